"""A small CLIP that learns a data set's captions: its vocabulary, its networks, and its loss.

The loss is CLIP's (Radford et al. 2021, fig. 3) with the targets of UniCL (Yang et al. 2022): all captions of an image
that are in a batch are its positives, as are those of the other images with the same captions. CLIP's diagonal targets
would push them apart.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

from cond_diffusion.config.run import ClipPretrainingConfig, TextConfig
from cond_diffusion.errors import UserError
from cond_diffusion.images import to_model
from cond_diffusion.models import text_encoder

BATCH_SIZE = 250  # images or captions
MIN_LENGTH, MAX_LENGTH = 16, 77  # tokens of a caption, where no length is given; CLIP's is 77


def train_tokenizer(captions: Sequence[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary (Sennrich et al. 2016) in CLIP's order: bytes, word-final bytes, merges, special
    tokens.

    It contains every byte, so any text can be encoded, including unseen words.
    """
    start, end = "<|startoftext|>", "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # CLIPTokenizer's normalizer and pre-tokenizer decide which bytes merges may join.
    clip_backend = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = clip_backend.normalizer, clip_backend.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=alphabet,
        # Otherwise their order is random, and with it the order of merges that are equally frequent.
        special_tokens=[byte + "</w>" for byte in alphabet],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges: Any = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *map("".join, merges), start, end]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def count_whole_words(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> tuple[int, int]:
    """Return the number of distinct words of captions that are single tokens, and that of all distinct words."""
    words = text_encoder.distinct_words([caption.lower() for caption in captions])
    tokens: Any = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"] if words else []
    return sum(len(own) == 1 for own in tokens), len(words)


def count_truncated(tokenizer: CLIPTokenizer, captions: Sequence[str], max_length: int) -> int:
    """Return how many captions are longer than `max_length` tokens, with the start and the end token."""
    batches = (captions[start : start + BATCH_SIZE] for start in range(0, len(captions), BATCH_SIZE))
    tokens = (tokenizer([*batch], verbose=False)["input_ids"] for batch in batches)
    return sum(len(own) > max_length for batch in tokens for own in batch)


def build_clip(config: ClipPretrainingConfig, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return a randomly initialized `CLIPModel`."""
    shared = {
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.num_heads,
    }
    special_tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**shared, **special_tokens, "vocab_size": len(tokenizer), "max_position_embeddings": config.max_length}
    vision = {
        **shared,
        "image_size": config.data.resolution,
        "patch_size": config.patch_size,
        "num_channels": config.data.channels,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.width))


def untrained_text_encoder(
    config: ClipPretrainingConfig, captions: Sequence[str], text: TextConfig
) -> text_encoder.TextEncoder:
    """Return a randomly initialized text encoder with the vocabulary and the shape of the CLIP to train. `max_length`
    is by default that of the longest caption, within 16 and 77."""
    tokenizer = train_tokenizer(captions, config.vocab_size, config.max_length)
    text_config: Any = build_clip(config, tokenizer).config.text_config
    encoder = text_encoder.TextEncoder(tokenizer, CLIPTextModel(text_config), text.max_length, text.split_phrases)
    if text.max_length is None:
        encoder.max_length = min(MAX_LENGTH, max(MIN_LENGTH, encoder.max_length_for(captions, 1.0)))
    return encoder


def contrastive_loss(
    logits: Float[Tensor, "images texts"], is_positive: Bool[Tensor, "images texts"]
) -> Float[Tensor, ""]:
    """Compute the symmetric contrastive loss of UniCL: each target is uniform over the positives.

    Args:
        logits: Similarities; they are multiplied by the temperature.
        is_positive: Whether a text describes an image; at least one in each row and column.
    """
    positive = is_positive.to(logits.dtype)
    to_text = F.cross_entropy(logits, positive / positive.sum(1, keepdim=True))
    to_image = F.cross_entropy(logits.T, positive.T / positive.T.sum(1, keepdim=True))
    return (to_text + to_image) / 2


def nearest_captions(images: Float[Tensor, "n d"], texts: Float[Tensor, "captions d"], k: int) -> Int64[Tensor, "n k"]:
    """Return the indices of the k captions that are most similar to each image, the nearest first."""
    return torch.cat([(rows @ texts.T).topk(k).indices for rows in images.split(BATCH_SIZE)])


class ClipJudge(nn.Module):
    """Maps images and captions to unit vectors in CLIP's joint embedding space (Radford et al. 2021).

    Args:
        processor: Preprocessing of images; None if the model accepts images in [-1, 1].
        max_length: Number of tokens that captions are cut to.
    """

    def __init__(
        self, clip: CLIPModel, tokenizer: CLIPTokenizer, processor: CLIPImageProcessorPil | None, max_length: int
    ) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.processor = processor
        self.max_length = min(max_length, cast(Any, clip.config.text_config).max_position_embeddings)

    @classmethod
    def from_pretrained(cls, source: str | Path, max_length: int = 77) -> "ClipJudge":
        """Load a CLIP from "builtin", a folder or a Hub id."""
        with text_encoder.clip_errors("CLIP", source):
            folder = text_encoder.find_clip(source)
            if not (folder / "text_encoder").is_dir() and text_encoder.clip_kind(folder) == "clip":
                processor = None  # a CLIP of `clip_pretraining` has no processor: it accepts images in [-1, 1]
                if any(folder.glob("*processor_config.json")):
                    processor = CLIPImageProcessorPil.from_pretrained(folder, trust_remote_code=False)
                clip = text_encoder.load_clip(CLIPModel, folder)
                vocab_size: int = cast(Any, clip.config.text_config).vocab_size
                return cls(clip, text_encoder.load_tokenizer(folder, vocab_size), processor, max_length)
        raise UserError(f"CLIP: {source} has no image encoder")

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Compute the embeddings of images."""
        batches = [text_encoder.embed_images(self.clip, self._preprocess(batch)) for batch in images.split(BATCH_SIZE)]
        return F.normalize(torch.cat(batches), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Float[Tensor, "n d"]:
        """Compute the embeddings of captions."""
        batches = [captions[i : i + BATCH_SIZE] for i in range(0, len(captions), BATCH_SIZE)]
        embedded = [text_encoder.embed_texts(self.clip, self.tokenizer, batch, self.max_length) for batch in batches]
        return F.normalize(torch.cat(embedded), dim=-1).cpu()

    def _preprocess(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if self.processor is None:
            return to_model(images.to(self.clip.device))
        rgb = images.expand(-1, 3, -1, -1)
        return self.processor([*rgb], return_tensors="pt")["pixel_values"].to(self.clip.device)
