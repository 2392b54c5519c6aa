"""Oracles: how often the kernel had to give the process a page; what malloc says is in use."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from minift.ops import matmul

PAGES = """
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


PRODUCTS = """
import ctypes, torch
from minift.cli import main

class Mallinfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2

def used_mib():
    heap = libc.mallinfo2()
    return (heap.uordblks + heap.hblkhd) / 2**20

try:
    main(["--help"])
except SystemExit:
    pass
rows = torch.ones(300, 64, dtype=torch.bfloat16)
weight = torch.ones(64, 64, dtype=torch.bfloat16)
before = used_mib()
for length in range(1, 301):
    rows[:length] @ weight
print(used_mib() - before)
"""

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library's heap is its own business"
)


def last_number(program: str, environment: dict[str, str]) -> float:
    """What a fresh interpreter prints last."""
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


@needs_glibc
@pytest.mark.parametrize("variable", [None, "MALLOC_MMAP_THRESHOLD_"])
def test_a_command_keeps_memory_that_it_lets_go(variable):
    """100 MiB in pieces of one, again and again: hardly a page is new, unless the user has wishes of his own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if variable is not None:
        environment[variable] = "65536"
    faults = last_number(PAGES, environment)
    num_pages = 5 * 100 * 2**20 // os.sysconf("SC_PAGESIZE")
    assert faults < num_pages // 50 if variable is None else faults > num_pages // 2


@needs_glibc
@pytest.mark.skipif(matmul._must_widen(torch.empty(0, dtype=torch.bfloat16)), reason="no product in 16 bits here")
def test_a_command_keeps_few_products_of_all_lengths():
    """Of 300 lengths oneDNN and PyTorch keep 64 each, or as many as the user says: here all."""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    few_mib = last_number(PRODUCTS, environment)
    all_mib = last_number(PRODUCTS, environment | dict.fromkeys(names, "1024"))
    assert all_mib > 0.1 * 300
    assert few_mib < all_mib / 3
