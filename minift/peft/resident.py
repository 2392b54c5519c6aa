"""Several adapters of one model in memory: one of them in use, or several added up, or none.

    residents = Residents(model)
    load_resident(residents, "sql", "runs/sql/export/adapter")    # checkpoint.adapters
    load_resident(residents, "tone", "runs/tone/export/adapter")
    residents.activate("sql")                                     # switch
    residents.activate("sql", "tone")                             # stack: W + ΔW_sql + ΔW_tone
    with residents.using():                                       # the base alone
        ...

An adapter is a module in the place of another, so switching is an assignment for each of its modules: nothing is
copied, and what is not in use costs no time. The base is there once, dense or NF4. `manage.merge_all` merges what is in
use and `unmerge_all` undoes it; in between nothing can be switched. `per_row` gives every row of one batch its own.

For a model that one process holds whole. Not here: training several at once, and stacks as something to train.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial

from torch import Tensor, nn

from minift.model.linear import LinearBase, LowRank
from minift.peft.adapter import Adapter, AdapterConfig, AdapterModule
from minift.peft.inject import adapter_modules, adapters, inject
from minift.peft.patterns import matches

Put = Callable[[nn.Module], object]
"""Gives a model without adapters one, as `inject` and `load_adapter` do."""


@dataclass(frozen=True)
class Site:
    """A place for a module: the attribute of its parent."""

    parent: nn.Module
    attribute: str

    def put(self, module: nn.Module) -> None:
        setattr(self.parent, self.attribute, module)

    def module(self) -> nn.Module:
        return getattr(self.parent, self.attribute)


@dataclass(frozen=True)
class Resident:
    """One adapter: what it puts where. `names`: of the sites, in the model."""

    config: AdapterConfig
    modules: Mapping[Site, nn.Module]
    names: Mapping[Site, str]

    def tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(full name, Parameter) of what an adapter file holds of it."""
        for site, module in self.modules.items():
            own = module.own_parameters() if isinstance(module, AdapterModule) else module.named_parameters()
            yield from ((f"{self.names[site]}.{local_name}", parameter) for local_name, parameter in own)


