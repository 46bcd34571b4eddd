"""What training minimises: the epsilon loss (Ho et al. 2020, eq. 14), with uniform t."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from cond_diffusion.schedule import NoiseSchedule

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, t, context) -> eps_hat, for a batch with a timestep each."""


def epsilon_loss(
    network: Network,
    schedule: NoiseSchedule,
    x_0: Float[Tensor, "b *chw"],
    t: Int64[Tensor, " b"],
    eps: Float[Tensor, "b *chw"],
    context: Float[Tensor, "b l d"],
) -> Float[Tensor, ""]:
    """Return the mean of (eps - eps_hat(x_t, t, context))^2, x_t being x_0 noised with eps."""
    return F.mse_loss(network(schedule.q_sample(x_0, t, eps), t, context), eps)


def uniform_timesteps(num_timesteps: int, count: int, draw: torch.Generator) -> Int64[Tensor, " count"]:
    """Draw t uniformly from 0 .. num_timesteps - 1."""
    return torch.randint(num_timesteps, (count,), generator=draw, device=draw.device)
