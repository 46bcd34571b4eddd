"""The likelihood of real images: the variational bound, term by term, in bits per dimension.

The sum of these terms is an upper bound of -log p(x_0) (Ho et al. 2020, eq. 5):

    prior    KL(q(x_T | x_0) || N(0, I))
    L_t      KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))     for t from T - 1 to 1
    decoder  -log p(x_0 | x_1)                                 of the 8-bit pixel values, at t = 0

The variance of p is fixed to that of the posterior, or to beta. The network is conditioned on the image's own caption,
without guidance.
"""

import hashlib
import math
import shutil
from collections.abc import Iterator
from functools import partial
from typing import get_args

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.schedule import Variance
from cond_diffusion.data.cache import cached_shards, context_key
from cond_diffusion.data.dataset import load_captioned_images
from cond_diffusion.device import autocast
from cond_diffusion.diffusion.guidance import guided
from cond_diffusion.diffusion.objective import Denoiser, denoiser
from cond_diffusion.diffusion.samplers import Noise
from cond_diffusion.diffusion.schedule import Images, NoiseSchedule, PerExample
from cond_diffusion.errors import Interrupted, UserError
from cond_diffusion.evaluation import metrics
from cond_diffusion.files import cache_folder
from cond_diffusion.images import to_model
from cond_diffusion.models.text_encoder import embed
from cond_diffusion.pipeline.text_to_image import TextToImage
from cond_diffusion.seeding import generator

VARIANCES: tuple[Variance, ...] = get_args(Variance)
HALF_BIN = 1 / 255  # half of the distance between two 8-bit values in [-1, 1]


def prior_bits(schedule: NoiseSchedule, x_0: Images) -> PerExample:
    """Return KL(q(x_T | x_0) || N(0, I)) in bits per dimension."""
    alpha_bar = schedule.alpha_bar[-1].item()
    return _mean_bits((alpha_bar * x_0.double() ** 2 - alpha_bar - math.log1p(-alpha_bar)) / 2)


def step_bits(schedule: NoiseSchedule, x_0: Images, x_0_hat: Images, t: int, variance: Variance) -> PerExample:
    """Return L_t or, at t = 0, the decoder term in bits per dimension, of images in [-1, 1] and their predictions.

    L_t is the KL divergence of two Gaussians whose means differ by x_0_coefficient (x_0 - x_0_hat).
    """
    if t == 0:
        return decoder_bits(x_0, x_0_hat, schedule.decoder_variance)
    posterior = schedule.posterior(t, t - 1)
    model_variance = posterior.variance if variance == "posterior" else posterior.beta
    ratio = posterior.variance / model_variance
    mean_error = posterior.x_0_coefficient * (x_0 - x_0_hat).double()
    return _mean_bits((ratio - 1 - math.log(ratio) + mean_error**2 / model_variance) / 2)


