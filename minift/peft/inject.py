"""Put adapters into a model, freeze the rest, and give the adapters their initial values.

The initial value of a parameter is a function of (seed, name) alone. So it can be asked for one parameter at a time,
by a rank that holds the model on the meta device, and it is the same at any world size and in any order.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minift.peft.adapter import Adapter, AdapterConfig, AdapterModule
from minift.peft.patterns import select_modules


def inject(model: nn.Module, config: AdapterConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[str]:
    """Wrap the modules that `config` names, train the adapters and nothing else; return the trainable names.

    Adapter parameters get `dtype` and their base's device, and `init_tensor`'s values unless that is the meta device.
    ValueError if the model has adapters already, a pattern matches nothing, or a setting does not fit a module (the
    model is unchanged then).
    """
    if any(isinstance(module, AdapterModule) for module in model.modules()):
        raise ValueError("the model has adapters already; inject works once per model")
    candidates = config.candidates(model)
    names = select_modules(list(candidates), config.targets, config.exclude)
    config.check(names)
    wrapped: dict[str, AdapterModule] = {}
    for name in names:
        base = candidates[name]
        device = next(itertools.chain(base.parameters(), base.buffers())).device
        wrapped[name] = config.wrap(name, base, dtype, device).train(base.training)
    model.requires_grad_(False)  # what is in the adapters is not in the model yet
    for name, adapter in wrapped.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, adapter)
    own_parameters = adapter_parameters(model)
    for name, parameter in own_parameters.items():
        if not parameter.is_meta:
            parameter.data.copy_(init_tensor(model, name, seed))
    return [name for name, parameter in own_parameters.items() if parameter.requires_grad]


def adapter_modules(model: nn.Module) -> dict[str, AdapterModule]:
    """Full name -> module with an adapter, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterModule)}


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Of these, the projections."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Full name -> parameter of every adapter, in the model's order: what is stored, and trained unless frozen."""
    return {
        f"{name}.{local_name}": parameter
        for name, adapter in adapter_modules(model).items()
        for local_name, parameter in adapter.own_parameters()
    }


def init_tensor(model: nn.Module, name: str, seed: int) -> Tensor:
    """Initial value (fp32, CPU) of the adapter parameter called `name`, which may itself be on the meta device."""
    adapter_name, local_name = split_name(model, name)
    adapter = model.get_submodule(adapter_name)
    return adapter.init_parameter(local_name, named_generator(seed, name))


def split_name(model: nn.Module, name: str) -> tuple[str, str]:
    """(name of the adapter, local name) of the adapter parameter called `name`."""
    path = name.split(".")
    for depth in range(len(path) - 1, 0, -1):  # the innermost: an adapter may wrap another
        adapter_name = ".".join(path[:depth])
        if isinstance(model.get_submodule(adapter_name), AdapterModule):
            return adapter_name, ".".join(path[depth:])
    raise ValueError(f"{name!r} is not a parameter of an adapter of this model")


def to_file(model: nn.Module, name: str, values: Tensor, base_weight: Callable[[str], Tensor]) -> Tensor:
    """What an adapter file holds where the adapter parameter `name` is `values` (fp32).

    base_weight: name of an adapted module -> its base's dense weight as it was trained with; called where needed only.
    """
    adapter_name, local_name = split_name(model, name)
    return model.get_submodule(adapter_name).to_file(local_name, values, lambda: base_weight(adapter_name))


def from_file(model: nn.Module, name: str, values: Tensor, base_weight: Callable[[str], Tensor]) -> Tensor:
    """Inverse of `to_file`."""
    adapter_name, local_name = split_name(model, name)
    return model.get_submodule(adapter_name).from_file(local_name, values, lambda: base_weight(adapter_name))


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose stream depends on (seed, name) alone. SHA-256, as Python's `hash` differs per process."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
