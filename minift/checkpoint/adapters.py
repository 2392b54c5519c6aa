"""Adapters on disk, exactly as PEFT 0.21 writes and reads them: `adapter_config.json` and `adapter_model.safetensors`.

Tensors come and go as {in-memory name: tensor}, so that a sharded model can hand in what it gathered; `adapter_files`
says how they are stored. What a method holds in another form than PEFT is turned by `peft.inject.to_file` and
`from_file`, what PEFT calls otherwise is renamed by `AdapterConfig.to_stored` and `from_stored`. Writing is atomic and
ends with reading back what was written; reading is strict: a missing, an unexpected, a misshapen or a non-finite tensor
is an error that names it, as is a PEFT feature that minift does not have. (An adapter that loads "with a warning" is
usually one whose B is still zero.)

    save_adapter(folder, config, file_tensors(model), base_model=...)
    config = load_adapter(model, folder)

Methods that PEFT does not have are stored in the same two files, under a `peft_type` that it refuses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minift.checkpoint.adapter_files import check_values, read_stored, write_tensors
from minift.checkpoint.atomic import atomic_folder
from minift.checkpoint.fingerprint import Sample, check_fingerprint, write_fingerprint
from minift.json_file import read_object
from minift.model.linear import Linear
from minift.peft.adapter import AdapterConfig
from minift.peft.inject import adapters, from_file, frozen_projections, inject, stored_parameters, to_file
from minift.peft.methods import METHODS
from minift.peft.patterns import ALL_LINEAR, matches
from minift.peft.peft_json import optional
from minift.peft.resident import Residents

CONFIG_FILE = "adapter_config.json"


def save_adapter(
    folder: str | Path,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    *,
    base_model: str | None = None,
    fingerprint: Mapping[str, Sample] | None = None,
    model: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int | None = None,
) -> None:
    """Write a new PEFT folder. `tensors`: every adapter parameter, whole, as files hold it, by its in-memory name, any
    dtype and device. dtype, max_shard_bytes: see `adapter_files`; PEFT reads any dtype, and one file only.

    `base_model` is recorded as the name or path by which PEFT finds the base, `fingerprint` to know it by; of `model`,
    its sizes, by methods whose files tell them, and full names where PEFT would take short ones for others, too.
    ValueError if `tensors` is empty or incomplete, or has a non-finite value; OSError if what was read back is not what
    was written.
    """
    on_cpu = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in tensors.items()}
    stored = config.to_stored(on_cpu)
    for key, tensor in stored.items():
        check_values(key, tensor)
    fields = config.to_peft() | {"base_model_name_or_path": base_model}
    if model is not None:
        fields |= config.base_fields(model) | _saved_whole(config, model)
    targets = fields.get("target_modules")
    if targets == ALL_LINEAR:
        # Spelled out, as PEFT does: readers other than PEFT want a list.
        fields["target_modules"] = sorted({name.rpartition(".")[2] for name in config.adapted_modules(tensors)})
    elif isinstance(targets, str):
        # A regular expression may also match modules that are no projections: PEFT refuses them, minift passes over.
        fields["target_modules"] = sorted(config.adapted_modules(tensors))
    with atomic_folder(Path(folder)) as temporary:
        (temporary / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if fingerprint is not None:
            write_fingerprint(temporary, fingerprint)
        write_tensors(temporary, stored, dtype, max_shard_bytes)


def read_config(folder: str | Path) -> AdapterConfig:
    """Settings of the adapter in `folder`. ValueError for a file, method or feature that minift cannot read."""
    with _fields_of(folder) as fields:
        method = next((method for method in METHODS if method.reads(fields)), None)
        if method is None:
            valid = ", ".join(dict.fromkeys(method.peft_type for method in METHODS))
            raise ValueError(f"peft_type is {fields.get('peft_type')!r}; valid: {valid}")
        return method.from_peft(fields)


def base_model_of(folder: str | Path) -> str | None:
    """Name or path of the base that the adapter in `folder` names; None if it names none. ValueError as above."""
    with _fields_of(folder) as fields:
        return optional(fields, "base_model_name_or_path", str, None)


@contextmanager
def _fields_of(folder: str | Path) -> Iterator[dict[str, Any]]:
    """What adapter_config.json says; a ValueError about it, while it is looked at, gets the file's name."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG_FILE}: not a PEFT adapter folder")
    fields = read_object(path)
    try:
        yield fields
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_tensors(folder: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of the adapter in `folder` by in-memory name, in the order of `shapes`, as the file holds them, fp32.

    `shapes`: name -> shape of every adapter parameter of the model. ValueError names what is missing, unexpected,
    misshapen, empty or non-finite.
    """
    tensors = read_unchecked(folder, read_config(folder), shapes)
    differences = (("lacks", shapes.keys() - tensors.keys()), ("has unexpected", tensors.keys() - shapes.keys()))
    for problem, names in differences:
        if names:
            shown = ", ".join(sorted(names)[:4])
            raise ValueError(f"{folder} {problem} {len(names)} of {len(shapes)} adapter tensors, among them {shown}")
    for name, shape in shapes.items():
        if tensors[name].shape != torch.Size(shape):
            raise ValueError(f"{folder}: {name} is {tuple(tensors[name].shape)}, the model needs {tuple(shape)}")
    return {name: tensors[name] for name in shapes}


def read_unchecked(
    folder: str | Path, config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Likewise, whatever there is: no tensor is compared with `shapes`, which only methods with one tensor for all
    modules need.

    One thing is passed over, `base_layer.weight`: PEFT stores a copy of the base weight beside an adapter on the LM
    head or the embedding, which the base folder has, too.
    """
    tensors = config.from_stored(read_stored(Path(folder)), shapes)
    for name in list(tensors):
        module = name.removesuffix(".base_layer.weight")
        if module != name and any(other.startswith(f"{module}.") and other != name for other in tensors):
            del tensors[name]
    return {name: tensor.float() for name, tensor in tensors.items()}


def load_adapter(model: nn.Module, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> AdapterConfig:
    """Inject the adapter in `folder` into a model that one process holds whole, and load its tensors, as `dtype`.
    ValueError if it does not fit, or was trained on another base."""
    config = read_config(folder)
    inject(model, config, dtype=dtype)
    projections = frozen_projections(model)
    check_fingerprint(
        folder,
        model,
        read=lambda name: projections[name].dense_weight(),
        is_quantized=lambda name: not isinstance(projections[name], Linear),
    )
    parameters = stored_parameters(model)
    tensors = read_tensors(folder, {name: tuple(p.shape) for name, p in parameters.items()})
    for name, parameter in parameters.items():
        parameter.data.copy_(from_file(model, name, tensors[name], partial(_base_weight, model)))
    return config


def load_resident(
    residents: Residents, name: str, folder: str | Path, *, dtype: torch.dtype = torch.float32, swap: bool = False
) -> None:
    """Add the adapter in `folder` as `name`; with `swap`, write its values into the tensors of the one called so. As
    `load_adapter` otherwise."""
    take = residents.replace if swap else residents.add
    take(name, read_config(folder), lambda model: load_adapter(model, folder, dtype=dtype))


def file_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What `save_adapter` takes, of a model that one process holds whole."""
    return {
        name: to_file(model, name, parameter.detach().float(), partial(_base_weight, model))
        for name, parameter in stored_parameters(model).items()
    }


def _saved_whole(config: AdapterConfig, model: nn.Module) -> dict[str, list[str]]:
    """`modules_to_save`, by full names if one is ambiguous: for PEFT "norm" is all that ends so, "input_layernorm",
    too."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    meant = [name for name in names if matches(name, config.modules_to_save)]
    taken = [name for name in names if name.endswith(tuple(config.modules_to_save))]
    return {} if taken == meant else {"modules_to_save": meant}


def _base_weight(model: nn.Module, name: str) -> Tensor:
    return adapters(model)[name].base.dense_weight()
