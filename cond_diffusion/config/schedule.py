"""Options of the noise schedule, and their conversion to and from diffusers' `scheduler_config.json`.

Configs are written for `DDPMScheduler`. Those of diffusers' other schedulers are read too; the sampler that they imply
is ignored, because the sampler is a sampling option here.
"""

from pathlib import Path
from typing import Any, Literal, get_args

from cond_diffusion.config.schema import NonNegativeInt, from_json, option, section
from cond_diffusion.errors import UserError, refuse_other_values

BetaSchedule = Literal["linear", "scaled_linear", "cosine", "sigmoid"]
Spacing = Literal["trailing", "leading", "linspace"]
SPACINGS_WITH_OFFSET = ("leading", None)  # those that use steps_offset; None is leading for some samplers
Variance = Literal["posterior", "beta"]

MAX_TIMESTEPS = 1_000_000


@section("schedule")
class ScheduleConfig:
    """The noise schedule, and the defaults of sampling from it."""

    num_timesteps: int = option(1000, "T, the number of timesteps", ge=1, le=MAX_TIMESTEPS)
    beta_start: float = option(1e-4, "beta of the first step")
    beta_end: float = option(0.02, "beta of the last step")
    beta_schedule: BetaSchedule = option(
        "linear",
        "`linear` (Ho et al. 2020), `scaled_linear` (Stable Diffusion), `sigmoid`, or `cosine` (Nichol and Dhariwal "
        "2021, eq. 17)",
    )
    betas: tuple[float, ...] = option((), "list of all betas; replaces the three options above")
    zero_terminal_snr: bool = option(
        False, "rescale to zero SNR at the last timestep (Lin et al. 2023); for `v_prediction` and `sample`"
    )
    spacing: Spacing | None = option(
        "trailing",
        "timesteps visited when sampling with fewer steps: `trailing`, `leading`, `linspace`; `null`: the default of "
        "diffusers' scheduler for the sampler",
    )
    steps_offset: NonNegativeInt = option(0, "offset of `leading`")
    variance: Variance = option("posterior", "variance of a DDPM step: `posterior` or `beta`")
    clip_x_0: bool = option(True, "clip x_0_hat to [-1, 1] while sampling")

    def __post_init__(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(
                f"schedule.beta_start, schedule.beta_end: {self.beta_start} and {self.beta_end}; "
                "expected 0 < beta_start <= beta_end < 1"
            )
        if self.betas and len(self.betas) != self.num_timesteps:
            raise UserError(
                f"schedule.betas: {len(self.betas)} values for schedule.num_timesteps={self.num_timesteps}; "
                "expected one per timestep"
            )
        for t, beta in enumerate(self.betas):
            if not (0 < beta < 1 or (beta == 1 and 0 < t == self.num_timesteps - 1)):
                raise UserError(f"schedule.betas[{t}]: {beta}; expected 0 < beta < 1, or 1 for the last")
        if self.zero_terminal_snr and self.num_timesteps < 2:
            raise UserError("schedule.zero_terminal_snr: requires at least 2 timesteps, got 1")
        if self.steps_offset and self.spacing not in SPACINGS_WITH_OFFSET:
            raise UserError(
                f"schedule.steps_offset: {self.steps_offset} applies only to schedule.spacing=leading, "
                f"not to {self.spacing}"
            )


# Fields of diffusers' config and the equivalent fields of ScheduleConfig.
_EQUIVALENT = {
    "num_train_timesteps": "num_timesteps",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "rescale_betas_zero_snr": "zero_terminal_snr",
    "clip_sample": "clip_x_0",
}
_BETA_SCHEDULES = {name: name for name in get_args(BetaSchedule)} | {"cosine": "squaredcos_cap_v2"}
_VARIANCE_TYPES = {"posterior": "fixed_small", "beta": "fixed_large"}

# Fields of diffusers' config of which one value is supported.
_ONLY_SUPPORTED = {
    "clip_sample_range": 1.0,
    "thresholding": False,
    "use_flow_sigmas": False,
    "timestep_type": "discrete",
    "predict_epsilon": True,  # in old files
}
# Fields without effect given the values above, and options of samplers.
_IGNORED = {
    "tensor_format",  # of old files
    *("dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "use_dynamic_shifting", "time_shift_type"),
    *("shift_terminal", "set_alpha_to_one", "skip_prk_steps", "interpolation_type", "use_karras_sigmas"),
    *("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "sigma_min", "sigma_max", "final_sigmas_type"),
    *("lambda_min_clipped", "algorithm_type", "solver_order", "solver_type", "solver_p", "lower_order_final"),
    *("euler_at_final", "predict_x0", "disable_corrector"),
}
# Schedulers that start from noise of standard deviation 1 and are defined by alpha_bar; the others define betas
# differently, or have none. The first two clip x_0_hat by default.
_CLIP_BY_DEFAULT = ("DDPMScheduler", "DDIMScheduler")
_SUPPORTED_SCHEDULERS = (
    *(*_CLIP_BY_DEFAULT, "PNDMScheduler"),
    *(f"{name}DiscreteScheduler" for name in ("LMS", "Euler", "EulerAncestral", "Heun", "KDPM2", "KDPM2Ancestral")),
    *(f"DPMSolver{name}Scheduler" for name in ("Multistep", "Singlestep")),
    *(f"{name}MultistepScheduler" for name in ("UniPC", "DEIS")),
)


def to_diffusers(config: ScheduleConfig) -> dict[str, Any]:
    """Return the config of diffusers' `DDPMScheduler`, without the prediction type."""
    return {
        **{theirs: getattr(config, ours) for theirs, ours in _EQUIVALENT.items()},
        "beta_schedule": _BETA_SCHEDULES[config.beta_schedule],
        "trained_betas": list(config.betas) or None,
        "variance_type": _VARIANCE_TYPES[config.variance],
        # Without the field, each of diffusers' schedulers has its own default.
        **({} if config.spacing is None else {"timestep_spacing": config.spacing}),
        # StableDiffusionPipeline requires 1; only leading uses it.
        "steps_offset": config.steps_offset if config.spacing in SPACINGS_WITH_OFFSET else 1,
        "_class_name": "DDPMScheduler",
        "clip_sample_range": 1.0,
        "thresholding": False,
    }


def from_diffusers(fields: dict[str, Any], where: str | Path = "scheduler config") -> ScheduleConfig:
    """Convert the config of a diffusers scheduler; inverse of `to_diffusers`."""
    name = fields.get("_class_name", "DDPMScheduler")
    if name not in _SUPPORTED_SCHEDULERS:
        supported = ", ".join(_SUPPORTED_SCHEDULERS)
        raise UserError(f"{where}: _class_name: {name!r:.60} is not supported; expected {supported}")
    fields = {"clip_sample": name in _CLIP_BY_DEFAULT, **fields}
    refuse_other_values(fields, _ONLY_SUPPORTED, where)
    fields = {key: value for key, value in fields.items() if not key.startswith("_") and key not in _IGNORED}
    ours: dict[str, Any] = {ours: fields.pop(theirs) for theirs, ours in _EQUIVALENT.items() if theirs in fields}
    spacing, offset = fields.pop("timestep_spacing", None), fields.pop("steps_offset", 0)
    if spacing not in (*get_args(Spacing), None):
        raise UserError(
            f"{where}: timestep_spacing: {spacing!r:.60} is not supported; expected {', '.join(get_args(Spacing))}"
        )
    offset = from_json(NonNegativeInt, offset, f"{where}: steps_offset")
    ours["steps_offset"] = offset if spacing in SPACINGS_WITH_OFFSET else 0
    ours["beta_schedule"] = _translate(fields, "beta_schedule", _BETA_SCHEDULES, "linear", where)
    if fields.get("variance_type") is None:  # in configs of deterministic solvers
        fields["variance_type"] = "fixed_small"
    ours["variance"] = _translate(fields, "variance_type", _VARIANCE_TYPES, "fixed_small", where)
    ours["betas"] = [] if (betas := fields.pop("trained_betas", None)) is None else betas
    if betas and isinstance(betas, list):
        ours["num_timesteps"] = len(betas)
    if unknown := [key for key, value in fields.items() if value not in (None, False)]:  # options that are on
        raise UserError(f"{where}: {min(unknown)}: this field is not supported")
    return from_json(ScheduleConfig, {**ours, "spacing": spacing}, where)


def _translate(fields: dict[str, Any], key: str, names: dict[str, str], default: str, where: str | Path) -> str:
    """Remove `key` from `fields`, and return the name in `names` that maps to its value."""
    from_theirs = {theirs: ours for ours, theirs in names.items()}
    value = fields.pop(key, default)
    if not isinstance(value, str) or value not in from_theirs:
        raise UserError(f"{where}: {key}: {value!r:.60} is not supported; expected {', '.join(from_theirs)}")
    return from_theirs[value]
