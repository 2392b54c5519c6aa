"""kill -9 at random moments of saves, and at each at which a folder changes. Oracle: the state after each step,
computed without checkpoints.
"""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minift.checkpoint.manifest import Standing, list_checkpoints
from minift.checkpoint.saver import Saver, shard_states
from minift.checkpoint.sharded import load_checkpoint, load_newest
from minift.dist.process import World
from minift.optim.adamw import AdamW
from tests.checkpoint import states
from tests.checkpoint.kills import all_kills, fork_server
from tests.checkpoint.states import Cut

CUT = Cut(seed=3)
KILLS = 13  # for each of four kinds: 52 in all
ALONE = World(0, 1, 0, torch.device("cpu"), "gloo", group=None)


def step(optimizer: AdamW) -> None:
    """A pure function of the state before; element-wise, so whoever holds an element computes it."""
    for shard in optimizer.shards:
        for r in shard.ranges:
            here = slice(r.start, r.stop)
            index = torch.arange(r.param_start, r.param_start + r.stop - r.start)
            shard.grad[here] = torch.sin(index + optimizer.num_steps) + 0.1 * shard.master[here]
    optimizer.step(1.0)


def save_for_ever(parent: Path, rank: int, size: int, is_async: bool, rendezvous: Path, ready: Connection) -> None:
    """Load the newest checkpoint and go on from there, saving after every step, until killed."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(rendezvous), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    world = World(rank, size, 0, torch.device("cpu"), "gloo", dist.group.WORLD)
    optimizer = CUT.optimizer(world)
    load_newest(parent, optimizer, world)
    with Saver(parent, optimizer, world, CUT.replica_world(world), keep_last=2) as saver:
        ready.send(None)
        while True:
            step(optimizer)
            saver.start(Standing(optimizer.num_steps, {}, {}))
            if not is_async:
                saver.wait()


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_the_newest_complete_checkpoint_always_loads(tmp_path: Path, size: int, is_async: bool) -> None:
    server = fork_server()
    draw = random.Random(size * 10 + is_async)
    parent = tmp_path / "checkpoints"
    reference = CUT.optimizer(ALONE)
    last_step = num_interrupted = 0
    longest_s = 0.08
    for attempt in range(KILLS):
        processes, pipes = [], []
        for rank in range(size):
            ours, theirs = server.Pipe()
            arguments = (parent, rank, size, is_async, tmp_path / f"rendezvous-{attempt}", theirs)
            processes.append(server.Process(target=save_for_ever, args=arguments))
            processes[-1].start()
            pipes.append(ours)
        for pipe in pipes:
            assert pipe.poll(60), "a process did not start"
            pipe.recv()
        time.sleep(draw.uniform(0.0, longest_s))
        victims = [process.pid for process in processes]
        for pid in draw.sample(victims, size):
            os.kill(pid, signal.SIGKILL)
        for process in processes:
            process.join()
        num_interrupted += any(parent.glob(".step-*.tmp"))

        optimizer = CUT.optimizer(ALONE)
        loaded = load_newest(parent, optimizer, ALONE)
        if optimizer.num_steps == last_step:
            longest_s *= 1.5  # a busy machine: let them get somewhere
        if loaded is None:  # killed before the first was complete
            assert last_step == 0
            continue
        assert loaded.passed_over == ()
        assert loaded.standing.step == optimizer.num_steps >= last_step
        last_step = optimizer.num_steps
        while reference.num_steps < last_step:
            step(reference)
        for name, tensors in shard_states(reference).items():
            for what, tensor in tensors.items():
                assert torch.equal(shard_states(optimizer)[name][what], tensor), f"{name}/{what}, {last_step} steps"
    assert last_step > 0
    assert num_interrupted > 0, "the kills did not meet saves"


def save(parent: Path, *steps: int) -> None:
    """What is saved as step k is what `states.fill` makes of k. One checkpoint is kept."""
    optimizer = CUT.optimizer(ALONE)
    with Saver(parent, optimizer, ALONE, ALONE, keep_last=1) as saver:
        for number in steps:
            states.fill(optimizer, number)
            saver.start(Standing(number, {}, {}))
            saver.wait()


@pytest.mark.parametrize("saved", [3, 2])
def test_a_save_killed_before_any_change_leaves_good_checkpoints_and_no_litter(tmp_path: Path, saved: int) -> None:
    """The next step, or the newest one once more (a run that fell back comes by the damaged one again)."""
    parent, names = Path(), []

    def prepare() -> tuple[Path, int]:
        nonlocal parent
        parent = tmp_path / str(len(list(tmp_path.iterdir())))
        save(parent, 1)
        later = parent.with_name("later")
        save(later, 2)
        (later / "step-00000002").rename(parent / "step-00000002")
        (parent / ".step-00000000.tmp").mkdir()  # of a kill before
        later.rmdir()
        return parent, saved

    for _ in all_kills(save, prepare):
        names.append(sorted(path.name for path in parent.iterdir()))
        kept = list_checkpoints(parent)
        assert kept and {path for path in parent.iterdir() if not path.match(".step-*.tmp")} == set(kept)
        for folder in kept:
            optimizer = CUT.optimizer(ALONE)
            assert states.differences(optimizer, load_checkpoint(folder, optimizer, ALONE).step) == []
        save(parent)  # a run that has nothing left to save
        assert sorted(parent.iterdir()) == kept
        save(parent, 4)
        assert [path.name for path in parent.iterdir()] == ["step-00000004"]
    assert [path.name for path in parent.iterdir()] == [f"step-{saved:08d}"]
    assert any(".step-00000001.removed.tmp" in found for found in names), "no kill met a removal"
