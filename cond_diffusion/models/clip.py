"""The embeddings of a whole CLIP, in the space that images and captions share (Radford et al. 2021)."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer


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
