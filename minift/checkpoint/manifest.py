"""The manifest: what makes a folder a checkpoint. Where the run stood, and size and CRC-32 of every file beside it.

It is written last, so a folder without one was never finished. It carries its own SHA-256, computed with that value
blanked, so that no byte of it can change unseen either.

Why CRC-32 for the data: it finds every change within four bytes, and any other damage but for one case in 4 billion;
who would forge a checkpoint could forge its manifest too. It runs at 3.3 GB/s per core and lets go of the interpreter
lock (on a Zen 4; SHA-256 with that CPU's own instructions: 1.8; BLAKE2b: 0.9). With it a save that reads everything
back is faster than `torch.distributed.checkpoint`, which reads nothing back; with SHA-256 it would be slower.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 2
MANIFEST = "manifest.json"
_FOLDER = re.compile(r"step-(\d{8})")
_BLANK = "0" * 64
_READ_BYTES = 2 << 20


class DamagedCheckpoint(ValueError):
    """A checkpoint that was once complete and is not what was written any more."""


@dataclass(frozen=True)
class Standing:
    """Where a run stands, on every rank alike. All JSON.

    step: finished optimizer steps.
    loader: where the data continues.
    base: what identifies the base model.
    extra: whatever else must survive (the loss scaler), by name.
    """

    step: int
    loader: dict[str, Any]
    base: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredFile:
    """What a file must be."""

    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """`files`: by name, in rank order."""

    standing: Standing
    optimizer_step: int
    world_size: int
    files: dict[str, StoredFile]

    def encode(self) -> bytes:
        """The text of the file, checksum included."""
        fields = {"format": FORMAT, "sha256": _BLANK, **asdict(self)}
        blank = json.dumps(fields, indent=2) + "\n"
        return blank.replace(_BLANK, hashlib.sha256(blank.encode()).hexdigest(), 1).encode()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """DamagedCheckpoint for one that is not as it was written; ValueError for one of another version."""
        path = folder / MANIFEST
        try:
            raw = path.read_bytes()
            fields = json.loads(raw)
            digest = fields.pop("sha256", "")
            version = fields.pop("format")
        except (OSError, ValueError, AttributeError, KeyError) as error:
            raise DamagedCheckpoint(f"{path} cannot be read: {type(error).__name__}: {error}") from None
        if not digest and version != FORMAT:  # format 1 had no checksum of its own
            raise ValueError(f"{folder} has checkpoint format {version!r}; this version reads {FORMAT}")
        if hashlib.sha256(raw.replace(str(digest).encode(), _BLANK.encode(), 1)).hexdigest() != digest:
            raise DamagedCheckpoint(f"{path} is damaged: it does not have its own checksum")
        if version != FORMAT:
            raise ValueError(f"{folder} has checkpoint format {version!r}; this version reads {FORMAT}")
        files = {name: StoredFile(**stored) for name, stored in fields["files"].items()}
        return cls(Standing(**fields["standing"]), fields["optimizer_step"], fields["world_size"], files)


def list_checkpoints(parent: Path) -> list[Path]:
    """Complete checkpoints below `parent`, oldest first. Folders without a manifest were never finished."""
    if not parent.is_dir():
        return []
    return sorted(p for p in parent.iterdir() if _FOLDER.fullmatch(p.name) and (p / MANIFEST).is_file())


def checkpoint_folder(parent: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps belongs."""
    return parent / f"step-{step:08d}"


def read_back(path: Path) -> StoredFile:
    """What the file is now, from its first byte to its last."""
    crc32 = num_bytes = 0
    buffer = memoryview(bytearray(_READ_BYTES))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while count := os.readv(descriptor, [buffer]):
            crc32 = zlib.crc32(buffer[:count], crc32)
            num_bytes += count
    finally:
        os.close(descriptor)
    return StoredFile(num_bytes, crc32)


def damage(path: Path, stored: StoredFile) -> str:
    """What is wrong with the file, in a sentence; empty if it is what was written."""
    try:
        actual = read_back(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if actual.num_bytes != stored.num_bytes:
        return f"{path} is damaged: it has {actual.num_bytes} bytes, {stored.num_bytes} were written"
    if actual.crc32 != stored.crc32:
        return f"{path} is damaged: its checksum is not that of what was written"
    return ""
