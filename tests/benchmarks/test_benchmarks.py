"""Every benchmark says what it does, is run by the driver, and draws what was kept of it. Nothing is measured here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import results
import run_all
from run_all import BENCHMARKS, Benchmark, missing

FOLDER = Path(results.__file__).parent
KEPT = [(name, path) for name in BENCHMARKS for path in sorted(results.FOLDER.glob(f"*_{name}.json"))]


def test_the_driver_knows_every_benchmark():
    """A benchmark is a file that measures, so it has a result; launches reads what others printed."""
    files = {path.stem for path in FOLDER.glob("*.py") if "finish(args" in path.read_text(encoding="utf-8")}
    assert files - {"results", "launches"} == BENCHMARKS.keys()


def test_every_benchmark_asks_a_question(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run_all.py", "--list"])
    run_all.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(BENCHMARKS)
    for name, line in zip(BENCHMARKS, lines, strict=True):
        assert "?" in line and 20 < len(run_all.question(name)) < 200


@pytest.mark.parametrize(("name", "path"), KEPT, ids=lambda value: getattr(value, "stem", value))
def test_what_was_kept_can_be_drawn(name, path, tmp_path, monkeypatch):
    if missing(BENCHMARKS[name], quick=True):
        pytest.skip("its peers are not installed")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    (tmp_path / path.name).write_bytes(path.read_bytes())
    run_all.draw(name)
    pictures = sorted(tmp_path.glob("*.png"))
    if name == "prefetch":  # drawn when it is measured: what is kept has no spans
        assert not pictures and path.with_suffix(".png").exists()
    else:
        assert [picture.name for picture in pictures] == [f"{path.stem}.png", f"{path.stem}_dark.png"]


def test_options_of_every_run_are_valid():
    """Oracle: each benchmark's own parser, stopped before it measures."""
    code = """
import importlib, shlex, sys
import results, run_all
class Parsed(Exception): pass
def stop(patience_s=0): raise Parsed
results.wait_until_quiet = stop
def keep(*_): raise AssertionError("it went on and measured")
results.keep = keep
parse_args = results.argparse.ArgumentParser.parse_args
for name, benchmark in run_all.BENCHMARKS.items():
    if run_all.missing(benchmark, quick=True): continue
    module = importlib.import_module(name)
    def parse(parser, *rest, **keywords):
        parser.add_argument("--write", action="store_true")
        parse_args(parser)
        raise Parsed
    module.parse = parse
    for options in (*benchmark.runs, benchmark.quick):
        sys.argv = [name, *shlex.split(options), "--write"]
        try: module.main()
        except Parsed: pass
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True)
    assert done.stdout.strip().endswith("fine"), done.stderr


def test_the_driver_goes_on_when_one_fails(monkeypatch, capsys):
    found = {"good": {"question": "good", "ratio": 2.0, "rows": []}, "bad": "ended with status 1"}
    monkeypatch.setattr(run_all, "BENCHMARKS", {
        "bad": Benchmark(runs=("--a", "--b")), "lacking": Benchmark(peers=("no_such_module",)), "good": Benchmark(),
    })  # fmt: skip
    calls = []
    monkeypatch.setattr(run_all, "run", lambda name, options: calls.append((name, options)) or found[name])
    monkeypatch.setattr("sys.argv", ["run_all.py"])
    with pytest.raises(SystemExit) as stopped:
        run_all.main()
    assert stopped.value.code == 1
    assert calls == [("bad", ["--a", "--write"]), ("bad", ["--b", "--write"]), ("good", ["--write"])]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "bad": ["ended with status 1"] * 2,
        "lacking": ["skipped: lacks no_such_module"],
        "good": [{"ratio": 2.0}],
    }


def test_the_driver_runs_a_benchmark_and_refuses_others(monkeypatch, capsys):
    said = run_all.run("nf4_error", ["--size", "64", "--busy"])
    assert isinstance(said, dict) and said["question"] == "nf4_error" and said["parameters"]["size"] == 64
    assert isinstance(run_all.run("nf4_error", ["--size", "x"]), str)
    monkeypatch.setattr("sys.argv", ["run_all.py", "nonsense"])
    with pytest.raises(SystemExit, match="no benchmark is called nonsense; valid: nf4_error, "):
        run_all.main()
