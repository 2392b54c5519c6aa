"""Which parameter belongs to which unit: a parameter in one place, in two places of a unit, in two units."""

from __future__ import annotations

from torch import nn

from minift.fsdp.assign import assign_parameters


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(2, 2, bias=False)


def test_what_two_units_share_is_the_root_s() -> None:
    """A parameter under two names as well as a module inside of both."""
    model = nn.Module()
    model.outside = nn.Linear(2, 2, bias=False)
    model.blocks = nn.ModuleList(Block() for _ in range(3))
    model.blocks[1].tied = nn.Linear(2, 2, bias=False)
    model.blocks[1].tied.weight = model.blocks[0].own.weight
    model.blocks[1].shared = model.blocks[2].shared = nn.Sequential(nn.Linear(2, 2, bias=False))
    model.blocks[2].twice = model.blocks[2].again = nn.Linear(2, 2, bias=False)

    groups = {group.name: group.params for group in assign_parameters(model, list(model.blocks))}
    assert {name: list(params) for name, params in groups.items()} == {
        "": ["outside.weight", "blocks.0.own.weight", "blocks.1.shared.0.weight"],
        "blocks.0": [],
        "blocks.1": ["blocks.1.own.weight"],
        "blocks.2": ["blocks.2.own.weight", "blocks.2.twice.weight"],
    }
    assert len(groups[""]["blocks.0.own.weight"]) == 2  # both places get the sharded one
