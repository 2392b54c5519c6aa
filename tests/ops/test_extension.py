"""Loading the extension, doing without it, and choosing an instruction set."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest
import torch

import minift.ops
from minift.ops import extension, norm

HAS_CUDA_KERNELS = True
ON_GPUS_ONLY = {"minift::updated_swiglu", "minift::updated_swiglu_backward_"}  # who calls them asks before
WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["minift._C"] = None  # importing it now raises ImportError, as if it had not been built
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from minift.ops import adamw, adamw_8bit, attention, blockwise, cross_entropy, dropout, extension, low_rank, nf4
    from minift.ops import nf4_linear, norm, rope, swiglu, updated_swiglu
assert extension.MISSING_REASON is not None
assert [warning for warning in caught if "plain PyTorch" in str(warning.message)]
assert extension.instruction_set() == "none"

import torch
x = torch.ones(2, 1, 8, dtype=torch.bfloat16, requires_grad=True)
swiglu.swiglu(x, x).sum().backward()
rope.apply_rope(x, torch.ones(2, 4), torch.zeros(2, 4)).sum().backward()
bounds = torch.tensor([0, 2], dtype=torch.int32)
attention.causal_attention(x, x, x, bounds, bounds, None).sum().backward()
y, rstd = norm.rms_norm(x.detach(), torch.ones(8, dtype=torch.bfloat16), 1e-5)
assert norm.rms_norm_backward(y, x.detach(), torch.ones(8, dtype=torch.bfloat16), rstd, None, False)[1] is None
assert torch.equal(dropout.dropout(y, 1, 0), y)
assert cross_entropy.cross_entropy_(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), True).tolist() == [0.0, 0.0]
wide, factor = torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(8, 1, dtype=torch.bfloat16)
narrow = low_rank.to_rank([wide], [factor], [0.5])
assert torch.equal(low_rank.to_rank_and_gradients_([wide], [factor], [0.5], [narrow], [factor.clone()]), narrow)
low_rank.factor_gradients_([factor], [wide], [narrow])
assert (factor == 8.0).all() and (low_rank.from_rank([narrow], [factor], [1], [None])[0] == 32.0).all()

updates = [narrow, narrow], [factor, factor], [1, 1]
y = updated_swiglu.updated_swiglu(wide, wide, *updates)
assert (y == swiglu.swiglu(wide + 32.0, wide + 32.0)).all()
again = updated_swiglu.updated_swiglu_backward_(wide, wide.clone(), wide.clone(), *updates[:2], [1, 1, 0], True)[2]
assert torch.equal(again, y)

codes, absmax = nf4.quantize_nf4(torch.ones(8, 64))
assert torch.equal(nf4.absmax_of(torch.ones(8, 64)), absmax)
matrix = nf4.Nf4(codes=codes, absmax=absmax, shape=(8, 64))
for num_tokens in (1, 40):
    assert (nf4_linear.nf4_linear(torch.ones(num_tokens, 64), matrix) == 64.0).all()
    assert (nf4_linear.nf4_linear_dx(torch.ones(num_tokens, 8), matrix) == 8.0).all()

step = adamw.AdamWStep(beta1=0.9, beta2=0.99, eps=1e-8, step_size=0.1, keep=1.0, key=0)
maps = [blockwise.dynamic_map(signed) for signed in (True, False)]
zeros = [blockwise.quantize_blockwise(torch.zeros(8), each) for each in maps]
for update in (
    lambda weights: adamw.adamw_(weights, torch.zeros(8), torch.zeros(8), None, step),
    lambda weights: adamw_8bit.adamw_8bit_(
        weights, adamw_8bit.QuantizedMoments(*zeros[0], *zeros[1]), *maps, None, step
    ),
):
    weights = adamw.Weights(torch.ones(8), torch.ones(8), 0, None)
    update(weights)
    assert (weights.master < 1.0).all()
"""


def test_without_the_extension_everything_works_and_says_so():
    subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], check=True)


def test_the_instruction_set_can_be_chosen(instruction_set):
    assert extension.instruction_set() == instruction_set


def test_an_unknown_instruction_set_is_refused(instruction_set):
    with pytest.raises(RuntimeError, match="'sse9' is unknown or not offered"):
        torch.ops.minift.use_instruction_set("sse9")
    assert extension.instruction_set() == instruction_set


def test_what_a_kernel_refuses_is_an_exception(compiled):
    """Wherever it runs, and not the end of the process: a build may be such that exceptions do not survive."""
    with pytest.raises(RuntimeError, match="as long as the last dimension"):
        norm.rms_norm(torch.ones(2, 4), torch.ones(5), 1e-5)


@pytest.fixture
def op_names() -> list[str]:
    """All of csrc/registration.cpp but what cannot be expressed in PyTorch: tables, flags, the instruction set."""
    for module in pkgutil.iter_modules(minift.ops.__path__, "minift.ops."):
        importlib.import_module(module.name)
    no_reference = {"nf4_tables", "set_flag", "wait_flags", "instruction_set", "use_instruction_set"}
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("minift::")]
    return [name for name in registered if name.removeprefix("minift::") not in no_reference]


@pytest.mark.skipif(extension.MISSING_REASON is not None, reason="needs the extension")
@pytest.mark.parametrize("key", ["CPU", "CompositeExplicitAutograd", "Meta"])
def test_every_op_has_a_kernel_a_reference_for_other_devices_and_a_fake(op_names, key):
    assert len(op_names) >= 18
    for name in op_names:
        is_compiled = torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        assert is_compiled != (key == "CPU" and name in ON_GPUS_ONLY), name


def test_devices_without_a_compiled_kernel_are_served():
    y, rstd = norm.rms_norm(torch.empty(2, 8, device="meta"), torch.empty(8, device="meta"), 1e-5)
    assert y.device.type == "meta" and y.shape == (2, 8) and rstd.shape == (2,)
