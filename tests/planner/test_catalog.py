"""Oracle: what model cards and datasheets say."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import pytest
import torch

from minift.cli import main
from minift.fsdp import ShardPolicy
from minift.optim.config import OptimConfig
from minift.peft.lora import LoraConfig
from minift.planner import catalog
from minift.planner.catalog import MODELS, gpu, model_shape, network, this_gpu, this_machine_bytes
from minift.planner.choices import Candidate, Method
from minift.planner.op import product
from minift.planner.plan import Machine, Planner
from minift.planner.shapes import Workload
from minift.planner.show import time_text
from minift.recompute import RecomputeConfig

PARAMETERS = {  # of model cards, or of transformers' count where the card rounds
    "smollm2-135m": 134_515_008,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_have_the_parameters_of_the_models(name: str) -> None:
    planner = Planner(model_shape(name), Machine.here(1))
    plan = planner.plan(Candidate(Method(), Workload(tokens=1, document_tokens=1), 1))
    assert plan.run.num_parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", MODELS)
def test_the_size_in_a_name_is_the_size(name: str) -> None:
    config = model_shape(name)
    head = config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    block = config.hidden_size * (head + 3 * config.intermediate_size)
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    number, unit = name.rpartition("-")[2][:-1], name[-1]
    billions = float(number) * {"b": 1.0, "m": 1e-3}[unit]
    assert (config.num_layers * block + embeddings) / 1e9 == pytest.approx(billions, rel=0.25)  # names round


def test_unknown_names_are_refused_with_the_nearest(monkeypatch, capsys) -> None:
    with pytest.raises(ValueError, match=r"did you mean llama-2-7b\?"):
        model_shape("llama2-7b")
    with pytest.raises(ValueError, match=r"did you mean h100\?"):
        gpu("h10")
    with pytest.raises(ValueError, match="valid: .* or cpu: this machine") as told:
        gpu("nope")
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert str(told.value).partition("valid: ")[2] in capsys.readouterr().out
    for name in ("fast", "0", "-3", "nan"):
        with pytest.raises(ValueError, match="a number of GB/s"):
            network(name)


def test_what_a_gpu_is_taken_to_do() -> None:
    """8192³ in bf16: 2 · 8192³ = 1.1e12 operations, at 70 % of 989e12 in a second."""
    seconds = gpu("H100").seconds([product("linear", "bfloat16", 8192, 8192, 8192)])
    assert seconds == pytest.approx(1.0995e12 / 692.3e12, rel=1e-3)
    assert gpu("h100").seconds([product("linear", "float32", 8192, 8192, 8192)]) > 10 * seconds


@pytest.mark.parametrize(
    ("driver_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),  # as benchmarks/results has it of one that was measured
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 PCIe", None),  # 756 TFLOP/s, 2.0 TB/s
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_machine_has_the_gpu_that_its_driver_names(monkeypatch, driver_name: str, name: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: driver_name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert this_gpu() == name
    machine = Machine.named(None, 4, "nvlink", None)
    assert machine.name == (name or "h100")
    assert machine.host_bytes == (this_machine_bytes() if name else math.inf)
    assert machine.ranks_of_a_node == (2 if name else 4)
    other = "a100" if name != "a100" else "h100"
    assert Machine.named(other, 4, "nvlink", None).host_bytes == math.inf
    assert Machine.named(other, 4, "nvlink", 100.0).host_bytes == 100 * 2**30
    assert Machine.named("cpu", 4, "nvlink", None).name == "cpu"


@pytest.mark.parametrize("is_v1", [False, True])
def test_a_machine_has_what_its_control_groups_leave(monkeypatch, tmp_path: Path, is_v1: bool) -> None:
    """Of any group above that of the process."""
    assert this_machine_bytes() <= psutil.virtual_memory().total
    line = "7:memory:/a/b" if is_v1 else "0::/a/b"
    root, name = (tmp_path / "memory", "memory.limit_in_bytes") if is_v1 else (tmp_path, "memory.max")
    (root / "a/b").mkdir(parents=True)
    (root / "a/b" / name).write_text("max\n")
    (root / "a" / name).write_text(f"{1 << 30}\n")
    monkeypatch.setattr(catalog, "CGROUPS", tmp_path)
    read_text = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, **how: f"3:cpu:/x\n{line}\n" if path.parts[1] == "proc" else read_text(path, **how),
    )
    assert this_machine_bytes() == 1 << 30


def test_networks() -> None:
    """An all-gather to 8 ranks of 8 GB in all, each of which receives 7: at 370 GB/s inside of a node. Over 16 ranks on
    two nodes, 15/16, at 8 times a rank's share of the node's 45 GB/s."""
    slow = network("400g")
    assert slow.shard_seconds(8e9, slow.shard_axis(8)) == pytest.approx(7 / 370, rel=0.01)
    assert slow.shard_seconds(8e9, slow.shard_axis(16)) == pytest.approx(7.5 / 45, rel=0.01)
    assert network("10").shard_seconds(8e9, network("10").shard_axis(8)) == pytest.approx(0.7, rel=0.01)


@pytest.mark.parametrize(("tokens", "is_bound"), [(256, True), (16384, False)])
def test_a_gpu_waits_for_its_host_where_there_is_little_to_do(tokens: int, is_bound: bool) -> None:
    """16 blocks of 44 operations, 30 µs each: 21 ms a step. On paper an H100 takes 6 · 0.97e9 weights · 16384 tokens /
    692e12 = 0.14 s for the products of the blocks of many tokens, and 2 ms for those of few."""
    planner = Planner(model_shape("llama-3.2-1b"), Machine.of_gpus("h100", 1, "nvlink"))
    plan = planner.plan(Candidate(Method(), Workload(tokens=tokens, document_tokens=256), tokens))
    assert plan.is_launch_bound == is_bound == ("launch-bound" in time_text(plan))
    assert plan.seconds_without_host <= plan.timed.seconds
    assert plan.timed.seconds >= 16 * 44 * 30e-6


BLOCK_BYTES = 2 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 2048 * 8192 + 2 * 2048)
"""Of Llama-3.2-1B, of which there are 16."""


@pytest.mark.parametrize(
    ("choice", "crossing_bytes"),
    [
        ({"fsdp": ShardPolicy(offload_frozen=("layers",))}, 31 * BLOCK_BYTES),  # one stays from forward to backward
        ({"recompute": RecomputeConfig("offload")}, 16 * 64 * 2048 * 2),
        ({"adapter": None, "optim": OptimConfig(paged=True)}, 8 * 1.236e9),
    ],
    ids=["frozen weights", "inputs", "moments"],
)
def test_what_crosses_the_bus_to_host_memory_takes_time(choice: dict, crossing_bytes: float) -> None:
    """64 tokens are computed faster than anything of this crosses, at 25 GB/s: no less than it, and what there is to
    compute besides, no more than both. Pages of moments are loaded ahead, two of 32 MiB."""
    planner = Planner(model_shape("llama-3.2-1b"), Machine.of_gpus("rtx4090", 1, "nvlink"))

    def step_s(**choice: object) -> float:
        setup = Method(**{"adapter": LoraConfig(), "recompute": RecomputeConfig("full"), **choice})
        return planner.plan(Candidate(setup, Workload(tokens=64, document_tokens=64), 64)).timed.seconds

    crossing_s, without_s = crossing_bytes / 25e9, step_s(adapter=choice.get("adapter", LoraConfig()))
    ahead_s = 2 * 2**25 / 25e9 if "optim" in choice else 0.0
    assert max(crossing_s - ahead_s, without_s) <= step_s(**choice) <= 1.001 * (crossing_s + without_s)


def test_masters_in_host_memory_get_no_time() -> None:
    """How fast the host's processor would update them nobody knows."""
    planner = Planner(model_shape("llama-3.2-1b"), Machine.of_gpus("h100", 1, "nvlink"))
    workload = Workload(tokens=256, document_tokens=256)
    plan = planner.plan(Candidate(Method(fsdp=ShardPolicy(offload=True)), workload, 256))
    assert plan.timed is None and "the GPU's host" in time_text(plan)
