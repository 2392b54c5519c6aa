"""Full fine-tuning of all of a model or of the part that patterns name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from minift.peft.patterns import select_parameters


def set_trainable(model: nn.Module, *, train: Sequence[str] = (), freeze: Sequence[str] = ()) -> list[str]:
    """Train what a `train` pattern finds (everything, if there is none) and no `freeze` pattern does; return its names.

    Patterns are regular expressions searched in full parameter names: `embed_tokens`, `layers\\.[0-7]\\.`, `norm`. A
    tied parameter is one storage with several names: it is matched under each, and returned under its first.
    ValueError if a pattern matches nothing, if nothing is left to train, or if what is left has no gradient (packed
    integer weights).
    """
    aliases: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    names = [name for group in aliases.values() for name in group]
    chosen = select_parameters(names, train, "train") if train else set(names)
    frozen = select_parameters(names, freeze, "freeze") if freeze else set()
    trainable = {
        group[0]: parameter
        for parameter, group in aliases.items()
        if not chosen.isdisjoint(group) and frozen.isdisjoint(group)
    }
    if not trainable:
        raise ValueError(f"train={list(train)} with freeze={list(freeze)} leaves nothing to train")
    for name, parameter in trainable.items():
        if not parameter.is_floating_point():
            raise ValueError(f"{name} is {parameter.dtype}, packed, and has no gradient; freeze it, or use an adapter")
    model.requires_grad_(False)
    for parameter in trainable.values():
        parameter.requires_grad_(True)
    return list(trainable)
