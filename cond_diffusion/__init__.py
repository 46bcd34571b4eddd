"""Train and sample conditional text-to-image diffusion models."""

from cond_diffusion.pipeline import TextToImage
from cond_diffusion.unet import UNet
from cond_diffusion.unet_config import UNetConfig

__version__ = "0.1.0"
__all__ = ["TextToImage", "UNet", "UNetConfig"]
