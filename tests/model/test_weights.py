"""WeightReader. Oracle: the safetensors library; hostile files are made by hand."""

from __future__ import annotations

import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from minift.model.weights import WeightReader

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@given(data=st.data())
def test_names_shapes_and_any_range_equal_the_library(data):
    shapes = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6))
    tensors = {
        f"t{i}": (torch.randn(shape) * 100).to(data.draw(st.sampled_from(DTYPES))) for i, shape in enumerate(shapes)
    }
    with tempfile.TemporaryDirectory() as folder:
        if data.draw(st.booleans(), label="sharded"):
            files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
            for file in set(files.values()):
                save_file({name: tensors[name] for name in tensors if files[name] == file}, Path(folder) / file)
            (Path(folder) / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        else:
            files = dict.fromkeys(tensors, "model.safetensors")
            save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})

        reader = WeightReader(folder)
        assert sorted(reader.names()) == sorted(tensors)
        for name in tensors:
            with safe_open(Path(folder) / files[name], "pt") as library:
                expected = library.get_tensor(name)
            assert reader.shape(name) == tuple(expected.shape) and reader.dtype(name) == expected.dtype
            assert torch.equal(reader.read(name), expected)
            start = data.draw(st.integers(0, expected.numel()))
            stop = data.draw(st.integers(start, expected.numel()))
            part = reader.read_range(name, start, stop)
            assert part.dtype == expected.dtype and torch.equal(part, expected.reshape(-1)[start:stop])
            part.zero_()  # own, writable memory
            assert torch.equal(reader.read(name), expected)


def test_only_the_asked_bytes_are_read(tmp_path):
    """The tensor is 4 GB of a sparse file; reading it whole would not fit in the time and memory of a test."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * 10**9)
    assert torch.equal(WeightReader(tmp_path).read_range("w", 10**9 - 3, 10**9), torch.zeros(3))


@pytest.mark.parametrize("span", [(-1, 2), (2, 1), (0, 7)])
def test_ranges_outside_the_tensor_are_refused(tmp_path, span):
    save_file({"w": torch.zeros(6)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="which has 6"):
        WeightReader(tmp_path).read_range("w", *span)
    with pytest.raises(ValueError, match="has no tensor v"):
        WeightReader(tmp_path).read("v")


def test_a_file_cut_short_after_opening_is_an_error(tmp_path):
    save_file({"w": torch.zeros(600)}, tmp_path / "model.safetensors")
    reader = WeightReader(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="ends at byte 1000"):
        reader.read("w")


def safetensors_bytes(header: Any, num_data_bytes: int) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(num_data_bytes)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


TWICE = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes and claims a header of 0"),
        (b"\x08\x00", "2 bytes and claims"),
        ((10**18).to_bytes(8, "little") + b"{}", "claims a header of 10{18}"),
        (pickle.dumps({"w": 1}), "claims a header"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (safetensors_bytes(b"{", 0), "not valid JSON"),
        (safetensors_bytes(b"\xff\xfe", 0), "not valid JSON"),
        (safetensors_bytes(b"[" * 100_000, 0), "not valid JSON"),
        (safetensors_bytes([], 0), "not a JSON object"),
        (safetensors_bytes(TWICE, 1), "'w' occurs twice"),
        (safetensors_bytes({"w": 3}, 0), "w lacks dtype"),
        (safetensors_bytes({"w": {"dtype": "F32", "shape": [2]}}, 8), "lacks dtype, shape or data_offsets"),
        (safetensors_bytes({"w": entry("F33")}, 8), "dtype 'F33'; known: F64"),
        (safetensors_bytes({"w": entry(["F32"])}, 8), "dtype"),
        (safetensors_bytes({"w": entry(shape=[-2])}, 8), r"shape \[-2\]"),
        (safetensors_bytes({"w": entry(shape=[2.0])}, 8), r"shape \[2.0\]"),
        (safetensors_bytes({"w": entry(shape=[True])}, 8), r"shape \[True\]"),
        (safetensors_bytes({"w": entry(offsets=[8, 0])}, 8), "data_offsets"),
        (safetensors_bytes({"w": entry(offsets=[0, 8, 9])}, 8), "data_offsets"),
        (safetensors_bytes({"w": entry(offsets=[-8, 0])}, 8), "data_offsets"),
        (safetensors_bytes({"w": entry(shape=[3])}, 8), r"\[3\] and type F32 cannot fill 8"),
        (safetensors_bytes({"w": entry()}, 7), "take 8 bytes and 7 are there"),
        (safetensors_bytes({"w": entry()}, 9), "take 8 bytes and 9 are there"),
        (safetensors_bytes({"w": entry(), "v": entry(offsets=[4, 12])}, 12), "starts at byte 4 .* 8 is expected"),
        (safetensors_bytes({"w": entry(), "v": entry(offsets=[12, 20])}, 20), "starts at byte 12 .* 8 is expected"),
        (safetensors_bytes({"w": entry(shape=[2**62], offsets=[0, 2**64])}, 8), "take 18446744073709551616 bytes"),
    ],
)
def test_hostile_files_are_refused_with_their_name(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"model.safetensors is not a valid safetensors file: .*{message}"):
        WeightReader(tmp_path)


@given(content=st.binary(max_size=200))
def test_random_bytes_never_do_worse_than_a_ValueError(content):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(content)
        try:
            WeightReader(folder)
        except ValueError:
            pass


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../secret.safetensors", "not the name of a file in this folder"),
        ("/etc/secret.safetensors", "not the name of a file in this folder"),
        ("sub/part.safetensors", "not the name of a file in this folder"),
        ("..\\secret.safetensors", "not the name of a file in this folder"),
        ("C:secret.safetensors", "not the name of a file in this folder"),
        ("", "not the name of a file|only .safetensors"),
        ("..", "not the name of a file|only .safetensors"),
        (7, "not the name of a file in this folder"),
        ("pytorch_model.bin", "only .safetensors"),
        ("absent.safetensors", "absent.safetensors does not exist"),
        ("there.safetensors", "says that w is in there.safetensors, but it is not"),
    ],
)
def test_an_index_cannot_point_elsewhere(tmp_path, file, message):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "secret.safetensors")
    save_file({"v": torch.zeros(1)}, folder / "there.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(ValueError, match=message):
        WeightReader(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "x", "a": "y"}}'])
def test_broken_indices(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="index.json is not a valid index"):
        WeightReader(tmp_path)


def test_one_name_in_two_shards(tmp_path):
    for file in ("a.safetensors", "b.safetensors"):
        save_file({"w": torch.zeros(1), file: torch.zeros(1)}, tmp_path / file)
    weight_map = {"w": "a.safetensors", "b.safetensors": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="w is in both a.safetensors and b.safetensors"):
        WeightReader(tmp_path)


def test_pickles_are_never_opened(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only pickled weights .pytorch_model.bin."):
        WeightReader(tmp_path)


def test_folders_without_weights(tmp_path):
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        WeightReader(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        WeightReader(tmp_path / "absent")
