"""Small programs on a device that is not there, with and without what puts their work in order; prints as JSON how many
mistakes `order` finds in each."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.pretended_cuda.device import pretended_cuda, print_found

DEVICE = torch.device("cuda", 0)


def read_on_another_stream(waits: bool) -> None:
    x, side = torch.ones(4, device=DEVICE), torch.cuda.Stream()
    if waits:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.add(1)
    torch.cuda.current_stream().wait_stream(side)


def write_what_another_reads(waits: bool) -> None:
    x, side = torch.ones(4, device=DEVICE), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x + 1
    read = side.record_event()
    if waits:
        torch.cuda.current_stream().wait_event(read)
    x.zero_()
    torch.cuda.current_stream().wait_event(read)
    del y


def event_of_too_early(waits: bool) -> None:
    x, side = torch.ones(4, device=DEVICE), torch.cuda.Stream()
    early = torch.cuda.current_stream().record_event()
    x.zero_()
    side.wait_event(torch.cuda.current_stream().record_event() if waits else early)
    with torch.cuda.stream(side):
        x.add_(1)
    torch.cuda.current_stream().wait_stream(side)


def look_at_a_copy(waits: bool) -> None:
    on_host = torch.ones(4, device=DEVICE).to("cpu", non_blocking=True)
    if waits:
        torch.cuda.current_stream().record_event().synchronize()
    on_host.add(1)


def overwrite_what_is_copied(waits: bool) -> None:
    on_host = torch.ones(4)
    x = on_host.to(DEVICE, non_blocking=True)
    if waits:
        torch.cuda.current_stream().record_event().synchronize()
    on_host.zero_()
    del x


def let_go_what_another_reads(waits: bool) -> None:
    x, side = torch.ones(4, device=DEVICE), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.add(1)
    if waits:
        torch.cuda.current_stream().wait_stream(side)
    del x


def other_bytes(waits: bool) -> None:
    x, side = torch.ones(8, device=DEVICE), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x[:4].zero_()
    x[4 if waits else 3 :].zero_()
    torch.cuda.current_stream().wait_stream(side)


PROGRAMS: list[Callable[[bool], None]] = [
    read_on_another_stream,
    write_what_another_reads,
    event_of_too_early,
    look_at_a_copy,
    overwrite_what_is_copied,
    let_go_what_another_reads,
    other_bytes,
]


def mistakes(program: Callable[[bool], None]) -> list[int]:
    """How many there are with its wait and without."""
    found = []
    for waits in (True, False):
        with pretended_cuda() as device:
            program(waits)
        found.append(len(device.order.mistakes))
    return found


def main() -> None:
    by_name = {program.__name__: program for program in PROGRAMS}
    print_found(by_name, lambda name: mistakes(by_name[name]))


if __name__ == "__main__":
    main()
