"""How well does a plan know how long a step takes?

    python benchmarks/plan_time.py                          # 27 runs drawn at random, on 1, 2 and 3 processes
    python benchmarks/plan_time.py --seed 7 --cases 12 --ranks 2

A run is drawn by its seed: the model's shape, full fine-tuning, LoRA or QLoRA, recomputation, what is sharded, number
formats, tokens, documents, microbatches. It is planned as `minift plan` does it, and its steps are timed. Figures of
the machine come from calibrating it in the same processes, a round every few runs, so that what else goes on meets
plans and measurements alike; no figure is fitted to a run. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from typing import Any

from drawn_runs import Case, Timing, draw_errors, draw_run, result_of, time_steps
from processes import run_ranks
from results import finish, parse

from minift.dist.process import World
from minift.planner.calibrate import Calibrator
from minift.planner.describe import describe
from minift.planner.device import Device
from minift.planner.network import Network
from minift.planner.timing import time_step
from minift.planner.trial import Trial

CASES_PER_ROUND = 2  # of calibration


@dataclass(frozen=True)
class Measured:
    """What the processes of one number say: figures, and a timing of each case."""

    device: Device
    network: Network
    timings: list[Timing]


def measure(world: World, tell: object, cases: list[Case]) -> Measured:
    """Runs, and rounds of calibration in between."""
    calibrator, timings = Calibrator(world), []
    for number, case in enumerate(cases):
        if number % CASES_PER_ROUND == 0:
            calibrator.round()
        timings.append(time_steps(Trial(case.config, case.setup, case.workload, world), world))
    calibrator.round()
    return Measured(*calibrator.figures(), timings)


def planned_seconds(case: Case, num_ranks: int, measured: Measured) -> float:
    run = describe(case.config, case.setup, world_size=num_ranks, link="shared memory", workload=case.workload)
    return time_step(run, measured.device, measured.network).seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=9, help="runs for each number of processes")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    args = parse(parser)

    rows, shares = [], []
    print(f"{'ranks':7}{'run':72}{'planned':>9}{'measured':>10}{'error':>8}")
    for num_ranks in args.ranks:
        rng = random.Random(f"{args.seed} {num_ranks}")
        cases = [draw_run(rng) for _ in range(args.cases)]
        measured = run_ranks(num_ranks, measure, cases)[0]
        for case, timing in zip(cases, measured.timings, strict=True):
            planned, seconds = planned_seconds(case, num_ranks, measured), timing.seconds
            shares += timing.foreign
            rows.append({
                "ranks": num_ranks, "run": case.text(), "planned_seconds": planned, "measured_seconds": seconds,
                "error": planned / seconds - 1,
            })  # fmt: skip
            print(f"{num_ranks:<7}{case.text():72}{planned:9.4f}{seconds:10.4f}{rows[-1]['error']:+8.1%}", flush=True)
    finish(args, result_of("plan_time", rows, shares), draw)


def draw(figure: Any, theme: Any, runs: list[dict[str, Any]]) -> None:
    """Each run's error by the length of its step."""
    draw_errors(figure, theme, [row for run in runs for row in run["rows"]], "measured_seconds", "planned")
    figure.axes[0].set_xscale("log")
    figure.axes[0].xaxis.set_major_formatter("{x:g}")
    figure.axes[0].set_xlabel("seconds of a step, measured")
    figure.axes[0].set_title("runs drawn at random, planned before they ran")


if __name__ == "__main__":
    main()
