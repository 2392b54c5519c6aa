"""Folders that transformers + bitsandbytes wrote in NF4, and writing such folders.

Beside the dense tensors a folder has, for every quantised projection P (facts checked against the packages by
tests/quant/test_bitsandbytes.py):

    P.weight                                  codes (ceil(n / 2), 1) uint8, or the same bytes seen as another dtype
    P.weight.absmax                           scales: fp32; with double quantisation uint8
    P.weight.nested_absmax                    with double quantisation only: scales of the scales, fp32
    P.weight.quant_map, .nested_quant_map     the codebooks, fp32: constants
    P.weight.quant_state.bitsandbytes__nf4    JSON as uint8: shape, dtype before, block sizes, mean of the scales

config.json has `quantization_config`. Codes and scales are what `NF4Linear` holds, so nothing is computed either way.
Not here: FP4 and LLM.int8(), which are other formats and are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minift.model.weights import TensorSpec, WeightReader
from minift.ops.nf4_tables import BLOCK_SIZES, CODEBOOK, DYNAMIC_MAP, NESTED_BLOCK_SIZE
from minift.quant.icq import IcqLinear
from minift.quant.linear import NF4Linear, QuantConfig

STATE = "quant_state.bitsandbytes__nf4"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_VALID = {
    "quant_type": ("nf4",),
    "dtype": tuple(_DTYPES),
    "blocksize": BLOCK_SIZES,
    "nested_blocksize": (NESTED_BLOCK_SIZE,),
}


class StoredNF4:
    """The quantised projections of a folder; none if it is a dense one.

    ValueError, naming the tensor, for one that an `NF4Linear` cannot hold.
    """

    def __init__(self, reader: WeightReader) -> None:
        self._reader = reader
        self._states = {
            name.removesuffix(f".weight.{STATE}"): _read_state(reader, name)
            for name in reader.names()
            if name.endswith(f".weight.{STATE}")
        }
        for projection, state in self._states.items():
            _check(reader, projection, state)

    @property
    def projections(self) -> list[str]:
        return list(self._states)

    def own_names(self) -> set[str]:
        """All tensors of the folder that belong to quantised projections."""
        prefixes = tuple(f"{projection}.weight" for projection in self._states)
        return {name for name in self._reader.names() if any(name == p or name.startswith(f"{p}.") for p in prefixes)}

    def shape(self, projection: str) -> tuple[int, ...]:
        """Of the weight before it was quantised."""
        return tuple(self._states[projection]["shape"])

    def dtype(self, projection: str) -> torch.dtype:
        """Of the weight before it was quantised."""
        return _DTYPES[self._states[projection]["dtype"]]

    def config(self) -> QuantConfig:
        """How all of them are stored. ValueError if they differ."""
        kinds = {(state["blocksize"], "nested_offset" in state) for state in self._states.values()}
        if len(kinds) != 1:
            raise ValueError(f"{self._reader.folder}: projections differ in (block size, double quantisation): {kinds}")
        ((block_size, double_quant),) = kinds
        return QuantConfig(block_size=block_size, double_quant=double_quant)

    def read(self, projection: str, part: str, start: int, stop: int) -> Tensor:
        """Bytes [start, stop) of a parameter of an `NF4Linear`: codes, scales or nested. uint8, 1-D."""
        weight = f"{projection}.weight"
        if part == "nested":
            offset = torch.tensor([self._states[projection]["nested_offset"]], dtype=torch.float32)
            return torch.cat([offset, self._reader.read(f"{weight}.nested_absmax")]).view(torch.uint8)[start:stop]
        stored = weight if part == "codes" else f"{weight}.absmax"
        size = self._reader.dtype(stored).itemsize
        whole = self._reader.read_range(stored, start // size, -(-stop // size)).view(torch.uint8)
        return whole[start - start // size * size :][: stop - start]


def _read_state(reader: WeightReader, name: str) -> dict[str, Any]:
    try:
        state = json.loads(bytes(reader.read(name).tolist()).decode())
    except ValueError as error:
        raise ValueError(f"{reader.folder}: {name} is not JSON: {error}") from None
    needed = {"quant_type", "blocksize", "dtype", "shape"}
    if not isinstance(state, dict) or not needed <= state.keys():
        raise ValueError(f"{reader.folder}: {name} lacks {sorted(needed - set(state))}")
    for key, valid in _VALID.items():
        if key in state and state[key] not in valid:
            raise ValueError(f"{reader.folder}: {name} has {key} {state[key]!r}; valid: {', '.join(map(str, valid))}")
    shape = state["shape"]
    if not isinstance(shape, list) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"{reader.folder}: {name} has shape {shape!r}; valid: positive integers")
    if not isinstance(state.get("nested_offset", 0.0), (int, float)):
        raise ValueError(f"{reader.folder}: {name} has nested_offset {state['nested_offset']!r}; valid: a number")
    return state


def _check(reader: WeightReader, projection: str, state: Mapping[str, Any]) -> None:
    """Sizes, dtypes and codebooks are those that the state implies; codes may be bytes of any dtype."""
    weight = f"{projection}.weight"
    numel = math.prod(state["shape"])
    blocks = math.ceil(numel / state["blocksize"])
    nested = "nested_offset" in state
    expected = {
        weight: (reader.dtype(weight), math.ceil(numel / 2)),
        f"{weight}.absmax": (torch.uint8, blocks) if nested else (torch.float32, 4 * blocks),
    }
    if nested:
        expected[f"{weight}.nested_absmax"] = (torch.float32, 4 * math.ceil(blocks / NESTED_BLOCK_SIZE))
    for name, (dtype, num_bytes) in expected.items():
        found = math.prod(reader.shape(name)) * reader.dtype(name).itemsize
        if found != num_bytes or reader.dtype(name) != dtype:
            raise ValueError(
                f"{reader.folder}: {name} has {found} bytes of {reader.dtype(name)} where {num_bytes} of {dtype} are "
                "expected"
            )
    maps = [("quant_map", CODEBOOK)] + ([("nested_quant_map", DYNAMIC_MAP)] if nested else [])
    for suffix, ours in maps:
        if not torch.equal(reader.read(f"{weight}.{suffix}"), ours):
            raise ValueError(f"{reader.folder}: {weight}.{suffix} is not the codebook of NF4 as bitsandbytes writes it")


# Writing #


def stored_specs(projection: str, linear: NF4Linear, offset: float) -> dict[str, TensorSpec]:
    """What `stored_tensors` will give, as (dtype, shape). `linear` may be on the meta device; `offset`: the mean of its
    scales (anything without double quantisation), which is part of the JSON and so decides its length."""
    tensors = _tensors(projection, linear) + [_state(projection, linear, offset)]
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors}


def stored_tensors(projection: str, linear: NF4Linear) -> list[tuple[str, Tensor]]:
    """The tensors of one projection as bitsandbytes names and shapes them; views where they can be."""
    offset = 0.0 if linear.nested is None else float(linear.nested.data.view(torch.float32)[0])
    return _tensors(projection, linear) + [_state(projection, linear, offset)]


def _tensors(projection: str, linear: NF4Linear) -> list[tuple[str, Tensor]]:
    if isinstance(linear, IcqLinear):
        raise ValueError(
            f"{projection} has shifted blocks (quant.icq), which bitsandbytes' format has no place for; valid: "
            "quant.icq false, or to merge into dense weights (dequantized, original)"
        )
    weight = f"{projection}.weight"
    constants = [(f"{weight}.quant_map", CODEBOOK)]
    if linear.nested is None:
        scales = [(f"{weight}.absmax", linear.scales.data.view(torch.float32))]
    else:
        nested_absmax = linear.nested.data.view(torch.float32)[1:]
        scales = [(f"{weight}.absmax", linear.scales.data), (f"{weight}.nested_absmax", nested_absmax)]
        constants.append((f"{weight}.nested_quant_map", DYNAMIC_MAP))
    return [(weight, linear.codes.data[:, None]), *scales, *constants]


def _state(projection: str, linear: NF4Linear, offset: float) -> tuple[str, Tensor]:
    if linear.dtype not in _DTYPE_NAMES:
        raise ValueError(
            f"{projection}.weight was {linear.dtype}, which bitsandbytes' format has no name for; valid: "
            f"{', '.join(_DTYPES)}"
        )
    state = {
        "quant_type": "nf4",
        "blocksize": linear.block_size,
        "dtype": _DTYPE_NAMES[linear.dtype],
        "shape": [linear.out_features, linear.in_features],
    }
    if linear.nested is not None:
        state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": offset}
    return f"{projection}.weight.{STATE}", torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def quantization_config(config: QuantConfig, compute_dtype: torch.dtype, dense: Sequence[str]) -> dict[str, Any]:
    """For config.json, as transformers writes it. dense: full names of the projections that are not quantised.

    transformers leaves lm_head dense by itself only where it is given no list.
    """
    skipped = sorted({"lm_head", *dense})
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": _DTYPE_NAMES[compute_dtype],
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": config.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if skipped == ["lm_head"] else skipped,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
