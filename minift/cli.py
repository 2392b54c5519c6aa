"""The command line: which commands and options there are, and what happens to errors. The commands are in commands.py.

Exit status: 0 done; 2 a mistake of the user's, told in one line on stderr; 130 Ctrl-C; anything else is a traceback.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Sequence

from minift import commands
from minift.heap import keep_few_products, keep_freed_memory

MERGE_TARGETS = """for an adapter over NF4, what the update is added to. dequantized (default): the 4-bit weights,
written dense; the model that was trained, rounded once, four times the bytes. original: the weights from before
quantisation, written dense; often better, but a model that nobody has evaluated yet; needs --original if --model is
stored in NF4. requantized: the 4-bit weights, the sum rounded to 4 bits again; as small as before, loses much of the
update."""

COMBINE_METHODS = """svd (default): the weighted sum of the updates, cut to a rank; cat: the sum exactly, ranks add up;
linear, ties, dare_linear, dare_ties, magnitude_prune: of the factors, with equal ranks; the last four with _svd: of the
updates, then cut to a rank. As PEFT's add_weighted_adapter."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    keep_freed_memory()
    keep_few_products()
    try:
        options, unknown = _parser().parse_known_args(arguments)
        if options.overrides_anywhere:
            options.overrides = unknown
        elif unknown:
            order = "; the recipe comes first: RECIPE --section.field VALUE" if "overrides" in options else ""
            raise ValueError(f"{unknown[0]} is not an option of this command{order}")
        status = options.command(options) or 0
        # What still refers to a process group goes now: its threads may hold the tensors of the last collective for a
        # moment longer, and one that asks for the interpreter when that is gone aborts a process whose work is done.
        gc.collect()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        # Under torchrun all ranks may have found the same mistake; torchrun itself shows the rank that failed first.
        if os.environ.get("RANK", "0") == "0" or "TORCHELASTIC_ERROR_FILE" not in os.environ:
            has_place = isinstance(error, OSError) and error.filename and error.strerror
            print(f"minift: error: {f'{error.filename}: {error.strerror}' if has_place else error}", file=sys.stderr)
        return 2


