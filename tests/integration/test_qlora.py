"""QLoRA under FSDP: NF4 weights cut into bytes, gathered as bytes, adapters trained on top.

Oracles: the same model with dense weights that hold the dequantised values, on one process, without the engine; and
the closed form of what NF4 takes (4 bits a weight, 8 bits a block of 64, 32 bits per 256 blocks).
"""

from __future__ import annotations

import gc
import math
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

import minift.optim.moments
from minift.build import ModelSource
from minift.checkpoint.quantize import quantize_folder
from minift.config import RunConfig
from minift.data.config import DataConfig
from minift.dist.process import World
from minift.dist.signals import StopRequest
from minift.fsdp import ShardedModel, ShardPolicy, shard
from minift.fsdp.sharded import connect
from minift.fsdp.transport import Buffer, PairedSends, Pending
from minift.inference import load_assistant, measure_loss
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.hf import fill_parameters, load_config, load_model, save_model
from minift.objectives.cross_entropy import linear_cross_entropy
from minift.optim.config import OptimConfig
from minift.peft.inject import adapter_parameters, init_tensor, inject
from minift.peft.lora import LoraConfig
from minift.peft.names import canonical_name
from minift.precision import Precision
from minift.quant.linear import NF4Linear, QuantConfig
from minift.quant.weights import QuantWeights, quantize_for
from minift.recompute import RecomputeConfig, apply_recompute
from minift.report import read_metrics
from minift.trace import Recorder
from minift.train import Run, TrainConfig
from tests.ranks import run_ranks
from tests.tiny import write_conversations, write_inputs

CONFIG = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "rope_theta": 1e4, "tie_word_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip
LORA = LoraConfig(r=4, alpha=8.0)
FP32 = Precision(wire="float32")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    config = ModelConfig.from_hf(CONFIG)
    model = CausalLM(config)
    model.init_weights(seed=1)
    specs = {name: (torch.float32, tuple(p.shape)) for name, p in model.named_parameters()}
    folder = tmp_path_factory.mktemp("model") / "dense"
    save_model(((name, p.detach()) for name, p in model.named_parameters()), config, folder, specs)
    return folder


