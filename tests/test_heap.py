"""Oracle: how often the kernel had to give the process a page."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from minift.heap import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def use(num_mib):
    tensors = [torch.ones(2**18) for _ in range(num_mib)]

torch.ones(2**18)
keep_freed_memory()
use(200)
before = faults()
use(200)
print(faults() - before)
"""


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="of glibc")
@pytest.mark.parametrize("variable", [None, "MALLOC_MMAP_THRESHOLD_"])
def test_memory_that_was_let_go_is_taken_again(variable):
    """200 MiB in pieces of one, twice: the second time hardly a page is new, unless the user has wishes of his own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if variable is not None:
        environment[variable] = "65536"
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    num_pages = 200 * 2**20 // os.sysconf("SC_PAGESIZE")
    faults = int(done.stdout)
    assert faults < num_pages // 5 if variable is None else faults > num_pages // 2
