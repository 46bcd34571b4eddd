"""Train and sample conditional text-to-image diffusion models."""

import importlib

TYPE_CHECKING = False  # as in typing, whose import takes longer than all of this
if TYPE_CHECKING:
    from cond_diffusion.config.run import Config, ObjectiveConfig, load_config
    from cond_diffusion.config.sampling import SamplingOptions
    from cond_diffusion.config.schedule import ScheduleConfig
    from cond_diffusion.config.unet import UNetConfig
    from cond_diffusion.diffusion.guidance import drop_captions, guided
    from cond_diffusion.diffusion.objective import Objective, Prediction, denoiser
    from cond_diffusion.diffusion.samplers import ddim, ddpm, dpm_solver, euler, heun, unipc
    from cond_diffusion.diffusion.schedule import NoiseSchedule
    from cond_diffusion.errors import UserError
    from cond_diffusion.models.text_encoder import TextEncoder
    from cond_diffusion.models.unet import UNet
    from cond_diffusion.pipeline.text_to_image import TextToImage
    from cond_diffusion.training.trainer import train

__version__ = "0.1.0"
__all__ = ["Config", "ObjectiveConfig", "SamplingOptions", "ScheduleConfig", "UNetConfig", "UserError"]
__all__ += ["NoiseSchedule", "Objective", "Prediction", "TextEncoder", "TextToImage", "UNet", "load_config", "train"]
__all__ += ["ddim", "ddpm", "denoiser", "dpm_solver", "drop_captions", "euler", "guided", "heun", "unipc"]

# Imported on first access (PEP 562), so that `--help` and errors in the arguments do not wait for torch.
_NAMES_IN = {
    "config.run": ("Config", "ObjectiveConfig", "load_config"),
    "config.sampling": ("SamplingOptions",),
    "config.schedule": ("ScheduleConfig",),
    "config.unet": ("UNetConfig",),
    "diffusion.guidance": ("drop_captions", "guided"),
    "diffusion.objective": ("Objective", "Prediction", "denoiser"),
    "diffusion.samplers": ("ddim", "ddpm", "dpm_solver", "euler", "heun", "unipc"),
    "diffusion.schedule": ("NoiseSchedule",),
    "errors": ("UserError",),
    "models.text_encoder": ("TextEncoder",),
    "models.unet": ("UNet",),
    "pipeline.text_to_image": ("TextToImage",),
    "training.trainer": ("train",),
}
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"cond_diffusion.{_MODULE_OF[name]}"), name)
