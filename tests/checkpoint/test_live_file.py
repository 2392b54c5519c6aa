"""A file written from memory that changes. Oracle: a copy from before; the safetensors library reads the file."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from minift.checkpoint import live_file
from minift.checkpoint.device_reader import DeviceReader
from minift.checkpoint.live_file import LiveFile
from minift.checkpoint.manifest import read_back

PIECE = 256  # bytes, instead of megabytes


class Disk:
    """A disk that writes what it is allowed to, and remembers how far it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allowed = threading.Semaphore(0)
        self.sizes: list[int] = []
        original = live_file._Sink.put

        def put(sink: live_file._Sink, view: memoryview) -> None:
            self.allowed.acquire()
            original(sink, view)
            self.sizes.append(len(view))

        monkeypatch.setattr(live_file, "PIECE_BYTES", PIECE)
        monkeypatch.setattr(live_file._Sink, "put", put)

    def allow(self, count: int) -> None:
        self.allowed.release(count)


class LateCopy:
    """An event of `LateReader`. The copy takes place when somebody waits for it, the last moment that is allowed."""

    def __init__(self, live: torch.Tensor, host: torch.Tensor) -> None:
        self.live, self.host = live, host
        self.lock = threading.Lock()

    def synchronize(self) -> None:
        with self.lock:
            if self.live is not None:
                self.host.copy_(self.live)
                self.live = None


