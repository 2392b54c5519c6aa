"""One format for what was measured, and where it is kept.

    args = results.parse(parser)                 the options that all benchmarks share; waits for a quiet machine
    results.finish(args, Result(...), draw)      last line of the output, file, picture

The last line that a benchmark prints is one JSON object: `question`, every entry of `values` at its top, then `rows`,
and what is needed to repeat and to judge it:

    parameters  what the command line said, defaults included
    command     that line itself
    commit      of the code that was measured, with a + if it was changed since
    conditions  {"quiet": ..., "foreign_share": [smallest, largest], "noise": ...}, see `protocol`; {} where nothing
                was timed
    machine     `describe_machine`
    date

`--write` puts it into benchmarks/results/<date>_<hardware>_<question>.json: {"question", "date", "machine", "runs":
[...]}, a run for each set of parameters, and draws all of them beside it, light and dark, with the benchmark's
`draw(figure, theme, runs)`. The README's numbers are made from these files (`readme`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from protocol import Times, wait_until_quiet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

HERE = Path(__file__).parent
FOLDER = HERE / "results"
PEERS = ("transformers", "peft", "bitsandbytes", "nvidia-cudnn-frontend")
Draw = Callable[["Figure", "Theme", list[dict[str, Any]]], None]

_SHARED_OPTIONS = ("write", "picture", "busy")
_MICROARCHITECTURES = {  # (vendor, family): [(first model, name)], ascending
    ("AuthenticAMD", 23): [(0x00, "zen1"), (0x30, "zen2")],
    ("AuthenticAMD", 25): [(0x00, "zen3"), (0x10, "zen4"), (0x20, "zen3"), (0x60, "zen4")],
    ("AuthenticAMD", 26): [(0x00, "zen5")],
    ("GenuineIntel", 6): [
        (0x3F, "haswell"), (0x4F, "broadwell"), (0x55, "skylake"), (0x6A, "icelake"), (0x8F, "sapphirerapids"),
        (0xAD, "graniterapids"), (0xCF, "emeraldrapids"),
    ],
}  # fmt: skip


@dataclass
class Result:
    """values: {name: number, or a dict of them}; rows: those of the printed table."""

    question: str
    values: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)

    def count(self, times: Times) -> None:
        """Add what the machine was like while `times` were taken to the conditions."""
        shares = [*self.conditions.get("foreign_share", []), *times.foreign]
        self.conditions = {
            "quiet": self.conditions.get("quiet", True) and times.is_quiet,
            "foreign_share": [round(min(shares), 3), round(max(shares), 3)],
            "noise": round(max(self.conditions.get("noise", 1.0), times.noise(len(times.counted_rounds()))), 4),
        }


# ------------------------------------------------------------------------------------------------------ command line


def parse(
    parser: argparse.ArgumentParser, arguments: list[str] | None = None, is_timed: bool = True
) -> argparse.Namespace:
    """The options, with those of every benchmark; returns when the machine is quiet, if something `is_timed`."""
    group = parser.add_argument_group("of every benchmark")
    group.add_argument("--write", action="store_true", help="keep the result, and its picture, in benchmarks/results/")
    group.add_argument("--picture", type=Path, metavar="PNG", help="draw this result; for dark pages in ..._dark.png")
    group.add_argument("--busy", action="store_true", help="measure although others use the processors")
    args = parser.parse_args(arguments)
    if is_timed and not args.busy:
        wait_until_quiet()
    return args


def finish(args: argparse.Namespace, result: Result, draw: Draw | None = None) -> None:
    """Print the last line; write and draw if asked to."""
    run = {
        "values": result.values,
        "rows": result.rows,
        "parameters": {k: _plain(v) for k, v in vars(args).items() if k not in _SHARED_OPTIONS},
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": _commit(),
        "conditions": result.conditions,
    }
    if result.conditions and not result.conditions["quiet"]:
        print("others used the machine meanwhile: read these as a hint, not as a measurement", file=sys.stderr)
    pictures = []
    if args.write:
        path = keep(result.question, run)
        print(f"wrote {path}", file=sys.stderr)
        pictures.append((path.with_suffix(".png"), runs_of(path)))
    if args.picture:
        pictures.append((args.picture, [run]))
    for path, runs in pictures if draw is not None else []:
        draw_picture(path, draw, runs)
    about = {"machine": describe_machine(), "date": str(datetime.date.today())}
    rest = {key: run[key] for key in ("rows", "parameters", "command", "commit", "conditions")}
    print(json.dumps({"question": result.question, **result.values, **rest, **about}))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../minift", "../csrc", ".", ":!results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# -------------------------------------------------------------------------------------------------------------- files


def keep(question: str, run: dict[str, Any]) -> Path:
    """Add `run` to today's file of the question, in the place of the one with the same parameters."""
    machine = describe_machine()
    path = FOLDER / f"{datetime.date.today()}_{machine['hardware']}_{question}.json"
    content = {"question": question, "date": str(datetime.date.today()), "machine": machine, "runs": []}
    others = runs_of(path) if path.exists() else []
    content["runs"] = [other for other in others if other["parameters"] != run["parameters"]] + [run]
    FOLDER.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    unfinished.replace(path)
    return path


def files_of(question: str, hardware: str) -> list[Path]:
    """The files of a question on a machine, newest first."""
    paths = sorted(FOLDER.glob(f"*_{hardware}_{question}.json"), reverse=True)
    return [path for path in paths if path.stem.split("_", 2)[2] == question]


def runs_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["runs"]


def draw_picture(path: Path, draw: Draw, runs: list[dict[str, Any]]) -> None:
    """Light at `path`, dark beside it."""
    from minift.style import save_light_and_dark

    for drawn in save_light_and_dark(path, lambda figure, theme: draw(figure, theme, runs)):
        print(f"drew {drawn}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------ machine


def describe_machine() -> dict[str, Any]:
    """What the numbers depend on. `hardware` is short enough for a file name: zen4-2vcpu."""
    cpu = _cpu()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PEERS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "hardware": _slug(gpus[0]) if gpus else f"{cpu['name']}-{os.cpu_count()}{'vcpu' if cpu['virtual'] else 'cpu'}",
        "cpu": cpu["model"],
        "cpus": os.cpu_count(),
        "instructions": cpu["instructions"],
        "memory_gib": round(memory_bytes / 2**30, 1),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
    }


def _cpu() -> dict[str, Any]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = dict(re.findall(r"^(.*?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))
    flags = fields.get("flags", "").split()
    vendor, family, model = (fields.get(key, "0") for key in ("vendor_id", "cpu family", "model"))
    name = _slug(platform.machine())
    for first_model, microarchitecture in _MICROARCHITECTURES.get((vendor, int(family)), []):
        if int(model) >= first_model:
            name = microarchitecture
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "name": name,
        "model": f"{fields.get('model name', platform.processor() or platform.machine())} ({name})",
        "virtual": "hypervisor" in flags,
        "instructions": [flag for flag in wanted if flag in flags],
    }


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower().removeprefix("nvidia ")).strip("-")
