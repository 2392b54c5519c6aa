"""A plan as a table, as JSON, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minift.planner.memory import PERSISTENT, TRANSIENT, MemoryPlan
from minift.planner.plan import Plan
from minift.style import Theme, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 1 << 30
MIB = 1 << 20

BARS = {  # what is told apart in a picture: categories that belong together have one colour
    "weights": ("weights", "quantization scales"),
    "gradients": ("gradients",),
    "optimizer state": ("optimizer state",),
    "gathered buffers": ("gathered buffers",),
    "reduce buffers": ("reduce buffers",),
    "activations": ("activations", "recompute"),
    "backward": ("backward", "workspace"),
    "LM head": ("LM head",),
}


def show_bytes(num_bytes: float) -> str:
    if num_bytes >= GIB / 10:
        return f"{num_bytes / GIB:,.2f} GiB"
    return f"{num_bytes / MIB:,.1f} MiB"


def plan_text(plan: Plan) -> str:
    """What a rank holds by category, whether it fits, and how long a step takes."""
    memory, peak = plan.memory, plan.memory.peak
    rows = [("memory of a rank", "always", f"peak: {peak.name}")]
    for name, num_bytes in memory.categories().items():
        if num_bytes:
            always = show_bytes(memory.persistent[name]) if name in PERSISTENT else ""
            rows.append((name, always, show_bytes(num_bytes)))
    rows.append(("all of it", show_bytes(memory.persistent_bytes), show_bytes(memory.peak_bytes)))
    text = [describe_run(plan), "", _columns(rows), "", fit_text(plan)]
    if memory.host:
        text.append(host_text(plan))
    return "\n".join([*text, time_text(plan)])


def host_text(plan: Plan) -> str:
    """What lies elsewhere, for all ranks of a node if there are several, and whether that fits if one knows."""
    machine, memory = plan.machine, plan.memory
    text = f"in {_elsewhere(plan)}: "
    text += ", ".join(f"{name} {show_bytes(size)}" for name, size in memory.host.items() if size)
    if machine.is_gpu and machine.ranks_of_a_node > 1:
        of_all = show_bytes(machine.ranks_of_a_node * memory.host_bytes)
        text += f"; {of_all} for the {machine.ranks_of_a_node} ranks of a node"
    if math.isfinite(machine.host_bytes):
        verdict = "fits" if machine.host_has_room(memory) else "does not fit"
        text += f"; {verdict} in the {show_bytes(machine.usable_host_bytes)} that there are"
    return text


def _elsewhere(plan: Plan) -> str:
    """Where `MemoryPlan.host` lies."""
    return "host memory" if plan.machine.is_gpu else "a file"


def describe_run(plan: Plan) -> str:
    run, work = plan.run, plan.run.workload
    share = run.num_trainable_parameters / run.num_parameters
    documents = "" if work.document_tokens == work.tokens else f" in documents of {work.document_tokens:,}"
    times = "1 microbatch" if work.microbatches == 1 else f"{work.microbatches} microbatches"
    return (
        f"{run.num_parameters / 1e9:.2f} billion parameters, {run.num_trainable_parameters:,} trained ({share:.2%})\n"
        f"{run.world_size} × {plan.machine.name}, {run.policy.strategy} over {run.shard_size}; "
        f"a step of a rank: {times} of {work.tokens:,} tokens{documents}"
    )


def fit_text(plan: Plan) -> str:
    usable = plan.machine.usable_bytes
    verdict = "fits" if plan.fits else "does not fit"
    if not plan.fits and plan.memory.peak_bytes <= usable:
        verdict = "fits, but not in host memory"
    return f"{verdict}: {show_bytes(plan.memory.peak_bytes)} of the {show_bytes(usable)} that tensors can have"


def time_text(plan: Plan) -> str:
    timed, device = plan.timed, plan.machine.device
    if timed is None or device is None:
        return f"no time: {plan.no_time}"
    seconds = timed.seconds
    mfu = timed.work.model_flops / seconds / device.peak_flops_per_s
    text = (
        f"step {seconds:.3g} s, {plan.tokens_per_second:,.0f} tokens/s of all ranks, {mfu:.0%} of the peak FLOP/s; "
        f"a rank sends {show_bytes(timed.sent_bytes)}"
    )
    if timed.exposed_s > 0.01 * seconds:
        text += f"; {timed.exposed_s:.2g} s it only waits, for other ranks or the bus to host memory"
    if plan.is_launch_bound:
        text += (
            f"\nlaunch-bound: {device.name} alone would take {plan.seconds_without_host:.3g} s, the rest is its host, "
            "which starts one operation after the other; more tokens in a microbatch cost little"
        )
    return text


def change_text(plan: Plan | None) -> str:
    if plan is None:
        return "no change that minift knows makes it fit; more ranks, another device, or more host memory"
    seconds = "" if plan.timed is None else f", step {plan.timed.seconds:.3g} s"
    host_bytes = plan.memory.host_bytes
    host = f" and {show_bytes(host_bytes)} in {_elsewhere(plan)}" if host_bytes else ""
    changes = " ".join(plan.candidate.changes)
    return f"smallest change that fits: {changes}   ({show_bytes(plan.memory.peak_bytes)}{host}{seconds})"


def search_text(plans: Sequence[Plan], most: int = 5) -> str:
    """The first of `plans`."""
    if not plans:
        return "no way to compute this step fits"
    what = "the fastest that fit" if plans[0].timed is not None else "what fits, the largest first"
    rows = [(what, "step", "peak")]
    for plan in plans[:most]:
        seconds = "?" if plan.timed is None else f"{plan.timed.seconds:.3g} s"
        rows.append((" ".join(plan.candidate.changes) or "as it is", seconds, show_bytes(plan.memory.peak_bytes)))
    return _columns(rows)


def methods_text(plans: dict[str, Plan], needs: dict[str, Plan | None]) -> str:
    """One line for each way to fine-tune a model. needs: on how many ranks it fits."""
    rows = [("", "weights", "gradients", "optimizer", "all else", "peak", "fits on")]
    for method, plan in plans.items():
        at_peak = plan.memory.categories()
        weights = at_peak["weights"] + at_peak["quantization scales"]
        rest = plan.memory.peak_bytes - weights - at_peak["gradients"] - at_peak["optimizer state"]
        cells = (weights, at_peak["gradients"], at_peak["optimizer state"], rest, plan.memory.peak_bytes)
        ranks = needs[method]
        fits = "?" if ranks is None else f"{ranks.machine.world_size} × {ranks.machine.name}"
        rows.append((method, *map(show_bytes, cells), fits))
    return _columns(rows)


def plan_json(plan: Plan) -> dict[str, Any]:
    """Bytes and seconds, everything by name."""
    memory, run = plan.memory, plan.run
    record = {
        "changes": list(plan.candidate.changes),
        "num_parameters": run.num_parameters,
        "num_trainable_parameters": run.num_trainable_parameters,
        "world_size": run.world_size,
        "shard_size": run.shard_size,
        "device": plan.machine.name,
        "usable_bytes": plan.machine.usable_bytes,
        "fits": plan.fits,
        "peak_bytes": memory.peak_bytes,
        "peak_at": memory.peak.name,
        "at_peak_bytes": memory.categories(),
        "always_bytes": memory.persistent,
        "host_bytes": memory.host,
        "usable_host_bytes": plan.machine.usable_host_bytes if math.isfinite(plan.machine.host_bytes) else None,
        "moments_bytes": {moment.name: memory.persistent_bytes + moment.total_bytes for moment in memory.moments},
    }
    if plan.timed is not None:
        record |= {
            "step_seconds": plan.timed.seconds,
            "exposed_seconds": plan.timed.exposed_s,
            "tokens_per_second": plan.tokens_per_second,
            "sent_bytes": plan.timed.sent_bytes,
            "flops": plan.timed.work.flops,
            "model_flops": plan.timed.work.model_flops,
        }
    return record


def draw_plans(plans: dict[str, Plan], path: Path) -> Path:
    """A bar for each plan, stacked by category at its peak, and what the device has."""
    size = (9.0, 1.6 + 0.55 * len(plans))
    return save(path, lambda figure, theme: _draw(figure, theme, plans), size=size)


def _draw(figure: Figure, theme: Theme, plans: dict[str, Plan]) -> None:
    axes = figure.subplots()
    labels = list(plans)
    ends = [0.0] * len(labels)
    for (bar, categories), colour in zip(BARS.items(), theme.series, strict=True):
        widths = [_gib(plans[label].memory, categories) for label in labels]
        axes.barh(labels, widths, left=ends, color=colour, label=bar, height=0.62)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    machine = next(iter(plans.values())).machine
    limit = machine.usable_bytes / GIB
    axes.set_xlim(0, 1.12 * max([limit, *ends]) if limit < 3 * max(ends) else 1.15 * max(ends))
    axes.axvline(limit, color=theme.ink, linewidth=1.2, linestyle="--")
    for label, end in zip(labels, ends, strict=True):
        around = {"boxstyle": "square,pad=0.15", "facecolor": theme.ground, "edgecolor": "none"}
        place = {"xytext": (6, 0), "textcoords": "offset points"}
        axes.annotate(f"{end:,.1f}", (end, label), **place, va="center", fontsize=9, bbox=around)
    axes.set_title(f"GiB of one rank at the peak of a step; dashed: what {machine.name} has for tensors")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    figure.legend(ncols=4, loc="outside lower center")


def _gib(memory: MemoryPlan, categories: Iterable[str]) -> float:
    at_peak = memory.categories()
    return sum(at_peak[name] for name in categories) / GIB


assert {name for names in BARS.values() for name in names} == {*PERSISTENT, *TRANSIENT}


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    """The first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