class Residents:
    """The adapters of one model, by name; those that are `active` are in it. ValueError if it has one already."""

    def __init__(self, model: nn.Module) -> None:
        if adapter_modules(model):
            raise ValueError("the model has an adapter already; give Residents the base model, and add it by name")
        self.model = model
        self.active: tuple[str, ...] = ()
        self._adapters: dict[str, Resident] = {}
        self._bases: dict[Site, nn.Module] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __getitem__(self, name: str) -> Resident:
        """ValueError, with the names there are, for another one."""
        if name not in self._adapters:
            valid = ", ".join(self._adapters) or "none is loaded yet"
            raise ValueError(f"there is no adapter {name!r}; valid: {valid}")
        return self._adapters[name]

    def add(self, name: str, config: AdapterConfig, put: Put | None = None) -> None:
        """Take an adapter with these settings in, as `name`, not active yet. `put`: what gives it to the model; None:
        `inject`. ValueError if the name is taken, and whatever `put` raises; nothing has changed then."""
        if not name or name in self:
            raise ValueError(f"the adapter name {name!r} is {'taken' if name else 'empty'}; choose another")
        self._adapters[name] = self._make(config, put)

    def remove(self, name: str) -> None:
        """Forget an adapter that is not active."""
        if name in self.active:
            raise ValueError(f"{name!r} is active; activate others before it is removed")
        self[name]
        del self._adapters[name]

    def replace(self, name: str, config: AdapterConfig, put: Put) -> None:
        """Hot swap: write the values of another adapter into the tensors of `name`, in place, so that whoever computes
        with them (an active adapter, a stack) computes with the new ones. ValueError if it has other settings than the
        one before, `targets` aside, or other modules; nothing has changed then."""
        self._refuse_merged("swapped")
        old = self[name]
        for setting in fields(config):
            here, there = getattr(old.config, setting.name, None), getattr(config, setting.name)
            if here != there and setting.name not in ("targets", "exclude", "modules_to_save"):
                raise ValueError(
                    f"{name!r} has {setting.name} {here!r} and the adapter to swap in has {there!r}; a swap in place "
                    "needs equal settings: add it under another name"
                )
        fresh = self._make(config, put)
        ours, theirs = dict(old.tensors()), dict(fresh.tensors())
        if {n: p.shape for n, p in ours.items()} != {n: p.shape for n, p in theirs.items()}:
            raise ValueError(f"the adapter to swap in has other modules or shapes than {name!r}; give it its own name")
        for full_name, parameter in ours.items():
            parameter.data.copy_(theirs[full_name].data)

    def activate(self, *names: str) -> None:
        """Use these and no others, the base alone if there are none. Where several adapt one projection, their updates
        add up; ValueError, and no change, if one of them is no low-rank update."""
        self._refuse_merged("switched")
        if len(set(names)) != len(names):
            raise ValueError(f"an adapter is named twice in {', '.join(names)}; valid: each once")
        chosen: dict[Site, list[nn.Module]] = {}
        for name in names:
            for site, module in self[name].modules.items():
                chosen.setdefault(site, []).append(module)
        self.put_in_place({site: self._together(site, modules, names) for site, modules in chosen.items()})
        self.active = names

    @contextmanager
    def using(self, *names: str) -> Iterator[nn.Module]:
        """`activate` these for a block, in which the model is yielded; then those of before."""
        before = self.active
        self.activate(*names)
        try:
            yield self.model
        finally:
            self.activate(*before)

    def put_in_place(self, modules: Mapping[Site, nn.Module]) -> None:
        """The base model with these modules, each around the base of its site."""
        for site, base in self._bases.items():
            module = modules.get(site, base)
            site.put(module.train(base.training))

    def base(self, site: Site) -> nn.Module:
        return self._bases[site]

    def _together(self, site: Site, modules: Sequence[nn.Module], names: Sequence[str]) -> nn.Module:
        if len(modules) == 1:
            return modules[0]
        for module in modules:
            if not is_low_rank(module):
                kind = type(module).__name__
                raise ValueError(
                    f"{' and '.join(names)} cannot be stacked: both adapt {site.attribute}, and {kind} does more than "
                    "add a low-rank update; valid: activate one of them"
                )
        return _Stack(self._bases[site], modules)

    def _make(self, config: AdapterConfig, put: Put | None) -> Resident:
        """An adapter that is made on the base model and taken out again."""
        before = self.active
        self.activate()
        places = {}  # of modules in the base model
        for name, module in self.model.named_modules():
            if name:
                parent, _, attribute = name.rpartition(".")
                places[Site(self.model.get_submodule(parent), attribute)] = (name, module)
        modules: dict[Site, nn.Module] = {}
        try:
            for site, (name, module) in places.items():
                if matches(name, config.modules_to_save):
                    site.put(copy.deepcopy(module))
            (put or partial(inject, config=config))(self.model)
        finally:
            for site, (_, module) in places.items():
                if site.module() is not module:
                    modules[site] = site.module()
                    site.put(module)
                    self._bases.setdefault(site, module)
            self.activate(*before)
        return Resident(config, modules, {site: places[site][0] for site in modules})

    def _refuse_merged(self, what: str) -> None:
        if any(adapter.merged for adapter in adapters(self.model).values()):
            raise ValueError(f"an adapter is merged into the weights, so nothing can be {what}; unmerge_all first")


def is_low_rank(module: nn.Module) -> bool:
    """Whether it is a projection to whose base it adds low-rank updates, and nothing else."""
    if not isinstance(module, Adapter):
        return False
    kind = type(module)
    return kind.after is LinearBase.after and kind.forward is LinearBase.forward and module.parts() is not None


class _Stack(Adapter):
    """Low-rank adapters of one base, whose updates add up. It owns no parameters: these are its members'."""

    def __init__(self, base: LinearBase, members: Sequence[nn.Module]) -> None:
        super().__init__(base)
        self._members = tuple(members)  # not modules of this one, so that no parameter has a second name

    def parts(self) -> tuple[LinearBase, tuple[LowRank, ...]]:
        if self.merged:
            return self.base, ()
        return self.base, tuple(update for member in self._members for update in member.parts()[1])

    def effective_weight(self, weight: Tensor) -> Tensor:
        for member in self._members:
            weight = member.effective_weight(weight)
        return weight

    def train(self, mode: bool = True) -> _Stack:
        for member in self._members:
            member.train(mode)
        return super().train(mode)
