"""Compare training from scratch on digits with other libraries, each in its usual setup, for the same wall time.

    python tests/benchmarks/peers.py [--minutes 5] [--who ours diffusers denoising-diffusion-pytorch]

Ours is `accelerate launch train.py --config configs/mnist_fast.yaml`, timed from the launch on; each checkpoint is
sampled afterwards, in 20 steps of dpm_solver. The others receive decoded images, and embedded captions (diffusers) or
class indices (denoising-diffusion-pytorch, which does not support text); their time excludes imports. Their learning
rates are those of their examples and READMEs, not tuned; networks have about the size of ours, and the guidance scale
is that of the speedrun, 1.5. All are evaluated by the classifier of `evaluation/` and its features. Only our own run
would use a GPU, so the benchmark must run on a machine without one.
"""

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from measuring import hardware
from speedrun.run import ROOT, Digits, timed_checkpoints
from torch.nn import functional as F
from tqdm import tqdm

from cond_diffusion.config.run import Config, load_config
from cond_diffusion.data.dataset import CaptionedImages
from cond_diffusion.evaluation.evaluator import Judged, load_evaluator
from cond_diffusion.images import to_bytes, to_model
from cond_diffusion.pipeline.text_to_image import TextToImage

FAST = ROOT / "configs" / "mnist_fast.yaml"
BATCH = 64
(SCALE,) = Digits.sampling.per_prompt("guidance_scale", 1)


class Referee:
    """Measures accuracy and Fréchet distance of images of the ten digits, the same number of each, in order."""

    def __init__(self, config: Config, samples: int) -> None:
        self.count = samples
        self.pipe = TextToImage.from_pretrained()
        self.evaluator = load_evaluator(self.pipe, config)
        self.prompts = self.evaluator.prompts(samples)
        self.labels = torch.tensor([group for _, group in self.prompts]).repeat_interleave(samples // len(self.prompts))

    def line(self, who: str, seconds: float, images: int | str, samples: Judged) -> str:
        distance = self.evaluator.distance(samples)
        return f"| {who} | {seconds:.0f} s | {images} | {samples.accuracy:.1%} | {distance:.1f} |"

    def of_pixels(self, x_0: torch.Tensor) -> Judged:
        captions = self.evaluator.train.caption_groups
        return self.evaluator.judge(CaptionedImages(to_bytes(x_0), self.labels, captions))


def ours(referee: Referee, folder: Path, config: Path, words: list[str]) -> Iterator[str]:
    """Train, and evaluate each checkpoint."""
    checkpoints = timed_checkpoints(config, folder / "ours", words)
    batch = load_config(Config, checkpoints[-1][1] / "config.yaml").train.batch_size
    for seconds, checkpoint in checkpoints:
        pipe = TextToImage.from_pretrained(checkpoint)
        samples = referee.evaluator.generate(pipe, referee.prompts, referee.count, Digits.sampling)
        yield referee.line("ours", seconds, int(checkpoint.name.removeprefix("step-")) * batch, samples)


def train_for(step: Callable[[torch.Tensor], None], count: int, seconds: float, name: str) -> tuple[int, float]:
    """Run training steps on random samples for `seconds`; return the number of images, and the time."""
    draw = torch.Generator().manual_seed(0)
    start, steps = time.perf_counter(), 0
    with tqdm(total=round(seconds), desc=name, unit=" s") as bar:
        while (taken := time.perf_counter() - start) < seconds:
            step(torch.randint(0, count, (BATCH,), generator=draw))
            steps += 1
            bar.update(round(taken) - bar.n)
    return steps * BATCH, time.perf_counter() - start


def diffusers(referee: Referee, seconds: float) -> Iterator[str]:
    """The loop of diffusers' `train_unconditional.py` with its text-conditional UNet, and 10% caption dropout."""
    torch.manual_seed(0)
    data, encoder = referee.evaluator.train, referee.pipe.text_encoder
    captions = encoder([*(group[0] for group in data.caption_groups), ""])
    unet = UNet2DConditionModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=captions.shape[2],
        norm_num_groups=8,  # with the default of 32, each group of the first level has one channel
    )
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    # The number of steps is unknown in advance, so the learning rate is constant after the warm-up.
    rate = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=500)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def step(indices: torch.Tensor) -> None:
        x_0 = to_model(data.images[indices])
        noise, t = torch.randn_like(x_0), torch.randint(0, 1000, (BATCH,))
        words = torch.where(torch.rand(BATCH) < 0.1, len(captions) - 1, data.group_of[indices])
        loss = F.mse_loss(unet(scheduler.add_noise(x_0, noise, t), t, captions[words]).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())

    images, taken = train_for(step, len(data), seconds, "diffusers")
    ema.copy_to(unet.parameters())
    sampler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    sampler.set_timesteps(50)
    x = torch.randn(len(referee.labels), 1, 28, 28)
    context = torch.cat([captions[-1:].expand(len(referee.labels), -1, -1), captions[referee.labels]])
    with torch.inference_mode():
        for t in tqdm(sampler.timesteps, desc="sampling", leave=False):
            uncond, cond = unet(torch.cat([x, x]), t, context).sample.chunk(2)
            x = sampler.step(uncond + SCALE * (cond - uncond), t, x).prev_sample
    yield referee.line("diffusers' loop", taken, images, referee.of_pixels(x))


