"""Plots of what `evaluation.py` measured: prompt accuracy, and Fréchet distance beside its floor."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Point = Mapping[str, Any]
"""What samples drawn in one way came to: `Sampling`'s fields, "prompt accuracy" and "Fréchet distance"."""


def plot_guidance_scales(points: Sequence[Point], floor: float, file: Path) -> None:
    """Plot both against the guidance scale."""
    _plot({"": points}, "guidance_scale", "guidance scale", floor, file)


def plot_steps(points: Sequence[Point], floor: float, file: Path) -> None:
    """Plot both against the number of steps, a line for each sampler."""
    samplers = dict.fromkeys(point["sampler"] for point in points)
    lines = {sampler: [point for point in points if point["sampler"] == sampler] for sampler in samplers}
    _plot(lines, "steps", "steps", floor, file)


def _plot(lines: Mapping[str, Sequence[Point]], key: str, name: str, floor: float, file: Path) -> None:
    # Of the extra `eval`: imported where it is used.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    accuracy, distance = figure.subplots(1, 2)
    for label, points in lines.items():
        at = [point[key] for point in points]
        accuracy.plot(at, [100 * point["prompt accuracy"] for point in points], marker="o", label=label)
        distance.plot(at, [point["Fréchet distance"] for point in points], marker="o", label=label)
    distance.axhline(floor, color="black", linestyle="dotted")
    distance.annotate("real pictures", (1, floor), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    distance.set_yscale("log")
    accuracy.set_ylabel("prompt accuracy, %")
    distance.set_ylabel("Fréchet distance")
    places = sorted({point[key] for points in lines.values() for point in points})
    for axes in (accuracy, distance):
        axes.set_xlabel(name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, map(str, places))
        axes.grid(alpha=0.3)
    if len(lines) > 1:
        accuracy.legend()
    figure.savefig(file, dpi=100)
