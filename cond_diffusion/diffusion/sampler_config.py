"""Which sampler, with which of its options; combinations that mean nothing are refused in one line."""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from cond_diffusion.config.schedule import ScheduleConfig, Variance
from cond_diffusion.diffusion import samplers
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.errors import UserError, did_you_mean

SamplerName = Literal["ddpm", "ddim", "euler", "heun", "dpm_solver", "unipc"]

# Below this many steps the variance beta leaves noise in the picture (Nichol and Dhariwal 2021, figure 8).
FEWEST_STEPS_FOR_BETA = 200

_BELONGS_TO = {"variance": ("ddpm",), "eta": ("ddim", "dpm_solver"), "order": ("dpm_solver", "unipc")}
_HIGHEST_ORDER = {"dpm_solver": 2, "unipc": 3}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplerConfig:
    """An algorithm of `samplers.py`; None leaves an option at its default.

    variance: of ddpm; the schedule's own, unless there are too few steps for it.
    eta: of ddim and dpm_solver, 0 (no noise, the default) to 1.
    order: of dpm_solver (1 or 2) and unipc (1 to 3); 2.
    """

    name: str = "ddpm"
    variance: str | None = None
    eta: float | None = None
    order: int | None = None

    def __post_init__(self) -> None:
        names = get_args(SamplerName)
        if self.name not in names:
            raise UserError(
                f"sampler: {self.name!r} is unknown{did_you_mean(self.name, names)}; there are {', '.join(names)}"
            )
        for option, owners in _BELONGS_TO.items():
            if (value := getattr(self, option)) is not None and self.name not in owners:
                raise UserError(
                    f"{option}: {value} means nothing to the sampler {self.name}; it belongs to {' and '.join(owners)}"
                )
        if self.variance is not None and self.variance not in get_args(Variance):
            raise UserError(f"variance: {self.variance!r} is unknown; expected {' or '.join(get_args(Variance))}")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise UserError(f"eta: {self.eta} must lie between 0 (no noise) and 1")
        if self.order is not None and not 1 <= self.order <= (highest := _HIGHEST_ORDER[self.name]):
            raise UserError(f"order: {self.order} must lie between 1 and {highest} for the sampler {self.name}")

    def timesteps(self, schedule: NoiseSchedule, steps: int | None) -> list[int]:
        """Return the timesteps that a chain of `steps` steps visits, those of diffusers' scheduler of this algorithm.

        Where the schedule leaves the spacing to the sampler, it is "leading" for ddpm and ddim and "linspace" for the
        others. The multistep solvers' last step comes to x_0 from farther away than the least noisy timestep.
        """
        spacing = schedule.config.spacing or ("leading" if self.name in ("ddpm", "ddim") else "linspace")
        return schedule.shorter_chain(steps, spacing, first_too=self.name not in ("dpm_solver", "unipc"))

    def sampler(self, schedule: ScheduleConfig, steps: int) -> samplers.Sampler:
        """Return the generator function, its options filled in, for a chain of `steps` steps."""
        eta, order = self.eta or 0.0, self.order or 2
        match self.name:
            case "ddpm":
                return partial(samplers.ddpm, variance=self._variance(schedule, steps))
            case "ddim":
                return partial(samplers.ddim, eta=eta)
            case "euler":
                return samplers.euler
            case "heun":
                return samplers.heun
            case "dpm_solver":
                return partial(samplers.dpm_solver, eta=eta, order=order)
            case _:
                return partial(samplers.unipc, order=order)

    def _variance(self, schedule: ScheduleConfig, steps: int) -> Variance:
        if self.variance is not None:
            return "beta" if self.variance == "beta" else "posterior"
        if schedule.variance == "beta" and steps < FEWEST_STEPS_FOR_BETA:
            logger.warning(
                "the model's variance, beta, leaves noise in a picture of fewer than %d steps (%d): using posterior; "
                "variance=beta insists",
                FEWEST_STEPS_FOR_BETA,
                steps,
            )
            return "posterior"
        return schedule.variance
