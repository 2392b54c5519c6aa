"""The sheet of curves. Oracles: a plain mean over each window; colours of pixels."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minift.cli import main
from minift.curves import MAX_RUNS, draw_runs, smooth
from minift.style import DARK, LIGHT
from tests.records import training_record, validation_record, write_records
from tests.test_timeline import pixels


@given(st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), min_size=1, max_size=100))
def test_smoothing_is_the_mean_of_a_centred_window(values):
    half = round(len(values) / 30)
    for i, got in enumerate(smooth(values)):
        window = [value for value in values[max(0, i - half) : i + half + 1] if math.isfinite(value)]
        # sums of at most 100 numbers of 1e3 in fp64: far below 1e-8
        assert got == pytest.approx(statistics.fmean(window), abs=1e-8) if window else math.isnan(got)


def write_run(folder: Path, num_steps: int) -> Path:
    records = [validation_record(0), *(training_record(step, 2.0 / step) for step in range(1, num_steps + 1))]
    write_records(folder, [*records, validation_record(num_steps, 0.75)])
    return folder


def test_each_run_has_a_colour_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        write_run(tmp_path / name, num_steps=70)
    assert main(["plot", "a"]) == 0
    assert capsys.readouterr().out.strip() == "a/loss.png"
    one = Path("a/loss.png")
    assert pixels(one, LIGHT.series[0]) > 500 and pixels(one, LIGHT.series[2]) == 0
    assert main(["plot", "a", "b", "c"]) == 0 and main(["plot", "a", "b", "c", "--dark", "--out", "dark.png"]) == 0
    for path, theme in ((Path("runs.png"), LIGHT), (Path("dark.png"), DARK)):
        assert all(pixels(path, colour) > 100 for colour in (*theme.series[:3], theme.ground))
        assert pixels(path, theme.series[3]) == 0


def test_runs_are_named_by_what_tells_them_apart(tmp_path, monkeypatch):
    """Two folders of the same name, in different places; older runs did not write everything down."""
    seen = []
    monkeypatch.setattr("minift.curves._draw", lambda figure, theme, runs: seen.extend(runs))
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
    folders = [write_run(tmp_path / "x" / "run", 3), write_run(tmp_path / "y" / "run", 3), write_run(tmp_path / "z", 3)]
    draw_runs(folders, tmp_path / "runs.png")
    assert [run.name for run in seen] == ["x/run", "y/run", "z"]
    assert seen[0].values("lr") == [1e-4] * 3 and all(map(math.isnan, seen[0].values("not yet known")))


def test_what_cannot_be_drawn_is_said(tmp_path):
    write_records(tmp_path, [validation_record(0)])
    with pytest.raises(ValueError, match="has no training step yet"):
        draw_runs([tmp_path], tmp_path / "loss.png")
    with pytest.raises(ValueError, match="9 runs on one sheet cannot be told apart; valid: at most 8"):
        draw_runs([tmp_path] * (MAX_RUNS + 1), tmp_path / "loss.png")
    assert not list(tmp_path.glob("*.png"))
