"""The tensors of an adapter on disk: one safetensors file, or several of bounded size with an index.

    adapter_model.safetensors                        as PEFT reads and writes it
    adapter_model-00001-of-00003.safetensors, ...    if a bound is given: writing needs no more memory than one of them
    adapter_model.safetensors.index.json             which tensor is where, as for models; PEFT reads no such folder

Values are in fp32, which is what is trained, or rounded once to bf16 or fp16, half the bytes. What is written is read
back and compared; what is read must be whole: names and files as the index says, no tensor empty, no value infinite or
not a number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minift.model.weights import parse_index

TENSOR_FILE = "adapter_model.safetensors"
INDEX_FILE = f"{TENSOR_FILE}.index.json"
STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, max_shard_bytes: int | None = None
) -> None:
    """Write `tensors` (fp32, on the CPU, by key) as `dtype` into files of at most `max_shard_bytes` of data, or of one
    tensor if that is larger. ValueError for a value that is not finite in `dtype`; OSError if something else than what
    was written is read back."""
    if dtype not in STORAGE_DTYPES:
        valid = ", ".join(str(valid).removeprefix("torch.") for valid in STORAGE_DTYPES)
        raise ValueError(f"an adapter cannot be stored as {str(dtype).removeprefix('torch.')}; valid: {valid}")
    shards = _plan(tensors, dtype, max_shard_bytes)
    for file, keys in shards.items():
        stored = {key: tensors[key].to(dtype).contiguous() for key in keys}
        for key, tensor in stored.items():
            check_values(key, tensor)
        save_file(stored, folder / file, metadata={"format": "pt"})
        written = load_file(folder / file)
        if written.keys() != stored.keys() or not all(torch.equal(written[key], stored[key]) for key in stored):
            raise OSError(f"{file} reads back differently from what was written; is the disk full or failing?")
    if len(shards) > 1:
        total_bytes = dtype.itemsize * sum(tensor.numel() for tensor in tensors.values())
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": {key: file for file, keys in shards.items() for key in keys},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _plan(tensors: Mapping[str, Tensor], dtype: torch.dtype, max_shard_bytes: int | None) -> dict[str, list[str]]:
    """File -> keys, in order."""
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"a shard of {max_shard_bytes} bytes holds nothing; valid: 1 byte or more, or no bound")
    shards: list[list[str]] = [[]]
    filled_bytes = 0
    for key, tensor in tensors.items():
        tensor_bytes = dtype.itemsize * tensor.numel()
        if shards[-1] and max_shard_bytes is not None and filled_bytes + tensor_bytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(key)
        filled_bytes += tensor_bytes
    if len(shards) == 1:
        return {TENSOR_FILE: shards[0]}
    stem = TENSOR_FILE.removesuffix(".safetensors")
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": keys for i, keys in enumerate(shards, start=1)}


def read_stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor by key, in the dtype of the file. ValueError names what is missing, unexpected or damaged."""
    if (folder / TENSOR_FILE).is_file():
        tensors = _load(folder / TENSOR_FILE)
    elif (folder / INDEX_FILE).is_file():
        tensors = _read_shards(folder)
    else:
        raise ValueError(f"{folder} has no {TENSOR_FILE} (adapter_model.bin is a pickle, which can run code: not read)")
    if not tensors:
        raise ValueError(f"{folder / TENSOR_FILE} is empty")
    for key, tensor in tensors.items():
        check_values(key, tensor)
    return tensors


def _read_shards(folder: Path) -> dict[str, Tensor]:
    file_of = parse_index(folder / INDEX_FILE)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(file_of.values())):
        if not (folder / file).is_file():
            raise ValueError(f"{folder / INDEX_FILE} names {file}, which is not there")
        shard = _load(folder / file)
        announced = {key for key, place in file_of.items() if place == file}
        for problem, keys in (("lacks", announced - shard.keys()), ("has unexpected", shard.keys() - announced)):
            if keys:
                raise ValueError(f"{folder / file} {problem} {', '.join(sorted(keys)[:4])}, going by {INDEX_FILE}")
        tensors |= shard
    return tensors


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def check_values(name: str, tensor: Tensor) -> None:
    """ValueError for a tensor that is empty, as one of a sharded model that was never gathered is, or not finite."""
    if tensor.numel() == 0:
        raise ValueError(f"{name} is empty, {tuple(tensor.shape)}: was it gathered before it was saved?")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} has a value that is infinite or not a number; the adapter is not usable")
