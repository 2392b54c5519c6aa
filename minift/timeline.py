"""One recorded step of every rank, to look at: Chrome trace, picture, and a few numbers.

    traces = [recorder.stop(), ...]                     one `trace.Trace` per rank
    write_timeline(traces, run_dir, "step 3")           timeline.json (chrome://tracing, ui.perfetto.dev), timeline.png

What a lane shows. *compute*: forward, backward, recompute and optimizer of each unit, and `wait`, in which it stood
still for a collective. Spans lie inside of one another: the root's forward and backward enclose those of the blocks, so
what remains of them (pale in the picture) is the root's own work: embedding, head, loss. *all-gather* and
*reduce-scatter*: from the moment a collective was issued until compute went on with its result. Overlap is a collective
beneath compute that runs on.

[Note: early collectives] Nobody tells when the last byte came in, only when somebody asked for the result. A collective
that was done before that seems to last until then, and counts as hidden, which it was. Waits are exact; on gloo the one
for a reduction includes adding up what came.

Not here: recording (`trace`), what is recorded (`fsdp`, `recompute`, `step`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, get_args

from minift.trace import Lane, Level, Span, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LANES: tuple[Lane, ...] = get_args(Lane)
MAX_RANKS_DRAWN = 4
COLOURS = {
    "forward": "#7fb3d9",
    "backward": "#2f6fa7",
    "recompute": "#b58ac4",
    "optimizer": "#4f9d69",
    "wait": "#d1495b",
    "all-gather": "#edae49",
    "reduce-scatter": "#9c6b30",
    "all-reduce": "#5f4420",
}
OTHER_COLOUR = "#999999"
MEMORY_COLOURS = {"gathered": COLOURS["all-gather"], "gradients": COLOURS["reduce-scatter"]}


def write_timeline(traces: list[Trace], folder: Path, title: str) -> Path:
    """Write folder/timeline.json and folder/timeline.png; the path of the picture."""
    _replace(folder / "timeline.json", lambda path: path.write_text(json.dumps(chrome_trace(traces)), encoding="utf-8"))
    return draw(traces, folder / "timeline.png", title)


# ------------------------------------------------------------------------------------------------------ numbers


def summary(traces: list[Trace]) -> dict[str, float | None]:
    """Seconds of one step, means over ranks, and how much communication cost nothing.

    step_s          until the last span ends
    compute_s       in which compute did something; wait_s: in which it stood still for a collective
    all-gather_s    in which at least one of them was under way; reduce-scatter_s likewise
    hidden_share    of the time in which a collective was under way, the part in which compute did not wait; None if no
                    collective took any time. See [Note: early collectives]
    """
    per_rank = [_summary_of_rank(trace) for trace in traces]
    means: dict[str, float | None] = {name: fmean(rank[name] for rank in per_rank) for name in per_rank[0]}
    under_way, exposed = means.pop("under_way_s"), means.pop("exposed_s")
    return means | {"hidden_share": 1 - exposed / under_way if under_way else None}


def _summary_of_rank(trace: Trace) -> dict[str, float]:
    waits = _union([span for span in trace.spans if span.kind == "wait"])
    busy = _union([span for span in trace.spans if span.lane == "compute" and span.kind != "wait"])
    under_way = _union([span for span in trace.spans if span.lane != "compute"])
    lanes = {f"{lane}_s": _length(_union([s for s in trace.spans if s.lane == lane])) for lane in LANES[1:]}
    return {
        "step_s": max((span.stop_s for span in trace.spans), default=0.0),
        "compute_s": _length(busy) - _length(_intersection(busy, waits)),
        "wait_s": _length(waits),
        **lanes,
        "under_way_s": _length(under_way),
        "exposed_s": _length(_intersection(under_way, waits)),
    }


Intervals = list[tuple[float, float]]  # ascending, apart from each other


def _union(spans: list[Span]) -> Intervals:
    union: Intervals = []
    for start, stop in sorted((span.start_s, span.stop_s) for span in spans):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(stop, union[-1][1]))
        else:
            union.append((start, stop))
    return union


def _intersection(a: Intervals, b: Intervals) -> Intervals:
    pairs = ((max(a0, b0), min(a1, b1)) for a0, a1 in a for b0, b1 in b)
    return [(start, stop) for start, stop in pairs if start < stop]


def _length(intervals: Intervals) -> float:
    return sum(stop - start for start, stop in intervals)


# ------------------------------------------------------------------------------------------------------ Chrome trace


def chrome_trace(traces: list[Trace]) -> dict[str, Any]:
    """A JSON object in Chrome's trace event format: a process per rank, a thread per lane, a counter for the memory.

    Times in microseconds since the step began, events in order of time. Events of a thread must nest, so collectives
    that are under way together get a thread each. Process and thread numbers start at 1: to Perfetto, 0 is the kernel.
    Format: "Trace Event Format", the document that chrome://tracing links to.
    """
    names: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    for trace in traces:
        pid = trace.rank + 1
        names += [_metadata("process_name", pid, 0, name=f"rank {trace.rank}")]
        names += [_metadata("process_sort_index", pid, 0, sort_index=trace.rank)]
        for tid, (lane, row) in enumerate(_rows(trace), start=1):
            names += [_metadata("thread_name", pid, tid, name=lane)]
            names += [_metadata("thread_sort_index", pid, tid, sort_index=tid)]
            for span, _ in row:
                events.append({
                    "ph": "X", "name": f"{span.kind} {span.name}".rstrip(), "cat": span.kind, "pid": pid, "tid": tid,
                    "ts": span.start_s * 1e6, "dur": (span.stop_s - span.start_s) * 1e6,
                })  # fmt: skip
        for time_s, mib in _memory(trace.levels):
            events.append({"ph": "C", "name": "buffers (MiB)", "pid": pid, "tid": 0, "ts": time_s * 1e6, "args": mib})
    events.sort(key=lambda event: event["ts"])
    return {"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": summary(traces)}


def _metadata(kind: str, pid: int, tid: int, **args: str | int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}


def _rows(trace: Trace) -> Iterator[tuple[str, list[tuple[Span, int]]]]:
    """(lane, spans with their depth) for as many rows per lane as it takes: on a row spans lie apart or, in compute,
    one inside of the other (its depth is 1 more). Every lane has a row, if only an empty one."""
    for lane in LANES:
        rows: list[list[tuple[Span, int]]] = [[]]
        open_spans: list[list[Span]] = [[]]
        for span in sorted((s for s in trace.spans if s.lane == lane), key=lambda s: (s.start_s, -s.stop_s)):
            for enclosing in open_spans:
                while enclosing and enclosing[-1].stop_s <= span.start_s:
                    enclosing.pop()
            fits = [not e or (lane == "compute" and span.stop_s <= e[-1].stop_s) for e in open_spans]
            if not any(fits):
                rows.append([])
                open_spans.append([])
                fits.append(True)
            row = fits.index(True)
            rows[row].append((span, len(open_spans[row])))
            open_spans[row].append(span)
        for row in rows:
            yield lane, row


def _memory(levels: list[Level]) -> Iterator[tuple[float, dict[str, float]]]:
    """(seconds, MiB in use by kind from then on), in order of time."""
    in_use = {kind: 0.0 for kind in MEMORY_COLOURS}
    for level in sorted(levels, key=lambda level: level.time_s):
        in_use[level.kind] = level.num_bytes / 2**20
        yield level.time_s, dict(in_use)


# ------------------------------------------------------------------------------------------------------ picture


def draw(traces: list[Trace], path: Path, title: str) -> Path:
    """The lanes of each rank (of the first few, if there are many) and the first one's buffers beneath, as PNG."""
    return draw_stacked({title: traces}, path)