def _is_for_the_user(error: Exception) -> bool:
    """Whether the sentence in `error` was written for the user: what the disk says, and what minift itself refuses."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    is_ours = str(frame.f_globals["__name__"]).split(".")[0] == "minift"
    return isinstance(error, OSError) or (is_ours and isinstance(error, (ValueError, ArithmeticError)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minift", description="Fine-tune large language models.")
    top = parser.add_subparsers(required=True, metavar="COMMAND")

    train = _add(top, "train", commands.train, "fine-tune: alone, or on every rank under torchrun", add_help=False)
    train.add_argument("-h", "--help", action=_ListFields, nargs=0)
    _add_recipe(train)

    plan = _add(top, "plan", commands.plan, "what a recipe takes on paper: memory, and time; or what a model takes")
    plan.add_argument(
        "recipe", metavar="RECIPE|MODEL", nargs="?", help="YAML file, as in train; or llama-2-7b, ...: all methods"
    )
    plan.add_argument("--world-size", type=int, default=1, metavar="N", help="processes, one device each (default: 1)")
    plan.add_argument(
        "--device", metavar="NAME",
        help="h100, h200, a100, a100-40g, l40s, rtx4090, rtx3090, or cpu: this machine (default: its GPU, or h100)",
    )  # fmt: skip
    plan.add_argument(
        "--host-memory", type=float, metavar="GIB",
        help="of a node (8 ranks), for what GPUs keep there (default: this machine's, for its own; else any amount)",
    )  # fmt: skip
    plan.add_argument(
        "--network", default="nvlink", metavar="NAME",
        help="between nodes of 8: nvlink (as fast as inside), 400g, 100g; or GB/s of every rank (default: nvlink)",
    )  # fmt: skip
    plan.add_argument("--document-tokens", type=int, metavar="N", help="of all documents; default: the longest allowed")
    plan.add_argument("--supervised", type=float, default=1.0, metavar="PART", help="of the tokens (default: 1, all)")
    plan.add_argument("--search", action="store_true", help="the fastest ways to compute the same step that fit")
    plan.add_argument("--json", action="store_true", help="print everything as JSON")
    plan.add_argument("--picture", metavar="FILE", help="draw it, as PNG")
    plan.add_argument(
        "--calibrate", action="store_true",
        help="measure this machine, with 1, 2 and N processes, for plans with --device cpu; takes a minute",
    )  # fmt: skip
    plan.set_defaults(overrides_anywhere=True)

    data = top.add_parser("data", help="look at data, or write some").add_subparsers(required=True, metavar="WHAT")
    _add_recipe(_add(data, "prepare", commands.prepare_data, "encode a recipe's data and show what will be learnt"))
    bfcl = _add(data, "bfcl", commands.write_bfcl, "write the function-calling rows of the quickstart")
    bfcl.add_argument("out", metavar="OUT", help="folder for train.jsonl, heldout.jsonl and answers.json")

    convert = _add(top, "convert", commands.convert, "GGUF file -> Hugging Face model folder")
    convert.add_argument("gguf", metavar="GGUF", help="file to read")
    convert.add_argument("out", metavar="OUT", help="folder to write; new or empty")

    quantize = _add(top, "quantize", commands.quantize, "model -> model folder in NF4, as bitsandbytes writes it")
    quantize.add_argument("--model", required=True, metavar="DIR", help="Hugging Face model folder")
    quantize.add_argument("--out", required=True, metavar="DIR", help="folder to write; new or empty")
    _add_nf4_settings(quantize)

    merge = _add(top, "merge", commands.merge, "model + adapter -> Hugging Face model folder")
    merge.add_argument("--model", required=True, metavar="DIR", help="Hugging Face model folder")
    merge.add_argument("--adapter", required=True, metavar="DIR", help="PEFT adapter folder")
    merge.add_argument("--out", required=True, metavar="DIR", help="folder to write; new or empty")
    _add_quant(merge, "the adapter was trained over this model in 4 bits (QLoRA)")
    merge.add_argument("--target", metavar="dequantized|original|requantized", help=MERGE_TARGETS)
    merge.add_argument("--original", metavar="DIR", help="what a --model in NF4 was quantised from, for that --target")

    combine = _add(top, "combine", commands.combine, "several LoRA adapters -> one; no base model is needed")
    combine.add_argument("adapters", metavar="DIR", nargs="+", help="PEFT adapter folder")
    combine.add_argument("--out", required=True, metavar="DIR", help="folder to write; new or empty")
    combine.add_argument(
        "--weights", nargs="+", action="extend", type=float, metavar="W", help="one for each (default: equal, sum 1)"
    )
    combine.add_argument("--method", default="svd", help=COMBINE_METHODS)
    combine.add_argument("--rank", type=int, metavar="R", help="of the result, for svd, *_svd (default: the largest)")
    combine.add_argument("--density", type=float, default=0.5, help="what ties, dare, magnitude_prune keep (0.5)")
    combine.add_argument("--seed", type=int, default=0, metavar="N", help="of what dare drops (default: 0)")
    combine.add_argument("--dtype", default="float32", help="stored as float32 (default), bfloat16 or float16")
    combine.add_argument("--max-shard-mib", type=int, metavar="N", help="largest file (default: one, as PEFT reads)")

    generate = _add(top, "generate", commands.generate, "answer a prompt")
    _add_assistant(generate)
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="what the user says; - reads standard input")
    generate.add_argument("--each", action="store_true", help="answer without an adapter and with each, in one batch")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (default)")
    generate.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest tokens that reach this")
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="stop after N (default: 256)")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")

    tasks = top.add_parser("eval", help="grade a model").add_subparsers(required=True, metavar="TASK")
    calls = _add(tasks, "bfcl", commands.grade_calls, "exact function calls; under torchrun every rank takes a share")
    calls.add_argument("--data", required=True, metavar="FILE", help="answers.json from `minift data bfcl`")
    loss = _add(tasks, "loss", commands.measure_loss, "mean loss per supervised token of a file of rows")
    loss.add_argument("--data", required=True, metavar="FILE", help="JSON, JSON lines or Parquet")
    loss.add_argument("--max-length-tokens", type=int, default=2048, metavar="N", help="longest row (default: 2048)")
    for task in (calls, loss):
        _add_assistant(task)
        task.add_argument("--out", metavar="FILE", help="JSON file for the result; default: standard output only")

    analyze = _add(top, "analyze", commands.analyze, "what fine-tuning did to weights: intruders, ranks, directions")
    analyze.add_argument("tuned", metavar="RUN|ADAPTER|MODEL", help="run folder, PEFT adapter, or fine-tuned model")
    analyze.add_argument("--model", metavar="DIR", help="the base (default: what the run or the adapter names)")
    _add_quant(analyze, "the adapter was trained over the base in 4 bits; a run says itself how it was")
    analyze.add_argument("--top", type=int, default=10, metavar="K", help="singular vectors to look at (default: 10)")
    analyze.add_argument("--threshold", type=float, default=0.5, help="cosine that makes an intruder (default: 0.5)")
    analyze.add_argument("--out", metavar="DIR", help="for analysis.json, .png (default: the run, or ./analysis)")
    analyze.add_argument("--scale-intruders", type=float, metavar="F", help="and write an adapter with F times theirs")
    analyze.add_argument("--adapter-out", metavar="DIR", help="where to; new or empty")

    plot = _add(top, "plot", commands.plot, "draw the curves of one or several runs on one sheet")
    plot.add_argument("runs", metavar="RUN", nargs="+", help="run folder")
    plot.add_argument(
        "--out", metavar="PNG", help="file to write; default: loss.png of the run, runs.png here if there are several"
    )
    timeline = _add(top, "timeline", commands.timeline, "draw the step that a run recorded (loop.timeline_step) again")
    timeline.add_argument("run", metavar="RUN", help="run folder; the picture is its timeline.png")
    for picture in (plot, timeline):
        picture.add_argument("--dark", action="store_true", help="for a dark page")
    return parser


class _ListFields(argparse.Action):
    """--help of `minift train`: every field of a recipe."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        commands.list_fields()
        parser.exit()


