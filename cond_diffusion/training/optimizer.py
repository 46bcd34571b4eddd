"""Muon optimizer (Jordan et al. 2024): orthogonalized momentum for weight matrices, AdamW for all other parameters;
and the schedule of the learning rate.

An Adam update of a matrix is dominated by a few singular directions. Muon replaces the momentum by the nearest matrix
whose singular values are all 1, so all directions are updated equally; on this package's networks it reaches the same
loss with several times fewer images than AdamW. Updates are scaled to the RMS of AdamW's, so both share one learning
rate (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4).

`torch.optim.Muon` does not support convolutions, processes one parameter at a time, and computes in bf16, which is slow
on most CPUs.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.adamw import adamw

from cond_diffusion.config.run import TrainConfig

# Of the Newton-Schulz iteration (Jordan et al. 2024).
NEWTON_SCHULZ_STEPS, NEWTON_SCHULZ_COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolution kernels, AdamW for everything else.

    Args:
        adamw_parameters: Parameters that AdamW updates whatever their shape: the input and output layers.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        adamw_parameters: Iterable[nn.Parameter] = (),
        weight_decay: float = 0.0,
    ) -> None:
        # "fused": torch checks this key to move a loaded step counter to the parameters' device.
        constants = {"momentum": 0.95, "betas": (0.9, 0.999), "eps": 1e-8, "fused": True}
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, **constants})
        self._adamw_ids = {id(parameter) for parameter in adamw_parameters}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            muon_parameters: dict[int, list[Tensor]] = {}  # by the length of the shorter side
            adamw_parameters = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.ndim < 2 or id(parameter) in self._adamw_ids:
                    adamw_parameters.append(parameter)
                else:
                    muon_parameters.setdefault(min(len(parameter), parameter[0].numel()), []).append(parameter)
            for parameters in muon_parameters.values():
                self._muon_step(parameters, group)
            self._adamw_step(adamw_parameters, group)

    def _muon_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices that have the same shorter side in one batch."""
        directions = []
        for parameter in parameters:
            gradient, state = parameter.grad, self.state[parameter]
            assert gradient is not None
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            directions.append(gradient.lerp(state["momentum"], group["momentum"]).flatten(1))  # Nesterov momentum
        for parameter, update in zip(parameters, orthogonalize(directions), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            scale = group["lr"] * 0.2 * max(update.shape) ** 0.5  # matches the RMS of AdamW's updates
            parameter.sub_(update.reshape(parameter.shape), alpha=scale)

    def _adamw_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter].update(step=torch.zeros((), device=parameter.device), **zeros)
        states = [self.state[parameter] for parameter in parameters]
        averages, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        options = {name: group[name] for name in ("lr", "weight_decay", "eps", "fused")}
        options |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "amsgrad": False, "maximize": False}
        adamw(parameters, gradients, averages, squares, [], steps, **options)


def orthogonalize(matrices: list[Float[Tensor, "_ _"]]) -> list[Float[Tensor, "_ _"]]:
    """Orthogonalize each matrix approximately by Newton-Schulz iteration; singular values end in [0.7, 1.2].

    The iteration is x <- p(x x^T) x with a polynomial p that increases small singular values quickly. Every p(x x^T) is
    a polynomial of the first x x^T, so their product is computed on the shorter side only, for all matrices in one
    batch, and multiplied by x at the end.

    Args:
        matrices: Matrices that have the same shorter side.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # p amplifies the rounding errors of TF32
    wide = [matrix if len(matrix) <= matrix.shape[1] else matrix.T for matrix in matrices]
    wide = [matrix / (matrix.norm() + 1e-7) for matrix in wide]
    gram = torch.stack([x @ x.T for x in wide])
    identity = torch.eye(gram.shape[1], device=gram.device, dtype=gram.dtype)
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    product = p = a * identity + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    for _ in range(NEWTON_SCHULZ_STEPS - 1):
        gram = p @ gram @ p
        p = a * identity + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = p @ product
    results = [q @ x for q, x in zip(product, wide, strict=True)]
    torch.set_float32_matmul_precision(precision)
    return [x if len(matrix) <= matrix.shape[1] else x.T for x, matrix in zip(results, matrices, strict=True)]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then constant, cosine, or linear decay over
    the last `decay_steps`, or over a shorter run as a whole (Hu et al. 2024, "MiniCPM", section 4).

    It depends on the step alone, so no scheduler state has to be saved.
    """
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    match config.learning_rate_schedule:
        case "constant":
            decay = 1.0
        case "cosine":
            decay_steps = max(1, config.max_steps - config.warmup_steps)
            decay = (1 + math.cos(math.pi * max(0, step - config.warmup_steps) / decay_steps)) / 2
        case "warmup_stable_decay":
            decay = min(1.0, (config.max_steps - step) / (min(config.decay_steps, config.max_steps) + 1))
    return config.learning_rate * warmup * decay
