"""Imports inside minift only point down the list of layers. Oracle: the list; every import statement is read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "minift"

LAYERS = [  # lowest first; what shares a line does not import each other
    ["_C"],
    ["ops", "dist", "heap", "json_file", "metrics", "pinned", "precision", "progress", "recipe", "run_lock", "style"]
    + ["trace"],
    ["grad_slot", "curves"],
    ["model", "data", "objectives", "optim"],
    ["quant", "recompute", "generate", "peft", "fsdp"],
    ["checkpoint"],
    ["build", "step", "loop", "eval", "report", "timeline", "analysis"],
    ["planner", "start"],
    ["train", "inference"],
    ["config"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
NEVER = {  # downward, and still refused: these work on any model, objective or number of processes
    "model": ["minift.dist"],
    "objectives": ["minift.dist"],
    "data": ["minift.dist"],
    "fsdp": ["minift.model", "minift.data", "minift.objectives"],
    "peft": ["minift.model"],
}
EXCEPT = {"peft": ["minift.model.linear", "minift.model.attention", "minift.model.embedding"]}  # what is wrapped


def part_of(module: str) -> str:
    """minift.model.linear -> model; minift itself -> the empty string, which anybody may import."""
    return (module + ".").split(".")[1]


def imports_of(source: str, module: str, is_package: bool) -> list[str]:
    """Full names of everything of minift that `source` imports, at any depth, with relative imports resolved."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module if is_package else module.rpartition(".")[0]
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            found += [f"{base}.{alias.name}" if base == "minift" else base for alias in node.names]
    return [name for name in found if name.split(".")[0] == "minift"]


def complaint(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`, or None."""
    here, there = part_of(module), part_of(imported)
    if here == there or there in ("", "__version__"):
        return None
    for name in (here, there):
        if name not in LAYER_OF:
            return f"minift.{name} has no layer; give it one in {Path(__file__).name}"
    if LAYER_OF[there] >= LAYER_OF[here]:
        return f"{module} imports {imported}, which is not below it"
    if there == "_C" and here != "ops":
        return f"{module} imports the extension itself; minift.ops is its only door"
    banned = any(f"{imported}.".startswith(f"{name}.") for name in NEVER.get(here, []))
    if banned and imported not in EXCEPT.get(here, []):
        return f"{module} imports {imported}; {here} must work without it"
    return None


def test_imports_point_down():
    complaints, unplaced = [], []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        if part_of(module) not in {*LAYER_OF, ""}:
            unplaced.append(module)
        imported = imports_of(path.read_text(encoding="utf-8"), module, is_package)
        complaints += filter(None, (complaint(module, name) for name in imported))
    assert not unplaced, f"no layer for {unplaced}; give it one in {Path(__file__).name}"
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("source", "module", "is_legal"),
    [
        ("import minift.fsdp.unit", "minift.train", True),
        ("from minift import train", "minift.build", False),
        ("def f():\n    from minift.train import train", "minift.eval.loss", False),
        ("from ..fsdp import shard", "minift.peft.lora", False),
        ("from .lora import LoraConfig", "minift.peft.inject", True),
        ("from minift.model.linear import LinearBase", "minift.peft.lora", True),
        ("from minift.model.decoder import CausalLM", "minift.peft.lora", False),
        ("from minift.dist.process import World", "minift.model.decoder", False),
        ("from minift.data.batch import Batch", "minift.objectives.sft", False),
        ("import minift.odds_and_ends", "minift.train", False),
        ("import torch, numpy", "minift.ops.norm", True),
        ("from minift import _C", "minift.ops.norm", True),
        ("from minift import _C", "minift.model.norm", False),
    ],
)
def test_the_test_sees(source, module, is_legal):
    complaints = [complaint(module, name) for name in imports_of(source, module, is_package=False)]
    assert is_legal == (not any(complaints))
