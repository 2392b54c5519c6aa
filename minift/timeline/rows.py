"""Where spans lie in a timeline: a lane for each kind of work, as many rows in it as it takes; and memory over time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from minift.trace import Lane, Level, Span, Trace

LANES: tuple[Lane, ...] = get_args(Lane)
KINDS_OF_MEMORY = ("gathered", "gradients")


def rows_of(trace: Trace) -> Iterator[tuple[str, list[tuple[Span, int]]]]:
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


def memory_of(levels: list[Level]) -> Iterator[tuple[float, dict[str, float]]]:
    """(seconds, MiB in use by kind from then on), in order of time."""
    in_use = dict.fromkeys(KINDS_OF_MEMORY, 0.0)
    for level in sorted(levels, key=lambda level: level.time_s):
        in_use[level.kind] = level.num_bytes / 2**20
        yield level.time_s, dict(in_use)
