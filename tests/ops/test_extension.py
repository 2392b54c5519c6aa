"""Loading the extension, doing without it, and choosing an instruction set."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from minift.ops import extension

WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["minift._C"] = None  # importing it now raises ImportError, as if it had not been built
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from minift.ops import extension, norm, rope, swiglu
assert extension.MISSING_REASON is not None
assert [warning for warning in caught if "plain PyTorch" in str(warning.message)]
assert extension.instruction_set() == "none"

import torch
x = torch.ones(2, 1, 8, dtype=torch.bfloat16, requires_grad=True)
swiglu.swiglu(x, x).sum().backward()
rope.apply_rope(x, torch.ones(2, 4), torch.zeros(2, 4)).sum().backward()
y, rstd = norm.rms_norm(x.detach(), torch.ones(8, dtype=torch.bfloat16), 1e-5)
assert norm.rms_norm_backward(y, x.detach(), torch.ones(8, dtype=torch.bfloat16), rstd, False)[1] is None
"""


def test_without_the_extension_everything_works_and_says_so():
    subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], check=True)


def test_the_instruction_set_can_be_chosen(instruction_set):
    assert extension.instruction_set() == instruction_set


def test_an_unknown_instruction_set_is_refused(instruction_set):
    with pytest.raises(RuntimeError, match="'sse9' is unknown or not offered"):
        torch.ops.minift.use_instruction_set("sse9")
    assert extension.instruction_set() == instruction_set


def test_devices_without_a_compiled_kernel_get_the_reference(instruction_set):
    """The reference is registered as the default kernel; called under that dispatch key it must be found."""
    x, weight = torch.randn(2, 8), torch.randn(8)
    for name in ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rope"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"minift::{name}", "CompositeExplicitAutograd")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"minift::{name}", "CPU")
    y, rstd = torch.ops.minift.rms_norm(x.to("meta"), weight.to("meta"), 1e-5)
    assert y.device.type == "meta" and y.shape == (2, 8) and rstd.shape == (2,)
