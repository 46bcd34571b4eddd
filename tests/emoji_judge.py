"""Train the judge of the emoji evaluation anew: `python tests/emoji_judge.py FILE`.

The figures that were measured with the shipped weights do not compare with those of new ones. With `--check`, it is
trained on the training split alone, and recognizes the concepts of held-out pairs: how far it generalizes over styles.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from cond_diffusion.evaluation.emoji import SUBSETS, Emoji, EmojiImages, EmojiJudge, recognized
from cond_diffusion.evaluation.metrics import digest
from cond_diffusion.images import to_bytes, to_model
from cond_diffusion.seeding import sample_indices

EPOCHS, BATCH_SIZE, LEARNING_RATE = 25, 128, 3e-3


def distorted(images: Tensor) -> Tensor:
    """Return images in [-1, 1], randomly shifted, scaled, rotated by a few degrees, blurred and noisy, on white."""
    count = len(images)
    angle = (torch.rand(count) - 0.5) * 0.3
    scale = 1 + (torch.rand(count) - 0.5) * 0.4
    shift = (torch.rand(count, 2, 1) - 0.5) * 0.3
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(-1, 2, 2)
    places = F.affine_grid(torch.cat([scale[:, None, None] * rotation, shift], 2), [*images.shape], align_corners=False)
    moved = F.grid_sample(images - 1, places, align_corners=False) + 1  # outside is 0, which is white here
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), value=1.0), 3, 1)
    strength = torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.5)
    noise = torch.randn_like(images) * torch.rand(count, 1, 1, 1) * 0.15
    return (moved.lerp(blurred, strength) + noise).clamp(-1, 1)


def train_judge(emoji: Emoji, data: EmojiImages) -> EmojiJudge:
    """Train on `data` with a one-cycle learning rate."""
    torch.manual_seed(0)
    judge = EmojiJudge(len(emoji.concepts), len(emoji.styles))
    steps = EPOCHS * len(data) // BATCH_SIZE
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for step in tqdm(range(steps), unit=" steps"):
        rows = sample_indices(len(data), 0, step * BATCH_SIZE, BATCH_SIZE)
        concepts, styles = judge.logits(distorted(to_model(data.images[rows])))
        loss = F.cross_entropy(concepts, data.concept[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        (loss + F.cross_entropy(styles, data.style[rows])).backward()
        optimizer.step()
        scheduler.step()
    return judge.eval()


def main() -> None:
    file, check = Path(sys.argv[1]), "--check" in sys.argv
    emoji = Emoji()
    everything = EmojiImages(
        *(torch.cat([getattr(x, name) for x in (emoji.train, emoji.test)]) for name in ("images", "concept", "style")),
        [*emoji.train.prompts, *emoji.test.prompts],
    )
    judge = train_judge(emoji, emoji.train if check else everything)
    save_model(judge.half(), str(file))
    judge = EmojiJudge.load(file)
    print(f"{digest(judge)}, {file.stat().st_size} bytes")
    for name in SUBSETS:
        images = emoji.subset(name, len(emoji.train))
        print(name, recognized(judge, emoji, images))
        torch.manual_seed(1)
        noisy = to_bytes(distorted(to_model(images.images)))
        print(name, "distorted", recognized(judge, emoji, replace(images, images=noisy)))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