def _add(group, name: str, command, text: str, add_help: bool = True) -> argparse.ArgumentParser:
    parser = group.add_parser(name, help=text, description=text, allow_abbrev=False, add_help=add_help)
    parser.set_defaults(command=command, overrides_anywhere=False)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file; `minift train --help` lists its fields")
    overrides = parser.add_argument("overrides", nargs=argparse.REMAINDER, help="--section.field VALUE ...")
    overrides.required = False  # or argparse says it is missing when RECIPE is


def _add_assistant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face model folder")
    parser.add_argument(
        "--adapter", metavar="DIR", nargs="+", action="extend", help="PEFT adapter folder; several are added up"
    )
    _add_quant(parser, "hold the weights in 4 bits, as QLoRA adapters expect")
    parser.add_argument("--template", default="auto", help="auto: the tokenizer's; or chatml, llama2, llama3, ...")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def _add_quant(parser: argparse.ArgumentParser, nf4: str) -> None:
    """That and how weights are held in 4 bits on the way into memory."""
    parser.add_argument("--nf4", action="store_true", help=nf4)
    parser.add_argument("--icq", action="store_true", help="likewise, with quant.icq (IR-QLoRA)")
    _add_nf4_settings(parser)


def _add_nf4_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--block-size", type=int, default=64, metavar="N", help="weights per scale (default: 64)")
    parser.add_argument("--no-double-quant", action="store_true", help="keep the scales in fp32")
    parser.add_argument(
        "--skip", nargs="+", action="extend", default=[], metavar="REGEX",
        help="projections to leave dense, as lm_head always is",
    )  # fmt: skip