def denoising_diffusion_pytorch(referee: Referee, seconds: float) -> Iterator[str]:
    """The classifier-free-guidance UNet and the loop of its README, with the EMA of its Trainer."""
    from ema_pytorch import EMA

    # Import only the module: its package imports torchvision, which is not needed.
    (package,) = importlib.util.find_spec("denoising_diffusion_pytorch").submodule_search_locations
    sys.path.append(package)
    import classifier_free_guidance as theirs

    torch.manual_seed(0)
    data = referee.evaluator.train
    unet = theirs.Unet(dim=32, dim_mults=(1, 2, 4), num_classes=10, channels=1)
    diffusion = theirs.GaussianDiffusion(unet, image_size=28, timesteps=1000, sampling_timesteps=50)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)

    def step(indices: torch.Tensor) -> None:
        loss = diffusion(data.images[indices].float() / 255, classes=data.group_of[indices])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    images, taken = train_for(step, len(data), seconds, "denoising-diffusion-pytorch")
    drawn = ema.ema_model.eval().sample(classes=referee.labels, cond_scale=SCALE)
    yield referee.line("denoising-diffusion-pytorch", taken, images, referee.of_pixels(drawn * 2 - 1))


PEERS = {"diffusers": diffusers, "denoising-diffusion-pytorch": denoising_diffusion_pytorch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="minutes per other library (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=500, help="number of samples (default: %(default)s)")
    parser.add_argument("--who", nargs="+", choices=["ours", *PEERS], default=["ours", *PEERS])
    parser.add_argument("--config", type=Path, default=FAST, help="config of our run")
    parser.add_argument("--folder", type=Path, help="folder to keep our run in (default: a temporary folder)")
    parser.add_argument("words", nargs="*", metavar="key=value", help="overrides of the config of our run")
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        sys.exit("peers.py requires a machine without a GPU; hide the GPU with CUDA_VISIBLE_DEVICES=")

    referee = Referee(load_config(Config, arguments.config), arguments.samples)
    baseline = referee.evaluator.real_baseline(arguments.samples)
    print(
        f"On {hardware()}; {arguments.samples} samples, by {referee.evaluator.judge_name}. "
        f"The same number of real images has a Fréchet distance of {baseline:.1f}.\n"
    )
    print("| library | time | images seen | prompt accuracy | Fréchet distance |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for who in arguments.who:
            lines = (
                ours(referee, (arguments.folder or Path(scratch)).resolve(), arguments.config, arguments.words)
                if who == "ours"
                else PEERS[who](referee, 60 * arguments.minutes)
            )
            for line in lines:
                print(line, flush=True)


if __name__ == "__main__":
    main()
