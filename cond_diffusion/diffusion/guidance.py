"""Conditioning of the sampling process: classifier-free guidance by the text (Ho and Salimans 2022), bounds on x_0_hat,
and editing of input images, which is image-to-image generation and inpainting with any sampler.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cond_diffusion.diffusion.objective import Denoiser
from cond_diffusion.diffusion.samplers import Noise, Sampler, Step
from cond_diffusion.diffusion.schedule import Context, Images, NoiseSchedule, PerExample, expand_like


def drop_captions(context: Context, null_context: Float[Tensor, "l d"], dropped: Bool[Tensor, " b"]) -> Context:
    """Replace the context of the dropped captions by the null context (Ho and Salimans 2022, algorithm 1)."""
    return torch.where(dropped.to(context.device)[:, None, None], null_context, context)


def guided(
    network: Callable[[Tensor, Tensor, Any], Tensor],
    context: Context,
    null_context: Context,
    guidance_scale: PerExample,
    *,
    phrases: Sequence[Sequence[Float[Tensor, "l d"]]] = (),
    phrase_guidance: float = 0.0,
    first_phrase_from: int = 0,
    interval: Sequence[int] | None = None,
    rescale: float = 0.0,
    project: Callable[[Tensor], Any] = lambda context: context,
) -> Callable[[Tensor, int], Tensor]:
    """Return the function (x_t, t) -> uncond + w (cond - uncond) (Ho and Salimans 2022, eq. 6, whose weight is w - 1).

    All prediction types are linear in x_t and eps, so guiding the output guides eps by the same w. All passes run as
    one batch, the conditional rows first. Rows with w = 1, and timesteps outside the interval, need no other pass.

    For examples with phrases, a fraction r of the guidance comes from the phrases, each by itself:

        uncond + w ((1 - r) (cond - uncond) + r mean_i (cond_i - uncond))

    This is a conjunction of captions in composable diffusion (Liu et al. 2022, "Compositional Visual Generation with
    Composable Diffusion Models") with the weights w (1 - r) of the whole and w r / n of each of n phrases. The first of
    several phrases, which names the subject, can be left out below a timestep: noisier timesteps determine the subject.

    Args:
        network: (x_t, t, projected context) -> output.
        context: Text embeddings, one row per example.
        null_context: Embeddings of the empty caption, one row per example.
        guidance_scale: w of each example.
        phrases: Embeddings of the phrases of each example, possibly none; () for no phrases at all.
        phrase_guidance: r, 0 to 1.
        first_phrase_from: Lowest timestep with the first of several phrases; lower ones have guidance by the others.
        interval: Lowest and highest timestep with guidance (Kynkäänniemi et al. 2024); None for all timesteps.
        rescale: phi of Lin et al. 2023, section 3.4, 0 to 1; see `rescale_deviation`.
        project: Computes what the network needs from a context; called before sampling only.

    Raises:
        ValueError: If there are phrases, but not for each example.
    """
    first, last = (-math.inf, math.inf) if interval is None else interval
    scales = guidance_scale.tolist()
    if phrases and len(phrases) != len(scales):
        raise ValueError(f"phrases: {len(phrases)} lists; expected {len(scales)}, one per example")
    guided_rows = [row for row, w in enumerate(scales) if w != 1]
    parts = [[*phrases[row]] if phrases and scales[row] else [] for row in guided_rows]
    fraction = torch.tensor([phrase_guidance if part else 0.0 for part in parts]).to(context)
    weight = guidance_scale.to(context)[guided_rows]
    phrase_weight, weight = fraction * weight, (1 - fraction) * weight

    unguided_contexts = project(context)

    def unguided(x_t: Images, t: int) -> Images:
        return network(x_t, torch.full((len(x_t),), t, device=x_t.device), unguided_contexts)

    def with_guidance(parts: list[list[Tensor]]) -> Callable[[Tensor, int], Tensor]:
        part_rows = [row for row, part in zip(guided_rows, parts, strict=True) for _ in part]
        in_parts = [phrase[None] for part in parts for phrase in part]
        contexts = project(torch.cat([context, null_context[guided_rows], *in_parts]))
        sizes = [len(scales), len(guided_rows), len(part_rows)]
        rows = torch.tensor([*range(len(scales)), *guided_rows, *part_rows], device=context.device)
        _, guided_indices, _ = rows.split(sizes)

        def forward(x_t: Images, t: int) -> Images:
            outputs = network(x_t[rows], torch.full((len(rows),), t, device=x_t.device), contexts)
            all_cond, uncond, of_parts = outputs.split(sizes)
            cond = all_cond[guided_indices]
            output = uncond + expand_like(weight, uncond) * (cond - uncond)
            if part_rows:
                split = zip(of_parts.split([len(part) for part in parts]), uncond, strict=True)
                means = torch.stack([part.mean(0) if len(part) else u for part, u in split])
                output = output + expand_like(phrase_weight, uncond) * (means - uncond)
            if rescale:
                output = rescale_deviation(output, cond, rescale)
            return all_cond.index_copy(0, guided_indices, output)

        return forward

    if not guided_rows:
        return unguided
    with_first = without_first = with_guidance(parts)
    if first_phrase_from and any(len(part) > 1 for part in parts):
        without_first = with_guidance([part[1:] or part for part in parts])

    def guided_forward(x_t: Images, t: int) -> Images:
        if not first <= t <= last:
            return unguided(x_t, t)
        return without_first(x_t, t) if t < first_phrase_from else with_first(x_t, t)

    return guided_forward


def rescale_deviation(guided_output: Images, cond: Images, phi: float) -> Images:
    """Rescale a guided output towards the standard deviation of the conditional one (Lin et al. 2023, eq. 15 and 16).

    High guidance scales increase the standard deviation, which over- or underexposes images.

    Args:
        phi: Strength, 0 (none) to 1 (the deviation of `cond`).
    """
    deviation = guided_output.flatten(1).std(1)
    ratio = torch.where(deviation > 0, cond.flatten(1).std(1) / deviation, 1)  # nothing to rescale in a constant
    return expand_like(phi * ratio + 1 - phi, guided_output) * guided_output


def threshold_dynamically(x_0_hat: Images, share: float) -> Images:
    """Clip each image to [-s, s] and divide it by s (dynamic thresholding, Saharia et al. 2022, section 2.3): the
    quantile `share` of its absolute pixel values, but at least 1, so images in [-1, 1] stay the same."""
    s = x_0_hat.flatten(1).abs().float().quantile(share, dim=1).clamp(min=1)
    bound = expand_like(s, x_0_hat)
    return x_0_hat.clamp(-bound, bound) / bound


@dataclass(frozen=True)
class Edit:
    """The start of sampling from an input image, and the region of it to keep. Without x_0, sampling starts from noise.

    Args:
        x_0: Encoded input image (SDEdit, Meng et al. 2022).
        mask: 1 where the image is generated, 0 where x_0 is kept.
        strength: Fraction of the timesteps that are run, 0 to 1; above 0, at least one timestep is run.
        resamplings: Number of passes through each part of the timesteps; see `repaint`.
    """

    x_0: Float[Tensor, "1 c h w"] | None = None
    mask: Float[Tensor, "1 c h w"] | None = None
    strength: float = 1.0
    resamplings: int = 1

    def timesteps(self, timesteps: list[int]) -> list[int]:
        """Return the last timesteps, the fraction `strength` of all."""
        count = max(1, round(self.strength * len(timesteps))) if self.strength > 0 else 0
        return timesteps[len(timesteps) - count :]

    def begin(
        self, eps: Float[Tensor, "b c h w"], schedule: NoiseSchedule, timesteps: list[int]
    ) -> Float[Tensor, "b c h w"]:
        """Return x at the first of the timesteps, with eps as its noise.

        With a mask and strength 1, what is generated begins with eps alone: x_T of many schedules still contains the
        brightness of x_0 (Lin et al. 2023).
        """
        if self.x_0 is None:
            return eps
        x_0 = self.x_0.expand_as(eps)
        if not timesteps:
            return x_0
        x = schedule.q_sample(x_0, torch.full((len(eps),), timesteps[0]), eps)
        return x if self.mask is None or self.strength < 1 else self.mask * eps + (1 - self.mask) * x

    def apply_mask(self, x_0_hat: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Replace x_0_hat by x_0 where the mask is 0.

        With x_0_hat = x_0, a sampler inverts the forward process: ancestral steps with the posterior variance sample
        from q(x_{t-1} | x_t, x_0), and an ODE ends at x_0. RePaint (Lugmayr et al. 2022, eq. 8) instead adds new noise
        to x_0 at each step; the distribution at each t is the same, but multistep solvers need a continuous trajectory.
        """
        if self.mask is None or self.x_0 is None:
            return x_0_hat
        return self.mask * x_0_hat + (1 - self.mask) * self.x_0

    def wrap_sampler(self, sampler: Sampler) -> Sampler:
        """Return the sampler, inside `repaint` if there are resamplings."""
        return sampler if self.resamplings == 1 else partial(repaint, sampler, times=self.resamplings)


def repaint(
    sampler: Sampler,
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Images,
    timesteps: list[int],
    noise: Noise,
    *,
    times: int,
    jump: int = 10,
) -> Iterator[Step]:
    """Sample with RePaint's resampling, which harmonizes the generated and the kept regions (Lugmayr et al. 2022,
    algorithm 1 and section 4.2).

    Every `jump` steps are run `times` times, and x is noised back to their first timestep in between. Multistep solvers
    restart after each jump. Without resampling (times = 1), a single-step sampler is unchanged.
    """
    for start in range(0, len(timesteps), jump):
        remaining = timesteps[start:]
        t_end = remaining[jump] if len(remaining) > jump else None
        for repetition in range(times):
            if repetition > 0:
                # Sample from q(x_{t_later} | x_t) (Ho et al. 2020, eq. 2, over several steps); t_end = None means x_0.
                alpha_ratio = schedule.level(remaining[0]).alpha / schedule.level(t_end).alpha
                x = alpha_ratio * x + (1 - alpha_ratio**2) ** 0.5 * noise()
            for step in islice(sampler(denoiser, schedule, x, remaining, noise), jump):
                x = step.x
                yield step
