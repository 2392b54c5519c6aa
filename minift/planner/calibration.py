"""Figures of one machine, as `calibrate` measured them: devices and networks by the number of processes at work, kept
as JSON in $XDG_CACHE_HOME/minift (~/.cache/minift).

    calibration = find_calibration("cpu")               None: this machine was not measured
    calibration.device(2), calibration.network(2)
"""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

from minift.planner.device import Deviation, Device, Rate
from minift.planner.network import Network, Protocol

FORMAT = 1


@dataclass(frozen=True)
class Calibration:
    """devices and networks of 1, 2, ... processes (those that were measured). machine: what `describe_machine`
    said."""

    machine: str
    date: str
    num_threads: dict[int, int]
    devices: dict[int, Device]
    networks: dict[int, Network]

    def device(self, num_processes: int) -> Device:
        """One process's share where so many are at work. More than were measured share the same processors: each gets
        so much less. ValueError if the smallest number that was measured is larger."""
        nearest = max((n for n in self.devices if n <= num_processes), default=None)
        if nearest is None:
            raise ValueError(f"this machine was calibrated with {sorted(self.devices)} processes, not {num_processes}")
        return self.devices[nearest].slower(num_processes / nearest)

    def network(self, num_processes: int) -> Network:
        """Between processes of this machine that do not share memory; and how long all take to meet."""
        nearest = max(n for n in self.networks if n <= num_processes)
        return self.networks[nearest]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"format": FORMAT, **_plain(asdict(self))}, indent=1), encoding="utf-8")
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """FileNotFoundError; ValueError for a file that is none of this format."""
        try:
            record = _with_infinities(json.loads(path.read_text(encoding="utf-8")))
            if record["format"] != FORMAT:
                raise KeyError("format")
            return cls(
                record["machine"],
                record["date"],
                {int(n): threads for n, threads in record["num_threads"].items()},
                {int(n): _device(fields) for n, fields in record["devices"].items()},
                {int(n): _network(fields) for n, fields in record["networks"].items()},
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            again = "minift plan --calibrate writes a new one"
            raise ValueError(f"{path} is no calibration of this version ({error!r}); {again}") from None


def calibration_path(kind: str) -> Path:
    """Where the figures of this machine's "cpu" or "cuda" are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "minift" / f"calibration-{kind}.json"


def find_calibration(kind: str) -> Calibration | None:
    """That of this machine's processors ("cpu") or GPUs ("cuda"), if there is one. ValueError for a file that cannot be
    read."""
    path = calibration_path(kind)
    found = Calibration.load(path) if path.is_file() else None
    return found if found is not None and found.machine == describe_machine(kind) else None


def describe_machine(kind: str) -> str:
    """Its GPU, or its processor and their number, so that figures of another machine are recognised."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} processors"


def _device(fields: dict[str, Any]) -> Device:
    rates = {
        key: Rate(**rate | {"deviations": tuple(Deviation(**one) for one in rate["deviations"])})
        for key, rate in fields["rates"].items()
    }
    return Device(**fields | {"rates": rates})


def _network(fields: dict[str, Any]) -> Network:
    return Network(**fields | {"protocols": tuple(Protocol(**one) for one in fields["protocols"])})


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return "inf" if value == math.inf else value


def _with_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_infinities(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_infinities(item) for item in value]
    return math.inf if value == "inf" else value
