"""The space in which diffusion takes place: pixels, patches of pixels in the channels, or latents of an autoencoder.

`PixelPatchify` moves each p x p patch of pixels into the channels ("patching" in Hoogeboom et al. 2023). It has no
parameters, is exactly invertible, and maps independent Gaussian noise to independent Gaussian noise. Diffusion is
therefore the same; only the network sees another arrangement, with 1 / p^2 of the positions.

`VAE` is latent diffusion (Rombach et al. 2022): a frozen, pretrained autoencoder, diffusers' `AutoencoderKL`, maps
large images to small latents.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.run import LatentConfig
from cond_diffusion.config.schema import Depth, PositiveFloat, Width, from_json, read_json
from cond_diffusion.config.unet import Levels
from cond_diffusion.device import autocast
from cond_diffusion.errors import UserError, user_errors
from cond_diffusion.files import check_finite, hash_weights
from cond_diffusion.hub import WEIGHTS, download, refuse_pickles, variant_of
from cond_diffusion.images import to_model

IN_PIXELS, IN_LATENTS = "TextToImage", "StableDiffusionPipeline"  # classes of `model_index.json`
PIXELS_PER_BATCH = 512 * 512  # of the autoencoder, whose feature maps take about a thousand times their size in memory


class PixelPatchify:
    """Pixels, with each patch of `downsample_factor` x `downsample_factor` pixels moved into the channels."""

    is_latent = False

    def __init__(self, patch_size: int) -> None:
        self.downsample_factor = patch_size

    def shape(self, data: DataConfig) -> tuple[int, int, int]:
        """Return channels, height and width of x_0; raise UserError if the images cannot be divided into patches."""
        size, rest = divmod(data.resolution, self.downsample_factor)
        if rest:
            raise UserError(
                f"latent.patch_size: {self.downsample_factor} does not divide data.resolution ({data.resolution})"
            )
        return data.channels * self.downsample_factor**2, size, size

    def pixel_channels(self, of_x_0: int) -> int:
        """Return the number of channels of the images, given that of x_0; raise UserError if it is not an integer."""
        channels, rest = divmod(of_x_0, self.downsample_factor**2)
        if rest:
            raise UserError(f"UNet config: in_channels: {of_x_0}; patches of {self.downsample_factor} do not divide it")
        return channels

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_pp h_p w_p"]:
        """Return x_0 of images."""
        p = self.downsample_factor
        return rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=p, q=p)

    def decode(self, x_0: Float[Tensor, "b c_pp h_p w_p"]) -> Float[Tensor, "b c h w"]:
        """Return the images of x_0: the exact inverse of `encode`."""
        p = self.downsample_factor
        return rearrange(x_0, "b (c p q) h w -> b c (h p) (w q)", p=p, q=p)

    def encode_mask(self, mask: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_pp h_p w_p"]:
        """Return the mask of x_0 for a mask of pixels."""
        return self.encode(mask)

    def digest(self) -> str:
        """Return what identifies the mapping from images to x_0."""
        return f"patches of {self.downsample_factor}"

    def save_pretrained(self, folder: Path) -> dict[str, Any]:
        """Return the fields of `model_index.json`; writes nothing, since there are no weights."""
        return {"_class_name": IN_PIXELS, "patch_size": self.downsample_factor}

    def to(self, device: torch.device | str) -> "PixelPatchify":
        """Return the object itself: it has no tensors."""
        return self


@dataclass(frozen=True)
class AutoencoderConfig:
    """The fields of the `config.json` of diffusers' `AutoencoderKL` that are checked, with its defaults."""

    in_channels: Width = 3
    out_channels: Width = 3
    block_out_channels: Levels = (64,)
    layers_per_block: Depth = 1
    latent_channels: Width = 4
    norm_num_groups: Width = 32
    scaling_factor: PositiveFloat = 0.18215
    shift_factor: None = None


