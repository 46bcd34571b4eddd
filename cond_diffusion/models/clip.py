"""A whole CLIP, both halves of it: how near a picture is to a caption (Radford et al. 2021)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from cond_diffusion.images import to_model
from cond_diffusion.models.text_encoder import clip_errors, clip_kind, find_clip, load_clip, load_tokenizer

AT_ONCE = 250


def embed_images(clip: CLIPModel, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """Embed pictures that are as this CLIP wants them."""
    found: Any = clip.get_image_features(pixel_values=images)
    return found.pooler_output


def embed_texts(
    clip: CLIPModel, tokenizer: CLIPTokenizer, captions: Sequence[str], max_length: int
) -> Float[Tensor, "b d"]:
    """Embed captions, cut and padded to `max_length`."""
    tokens = tokenizer([*captions], padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")
    found: Any = clip.get_text_features(input_ids=tokens["input_ids"].to(clip.device))
    return found.pooler_output


class ClipJudge(nn.Module):
    """Pictures and captions to directions in CLIP's common space."""

    def __init__(
        self, clip: CLIPModel, tokenizer: CLIPTokenizer, processor: CLIPImageProcessorPil | None, max_length: int
    ) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.processor = processor
        self.max_length = min(max_length, cast(Any, clip.config.text_config).max_position_embeddings)

    @classmethod
    def from_pretrained(cls, source: str | Path, max_length: int = 77) -> "ClipJudge | None":
        """Load from "builtin", a folder or a hub id; None if what is there reads texts but no pictures.

        Raises UserError where there is no CLIP at all.
        """
        with clip_errors("CLIP", source):
            folder = find_clip(source)
            if (folder / "text_encoder").is_dir() or clip_kind(folder) != "clip":
                return None
            clip, tokenizer = load_clip(CLIPModel, folder), load_tokenizer(folder)
            # What `clip_pretraining` trains reads pictures in [-1, 1] as they are, and comes without a processor.
            names = ("preprocessor_config.json", "processor_config.json")
            has_processor = any((folder / name).is_file() for name in names)
            processor = (
                CLIPImageProcessorPil.from_pretrained(folder, trust_remote_code=False) if has_processor else None
            )
        return cls(clip, tokenizer, processor, max_length)

    def reads(self, channels: int, side: int) -> bool:
        """Say whether pictures of this shape can be shown to it: with an image processor any, else its own alone."""
        vision = cast(Any, self.clip.config.vision_config)
        return self.processor is not None or (vision.num_channels, vision.image_size) == (channels, side)

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Return the directions of pictures, of length 1."""
        found = [embed_images(self.clip, self._prepared(batch)) for batch in images.split(AT_ONCE)]
        return F.normalize(torch.cat(found), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Float[Tensor, "n d"]:
        """Return the directions of captions, of length 1."""
        starts = range(0, len(captions), AT_ONCE)
        batches = [captions[start : start + AT_ONCE] for start in starts]
        found = [embed_texts(self.clip, self.tokenizer, batch, self.max_length) for batch in batches]
        return F.normalize(torch.cat(found), dim=-1).cpu()

    def _prepared(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if self.processor is None:
            return to_model(images.to(self.clip.device))
        channels, height, width = images.shape[1:]
        rgb = images.expand(-1, 3, height, width) if channels == 1 else images
        return self.processor([*rgb], return_tensors="pt")["pixel_values"].to(self.clip.device)
