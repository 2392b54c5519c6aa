"""How close to what the card can do are minift's CUDA kernels, and how do they compare with torch's and bitsandbytes'?

    python benchmarks/ops_cuda.py
    python benchmarks/ops_cuda.py --device cpu          # tiny, through the CPU's kernels: does this file work?

What the card can do is measured first, in the same run: a copy of 1 GiB (bytes read and written), and a product of
8192 x 8192 matrices in bf16. Then each op, with the shapes of Llama-3.1-8B and 8192 tokens (`cuda_case`): its results
are compared, then it is timed in turns with what others offer.

    share   of the copy's rate, counting the bytes that have to move, each once; for products, of the product's
    ratio   times as fast as the other side
    extra   memory beside what was there before, results included

Times are those of CUDA events around calls that stand in the queue before the first of them begins, so the host's part
is hidden, as it is in a step; an op that waits for the GPU itself does not hide it. Peers that are not installed are
left out.

Rules of measuring: `protocol`. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import cuda_nf4
import cuda_rows
import cuda_updates
import torch
from cuda_case import TINY, Case, Maker, Run, Sizes
from protocol import Turn, stopwatch, take_turns
from results import Result, finish, parse

from minift.ops import extension
from minift.style import label_bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

FAMILIES = (
    cuda_nf4.nf4, cuda_nf4.nf4_products, cuda_rows.rows, cuda_rows.head,
    cuda_updates.adamw, cuda_updates.low_rank, cuda_updates.gated, cuda_updates.adapters,
)  # fmt: skip
MOST_CYCLES_PER_S = 2e9  # of any clock
TURN_S = 2e-3

# What was promised: (op, of its row, at least or at most, bound).
BARS = (
    ("NF4 dequantize, nested", "share", ">=", 0.87),
    ("NF4 dequantize, nested", "bitsandbytes", ">=", 1.15),
    ("NF4 quantize", "bitsandbytes", ">=", 1.0),
    ("LM head, 16384 rows", "tflops", ">=", 650.0),
    ("LM head, 16384 rows", "extra_gb", "<=", 0.6),
)


def event_stopwatch(run: Run, prepare: Run | None) -> Turn:
    """Mean seconds of a call on the GPU, of as many as take a turn; of one, if something has to be prepared."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def turn(calls: int, host_s: float) -> float:
        if prepare is not None:
            prepare()
        torch.cuda._sleep(int(host_s * MOST_CYCLES_PER_S))  # the queue fills meanwhile
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    run()
    torch.cuda.synchronize()
    once_s = turn(1, 1e-3)
    calls = 1 if prepare is not None else max(1, min(50, int(TURN_S / once_s)))
    started = time.perf_counter()
    for _ in range(calls):
        run()
    host_s = time.perf_counter() - started
    torch.cuda.synchronize()
    return lambda: turn(calls, min(2 * host_s + 1e-4, 0.05))


def make_stopwatch(device: torch.device, run: Run, prepare: Run | None = None) -> Turn:
    return event_stopwatch(run, prepare) if device.type == "cuda" else stopwatch(run)


def ceilings(device: torch.device, rounds: int) -> tuple[float, float]:
    """(bytes per second of a copy, FLOP/s of a product)."""
    is_cuda = device.type == "cuda"
    a, b = (torch.randn((1 << 29) if is_cuda else (1 << 16), device=device).bfloat16() for _ in range(2))
    size = 8192 if is_cuda else 256
    left, right = (t[: size * size].view(size, size) for t in (a, b))
    turns = {"copy": lambda: b.copy_(a), "product": lambda: torch.mm(left, right)}
    times = take_turns({name: make_stopwatch(device, run) for name, run in turns.items()}, rounds)
    return 2 * a.nbytes / times.median("copy"), 2 * size**3 / times.median("product")


def compiler(device: torch.device) -> Callable[[Callable], Callable] | None:
    """torch.compile if it works here, which takes triton."""
    if device.type != "cuda":
        return None
    try:
        torch.compile(torch.neg)(torch.zeros(8, device=device))
    except Exception as error:
        print(f"without torch.compile, which does not work here: {str(error).splitlines()[0]}")
        return None
    return lambda function: torch.compile(function, dynamic=False)


