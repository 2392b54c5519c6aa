"""The spectra of gradients that nobody holds. Oracle: autograd on one process, and torch's SVD of what it gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minift.build import ModelSource
from minift.dist.process import World
from minift.fsdp import ShardedModel
from minift.objectives.sft import SupervisedTokens
from minift.peft.residual import Spectrum
from minift.recompute import RecomputeConfig
from minift.start import gradients
from minift.start.gradients import gradient_spectra
from tests.ranks import run_ranks
from tests.start.first_batches import first_steps, whole_gradients
from tests.tiny import write_model


def spectra_on_rank(
    world: World, folder: Path, columns: dict[str, int], wire: str = "float32"
) -> tuple[dict[str, Spectrum], int]:
    """And the most bytes of gradients that the engine had memory for."""
    engines: list[ShardedModel] = []
    build = gradients.build_model

    def watched(*args, **settings):
        built = build(*args, **settings)
        engines.append(built.engine)
        return built

    gradients.build_model = watched
    try:
        found = gradient_spectra(
            ModelSource(str(folder)), columns, first_steps(world), objective=SupervisedTokens(), wire=wire,
            recompute=RecomputeConfig(), world=world, seed=3,
        )  # fmt: skip
    finally:
        gradients.build_model = build
    return found, engines[0].held_bytes()["gradients"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tied=False, num_hidden_layers=6)


def projections(folder: Path) -> list[str]:
    names = [name.removesuffix(".weight") for name in whole_gradients(folder)]
    return [name for name in names if name.endswith(("_proj", "lm_head"))]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_columns_are_the_whole_gradient(folder: Path, world_size: int) -> None:
    """fp32 sums over some hundred tokens, and four products and three orthogonalisations of 24 columns: 1e-5."""
    expected, columns = whole_gradients(folder), dict.fromkeys(projections(folder), 40)
    for found, _ in run_ranks(world_size, spectra_on_rank, folder, columns):
        assert found.keys() == columns.keys()
        for name, spectrum in found.items():
            gradient = expected[f"{name}.weight"]
            error = (spectrum.U * spectrum.S) @ spectrum.V.T - gradient
            assert error.norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16"])
def test_few_columns_have_almost_what_the_best_ones_have(folder: Path, wire: str) -> None:
    expected, columns = whole_gradients(folder), dict.fromkeys(projections(folder), 6)
    ((found, _),) = run_ranks(1, spectra_on_rank, folder, columns, wire)
    for name, spectrum in found.items():
        gradient = expected[f"{name}.weight"]
        best = torch.linalg.svdvals(gradient)[:6].norm()
        caught = (spectrum.U.T @ gradient @ spectrum.V).norm()
        assert spectrum.U.shape[1] == spectrum.V.shape[1] == len(spectrum.S) == 6
        assert caught >= 0.99 * best, name


@pytest.mark.parametrize("world_size", [1, 2])
def test_memory_for_gradients_does_not_grow_with_the_model(folder: Path, tmp_path: Path, world_size: int) -> None:
    """It is that of two blocks, however many there are."""
    held = []
    for model in (folder, write_model(tmp_path / "half", tied=False, num_hidden_layers=3)):
        blocks = {name: 2 for name in projections(model) if name != "lm_head"}
        held.append([num_bytes for _, num_bytes in run_ranks(world_size, spectra_on_rank, model, blocks)])
    assert held[0] == held[1]
    assert held[0][0] > 0
