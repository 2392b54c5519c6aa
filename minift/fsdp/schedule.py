"""The order in which units run, recorded in the first pass and used to look ahead in every later one.

Looking ahead is a guess: a pass that goes another way (a model that skips layers) is followed faithfully, without
looking ahead from the first difference on, and becomes the new record. All ranks run the same code on equally many
microbatches, so all of them guess alike.
"""

from __future__ import annotations

from minift.fsdp.unit import Unit


class Order:
    """One direction: forward, or backward."""

    def __init__(self) -> None:
        self.recorded: list[Unit] = []
        self._current: list[Unit] = []

    def begin(self) -> None:
        self._current = []

    def visit(self, unit: Unit, look_ahead: int) -> list[Unit]:
        """Note that `unit` runs now; return up to `look_ahead` units that ran after it last time."""
        self._current.append(unit)
        here = len(self._current)
        return self.recorded[here : here + look_ahead] if self._follows_record() else []

    def is_last(self, unit: Unit) -> bool:
        """Whether the pass ended with `unit` last time."""
        return self._current == self.recorded and self._current[-1:] == [unit]

    def end(self) -> None:
        """The pass is complete."""
        self.recorded = self._current

    def _follows_record(self) -> bool:
        return self._current == self.recorded[: len(self._current)]
