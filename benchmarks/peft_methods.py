"""What does each method of fine-tuning cost, and what does it reach, on one task with one budget?

    ./launch/quickstart.sh                              # once: the model and the data
    python benchmarks/peft_methods.py --quickstart runs/quickstart --write
    python benchmarks/peft_methods.py                   # the cost alone

The task is the quickstart's: SmolLM2-135M learns function calls (BFCL). Every method starts from the same model and
sees the same `--examples` conversations once, in the same order, `EXAMPLES_PER_STEP` a step, in bf16 on two ranks; only
the adapter, its learning rate and, for QLoRA, the weights' format are its own. Learning rates are those of the recipes
in launch/recipes/, times what a model this small needs; none was searched for (those of prefix and prompt tuning were
tried at 3e-3, too), so a few correct answers more or less say nothing. Then the model answers the 80
questions that were held out, which counts those calls that are right in every argument. What was trained and graded
stays in `--runs` and is not done again.

Cost: every method that has a forward of its own takes steps of 2 x 512 tokens with SmolLM2-135M's shapes in one
process, in turns. (LoRA+, PiSSA, LoRA-GA and allocated ranks are LoRA once they have begun.) Memory: the peak resident
over such steps, a fresh process for each.

Rules of measuring: `protocol`. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from processes import RETURNING, PeakResident, run_ranks
from protocol import Times, Turn, stopwatch, take_turns
from results import Result, finish, parse
from safetensors import safe_open
from smollm2 import random_document
from step_sides import write_folders

from minift.build import build_model
from minift.config import RunConfig
from minift.data.batch import pack
from minift.dist.process import World
from minift.metrics import read_metrics
from minift.objectives.sft import SupervisedTokens
from minift.optim.adamw import AdamW
from minift.step import train_step
from minift.style import label_bars, three_digits
from minift.trace import Recorder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

EXAMPLES_PER_STEP = 4
RANKS = 2
ATTENTION_AND_MLP = ["o_proj", "down_proj"]


@dataclass(frozen=True)
class Variant:
    """adapter: as in a recipe; None: every weight is trained. like: the variant whose steps this one takes, too."""

    lr: float
    adapter: dict[str, Any] | None
    quant: dict[str, Any] | None = None
    lr_ratios: dict[str, float] = field(default_factory=dict)
    like: str = ""


NF4 = {"format": "nf4", "double_quant": True}
WORDS = {"init": "text", "text": "Answer with a function call."}
VARIANTS = {
    "LoRA": Variant(1e-3, {"r": 16, "alpha": 32}),
    "QLoRA": Variant(1e-3, {"r": 16, "alpha": 32}, NF4),
    "rsLoRA, r = 64": Variant(5e-4, {"r": 64, "alpha": 16, "rslora": True}),
    "LoRA+": Variant(2.5e-4, {"r": 16, "alpha": 32}, lr_ratios={"lora_B": 16.0}, like="LoRA"),
    "allocated ranks": Variant(1e-3, {"r": 16, "alpha": 32, "allocate": "gradients", "gradient_steps": 4}, like="LoRA"),
    "PiSSA": Variant(5e-4, {"method": "pissa", "r": 16, "alpha": 16}, like="LoRA"),
    "LoRA-GA": Variant(5e-4, {"method": "lora_ga", "r": 16, "alpha": 32, "gradient_steps": 4}, like="LoRA"),
    "DoRA": Variant(1e-3, {"method": "dora", "r": 16, "alpha": 32}),
    "bottleneck": Variant(1e-3, {"method": "bottleneck", "targets": ATTENTION_AND_MLP, "size": 64}),
    "IA3": Variant(2e-2, {"method": "ia3", "targets": ["k_proj", "v_proj", "down_proj"], "feedforward": ["down_proj"]}),
    "BitFit": Variant(1e-2, {"method": "bitfit"}),
    "prefix tuning": Variant(1e-2, {"method": "prefix", "num_virtual_tokens": 20} | WORDS),
    "prompt tuning": Variant(1e-2, {"method": "prompt", "num_virtual_tokens": 20} | WORDS),
    "full": Variant(2e-4, None),
    "IR-QLoRA": Variant(1e-3, {"method": "iec", "r": 16, "alpha": 32}, NF4 | {"icq": True}),
}


# ------------------------------------------------------------------------------------------------------------ the task


def folder_of(args: argparse.Namespace, name: str) -> Path:
    return args.runs / name.lower().replace(" ", "-").replace(",", "").replace("=-", "")


def recipe(args: argparse.Namespace, name: str) -> dict[str, Any]:
    variant = VARIANTS[name]
    return {
        "run_dir": str(folder_of(args, name) / "train"),
        "device": "cpu",
        "model": {"path": str(args.quickstart / "model")},
        "data": {
            "train": [str(args.runs / "train.jsonl")],
            "validation": [str(args.quickstart / "data/heldout.jsonl")],
            "max_length_tokens": 512,
        },
        "adapter": variant.adapter,
        "quant": variant.quant,
        "optim": {
            "lr": variant.lr,
            "lr_ratios": variant.lr_ratios,
            "warmup_steps": args.examples // EXAMPLES_PER_STEP // 8,
            "schedule": "linear",
        },
        "loop": {"epochs": 1, "examples_per_step": EXAMPLES_PER_STEP, "microbatch_tokens": 1024},
    }


def minift(*arguments: object) -> None:
    """On all ranks, what it says going to standard error: the last line of standard output is ours."""
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m", "minift"]
    subprocess.run([*ranks, *map(str, arguments)], env=environment, stdout=sys.stderr, check=True)


def reached(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Trained and graded, unless it was."""
    folder, variant = folder_of(args, name), VARIANTS[name]
    exported = folder / "train/export" / ("model" if variant.adapter is None else "adapter")
    answers = folder / "answers.json"
    if not exported.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(args, name), sort_keys=False))
        minift("train", folder / "recipe.yaml")
    if not answers.exists():
        model = (
            ["--model", exported]
            if variant.adapter is None
            else ["--model", args.quickstart / "model", "--adapter", exported]
        )
        quant = variant.quant or {}
        quantized = ["--icq"] if quant.get("icq") else ["--nf4"] if quant else []
        unfinished = answers.with_suffix(".unfinished")
        minift("eval", "bfcl", "--device", "cpu", *model, *quantized, "--data", args.quickstart / "data/answers.json",
               "--out", unfinished)  # fmt: skip
        unfinished.rename(answers)
    _, validation = read_metrics(folder / "train/metrics.jsonl")
    graded = json.loads(answers.read_text())
    files = list(exported.glob("*.safetensors"))
    return {
        "correct": graded["correct"],
        "questions": graded["total"],
        "validation_loss": validation[-1]["validation_loss"],
        "stored_weights": sum(numel_in(file) for file in files),
        "stored_bytes": sum(file.stat().st_size for file in files),
    }


