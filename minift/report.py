"""report.md: what a run did, how fast, and what to do with what it left. loss.png is drawn beside it.

Nothing here interprets a curve; nothing is read but the run folder.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minift.curves import draw_runs, smooth
from minift.metrics import Records, read_metrics
from minift.progress import show_seconds
from minift.quant.linear import QuantConfig


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """What was predicted of optimizer step `step` of rank 0, and what was measured: pairs of these, in bytes.

    held: between steps, by category. peak: the most at a time, expected at `peak_at`. sent: to other ranks.
    seconds: of the steps that follow, the mean; None without figures of this machine.
    """

    step: int
    held: dict[str, tuple[int, int]]
    peak: tuple[int, int]
    peak_at: str
    sent: tuple[int, int]
    seconds: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What report.md says beyond the metrics; all plain values, the same on every rank.

    `data`: label -> sentences, e.g. {"training": ["320 rows -> 318 documents", "2 bad rows were skipped"]}.
    `seconds_by_phase`: wall seconds of rank 0, e.g. {"load": 3.1, "train": 181.0, "validate": 9.2, "checkpoint": 1.4}.
    `adapter_folder`, `model_folder`: what was exported, in PEFT or Hugging Face format, or None; `adapter_base`: the
    model that the adapter is for; `adapter_quant`: how that is quantised when it is read, None if not, or stored so.
    `adapter_is_mergeable`: whether the two can become plain weights. `earlier_adapter`: what the run went on from.
    `template`: data.template of the recipe. `plan`: what the planner said, and what was.
    """

    status: str
    objective: str
    method: str
    model_path: str
    model_family: str
    num_parameters: int
    num_trainable_parameters: int
    data: dict[str, list[str]]
    world_size: int
    device: str
    seconds_by_phase: dict[str, float]
    adapter_folder: str | None
    adapter_base: str | None
    model_folder: str | None
    adapter_quant: QuantConfig | None = None
    adapter_is_mergeable: bool = True
    earlier_adapter: str | None = None
    template: str = "auto"
    plan: PlanResult | None = None


