"""An average of the weights over training, which draws better pictures than the weights themselves.

The average is a power function of the step (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models", section 3.1): it remembers a fixed share of the training so far, however long that is, and forgets
the random start by itself, so it needs neither a warm-up nor a decay that fits the length of the run.
"""

import copy
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class EMA(Generic[Network]):
    """A copy of a network whose parameters are averages of the network's.

    width: sigma_rel, the average's standard deviation in time as a share of the training so far.
    """

    def __init__(self, network: Network, width: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.exponent = power_of_width(width)

    @torch.no_grad()
    def update(self, network: Network, step: int) -> None:
        """Take in the parameters after optimizer step number `step`, counted from 1.

        beta = (1 - 1 / step)^(exponent + 1) is 0 at the first step, which therefore replaces the start.
        """
        beta = (1 - 1 / step) ** (self.exponent + 1)
        averages: list[Tensor] = list(self.network.parameters())
        weights: list[Tensor] = list(network.parameters())
        torch._foreach_lerp_(averages, weights, 1 - beta)  # pyright: ignore[reportPrivateImportUsage]


def power_of_width(width: float) -> float:
    """Return the exponent gamma whose average has relative width sigma_rel.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) is a cubic in gamma; its largest real root is
    wanted.
    """
    square = width**-2
    roots = np.roots([1, 7, 16 - square, 12 - square])
    return float(roots[np.isreal(roots)].real.max())
