"""Cases of `ops_cuda`: functions of the rows of activations, and the LM head. Peers: the formulas in eager mode, and by
torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from cuda_case import BF16, Case, Maker, Run, check_all_close, check_equal
from ops_cpu import EPS, eager_rms_norm, eager_rope, eager_swiglu
from torch import Tensor, nn

from minift.objectives.cross_entropy import linear_cross_entropy
from minift.ops.cross_entropy import cross_entropy_
from minift.ops.dropout import DROPOUT_STEPS, dropout
from minift.ops.norm import rms_norm, rms_norm_backward, rms_norm_backward_reference
from minift.ops.rope import apply_rope
from minift.ops.swiglu import swiglu, swiglu_backward_reference

Inputs = tuple[tuple[Tensor, ...], Run]  # and the formula in eager mode, of the same inputs
DROPPED = DROPOUT_STEPS // 10


def rows(make: Maker) -> Iterator[Case]:
    s = make.sizes
    wide_bytes, mlp_bytes = 2 * s.tokens * s.hidden, 2 * s.tokens * s.intermediate
    weight = make.random(s.hidden)

    def formula(
        name: str, ours: Callable, fused: Callable, inputs: Callable[[], Inputs], read: float, moved: float
    ) -> Case:
        """fused: for torch.compile. read, moved: bytes."""
        pool = make.turns(inputs, read)

        def check() -> None:
            one, eager = pool()
            check_all_close(name, eager(), ours(*one))

        others = {"eager": lambda: pool()[1]()}
        if make.compiled is not None:
            compiled = make.compiled(fused)
            others["compiled"] = lambda: compiled(*pool()[0])
        return Case(name, lambda: ours(*pool()[0]), check, moved, others=others)

    def one_x() -> Inputs:
        x = make.random(s.tokens, s.hidden)
        return (x, weight), lambda: eager_rms_norm(x, weight)

    yield formula("rms_norm", lambda x, w: rms_norm(x, w, EPS)[0], eager_rms_norm, one_x, wide_bytes, 2 * wide_bytes)
    for name, is_trained, adds in (
        ("rms_norm backward, frozen weight", False, False),
        ("rms_norm backward, frozen weight, and a residual's gradient", False, True),
        ("rms_norm backward", True, False),
    ):

        def normed(is_trained: bool = is_trained, adds: bool = adds) -> Inputs:
            x, dy = make.random(s.tokens, s.hidden), make.random(s.tokens, s.hidden)
            dresidual = make.random(s.tokens, s.hidden) if adds else None
            leaves = (x, weight) if is_trained else (x,)
            eager = backward(lambda x, w=weight: eager_rms_norm(x, w), leaves, dy)
            both = (lambda: (eager()[0] + dresidual,)) if adds else eager
            return (dy, x, weight, rms_norm(x, weight, EPS)[1], dresidual), both

        def norm_backward(*inputs: Tensor, is_trained: bool = is_trained) -> tuple[Tensor, ...]:
            return rms_norm_backward(*inputs, is_trained)[: 1 + is_trained]

        def norm_formula(*inputs: Tensor, is_trained: bool = is_trained) -> tuple[Tensor, ...]:
            return rms_norm_backward_reference(*inputs, is_trained)

        yield formula(name, norm_backward, norm_formula, normed, (2 + adds) * wide_bytes, (3 + adds) * wide_bytes)

    def gate_and_up() -> Inputs:
        both = tuple(make.random(s.tokens, s.intermediate) for _ in range(2))
        return both, lambda: eager_swiglu(*both)

    def with_dy() -> Inputs:
        dy, (both, _) = make.random(s.tokens, s.intermediate), gate_and_up()
        return (dy, *both), backward(eager_swiglu, both, dy)

    yield formula("swiglu", swiglu, eager_swiglu, gate_and_up, 2 * mlp_bytes, 3 * mlp_bytes)
    yield formula(
        "swiglu backward", torch.ops.minift.swiglu_backward, swiglu_backward_reference, with_dy,
        3 * mlp_bytes, 5 * mlp_bytes,
    )  # fmt: skip

    angle_TR = torch.rand(s.tokens, s.head_dim // 2, device=make.device) * 6
    narrow = angle_TR.cos(), angle_TR.sin()
    full = tuple(torch.cat((t, t), dim=-1).unsqueeze(1).to(BF16) for t in narrow)

    def heads() -> Inputs:
        x = make.random(s.tokens, s.hidden // s.head_dim, s.head_dim)
        return (x,), lambda: eager_rope(x, *full)

    yield formula(
        "rope", lambda x: apply_rope(x, *narrow), lambda x: eager_rope(x, *full), heads,
        wide_bytes, 2 * wide_bytes + 2 * angle_TR.nbytes,
    )  # fmt: skip

    x = make.turns(lambda: make.random(s.tokens, s.hidden), wide_bytes)
    one = x()
    yield Case(
        "dropout", lambda: dropout(x(), 7, DROPPED),
        lambda: check_equal("dropout", dropout(one.cpu(), 7, DROPPED), dropout(one, 7, DROPPED)),
        2 * wide_bytes, others={"eager": lambda: nn.functional.dropout(x(), 0.1)},
    )  # fmt: skip


def backward(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> Run:
    """The backward pass alone: the graph is recorded once and kept."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return lambda: torch.autograd.grad(output, leaves, dy, retain_graph=True)


def head(make: Maker) -> Iterator[Case]:
    """Rows of logits, and the whole LM head, frozen: forward and the gradient of its input."""
    s = make.sizes

    def targets_of(count: int) -> Tensor:
        return torch.randint(s.vocab, (count,), device=make.device)

    def whole(logits: Tensor, targets: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
        loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    logits, targets = make.random(s.head_rows[0], s.vocab), targets_of(s.head_rows[0])

    def rows_by_torch() -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        return whole(leaf, targets, leaf)

    def check_rows() -> None:
        (loss, gradient), ours = rows_by_torch(), logits.clone()
        check_all_close("loss", loss, cross_entropy_(ours, targets, True).sum(), 1e-5)
        check_all_close("gradient of logits", gradient, ours)

    yield Case(
        f"cross_entropy_, {len(targets)} rows", lambda: cross_entropy_(logits, targets, True), check_rows,
        2 * logits.nbytes, others={"eager": rows_by_torch}, prepare=logits.normal_,
    )  # fmt: skip

    lm_head = nn.Linear(s.hidden, s.vocab, bias=False, device=make.device, dtype=BF16).requires_grad_(False)
    lm_head.weight.normal_(std=0.02)
    for count in s.head_rows:
        hidden, targets = make.random(count, s.hidden).requires_grad_(), targets_of(count)

        def chunked(hidden: Tensor = hidden, targets: Tensor = targets) -> tuple[Tensor, Tensor]:
            loss = linear_cross_entropy(hidden, lm_head, targets, num_targets=len(targets))
            return loss.detach(), torch.autograd.grad(loss, hidden)[0]

        def at_once(hidden: Tensor = hidden, targets: Tensor = targets) -> tuple[Tensor, Tensor]:
            return whole(lm_head(hidden), targets, hidden)

        def check(chunked: Run = chunked, at_once: Run = at_once) -> None:
            for part, expected, actual in zip(("loss", "gradient"), at_once(), chunked(), strict=True):
                check_all_close(f"{part} of the head", expected, actual, 2**-6)  # theirs rounds once more

        yield Case(
            f"LM head, {count} rows", chunked, check, flops=4 * count * s.vocab * s.hidden,
            others={"eager": at_once}, has_peak=True,
        )  # fmt: skip
