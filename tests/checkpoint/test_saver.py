"""Saving while training goes on. Oracle: the state at `start`, as a checkpoint that nothing disturbed would hold it."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from minift.checkpoint import live_file, saver
from minift.checkpoint.manifest import Standing, StoredFile, list_checkpoints
from minift.checkpoint.saver import Saver, shard_states
from minift.checkpoint.sharded import load_checkpoint, load_newest
from minift.dist.process import World
from minift.optim.adamw import AdamW
from tests.checkpoint import states
from tests.checkpoint.states import Cut
from tests.ranks import run_ranks

CUT = Cut()


def at(step: int) -> Standing:
    return Standing(step, {}, {})


def train_through_saves(world: World, parent: Path, staging_bytes: int) -> list[str]:
    """Five steps, a save begun after each, on a slow disk: every step meets a save that is under way."""
    optimizer = CUT.optimizer(world)
    states.fill(optimizer, 0)
    put = live_file._Sink.put
    after: list[list[torch.Tensor]] = []
    with (
        pytest.MonkeyPatch.context() as patch,
        Saver(parent, optimizer, world, CUT.replica_world(world), keep_last=9, staging_bytes=staging_bytes) as saver,
    ):
        patch.setattr(live_file, "PIECE_BYTES", 100)
        patch.setattr(live_file._Sink, "put", lambda sink, view: (time.sleep(0.0005), put(sink, view)))
        for step in range(1, 6):
            for shard in optimizer.shards:
                for r in shard.ranges:
                    shard.grad[r.start : r.stop] = 0.1 * step
            optimizer.step(1.0)
            standing = Standing(step, {"at": [step]}, {})
            saver.start(standing)
            standing.loader["at"].append("changed")  # the saver has its own
            after.append([tensor.clone() for tensor in tensors_of(optimizer)])
    wrong = []
    for folder, tensors in zip(list_checkpoints(parent), after, strict=True):
        again = CUT.optimizer(world)
        standing = load_checkpoint(folder, again, world)
        if not all(map(torch.equal, tensors_of(again), tensors)) or standing.loader != {"at": [standing.step]}:
            wrong.append(folder.name)
    return wrong


def tensors_of(optimizer: AdamW) -> list[torch.Tensor]:
    return [tensor for named in shard_states(optimizer).values() for tensor in named.values()]


@pytest.mark.parametrize("staging_bytes", [0, 200, 1 << 20])
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_saved_is_the_state_at_start(tmp_path: Path, world_size: int, staging_bytes: int) -> None:
    assert run_ranks(world_size, train_through_saves, tmp_path, staging_bytes) == [[]] * world_size
    assert len(list_checkpoints(tmp_path)) == 5


def start_on_a_stuck_disk(world: World, parent: Path) -> None:
    """A whole step is done, and the generator is used, before a byte can be written."""
    optimizer = CUT.optimizer(world)
    states.fill(optimizer, 1)
    stuck = threading.Event()
    put = live_file._Sink.put
    with (
        pytest.MonkeyPatch.context() as patch,
        Saver(parent, optimizer, world, CUT.replica_world(world), keep_last=1, staging_bytes=1 << 20) as this,
    ):
        patch.setattr(live_file._Sink, "put", lambda sink, view: (stuck.wait(), put(sink, view)))
        torch.manual_seed(5 + world.rank)
        expected = torch.rand(3)
        torch.manual_seed(5 + world.rank)
        this.start(at(1))
        torch.rand(100)
        optimizer.step(1.0)
        assert list_checkpoints(parent) == [] and not this.failed
        stuck.set()
        assert this.wait() == parent / "step-00000001"
    again = CUT.optimizer(world)
    load_newest(parent, again, world)
    assert states.differences(again, 1) == []
    assert torch.equal(torch.rand(3), expected)
    assert optimizer.before_update is None


def test_training_goes_on_while_the_disk_is_stuck(tmp_path: Path) -> None:
    run_ranks(2, start_on_a_stuck_disk, tmp_path)


def save_in_another_order(world: World, parent: Path) -> list[list[str]]:
    """The order of shards in the file, before and after a step that updates them backwards."""
    optimizer = CUT.optimizer(world)
    orders = []
    with Saver(parent, optimizer, world, CUT.replica_world(world), keep_last=1) as this:
        for step in (1, 2):
            this.start(at(step))
            (path,) = this.wait().glob("rank-*")
            with safe_open(path, "pt") as file:
                orders.append([name.split(":")[0] for name in file.offset_keys() if name.endswith("/master")])
            optimizer.begin_step(1.0)
            for shard in reversed(optimizer.shards):
                optimizer.update(shard)
    return orders


def test_shards_are_written_in_the_order_of_their_updates(tmp_path: Path) -> None:
    names = ["bucket.0", "bucket.1", "bucket.2"]
    assert run_ranks(1, save_in_another_order, tmp_path) == [[names, names[::-1]]]


def save_many(world: World, parent: Path) -> None:
    optimizer = CUT.optimizer(world)
    with Saver(parent, optimizer, world, CUT.replica_world(world), keep_last=2) as this:
        for step in (1, 2, 3, 10):
            this.start(at(step))  # waits for the one before


def test_keeps_the_newest_and_closing_waits(tmp_path: Path) -> None:
    run_ranks(2, save_many, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


def fail_on_rank_1(world: World, parent: Path, where: str) -> list[str]:
    """What `wait` raises; nothing older is lost then; the next save works."""
    optimizer = CUT.optimizer(world)
    told = []
    with Saver(parent, optimizer, world, CUT.replica_world(world), keep_last=1, on_saved=told.append) as this:
        with pytest.MonkeyPatch.context() as patch:
            if where == "write" and world.rank == 1:
                patch.setattr(live_file.os, "write", _disk_full)
            if where == "verify" and world.rank == 1:
                patch.setattr(saver, "damage", lambda path, stored: f"{path.name} is damaged" if stored else "")
            if where == "commit" and world.rank == 0:
                patch.setattr(saver.os, "replace", _disk_full)
            if where == "folder" and world.rank == 0:
                patch.setattr(saver, "_make_empty", _disk_full)
            this.start(at(11))
            optimizer.step(1.0)  # no fence stays shut
            with pytest.raises(OSError) as caught:
                this.wait()
        assert this.wait() is None and not this.failed and told == []  # raised once
        assert [p.name for p in list_checkpoints(parent)] == ["step-00000003", "step-00000010"]
        this.start(at(12))
        assert this.wait() == parent / "step-00000012" and told == [parent / "step-00000012"]
    return [str(caught.value)]


def _disk_full(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("where", "culprit", "message"),
    [
        ("write", 1, "No space left"),
        ("verify", 1, "rank-00001-of-00002.safetensors is damaged"),
        ("commit", 0, "No space left"),
        ("folder", 0, "No space left"),
    ],
)
def test_one_rank_that_fails_fails_all_and_leaves_what_was_there(
    tmp_path: Path, where: str, culprit: int, message: str
) -> None:
    run_ranks(2, save_many, tmp_path)
    for (text,) in run_ranks(2, fail_on_rank_1, tmp_path, where):
        assert f"rank {culprit}: OSError" in text and message in text and "Older ones are intact" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000012"]


def tell_into_a_broken_pipe(world: World, parent: Path) -> tuple[str, list[str]]:
    """What `wait` returns and what is logged; only rank 0 has anybody to tell."""
    optimizer = CUT.optimizer(world)
    logged: list[str] = []

    class Log(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(record.getMessage())

    def say(folder: Path) -> None:
        if world.rank == 0:
            raise BrokenPipeError(32, "Broken pipe")

    saver.log.addHandler(handler := Log())
    try:
        with Saver(parent, optimizer, world, CUT.replica_world(world), keep_last=1, on_saved=say) as this:
            this.start(at(1))
            return this.wait().name, logged
    finally:
        saver.log.removeHandler(handler)


def test_a_checkpoint_of_which_nobody_can_be_told_is_saved_all_the_same(tmp_path: Path) -> None:
    (folder, (line,)), other = run_ranks(2, tell_into_a_broken_pipe, tmp_path)
    assert folder == "step-00000001" and other == (folder, [])
    assert [p.name for p in list_checkpoints(tmp_path)] == [folder]
    assert folder in line and "is complete" in line and "Broken pipe" in line


def lie_about_what_was_written(world: World, parent: Path) -> str:
    """The file on the disk is not what the writer thinks it is."""
    optimizer = CUT.optimizer(world)
    states.fill(optimizer, 1)
    stored = live_file._Sink.stored

    def other(sink: live_file._Sink) -> StoredFile:
        truth = stored(sink)
        return StoredFile(truth.num_bytes, truth.crc32 ^ 1)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError) as caught:
        patch.setattr(live_file._Sink, "stored", other)
        with Saver(parent, optimizer, world, CUT.replica_world(world), keep_last=1) as this:
            this.start(at(11))
            this.wait()
    return str(caught.value)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    for message in run_ranks(2, lie_about_what_was_written, tmp_path):
        assert "its checksum is not that of what was written" in message
    assert list(tmp_path.iterdir()) == []


def leave_with_an_exception(world: World, parent: Path) -> bool:
    optimizer = CUT.optimizer(world)
    with pytest.raises(ArithmeticError), Saver(parent, optimizer, world, CUT.replica_world(world), keep_last=1) as this:
        this.start(at(4))
        raise ArithmeticError("in the loop")
    return list_checkpoints(parent) != []


def test_an_exception_in_the_loop_does_not_lose_the_save_under_way(tmp_path: Path) -> None:
    assert run_ranks(2, leave_with_an_exception, tmp_path) == [True, True]
