"""The progress display. Oracle: what a reader of the captured output must find, and how much of it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from minift.progress import Progress, show_seconds

RECORD = {"loss": 1.25, "tokens_per_second": 1234.5, "memory_bytes": 3 * 2**29}


def captured(is_terminal: bool, **options) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=120)
    first_step, total_steps = options.get("first_step", 0), options["total_steps"]
    with Progress(**options, console=console) as progress:
        for step in range(first_step + 1, total_steps + 1):
            progress.step({"step": step, **RECORD})
        progress.say("checkpoint [step 3]")
    return out.getvalue()


def test_a_log_gets_few_whole_lines_with_first_and_last():
    lines = captured(False, total_steps=1000, first_step=100).splitlines()
    assert lines[0].startswith("step 101/1000  loss 1.2500  1,234 tokens/s  1.50 GiB  left ")
    assert lines[-2].startswith("step 1000/1000")
    assert lines[-1] == "checkpoint [step 3]"
    assert len(lines) < 30


def test_a_terminal_gets_a_bar():
    text = captured(True, total_steps=3)
    assert "3/3" in text and "loss 1.2500" in text and "checkpoint [step 3]" in text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_other_ranks_show_nothing(is_terminal):
    assert captured(is_terminal, total_steps=3, enabled=False) == ""


def test_the_cursor_comes_back_when_the_run_fails(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # a dumb terminal has no cursor to hide
    out = io.StringIO()
    with pytest.raises(KeyError), Progress(3, console=Console(file=out, force_terminal=True)):
        raise KeyError
    assert out.getvalue().rstrip().endswith("\x1b[?25h")


def test_durations():
    assert [show_seconds(s) for s in (0.04, 9.94, 59.4, 59.6, 60, 247, 3599.7, 3729)] == [
        "0.0 s", "9.9 s", "59 s", "1:00", "1:00", "4:07", "1:00:00", "1:02:09",
    ]  # fmt: skip
