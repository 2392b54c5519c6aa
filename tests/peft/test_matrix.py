"""Every method x {dense, NF4} x {1, 2 ranks} x recomputation on and off, against its formula in fp64.

The methods and their formulas are in rows.py. What the base computes with is the same in both: of an NF4 folder the
formula gets the dequantised weights. Oracles of files: reading back, and PEFT (tests/checkpoint/test_adapters.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import minift.checkpoint.adapters
from minift.checkpoint.adapters import file_tensors, load_adapter, save_adapter
from minift.checkpoint.quantize import quantize_folder
from minift.dist.process import World
from minift.fsdp import ShardPolicy
from minift.model.decoder import CausalLM
from minift.model.hf import fill_parameters, load_config
from minift.peft.inject import adapter_parameters, inject
from minift.peft.lora_ga import LoraGaConfig
from minift.peft.manage import merge_all, unmerge_all
from minift.peft.methods import METHODS
from minift.peft.pissa import PissaConfig
from minift.peft.prefix import PrefixConfig
from minift.peft.prompt import PromptConfig
from minift.quant.linear import QuantConfig
from minift.quant.model import load_model
from minift.quant.weights import QuantWeights
from tests.integration.assembly import QWEN2, VOCAB_SIZE, assemble, loss_of, write_model
from tests.peft.residual_rows import residual_row
from tests.peft.rows import ALL, README_METHOD, Row
from tests.peft.rows import ROWS as ROWS_OF_PROJECTIONS
from tests.peft.virtual_rows import PrefixRow, PromptRow
from tests.ranks import run_ranks

NUM_TOKENS = 23
ZERO3 = ShardPolicy()
# fp32 against fp64 through two blocks, relative to the norm of a whole gradient, or to the largest logit: some dozens
# of roundings of 6e-8 one after another, each of random sign.
TOLERANCE = 1e-5
# W - s B A and s B A are rounded one by one, in each projection of a block and in what adds them up.
RESIDUAL_TOLERANCE = {torch.float32: TOLERANCE, torch.bfloat16: 2.0**-5}
VIRTUAL = {"is_identity_at_start": False, "is_dense_weight": False}
ROWS = ROWS_OF_PROJECTIONS | {
    "prefix": PrefixRow(
        PrefixConfig(num_virtual_tokens=5), {}, {"block": ("prefix_keys", "prefix_values")}, **VIRTUAL
    ),
    "prefix, projected": PrefixRow(
        PrefixConfig(num_virtual_tokens=5, projection=True, encoder_hidden_size=7),
        {},
        {
            "encoder": ("encoder.embedding.weight", "encoder.hidden_proj.weight", "encoder.hidden_proj.bias"),
            "block": ("prefix_proj.weight", "prefix_proj.bias"),
        },
        **VIRTUAL,
    ),
    "prompt": PromptRow(PromptConfig(num_virtual_tokens=5, init="random"), {}, {}, **VIRTUAL),
    "pissa": residual_row(PissaConfig(r=3, alpha=6), dict.fromkeys(ALL, 2.0)),
    "pissa, rslora": residual_row(
        PissaConfig(r=4, alpha=6, rslora=True, rank_pattern={"q_proj": 9}, targets=["q_proj", "down_proj"]),
        {"q_proj": 2.0, "down_proj": 3.0},
    ),
    "pissa, nf4": residual_row(PissaConfig(r=3, alpha=6), dict.fromkeys(ALL, 2.0), QuantConfig()),
    "lora_ga": residual_row(LoraGaConfig(r=3, alpha=6), dict.fromkeys(ALL, 2.0)),
}
BASES = {name: ["dense"] if name.startswith("pissa") else ["dense", "nf4"] for name in ROWS}
"""The folders. PiSSA's are dense, also where it computes in 4 bits."""
CELLS = [(name, base) for name in ROWS for base in BASES[name]]


@dataclass(frozen=True)
class Folders:
    """The same model twice (Qwen2, for its biases on q, k and v), and what the formulas make of it."""

    parent: Path

    @functools.cache  # noqa: B019 (one object, of this module)
    def folder(self, base: str) -> Path:
        if base == "dense":
            return write_model(self.parent / "dense", QWEN2 | {"num_hidden_layers": 2})
        quantize_folder(self.folder("dense"), self.parent / "nf4", QuantConfig())
        return self.parent / "nf4"

    def start(self, base: str, row: str) -> Path:
        return self.parent / f"start of {row} on {base}"

    @functools.cache  # noqa: B019
    def row(self, base: str, row: str) -> Row:
        return ROWS[row].started(self.folder(base), self.start(base, row))

    def exported(self, base: str, row: str) -> Path:
        """The folder of the model that the exported adapter is for."""
        return self.row(base, row).base(self.folder(base), self.start(base, row))

    def formulas(self, base: str, row: str) -> tuple[CausalLM, dict[str, Tensor]]:
        """The model in fp64 that computes the formulas, and what is trained in it."""
        folder, chosen = self.folder(base), self.row(base, row)
        with torch.device("meta"):
            model, adapted = CausalLM(load_config(folder)), CausalLM(load_config(folder))
        weights = QuantWeights(self.exported(base, row))
        fill_parameters(model, lambda name: weights.read(name).double())
        model.requires_grad_(False)
        names = inject(adapted, chosen.config)
        own_names = adapter_parameters(adapted).keys()
        own = {
            name: nn.Parameter((chosen.values(adapted, name) if name in own_names else weights.read(name)).double())
            for name in names
        }
        chosen.as_formulas(model, own)
        return model, own

    @functools.cache  # noqa: B019
    def expected(self, base: str, row: str, world_size: int) -> tuple[list[float], dict[str, Tensor]]:
        """The loss on each rank, and the gradients of their sum."""
        model, own = self.formulas(base, row)
        losses = []
        for rank in range(world_size):
            loss = loss_of(model, rank, NUM_TOKENS)
            loss.backward()
            losses.append(loss.item())
        return losses, {name: leaf.grad for name, leaf in own.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("models"))


