"""What computes: how long an operation takes on it, as figures of a named device, a file, or this machine, measured.

    seconds = overhead + flops / flops_per_s + bytes / bytes_per_s             of one operation, by its kind

A sum and not a maximum: on a CPU memory is read by the instructions that compute, and on a GPU the largest products
are far from where both would matter. What small and odd shapes lose is in overhead and bytes; where a kind was
measured, what its samples were off from this line is known too, and applied near them (`Rate.seconds`).

Beside operations goes the host's work to start them (Python, autograd): `call_s` each, and `pass_s` for each forward
or backward of a unit (hooks, parameters that are exposed and hidden). A CPU does that itself; a GPU computes meanwhile,
and waits only where it is the faster of the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from minift.planner.op import Op

_NEAR = math.log(1.6)  # how far in flops and bytes a sample speaks for others: it has half of its weight there
_DOUBT = 0.05  # the weight of the line itself


@dataclass(frozen=True)
class Deviation:
    """One sample: it took `ratio` times what the line says."""

    flops: float
    bytes: float
    ratio: float


@dataclass(frozen=True)
class Rate:
    """See the module docstring; infinite: costs nothing."""

    overhead_s: float = 0.0
    flops_per_s: float = math.inf
    bytes_per_s: float = math.inf
    deviations: tuple[Deviation, ...] = ()

    def seconds(self, op: Op) -> float:
        """Of all `op.count`."""
        return op.count * self.line(op.flops, op.bytes) * self._ratio(op)

    def line(self, flops: float, num_bytes: float) -> float:
        return self.overhead_s + flops / self.flops_per_s + num_bytes / self.bytes_per_s

    def slower(self, factor: float) -> Rate:
        return replace(
            self,
            overhead_s=self.overhead_s * factor,
            flops_per_s=self.flops_per_s / factor,
            bytes_per_s=self.bytes_per_s / factor,
        )

    def _ratio(self, op: Op) -> float:
        """The geometric mean of the samples' ratios, by how near they are; 1 far from all of them."""
        if not self.deviations:
            return 1.0
        total, logs = _DOUBT, 0.0
        for sample in self.deviations:
            distance = abs(math.log(op.bytes / sample.bytes))
            if op.flops:
                distance = max(distance, abs(math.log(op.flops / sample.flops)))
            weight = 0.5 ** (distance / _NEAR) ** 2
            total += weight
            logs += weight * math.log(sample.ratio)
        return math.exp(logs / total)


@dataclass(frozen=True)
class Device:
    """One rank's share of a machine.

    memory_bytes: that a rank may use. peak_flops_per_s: of the datasheet, dense products in 16 bits; what model FLOP
    utilisation divides by. memory_bytes_per_s: likewise, of memory; of a CPU, that of a copy.
    rates: by "kind dtype", "kind", or "*" for all others. step_s: of the host, once a step, when nothing else runs.
    runs_ahead: a host starts operations and does not wait. bus_bytes_per_s: each way, between its memory and its
    host's; infinite: they are the same.
    """

    name: str
    memory_bytes: float
    peak_flops_per_s: float
    memory_bytes_per_s: float
    rates: Mapping[str, Rate]
    call_s: float = 0.0
    pass_s: float = 0.0
    step_s: float = 0.0
    runs_ahead: bool = False
    bus_bytes_per_s: float = math.inf

    def rate(self, op: Op) -> Rate:
        for key in (f"{op.kind} {op.dtype}", op.kind, "*"):
            if key in self.rates:
                return self.rates[key]
        raise ValueError(f"device {self.name} has no figures for {op.kind!r} in {op.dtype}; calibrate it again")

    def seconds(self, ops: Iterable[Op], passes: int = 0) -> float:
        """One after the other, in so many passes of a unit."""
        computing, calling = 0.0, passes * self.pass_s
        for op in ops:
            computing += self.rate(op).seconds(op)
            calling += op.count * self.call_s
        return max(computing, calling) if self.runs_ahead else computing + calling

    def slower(self, factor: float) -> Device:
        """The same with so much less of everything: a processor that more processes share."""
        rates = {key: rate.slower(factor) for key, rate in self.rates.items()}
        return replace(
            self,
            rates=rates,
            call_s=self.call_s * factor,
            pass_s=self.pass_s * factor,
            step_s=self.step_s * factor,
            peak_flops_per_s=self.peak_flops_per_s / factor,
            memory_bytes_per_s=self.memory_bytes_per_s / factor,
        )
