"""What `minift plan` says: of a recipe, or of a model and every way to fine-tune it.

answer = answer_for_recipe(config, machine)
answer.text, answer.to_json(), answer.draw(Path("plan.png"))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from minift.build import ModelSource
from minift.data.config import DataConfig
from minift.model.config import ModelConfig
from minift.model.hf import load_config
from minift.planner.catalog import MODELS, model_shape
from minift.planner.choices import METHODS, Candidate
from minift.planner.plan import Loop, Machine, Plan, Planner, workload_of
from minift.planner.shapes import Setup, Workload
from minift.planner.show import change_text, draw_plans, methods_text, plan_json, plan_text, search_text
from minift.quant.weights import QuantWeights


class Config(Setup, Protocol):
    """What is read of `config.RunConfig`, a frozen dataclass."""

    model: ModelSource
    data: DataConfig
    loop: Loop


@dataclass(frozen=True)
class Answer:
    """text: for people. bars: what to draw, by label. to_json: everything, by name."""

    text: str
    bars: dict[str, Plan]
    to_json: Callable[[], dict[str, Any]]

    def draw(self, path: Path) -> Path:
        return draw_plans(self.bars, path)


def answer_for_recipe(
    config: Config,
    machine: Machine,
    document_tokens: int | None = None,
    supervised: float = 1.0,
    search: bool = False,
) -> Answer:
    """What the recipe takes on `machine`, what would make it fit, and with `search` what is fastest."""
    model, weights = find_model(config.model.path)
    workload = workload_of(config.loop, config.data.max_length_tokens, machine.world_size, document_tokens, supervised)
    examples, ranks = config.loop.examples_per_step, machine.world_size
    asked = Candidate(config, workload, examples * workload.document_tokens)
    planner = Planner(model, machine, weights)
    plan = planner.plan(asked)
    parts, bars = [plan_text(plan)], {"as it is": plan}
    if examples < ranks:
        parts.append(f"loop.examples_per_step {examples} leaves {ranks - examples} of {ranks} ranks without an example")
    change, found = None, []
    if not plan.fits:
        change = planner.smallest_change(asked)
        parts.append(change_text(change))
        if change is not None:
            bars["\n".join(change.candidate.changes)] = change
    if search:
        found = planner.search(asked)
        parts += ["", search_text(found)]
        if found and found[0].candidate.changes:
            bars["fastest:\n" + "\n".join(found[0].candidate.changes)] = found[0]

    def to_json() -> dict[str, Any]:
        record: dict[str, Any] = {"plan": plan_json(plan)}
        if not plan.fits:
            record["smallest_change"] = None if change is None else plan_json(change)
        if search:
            record["search"] = [plan_json(other) for other in found]
        return record

    return Answer("\n".join(parts), bars, to_json)


def answer_for_model(name: str, machine: Machine, tokens: int) -> Answer:
    """One line for each of `METHODS`: of one rank without any sharding, and how many ranks it takes to fit."""
    model, weights = find_model(name)
    workload = Workload(tokens=tokens, document_tokens=tokens)
    alone = Planner(model, replace(machine, world_size=1), weights)
    candidates = {method: Candidate(setup, workload, tokens) for method, setup in METHODS.items()}
    plans = {method: alone.plan(candidate) for method, candidate in candidates.items()}
    needs = {method: alone.fewest_ranks(candidate) for method, candidate in candidates.items()}
    num_parameters = plans["full fine-tuning"].run.num_parameters
    head = (
        f"{name}: {num_parameters / 1e9:.2f} billion parameters; on one device, {tokens:,} tokens at a time, bf16, "
        "blocks run again in backward"
    )

    def to_json() -> dict[str, Any]:
        return {
            method: plan_json(plan) | {"fits_on_ranks": needs[method] and needs[method].machine.world_size}
            for method, plan in plans.items()
        }

    return Answer(f"{head}\n\n{methods_text(plans, needs)}", plans, to_json)


def find_model(path: str) -> tuple[ModelConfig, QuantWeights | None]:
    """Of a Hugging Face folder, with its weights if there are any, or of a name in `catalog.MODELS`."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return load_config(folder), QuantWeights(folder) if any(folder.glob("*.safetensors")) else None
    if folder.name.lower() in MODELS:
        return model_shape(folder.name), None
    raise ValueError(
        f"{path} is neither a folder with a config.json nor a model that minift knows by name; valid: one of "
        f"{', '.join(MODELS)} (of a recipe: --model.path {next(iter(MODELS))}), or a Hugging Face model folder"
    )
