"""Averages of the weights over training, which draw better pictures than the weights themselves.

An average is a power function of the step (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models", section 3.1): it remembers a fixed share of the training so far, however long that is, and forgets
the random start by itself, so it needs neither a warm-up nor a decay that fits the length of the run.

Two of them are kept. One is what the checkpoints hold; from snapshots of both an average of any other width can be put
together after training (`posthoc_ema.py`).
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


class EMA:
    """An average of parameters, kept where they are: on the same device, sharded as they are.

    width: sigma_rel, the average's standard deviation in time as a share of the training so far.
    """

    def __init__(self, parameters: Weights, width: float) -> None:
        self.width = width
        self.exponent = power_of_width(width)
        self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Weights, step: int) -> None:
        """Take in the parameters after optimizer step number `step`, counted from 1.

        beta = (1 - 1 / step)^(exponent + 1) is 0 at the first step, which therefore replaces the start.
        """
        beta = (1 - 1 / step) ** (self.exponent + 1)
        averages, weights = list(self.weights.values()), [parameters[name].detach() for name in self.weights]
        torch._foreach_lerp_(averages, weights, 1 - beta)  # pyright: ignore[reportPrivateImportUsage]


def power_of_width(width: float) -> float:
    """Return the exponent gamma whose average has relative width sigma_rel.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) is a cubic in gamma; its largest real root is
    wanted.
    """
    square = width**-2
    roots = np.roots([1, 7, 16 - square, 12 - square])
    return float(roots[np.isreal(roots)].real.max())
