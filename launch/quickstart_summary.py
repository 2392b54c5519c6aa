"""The last page of launch/quickstart.sh: five answers before and after, the table, where everything is, one JSON line.

    python launch/quickstart_summary.py runs/quickstart --wall-seconds 312

Reads before.json and after.json (`minift eval bfcl --out`) and train/metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import Counter
from pathlib import Path

from minift.metrics import read_metrics

NUM_SAMPLES = 5
KINDS = ("correct", "wrong arguments", "wrong function", "not a call")


def table(before: dict, after: dict, validations: list[dict]) -> str:
    """Counts per kind of answer, and the loss, before and after."""
    counts = [Counter(result["kind"] for result in grades["results"]) for grades in (before, after)]
    rows = [(kind, *(str(count[kind]) for count in counts)) for kind in KINDS]
    rows.append(("of", str(before["total"]), str(after["total"])))
    if validations:
        first, last = validations[0]["validation_loss"], validations[-1]["validation_loss"]
        rows.append(("loss per supervised token, held out", f"{first:.3f}", f"{last:.3f}"))
    return "\n".join(f"{label:<36}{old:>8}{new:>8}" for label, old, new in [("", "before", "after"), *rows])


def samples(before: dict, after: dict) -> str:
    """Questions from all over the held-out set, chosen by place and not by result."""
    count = min(NUM_SAMPLES, after["total"])
    places = [i * after["total"] // count for i in range(count)]
    return "\n\n".join(
        "\n".join(
            [
                after["results"][place]["question"],
                show("before", before["results"][place]),
                show("after", after["results"][place]),
            ]
        )
        for place in places
    )


def show(label: str, result: dict) -> str:
    """One answer on one or two lines, and why it is wrong if it is."""
    answer = textwrap.shorten(result["answer"], 180, placeholder=" ...")
    verdict = "correct" if result["correct"] else f"{result['kind']}: {textwrap.shorten(result['reason'], 80)}"
    return f"  {label:<7}{answer}\n         [{verdict}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wall-seconds", type=float, required=True)
    options = parser.parse_args()
    folder: Path = options.folder
    before, after = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("before", "after"))
    steps, validations = read_metrics(folder / "train" / "metrics.jsonl")
    train_seconds = sum(step["step_seconds"] for step in steps)
    train_tokens = sum(step["tokens"] for step in steps)

    print("\n=== five held-out questions\n")
    print(samples(before, after))
    print(f"\n=== {after['total']} held-out questions\n")
    print(table(before, after, validations))
    print("\n=== where everything is\n")
    for path, what in (
        (folder / "train" / "report.md", "the report; loss.png beside it has the curves"),
        (folder / "train" / "metrics.jsonl", "one record per step"),
        (folder / "train" / "export" / "adapter", "the adapter, in PEFT's format"),
        (folder / "model", "the base model, a Hugging Face folder"),
        (folder / "data", "training rows, held-out rows, allowed answers"),
        (folder / "before.json", "all answers before, and after.json after"),
    ):
        print(f"  {str(path):<40}{what}")
    adapter = folder / "train" / "export" / "adapter"
    print("\nNext, with .venv/bin in PATH:\n")
    print(f"  minift merge --nf4 --model {folder / 'model'} --adapter {adapter} --out {folder / 'merged'}")
    print(f"  minift generate --nf4 --model {folder / 'model'} --adapter {adapter} --prompt '...'\n")
    print(
        json.dumps(
            {
                "before_correct": before["correct"],
                "after_correct": after["correct"],
                "total": after["total"],
                "train_seconds": round(train_seconds, 1),
                "train_tokens_per_second": round(train_tokens / train_seconds, 1),
                "wall_seconds": options.wall_seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
