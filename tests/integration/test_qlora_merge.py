"""A whole QLoRA run, its adapter merged into each target, and what transformers, PEFT and the run itself say of these.

fp32 throughout; roundings through two blocks: 2e-5 of the largest logit, as everywhere.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minift.checkpoint.adapters import load_adapter
from minift.checkpoint.merge import merge_adapter
from minift.data.config import DataConfig
from minift.dist.process import World
from minift.inference import load_assistant, measure_loss
from minift.model.decoder import CausalLM
from minift.model.weights import WeightReader
from minift.quant.linear import QuantConfig
from minift.quant.model import load_model
from tests.integration.test_qlora import config_for, inputs, losses, train_on_rank  # noqa: F401 (inputs: a fixture)
from tests.ranks import run_ranks

TOKENS = torch.arange(20)[None] * 11 % 250
TARGETS = ("dequantized", "original", "requantized")


def logits(model: torch.nn.Module) -> Tensor:
    """(tokens, vocabulary) of minift's model, or of transformers'."""
    if not isinstance(model, CausalLM):
        return model(TOKENS).logits[0]
    count = TOKENS.shape[1]
    bounds = torch.tensor([0, count], dtype=torch.int32)
    return model(TOKENS[0], torch.arange(count), bounds, count, head=lambda hidden_TD, lm_head: lm_head(hidden_TD))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()


def from_transformers(folder: Path) -> torch.nn.Module:
    """In training mode: in inference bitsandbytes computes in bf16 on a CPU, and only with widths that it likes."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


@torch.no_grad()
def test_the_adapter_of_a_run_merged_into_every_target(inputs: Path, tmp_path: Path) -> None:  # noqa: F811
    run_ranks(1, train_on_rank, config_for(inputs, tmp_path / "run"))
    dense, nf4, adapter = inputs / "model", inputs / "nf4", tmp_path / "run" / "export" / "adapter"
    reports = {}
    for target in TARGETS:
        original = dense if target == "original" else None
        reports[target] = merge_adapter(nf4, adapter, tmp_path / target, target=target, original_folder=original)
        on_the_way = tmp_path / f"{target} on the way"
        assert reports[target] == merge_adapter(dense, adapter, on_the_way, target=target, quant=QuantConfig())
        readers = WeightReader(tmp_path / target), WeightReader(on_the_way)
        assert set(readers[0].names()) == set(readers[1].names())
        assert all(torch.equal(*(reader.read(name) for reader in readers)) for name in readers[0].names())

    trained = load_model(nf4, None, torch.float32)
    load_adapter(trained, adapter)
    dequantized, original, requantized = (from_transformers(tmp_path / target) for target in TARGETS)
    assert_close(logits(dequantized), logits(trained))
    assert_close(logits(original), logits(peft.PeftModel.from_pretrained(from_transformers(dense), adapter)))
    assert_close(logits(requantized), logits(load_model(tmp_path / "requantized", None, torch.float32)))

    # The sum is fp32 and so is the file; the other two are other models, and the report says so.
    assert reports["dequantized"].lost_ratio == 0.0
    for target, model in (("original", original), ("requantized", requantized)):
        assert reports[target].lost_ratio > 0.01
        assert (logits(model) - logits(trained)).abs().max() > 1e-3 * logits(trained).abs().max()

    data = DataConfig(train=(str(inputs / "heldout.jsonl"),), max_length_tokens=256, template="chatml")
    cpu = torch.device("cpu")
    merged = load_assistant(str(tmp_path / "dequantized"), template="chatml", dtype=torch.float32, device=cpu)
    loss = measure_loss(merged, data, 256, World(0, 1, 0, cpu, "gloo", None))["loss"]
    assert loss == pytest.approx(losses(tmp_path / "run")[-1], rel=1e-5)
