"""Where diffusion happens: on the pixels, or on the same pixels with less height and width and more channels.

`patch_size` p moves each p x p patch of pixels into the channels (space-to-depth; "patching" in Hoogeboom et al.
2023). It has no parameters, is inverted exactly, and maps independent Gaussian noise to independent Gaussian noise,
so the diffusion is the same, number for number; only the network sees another arrangement, with 1 / p^2 of the places
to convolve over.
"""

from dataclasses import dataclass

from einops import rearrange
from jaxtyping import Num
from torch import Tensor

from cond_diffusion.errors import UserError


@dataclass(frozen=True)
class LatentConfig:
    """patch_size: 1 diffuses the pixels as they are."""

    patch_size: int = 1

    def __post_init__(self) -> None:
        if self.patch_size < 1:
            raise UserError(f"latent.patch_size: {self.patch_size} must be at least 1")


def encode(images: Num[Tensor, "b c h w"], patch_size: int) -> Num[Tensor, "b c_pp h_p w_p"]:
    """Move each patch of `patch_size` x `patch_size` pixels into the channels."""
    return rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=patch_size, q=patch_size)


def decode(latents: Num[Tensor, "b c_pp h_p w_p"], patch_size: int) -> Num[Tensor, "b c h w"]:
    """Invert `encode`, exactly."""
    return rearrange(latents, "b (c p q) h w -> b c (h p) (w q)", p=patch_size, q=patch_size)
