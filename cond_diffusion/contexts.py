"""The context of each unique caption, computed once: the text encoder is frozen, so training never asks it again.

Few captions are embedded anew by every process of every run, and lie in its memory. More of them go to the disk, in
safetensors that are mapped into memory and shared by the processes of a machine. Their folder is named by a hash of all
that decides the numbers in them - the encoder's weights, its tokenizer, `max_length`, the captions - so they cannot be
out of date.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm.auto import tqdm

from cond_diffusion.checkpoint import save_tensors
from cond_diffusion.errors import UserError, first_line
from cond_diffusion.text import TextEncoder

PER_SHARD = 1024  # captions; 0.25 GB of them for a CLIP of width 768 that reads 77 tokens
PER_BATCH = 256


Contexts = Callable[[Sequence[str]], Tensor]
"""captions -> their contexts: a `ContextTable`, or the encoder itself."""


class ContextTable:
    """Captions to their contexts.

    shards: the contexts, `PER_SHARD` captions in each but the last.
    """

    def __init__(self, captions: Sequence[str], shards: list[Float[Tensor, "_ l d"]]) -> None:
        self.row_of = {caption: row for row, caption in enumerate(captions)}
        self.shards = shards

    def __call__(self, captions: Sequence[str]) -> Float[Tensor, "b l d"]:
        """Look up the captions."""
        rows = [self.row_of[caption] for caption in captions]
        if len(self.shards) == 1:
            return self.shards[0][rows]
        return torch.stack([self.shards[row // PER_SHARD][row % PER_SHARD] for row in rows])


def embed(text_encoder: TextEncoder, captions: Sequence[str], *, progress: bool = True) -> Float[Tensor, "n l d"]:
    """Embed all `captions`, a batch at a time."""
    starts = tqdm(range(0, len(captions), PER_BATCH), desc="embedding captions", disable=not progress, leave=False)
    return torch.cat([text_encoder(captions[start : start + PER_BATCH]) for start in starts])


def context_table(text_encoder: TextEncoder, captions: Sequence[str], accelerator: Accelerator) -> ContextTable:
    """Embed each of the unique `captions`, or find them on the disk; the processes of a machine share the work.

    Raises UserError where they cannot be written.
    """
    progress = accelerator.is_main_process
    if len(captions) <= PER_SHARD:
        return ContextTable(captions, [embed(text_encoder, captions, progress=progress)])
    folder = cache_folder() / "contexts" / _key(text_encoder, captions)
    starts = range(0, len(captions), PER_SHARD)
    files = [folder / f"{number:05d}.safetensors" for number in range(len(starts))]
    mine = slice(accelerator.local_process_index, None, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    todo = [(start, file) for start, file in list(zip(starts, files, strict=True))[mine] if not _is_whole(file)]
    try:
        for start, file in tqdm(todo, desc="embedding captions", unit=" shards", disable=not progress, leave=False):
            contexts = embed(text_encoder, captions[start : start + PER_SHARD], progress=False)
            save_tensors({"contexts": contexts.cpu().contiguous()}, file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the captions' embeddings cannot be kept in {folder}: {first_line(error)}", of_this_process=True
        ) from error
    accelerator.wait_for_everyone()
    return ContextTable(captions, [load_file(file)["contexts"] for file in files])


def cache_folder() -> Path:
    """Return where this machine keeps what is computed once."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cond_diffusion"


def _is_whole(file: Path) -> bool:
    """Say whether `file` is there, and as long as it says it is."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _key(text_encoder: TextEncoder, captions: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    clip = text_encoder.clip.config
    digest.update(repr((clip.hidden_act, clip.num_attention_heads, clip.layer_norm_eps)).encode())
    for name, weight in text_encoder.clip.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().numpy().data)
    tokenizer = Tokenizer.from_str(text_encoder.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()  # how it was used last says nothing of what it is
    tokenizer.no_truncation()
    digest.update(tokenizer.to_str().encode())
    digest.update(repr((text_encoder.max_length, list(captions))).encode())
    return digest.hexdigest()
