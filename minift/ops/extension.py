"""Loads the compiled extension `minift._C` and decides, once per op at import, what an op's name stands for.

With the extension, an op is `torch.ops.minift.<name>`: torch's dispatcher takes the compiled kernel where one exists
for the tensor's device and the plain-PyTorch reference everywhere else, and a fake kernel gives shapes to
torch.compile. Without the extension, an op is its reference: the same results, more slowly, after one warning that
says why. Nothing is probed per call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch


def _load() -> str | None:
    """Import the extension, which registers its ops; None, or the reason why it cannot be used."""
    try:
        import minift._C  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


MISSING_REASON: str | None = _load()
"""None when the extension is loaded, else why not."""

if MISSING_REASON is not None:
    warnings.warn(
        f"minift runs on plain PyTorch instead of its compiled ops ({MISSING_REASON}): correct, but slower. "
        "Build them with `python setup.py build_ext --inplace`.",
        stacklevel=2,
    )


def op(name: str, *, reference: Callable, fake: Callable) -> Callable:
    """The callable to use for the op `name` of csrc/registration.cpp.

    `reference` and `fake` take the arguments of the op's schema and return what it returns; `reference` becomes the
    op's kernel on every device without a compiled one, `fake` only makes empty tensors of the right shape and dtype.
    """
    if MISSING_REASON is not None:
        return reference
    qualified_name = f"minift::{name}"
    torch.library.register_kernel(qualified_name, None, reference)
    torch.library.register_fake(qualified_name, fake)
    return getattr(torch.ops.minift, name).default


def instruction_set() -> str:
    """What the CPU kernels use: portable, avx2, avx512 or avx512_bf16; "none" without the extension."""
    return "none" if MISSING_REASON is not None else torch.ops.minift.instruction_set()
