"""The curves of one or several runs on one sheet: loss, learning rate, gradient norm, throughput, memory.

    draw_runs(["runs/a", "runs/b"], Path("compared.png"))

Steps are optimizer steps. Nothing here interprets a curve; nothing is read but each run's metrics.jsonl (`metrics`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minift.metrics import Records, read_metrics
from minift.style import LIGHT, Theme, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_RUNS = 8  # as many as there are colours


@dataclass(frozen=True)
class _Run:
    name: str
    training: Records
    validation: Records

    def values(self, key: str, unit: float = 1.0) -> list[float]:
        """NaN where older runs did not write it down."""
        return [record.get(key, math.nan) / unit for record in self.training]

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in self.training]


def draw_runs(folders: Sequence[str | Path], path: Path, theme: Theme = LIGHT) -> Path:
    """Draw the sheet as PNG at `path`, and return that. ValueError if there are too many runs or one has no step yet;
    FileNotFoundError for a folder without metrics.jsonl."""
    if len(folders) > MAX_RUNS:
        raise ValueError(f"{len(folders)} runs on one sheet cannot be told apart; valid: at most {MAX_RUNS}")
    runs = [_read(Path(folder), [Path(other) for other in folders]) for folder in folders]
    return save(path, lambda figure, theme: _draw(figure, theme, runs), size=(9.0, 7.0), theme=theme)


def _read(folder: Path, folders: list[Path]) -> _Run:
    """The run, by the shortest end of its path that tells it from the others."""
    training, validation = read_metrics(folder / "metrics.jsonl")
    if not training:
        raise ValueError(f"{folder}/metrics.jsonl has no training step yet, so there is nothing to plot")
    ends = [other.resolve().parts for other in folders]
    own = folder.resolve().parts
    length = next((n for n in range(1, len(own)) if sum(end[-n:] == own[-n:] for end in ends) == 1), 1)
    return _Run("/".join(own[-length:]), training, validation)


def smooth(values: list[float]) -> list[float]:
    """Mean over a window of about 1/15 of the run around each step, so that the curve does not lag behind.

    The window is cut at both ends of the run; values that are not finite are left out.
    """
    half = round(len(values) / 30)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    start = np.maximum(np.arange(len(values)) - half, 0)
    stop = np.minimum(np.arange(len(values)) + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return ((sums[stop] - sums[start]) / (counts[stop] - counts[start])).tolist()


def _draw(figure: Figure, theme: Theme, runs: list[_Run]) -> None:
    axes = figure.subplot_mosaic([["loss", "loss"], ["lr", "norm"], ["speed", "memory"]], height_ratios=(2.4, 1, 1))
    for run, colour in zip(runs, theme.series, strict=False):
        _draw_loss(axes["loss"], run, colour, theme, is_alone=len(runs) == 1)
        for name, values, width in (
            ("lr", run.values("lr"), 1.6),
            ("norm", run.values("grad_norm"), 1.0),
            ("speed", run.values("tokens_per_second"), 1.0),
            ("memory", run.values("memory_bytes", 2**30), 1.6),
        ):
            axes[name].plot(run.steps, values, color=colour, linewidth=width, marker=_marker(run))
    alone = f"{runs[0].name}: " if len(runs) == 1 else ""
    axes["loss"].set_title(f"{alone}loss, nats per supervised token")
    axes["lr"].set_title("learning rate")
    axes["lr"].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes["norm"].set_title("gradient norm, before clipping")
    axes["speed"].set_title("tokens per second")
    axes["memory"].set_title("peak memory of the largest process, GiB")
    for name in ("lr", "norm", "speed", "memory"):
        highest = axes[name].dataLim.y1  # -inf without a number
        axes[name].set_ylim(0, 1.08 * highest if highest > 0 else 1)
    for name in ("loss", "speed", "memory"):
        axes[name].set_xlabel("optimizer step")
    axes["loss"].legend()
    if len(runs) == 1:
        _draw_epochs(axes, runs[0], theme)


def _draw_loss(axes: Axes, run: _Run, colour: str, theme: Theme, is_alone: bool) -> None:
    """Each step pale, their running mean, and validation as points: in a colour of its own if there is no other run."""
    losses = run.values("loss")
    mean = smooth(losses)
    axes.plot(run.steps, losses, color=colour, alpha=0.3, linewidth=1, marker=_marker(run))
    label = "training, smoothed" if is_alone else run.name
    axes.plot(run.steps, mean, color=colour, linewidth=2, label=f"{label} ({mean[-1]:.3f} at the end)")
    if run.validation:
        points = [(record["step"], record["validation_loss"]) for record in run.validation]
        label = "validation" if is_alone else f"{run.name}, validation"
        axes.plot(
            *zip(*points, strict=True), color=theme.theirs if is_alone else colour, linewidth=2, marker="o",
            linestyle="-" if is_alone else ":", label=f"{label} ({points[-1][1]:.3f} at the end)",
        )  # fmt: skip


def _marker(run: _Run) -> str:
    return "." if len(run.steps) < 60 else ""


def _draw_epochs(axes: dict[str, Axes], run: _Run, theme: Theme) -> None:
    """A line where a pass over the data ends and another step follows; none if there are more than 20."""
    passes = [int(record["epoch"] + 1e-6) for record in run.training]
    ends = [(run.steps[i], passes[i]) for i in range(1, len(passes) - 1) if passes[i - 1] < passes[i]]
    for step, epoch in ends if len(ends) <= 20 else []:
        for part in axes.values():
            part.axvline(step, color=theme.quiet, linewidth=0.8, linestyle=":")
        place = {"xycoords": ("data", "axes fraction"), "xytext": (3, -2), "textcoords": "offset points"}
        axes["loss"].annotate(f"epoch {epoch + 1}", (step, 1.0), **place, va="top", fontsize=8.5, color=theme.quiet)