def decoder_bits(x_0: Images, mean: Images, variance: float) -> PerExample:
    """Return -log of the integral of N(mean, variance) over each pixel value's bin (eq. 13), in bits per dimension.

    The first and the last bin are open.
    """
    deviation = variance**0.5
    upper = (x_0 - mean).double() / deviation + HALF_BIN / deviation
    lower = (x_0 - mean).double() / deviation - HALF_BIN / deviation
    upper = upper.masked_fill(x_0 > 1 - HALF_BIN, math.inf)
    lower = lower.masked_fill(x_0 < -1 + HALF_BIN, -math.inf)
    # The difference of two probabilities close to 1 loses all digits; that of the mirrored values does not.
    mirror = lower > 0
    upper, lower = torch.where(mirror, -lower, upper), torch.where(mirror, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return _mean_bits(-(log_upper + torch.log1p(-torch.exp(log_lower - log_upper))))


def variational_bound(
    denoise: Denoiser, schedule: NoiseSchedule, x_0: Images, noise: Noise
) -> Iterator[tuple[int, dict[Variance, PerExample]]]:
    """Yield (t, {variance: bits per dimension of the term}) from T - 1 to 0, each estimated from one sample of x_t."""
    for t in reversed(range(schedule.num_timesteps)):
        x_t = schedule.q_sample(x_0, torch.full((len(x_0),), t), noise())
        x_0_hat = denoise(x_t, t).x_0_hat
        yield t, {variance: step_bits(schedule, x_0, x_0_hat, t, variance) for variance in VARIANCES}


def _mean_bits(nats: Images) -> PerExample:
    return nats.flatten(1).mean(1) / math.log(2)


@torch.inference_mode()
def bits_per_dimension(
    pipe: TextToImage, config: DataConfig, split: str, *, count: int | None = None, batch_size: int = 250, seed: int = 0
) -> tuple[Float[Tensor, " n"], Float[Tensor, "variances n T"]]:
    """Compute the variational bound of a data split, in bits per dimension.

    Batches are kept in the cache folder until all are complete, so a call that was interrupted can be repeated.

    Args:
        count: Number of images, from the first one; None for all.
        seed: Seed of the noise in x_t.

    Returns:
        The prior term of each image, and the other terms from t = T - 1 to 0 for each variance and image.

    Raises:
        Interrupted: On Ctrl-C.
    """
    if pipe.latent_space.is_latent:
        raise UserError(f"checkpoint: {pipe.folder} generates latents; bits per dimension are defined only for pixels")
    data = load_captioned_images(config, split)
    total = min(len(data), count or len(data))
    captions = [data.caption_groups[group][0] for group in data.group_of[:total].tolist()]

    def compute(rows: range) -> dict[str, Tensor]:
        batch = slice(rows.start, rows.stop)
        x_0 = pipe.latent_space.encode(to_model(data.images[batch].to(pipe.device)))
        context = embed(pipe.text_encoder, captions[batch])
        unguided = guided(pipe.unet, context, context, torch.ones(len(rows)), project=pipe.unet.project_context)
        denoise = denoiser(unguided, pipe.prediction, pipe.clip_fn())
        draw = generator("likelihood", seed, rows.start, device=pipe.device)
        noise = partial(torch.randn, x_0.shape, generator=draw, device=pipe.device)
        bound = variational_bound(denoise, pipe.schedule, x_0, noise)
        what = f"images {rows.start} to {rows.stop - 1}"
        bound = tqdm(bound, what, pipe.schedule.num_timesteps, unit=" steps", leave=False)
        with autocast(pipe.precision, pipe.device):
            terms = torch.stack([torch.stack([*term.values()]) for _, term in bound], dim=-1)
        return {"prior": prior_bits(pipe.schedule, x_0), "terms": terms}

    network = (metrics.digest(pipe.unet), pipe.unet.config, pipe.latent_space.digest(), pipe.precision)
    process = (pipe.prediction.kind, pipe.schedule.config, context_key(pipe.text_encoder, captions))
    settings = (network, process, metrics.fingerprint(data), total, batch_size, seed)
    folder = cache_folder() / "likelihood" / hashlib.blake2b(repr(settings).encode(), digest_size=16).hexdigest()
    accelerator = Accelerator(cpu=pipe.device.type == "cpu")
    try:
        shards = cached_shards(folder, total, batch_size, compute, accelerator, "computing the bound")
    except KeyboardInterrupt as interruption:
        raise Interrupted("interrupted; the same command continues after the complete batches") from interruption
    accelerator.wait_for_everyone()
    shutil.rmtree(folder, ignore_errors=True)
    return torch.cat([shard["prior"] for shard in shards]), torch.cat([shard["terms"] for shard in shards], dim=1)


def format_bits(prior: Float[Tensor, " n"], terms: Float[Tensor, "variances n T"]) -> str:
    """Format the output of `bits_per_dimension` as a table.

    The rows are the terms, with L_t summed over tenths of the timesteps, and the total with its standard error.
    """
    steps = terms.shape[2] - 1  # the last term is the decoder term
    rows = [("variance", [*VARIANCES]), ("prior", [f"{prior.mean():.5f}"] * len(terms))]
    for i in range(10):
        if (start := i * steps // 10) < (stop := (i + 1) * steps // 10):
            tenth = terms[:, :, start:stop].sum(2).mean(1)
            rows.append((f"L_t, t = {steps - start} to {steps - stop + 1}", [f"{bits:.5f}" for bits in tenth]))
    rows.append(("decoder", [f"{bits:.5f}" for bits in terms[:, :, -1].mean(1)]))
    totals = prior + terms.sum(2)
    errors = totals.std(1) / totals.shape[1] ** 0.5 if totals.shape[1] > 1 else torch.full((len(totals),), math.nan)
    sums = [f"{total:.4f} +- {error:.4f}" for total, error in zip(totals.mean(1), errors, strict=True)]
    rows.append(("bits per dimension", sums))
    return "\n".join(f"{name:20}" + "".join(f"{value:>22}" for value in values) for name, values in rows)
