"""Models, devices and networks by name, for plans of what is not here: figures of model cards and datasheets.

    model_shape("llama-3.1-70b")     -> ModelConfig, without a file
    gpu("h100")                      -> Device: memory, and rates for times
    this_gpu()                       -> "h100", where there is one
    network("400g")                  -> Network

What a GPU does of its datasheet's figures is what performance.md found elsewhere (sections 4.2 and 4.7): products at
70 % of the peak in 16 bits, attention at 55 % and its backward at 45 %, everything else at 87 % of the memory's
bandwidth. The host's time for an operation is an estimate (benchmarks/host_time.py). An H100 that was measured later
took what these figures say to within 10 % (tests/planner/test_h100.py), so they were left alone; no other card was.
For figures of the machine at hand: `minift plan --calibrate`.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minift.model.config import ModelConfig
from minift.planner.device import Device, Rate
from minift.planner.network import Network
from minift.planner.op import LOW_RANK, PRODUCTS, UPDATED


def _model(
    family: str, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> dict:
    return {
        "model_type": family, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab, **more,
    }  # fmt: skip


_TIED = {"tie_word_embeddings": True}
_QWEN3 = {"head_dim": 128}

MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _model("llama", 576, 1536, 30, 9, 3, 49152, **_TIED),
    "smollm2-360m": _model("llama", 960, 2560, 32, 15, 5, 49152, **_TIED),
    "smollm2-1.7b": _model("llama", 2048, 8192, 24, 32, 32, 49152, **_TIED),
    "llama-2-7b": _model("llama", 4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": _model("llama", 5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": _model("llama", 8192, 28672, 80, 64, 8, 32000),
    "llama-3.2-1b": _model("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, **_TIED),
    "llama-3.2-3b": _model("llama", 3072, 8192, 28, 24, 8, 128256, head_dim=128, **_TIED),
    "llama-3.1-8b": _model("llama", 4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": _model("llama", 8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-405b": _model("llama", 16384, 53248, 126, 128, 8, 128256),
    "mistral-7b": _model("mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=None),
    "qwen2.5-7b": _model("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-32b": _model("qwen2", 5120, 27648, 64, 40, 8, 152064),
    "qwen2.5-72b": _model("qwen2", 8192, 29568, 80, 64, 8, 152064),
    "qwen3-0.6b": _model("qwen3", 1024, 3072, 28, 16, 8, 151936, **_QWEN3, **_TIED),
    "qwen3-1.7b": _model("qwen3", 2048, 6144, 28, 16, 8, 151936, **_QWEN3, **_TIED),
    "qwen3-4b": _model("qwen3", 2560, 9728, 36, 32, 8, 151936, **_QWEN3, **_TIED),
    "qwen3-8b": _model("qwen3", 4096, 12288, 36, 32, 8, 151936, **_QWEN3),
    "qwen3-14b": _model("qwen3", 5120, 17408, 40, 40, 8, 151936, **_QWEN3),
    "qwen3-32b": _model("qwen3", 5120, 25600, 64, 64, 8, 151936, **_QWEN3),
}
"""name -> what config.json says of its shape."""


def model_shape(name: str) -> ModelConfig:
    """ValueError, with the nearest names, if there is none of this name."""
    return ModelConfig.from_hf(MODELS[_known(name.lower(), MODELS, "a model")])


GIB = 1 << 30


@dataclass(frozen=True)
class _Card:
    """memory_bytes: what PyTorch sees of it; tflops: dense, in 16 bits with fp32 sums; bytes a second of memory, and to
    the host. driver_name: others of its kind (PCIe, laptops) are slower."""

    memory_bytes: int
    tflops: float
    memory_bytes_per_s: float
    bus_bytes_per_s: float
    driver_name: str


_PCIE_4, _PCIE_5 = 25e9, 53e9  # with 16 lanes, each way, from pinned memory (performance.md, section 2)

_CARDS = {
    "h100": _Card(79 * GIB, 989, 3.35e12, _PCIE_5, "NVIDIA H100 80GB HBM3"),
    "h200": _Card(139 * GIB, 989, 4.8e12, _PCIE_5, "NVIDIA H200"),
    "a100": _Card(79 * GIB, 312, 2.04e12, _PCIE_4, "NVIDIA A100-SXM4-80GB"),
    "a100-40g": _Card(39 * GIB, 312, 1.56e12, _PCIE_4, "NVIDIA A100-SXM4-40GB"),
    "l40s": _Card(44 * GIB, 362, 0.86e12, _PCIE_4, "NVIDIA L40S"),
    "rtx4090": _Card(int(23.5 * GIB), 165, 1.01e12, _PCIE_4, "NVIDIA GeForce RTX 4090"),
    "rtx3090": _Card(int(23.5 * GIB), 71, 0.94e12, _PCIE_4, "NVIDIA GeForce RTX 3090"),
}

CONTEXT_BYTES = GIB // 2
"""What CUDA takes for itself (performance.md, section 4.4)."""
USABLE = 0.95
"""Of the rest: the allocator rounds, and cannot use all gaps."""
HOST_USABLE = 0.9
"""Of a node's memory; the system, interpreters and a checkpoint on its way to the disk need some."""
_CALL_S = 30e-6
"""Of an operation, for the host: Python, autograd and dispatch as benchmarks/host_time.py measured them on a processor,
and 5 µs for each launch of a kernel (performance.md, section 4.7)."""


