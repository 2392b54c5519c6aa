"""The command line: parse, build, call. No command does work of its own here.

Exit status: 0 done; 2 a mistake of the user's, told in one line on stderr; 130 Ctrl-C; anything else is a traceback.
Modules that import torch are imported inside the commands, so that help and typing mistakes do not wait for it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from minift.recipe.nodes import RecipeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.command(parsed) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        if _rank() == 0 or "TORCHELASTIC_ERROR_FILE" not in os.environ:  # else torchrun shows the rank that failed first
            print(f"minift: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minift", description="Fine-tune large language models.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(group, name, function, text, *positionals: str) -> argparse.ArgumentParser:
        command = group.add_parser(name, help=text, description=text, allow_abbrev=False)
        for positional in positionals:
            command.add_argument(positional.lower(), metavar=positional)
        command.set_defaults(command=function)
        return command

    def add_model(command: argparse.ArgumentParser, adapter_required: bool = False) -> None:
        command.add_argument("--model", required=True, metavar="DIR", help="Hugging Face model folder")
        command.add_argument("--adapter", required=adapter_required, metavar="DIR", help="PEFT adapter folder")

    train = add(commands, "train", _train, "fine-tune; alone, or on every rank under torchrun")
    data = commands.add_parser("data", help="look at data, or fetch some").add_subparsers(required=True, metavar="WHAT")
    prepare = add(data, "prepare", _data_prepare, "encode a recipe's data and show what will be learnt")
    for command in (train, prepare):
        command.add_argument("recipe", metavar="RECIPE", help="YAML file; fields of all sections: minift train --help")
        command.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--section.field VALUE")
    add(data, "bfcl", _data_bfcl, "write the function-calling rows of the quickstart into a folder", "OUT")

    add(commands, "convert", _convert, "GGUF file -> Hugging Face model folder", "GGUF", "OUT")
    merge = add(commands, "merge", _merge, "model + adapter -> Hugging Face model folder")
    add_model(merge, adapter_required=True)
    merge.add_argument("--out", required=True, metavar="DIR", help="folder to write; must be new or empty")

    generate = add(commands, "generate", _generate, "answer a prompt")
    add_model(generate)
    generate.add_argument("--prompt", required=True, help="what the user says; - reads standard input")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (the default): always the likeliest token")
    generate.add_argument("--top-p", type=float, default=1.0, help="smallest set of tokens with this probability; 1: all")
    generate.add_argument("--max-new-tokens", type=int, default=256, help="default: 256")
    generate.add_argument("--seed", type=int, default=0, help="of the sampling; default: 0")

    add(commands, "plot", _plot, "draw a run's loss.png again from its metrics.jsonl", "RUN")
    return parser


# ---------------------------------------------------------------------------------------------------- the commands


def _train(parsed: argparse.Namespace) -> int:
    from torch.distributed.elastic.multiprocessing.errors import record

    from minift.train import train

    try:
        config = _read_recipe(parsed)
        config.check_files()
    except (ValueError, OSError):
        if _rank() == 0:
            raise
        return 2  # every rank finds the same mistake; one of them says so
    return record(train)(config)


def _data_prepare(parsed: argparse.Namespace) -> None:
    from rich.console import Console

    from minift.data.prepare import choose_template, prepare
    from minift.data.preview import preview
    from minift.data.tokenizer import Tokenizer

    config = _read_recipe(parsed)
    tokenizer = Tokenizer.from_folder(config.model.path)
    template = choose_template(config.data, tokenizer)
    documents = prepare(config.data, tokenizer, template, Path(config.run_dir) / "data")
    console = Console()
    console.print(preview(documents, tokenizer))
    console.print("\n".join(documents.report.lines()), markup=False)


def _data_bfcl(parsed: argparse.Namespace) -> None:
    from minift.eval.bfcl import prepare

    print(prepare(Path(parsed.out)))


def _convert(parsed: argparse.Namespace) -> None:
    from minift.model.gguf import convert_gguf

    convert_gguf(parsed.gguf, parsed.out)
    print(f"wrote {parsed.out}")


def _merge(parsed: argparse.Namespace) -> None:
    from minift.checkpoint.merge import merge_adapter

    print(merge_adapter(parsed.model, parsed.adapter, parsed.out))


def _plot(parsed: argparse.Namespace) -> None:
    from minift.report import plot_run

    print(plot_run(parsed.run))


def _read_recipe(parsed: argparse.Namespace):
    from minift.config import RunConfig

    return RunConfig.from_recipe(parsed.recipe, parsed.overrides)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _is_for_the_user(error: Exception) -> bool:
    """Whether the sentence in `error` was written for the user: what the disk says, and what minift itself refuses."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    is_ours = str(frame.f_globals["__name__"]).split(".")[0] == "minift"
    return isinstance(error, OSError) or (is_ours and isinstance(error, (ValueError, ArithmeticError)))
