"""The files of a checkpoint as one map from (parameter, element) to bytes, whoever cut them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from minift.model.weights import StoredTensor, read_header, read_into
from minift.optim.shard import ParamRange

RNG_PREFIX = "rng/"
_READ_ELEMENTS = 4 << 20  # at a time, on the way to a device


@dataclass(frozen=True)
class _StoredShard:
    """One shard in one file: "master", "exp_avg", … -> where its elements are."""

    tensors: dict[str, StoredTensor]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {what: tensor.dtype for what, tensor in self.tensors.items()}


@dataclass(frozen=True)
class _Overlap:
    """Elements [first, last) of a parameter are elements from `shard_start` on of `shard`."""

    shard: _StoredShard
    shard_start: int
    first: int
    last: int


class StoredRanges:
    """`paths`: the files in rank order, which were found to be whole."""

    def __init__(self, paths: list[Path]) -> None:
        self._headers = [read_header(path) for path in paths]
        self._ranges: dict[str, list[tuple[_StoredShard, ParamRange]]] = {}  # by parameter
        for path, header in zip(paths, self._headers, strict=True):
            shards: dict[str, _StoredShard] = {}
            for name, tensor in header.items():
                shard_name, _, what = name.rpartition("/")
                shards.setdefault(shard_name, _StoredShard({})).tensors[what] = tensor
            with safe_open(path, framework="pt") as file:
                ranges: dict[str, list[dict[str, Any]]] = json.loads(file.metadata()["ranges"])
            for shard_name, entries in ranges.items():
                for fields in entries:
                    stored = ParamRange(**{**fields, "full_shape": tuple(fields["full_shape"])})
                    self._ranges.setdefault(stored.name, []).append((shards[shard_name], stored))

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter."""
        return {name: entries[0][1].full_shape for name, entries in self._ranges.items()}

    def problem(self, wanted: ParamRange, dtypes: dict[str, torch.dtype]) -> str:
        """Why `copy` could not fill all of `wanted`, a range of a known parameter, with exactly `dtypes`; or empty."""
        num_stored = 0
        for overlap in self._overlaps(wanted):
            stored = overlap.shard.dtypes
            if stored != dtypes:
                return f"of {wanted.name} there is {_show(stored)}, and here {_show(dtypes)}"
            num_stored += overlap.last - overlap.first
        num_wanted = wanted.stop - wanted.start
        if num_stored != num_wanted:
            return f"it has {num_stored} of {num_wanted} elements of {wanted.name}"
        return ""

    def copy(self, wanted: ParamRange, what: str, destination: Tensor) -> None:
        """Fill `destination` (1-D) with `what` ("master", "exp_avg", …) of the elements that `wanted` names."""
        for overlap in self._overlaps(wanted):
            source = overlap.shard.tensors[what]
            offset = source.offset + overlap.shard_start * source.dtype.itemsize
            out = destination[overlap.first - wanted.param_start : overlap.last - wanted.param_start]
            _read(source.file, offset, out)

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Generator states that `rank` saved."""
        states = {}
        for name, stored in self._headers[rank].items():
            if name.startswith(RNG_PREFIX):
                states[name.removeprefix(RNG_PREFIX)] = state = torch.empty(stored.shape, dtype=stored.dtype)
                read_into(stored.file, stored.offset, state)
        return states

    def _overlaps(self, wanted: ParamRange) -> Iterator[_Overlap]:
        begin, end = wanted.param_start, wanted.param_start + wanted.stop - wanted.start
        for shard, stored in self._ranges[wanted.name]:
            first, last = max(begin, stored.param_start), min(end, stored.param_start + stored.stop - stored.start)
            if first < last:
                yield _Overlap(shard, stored.start + first - stored.param_start, first, last)


def _read(path: Path, offset: int, out: Tensor) -> None:
    """Straight into host memory; to a device in pieces."""
    if out.device.type == "cpu":
        read_into(path, offset, out)
        return
    for piece in out.split(_READ_ELEMENTS):
        host = torch.empty(piece.numel(), dtype=out.dtype)
        read_into(path, offset, host)
        piece.copy_(host)
        offset += host.nbytes


def _show(dtypes: dict[str, torch.dtype]) -> str:
    return ", ".join(f"{what} {str(dtype).removeprefix('torch.')}" for what, dtype in dtypes.items()) or "nothing"
