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
from minift.ops.halves import read_weights
from minift.optim.moments import Place
from minift.optim.shard import ParamRange

RNG_PREFIX = "rng/"
_READ_ELEMENTS = 4 << 20  # at a time, on the way to a device


@dataclass(frozen=True)
class _StoredRange:
    """A range of a parameter in one shard in one file.

    tensors: "master", "lower", "exp_avg", … -> where the entries of the shard are.
    places: where among them those of the range are; it need not have any in each tensor.
    """

    range: ParamRange
    tensors: dict[str, StoredTensor]
    places: dict[str, Place]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {what: self.tensors[what].dtype for what in self.places}

    def read(self, what: str, first: int, out: Tensor) -> None:
        """Fill `out`, 1-D, with entries of `what` from that of element `first` of the parameter on."""
        source, place = self.tensors[what], self.places[what]
        entry, rest = divmod(first - self.range.param_start, place.elements)
        assert rest == 0, f"{self.range} is not cut as {what} is"
        _read(source.file, source.offset + (place.start + entry) * source.dtype.itemsize, out)


@dataclass(frozen=True)
class _Overlap:
    """Elements [first, last) of a parameter are in `stored`."""

    stored: _StoredRange
    first: int
    last: int


class StoredRanges:
    """`paths`: the files in rank order, which were found to be whole."""

    def __init__(self, paths: list[Path]) -> None:
        self._headers = [read_header(path) for path in paths]
        self._ranges: dict[str, list[_StoredRange]] = {}  # by parameter
        for path, header in zip(paths, self._headers, strict=True):
            shards: dict[str, dict[str, StoredTensor]] = {}
            for name, tensor in header.items():
                shard_name, _, what = name.rpartition("/")
                shards.setdefault(shard_name, {})[what] = tensor
            with safe_open(path, framework="pt") as file:
                ranges: dict[str, list[dict[str, Any]]] = json.loads(file.metadata()["ranges"])
            for shard_name, entries in ranges.items():
                for fields in entries:
                    places = {what: Place(**place) for what, place in fields.pop("places").items()}
                    stored = ParamRange(**fields | {"full_shape": tuple(fields["full_shape"])})
                    self._ranges.setdefault(stored.name, []).append(_StoredRange(stored, shards[shard_name], places))

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter."""
        return {name: entries[0].range.full_shape for name, entries in self._ranges.items()}

    def problem(self, wanted: ParamRange, dtypes: dict[str, torch.dtype]) -> str:
        """Why `weights` and `copy` could not give all of `wanted`, a range of a known parameter, in exactly `dtypes`
        (fp32 weights may be in halves on one side only); or empty."""
        num_stored = 0
        for overlap in self._overlaps(wanted):
            stored = overlap.stored.dtypes
            if _joined(stored) != _joined(dtypes):
                return f"of {wanted.name} there is {_show(stored)}, and here {_show(dtypes)}"
            num_stored += overlap.last - overlap.first
        num_wanted = wanted.stop - wanted.start
        if num_stored != num_wanted:
            return f"it has {num_stored} of {num_wanted} elements of {wanted.name}"
        return ""

    def copy(self, wanted: ParamRange, what: str, elements: int, destination: Tensor) -> None:
        """Fill `destination` (1-D, an entry for every `elements` elements) with `what` ("exp_avg", …) of the elements
        that `wanted` names."""
        for overlap in self._overlaps(wanted):
            # Shards are cut where blocks end, so an overlap begins with an entry on both sides.
            here, rest = divmod(overlap.first - wanted.param_start, elements)
            assert rest == 0 and overlap.stored.places[what].elements == elements, f"{wanted} is not cut as {what} is"
            count = -(-(overlap.last - overlap.first) // elements)
            overlap.stored.read(what, overlap.first, destination[here : here + count])

    def weights(self, wanted: ParamRange) -> Iterator[tuple[int, Tensor]]:
        """All weights of `wanted`: (where in it they begin, 1-D fp32 or bf16 in host memory), a piece at a time."""
        for overlap in self._overlaps(wanted):
            for first in range(overlap.first, overlap.last, _READ_ELEMENTS):
                count = min(_READ_ELEMENTS, overlap.last - first)
                halves = {}
                for what in overlap.stored.places.keys() & {"master", "lower"}:
                    halves[what] = torch.empty(count, dtype=overlap.stored.tensors[what].dtype)
                    overlap.stored.read(what, first, halves[what])
                yield first - wanted.param_start, read_weights(halves["master"], halves.get("lower"))

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
        for stored in self._ranges[wanted.name]:
            there = stored.range
            first, last = max(begin, there.param_start), min(end, there.param_start + there.stop - there.start)
            if first < last:
                yield _Overlap(stored, first, last)


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


def _joined(dtypes: dict[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Of weights in halves: as if they were fp32 in one piece."""
    if "lower" not in dtypes:
        return dtypes
    return {what: dtype for what, dtype in dtypes.items() if what != "lower"} | {"master": torch.float32}


def _show(dtypes: dict[str, torch.dtype]) -> str:
    return ", ".join(f"{what} {str(dtype).removeprefix('torch.')}" for what, dtype in dtypes.items()) or "nothing"
