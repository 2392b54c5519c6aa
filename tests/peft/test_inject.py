"""Who is wrapped, who is trained, and that initial values depend on seed and name alone."""

from __future__ import annotations

import math

import pytest
import torch

from minift.model.decoder import CausalLM
from minift.peft.adapter import Adapter
from minift.peft.dora import DoraConfig
from minift.peft.ia3 import IA3Config
from minift.peft.inject import adapter_parameters, adapters, init_tensor, inject, named_generator, stored_parameters
from minift.peft.lora import LoraConfig
from minift.quant.linear import QuantConfig, projections_to_quantize, quantize_linears

PROJECTIONS = [
    f"model.layers.{i}.{m}"
    for i in range(2)
    for m in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
              "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
]  # fmt: skip
TOKENS = torch.arange(9)


def with_factors(modules):
    return [f"{module}.{factor}.weight" for module in modules for factor in ("lora_A", "lora_B")]


@pytest.mark.parametrize(
    ("config", "modules"),
    [
        (LoraConfig(r=8), PROJECTIONS),
        (LoraConfig(r=8, targets=["q_proj", "v_proj"]), [m for m in PROJECTIONS if m.endswith(("q_proj", "v_proj"))]),
        (LoraConfig(r=8, targets=r"model\.layers\.1\.mlp\..*"), PROJECTIONS[11:]),
        (LoraConfig(targets=["lm_head"]), ["lm_head"]),
        (LoraConfig(r=8, exclude=["down_proj"]), [m for m in PROJECTIONS if not m.endswith("down_proj")]),
    ],
)
def test_trainable_names_are_exactly_the_adapters(tiny_model, config, modules):
    model = tiny_model()
    trainable = inject(model, config)
    assert sorted(trainable) == sorted(with_factors(modules))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert list(adapter_parameters(model)) == trainable
    assert sorted(adapters(model)) == sorted(modules)


def test_first_forward_is_the_base_model_and_only_adapters_get_gradients(tiny_model, logits_of):
    model = tiny_model()
    before = logits_of(model, TOKENS)
    names = inject(model, LoraConfig(targets=["q_proj", "up_proj", "lm_head"]))
    after = logits_of(model, TOKENS)
    assert torch.equal(before, after)
    after.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == names
    grads = {name: p.grad.abs().max() for name, p in model.named_parameters() if p.grad is not None}
    assert all((grad > 0) == ("lora_B" in name) for name, grad in grads.items()), "B moves first, A after it"


def test_refuses_a_second_injection_and_leaves_the_model_alone_on_error(tiny_model):
    model = tiny_model()
    too_much = r"rank 9 is more than .*k_proj can have with (lo|do)ra, going from 16 to 8; valid: r of at most 8"
    for config, message in (
        (LoraConfig(targets=["q_projj"]), "matches none"),
        (LoraConfig(rank_pattern={"o_porj": 2}), "matches none"),
        (LoraConfig(r=9), too_much),
        (DoraConfig(r=9), too_much),
        (IA3Config(targets=["k_proj"]), "feedforward: 'down_proj' matches none"),
    ):
        with pytest.raises(ValueError, match=message):
            inject(model, config)
        assert not adapters(model)
        assert all(p.requires_grad for p in model.parameters())
    inject(model, LoraConfig(r=8))
    with pytest.raises(ValueError, match="adapters already"):
        inject(model, LoraConfig(targets=["lm_head"]))


def test_modules_to_save_are_trained_whole(tiny_model):
    model = tiny_model()
    config = LoraConfig(r=2, targets=["q_proj"], modules_to_save=["lm_head", "layers.0.mlp", "model.norm"])
    trainable = inject(model, config)
    whole = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    whole += ["model.norm.weight", "lm_head.weight"]
    expected = [*with_factors(f"model.layers.{i}.self_attn.q_proj" for i in range(2)), *whole]
    assert sorted(trainable) == sorted(expected)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert list(adapter_parameters(model)) == [name for name in trainable if "lora" in name]
    assert sorted(stored_parameters(model)) == sorted(expected)


