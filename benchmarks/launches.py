"""What do the quickstart and the test suite take, and what does the quickstart reach? Read from what they print.

    ./launch/quickstart.sh | tee quickstart.log       # fresh: remove runs/quickstart first
    python benchmarks/launches.py quickstart.log --write
    ./launch/test.sh | tee test.log
    python benchmarks/launches.py test.log --write

Nothing is measured here. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from results import Result, describe_machine, files_of, finish, parse

from minift.curves import draw_runs
from minift.metrics import read_metrics
from minift.style import DARK

RUN = Path("runs/quickstart/train")


def stages(log: str) -> dict[str, int]:
    """{stage: seconds}, of those that were not there already."""
    return {name: int(seconds) for name, seconds in re.findall(r"^--- (.*) took (\d+) s$", log, re.MULTILINE)}


def quickstart(log: str) -> Result:
    """The last line of the quickstart, its table, its stages, and what metrics.jsonl says about memory."""
    table = re.search(r"^ +before +after\n.*(?:\n.+)*", log, re.MULTILINE)
    training, validation = read_metrics(RUN / "metrics.jsonl")
    gib = [record["memory_bytes"] / 2**30 for record in training]
    values: dict[str, Any] = json.loads(log.rstrip().splitlines()[-1])
    values |= {
        "table": table.group(0) if table else "",
        "stages_seconds": stages(log),
        "memory_first_gib": gib[0],
        "memory_last_gib": gib[-1],
        "validation_loss": validation[-1]["validation_loss"],
    }
    return Result("quickstart", values)


def test_suite(log: str) -> Result:
    passed, seconds = re.findall(r"(\d+) passed.* in ([\d.]+)s", log)[-1]
    return Result(
        "test_suite",
        {"tests": int(passed), "pytest_seconds": float(seconds), "stages_seconds": stages(log)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="what launch/quickstart.sh or launch/test.sh printed")
    parser.add_argument("--note", default="", help="what differs from the default, to be kept with the result")
    args = parse(parser, is_timed=False)
    log = args.log.read_text(encoding="utf-8")
    args.log = args.log.name
    is_quickstart = '"after_correct"' in log
    finish(args, quickstart(log) if is_quickstart else test_suite(log))
    if is_quickstart and args.write and not args.note:
        path = files_of("quickstart", describe_machine()["hardware"])[0].with_suffix(".png")
        draw_runs([RUN], path)
        draw_runs([RUN], path.with_stem(f"{path.stem}_dark"), DARK)


if __name__ == "__main__":
    main()
