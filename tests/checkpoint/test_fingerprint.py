"""An adapter on its base in every form that is still that base, and on others that look the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minift.checkpoint.adapters import file_tensors, load_adapter, save_adapter
from minift.checkpoint.fingerprint import FINGERPRINT_FILE, Sample, take_fingerprint
from minift.checkpoint.merge import merge_adapter
from minift.checkpoint.quantize import quantize_folder
from minift.model.decoder import CausalLM
from minift.peft.adapter import AdapterConfig
from minift.peft.bottleneck import BottleneckConfig
from minift.peft.inject import frozen_projections, inject
from minift.peft.lora import LoraConfig
from minift.quant.linear import NF4Linear, QuantConfig
from minift.quant.model import load_model
from minift.quant.weights import QuantWeights
from tests.tiny import write_model

LORA = LoraConfig(r=2)


def save(base: Path, folder: Path, config: AdapterConfig = LORA) -> CausalLM:
    """An adapter trained on `base`, as `export_run` writes it."""
    model = load_model(base, None, torch.float32)
    inject(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    weights = QuantWeights(base)
    fingerprint = take_fingerprint(
        model, lambda name: weights.read(f"{name}.weight"), weights.stored.projections.__contains__
    )
    save_adapter(folder, config, file_tensors(model), fingerprint=fingerprint)
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base")


@pytest.mark.parametrize("quant", [None, QuantConfig(), QuantConfig(block_size=32, double_quant=False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_stored_quantized", [False, True])
def test_the_base_in_other_formats_is_the_base(base, tmp_path, quant, dtype, is_stored_quantized):
    trained_on = base
    if is_stored_quantized:
        trained_on = tmp_path / "nf4"
        quantize_folder(base, trained_on, QuantConfig())
    save(trained_on, tmp_path / "adapter")
    load_adapter(load_model(base, quant, dtype), tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", dtype, quant=quant)


def test_other_bases_are_refused(base, tmp_path):
    save(base, tmp_path / "adapter")
    other = write_model(tmp_path / "other", seed=1)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    for model, quant in ((other, None), (other, QuantConfig()), (tmp_path / "merged", None)):
        with pytest.raises(ValueError, match=r"trained on another base: model.layers.*_proj has other values there"):
            load_adapter(load_model(model, quant, torch.float32), tmp_path / "adapter")
        with pytest.raises(ValueError, match="trained on another base"):
            merge_adapter(model, tmp_path / "adapter", tmp_path / "again", quant=quant)
    (tmp_path / "adapter" / FINGERPRINT_FILE).unlink()
    load_adapter(load_model(other, None, torch.float32), tmp_path / "adapter")


@pytest.mark.parametrize("text", ["{", "[]", '{"lm_head": {}}', '{"lm_head": 3}'])
def test_a_damaged_file_is_said_to_be(base, tmp_path, text):
    save(base, tmp_path / "adapter")
    (tmp_path / "adapter" / FINGERPRINT_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{FINGERPRINT_FILE} is damaged; delete it"):
        load_adapter(load_model(base, None, torch.float32), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("config", "tied", "absent"),
    [
        (LoraConfig(r=2, targets=["q_proj"]), True, ["lm_head"]),  # it is the embedding
        (LoraConfig(r=2, targets=["q_proj"]), False, []),
        (LoraConfig(r=2, targets=["q_proj"], modules_to_save=["lm_head", "layers.0.mlp"]), False, ["lm_head", "0.mlp"]),
        (BottleneckConfig(size=2), False, ["adapter"]),
    ],
)
def test_what_a_fingerprint_is_of(tmp_path, config, tied, absent):
    """Weights of the folder, by their names there, that are as they were."""
    base = write_model(tmp_path / "base", tied=tied)
    model = load_model(base, None, torch.float32)
    everything = frozen_projections(model).keys()
    assert not everything, "nothing is frozen"
    inject(model, config)
    names = list(frozen_projections(model))
    in_folder = [name.removesuffix(".weight") for name in QuantWeights(base).names() if "proj" in name]
    expected = [name for name in [*in_folder, *([] if tied else ["lm_head"])] if not any(a in name for a in absent)]
    assert sorted(names) == sorted(expected)
    save(base, tmp_path / "adapter", config)
    stored = json.loads((tmp_path / "adapter" / FINGERPRINT_FILE).read_text())
    assert len(stored) == 8 and stored.keys() <= set(names)


def test_samples_find_small_changes_and_forgive_nf4():
    torch.manual_seed(0)
    weight = torch.randn(96, 128)
    sample = Sample.of(weight, False)
    assert not Sample.of(weight * 1.02, False).could_be(sample)
    assert not Sample.of(weight.t(), False).could_be(sample), "another shape"
    assert Sample.of(weight.bfloat16(), False).could_be(sample) and sample.could_be(Sample.of(weight.half(), False))
    assert not Sample.of(torch.randn(96, 128), True).could_be(sample)
    for block_size in (32, 64, 4096):
        kind = NF4Linear(128, 96, False, block_size, True, torch.float32, torch.device("meta"))
        assert Sample.of(kind.storing(weight).dense_weight(), True).could_be(sample)


def test_a_base_that_was_made_for_the_adapter_is_no_other():
    """A change that NF4's rounding could be is none that it was. In 16 bits it is still the same."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    other = weight + 0.05 * weight.flip(0)
    assert Sample.of(weight, True).could_be(Sample.of(other, True))
    exact = Sample.of(weight, True, is_exact=True)
    assert not exact.could_be(Sample.of(other, True))
    assert not Sample.of(other, True).could_be(exact)
    assert exact.could_be(Sample.of(weight.bfloat16(), True))