def numel_in(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:
        return sum(tensors.get_tensor(key).numel() for key in tensors.keys())  # noqa: SIM118 (no iterator)


# ------------------------------------------------------------------------------------------------------------ the step


def make_step(world: World, args: argparse.Namespace, folder: str, name: str) -> Turn:
    """Takes a step, on tokens of its own: built, sharded and stepped as minift's trainer does."""
    variant = VARIANTS[name]
    # The model has no tokenizer.
    adapter = variant.adapter and {key: value for key, value in variant.adapter.items() if key not in WORDS}
    path = Path(folder) / "recipe.yaml"
    plain = {
        "run_dir": folder,
        "model": {"path": f"{folder}/base"},
        "data": {"train": [folder], "max_length_tokens": args.tokens},
        "loop": {"epochs": 1, "examples_per_step": 2, "microbatch_tokens": 2 * args.tokens},
    }
    path.write_text(yaml.safe_dump(plain | {"adapter": adapter, "quant": variant.quant}))
    config = RunConfig.from_recipe(path)
    recorder = Recorder(world.rank, world.device)
    built = build_model(
        config.model, config.adapter, quant=config.quant, precision=config.precision, recompute=config.recompute,
        policy=config.fsdp, recorder=recorder, world=world, seed=0,
    )  # fmt: skip
    optimizer = AdamW(built.engine.trainable_shards(), config.optim)
    numbers = itertools.count()

    def step() -> float:
        batch = pack([random_document(args.tokens, seed) for seed in (2 * next(numbers), 1)])
        return train_step(
            built.module, built.engine, optimizer, SupervisedTokens(), [batch],
            lr_scale=1.0, max_grad_norm=None, scaler=None, recorder=recorder,
        ).loss  # fmt: skip

    return step


def time_steps(world: World, tell: object, job: tuple[argparse.Namespace, str]) -> Times:
    steps = {name: make_step(world, *job, name) for name in VARIANTS if not VARIANTS[name].like}
    for step in steps.values():
        step()
    return take_turns({name: stopwatch(step) for name, step in steps.items()}, job[0].rounds)


def hold_steps(world: World, tell: object, job: tuple[argparse.Namespace, str, str]) -> float:
    """MiB."""
    step = make_step(world, *job)
    for _ in range(2):
        step()
    peak = PeakResident()
    for _ in range(3):
        step()
    return peak.bytes() / 2**20


# ---------------------------------------------------------------------------------------------------------- the result


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    """Correct answers with what is stored for them, and what a step costs."""
    rows = runs[-1]["rows"]
    places = range(len(rows))
    figure.set_size_inches(10, 0.9 + 0.27 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    correct = [row.get("correct", 0) for row in rows]
    bars = left.barh(places, correct, color=theme.ours)
    label_bars(left, bars, [f"{row.get('correct', '')}   {_size(row.get('stored_bytes', 0))}" for row in rows])
    left.set(title=f"correct calls, of {rows[0].get('questions', '')}; size of the file")
    times = [row.get("time", 0.0) for row in rows]
    bars = right.barh(places, times, color=theme.ours)
    texts = [f"{row['time']:.2f}   {three_digits(row['peak_mib'])} MiB" if "time" in row else "as LoRA" for row in rows]
    label_bars(right, bars, texts)
    right.set(title="time of a step, LoRA = 1; peak memory")
    left.set_yticks(places, [row["method"] for row in rows])
    left.invert_yaxis()
    for axes in (left, right):
        axes.margins(x=0.35)


def _size(num_bytes: int) -> str:
    return f"{three_digits(num_bytes / 2**20)} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, help="folder with the model and the data; none: the cost alone")
    parser.add_argument("--runs", type=Path, default=Path("runs/peft_methods"))
    parser.add_argument("--examples", type=int, default=160)
    parser.add_argument("--only-train", action="store_true", help="train and grade, time nothing, print no result")
    parser.add_argument("--tokens", type=int, default=512, help="per document")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    args = parse(parser)

    rows: list[dict[str, Any]] = [{"method": name} for name in VARIANTS]
    if args.quickstart is not None:
        args.runs.mkdir(parents=True, exist_ok=True)
        lines = (args.quickstart / "data/train.jsonl").read_text().splitlines(keepends=True)
        (args.runs / "train.jsonl").write_text("".join(lines[: args.examples]))
        for row in rows:
            row |= reached(args, row["method"])
    if args.only_train:
        return
    result = Result("peft_methods", rows=rows)
    with tempfile.TemporaryDirectory() as folder:
        write_folders(Path(folder), args.layers)
        (times,) = run_ranks(1, time_steps, (args, folder), num_threads=2)
        result.count(times)
        for row in rows:
            name = row["method"]
            if not VARIANTS[name].like:
                row["time"] = times.ratio(name, "LoRA").median
                row["tokens_per_second"] = 2 * args.tokens / times.median(name)
                row["peak_mib"] = run_ranks(1, hold_steps, (args, folder, name), RETURNING, num_threads=2)[0]
    print(f"{'method':18}{'time':>6}{'tokens/s':>10}{'peak MiB':>10}{'correct':>9}{'loss':>8}{'weights':>13}{'MiB':>8}")
    for row in rows:
        cost = (
            f"{row['time']:6.2f}{row['tokens_per_second']:10.0f}{row['peak_mib']:10.0f}" if "time" in row else " " * 26
        )
        gain = f"{row['correct']:9d}{row['validation_loss']:8.3f}" if "correct" in row else ""
        size = f"{row['stored_weights']:13,d}{row['stored_bytes'] / 2**20:8.2f}" if "correct" in row else ""
        print(f"{row['method']:18}{cost}{gain}{size}")
    finish(args, result, draw)


if __name__ == "__main__":
    main()
