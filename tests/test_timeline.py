"""Chrome trace, numbers and picture of recorded steps.

Oracles: a checker of the trace format written here; counting on a grid of whole seconds; colours of pixels; a run that
records nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colors, image

from minift.build import ModelSource
from minift.config import RunConfig
from minift.data.config import DataConfig
from minift.dist.process import World
from minift.dist.signals import StopRequest
from minift.loop import TrainConfig
from minift.metrics import read_metrics
from minift.optim.config import OptimConfig
from minift.precision import Precision
from minift.recompute import RecomputeConfig
from minift.style import DARK, DPI, LIGHT
from minift.timeline import chrome_trace, draw_stacked, read_chrome_trace, redraw_timeline, summary, write_timeline
from minift.timeline.picture import WIDTH_INCHES, colours
from minift.timeline.rows import memory_of
from minift.trace import Level, Span, Trace
from minift.train import Run
from tests.ranks import run_ranks
from tests.tiny import write_inputs

WIDTH = round(WIDTH_INCHES * DPI)
COLOURS = colours(LIGHT)
KINDS = {
    "compute": ["forward", "backward", "recompute", "optimizer", "wait"],
    "all-gather": ["all-gather"],
    "reduce-scatter": ["reduce-scatter"],
}


@st.composite
def spans(draw) -> Span:
    """Anywhere within 20 whole seconds, of length 0 too."""
    lane = draw(st.sampled_from(list(KINDS)))
    kind = draw(st.sampled_from(KINDS[lane]))
    start, stop = sorted((draw(st.integers(0, 20)), draw(st.integers(0, 20))))
    return Span(lane, kind, draw(st.sampled_from(["", "blocks.0", "blocks.1"])), start, stop)


levels = st.builds(Level, st.sampled_from(["gathered", "gradients"]), st.integers(0, 20), st.integers(0, 2**40))
traces = st.lists(st.tuples(st.lists(spans(), max_size=12), st.lists(levels, max_size=6)), min_size=1, max_size=3).map(
    lambda ranks: [Trace(rank, own_spans, own_levels) for rank, (own_spans, own_levels) in enumerate(ranks)]
)


# Chrome trace #


@settings(max_examples=200)
@given(traces)
def test_chrome_trace_is_well_formed_and_complete(traces: list[Trace]) -> None:
    events = json.loads(json.dumps(chrome_trace(traces), allow_nan=False))["traceEvents"]
    timed = [event for event in events if event["ph"] != "M"]
    assert [event["ts"] for event in timed] == sorted(event["ts"] for event in timed)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    ranks = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert list(ranks.values()) == [f"rank {trace.rank}" for trace in traces] and 0 not in ranks
    for trace, pid in zip(traces, ranks, strict=True):
        own = [event for event in timed if event["pid"] == pid]
        drawn = Counter(
            (names[pid, e["tid"]], e["cat"], e["name"], e["ts"], e["ts"] + e["dur"]) for e in own if e["ph"] == "X"
        )
        assert drawn == Counter(
            (s.lane, s.kind, f"{s.kind} {s.name}".strip(), s.start_s * 1e6, s.stop_s * 1e6) for s in trace.spans
        )
        counters = [(event["ts"], event["args"]) for event in own if event["ph"] == "C"]
        assert len(counters) == len(trace.levels)
        for kind in ("gathered", "gradients"):
            latest = [level for level in sorted(trace.levels, key=lambda level: level.time_s) if level.kind == kind]
            if latest:
                assert counters[-1][1][kind] == latest[-1].num_bytes / 2**20
    for thread in names:
        check_nesting([e for e in timed if e["ph"] == "X" and (e["pid"], e["tid"]) == thread], names[thread])


def check_nesting(events: list[dict], lane: str) -> None:
    """Two events of a thread lie apart or, in compute only, one inside of the other."""
    for i, a in enumerate(events):
        for b in events[i + 1 :]:
            a_stop, b_stop = a["ts"] + a["dur"], b["ts"] + b["dur"]
            apart = a_stop <= b["ts"] or b_stop <= a["ts"]
            inside = (a["ts"] <= b["ts"] and b_stop <= a_stop) or (b["ts"] <= a["ts"] and a_stop <= b_stop)
            assert apart or (inside and lane == "compute"), (a, b)


@settings(max_examples=100)
@given(traces)
def test_a_chrome_trace_is_read_back(traces: list[Trace]) -> None:
    """To the microsecond's rounding; memory, which is told for both kinds at each change, as it develops."""
    found, title = read_chrome_trace(json.loads(json.dumps(chrome_trace(traces, "step 3"))))
    assert title == "step 3" and [trace.rank for trace in found] == [trace.rank for trace in traces]
    for got, expected in zip(found, traces, strict=True):

        def rounded(trace: Trace) -> Counter:
            return Counter((s.lane, s.kind, s.name, round(s.start_s, 9), round(s.stop_s, 9)) for s in trace.spans)

        assert rounded(got) == rounded(expected)
        assert list(memory_of(got.levels))[1::2] == list(memory_of(expected.levels))


