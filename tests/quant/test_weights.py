"""Any bytes of any quantised parameter, from a dense folder and from one that is quantised already.

Oracle: `quantize_nf4` and `quantize_scales` (held to bitsandbytes by tests/ops/test_nf4.py) of the whole weight.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import minift.quant.weights
from minift.checkpoint.quantize import quantize_folder
from minift.model.decoder import CausalLM
from minift.model.hf import check_weights, load_config
from minift.model.weights import WeightReader
from minift.ops.nf4 import dequantize_nf4, quantize_nf4, quantize_scales
from minift.quant.linear import NF4Linear, QuantConfig
from minift.quant.weights import QuantWeights, quantize_for
from tests.tiny import write_model

NAME = "model.layers.0.mlp.up_proj"  # 40 x 24 = 960 weights: 15 blocks of 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("dense") / "model")


def whole(folder: Path, config: QuantConfig) -> dict[str, Tensor]:
    codes, absmax = quantize_nf4(WeightReader(folder).read(f"{NAME}.weight"), config.block_size)
    if not config.double_quant:
        return {"codes": codes, "scales": absmax.view(torch.uint8)}
    scales, nested_absmax, offset = quantize_scales(absmax)
    return {"codes": codes, "scales": scales, "nested": torch.cat([offset, nested_absmax]).view(torch.uint8)}


def quantized(folder: Path, config: QuantConfig | None) -> tuple[QuantWeights, dict[str, NF4Linear]]:
    with torch.device("meta"):
        model = CausalLM(load_config(folder))
    weights = QuantWeights(folder)
    check_weights(weights, model)
    return weights, quantize_for(model, weights, config)


configs = st.builds(QuantConfig, block_size=st.sampled_from([32, 64, 256, 4096]), double_quant=st.booleans())


@settings(deadline=None)
@given(config=configs, cut=st.floats(0, 1), length=st.floats(0, 1), piece_blocks=st.sampled_from([1, 2, 1 << 10]))
def test_any_range_of_bytes(folder: Path, config: QuantConfig, cut: float, length: float, piece_blocks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minift.quant.weights, "_PIECE_ELEMENTS", config.block_size * piece_blocks)
        weights, linears = quantized(folder, config)
        for part, expected in whole(folder, config).items():
            assert linears[NAME].get_parameter(part).numel() == len(expected)
            start = round(cut * len(expected))
            stop = start + round(length * (len(expected) - start))
            actual = weights.read_bytes(linears[NAME], f"{NAME}.{part}", start, stop)
            assert torch.equal(actual, expected[start:stop]), part


def test_codes_read_only_the_blocks_they_need(folder: Path, monkeypatch) -> None:
    weights, linears = quantized(folder, QuantConfig())
    ranges = []
    read_range = WeightReader.read_range

    def watching(self, name: str, start: int, stop: int) -> Tensor:
        ranges.append((start, stop))
        return read_range(self, name, start, stop)

    monkeypatch.setattr(WeightReader, "read_range", watching)
    weights.read_bytes(linears[NAME], f"{NAME}.codes", 33, 95)  # weights 66 to 190: blocks 1 and 2
    assert ranges == [(64, 192)]


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_stored_folder_is_read_as_it_is(folder: Path, tmp_path: Path, double_quant: bool) -> None:
    config = QuantConfig(block_size=128, double_quant=double_quant)
    quantize_folder(folder, tmp_path / "nf4", config)
    weights, linears = quantized(tmp_path / "nf4", None)
    expected = whole(folder, config)
    for part, tensor in expected.items():
        for start, stop in ((0, len(tensor)), (1, len(tensor) - 2), (3, 3)):
            actual = weights.read_bytes(linears[NAME], f"{NAME}.{part}", start, stop)
            assert torch.equal(actual, tensor[start:stop]), part
    linear = linears[NAME]
    weights.fill(NAME, linear, torch.device("cpu"))
    dense = dequantize_nf4(linear.nf4(), torch.float32)
    assert torch.equal(weights.read(f"{NAME}.weight").flatten(), dense)
    assert torch.equal(weights.read_range(f"{NAME}.weight", 100, 301), dense[100:301])
    assert torch.equal(weights.read("model.norm.weight"), WeightReader(folder).read("model.norm.weight"))


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    quantize_folder(folder, tmp_path / "nf4", QuantConfig())
    with pytest.raises(ValueError, match="quantised already, and its .block_size, double_quant. are .64, True."):
        quantized(tmp_path / "nf4", QuantConfig(block_size=128))
    quantized(tmp_path / "nf4", QuantConfig())
    with pytest.raises(ValueError, match="is quantised already"):
        quantize_folder(tmp_path / "nf4", tmp_path / "again", QuantConfig())
    with pytest.raises(ValueError, match="quant.skip has 'nothing', found in no projection; they are model.layers.0"):
        quantized(folder, QuantConfig(skip=("nothing",)))
    with pytest.raises(ValueError, match="quant.skip leaves no projection to quantise"):
        quantized(folder, QuantConfig(skip=("proj",)))
    with pytest.raises(ValueError, match="quant.block_size is 100; valid: 32, 64"):
        QuantConfig(block_size=100)
    with pytest.raises(ValueError, match="quant.format is 'fp4'; valid: nf4"):
        QuantConfig(format="fp4")


@pytest.mark.parametrize("double_quant", [True, False])
def test_an_element_that_is_not_finite_is_found(folder: Path, tmp_path: Path, monkeypatch, double_quant: bool) -> None:
    """Element 500, counted from where what was read begins."""
    monkeypatch.setattr(minift.quant.weights, "_PIECE_ELEMENTS", 128)
    weights, linears = quantized(folder, QuantConfig(double_quant=double_quant))
    read_range = WeightReader.read_range

    def poisoned(self, name: str, start: int, stop: int) -> Tensor:
        elements = read_range(self, name, start, stop)
        if start <= 500 < stop:
            elements[500 - start] = torch.nan
        return elements

    monkeypatch.setattr(WeightReader, "read_range", poisoned)
    where = f"{NAME}.weight, from element {{}} on, cannot be quantised: .* among elements {{}} to {{}};"
    for part, start, message in (
        ("codes", 0, where.format(384, 64, 127)),
        ("codes", 230, where.format(448, 0, 63)),  # of block 7 on
        ("scales", 0, where.format(384, 64, 127)),
    ):
        with pytest.raises(ValueError, match=message):
            weights.read_bytes(linears[NAME], f"{NAME}.{part}", start, 480)


def test_skip_and_lm_head(folder: Path) -> None:
    _, linears = quantized(folder, QuantConfig(skip=("down_proj", r"layers\.0\.self_attn")))
    assert not any("down_proj" in name or "layers.0.self_attn" in name or "lm_head" in name for name in linears)
    assert len(linears) == 2 + 4 + 2
