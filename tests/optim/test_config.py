from __future__ import annotations

import math
import re

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from minift.optim.config import OptimConfig


@pytest.mark.parametrize(
    "field, value",
    [
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", "2e-4"),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("betas", 0.9),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("no_decay", "bias"),
        ("no_decay", ("(",)),
        ("lr_ratios", {"lora_B": -1.0}),
        ("lr_ratios", {"[": 1.0}),
        ("schedule", "step"),
        ("warmup_steps", 1.5),
        ("warmup_steps", -1),
        ("min_lr_ratio", 1.1),
        ("max_grad_norm", 0.0),
        ("rounding_seed", 0.5),
        ("state", "int8"),
        ("paged", "yes"),
    ],
)
def test_an_invalid_field_is_named_with_its_value_and_what_is_valid(field, value):
    with pytest.raises(ValueError, match=rf"optim\.{field} is {re.escape(repr(value))}; valid: \w+"):
        OptimConfig(**{field: value})


def test_default_exempts_norms_and_biases_from_decay():
    config = OptimConfig(weight_decay=0.1)
    for name in ("model.layers.0.input_layernorm.weight", "model.norm.weight", "layers.0.q_norm.weight", "q_proj.bias"):
        assert config.decay(name) == 0.0
    for name in ("model.embed_tokens.weight", "q_proj.lora_A.weight", "normalizer.weight"):
        assert config.decay(name) == 0.1


def test_the_first_matching_ratio_counts():
    config = OptimConfig(lr_ratios={r"layers\.0\..*lora_B": 4.0, "lora_B": 16.0})
    assert config.lr_ratio("layers.0.q_proj.lora_B.weight") == 4.0
    assert config.lr_ratio("layers.1.q_proj.lora_B.weight") == 16.0
    assert config.lr_ratio("layers.1.q_proj.lora_A.weight") == 1.0


@pytest.mark.parametrize("patterns", [("lora_b",), ("lora_B", "q_proj.lora_B")], ids=["misspelt", "shadowed"])
def test_a_ratio_that_decides_nothing_is_refused(patterns):
    config = OptimConfig(lr_ratios=dict.fromkeys(patterns, 2.0))
    with pytest.raises(ValueError, match=f"{patterns[-1]}.*q_proj.lora_A"):
        config.check_names(["q_proj.lora_A.weight", "q_proj.lora_B.weight"])


NAMES = [
    *(f"model.layers.{layer}.{ending}" for layer in range(12) for ending in ("mlp.up_proj.weight", "norm.weight")),
    "model.embed_tokens.weight",
]


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [("embed_token[.]", "embed_tokens.weight"), (r"norn\.weight$", "norm.weight"), ("up_porj", "up_proj.weight")],
)
def test_a_pattern_without_decay_that_finds_nothing_is_refused(pattern, nearest):
    config = OptimConfig(no_decay=("norm", pattern), lr_ratios={"up": 2.0})
    sentence = f"optim.no_decay has the pattern {pattern!r}, found in the name of no trainable parameter"
    with pytest.raises(ValueError, match=f"{re.escape(sentence)}; .*nearest: {re.escape(nearest)}"):
        config.check_names(NAMES)


def test_defaults_may_find_nothing():
    """They are for any model: biases there may be none, and under LoRA no norms that train."""
    OptimConfig().check_names(NAMES)
    OptimConfig(no_decay=(*OptimConfig.no_decay, "lora_B")).check_names(["q_proj.lora_B.weight"])


@pytest.mark.parametrize("pattern", ["norm", r"layers\.11\.", "^model[.]embed"])
def test_patterns_without_decay_that_find_something_are_accepted(pattern):
    OptimConfig(no_decay=(pattern,)).check_names(NAMES)


def test_ratios_that_decide_something_are_accepted():
    OptimConfig(lr_ratios={"lora_B": 2.0}).check_names(["q_proj.lora_A.weight", "q_proj.lora_B.weight"])


def test_lora_plus_is_peft_s():
    """Every parameter gets the rate that PEFT's optimizer gives it: Hayou et al. 2024, arXiv 2402.12354."""
    base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    rates = {parameter: group["lr"] for group in theirs.param_groups for parameter in group["params"]}
    ours = OptimConfig(lr=1e-3, lr_ratios={"lora_B": 16.0})
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 4
    assert {name: ours.lr * ours.lr_ratio(name) for name in trainable} == {n: rates[p] for n, p in trainable.items()}
