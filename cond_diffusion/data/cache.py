"""What is computed once and kept on disk: text embeddings and latents, as safetensors that processes share.

A folder is named by a hash of all that decides the numbers in it, so they cannot be out of date. What was written
before an interruption is not computed again.
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Float16, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, distributed
from tqdm.auto import tqdm

from cond_diffusion.data.dataset import Candidates, CaptionedBatch, CaptionedFiles, RandomDraws
from cond_diffusion.data.sources import CaptionGroup, pick_captions
from cond_diffusion.device import is_main_process
from cond_diffusion.errors import UserError, first_line
from cond_diffusion.files import cache_folder, hash_weights, save_tensors
from cond_diffusion.images import to_model
from cond_diffusion.models.latents import LatentSpace
from cond_diffusion.models.text_encoder import TextEncoder

PATIENCE = timedelta(days=7)  # for the others to finish their share

Tensors = dict[str, Tensor]


def cached_shards(
    folder: Path, count: int, per_shard: int, compute: Callable[[range], Tensors], accelerator: Accelerator, what: str
) -> list[Tensors]:
    """Return the tensors of rows 0 to count - 1, `per_shard` rows at a time, out of `folder`; `compute` those that are
    not there yet. The processes of a machine share the work.

    what: in words, for the progress bar and for the UserError where they cannot be written.
    """
    # A group of its own, made while all are here: the one that gradients go through gives up after some minutes.
    waiting: Any = distributed.new_group(backend="gloo", timeout=PATIENCE) if accelerator.num_processes > 1 else None
    parts = [range(start, min(start + per_shard, count)) for start in range(0, count, per_shard)]
    files = [folder / f"{number:05d}.safetensors" for number in range(len(parts))]
    mine = slice(accelerator.local_process_index, None, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    todo = [(rows, file) for rows, file in list(zip(parts, files, strict=True))[mine] if not _is_whole(file)]
    hidden = not (todo and accelerator.is_main_process)
    with tqdm(total=sum(len(rows) for rows, _ in todo), desc=what, disable=hidden, leave=False) as bar:
        for rows, file in todo:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in compute(rows).items()}
            try:
                save_tensors(tensors, file)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{what}: cannot be kept in {folder}: {first_line(error)}", of_this_process=True
                ) from error
            bar.update(len(rows))
    if waiting is not None:
        distributed.barrier(waiting)
    return [load_file(file) for file in files]


def _is_whole(file: Path) -> bool:
    """Say whether `file` is there, and as long as it says it is."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


CAPTIONS_PER_SHARD = 1024  # 0.25 GB of them for a CLIP of width 768 that reads 77 tokens
CAPTIONS_AT_ONCE = 256


TextEmbedder = Callable[[Sequence[str]], Tensor]
"""captions -> their contexts: a `ContextTable`, or the encoder itself."""


class ContextTable:
    """Captions to their contexts.

    shards: the contexts, `CAPTIONS_PER_SHARD` captions in each but the last.
    """

    def __init__(self, captions: Sequence[str], shards: list[Float[Tensor, "_ l d"]]) -> None:
        self.row_of = {caption: row for row, caption in enumerate(captions)}
        self.shards = shards

    def __call__(self, captions: Sequence[str]) -> Float[Tensor, "b l d"]:
        """Look up the captions."""
        rows = [self.row_of[caption] for caption in captions]
        if len(self.shards) == 1:
            return self.shards[0][rows]
        return torch.stack([self.shards[row // CAPTIONS_PER_SHARD][row % CAPTIONS_PER_SHARD] for row in rows])


def embed(text_encoder: TextEncoder, captions: Sequence[str]) -> Float[Tensor, "n l d"]:
    """Embed all `captions`, a batch at a time."""
    starts = tqdm(
        range(0, len(captions), CAPTIONS_AT_ONCE),
        desc="embedding captions",
        disable=len(captions) <= CAPTIONS_AT_ONCE or not is_main_process(),
        leave=False,
    )
    return torch.cat([text_encoder(captions[start : start + CAPTIONS_AT_ONCE]) for start in starts])


def context_table(text_encoder: TextEncoder, captions: Sequence[str], accelerator: Accelerator) -> ContextTable:
    """Embed each of the unique `captions`, or find them on the disk; the processes of a machine share the work.

    Raises UserError where they cannot be written.
    """
    if len(captions) <= CAPTIONS_PER_SHARD:
        return ContextTable(captions, [embed(text_encoder, captions)])
    folder = cache_folder() / "contexts" / _key(text_encoder, captions)

    def compute(rows: range) -> dict[str, Tensor]:
        return {"contexts": embed(text_encoder, captions[rows.start : rows.stop])}

    shards = cached_shards(folder, len(captions), CAPTIONS_PER_SHARD, compute, accelerator, "embedding captions")
    return ContextTable(captions, [shard["contexts"] for shard in shards])


def _key(text_encoder: TextEncoder, captions: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    clip = text_encoder.clip.config
    digest.update(repr((clip.hidden_act, clip.num_attention_heads, clip.layer_norm_eps)).encode())
    hash_weights(digest, text_encoder.clip.state_dict().items())
    tokenizer = Tokenizer.from_str(text_encoder.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()  # how it was used last says nothing of what it is
    tokenizer.no_truncation()
    digest.update(tokenizer.to_str().encode())
    digest.update(repr((text_encoder.max_length, list(captions))).encode())
    return digest.hexdigest()


IMAGES_PER_SHARD = 512  # 4 MB of latents at 256 x 256 pixels
IMAGES_AT_ONCE = 32  # moved to the accelerator


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

    def read(self, candidates: Candidates, draws: RandomDraws) -> CaptionedBatch:
        """Gather the first candidates: those that could not be read are not in here."""
        rows = candidates(0)
        groups = [self.caption_groups[group] for group in self.group_of[rows].tolist()]
        return CaptionedBatch(
            torch.stack([self._row(row) for row in rows.tolist()]), pick_captions(groups, draws.caption.tolist())
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
        files.decoder.check()  # of several processes each tells of the pictures that it reads
        parts = [
            vae.encode(to_model(part.to(accelerator.device))).half()
            for part in torch.from_numpy(images).split(IMAGES_AT_ONCE)
            if len(part)
        ]
        latents = torch.cat(parts) if parts else torch.empty(0, *shape, dtype=torch.float16)
        return {"latents": latents, "rows": torch.tensor(read, dtype=torch.int64)}

    shards = cached_shards(folder, len(files), IMAGES_PER_SHARD, compute, accelerator, "encoding pictures")
    rows = torch.cat([shard["rows"] for shard in shards])
    lost = len(files) - len(rows)
    if lost > data.max_bad_fraction * len(files) or lost == len(files):
        raise UserError(
            f"data.source: {lost} of the {len(files)} pictures of {data.source} cannot be read; more than "
            f"data.max_bad_fraction ({data.max_bad_fraction})"
        )
    return LatentSet([shard["latents"] for shard in shards], files.group_of[rows], files.caption_groups)
