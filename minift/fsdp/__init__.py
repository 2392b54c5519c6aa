"""FSDP (ZeRO-3) written directly on `torch.distributed`: shard a model over N ranks, use it as if it were whole.

Follow one weight W of one block through a step on N ranks:

1. `shard()` puts W into its block's *bucket*: a flat tensor of all parameters of the block with the same dtypes and the
   same trainability, cut into N equal shards (`flat`). This rank stores its shard: fp32 master values if W is trained,
   the wire dtype if it is frozen. W itself becomes a placeholder of the right shape that holds no memory.
2. The block's forward begins. The pre-forward hook (`hooks`) borrows a *ring* slot (`unit`), casts the own shard into
   its place there, and all-gathers the other N - 1 places (`collectives`). W is now a view of the slot.
3. The block's forward ends. The slot goes back to the ring; the next block overwrites it. Autograd has saved
   activations only, never W ([Note: what autograd may save] in `hooks`).
4. Backward reaches the block's output: gather again, as in 2. The block's operations compute dX from W, and dW.
5. The gradient of the block's input is out: every dW of the block is complete. They are packed into one flat buffer in
   the reduce dtype, reduce-scattered (a sum, never a mean: the loss was divided by the global weight), and this rank's
   chunk is added to the fp32 gradient shard. The slot is freed.
6. `clip` takes the global norm over shards; the optimizer updates the fp32 master shard in place. The next gather (2)
   sends the new values.

Per step a block costs two all-gathers and one reduce-scatter of its trainable part; per rank it holds 1/N of the
parameters, gradients and optimizer state, plus a constant: one slot, the root's slot, one gradient buffer (`sharded`).
A group of one runs the same code; a bucket whose storage is what compute reads is then its own gathered buffer.
"""

from __future__ import annotations

from torch import nn

from minift.dist.process import World
from minift.fsdp.policy import ShardPolicy
from minift.fsdp.sharded import ShardedModel
from minift.precision import Precision


def shard(
    module: nn.Module, unit_modules: list[nn.Module], world: World, policy: ShardPolicy, precision: Precision
) -> ShardedModel:
    """Cut the parameters of `module` over the ranks of `world`, in place, and install the hooks that gather them.

    `unit_modules` are gathered and freed one at a time (decoder blocks); they must be disjoint and inside `module`.
    Everything else belongs to the root, which stays gathered from the start of forward to the end of backward.
    `requires_grad` and the module tree must be final: shard last. Parameters may be on the meta device; fill them with
    `ShardedModel.load`. After this, `nn.Parameter` objects of the module are new ones.
    """
    return ShardedModel(module, unit_modules, world, policy, precision)


__all__ = ["ShardPolicy", "ShardedModel", "shard"]
