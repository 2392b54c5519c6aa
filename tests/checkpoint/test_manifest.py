"""The manifest round-trips, and no byte of it can change unseen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minift.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpoint,
    Manifest,
    Standing,
    StoredFile,
    damage,
    list_checkpoints,
    read_back,
)

WHOLE = Manifest(
    Standing(7, {"epoch": 1, "seed": 0}, {"config.json": "0" * 64}, {"loss_scaler": {"scale": 65536.0}}),
    optimizer_step=6,
    world_size=2,
    files={"rank-00000-of-00002.safetensors": StoredFile(10, 1), "rank-00001-of-00002.safetensors": StoredFile(0, 0)},
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(extra=st.dictionaries(st.text(), json_values, max_size=3), step=st.integers(0, 10**8 - 1))
def test_round_trip(tmp_path_factory, extra, step):
    folder = tmp_path_factory.mktemp("checkpoint")
    manifest = Manifest(Standing(step, {"a": [1]}, {}, extra), step, 3, WHOLE.files)
    (folder / MANIFEST).write_bytes(manifest.encode())
    assert Manifest.read(folder) == manifest


def test_every_changed_byte_is_seen(tmp_path):
    raw = WHOLE.encode()
    json.loads(raw)
    for position in range(len(raw)):
        for bit in range(8):
            flipped = bytearray(raw)
            flipped[position] ^= 1 << bit
            (tmp_path / MANIFEST).write_bytes(flipped)
            with pytest.raises(DamagedCheckpoint, match="manifest"):
                Manifest.read(tmp_path)
    for cut in range(len(raw)):
        (tmp_path / MANIFEST).write_bytes(raw[:cut])
        with pytest.raises(DamagedCheckpoint, match="manifest"):
            Manifest.read(tmp_path)


def test_other_formats_are_refused_as_such(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 1, "step": 3, "files": {}}))
    with pytest.raises(ValueError, match="has checkpoint format 1; this version reads 2") as caught:
        Manifest.read(tmp_path)
    assert not isinstance(caught.value, DamagedCheckpoint)  # nobody should fall back to an even older one


def test_files_are_compared_with_what_was_written(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 20_000)  # longer than what is read at a time
    stored = read_back(path)
    assert stored.num_bytes == 5_120_000 and damage(path, stored) == ""
    raw = path.read_bytes()
    path.write_bytes(raw[:3_000_000] + bytes([raw[3_000_000] ^ 1]) + raw[3_000_001:])
    assert "checksum" in damage(path, stored)
    path.write_bytes(raw[:-1])
    assert "5119999 bytes, 5120000 were written" in damage(path, stored)
    path.unlink()
    assert "No such file" in damage(path, stored)


def test_only_folders_with_a_manifest_are_checkpoints(tmp_path):
    assert list_checkpoints(tmp_path / "nowhere") == []
    for name in ("step-00000010", "step-00000009", "step-00000011", ".step-00000012.tmp", "step-13", "other"):
        (tmp_path / name).mkdir()
        if name != "step-00000011":
            (tmp_path / name / MANIFEST).write_bytes(WHOLE.encode())
    assert [Path(p).name for p in list_checkpoints(tmp_path)] == ["step-00000009", "step-00000010"]