class Watching(PairedSends):
    """Paired sends that note how many bytes of which dtype are gathered."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.gathered_bytes: dict[torch.dtype, int] = {}

    def all_gather(self, buffer: Buffer, fulls: list[Tensor]) -> Pending:
        for full in fulls:
            self.gathered_bytes[full.dtype] = self.gathered_bytes.get(full.dtype, 0) + full.nbytes
        return super().all_gather(buffer, fulls)


def assemble(
    folder: Path, quant: QuantConfig, world: World, policy: ShardPolicy, recompute: str = "none", connect=connect
) -> tuple[CausalLM, ShardedModel]:
    """As `minift.build` does it, over the transport that the test wants."""
    with torch.device("meta"):
        model = CausalLM(load_config(folder))
    weights = QuantWeights(folder)
    quantized = quantize_for(model, weights, quant)
    inject(model, LORA, seed=2)
    own = adapter_parameters(model).keys()
    recorder = Recorder(world.rank, world.device)
    apply_recompute(model, model.shard_units(), RecomputeConfig(recompute), recorder)
    engine = shard(model, model.shard_units(), world, policy, FP32, recorder, connect)

    def read(name: str, start: int, stop: int) -> Tensor:
        if name in own:
            return initial(model, name).reshape(-1)[start:stop]
        projection, _, part = canonical_name(name).rpartition(".")
        if projection in quantized:
            return weights.read_bytes(quantized[projection], f"{projection}.{part}", start, stop)
        return weights.read_range(f"{projection}.{part}", start, stop)

    engine.load(read)
    return model, engine


def initial(model: CausalLM, name: str) -> Tensor:
    """B starts at random too: with B = 0 the gradient of A would be 0."""
    if "lora_B" not in name:
        return init_tensor(model, name, seed=2)
    shape = model.get_parameter(name).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) * 0.1


def loss_of(model: CausalLM, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    tokens_T = torch.randint(CONFIG["vocab_size"], (12 + rank,), generator=generator)
    length = len(tokens_T) - 1
    bounds = torch.tensor([0, length], dtype=torch.int32)
    return model(
        tokens_T[:-1], torch.arange(length), bounds, length,
        head=lambda hidden_TD, lm_head: linear_cross_entropy(hidden_TD, lm_head, tokens_T[1:]),
    )  # fmt: skip


def dense_gradients(folder: Path, world_size: int) -> dict[str, Tensor]:
    """`folder`: a quantised one, read as the dense model that it stands for."""
    with torch.device("meta"):
        model = CausalLM(load_config(folder))
    fill_parameters(model, QuantWeights(folder).read)
    inject(model, LORA, seed=2)
    for name, parameter in adapter_parameters(model).items():
        parameter.data.copy_(initial(model, name))
    for rank in range(world_size):
        loss_of(model, rank).backward()
    return {name: parameter.grad for name, parameter in adapter_parameters(model).items()}


def gradients_on_rank(world: World, folder: Path, quant: QuantConfig, policy: ShardPolicy, recompute: str, transport):
    model, engine = assemble(folder, quant, world, policy, recompute, transport)
    for _ in range(2):
        engine.clear_gradients()
        loss_of(model, world.rank).backward()
    for bucket in engine.buckets:
        if bucket.trainable:
            bucket.shard.copy_(bucket.grad)
    engine.weights_changed()
    return {name: tensor.clone() for name, tensor in engine.full_tensors(trainable_only=True)}


@pytest.mark.parametrize(
    ("world_size", "transport"),
    [(1, connect), (2, connect), (3, connect), (2, PairedSends), (3, PairedSends)],
    ids=lambda value: value if isinstance(value, int) else "paired" if value is PairedSends else "default",
)
@pytest.mark.parametrize(
    ("policy", "recompute", "quant"),
    [
        (ShardPolicy(), "none", QuantConfig()),
        (ShardPolicy(), "selective", QuantConfig(double_quant=False)),
        (ShardPolicy(prefetch_units=2), "full", QuantConfig(block_size=32)),
        (ShardPolicy(strategy="zero2"), "none", QuantConfig(block_size=4096)),
        (ShardPolicy(strategy="ddp"), "none", QuantConfig()),
    ],
)
def test_gradients_equal_the_dense_model(
    folder: Path, tmp_path: Path, policy: ShardPolicy, recompute: str, quant: QuantConfig, world_size: int, transport
) -> None:
    """fp32 throughout; products are summed in other orders: 1e-5 of the largest gradient of a parameter."""
    quantize_folder(folder, tmp_path / "nf4", quant)
    expected = dense_gradients(tmp_path / "nf4", world_size)
    for source in (folder, tmp_path / "nf4"):
        for gradients in run_ranks(world_size, gradients_on_rank, source, quant, policy, recompute, transport):
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                error = (gradient - expected[name]).abs().max() / expected[name].abs().max()
                assert error <= 1e-5, (name, error)


def nf4_bytes(model_config: ModelConfig) -> int:
    """Of all projections of one block."""
    hidden, inner = model_config.hidden_size, model_config.intermediate_size
    head = model_config.head_dim
    queries, keys = model_config.num_heads * head, model_config.num_kv_heads * head
    sizes = [hidden * queries, hidden * keys, hidden * keys, queries * hidden, *[hidden * inner] * 3]
    blocks = [math.ceil(size / 64) for size in sizes]
    nested = [4 * (1 + math.ceil(count / 256)) for count in blocks]
    return sum(math.ceil(n / 64) * 64 for size in sizes for n in [math.ceil(size / 2)]) + sum(
        math.ceil(n / 64) * 64 for n in [*blocks, *nested]
    )


def held_on_rank(world: World, folder: Path) -> dict[str, int]:
    """Bytes of the uint8 shards; bytes gathered in a step; elements of the largest float left after forward."""
    links: list[Watching] = []

    def watch(world: World) -> Watching:
        links.append(Watching(world))
        return links[-1]

    model, engine = assemble(folder, QuantConfig(), world, ShardPolicy(), connect=watch)
    for _ in range(2):
        engine.clear_gradients()
        links[0].gathered_bytes.clear()
        loss = loss_of(model, world.rank)
        largest = _largest_float_weight(model)
        loss.backward()
    frozen = [bucket for bucket in engine.buckets if bucket.dtypes.storage == torch.uint8]
    return {
        "shards": sum(bucket.shard.nbytes for bucket in frozen),
        "gathered": links[0].gathered_bytes[torch.uint8],
        "largest": largest,
    }


def _largest_float_weight(model: CausalLM) -> int:
    """Elements of the largest float tensor alive that has the shape of a quantised weight."""
    gc.collect()
    shapes = {(m.out_features, m.in_features) for m in model.modules() if isinstance(m, NF4Linear)}
    alive = [t for t in gc.get_objects() if isinstance(t, Tensor) and t.is_floating_point()]
    return max((t.numel() for t in alive if tuple(t.shape) in shapes), default=0)


@pytest.mark.parametrize("world_size", [2, 3])
def test_only_bytes_are_kept_and_gathered(folder: Path, world_size: int) -> None:
    config = load_config(folder)
    block = nf4_bytes(config)
    padded = math.ceil(block / (64 * world_size)) * 64 * world_size
    weights = sum(math.prod(s) for s in _shapes(config)) * config.num_layers
    for held in run_ranks(world_size, held_on_rank, folder):
        assert held["shards"] == config.num_layers * padded // world_size
        assert held["gathered"] == (2 * config.num_layers - 1) * padded  # the last block once
        assert held["largest"] == 0
        padding = 21 * config.num_layers * 64 + 64 * config.num_layers
        assert held["shards"] <= 0.52 * weights / world_size + padding


def _shapes(config: ModelConfig) -> list[tuple[int, int]]:
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    return [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)] + [(hidden, inner)] * 3


def bytes_on_rank(world: World, folder: Path) -> dict[str, Tensor]:
    _, engine = assemble(folder, QuantConfig(), world, ShardPolicy())
    return {canonical_name(name): t.clone() for name, t in engine.full_tensors() if t.dtype == torch.uint8}


def test_the_bytes_do_not_depend_on_the_number_of_ranks(folder: Path) -> None:
    (expected,) = run_ranks(1, bytes_on_rank, folder)
    for world_size in (2, 3, 4):
        for held in run_ranks(world_size, bytes_on_rank, folder):
            assert held.keys() == expected.keys()
            assert all(torch.equal(held[name], expected[name]) for name in expected)


def test_an_untouched_dense_folder_still_loads_dense(folder: Path) -> None:
    assert not any(isinstance(module, NF4Linear) for module in load_model(folder, torch.float32).modules())


# Whole runs #


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    write_conversations(folder / "heldout.jsonl", 5)
    quantize_folder(folder / "model", folder / "nf4", QuantConfig())
    return folder


def config_for(inputs: Path, run_dir: Path, **changes) -> RunConfig:
    settings = {
        "run_dir": str(run_dir),
        "model": ModelSource(str(inputs / "model")),
        "data": DataConfig(
            train=(str(inputs / "train.jsonl"),),
            validation=(str(inputs / "heldout.jsonl"),),
            max_length_tokens=256,
            template="chatml",
        ),
        "adapter": LoraConfig(r=4, alpha=8.0),
        "quant": QuantConfig(),
        "optim": OptimConfig(lr=1e-2, state="8bit"),
        "precision": FP32,
        "loop": TrainConfig(examples_per_step=8, microbatch_tokens=256, epochs=2.0, checkpoint_every_steps=3),
    }
    return RunConfig(**(settings | changes))


def train_on_rank(world: World, config: RunConfig, stop_at_step: int | None = None) -> None:
    stop = StopRequest()
    run = Run(config, world, stop)
    guarded_step = run.guarded_step

    def step(*args):
        if run.step + 1 == stop_at_step:
            stop.signal = signal.SIGTERM
        return guarded_step(*args)

    run.guarded_step = step
    run.go()


def losses(run_dir: Path) -> list[float]:
    training, validation = read_metrics(run_dir / "metrics.jsonl")
    return [record["loss"] for record in training] + [record["validation_loss"] for record in validation]


def test_a_run_is_the_same_on_any_ranks_from_any_folder_and_after_a_stop(inputs: Path, tmp_path: Path) -> None:
    """On other ranks up to the order of sums, which Adam amplifies (see tests/test_train.py); else to the bit."""
    run_ranks(1, train_on_rank, config_for(inputs, tmp_path / "one"))
    expected = losses(tmp_path / "one")
    assert expected[-1] < expected[-2], "nothing was learnt"
    run_ranks(2, train_on_rank, config_for(inputs, tmp_path / "two"))
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=1e-4)
    stored = config_for(inputs, tmp_path / "stored", model=ModelSource(str(inputs / "nf4")), quant=None)
    run_ranks(1, train_on_rank, stored)
    assert losses(tmp_path / "stored") == expected
    for stop_at_step in (4, None):
        run_ranks(1, train_on_rank, config_for(inputs, tmp_path / "stopped"), stop_at_step)
    assert losses(tmp_path / "stopped") == expected


def train_with_8bit_states(world: World, config: RunConfig, stop_at_step: int | None = None) -> None:
    """All of this model's parameters are too small to be kept in 8 bits, if nothing is done about it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minift.optim.moments, "MIN_8BIT_ELEMENTS", 64)
        train_on_rank(world, config, stop_at_step)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_8bit_states_survive_a_stop_to_the_bit(inputs: Path, tmp_path: Path, world_size: int, paged: bool) -> None:
    optim = OptimConfig(lr=1e-2, state="8bit", paged=paged)
    run_ranks(world_size, train_with_8bit_states, config_for(inputs, tmp_path / "whole", optim=optim))
    for stop_at_step in (4, None):
        config = config_for(inputs, tmp_path / "stopped", optim=optim)
        run_ranks(world_size, train_with_8bit_states, config, stop_at_step)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_an_adapter_is_used_on_the_base_it_was_trained_on(inputs: Path, tmp_path: Path) -> None:
    """The validation loss of the run comes out again with --nf4, and with the stored folder, and not without."""
    run_ranks(1, train_on_rank, config_for(inputs, tmp_path / "run"))
    expected = losses(tmp_path / "run")[-1]
    data = DataConfig(train=(str(inputs / "heldout.jsonl"),), max_length_tokens=256, template="chatml")

    def loss(folder: str, quant: QuantConfig | None) -> float:
        adapter = str(tmp_path / "run" / "export" / "adapter")
        assistant = load_assistant(
            str(inputs / folder), adapter, template="chatml", quant=quant, dtype=torch.float32, device=CPU
        )
        return measure_loss(assistant, data, 256, World(0, 1, 0, CPU, "gloo", None))["loss"]

    assert loss("model", QuantConfig()) == pytest.approx(expected, rel=1e-5)
    assert loss("nf4", None) == pytest.approx(expected, rel=1e-5)
    assert abs(loss("model", None) - expected) > 1e-3 * expected
