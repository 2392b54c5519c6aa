"""What methods keep, against what one can count by hand; the memory of whole steps is measured in test_memory.py."""

from __future__ import annotations

import pytest
import torch

from minift.model.linear import Linear
from minift.peft.adapter import AdapterConfig
from minift.peft.bitfit import BitFitConfig
from minift.peft.bottleneck import BottleneckConfig
from minift.peft.dora import DoraConfig
from minift.peft.ia3 import IA3Config
from minift.peft.iec import IecConfig
from minift.peft.lora import LoraConfig
from minift.planner.methods import MethodShape, method_of
from minift.quant.linear import NF4Linear
from tests.peft.rows import README_METHOD

META = torch.device("meta")
IN, OUT = 96, 64


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LoraConfig(r=4, dropout=0.1), MethodShape()),
        # the input is LoRA's
        (DoraConfig(r=4), MethodShape(True, keeps_input=True, keeps_output=True, has_after=True, slices_weight=True)),
        # it drops: x with its zeros, and these; what A makes; the sum of base and update, stretched. Then each of the
        # two, the stretched less the base, the base of x, and the sum of these
        (
            DoraConfig(r=4, dropout=0.1),
            MethodShape(
                True,
                other_features=2 * IN + 4 + OUT,
                is_opaque=True,
                has_after=True,
                slices_weight=True,
                forward_features=2 * IN + 4 + 6 * OUT,
            ),
        ),
        # the input, of which A reads; what is pooled of it, and what B reads. Then what passes by B, the results of
        # base and update, and their sum
        (
            IecConfig(r=8),
            MethodShape(True, keeps_input=True, other_features=8 + 8, is_opaque=True, forward_features=3 * 8 + 3 * OUT),
        ),
        (IA3Config(feedforward=[]), MethodShape(True, keeps_output=True, has_after=True)),
        # the input, and what is made of it
        (IA3Config(), MethodShape(True, keeps_input=True, is_opaque=True, has_after=True, forward_features=IN + OUT)),
        (BitFitConfig(), MethodShape(True, has_after=True)),
        # z, and the bottleneck before and behind its activation
        (BottleneckConfig(size=8), MethodShape(True, other_features=OUT + 8 + 8, has_after=True)),
        # x, which B reads; B x, which A reads, with its columns one after the other. It is one of five, with B x as it
        # comes, the base's result, and the update and their sum
        (
            README_METHOD(size=8),
            MethodShape(True, keeps_input=True, other_features=OUT, is_opaque=True, forward_features=5 * OUT),
        ),
    ],
    ids=lambda value: value.method if isinstance(value, AdapterConfig) else "",
)
def test_what_is_kept(config: AdapterConfig, expected: MethodShape, is_quantized: bool) -> None:
    with META:
        base = NF4Linear(IN, OUT, False, 64, True, torch.bfloat16, META) if is_quantized else Linear(IN, OUT)
    base.requires_grad_(False)
    module = config.wrap("model.layers.0.mlp.down_proj", base, torch.float32, META).train()
    state = torch.get_rng_state()
    known: dict[str, MethodShape] = {}
    found = method_of(module, known)
    assert found == expected
    assert torch.equal(torch.get_rng_state(), state), "a plan is made in the middle of a run"
    assert not known or method_of(module, known) is found