def gpu(name: str) -> Device:
    """ValueError, with the nearest names, if there is none of this name."""
    name = _known(name.lower(), _CARDS, "a device", ", or cpu: this machine")
    card = _CARDS[name]
    peak, bytes_per_s = card.tflops * 1e12, 0.87 * card.memory_bytes_per_s
    rates = {"*": Rate(bytes_per_s=bytes_per_s)}
    for kinds, share in ((PRODUCTS, 0.70), (("attention",), 0.55), (("attention backward",), 0.45)):
        for kind in kinds:
            # Operands are read while others are multiplied. In fp32 (TF32 is off) there are no matrix units to use.
            rates[kind] = Rate(flops_per_s=share * peak)
            rates[f"{kind} float32"] = Rate(flops_per_s=share * peak / 15)
    for kind in (*LOW_RANK, *UPDATED):  # these are narrow: limited by what they read
        rates[kind] = Rate(flops_per_s=0.7 * peak, bytes_per_s=bytes_per_s)
    return Device(
        name, card.memory_bytes, peak, card.memory_bytes_per_s, rates,
        call_s=_CALL_S, runs_ahead=True, bus_bytes_per_s=card.bus_bytes_per_s,
    )  # fmt: skip


def this_gpu() -> str | None:
    """The name of PyTorch's current GPU, if it is one of these."""
    if not torch.cuda.is_available():
        return None
    driver_name = torch.cuda.get_device_name()
    return next((name for name, card in _CARDS.items() if card.driver_name == driver_name), None)


_NVLINK_BYTES_PER_S = 370e9
_NODE_BYTES_PER_S = {"nvlink": 370e9, "400g": 45e9, "100g": 12e9}
RANKS_PER_NODE = 8


def network(name: str) -> Network:
    """Between nodes of 8 GPUs with NVLink (performance.md, section 4.6): nvlink: eight interfaces of 400 Gbit/s a node;
    400g, 100g: one. A number: GB/s of every rank to every other, inside of a node, too."""
    if name in _NODE_BYTES_PER_S:
        return Network(_NVLINK_BYTES_PER_S, _NODE_BYTES_PER_S[name] / RANKS_PER_NODE, RANKS_PER_NODE)
    try:
        bytes_per_s = float(name) * 1e9
    except ValueError:
        bytes_per_s = math.nan
    if not bytes_per_s > 0:
        raise ValueError(f"--network is {name}; valid: {', '.join(_NODE_BYTES_PER_S)}, or a number of GB/s")
    return Network(bytes_per_s, bytes_per_s, 1)


CGROUPS = Path("/sys/fs/cgroup")


def this_machine_bytes() -> int:
    """Memory of the host, or what this process's control groups (containers, batch systems) leave of it."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return limits[0]
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        name = "memory.limit_in_bytes" if controllers else "memory.max"  # version 1, version 2
        own_group = CGROUPS / controllers / path.lstrip("/")
        for group in (own_group, *own_group.parents):
            with suppress(OSError, ValueError):  # no such group in here, or "max"
                limits.append(int((group / name).read_text(encoding="utf-8")))
    return min(limits)


def _known(name: str, names: Iterable[str], what: str, more: str = "") -> str:
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        question = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{name} is not the name of {what}; {question}valid: {', '.join(names)}{more}")
    return name