@dataclass(frozen=True)
class Step:
    """What a rank tells of its second step (in the first the engine learns the order of things)."""

    loss: float
    gradients: dict[str, Tensor]
    in_gradient_buffers: list[str]
    not_reached: list[str]


def step_on_rank(
    world: World, folder: Path, start: Path, row: str, recompute: str, policy: ShardPolicy = ZERO3
) -> Step:
    chosen = ROWS[row].started(folder, start)
    model, engine = assemble(
        folder, chosen.quant, world, policy, recompute, adapter=chosen.config,
        values=chosen.values, start=chosen.initial,
    )  # fmt: skip
    for _ in range(2):
        engine.clear_gradients()
        loss = loss_of(model, world.rank, NUM_TOKENS)
        loss.backward()
    with_gradients = [name for bucket in engine.buckets if bucket.grad is not None for name in bucket.params]
    for bucket in engine.buckets:
        if bucket.trainable:
            bucket.shard.copy_(bucket.grad)
    engine.weights_changed()
    gradients = {name: tensor.clone() for name, tensor in engine.full_tensors(trainable_only=True)}
    return Step(loss.item(), gradients, with_gradients, engine.parameters_without_grad())


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("row", "base"), CELLS)
def test_loss_and_gradients_are_the_formula_s(
    folders: Folders, row: str, base: str, world_size: int, recompute: str
) -> None:
    check_steps(folders, row, base, world_size, recompute)


STRATEGIES = {
    "zero2": (2, ShardPolicy(strategy="zero2")),
    "zero1": (2, ShardPolicy(strategy="zero1")),
    "ddp": (2, ShardPolicy(strategy="ddp")),
    "hsdp": (4, ShardPolicy(replicas=2)),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("row", ROWS)
def test_under_every_other_strategy(folders: Folders, row: str, strategy: str) -> None:
    world_size, policy = STRATEGIES[strategy]
    check_steps(folders, row, BASES[row][-1], world_size, "none", policy)


def check_steps(folders: Folders, row: str, base: str, world_size: int, *how: str | ShardPolicy) -> None:
    losses, expected = folders.expected(base, row, world_size)
    steps = run_ranks(world_size, step_on_rank, folders.folder(base), folders.start(base, row), row, *how)
    for step, loss in zip(steps, losses, strict=True):
        assert step.loss == pytest.approx(loss, rel=TOLERANCE)
        assert step.gradients.keys() == expected.keys()
        for name, gradient in step.gradients.items():
            # One number may be a sum over everything that cancels to a hundredth of what was added.
            tolerance = TOLERANCE if gradient.numel() > 1 else 100 * TOLERANCE
            assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm(), name
        assert sorted(step.in_gradient_buffers) == sorted(expected), "gradient buffers are for what is trained"
        assert not step.not_reached


@torch.no_grad()
def logits_of(model: CausalLM) -> Tensor:
    tokens_T = torch.arange(11) * 7 % VOCAB_SIZE
    bounds = torch.tensor([0, 11], dtype=torch.int32)
    return model(tokens_T, torch.arange(11), bounds, 11, head=lambda hidden_TD, lm_head: lm_head(hidden_TD))


def assert_close_logits(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(("row", "base"), CELLS)
def test_logits_are_the_formula_s_merged_or_not(folders: Folders, row: str, base: str) -> None:
    model, (oracle, _) = folders.row(base, row).adapted(folders.exported(base, row)), folders.formulas(base, row)
    expected, unmerged = logits_of(oracle), logits_of(model)
    assert_close_logits(unmerged, expected)
    if not ROWS[row].is_dense_weight:
        with pytest.raises(ValueError, match="cannot be merged; keep it beside"):
            merge_all(model)
        return
    merge_all(model)
    assert_close_logits(logits_of(model), expected)
    unmerge_all(model)
    assert torch.equal(logits_of(model), unmerged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("row", "base"), CELLS)
def test_nothing_changes_at_the_start_and_what_trains_is_exactly_this(
    folders: Folders, row: str, base: str, dtype: torch.dtype
) -> None:
    chosen = folders.row(base, row)
    before = logits_of(load_model(folders.folder(base), None, dtype))
    model = chosen.at_start(folders.folder(base), dtype)
    after = logits_of(model)
    if chosen.initial is None:
        assert torch.equal(after, before) == chosen.is_identity_at_start
    elif chosen.quant is None:
        assert (after - before).abs().max() <= RESIDUAL_TOLERANCE[dtype] * before.abs().max()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(trained) == sorted(chosen.trainable(model))


@pytest.mark.parametrize(("row", "base"), CELLS)
def test_saved_and_loaded_it_is_the_same(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str, base: str
) -> None:
    monkeypatch.setattr(minift.checkpoint.adapters, "METHODS", (*METHODS, README_METHOD))
    chosen = folders.row(base, row)
    model = chosen.adapted(folders.exported(base, row))
    save_adapter(tmp_path / "adapter", chosen.exported, file_tensors(model))
    again = load_model(folders.exported(base, row), None, torch.float32).eval()
    assert type(load_adapter(again, tmp_path / "adapter")) is (chosen.stored_as or type(chosen.config))
    assert_close_logits(logits_of(again), logits_of(model))
