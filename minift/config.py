"""The recipe of a run: one frozen dataclass of the dataclasses owned below, read, checked, shown and written here.

    config = RunConfig.from_recipe("recipe.yaml", ["--optim.lr", "2e-4", "--adapter", "null"])  # names, types, values
    config.check_files()                                                                        # what the disk says

Precedence: defaults < recipe file < command line, later over earlier. Mistakes are refused before a process group
starts, with the full key, the place it was written, the value, what is valid and the nearest name that is. Rules about
one section are in the `__post_init__` of its owner, rules about several are here. Text is read by minift/recipe.
"""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import yaml

from minift.build import ModelSource
from minift.data.config import DataConfig
from minift.fsdp.policy import ShardPolicy
from minift.loop import TrainConfig
from minift.metrics import read_metrics
from minift.optim.config import OptimConfig
from minift.peft.methods import Method
from minift.peft.residual import ResidualLoraConfig
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.recipe.build import build, differences
from minift.recipe.describe import Field, describe, sections_of, show, to_plain, variants, walk
from minift.recipe.nodes import RecipeError, merge, parse_overrides, read_yaml
from minift.recompute import RecomputeConfig
from minift.start.prepare import needs_start

USAGE = """\
usage: minift train RECIPE [--section.field VALUE ...]
       torchrun --standalone --nproc-per-node N -m minift train RECIPE [--section.field VALUE ...]

RECIPE is a YAML file with the fields below. The command line wins over the recipe, the recipe over the default.
Values are YAML: --optim.lr 2e-4, --data.train '[a.jsonl, b.jsonl]', --adapter null, --adapter '{}' (all its defaults).
"""


HOW = (
    "device", "fsdp", "recompute", "optim.paged", "loop.microbatch_tokens", "loop.validate_every_steps",
    "loop.checkpoint_every_steps", "loop.keep_checkpoints", "loop.checkpoint_staging_mib", "loop.timeline_step",
)  # fmt: skip
"""Fields, and sections, that decide how a run is computed and what is kept of it, and of what comes out only the order
of sums (microbatch_tokens: and what dropout draws). A run may go on with others: in less memory, on other devices."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run does. Two runs with equal configs on equally many processes are equal."""

    run_dir: str
    """Folder of the run: config.yaml, metrics.jsonl, loss.png, report.md, checkpoints/, export/."""

    model: ModelSource
    """Where the weights come from."""

    data: DataConfig
    """What to train on."""

    objective: Literal["sft", "lm"] = "sft"
    """sft: the loss counts what the assistant says (or the completion). lm: every token of every document."""

    adapter: Method | None = None
    """Train little beside the frozen weights, by the method that `method` names; null: train the weights themselves."""

    quant: QuantConfig | None = None
    """Hold the frozen weights under an adapter in 4 bits (QLoRA); null: in precision.wire."""

    train: tuple[str, ...] = ()
    """Without an adapter: regular expressions searched in parameter names; what matches trains. Empty: everything."""

    freeze: tuple[str, ...] = ()
    """Without an adapter: likewise, parameters that stay as they are, also if `train` finds them."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW and the learning rate."""

    precision: Precision = field(default_factory=Precision)
    """Number formats."""

    fsdp: ShardPolicy = field(default_factory=ShardPolicy)
    """How weights, gradients and optimizer state are spread over the processes."""

    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    """What backward computes again instead of keeping it in memory."""

    loop: TrainConfig
    """How long, how much per step, and what happens when."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: CUDA where there is a GPU."""

    def __post_init__(self) -> None:
        problems = []
        if not self.run_dir.strip():
            problems.append("run_dir is empty; valid: the name of a folder")
        for name, patterns in (("train", self.train), ("freeze", self.freeze)):
            if patterns and self.adapter is not None:
                problems.append(
                    f"{name} is {show(patterns)} but adapter is set too, and an adapter freezes every other weight; "
                    f"valid: {name} without adapter (--adapter null), or adapter without {name} (--{name} [])"
                )
        if self.quant is not None and self.adapter is None:
            problems.append(
                "quant is set without adapter, and weights of 4 bits cannot be trained; valid: quant with an adapter "
                "(--adapter '{}': LoRA), or quant null"
            )
        if (
            self.quant is not None
            and self.quant.icq
            and isinstance(self.adapter, ResidualLoraConfig)
            and self.adapter.quantizes_residual
        ):
            problems.append(
                f"quant.icq is true with adapter.method {self.adapter.method}, whose base is exported beside the "
                "adapter, and no file format has shifted blocks; valid: quant.icq false, or another method"
            )
        if self.model.adapter is not None and self.adapter is None:
            problems.append(
                f"model.adapter is {self.model.adapter} without adapter, which says how it is trained; valid: adapter "
                "with the settings of that folder"
            )
        if self.model.adapter is not None and needs_start(self.adapter):
            problems.append(
                f"model.adapter is {self.model.adapter}, but adapter.method {self.adapter.method} finds its start, or "
                "its ranks, in the base; valid: a method that starts as it is told (what such a run exports is lora)"
            )
        if self.loop.microbatch_tokens < self.data.max_length_tokens:
            problems.append(
                f"loop.microbatch_tokens is {self.loop.microbatch_tokens} but data.max_length_tokens is "
                f"{self.data.max_length_tokens}, and a document never spans two microbatches; valid: "
                f"{self.data.max_length_tokens} or more"
            )
        if self.loop.validate_every_steps and not (self.data.validation or self.data.validation_share):
            problems.append(
                f"loop.validate_every_steps is {self.loop.validate_every_steps} but there is nothing to validate on; "
                "give data.validation (files) or data.validation_share, or set loop.validate_every_steps to 0"
            )
        if self.fsdp.step_in_backward and (self.optim.max_grad_norm is not None or self.precision.needs_loss_scaling):
            problems.append(
                "fsdp.step_in_backward updates weights before the norm of all gradients is known, so it can neither "
                f"clip by it (optim.max_grad_norm is {self.optim.max_grad_norm}) nor skip the step when fp16 overflows "
                f"(precision.wire is {self.precision.wire}); valid: optim.max_grad_norm null and precision.wire "
                "bfloat16 or float32"
            )
        if problems:
            raise RecipeError(*problems)

    @classmethod
    def from_recipe(cls, path: str | Path, overrides: list[str] = ()) -> Self:
        """Read a YAML recipe and command-line overrides. Raises FileNotFoundError, ValueError (all problems)."""
        return build(cls, merge(read_yaml(path), parse_overrides(list(overrides))))

    def to_yaml(self) -> str:
        """All fields, defaults included; `from_recipe` of this text gives an equal config."""
        return yaml.safe_dump(to_plain(self), sort_keys=False, allow_unicode=True)

    def check_files(self) -> None:
        """Refuse missing input, and a run folder that holds another run. Raises ValueError with every problem."""
        problems = []
        if not (Path(self.model.path) / "config.json").is_file():
            state = "has no config.json" if Path(self.model.path).is_dir() else "does not exist"
            problems.append(f"model.path is {self.model.path}, which {state}; valid: a Hugging Face model folder")
        if self.model.adapter is not None and not (Path(self.model.adapter) / "adapter_config.json").is_file():
            problems.append(f"model.adapter is {self.model.adapter}, which has no adapter_config.json")
        for name, files in (("data.train", self.data.train), ("data.validation", self.data.validation)):
            for file in files:
                if not Path(file).is_file():
                    state = "is a folder" if Path(file).is_dir() else "does not exist"
                    problems.append(f"{name} names {file}, which {state}; valid: a JSON, JSON lines or Parquet file")
        problems += self._other_run()
        if problems:
            raise RecipeError(*problems)

    def save(self) -> None:
        """Write run_dir/config.yaml, whole or not at all."""
        path = self._saved_path
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(f"# minift train {path}\n{self.to_yaml()}", encoding="utf-8")
        os.replace(unfinished, path)

    @property
    def _saved_path(self) -> Path:
        return Path(self.run_dir) / "config.yaml"

    def changes(self) -> list[str]:
        """What is not as it was when the run in run_dir was here last, a sentence each."""
        if not _was_trained(Path(self.run_dir)):
            return []
        return [_told(change) for change in self._changes()]

    def _changes(self) -> list[tuple[str, Any, Any]]:
        """(key, value there, value here). ValueError if this version cannot read what is there."""
        there = replace(RunConfig.from_recipe(self._saved_path), run_dir=self.run_dir)
        return differences(there, self)

    def _other_run(self) -> list[str]:
        """A sentence if run_dir holds a run that this config would not continue."""
        run_dir = Path(self.run_dir)
        if run_dir.exists() and not run_dir.is_dir():
            return [f"run_dir is {run_dir}, which is a file; valid: a folder, new or of the same run"]
        if not _was_trained(run_dir):
            return []  # the first try failed before its first step: nothing can be lost, and the recipe may change
        if not self._saved_path.is_file():
            return [f"run_dir is {run_dir}, which holds results but no config.yaml; give another --run_dir"]
        try:
            changes = [_told(change) for change in self._changes() if not _is_how(change[0])]
        except ValueError as error:
            return [f"run_dir is {run_dir}, whose run this version cannot continue ({error}); give another --run_dir"]
        if not changes:
            return []
        return [f"run_dir is {run_dir}, which holds another run: {'; '.join(changes)}. Give another --run_dir"]