def write_report(run_dir: str | Path, facts: RunFacts) -> Path:
    """Write run_dir/report.md and draw loss.png beside it; returns the report's path."""
    run_dir = Path(run_dir)
    training, validation = read_metrics(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else ([], [])
    share = facts.num_trainable_parameters / max(1, facts.num_parameters)
    ran = {
        "status": facts.status,
        "objective": facts.objective,
        "model": f"`{facts.model_path}` ({facts.model_family}, {facts.num_parameters:,} parameters)",
        "method": facts.method,
        **({"goes on from": f"`{facts.earlier_adapter}`"} if facts.earlier_adapter else {}),
        "trainable parameters": f"{facts.num_trainable_parameters:,} ({share:.2%})",
        **{f"data, {label}": "\n".join(sentences) for label, sentences in facts.data.items()},
        "processes": f"{facts.world_size} on {facts.device}",
    }
    parts = [f"# {run_dir.resolve().name}", _table(("", ""), ran.items())]
    if training:
        draw_runs([run_dir], run_dir / "loss.png")
        parts += ["## Loss", "![loss](loss.png)", _table(("", "value", "step"), _losses(training, validation))]
    parts += ["## Time and memory", _time_and_memory(facts, training)]
    if facts.plan is not None:
        parts += ["## Plan and measurement", _plan(facts.plan)]
    parts += ["## Where things are", _files(run_dir), "## What to do next", _commands(run_dir, facts)]
    path = run_dir / "report.md"
    unfinished = path.with_suffix(".unfinished.md")  # a report that is there is a run that is finished
    unfinished.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path


def _losses(training: Records, validation: Records) -> list[tuple[str, str, str]]:
    mean = smooth([record["loss"] for record in training])[-1]
    rows = [
        ("training loss, first step", f"{training[0]['loss']:.4f}", str(training[0]["step"])),
        ("training loss, smoothed", f"{mean:.4f}", str(training[-1]["step"])),
    ]
    if validation:
        best = min(validation, key=lambda record: record["validation_loss"])
        for label, record in (("first", validation[0]), ("best", best), ("last", validation[-1])):
            rows.append((f"validation loss, {label}", f"{record['validation_loss']:.4f}", str(record["step"])))
    return rows


def _time_and_memory(facts: RunFacts, training: Records) -> str:
    total = sum(facts.seconds_by_phase.values())
    phases = [*facts.seconds_by_phase.items(), ("all", total)]
    text = _table(("phase", "wall time", "share"), [(p, show_seconds(s), f"{s / total:.0%}") for p, s in phases])
    if training:
        tokens = sum(record["tokens"] for record in training)
        targets = sum(record["targets"] for record in training)
        seconds = sum(record["step_seconds"] for record in training)
        peak = max(record["memory_bytes"] for record in training)
        text += (
            f"\n\n{len(training)} optimizer steps, {tokens:,} tokens of which {targets:,} supervised: "
            f"{tokens / seconds:,.0f} tokens/s, {seconds / len(training):.2f} s a step. "
            f"Peak memory of the largest process: {peak / 2**30:.2f} GiB."
        )
        sent = [record.get("sent_bytes", 0) for record in training]  # which older runs did not write down
        if any(sent):
            text += f" Each process sent {sum(sent) / len(sent) / 2**20:,.1f} MiB of weights and gradients a step."
    return text


def _plan(plan: PlanResult) -> str:
    """Rows that are zero on both sides are left out."""

    def row(name: str, predicted: int, measured: int) -> tuple[str, ...]:
        error = f"{predicted / measured - 1:+.1%}" if measured else "" if predicted == 0 else "?"
        return name, f"{predicted / 2**20:,.1f}", f"{measured / 2**20:,.1f}", error

    held = [row(name, *pair) for name, pair in plan.held.items() if any(pair)]
    rows = [
        *held,
        row("held between steps", *(sum(values) for values in zip(*plan.held.values(), strict=True))),
        row(f"peak of a step ({plan.peak_at})", *plan.peak),
    ]
    if any(plan.sent):
        rows.append(row("sent in a step", *plan.sent))
    text = f"Step {plan.step} on rank 0, as `minift plan` has it, and tensors as they were:"
    text = f"{text}\n\n{_table(('MiB', 'planned', 'measured', 'plan is off by'), rows)}"
    if plan.seconds is not None:
        planned, measured = plan.seconds
        text += (
            f"\n\nThe steps after that were planned to take {planned:.3f} s each, and took {measured:.3f} s "
            f"({planned / measured - 1:+.1%})."
        )
    return text


def _files(run_dir: Path) -> str:
    known = {
        "config.yaml": "the whole recipe of this run, defaults included",
        "metrics.jsonl": "one record per optimizer step and per validation",
        "loss.png": "the curves",
        "timeline.png": "one step of every rank: computation, communication, memory",
        "checkpoints": "what a resume starts from",
        "export": "the result, in formats other tools read",
    }
    found = {name: text for name, text in known.items() if (run_dir / name).exists()}
    return _table(("in " + f"`{run_dir}`", ""), [(f"`{name}`", text) for name, text in found.items()])


def _commands(run_dir: Path, facts: RunFacts) -> str:
    ask = ("" if facts.template == "auto" else f"--template {facts.template} ") + '--prompt "..."'
    blocks = []
    if facts.adapter_folder:
        held = [] if facts.adapter_quant is None else _options(facts.adapter_quant)
        both = shlex.join(["--model", facts.adapter_base, "--adapter", facts.adapter_folder, *held])
        blocks += [("Try it", f"minift generate {both} {ask}")]
        if facts.adapter_is_mergeable:
            merged = shlex.quote(str(run_dir / "export" / "merged"))
            blocks += [("Merge it into plain weights", f"minift merge {both} --out {merged}")]
    if facts.model_folder:
        blocks += [("Try it", f"minift generate --model {shlex.quote(facts.model_folder)} {ask}")]
    recipe = shlex.quote(str(run_dir / "config.yaml"))
    blocks += [
        ("Go on from the last checkpoint, if it was stopped", f"minift train {recipe}"),
        ("Run it again elsewhere", f"minift train {recipe} --run_dir {shlex.quote(str(run_dir) + '-again')}"),
        ("Draw the curves again, or those of several runs on one sheet", f"minift plot {shlex.quote(str(run_dir))}"),
    ]
    if (run_dir / "timeline.json").exists():
        blocks += [("Draw the recorded step again", f"minift timeline {shlex.quote(str(run_dir))}")]
    return "\n\n".join(f"{title}:\n\n```\n{command}\n```" for title, command in blocks)


def _options(quant: QuantConfig) -> list[str]:
    """Of commands that read a base: how an adapter knows it. Defaults are left out."""
    options = ["--icq" if quant.icq else "--nf4"]
    options += [] if quant.block_size == QuantConfig().block_size else ["--block-size", str(quant.block_size)]
    options += [] if quant.double_quant else ["--no-double-quant"]
    return options + (["--skip", *quant.skip] if quant.skip else [])


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """In a table, where a line of the file is a row."""
    return "<br>".join(line.strip() for line in text.splitlines()).replace("|", "\\|")
