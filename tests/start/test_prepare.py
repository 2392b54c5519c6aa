"""PiSSA, LoRA-GA and ranks by spectrum, from the settings to the exported adapter.

Oracles: PEFT, for initial values, for files both ways; whole gradients by autograd; the base model's loss.
"""

from __future__ import annotations

import copy
import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora.config import LoraGAConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from minift.build import ModelSource, build_model
from minift.checkpoint.adapters import load_adapter, load_resident, read_config
from minift.checkpoint.initial import InitialAdapter, ResidualWeights
from minift.checkpoint.merge import merge_adapter
from minift.checkpoint.quantize import quantize_folder
from minift.config import RunConfig
from minift.dist.process import World
from minift.fsdp import ShardPolicy
from minift.inference import load_assistant, measure_loss
from minift.metrics import read_metrics
from minift.model.decoder import CausalLM
from minift.model.hf import load_config
from minift.objectives.sft import SupervisedTokens
from minift.peft.dora import DoraConfig
from minift.peft.inject import adapters, inject
from minift.peft.lora import LoraConfig
from minift.peft.lora_ga import LoraGaConfig
from minift.peft.pissa import PissaConfig
from minift.peft.resident import Residents
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.quant.model import load_model
from minift.quant.weights import QuantWeights, quantize_for
from minift.recompute import RecomputeConfig
from minift.start import gradients
from minift.start.prepare import prepare_start
from minift.trace import Recorder
from tests.ranks import run_ranks
from tests.start.first_batches import first_steps, whole_gradients
from tests.test_train import config_for, losses, run
from tests.tiny import write_conversations, write_inputs, write_model

ALONE = World(0, 1, 0, torch.device("cpu"), "gloo", None)
FP32 = Precision(wire="float32")
TOKENS = torch.arange(13) * 3
LOGIT_TOLERANCE = 2e-5  # fp32 through two blocks, of the largest logit


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    write_conversations(folder / "heldout.jsonl", 5)
    return folder


def prepared(
    folder: Path, base: Path, config: LoraConfig, world: World = ALONE, wire: str = "float32",
    quant: QuantConfig | None = None,
) -> InitialAdapter:
    return prepare_start(
        folder, config, first_steps(world), source=ModelSource(str(base)), quant=quant, objective=SupervisedTokens(),
        precision=Precision(wire=wire), recompute=RecomputeConfig(), world=world, seed=0,
    )  # fmt: skip


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        if not isinstance(model, CausalLM):
            return model(TOKENS[None]).logits[0]
        count = len(TOKENS)
        bounds = torch.tensor([0, count], dtype=torch.int32)
        return model(TOKENS, torch.arange(count), bounds, count, head=lambda hidden, lm_head: lm_head(hidden))


