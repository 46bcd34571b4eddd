"""Measure memory and time of a training step with the shapes of Stable Diffusion 1.5 and of configs/latent_256.yaml.

python tests/benchmarks/large.py [--only stable_diffusion latent_256] [--batch-size 1]

Nothing is downloaded: diffusers' and transformers' classes create the models with random weights, which need 5 GB of
temporary disk space.
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import torch
from measuring import hardware, peak_memory_gb
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cond_diffusion.cli.main import CONFIGS
from cond_diffusion.config.run import Config, load_config
from cond_diffusion.device import free_memory
from cond_diffusion.models.text_encoder import BUILT_IN_ENCODER
from cond_diffusion.training.preflight import check

PICTURES = 16
# What is trained: overrides of the config, and the minimum memory in GB.
RUNS: dict[str, dict[str, tuple[list[str], int]]] = {
    "stable_diffusion": {"LoRA of rank 4": ([], 7), "all weights": (["train.lora_rank=0"], 20)},
    "latent_256": {"all weights": ([], 5)},
}


def write_text_encoder(folder: Path, width: int, layers: int) -> None:
    """Write a CLIP text encoder of OpenAI's shape, with the vocabulary of the built-in encoder."""
    tokenizer = CLIPTokenizer.from_pretrained(BUILT_IN_ENCODER, model_max_length=77)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
    }
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    clip = CLIPTextModel(CLIPTextConfig(**shape, **special, num_attention_heads=width // 64, hidden_act="quick_gelu"))
    clip.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")


def write_autoencoder(folder: Path, *, small: bool) -> None:
    """Write an autoencoder with the shape of Stable Diffusion's."""
    channels = (8, 8, 8, 8) if small else (128, 256, 512, 512)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=2,
        norm_num_groups=8 if small else 32,
        sample_size=512,
    ).save_pretrained(folder / "vae")


def write_stable_diffusion(folder: Path, *, small: bool) -> None:
    """Write a pipeline with the shapes of Stable Diffusion 1.5."""
    write_text_encoder(folder, 64 if small else 768, 1 if small else 12)
    write_autoencoder(folder, small=small)
    down, up = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
    diffusers.UNet2DConditionModel(
        sample_size=64,
        down_block_types=(*down, "DownBlock2D"),
        up_block_types=("UpBlock2D", *up),
        block_out_channels=(32, 32, 32, 32) if small else (320, 640, 1280, 1280),
        cross_attention_dim=64 if small else 768,
        attention_head_dim=8,
    ).save_pretrained(folder / "unet")
    beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    diffusers.PNDMScheduler(**beta, skip_prk_steps=True, steps_offset=1).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}', encoding="utf-8")


def write_pictures(folder: Path, side: int) -> None:
    """Write single-color images with captions."""
    folder.mkdir(parents=True)
    for i in range(PICTURES):
        Image.new("RGB", (side, side), (16 * i, 128, 255 - 16 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture number {i}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*RUNS], default=[*RUNS])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="use small shapes, only to check that everything runs")
    arguments = parser.parse_args()
    print(f"On {hardware()}; random weights, batches of {arguments.batch_size}.\n")
    with TemporaryDirectory() as name:
        os.chdir(name)  # --check writes its image here
        parts = Path(name)
        torch.manual_seed(0)
        for config_name in arguments.only:
            if config_name == "stable_diffusion":
                write_stable_diffusion(parts / "stable", small=arguments.small)
                words = ["init_from=stable"]
            else:
                write_text_encoder(parts / "text", 64 if arguments.small else 512, 1 if arguments.small else 12)
                write_autoencoder(parts / "autoencoder", small=arguments.small)
                words = ["text.encoder=text", "latent.vae=autoencoder"]
                words += ["unet.channels=[32,32,32,32]"] if arguments.small else []
            path = CONFIGS / f"{config_name}.yaml"
            side = 128 if arguments.small else load_config(Config, path).data.resolution
            write_pictures(parts / config_name, side)
            words += [f"data.source={config_name}", f"data.resolution={side}"]
            words += [f"train.batch_size={arguments.batch_size}", "train.gradient_accumulation_steps=1"]
            for title, (more, least) in RUNS[config_name].items():
                print(f"{config_name}, {title}:", flush=True)
                free = free_memory(torch.accelerator.current_accelerator(check_available=True)) / 1e9
                if not arguments.small and free < least:
                    print(f"- skipped: needs {least} GB, only {free:.0f} GB are free")
                    continue
                for line in check(load_config(Config, path, [*words, *more])):
                    if line.startswith(("network:", "memory:", "time:")):
                        print(f"- {line}", flush=True)
                    if line.startswith("time:"):
                        break  # the rest is the overfitting test
                print(f"- peak memory so far: {peak_memory_gb():.1f} GB", flush=True)


if __name__ == "__main__":
    main()
