"""Analysis of folders. Oracles: intruders planted through an adapter's factors; weights computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minift.analysis.spectrum import find_intruders
from minift.analysis.weights import IntruderScaling, adapted_weights, changed_weights
from minift.checkpoint.adapters import file_tensors, save_adapter
from minift.checkpoint.combine import read_updates
from minift.checkpoint.merge import merge_adapter
from minift.cli import main
from minift.model.hf import load_model
from minift.peft.combine import nearest_of_rank
from minift.peft.dora import DoraConfig
from minift.peft.inject import adapter_parameters, adapters, inject
from minift.peft.lora import LoraConfig
from minift.quant.linear import QuantConfig
from tests.tiny import write_model

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def folders(tmp_path):
    """(model, adapter): small updates everywhere, and in one weight a large one in a direction that W lacks."""
    write_model(tmp_path / "model")
    model = load_model(tmp_path / "model", torch.float32)
    config = LoraConfig(r=2, alpha=4)
    inject(model, config)
    torch.manual_seed(0)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.01)
    adapter = adapters(model)[DOWN]
    weight = adapter.base.weight
    U = torch.linalg.svd(weight.detach())[0]
    # Between all of W's directions: the cosine with each is 1 / √24.
    adapter.lora_B.weight.data[:, 0] = U.sum(1) / 24**0.5
    adapter.lora_A.weight.data[0] = torch.nn.functional.normalize(torch.randn(40), dim=0) * 50.0 * weight.norm()
    save_adapter(tmp_path / "adapter", config, file_tensors(model), base_model=str(tmp_path / "model"))
    return tmp_path / "model", tmp_path / "adapter"


@pytest.mark.parametrize("quant", [None, QuantConfig(block_size=32)])
def test_a_planted_intruder_is_scaled_down_and_the_rest_stays(folders, tmp_path, quant):
    model, adapter = folders
    intruders = {name: find_intruders(W, after) for name, W, after in adapted_weights(model, adapter, quant)}
    assert [name for name, of_weight in intruders.items() if of_weight.found] == [DOWN]
    for factor in (0.0, 0.25):
        out = tmp_path / f"scaled {factor}"
        counts = IntruderScaling(adapter, out, factor).write(intruders)
        assert {name: count for name, count in counts.items() if count} == {DOWN: 1}
        pairs = zip(adapted_weights(model, adapter, quant), adapted_weights(model, out, quant), strict=True)
        for (name, _, after), (_, _, scaled) in pairs:
            expected = after + (factor - 1.0) * intruders[name].columns @ intruders[name].rows
            # The factors are stored in fp32: a rounding of 2⁻²⁴ for each of them, relative to the largest.
            torch.testing.assert_close(scaled, expected, rtol=0, atol=4e-7 * after.abs().max().item())
        ranks = {factors.module: update.rank for factors, update in read_updates(out).items()}
        assert ranks == {name: 3 if name == DOWN else 2 for name in ranks}
    removed = adapted_weights(model, tmp_path / "scaled 0.0", quant)
    assert not any(find_intruders(W, after).found for _, W, after in removed)


def test_peft_scales_the_same(folders, tmp_path):
    """Its `reduce_intruder_dimension` then keeps the largest r directions of the update, ours keeps all r + n."""
    peft, theirs = pytest.importorskip("peft"), pytest.importorskip("peft.tuners.lora.intruders")
    transformers = pytest.importorskip("transformers")
    model, adapter = folders
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    wrapped = peft.PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).double()
    said: list[str] = []
    theirs.reduce_intruder_dimension(wrapped, mitigation_lambda=0.25, logging_sink=said.append)
    intruders = {name: find_intruders(W, after) for name, W, after in adapted_weights(model, adapter, None)}
    counts = IntruderScaling(adapter, tmp_path / "out", 0.25).write(intruders)
    assert [line for line in said if "Intruders" in line] == [f"base_model.model.{DOWN}: Intruders: {counts[DOWN]}"]
    for factors, update in read_updates(tmp_path / "out").items():
        A, B = nearest_of_rank(update.A, update.scale * update.B, 2)
        expected = wrapped.get_submodule(f"base_model.model.{factors.module}").get_delta_weight("intruder_reduced")
        torch.testing.assert_close((B @ A).double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_a_merged_model_is_what_its_adapter_is(folders, tmp_path):
    model, adapter = folders
    merge_adapter(model, adapter, tmp_path / "merged")
    of_adapter = {}
    for name, _, after in adapted_weights(model, adapter, None):
        assert torch.is_grad_enabled() and not after.requires_grad
        of_adapter[name] = after
    of_model = {name: after for name, _, after in changed_weights(model, tmp_path / "merged")}
    assert of_adapter.keys() == of_model.keys()
    for name, after in of_adapter.items():
        torch.testing.assert_close(of_model[name], after, rtol=1e-6, atol=1e-9 + 2e-7 * after.abs().max().item())
    write_model(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(ValueError, match="are different models: only one of them has model.layers.1"):
        next(changed_weights(model, tmp_path / "other"))
    write_model(tmp_path / "wider", intermediate_size=44)
    with pytest.raises(ValueError, match=r"proj.weight is \(.*\) in .*/model and \(.*44.*\) in .*/wider; valid: one"):
        list(changed_weights(model, tmp_path / "wider"))


def test_the_command_writes_figures_pictures_and_an_adapter(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", "adapter", "--scale-intruders", "0.5", "--adapter-out", "calmer"]) == 0
    out = capsys.readouterr().out
    assert "wrote calmer: 1 intruders times 0.5" in out
    assert [line.split()[2] for line in out.splitlines() if line.startswith("down_proj")] == ["1"]
    light, dark = ((tmp_path / "analysis" / f"analysis{theme}.png").read_bytes() for theme in ("", "_dark"))
    assert light != dark
    found = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert [weight["name"] for weight in found if weight["intruders"]] == [DOWN]
    assert main(["merge", "--model", "model", "--adapter", "calmer", "--out", "merged"]) == 0
    assert main(["analyze", "merged", "--model", "model", "--out", "whole"]) == 0


@pytest.mark.parametrize(("flag", "quant"), [("--nf4", QuantConfig()), ("--icq", QuantConfig(icq=True))])
def test_the_command_takes_the_base_as_the_adapter_was_trained_on_it(tmp_path, monkeypatch, flag, quant):
    monkeypatch.chdir(tmp_path)
    write_model(Path("model"), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    model, config = load_model("model", torch.float32), LoraConfig(r=2)
    inject(model, config)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    save_adapter("adapter", config, file_tensors(model), base_model="model")
    assert main(["analyze", "adapter", flag]) == 0
    written = json.loads(Path("analysis/analysis.json").read_text())
    found = {weight["name"]: weight["update_ratio"] for weight in written}
    for name, before, after in adapted_weights("model", "adapter", quant):
        assert found.pop(name) == pytest.approx((after - before).norm().item() / before.norm().item(), rel=1e-9)
    assert not found


def test_what_cannot_be_is_refused(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load_model("model", torch.float32)
    inject(model, DoraConfig(r=2))
    save_adapter("dora", DoraConfig(r=2), file_tensors(model))
    with pytest.raises(ValueError, match="dora has dora; valid: lora"):
        IntruderScaling("dora", "out", factor=0.5)
    with pytest.raises(ValueError, match="factor for intruders is 1.0"):
        IntruderScaling("adapter", "out", factor=1.0)
    scaled = ["analyze", "adapter", "--model", "model", "--scale-intruders"]
    for arguments, sentence in [
        (["analyze", "dora"], "what was dora made from? it does not say; give the base with --model DIR"),
        (["analyze", "adapter", "--scale-intruders", "0.5"], "--scale-intruders F and --adapter-out DIR belong"),
        ([*scaled, "0.5", "--adapter-out", "model"], "model exists already"),
        ([*scaled, "2", "--adapter-out", "new"], "factor for intruders is 2.0"),
    ]:
        assert main(arguments) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "analysis").exists()  # refused before the work, not after it
