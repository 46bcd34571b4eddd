"""On-disk cache of text embeddings and latents, as safetensors shards that processes share.

A cache folder is named by a hash of everything that determines its values, so entries never become stale. Shards that
were written before an interruption are not computed again.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Float16, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, distributed
from torch.utils.data import ConcatDataset
from tqdm.auto import tqdm

from cond_diffusion.data.dataset import Candidates, CaptionedBatch, CaptionedFiles, RandomDraws, rows_read
from cond_diffusion.data.sources import CaptionGroup, pick_captions
from cond_diffusion.device import processes_of_machine
from cond_diffusion.errors import UserError, first_line
from cond_diffusion.files import cache_folder, hash_weights, save_tensors
from cond_diffusion.images import to_model
from cond_diffusion.models.latents import LatentSpace
from cond_diffusion.models.text_encoder import TextEncoder, embed

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(days=7)  # until the slowest process has finished its shards

Tensors = dict[str, Tensor]


def cached_shards(
    folder: Path, count: int, per_shard: int, compute: Callable[[range], Tensors], accelerator: Accelerator, what: str
) -> list[Tensors]:
    """Load the shards of rows 0 to count - 1 from `folder`; compute and write those that are missing, from ranges of
    rows to their tensors. The processes of a machine share the work."""
    # A separate process group: the default one times out after some minutes. Created before the work starts, while all
    # processes are at the same point.
    group: Any = distributed.new_group(backend="gloo", timeout=TIMEOUT) if accelerator.num_processes > 1 else None
    starts = range(0, count, per_shard)
    files = [folder / f"{number:05d}.safetensors" for number in range(len(starts))]
    shards = [(range(start, min(start + per_shard, count)), file) for start, file in zip(starts, files, strict=True)]
    local_shards = shards[accelerator.local_process_index :: processes_of_machine()]
    missing = [(rows, file) for rows, file in local_shards if not _is_complete(file)]
    hidden = not (missing and accelerator.is_main_process)
    with tqdm(total=sum(len(rows) for rows, _ in missing), desc=what, disable=hidden, leave=False) as bar:
        for rows, file in missing:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in compute(rows).items()}
            try:
                save_tensors(tensors, file)
            except (OSError, SafetensorError) as error:
                hint = "set XDG_CACHE_HOME to another folder"
                message = f"{what}: the cache {folder} cannot be written ({first_line(error)}); {hint}"
                raise UserError(message, of_this_process=True) from error
            bar.update(len(rows))
    if group is not None:
        distributed.barrier(group)
    return [load_file(file) for file in files]


def _is_complete(file: Path) -> bool:
    """Return whether `file` exists and has the length that its header gives."""
    with suppress(OSError, SafetensorError), safe_open(file, "pt"):
        return True
    return False


CAPTIONS_PER_SHARD = 1024  # 0.25 GB for a CLIP of width 768 and 77 tokens

TextEmbedder = Callable[[Sequence[str]], Tensor]
"""Maps captions to text embeddings of shape (batch, length, dim): a `context_table` or a `TextEncoder`."""


def context_table(text_encoder: TextEncoder, captions: Sequence[str], accelerator: Accelerator) -> TextEmbedder:
    """Compute the embeddings of unique captions, or load them from the cache; return the function that looks them up.

    Up to `CAPTIONS_PER_SHARD` captions are embedded by each process and are not cached.
    """
    if len(captions) <= CAPTIONS_PER_SHARD:
        contexts = [embed(text_encoder, captions)]
    else:
        shards = cached_shards(
            cache_folder() / "contexts" / context_key(text_encoder, captions),
            len(captions),
            CAPTIONS_PER_SHARD,
            lambda rows: {"contexts": embed(text_encoder, captions[rows.start : rows.stop])},
            accelerator,
            "embedding captions",
        )
        contexts = [shard["contexts"] for shard in shards]
    row_of = {caption: row for row, caption in enumerate(captions)}

    def look_up(chosen: Sequence[str]) -> Float[Tensor, "b l d"]:
        rows = [row_of[caption] for caption in chosen]
        if len(contexts) == 1:  # three times as fast as a stack
            return contexts[0][rows]
        return torch.stack([contexts[row // CAPTIONS_PER_SHARD][row % CAPTIONS_PER_SHARD] for row in rows])

    return look_up


def context_key(text_encoder: TextEncoder, captions: Sequence[str]) -> str:
    """Return a hash of all that determines the embeddings of captions."""
    digest = hashlib.blake2b(digest_size=16)
    clip = text_encoder.clip.config
    digest.update(repr((clip.hidden_act, clip.num_attention_heads, clip.layer_norm_eps)).encode())
    hash_weights(digest, text_encoder.clip.state_dict().items())
    tokenizer = Tokenizer.from_str(text_encoder.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()  # padding and truncation depend on the last call, not on the tokenizer
    tokenizer.no_truncation()
    digest.update(tokenizer.to_str().encode())
    digest.update(repr((text_encoder.max_length, list(captions))).encode())
    if text_encoder.split_phrases:
        digest.update(b"split_phrases")
    return digest.hexdigest()


IMAGES_PER_SHARD = 512  # 4 MB of latents at 256 x 256 pixels
IMAGE_BATCH_SIZE = 32  # images that are moved to the accelerator at once


@dataclass(frozen=True, eq=False)
class LatentSet:
    """A dataset in latent space.

    Attributes:
        x_0: The images' latents, which stay on the disk until they are read.
        group_of: Row i has the captions `caption_groups[group_of[i]]`.
        is_read: Which rows of the source the rows are; None for all.
    """

    x_0: ConcatDataset[Float16[Tensor, "c h w"]]
    group_of: Int64[Tensor, " n"]
    caption_groups: tuple[CaptionGroup, ...]
    is_read: Bool[Tensor, " rows"] | None = None

    def __len__(self) -> int:
        return len(self.group_of)

    def read(self, candidates: Candidates, draws: RandomDraws) -> CaptionedBatch:
        """Return the rows of `candidates(0)`; unreadable images are not in the set."""
        rows = candidates(0)
        groups = [self.caption_groups[group] for group in self.group_of[rows].tolist()]
        x_0 = torch.stack([self.x_0[row] for row in rows.tolist()]).float()
        return CaptionedBatch(x_0, pick_captions(groups, draws.caption.tolist()))


def latent_set(files: CaptionedFiles, vae: LatentSpace, accelerator: Accelerator) -> LatentSet:
    """Encode each image of a dataset once, or load the latents from the cache.

    Latents are stored in half precision, a relative rounding error below 1e-3.
    """
    data = files.config
    settings = (vae.digest(), files.fingerprint(), data.resolution, data.channels, data.background)
    folder = cache_folder() / "latents" / hashlib.blake2b(repr(settings).encode(), digest_size=16).hexdigest()
    shape = vae.shape(data)

    def compute(rows: range) -> Tensors:
        images, read = files.decode(rows)
        files.decoder.check()  # each process reports the images of its own shards
        parts = [
            vae.encode(to_model(part.to(accelerator.device))).half()
            for part in torch.from_numpy(images).split(IMAGE_BATCH_SIZE)
            if len(part)
        ]
        latents = torch.cat(parts) if parts else torch.empty(0, *shape, dtype=torch.float16)
        return {"latents": latents, "rows": torch.tensor(read, dtype=torch.int64)}

    shards = cached_shards(folder, len(files), IMAGES_PER_SHARD, compute, accelerator, "encoding images")
    rows = torch.cat([shard["rows"] for shard in shards])
    lost = len(files) - len(rows)
    if lost > data.max_bad_fraction * len(files) or lost == len(files):
        raise UserError(
            f"data.source: {lost} of {len(files)} images of {data.source} cannot be read, more than "
            f"data.max_bad_fraction ({data.max_bad_fraction})"
        )
    if lost:
        message = "data.source: %d of %d images were unreadable when their latents were cached; delete %s to try again"
        logger.warning(message, lost, len(files), folder)
    latents = ConcatDataset([cast(Any, shard["latents"]) for shard in shards])
    return LatentSet(latents, files.group_of[rows], files.caption_groups, rows_read(rows, len(files)))
