"""Closed-form denoisers, and the samplers that are tested with them."""

from functools import partial

import torch
from torch import Tensor

from cond_diffusion.diffusion.objective import Denoiser, DenoiserOutput
from cond_diffusion.diffusion.samplers import Sampler, ddim, ddpm, dpm_solver, euler, heun, unipc
from cond_diffusion.diffusion.schedule import NoiseSchedule

SAMPLERS: dict[str, Sampler] = {
    "ddpm": partial(ddpm, variance="posterior"),
    "ddpm beta": partial(ddpm, variance="beta"),
    "ddim": partial(ddim, eta=0.0),
    "ddim 0.5": partial(ddim, eta=0.5),
    "ddim 1": partial(ddim, eta=1.0),
    "euler": euler,
    "heun": heun,
    "dpm_solver": partial(dpm_solver, eta=0.0, order=2),
    "dpm_solver 1": partial(dpm_solver, eta=0.0, order=1),
    "dpm_solver sde": partial(dpm_solver, eta=1.0, order=2),
    "dpm_solver 1 sde": partial(dpm_solver, eta=1.0, order=1),
    "unipc": partial(unipc, order=2),
    "unipc 3": partial(unipc, order=3),
}


def mixture_denoiser(
    schedule: NoiseSchedule, means: list[float], deviations: list[float], weights: list[float]
) -> Denoiser:
    """Return the optimal denoiser, x_0_hat = E[x_0 | x_t], of data that is a mixture of Gaussians."""
    mean, variance, weight = (
        torch.tensor(values, dtype=torch.float64) for values in (means, [d**2 for d in deviations], weights)
    )

    def denoise(x_t: Tensor, t: int) -> DenoiserOutput:
        alpha_bar = schedule.alpha_bar[t]
        alpha = alpha_bar.sqrt()
        noised = alpha_bar * variance + 1 - alpha_bar
        distance = x_t[..., None].double() - alpha * mean
        responsibility = (weight.log() - noised.log() / 2 - distance**2 / (2 * noised)).softmax(-1)
        x_0 = (responsibility * (mean + alpha * variance / noised * distance)).sum(-1)
        eps = (x_t.double() - alpha * x_0) / (1 - alpha_bar).sqrt()
        return DenoiserOutput(x_0.to(x_t), eps.to(x_t))

    return denoise
