"""The largest singular values of weights, and their vectors: each rank takes its part of the projections.

By a randomised method with power iterations (Halko, Martinsson, Tropp 2011, algorithm 4.4), as with PEFT's
`pissa_niter_16`: a full decomposition of one matrix of 4096² takes a minute on a CPU. What PiSSA subtracts is what it
found, so an inexact vector costs nothing but a little of the weight's share.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from minift.dist.collectives import gather_objects
from minift.dist.process import World
from minift.peft.inject import named_generator
from minift.peft.residual import Spectrum
from minift.quant.weights import QuantWeights

_ITERATIONS = 16


def weight_spectra(folder: str | Path, columns: Mapping[str, int], world: World, seed: int) -> dict[str, Spectrum]:
    """{projection: the first columns[projection] singular values and vectors of its weight}. Equal on all ranks;
    collective."""
    weights, mine = QuantWeights(folder), list(columns)[world.rank :: world.size]
    found = {name: _spectrum(weights, name, columns[name], world.device, seed) for name in mine}
    together = {name: spectrum for part in gather_objects(found, world) for name, spectrum in part.items()}
    return {name: together[name] for name in columns}


def _spectrum(weights: QuantWeights, name: str, count: int, device: torch.device, seed: int) -> Spectrum:
    weight_OI = weights.read(f"{name}.weight").to(device, torch.float32)
    sketched = min(2 * count, *weight_OI.shape)
    with torch.random.fork_rng(devices=[]):  # the library draws from the global generators
        torch.manual_seed(named_generator(seed, name).initial_seed())
        U, S, V = torch.svd_lowrank(weight_OI, q=sketched, niter=_ITERATIONS)
    square_norm = float(torch.linalg.vector_norm(weight_OI, dtype=torch.float64)) ** 2
    return Spectrum.first(count, U, S, V, square_norm)
