"""Adapters side by side in one model. Oracle: PEFT's `set_adapter` and `disable_adapter`; a model with only one."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

from minift.checkpoint.adapters import file_tensors, load_adapter, load_resident, save_adapter
from minift.peft.bitfit import BitFitConfig
from minift.peft.dora import DoraConfig
from minift.peft.ia3 import IA3Config
from minift.peft.inject import adapter_modules, inject, stored_parameters
from minift.peft.lora import LoraConfig
from minift.peft.lora_ga import LoraGaConfig
from minift.peft.manage import merge_all, unmerge_all
from minift.peft.pissa import PissaConfig
from minift.peft.prefix import PrefixConfig
from minift.peft.resident import Residents
from minift.quant.linear import NF4Linear

TOKENS = torch.arange(13) * 3
TOLERANCE = 2e-5  # of the largest logit: fp32 through two blocks
CONFIGS = {
    "a": LoraConfig(r=4, alpha=8),
    "b": LoraConfig(r=2, alpha=6, targets=["q_proj", "down_proj", "lm_head"]),
    "c": LoraConfig(r=3, alpha=3, targets=["embed_tokens", "v_proj"]),
    "dora": DoraConfig(r=3, targets=["q_proj"]),
    "ia3": IA3Config(),
    "prefix": PrefixConfig(num_virtual_tokens=3),
    "whole": LoraConfig(r=2, targets=["q_proj"], modules_to_save=["lm_head", "norm"]),
}


@pytest.fixture
def folders(tiny_model, tmp_path):
    """Name -> adapter folder, with random values."""
    for index, (name, config) in enumerate(CONFIGS.items()):
        model = tiny_model()
        inject(model, config)
        torch.manual_seed(index)
        for parameter in stored_parameters(model).values():
            torch.nn.init.normal_(parameter, std=0.3)
        save_adapter(tmp_path / name, config, file_tensors(model), model=model)
    return {name: tmp_path / name for name in CONFIGS}


def loaded(model, folders, *names):
    residents = Residents(model)
    for name in names:
        load_resident(residents, name, folders[name])
    return residents


def assert_close(actual, expected):
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


@torch.no_grad()
def test_each_is_as_if_it_were_alone_and_the_base_keeps_its_bits(tiny_model, logits_of, folders):
    model = tiny_model()
    base, modules = logits_of(model, TOKENS), dict(model.named_modules())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    residents = loaded(model, folders, *CONFIGS)
    assert list(residents) == list(CONFIGS) and residents.active == ()
    for name in [*CONFIGS, "a", "dora", "prefix", "c"]:
        alone = tiny_model()
        load_adapter(alone, folders[name])
        with residents.using(name):
            assert torch.equal(logits_of(model, TOKENS), logits_of(alone, TOKENS)), name
    assert torch.equal(logits_of(model, TOKENS), base)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@torch.no_grad()
def test_stacked_and_disabled_as_in_peft(tiny_model, hf_llama, logits_of, folders):
    theirs = peft.PeftModel.from_pretrained(hf_llama(), folders["a"], "a")
    for name in ("b", "c"):
        theirs.load_adapter(folders[name], name)
    model = tiny_model()
    residents = loaded(model, folders, "a", "b", "c")
    for names in (["a", "b"], ["a", "b", "c"], ["c", "b"], ["b"]):
        theirs.base_model.set_adapter(names)
        residents.activate(*names)
        assert residents.active == tuple(names)
        assert_close(logits_of(model, TOKENS), theirs(TOKENS[None]).logits[0])
    with residents.using(), theirs.disable_adapter():
        assert_close(logits_of(model, TOKENS), theirs(TOKENS[None]).logits[0])
    assert residents.active == ("b",)


@torch.no_grad()
@pytest.mark.parametrize("nf4", [False, True])
def test_stacks_merge_and_come_back(tiny_model, logits_of, folders, nf4):
    model = tiny_model()
    if nf4:
        for name, module in list(model.named_modules()):
            if name.endswith("_proj"):
                sizes = (module.in_features, module.out_features)
                like = NF4Linear(*sizes, False, 64, True, torch.float32, torch.device("meta"))
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, like.storing(module.weight))
    base = logits_of(model, TOKENS)
    residents = loaded(model, folders, "a", "b")
    residents.activate("a", "b")
    stacked = logits_of(model, TOKENS)
    alone = {}
    for name in "ab":
        with residents.using(name):
            alone[name] = logits_of(model, TOKENS)
    assert all((stacked - other).abs().max() > 0.01 * base.abs().max() for other in (base, *alone.values()))
    report = merge_all(model)
    assert report.lost_ratio < 1e-6 and len(report.drifts) == len(adapter_modules(model))
    assert_close(logits_of(model, TOKENS), stacked)
    for change in (lambda: residents.activate("a"), lambda: load_resident(residents, "c", folders["c"])):
        with pytest.raises(ValueError, match="is merged into the weights, so nothing can be switched"):
            change()
    with pytest.raises(ValueError, match="nothing can be swapped"):
        load_resident(residents, "a", folders["a"], swap=True)
    unmerge_all(model)
    assert torch.equal(logits_of(model, TOKENS), stacked)
    residents.activate()
    assert torch.equal(logits_of(model, TOKENS), base)


@torch.no_grad()
def test_a_hot_swap_is_in_place_and_seen_at_once(tiny_model, logits_of, folders, tmp_path):
    other = tiny_model()
    inject(other, CONFIGS["a"], seed=9)
    for parameter in stored_parameters(other).values():
        torch.nn.init.normal_(parameter, std=0.4)
    save_adapter(tmp_path / "new a", CONFIGS["a"], file_tensors(other))

    model = tiny_model()
    residents = loaded(model, folders, "a", "b")
    residents.activate("a")
    addresses = {name: parameter.data_ptr() for name, parameter in residents["a"].tensors()}
    load_resident(residents, "a", tmp_path / "new a", swap=True)
    assert {name: parameter.data_ptr() for name, parameter in residents["a"].tensors()} == addresses
    assert residents.active == ("a",)
    assert torch.equal(logits_of(model, TOKENS), logits_of(other, TOKENS))

    before = copy.deepcopy(dict(residents["a"].tensors()))
    save_adapter(tmp_path / "damaged", CONFIGS["a"], file_tensors(other))
    damaged = tmp_path / "damaged" / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    narrower = LoraConfig(r=4, alpha=8, targets=["q_proj"])
    smaller = tiny_model()
    inject(smaller, narrower)
    save_adapter(tmp_path / "narrower", narrower, file_tensors(smaller))
    for folder, sentence in [
        (folders["b"], "has r 4 and the adapter to swap in has 2"),
        (folders["ia3"], "has method 'lora' and the adapter to swap in has 'ia3'"),
        (tmp_path / "narrower", "has other modules or shapes than 'a'"),
        (tmp_path / "damaged", "not a whole safetensors file"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            load_resident(residents, "a", folder, swap=True)
        assert all(torch.equal(parameter, before[name]) for name, parameter in residents["a"].tensors())
        assert torch.equal(logits_of(model, TOKENS), logits_of(other, TOKENS))


def test_a_new_one_can_be_trained_beside_the_others(tiny_model, logits_of, folders):
    model = tiny_model()
    residents = loaded(model, folders, "a")
    residents.add("new", LoraConfig(r=2, targets=["o_proj"]))
    with residents.using("new"):
        logits_of(model, TOKENS).square().sum().backward()
        trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert trained == {name for name, _ in residents["new"].tensors()}
    assert all(parameter.grad is None for _, parameter in residents["a"].tensors())


def test_what_cannot_be_is_refused_by_name_and_changes_nothing(tiny_model, logits_of, folders):
    model = tiny_model()
    residents = loaded(model, folders, "a", "dora")
    residents.add("bias", BitFitConfig(targets=["q_proj"]))
    residents.activate("a")
    expected = logits_of(model, TOKENS)
    for change, sentence in [
        (lambda: residents.activate("x"), "no adapter 'x'; valid: a, dora, bias"),
        (lambda: residents.activate("a", "a"), "named twice"),
        (lambda: residents.activate("a", "dora"), "both adapt q_proj, and DoraLinear does more than add"),
        (lambda: residents.activate("bias", "a"), "BitFitLinear does more than add"),
        (lambda: residents.remove("a"), "'a' is active"),
        (lambda: residents.remove("x"), "no adapter 'x'"),
        (lambda: residents.add("a", CONFIGS["a"]), "'a' is taken"),
        (lambda: residents.add("y", LoraConfig(targets=["nowhere"])), "'nowhere' matches none"),
        (lambda: residents.add("y", PissaConfig(r=2)), "pissa takes its initial values out of .* valid: lora here, or"),
        (lambda: residents.add("y", LoraGaConfig(r=2)), "lora_ga takes its initial values out of the base"),
        (lambda: load_resident(residents, "y", folders["a"] / "gone"), "not a PEFT adapter folder"),
        (lambda: Residents(model), "has an adapter already"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            change()
        assert residents.active == ("a",) and list(residents) == ["a", "dora", "bias"]
        assert torch.equal(logits_of(model, TOKENS), expected)
    residents.activate()
    residents.remove("a")
    assert list(residents) == ["dora", "bias"] and not adapter_modules(model)
