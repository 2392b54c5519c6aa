"""IEC beside what the matrix asks of every method: that it is LoRA without its betas, and as a file. Oracle: PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch

from minift.checkpoint.adapters import file_tensors, save_adapter
from minift.peft.iec import IecConfig
from minift.peft.inject import adapter_parameters, inject
from minift.peft.lora import LoraConfig

TOKENS = torch.arange(13) * 3
TOLERANCE = 2e-5  # fp32 through two blocks, of the largest logit
SETTINGS = {"r": 4, "alpha": 6.0, "rank_pattern": {"k_proj": 8, "down_proj": 2}}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def fill(model: torch.nn.Module, beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter_parameters(model).items():
        if "beta" in name:
            parameter.data.fill_(beta)
        else:
            parameter.data.normal_(0, 0.2, generator=generator)


def test_without_betas_it_is_lora(tiny_model: Callable, logits_of: Callable) -> None:
    ours, lora = tiny_model(), tiny_model()
    inject(ours, IecConfig(**SETTINGS))
    inject(lora, LoraConfig(**SETTINGS))
    fill(ours, 0.0)
    fill(lora, 0.0)
    assert_close(logits_of(ours, TOKENS), logits_of(lora, TOKENS))
    fill(ours, 0.5)
    assert (logits_of(ours, TOKENS) - logits_of(lora, TOKENS)).abs().max() > 0.01, "betas count"


def test_it_starts_with_the_values_of_lora(tiny_model: Callable) -> None:
    ours, lora = tiny_model(), tiny_model()
    inject(ours, IecConfig(**SETTINGS), seed=3)
    inject(lora, LoraConfig(**SETTINGS), seed=3)
    for name, parameter in adapter_parameters(lora).items():
        assert torch.equal(ours.get_parameter(name), parameter)


def test_peft_loads_the_lora_that_it_is(
    tiny_model: Callable, hf_llama: Callable, logits_of: Callable, tmp_path: Path
) -> None:
    model, config = tiny_model(), IecConfig(**SETTINGS, rslora=True)
    inject(model, config)
    fill(model, 0.5)
    save_adapter(tmp_path / "adapter", config, file_tensors(model))
    theirs = peft.PeftModel.from_pretrained(hf_llama(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert_close(logits_of(model, TOKENS), theirs(TOKENS[None]).logits[0])


def test_dropout_is_on_the_way_into_A_alone(tiny_model: Callable) -> None:
    model = tiny_model()
    inject(model, IecConfig(r=4, dropout=0.999999, targets=["q_proj"]))
    fill(model, 0.5)
    module = model.train().model.layers[0].self_attn.q_proj
    module.lora_B.weight.data.zero_()
    x = torch.randn(5, 16)
    passed = 0.5 * x.unflatten(-1, (4, 4)).mean(-1) * module.scale * 0.5
    expected = module.base(x) + passed.repeat_interleave(4, dim=-1)
    assert torch.allclose(module(x), expected, atol=1e-5)


def test_ranks_by_spectrum_are_refused() -> None:
    with pytest.raises(ValueError, match="allocate is weights, which gives any rank, and iec needs ranks that divide"):
        IecConfig(allocate="weights")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IecConfig(r=3), "rank 3 does not divide .*q_proj, which goes from 16 to 16"),
        (IecConfig(r=16), "rank 16 is more than .*k_proj can have"),
    ],
)
def test_refused(tiny_model: Callable, config: IecConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inject(tiny_model(), config)
