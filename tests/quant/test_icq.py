"""Shifted blocks as a module, read by any number of ranks, trained on, merged. Oracles: the dense weight that they are,
and autograd on it in fp64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minift.checkpoint.adapters import file_tensors, load_adapter, save_adapter
from minift.checkpoint.merge import merge_adapter
from minift.checkpoint.quantize import quantize_folder
from minift.config import RunConfig
from minift.dist.process import World
from minift.fsdp import ShardPolicy
from minift.inference import load_assistant, measure_loss
from minift.metrics import read_metrics
from minift.model.decoder import CausalLM
from minift.model.hf import fill_parameters, load_config
from minift.ops.nf4 import quantize_nf4
from minift.ops.nf4_shift import block_shifts, shifted
from minift.peft.iec import IecConfig
from minift.peft.inject import adapter_parameters, inject
from minift.peft.manage import merge_all, unmerge_all
from minift.quant.icq import IcqLinear
from minift.quant.linear import NF4Linear, QuantConfig
from minift.quant.model import load_model
from minift.quant.weights import QuantWeights
from tests.integration.assembly import LLAMA, QWEN2, assemble, loss_of, write_model
from tests.peft.rows import ROWS
from tests.peft.test_matrix import assert_close_logits, logits_of
from tests.ranks import run_ranks
from tests.test_train import config_for, losses, run
from tests.tiny import write_conversations
from tests.tiny import write_model as write_tiny_model

ICQ = QuantConfig(icq=True)
CPU = torch.device("cpu")
NUM_TOKENS = 23
TOLERANCE = 1e-5  # see test_matrix.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "dense", QWEN2 | {"num_hidden_layers": 2})


def make(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Linear:
    out_features, in_features = weight.shape
    blank = IcqLinear(in_features, out_features, False, block_size, double_quant, weight.dtype, CPU)
    return blank.storing(weight)


@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_products_are_those_of_the_dense_weight(double_quant: bool, dtype: torch.dtype, num_tokens: int) -> None:
    """As tests/quant/test_linear.py bounds them, and one rounding more for the sums of a block."""
    torch.manual_seed(0)
    linear = make((3 + torch.randn(24, 192)).to(dtype), 64, double_quant)
    weight = linear.dense_weight()
    assert weight.dtype == dtype
    W, unit = weight.double(), torch.finfo(dtype).eps / 2
    x, dy = torch.randn(num_tokens, 192, dtype=dtype), torch.randn(num_tokens, 24, dtype=dtype)
    bound = 8 * unit + 400 * min(2.0**-24, unit)
    size = x.double().abs() @ W.abs().T
    assert ((linear.product(x).double() - x.double() @ W.T).abs() <= bound * size).all()
    added_to = torch.randn(num_tokens, 192, dtype=dtype)
    exact, size = dy.double() @ W, dy.double().abs() @ W.abs()
    assert ((linear.product_dx(dy).double() - exact).abs() <= bound * size).all()
    exact, size = exact + added_to.double(), size + added_to.double().abs()
    assert linear.product_dx(dy, added_to) is added_to
    assert ((added_to.double() - exact).abs() <= bound * size).all()
    rows = torch.cat([rows for _, rows in linear.weight_slices(dtype)])
    assert torch.equal(rows, weight)


def test_it_holds_the_codes_of_what_is_left(folder: Path) -> None:
    """Read by a folder's reader, and stored from memory: the same bytes."""
    weights = QuantWeights(folder)
    weight = weights.read("model.layers.0.mlp.up_proj.weight")
    linear = make(weight)
    shifts = block_shifts(weight)
    codes, absmax = quantize_nf4(shifted(weight, shifts))
    assert torch.equal(linear.codes, codes) and torch.equal(linear.shifts.view(torch.bfloat16), shifts)
    read = linear.blank()
    weights.fill("model.layers.0.mlp.up_proj", read, CPU)
    for part in ("codes", "scales", "nested", "shifts"):
        assert torch.equal(read.get_parameter(part), linear.get_parameter(part)), part
    error = (linear.dense_weight() - weight).norm() / weight.norm()
    assert error < 0.1  # as NF4: what is gained is entropy


def gathered(world: World, folder: Path) -> dict[str, Tensor]:
    _, engine = assemble(folder, ICQ, world, ShardPolicy())
    return {name: tensor.clone() for name, tensor in engine.full_tensors() if tensor.dtype == torch.uint8}


def test_bytes_do_not_depend_on_the_number_of_ranks(folder: Path) -> None:
    alone = run_ranks(1, gathered, folder)[0]
    assert len(alone) == 4 * 14
    for world_size in (2, 3):
        for tensors in run_ranks(world_size, gathered, folder):
            assert all(torch.equal(tensors[name], expected) for name, expected in alone.items())


