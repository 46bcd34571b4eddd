"""Where diffusion happens: on the pixels, on the same pixels in another arrangement, or in an autoencoder's latents.

`PixelPatchify` moves each p x p patch of pixels into the channels ("patching" in Hoogeboom et al. 2023). It has no
parameters, is inverted exactly, and maps independent Gaussian noise to independent Gaussian noise, so the diffusion is
the same, number for number; only the network sees another arrangement, with 1 / p^2 of the places to convolve over.

`VAE` is latent diffusion (Rombach et al. 2022): an autoencoder that somebody has trained, diffusers' `AutoencoderKL`,
makes small latents of large pictures. It is frozen, and what it cannot tell apart the diffusion never sees.
"""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.run import LatentConfig
from cond_diffusion.errors import UserError, first_line
from cond_diffusion.files import hash_weights
from cond_diffusion.hub import WEIGHTS, download, refuse_pickles, variant_of
from cond_diffusion.images import to_model

IN_PIXELS, IN_LATENTS = "TextToImage", "StableDiffusionPipeline"  # classes of `model_index.json`
PIXELS_AT_ONCE = 512 * 512  # what an autoencoder is given at once: each takes some thousand times its size in memory


class PixelPatchify:
    """Pixels, each patch of `downsample_factor` x `downsample_factor` of them moved into the channels."""

    is_latent = False

    def __init__(self, patch_size: int) -> None:
        self.downsample_factor = patch_size

    def shape(self, data: DataConfig) -> tuple[int, int, int]:
        """Return channels, height and width of x_0; raise UserError for pictures that fall into no whole patches."""
        side, left = divmod(data.resolution, self.downsample_factor)
        if left:
            raise UserError(
                f"latent.patch_size: {self.downsample_factor} does not divide data.resolution ({data.resolution})"
            )
        return data.channels * self.downsample_factor**2, side, side

    def pixel_channels(self, of_x_0: int) -> int:
        """Return how many channels the pictures have."""
        return of_x_0 // self.downsample_factor**2

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_pp h_p w_p"]:
        """Return x_0 of pictures in [-1, 1]."""
        p = self.downsample_factor
        return rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=p, q=p)

    def decode(self, x_0: Float[Tensor, "b c_pp h_p w_p"]) -> Float[Tensor, "b c h w"]:
        """Invert `encode`, exactly."""
        p = self.downsample_factor
        return rearrange(x_0, "b (c p q) h w -> b c (h p) (w q)", p=p, q=p)

    def encode_mask(self, mask: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_pp h_p w_p"]:
        """Return a mask of pixels as one of x_0."""
        return self.encode(mask)

    def digest(self) -> str:
        """Return what decides x_0 of a picture."""
        return f"patches of {self.downsample_factor}"

    def save_pretrained(self, folder: Path) -> dict[str, Any]:
        """Write nothing; return the fields of `model_index.json`, which diffusers has no pipeline for."""
        del folder
        return {"_class_name": IN_PIXELS, "patch_size": self.downsample_factor}

    def to(self, device: torch.device | str) -> "PixelPatchify":
        """Return it: it has nothing that lies anywhere."""
        del device
        return self


class VAE:
    """The latents of diffusers' `AutoencoderKL`: the mean of what a picture becomes, scaled to variance 1 or so."""

    is_latent = True

    def __init__(self, autoencoder: Any) -> None:
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        config = autoencoder.config
        self.scaling_factor: float = config.scaling_factor
        self.downsample_factor: int = 2 ** (len(config.block_out_channels) - 1)
        self._channels: tuple[int, int] = config.in_channels, config.latent_channels

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "VAE":
        """Load from a folder, or a pipeline's with `vae/` in it, or a hub id; raise UserError if it is none."""
        if importlib.util.find_spec("diffusers") is None:
            raise UserError('latent.vae needs diffusers; install it: pip install "cond_diffusion[latent]"')
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # an extra, and it takes seconds

        folder = Path(source)
        if not folder.is_dir():
            names = ("config.json", WEIGHTS["vae"])
            try:
                folder = download(str(source), [*names, *(f"vae/{name}" for name in names)])
            except UserError as error:
                raise UserError(f"latent.vae: {error}") from error
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        refuse_pickles(folder, WEIGHTS["vae"])
        try:
            config: Any = json.loads((folder / "config.json").read_text())
            if (kind := config.get("_class_name")) != "AutoencoderKL":
                raise UserError(f"latent.vae: {source} is a {kind}; expected an AutoencoderKL")
            if config.get("shift_factor") is not None:
                raise UserError(f"latent.vae: {source} shifts its latents, which Stable Diffusion does not")
            loaded: Any = AutoencoderKL.from_pretrained(
                folder,
                variant=variant_of(folder, WEIGHTS["vae"]),
                use_safetensors=True,
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
            vae, report = loaded
            if missing := sorted(report["missing_keys"]):
                raise UserError(f"latent.vae: {source} lacks {len(missing)} of its weights, {missing[0]} among them")
        except UserError:
            raise
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"latent.vae: {source} holds no AutoencoderKL ({first_line(error)}); expected one, for example "
                "stabilityai/sd-vae-ft-mse"
            ) from error
        return cls(vae)

    def shape(self, data: DataConfig) -> tuple[int, int, int]:
        """Return channels, height and width of x_0; raise UserError for pictures that the autoencoder does not see."""
        in_channels, latent_channels = self._channels
        if data.channels != in_channels:
            raise UserError(f"data.channels: {data.channels}; latent.vae sees pictures of {in_channels} channels")
        side, left = divmod(data.resolution, self.downsample_factor)
        if left:
            raise UserError(
                f"data.resolution: {data.resolution} must be divisible by latent.vae's factor {self.downsample_factor}"
            )
        return latent_channels, side, side

    def pixel_channels(self, of_x_0: int) -> int:
        """Return how many channels the pictures have; raise UserError where the autoencoder has other latents."""
        if of_x_0 != self._channels[1]:
            raise UserError(f"the UNet draws {of_x_0} channels, and the VAE's latents have {self._channels[1]}")
        return self._channels[0]

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l h_f w_f"]:
        """Return x_0 of pictures in [-1, 1]."""
        with torch.no_grad():
            parts = [self.autoencoder.encode(part).latent_dist.mode() for part in images.split(self._at_once(images))]
        return torch.cat(parts) * self.scaling_factor

    def decode(self, x_0: Float[Tensor, "b l h_f w_f"]) -> Float[Tensor, "b c h w"]:
        """Return pictures, about in [-1, 1]."""
        at_once = self._at_once(x_0, self.downsample_factor)
        with torch.no_grad():
            parts = [self.autoencoder.decode(part).sample for part in (x_0 / self.scaling_factor).split(at_once)]
        return torch.cat(parts)

    def encode_mask(self, mask: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h_f w_f"]:
        """Return a mask of pixels as one of latents: where any of a latent's pixels is drawn anew, it is."""
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
        """Return a hash of all that decides the latents of a picture."""
        # What begins with _ tells where it lay, not what it is.
        config = sorted((key, value) for key, value in self.autoencoder.config.items() if not key.startswith("_"))
        digest = hashlib.blake2b(repr(config).encode(), digest_size=16)
        hash_weights(digest, self.autoencoder.state_dict().items())
        return digest.hexdigest()

    @staticmethod
    def _at_once(x: Tensor, scale: int = 1) -> int:
        return max(1, PIXELS_AT_ONCE // (x.shape[2] * x.shape[3] * scale**2))


LatentSpace = PixelPatchify | VAE


def encode_images(
    images: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"], latent_space: LatentSpace
) -> Float[Tensor, "b _ _ _"]:
    """Return x_0 of pictures in bytes; what is no bytes is x_0 already."""
    return images if images.is_floating_point() else latent_space.encode(to_model(images))


def build_latent_space(config: LatentConfig) -> LatentSpace:
    """Return the latent space that the config describes."""
    return PixelPatchify(config.patch_size) if config.vae is None else VAE.from_pretrained(config.vae)
