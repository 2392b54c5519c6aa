"""Sharded training checkpoints: every rank writes its own shard, and any number of ranks can load them.

    checkpoints/step-00000120/
        rank-00000-of-00002.safetensors   "<shard>/master", "<shard>/exp_avg", "<shard>/exp_avg_sq": 1-D fp32; "rng/…"
        rank-00001-of-00002.safetensors   metadata: which elements of which parameter each element of a shard is
        manifest.json                     step, optimizer step, data state, base fingerprint, sha256 of every file

Only what is trained is stored: a LoRA checkpoint holds adapters and their moments, not the base model, whose
fingerprint stands in the manifest. Positions are global (parameter, element), so loading is a copy of ranges and the
writer's world size does not matter; on the same one the restored state is bitwise what was saved, generators included.

The folder is written under a temporary name, flushed, given its manifest last and renamed. A folder without a manifest
is not a checkpoint; one whose files do not match their checksums is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minift.checkpoint.atomic import flush
from minift.dist.collectives import gather_objects
from minift.dist.process import World
from minift.dist.seeds import rng_state, set_rng_state
from minift.optim.adamw import AdamW
from minift.optim.shard import FlatShard, ParamRange

FORMAT = 1
MANIFEST = "manifest.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Standing:
    """Where a run stands, on every rank alike. `loader` and `base` are JSON; `step` counts finished optimizer steps."""

    step: int
    loader: dict[str, Any]
    base: dict[str, Any]


def save_checkpoint(
    parent: Path, standing: Standing, shards: list[FlatShard], optimizer: AdamW, world: World, keep_last: int
) -> Path:
    """Write `parent/step-<step>` together with all ranks, then remove all but the newest `keep_last`. Collective.

    Raises on every rank if any rank could not write (disk full); what was there before is untouched then.
    """
    folder = parent / f"step-{standing.step:08d}"
    temporary = parent / f".{folder.name}.tmp"
    _, failure = _attempt(lambda: _make_empty(temporary)) if world.is_main else ("", "")
    _raise_first_failure(gather_objects((temporary.name, "", failure), world), temporary, world)

    file_name = f"rank-{world.rank:05d}-of-{world.size:05d}.safetensors"
    written = _attempt(lambda: _write_rank_file(temporary / file_name, shards, optimizer))
    files = gather_objects((file_name, *written), world)
    _raise_first_failure(files, temporary, world)

    failure = ""
    if world.is_main:
        manifest = {
            "format": FORMAT,
            "world_size": world.size,
            "optimizer_step": optimizer.num_steps,
            "files": {name: digest for name, digest, _ in files},
            **asdict(standing),
        }
        _, failure = _attempt(lambda: _commit(temporary, folder, manifest))
    _raise_first_failure(gather_objects((MANIFEST, "", failure), world), temporary, world)
    if world.is_main:
        for old in list_checkpoints(parent)[:-keep_last]:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _make_empty(temporary: Path) -> str:
    """Also clears what saves that were killed have left behind."""
    for leftover in temporary.parent.glob(".step-*.tmp"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    return ""


def _write_rank_file(path: Path, shards: list[FlatShard], optimizer: AdamW) -> str:
    moments = optimizer.state_dict()
    tensors = {f"rng/{name}": state for name, state in rng_state().items()}
    for shard in shards:
        tensors[f"{shard.name}/master"] = shard.master
        for moment in _MOMENTS:
            tensors[f"{shard.name}/{moment}"] = moments[shard.name][moment]
    ranges = {shard.name: [asdict(r) for r in shard.ranges] for shard in shards}
    save_file({name: t.cpu() for name, t in tensors.items()}, path, metadata={"ranges": json.dumps(ranges)})
    flush(path)
    return _sha256(path)


def _commit(temporary: Path, folder: Path, manifest: dict[str, Any]) -> str:
    path = temporary / MANIFEST
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    flush(path)
    flush(temporary)
    if folder.exists():  # the same step again, after a resume: the new one replaces it
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    flush(folder.parent)
    return ""


def _attempt(write: Any) -> tuple[str, str]:
    """(result, "") or ("", what went wrong): a rank that fails must still take part in the collectives that follow."""
    try:
        return write(), ""
    except Exception as error:  # safetensors raises its own type on a full disk
        return "", f"{type(error).__name__}: {error}"


def _raise_first_failure(results: list[tuple[str, str, str]], temporary: Path, world: World) -> None:
    for name, _, failure in results:
        if failure:
            if world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)  # half a checkpoint on a full disk helps nobody
            raise OSError(f"no checkpoint was written to {temporary.parent}: {name}: {failure}. Older ones are intact.")


def list_checkpoints(parent: Path) -> list[Path]:
    """Complete checkpoints below `parent`, oldest first. Folders without a manifest were never finished."""
    if not parent.is_dir():
        return []
    return sorted(p for p in parent.iterdir() if _FOLDER.fullmatch(p.name) and (p / MANIFEST).is_file())


def load_checkpoint(folder: Path, shards: list[FlatShard], optimizer: AdamW, world: World) -> Standing:
    """Fill masters, moments and (on the writer's world size) generators from `folder`; return where the run stood.

    ValueError, with nothing changed, if a file is missing or damaged or if the trained parameters are not the same.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise ValueError(f"{folder} has checkpoint format {manifest['format']}; this version reads {FORMAT}")
    _check_files(folder, manifest["files"], world)
    stored = _StoredRanges([folder / name for name in manifest["files"]])
    wanted = [r for shard in shards for r in shard.ranges]
    stored.check(wanted, folder, world)
    moments = optimizer.state_dict()  # the optimizer's own tensors: filled in place, never held twice
    for shard in shards:
        for r in shard.ranges:
            stored.copy(r, "master", shard.master[r.start : r.stop])
            for moment in _MOMENTS:
                stored.copy(r, moment, moments[shard.name][moment][r.start : r.stop])
    optimizer.num_steps = manifest["optimizer_step"]
    if manifest["world_size"] == world.size:
        set_rng_state(stored.rng(world.rank))
    return Standing(manifest["step"], manifest["loader"], manifest["base"])


def _check_files(folder: Path, digests: dict[str, str], world: World) -> None:
    """Each rank reads its share of the files; all of them raise if one is missing or damaged."""
    damaged = [
        name
        for name in list(digests)[world.rank :: world.size]
        if not (folder / name).is_file() or _sha256(folder / name) != digests[name]
    ]
    for name in sum(gather_objects(damaged, world), []):
        raise ValueError(f"{folder / name} is missing or damaged (its checksum differs from the manifest's)")


class _StoredRanges:
    """All files of a checkpoint as one map from (parameter, element) to bytes on disk."""

    def __init__(self, paths: list[Path]) -> None:
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._ranges: dict[str, list[tuple[int, str, ParamRange]]] = {}  # parameter -> (file index, shard, range)
        for index, file in enumerate(self._files):
            for shard_name, ranges in json.loads(file.metadata()["ranges"]).items():
                for fields in ranges:
                    stored = ParamRange(**{**fields, "full_shape": tuple(fields["full_shape"])})
                    self._ranges.setdefault(stored.name, []).append((index, shard_name, stored))

    def check(self, wanted: list[ParamRange], folder: Path, world: World) -> None:
        """Both sides must train exactly the same parameters, of the same shapes."""
        here: dict[str, tuple[int, ...]] = {}
        for names in gather_objects({r.name: r.full_shape for r in wanted}, world):
            here |= names
        there = {name: entries[0][2].full_shape for name, entries in self._ranges.items()}
        for name in sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                raise ValueError(
                    f"{folder} does not fit this run: parameter {name} is {there.get(name, 'not trained')} there and "
                    f"{here.get(name, 'not trained')} here"
                )

    def copy(self, wanted: ParamRange, what: str, destination: Tensor) -> None:
        """Fill `destination` (1-D) with `what` ("master", "exp_avg", …) of the elements that `wanted` names."""
        begin = wanted.param_start
        end = begin + wanted.stop - wanted.start
        for index, shard_name, stored in self._ranges[wanted.name]:
            first, last = max(begin, stored.param_start), min(end, stored.param_start + stored.stop - stored.start)
            if first < last:
                offset = stored.start - stored.param_start
                source = self._files[index].get_slice(f"{shard_name}/{what}")[first + offset : last + offset]
                destination[first - begin : last - begin].copy_(source)

    def rng(self, rank: int) -> dict[str, Tensor]:
        file = self._files[rank]
        return {name.removeprefix("rng/"): file.get_tensor(name) for name in file.keys() if name.startswith("rng/")}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
