"""Full weights out of shards: equal to the masters, bit for bit, and within the memory that is promised."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minift.checkpoint.export import export_run
from minift.dist.process import World
from minift.fsdp import ShardPolicy, shard
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.hf import load_config, save_model
from minift.model.weights import WeightReader
from minift.precision import Precision
from tests.ranks import run_ranks

MIB = 2**20
FROZEN = "model.norm.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """76 million parameters in bf16. In fp32, the root (embedding) has 78 MiB and each of three blocks 71 MiB."""
    folder = tmp_path_factory.mktemp("base")
    config = ModelConfig.from_hf(
        {
            "model_type": "llama", "vocab_size": 40_000, "hidden_size": 512, "intermediate_size": 12_000,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        }
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in CausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 20, generator=generator).bfloat16()

    def tensors():
        for index, (name, shape) in enumerate(shapes.items()):
            numel = torch.Size(shape).numel()
            yield name, noise.roll(index).repeat(-(-numel // len(noise)))[:numel].view(shape)

    save_model(tensors(), config, folder, {name: (torch.bfloat16, shape) for name, shape in shapes.items()})
    return folder


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(f"{field}:")) * 1024


def reset_peak() -> int:
    """Give back what malloc keeps, let the peak begin anew, and return what is resident now."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return resident("VmRSS")


def export_with_peak(world: World, base: Path, out: Path) -> tuple[float, float]:
    """Most memory that this rank needed beside what it held before, and the largest unit in fp32, in MiB."""
    reader, config = WeightReader(base), load_config(base)
    with torch.device("meta"):
        model = CausalLM(config)
    model.get_parameter(FROZEN).requires_grad = False
    units = [model.model.embed_tokens, *model.shard_units()]
    largest = max(sum(p.numel() * 4 for p in unit.parameters()) for unit in units)
    engine = shard(model, model.shard_units(), world, ShardPolicy(), Precision())
    engine.load(reader.read_range)
    for piece in engine.trainable_shards():
        piece.set_weights(piece.weights() + 0.25)
    held = reset_peak()
    export_run(engine, config, None, str(base), out)
    return (resident("VmHWM") - held) / MIB, largest / MIB


@pytest.mark.parametrize("world_size", [1, 2])
def test_full_weights(base: Path, tmp_path: Path, world_size: int) -> None:
    """Two units at once would be 149 MiB: more than the largest and 64 MiB."""
    for peak_mib, largest_mib in run_ranks(world_size, export_with_peak, base, tmp_path):
        assert 64 < largest_mib < 80
        assert peak_mib <= largest_mib + 64
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        trained = tensor if name == FROZEN else (tensor.float() + 0.25).bfloat16()
        assert torch.equal(after[name], trained), name
