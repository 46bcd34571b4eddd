"""The context of each unique caption, computed once: the text encoder is frozen, so training never asks it again.

Few captions are embedded anew by every process of every run, and lie in its memory. More of them go to the disk, in a
folder that is named by the encoder's weights, its tokenizer, `max_length` and the captions (`shards.py`).
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor
from tqdm.auto import tqdm

from cond_diffusion.data.cache import computed_once
from cond_diffusion.files import cache_folder, hash_weights
from cond_diffusion.models.text_encoder import TextEncoder

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

    def compute(rows: range) -> dict[str, Tensor]:
        return {"contexts": embed(text_encoder, captions[rows.start : rows.stop], progress=False)}

    shards = computed_once(folder, len(captions), PER_SHARD, compute, accelerator, "embedding captions")
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
