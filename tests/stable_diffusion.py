"""A small Stable Diffusion with random weights, written by diffusers alone."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from cond_diffusion.models.text_encoder import BUILT_IN_ENCODER, TextEncoder

SIDE = 32


def autoencoder() -> AutoencoderKL:
    """A random one that makes pictures half as wide and high."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        norm_num_groups=8,
        scaling_factor=0.3,
    ).eval()


def stable_diffusion(folder: Path, prediction: str, **scheduler: Any) -> Path:
    """Write a small Stable Diffusion with random weights by diffusers alone."""
    torch.manual_seed(1)
    text = TextEncoder.from_pretrained(BUILT_IN_ENCODER, 16)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text.context_dim,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    stable = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    text.tokenizer.model_max_length = 16
    StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text.clip,
        tokenizer=text.tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(**stable, steps_offset=1, prediction_type=prediction, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
