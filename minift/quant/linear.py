"""A projection whose frozen weight is stored in NF4: 4-bit codes, a scale per block, and scales of the scales.

Paper: Dettmers et al. 2023, arXiv 2305.14314, sections 3 (NF4, double quantisation; with blocks of 64 and 256, 0.516
bytes a weight). The arithmetic is `minift/ops/nf4.py`; here it becomes a module.

Everything is kept as bytes, in parameters of dtype uint8, also the scales that are floats:

    codes    ceil(n / 2)                    two weights a byte, the even one in the high nibble
    scales   ceil(n / block_size)           8 bits a block; four times that, fp32, without double quantisation
    nested   4 · (1 + ceil(blocks / 256))   fp32: the mean of the scales, then the scales of their differences from it;
                                            nothing without double quantisation

So to FSDP they are one more bucket, which it cuts anywhere, gathers as it is (4.1 bits a weight on the wire) and never
casts, and a block that is cut in two comes together again before anybody reads it. Not here: quantising (`weights.py`),
gradients of the weight (there are none), adapters (`peft`, which wraps this like any projection).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minift.model.linear import Linear, LinearBase, rows_in_cache
from minift.ops.nf4 import Nf4, dequantize_nf4, quantize_nf4, quantize_scales
from minift.ops.nf4_linear import nf4_linear, nf4_linear_dx
from minift.ops.nf4_tables import BLOCK_SIZES, NESTED_BLOCK_SIZE

META = torch.device("meta")


@dataclass(frozen=True)
class QuantConfig:
    """How the base weights are stored that an adapter is trained on top of (QLoRA).

    format: nf4: 4 bits, whose 16 levels are the quantiles of a normal distribution.
    block_size: weights that share a scale; a power of two, 32 to 4096.
    double_quant: store the scales in 8 bits too: 0.516 bytes a weight instead of 0.562.
    skip: projections that stay as they are (regular expressions searched in their names); lm_head always does.
    icq: shift each block so that its codes have the largest entropy (the first half of IR-QLoRA; adapter.method iec is
        the other): 0.25 bits a weight more, and minutes at the start for a large model.
    """

    format: Literal["nf4"] = "nf4"
    block_size: int = 64
    double_quant: bool = True
    skip: tuple[str, ...] = ()
    icq: bool = False

    def __post_init__(self) -> None:
        if self.format != "nf4":
            raise ValueError(f"quant.format is {self.format!r}; valid: nf4")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"quant.block_size is {self.block_size!r}; valid: {', '.join(map(str, BLOCK_SIZES))}")
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"quant.skip has {pattern!r}, no regular expression ({error})") from None


class NF4Linear(LinearBase):
    """y = x Wᵀ + b with W in NF4. Parameters start uninitialised; bias is dense, and frozen too."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        block_size: int,
        double_quant: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.block_size = block_size
        self.double_quant = double_quant
        self.dtype = dtype
        """Of the weight before it was quantised, and so of `dense_weight`."""
        num_blocks = math.ceil(self.numel / block_size)
        self.codes = _bytes(math.ceil(self.numel / 2), device)
        self.scales = _bytes(num_blocks if double_quant else 4 * num_blocks, device)
        num_nested = 1 + math.ceil(num_blocks / NESTED_BLOCK_SIZE)
        self.register_parameter("nested", _bytes(4 * num_nested, device) if double_quant else None)
        bias_O = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)
        self.register_parameter("bias", bias_O if bias else None)

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return self.in_features * self.out_features

    def nf4(self) -> Nf4:
        """The weight as it is now: views of the parameters, which under FSDP move between forward and backward."""
        kind = {"shape": (self.out_features, self.in_features), "block_size": self.block_size}
        codes, scales = self.codes.data, self.scales.data
        if self.nested is None:
            return Nf4(codes=codes, absmax=scales.view(torch.float32), **kind)
        nested = self.nested.data.view(torch.float32)
        return Nf4(codes=codes, scales=scales, nested_absmax=nested[1:], offset=nested[:1], **kind)

    def product(self, x_NI: Tensor, add_to_NO: Tensor | None = None) -> Tensor:
        if add_to_NO is None and self.bias is not None:
            add_to_NO = self.bias.to(x_NI.dtype).repeat(len(x_NI), 1)
        return nf4_linear(x_NI, self.nf4(), add_to_NO)

    def product_dx(self, dy_NO: Tensor, add_to_NI: Tensor | None = None) -> Tensor:
        return nf4_linear_dx(dy_NO, self.nf4(), add_to_NI)

    def dense_weight(self) -> Tensor:
        return dequantize_nf4(self.nf4(), self.dtype).view(self.out_features, self.in_features)

    def weight_slices(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        nf4 = self.nf4()
        unit = self.block_size // math.gcd(self.block_size, self.in_features)  # rows that are whole blocks
        rows = -(-rows_in_cache(nf4.shape, dtype, self.codes.device) // unit) * unit
        for start in range(0, self.out_features, rows):
            stop = min(start + rows, self.out_features)
            values = dequantize_nf4(nf4, dtype, start * self.in_features, stop * self.in_features)
            yield start, values.view(stop - start, self.in_features)

    def storing(self, weight: Tensor) -> NF4Linear:
        codes, absmax = quantize_nf4(weight, self.block_size)
        linear = self.blank()
        linear.bias = self.bias
        linear.hold("codes", codes)
        for part, values in self.bytes_of_scales(absmax).items():
            linear.hold(part, values)
        return linear

    def bytes_of_scales(self, absmax: Tensor) -> dict[str, Tensor]:
        """What absmax fp32 (blocks,) is stored as: scales and, with double quantisation, nested."""
        if not self.double_quant:
            return {"scales": absmax.view(torch.uint8)}
        scales, nested_absmax, offset = quantize_scales(absmax)
        return {"scales": scales, "nested": torch.cat([offset, nested_absmax]).view(torch.uint8)}

    def blank(self) -> NF4Linear:
        """A projection of this shape and format, without memory and without bias."""
        return type(self)(
            self.in_features, self.out_features, False, self.block_size, self.double_quant, self.dtype, META
        )

    def hold(self, part: str, values: Tensor) -> None:
        """Make `values` (uint8, of the right size) the parameter codes, scales or nested."""
        assert values.dtype == torch.uint8 and values.numel() == self.get_parameter(part).numel(), part
        self.register_parameter(part, nn.Parameter(values, requires_grad=False))

    def extra_repr(self) -> str:
        scales = "8-bit" if self.double_quant else "fp32"
        return f"{self.in_features} -> {self.out_features}, nf4, block_size={self.block_size}, {scales} scales"


def projections_to_quantize(model: nn.Module, skip: Sequence[str]) -> list[str]:
    """Names of the dense projections of `model` but lm_head and what a pattern of `skip` is found in. ValueError if a
    pattern matches nothing, or nothing is left."""
    names = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    few = ", ".join(names[:3]) + (f" ... {names[-1]}" if len(names) > 3 else "")
    for pattern in skip:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"quant.skip has {pattern!r}, found in no projection; they are {few}")
    chosen = [
        name
        for name in names
        if name.rpartition(".")[2] != "lm_head" and not any(re.search(pattern, name) for pattern in skip)
    ]
    if not chosen:
        raise ValueError(f"quant.skip leaves no projection to quantise; they are {few}")
    return chosen


def quantize_linears(
    model: nn.Module, dtypes: Mapping[str, torch.dtype], config: QuantConfig, kind: type[NF4Linear] = NF4Linear
) -> dict[str, NF4Linear]:
    """Replace projections of `model` by uninitialised ones of `kind`; return these. dtypes: {name: its weight's}."""
    quantized = {}
    for name, dtype in dtypes.items():
        dense = model.get_submodule(name)
        assert isinstance(dense, Linear), f"{name} is no dense projection"
        quantized[name] = kind(
            dense.in_features,
            dense.out_features,
            dense.bias is not None,
            config.block_size,
            config.double_quant,
            dtype,
            dense.weight.device,
        )
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, quantized[name])
    return quantized


def _bytes(count: int, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(count, dtype=torch.uint8, device=device), requires_grad=False)
