"""Gradients of a `Case` on one process, without the engine, and how far the engine's may be from them.

[Note: addends] With 16 bits on the wire, every backward rounds: what one use of a parameter adds to its gradient, a
product or a sum p, is computed in fp32 and rounded to g in the wire dtype, by the same kernels with the engine and
without. Where a backward uses each parameter once that is all, because microbatches and ranks are added up in fp32;
except that a GPU, where it adds up in fp32, does not round p to g (`matmul.adds_up_in`, `GradSlot.add_repeated_rows`).
Where it uses one n > 1 times (a tied embedding; a block that runs twice), the engine adds its uses up in fp32 if it
keeps gradients whole, and else in the wire dtype, in backward's order, sometimes without rounding p to g first
(`addmm_`). So the oracle gives every use a parameter of its own, and knows each addend g_i. With u the unit roundoff
of the wire dtype and c_k = k u / (1 - k u), not rounding p_i changes g_i by at most c_1 |g_i|, and n - 1 additions are
off by at most c_(n-1) times the sum of absolute addends (Higham 2002, Accuracy and Stability, section 4.2). Together,
because c_k + c_j + c_k c_j <= c_(k+j) (lemma 3.3):

    |gradient - sum g_i|  <=  c_n · sum |g_i|

plus n halves of the smallest subnormal, by which p_i below the normal range are off. Such bounds of several
microbatches and ranks are added up.

[Note: sums on the way] What a GPU has for a transport adds gradients of different ranks up in the dtype it sends them
in (`precision.reduce`); where that has 16 bits, each is rounded by w - 1 more additions, with w ranks among which a
model is cut up, and n grows by as many. Whole gradients that are kept until the last microbatch travel in fp32.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.fsdp.trees import Case, Tree, loss_of, set_path
from tests.ranks import DEVICE


@dataclass(frozen=True)
class Expected:
    """value: of a gradient or a weight. slack: by how much its elements may be off, beside 1e-6 of the largest value
    for sums in another order."""

    value: Tensor
    slack: Tensor | float = 0.0

    @property
    def tolerance(self) -> Tensor:
        return self.slack + 1e-6 * self.value.double().abs().max()

    def admits(self, actual: Tensor) -> bool:
        return bool(((actual.double() - self.value.double()).abs() <= self.tolerance).all())


def rounds_sums(case: Case) -> bool:
    """Whether sums of ranks' gradients have 16 bits, as in [Note: sums on the way]."""
    num_shards = case.policy.shard_size(case.world_size)
    is_sent_narrow = case.precision.reduce != "float32" and not case.policy.keeps_full_gradients(num_shards)
    return DEVICE.type == "cuda" and num_shards > 1 and is_sent_narrow


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest value."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def unsharded(case: Case, masters: Tree | None = None) -> Tree:
    """The module in one piece, with the weights that compute reads: `masters` (or those of `case`), once gathered."""
    model = Tree(case) if masters is None else copy.deepcopy(masters)
    for parameter in model.parameters():
        stored = parameter.data.to(case.precision.master_dtype) if parameter.requires_grad else parameter.data
        read = on_the_wire(stored, case) if parameter.requires_grad else stored.to(case.precision.wire_dtype)
        parameter.grad, parameter.data = None, read.to(DEVICE)
    return model


def on_the_wire(master: Tensor, case: Case) -> Tensor:
    """What is read of it: a cast; of fp32 in halves too, but for ties, which go away from zero and not to even."""
    if not case.precision.has_halves:
        return master.to(case.precision.wire_dtype)
    return ((master.view(torch.int32) + 2**15) >> 16 << 16).view(torch.float32).bfloat16()


def reference_gradients(case: Case, masters: Tree | None = None) -> dict[str, Tensor]:
    """Of all microbatches of all ranks; the wire is fp32."""
    assert case.precision.wire == "float32"
    model = unsharded(case, masters)
    for rank in range(case.world_size):
        for index in range(case.microbatches):
            loss_of(model, case, rank, index).backward()
    return {
        name: torch.zeros(p.shape) if p.grad is None else p.grad.cpu()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def expected_gradients(case: Case, masters: Tree | None = None) -> dict[str, Expected]:
    """`reference_gradients`; with 16 bits on the wire the sum of all addends, as in [Note: addends]."""
    if case.precision.wire == "float32":
        return {name: Expected(gradient) for name, gradient in reference_gradients(case, masters).items()}
    zeros = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in Tree(case).named_parameters() if p.requires_grad}
    expected = {name: Expected(zero, zero) for name, zero in zeros.items()}
    num_sums = case.policy.shard_size(case.world_size) - 1 if rounds_sums(case) else 0
    for rank in range(case.world_size):
        for index in range(case.microbatches):
            for name, addends in addends_of(unsharded(case, masters), case, rank, index).items():
                so_far = expected[name]
                value = so_far.value + torch.stack(addends).double().sum(0)
                expected[name] = Expected(value, so_far.slack + slack_of(addends, num_sums))
    return expected


def slack_of(addends: list[Tensor], num_sums: int) -> Tensor | float:
    """By how much the sum of all uses in one backward may be off: the bound of [Note: addends]. num_sums: how many
    additions of other ranks' gradients round it besides."""
    n, dtype = len(addends), torch.finfo(addends[0].dtype)
    if n == 1 and num_sums == 0 and DEVICE.type == "cpu":
        return 0.0
    nu = (n + num_sums) * dtype.eps / 2
    return nu / (1 - nu) * torch.stack(addends).double().abs().sum(0) + n * dtype.smallest_normal * dtype.eps / 2


def addends_of(model: Tree, case: Case, rank: int, index: int) -> dict[str, list[Tensor]]:
    """What each use of each trained parameter adds to its gradient in one backward. Takes `model` to pieces."""
    set_path(model, case, index)
    path, blocks = model.path, model.blocks
    model.head = copy.deepcopy(model.head)
    model.blocks = nn.ModuleList(copy.deepcopy(blocks[number]) for number in path)
    loss_of(model, case.but(paths=(), depth=len(path)), rank, index).backward()
    uses = [("embed", model.embed), ("norm", model.norm), ("embed" if case.tied else "head", model.head)]
    uses += [(f"blocks.{number}", block) for number, block in zip(path, model.blocks, strict=True)]
    addends: dict[str, list[Tensor]] = {}
    for prefix, module in uses:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                addends.setdefault(f"{prefix}.{name}", []).append(parameter.grad.cpu())
    return addends