@pytest.mark.parametrize(
    ("tied", "quant", "config", "message"),
    [
        (True, None, LoraConfig(r=2, modules_to_save=["lm_head"]), "lm_head is in modules_to_save, but shares its"),
        (True, None, LoraConfig(r=2, modules_to_save=["embed_tokens"]), "embed_tokens is .* but shares its weight"),
        (False, None, LoraConfig(r=2, modules_to_save=["layers.1.mlp"]), "1.mlp is .* and model.layers.1.mlp.gate"),
        (False, None, LoraConfig(r=2, modules_to_save=["q_proj"]), "q_proj is in modules_to_save and .*q_proj gets an"),
        (False, None, LoraConfig(r=2, modules_to_save=["lm_haed"]), "modules_to_save: .lm_haed. matches none"),
        (False, QuantConfig(), IA3Config(modules_to_save=["o_proj"]), "o_proj is .*, but codes is held in 4 bits"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(tiny_model, tied, quant, config, message):
    model = tiny_model(tied)
    if quant is not None:
        names = projections_to_quantize(model, ())
        quantize_linears(model, dict.fromkeys(names, torch.float32), quant)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        inject(model, config)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_all_linear_leaves_the_embedding_alone(tiny_model):
    for targets in ("all-linear", "ALL-Linear"):
        model = tiny_model()
        assert sorted(inject(model, LoraConfig(r=2, targets=targets))) == sorted(with_factors(PROJECTIONS))
    model = tiny_model()
    names = inject(model, LoraConfig(r=2, targets=".*(tokens|head)"))
    assert names == [f"model.embed_tokens.lora_embedding_{f}" for f in "AB"] + with_factors(["lm_head"])
    with pytest.raises(ValueError, match="matches none"):
        inject(tiny_model(), DoraConfig(r=2, targets=["embed_tokens"]))


def test_ranks_and_scales_follow_patterns(tiny_model):
    model = tiny_model()
    inject(model, LoraConfig(r=4, alpha=8, rslora=True, rank_pattern={r"layers\.1.*q_proj": 9, "q_proj": 2},
                             alpha_pattern={"q_proj": 3}))  # fmt: skip
    found = {name: (a.lora_A.weight.shape[0], a.lora_B.weight.shape[1], a.scale) for name, a in adapters(model).items()}
    assert found["model.layers.0.self_attn.q_proj"] == (2, 2, 3 / math.sqrt(2))
    assert found["model.layers.1.self_attn.q_proj"] == (9, 9, 1.0)
    assert found["model.layers.0.mlp.up_proj"] == (4, 4, 4.0)


def test_initial_values_depend_on_seed_and_name_only(tiny_model):
    model = tiny_model()
    names = inject(model, LoraConfig(r=4), seed=3)
    with torch.device("meta"):
        meta = CausalLM(model.config)
    assert inject(meta, LoraConfig(r=4), seed=99) == names
    torch.manual_seed(12345)
    for name in reversed(names):  # on meta, in another order, with another global state
        assert torch.equal(init_tensor(meta, name, seed=3), model.get_parameter(name))
        assert meta.get_parameter(name).is_meta
    a_names = [name for name in names if "lora_A" in name]
    assert len({init_tensor(meta, name, seed=3).sum().item() for name in a_names}) == len(a_names)
    assert not torch.equal(init_tensor(meta, a_names[0], seed=4), init_tensor(meta, a_names[0], seed=3))
    with pytest.raises(ValueError, match="not a parameter of an adapter"):
        init_tensor(meta, "model.norm.weight", seed=0)


def test_the_generator_is_stable_across_processes_and_versions():
    """People quote seeds, so this stream must not change. `printf '0\\0a' | sha256sum` begins with these bytes."""
    assert named_generator(0, "a").initial_seed() == int.from_bytes(bytes.fromhex("5f1aa0c8dad9dc73"), "little")
    assert named_generator(0, "a").initial_seed() != named_generator(1, "a").initial_seed()


def test_initial_distribution_is_peft_s():
    """A uniform in ±1/sqrt(in), B zero. Kaiming with a = sqrt(5) has exactly this bound; the largest of 64k uniforms is
    within 1e-3 of it except with probability (1 - 1e-3)^64k < 1e-27."""
    with torch.device("meta"):
        from minift.model.linear import Linear

        base = Linear(1024, 64)
    adapter: Adapter = LoraConfig(r=64).wrap("x", base, torch.float32, torch.device("meta"))
    A = adapter.init_parameter("lora_A.weight", named_generator(0, "x"))
    bound = 1 / math.sqrt(1024)
    reference = torch.empty_like(A)
    torch.nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
    assert A.shape == (64, 1024) and A.dtype == torch.float32
    for values in (A, reference):
        assert bound * (1 - 1e-3) < values.abs().max() <= bound
    assert adapter.init_parameter("lora_B.weight", named_generator(0, "x")).eq(0).all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"r": 0}, "rank r is 0"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank q_proj is 1.5"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": []}, "targets is"),
    ],
)
def test_refuses_settings(bad, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**bad)
