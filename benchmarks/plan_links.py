"""Does the simulated step keep its word when the network is slow?

    python benchmarks/plan_links.py                         # 2, 3 and 4 ranks, links of 0.5 to 4 Gbit/s
    python benchmarks/plan_links.py --ranks 2 --gbit 1

Ranks are processes in network namespaces, joined by links that the kernel slows (`slow_network`), and exchange weights
and gradients by gloo's TCP connections, as machines would. What runs is drawn at random (`drawn_runs`), prefetch,
resharding and strategy included. The simulation is given figures of compute (calibrated in the same processes) and of
the link (messages over it, before and after the runs); it has seen no run. *Exposed* is the part of the simulated step
in which compute stands still for the network: where that is small, or all of it, the order of events matters little.

Where the kernel allows no namespaces, collectives are delayed instead (`slow_links`). Prints a table, and one line of
JSON last.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from drawn_runs import Case, Timing, draw_errors, draw_run, result_of, time_steps
from processes import run_ranks
from results import finish, parse
from slow_links import SlowLinks
from slow_network import SlowNetwork

from minift.dist.process import World
from minift.fsdp.transport import PairedSends, Transport
from minift.planner.calibrate import Calibrator, LinkCalibrator
from minift.planner.describe import describe
from minift.planner.device import Device
from minift.planner.network import Network
from minift.planner.timing import time_step
from minift.planner.trial import Trial


@dataclass(frozen=True)
class Job:
    """Runs by the speed of the links that they are timed over, bytes a second. network: None: delay collectives."""

    network: SlowNetwork | None
    cases: dict[float, list[Case]]


@dataclass(frozen=True)
class Measured:
    device: Device
    networks: dict[float, Network]
    timings: dict[float, list[Timing]]


def measure(world: World, tell: object, job: Job) -> Measured:
    """Compute is calibrated before the runs over each speed of the links, and at the end."""
    slow_world = world if job.network is None else replace(world, group=job.network.enter(world.rank))
    calibrator = Calibrator(world)
    networks: dict[float, Network] = {}
    timings: dict[float, list[Timing]] = {}
    for bytes_per_s, cases in job.cases.items():
        calibrator.round()
        if job.network is not None:
            SlowNetwork.limit(bytes_per_s)
        links = LinkCalibrator(slow_world)
        links.round()
        timings[bytes_per_s] = []
        for case in cases:
            trial = Trial(case.config, case.setup, case.workload, slow_world, partial(connect, job, bytes_per_s))
            timings[bytes_per_s].append(time_steps(trial, slow_world))
        links.round()
        networks[bytes_per_s] = links.network()
        if job.network is None:
            networks[bytes_per_s] = replace(networks[bytes_per_s], inside_bytes_per_s=bytes_per_s)
    calibrator.round()
    return Measured(calibrator.figures()[0], networks, timings)


def connect(job: Job, bytes_per_s: float, world: World) -> Transport:
    if world.size == 1:
        return Transport(world)
    return SlowLinks(world, bytes_per_s) if job.network is None else PairedSends(world)


def measure_all(num_ranks: int, cases: dict[float, list[Case]]) -> Measured:
    if not SlowNetwork.available():
        return run_ranks(num_ranks, measure, Job(None, cases))[0]
    with SlowNetwork(num_ranks) as network:
        return run_ranks(num_ranks, measure, Job(network, cases))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=2, help="runs for each number of ranks and speed")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--gbit", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0], help="a second, each way")
    args = parse(parser)

    rows, shares = [], []
    print(f"{'ranks':6}{'Gbit/s':>7}  {'run':72}{'exposed':>8}{'simulated':>11}{'measured':>10}{'error':>8}")
    for num_ranks in args.ranks:
        rng = random.Random(f"{args.seed} {num_ranks}")
        cases = {gbit * 1e9 / 8: [draw_run(rng) for _ in range(args.cases)] for gbit in args.gbit}
        measured = measure_all(num_ranks, cases)
        for bytes_per_s, timings in measured.timings.items():
            for case, timing in zip(cases[bytes_per_s], timings, strict=True):
                run = describe(
                    case.config, case.setup, world_size=num_ranks, link="paired sends", workload=case.workload
                )
                timed = time_step(run, measured.device, measured.networks[bytes_per_s])
                exposed = timed.exposed_s / timed.seconds
                shares += timing.foreign
                rows.append({
                    "ranks": num_ranks, "gbit_per_second": 8e-9 * bytes_per_s, "run": case.text(),
                    "exposed_share": exposed, "simulated_seconds": timed.seconds, "measured_seconds": timing.seconds,
                    "error": timed.seconds / timing.seconds - 1,
                })  # fmt: skip
                print(
                    f"{num_ranks:<6}{8e-9 * bytes_per_s:7.2f}  {case.text():72}{exposed:8.0%}{timed.seconds:11.4f}"
                    f"{timing.seconds:10.4f}{rows[-1]['error']:+8.1%}",
                    flush=True,
                )
    result = result_of("plan_links", rows, shares)
    result.values["real_network"] = SlowNetwork.available()
    finish(args, result, draw)


def draw(figure: Any, theme: Any, runs: list[dict[str, Any]]) -> None:
    """Each run's error by how much of its step the network decides."""
    draw_errors(figure, theme, [row for run in runs for row in run["rows"]], "exposed_share", "simulated")
    figure.axes[0].set_xlabel("share of the step in which compute waits for the network")
    figure.axes[0].set_title("runs drawn at random, over slow links")


if __name__ == "__main__":
    main()
