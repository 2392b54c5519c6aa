"""metrics.jsonl -> loss.png and report.md: what a run did, how fast, and what to do with what it left.

metrics.jsonl has one JSON object a line; every number in it is reduced over all ranks. Two kinds of record:

  training    {"step": optimizer steps done so far (1 = after the first), "epoch": passes over the data so far (float),
               "loss": mean over the step's supervised tokens, nats/token, "lr", "grad_norm": before clipping,
               "tokens": packed tokens of the step, "targets": supervised ones, "tokens_per_second", "step_seconds",
               "memory_bytes": largest peak of any rank, "sent_bytes": weights and gradients that each rank sent; what
               JSON has no number for is null, and its name and value ("nan", "inf", "-inf") are in "nonfinite": {}}
  validation  {"step", "validation_loss": mean over its supervised tokens, nats/token, "validation_targets"}

A resumed run writes the steps after its checkpoint a second time; what was written the first time is then forgotten. A
last line that was cut off by a crash is ignored. Nothing here interprets a curve; nothing is read but the run folder.
"""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minift.progress import show_seconds

Records = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What report.md says beyond the metrics; all plain values, the same on every rank.

    `data`: label -> sentence, e.g. {"training": "320 examples, 74,560 tokens, 9,120 supervised; 2 dropped: too long"}.
    `seconds_by_phase`: wall seconds of rank 0, e.g. {"load": 3.1, "train": 181.0, "validate": 9.2, "checkpoint": 1.4}.
    `adapter_folder`, `model_folder`: what was exported, in PEFT or Hugging Face format, or None.
    `template`: data.template of the recipe.
    """

    status: str
    objective: str
    method: str
    model_path: str
    model_family: str
    num_parameters: int
    num_trainable_parameters: int
    data: dict[str, str]
    world_size: int
    device: str
    seconds_by_phase: dict[str, float]
    adapter_folder: str | None
    model_folder: str | None
    template: str = "auto"


# ------------------------------------------------------------------------------------------------------ reading


def read_metrics(path: str | Path) -> tuple[Records, Records]:
    """(training, validation) records, each ordered by step. Raises FileNotFoundError; ValueError for a bad line."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    training: Records = []
    validation: Records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step, is_validation = record["step"], "validation_loss" in record
            record |= {key: float(text) for key, text in record.pop("nonfinite", {}).items()}
        except (json.JSONDecodeError, KeyError, TypeError):
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not a metrics record: {line[:80]!r}") from None
        for earlier in [validation] if is_validation else [training, validation]:
            while earlier and earlier[-1]["step"] >= step:  # seen before: the run went on from an earlier checkpoint
                earlier.pop()
        (validation if is_validation else training).append(record)
    return training, validation


