"""Which noise schedule, and its form on disk: the `scheduler_config.json` of diffusers' `DDPMScheduler`.

What other schedulers of diffusers keep of a schedule is read as well: which of them it is says how somebody would draw,
and that is chosen anew for each picture here.
"""

from typing import Any, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from cond_diffusion.config.schema import from_json, section
from cond_diffusion.errors import UserError, refuse_other_values

BetaSchedule = Literal["linear", "scaled_linear", "cosine", "sigmoid"]
Spacing = Literal["trailing", "leading", "linspace"]
READING_OFFSET = ("leading", None)  # the spacings that read steps_offset: None is leading for some samplers
Variance = Literal["posterior", "beta"]

MOST_TIMESTEPS = 1_000_000


@section("schedule")
@dataclass(frozen=True)
class ScheduleConfig:
    num_timesteps: int = Field(default=1000, ge=1, le=MOST_TIMESTEPS, description="T, the number of timesteps")
    beta_start: float = Field(default=1e-4, description="beta of the first step")
    beta_end: float = Field(default=0.02, description="beta of the last step")
    beta_schedule: BetaSchedule = Field(
        default="linear",
        description="how beta rises: `linear` (Ho et al. 2020), `scaled_linear` (Stable Diffusion's), `sigmoid`; or "
        "`cosine` (Nichol and Dhariwal 2021, eq. 17)",
    )
    betas: tuple[float, ...] = Field(default=(), description="a list of them, in place of the above")
    zero_terminal_snr: bool = Field(
        default=False,
        description="leave no signal at the last timestep (Lin et al. 2023); for `v_prediction` and `sample`",
    )
    spacing: Spacing | None = Field(
        default="trailing",
        description="which timesteps fewer steps visit: `trailing`, `leading`, `linspace`; `null`: as diffusers' "
        "scheduler of the sampler does by default",
    )
    steps_offset: int = Field(default=0, ge=0, description="offset of `leading`")
    variance: Variance = Field(default="posterior", description="variance of a DDPM step: `posterior` or `beta`")
    clip_x_0: bool = Field(default=True, description="clip x_0_hat to [-1, 1] while sampling")

    def __post_init__(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(
                f"schedule.beta_start, schedule.beta_end: {self.beta_start} and {self.beta_end}; "
                "expected 0 < beta_start <= beta_end < 1"
            )
        if self.betas and len(self.betas) != self.num_timesteps:
            raise UserError(
                f"schedule.betas: {len(self.betas)} values for schedule.num_timesteps={self.num_timesteps}; "
                "expected one for each"
            )
        for t, beta in enumerate(self.betas):
            at_the_end = 0 < t == self.num_timesteps - 1
            if not (0 < beta < 1 or (beta == 1 and at_the_end)):
                raise UserError(f"schedule.betas: number {t} is {beta}; expected above 0 and below 1, or 1 at the end")
        if self.zero_terminal_snr and self.num_timesteps < 2:
            raise UserError("schedule.zero_terminal_snr: needs at least 2 timesteps, got 1")
        if self.steps_offset and self.spacing not in READING_OFFSET:
            raise UserError(
                f"schedule.steps_offset: {self.steps_offset} applies only to schedule.spacing=leading, "
                f"not to {self.spacing}"
            )


# The field of diffusers' JSON and the one of ours that mean the same.
_SAME = {
    "num_train_timesteps": "num_timesteps",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "rescale_betas_zero_snr": "zero_terminal_snr",
    "clip_sample": "clip_x_0",
}
_BETA_SCHEDULES = {name: name for name in get_args(BetaSchedule)} | {"cosine": "squaredcos_cap_v2"}
_VARIANCE_TYPES = {"posterior": "fixed_small", "beta": "fixed_large"}

# What diffusers' schedulers can be told, and ours does in one way only.
_DOES_ONLY = {
    "clip_sample_range": 1.0,
    "thresholding": False,
    "use_flow_sigmas": False,
    "timestep_type": "discrete",
    "predict_epsilon": True,  # of old files
}
# Of no consequence beside the values above, or options of one way to draw.
_IGNORED = {
    *("dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "use_dynamic_shifting", "time_shift_type"),
    *("shift_terminal", "set_alpha_to_one", "skip_prk_steps", "interpolation_type", "use_karras_sigmas"),
    *("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "sigma_min", "sigma_max", "final_sigmas_type"),
    *("lambda_min_clipped", "algorithm_type", "solver_order", "solver_type", "solver_p", "lower_order_final"),
    *("euler_at_final", "predict_x0", "disable_corrector"),
}
# Those that begin with noise of deviation 1 and know alpha_bar: the others mean something else by their betas, or have
# none. The first two clip x_0_hat unless they are told not to.
_THEY_CLIP = ("DDPMScheduler", "DDIMScheduler")
_THEIRS = (
    *(*_THEY_CLIP, "PNDMScheduler"),
    *(f"{name}DiscreteScheduler" for name in ("LMS", "Euler", "EulerAncestral", "Heun", "KDPM2", "KDPM2Ancestral")),
    *(f"DPMSolver{name}Scheduler" for name in ("Multistep", "Singlestep")),
    *(f"{name}MultistepScheduler" for name in ("UniPC", "DEIS")),
)


def to_diffusers(config: ScheduleConfig) -> dict[str, Any]:
    """Return the `scheduler_config.json` that `DDPMScheduler` reads, but for what the network predicts."""
    return {
        **{theirs: getattr(config, ours) for theirs, ours in _SAME.items()},
        "beta_schedule": _BETA_SCHEDULES[config.beta_schedule],
        "trained_betas": list(config.betas) or None,
        "variance_type": _VARIANCE_TYPES[config.variance],
        # Without the field each of their schedulers has its own.
        **({} if config.spacing is None else {"timestep_spacing": config.spacing}),
        # StableDiffusionPipeline insists on 1; only leading reads it.
        "steps_offset": config.steps_offset if config.spacing in READING_OFFSET else 1,
        "_class_name": "DDPMScheduler",
        "clip_sample_range": 1.0,
        "thresholding": False,
    }


def from_diffusers(fields: dict[str, Any]) -> ScheduleConfig:
    """Invert `to_diffusers`; raise UserError, naming the field, for what our schedule does not do."""
    kind = fields.get("_class_name", "DDPMScheduler")
    if kind not in _THEIRS:
        raise UserError(f"scheduler config: _class_name: {kind!r:.60} is not supported; expected {', '.join(_THEIRS)}")
    fields = {"clip_sample": kind in _THEY_CLIP, **fields}
    refuse_other_values(fields, _DOES_ONLY, "scheduler config")
    fields = {key: value for key, value in fields.items() if not key.startswith("_") and key not in _IGNORED}
    ours: dict[str, Any] = {ours: fields.pop(theirs) for theirs, ours in _SAME.items() if theirs in fields}
    spacing, offset = fields.pop("timestep_spacing", None), fields.pop("steps_offset", 0)
    if spacing not in (*get_args(Spacing), None):
        raise UserError(
            f"scheduler config: timestep_spacing: {spacing!r} is not supported; expected {', '.join(get_args(Spacing))}"
        )
    ours["steps_offset"] = offset if spacing in READING_OFFSET else 0
    ours["beta_schedule"] = _translate(fields, "beta_schedule", _BETA_SCHEDULES, "linear")
    if fields.get("variance_type") is None:  # as solvers have it that draw no noise
        fields["variance_type"] = "fixed_small"
    ours["variance"] = _translate(fields, "variance_type", _VARIANCE_TYPES, "fixed_small")
    betas = fields.pop("trained_betas", None) or []
    if not isinstance(betas, list) or not all(isinstance(beta, float | int) for beta in betas):
        raise UserError(f"scheduler config: trained_betas: {betas!r:.60} is no list of numbers")
    ours["betas"] = tuple(betas)
    if betas:
        ours["num_timesteps"] = len(ours["betas"])
    if fields:
        raise UserError(f"scheduler config: {min(fields)} is not a field that this schedule knows")
    return from_json(ScheduleConfig, {**ours, "spacing": spacing}, "scheduler config")


def _translate(fields: dict[str, Any], key: str, names: dict[str, str], default: str) -> str:
    """Take `key` out of `fields`; return our name for their value, or raise UserError where we have none."""
    of_theirs = {theirs: ours for ours, theirs in names.items()}
    value = fields.pop(key, default)
    if not isinstance(value, str) or value not in of_theirs:
        raise UserError(f"scheduler config: {key}: {value!r} is not supported; expected {', '.join(of_theirs)}")
    return of_theirs[value]
