"""One safetensors file, written in the background from memory that its owner goes on using.

    file = LiveFile(path, {"block 0": {"master": ..., "exp_avg": ...}, ...}, ...)
    stored = file.write()            # the writer's thread: header, then group after group, from where the bytes are
    file.before_overwrite("block 0") # the owner's thread, which may go on when the bytes of that group are safe

Nothing is copied ahead of time. A training step overwrites its state only at its end, and by then the writer is
normally through: the fence then costs nothing, and the save needs no memory. Where the writer is late, the fence makes
room for itself: pieces that have not been written yet are copied to *staging*, up to a budget, and written from there.
Only beyond the budget does the owner wait for the disk.

          live memory   | 0 | 1 | 2 | 3 | 4 | 5 | 6 |          pieces of PIECE_BYTES, in the order of the file
                         SAFE SAFE  ^             ^
                         (written)  READING       before_overwrite() has come to 6: WAITING, so copied to staging

On a GPU the writer reads through a small ring of pinned buffers (`device_reader`), and a piece is safe as soon as its
copy is queued, because the compute stream is made to wait for it. Whatever happens to the writer, no fence waits for
ever: a file that fails lets all of them pass.
"""

from __future__ import annotations

import enum
import os
import threading
import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minift.checkpoint.device_reader import DeviceReader
from minift.checkpoint.manifest import StoredFile
from minift.model.weights import encode_header

PIECE_BYTES = 8 << 20  # long enough that the interpreter lock is free nearly all of the time, short enough to wait for
_FLUSH_BYTES = 32 << 20


class PieceState(enum.Enum):
    """Where the bytes of a piece are."""

    WAITING = enum.auto()
    """In live memory only, and the writer has not come to them."""
    READING = enum.auto()
    """In live memory, being written from there."""
    SAFE = enum.auto()
    """Written, or in host memory that is the writer's own (on a GPU: a copy to there is queued)."""


@dataclass(eq=False)
class Piece:
    """At most PIECE_BYTES of one tensor: 1-D uint8. `copied`: when a copy from a device has arrived in `host`."""

    live: Tensor
    state: PieceState = PieceState.WAITING
    host: Tensor | None = None
    staged: bool = False
    copied: torch.cuda.Event | None = None


class LiveFile:
    """See above.

    Args:
        path: a new file.
        groups: group name -> tensor name -> 1-D contiguous tensor; `before_overwrite` takes a group name. The file has
            them in this order, called "group/tensor"; best is the order in which they are overwritten.
        constants: tensors that nobody overwrites; written last.
        metadata: of the safetensors header.
        staging_bytes: most bytes that fences may copy at any time.
        reader: for the tensors that are on its device; the others are in host memory.
    """

    def __init__(
        self,
        path: Path,
        groups: Mapping[str, Mapping[str, Tensor]],
        constants: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        *,
        staging_bytes: int,
        reader: DeviceReader | None,
    ) -> None:
        self.path = path
        self.staged_bytes = 0
        """Bytes in staging now."""
        self._staging_bytes = staging_bytes
        self._reader = reader
        self._abandoned = False
        self._changed = threading.Condition()  # guards everything that both threads touch
        tensors = {f"{group}/{name}": t for group, named in groups.items() for name, t in named.items()}
        specs = {name: (t.dtype, tuple(t.shape)) for name, t in (tensors | dict(constants)).items()}
        self._header, _ = encode_header(specs, metadata)
        self._pieces_of = {group: [p for t in named.values() for p in _pieces(t)] for group, named in groups.items()}
        self._pieces = [piece for pieces in self._pieces_of.values() for piece in pieces]
        self._pieces += [piece for tensor in constants.values() for piece in _pieces(tensor)]

    # The writer #

    def write(self) -> StoredFile:
        """Write everything and flush it to the disk. Raises OSError, and then lets all fences pass."""
        try:
            with _Sink(self.path) as sink:
                sink.put(memoryview(self._header))
                begun: deque[Piece] = deque()
                for piece in self._pieces:
                    self._begin(piece)
                    begun.append(piece)
                    if len(begun) > (self._reader.LOOKAHEAD if self._reader else 0):
                        self._finish(begun.popleft(), sink)
                for piece in begun:
                    self._finish(piece, sink)
                return sink.stored()
        finally:
            self.abandon()  # after success there is nothing left to let go

    def abandon(self) -> None:
        """The file is not needed any more: whoever waits at a fence goes on."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def _begin(self, piece: Piece) -> None:
        with self._changed:
            if piece.state is not PieceState.WAITING:
                return
            if self._reader is not None and piece.live.device == self._reader.device:
                piece.host, piece.copied = self._reader.to_ring(piece.live)
                piece.state = PieceState.SAFE
                self._changed.notify_all()
            else:
                piece.host = piece.live
                piece.state = PieceState.READING

    def _finish(self, piece: Piece, sink: _Sink) -> None:
        assert piece.host is not None
        if piece.copied is not None:
            piece.copied.synchronize()
        sink.put(memoryview(piece.host.numpy()))
        with self._changed:
            if piece.staged:
                self.staged_bytes -= piece.live.numel()
            piece.host = None
            piece.state = PieceState.SAFE
            self._changed.notify_all()

    # The owner #

    def before_overwrite(self, group: str) -> None:
        """Return when the memory of `group` may change without changing the file. Other groups: nothing to do."""
        for piece in self._pieces_of.get(group, ()):
            if piece.state is PieceState.SAFE and piece.copied is None:
                continue  # nearly always; SAFE is for ever
            with self._changed:
                while piece.state is not PieceState.SAFE and not self._abandoned:
                    if piece.state is PieceState.WAITING and (
                        self.staged_bytes + piece.live.numel() <= self._staging_bytes
                    ):
                        self._stage(piece)
                    else:
                        self._changed.wait()
                if piece.copied is not None:
                    assert self._reader is not None
                    self._reader.hold_compute(piece.copied)

    def _stage(self, piece: Piece) -> None:
        if self._reader is not None and piece.live.device == self._reader.device:
            piece.host, piece.copied = self._reader.to_new(piece.live)
        else:
            piece.host = piece.live.clone()
        piece.staged = True
        self.staged_bytes += piece.live.numel()
        piece.state = PieceState.SAFE


class _Sink:
    """A new file that is written from its beginning to its end, and the checksum of what was written."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._crc32 = self._num_bytes = self._flushing_bytes = 0

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)

    def put(self, view: memoryview) -> None:
        self._crc32 = zlib.crc32(view, self._crc32)
        while view:
            count = os.write(self._descriptor, view)
            view = view[count:]
            self._num_bytes += count
        if self._num_bytes - self._flushing_bytes >= _FLUSH_BYTES:
            # Linux starts to write dirty pages back when it is told that they are not needed. Left alone it would wait
            # for the fsync, and the disk would stand still until then.
            length = self._num_bytes - self._flushing_bytes
            os.posix_fadvise(self._descriptor, self._flushing_bytes, length, os.POSIX_FADV_DONTNEED)
            self._flushing_bytes = self._num_bytes

    def stored(self) -> StoredFile:
        """Everything is on the disk."""
        os.fsync(self._descriptor)
        return StoredFile(self._num_bytes, self._crc32)


def _pieces(tensor: Tensor) -> list[Piece]:
    return [Piece(part) for part in tensor.detach().view(torch.uint8).split(PIECE_BYTES)] if tensor.numel() else []