class LateReader(DeviceReader):
    """A device whose copies are as late as they may be; host memory plays the device's."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._ring = [torch.zeros(PIECE, dtype=torch.uint8) for _ in range(self.LOOKAHEAD + 1)]
        self._num_copies = 0

    def to_new(self, live):
        host = torch.zeros_like(live)
        return host, self._copy(live, host)

    def hold_compute(self, copied):
        copied.synchronize()

    def _copy(self, live, host):
        return LateCopy(live, host)


READERS = {"host memory": lambda: None, "a late device": LateReader}
if torch.cuda.is_available():
    READERS["cuda"] = lambda: DeviceReader(torch.device("cuda", 0), PIECE)


def make(path, staging_bytes, groups=None, reader=None):
    groups = groups or {f"g{i}": {"master": torch.full((200,), float(i)), "m": torch.randn(70)} for i in range(3)}
    constants = {"rng/cpu": torch.arange(300, dtype=torch.uint8)}
    return groups, LiveFile(path, groups, constants, {"ranges": "{}"}, staging_bytes=staging_bytes, reader=reader)


def copy_of(groups):
    return {f"{group}/{name}": t.clone() for group, named in groups.items() for name, t in named.items()}


def assert_holds(path, stored, snapshot):
    assert read_back(path) == stored
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"ranges": "{}"}
    read = load_file(path)
    assert torch.equal(read.pop("rng/cpu"), torch.arange(300, dtype=torch.uint8))
    assert list(read) == list(snapshot)
    assert all(torch.equal(read[name].view(torch.uint8), snapshot[name].view(torch.uint8)) for name in snapshot)


def in_thread(function):
    result = []
    thread = threading.Thread(target=lambda: result.append(function()), daemon=True)  # a failed test must not hang
    thread.start()
    return thread, result


def overwrite(groups, group):
    for tensor in groups[group].values():
        tensor.fill_(-1.0)


def test_the_fence_is_open_when_the_writer_is_through(tmp_path):
    groups, file = make(tmp_path / "f", staging_bytes=0)
    snapshot = copy_of(groups)
    stored = file.write()
    for group in groups:
        file.before_overwrite(group)
        overwrite(groups, group)
    assert_holds(tmp_path / "f", stored, snapshot)


def test_a_late_writer_is_made_room_for(tmp_path, monkeypatch):
    """Nothing has been written when everything is overwritten: all of it goes to staging, and nobody waits."""
    disk = Disk(monkeypatch)
    groups, file = make(tmp_path / "f", staging_bytes=1 << 20)
    snapshot = copy_of(groups)
    thread, stored = in_thread(file.write)
    for group in groups:  # returns although the disk has not been allowed a byte
        file.before_overwrite(group)
        overwrite(groups, group)
    assert file.staged_bytes == sum(t.nbytes for t in snapshot.values())
    disk.allow(1000)
    thread.join()
    assert file.staged_bytes == 0
    assert_holds(tmp_path / "f", stored[0], snapshot)


@pytest.mark.parametrize("staging_bytes", [0, 3 * PIECE])
def test_beyond_the_budget_the_owner_waits_for_the_disk(tmp_path, monkeypatch, staging_bytes):
    disk = Disk(monkeypatch)
    groups, file = make(tmp_path / "f", staging_bytes=staging_bytes)
    snapshot = copy_of(groups)
    thread, stored = in_thread(file.write)
    passed = []

    def owner():
        for group in groups:
            file.before_overwrite(group)
            assert file.staged_bytes <= staging_bytes
            overwrite(groups, group)
            passed.append(len(disk.sizes))

    owning, _ = in_thread(owner)
    time.sleep(0.05)
    assert not passed  # g0 has 800 + 280 bytes: five pieces, more than the budget
    for _ in range(100):
        disk.allow(1)
        time.sleep(0.001)
    owning.join()
    thread.join()
    # Header and five pieces a group: what has been written when a group may change, less what staging can hold.
    room = staging_bytes // PIECE
    assert all(count + room >= 1 + 5 * (i + 1) for i, count in enumerate(passed)), passed
    assert_holds(tmp_path / "f", stored[0], snapshot)


def test_other_groups_pass(tmp_path):
    _, file = make(tmp_path / "f", staging_bytes=0)
    file.before_overwrite("not in this file")


@settings(max_examples=40)
@given(
    sizes=st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=3), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
    staging_bytes=st.sampled_from([0, PIECE - 1, PIECE, 3 * PIECE, 1 << 20]),
    reader=st.sampled_from(list(READERS)),
    seed=st.integers(0, 2**32),
)
def test_any_interleaving_writes_the_state_of_before(tmp_path_factory, sizes, dtype, staging_bytes, reader, seed):
    """Groups are overwritten in any order, at any speed, while the disk has pauses of its own."""
    path = tmp_path_factory.mktemp("live") / "f"
    draw = random.Random(seed)
    reader = READERS[reader]()
    device = reader.device if reader is not None else torch.device("cpu")
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = Disk(monkeypatch)
        groups = {
            f"g{i}": {f"t{j}": torch.randint(0, 200, (size,)).to(device, dtype) for j, size in enumerate(group)}
            for i, group in enumerate(sizes)
        }
        _, file = make(path, staging_bytes, groups, reader)
        snapshot = copy_of(groups)
        thread, stored = in_thread(file.write)
        order = draw.sample(list(groups), len(groups))

        def owner():
            for group in order:
                time.sleep(draw.choice((0.0, 0.0, 0.001)))
                file.before_overwrite(group)
                assert file.staged_bytes <= staging_bytes
                for tensor in groups[group].values():
                    tensor.fill_(255)

        owning, _ = in_thread(owner)
        while owning.is_alive() or thread.is_alive():
            disk.allow(draw.randrange(1, 5))
            time.sleep(draw.choice((0.0, 0.0005)))
        owning.join(), thread.join()
        read = load_file(path) if any(t.numel() for t in snapshot.values()) else None
    assert read_back(path) == stored[0]
    for name, tensor in snapshot.items():
        assert tensor.numel() == 0 or torch.equal(read[name], tensor.cpu()), name


def test_a_writer_that_fails_lets_the_owner_go(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    groups, file = make(tmp_path / "f", staging_bytes=0)

    def full(descriptor, view):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(live_file.os, "write", full)
    owning, _ = in_thread(lambda: file.before_overwrite("g2"))
    time.sleep(0.01)
    assert owning.is_alive()
    disk.allow(1)
    with pytest.raises(OSError, match="No space"):
        file.write()
    owning.join(10)
    assert not owning.is_alive()


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    write = live_file.os.write
    monkeypatch.setattr(live_file.os, "write", lambda descriptor, view: write(descriptor, view[:7]))
    groups, file = make(tmp_path / "f", staging_bytes=0)
    assert_holds(tmp_path / "f", file.write(), copy_of(groups))
