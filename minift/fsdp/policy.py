"""What the engine may choose: a frozen policy, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ShardPolicy:
    """How parameters are spread over the ranks and for how long gathered copies stay alive.

    Every value is ZeRO-3 storage: a rank keeps 1/N of the parameters, gradients and optimizer state between steps.
    """

    reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward and gather them again for its backward. `true`: two
    all-gathers per block and step, one block's bytes alive at a time. `false`: one all-gather, and all gathered blocks
    stay in memory from forward until their backward."""
