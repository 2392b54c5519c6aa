"""Folders in NF4 go from transformers + bitsandbytes to minift and back. Oracle: those two packages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minift.checkpoint.quantize import quantize_folder
from minift.model.weights import WeightReader
from minift.quant.linear import NF4Linear, QuantConfig
from minift.quant.model import load_model
from tests.tiny import write_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")


def theirs(folder: Path, config: QuantConfig | None, dtype: torch.dtype) -> torch.nn.Module:
    """Loaded by transformers: quantised by bitsandbytes on the way, or as the folder says."""
    asked = {}
    if config is not None:
        asked["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **asked)
    return model.train()  # else bitsandbytes computes in bf16 on a CPU, and only with widths that it likes


def logits(model, tokens_T: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(model, transformers.PreTrainedModel):
            return model(tokens_T[None]).logits[0]
        length = len(tokens_T)
        bounds = torch.tensor([0, length], dtype=torch.int32)
        return model(tokens_T, torch.arange(length), bounds, length, head=lambda hidden, lm_head: lm_head(hidden))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_both_ways(tmp_path: Path, double_quant: bool, dtype: torch.dtype) -> None:
    """Every stored byte is equal. Logits of each side's folder on the other side are equal up to the order of sums: in
    fp32 2e-5 of the largest, as for dense models; in bf16 activations are rounded to 2^-9, some ten times on the way.
    """
    config = QuantConfig(double_quant=double_quant)
    dense = write_model(tmp_path / "dense")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    reloaded.save_pretrained(tmp_path / "cast")
    for file in dense.glob("tokenizer*"):
        (tmp_path / "cast" / file.name).write_bytes(file.read_bytes())

    theirs(tmp_path / "cast", config, dtype).save_pretrained(tmp_path / "theirs")
    quantize_folder(tmp_path / "cast", tmp_path / "ours", config)

    ours_reader, their_reader = WeightReader(tmp_path / "ours"), WeightReader(tmp_path / "theirs")
    assert sorted(ours_reader.names()) == sorted(their_reader.names())
    for name in their_reader.names():
        mine, other = ours_reader.read(name), their_reader.read(name)
        assert mine.dtype == other.dtype and mine.shape == other.shape, name
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8)), name
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]

    tokens_T = torch.arange(3, 40)
    for side in ("ours", "theirs"):
        mine = load_model(tmp_path / side, None, dtype)
        assert sum(isinstance(module, NF4Linear) for module in mine.modules()) == 2 * 7
        expected = logits(theirs(tmp_path / side, None, dtype), tokens_T).float()
        limit = 2e-5 if dtype == torch.float32 else 10 * 2**-9
        assert (logits(mine, tokens_T).float() - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_type": "fp4"}, "has quant_type 'fp4'; valid: nf4"),
        ({"dtype": "float64"}, "has dtype 'float64'; valid: float32, bfloat16, float16"),
        ({"nested_blocksize": 128}, "has nested_blocksize 128; valid: 256"),
        ({"shape": [24, 48]}, "has 480 bytes where 576 are expected|bytes where"),
    ],
)
def test_what_cannot_be_held_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    from safetensors.torch import load_file, save_file

    quantize_folder(write_model(tmp_path / "dense"), tmp_path / "nf4", QuantConfig())
    path = tmp_path / "nf4" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[name].tolist())) | change
    tensors[name] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "nf4", None, torch.float32)


def test_another_codebook_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    quantize_folder(write_model(tmp_path / "dense"), tmp_path / "nf4", QuantConfig())
    path = tmp_path / "nf4" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight.quant_map"][3] += 0.01
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="up_proj.weight.quant_map is not the codebook of NF4"):
        load_model(tmp_path / "nf4", None, torch.float32)
