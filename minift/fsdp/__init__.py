"""FSDP written directly on `torch.distributed`: shard a model over N ranks, use it as if it were whole.

Follow one weight W of one block through a step on N ranks (strategy zero3; `policy` has the others):

1. `shard()` puts W into its block's *bucket*: a flat tensor of all parameters of the block with the same dtypes and the
   same trainability, cut into N equal shards (`flat`, `bucket`). This rank stores its shard: fp32 master values if W is
   trained, with a bf16 wire in two halves of which one is what is sent (`ops/halves`); the wire dtype if it is frozen.
   W itself becomes a placeholder of the right shape that holds no memory.
2. While the block before it computes, the block's gather begins (`hooks`; in the first step nobody knows the order yet,
   `schedule` records it): it borrows one of the buffers of a *ring* (`unit`), copies the own shard to its place there,
   and asks the `transport` for the other N - 1 places: NCCL, sends between processes, or memory they share.
3. The block's forward begins; W is now a view of the buffer. When it ends the buffer goes back to the ring, and the
   block after the next overwrites it. Autograd has saved activations only, never W ([Note: what autograd may save] in
   `hooks`).
4. Backward reaches the block after it: the gather of 2 again, one block ahead in the other direction.
5. Backward reaches the block. W gets a *slot* (`grad_slot`): its part of a reduce buffer, and the product dYᵀ X is
   written there by the GEMM itself. The block's other operations compute dX from W.
6. The gradient of the block's input is out, so every gradient of the block is complete: the reduce-scatter of its
   buffer begins (a sum, never a mean: the loss was divided by the global weight), and the gathered buffer is freed.
   While the next two blocks go backward, this rank's chunk is added up into the fp32 gradient shard.
7. `clip` takes the global norm from the shards, the optimizer updates the fp32 master shard in place, and the next
   gather (2) sends the new values.

Per step a block costs two all-gathers and one reduce-scatter of its trainable part (the last block one all-gather: it
ends the forward and begins the backward). Per rank it holds 1/N of parameters, gradients and optimizer state, plus a
constant: two buffers to gather into, two to reduce from, the root's (`sharded` has the closed form). Nothing is copied
in or out around a collective, and nothing is allocated in a step but, on CUDA, gradients; there the host never waits.

A group of one runs the same code: gradients are added up where they are computed, and a bucket whose storage is what
compute reads is its own gathered buffer. So it is between ranks that share memory, which then meet after an update
(`bucket`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from minift.dist.process import World
from minift.fsdp.policy import ShardPolicy
from minift.fsdp.sharded import ShardedModel, connect
from minift.fsdp.transport import Transport
from minift.precision import Precision
from minift.trace import Recorder


def shard(
    module: nn.Module,
    unit_modules: list[nn.Module],
    world: World,
    policy: ShardPolicy,
    precision: Precision,
    recorder: Recorder | None = None,
    connect: Callable[[World], Transport] = connect,
) -> ShardedModel:
    """Cut the parameters of `module` over the ranks of `world`, in place, and install the hooks that gather them.

    `unit_modules` are gathered and freed one at a time (decoder blocks); they must be disjoint and inside `module`.
    Everything else belongs to the root, which stays gathered from the start of forward to the end of backward.
    `requires_grad` and the module tree must be final: shard last. Parameters may be on the meta device; fill them with
    `ShardedModel.load`. After this, `nn.Parameter` objects of the module are new ones.

    recorder: told what happens when, for a timeline. connect: how the ranks of a mesh axis exchange tensors; by default
    the fastest way that works. Collective. ValueError if `policy` does not fit the number of ranks.
    """
    recorder = recorder or Recorder(world.rank, world.device)
    return ShardedModel(module, unit_modules, world, policy, precision, recorder, connect)


__all__ = ["ShardPolicy", "ShardedModel", "shard"]