def _told(change: tuple[str, Any, Any]) -> str:
    key, there, here = change
    return f"{key} is {show(here)} now and {show(there)} there"


def _is_how(key: str) -> bool:
    return any(f"{key}.".startswith(f"{name}.") for name in HOW)


def _was_trained(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    has_files = any((run_dir / name).is_dir() and any((run_dir / name).iterdir()) for name in ("checkpoints", "export"))
    return has_files or (metrics.is_file() and bool(read_metrics(metrics)[0]))


def help_text() -> str:
    """Every field with type, default and documentation, section by section."""
    top, sections = [], []
    seen = set()
    for entry in walk(RunConfig):
        if entry.section:
            sections += _section_lines(entry, is_first=entry.key not in seen)
            seen.add(entry.key)
            continue
        default = f"default: {entry.default}" if entry.default else "required"
        lines = [f"  --{entry.key}  {describe(entry.hint)}  ({default})"]
        doc = entry.doc[:1].upper() + entry.doc[1:]
        lines += textwrap.wrap(doc, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
        text = "\n".join(lines)
        if text not in seen:  # fields that variants of a section share are told once
            (sections if "." in entry.key else top).append(text)
            seen.add(text)
    return "\n".join([USAGE, *top, *sections])


def _section_lines(entry: Field, is_first: bool) -> list[str]:
    """The heading of a section, of each of its variants if there are any; `is_first`: of these."""
    rest = "" if entry.default != "null" else "  (default: null)"
    lines = [f"\n{entry.key}: {entry.doc}{rest}"] if is_first else []
    sections = sections_of(entry.hint)
    if len(sections) > 1:
        name, choices = variants(sections)
        value = next(value for value, section in choices.items() if section is entry.section)
        lines.append(f"\n  with {name}: {value}")
    return lines
