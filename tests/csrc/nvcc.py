"""Compiles the CUDA sources in the background, for GPUs and for the processor (tests/cuda_on_cpu): it takes minutes of
a processor that most tests leave idle.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.cuda_on_cpu import library

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = ["80", "90", "90a"]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

_pool = ThreadPoolExecutor(1)
_compiled: dict[Path, Future[Compiled]] = {}


def start() -> None:
    """Begin to compile all sources."""
    if library.compiler() is not None:
        _pool.submit(library.build)
    if NVCC is not None:
        for source in SOURCES:
            compiled(source)


@dataclass(frozen=True)
class Compiled:
    """stderr: what nvcc said, of every kernel, too. ptx: of sm_90."""

    returncode: int
    stderr: str
    ptx: str


def compiled(source: Path) -> Future[Compiled]:
    if source not in _compiled:
        _compiled[source] = _pool.submit(_compile, source)
    return _compiled[source]


def stop() -> None:
    """Leave what has not begun."""
    _pool.shutdown(wait=False, cancel_futures=True)


def _compile(source: Path) -> Compiled:
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
    command = [NVCC, "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-c", str(source), *targets]
    with TemporaryDirectory() as folder:
        command += ["-o", os.devnull, "--keep", "--keep-dir", folder]
        done = subprocess.run(["nice", *command], capture_output=True, text=True)
        ptx = Path(folder, f"{source.stem}.compute_90.ptx")
        return Compiled(done.returncode, done.stderr, ptx.read_text() if ptx.exists() else "")
