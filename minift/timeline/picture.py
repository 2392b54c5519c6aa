"""The picture of recorded steps: the lanes of each rank, and the first rank's buffers beneath."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from minift.style import LIGHT, Theme, save
from minift.timeline.rows import KINDS_OF_MEMORY, LANES, memory_of, rows_of
from minift.trace import Span, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_RANKS_DRAWN = 4
WIDTH_INCHES = 9.0
KINDS = ("forward", "backward", "recompute", "optimizer", "wait", "all-gather", "reduce-scatter", "all-reduce")
_COLOURS = {  # by theme: of KINDS, and of what else there may be
    "light": ("#7fb3d9", "#2f6fa7", "#b58ac4", "#4f9d69", "#d1495b", "#e0a030", "#9c6b30", "#5f4420", "#999999"),
    "dark": ("#8cc4ee", "#4487c4", "#c79bd8", "#57b57a", "#ee6478", "#e8b552", "#b8834a", "#8a6a44", "#8b949e"),
}


def colours(theme: Theme) -> dict[str, str]:
    """Kind of span -> colour; "other" stands for kinds that are not in KINDS."""
    return dict(zip((*KINDS, "other"), _COLOURS[theme.name], strict=True))


def draw_stacked(panels: dict[str, list[Trace]], path: Path, theme: Theme = LIGHT) -> Path:
    """Recordings, {title: traces}, beneath each other on one time axis, to be compared; of many ranks the first few."""
    return save(path, lambda figure, theme: draw_panels(figure, theme, panels), theme=theme)


def draw_panels(figure: Figure, theme: Theme, panels: dict[str, list[Trace]]) -> None:
    """The same on a figure, whose size is set."""
    from matplotlib.patches import Patch

    panels = {title: traces[:MAX_RANKS_DRAWN] for title, traces in panels.items()}
    heights = [height for traces in panels.values() for height in (0.45 + 0.9 * len(traces), 0.85)]
    figure.set_size_inches(WIDTH_INCHES, 1.0 + sum(heights))
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    spans = [span for traces in panels.values() for trace in traces for span in trace.spans]
    last_s = max((span.stop_s for span in spans), default=0.0)
    for (title, traces), lanes, memory in zip(panels.items(), axes[::2], axes[1::2], strict=True):
        lanes.set_title(title)
        _draw_lanes(lanes, traces, last_s, theme)
        _draw_memory(memory, traces[0], last_s, theme)
    largest_mib = max(memory.get_ylim()[1] for memory in axes[1::2])
    for memory in axes[1::2]:
        memory.set_ylim(0, largest_mib)
    axes[-1].set_xlabel("ms since the step began")
    axes[-1].set_xlim(0, last_s * 1e3 or 1.0)
    present = {span.kind if span.kind in KINDS else "other" for span in spans}
    handles = [Patch(color=colour, label=kind) for kind, colour in colours(theme).items() if kind in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(handles)), handlelength=1.2,
                  columnspacing=1.2)  # fmt: skip


def _draw_lanes(axes: Axes, traces: list[Trace], last_s: float, theme: Theme) -> None:
    """One row of bars per lane and rank; rows that share a lane share its height."""
    labels: dict[float, str] = {}
    top = 0.0
    for trace in traces:
        rows = list(rows_of(trace))
        for lane in LANES:
            own = [row for name, row in rows if name == lane]
            for number, row in enumerate(own):
                _draw_row(axes, row, top + 0.1 + 0.8 * number / len(own), 0.8 / len(own), last_s, theme)
            labels[top + 0.5] = f"rank {trace.rank}  {lane}" if lane == LANES[0] else lane
            top += 1
        axes.axhline(top, color=theme.quiet, linewidth=0.5, alpha=0.6)
    axes.set_yticks(list(labels), list(labels.values()))
    axes.set_ylim(top, 0)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _draw_row(
    axes: Axes, row: list[tuple[Span, int]], top: float, height: float, last_s: float, theme: Theme
) -> None:
    """What lies inside of something is less high, but for waits."""
    colour_of = colours(theme)
    enclosing = {id(outer) for (outer, depth), (_, next_depth) in zip(row, row[1:], strict=False) if next_depth > depth}
    for span, depth in row:
        width = (span.stop_s - span.start_s) / last_s if last_s else 0.0
        inset = 0.0 if span.kind == "wait" else min(0.12 * depth, 0.36) * height
        axes.broken_barh(
            [(span.start_s * 1e3, (span.stop_s - span.start_s) * 1e3)],
            (top + inset, height - 2 * inset),
            facecolor=colour_of.get(span.kind, colour_of["other"]),
            alpha=0.45 if id(span) in enclosing and span.name == "" else 1.0,  # the root's, with all else inside of it
            edgecolor=theme.ground,
            linewidth=0.4 if width > 0.004 else 0.0,  # an edge would cover it
        )
        label = span.name.rpartition(".")[2]
        if label and span.kind != "wait" and width > 0.0095 * len(label):
            style = {"va": "center", "fontsize": 7.5, "color": theme.on_colour, "textcoords": "offset points"}
            if id(span) in enclosing:  # a backward begins with what it recomputes: what is left of it is at its end
                axes.annotate(label, (span.stop_s * 1e3, top + height / 2), (-2, 0), ha="right", **style)
            else:
                middle_ms = (span.start_s + span.stop_s) * 500
                axes.annotate(label, (middle_ms, top + height / 2), (0, 0), ha="center", **style)


def _draw_memory(axes: Axes, trace: Trace, last_s: float, theme: Theme) -> None:
    """MiB of gathered parameters, and of gradients on top of them."""
    steps = list(memory_of(trace.levels))
    times = [time_s * 1e3 for time_s, _ in steps] + [last_s * 1e3]
    floor = [0.0] * len(times)
    colour_of = colours(theme)
    for kind, like in zip(KINDS_OF_MEMORY, ("all-gather", "reduce-scatter"), strict=True):
        values = [in_use[kind] for _, in_use in steps]
        values += values[-1:] or [0.0]
        ceiling = [low + value for low, value in zip(floor, values, strict=True)]
        style = {"color": colour_of[like], "alpha": 0.75, "linewidth": 0, "label": kind}
        axes.fill_between(times, floor, ceiling, step="post", **style)
        floor = ceiling
    axes.set_ylim(0, 1.4 * max(floor) or 1.0)
    axes.set_ylabel(f"rank {trace.rank}\nMiB", rotation=0, ha="right", va="center")
    axes.legend(loc="upper left", ncols=len(KINDS_OF_MEMORY), borderaxespad=0.1)
