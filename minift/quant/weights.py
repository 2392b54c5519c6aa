"""The weights of a folder, whether they are stored densely or in NF4, for models that want them either way.

    weights = QuantWeights("model/")
    weights.read_range(name, start, stop)          # of dense weights, as `WeightReader`; stored NF4 is dequantised
    weights.read_bytes(linear, name, start, stop)  # of the parameters of an `NF4Linear`; a dense weight is quantised

A rank of a sharded model asks for its part of each parameter. Codes depend on their own block only, so it reads just
the blocks that its part touches. Scales with double quantisation depend on the mean of all scales of a weight; for
those it goes over the whole weight in pieces and keeps nothing but one fp32 a block. So no process ever holds more of
a dense weight than a piece and its own share, and the bytes are the same at any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from minift.model.linear import LinearBase
from minift.model.weights import WeightReader
from minift.ops.nf4 import absmax_of, dequantize_nf4, quantize_nf4
from minift.ops.nf4_shift import block_shifts, shifted
from minift.quant.bitsandbytes import StoredNF4
from minift.quant.icq import IcqLinear
from minift.quant.linear import NF4Linear, QuantConfig, projections_to_quantize, quantize_linears

T = TypeVar("T")

_PIECE_ELEMENTS = 1 << 22  # a multiple of every block size; 8 MiB of bf16


class QuantWeights(WeightReader):
    """Names, shapes and dtypes are those of the dense model, whatever the folder holds."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.stored = StoredNF4(WeightReader(folder))
        self._scales_of = ""  # the projection whose scales were made last: they are asked for several times
        self._scales: dict[str, Tensor] = {}
        self._shifts_of = ""  # likewise
        self._shifts = torch.empty(0)

    # As a dense model sees them #

    def names(self) -> list[str]:
        hidden = self.stored.own_names() - {f"{projection}.weight" for projection in self.stored.projections}
        return [name for name in super().names() if name not in hidden]

    def shape(self, name: str) -> tuple[int, ...]:
        projection = self._stored_projection(name)
        return super().shape(name) if projection is None else self.stored.shape(projection)

    def dtype(self, name: str) -> torch.dtype:
        projection = self._stored_projection(name)
        return super().dtype(name) if projection is None else self.stored.dtype(projection)

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        projection = self._stored_projection(name)
        if projection is None:
            return super().read_range(name, start, stop)
        out_features, in_features = self.stored.shape(projection)
        config, dtype = self.stored.config(), self.stored.dtype(projection)
        linear = NF4Linear(
            in_features, out_features, False, config.block_size, config.double_quant, dtype, torch.device("meta")
        )
        self.fill(projection, linear, torch.device("cpu"))
        first = start // config.block_size * config.block_size
        last = min(-(-stop // config.block_size) * config.block_size, linear.numel)
        return dequantize_nf4(linear.nf4(), dtype, first, last)[start - first : stop - first]

    def _stored_projection(self, name: str) -> str | None:
        projection = name.removesuffix(".weight")
        return projection if projection != name and projection in self.stored.projections else None

    # As an `NF4Linear` holds them #

    def read_bytes(self, linear: NF4Linear, name: str, start: int, stop: int) -> Tensor:
        """Bytes [start, stop) of the parameter `name` (codes, scales, nested or shifts) of `linear`; uint8, 1-D."""
        projection, _, part = name.rpartition(".")
        if projection in self.stored.projections:
            return self.stored.read(projection, part, start, stop)
        if part == "codes":
            return self._codes(f"{projection}.weight", linear, start, stop)
        if part == "shifts":
            return self._block_shifts(f"{projection}.weight", linear).view(torch.uint8)[start:stop]
        if projection != self._scales_of:
            self._scales, self._scales_of = self._make_scales(f"{projection}.weight", linear), projection
        return self._scales[part][start:stop]

    def fill(self, projection: str, linear: NF4Linear, device: torch.device) -> None:
        """Give `linear` its weight, in memory of its own."""
        for part, old in list(linear.named_parameters()):
            if part != "bias":
                linear.hold(part, self.read_bytes(linear, f"{projection}.{part}", 0, old.numel()).to(device))

    def trained_weight(self, projection: str, linear: LinearBase) -> Tensor:
        """The dense weight of `projection`, in memory of its own, as a model sees it in which it is like `linear`: in
        NF4 or not. Of `linear` nothing else is read."""
        if not isinstance(linear, NF4Linear):
            return self.read(f"{projection}.weight")
        filled = linear.blank()
        self.fill(projection, filled, torch.device("cpu"))
        return filled.dense_weight()

    def _codes(self, weight_name: str, linear: NF4Linear, start: int, stop: int) -> Tensor:
        block = linear.block_size
        first = 2 * start // block * block
        last = min(-(-2 * stop // block) * block, linear.numel)
        codes = torch.empty(stop - start, dtype=torch.uint8)
        pieces = self._of_pieces(lambda piece: quantize_nf4(piece, block), weight_name, linear, first, last)
        for at, (made, _) in pieces:
            begin, end = max(start, at // 2), min(stop, at // 2 + len(made))
            codes[begin - start : end - start] = made[begin - at // 2 : end - at // 2]
        return codes

    def _make_scales(self, weight_name: str, linear: NF4Linear) -> dict[str, Tensor]:
        block = linear.block_size
        pieces = self._of_pieces(lambda piece: absmax_of(piece, block), weight_name, linear, 0, linear.numel)
        return linear.bytes_of_scales(torch.cat([absmax for _, absmax in pieces]))

    def _block_shifts(self, weight_name: str, linear: NF4Linear) -> Tensor:
        """Of all blocks, bf16: scales with double quantisation need all of them anyway."""
        if weight_name != self._shifts_of:
            pieces = self._pieces(weight_name, 0, linear.numel)
            self._shifts = torch.cat([block_shifts(piece, linear.block_size) for _, piece in pieces])
            self._shifts_of = weight_name
        return self._shifts

    def _of_pieces(
        self, function: Callable[[Tensor], T], weight_name: str, linear: NF4Linear, first: int, last: int
    ) -> Iterator[tuple[int, T]]:
        """(its first element, function(piece)) for the pieces of elements [first, last) of what `linear` quantises."""
        for at, piece in self._pieces(weight_name, first, last):
            try:
                if isinstance(linear, IcqLinear):
                    blocks = slice(at // linear.block_size, (at + len(piece)) // linear.block_size)
                    piece = shifted(piece, self._block_shifts(weight_name, linear)[blocks])
                result = function(piece)
            except ValueError as error:
                raise ValueError(
                    f"{self.folder}: {weight_name}, from element {at} on, cannot be quantised: {error}"
                ) from None
            yield at, result

    def _pieces(self, weight_name: str, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """(its first element, piece) of elements [first, last) of a dense weight."""
        for at in range(first, last, _PIECE_ELEMENTS):
            yield at, self.read_range(weight_name, at, min(at + _PIECE_ELEMENTS, last))


def quantize_for(model: nn.Module, weights: QuantWeights | None, asked: QuantConfig | None) -> dict[str, NF4Linear]:
    """Make those projections of `model` NF4 that `asked` wants so, or that the folder stores so; {full name: module}.

    weights: None where there is no folder: they are dense then, in bf16. ValueError if both say something, and not the
    same.
    """
    if weights is None or not weights.stored.projections:
        if asked is None:
            return {}
        names, config = projections_to_quantize(model, asked.skip), asked
        _check_rows(model, names, config)
        if weights is None:
            return quantize_linears(model, dict.fromkeys(names, torch.bfloat16), config, _kind(config))
    else:
        names, config = weights.stored.projections, weights.stored.config()
        if asked is not None and asked.icq:
            raise ValueError(
                f"{weights.folder} is quantised already, without quant.icq, which needs the weights from before; "
                "valid: quant.icq false, or the folder of the original model"
            )
        kinds = [(c.block_size, c.double_quant) for c in (asked or config, config)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{weights.folder} is quantised already, and its (block_size, double_quant) are {kinds[1]} where quant "
                f"asks for {kinds[0]}; leave quant out, or give the folder of the original model"
            )
    dtypes = {name: weights.dtype(f"{name}.weight") for name in names}
    return quantize_linears(model, dtypes, config, _kind(config))


def _kind(config: QuantConfig) -> type[NF4Linear]:
    return IcqLinear if config.icq else NF4Linear


def _check_rows(model: nn.Module, names: list[str], config: QuantConfig) -> None:
    """ValueError if ICQ would have to shift blocks that are parts of two rows."""
    for name in names if config.icq else []:
        in_features = model.get_submodule(name).in_features
        if in_features % config.block_size:
            raise ValueError(
                f"quant.icq needs rows of whole blocks of {config.block_size}, and those of {name} have {in_features} "
                "elements; valid: a quant.block_size that divides them, quant.skip for it, or quant.icq false"
            )
