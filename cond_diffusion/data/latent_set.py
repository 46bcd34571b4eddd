"""A set's latents, computed once and kept: an autoencoder takes longer over a picture than a step of training does."""

import hashlib
from bisect import bisect_right
from itertools import accumulate

import torch
from accelerate import Accelerator
from jaxtyping import Float, Float16, Int64
from torch import Tensor

from cond_diffusion.data.cache import computed_once
from cond_diffusion.data.captions import CaptionGroup, chosen
from cond_diffusion.data.dataset import Candidates, CaptionedBatch, CaptionedFiles, Places
from cond_diffusion.errors import UserError
from cond_diffusion.files import cache_folder
from cond_diffusion.images import to_model
from cond_diffusion.models.latents import LatentSpace

PER_SHARD = 512  # pictures; 4 MB of their latents at 256 x 256 pixels
AT_ONCE = 32  # pictures that are moved to the accelerator


class LatentSet:
    """A set in latent space: row i, in one shard after the other, is x_0 of a picture with the captions of
    caption_groups[group_of[i]].
    """

    def __init__(
        self, shards: list[Float16[Tensor, "_ c h w"]], group_of: Int64[Tensor, " n"], groups: tuple[CaptionGroup, ...]
    ) -> None:
        self.shards = shards
        self.ends = list(accumulate(map(len, shards)))
        self.group_of = group_of
        self.caption_groups = groups

    def __len__(self) -> int:
        return len(self.group_of)

    def read(self, candidates: Candidates, places: Places) -> CaptionedBatch:
        """Gather the first candidates: those that could not be read are not in here."""
        rows = candidates(0)
        groups = [self.caption_groups[group] for group in self.group_of[rows].tolist()]
        return CaptionedBatch(
            torch.stack([self._row(row) for row in rows.tolist()]), chosen(groups, places.caption.tolist())
        )

    def _row(self, row: int) -> Float[Tensor, "c h w"]:
        shard = bisect_right(self.ends, row)
        return self.shards[shard][row - self.ends[shard]].float()


def latent_set(files: CaptionedFiles, vae: LatentSpace, accelerator: Accelerator) -> LatentSet:
    """Encode a set's pictures, each once, or find their latents on the disk; UserError if too many cannot be read.

    They are kept in half precision, which rounds them by less than a thousandth of themselves.
    """
    data = files.config
    settings = (vae.digest(), files.fingerprint(), data.resolution, data.channels, data.background)
    folder = cache_folder() / "latents" / hashlib.blake2b(repr(settings).encode(), digest_size=16).hexdigest()
    shape = vae.shape(data)

    def compute(rows: range) -> dict[str, Tensor]:
        images, read = files.decode(rows)
        files.decoder.check(aloud=True)  # of several processes each tells of the pictures that it reads
        parts = [
            vae.encode(to_model(part.to(accelerator.device))).half()
            for part in torch.from_numpy(images).split(AT_ONCE)
            if len(part)
        ]
        latents = torch.cat(parts) if parts else torch.empty(0, *shape, dtype=torch.float16)
        return {"latents": latents, "rows": torch.tensor(read, dtype=torch.int64)}

    shards = computed_once(folder, len(files), PER_SHARD, compute, accelerator, "encoding pictures")
    rows = torch.cat([shard["rows"] for shard in shards])
    lost = len(files) - len(rows)
    if lost > data.max_bad_fraction * len(files) or lost == len(files):
        raise UserError(
            f"data.source: {lost} of the {len(files)} pictures of {data.source} cannot be read; more than "
            f"data.max_bad_fraction ({data.max_bad_fraction})"
        )
    return LatentSet([shard["latents"] for shard in shards], files.group_of[rows], files.caption_groups)
