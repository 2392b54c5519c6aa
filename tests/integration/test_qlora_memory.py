"""What a sharded model in NF4 holds, sends, and never makes: a full weight in floats.

Oracles: the closed form of NF4 (4 bits a weight, 8 bits a block of 64, 32 bits per 256 blocks) and of FSDP's layout;
every tensor storage alive in the process; the most memory that the kernel has seen a process use.
"""

from __future__ import annotations

import ctypes
import gc
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import minift.quant.weights
from minift.build import ModelSource, build_model
from minift.checkpoint.quantize import quantize_folder
from minift.dist.process import World
from minift.fsdp import ShardPolicy
from minift.fsdp.sharded import connect
from minift.fsdp.transport import Buffer, PairedSends, Pending
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.hf import load_config, save_model
from minift.peft.names import canonical_name
from minift.precision import Precision
from minift.quant.linear import NF4Linear, QuantConfig
from minift.quant.model import load_model
from minift.recompute import RecomputeConfig
from minift.trace import Recorder
from tests.integration.assembly import LLAMA, LORA, QWEN2, assemble, loss_of, write_model
from tests.ranks import restart, run_ranks

MIB = 2**20
NUM_TOKENS = 20
WIDE = QWEN2 | {"hidden_size": 512, "intermediate_size": 1024}
"""The smallest weight, k's or v's, has 2**17 elements: more than an embedding, and than activations of 20 tokens."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("wide") / "model", WIDE)


# Held and sent #


def weights_of(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the projections of one block."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries),
        "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }  # fmt: skip


def padded(sizes: list[int], unit: int, world_size: int) -> int:
    """Elements of a bucket: its parameters begin at multiples of `unit`, and so do its shards."""
    total = sum(math.ceil(size / unit) * unit for size in sizes)
    return math.ceil(total / (unit * world_size)) * unit * world_size


@dataclass(frozen=True)
class Sizes:
    """Bytes of the whole buckets, fp32 where they are floats."""

    block_nf4: int
    block_frozen: int
    block_adapters: int
    root: int

    @classmethod
    def of(cls, config: ModelConfig, world_size: int) -> Sizes:
        weights, hidden = weights_of(config), config.hidden_size
        nf4 = []
        for out_features, in_features in weights.values():
            blocks = math.ceil(out_features * in_features / 64)
            nf4 += [out_features * in_features // 2, blocks, 4 * (1 + math.ceil(blocks / 256))]
        biases = [weights[name][0] for name in "qkv"]
        factors = [LORA.r * size for shape in weights.values() for size in shape]
        head = [config.vocab_size * hidden]
        return cls(
            padded(nf4, 64, world_size),
            4 * padded([hidden, hidden, *biases], 16, world_size),
            4 * padded(factors, 256, world_size),
            4 * padded([hidden, *head, *head], 16, world_size),
        )

    def held(self, depth: int, shard_size: int, policy: ShardPolicy, shared: bool) -> dict[str, int]:
        """As `ShardedModel.held_bytes` has it."""
        block = self.block_nf4 + self.block_frozen + self.block_adapters
        gradients = depth * self.block_adapters // shard_size + 2 * self.block_adapters
        if shared:  # everything lies where all ranks see it
            return {"shards": 0, "gathered": depth * block + self.root, "gradients": gradients}
        if policy.strategy == "zero3":
            shards, gathered = (depth * block + self.root) // shard_size, 2 * block + self.root
        else:  # what is frozen is resident: no shard beside it, and no buffer
            shards, gathered = depth * self.block_adapters // shard_size, depth * block + self.root
        return {"shards": shards, "gathered": gathered, "gradients": gradients}

    def sent(self, depth: int, shard_size: int, policy: ShardPolicy, shared: bool) -> int:
        """In a step: all but the last block are gathered twice, the root once; gradients of adapters are reduced."""
        if shared:
            return 0
        gathered = depth * self.block_adapters
        if policy.strategy == "zero3":
            block = self.block_nf4 + self.block_frozen + self.block_adapters
            gathered = (2 * depth - 1) * block + self.root
        return (gathered + depth * self.block_adapters) * (shard_size - 1) // shard_size


class Watching(PairedSends):
    """Paired sends that note how many bytes of which dtype are gathered."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.gathered_bytes: dict[torch.dtype, int] = {}

    def all_gather(self, buffer: Buffer, fulls: list[Tensor]) -> Pending:
        for full in fulls:
            self.gathered_bytes[full.dtype] = self.gathered_bytes.get(full.dtype, 0) + full.nbytes
        return super().all_gather(buffer, fulls)


def tensors_of(objects: list[object]) -> list[Tensor]:
    """By type: to ask `isinstance` of some objects makes torch warn that they are deprecated."""
    return [thing for thing in objects if issubclass(type(thing), Tensor)]


