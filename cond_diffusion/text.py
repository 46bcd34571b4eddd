"""Captions to context: a frozen CLIP text encoder, used as Stable Diffusion uses it.

A caption is tokenized, padded to `max_length`, and encoded; the context is CLIP's `last_hidden_state`, all `max_length`
tokens of it, without a mask. The context of the empty caption is the *null context* of classifier-free guidance.

CLIP: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from cond_diffusion.errors import UserError, first_line
from cond_diffusion.hub import WEIGHTS, variant_of

BUILT_IN_ENCODER = Path(__file__).parent / "assets" / "mnist_clip"


@dataclass(frozen=True)
class TextConfig:
    """Which CLIP reads the captions.

    encoder: "builtin" (the small CLIP that comes with the package), a hub id such as openai/clip-vit-base-patch32, or a
        folder in transformers' or diffusers' layout.
    max_length: the number of tokens that every caption is padded or cut to, the two marks at its ends included. CLIP is
        causal, so the first tokens' embeddings do not depend on it.
    """

    encoder: str = "builtin"
    max_length: int = 77

    def __post_init__(self) -> None:
        if self.max_length < 3:
            raise UserError(f"text.max_length: {self.max_length} must be at least 3: a word between the two marks")


class TextEncoder(nn.Module):
    """A frozen CLIP text model with its tokenizer: captions in, context out."""

    def __init__(self, tokenizer: CLIPTokenizer, clip: CLIPTextModel, max_length: int | None) -> None:
        super().__init__()
        positions: int = clip.config.max_position_embeddings
        if max_length is None:  # what the tokenizer was stored with, as diffusers does
            max_length = min(tokenizer.model_max_length, positions)
        if max_length > positions:
            raise UserError(f"text.max_length: {max_length} is more than the encoder's {positions} positions")
        self.tokenizer = tokenizer
        self.clip = clip.requires_grad_(False)
        self.max_length = max_length
        self.eval()

    @classmethod
    def from_pretrained(cls, source: str | Path, max_length: int | None) -> "TextEncoder":
        """Load from "builtin", a folder or a hub id; raise UserError if it is none or cannot be reached.

        max_length: None takes the length that the tokenizer was saved with.
        """
        folder = BUILT_IN_ENCODER if source == "builtin" else Path(source)
        # diffusers' layout keeps the two halves in folders of their own, transformers' in one.
        in_two = (folder / "text_encoder").is_dir()
        where = {name: str(folder / name if in_two else folder) for name in ("text_encoder", "tokenizer")}
        variant = variant_of(Path(where["text_encoder"]), WEIGHTS["text_encoder"])
        if not folder.is_dir():
            where = dict.fromkeys(where, str(source))
        try:
            kind = AutoConfig.from_pretrained(where["text_encoder"]).model_type
            if kind not in ("clip", "clip_text_model"):
                raise UserError(f"text.encoder: {source} is a {kind!r} model; expected a CLIP")
            with quiet_transformers():
                tokenizer = CLIPTokenizer.from_pretrained(where["tokenizer"])
                # fp32, whatever it was stored in: what training reads, and what a CPU is fast at.
                loaded = CLIPTextModel.from_pretrained(
                    where["text_encoder"],
                    variant=variant,
                    use_safetensors=True,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
                clip, report = cast(tuple[CLIPTextModel, dict[str, Any]], loaded)
        except UserError:
            raise
        except OSError as error:
            if folder.is_dir():
                raise UserError(f"text.encoder: {source} holds no whole CLIP: {first_line(error)}") from error
            raise UserError(
                f"text.encoder: cannot load {source}: there is no such folder, and the hub does not give it "
                f"({first_line(error)}); use text.encoder=builtin, or download it elsewhere and give "
                "the folder"
            ) from error
        except Exception as error:  # transformers, tokenizers and safetensors each raise their own for a bad file
            raise UserError(
                f"text.encoder: {source}: a file is damaged, was cut short or is no CLIP's: {first_line(error)}"
            ) from error
        # Transformers would go on with random weights in their place, and with a tokenizer that knows no words.
        if missing := sorted(report["missing_keys"]):
            raise UserError(f"text.encoder: {source} lacks {len(missing)} of CLIP's weights, {missing[0]} among them")
        if len(tokenizer) != clip.config.vocab_size:
            raise UserError(
                f"text.encoder: {source}: the tokenizer has {len(tokenizer)} tokens, the CLIP {clip.config.vocab_size}"
            )
        return cls(tokenizer, clip, max_length)

    def save_pretrained(self, folder: Path) -> None:
        """Write `text_encoder/` and `tokenizer/` as diffusers lays them out."""
        # Stored with the tokenizer, where diffusers looks for the length to pad to.
        self.tokenizer.model_max_length = self.max_length
        with quiet_transformers():
            self.clip.save_pretrained(folder / "text_encoder")
            self.tokenizer.save_pretrained(folder / "tokenizer")

    def train(self, mode: bool = True) -> "TextEncoder":
        """Stay in eval mode: frozen means frozen, whatever the module around it is told."""
        del mode
        return super().train(False)

    @property
    def context_dim(self) -> int:
        """The width d of the context."""
        return self.clip.config.hidden_size

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Float[Tensor, "b l d"]:
        """Encode the captions; those longer than `max_length` tokens are cut."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        ids: Any = tokens["input_ids"]
        return self.clip(ids.to(self.clip.device))[0]

    def words_cut(self, caption: str) -> str:
        """Return the end of `caption` that does not fit into `max_length` tokens; empty when all of it fits."""
        encoding = self.tokenizer(caption, return_offsets_mapping=True, add_special_tokens=False)
        offsets: Any = encoding["offset_mapping"]
        room = self.max_length - 2
        return "" if len(offsets) <= room else caption[offsets[room][0] :]

    def cut(self, captions: Sequence[str]) -> list[str]:
        """Return those of the captions that are longer than `max_length` tokens."""
        tokens = self.tokenizer(list(captions), add_special_tokens=False, verbose=False)
        ids: Any = tokens["input_ids"]
        return [
            caption for caption, of_caption in zip(captions, ids, strict=True) if len(of_caption) > self.max_length - 2
        ]

    def words(self, prompt: str) -> list[tuple[str, list[int]]]:
        """Return each word of the prompt that is read, with the places of its tokens in the context."""
        encoding = self.tokenizer(prompt, return_offsets_mapping=True, add_special_tokens=False)
        offsets: Any = encoding["offset_mapping"]
        offsets = offsets[: self.max_length - 2]
        found = []
        for word in re.finditer(r"\S+", prompt):
            # Place 0 is the mark that every caption begins with.
            tokens = [i + 1 for i, (start, end) in enumerate(offsets) if start < word.end() and end > word.start()]
            if tokens:
                found.append((word.group(), tokens))
        return found


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own bars, and its report that a CLIP's vision half is left out, which is what we want."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
