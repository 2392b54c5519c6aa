"""Folders in NF4 go from transformers + bitsandbytes to minift and back. Oracle: those two packages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minift.checkpoint.quantize import quantize_folder
from minift.model.weights import WeightReader
from minift.quant.linear import NF4Linear, QuantConfig
from minift.quant.model import load_model
from minift.quant.weights import QuantWeights
from tests.tiny import write_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")


def theirs(folder: Path, config: QuantConfig | None, dtype: torch.dtype, **more: object) -> torch.nn.Module:
    """Loaded by transformers: quantised by bitsandbytes on the way, or as the folder says."""
    asked = {}
    if config is not None:
        asked["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head", *config.skip] if config.skip else None,
            **more,
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


def quantize(folder: Path, config: QuantConfig) -> Path:
    """A tiny model in NF4 in `folder`, which is made."""
    quantize_folder(write_model(folder / "dense"), folder / "nf4", config)
    return folder / "nf4"


def spoiled(folder: Path, spoil: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Another one, whose tensors `spoil` has changed."""
    shutil.rmtree(folder / "spoiled", ignore_errors=True)
    path = quantize(folder / "spoiled", QuantConfig()) / "model.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path, {"format": "pt"})
    return path.parent


UP = "model.layers.1.mlp.up_proj.weight"
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
DOWN = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


def cast(dense: Path, folder: Path, dtype: torch.dtype) -> Path:
    """The same model in another dtype, written by transformers."""
    transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).save_pretrained(folder)
    for file in dense.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def assert_logits_agree(folder: Path, dtype: torch.dtype, num_quantized: int) -> None:
    """Ours of a quantised folder and theirs of the same folder, up to the order of sums: in fp32 2e-5 of the largest,
    as for dense models; in 16 bits activations are rounded to half an eps, some ten times on the way."""
    tokens_T = torch.arange(3, 40)
    mine = load_model(folder, None, dtype)
    assert sum(isinstance(module, NF4Linear) for module in mine.modules()) == num_quantized
    expected = logits(theirs(folder, None, dtype), tokens_T).float()
    limit = 2e-5 if dtype == torch.float32 else 10 * torch.finfo(dtype).eps / 2
    assert (logits(mine, tokens_T).float() - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize(
    ("dtype", "double_quant", "skip", "model"),
    [
        (torch.float32, True, (), {}),
        (torch.float32, False, ("down_proj",), {"tied": False}),
        (torch.bfloat16, True, (), {"tied": False, **QWEN2}),
        (torch.bfloat16, False, (), {}),
        (torch.float16, True, ("down_proj",), {"tied": True, **QWEN2}),
    ],
    ids=["fp32", "fp32-skip-untied", "bf16-qwen2-untied", "bf16", "fp16-skip-qwen2"],
)
def test_both_ways(tmp_path: Path, dtype: torch.dtype, double_quant: bool, skip: tuple[str, ...], model: dict) -> None:
    """Every stored byte is equal. Logits of each side's folder on the other side agree."""
    config = QuantConfig(double_quant=double_quant, skip=skip)
    dense = cast(write_model(tmp_path / "dense", **model), tmp_path / "cast", dtype)
    theirs(dense, config, dtype).save_pretrained(tmp_path / "theirs")
    quantize_folder(dense, tmp_path / "ours", config)

    ours_reader, their_reader = WeightReader(tmp_path / "ours"), WeightReader(tmp_path / "theirs")
    assert sorted(ours_reader.names()) == sorted(their_reader.names())
    for name in their_reader.names():
        mine, other = ours_reader.read(name), their_reader.read(name)
        assert mine.dtype == other.dtype and mine.shape == other.shape, name
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8)), name
    assert any(name.endswith(".bias") for name in their_reader.names()) == ("model_type" in model)
    ours, others = (
        json.loads((tmp_path / side / "config.json").read_text())["quantization_config"] for side in ("ours", "theirs")
    )
    # Their list has what the caller typed; ours names every projection.
    assert ours.pop("llm_int8_skip_modules") == (["lm_head", *DOWN] if skip else None)
    assert others.pop("llm_int8_skip_modules") == (["lm_head", *skip] if skip else None)
    assert ours == others
    for side in ("ours", "theirs"):
        assert_logits_agree(tmp_path / side, dtype, num_quantized=2 * (6 if skip else 7))


def test_block_sizes_that_transformers_does_not_offer_are_loaded_by_it(tmp_path: Path) -> None:
    config = QuantConfig(block_size=128, double_quant=False)
    quantize_folder(write_model(tmp_path / "dense"), tmp_path / "nf4", config)
    assert_logits_agree(tmp_path / "nf4", torch.float32, num_quantized=2 * 7)


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    dense = cast(write_model(tmp_path / "dense"), tmp_path / "fp64", torch.float64)
    with pytest.raises(ValueError, match="_proj.weight was torch.float64, .* valid: float32, bfloat16, float16"):
        quantize_folder(dense, tmp_path / "nf4", QuantConfig())
    assert not (tmp_path / "nf4").exists()


