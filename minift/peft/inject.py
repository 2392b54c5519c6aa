"""Put adapters into a model, freeze the rest, and give the adapters their initial values.

The initial value of a parameter is a function of seed, name and, for some methods, the base's weights. So it can be
asked for one parameter at a time, by a rank that holds the model on the meta device, and it is the same at any world
size and in any order.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from minift.model.linear import LinearBase
from minift.peft.adapter import Adapter, AdapterConfig, AdapterModule
from minift.peft.names import canonical_name
from minift.peft.patterns import check_modules, matches


def inject(model: nn.Module, config: AdapterConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[str]:
    """Wrap the modules that `config` names, train the adapters and its `modules_to_save`; return the trainable names.

    Adapter parameters get `dtype` and their base's device, and `init_tensor`'s values unless that is the meta device.
    ValueError if the model has adapters already, a pattern matches nothing, or a setting does not fit a module (the
    model is unchanged then).
    """
    if any(isinstance(module, AdapterModule) for module in model.modules()):
        raise ValueError("the model has adapters already; inject works once per model")
    chosen = config.select(model)
    config.check(list(chosen))
    whole = _whole_parameters(model, config, chosen)
    wrapped = config.wrap_all(chosen, dtype)
    model.requires_grad_(False)  # what is in the adapters is not in the model yet
    for name, adapter in wrapped.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, adapter)
    for parameter in whole:
        parameter.requires_grad_(True)
    for name, parameter in adapter_parameters(model).items():
        if not parameter.is_meta:
            parameter.data.copy_(init_tensor(model, name, seed))
    if not any(parameter.is_meta for parameter in model.parameters()):
        for name, values in config.computed_values(model, seed).items():
            model.get_parameter(name).data.copy_(values)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _whole_parameters(model: nn.Module, config: AdapterConfig, chosen: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """Parameters of `config.modules_to_save`. ValueError for a module that cannot be trained beside the adapters of
    `chosen`, by name, and alone."""
    modules = dict(model.named_modules())
    check_modules([name for name in modules if name], config.modules_to_save, "modules_to_save")
    users = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    found = []
    for name, module in modules.items():
        if not matches(name, config.modules_to_save):
            continue
        for adapted in chosen:
            if f"{adapted}.".startswith(f"{name}.") or f"{name}.".startswith(f"{adapted}."):
                raise ValueError(f"{name} is in modules_to_save and {adapted} gets an adapter; valid: one of the two")
        for local_name, parameter in module.named_parameters():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{name} is in modules_to_save, but {local_name} is held in 4 bits, which cannot be trained; "
                    "valid: an adapter on it, or quant.skip to leave it dense"
                )
            if users[parameter] > 1:
                raise ValueError(
                    f"{name} is in modules_to_save, but shares its {local_name} with another module (tied embeddings), "
                    "which would change too; valid: an adapter on it"
                )
            found.append(parameter)
    return found


def adapter_modules(model: nn.Module) -> dict[str, AdapterModule]:
    """Full name -> module with an adapter, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterModule)}


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Of these, the projections."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def frozen_projections(model: nn.Module) -> dict[str, LinearBase]:
    """Name in the model's folder -> projection of the base that is not trained nor tied, in the model's order."""
    frozen = {name for name, _ in model.named_parameters()} - stored_parameters(model).keys()
    return {
        canonical_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, LinearBase)
        and not isinstance(module, AdapterModule)
        and all(f"{name}.{local_name}" in frozen for local_name, _ in module.named_parameters())
    }


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Full name -> parameter of every adapter, in the model's order; one that adapters share under its first name."""
    names: dict[nn.Parameter, str] = {}
    for name, adapter in adapter_modules(model).items():
        for local_name, parameter in adapter.own_parameters():
            names.setdefault(parameter, f"{name}.{local_name}")
    return {name: parameter for parameter, name in names.items()}


def stored_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """These and whatever else is trained, in `modules_to_save`: what an adapter file holds."""
    own = adapter_parameters(model)
    return own | {name: p for name, p in model.named_parameters() if p.requires_grad and name not in own}


def init_tensor(
    model: nn.Module, name: str, seed: int, read: Callable[[str, int, int | None], Tensor] | None = None
) -> Tensor:
    """Initial value (fp32, CPU) of the adapter parameter called `name`, which may itself be on the meta device.

    read: (name of an adapted module, start, stop) -> elements of its flattened dense weight; None: it is in the model.
    """
    found = _adapter_of(model, name)
    if found is None:
        raise ValueError(f"{name!r} is not a parameter of an adapter of this model")
    adapter_name, local_name = found
    adapter = model.get_submodule(adapter_name)

    def base_weight(start: int = 0, stop: int | None = None) -> Tensor:
        if read is not None:
            return read(adapter_name, start, stop)
        return adapter.base.dense_weight().reshape(-1)[start:stop]

    return adapter.init_from_base(local_name, named_generator(seed, name), base_weight)


def _adapter_of(model: nn.Module, name: str) -> tuple[str, str] | None:
    """(name of the adapter, local name) of the adapter parameter called `name`; None for any other parameter."""
    path = name.split(".")
    for depth in range(len(path) - 1, 0, -1):  # the innermost: an adapter may wrap another
        adapter_name = ".".join(path[:depth])
        if isinstance(model.get_submodule(adapter_name), AdapterModule):
            return adapter_name, ".".join(path[depth:])
    return None


def to_file(model: nn.Module, name: str, values: Tensor, base_weight: Callable[[str], Tensor]) -> Tensor:
    """What an adapter file holds where the stored parameter `name` is `values` (fp32).

    base_weight: name of an adapted module -> its base's dense weight as it was trained with; called where needed only.
    """
    found = _adapter_of(model, name)
    if found is None:
        return values
    adapter_name, local_name = found
    return model.get_submodule(adapter_name).to_file(local_name, values, lambda: base_weight(adapter_name))


def from_file(model: nn.Module, name: str, values: Tensor, base_weight: Callable[[str], Tensor]) -> Tensor:
    """Inverse of `to_file`."""
    found = _adapter_of(model, name)
    if found is None:
        return values
    adapter_name, local_name = found
    return model.get_submodule(adapter_name).from_file(local_name, values, lambda: base_weight(adapter_name))


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose stream depends on (seed, name) alone. SHA-256, as Python's `hash` differs per process."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
