"""How likely a model finds real pictures: the variational bound, term by term, in bits per dimension.

Coding a picture with the chain costs, in expectation (Ho et al. 2020, eq. 5):

    prior    KL(q(x_T | x_0) || N(0, I))                       what the end of the chain still knows of it
    L_t      KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))     what the network does not know, at each t from T - 1 to 1
    decoder  -log p(x_0 | x_1)                                 the bytes themselves, at t = 0

and their sum bounds -log p(x_0) from above. p's variance is fixed: the posterior's, or beta. The network is asked for
the picture's own caption, unguided.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from cond_diffusion.config.run import checkpoint_config
from cond_diffusion.config.schedule import Variance
from cond_diffusion.data.contexts import embed
from cond_diffusion.data.dataset import load_captioned_images
from cond_diffusion.diffusion.guidance import GuidanceConfig, guided
from cond_diffusion.diffusion.prediction import Denoiser, denoiser
from cond_diffusion.diffusion.samplers import Noise
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.errors import UserError, command_line
from cond_diffusion.images import to_model
from cond_diffusion.models.latents import VAE
from cond_diffusion.pipeline.pretrained import read_checkpoint
from cond_diffusion.pipeline.text_to_image import TextToImage
from cond_diffusion.seeding import generator

VARIANCES: tuple[Variance, ...] = get_args(Variance)
HALF_BIN = 1 / 255  # half of the distance between two bytes in [-1, 1]


def prior_bits(schedule: NoiseSchedule, x_0: Float[Tensor, "b *chw"]) -> Float[Tensor, " b"]:
    """Return KL(q(x_T | x_0) || N(0, I)) in bits per dimension."""
    alpha_bar = schedule.alpha_bar[-1].item()
    nats = (alpha_bar * x_0.double() ** 2 - alpha_bar - math.log1p(-alpha_bar)) / 2
    return _mean_bits(nats)


def step_bits(
    schedule: NoiseSchedule,
    x_0: Float[Tensor, "b *chw"],
    x_0_hat: Float[Tensor, "b *chw"],
    t: int,
    variance: Variance,
) -> Float[Tensor, " b"]:
    """Return L_t, or at t = 0 the decoder's term, in bits per dimension.

    L_t is the KL divergence of two Gaussians whose means differ by x_0_coefficient (x_0 - x_0_hat).
    """
    if t == 0:
        return decoder_bits(x_0, x_0_hat, schedule.decoder_variance)
    posterior = schedule.posterior(t, t - 1)
    ours = posterior.variance if variance == "posterior" else posterior.beta
    ratio = posterior.variance / ours
    off = posterior.x_0_coefficient * (x_0 - x_0_hat).double()
    return _mean_bits((ratio - 1 - math.log(ratio) + off**2 / ours) / 2)


def decoder_bits(x_0: Float[Tensor, "b *chw"], mean: Float[Tensor, "b *chw"], variance: float) -> Float[Tensor, " b"]:
    """Return -log of what N(mean, variance) gives each byte: its integral around the byte, the two ends being open
    (Ho et al. 2020, eq. 13)."""
    deviation = variance**0.5
    above = (x_0 - mean).double() / deviation + HALF_BIN / deviation
    below = (x_0 - mean).double() / deviation - HALF_BIN / deviation
    above = above.masked_fill(x_0 > 1 - HALF_BIN, math.inf)
    below = below.masked_fill(x_0 < -1 + HALF_BIN, -math.inf)
    # In the tail where both are near 1, their difference would be lost; the mirrored one is not.
    mirror = below > 0
    above, below = torch.where(mirror, -below, above), torch.where(mirror, -above, below)
    log_above, log_below = torch.special.log_ndtr(above), torch.special.log_ndtr(below)
    return _mean_bits(-(log_above + torch.log1p(-torch.exp(log_below - log_above))))


def variational_bound(
    denoise: Denoiser, schedule: NoiseSchedule, x_0: Float[Tensor, "b *chw"], noise: Noise
) -> Iterator[tuple[int, dict[Variance, Float[Tensor, " b"]]]]:
    """Yield (t, the bits of its term with either variance) from T - 1 to 0, each with one x_t drawn by `noise`."""
    for t in reversed(range(schedule.num_timesteps)):
        x_t = schedule.q_sample(x_0, torch.full((len(x_0),), t), noise())
        x_0_hat = denoise(x_t, t).x_0_hat
        yield t, {variance: step_bits(schedule, x_0, x_0_hat, t, variance) for variance in VARIANCES}


def _mean_bits(nats: Float[Tensor, "b *chw"]) -> Float[Tensor, " b"]:
    return nats.flatten(1).mean(1) / math.log(2)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="The variational bound of real pictures, in bits per dimension.")
    parser.add_argument(
        "--checkpoint", default="builtin", help="a run folder, a checkpoint folder or a hub id (default: %(default)s)"
    )
    parser.add_argument("--split", default="test", help="of the checkpoint's own data (default: %(default)s)")
    parser.add_argument("--samples", type=int, help="only the first so many pictures (default: all)")
    parser.add_argument("--batch-size", type=int, default=250, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    arguments = parser.parse_args()
    for option in ("samples", "batch_size"):
        if (value := getattr(arguments, option)) is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')}: {value} must be at least 1")

    pipe, config = read_checkpoint(
        arguments.checkpoint, lambda folder: (TextToImage.from_pretrained(folder), checkpoint_config(folder))
    )
    pipe.to_accelerator()
    if isinstance(pipe.space, VAE):
        raise UserError(f"--checkpoint: {arguments.checkpoint} draws latents; bits per dimension are those of pixels")
    schedule = pipe.schedule
    data = load_captioned_images(config.data, arguments.split)
    count = min(len(data), arguments.samples or len(data))
    contexts = embed(pipe.text_encoder, [captions[0] for captions in data.caption_groups])

    priors, terms = [], []
    starts = range(0, count, arguments.batch_size)
    with tqdm(total=len(starts) * schedule.num_timesteps, desc="bits per dimension", unit=" steps") as bar:
        for start in starts:
            rows = slice(start, min(count, start + arguments.batch_size))
            x_0 = pipe.space.encode(to_model(data.images[rows].to(pipe.device)))
            context = contexts[data.group_of[rows].to(pipe.device)]
            draw = generator("likelihood", arguments.seed, start, device=pipe.device)
            bits = []
            for _, term in variational_bound(_unguided(pipe, context), schedule, x_0, _noise_like(x_0, draw)):
                bits.append(torch.stack([term[variance] for variance in VARIANCES]))
                bar.update()
            priors.append(prior_bits(schedule, x_0).cpu())
            terms.append(torch.stack(bits, dim=-1).cpu())
    print(_table(torch.cat(priors), torch.cat(terms, dim=1)))


def _unguided(pipe: TextToImage, context: Float[Tensor, "b l d"]) -> Denoiser:
    scale_1, plain = torch.ones(len(context)), GuidanceConfig()
    network = guided(pipe.unet, context, context, scale_1, plain, project=pipe.unet.project_context)
    return denoiser(network, pipe.prediction, pipe.range_of_pixels(plain))


def _noise_like(x: Tensor, draw: torch.Generator) -> Noise:
    return lambda: torch.randn(x.shape, generator=draw, device=x.device)


def _table(prior: Float[Tensor, " n"], terms: Float[Tensor, "variances n T"]) -> str:
    """Return the terms, L_t summed over tenths of the chain, and their sum with its standard error over pictures."""
    rows = [("variance", list(VARIANCES)), ("prior", [f"{prior.mean():.5f}"] * len(terms))]
    steps = terms.shape[2] - 1  # the last term is the decoder's
    for tenth in (slice(i * steps // 10, (i + 1) * steps // 10) for i in range(10)):
        if tenth.stop > tenth.start:
            name = f"L_t, t = {steps - tenth.start} to {steps - tenth.stop + 1}"
            rows.append((name, [f"{bits[:, tenth].sum(1).mean():.5f}" for bits in terms]))
    rows.append(("decoder", [f"{bits[:, -1].mean():.5f}" for bits in terms]))
    totals = [prior + bits.sum(1) for bits in terms]
    errors = [total.std().item() / len(total) ** 0.5 if len(total) > 1 else math.nan for total in totals]
    sums = [f"{total.mean():.4f} +- {error:.4f}" for total, error in zip(totals, errors, strict=True)]
    rows.append(("bits per dimension", sums))
    return "\n".join(f"{name:20}" + "".join(f"{value:>22}" for value in values) for name, values in rows)


if __name__ == "__main__":
    sys.exit(command_line(main))
