"""Before the first step: find the ranks and the initial factors that the settings of an adapter leave to the base.

Spectra are found together by all ranks (`weights`, `gradients`); what follows from them is small and done by the first,
which leaves it in the run folder, from where all ranks read it, now and whenever the run goes on.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minift.build import ModelSource, construct
from minift.checkpoint.initial import InitialAdapter, save_initial
from minift.data.batch import Batch
from minift.dist.collectives import barrier
from minift.dist.process import World
from minift.model.hf import load_config
from minift.model.linear import LinearBase
from minift.objectives.sft import SupervisedTokens
from minift.peft.adapter import AdapterConfig
from minift.peft.inject import adapters, frozen_projections
from minift.peft.lora import LoraConfig
from minift.peft.ranks import allocate_ranks
from minift.peft.residual import ResidualLoraConfig, Spectrum
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.quant.weights import QuantWeights
from minift.recompute import RecomputeConfig
from minift.start.gradients import gradient_spectra
from minift.start.weights import weight_spectra

_MOST_RANK = 4
"""A projection gets at most so many times r: of what is beyond, nobody has looked at the spectrum."""


def needs_start(adapter: AdapterConfig | None) -> bool:
    """Whether there is anything to find out."""
    return isinstance(adapter, ResidualLoraConfig) or (isinstance(adapter, LoraConfig) and adapter.allocate != "none")


def needs_gradients(adapter: LoraConfig) -> bool:
    """Whether for this batches are needed."""
    return "gradients" in _sources(adapter)


def prepare_start(
    folder: Path,
    adapter: LoraConfig,
    steps: Sequence[Sequence[Batch]],
    *,
    source: ModelSource,
    quant: QuantConfig | None,
    objective: SupervisedTokens,
    precision: Precision,
    recompute: RecomputeConfig,
    world: World,
    seed: int,
) -> InitialAdapter:
    """Find out what `adapter` leaves open, and leave it in `folder`, in the place of what is there. Collective.

    steps: this rank's microbatches of the optimizer steps over which gradients are averaged; empty unless
    `needs_gradients`. ValueError for settings, or a base, that do not allow it.
    """
    projections = _projections(source, adapter, quant)
    columns = {name: _columns(adapter, name, linear) for name, linear in projections.items()}
    spectra: dict[str, dict[str, Spectrum]] = {}
    if "weights" in _sources(adapter):
        spectra["weights"] = weight_spectra(source.path, columns, world, seed)
    if "gradients" in _sources(adapter):
        spectra["gradients"] = gradient_spectra(
            source,
            columns,
            steps,
            quant=quant,
            objective=objective,
            wire=precision.wire,
            recompute=recompute,
            world=world,
            seed=seed,
        )
        gc.collect()  # a model's hooks refer back to it: else it is still there when the one to train is loaded
    if world.is_main:
        if adapter.allocate != "none":
            adapter = with_ranks(adapter, projections, spectra[adapter.allocate])
        factors = {}
        if isinstance(adapter, ResidualLoraConfig):
            for name, spectrum in spectra[adapter.source].items():
                # What compute will read of them, so that the residual and they make up the weight exactly.
                pair = adapter.factors(name, spectrum)
                factors[name] = tuple(factor.to(precision.wire_dtype).float() for factor in pair)
        shutil.rmtree(folder, ignore_errors=True)
        save_initial(folder, adapter, factors)
    barrier(world)
    return InitialAdapter(folder, adapter)


def with_ranks(
    adapter: LoraConfig, projections: Mapping[str, LinearBase], spectra: Mapping[str, Spectrum]
) -> LoraConfig:
    """`adapter` with a rank for each projection, together at most as many parameters as with rank r in all of them. The
    scale of an update stays what it was, or goes with 1 / √rank with `rslora`, as always."""
    costs = {name: linear.in_features + linear.out_features for name, linear in projections.items()}
    gains = {}
    for name, linear in projections.items():
        squares = spectra[name].S.double().square()
        if adapter.allocate == "weights":
            squares /= max(spectra[name].square_norm, torch.finfo(torch.float64).tiny)
        gains[name] = squares[: _most_rank(adapter, name, linear)].tolist()
    ranks = allocate_ranks(gains, costs, sum(adapter.r * cost for cost in costs.values()))
    alphas = {} if adapter.rslora else {name: adapter.scale(name) * rank for name, rank in ranks.items()}
    return replace(adapter, allocate="none", rank_pattern=ranks, alpha_pattern=alphas or adapter.alpha_pattern)


def _sources(adapter: LoraConfig) -> set[str]:
    """Whose spectra are needed."""
    sources = {adapter.allocate} - {"none"}
    return sources | {adapter.source} if isinstance(adapter, ResidualLoraConfig) else sources


def _projections(source: ModelSource, adapter: LoraConfig, quant: QuantConfig | None) -> dict[str, LinearBase]:
    """What gets an adapter, on the meta device. ValueError for what building will refuse."""
    weights = QuantWeights(source.path)
    model = construct(load_config(source.path), weights, adapter, quant=quant).module
    if weights.stored.projections and isinstance(adapter, ResidualLoraConfig) and adapter.quantizes_residual:
        raise ValueError(
            f"{source.path} is stored in 4 bits, and {adapter.method} is to quantise what its start leaves of the "
            "weights from before; valid: the folder of the original model, with quant, or method lora_ga or lora"
        )
    projections = {name: module.base for name, module in adapters(model).items()}
    tied = projections.keys() - frozen_projections(model).keys()
    if tied:
        raise ValueError(f"{min(tied)} has no weight of its own (tied embeddings), so no spectrum; exclude it")
    return projections


def _most_rank(adapter: LoraConfig, name: str, linear: LinearBase) -> int:
    if adapter.allocate == "none":
        return adapter.rank(name)
    return min(_MOST_RANK * adapter.r, adapter.most_rank(linear.in_features, linear.out_features))


def _columns(adapter: LoraConfig, name: str, linear: LinearBase) -> int:
    """How many singular vectors are needed of the projection `name`."""
    directions = adapter.directions_per_rank if isinstance(adapter, ResidualLoraConfig) else 1
    return directions * _most_rank(adapter, name, linear)