def test_other_json_is_refused() -> None:
    for other in ({}, {"traceEvents": []}, {"traceEvents": [{"ph": "X"}], "otherData": {}}, []):
        with pytest.raises(ValueError, match="no trace that minift wrote"):
            read_chrome_trace(other)


# Numbers #


@settings(max_examples=200)
@given(traces)
def test_summary_counts_seconds(traces: list[Trace]) -> None:
    """Oracle: in which of the twenty seconds is what the case?"""

    def seconds(condition) -> float:
        """Mean over ranks of the seconds in which the spans under way fulfil `condition`."""
        total = 0
        for trace in traces:
            for second in range(20):
                total += condition([s for s in trace.spans if s.start_s <= second < s.stop_s])
        return total / len(traces)

    def waits(spans: list[Span]) -> bool:
        return any(span.kind == "wait" for span in spans)

    def communicates(spans: list[Span]) -> bool:
        return any(span.lane != "compute" for span in spans)

    found = summary(traces)
    hidden = found.pop("hidden_share")
    assert found == pytest.approx({
        "step_s": sum(max((s.stop_s for s in trace.spans), default=0) for trace in traces) / len(traces),
        "compute_s": seconds(lambda spans: any(s.lane == "compute" for s in spans) and not waits(spans)),
        "wait_s": seconds(waits),
        "all-gather_s": seconds(lambda spans: any(s.lane == "all-gather" for s in spans)),
        "reduce-scatter_s": seconds(lambda spans: any(s.lane == "reduce-scatter" for s in spans)),
    })  # fmt: skip
    if seconds(communicates) == 0:
        assert hidden is None
    else:
        both = seconds(lambda spans: communicates(spans) and not waits(spans))
        assert hidden == pytest.approx(both / seconds(communicates))


# Picture #


def pixels(path: Path, colour: str) -> int:
    """How many have exactly this colour."""
    red_green_blue = [round(255 * c) for c in colors.to_rgb(colour)]
    return int(((image.imread(path)[..., :3] * 255).round() == red_green_blue).all(-1).sum())


def test_bars_are_as_long_as_spans(tmp_path: Path) -> None:
    """One second forward, three seconds backward, of which one waiting: areas as 1 : 2 : 1, and nothing else."""
    trace = Trace(0, [
        Span("compute", "forward", "a", 0, 1),
        Span("compute", "backward", "a", 1, 4),
        Span("compute", "wait", "a", 2, 3),
    ])  # fmt: skip
    draw_stacked({"nothing recorded": [Trace(0)]}, tmp_path / "empty.png")
    path = draw_stacked({"a step": [trace]}, tmp_path / "timeline.png")
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["empty.png", "timeline.png"]
    legend = 420  # pixels of a legend's patch, at most
    one = pixels(path, COLOURS["wait"])
    assert one > 5 * legend
    assert abs(pixels(path, COLOURS["forward"]) - one) < legend
    assert abs(pixels(path, COLOURS["backward"]) - 2 * one) < 0.05 * one + legend  # less its label
    assert pixels(path, COLOURS["all-gather"]) == pixels(path, COLOURS["recompute"]) == 0


