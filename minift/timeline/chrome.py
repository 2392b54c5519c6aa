"""Recorded steps as a Chrome trace (chrome://tracing, ui.perfetto.dev), and back.

Format: "Trace Event Format", the document that chrome://tracing links to.
"""

from __future__ import annotations

from typing import Any

from minift.timeline.numbers import summary
from minift.timeline.rows import KINDS_OF_MEMORY, memory_of, rows_of
from minift.trace import Level, Span, Trace

_COUNTER = "buffers (MiB)"


def chrome_trace(traces: list[Trace], title: str = "") -> dict[str, Any]:
    """A JSON object in Chrome's trace event format: a process per rank, a thread per lane, a counter for the memory.
    `title`: of the picture.

    Times in microseconds since the step began, events in order of time. Events of a thread must nest, so collectives
    that are under way together get a thread each. Process and thread numbers start at 1: to Perfetto, 0 is the kernel.
    """
    names: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    for trace in traces:
        pid = trace.rank + 1
        names += [_metadata("process_name", pid, 0, name=f"rank {trace.rank}")]
        names += [_metadata("process_sort_index", pid, 0, sort_index=trace.rank)]
        for tid, (lane, row) in enumerate(rows_of(trace), start=1):
            names += [_metadata("thread_name", pid, tid, name=lane)]
            names += [_metadata("thread_sort_index", pid, tid, sort_index=tid)]
            for span, _ in row:
                events.append({
                    "ph": "X", "name": f"{span.kind} {span.name}".rstrip(), "cat": span.kind, "pid": pid, "tid": tid,
                    "ts": span.start_s * 1e6, "dur": (span.stop_s - span.start_s) * 1e6,
                })  # fmt: skip
        for time_s, mib in memory_of(trace.levels):
            events.append({"ph": "C", "name": _COUNTER, "pid": pid, "tid": 0, "ts": time_s * 1e6, "args": mib})
    events.sort(key=lambda event: event["ts"])
    return {"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": summary(traces) | {"title": title}}


def _metadata(kind: str, pid: int, tid: int, **args: str | int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}


def read_chrome_trace(written: dict[str, Any]) -> tuple[list[Trace], str]:
    """The traces and the title that `chrome_trace` wrote. ValueError if something else did."""
    try:
        events = written["traceEvents"]
        lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
        traces = {e["pid"]: Trace(e["pid"] - 1) for e in events if e["name"] == "process_name"}
        for event in events:
            start_s, spans, levels = event.get("ts", 0.0) / 1e6, traces[event["pid"]].spans, traces[event["pid"]].levels
            if event["ph"] == "X":
                name = event["name"].removeprefix(event["cat"]).lstrip()
                stop_s = start_s + event["dur"] / 1e6
                spans.append(Span(lanes[event["pid"], event["tid"]], event["cat"], name, start_s, stop_s))
            elif event["ph"] == "C" and event["name"] == _COUNTER:
                levels += [Level(kind, start_s, round(event["args"][kind] * 2**20)) for kind in KINDS_OF_MEMORY]
        return list(traces.values()), written["otherData"]["title"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no trace that minift wrote ({error!r} is missing in it)") from None