def storages() -> dict[int, int]:
    """{address: bytes} of every tensor storage that Python can reach."""
    gc.collect()
    tensors = [t for t in tensors_of(gc.get_objects()) if t.device.type == "cpu"]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def step(model: CausalLM, engine, rank: int) -> None:
    engine.clear_gradients()
    loss_of(model, rank, NUM_TOKENS).backward()
    engine.weights_changed()


def held_on_rank(world: World, folder: Path, policy: ShardPolicy, transport) -> dict[str, object]:
    links: list[PairedSends] = []

    def watch(world: World):
        links.append(transport(world))
        return links[-1]

    before = storages()
    model, engine = assemble(folder, QuantConfig(), world, policy, connect=watch)
    step(model, engine, world.rank)
    if transport is Watching:
        links[0].gathered_bytes.clear()
    sent = engine.sent_bytes()
    step(model, engine, world.rank)
    placeholders = sum(p.itemsize for bucket in engine.buckets for p in bucket.params.values())
    after = storages()
    return {
        "held": engine.held_bytes(),
        "sent": engine.sent_bytes() - sent,
        "gathered": links[0].gathered_bytes.get(torch.uint8, 0) if transport is Watching else 0,
        "alive": sum(size for address, size in after.items() if address not in before) - placeholders,
        "types": {type(link).__name__ for link in links},
    }


@pytest.mark.parametrize("transport", [connect, Watching], ids=["shared", "paired"])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("strategy", ["zero3", "zero2"])
def test_held_and_sent_bytes_are_the_closed_form(wide: Path, strategy: str, world_size: int, transport) -> None:
    """No byte more. Sharded, the base takes 0.52 bytes a weight divided by the ranks; resident, as under zero2, it is
    there whole and never gathered again."""
    config, policy = load_config(wide), ShardPolicy(strategy=strategy)
    sizes, depth, shared = Sizes.of(config, world_size), config.num_layers, transport is connect
    weights = depth * sum(math.prod(shape) for shape in weights_of(config).values())
    assert depth * sizes.block_nf4 <= 0.52 * weights
    expected = sizes.held(depth, world_size, policy, shared)
    for rank in run_ranks(world_size, held_on_rank, wide, policy, transport):
        assert rank["held"] == expected
        assert rank["sent"] == sizes.sent(depth, world_size, policy, shared)
        if shared:
            assert rank["types"] == {"SharedMemory"}
            continue
        assert rank["gathered"] == ((2 * depth - 1) * sizes.block_nf4 if strategy == "zero3" else 0)
        staging = 2 * sizes.block_adapters * (world_size - 1) // world_size
        assert rank["alive"] == sum(expected.values()) + staging


# Never whole #


def graph_tensors(output: Tensor) -> Iterator[Tensor]:
    """What autograd has saved for the backward of `output`, also where Python has no name for it."""
    stack, seen = [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield from (t for t in getattr(node, "saved_tensors", ()) if isinstance(t, Tensor))
        names = (name for name in dir(node) if name.startswith("_saved_"))
        yield from (t for t in (getattr(node, name) for name in names) if isinstance(t, Tensor))
        stack += [next_node for next_node, _ in node.next_functions]


def whole_weights_on_rank(world: World, folder: Path, recompute: str, transport) -> tuple[int, list[str]]:
    """How often was looked, and what was found: floats, in memory that is not the engine's, of the size of a weight."""
    model, engine = assemble(folder, QuantConfig(), world, ShardPolicy(), recompute, transport)
    step(model, engine, world.rank)
    owned = storages().keys()
    smallest = min(m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear))
    looks, found = 0, []

    def look(where: str, more: list[Tensor]) -> None:
        nonlocal looks
        looks += 1
        gc.collect()
        for tensor in tensors_of([*gc.get_objects(), *more]):
            if tensor.is_floating_point() and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage.nbytes() >= 2 * smallest and storage.data_ptr() not in owned:
                    found.append(f"{where}: {tuple(tensor.shape)} {tensor.dtype}")

    def after_forward(block, inputs, output) -> None:
        if output.requires_grad:
            look("forward", list(graph_tensors(output)))
            output.register_hook(lambda gradient: look("backward", [gradient]))

    for block in model.model.layers:
        block.register_forward_hook(after_forward)
    engine.clear_gradients()
    loss = loss_of(model, world.rank, NUM_TOKENS)
    look("loss", list(graph_tensors(loss)))
    loss.backward()
    look("end", [])
    return looks, found