def test_panels_have_one_time_axis(tmp_path: Path) -> None:
    """The same second is as long in a panel of one second as in a panel of four, and pictures keep a readable size."""
    short, long = [Span("compute", "forward", "", 0, 1)], [Span("compute", "optimizer", "", 0, 4)]
    path = draw_stacked({"short": [Trace(0, short)], "long": [Trace(0, long)]}, tmp_path / "both.png")
    assert pixels(path, COLOURS["optimizer"]) == pytest.approx(4 * pixels(path, COLOURS["forward"]), rel=0.1)
    height, width, _ = image.imread(path).shape
    assert width == WIDTH and 500 < height < 750
    many = draw_stacked({"64 ranks": [Trace(rank, short) for rank in range(64)]}, tmp_path / "many.png")
    assert image.imread(many).shape[0] < 900


def test_a_timeline_is_drawn_again(tmp_path: Path) -> None:
    trace = Trace(0, [Span("compute", "forward", "a", 0, 1)], [Level("gathered", 0.5, 2**20)])
    path = write_timeline([trace], tmp_path, "run, step 2")
    first = path.read_bytes()
    path.unlink()
    assert redraw_timeline(tmp_path) == path and path.read_bytes() == first
    redraw_timeline(tmp_path, DARK)
    assert pixels(path, colours(DARK)["forward"]) > 1000 < pixels(path, DARK.ground)
    assert pixels(path, COLOURS["forward"]) == pixels(path, LIGHT.ground) == 0
    (tmp_path / "timeline.json").unlink()
    with pytest.raises(ValueError, match="no step of this run was recorded"):
        redraw_timeline(tmp_path)


# A run #


def run(world: World, config: RunConfig) -> None:
    Run(config, world, StopRequest()).go()


def config_for(inputs: Path, run_dir: Path, timeline_step: int) -> RunConfig:
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelSource(str(inputs / "model")),
        data=DataConfig(train=(str(inputs / "train.jsonl"),), max_length_tokens=256, template="chatml"),
        optim=OptimConfig(lr=1e-3),
        recompute=RecomputeConfig("full"),
        precision=Precision(wire="float16"),  # whose masters have to be gathered
        loop=TrainConfig(examples_per_step=8, microbatch_tokens=512, max_steps=3, timeline_step=timeline_step),
    )


def test_a_run_draws_the_step_it_is_asked_for(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    run_ranks(2, run, config_for(tmp_path, tmp_path / "with", timeline_step=2))
    run_ranks(2, run, config_for(tmp_path, tmp_path / "without", timeline_step=0))
    assert not list((tmp_path / "without").glob("timeline*"))
    with_, without = (read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("with", "without"))
    assert [record["loss"] for record in with_] == [record["loss"] for record in without]

    assert sorted(file.name for file in (tmp_path / "with").glob("timeline*")) == ["timeline.json", "timeline.png"]
    written = json.loads((tmp_path / "with" / "timeline.json").read_text())
    bars = [event for event in written["traceEvents"] if event["ph"] == "X"]
    for pid in (1, 2):
        kinds = Counter(event["cat"] for event in bars if event["pid"] == pid)
        assert kinds["optimizer"] == 1
        assert kinds["forward"] == kinds["backward"] == 3 * kinds["recompute"] / 2  # root and two blocks
        assert kinds["all-gather"] >= 4 and kinds["reduce-scatter"] >= 3
        reruns = [event for event in bars if event["pid"] == pid and event["cat"] == "recompute"]
        backwards = [event for event in bars if event["pid"] == pid and event["cat"] == "backward"]
        for rerun in reruns:
            (own,) = (b for b in backwards if b["name"] == rerun["name"].replace("recompute", "backward")
                      and b["ts"] <= rerun["ts"] <= b["ts"] + b["dur"])  # fmt: skip
            assert rerun["ts"] + rerun["dur"] <= own["ts"] + own["dur"]
    assert 0 < written["otherData"]["hidden_share"] <= 1
    assert image.imread(tmp_path / "with" / "timeline.png").shape[1] == WIDTH


def test_a_step_that_never_comes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loop.timeline_step is -1; valid: 0 or more"):
        TrainConfig(examples_per_step=8, microbatch_tokens=512, timeline_step=-1)
    write_inputs(tmp_path)
    with pytest.raises(RuntimeError, match=r"loop.timeline_step is 4; valid: 0 \(none\) to 3, the last optimizer step"):
        run_ranks(1, run, config_for(tmp_path, tmp_path / "run", timeline_step=4))
