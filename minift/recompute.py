"""Activation recomputation: what a unit keeps for its backward, and what its backward computes again.

A unit is a decoder block. Bytes that one keeps from forward to backward, fine-tuned in full, with T tokens of b bytes
an element, D hidden_size, Q = heads · head_dim, K = kv_heads · head_dim, F intermediate_size:

    none         b·T·(4·D + 2·Q + 2·K + 3·F) + 4·T·(heads + 2)     everything that its operations read in backward
    selective    b·T·(2·D + 2·Q + 2·K + 2·F) + 4·T·(heads + 2)     not what element-wise work makes from the rest
    full         b·T·D                                             its input
    offload      0; b·T·D in host memory                           its input, on the other side of the bus

Rank-r LoRA on all seven projections instead: none and selective keep 7·b·T·r more, with dropout or without. Queries and
keys with norms of their own cost 4·T·(heads + kv_heads) more, and none keeps b·T·(Q + K) more.
4·T·heads is attention's log-sum-exp. Its result, b·T·Q, is kept once, for its own backward and that of o_proj; where
o_proj is frozen and has no adapter, for attention alone. `full` and `offload` keep 5 KB of generator state besides.

`full` runs the unit's forward without a graph, and in backward once more with one, but for its last product, whose
result nobody reads: in a Llama a quarter more arithmetic, or a third where weights are frozen. [Note: rerun] Three
things make the rerun the same to the bit and invisible from outside. It draws what the first run drew, because the
generators' states of then are put back for its duration. It calls the original `forward`, not the module, so the hooks
that gather the unit's parameters do not fire again: they are gathered for the unit's backward, which is when it
happens. And its backward is an ordinary one inside the outer one, so parameters get their gradients, and their hooks
run, as they would have.

`offload` is `full` with the input in pinned host memory; `_Transfers` says who waits for whom.

`selective` runs no matrix product and no attention twice. The model says which results are cheap to make again
(minift/model/cheap.py); where autograd wants to keep such a result, it keeps a recipe instead. The first to unpack it
in backward makes the result, those who share it (q, k, v, their adapters) get the same tensor, the last takes it away.
silu(gate) · up has one reader, which makes it again itself, while it reads both for their gradients: so at that moment
one tensor of F features is there that `none` has given away before.

Papers: Chen et al. 2016, arXiv 1604.06174, section 4 (full); Korthikanti et al. 2022, arXiv 2205.05198, section 5
(selective; they run attention again and keep what is made again here). Not here: which policy fits (planner).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from minift.model.cheap import CheapOps, Result
from minift.trace import Recorder

Policy = Literal["none", "full", "selective", "offload"]


@dataclass(frozen=True)
class RecomputeConfig:
    """Which activations backward computes again instead of finding them in memory. The result is the same to the bit.

    policy: none: keep all. selective: make norms and silu · up again, which takes little time. full: run each block
        again from its input, a quarter to a third more work. offload: full, with these inputs in host memory.
    every: the policy holds for one block in so many, from the first on; 1: for all blocks.
    """

    policy: Policy = "none"
    every: int = 1

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise ValueError(f"recompute.policy is {self.policy!r}; valid: {', '.join(get_args(Policy))}")
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"recompute.every is {self.every!r}; valid: an integer, 1 or more")


def apply_recompute(model: nn.Module, units: list[nn.Module], config: RecomputeConfig, recorder: Recorder) -> None:
    """Replace the `forward` of every `config.every`-th of `units`, submodules of `model`, on the instance.

    Modules, parameters and their names stay what they are. A unit's forward takes the one tensor that may need a
    gradient first, anything else after it, and returns one tensor. What is run again in backward is recorded as
    Span("compute", "recompute", name of the unit in `model`), but for silu(gate) · up. The units compute on
    `recorder.device`.
    """
    names = {module: name for name, module in model.named_modules()}
    transfers = _Transfers(recorder.device) if config.policy == "offload" else None
    for unit in units[:: config.every]:
        if config.policy == "selective":
            unit.forward = _Selective(unit, names[unit], recorder)
        elif config.policy != "none":
            unit.forward = _Full(unit, names[unit], recorder, transfers)


# Full #


class _Full:
    """The forward of a unit that keeps its input only, on the device or, given `transfers`, in host memory."""

    def __init__(self, unit: nn.Module, name: str, recorder: Recorder, transfers: _Transfers | None) -> None:
        self.unit = unit
        self.name = name
        self.recorder = recorder
        self.forward = unit.forward
        self._transfers = transfers

    def __call__(self, x: Tensor, *others: Any, **keywords: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self.forward(x, *others, **keywords)
        for other in (*others, *keywords.values()):
            assert not (isinstance(other, Tensor) and other.requires_grad), f"{self.name}: only x may need a gradient"
        anchor = None
        if not x.requires_grad:
            if not any(parameter.requires_grad for parameter in self.unit.parameters()):
                return self.forward(x, *others, **keywords)
            anchor = torch.empty(0, requires_grad=True)  # an input that makes autograd come by; it gets no gradient
        with nullcontext() if self._transfers is None else self._transfers.keeping(x):
            return _Rerun.apply(x, anchor, self, others, keywords)


class _Rerun(torch.autograd.Function):
    """See [Note: rerun]."""

    @staticmethod
    def forward(
        ctx, x: Tensor, anchor: Tensor | None, unit: _Full, others: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Tensor:
        ctx.unit, ctx.others, ctx.keywords = unit, others, keywords
        ctx.random_state = _random_state(unit.recorder.device)
        ctx.save_for_backward(x)
        return unit.forward(x, *others, **keywords)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        (x,), unit, recorder = ctx.saved_tensors, ctx.unit, ctx.unit.recorder
        x = x.detach().requires_grad_(ctx.needs_input_grad[0])
        with recorder.during("compute", "recompute", unit.name), _replayed(ctx.random_state, recorder.device):
            with torch.enable_grad(), _unread(unit.unit):
                out = unit.forward(x, *ctx.others, **ctx.keywords)
        if out.requires_grad:  # else the unit cuts the graph
            edge = get_gradient_edge(out)
            del out
            torch.autograd.backward(edge, dout)
        return x.grad, None, None, None, None


@contextmanager
def _unread(unit: nn.Module) -> Iterator[None]:
    """Nobody reads what the forward of `unit` returns: a `Block` leaves the values out."""
    unit.result_is_read = False
    try:
        yield
    finally:
        unit.result_is_read = True


def _random_state(device: torch.device) -> list[Tensor]:
    """Where the default generators stand: the CPU's and, on CUDA, the device's (which is known without asking it)."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


