"""The transport of GPUs over NCCL, as far as one GPU shows it: every collective is issued, in a group of one."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from minift.dist.process import World, init_world, shutdown
from minift.fsdp import ShardPolicy
from minift.fsdp.transport import NcclTransport
from minift.precision import Precision
from tests.test_step import FP32, steps_on_rank

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def collectives() -> None:
    world = init_world("cuda")
    transport = NcclTransport(world)
    (gather,), (reduce,) = transport.gather_buffers(1, 4000), transport.reduce_buffers(1, 4000)
    full = gather.memory.view(torch.float32)
    full.copy_(torch.arange(1000.0))
    transport.all_gather(gather, [full]).wait()
    assert torch.equal(full.cpu(), torch.arange(1000.0))
    gradient, out = reduce.memory.view(torch.bfloat16), torch.full((2000,), 3.0, device=world.device)
    for accumulate in (False, True):
        gradient.copy_(torch.arange(2000.0))
        transport.reduce_scatter(reduce, [gradient], [out], accumulate).wait()
    assert torch.equal(out.cpu(), 2 * torch.arange(2000.0).bfloat16().float())
    shutdown()


def steps() -> None:
    """Those that a CPU takes: to what fp32 sums in another order make of three steps of Adam, and bf16 roundings."""
    world = init_world("cuda")
    on_cpu = World(0, 1, 0, torch.device("cpu"), "gloo", None)
    for precision, tolerance in ((FP32, 1e-4), (Precision(), 2e-2)):
        ours, _, _ = steps_on_rank(world, ShardPolicy(), precision, 2)
        theirs, _, _ = steps_on_rank(on_cpu, ShardPolicy(), precision, 2)
        for a, b in zip(ours, theirs, strict=True):
            assert abs(a.loss - b.loss) <= tolerance * abs(b.loss)
            assert abs(a.grad_norm - b.grad_norm) <= 10 * tolerance * b.grad_norm
    shutdown()


@pytest.mark.parametrize("task", [collectives, steps])
def test_on_one_gpu(task):
    process = multiprocessing.get_context("spawn").Process(target=task)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
