"""The spectra of gradients that nobody holds. Oracle: autograd on one process, and torch's SVD of what it gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minift.build import ModelSource
from minift.checkpoint.quantize import quantize_folder
from minift.dist.process import World
from minift.fsdp import ShardedModel
from minift.objectives.sft import SupervisedTokens
from minift.peft.residual import Spectrum
from minift.quant.linear import QuantConfig
from minift.recompute import RecomputeConfig
from minift.start import gradients
from minift.start.gradients import gradient_spectra
from tests.ranks import run_ranks
from tests.start.first_batches import first_steps, whole_gradients
from tests.tiny import write_model


def spectra_on_rank(
    world: World, folder: Path, columns: dict[str, int], wire: str = "float32", quant: QuantConfig | None = None
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
            ModelSource(str(folder)), columns, first_steps(world), quant=quant, objective=SupervisedTokens(), wire=wire,
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


@pytest.mark.parametrize(
    ("base", "world_size"), [("dense", 1), ("dense", 2), ("dense", 3), ("quantized", 2), ("quantized on the way", 2)]
)
def test_all_columns_are_the_whole_gradient(folder: Path, tmp_path: Path, base: str, world_size: int) -> None:
    """fp32 sums over some hundred tokens, and four products and three orthogonalisations of 24 columns: 1e-5. Of a base
    in 4 bits it is the gradient at the dequantised weights."""
    used, quant = folder, QuantConfig() if base == "quantized on the way" else None
    if base != "dense":
        quantize_folder(folder, tmp_path / "nf4", QuantConfig())
        used = tmp_path / "nf4"
    expected, columns = whole_gradients(used), dict.fromkeys(projections(folder), 40)
    read = folder if quant else used
    for found, _ in run_ranks(world_size, spectra_on_rank, read, columns, "float32", quant):
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


def test_gradients_take_the_memory_of_thin_matrices(tmp_path: Path) -> None:
    """All together less than one of them would take whole."""
    model = write_model(tmp_path, tied=False, hidden_size=192, intermediate_size=256, num_hidden_layers=3)
    columns = {name: 1 for name in projections(model) if name != "lm_head"}
    ((_, held_bytes),) = run_ranks(1, spectra_on_rank, model, columns)
    assert 0 < held_bytes < 4 * 192 * 256
