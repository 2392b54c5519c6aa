"""The merged folder against transformers with the adapter on top, and against PEFT's own merge.

Over NF4 bases: test_merge_nf4.py.
"""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from minift.checkpoint.adapters import file_tensors, save_adapter
from minift.checkpoint.merge import merge_adapter
from minift.model.config import ModelConfig
from minift.peft.bitfit import BitFitConfig
from minift.peft.bottleneck import BottleneckConfig
from minift.peft.dora import DoraConfig
from minift.peft.drift import WeightDrift
from minift.peft.ia3 import IA3Config
from minift.peft.inject import inject, stored_parameters
from minift.peft.lora import LoraConfig
from minift.quant.model import load_model
from tests.tiny import write_model

TOKENS = torch.arange(13)[None] * 3
TARGETS = ["q_proj", "o_proj", "down_proj"]


@pytest.fixture
def folders(tmp_path):
    """(dtype, tied, targets) -> (base folder, adapter folder, the PEFT model), with random A and B."""

    def make(dtype=torch.float32, tied=False, targets=TARGETS):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=tied,
        )  # fmt: skip
        base = LlamaForCausalLM(config).to(dtype).eval()
        base.save_pretrained(tmp_path / "base", max_shard_size="5KB")
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False,
            rank_pattern={r"layers\.1\.self_attn\.q_proj": 5},
        )  # fmt: skip
        model = peft.get_peft_model(base, settings).eval()
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter", model

    return make


def stored_tensors(folder):
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_the_merged_folder(folders, tmp_path, tied):
    base, adapter, model = folders(tied=tied)
    report = merge_adapter(base, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.dtype == torch.float32
    expected = model(TOKENS).logits
    # fp32 roundings through two blocks, relative to the largest logit
    assert (merged(TOKENS).logits - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert len(report.drifts) == 2 * len(TARGETS)
    assert all(drift.lost_ratio == 0.0 for drift in report.drifts), "the sum is fp32, and so is the file"


@torch.no_grad()
def test_only_targets_change_and_peft_merges_to_the_same(folders, tmp_path):
    base, adapter, model = folders()
    merge_adapter(base, adapter, tmp_path / "merged")
    ours, before = stored_tensors(tmp_path / "merged"), stored_tensors(base)
    theirs = model.merge_and_unload().state_dict()
    assert ours.keys() == before.keys()
    for name, tensor in ours.items():
        if any(target in name for target in TARGETS):
            assert not torch.equal(tensor, before[name])
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(tensor, before[name])


@torch.no_grad()
@pytest.mark.parametrize(
    ("base_dtype", "out_dtype"), [("bfloat16", None), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_rounds_once_from_fp32_and_reports_it(folders, tmp_path, base_dtype, out_dtype):
    base, adapter, _ = folders(getattr(torch, base_dtype))
    report = merge_adapter(base, adapter, tmp_path / "merged", out_dtype and getattr(torch, out_dtype))
    ours, before, factors = (stored_tensors(folder) for folder in (tmp_path / "merged", base, adapter))
    expected_dtype = getattr(torch, out_dtype or base_dtype)
    assert all(tensor.dtype == expected_dtype for tensor in ours.values())
    for drift in report.drifts:
        prefix = f"base_model.model.{drift.name.removesuffix('.weight')}"
        A, B = (factors[f"{prefix}.lora_{factor}.weight"].double() for factor in "AB")
        update = 6 / A.shape[0] * B @ A
        exact = before[drift.name].double() + update
        error = ours[drift.name].double() - exact
        # half an eps of the output dtype, after a handful of fp32 roundings
        assert (error.abs() <= torch.finfo(expected_dtype).eps / 2 * exact.abs() + 1e-6 * update.abs().max()).all()
        assert drift.update_norm == pytest.approx(update.norm().item(), rel=1e-5)
        if expected_dtype == torch.bfloat16:
            assert drift.error_norm == pytest.approx(error.norm().item(), rel=1e-2)
            assert drift.lost_ratio == pytest.approx((error.norm() / update.norm()).item(), rel=1e-2)
    assert max(report.drifts, key=lambda drift: drift.lost_ratio).name in str(report)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", DoraConfig(r=3, alpha=6)),
        ("llama", IA3Config()),
        ("qwen2", IA3Config(targets="all-linear")),
        ("llama", BitFitConfig(targets=["q_proj", "down_proj"])),
        ("llama", BitFitConfig(targets=["o_proj"])),
        ("qwen2", BitFitConfig(targets=["k_proj"])),
        ("qwen3", BitFitConfig(targets=["v_proj"])),
        ("llama", LoraConfig(r=3, targets=["embed_tokens", "lm_head", "up_proj"])),
        ("llama", LoraConfig(r=3, targets=["up_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    ],
    ids=lambda value: value if isinstance(value, str) else value.method,
)
def test_other_methods_biases_included(tmp_path, family, config):
    """transformers is the oracle of the folder, the model with its adapter that of the numbers."""
    base = write_model(tmp_path / "base", model_type=family, tied=False, head_dim=8)
    model = with_random_adapter(base, config)
    save_adapter(tmp_path / "adapter", config, file_tensors(model))
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokens_T = TOKENS[0]
    bounds = torch.tensor([0, len(tokens_T)], dtype=torch.int32)
    expected = model(
        tokens_T, torch.arange(len(tokens_T)), bounds, len(tokens_T), head=lambda hidden, lm_head: lm_head(hidden)
    )
    assert (merged(TOKENS).logits[0] - expected).abs().max() <= 2e-5 * expected.abs().max()


def with_random_adapter(folder, config):
    model = load_model(folder, None, torch.float32).eval()
    inject(model, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in stored_parameters(model).values():
        parameter.data.normal_(std=0.2, generator=generator)
    return model


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("qwen2", BitFitConfig(targets=["o_proj", "q_proj"]), "a qwen2 model on disk has no place for a bias"),
        ("mistral", BitFitConfig(targets=["q_proj"]), "no place for a bias on some of q_proj, .* keep the adapter"),
        ("llama", BitFitConfig(targets=["lm_head"]), "no place for a bias on some of lm_head"),
        ("llama", BottleneckConfig(size=2), "BottleneckLinear is no weight and cannot be merged; keep it"),
    ],
)
def test_what_has_no_place_is_refused(tmp_path, family, config, message):
    base = write_model(tmp_path / "base", model_type=family, tied=False)
    save_adapter(tmp_path / "adapter", config, file_tensors(with_random_adapter(base, config)))
    with pytest.raises(ValueError, match=message):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_lost_ratio_of_an_update_of_zero():
    assert WeightDrift("w", 0.0, 0.0, 0.0, 0.0).lost_ratio == 0.0
    assert WeightDrift("w", 0.0, 0.1, 0.01, 0.05).lost_ratio == float("inf")


def test_refuses_and_leaves_nothing_behind(folders, tmp_path):
    for target in ("lm_head", "embed_tokens"):
        base, adapter, _ = folders(tied=True, targets=["q_proj", target])
        with pytest.raises(ValueError, match=f"adapts .*{target}.weight, and lm_head and the embedding are one"):
            merge_adapter(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_refuses_an_adapter_of_another_model(folders, tmp_path):
    base, adapter, _ = folders()
    config = ModelConfig.from_hf(LlamaConfig.from_pretrained(base).to_dict()).to_hf() | {"num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="unexpected|matches none"):
        merge_adapter(tmp_path / "other", adapter, tmp_path / "merged")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious").touch()
    with pytest.raises(ValueError, match="exists already"):
        merge_adapter(base, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged", "other"]