def smooth(values: list[float]) -> list[float]:
    """Mean over a window of about 1/15 of the run around each step, so that the curve does not lag behind.

    The window is cut at both ends of the run; values that are not finite are left out.
    """
    half = round(len(values) / 30)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    start = np.maximum(np.arange(len(values)) - half, 0)
    stop = np.minimum(np.arange(len(values)) + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return ((sums[stop] - sums[start]) / (counts[stop] - counts[start])).tolist()


# ------------------------------------------------------------------------------------------------------ loss.png


def plot_run(run_dir: str | Path) -> Path:
    """Draw run_dir/loss.png from run_dir/metrics.jsonl and return its path; ValueError if there is nothing to draw."""
    # Only rank 0 draws, once: importing matplotlib here saves every rank of every run half a second at its start.
    from matplotlib.figure import Figure

    training, validation = read_metrics(Path(run_dir) / "metrics.jsonl")
    if not training:
        raise ValueError(f"{run_dir}/metrics.jsonl has no training step yet, so there is nothing to plot")
    steps = [record["step"] for record in training]
    losses = [record["loss"] for record in training]

    figure = Figure(figsize=(9, 6.5), dpi=140, layout="constrained")
    figure.suptitle(Path(run_dir).resolve().name, fontsize=11)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(5, 1, 1))

    mean = smooth(losses)
    top.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, marker="." if len(steps) < 60 else "")
    top.plot(steps, mean, color="tab:blue", linewidth=2, label=f"training, smoothed ({mean[-1]:.3f} at the end)")
    if validation:
        label = f"validation ({validation[-1]['validation_loss']:.3f} at the end)"
        points = [(record["step"], record["validation_loss"]) for record in validation]
        top.plot(*zip(*points, strict=True), color="tab:orange", linewidth=2, marker="o", markersize=4, label=label)
    top.set_ylabel("loss (nats per supervised token)")
    top.legend(frameon=False)

    middle.plot(steps, [record["lr"] for record in training], color="tab:green", linewidth=1.5)
    middle.set_ylabel("learning\nrate")
    middle.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.plot(steps, [record["tokens_per_second"] for record in training], color="tab:gray", linewidth=1)
    bottom.set_ylabel("tokens/s")
    bottom.set_xlabel("optimizer step")
    middle.set_ylim(bottom=0)
    bottom.set_ylim(bottom=0)
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for step, epoch in _epoch_ends(training):
            axes.axvline(step, color="black", linewidth=0.8, linestyle=":", alpha=0.6)
            if axes is top:
                place = {"xycoords": ("data", "axes fraction"), "xytext": (3, -2), "textcoords": "offset points"}
                axes.annotate(f"epoch {epoch + 1}", (step, 1.0), **place, va="top", fontsize=8, alpha=0.6)

    path = Path(run_dir) / "loss.png"
    unfinished = path.with_suffix(".unfinished.png")
    figure.savefig(unfinished)
    os.replace(unfinished, path)  # a viewer that is open on the picture never sees half of one
    return path


def _epoch_ends(training: Records) -> list[tuple[int, int]]:
    """(step, epochs completed with it) for every pass over the data that another step follows; at most 20 of them."""
    passes = [int(record["epoch"] + 1e-6) for record in training]
    ends = [(training[i]["step"], passes[i]) for i in range(1, len(passes) - 1) if passes[i - 1] < passes[i]]
    return ends if len(ends) <= 20 else []


# ------------------------------------------------------------------------------------------------------ report.md


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
        "trainable parameters": f"{facts.num_trainable_parameters:,} ({share:.2%})",
        **{f"data, {label}": sentence for label, sentence in facts.data.items()},
        "processes": f"{facts.world_size} on {facts.device}",
    }
    parts = [f"# {run_dir.resolve().name}", _table(("", ""), ran.items())]
    if training:
        plot_run(run_dir)
        parts += ["## Loss", "![loss](loss.png)", _table(("", "value", "step"), _losses(training, validation))]
    parts += ["## Time and memory", _time_and_memory(facts, training)]
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
    model = shlex.quote(facts.model_path)
    ask = ("" if facts.template == "auto" else f"--template {facts.template} ") + '--prompt "..."'
    blocks = []
    if facts.adapter_folder:
        adapter = shlex.quote(facts.adapter_folder)
        merged = shlex.quote(str(run_dir / "export" / "merged"))
        blocks += [
            ("Try it", f"minift generate --model {model} --adapter {adapter} {ask}"),
            ("Merge it into plain weights", f"minift merge --model {model} --adapter {adapter} --out {merged}"),
        ]
    if facts.model_folder:
        blocks += [("Try it", f"minift generate --model {shlex.quote(facts.model_folder)} {ask}")]
    recipe = shlex.quote(str(run_dir / "config.yaml"))
    blocks += [
        ("Go on from the last checkpoint, if it was stopped", f"minift train {recipe}"),
        ("Run it again elsewhere", f"minift train {recipe} --run_dir {shlex.quote(str(run_dir) + '-again')}"),
        ("Draw the curves again", f"minift plot {shlex.quote(str(run_dir))}"),
    ]
    return "\n\n".join(f"{title}:\n\n```\n{command}\n```" for title, command in blocks)


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