def draw_stacked(panels: dict[str, list[Trace]], path: Path) -> Path:
    """Several recordings, {title: traces}, beneath each other on one time axis, to be compared."""
    # Only rank 0 draws, once: importing matplotlib here saves every rank of every run half a second at its start.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    drawn = {title: traces[:MAX_RANKS_DRAWN] for title, traces in panels.items()}
    heights = [height for traces in drawn.values() for height in (0.42 + 0.85 * len(traces), 0.8)]
    figure = Figure(figsize=(10, 0.95 + sum(heights)), dpi=120, layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    last_s = max((span.stop_s for traces in drawn.values() for trace in traces for span in trace.spans), default=0.0)
    for (title, traces), lanes, memory in zip(drawn.items(), axes[::2], axes[1::2], strict=True):
        lanes.set_title(title, fontsize=9.5, loc="left")
        _draw_lanes(lanes, traces, last_s)
        _draw_memory(memory, traces[0], last_s)
    largest_mib = max(memory.get_ylim()[1] for memory in axes[1::2])
    for memory in axes[1::2]:
        memory.set_ylim(0, largest_mib)
    axes[-1].set_xlabel("ms since the step began")
    axes[-1].set_xlim(0, last_s * 1e3 or 1.0)
    present = {span.kind for traces in drawn.values() for trace in traces for span in trace.spans}
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items() if kind in present]
    if present - COLOURS.keys():
        handles.append(Patch(color=OTHER_COLOUR, label=", ".join(sorted(present - COLOURS.keys()))))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8.5)
    _replace(path, lambda unfinished: figure.savefig(unfinished, format="png"))
    return path


