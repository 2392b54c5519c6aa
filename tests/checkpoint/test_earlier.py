"""A run that goes on from an adapter. Oracles: what the run that trained it validated last; PEFT; sentences by hand."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from minift.build import ModelSource, construct
from minift.checkpoint.earlier import read_earlier
from minift.config import RunConfig
from minift.metrics import read_metrics
from minift.model.hf import load_config
from minift.peft.adapter import AdapterConfig
from minift.peft.bottleneck import BottleneckConfig
from minift.peft.dora import DoraConfig
from minift.peft.ia3 import IA3Config
from minift.peft.lora import LoraConfig
from minift.peft.pissa import PissaConfig
from minift.peft.prefix import PrefixConfig
from minift.peft.prompt import PromptConfig
from minift.quant.linear import QuantConfig
from tests.ranks import run_ranks
from tests.test_train import config_for, run
from tests.tiny import write_conversations, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    write_conversations(folder / "heldout.jsonl", 5)
    return folder


def later(config: RunConfig, tmp_path: Path) -> RunConfig:
    """A run that goes on from what `config` exports."""
    source = ModelSource(config.model.path, adapter=f"{config.run_dir}/export/adapter")
    return replace(config, run_dir=str(tmp_path / "later"), model=source)


def validated(config: RunConfig) -> list[float]:
    return [record["validation_loss"] for record in read_metrics(Path(config.run_dir) / "metrics.jsonl")[1]]


@pytest.mark.parametrize(
    ("adapter", "quant"),
    [
        (LoraConfig(r=4, alpha=8.0, modules_to_save=["model.norm"]), None),
        (DoraConfig(r=4, alpha=8.0, targets=["q_proj", "down_proj"]), QuantConfig()),
        (IA3Config(), None),
        (BottleneckConfig(size=5), None),
        (PromptConfig(num_virtual_tokens=3, init="random"), None),
        (PrefixConfig(num_virtual_tokens=3), None),
    ],
    ids=lambda part: getattr(part, "method", ""),
)
def test_a_run_begins_where_the_other_ended(
    inputs: Path, tmp_path: Path, adapter: AdapterConfig, quant: QuantConfig | None
) -> None:
    """In fp32, so on one and on two ranks up to the order of sums; another dropout is no other adapter."""
    config = replace(config_for(inputs, tmp_path / "first", max_steps=2), adapter=adapter, quant=quant)
    run_ranks(1, run, config)
    second = later(config, tmp_path)
    if hasattr(adapter, "dropout"):
        second = replace(second, adapter=replace(adapter, dropout=0.1))
    second.check_files()
    run_ranks(2, run, second)
    assert f"| goes on from | `{second.model.adapter}` |" in (Path(second.run_dir) / "report.md").read_text()
    (start, end), (again, further) = validated(config), validated(second)
    assert again == pytest.approx(end, rel=1e-6) and abs(end - start) > 1e-4 and abs(further - again) > 1e-4


def test_what_peft_trained_goes_on(inputs: Path, tmp_path: Path) -> None:
    """A step of 1e-30 changes no bit, so what is exported is what PEFT wrote."""
    base = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "peft")
    config = config_for(inputs, tmp_path / "later", max_steps=1)
    config = replace(
        config,
        model=ModelSource(config.model.path, adapter=str(tmp_path / "peft")),
        optim=replace(config.optim, lr=1e-30),
    )
    run_ranks(2, run, config)
    theirs = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "later" / "export" / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def first(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Of a run that is over."""
    config = config_for(inputs, tmp_path_factory.mktemp("first"), max_steps=1)
    run_ranks(1, run, config)
    return config


@pytest.mark.parametrize(
    ("adapter", "base_scale", "sentence"),
    [
        (LoraConfig(r=4, alpha=9.0), 1.0, "lora_alpha is 8 there and 9 here"),
        (LoraConfig(r=8, alpha=8.0), 1.0, "r is 4 there and 8 here"),
        (DoraConfig(r=4, alpha=8.0), 1.0, "method is 'lora' there and 'dora' here"),
        (LoraConfig(r=4, alpha=8.0, targets=["q_proj"]), 1.0, "has unexpected"),
        (LoraConfig(r=4, alpha=8.0), 1.1, "was trained on another base"),
        (LoraConfig(r=4, alpha=8.0), 1.0, None),
    ],
    ids=str,
)
def test_an_adapter_that_is_another_is_refused(
    first: RunConfig, adapter: AdapterConfig, base_scale: float, sentence: str | None
) -> None:
    base = load_file(Path(first.model.path) / "model.safetensors")
    model = construct(load_config(first.model.path), None, adapter).module
    refusal = nullcontext() if sentence is None else pytest.raises(ValueError, match=sentence)
    with refusal:
        read_earlier(
            f"{first.run_dir}/export/adapter",
            adapter,
            model,
            lambda projection: base_scale * base[f"{projection}.weight"],
            lambda projection: False,
        )


def test_settings_that_make_no_sense_are_refused(first: RunConfig, tmp_path: Path) -> None:
    second = later(first, tmp_path)
    with pytest.raises(ValueError, match=r"model.adapter is .* without adapter"):
        replace(second, adapter=None)
    with pytest.raises(ValueError, match=r"adapter.method pissa finds its start"):
        replace(second, adapter=PissaConfig(r=4, alpha=8.0))
    with pytest.raises(ValueError, match=r"adapter.method lora finds its start"):
        replace(second, adapter=LoraConfig(r=4, alpha=8.0, allocate="weights"))
    with pytest.raises(ValueError, match="which has no adapter_config.json"):
        replace(second, model=replace(second.model, adapter=str(tmp_path))).check_files()
