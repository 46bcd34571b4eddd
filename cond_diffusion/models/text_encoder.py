"""A frozen CLIP text encoder that maps captions to the context of the UNet, as in Stable Diffusion.

A caption is tokenized and padded to `max_length`; the context is CLIP's `last_hidden_state` of all `max_length` tokens,
without a mask. The context of the empty caption is the *null context* of classifier-free guidance.

With `split_phrases`, the phrases of a caption, which commas separate, are encoded independently, each between its own
start and end token. The embedding of "3d style" is then the same in every caption, and no token stands for a pair of a
subject and a style, by which a network can memorize a training image. BREAK in web UIs is similar.

CLIP: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from cond_diffusion.config.schema import Depth, PositiveFloat, Width, from_json, read_json
from cond_diffusion.device import autocast, is_main_process
from cond_diffusion.errors import UserError, first_line
from cond_diffusion.files import check_finite
from cond_diffusion.hub import WEIGHTS, download, is_hub_id, variant_of

ASSETS = Path(__file__).parent.parent / "assets"
BUILT_IN_ENCODER = ASSETS / "mnist_clip"
BUILT_IN_ENCODERS = {"builtin": BUILT_IN_ENCODER, "emoji": ASSETS / "emoji_model"}  # by the name in `text.encoder`
# A CLIP in transformers' layout, or the two folders of diffusers' layout.
CLIP_FILES = [
    *("config.json", WEIGHTS["text_encoder"], "tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("preprocessor_config.json", "processor_config.json"),
    *("text_encoder/config.json", f"text_encoder/{WEIGHTS['text_encoder']}", "tokenizer/*.json", "tokenizer/*.txt"),
]

PHRASE = re.compile(r"(?:[^,]|(?<=\d),(?=\d))+")  # text without a comma, except between digits

CAPTION_BATCH_SIZE = 256

Clip = TypeVar("Clip", CLIPTextModel, CLIPModel)


@dataclass(frozen=True)
class EncoderConfig:
    """The fields of CLIP's `config.json` that decide the size of an encoder and its values, with their defaults."""

    hidden_size: Width = 512
    intermediate_size: Width = 2048
    num_hidden_layers: Depth = 12
    num_attention_heads: Width = 8
    layer_norm_eps: PositiveFloat = 1e-5
    max_position_embeddings: Annotated[int, Field(ge=3, le=2**20)] = 77
    vocab_size: Width = 49408
    projection_dim: Width = 512
    patch_size: Width = 32
    image_size: Width = 224
    num_channels: Width = 3
    split_phrases: bool = False  # of this package


