"""Sharded training checkpoints: every rank writes its own shard, and any number of ranks can load them.

    checkpoints/step-00000120/
        rank-00000-of-00002.safetensors   "<shard>/master", "<shard>/lower" (if fp32 masters are in two halves:
        rank-00001-of-00002.safetensors   `ops.halves`), "<shard>/exp_avg", "<shard>/exp_avg_sq" or what else
                                          `optim.moments` has: 1-D; "rng/…"; metadata: where in them the elements of
                                          which parameters are
        manifest.json                     step, optimizer step, data state, base fingerprint, checksum of every file

Only what is trained is stored: a LoRA checkpoint holds adapters and their moments, not the base model, whose
fingerprint stands in the manifest. Positions are global (parameter, element), so loading is a copy of ranges, and
neither the writer's world size nor its strategy (ZeRO-1/2/3, replicas) matters, nor whether fp32 weights are stored in
halves. On the same world size the restored state is bitwise what was saved, generators included; on another one the
generators start from their seeds.

A checkpoint is complete or not there, at every instant, also with `kill -9` (`saver` writes, `manifest` checks):

    1. .step-00000120.tmp/       made by rank 0; what killed saves have left goes away
    2. rank-*.safetensors        written by all ranks at once, flushed, read back and compared
    3. manifest.json             by rank 0 when all files are good; flushed, read back
    4. step-00000120/            the folder gets its name, and the folder above is flushed
    5. older ones are removed    all but `keep_last`

This file reads. A checkpoint that is not what was written is refused as a whole, on all ranks, before anything is
changed; the newest that is good is taken then.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minift.checkpoint.manifest import DamagedCheckpoint, Manifest, Standing, damage, list_checkpoints
from minift.checkpoint.saver import places_of, shard_states
from minift.checkpoint.stored_ranges import StoredRanges
from minift.dist.collectives import gather_objects
from minift.dist.process import World
from minift.dist.seeds import set_rng_state
from minift.optim.adamw import AdamW


@dataclass(frozen=True)
class Loaded:
    """What was loaded: from where, where the run stood, and a sentence about each newer checkpoint that was damaged."""

    folder: Path
    standing: Standing
    passed_over: tuple[str, ...]


def load_newest(parent: Path, optimizer: AdamW, world: World) -> Loaded | None:
    """Load the newest good checkpoint below `parent`; None if there is none at all. Collective.

    ValueError if all are damaged (a run does not silently begin anew), or if the newest good one does not fit.
    """
    passed_over: list[str] = []
    for folder in reversed(list_checkpoints(parent)):
        try:
            return Loaded(folder, load_checkpoint(folder, optimizer, world), tuple(passed_over))
        except DamagedCheckpoint as error:
            passed_over.append(str(error))
    if passed_over:
        raise DamagedCheckpoint(
            f"no checkpoint in {parent} is good ({'; '.join(passed_over)}). Remove the folder to begin anew."
        )
    return None


def load_checkpoint(folder: Path, optimizer: AdamW, world: World) -> Standing:
    """Fill masters, optimizer state and (on the writer's world size) generators from `folder`. Collective.

    Whoever keeps copies of the masters (`ShardedModel`) must be told. With nothing changed, and on all ranks alike:
    DamagedCheckpoint if a file is missing or not what was written; ValueError if it is not a checkpoint of these
    parameters, with this optimizer and these number formats.
    """
    manifest = _checked_manifest(folder, world)
    stored = StoredRanges([folder / name for name in manifest.files])
    states = shard_states(optimizer)  # the optimizer's own tensors: filled in place, never held twice
    for problem in gather_objects(_problem(stored, optimizer, world), world):
        if problem:
            raise ValueError(f"{folder} does not fit this run: {problem}")
    for shard in optimizer.shards:
        for wanted in shard.ranges:
            for start, values in stored.weights(wanted):
                shard.set_weights(values, wanted.start + start)
            for what, place in optimizer.places(shard, wanted).items():
                stored.copy(wanted, what, place.elements, states[shard.name][what][place.start : place.stop])
    optimizer.num_steps = manifest.optimizer_step
    if manifest.world_size == world.size:
        set_rng_state(stored.rng(world.rank))
    return manifest.standing


def _problem(stored: StoredRanges, optimizer: AdamW, world: World) -> str:
    """Both sides must train exactly the same parameters, of the same shapes, with the same state. Collective."""
    here: dict[str, tuple[int, ...]] = {}
    for shapes in gather_objects({r.name: r.full_shape for shard in optimizer.shards for r in shard.ranges}, world):
        here |= shapes
    there = stored.full_shapes()
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            trained = "not trained"
            return f"parameter {name} is {there.get(name, trained)} there and {here.get(name, trained)} here"
    for shard in optimizer.shards:
        tensors = shard_states(optimizer)[shard.name]
        for wanted in shard.ranges:
            dtypes = {what: tensors[what].dtype for what in places_of(optimizer, shard, wanted)}
            if problem := stored.problem(wanted, dtypes):
                return problem
    return ""


def _checked_manifest(folder: Path, world: World) -> Manifest:
    """Every rank reads the manifest and its share of the files; what one of them finds, all of them raise."""
    damages, refusal, manifest = [], "", None
    try:
        manifest = Manifest.read(folder)
        mine = list(manifest.files.items())[world.rank :: world.size]
        damages = [found for name, stored in mine if (found := damage(folder / name, stored))]
    except DamagedCheckpoint as error:
        damages = [str(error)]
    except ValueError as error:
        refusal = str(error)
    found = gather_objects((damages, refusal), world)
    for _, reason in found:
        if reason:
            raise ValueError(reason)
    for rank_damages, _ in found:
        for reason in rank_damages:
            raise DamagedCheckpoint(reason)
    assert manifest is not None
    return manifest
