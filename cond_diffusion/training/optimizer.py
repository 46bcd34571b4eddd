"""Muon (Jordan et al. 2024): momentum, made orthogonal, for the weights that are matrices; AdamW for the others.

A step of Adam changes a matrix mostly along its few strongest directions. Muon replaces the momentum by the nearest
matrix whose singular values are all 1, so that all directions are learned alike: on this package's networks a picture
seen is worth several of AdamW's. Its steps have the size of AdamW's, so that both share one learning rate (Liu et al.
2025, "Muon is scalable for LLM training", eq. 4).

`torch.optim.Muon` takes no convolutions, works on one parameter at a time, and in bf16, which few CPUs are fast at.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.adamw import adamw

STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration: Jordan et al. 2024


class Muon(torch.optim.Optimizer):
    """One optimizer for all parameters, in the order in which they are given.

    first_and_last: parameters that are AdamW's whatever their shape: the layers that read pixels and write them.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        first_and_last: Iterable[nn.Parameter] = (),
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        # "fused" is what torch goes by when it puts a loaded state's counter of steps back on the parameters' device.
        super().__init__(parameters, {**defaults, "fused": True})
        self._adamw_s = {id(parameter) for parameter in first_and_last}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change the parameters by their gradients."""
        for group in self.param_groups:
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            by_side: dict[int, list[Tensor]] = {}
            others = []
            for parameter in given:
                if parameter.ndim < 2 or id(parameter) in self._adamw_s:
                    others.append(parameter)
                else:
                    by_side.setdefault(min(len(parameter), parameter[0].numel()), []).append(parameter)
            for parameters in by_side.values():
                self._orthogonal_step(parameters, group)
            self._adamw_step(others, group)

    def _orthogonal_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Change matrices with the same shorter side, all at once."""
        directions = []
        for parameter in parameters:
            gradient, state = parameter.grad, self.state[parameter]
            assert gradient is not None
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            directions.append(gradient.lerp(state["momentum"], group["momentum"]).flatten(1))  # Nesterov's
        for parameter, step in zip(parameters, orthogonal(directions), strict=True):
            size = group["lr"] * 0.2 * max(step.shape) ** 0.5  # as large, on average, as AdamW's
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(step.reshape(parameter.shape), alpha=size)

    def _adamw_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter].update(step=torch.zeros((), device=parameter.device), **zeros)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonal(matrices: list[Float[Tensor, "_ _"]]) -> list[Float[Tensor, "_ _"]]:
    """Return about the nearest matrices whose singular values are 1: these come out between 0.7 and 1.2.

    matrices: all with the same shorter side.

    A Newton-Schulz iteration x <- p(x x^T) x, with a polynomial p that brings small singular values up fast. All its
    p(x x^T) are polynomials of the first x x^T, so their product is found on the short side alone, for all matrices at
    once, and each x is multiplied by it at the end. Rounding to TF32 would not do: p enlarges what is small.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    wide = [matrix if len(matrix) <= matrix.shape[1] else matrix.T for matrix in matrices]
    wide = [matrix / (matrix.norm() + 1e-7) for matrix in wide]
    gram = torch.stack([x @ x.T for x in wide])
    one = torch.eye(gram.shape[1], device=gram.device, dtype=gram.dtype)
    product = one.expand_as(gram)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        p = a * one + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product, gram = p @ product, p @ gram @ p
    found = [q @ x for q, x in zip(product, wide, strict=True)]
    torch.set_float32_matmul_precision(precision)
    return [x if len(matrix) <= matrix.shape[1] else x.T for x, matrix in zip(found, matrices, strict=True)]