def cases(make: Maker) -> Iterator[Case]:
    for family in FAMILIES:
        yield from family(make)
        if make.device.type == "cuda":
            torch.cuda.empty_cache()


def measure(
    case: Case, device: torch.device, rates: tuple[float, float], rounds: int, result: Result
) -> dict[str, Any]:
    """A row of the table, after the op was found to be right."""
    case.check()
    row: dict[str, Any] = {"name": case.name}
    if case.has_peak and device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case.run()
        row["extra_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    turns = {"minift": case.run, **case.others}
    times = take_turns({name: make_stopwatch(device, run, case.prepare) for name, run in turns.items()}, rounds)
    result.count(times)
    row["seconds"] = seconds = times.median("minift")
    if case.flops:
        row |= {"tflops": case.flops / seconds / 1e12, "share": case.flops / seconds / rates[1]}
    else:
        row |= {"gb_per_s": case.bytes / seconds / 1e9, "share": case.bytes / seconds / rates[0]}
    return row | {"ratios": {name: times.ratio(name, "minift").median for name in case.others}}


def show(row: dict[str, Any]) -> None:
    rate = f"{row['tflops']:8.0f} TFLOP/s" if "tflops" in row else f"{row['gb_per_s']:8.0f} GB/s   "
    ratios = "  ".join(f"{ratio:.2f}x {name}" for name, ratio in row["ratios"].items())
    extra = f"  {row['extra_gb']:.2f} GB extra" if "extra_gb" in row else ""
    print(f"{row['name']:36}{row['seconds'] * 1e6:10.1f} us{rate}{row['share']:7.2f}  {ratios}{extra}", flush=True)


def held_to_bars(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{bar: what was measured, and whether that is enough}; without those that nothing was measured for."""
    by_name = {row["name"]: row | row["ratios"] for row in rows}
    found = {}
    for name, what, sign, bound in BARS:
        value = by_name.get(name, {}).get(what)
        if value is not None:
            is_met = value >= bound if sign == ">=" else value <= bound
            found[f"{name}: {what} {sign} {bound:g}"] = {"value": value, "met": is_met}
    return found


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    """What part of the card's rate each op reaches, and the one bar of that kind."""
    rows = runs[-1]["rows"]
    figure.set_size_inches(9, 0.8 + 0.25 * len(rows))
    axes = figure.subplots()
    colours = [theme.ours if "tflops" in row else theme.series[2] for row in rows]
    bars = axes.barh([row["name"] for row in rows], [row["share"] for row in rows], color=colours)
    label_bars(axes, bars, [f"{row['share']:.2f}" for row in rows])
    for text in axes.texts:  # which may lie on the line at 1
        text.set_bbox({"facecolor": theme.ground, "edgecolor": "none", "pad": 0.5})
    for name, what, _, bound in BARS:
        at = [number for number, row in enumerate(rows) if row["name"] == name and what == "share"]
        axes.vlines([bound] * len(at), [y - 0.5 for y in at], [y + 0.5 for y in at], color=theme.ink)
    axes.axvline(1, color=theme.ink, linewidth=1)
    axes.set_title("share of what this card copies or, in the first colour, multiplies")
    axes.invert_yaxis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=15)
    args = parse(parser)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --device cpu tries this file without one")
    if extension.MISSING_REASON is not None:
        raise SystemExit(f"nothing to measure: the extension is missing ({extension.MISSING_REASON})")
    torch.manual_seed(0)

    make = Maker(device, Sizes() if device.type == "cuda" else TINY, compiler(device))
    rates = ceilings(device, args.rounds)
    result = Result("ops_cuda", {"copy_gb_per_s": rates[0] / 1e9, "products_tflops": rates[1] / 1e12})
    print(f"torch {torch.__version__}; a copy: {rates[0] / 1e9:.0f} GB/s, a product: {rates[1] / 1e12:.1f} TFLOP/s")
    for case in cases(make):
        result.rows.append(measure(case, device, rates, args.rounds, result))
        show(result.rows[-1])
    result.values["bars"] = held_to_bars(result.rows)
    for bar, found in result.values["bars"].items():
        print(f"{'met' if found['met'] else 'MISSED':8}{bar} (here {found['value']:.3g})")
    finish(args, result, draw)


if __name__ == "__main__":
    main()
