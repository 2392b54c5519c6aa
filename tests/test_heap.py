"""Oracle: how often the kernel had to give the process a page."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource
from minift.cli import main

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def use(times):
    for _ in range(times):
        blocks = [libc.malloc(2**20) for _ in range(100)]
        for block in blocks:
            ctypes.memset(block, 1, 2**20)
        for block in blocks:
            libc.free(block)

try:
    main(["--help"])
except SystemExit:
    pass
use(3)
before = faults()
use(5)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's heap is its own business")
@pytest.mark.parametrize("variable", [None, "MALLOC_MMAP_THRESHOLD_"])
def test_a_command_keeps_memory_that_it_lets_go(variable):
    """100 MiB in pieces of one, again and again: hardly a page is new, unless the user has wishes of his own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if variable is not None:
        environment[variable] = "65536"
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    num_pages = 5 * 100 * 2**20 // os.sysconf("SC_PAGESIZE")
    faults = int(done.stdout.splitlines()[-1])
    assert faults < num_pages // 50 if variable is None else faults > num_pages // 2
