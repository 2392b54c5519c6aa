"""What `checkpoint.py` compares: the same training state held and saved by minift, and by PyTorch's DCP."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from minift.checkpoint.manifest import Standing
from minift.checkpoint.saver import Saver
from minift.checkpoint.sharded import load_checkpoint
from minift.dist.process import World
from minift.model.decoder import CausalLM
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.shard import FlatShard, ParamRange


class Minift:
    """Flat shards of the units of `model`, fp32 in halves, saved by a `Saver`, which waits in the optimizer."""

    def __init__(self, model: CausalLM, world: World, folder: Path, name: str) -> None:
        self.world, self.folder = world, folder
        units: dict[str, list[ParamRange]] = defaultdict(list)
        for key, parameter in model.named_parameters():
            ranges = units[key.split(".")[2] if key.startswith("model.layers.") else "root"]
            start, numel = ranges[-1].stop if ranges else 0, parameter.numel() // world.size
            ranges.append(ParamRange(key, start, start + numel, world.rank * numel, tuple(parameter.shape)))
        shards = []
        for unit, ranges in units.items():
            numel = ranges[-1].stop
            halves = [torch.zeros(numel, dtype=dtype) for dtype in (torch.bfloat16, torch.int16)]
            shards.append(FlatShard(unit, halves[0], torch.full((numel,), 1e-3), ranges, halves[1]))
        self.optimizer = AdamW(shards, OptimConfig())
        self._saver = Saver(folder, self.optimizer, world, replace(world, rank=0, size=1), keep_last=1)

    def begin(self) -> None:
        """Start to save in the background."""
        self._saver.start(Standing(1, {}, {}))

    def finish(self) -> None:
        self._saver.wait()

    def save(self) -> None:
        self.begin()
        self.finish()

    def load(self) -> None:
        load_checkpoint(self.folder / "step-00000001", self.optimizer, self.world)


class Dcp:
    """DTensors of every parameter and moment, each in memory of its own, as `fully_shard` has them."""

    def __init__(self, model: CausalLM, world: World, folder: Path, name: str) -> None:
        self.folder = folder
        mesh = init_device_mesh("cpu", (world.size,))
        shards, shapes = [], {}
        for key, parameter in model.named_parameters():
            numel = parameter.numel() // world.size
            shapes[key] = (parameter.shape[0] // world.size, *parameter.shape[1:])
            everything = [ParamRange(key, 0, numel, world.rank * numel, tuple(parameter.shape))]
            shards.append(FlatShard(key, torch.zeros(numel), torch.full((numel,), 1e-3), everything))
        self.optimizer = AdamW(shards, OptimConfig())
        self.optimizer.before_update = self._wait_for_staging

        def whole(key: str, local: Tensor) -> DTensor:
            return DTensor.from_local(local.view(shapes[key]), mesh, [Shard(0)])

        states = self.optimizer.state_dict()
        moments = {s.name: {what: whole(s.name, t) for what, t in states[s.name].items()} for s in shards}
        self._state = {"model": {s.name: whole(s.name, s.master) for s in shards}, "optim": {"state": moments}}
        self._planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        self._stager = DefaultStager(StagingOptions(False, False, True, False)) if name == "dcp staged" else None
        self._staged: Future | None = None

    def begin(self) -> None:
        writer = dcp.FileSystemWriter(self.folder)
        self._uploaded = dcp.async_save(
            self._state, storage_writer=writer, planner=self._planner, async_stager=self._stager
        )
        if self._stager is not None:
            self._staged, self._uploaded = self._uploaded.staging_completion, self._uploaded.upload_completion

    def _wait_for_staging(self, shard: FlatShard) -> None:
        if self._staged is not None:
            self._staged.result()

    def finish(self) -> None:
        self._uploaded.result()

    def save(self) -> None:
        dcp.save(self._state, storage_writer=dcp.FileSystemWriter(self.folder), planner=self._planner)

    def load(self) -> None:
        dcp.load(self._state, storage_reader=dcp.FileSystemReader(self.folder))


MAKERS = {"minift": Minift, "dcp staged": Dcp, "dcp": Dcp}