def _draw_lanes(axes: Axes, traces: list[Trace], last_s: float) -> None:
    """One row of bars per lane and rank; rows that share a lane share its height."""
    labels: dict[float, str] = {}
    top = 0.0
    for trace in traces:
        rows = list(_rows(trace))
        for lane in LANES:
            own = [row for name, row in rows if name == lane]
            for number, row in enumerate(own):
                _draw_row(axes, row, top + 0.1 + 0.8 * number / len(own), 0.8 / len(own), last_s)
            labels[top + 0.5] = f"rank {trace.rank}  {lane}" if lane == LANES[0] else lane
            top += 1
        axes.axhline(top, color="black", linewidth=0.5, alpha=0.4)
    axes.set_yticks(list(labels), list(labels.values()), fontsize=8.5)
    axes.set_ylim(top, 0)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_row(axes: Axes, row: list[tuple[Span, int]], top: float, height: float, last_s: float) -> None:
    """What lies inside of something is less high, but for waits."""
    enclosing = {id(outer) for (outer, depth), (_, next_depth) in zip(row, row[1:], strict=False) if next_depth > depth}
    for span, depth in row:
        width = (span.stop_s - span.start_s) / last_s if last_s else 0.0
        inset = 0.0 if span.kind == "wait" else min(0.12 * depth, 0.36) * height
        axes.broken_barh(
            [(span.start_s * 1e3, (span.stop_s - span.start_s) * 1e3)],
            (top + inset, height - 2 * inset),
            facecolor=COLOURS.get(span.kind, OTHER_COLOUR),
            alpha=0.45 if id(span) in enclosing and span.name == "" else 1.0,  # the root's, with all else inside of it
            edgecolor="white",
            linewidth=0.4 if width > 0.004 else 0.0,  # an edge would cover it
        )
        label = span.name.rpartition(".")[2]
        if label and span.kind != "wait" and width > 0.009 * len(label):
            style = {"va": "center", "fontsize": 7, "color": "white", "textcoords": "offset points"}
            if id(span) in enclosing:  # a backward begins with what it recomputes: what is left of it is at its end
                axes.annotate(label, (span.stop_s * 1e3, top + height / 2), (-2, 0), ha="right", **style)
            else:
                middle_ms = (span.start_s + span.stop_s) * 500
                axes.annotate(label, (middle_ms, top + height / 2), (0, 0), ha="center", **style)


def _draw_memory(axes: Axes, trace: Trace, last_s: float) -> None:
    """MiB of gathered parameters, and of gradients on top of them."""
    steps = list(_memory(trace.levels))
    times = [time_s * 1e3 for time_s, _ in steps] + [last_s * 1e3]
    floor = [0.0] * len(times)
    for kind, colour in MEMORY_COLOURS.items():
        values = [in_use[kind] for _, in_use in steps]
        values += values[-1:] or [0.0]
        ceiling = [low + value for low, value in zip(floor, values, strict=True)]
        axes.fill_between(times, floor, ceiling, step="post", color=colour, alpha=0.6, linewidth=0, label=kind)
        floor = ceiling
    axes.set_ylim(0, 1.4 * max(floor) or 1.0)
    axes.set_ylabel(f"rank {trace.rank}\nMiB", fontsize=8.5, rotation=0, ha="right", va="center")
    axes.legend(loc="upper left", ncols=len(MEMORY_COLOURS), frameon=False, fontsize=7.5, borderaxespad=0.1)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _replace(path: Path, write: Any) -> None:
    """Call `write` with a path beside `path`, and move what it wrote there: nobody ever sees half of a file."""
    unfinished = path.with_name(f"{path.stem}.unfinished{path.suffix}")
    write(unfinished)
    os.replace(unfinished, path)
