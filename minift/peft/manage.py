"""What is done to all adapters of a model at once: merge into the base weights and back, in memory; hold still.

For a model that one process holds whole (generation, evaluation). Sharded or large models merge on disk:
`checkpoint.merge`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from minift.peft.adapter import AdapterModule
from minift.peft.drift import MergeReport, MergeTarget, WeightDrift, measure_drift
from minift.peft.inject import adapter_modules, adapters


def check_mergeable(model: nn.Module) -> None:
    """ValueError if a method is no dense weight, with what to do instead."""
    for module in adapter_modules(model).values():
        if type(module).effective_weight is AdapterModule.effective_weight:
            kind = type(module).__name__
            raise ValueError(
                f"{kind} is no weight and cannot be merged; keep it beside the model (minift generate --adapter)"
            )


def is_mergeable(model: nn.Module) -> bool:
    """Whether all that adapters do to `model` can be written as its weights; `checkpoint.merge` says why not."""
    try:
        check_mergeable(model)
    except ValueError:
        return False
    return _first_tied(model, adapter_modules(model)) is None


def merge_all(
    model: nn.Module, target: MergeTarget = "dequantized", original: Callable[[str], Tensor] | None = None
) -> MergeReport:
    """Merge every adapter; none, with a ValueError, if one is no weight, or if a base weight is tied: its other user
    would change, too.

    original: name of a projection -> its full-precision base weight (out, in), asked for one at a time; needed for the
    target "original" over a quantized base.
    """
    check_mergeable(model)
    tied = _first_tied(model, adapters(model))
    if tied is not None:
        raise ValueError(f"{tied} shares its weight with another module (tied embeddings): merging changes both")
    drifts: list[WeightDrift] = []
    for name, adapter in adapters(model).items():
        weight = adapter.base.dense_weight()
        adapter.merge(target, None if original is None else original(name))
        exact = adapter.exact_weight(weight)
        drifts.append(measure_drift(name, adapter.base.dense_weight(), exact, weight))
    return MergeReport(target, tuple(drifts))


def unmerge_all(model: nn.Module) -> None:
    """Undo `merge_all`, restoring every bit."""
    for adapter in adapters(model).values():
        adapter.unmerge()


def _first_tied(model: nn.Module, adapters: Mapping[str, AdapterModule]) -> str | None:
    """The first of `adapters` (name -> module) whose base has a parameter that another module has, too."""
    users = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    return next((name for name, a in adapters.items() if any(users[p] > 1 for p in a.base.parameters())), None)


@contextmanager
def constant_weights(model: nn.Module) -> Iterator[None]:
    """Inside of the block nobody changes a weight of `model`, so that adapters make only once what they make of weights
    alone: a forward with one new token would else cost a pass over all of them."""
    modules = adapter_modules(model).values()
    for module in modules:
        module.hold_weights(True)
    try:
        yield
    finally:
        for module in modules:
            module.hold_weights(False)