def test_codes_stored_as_another_dtype_are_read(tmp_path: Path) -> None:
    """bnb_4bit_quant_storage: what FSDP of others needs to shard them. The same bytes, so the same model to the bit."""
    dense = write_model(tmp_path / "dense")
    for storage in (torch.uint8, torch.bfloat16):
        name = str(storage).removeprefix("torch.")
        model = theirs(dense, QuantConfig(), torch.float32, bnb_4bit_quant_storage=storage)
        model.save_pretrained(tmp_path / name)
        assert WeightReader(tmp_path / name).dtype(f"{DOWN[0]}.weight") == storage
    expected = load_model(tmp_path / "uint8", None, torch.float32).state_dict()
    for name, tensor in load_model(tmp_path / "bfloat16", None, torch.float32).state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    # A rank reads any range of bytes.
    codes = expected[f"{DOWN[0]}.codes"]
    for start, stop in ((0, 1), (1, 2), (1, 4), (2, 4), (477, 480), (7, 7)):
        part = QuantWeights(tmp_path / "bfloat16").stored.read(DOWN[0], "codes", start, stop)
        assert torch.equal(part, codes[start:stop])


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "load_in_4bit True, bnb_4bit_quant_type 'fp4'"),
        ({"load_in_8bit": True}, "load_in_4bit False"),
    ],
    ids=["fp4", "int8"],
)
def test_other_formats_of_bitsandbytes_are_refused(tmp_path: Path, asked: dict, found: str) -> None:
    dense = write_model(tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense,
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=transformers.BitsAndBytesConfig(**asked),
    )
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"not supported .*{found}.*supported: NF4 of bitsandbytes"):
        load_model(tmp_path / "other", None, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_type": "fp4"}, "has quant_type 'fp4'; valid: nf4"),
        ({"dtype": "float64"}, "has dtype 'float64'; valid: float32, bfloat16, float16"),
        ({"nested_blocksize": 128}, "has nested_blocksize 128; valid: 256"),
        ({"nested_offset": "0.1"}, "has nested_offset '0.1'; valid: a number"),
        ({"blocksize": 100}, "has blocksize 100; valid: 32, 64, 128"),
        ({"blocksize": "64"}, "has blocksize '64'; valid: 32, 64, 128"),
        ({"shape": "24 x 40"}, "has shape '24 x 40'; valid: positive integers"),
        ({"shape": [24, 48]}, "has 480 bytes of torch.uint8 where 576 of torch.uint8 are expected"),
    ],
)
def test_what_cannot_be_held_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{UP}.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[name].tolist())) | change
        tensors[name] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)

    with pytest.raises(ValueError, match=message):
        load_model(spoiled(tmp_path, spoil), None, torch.float32)


@pytest.mark.parametrize("which", ["quant_map", "nested_quant_map"])
def test_another_codebook_is_refused(tmp_path: Path, which: str) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.{which}"][3] += 0.01

    with pytest.raises(ValueError, match=f"up_proj.weight.{which} is not the codebook of NF4"):
        load_model(spoiled(tmp_path, spoil), None, torch.float32)


@pytest.mark.parametrize("which", ["absmax", "nested_absmax"])
def test_scales_of_other_numbers_or_dtypes_are_refused(tmp_path: Path, which: str) -> None:
    """960 weights have 15 scales, in one group."""
    count, dtype, other = {
        "absmax": (15, torch.uint8, torch.int8),
        "nested_absmax": (1, torch.float32, torch.int32),
    }[which]
    for wrong in (torch.zeros(count + 1, dtype=dtype), torch.zeros(count, dtype=other)):
        folder = spoiled(tmp_path, lambda tensors, wrong=wrong: tensors.update({f"{UP}.{which}": wrong}))
        expected = f"up_proj.weight.{which} has {wrong.nbytes} bytes of {wrong.dtype} where {count * dtype.itemsize} of"
        with pytest.raises(ValueError, match=expected):
            load_model(folder, None, torch.float32)


def test_projections_that_are_stored_in_different_ways_are_refused(tmp_path: Path) -> None:
    other = load_file(quantize(tmp_path / "other", QuantConfig(block_size=128)) / "model.safetensors")
    theirs = {name: tensor for name, tensor in other.items() if name.startswith(UP)}
    with pytest.raises(ValueError, match="projections differ in .block size, double quantisation.: {.*64.*128|128.*64"):
        load_model(spoiled(tmp_path, lambda tensors: tensors.update(theirs)), None, torch.float32)
