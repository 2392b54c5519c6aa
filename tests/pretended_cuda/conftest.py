"""What runs on the device that is not there."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.pretended_cuda.device import build, run_with_device


@pytest.fixture(scope="session")
def found_on_device(tmp_path_factory) -> Callable[[str], Any]:
    """found_on_device(module): {case: what `python -m module` finds in processes that believe in the device}."""
    if sys.platform != "linux" or shutil.which("c++") is None:
        pytest.skip("needs Linux, whose loader preloads a library, and a C++ compiler to make it")
    if torch.backends.cuda.is_built():
        pytest.skip("needs a PyTorch without CUDA, which believes what it is told of a device")
    library = build(tmp_path_factory.mktemp("device"))
    return lambda module: run_with_device(library, module)