class TextEncoder(nn.Module):
    """A frozen CLIP text model with its tokenizer.

    Args:
        tokenizer: The tokenizer of the CLIP.
        clip: The text model.
        max_length: Number of tokens to pad and truncate to; None for the length stored in the tokenizer.
        split_phrases: Encode the phrases of a caption independently; None for what is stored in the model's config.
    """

    def __init__(
        self, tokenizer: CLIPTokenizer, clip: CLIPTextModel, max_length: int | None, split_phrases: bool | None = None
    ) -> None:
        super().__init__()
        positions: int = clip.config.max_position_embeddings
        if max_length is None:  # as in diffusers
            max_length = min(tokenizer.model_max_length, positions)
        if max_length > positions:
            raise UserError(f"text.max_length: {max_length} exceeds the {positions} positions of the encoder")
        self.tokenizer = tokenizer
        self.clip = clip.requires_grad_(False)
        self.max_length = max_length
        stored = bool(getattr(clip.config, "split_phrases", False))
        self.split_phrases = stored if split_phrases is None else split_phrases
        self.eval()

    @classmethod
    def from_pretrained(
        cls, source: str | Path, max_length: int | None, split_phrases: bool | None = None
    ) -> "TextEncoder":
        """Load a text encoder.

        Args:
            source: "builtin", "emoji", a folder or a Hub id.
            max_length: Number of tokens; None for the length stored in the tokenizer.
            split_phrases: Encode phrases independently; None for what is stored in the model's config.

        Raises:
            UserError: If the source is not a CLIP, or cannot be read or downloaded.
        """
        with clip_errors("text.encoder", source):
            clip_folder = tokenizer_folder = find_clip(source)
            if (clip_folder / "text_encoder").is_dir():  # diffusers' layout, not transformers'
                clip_folder, tokenizer_folder = clip_folder / "text_encoder", clip_folder / "tokenizer"
            if (kind := clip_kind(clip_folder)) not in ("clip", "clip_text_model"):
                raise UserError(f"the model type is {kind!r}; expected clip or clip_text_model")
            clip = load_clip(CLIPTextModel, clip_folder)
            tokenizer = load_tokenizer(tokenizer_folder, clip.config.vocab_size)
        return cls(tokenizer, clip, max_length, split_phrases)

    def save_pretrained(self, folder: Path) -> None:
        """Write `text_encoder/` and `tokenizer/` in diffusers' layout."""
        # diffusers pads to the length that is stored in the tokenizer.
        self.tokenizer.model_max_length = self.max_length
        if self.split_phrases or hasattr(self.clip.config, "split_phrases"):
            self.clip.config.split_phrases = self.split_phrases
        with quiet_transformers():
            self.clip.save_pretrained(folder / "text_encoder")
            save_tokenizer(self.tokenizer, folder / "tokenizer")

    def train(self, mode: bool = True) -> "TextEncoder":
        """Keep the encoder in eval mode even if the parent module is set to train mode."""
        return super().train(False)

    @property
    def context_dim(self) -> int:
        """Width d of the context."""
        return self.clip.config.hidden_size

    def tokenize(self, captions: Sequence[str]) -> tuple[Int64[Tensor, "b l"], list[str]]:
        """Return the ids of captions, padded and truncated to `max_length`, and the part of each that was truncated (""
        if none)."""
        bos, eos, limit = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.max_length - 2
        ids = torch.full((len(captions), self.max_length), cast(int, self.tokenizer.pad_token_id))
        rests = []
        for row, caption, tokens in zip(ids, captions, self._tokens_with_spans(captions), strict=True):
            marked = [bos, *(token for token, _ in tokens[:limit]), eos]
            row[: len(marked)] = torch.tensor(marked)
            rests.append(caption[tokens[limit][1][0] :] if len(tokens) > limit else "")
        return ids, rests

    def _tokens_with_spans(self, captions: Sequence[str]) -> Iterator[list[tuple[int, tuple[int, int]]]]:
        """Yield the tokens of each caption, without the marks at its ends, each with the characters that it spans.

        With `split_phrases`, an end and a start token, which span no characters, stand between two phrases.
        """
        for start in range(0, len(captions), CAPTION_BATCH_SIZE):
            yield from self._tokens_of_batch(captions[start : start + CAPTION_BATCH_SIZE])

    def _tokens_of_batch(self, captions: Sequence[str]) -> list[list[tuple[int, tuple[int, int]]]]:
        split = find_phrases if self.split_phrases else lambda caption: [(0, caption)]
        phrases = [split(caption) or [(0, "")] for caption in captions]  # of each, its first character's index, and it
        texts = [text for of_caption in phrases for _, text in of_caption]
        encoding: Any = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        encoded = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        rows = []
        for of_caption in phrases:
            row: list[tuple[int, tuple[int, int]]] = []
            for number, (offset, _) in enumerate(of_caption):
                if number > 0:
                    for mark in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
                        row.append((cast(int, mark), (offset, offset)))
                tokens, spans = next(encoded)
                row += [
                    (token, (offset + start, offset + end)) for token, (start, end) in zip(tokens, spans, strict=True)
                ]
            rows.append(row)
        return rows

    def unknown_words(self, captions: Sequence[str]) -> list[str]:
        """Return the words that are split into tokens of fewer than two letters on average: unknown ones."""
        words = distinct_words(captions)
        tokens: Any = self.tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"] if words else []
        return [word for word, own in zip(words, tokens, strict=True) if len(word) < 2 * len(own)]

    def max_length_for(self, captions: Sequence[str], share: float) -> int:
        """Return the number of tokens, marks included, that suffices for a share of the captions."""
        lengths = sorted(len(tokens) + 2 for tokens in self._tokens_with_spans(captions))
        return lengths[min(len(lengths) - 1, int(share * len(lengths)))]

    @torch.no_grad()
    def embed(self, ids: Int64[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """Compute the context of token ids."""
        ids = ids.to(self.clip.device)
        with autocast("fp32", self.clip.device):
            return self.clip(ids, **(self._phrase_inputs(ids) if self.split_phrases else {}))[0]

    def _phrase_inputs(self, ids: Int64[Tensor, "b l"]) -> dict[str, Tensor]:
        """Return positions that count from each start token, and a mask that hides other phrases and later tokens."""
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        is_start = ids.eq(cast(int, self.tokenizer.bos_token_id))
        start = torch.where(is_start, position, 0).cummax(1).values
        is_visible = (start[:, :, None] == start[:, None, :]).tril()
        mask = torch.zeros(is_visible.shape, device=ids.device).masked_fill(~is_visible, torch.finfo(torch.float32).min)
        return {"position_ids": position - start, "attention_mask": mask[:, None]}

    def forward(self, captions: Sequence[str]) -> Float[Tensor, "b l d"]:
        """Compute the context of captions, truncated to `max_length` tokens."""
        return self.embed(self.tokenize(captions)[0])

    def cut(self, captions: Sequence[str]) -> list[str]:
        """Return the captions that are longer than `max_length` tokens."""
        tokens = self._tokens_with_spans(captions)
        return [caption for caption, own in zip(captions, tokens, strict=True) if len(own) > self.max_length - 2]

    def words(self, prompt: str) -> list[tuple[str, list[int]]]:
        """Return the words of a prompt with the indices of their tokens in the context, without truncated words."""
        (encoded,) = self._tokens_with_spans([prompt])
        # Index 0 is the start token. Marks between phrases, which span no characters, belong to no word.
        spans = [(i, span) for i, (_, span) in enumerate(encoded[: self.max_length - 2], start=1) if span[0] < span[1]]
        words = []
        for word in re.finditer(r"\S+", prompt):
            if tokens := [i for i, (start, end) in spans if start < word.end() and end > word.start()]:
                words.append((word.group(), tokens))
        return words


def embed(text_encoder: TextEncoder, captions: Sequence[str]) -> Float[Tensor, "n l d"]:
    """Compute the embeddings of captions in batches."""
    starts = tqdm(
        range(0, len(captions), CAPTION_BATCH_SIZE),
        desc="embedding captions",
        disable=len(captions) <= CAPTION_BATCH_SIZE or not is_main_process(),
        leave=False,
    )
    return torch.cat([text_encoder(captions[start : start + CAPTION_BATCH_SIZE]) for start in starts])


def find_phrases(caption: str) -> list[tuple[int, str]]:
    """Return the phrases of a caption, which commas separate, each with the index of its first character."""
    return [(match.start(), match.group()) for match in PHRASE.finditer(caption) if match.group().strip()]


def distinct_words(captions: Sequence[str]) -> list[str]:
    """Return the words of three letters or more, each once."""
    return list(dict.fromkeys(word for caption in captions for word in re.findall(r"[^\W\d_]{3,}", caption)))


def find_clip(source: str | Path) -> Path:
    """Return the folder of a CLIP: "builtin", "emoji", a folder, or a Hub id, which is downloaded."""
    folder = BUILT_IN_ENCODERS.get(str(source), Path(source))
    if not folder.is_dir() and not is_hub_id(source):
        raise UserError("there is no such folder")
    return folder if folder.is_dir() else download(str(source), CLIP_FILES)


def clip_kind(folder: Path) -> str:
    """Check `config.json`, and return its model type.

    The JSON is not read by transformers' Auto classes, which may run code of the repository.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError("adapter_config.json is not supported; merge the adapter into the weights")
    config = read_json(folder / "config.json")
    encoders = {key: config[key] for key in ("text_config", "vision_config") if config.get(key) is not None}
    for key, fields in (encoders or {"": config}).items():
        from_json(EncoderConfig, fields, f"config.json: {key}".rstrip(": "))
    return str(config.get("model_type"))


def load_clip(kind: type[Clip], folder: Path) -> Clip:
    """Load a CLIP in fp32; raise UserError if weights are missing, which transformers would initialize randomly."""
    with quiet_transformers():
        loaded = kind.from_pretrained(
            folder,
            variant=variant_of(folder, WEIGHTS["text_encoder"]),
            use_safetensors=True,
            dtype=torch.float32,
            # Overrides the config, which could name an attention kernel on the Hub, that is, code.
            attn_implementation="sdpa",
            trust_remote_code=False,
            output_loading_info=True,
        )
    clip, report = cast(tuple[Clip, dict[str, Any]], loaded)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{len(missing)} weights are missing, for example {missing[0]}")
    check_finite(clip.named_parameters(), WEIGHTS["text_encoder"])
    return clip


def load_tokenizer(folder: Path, vocab_size: int) -> CLIPTokenizer:
    """Load a tokenizer; raise UserError if its tokens are not those of an encoder with `vocab_size` embeddings."""
    file = folder / "tokenizer_config.json"
    if file.exists():
        length = read_json(file).get("model_max_length", 77)
        from_json(Annotated[int, Field(ge=3)], length, f"{file.name}: model_max_length")
    with quiet_transformers():
        tokenizer = CLIPTokenizer.from_pretrained(folder, trust_remote_code=False)
    if len(tokenizer) != vocab_size or max(tokenizer.get_vocab().values()) >= vocab_size:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the model {vocab_size}")
    for name in ("bos_token", "eos_token", "pad_token"):
        if not isinstance(number := getattr(tokenizer, f"{name}_id"), int) or not 0 <= number < vocab_size:
            raise UserError(f"tokenizer_config.json: {name}: {getattr(tokenizer, name)!r:.60} is not in the vocabulary")
    return tokenizer


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a tokenizer; raise OSError if it cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error  # of tokenizers, whose errors have no other type


@contextmanager
def clip_errors(key: str, source: str | Path) -> Iterator[None]:
    """Convert errors of transformers, tokenizers and safetensors to a UserError with the key and the source."""
    try:
        yield
    except UserError as error:
        is_option = key == "text.encoder" and not Path(source).is_dir()
        hint = "; or use text.encoder=builtin, emoji or pretrain" if is_option else ""
        raise UserError(f"{key}: {source}: {error}{hint}") from error
    except OSError as error:
        raise UserError(f"{key}: {source} is not a complete CLIP ({first_line(error)})") from error
    except Exception as error:  # each library raises its own types for a damaged file
        message = f"{key}: {source}: a file is damaged, truncated or not of a CLIP ({first_line(error)})"
        raise UserError(message) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Disable transformers' progress bars and warnings, such as the one for the unused image encoder of a CLIP."""
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
    """Compute the CLIP embeddings of preprocessed images."""
    output: Any = clip.get_image_features(pixel_values=images)
    return output.pooler_output


def embed_texts(
    clip: CLIPModel, tokenizer: CLIPTokenizer, captions: Sequence[str], max_length: int
) -> Float[Tensor, "b d"]:
    """Compute the CLIP embeddings of captions, padded and truncated to `max_length` tokens."""
    tokens = tokenizer([*captions], padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")
    output: Any = clip.get_text_features(input_ids=tokens["input_ids"].to(clip.device))
    return output.pooler_output
