"""Hugging Face model folders: load one into a `CausalLM`, write one that transformers loads.

A folder is config.json, weights (`model.safetensors`, or shards with an index), and tokenizer files. Reading weights is
weights.py; this file knows which names a model wants, and writes. Writing streams: the headers are computed from names,
dtypes and shapes alone, then each tensor goes to its place in whatever order it comes, so that a model larger than
memory can be written from shards.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minift.json_file import read_object
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.weights import INDEX_FILE, SINGLE_FILE, TensorSpec, WeightReader, encode_header

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "generation_config.json",
)
TIED_HEAD = "lm_head.weight"
_WRITE_ELEMENTS = 1 << 21  # how much of a tensor is cast, or fetched from a device, at a time: a few MiB


def load_config(folder: str | Path) -> ModelConfig:
    """The folder's config.json; ValueError if there is none or it describes a model we would compute wrongly."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a Hugging Face model folder has one.")
    hf = read_object(path)
    try:
        return ModelConfig.from_hf(hf)
    except ValueError as error:
        raise ValueError(f"{path.parent}: {error}") from None


def load_model(folder: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> CausalLM:
    """The whole model in this process, weights cast to `dtype` one tensor at a time."""
    with torch.device("meta"):
        model = CausalLM(load_config(folder))
    reader = WeightReader(folder)
    check_weights(reader, model)
    fill_parameters(model, lambda name: reader.read(name).to(device=device, dtype=dtype))
    return model


def fill_parameters(model: CausalLM, read: Callable[[str], Tensor]) -> None:
    """Give every parameter of a model on the meta device the value `read(name)`, in its dtype and on its device."""
    for name, parameter in list(model.named_parameters()):
        module_name, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module_name), attribute, nn.Parameter(read(name), parameter.requires_grad))
    model.tie_weights()


def check_weights(reader: WeightReader, model: CausalLM) -> None:
    """ValueError unless the folder has every parameter of `model` in its shape, and nothing else.

    Allowed extras change nothing: a stored copy of a tied head, and the rotary frequencies that old files carry.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored = {name for name in reader.names() if not name.endswith(".rotary_emb.inv_freq")}
    if model.config.tie_word_embeddings:
        stored.discard(TIED_HEAD)
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    problems += [f"{name} has no place in the model" for name in sorted(stored - wanted.keys())]
    problems += [
        f"{name} has shape {reader.shape(name)} where {shape} is expected"
        for name, shape in wanted.items()
        if name in stored and reader.shape(name) != shape
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError(f"{reader.folder}: the weights do not fit config.json: {'; '.join(problems[:5])}{more}.")


def save_model(
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    folder: str | Path,
    specs: Mapping[str, TensorSpec],
    max_shard_bytes: float = 5e9,
    source_folder: str | Path | None = None,
    quantization_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that `load_model` and transformers load; holds one tensor at a time, and a few MiB.

    `specs` announces every tensor as (dtype, shape); `tensors` then brings exactly those, in any order, from any
    device, and in any dtype: it is cast to the announced one on the way. Each is let go before the next is asked for,
    so an iterator may hand out views of what it gathered. Shards are filled greedily in the order of `specs`, as
    transformers does. The head of a tied model is not written. Tokenizer files and generation_config.json are copied
    from `source_folder`; `quantization_config` goes into config.json. Weight files get their names when all bytes are
    written. ValueError if the folder has weights already, or if tensors and specs disagree.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    existing = sorted(path.name for path in folder.glob("[!.]*.safetensors*"))
    if existing:
        raise ValueError(f"{folder} has weights already ({existing[0]}); give a new folder, or remove them first.")
    ignored = TIED_HEAD if config.tie_word_embeddings else None
    specs = {name: spec for name, spec in specs.items() if name != ignored}

    shards = _plan_shards(specs, max_shard_bytes)
    _write_tensors(tensors, ignored, specs, shards, folder)
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(shape) for _, shape in specs.values()),
                "total_size": sum(_num_bytes(spec) for spec in specs.values()),
            },
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        _write_json(folder / INDEX_FILE, index)
    bytes_of_dtype: dict[torch.dtype, int] = {}
    for dtype, shape in specs.values():
        bytes_of_dtype[dtype] = bytes_of_dtype.get(dtype, 0) + _num_bytes((dtype, shape))
    main_dtype = max(bytes_of_dtype, key=bytes_of_dtype.__getitem__)
    hf = config.to_hf(dtype=str(main_dtype).removeprefix("torch."))
    if quantization_config is not None:
        hf["quantization_config"] = dict(quantization_config)
    _write_json(folder / "config.json", hf)
    if source_folder is not None:
        copy_tokenizer_files(source_folder, folder)


def copy_tokenizer_files(source_folder: str | Path, folder: str | Path) -> None:
    """Copy whatever of the tokenizer, its chat templates and generation_config.json the source has."""
    for name in TOKENIZER_FILES:
        source = Path(source_folder) / name
        if source.is_dir():
            shutil.copytree(source, Path(folder) / name, dirs_exist_ok=True)
        elif source.is_file():
            shutil.copyfile(source, Path(folder) / name)


def _plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: float) -> dict[str, list[str]]:
    """File name -> names of its tensors."""
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, spec in specs.items():
        if shards[-1] and shard_bytes + _num_bytes(spec) > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += _num_bytes(spec)
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, start=1)}


def _write_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    ignored: str | None,
    specs: Mapping[str, TensorSpec],
    shards: Mapping[str, list[str]],
    folder: Path,
) -> None:
    partial = {file: folder / f".{file}.partial" for file in shards}
    places: dict[str, tuple[Path, int]] = {}
    for file, names in shards.items():
        # Larger elements first, as the safetensors library does: every tensor is then aligned to its elements.
        by_size = sorted(names, key=lambda name: -specs[name][0].itemsize)
        places |= _write_header(partial[file], {name: specs[name] for name in by_size})
    for name, tensor in tensors:
        if name != ignored:
            if name not in places:
                raise ValueError(f"Tensor {name} was not announced, or came twice.")
            dtype, shape = specs[name]
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"Tensor {name} is {tuple(tensor.shape)}, announced as {tuple(shape)}.")
            _write_at(*places.pop(name), tensor, dtype)
        del tensor  # a view of a gathered unit, perhaps: with it alive, the next one would be gathered beside it
    if places:
        raise ValueError(f"{len(places)} announced tensors did not come, e.g. {next(iter(places))}.")
    for file, path in partial.items():
        path.rename(folder / file)


def _write_header(path: Path, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[Path, int]]:
    """Create the file at its final size, header written; returns where each tensor's bytes go."""
    header, begins = encode_header(specs, {"format": "pt"})
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(map(_num_bytes, specs.values())))
    return {name: (path, begin) for name, begin in begins.items()}


def _write_at(path: Path, offset: int, tensor: Tensor, dtype: torch.dtype) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        for piece in tensor.detach().reshape(-1).split(_WRITE_ELEMENTS):
            file.write(memoryview(piece.to("cpu", dtype).view(torch.uint8).numpy()))


def _num_bytes(spec: TensorSpec) -> int:
    dtype, shape = spec
    return math.prod(shape) * dtype.itemsize


def _write_json(path: Path, content: object) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
