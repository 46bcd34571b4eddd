"""A small Stable Diffusion pipeline with random weights, created with diffusers only."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from cond_diffusion.models.text_encoder import BUILT_IN_ENCODER, TextEncoder

SIDE = 32


def autoencoder() -> AutoencoderKL:
    """Return an autoencoder with random weights and a downsampling factor of 2."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        norm_num_groups=8,
        scaling_factor=0.3,
    ).eval()


def stable_diffusion(folder: Path, prediction: str, **scheduler: Any) -> Path:
    """Write a small Stable Diffusion pipeline with random weights with diffusers; return its folder."""
    return shutil.copytree(_written(prediction, **scheduler), folder, dirs_exist_ok=True)


@cache
def _written(prediction: str, **scheduler: Any) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="stable-diffusion-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(1)
    text_encoder = TextEncoder.from_pretrained(BUILT_IN_ENCODER, 16)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_encoder.context_dim,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    text_encoder.tokenizer.model_max_length = 16
    StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder.clip,
        tokenizer=text_encoder.tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(**schedule, steps_offset=1, prediction_type=prediction, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
