"""Train and sample conditional text-to-image diffusion models."""

import importlib
from typing import TYPE_CHECKING, Any

from cond_diffusion.errors import UserError

if TYPE_CHECKING:
    from cond_diffusion.config.run import Config, ObjectiveConfig, load_config
    from cond_diffusion.config.sampling import SamplingOptions
    from cond_diffusion.config.schedule import ScheduleConfig
    from cond_diffusion.config.unet import UNetConfig
    from cond_diffusion.diffusion.guidance import drop_captions, guided
    from cond_diffusion.diffusion.objective import Objective, Prediction, denoiser
    from cond_diffusion.diffusion.samplers import ddim, ddpm, dpm_solver, euler, heun, unipc
    from cond_diffusion.diffusion.schedule import NoiseSchedule
    from cond_diffusion.models.text_encoder import TextEncoder
    from cond_diffusion.models.unet import UNet
    from cond_diffusion.pipeline.text_to_image import TextToImage
    from cond_diffusion.training.trainer import train

__version__ = "0.1.0"
__all__ = [
    "Config",
    "NoiseSchedule",
    "Objective",
    "ObjectiveConfig",
    "Prediction",
    "SamplingOptions",
    "ScheduleConfig",
    "TextEncoder",
    "TextToImage",
    "UNet",
    "UNetConfig",
    "UserError",
    "ddim",
    "ddpm",
    "denoiser",
    "dpm_solver",
    "drop_captions",
    "euler",
    "guided",
    "heun",
    "load_config",
    "train",
    "unipc",
]

# Imported when they are asked for, so that `--help` and a misspelt option do not wait for torch (PEP 562).
_MODULE_OF = {
    "Config": "config.run",
    "ObjectiveConfig": "config.run",
    "load_config": "config.run",
    "SamplingOptions": "config.sampling",
    "ScheduleConfig": "config.schedule",
    "UNetConfig": "config.unet",
    "drop_captions": "diffusion.guidance",
    "guided": "diffusion.guidance",
    "Objective": "diffusion.objective",
    "Prediction": "diffusion.prediction",
    "denoiser": "diffusion.prediction",
    "ddim": "diffusion.samplers",
    "ddpm": "diffusion.samplers",
    "dpm_solver": "diffusion.samplers",
    "euler": "diffusion.samplers",
    "heun": "diffusion.samplers",
    "unipc": "diffusion.samplers",
    "NoiseSchedule": "diffusion.schedule",
    "TextEncoder": "models.text_encoder",
    "UNet": "models.unet",
    "TextToImage": "pipeline.text_to_image",
    "train": "training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"cond_diffusion.{_MODULE_OF[name]}"), name)
