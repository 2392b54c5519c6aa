"""Saves checkpoints while training goes on: begun in a moment, written by a thread, complete on all ranks or not there.

    saver = Saver(folder, optimizer, world, replica_world, keep_last=2)
    with saver:
        saver.start(Standing(step, ...))   # all ranks, between two steps; returns in about a millisecond
        ...                                # the optimizer asks `before_update` before it overwrites a shard
        saver.wait()                       # the folder, complete; OSError on every rank if any could not write

What is saved is the state at `start`, bit for bit: see `live_file` for how that needs no copy of it. The thread then
goes through the protocol of `sharded`: temporary folder, own file, read it back, manifest, rename, old ones away.

The ranks' threads meet three times: the folder is there; all files are; it is done. They do so in a process group of
their own (`side_channel`), so a pending save ends whatever the training threads do, as long as the processes live; if
one does not, its peers' connections break, and the save fails instead of waiting. (Files that say "I am done" would
need no group, but a shared folder's idea of what is in it can be seconds old, and what a killed attempt left behind
would look like news.)

A save that fails is reported by `failed` and raised by `wait`: the outcome is the same on every rank, but not at the
same moment, so a training loop must agree on `failed` (one flag in a reduction it does anyway) before it calls `wait`.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Self

from torch import Tensor

from minift.checkpoint.atomic import flush
from minift.checkpoint.device_reader import DeviceReader
from minift.checkpoint.live_file import PIECE_BYTES, LiveFile
from minift.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    Standing,
    StoredFile,
    checkpoint_folder,
    damage,
    list_checkpoints,
)
from minift.checkpoint.side_channel import SideChannel
from minift.checkpoint.stored_ranges import RNG_PREFIX
from minift.dist.process import World
from minift.dist.seeds import rng_state
from minift.optim.adamw import AdamW
from minift.optim.moments import Place
from minift.optim.shard import FlatShard, ParamRange

STAGING_BYTES = 256 << 20

log = logging.getLogger(__name__)


class Saver:
    """One per run. Between `start` and the end of the save the state may only be changed by the optimizer.

    Args:
        parent: where checkpoints are; made if it is not there.
        optimizer: its shards and their state are saved; its `before_update` becomes this saver's.
        world: all ranks; each writes a file.
        replica_world: the ranks that hold the same shards as this one. They share the writing of them, shard by shard.
        keep_last: older checkpoints than the newest so many are removed, when the new one is complete.
        staging_bytes: host memory that each rank may take, during a save, to let the optimizer go on although the disk
            is behind; 0: it then waits.
        on_saved: called with the folder when it is complete, on every rank, in the saver's thread. What it raises is
            logged and does not make the save fail.
    """

    def __init__(
        self,
        parent: Path,
        optimizer: AdamW,
        world: World,
        replica_world: World,
        *,
        keep_last: int,
        staging_bytes: int = STAGING_BYTES,
        on_saved: Callable[[Path], None] | None = None,
    ) -> None:
        self.parent = parent
        self._optimizer = optimizer
        # Dealt out like cards: with one replica this rank has them all. In the order in which they were updated last.
        self._shards = {shard.name: shard for shard in optimizer.shards[replica_world.rank :: replica_world.size]}
        self._ranks = SideChannel(world)
        self._keep_last = keep_last
        self._staging_bytes = staging_bytes
        self._on_saved = on_saved
        self._reader = DeviceReader(world.device, PIECE_BYTES) if world.device.type == "cuda" else None
        ranges = {
            name: [asdict(r) | {"places": _plain(places_of(optimizer, shard, r))} for r in shard.ranges]
            for name, shard in self._shards.items()
        }
        self._metadata = {"ranges": json.dumps(ranges)}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self._file: LiveFile | None = None
        optimizer.before_update = self._before_update
        if self._ranks.rank == 0:
            _clear_leftovers(parent)

    def start(self, standing: Standing) -> None:
        """Begin to save the state as it is now, after waiting for the save before. Collective.

        The optimizer's step count and the generators are taken now; so is `standing`.
        """
        self.wait()
        if self._reader is not None:
            self._reader.follow_compute()
        manifest = Manifest(copy.deepcopy(standing), self._optimizer.num_steps, self._ranks.size, {})
        folder = checkpoint_folder(self.parent, standing.step)
        self._file = self._live_file(folder.with_name(f".{folder.name}.tmp"))
        self._pending = self._thread.submit(self._save, folder, manifest, self._file)

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise. Becomes true on all ranks, not at once."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> Path | None:
        """The folder of the save under way, when it is complete; None if there is none.

        Raises OSError on every rank, once, if any rank could not write it; what was there before is untouched then.
        """
        try:
            return None if self._pending is None else self._pending.result()
        except Exception as error:  # a lost connection to another rank, too
            text = f"no checkpoint was written to {self.parent}: {error}. Older ones are intact."
            raise OSError(text) from error
        finally:
            self._pending = self._file = None

    def close(self) -> None:
        """Wait for what is under way, whatever becomes of it. After this there is no saver."""
        self._thread.shutdown(wait=True)
        self._optimizer.before_update = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _before_update(self, shard: FlatShard) -> None:
        if shard.name not in self._shards:
            return
        self._shards[shard.name] = self._shards.pop(shard.name)
        if self._file is not None:
            self._file.before_overwrite(shard.name)

    def _live_file(self, folder: Path) -> LiveFile:
        states = shard_states(self._optimizer)
        return LiveFile(
            folder / f"rank-{self._ranks.rank:05d}-of-{self._ranks.size:05d}.safetensors",
            {name: states[name] for name in self._shards},
            {f"{RNG_PREFIX}{name}": state for name, state in rng_state().items()},
            self._metadata,
            staging_bytes=self._staging_bytes,
            reader=self._reader,
        )

    # The thread #

    def _save(self, folder: Path, manifest: Manifest, file: LiveFile) -> Path:
        temporary = file.path.parent
        is_main = self._ranks.rank == 0
        try:
            self._agree(_failure_of(lambda: _make_empty(temporary)) if is_main else "", temporary)

            stored: list[StoredFile] = []
            failure = _failure_of(lambda: stored.append(_write_and_verify(file)))
            files = self._ranks.gather((file.path.name, stored))
            self._agree(failure, temporary)

            complete = replace(manifest, files={name: stored for name, (stored,) in files})
            self._agree(_failure_of(lambda: _commit(temporary, folder, complete)) if is_main else "", temporary)
        finally:
            file.abandon()  # after a failure, too, the optimizer must go on
        # The checkpoint is complete. What fails now fails on this rank alone, so it must not become a failed save.
        if is_main:
            _then("removing older ones", folder, lambda: _remove_old(folder, self._keep_last))
        if self._on_saved is not None:
            _then("on_saved", folder, lambda: self._on_saved(folder))
        return folder

    def _agree(self, failure: str, temporary: Path) -> None:
        """Collective. Raises OSError on all ranks if any has failed."""
        failures = self._ranks.gather(failure)
        for rank, reason in enumerate(failures):
            if reason:
                if self._ranks.rank == 0:
                    shutil.rmtree(temporary, ignore_errors=True)  # half a checkpoint on a full disk helps nobody
                raise OSError(f"rank {rank}: {reason}")


def shard_states(optimizer: AdamW) -> dict[str, dict[str, Tensor]]:
    """Shard -> "master", "lower" (of one in halves), "exp_avg", … -> the live tensors, 1-D: what a checkpoint has of
    it."""
    states = optimizer.state_dict()
    return {shard.name: {**shard.halves(), **states[shard.name]} for shard in optimizer.shards}


def places_of(optimizer: AdamW, shard: FlatShard, piece: ParamRange) -> dict[str, Place]:
    """Where in these tensors the state of `piece`, one of the ranges of `shard`, is."""
    return dict.fromkeys(shard.halves(), Place(piece.start, piece.stop)) | optimizer.places(shard, piece)


def _plain(places: dict[str, Place]) -> dict[str, dict[str, int]]:
    """For JSON."""
    return {what: asdict(place) for what, place in places.items()}


def _failure_of(write: Callable[[], None]) -> str:
    """What went wrong, or nothing: a rank that fails must still take part in the collectives that follow."""
    try:
        write()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _then(what: str, folder: Path, action: Callable[[], None]) -> None:
    if failure := _failure_of(action):
        log.warning("%s is complete, but %s failed: %s", folder, what, failure)


def _clear_leftovers(parent: Path) -> None:
    """Remove what killed saves have left behind: files of a new checkpoint, or the rest of an old one."""
    for leftover in parent.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)  # somebody may have a file open; what is in our way will show


def _make_empty(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(temporary.parent)
    temporary.mkdir()


def _write_and_verify(file: LiveFile) -> StoredFile:
    """Read back through the kernel's cache, which finds what went wrong on the way there; the disk itself is checked
    when a checkpoint is loaded."""
    stored = file.write()
    problem = damage(file.path, stored)
    if problem:
        raise OSError(f"{problem}; is the disk or the memory failing?")
    return stored


def _commit(temporary: Path, folder: Path, manifest: Manifest) -> None:
    path, encoded = temporary / MANIFEST, manifest.encode()
    path.write_bytes(encoded)
    flush(path)
    if Manifest.read(temporary).encode() != encoded:
        raise OSError(f"{path} reads back differently from what was written; is the disk or the memory failing?")
    flush(temporary)
    replaced = folder.with_name(f".{folder.name}.replaced.tmp")
    if folder.exists():  # after falling back to an older checkpoint the run comes by the damaged one again
        folder.rename(replaced)
    os.replace(temporary, folder)
    flush(folder.parent)
    flush(folder.parent.parent)  # the first save has made the folder that this one is in
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_old(newest: Path, keep_last: int) -> None:
    """Their names go first: a checkpoint that a kill leaves half removed must not look like one.

    Later steps than the newest are those of a run that was continued from an earlier one: not ours to judge.
    """
    older = [folder for folder in list_checkpoints(newest.parent) if folder.name <= newest.name]
    removed = [folder.rename(folder.with_name(f".{folder.name}.removed.tmp")) for folder in older[:-keep_last]]
    flush(newest.parent)
    for folder in removed:
        shutil.rmtree(folder)
