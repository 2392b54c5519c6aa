"""A CUDA device that is not there: tensors on it have a shape and a device, and no memory.

What runs on it takes every turn that Python code takes on a GPU: devices must agree, whoever would wait for the device
is told on, and so is whoever does not wait and should (`order`). Not here: values and kernels.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.cpp_extension import include_paths, library_paths

from minift.ops import nf4
from minift.ops.blockwise import dynamic_map
from tests.pretended_cuda.order import Moment, Order, Worker, running

ROOT = Path(__file__).parents[2]


def build(folder: Path) -> Path:
    """The library that makes a process believe in the device."""
    library = folder / "pretended_cuda.so"
    directories = [f"-I{path}" for path in include_paths()]
    for path in library_paths():
        directories += [f"-L{path}", f"-Wl,-rpath,{path}"]
    source = str(Path(__file__).with_name("device.cpp"))
    flags = ["-std=c++20", "-O1", "-w", "-fPIC", "-shared", source, *directories, "-lc10", "-ltorch_cpu"]
    subprocess.run([shutil.which("c++"), *flags, "-o", str(library)], check=True)
    return library


def run_with_device(library: Path, module: str) -> dict[str, Any]:
    """What `python -m module` finds in processes that believe in the device, of which each takes its part of the
    cases."""
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    environment["OMP_NUM_THREADS"] = "1"
    count = min(4, len(os.sched_getaffinity(0)))
    commands = [[sys.executable, "-m", module, str(number), str(count)] for number in range(count)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, cwd=ROOT, **pipes) for command in commands]
    found: dict[str, Any] = {}
    said = [process.communicate() for process in processes]
    for process, (printed, errors) in zip(processes, said, strict=True):
        assert process.returncode == 0, errors
        found |= json.loads(printed)
    return found


def print_found(cases: dict[str, Any], find: Callable[[str], Any]) -> None:
    """For `run_with_device`: {name of a case: what was found, or why nothing was}, of one in so many."""
    found = {}
    number, count = map(int, sys.argv[1:] or (0, 1))
    for name in list(cases)[number::count]:
        try:
            found[name] = find(name)
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


class Waits(TorchDispatchMode):
    """Where minift's code made the host wait for the device: "file:function", in order. It does so when it reads a
    tensor, of which all values are 5, and when it copies between device and host unless with non_blocking. `order`:
    what comes after what. `updates`: of weights on the device; `updates_ahead`: those of them which it may be busy with
    when the last wait is over."""

    current: Waits

    def __init__(self) -> None:
        super().__init__()
        Waits.current = self
        self.places: list[str] = []
        self.updates: list[tuple[Worker, int]] = []
        self.updates_ahead = 0
        self.order = Order(Stream(name="the compute stream"))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        source = target = None
        if function is torch.ops.aten._to_copy.default:
            source, target, unwaited = args[0].device, kwargs.get("device"), kwargs.get("non_blocking", False)
        elif function is torch.ops.aten.copy_.default:
            source, target, unwaited = args[1].device, args[0].device, len(args) > 2 and args[2]
        result = function(*args, **kwargs)
        self.order.watch(function, args, kwargs, result)
        if function.name().startswith("minift::adamw") and args[0].is_cuda:
            self.updates.append((self.order.current, self.order.current.known[self.order.current]))
        if target is not None and torch.device(target).type != source.type and not unwaited:
            self._wait(self.order.current)
        return result

    def tolist(self, tensor: Tensor) -> list[float]:
        self.order.work(self.order.current if tensor.is_cuda else self.order.host, [tensor], [])
        if tensor.is_cuda:
            self._wait(self.order.current)
        return [5.0] * tensor.numel()

    def _wait(self, moment: Moment) -> None:
        self.places.append(place())
        self.updates_ahead = sum(moment.known.get(worker, 0) < count for worker, count in self.updates)
        self.order.host.learn(moment)


def place() -> str:
    """The innermost line of minift that is running."""
    for path, _, function in running():
        return f"{Path(path).name}:{function}"
    return "elsewhere"


class Stream(Worker):
    """Of torch.cuda's, what minift uses."""

    def __init__(self, *_: Any, name: str | None = None, **__: Any) -> None:
        super().__init__(name or f"the stream of {place()}")

    def wait_stream(self, other: Worker) -> None:
        self.learn(other)

    def wait_event(self, event: Event) -> None:
        self.learn(event)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        Waits.current._wait(self)


class Event:
    """A moment; before it is recorded, one before everything."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.known: dict[Worker, int] = {}
        self.now = 0.0

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or Waits.current.order.current
        self.known, self.now = dict(stream.known), stream.now

    def synchronize(self) -> None:
        Waits.current._wait(self)


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()


def host_zeros(numel: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(numel, dtype=dtype, pin_memory=True)


@contextmanager
def pretended_cuda() -> Iterator[Waits]:
    """Inside, tensors on cuda:0 can be made, in a process that believes in it. A tensor's address is that of what
    describes its memory, and seeds, which tensors without values cannot give, are 7."""
    with (
        mock.patch.object(fake_tensor, "init_gpu_context", lambda _: None),
        mock.patch.object(torch.cuda, "Stream", Stream),
        mock.patch.object(torch.cuda, "Event", Event),
        mock.patch.object(torch.cuda, "current_stream", lambda *_: Waits.current.order.current),
        mock.patch.object(torch.cuda, "stream", lambda stream: Waits.current.order.on(stream)),
        mock.patch.object(torch.cuda, "get_rng_state", lambda _: torch.zeros(16, dtype=torch.uint8)),
        mock.patch.object(torch.cuda, "set_rng_state", lambda *_: None),
        mock.patch.object(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata, create=True),
        mock.patch.object(fake_tensor.FakeTensor, "data_ptr", address, create=True),
        mock.patch("minift.model.low_rank.draw_seed", lambda: 7),
        mock.patch("minift.fsdp.bucket.pinned_zeros", host_zeros),
        mock.patch("minift.optim.memory.pinned_zeros", host_zeros),
        mock.patch("minift.optim.moments.dynamic_map", {signed: dynamic_map(signed) for signed in (True, False)}.get),
        fake_tensor.FakeTensorMode(allow_non_fake_inputs=True),
        Waits() as waits,
        mock.patch.object(fake_tensor.FakeTensor, "tolist", lambda tensor: waits.tolist(tensor)),
    ):
        nf4._dynamic_map.cache_clear()
        yield waits
    nf4._dynamic_map.cache_clear()
