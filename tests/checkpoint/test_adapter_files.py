"""Tensors of an adapter in one file or several, in three formats. Oracle: the safetensors library; bytes on disk."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minift.checkpoint.adapter_files import INDEX_FILE, STORAGE_DTYPES, TENSOR_FILE, read_stored, write_tensors


def tensors_of(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"t{number}": torch.randn(shape, generator=generator) for number, shape in enumerate(shapes)}


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
    dtype=st.sampled_from(STORAGE_DTYPES),
    max_shard_bytes=st.one_of(st.none(), st.integers(1, 400)),
)
def test_round_trip_in_bounded_files(tmp_path_factory, shapes, dtype, max_shard_bytes):
    folder, tensors = tmp_path_factory.mktemp("files"), tensors_of(shapes)
    write_tensors(folder, tensors, dtype, max_shard_bytes)
    read = read_stored(folder)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensor.to(dtype)) for key, tensor in tensors.items())
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    for held in files.values():
        held_bytes = sum(tensor.numel() * tensor.itemsize for tensor in held.values())
        assert max_shard_bytes is None or held_bytes <= max_shard_bytes or len(held) == 1
    if len(files) == 1:
        assert list(files) == [TENSOR_FILE] and not (folder / INDEX_FILE).exists()
    else:
        index = json.loads((folder / INDEX_FILE).read_text())
        assert index["weight_map"] == {key: file for file, held in files.items() for key in held}
        assert index["metadata"]["total_size"] == sum(math.prod(shape) for shape in shapes) * dtype.itemsize


def test_what_cannot_be_written_is_refused_by_name(tmp_path):
    for tensors, options, sentence in [
        ({"x": torch.ones(2) * 1e5}, {"dtype": torch.float16}, "x has a value that is infinite"),
        ({"x": torch.ones(0, 4)}, {}, r"x is empty, \(0, 4\): was it gathered"),
        ({"x": torch.ones(2)}, {"dtype": torch.int8}, "cannot be stored as int8; valid: float32, bfloat16, float16"),
        ({"x": torch.ones(2)}, {"max_shard_bytes": 0}, "a shard of 0 bytes holds nothing"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            write_tensors(tmp_path, tensors, **options)


@pytest.fixture
def sharded(tmp_path):
    write_tensors(tmp_path, tensors_of([(4, 4)] * 5), torch.bfloat16, 70)
    return tmp_path, sorted(path.name for path in tmp_path.glob("*.safetensors"))


def test_damaged_shards_are_told_by_name(sharded):
    folder, files = sharded
    assert files == [f"adapter_model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    whole, last = load_file(folder / files[0]), (folder / files[2]).read_bytes()
    for change, sentence in [
        ({"t0": whole["t0"]}, f"{files[0]} lacks t1, going by {INDEX_FILE}"),
        (whole | {"t7": torch.ones(2)}, f"{files[0]} has unexpected t7"),
        (whole | {"t1": torch.full((4, 4), float("nan"))}, "t1 has a value that is infinite or not a number"),
        (whole | {"t1": torch.ones(0)}, "t1 is empty"),
    ]:
        save_file(change, folder / files[0])
        with pytest.raises(ValueError, match=sentence):
            read_stored(folder)
    save_file(whole, folder / files[0])
    (folder / files[2]).write_bytes(last[:-1])
    with pytest.raises(ValueError, match=f"{files[2]} is not a whole safetensors file"):
        read_stored(folder)
    (folder / files[2]).unlink()
    with pytest.raises(ValueError, match=f"names {files[2]}, which is not there"):
        read_stored(folder)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"t0": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="not the name of a file in this folder"):
        read_stored(folder)
    (folder / INDEX_FILE).unlink()
    with pytest.raises(ValueError, match=f"has no {TENSOR_FILE}"):
        read_stored(folder)
