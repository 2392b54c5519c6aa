"""torchrun restarts a run whose rank or machine died. Oracle: the same run, undisturbed.

Real torchrun, real kill -9; the tiny model. That no example was skipped or repeated shows in the losses: each step's is
that of the undisturbed run, bit for bit as long as the number of processes is the same, generators (dropout) included;
with fewer processes sums are in another order, and Adam amplifies that where gradients are near zero (see test_train).
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from minift.config import RunConfig
from minift.dist.process import World
from minift.dist.signals import StopRequest
from minift.metrics import read_metrics
from minift.run_lock import run_lock
from minift.train import Run
from tests.ranks import run_ranks
from tests.tiny import write_inputs

STEPS = 40
KILL_AFTER_STEP = 12
SAVE_EVERY = 5
RECIPE = """
run_dir: {run_dir}
model: {{path: {inputs}/model}}
data: {{train: [{inputs}/train.jsonl], max_length_tokens: 256, template: chatml}}
adapter: {{r: 4, alpha: 8.0, dropout: {dropout}}}
optim: {{lr: 1.0e-2}}
precision: {{wire: float32}}
loop: {{examples_per_step: 8, microbatch_tokens: 256, epochs: 100, max_steps: {steps}, checkpoint_every_steps: {every}}}
device: cpu
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def recipe(folder: Path, inputs: Path, name: str, dropout: float) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(
        RECIPE.format(run_dir=folder / name, inputs=inputs, dropout=dropout, steps=STEPS, every=SAVE_EVERY)
    )
    return path


def run(world: World, path: Path) -> None:
    Run(RunConfig.from_recipe(path), world, StopRequest()).go()


class Torchrun:
    """A launcher, its processes, and what they say."""

    def __init__(self, recipe: Path, log: Path, *options: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval", "0.1", *options]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, "-m", "minift", "train", str(recipe)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                cwd=Path(__file__).parents[2],
                start_new_session=True,
            )

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def kill(self) -> None:
        """The launcher and everything it started, at once, as a power failure does."""
        victims = [*self.workers(), psutil.Process(self.process.pid)] if self.process.poll() is None else []
        for victim in victims:
            victim.kill()
        self.process.wait()

    def resumed_at(self) -> list[int]:
        """Steps after which the run was continued, as it says itself."""
        return [int(step) for step in re.findall(r"continuing after step (\d+)", self.log.read_text())]


@pytest.fixture
def launched() -> Iterator[list[Torchrun]]:
    """Whatever a test has launched is gone after it."""
    launchers: list[Torchrun] = []
    yield launchers
    for launcher in launchers:
        launcher.kill()


def wait_for_step(run_dir: Path, step: int, launcher: Torchrun) -> None:
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
        assert launcher.process.poll() is None, launcher.log.read_text()
        assert time.monotonic() < deadline, f"no step {step}: {launcher.log.read_text()}"
        time.sleep(0.005)


def losses(run_dir: Path) -> list[tuple[float, float]]:
    training, _ = read_metrics(run_dir / "metrics.jsonl")
    assert [record["step"] for record in training] == list(range(1, STEPS + 1))
    return [(record["loss"], record["grad_norm"]) for record in training]


def test_a_killed_rank_restarts_the_run(inputs: Path, tmp_path: Path, launched: list[Torchrun]) -> None:
    run_ranks(2, run, recipe(tmp_path, inputs, "straight", dropout=0.2))
    killed = recipe(tmp_path, inputs, "killed", dropout=0.2)
    options = ("--standalone", "--nproc-per-node=2", "--max-restarts=1")
    launched.append(torchrun := Torchrun(killed, tmp_path / "log", *options))
    wait_for_step(tmp_path / "killed", KILL_AFTER_STEP, torchrun)
    (victim,) = [worker for worker in torchrun.workers() if worker.environ()["RANK"] == "1"]
    victim.send_signal(signal.SIGKILL)
    assert torchrun.process.wait(120) == 0, torchrun.log.read_text()

    (resumed,) = torchrun.resumed_at()
    assert resumed % SAVE_EVERY == 0 and 0 < resumed < STEPS
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    exports = (tmp_path / name / "export" / "adapter" for name in ("killed", "straight"))
    ours, theirs = (load_file(export / "adapter_model.safetensors") for export in exports)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_second_launch_in_its_folder_is_refused(inputs: Path, tmp_path: Path, launched: list[Torchrun]) -> None:
    """By one sentence: the rank that is not told has not met the other, so it ends when the launcher says so."""
    with run_lock(tmp_path / "held"):
        options = ("--standalone", "--nproc-per-node=2")
        launched.append(torchrun := Torchrun(recipe(tmp_path, inputs, "held", 0.0), tmp_path / "log", *options))
        assert torchrun.process.wait(120) != 0
    said = torchrun.log.read_text()
    assert f"where process {os.getpid()} on {socket.gethostname()} is training; wait until it ends" in said
    assert "closing signal SIGTERM" in said and "SIGKILL" not in said and "gloo" not in said
    assert {path.name for path in (tmp_path / "held").iterdir()} == {".lock"}


def test_a_lost_machine_leaves_a_smaller_world(inputs: Path, tmp_path: Path, launched: list[Torchrun]) -> None:
    """Two launchers with a process each stand for two machines; the second is lost for good."""
    run_ranks(2, run, recipe(tmp_path, inputs, "straight", dropout=0.0))
    lost = recipe(tmp_path, inputs, "lost", dropout=0.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quick = "last_call_timeout=4,keep_alive_interval=1,keep_alive_max_attempt=2"  # seconds; the defaults take a minute
    for is_host in (1, 0):  # of the rendezvous, which is lost with its machine
        options = (
            "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=test",
            f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf={quick},is_host={is_host}", "--local-addr=127.0.0.1",
        )  # fmt: skip
        launched.append(Torchrun(lost, tmp_path / f"log-{is_host}", *options))
    wait_for_step(tmp_path / "lost", KILL_AFTER_STEP, launched[0])
    launched[1].kill()
    assert launched[0].process.wait(120) == 0, launched[0].log.read_text()

    resumed = max(step for torchrun in launched for step in torchrun.resumed_at())
    assert resumed % SAVE_EVERY == 0 and 0 < resumed < STEPS
    ours, theirs = losses(tmp_path / "lost"), losses(tmp_path / "straight")
    assert ours[:resumed] == theirs[:resumed]
    for a, b in zip(ours[resumed:], theirs[resumed:], strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    assert re.search(r"processes.*1 on cpu", (tmp_path / "lost" / "report.md").read_text())
