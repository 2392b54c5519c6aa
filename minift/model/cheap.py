"""Which results of a model are cheap to make again: the model's side of selective recomputation (minift/recompute.py).

Autograd keeps what a projection reads until its backward. Where that is the result of element-wise work on tensors
that are kept anyway (a norm, silu · up), keeping it costs as much memory as any activation, and making it again costs
next to nothing. Only the model knows these places, so it names them here; what becomes of them is not its business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

Result = TypeVar("Result", Tensor, tuple[Tensor, ...])


class CheapOps(nn.Module):
    """A module whose forward runs such operations through `cheap`, or tells whoever reads their results, and can make
    them again, whether it `keeps_cheap`."""

    keeps_cheap = True
    """Whether such results are kept for backward. Selective recomputation says no."""

    def cheap(self, operation: Callable[..., Result], *inputs: Tensor) -> Result:
        """operation(*inputs): a tensor, or a tuple of one that is meant and of others that are the inputs. Selective
        recomputation puts another function in this one's place.

        `operation` may then run once more in backward, without a graph, on the same inputs: it draws no random numbers,
        changes nothing, and reads parameters from their Parameter objects. Worth it where backward keeps the inputs
        anyway, because it keeps them instead of the result.
        """
        return operation(*inputs)
