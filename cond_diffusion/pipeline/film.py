"""A film of the chain: x_t on the left, the x_0_hat that it is heading for on the right."""

from pathlib import Path

from PIL import Image

from cond_diffusion.diffusion.samplers import Step
from cond_diffusion.errors import UserError, first_line
from cond_diffusion.images import enlarged, grid, to_pillow

FRAMES = 60
FRAME_MS, LAST_FRAME_MS = 80, 2000
WIDTH = 84  # pixels that a picture is at least wide


class Film:
    """Is told of each step as a `Watch`, and keeps up to `FRAMES` of them, evenly spaced, the last one among them."""

    def __init__(self) -> None:
        self.frames: list[tuple[list[Image.Image], list[Image.Image]]] = []
        self.next_frame = 0

    def __call__(self, step: Step, number: int, total: int) -> None:
        if number == 0:
            self.next_frame = 0  # of another batch, whose pictures stand behind those of the ones before
        count = min(FRAMES, total)
        if number != round((self.next_frame + 1) * total / count) - 1:
            return
        if self.next_frame == len(self.frames):
            self.frames.append(([], []))
        left, right = self.frames[self.next_frame]
        left += to_pillow(step.x)
        right += to_pillow(step.x_0_hat)
        self.next_frame += 1

    def save(self, path: Path, columns: int) -> None:
        """Write an animation, GIF or WebP by the path's suffix."""
        sheets = [_side_by_side(*(_sheet(half, columns) for half in frame)) for frame in self.frames]
        durations = [FRAME_MS] * (len(sheets) - 1) + [LAST_FRAME_MS]
        try:
            sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=durations, loop=0)
        except (ValueError, RuntimeError, OverflowError, OSError) as error:  # too large for WebP (16383) or GIF (65535)
            width, height = sheets[0].size
            raise UserError(
                f"--film: {path}, {width} x {height} pixels, cannot be written ({first_line(error)}); "
                "ask for fewer pictures"
            ) from error


def _sheet(pictures: list[Image.Image], columns: int) -> Image.Image:
    return grid([enlarged(picture, WIDTH).convert("RGB") for picture in pictures], columns)


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (2 * left.width + 8, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + 8, 0))
    return both
