"""The largest singular values of the gradients of weights, and their vectors, of gradients that never exist.

G (out, in) is the gradient of one weight, summed over batches and ranks. Nobody holds it: as long as a block's gradient
is reduced, each rank has its shard of it (`step_in_backward`), multiplies that with a thin matrix, and lets it go.
Products are linear in G, so they add up over batches and ranks, and block power iteration needs nothing else:

    pass 1, 3    Y = G V     (out, k)    U = orth(Y)
    pass 2, 4    Z = Gᵀ U    (in, k)     V = orth(Z)         after the last: Z = V S Wᵀ, and G ~ (U W) S Vᵀ

A pass is a forward and a backward for every batch, without updates. What is held for it is k (out + in) fp32 numbers a
projection, on every rank, and what is sent beside the engine's traffic is half of that, once a pass.

Halko, Martinsson, Tropp 2011, algorithm 4.4, with one power iteration: gradients of few documents have few directions
that matter. Exact, to rounding, for k = min(in, out).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from minift.build import ModelSource, build_model
from minift.data.batch import Batch
from minift.dist.collectives import sum_over_ranks
from minift.dist.process import World
from minift.fsdp import ShardPolicy
from minift.objectives.sft import SupervisedTokens
from minift.optim.shard import FlatShard
from minift.peft.inject import named_generator
from minift.peft.residual import Spectrum
from minift.precision import Precision
from minift.recompute import RecomputeConfig
from minift.trace import Recorder

_PASSES = 4
_PRECISION = {
    # Weights are not updated, so a master that would need stochastic rounding is what compute reads: 2 bytes, no copy.
    "bfloat16": Precision(wire="bfloat16", master="bfloat16", stochastic_rounding=True),
    "float32": Precision(wire="float32"),
    "float16": Precision(wire="float32"),  # gradients would underflow without a loss scaler
}


def gradient_spectra(
    source: ModelSource,
    columns: Mapping[str, int],
    steps: Sequence[Sequence[Batch]],
    *,
    objective: SupervisedTokens,
    wire: str,
    recompute: RecomputeConfig,
    world: World,
    seed: int,
) -> dict[str, Spectrum]:
    """{projection: the first columns[projection] singular values and vectors of its gradient}, equal on all ranks.

    steps: this rank's microbatches of each optimizer step; G is the mean of the gradients of the steps' mean losses.
    Every projection has a weight of its own (is no tied LM head). Collective.
    """
    patterns = "|".join(re.escape(f"{name}.weight") for name in columns)
    built = build_model(
        source,
        None,
        train=(f"^({patterns})$",),
        precision=_PRECISION[wire],
        recompute=recompute,
        policy=ShardPolicy(step_in_backward=True),
        recorder=Recorder(world.rank, world.device),
        world=world,
        seed=seed,
    )
    assert len(built.trainable) == len(columns), "a projection has no weight of its own"
    linears = {name: built.module.get_submodule(name) for name in columns}
    sketch = GradientSketch(
        {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}, columns, world, seed
    )
    built.engine.update_in_backward(sketch.add)
    for _ in range(_PASSES):
        for microbatches in steps:
            counts = torch.tensor([sum(objective.weight(microbatch) for microbatch in microbatches)])
            weight = sum_over_ranks(counts, world).item() * len(steps)
            for microbatch in microbatches:
                loss_sum = objective(built.module, microbatch.to(world.device)).loss_sum
                (loss_sum / weight).backward()
                del loss_sum
                built.engine.clear_gradients()
        sketch.end_pass()
    return sketch.spectra()


class GradientSketch:
    """The passes over the gradients of some weights, from what each rank holds of them.

    shapes: {projection: (out, in)}. columns: {projection: how many singular vectors}.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], columns: Mapping[str, int], world: World, seed: int
    ) -> None:
        self._shapes, self._columns, self._world = shapes, columns, world
        self._from_right = True  # whether this pass makes Y = G V
        self._thin: dict[str, Tensor] = {}  # V, or U
        for name, (out_features, in_features) in shapes.items():
            width = min(2 * columns[name], out_features, in_features)
            random = torch.randn(in_features, width, generator=named_generator(seed, name))
            self._thin[name] = random.to(world.device)
        self._sums = self._zeros()
        self._totals: dict[str, Tensor] = {}  # of the pass before this one: Y, or Z
        self._last: dict[str, Tensor] = {}  # what it multiplied with

    def _zeros(self) -> dict[str, Tensor]:
        side = 0 if self._from_right else 1
        return {name: thin.new_zeros(self._shapes[name][side], thin.shape[1]) for name, thin in self._thin.items()}

    def add(self, shard: FlatShard) -> None:
        """The gradient of one microbatch, this rank's piece of it."""
        for piece in shard.ranges:
            name = piece.name.removesuffix(".weight")
            if name in self._thin:
                self._add(name, shard.grad[piece.start : piece.stop], piece.param_start)

    def _add(self, name: str, values: Tensor, start: int) -> None:
        """values: elements of the flattened gradient, from `start` on; rows that are not whole are filled up."""
        in_features = self._shapes[name][1]
        first, last = start // in_features, -(-(start + len(values)) // in_features)
        rows = values.new_zeros(last - first, in_features)
        rows.view(-1)[start - first * in_features :][: len(values)] = values
        rows = rows.to(self._world.device)
        if self._from_right:
            self._sums[name][first:last].addmm_(rows, self._thin[name])
        else:
            self._sums[name].addmm_(rows.t(), self._thin[name][first:last])

    def end_pass(self) -> None:
        """All batches have been seen once more. Collective."""
        self._totals = {name: sum_over_ranks(part, self._world).float() for name, part in self._sums.items()}
        self._last = self._thin
        self._thin = {name: torch.linalg.qr(total).Q for name, total in self._totals.items()}
        self._from_right = not self._from_right
        self._sums = self._zeros()

    def spectra(self) -> dict[str, Spectrum]:
        """After an even number of passes."""
        assert self._from_right, "the last pass must have been one with U"
        found = {}
        for name, count in self._columns.items():
            V, S, Wt = torch.linalg.svd(self._totals[name], full_matrices=False)
            square_norm = float(S.double().square().sum())
            found[name] = Spectrum.first(count, self._last[name] @ Wt.t(), S, V, square_norm)
        return found