@pytest.mark.parametrize(
    ("recompute", "transport"), [("none", PairedSends), ("none", connect), ("full", connect)], ids=str
)
def test_no_weight_is_ever_kept_in_floats(wide: Path, recompute: str, transport) -> None:
    """After the forward of each block and before its backward, nothing as large as the smallest weight in 16 bits is
    alive but what the engine owns: not in an attribute, not saved by autograd, in no shape."""
    for looks, found in run_ranks(2, whole_weights_on_rank, wide, recompute, transport):
        assert looks >= 3 + 3 + 2 and found == []


# Bytes #


def bytes_on_rank(world: World, folder: Path) -> dict[str, Tensor]:
    _, engine = assemble(folder, QuantConfig(), world, ShardPolicy())
    return {canonical_name(name): t.clone() for name, t in engine.full_tensors() if t.dtype == torch.uint8}


def test_the_bytes_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "dense", LLAMA)
    (expected,) = run_ranks(1, bytes_on_rank, folder)
    for world_size in (2, 3, 4):
        for held in run_ranks(world_size, bytes_on_rank, folder):
            assert held.keys() == expected.keys()
            assert all(torch.equal(held[name], expected[name]) for name in expected)


# The peak #


PIECE_ELEMENTS = 1 << 18
SLACK_MIB = 10
"""Small things. A whole weight of the model below is 24 MiB, or 12 of codes."""

libc = ctypes.CDLL("libc.so.6")
M_MMAP_THRESHOLD = -3  # of mallopt(3)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """77 million weights in bf16, 147 MiB; three times four in each of two blocks."""
    config = ModelConfig.from_hf(LLAMA | {"hidden_size": 512, "intermediate_size": 24_576, "num_hidden_layers": 2})
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in CausalLM(config).named_parameters()}
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = (
        (name, noise.repeat(-(-math.prod(shape) // len(noise)))[: math.prod(shape)].view(shape))
        for name, shape in shapes.items()
    )
    folder = tmp_path_factory.mktemp("large") / "model"
    save_model(tensors, config, folder, {name: (torch.bfloat16, shape) for name, shape in shapes.items()})
    return folder


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(f"{field}:")) * 1024


def peak_of(run) -> float:
    """The most memory that `run` needed beside what was held before, in MiB.

    The second time it runs: the first one reads code of the libraries, which is resident memory, too.
    """
    run()
    gc.collect()
    libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minift.quant.weights, "_PIECE_ELEMENTS", PIECE_ELEMENTS)
        kept = run()
    peak = (resident("VmHWM") - before) / MIB
    del kept
    return peak


def peaks_on_rank(world: World, folder: Path, out: Path) -> dict[str, float]:
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)  # mapped one by one, so that what is freed is returned at once

    def build():
        return build_model(
            ModelSource(str(folder)), LORA, quant=QuantConfig(), precision=Precision(), policy=ShardPolicy(),
            recompute=RecomputeConfig(), recorder=Recorder(world.rank, world.device), world=world, seed=0,
        )  # fmt: skip

    def quantize():
        shutil.rmtree(out, ignore_errors=True)
        quantize_folder(folder, out, QuantConfig())

    peaks = {"build": peak_of(build)}
    if world.size == 1:
        peaks["load"] = peak_of(lambda: load_model(folder, QuantConfig(), torch.bfloat16))
        peaks["quantize"] = peak_of(quantize)
    return peaks


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_process_ever_holds_a_weight_in_full_precision(large: Path, tmp_path: Path, world_size: int) -> None:
    """Peaks are what is held in the end, and one piece, and codes on their way: of the own shard, or of one weight."""
    config = load_config(large)
    shapes = weights_of(config).values()
    weights = 2 * sum(math.prod(shape) for shape in shapes)
    adapters_mib = 2 * 2 * 4 * LORA.r * sum(sum(shape) for shape in shapes) / MIB  # masters and gradients, in fp32
    base_mib = 0.52 * weights / MIB
    piece_mib = 2 * PIECE_ELEMENTS / MIB
    codes_mib = 0.52 * max(map(math.prod, shapes)) / MIB
    embedding_mib = 3 * 2 * config.vocab_size * config.hidden_size / MIB
    beside = piece_mib + codes_mib + embedding_mib + SLACK_MIB
    restart()
    for peaks in run_ranks(world_size, peaks_on_rank, large, tmp_path / "nf4"):
        # Ranks that share memory map all of it, and touch what they write. A seam of adapters: gathered, to be reduced.
        assert peaks["build"] <= base_mib / world_size + adapters_mib + beside
        if world_size == 1:
            assert peaks["load"] <= base_mib + beside
            assert peaks["quantize"] <= codes_mib + beside


def test_an_untouched_dense_folder_still_loads_dense(wide: Path) -> None:
    assert not any(isinstance(module, NF4Linear) for module in load_model(wide, None, torch.float32).modules())