@contextmanager
def _replayed(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Random numbers are those that followed `states`; afterwards, also after an exception, those of before."""
    before = _random_state(device)
    _set_random_state(states, device)
    try:
        yield
    finally:
        _set_random_state(before, device)


# Offload #


class _Transfers:
    """Copies of unit inputs into host memory and back, on a stream of their own. On a CPU that is where they are.

    One copy is under way at a time. Its host side is pinned memory, which PyTorch keeps and lends again (rounded up to
    a power of two); its device side belongs to the compute stream, and is held until that stream has been told to wait
    for the copy, so that no allocation can be given its memory early:

        forward of unit i     copy x_i out while the unit computes          compute waits for it at the next unit
        backward of unit i    compute waits for x_i; bring x_(i-1) in while unit i runs again and backward

    So at most two inputs are on the device. A unit that backward reaches in another order brings its own in, and waits.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._in_use: Tensor | None = None  # the device side of the copy under way
        self._newest: Callable[[], _OnHost | None] = lambda: None

    def keeping(self, x: Tensor) -> saved_tensors_hooks:
        """While this is open, what autograd saves, and that is x, is kept in host memory."""
        kept = _OnHost(self, self.to_host(x.detach()), self._newest)
        self._newest = weakref.ref(kept)
        return saved_tensors_hooks(lambda saved: kept, lambda kept: kept.fetch())

    def to_host(self, x: Tensor) -> Tensor:
        if self._stream is None:
            return x
        return self._copy(x, target=torch.empty_like(x, device="cpu", pin_memory=True))

    def to_device(self, x_host: Tensor) -> Tensor:
        if self._stream is None:
            return x_host
        return self._copy(x_host, target=torch.empty_like(x_host, device=self.device))

    def settle(self) -> None:
        """From here on the compute stream has what was copied, and may give away where it was copied from."""
        if self._in_use is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            self._in_use = None

    def _copy(self, source: Tensor, target: Tensor) -> Tensor:
        self.settle()
        # What is read may not be computed yet, and what is written may still be read by kernels of its last owner.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._in_use = source if source.is_cuda else target
        return target


class _OnHost:
    """One unit's input, from its forward to its backward. Autograd holds it, and drops it when backward is through."""

    def __init__(self, transfers: _Transfers, x_host: Tensor, earlier: Callable[[], _OnHost | None]) -> None:
        self._transfers = transfers
        self._x_host = x_host
        self._earlier = earlier  # a weak reference to what went out before this
        self._arriving: Tensor | None = None

    def fetch(self) -> Tensor:
        """The input on the device. The one that backward will want next is sent for."""
        self._send_for()
        x, self._arriving = self._arriving, None
        self._transfers.settle()
        if (earlier := self._earlier()) is not None:
            earlier._send_for()
        return x

    def _send_for(self) -> None:
        if self._arriving is None:
            self._arriving = self._transfers.to_device(self._x_host)


# Selective #


class _Selective:
    """The forward of a unit whose cheap results are not kept but made again."""

    def __init__(self, unit: nn.Module, name: str, recorder: Recorder) -> None:
        self.name = name
        self.recorder = recorder
        self._forward = unit.forward
        self._parameters = list(unit.parameters())
        self._weights: set[int] = set()  # where they lie during the forward that is running
        self._recipes: list[tuple[weakref.ref[Tensor], _Recipe]] | None = None  # of the forward that is running
        for module in unit.modules():
            if isinstance(module, CheapOps):
                module.cheap, module.keeps_cheap = self._cheap, False

    def __call__(self, *args: Any, **keywords: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self._forward(*args, **keywords)
        self._recipes = []
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in self._parameters}
        try:
            with saved_tensors_hooks(self._pack, lambda kept: kept.serve() if isinstance(kept, _Recipe) else kept):
                return self._forward(*args, **keywords)
        finally:
            self._recipes = None

    def _cheap(self, operation: Callable[..., Result], *inputs: Tensor) -> Result:
        result = operation(*inputs)
        if self._recipes is not None:
            recipe = _Recipe(operation, [x.detach() for x in inputs], self)
            self._recipes.append((weakref.ref(_first(result)), recipe))
        return result

    def _pack(self, saved: Tensor) -> Tensor | _Recipe:
        for result, recipe in self._recipes:
            if result() is saved:
                recipe.num_readers += 1
                return recipe
        # Hooks do not nest: the one with which FSDP looks for this very mistake does not see what is saved in here.
        if not isinstance(saved, nn.Parameter) and saved.untyped_storage().data_ptr() in self._weights:
            raise RuntimeError(
                f"an operation in {self.name} saved a view of a parameter for backward (shape {tuple(saved.shape)}); "
                "under FSDP its memory will hold another layer by then; keep the Parameter and read it in backward"
            )
        # A node that kept its own output would keep itself. A Parameter stays the object it is: its data may change.
        return saved if saved.is_leaf else saved.detach()


def _first(result: Result) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


class _Recipe:
    """How to make one cheap result, and the result for as long as readers wait for it."""

    def __init__(self, operation: Callable[..., Result], inputs: list[Tensor], unit: _Selective) -> None:
        self.num_readers = 0
        self._operation = operation
        self._inputs = inputs
        self._unit = unit
        self._result: Tensor | None = None
        self._num_waiting = 0

    def serve(self) -> Tensor:
        """The result for one reader. A second backward over the same graph begins anew."""
        if self._result is None:
            with self._unit.recorder.during("compute", "recompute", self._unit.name), torch.no_grad():
                self._result = _first(self._operation(*self._inputs))
            self._num_waiting = self.num_readers
        result = self._result
        self._num_waiting -= 1
        if self._num_waiting == 0:
            self._result = None
        return result
