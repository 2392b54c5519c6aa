"""Weights in a Hugging Face folder: names, shapes, and any range of elements without reading the rest.

    reader = WeightReader("model/")
    reader.read_range("model.norm.weight", 0, 100)          # 100 elements: 200 bytes of bf16 leave the disk

A safetensors file is 8 bytes (the header's length, little endian), a JSON header {name: {dtype, shape, data_offsets}},
and the bytes. We parse the header ourselves because a rank of a sharded model wants elements, not tensors, and because
files come from strangers: every offset is checked against the file before anything is read, an index cannot point
outside its folder, and pickled weights (.bin, .pt) are never opened, since unpickling runs what it finds.

Bytes are read with `pread` straight into the result. Mapping the file would count its pages as our memory and turn a
file that is cut short while we read into a SIGBUS instead of an error.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

TensorSpec = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: elements of `dtype`, row-major, from byte `offset` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class WeightReader:
    """The tensors of a folder with `model.safetensors`, or with an index and its shards.

    Headers are read and checked at construction: ValueError names the file and what is wrong with it. Tensors come in
    the dtype they are stored in. Files stay closed between reads: a reader may be kept, and sent to other processes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a folder.")
        files, mapped = self._files()
        self._tensors: dict[str, StoredTensor] = {}
        for file in files:
            for name, tensor in read_header(self.folder / file).items():
                if name in self._tensors:
                    raise ValueError(f"{self.folder}: {name} is in both {self._tensors[name].file.name} and {file}.")
                self._tensors[name] = tensor
        for name, file in mapped.items():
            if name not in self._tensors or self._tensors[name].file.name != file:
                raise ValueError(f"{self.folder / INDEX_FILE} says that {name} is in {file}, but it is not.")

    def names(self) -> list[str]:
        """All tensors, in the order of the files."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._find(name).dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor, in its own memory."""
        shape = self.shape(name)
        return self.read_range(name, 0, math.prod(shape)).view(shape)

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D, in their own memory; reads only their bytes."""
        stored = self._find(name)
        size = math.prod(stored.shape)
        if not 0 <= start <= stop <= size:
            raise ValueError(f"Elements [{start}, {stop}) of {name}, which has {size}.")
        out = torch.empty(stop - start, dtype=stored.dtype)
        read_into(stored.file, stored.offset + start * stored.dtype.itemsize, out)
        return out

    def _find(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise ValueError(f"{self.folder} has no tensor {name}.")
        return self._tensors[name]

    def _files(self) -> tuple[list[str], dict[str, str]]:
        """Weight files by name, and what the index says is in which."""
        if (self.folder / SINGLE_FILE).is_file():
            return [SINGLE_FILE], {}
        index_path = self.folder / INDEX_FILE
        if index_path.is_file():
            mapped = parse_index(index_path)
            return sorted(set(mapped.values())), mapped
        pickled = sorted(path.name for path in self.folder.iterdir() if path.suffix in PICKLED_SUFFIXES)
        if pickled:
            raise ValueError(
                f"{self.folder} has only pickled weights ({pickled[0]}), and unpickling can run any code. Convert them "
                "to safetensors, or download the safetensors files of the model."
            )
        raise ValueError(f"{self.folder} has neither {SINGLE_FILE} nor {INDEX_FILE}.")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, checked: types, sizes, and that they fill the file without overlap."""

    def bad(reason: str) -> ValueError:
        return ValueError(f"{path} is not a valid safetensors file: {reason}.")

    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    with open(path, "rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise bad("it is a Git LFS pointer, not the file itself; run `git lfs pull`")
        if len(prefix) < 8 or header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
            raise bad(f"it has {file_bytes} bytes and claims a header of {header_bytes}")
        raw = file.read(header_bytes)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise bad(f"its header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    header.pop("__metadata__", None)

    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, (begin, end) = _check_entry(name, entry, bad)
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise bad(f"{name} of shape {list(shape)} and type {entry['dtype']} cannot fill {end - begin} bytes")
        spans.append((begin, end, name))
        tensors[name] = StoredTensor(path, dtype, shape, 8 + header_bytes + begin)
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise bad(f"{name} starts at byte {begin} of the data where {position} is expected")
        position = end
    if position != file_bytes - 8 - header_bytes:
        raise bad(f"its tensors take {position} bytes and {file_bytes - 8 - header_bytes} are there")
    return tensors


def encode_header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file with tensors of `specs`, (dtype, shape), one after the other in this order, and where
    in the file each begins. The data begin at a multiple of 8."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begins, position = {}, 0
    for name, (dtype, shape) in specs.items():
        begins[name] = position
        position += math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begins[name], position],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, {name: 8 + len(raw) + begin for name, begin in begins.items()}


def read_into(path: Path, offset: int, out: Tensor) -> None:
    """Fill the contiguous CPU tensor `out` with the file's bytes from `offset` on."""
    view = memoryview(out.view(torch.uint8).numpy())
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while len(view):
            count = os.preadv(descriptor, [view], offset)  # at most 2 GiB at a time
            if count == 0:
                raise ValueError(f"{path} ends at byte {offset}, {len(view)} bytes early.")
            view, offset = view[count:], offset + count
    finally:
        os.close(descriptor)


def _check_entry(
    name: str, entry: Any, bad: Callable[[str], ValueError]
) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise bad(f"{name} lacks dtype, shape or data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise bad(f"{name} has dtype {entry['dtype']!r}; known: {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"{name} has shape {shape!r} and data_offsets {offsets!r}")
    return DTYPES[entry["dtype"]], tuple(shape), (offsets[0], offsets[1])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """JSON allows a key twice and Python keeps the last; which bytes are meant would be anyone's guess."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} occurs twice")
        result[key] = value
    return result


def parse_index(path: Path) -> dict[str, str]:
    """Tensor -> file, of a `*.safetensors.index.json`. ValueError unless every file is one of the same folder."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)["weight_map"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a valid index: {error!r}.") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} is not a valid index: its weight_map is not an object with entries.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != PurePosixPath(file).name or file != PureWindowsPath(file).name:
            raise ValueError(f"{path}: {name} is in {file!r}, which is not the name of a file in this folder.")
        if not file.endswith(".safetensors"):
            raise ValueError(f"{path}: {name} is in {file!r}; only .safetensors files are read.")
    return weight_map