def step(world: World, folder: Path, recompute: str) -> tuple[float, dict[str, Tensor]]:
    row = ROWS["iec"]
    model, engine = assemble(
        folder, ICQ, world, ShardPolicy(), recompute, adapter=row.config, values=row.values
    )
    for _ in range(2):
        engine.clear_gradients()
        loss = loss_of(model, world.rank, NUM_TOKENS)
        loss.backward()
    for bucket in engine.buckets:
        if bucket.trainable:
            bucket.shard.copy_(bucket.grad)
    engine.weights_changed()
    return loss.item(), {name: tensor.clone() for name, tensor in engine.full_tensors(trainable_only=True)}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_ir_qlora_is_its_formula(folder: Path, world_size: int, recompute: str) -> None:
    """Both halves, sharded, against IEC's formula over the dequantised weights in fp64."""
    row, dense = ROWS["iec"], load_model(folder, ICQ, torch.float32)
    with torch.device("meta"):
        oracle, adapted = CausalLM(load_config(folder)), CausalLM(load_config(folder))
    weights, quantized = QuantWeights(folder), dict(dense.named_modules())

    def read(name: str) -> Tensor:
        module = quantized[name.rpartition(".")[0]]
        is_shifted = isinstance(module, IcqLinear) and name.endswith("weight")
        return (module.dense_weight() if is_shifted else weights.read(name)).double()

    fill_parameters(oracle, read)
    oracle.requires_grad_(False)
    names = inject(adapted, row.config)
    own = {name: torch.nn.Parameter(row.values(adapted, name).double()) for name in names}
    row.as_formulas(oracle, own)
    losses = [loss_of(oracle, rank, NUM_TOKENS) for rank in range(world_size)]
    sum(losses).backward()
    for rank, (loss, gradients) in enumerate(run_ranks(world_size, step, folder, recompute)):
        assert loss == pytest.approx(losses[rank].item(), rel=TOLERANCE)
        for name, gradient in gradients.items():
            tolerance = TOLERANCE if gradient.numel() > 1 else 100 * TOLERANCE
            assert (gradient - own[name].grad).norm() <= tolerance * own[name].grad.norm(), name


def test_merged_in_memory_and_on_disk(folder: Path, tmp_path: Path) -> None:
    config = IecConfig(r=4, alpha=8.0)
    model = load_model(folder, ICQ, torch.float32).eval()
    inject(model, config)
    for name, parameter in adapter_parameters(model).items():
        parameter.data.copy_(ROWS["iec"].values(model, name))
    expected = logits_of(model)
    save_adapter(tmp_path / "adapter", config, file_tensors(model))
    again = load_model(folder, ICQ, torch.float32).eval()
    load_adapter(again, tmp_path / "adapter")
    assert_close_logits(logits_of(again), expected)
    merge_adapter(folder, tmp_path / "adapter", tmp_path / "merged", quant=ICQ)
    assert_close_logits(logits_of(load_model(tmp_path / "merged", None, torch.float32).eval()), expected)
    with pytest.raises(ValueError, match="bitsandbytes' format has no place for"):
        merge_adapter(folder, tmp_path / "adapter", tmp_path / "again", target="requantized", quant=ICQ)
    merge_all(model)
    assert_close_logits(logits_of(model), expected)
    unmerge_all(model)
    assert torch.equal(logits_of(model), expected)


def test_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bitsandbytes' format has no place for"):
        quantize_folder(folder, tmp_path / "nf4", ICQ)
    quantize_folder(folder, tmp_path / "nf4", QuantConfig())
    with pytest.raises(ValueError, match="is quantised already, without quant.icq"):
        load_model(tmp_path / "nf4", ICQ, torch.float32)
    ragged = write_model(tmp_path / "ragged", LLAMA | {"num_hidden_layers": 1})
    with pytest.raises(ValueError, match=r"needs rows of whole blocks of 64, and those of .*q_proj have 96"):
        load_model(ragged, ICQ, torch.float32)


def test_a_run_of_ir_qlora_stops_resumes_and_is_loaded(tmp_path: Path) -> None:
    """On two ranks. What was exported, over the base in the same format, has the loss that was validated last."""
    inputs = tmp_path / "inputs"
    write_tiny_model(inputs / "model", hidden_size=64, intermediate_size=128, num_attention_heads=2)
    write_conversations(inputs / "train.jsonl", 24)
    write_conversations(inputs / "heldout.jsonl", 5)

    def config(folder: str) -> RunConfig:
        made = config_for(inputs, tmp_path / folder, validate_every_steps=6)
        return replace(made, adapter=IecConfig(r=4, alpha=8.0), quant=ICQ)

    run_ranks(2, run, config("straight"))
    run_ranks(2, run, config("stopped"), 3)
    run_ranks(2, run, config("stopped"))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    adapter = str(tmp_path / "straight" / "export" / "adapter")
    assistant = load_assistant(str(inputs / "model"), adapter, template="chatml", quant=ICQ, dtype=torch.float32)
    data = replace(config("straight").data, train=(str(inputs / "heldout.jsonl"),))
    loss = measure_loss(assistant, data, 256, World(0, 1, 0, CPU, "gloo", None))["loss"]
    _, validation = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    assert loss == pytest.approx(validation[-1]["validation_loss"], rel=1e-5)
    assert loss < validation[0]["validation_loss"]