def assert_close_logits(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= LOGIT_TOLERANCE * expected.abs().max()


def hf_model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# Initial values #


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_as_peft_does(tmp_path: Path, rslora: bool) -> None:
    """Up to signs, so products are compared. With twice 12 columns of at most 24 nothing is approximate."""
    base, targets = write_model(tmp_path / "base"), ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    initial = prepared(tmp_path / "start", base, PissaConfig(r=12, alpha=18.0, rslora=rslora, targets=targets))
    config = peft.LoraConfig(
        r=12, lora_alpha=18, use_rslora=rslora, target_modules=targets, init_lora_weights="pissa",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(hf_model(base), config)
    for name in (name.removesuffix(".lora_A.weight") for name in initial.names() if name.endswith("lora_A.weight")):
        module = theirs.get_submodule(f"base_model.model.{name}")
        A, B = initial.read(f"{name}.lora_A.weight"), initial.read(f"{name}.lora_B.weight")
        expected = module.lora_B["default"].weight @ module.lora_A["default"].weight
        assert (B @ A - expected).norm() <= 1e-5 * expected.norm(), name
        assert torch.allclose(A.norm(dim=1), module.lora_A["default"].weight.norm(dim=1), rtol=1e-4)


def test_lora_ga_starts_along_peft_s_singular_vectors(tmp_path: Path) -> None:
    """What PEFT does to their lengths is its own (see lora_ga.py)."""
    base, rank = write_model(tmp_path / "base", tied=False), 5
    initial = prepared(tmp_path / "start", base, LoraGaConfig(r=rank, gamma=4, targets=["q_proj", "down_proj"]))
    theirs, gradients = hf_model(base), whole_gradients(base)
    config = peft.LoraConfig(
        r=rank, target_modules=["q_proj", "down_proj"], init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction="ArB2r"), task_type="CAUSAL_LM",
    )  # fmt: skip
    for name, module in theirs.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            module._peft_loraga_grad = gradients[f"{name}.weight"].clone()
    adapted = peft.get_peft_model(theirs, config)
    for layer in range(2):
        for name in (f"model.layers.{layer}.self_attn.q_proj", f"model.layers.{layer}.mlp.down_proj"):
            module = adapted.get_submodule(f"base_model.model.{name}")
            A, B = initial.read(f"{name}.lora_A.weight"), initial.read(f"{name}.lora_B.weight")
            length = len(B) ** 0.25 / 2.0
            assert torch.allclose(A.norm(dim=1), torch.full((rank,), length), rtol=1e-4)
            assert torch.allclose(B.norm(dim=0), torch.full((rank,), length), rtol=1e-4)
            for ours, other in ((A, module.lora_A["default"].weight), (B.T, module.lora_B["default"].weight.T)):
                cosines = torch.nn.functional.cosine_similarity(ours, other).abs()
                # Both are approximations; where two singular values are close, the vectors mix.
                assert cosines.mean() > 0.95, name


# The first step #


def first_step(world: World, folder: Path, base: Path, config: LoraConfig) -> dict[str, Tensor]:
    """{projection: change of its weight in a first step of gradient descent, without the learning rate}."""
    initial = prepared(folder, base, config, world) if isinstance(config, LoraGaConfig) else None
    built = build_model(
        ModelSource(str(base)), config, precision=FP32, recompute=RecomputeConfig(), policy=ShardPolicy(),
        recorder=Recorder(world.rank, world.device), world=world, seed=0, initial=initial,
    )  # fmt: skip
    values = {name: tensor.clone() for name, tensor in built.engine.full_tensors(trainable_only=True)}
    objective = SupervisedTokens()
    for microbatches in first_steps(world):
        weight = sum(batch.num_targets for batch in microbatches)
        for batch in microbatches:
            (objective(built.module, batch).loss_sum / weight).backward()
    for bucket in built.engine.buckets:
        if bucket.trainable:
            bucket.shard.copy_(bucket.grad)
    built.engine.weights_changed()
    gradients = dict(built.engine.full_tensors(trainable_only=True))
    changes = {}
    for name, module in adapters(built.module).items():
        A, B = (values[f"{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
        dA, dB = (gradients[f"{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
        changes[name] = -module.scale * (dB @ A + B @ dA)
    return changes


def test_the_first_step_of_lora_ga_goes_along_the_gradient(tmp_path: Path) -> None:
    """In every layer nearer to it than LoRA's, and as near as rank 2r can be."""
    base, rank = write_model(tmp_path / "base", tied=False), 4
    (ours,) = run_ranks(1, first_step, tmp_path / "start", base, LoraGaConfig(r=rank, alpha=8.0))
    (random,) = run_ranks(1, first_step, tmp_path / "start", base, LoraConfig(r=rank, alpha=8.0))
    gradients = whole_gradients(base)
    assert len(ours) == 14
    for name, change in ours.items():
        direction = -gradients[f"{name}.weight"].flatten()
        cosine, cosine_of_random = (
            torch.nn.functional.cosine_similarity(step.flatten(), direction, dim=0)
            for step in (change, random[name])
        )
        values = torch.linalg.svdvals(gradients[f"{name}.weight"])
        assert cosine > cosine_of_random, name
        assert cosine >= 0.98 * values[: 2 * rank].norm() / values.norm(), name


# Whole runs #


METHODS = {
    "pissa": PissaConfig(r=4, alpha=8.0),
    "pissa, rslora": PissaConfig(r=3, alpha=5, rslora=True, rank_pattern={"q_proj": 5}, alpha_pattern={"up_proj": 2}),
    "lora_ga": LoraGaConfig(r=4, alpha=8.0, targets=["q_proj", "v_proj", "down_proj"]),
    "lora_ga, allocated": LoraGaConfig(r=3, alpha=6.0, allocate="gradients"),
    "lora, allocated": LoraConfig(r=3, alpha=6.0, allocate="weights"),
    "dora, allocated": DoraConfig(r=3, alpha=6.0, allocate="gradients"),
}


def config_of(inputs: Path, run_dir: Path, method: str, quant: QuantConfig | None = None) -> RunConfig:
    made = config_for(inputs, run_dir, epochs=2.0, validate_every_steps=6)
    return replace(made, adapter=METHODS[method], quant=quant)


def loss_of(config: RunConfig, inputs: Path, base: Path, *adapters: Path, quant: QuantConfig | None = None) -> float:
    """On what a run validates on."""
    assistant = load_assistant(
        str(base), [str(adapter) for adapter in adapters], template="chatml", dtype=torch.float32, quant=quant
    )
    return measure_loss(assistant, replace(config.data, train=(str(inputs / "heldout.jsonl"),)), 256, ALONE)["loss"]


@pytest.mark.parametrize("method", METHODS)
def test_runs_stop_resume_and_export_for_the_original_base(inputs: Path, tmp_path: Path, method: str) -> None:
    """On two ranks. The first loss is the base model's; what PEFT and minift load has the loss that was validated."""
    run_ranks(2, run, config_of(inputs, tmp_path / "straight", method))
    run_ranks(2, run, config_of(inputs, tmp_path / "stopped", method), 3)
    run_ranks(2, run, config_of(inputs, tmp_path / "stopped", method))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")

    base, folder = str(inputs / "model"), tmp_path / "straight" / "export" / "adapter"
    _, validation = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    data = replace(config_of(inputs, tmp_path, method).data, train=(str(inputs / "heldout.jsonl"),))
    for folders, index in (([], 0), ([str(folder)], -1)):
        assistant = load_assistant(base, folders, template="chatml", dtype=torch.float32)
        loss = measure_loss(assistant, data, 256, ALONE)["loss"]
        assert loss == pytest.approx(validation[index]["validation_loss"], rel=1e-5)
    theirs = peft.PeftModel.from_pretrained(hf_model(inputs / "model"), folder).eval()
    assert_close_logits(logits_of(assistant.model), logits_of(theirs))


@pytest.mark.parametrize("method", ["lora_ga", "lora_ga, allocated", "pissa, rslora"])
def test_runs_over_a_base_in_4_bits(inputs: Path, tmp_path: Path, method: str) -> None:
    """On two ranks. LoRA-GA leaves the base as it is, so its export is for that; PiSSA exports the base that it made,
    for which no other is taken."""
    model, quant = inputs / "model", QuantConfig()
    config = config_of(inputs, tmp_path / "run", method, quant)
    run_ranks(2, run, config_of(inputs, tmp_path / "straight", method, quant))
    run_ranks(2, run, config, 3)
    run_ranks(2, run, config)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    _, validation = read_metrics(tmp_path / "run" / "metrics.jsonl")
    before, after = (validation[index]["validation_loss"] for index in (0, -1))
    adapter, base = tmp_path / "run" / "export" / "adapter", tmp_path / "run" / "export" / "base"
    report = (tmp_path / "run" / "report.md").read_text()
    if method.startswith("lora_ga"):
        assert not base.exists()
        assert loss_of(config, inputs, model, quant=quant) == pytest.approx(before, rel=1e-5)
        assert loss_of(config, inputs, model, adapter, quant=quant) == pytest.approx(after, rel=1e-5)
        return
    assert loss_of(config, inputs, base, adapter) == pytest.approx(after, rel=1e-5)
    assert f"--model {base} --adapter {adapter}" in report
    merge_adapter(base, adapter, tmp_path / "merged")
    assert loss_of(config, inputs, tmp_path / "merged") == pytest.approx(after, rel=1e-5)
    theirs = peft.PeftModel.from_pretrained(hf_model(base), adapter).train()  # eval: bitsandbytes wants larger weights
    ours = load_assistant(str(base), [str(adapter)], template="chatml", dtype=torch.float32).model
    assert_close_logits(logits_of(ours), logits_of(theirs))
    quantize_folder(model, tmp_path / "nf4", quant)
    for other, way in ((model, None), (model, quant), (tmp_path / "nf4", None)):
        with pytest.raises(ValueError, match="was trained on another base"):
            load_assistant(str(other), [str(adapter)], template="chatml", dtype=torch.float32, quant=way)


def test_lora_ga_over_a_folder_in_4_bits(inputs: Path, tmp_path: Path) -> None:
    """Is LoRA-GA over the same weights, quantised on the way."""
    quantize_folder(inputs / "model", tmp_path / "nf4", QuantConfig())
    on_the_way = config_of(inputs, tmp_path / "on the way", "lora_ga", QuantConfig())
    stored = replace(on_the_way, run_dir=str(tmp_path / "stored"), quant=None, model=ModelSource(str(tmp_path / "nf4")))
    for config in (on_the_way, stored):
        run_ranks(1, run, config, 3)
    assert losses(tmp_path / "stored") == losses(tmp_path / "on the way")


@pytest.mark.parametrize("quant", [QuantConfig(), QuantConfig(block_size=32, double_quant=False, skip=("down_proj",))])
def test_what_pissa_leaves_loses_less_in_4_bits(tmp_path: Path, quant: QuantConfig) -> None:
    """The paper's claim, on weights whose singular values fall as those of real ones do: in every projection
    nf4(W - s B A) + s B A is nearer to W than nf4(W) is."""
    base = write_model(tmp_path / "base", hidden_size=96, intermediate_size=128)
    tensors = load_file(base / "model.safetensors")
    for name in tensors:
        if name.endswith("_proj.weight"):
            U, S, Vt = torch.linalg.svd(tensors[name], full_matrices=False)
            tensors[name] = U @ torch.diag(S[0] / torch.arange(1, len(S) + 1)) @ Vt
    save_file(tensors, base / "model.safetensors")
    config = PissaConfig(r=8, alpha=4.0)
    initial = prepared(tmp_path / "start", base, config, quant=quant)
    with torch.device("meta"):
        model = CausalLM(load_config(base))
    dense, residual = QuantWeights(base), ResidualWeights(base, initial)
    quantized = quantize_for(model, dense, quant)
    assert len(quantized) == 14 - 2 * len(quant.skip)
    for name, linear in quantized.items():
        weight = dense.read(f"{name}.weight")
        A, B = (initial.read(f"{name}.lora_{factor}.weight") for factor in "AB")
        start = residual.trained_weight(name, linear) + config.scale(name) * B @ A
        assert (start - weight).norm() < 0.9 * (dense.trained_weight(name, linear) - weight).norm(), name


@pytest.mark.parametrize("allocate", ["weights", "gradients"])
def test_allocated_ranks_take_no_more_than_even_ones(tmp_path: Path, allocate: str) -> None:
    base, config = write_model(tmp_path / "base"), LoraConfig(r=3, alpha=6.0, allocate=allocate)
    found = prepared(tmp_path / "start", base, config).config
    model, even = load_model(base, None, torch.float32), load_model(base, None, torch.float32)
    budget = sum(even.get_parameter(name).numel() for name in inject(even, LoraConfig(r=3)))
    used = sum(model.get_parameter(name).numel() for name in inject(model, found))
    cheapest = min(module.in_features + module.out_features for module in adapters(model).values())
    assert budget - cheapest < used <= budget
    assert {module.scale for module in adapters(model).values()} == {2.0}
    ranks = found.rank_pattern.values()
    assert len(set(ranks)) > 1
    assert min(ranks) >= 1 and max(ranks) <= 12


def test_allocated_ranks_can_be_exported(tmp_path: Path) -> None:
    """With twice the rank, which must fit the narrowest projection, too."""
    base, config = write_model(tmp_path / "base"), PissaConfig(r=3, targets=["k_proj", "up_proj"], allocate="weights")
    found = prepared(tmp_path / "start", base, config).config
    inject(load_model(base, None, torch.float32), found.original_config())
    assert max(rank for name, rank in found.rank_pattern.items() if "k_proj" in name) == 4


def test_the_model_that_gave_gradients_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the one that is trained is loaded beside it, whenever the next collection would have been."""
    built = []

    def watched(*args, **settings):
        model = build_model(*args, **settings)
        built.extend([weakref.ref(model.engine), weakref.ref(model.module)])
        return model

    monkeypatch.setattr(gradients, "build_model", watched)
    gc.disable()
    try:
        prepared(tmp_path / "start", write_model(tmp_path / "base"), LoraGaConfig(r=2, targets=["q_proj"]))
        assert [reference() for reference in built] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("method", ["pissa", "lora_ga"])
def test_any_number_of_ranks_starts_alike(inputs: Path, tmp_path: Path, method: str) -> None:
    """Up to the order of sums, which the decomposition passes on."""
    factors = []
    for world_size in (1, 2, 3):
        run_dir = tmp_path / f"on{world_size}"
        run_ranks(world_size, run, config_of(inputs, run_dir, method), 1)
        factors.append(load_file(run_dir / "start" / "factors.safetensors"))
    for name, values in factors[0].items():
        for other in factors[1:]:
            assert torch.allclose(values, other[name], rtol=0, atol=2e-3 * values.abs().max()), name


@pytest.mark.parametrize("init", ["pissa", "lora_ga"])
def test_an_adapter_that_peft_has_trained_and_converted_is_read(tmp_path: Path, init: str) -> None:
    base = write_model(tmp_path / "base", tied=False)
    theirs = hf_model(base)
    for name, module in theirs.named_modules():
        if name.endswith("_proj"):
            module._peft_loraga_grad = whole_gradients(base)[f"{name}.weight"].clone()
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=init,
        lora_ga_config=LoraGAConfig() if init == "lora_ga" else None, task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = peft.get_peft_model(theirs, copy.deepcopy(config)).eval()
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "initial")
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    expected = logits_of(adapted)
    adapted.peft_config["default"].init_lora_weights = init
    adapted.save_pretrained(tmp_path / "trained", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    model = load_model(base, None, torch.float32).eval()
    load_adapter(model, tmp_path / "trained")
    assert_close_logits(logits_of(model), expected)


# What cannot work #


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraGaConfig(r=5), "rank 5 is more than .*k_proj can have with lora_ga.* valid: r of at most 4"),
        (PissaConfig(r=5), "rank 5 is more than .*k_proj can have with pissa.* valid: r of at most 4"),
        (PissaConfig(r=2, targets=["lm_head"]), "lm_head has no weight of its own"),
        (LoraGaConfig(r=2, targets=["lm_head"]), "lm_head has no weight of its own"),
    ],
)
def test_refused(tmp_path: Path, config: LoraConfig, message: str) -> None:
    base = write_model(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        prepare_start(
            tmp_path / "start", config, first_steps(ALONE), source=ModelSource(str(base)), quant=None,
            objective=SupervisedTokens(), precision=FP32, recompute=RecomputeConfig(), world=ALONE, seed=0,
        )  # fmt: skip


def test_refused_settings() -> None:
    with pytest.raises(ValueError, match="allocate is weights and rank_pattern is"):
        LoraConfig(allocate="weights", rank_pattern={"q_proj": 3})
    with pytest.raises(ValueError, match="gamma is 0.0"):
        LoraGaConfig(gamma=0.0)
    with pytest.raises(ValueError, match="gradient_steps is 0"):
        LoraConfig(gradient_steps=0)


def test_pissa_over_what_cannot_be_quantised_anew_or_written_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file format has shifted blocks; valid: quant.icq false"):
        config_of(inputs, tmp_path, "pissa", QuantConfig(icq=True))
    quantize_folder(inputs / "model", tmp_path / "nf4", QuantConfig())
    with pytest.raises(ValueError, match="is stored in 4 bits, and pissa is to quantise .* valid: the folder of the"):
        prepared(tmp_path / "start", tmp_path / "nf4", PissaConfig(r=2))


def test_a_model_that_is_in_memory_already_is_refused(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path / "base"), None, torch.float32)
    modules = list(model.modules())
    with pytest.raises(ValueError, match="pissa takes its initial values out of the base, and .* valid: lora here, or"):
        inject(model, PissaConfig(r=2))
    assert list(model.modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_run_whose_start_is_gone_does_not_go_on(inputs: Path, tmp_path: Path) -> None:
    run_ranks(1, run, config_of(inputs, tmp_path / "run", "pissa"), 2)
    (tmp_path / "run" / "start" / "ranks.json").unlink()
    with pytest.raises(RuntimeError, match="which says how this run's base was changed"):
        run_ranks(1, run, config_of(inputs, tmp_path / "run", "pissa"))


def test_what_is_exported_is_lora_of_twice_the_rank(inputs: Path, tmp_path: Path) -> None:
    run_ranks(1, run, config_of(inputs, tmp_path / "run", "pissa, rslora"))
    folder = tmp_path / "run" / "export" / "adapter"
    assert type(read_config(folder)) is LoraConfig
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert fields["r"] == 6 and fields["rank_pattern"] == {"q_proj": 10}
    assert fields["lora_alpha"] == pytest.approx(5.0 * 2**0.5) and fields["init_lora_weights"] is True
    residents = Residents(load_model(inputs / "model", None, torch.float32))
    load_resident(residents, "pissa", folder)
    residents.activate("pissa")
