"""What a sanitizer is to see is everything that has a CUDA kernel; on the processor, no access leaves its tensor."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minift.ops import extension
from tests.ops import small_cases

HAS_CUDA_KERNELS = True
CUDA = Path(__file__).parents[2] / "csrc" / "cuda"


class Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "minift":
            self.names.add(func._schema.name.removeprefix("minift::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(extension.MISSING_REASON is not None, reason="needs the extension")
def test_every_op_with_a_cuda_kernel_is_called(implementation):
    text = "".join(path.read_text(encoding="utf-8") for path in CUDA.glob("*.cpp"))
    with Called() as called:
        small_cases.run(torch.device("cpu"))
    assert set(re.findall(r'm\.impl\("(\w+)"', text)) - called.names == set()
