"""Captions to context: a frozen CLIP text encoder, used as Stable Diffusion uses it.

A caption is tokenized, padded to `max_length`, and encoded; the context is CLIP's `last_hidden_state`, all `max_length`
tokens of it, without a mask. The context of the empty caption is the *null context* of classifier-free guidance.

CLIP: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from cond_diffusion.errors import UserError, first_line
from cond_diffusion.hub import WEIGHTS, download, is_hub_id, variant_of

BUILT_IN_ENCODER = Path(__file__).parent.parent / "assets" / "mnist_clip"
# A whole CLIP in transformers' layout, or the two folders of it in diffusers'.
CLIP_FILES = [
    *("config.json", WEIGHTS["text_encoder"], "tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("preprocessor_config.json", "processor_config.json"),
    *("text_encoder/config.json", f"text_encoder/{WEIGHTS['text_encoder']}", "tokenizer/*.json", "tokenizer/*.txt"),
]

Clip = TypeVar("Clip", CLIPTextModel, CLIPModel)


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
        with clip_errors("text.encoder", source):
            folder = find_clip(source)
            # diffusers' layout keeps the two halves in folders of their own, transformers' in one.
            in_two = (folder / "text_encoder").is_dir()
            where = folder / "text_encoder" if in_two else folder
            if (kind := clip_kind(where)) not in ("clip", "clip_text_model"):
                raise UserError(f"it is a {kind!r} model; expected a CLIP")
            clip = load_clip(CLIPTextModel, where)
            tokenizer = load_tokenizer(folder / "tokenizer" if in_two else folder)
            if len(tokenizer) != clip.config.vocab_size:
                raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the CLIP {clip.config.vocab_size}")
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

    def tokenize(self, captions: Sequence[str]) -> tuple[Int64[Tensor, "b l"], list[str]]:
        """Return the token ids, padded to `max_length`, and the end of each caption that does not fit ("" if all does).

        A caption that is too long is cut.
        """
        found = self.tokenizer([*captions], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens: Any = found["input_ids"]
        offsets: Any = found["offset_mapping"]
        room, mark = self.max_length - 2, self.tokenizer
        ids = torch.full((len(captions), self.max_length), cast(int, mark.pad_token_id))
        for row, own in zip(ids, tokens, strict=True):
            marked = [mark.bos_token_id, *own[:room], mark.eos_token_id]
            row[: len(marked)] = torch.tensor(marked)
        rows = zip(captions, offsets, strict=True)
        return ids, [caption[own[room][0] :] if len(own) > room else "" for caption, own in rows]

    @torch.no_grad()
    def embed(self, ids: Int64[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """Encode token ids."""
        return self.clip(ids.to(self.clip.device))[0]

    def forward(self, captions: Sequence[str]) -> Float[Tensor, "b l d"]:
        """Encode the captions; those longer than `max_length` tokens are cut."""
        return self.embed(self.tokenize(captions)[0])

    def cut(self, captions: Sequence[str]) -> list[str]:
        """Return those of the captions that are longer than `max_length` tokens."""
        return [caption for caption, rest in zip(captions, self.tokenize(captions)[1], strict=True) if rest]

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


def find_clip(source: str | Path) -> Path:
    """Return the folder of "builtin", of a folder, or of a hub id, which is downloaded."""
    folder = BUILT_IN_ENCODER if source == "builtin" else Path(source)
    if not folder.is_dir() and not is_hub_id(source):
        raise UserError("there is no such folder")
    return folder if folder.is_dir() else download(str(source), CLIP_FILES)


def clip_kind(folder: Path) -> str:
    """Return the model type that `config.json` names.

    The JSON is read here, not by transformers' Auto classes: those run code of the repository if a user agrees.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError("it has an adapter beside its weights (adapter_config.json); merge it into them first")
    config = json.loads((folder / "config.json").read_text())
    return str(config.get("model_type")) if isinstance(config, dict) else "damaged"


def load_clip(kind: type[Clip], folder: Path) -> Clip:
    """Load weights in fp32, whatever they are stored in; raise UserError where some are missing."""
    with quiet_transformers():
        loaded = kind.from_pretrained(
            folder,
            variant=variant_of(folder, WEIGHTS["text_encoder"]),
            use_safetensors=True,
            dtype=torch.float32,
            # Given, so that a config cannot name an attention kernel on the hub, which is code.
            attn_implementation="sdpa",
            trust_remote_code=False,
            output_loading_info=True,
        )
    clip, report = cast(tuple[Clip, dict[str, Any]], loaded)
    # Transformers would go on with random weights in their place.
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"it lacks {len(missing)} of CLIP's weights, {missing[0]} among them")
    return clip


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    with quiet_transformers():
        return CLIPTokenizer.from_pretrained(folder, trust_remote_code=False)


@contextmanager
def clip_errors(key: str, source: str | Path) -> Iterator[None]:
    """Turn what transformers, tokenizers and safetensors raise into a UserError that names key and source."""
    try:
        yield
    except UserError as error:
        hint = "" if Path(source).is_dir() else "; or use text.encoder=builtin"
        raise UserError(f"{key}: {source}: {error}{hint}") from error
    except OSError as error:
        raise UserError(f"{key}: {source} is not a complete CLIP: {first_line(error)}") from error
    except Exception as error:  # each of these libraries raises exceptions of its own for a bad file
        raise UserError(
            f"{key}: {source}: a file is damaged, was cut short or is no CLIP's: {first_line(error)}"
        ) from error


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


def embed_images(clip: CLIPModel, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """Embed images that are preprocessed for this CLIP."""
    output: Any = clip.get_image_features(pixel_values=images)
    return output.pooler_output


def embed_texts(
    clip: CLIPModel, tokenizer: CLIPTokenizer, captions: Sequence[str], max_length: int
) -> Float[Tensor, "b d"]:
    """Embed captions, truncated and padded to `max_length`."""
    tokens = tokenizer([*captions], padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")
    output: Any = clip.get_text_features(input_ids=tokens["input_ids"].to(clip.device))
    return output.pooler_output
