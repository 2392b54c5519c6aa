"""minift's CUDA ops on the processor: builds their kernels with g++ and cuda_runtime.h beside this, and takes them up.

Everything of csrc/cuda is in it, the launchers and the checks as well; only nvcc's work and the speed are not.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "cuda_on_cpu"
NAMESPACE = "minift_cuda_on_cpu"
STABLE_ABI = re.search(r"-DTORCH_TARGET_VERSION=\w+", (ROOT / "setup.py").read_text()).group()

# The first macro renames the C++ namespace and that of the ops, which exist twice in one process.
FLAGS = ["-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-w", "-U_FORTIFY_SOURCE", "-ffp-contract=off"]
FLAGS += ["-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"]
FLAGS += ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]  # races.h is called
FLAGS += [f"-Dminift={NAMESPACE}", "-DMINIFT_CUDA_KEY=CPU", "-DMINIFT_MAX_BLOCKS=3", "-DMINIFT_WANTED_BLOCKS=9"]
FLAGS += [STABLE_ABI]


def compiler() -> str | None:
    """The path of a C++ compiler; None if there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def build() -> Path:
    """The library, made of what has changed since the last time."""
    sources = [ROOT / "csrc" / "registration.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.c*"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(_compile, sources))
    library = BUILD / f"{_hash(b''.join(path.name.encode() for path in objects))}.so"
    if not library.exists():
        directories = [f"-L{path}" for path in library_paths()]
        _run("-shared", *map(str, objects), *directories, "-ltorch_cpu", "-lc10", "-ltorch", output=library)
    return library


@functools.cache
def load() -> None:
    """Register torch.ops.minift_cuda_on_cpu."""
    torch.ops.load_library(str(build()))


@functools.cache
def op_names() -> list[str]:
    """The ops that have a CUDA kernel."""
    load()
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    return sorted(name.split("::")[1] for name in registered if name.startswith(f"{NAMESPACE}::"))


def op(name: str) -> torch._ops.OpOverload:
    """minift's op `name` with its CUDA kernel, for tensors on the CPU."""
    load()
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def guarded(memory: Tensor) -> Tensor:
    """A copy of uint8 (n,) that ends, but for less than 16 bytes, where memory ends that may be touched."""
    if len(memory) == 0:
        return memory
    num_pages = -(-(len(memory) + 15) // mmap.PAGESIZE)
    area = mmap.mmap(-1, (num_pages + 1) * mmap.PAGESIZE)
    first = ctypes.c_char.from_buffer(area)
    guard = ctypes.c_void_p(ctypes.addressof(first) + num_pages * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(guard, mmap.PAGESIZE, 0) == 0
    offset = num_pages * mmap.PAGESIZE - len(memory)
    offset -= (offset - memory.data_ptr()) % 16  # what was aligned stays so
    return torch.frombuffer(area, dtype=torch.uint8, count=len(memory), offset=offset).copy_(memory)


def _compile(source: Path) -> Path:
    headers = [*(ROOT / "csrc").rglob("*.h"), *Path(__file__).parent.glob("*.h")]
    text = b"".join(path.read_bytes() for path in [source, *sorted(headers)])
    digest = _hash(text + " ".join(FLAGS).encode() + torch.__version__.encode())
    target = BUILD / f"{source.name}.{digest}.o"
    if not target.exists():
        directories = [str(Path(__file__).parent), *include_paths(), sysconfig.get_path("include")]
        _run(*FLAGS, *(f"-I{path}" for path in directories), "-c", "-x", "c++", str(source), output=target)
    return target


def _run(*arguments: str, output: Path) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(f".{os.getpid()}")
    done = subprocess.run([compiler(), *arguments, "-o", str(unfinished)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unfinished.rename(output)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
