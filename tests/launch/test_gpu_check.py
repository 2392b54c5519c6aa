"""launch/gpu_check.sh where there is no GPU: it says so; and with a stand-in for Python, which tells what it would run.

Oracles: the sentence; the files that commands name, and the benchmarks' own parsers.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
STAND_IN = """#!{python}
import json, os, sys
arguments = sys.argv[1:]
with open({calls!r}, "a") as file:
    seen = {{name: os.environ.get(name) for name in ("MINIFT_TEST_DEVICE", "TORCH_CUDA_ARCH_LIST", "USE_CUDA")}}
    file.write(json.dumps([arguments, seen]) + "\\n")
if "describe_machine" in " ".join(arguments):
    print("fake-gpu\\n9.0")
if {failing!r} in arguments:
    sys.exit("it does not work")
"""


def check(tmp_path: Path, failing: str = "nothing", **settings: str) -> tuple[subprocess.CompletedProcess, list]:
    """What became of the script, and [arguments, environment] of each call of Python; `failing`: of one that fails."""
    calls = tmp_path / "calls"
    stand_in = tmp_path / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN.format(python=sys.executable, calls=str(calls), failing=failing))
    stand_in.chmod(0o755)
    sanitizer = stand_in.with_name("compute-sanitizer")
    sanitizer.write_text('#!/bin/sh\nwhile [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"\n')
    sanitizer.chmod(0o755)
    environment = os.environ | {
        "PYTHON": str(stand_in), "OUT": str(tmp_path / "out"), "PATH": f"{stand_in.parent}:{os.environ['PATH']}",
    } | settings  # fmt: skip
    done = subprocess.run([ROOT / "launch" / "gpu_check.sh"], env=environment, capture_output=True, text=True)
    return done, [json.loads(line) for line in calls.read_text().splitlines()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_leaves_nothing(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    done = subprocess.run([ROOT / "launch" / "gpu_check.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert f"the torch of {sys.executable} sees no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_everything_it_would_run_exists(tmp_path, monkeypatch):
    done, calls = check(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    environments = {tuple(arguments): seen for arguments, seen in calls}
    assert environments["setup.py", "build_ext", "--inplace"] | {"MINIFT_TEST_DEVICE": None} == {
        "MINIFT_TEST_DEVICE": None, "TORCH_CUDA_ARCH_LIST": "9.0", "USE_CUDA": "1",
    }  # fmt: skip
    tested, benchmarks = set(), []
    for arguments, seen in calls:
        if arguments[:2] == ["-m", "pytest"]:
            (file,) = [argument for argument in arguments if argument.endswith(".py")]
            tested.add(file)
            assert (ROOT / file).exists() and file.startswith("tests/")
            if "-k" in arguments:
                asked = arguments[arguments.index("-k") + 1]
                names = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
                if "cuda" not in asked:  # which are parameters
                    asked = re.sub(r"\b(?!and\b|not\b)(\w+)", r"('\1' in name)", asked)
                    assert any(eval(asked, {"name": name}) for name in names), (file, asked)
            assert (seen["MINIFT_TEST_DEVICE"] == "cuda") == (not file.startswith("tests/ops/"))
        elif arguments[0] == "-m":
            assert importlib.util.find_spec(arguments[1]) is not None
        elif arguments[0].startswith("benchmarks/"):
            benchmarks.append((Path(arguments[0]).stem, arguments[1:]))
    with_kernels = {
        f"tests/ops/{path.name}"
        for path in (ROOT / "tests" / "ops").glob("test_*.py")
        if re.search("^HAS_CUDA_KERNELS = True", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(with_kernels) > 10
    assert tested == with_kernels | {
        "tests/fsdp/test_engine.py", "tests/test_step.py", "tests/fsdp/test_nccl.py", "tests/test_pinned.py",
        "tests/optim/test_memory.py", "tests/test_grad_slot.py",
    }  # fmt: skip
    assert [arguments for arguments, _ in calls].count(["-m", "tests.ops.small_cases"]) == 2  # memcheck, racecheck
    assert [name for name, _ in benchmarks] == ["ops_cuda"] + ["step_cuda"] * 10

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    parse = importlib.import_module("results").parse
    for name, options in benchmarks:
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "parse", lambda parser, **_: stop_after(parse(parser, is_timed=False)))
        monkeypatch.setattr("sys.argv", [name, *options])
        with pytest.raises(Parsed):
            module.main()


class Parsed(Exception):
    pass


def stop_after(_: object) -> None:
    raise Parsed


def test_what_fails_does_not_stop_the_rest(tmp_path):
    done, calls = check(tmp_path, failing="tests/test_step.py")
    assert done.returncode == 1
    assert re.search(r"engine: steps +FAILED: ended with status 1\n *\| \$ .*\n *\| it does not work", done.stdout)
    assert "1 of these failed" in done.stdout.splitlines()[-1]
    assert calls[-1][0][0] == "benchmarks/step_cuda.py"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "it does not work" in log and log.count("FAILED") == 2  # where it failed, and in the table


def test_what_there_is_no_time_for_is_said(tmp_path):
    done, calls = check(tmp_path, BUDGET_S="0")
    assert done.returncode == 0 and len(calls) == 2  # is there a GPU, and which
    assert re.search(r"build with CUDA +skipped: no time is left", done.stdout)