class VAE:
    """Latents of diffusers' `AutoencoderKL`: the mean of the posterior, scaled to a variance of about 1.

    It always computes in fp32: in fp16 the activations of Stable Diffusion's autoencoders can overflow.
    """

    is_latent = True

    def __init__(self, autoencoder: Any) -> None:
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        config = autoencoder.config
        self.scaling_factor: float = config.scaling_factor
        self.downsample_factor: int = 2 ** (len(config.block_out_channels) - 1)
        self._channels: tuple[int, int] = config.in_channels, config.latent_channels

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "VAE":
        """Load an autoencoder from a folder or a Hub id, of the autoencoder or of a pipeline with `vae/`."""
        if importlib.util.find_spec("diffusers") is None:
            raise UserError('latent.vae needs diffusers; install it: pip install "cond_diffusion[latent]"')
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # optional, and takes seconds to import

        folder = Path(source)
        if not folder.is_dir():
            names = ("config.json", WEIGHTS["vae"])
            try:
                folder = download(str(source), [*names, *(f"vae/{name}" for name in names)])
            except UserError as error:
                raise UserError(f"latent.vae: {error}") from error
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        refuse_pickles(folder, WEIGHTS["vae"])
        errors = (OSError, ValueError, TypeError, AttributeError, RuntimeError)
        hint = "; expected for example stabilityai/sd-vae-ft-mse"
        with user_errors(f"latent.vae: {source} is not an AutoencoderKL", *errors, hint=hint):
            config = read_json(folder / "config.json")
            if (kind := config.get("_class_name")) != "AutoencoderKL":
                raise UserError(f"latent.vae: {source} is a {kind}; expected an AutoencoderKL")
            from_json(AutoencoderConfig, config, f"latent.vae: {folder / 'config.json'}")
            loaded: Any = AutoencoderKL.from_pretrained(
                folder,
                variant=variant_of(folder, WEIGHTS["vae"]),
                use_safetensors=True,
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
            vae, report = loaded
            if missing := sorted(report["missing_keys"]):
                raise UserError(f"latent.vae: {source} lacks {len(missing)} weights, for example {missing[0]}")
        check_finite(vae.named_parameters(), f"latent.vae: {source}")
        return cls(vae)

    def shape(self, data: DataConfig) -> tuple[int, int, int]:
        """Return channels, height and width of x_0; raise UserError for images that do not fit the autoencoder."""
        in_channels, latent_channels = self._channels
        if data.channels != in_channels:
            raise UserError(f"data.channels: {data.channels}; latent.vae expects {in_channels}")
        size, rest = divmod(data.resolution, self.downsample_factor)
        if rest:
            raise UserError(
                f"data.resolution: {data.resolution} must be divisible by {self.downsample_factor}, the downsampling "
                "factor of latent.vae"
            )
        return latent_channels, size, size

    def pixel_channels(self, of_x_0: int) -> int:
        """Return the number of channels of the images; raise UserError if x_0 of the VAE has others."""
        if of_x_0 != self._channels[1]:
            raise UserError(f"UNet config: in_channels: {of_x_0}; the VAE has {self._channels[1]} latent channels")
        return self._channels[0]

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l h_f w_f"]:
        """Return x_0 of images in [-1, 1]."""
        with torch.no_grad(), autocast("fp32", images.device):
            parts = [self.autoencoder.encode(part).latent_dist.mode() for part in images.split(_batch_size(images))]
        return torch.cat(parts) * self.scaling_factor

    def decode(self, x_0: Float[Tensor, "b l h_f w_f"]) -> Float[Tensor, "b c h w"]:
        """Return the images of x_0, approximately in [-1, 1]."""
        batch_size = _batch_size(x_0, self.downsample_factor)
        with torch.no_grad(), autocast("fp32", x_0.device):
            parts = [self.autoencoder.decode(part).sample for part in (x_0 / self.scaling_factor).split(batch_size)]
        return torch.cat(parts)

    def encode_mask(self, mask: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h_f w_f"]:
        """Return the mask of x_0 for a mask of pixels: a position is masked if any of its pixels is."""
        return F.max_pool2d(mask[:, :1], self.downsample_factor)

    def to(self, device: torch.device | str) -> "VAE":
        self.autoencoder.to(device)
        return self

    def save_pretrained(self, folder: Path) -> dict[str, Any]:
        """Write `vae/` in diffusers' layout; return the fields of `model_index.json`."""
        self.autoencoder.save_pretrained(folder / "vae")
        absent = {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
        vae = {"vae": ["diffusers", "AutoencoderKL"], "requires_safety_checker": False}
        return {"_class_name": IN_LATENTS, **vae, **absent}

    def digest(self) -> str:
        """Return a hash of what determines the latents of an image: config and weights."""
        # Keys that begin with _ record where the autoencoder was loaded from.
        config = sorted((key, value) for key, value in self.autoencoder.config.items() if not key.startswith("_"))
        digest = hashlib.blake2b(repr(config).encode(), digest_size=16)
        hash_weights(digest, self.autoencoder.state_dict().items())
        return digest.hexdigest()


def _batch_size(x: Tensor, scale: int = 1) -> int:
    return max(1, PIXELS_PER_BATCH // (x.shape[2] * x.shape[3] * scale**2))


LatentSpace = PixelPatchify | VAE


def encode_images(
    images: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"], latent_space: LatentSpace
) -> Float[Tensor, "b _ _ _"]:
    """Return x_0 of images in bytes; floating-point input is x_0 already and is returned unchanged."""
    return images if images.is_floating_point() else latent_space.encode(to_model(images))


def build_latent_space(config: LatentConfig) -> LatentSpace:
    """Return the latent space of the config."""
    return PixelPatchify(config.patch_size) if config.vae is None else VAE.from_pretrained(config.vae)
