"""What a recorded step says in numbers: seconds computed, waited and communicated, and what of it was hidden.

[Note: early collectives] Nobody tells when the last byte came in, only when somebody asked for the result. A collective
that was done before that seems to last until then, and counts as hidden, which it was. Waits are exact; on gloo the one
for a reduction includes adding up what came.
"""

from __future__ import annotations

from statistics import fmean

from minift.timeline.rows import LANES
from minift.trace import Span, Trace


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
