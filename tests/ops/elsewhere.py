"""Runs ops of minift with other kernels than those of the CPU, while their tensors stay on the CPU.

So a test says once what an op must give, and its tensors, layouts and tolerances serve every device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

ON_HOST = {"sgmv_": ("ranks", "bounds", "choice")}
"""Arguments that an op reads on the host, wherever the others are."""


@contextmanager
def kernels_replaced(names: Sequence[str], kernel_of: Callable[[str], Callable]) -> Iterator[None]:
    """Inside, minift's op `name` on CPU tensors calls kernel_of(name)."""
    library = torch.library.Library("minift", "IMPL")  # noqa: TOR901
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*other operators may also be overridden")
            for name in names:
                library.impl(name, kernel_of(name), "CPU", allow_override=True)
        yield
    finally:
        library._destroy()


def on_copies(
    op: torch._ops.OpOverload, copy: Callable[[Tensor], Tensor], copy_on_host: Callable[[Tensor], Tensor]
) -> Callable:
    """`op` for tensors on the CPU: all of their memory, uint8 (n,), goes through `copy`, perhaps to another device, so
    that every stride and every misalignment is the same there; what the op returns comes back, and so does what it
    changes in place. What it reads on the host goes through `copy_on_host` instead."""
    writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in op._schema.arguments)
    on_host = ON_HOST.get(op._schema.name.split("::")[1], ())
    copies_by = [copy_on_host if argument.name in on_host else copy for argument in op._schema.arguments]

    def run(*arguments):
        copies: dict[tuple[int, Callable], tuple[Tensor, Tensor]] = {}

        def moved(tensor, copy):
            if not isinstance(tensor, Tensor):
                return tensor
            here = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            _, there = copies.setdefault((here.data_ptr(), copy), (here, copy(here)))
            offset = there.storage_offset() // tensor.element_size() + tensor.storage_offset()
            view = torch.empty(0, dtype=tensor.dtype, device=there.device)
            return view.set_(there.untyped_storage(), offset, tensor.size(), tensor.stride())

        result = op(*(tree_map(partial(moved, copy=by), a) for a, by in zip(arguments, copies_by, strict=True)))
        if writes:
            for here, there in copies.values():
                here.copy_(there)
        return tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, result)

    return run
