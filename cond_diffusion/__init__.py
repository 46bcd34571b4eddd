"""Train and sample conditional text-to-image diffusion models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cond_diffusion.config.unet import UNetConfig
    from cond_diffusion.models.unet import UNet
    from cond_diffusion.pipeline.text_to_image import TextToImage

__version__ = "0.1.0"
__all__ = ["TextToImage", "UNet", "UNetConfig"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `--help` and a misspelt option do not wait for torch (PEP 562)."""
    if name == "TextToImage":
        from cond_diffusion.pipeline.text_to_image import TextToImage

        return TextToImage
    if name in ("UNet", "UNetConfig"):
        from cond_diffusion.models import unet

        return getattr(unet, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
