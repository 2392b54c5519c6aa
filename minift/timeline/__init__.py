"""One recorded step of every rank, to look at: Chrome trace, picture, and a few numbers.

    traces = [recorder.stop(), ...]                     one `trace.Trace` per rank
    write_timeline(traces, run_dir, "step 3")           timeline.json (chrome://tracing, ui.perfetto.dev), timeline.png
    redraw_timeline(run_dir)                            timeline.png again, from timeline.json

What a lane shows. *compute*: forward, backward, recompute and optimizer of each unit, and `wait`, in which it stood
still for a collective. Spans lie inside of one another: the root's forward and backward enclose those of the blocks, so
what remains of them (pale in the picture) is the root's own work: embedding, head, loss. *all-gather* and
*reduce-scatter*: from the moment a collective was issued until compute went on with its result. Overlap is a collective
beneath compute that runs on; `numbers` says what that means for collectives that were done early.

Not here: recording (`trace`), what is recorded (`fsdp`, `recompute`, `step`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from minift.style import LIGHT, Theme
from minift.timeline.chrome import chrome_trace, read_chrome_trace
from minift.timeline.numbers import summary
from minift.timeline.picture import draw_panels, draw_stacked
from minift.trace import Trace


def write_timeline(traces: list[Trace], folder: Path, title: str) -> Path:
    """Write folder/timeline.json and folder/timeline.png; the path of the picture."""
    unfinished = folder / "timeline.unfinished.json"
    unfinished.write_text(json.dumps(chrome_trace(traces, title)), encoding="utf-8")
    os.replace(unfinished, folder / "timeline.json")
    return draw_stacked({title: traces}, folder / "timeline.png")


def redraw_timeline(folder: Path, theme: Theme = LIGHT) -> Path:
    """Draw folder/timeline.png from folder/timeline.json, and return its path. ValueError if that was never written, or
    not by minift."""
    path = folder / "timeline.json"
    if not path.exists():
        raise ValueError(f"{path} is missing: no step of this run was recorded; loop.timeline_step says which")
    traces, title = read_chrome_trace(json.loads(path.read_text(encoding="utf-8")))
    return draw_stacked({title or folder.resolve().name: traces}, folder / "timeline.png", theme)


__all__ = [
    "chrome_trace",
    "draw_panels",
    "draw_stacked",
    "read_chrome_trace",
    "redraw_timeline",
    "summary",
    "write_timeline",
]
