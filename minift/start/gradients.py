"""The largest singular values of the gradients of weights, and their vectors, of gradients that never exist.

G (out, in) is the gradient of one weight, summed over batches and ranks. Nobody needs it: a LoRA beside the frozen
weight, W + B A, has the gradients G Aᵀ of B and Bᵀ G of A, and it changes nothing while one of the two is zero. So
products of G with thin matrices are what training an adapter computes anyway, over any weight that can be trained on,
dense or in 4 bits; and block power iteration needs nothing else:

    pass 1, 3    A = Vᵀ, B = 0    Y = G V = dB      (out, k)    U = orth(Y)
    pass 2, 4    B = U, A = 0     Z = Gᵀ U = dAᵀ    (in, k)     V = orth(Z)

After the last, Z = V S Wᵀ and G ~ (U W) S Vᵀ.

A pass is a forward and a backward for every batch, without updates. What is held for it is some k (out + in) numbers a
projection, and what is sent beside the engine's traffic is half of that, once a pass.

Halko, Martinsson, Tropp 2011, algorithm 4.4, with one power iteration: gradients of few documents have few directions
that matter. Exact, to rounding, for k = min(in, out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minift.build import BuiltModel, ModelSource, build_model
from minift.data.batch import Batch
from minift.dist.collectives import sum_over_ranks
from minift.dist.process import World
from minift.fsdp import ShardedModel, ShardPolicy
from minift.model.linear import LinearBase
from minift.objectives.sft import SupervisedTokens
from minift.peft.adapter import AdapterConfig
from minift.peft.inject import adapters, named_generator
from minift.peft.lora import LoraLinear
from minift.peft.residual import FACTORS, Spectrum
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.recompute import RecomputeConfig
from minift.trace import Recorder

_NUM_PASSES = 4
_OVERSAMPLING = 2  # columns looked at for each that is wanted
_WIRES = {"float16": "float32"}  # its gradients would underflow without a loss scaler


def gradient_spectra(
    source: ModelSource,
    columns: Mapping[str, int],
    steps: Sequence[Sequence[Batch]],
    *,
    quant: QuantConfig | None,
    objective: SupervisedTokens,
    wire: str,
    recompute: RecomputeConfig,
    world: World,
    seed: int,
) -> dict[str, Spectrum]:
    """{projection: the first columns[projection] singular values and vectors of its gradient}, equal on all ranks.

    steps: this rank's microbatches of each optimizer step; G is the mean of the gradients of the steps' mean losses.
    quant: how the base is held, as for `build_model`; G is the gradient there. Every projection has a weight of its own
    (is no tied LM head). Collective.
    """
    built = build_model(
        source,
        _ProbeConfig(targets=list(columns), columns=columns),
        quant=quant,
        precision=Precision(wire=_WIRES.get(wire, wire)),
        recompute=recompute,
        policy=ShardPolicy(),
        recorder=Recorder(world.rank, world.device),
        world=world,
        seed=seed,
    )
    probes = adapters(built.module)
    assert probes.keys() == columns.keys()
    thin = {}  # V (in, k), or U (out, k)
    for name, probe in probes.items():
        width, in_features = probe.lora_A.weight.shape
        thin[name] = torch.randn(in_features, width, generator=named_generator(seed, name)).to(world.device)
    for number in range(_NUM_PASSES):
        given, wanted = FACTORS if number % 2 == 0 else reversed(FACTORS)
        _write(built.engine, {f"{name}.{given}": _as_factor(given, values) for name, values in thin.items()})
        _backward(built, steps, objective, world)
        gradients = _gradients(built.engine)
        last = thin
        totals = {name: _as_factor(wanted, gradients[f"{name}.{wanted}"]) for name in thin}
        thin = {name: torch.linalg.qr(total).Q for name, total in totals.items()}
    spectra = {}
    for name, count in columns.items():
        V, S, Wt = torch.linalg.svd(totals[name], full_matrices=False)
        spectra[name] = Spectrum.first(count, last[name] @ Wt.t(), S, V, float(S.double().square().sum()))
    return spectra


@dataclass(frozen=True, kw_only=True)
class _ProbeConfig(AdapterConfig):
    """A LoRA of scale 1 on each projection, of as many columns as are looked at."""

    method: str = "probe"
    columns: Mapping[str, int]

    def wrap(self, name: str, base: LinearBase, dtype: torch.dtype, device: torch.device) -> LoraLinear:
        rank = min(_OVERSAMPLING * self.columns[name], base.in_features, base.out_features)
        return LoraLinear(base, rank, 1.0, 0.0, dtype, device)


def _as_factor(local_name: str, thin: Tensor) -> Tensor:
    """V (in, k) <-> A (k, in), U (out, k) <-> B (out, k)."""
    return thin.t() if local_name == FACTORS[0] else thin


def _write(engine: ShardedModel, values: Mapping[str, Tensor]) -> None:
    """Make these the trained parameters, and all others zero. Collective."""
    for shard in engine.trainable_shards():
        shard.set_weights(torch.zeros_like(shard.master))
        shard.write(values)
    engine.weights_changed()


def _backward(built: BuiltModel, steps: Sequence[Sequence[Batch]], objective: SupervisedTokens, world: World) -> None:
    """Gradients of the mean over `steps` of their mean losses. Collective."""
    built.engine.clear_gradients()
    for microbatches in steps:
        counts = torch.tensor([sum(objective.weight(microbatch) for microbatch in microbatches)])
        weight = sum_over_ranks(counts, world).item() * len(steps)
        for microbatch in microbatches:
            loss_sum = objective(built.module, microbatch.to(world.device)).loss_sum
            (loss_sum / weight).backward()
            del loss_sum


def _gradients(engine: ShardedModel) -> dict[str, Tensor]:
    """All of them, whole; the parameters are gone. Collective."""
    for shard in engine.trainable_shards():
        shard.set_weights(shard.grad)
    engine.weights_changed()
    return {name: gradient.clone() for name, gradient in engine.full_tensors(trainable_only=True)}
