"""Processes that are measured: one for each rank, started together in an environment of their own, and the memory that
they hold.

    run_ranks(2, time_rank, job)                    what `time_rank(world, job)` returns on each rank
    with Ranks(2, hold_rank, job, RETURNING) as ranks:
        ranks.watch()                               sums over the ranks, by what the ranks said they are doing

With RETURNING in the environment, blocks above 64 KiB are mapped one by one, so that freeing gives them back to the
system and what is resident is what is alive.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.queues import Queue, SimpleQueue
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist

from minift.dist.process import World

RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""For measuring memory: glibc gives what is let go back at once, so what is resident is what is alive."""
KEEPING = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_MAX_": "0"}
"""For measuring time, also of peers: glibc gives nothing back. By itself it gives back large tensors at once, and small
ones where it happens to; new pages then took up to a third of a peer's step, and up to a twentieth of minift's."""
TIMEOUT_S = 3600.0
_DONE = "done"


class Ranks:
    """`function(world, tell, job)` in `num_ranks` gloo processes of `num_threads` threads each.

    `tell(phase)` says what the rank does next, for `watch`. What the function returns is in `results()`.
    """

    def __init__(
        self,
        num_ranks: int,
        function: Callable[[World, Callable[[str], None], Any], Any],
        job: Any,
        environment: dict[str, str] | None = None,
        num_threads: int = 1,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._said: SimpleQueue = context.SimpleQueue()  # told before the rank goes on, not by a thread some time later
        self._results: Queue = context.Queue()
        self._folder = tempfile.TemporaryDirectory()
        settings = {"OMP_NUM_THREADS": str(num_threads)} | (environment or {})
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)  # a spawned process inherits them, and reads them before torch is loaded
        place = (f"{self._folder.name}/store", num_ranks, num_threads)
        self.processes = [
            context.Process(target=_serve, args=(rank, place, function, job, self._said, self._results), daemon=True)
            for rank in range(num_ranks)
        ]
        for process in self.processes:
            process.start()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill() if exception[0] else process.join()
        self._folder.cleanup()

    def results(self) -> list[Any]:
        """What each rank returned, in rank order; RuntimeError with the traceback of one that failed."""
        answers = {}
        for _ in self.processes:
            rank, failure, answer = self._next()
            if failure is not None:
                raise RuntimeError(f"rank {rank}:\n{failure}")
            answers[rank] = answer
        return [answers[rank] for rank in range(len(self.processes))]

    def _next(self) -> Any:
        """An answer, or RuntimeError as soon as a process has died without one."""
        waited_s = 0.0
        while waited_s < TIMEOUT_S:
            try:
                return self._results.get(timeout=1.0)
            except Empty:
                waited_s += 1.0
                dead = [rank for rank, process in enumerate(self.processes) if process.exitcode not in (None, 0)]
                if dead and self._results.empty():
                    raise RuntimeError(f"rank {dead[0]} died ({self.processes[dead[0]].exitcode})") from None
        raise RuntimeError(f"no answer in {TIMEOUT_S:.0f} s")

    def watch(self) -> dict[str, int]:
        """{phase: largest PSS in bytes, summed over the ranks} until all have returned. All ranks tell the same phases;
        what is sampled while some have told the next one and others have not counts for neither."""
        peaks: dict[str, int] = defaultdict(int)
        num_ranks, num_said, phase = len(self.processes), 0, "start"
        while phase != _DONE:
            total = self._total_pss_bytes()
            said = []
            while not self._said.empty():
                said.append(self._said.get())
            if not said and num_said % num_ranks == 0:
                peaks[phase] = max(peaks[phase], total)
            num_said += len(said)
            if num_said % num_ranks == 0:
                phase = said[-1] if said else phase
            if any(process.exitcode for process in self.processes):
                self.results()
        return dict(peaks)

    def _total_pss_bytes(self) -> int:
        try:
            return sum(pss_bytes(process.pid) for process in self.processes)
        except OSError:  # one has just ended
            return 0


def run_ranks(
    num_ranks: int,
    function: Callable[[World, Callable[[str], None], Any], Any],
    job: Any,
    environment: dict[str, str] | None = None,
    num_threads: int = 1,
) -> list[Any]:
    """What `function(world, tell, job)` returns on each rank; nobody listens to `tell`."""
    with Ranks(num_ranks, function, job, environment, num_threads) as ranks:
        return ranks.results()


def _serve(
    rank: int, place: tuple[str, int, int], function: Callable[..., Any], job: Any, said: SimpleQueue, results: Queue
) -> None:
    store, num_ranks, num_threads = place
    try:
        torch.set_num_threads(num_threads)
        dist.init_process_group("gloo", store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
        world = World(rank, num_ranks, rank, torch.device("cpu"), "gloo", dist.group.WORLD)
        results.put((rank, None, function(world, said.put, job)))
        said.put(_DONE)
        dist.barrier()  # nobody leaves while another still talks to it
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
        raise SystemExit(1) from None


# ------------------------------------------------------------------------------------------------------------- memory


def pss_bytes(pid: int) -> int:
    """Proportional set size: pages that several processes share are counted once in the sum over them."""
    return _kib(f"/proc/{pid}/smaps_rollup", "Pss") * 1024


def resident_bytes() -> int:
    """What of this process is in memory now."""
    return _kib("/proc/self/status", "VmRSS") * 1024


class PeakResident:
    """The most that was resident of this process since this was made."""

    def __init__(self) -> None:
        self.held_bytes = resident_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now

    def bytes(self) -> int:
        return _kib("/proc/self/status", "VmHWM") * 1024


def _kib(path: str, field: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise AssertionError(f"no {field} line in {path}")
