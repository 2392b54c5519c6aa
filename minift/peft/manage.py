"""What is done to all adapters of a model at once: merge into the base weights and back, in memory.

For a model that one process holds whole (generation, evaluation). Sharded or large models merge on disk:
`checkpoint.merge`.
"""

from __future__ import annotations

from collections import Counter

from torch import nn

from minift.peft.inject import adapters


def merge_all(model: nn.Module) -> None:
    """Merge every adapter; none, with a ValueError, if a base weight is tied: its other user would change, too."""
    users = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, adapter in adapters(model).items():
        if any(users[parameter] > 1 for parameter in adapter.base.parameters()):
            raise ValueError(f"{name} shares its weight with another module (tied embeddings): merging changes both")
    for adapter in adapters(model).values():
        adapter.merge()


def unmerge_all(model: nn.Module) -> None:
    """Undo `merge_all`, restoring every bit."""
    for adapter in adapters(model).values():
        adapter.unmerge()
