"""Which parameter belongs to which unit.

The engine is given the modules that make a unit; every other parameter, and every one that two units share (tied
embeddings; a module inside of both), belongs to the root, the unit of the whole model, which is gathered all the time.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Place:
    """Where a parameter is registered: `module.<local_name>`."""

    module: nn.Module
    local_name: str


@dataclass(frozen=True)
class Group:
    """A unit to be. params: {full name: every place of that parameter}, in the order of the module tree."""

    name: str
    module: nn.Module
    params: dict[str, list[Place]]


def assign_parameters(module: nn.Module, unit_modules: list[nn.Module]) -> list[Group]:
    """The root (name "") first, then a group per unit module."""
    names = {id(m): name for name, m in module.named_modules()}
    for unit_module in unit_modules:
        assert id(unit_module) in names, f"unit {type(unit_module).__name__} is not inside the model"
    groups = {"": Group("", module, {})} | {names[id(m)]: Group(names[id(m)], m, {}) for m in unit_modules}
    unit_of_module: dict[int, str] = {}
    for unit_module in unit_modules:
        for inner in unit_module.modules():
            unit_of_module[id(inner)] = "" if id(inner) in unit_of_module else names[id(unit_module)]
    owners: dict[int, list[tuple[str, str, Place]]] = {}  # id(parameter) -> (full name, unit name, place)
    for module_name, inner in module.named_modules():
        for local_name, parameter in inner.named_parameters(recurse=False, remove_duplicate=False):
            full_name = f"{module_name}.{local_name}" if module_name else local_name
            owners.setdefault(id(parameter), []).append(
                (full_name, unit_of_module.get(id(inner), ""), Place(inner, local_name))
            )
    for places in owners.values():
        unit_names = {unit_name for _, unit_name, _ in places}
        unit_name = unit_names.pop() if len(unit_names) == 1 else ""  # shared between units: the root's
        groups[unit_name].params[places[0][0]] = [place for _, _, place in places]
    return list(groups.values())
