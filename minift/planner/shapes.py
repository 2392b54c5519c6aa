"""A run on paper: every module, parameter and shard of one rank of N, as frozen values that know no tensors.

`describe.describe` makes them of what the engine would do. What a rank does in a step is not here: bytes are `memory`,
operations `work`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from minift.fsdp import ShardPolicy
from minift.fsdp.unit import Keep
from minift.model.config import ModelConfig
from minift.ops.matmul import adds_up_in, widened_bytes
from minift.optim.config import OptimConfig
from minift.optim.shard import ParamRange
from minift.peft.adapter import AdapterConfig
from minift.planner.methods import MethodShape
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.recompute import Policy, RecomputeConfig

Link = Literal["nccl", "shared memory", "paired sends"]
"""How ranks exchange tensors: the transports of `minift/fsdp/transport.py`. A group of one exchanges none."""


class Setup(Protocol):
    """What a plan reads of a run's configuration (`config.RunConfig` has it all)."""

    adapter: AdapterConfig | None
    quant: QuantConfig | None
    train: tuple[str, ...]
    freeze: tuple[str, ...]
    optim: OptimConfig
    precision: Precision
    fsdp: ShardPolicy
    recompute: RecomputeConfig


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one rank computes in an optimizer step: `microbatches` times `tokens` in documents of `document_tokens`.

    targets: tokens of a microbatch that the loss counts (the LM head runs on these only); None: all.
    """

    tokens: int
    document_tokens: int
    microbatches: int = 1
    targets: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "document_tokens", "microbatches"):
            if self.__dict__[name] < 1:
                raise ValueError(f"{name} of a workload is {self.__dict__[name]}; valid: 1 or more")
        if self.document_tokens > self.tokens:
            raise ValueError(f"documents of {self.document_tokens} tokens do not fit into {self.tokens}")
        if self.targets is not None and not 0 <= self.targets <= self.tokens:
            raise ValueError(f"targets of a workload is {self.targets}; valid: 0 to {self.tokens}, the tokens")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document of a microbatch; the last one may be shorter."""
        whole, rest = divmod(self.tokens, self.document_tokens)
        return (self.document_tokens,) * whole + ((rest,) if rest else ())

    @property
    def num_targets(self) -> int:
        return self.tokens if self.targets is None else self.targets


@dataclass(frozen=True)
class ParameterShape:
    """One parameter as it is when gathered. dtype: of the gathered values, "bfloat16"; "uint8": packed bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class BucketShape:
    """One bucket, as `fsdp.bucket.Bucket` has it: sizes in elements, and bytes an element of each form.

    resident: its shard lies in the gathered tensor, which is always there. is_offloaded: its shard is in host memory.
    keeps_full_grads: gradients of full_numel are added up over microbatches, in fp32. lower_itemsize: of the other half
    of fp32 masters, or 0. ranges: of the shard of rank 0, which elements are whose.
    """

    name: str
    trainable: bool
    parameters: tuple[ParameterShape, ...]
    storage_itemsize: int
    lower_itemsize: int
    wire_itemsize: int
    grad_itemsize: int
    shard_numel: int
    full_numel: int
    resident: bool
    is_offloaded: bool
    keeps_full_grads: bool
    gather_bytes: int
    reduce_bytes: int
    ranges: tuple[ParamRange, ...]

    @property
    def slot_itemsize(self) -> int:
        """Of gradients where backward puts them."""
        return 4 if self.keeps_full_grads else self.grad_itemsize

    @property
    def local_numel(self) -> dict[str, int]:
        """{parameter: elements of it in the shard of rank 0}."""
        return {r.name: r.stop - r.start for r in self.ranges}

    @property
    def is_rounded(self) -> bool:
        """Whether updates are rounded to bf16, as `FlatShard` has it."""
        return self.storage_itemsize == 2 and not self.lower_itemsize


@dataclass(frozen=True)
class UpdateShape:
    """A low-rank update of a projection: A (rank, in), B (out, rank). dropout: on the way into A."""

    rank: int
    dropout: float


@dataclass(frozen=True)
class ProjectionShape:
    """y = x Wᵀ + b. storage: of W. adapter: name of the class that wraps it, with the updates that it adds; "" if none.

    method: what it keeps beside that. block_size: weights that share a scale, in NF4, else 0.
    """

    name: str
    in_features: int
    out_features: int
    storage: Literal["dense", "nf4"]
    has_bias: bool
    trains_weight: bool
    trains_bias: bool
    adapter: str = ""
    updates: tuple[UpdateShape, ...] = ()
    method: MethodShape = MethodShape()
    block_size: int = 0

    @property
    def weight_numel(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True)
class RingShape:
    """Equal buffers that units share. units that share one have the same `key`."""

    key: int
    count: int
    buffer_bytes: int


@dataclass(frozen=True)
class UnitShape:
    """What is gathered and freed together; name "": the root. In the order of the module tree, which forward runs in.

    keep: for how long it stays gathered. recompute: what its backward makes again.
    """

    name: str
    buckets: tuple[BucketShape, ...]
    projections: tuple[ProjectionShape, ...]
    keep: Keep
    recompute: Policy
    gather_ring: RingShape
    reduce_ring: RingShape

    @property
    def parameters(self) -> Iterator[ParameterShape]:
        for bucket in self.buckets:
            yield from bucket.parameters

    @property
    def trains(self) -> bool:
        return any(bucket.trainable for bucket in self.buckets)

    @property
    def slot_itemsize(self) -> int:
        """Of gradients where backward puts them, if anything trains."""
        return next(bucket.slot_itemsize for bucket in self.buckets if bucket.trainable)


@dataclass(frozen=True)
class RunShape:
    """One rank of a run. The root is the first of `units`; the others are the blocks, in their order.

    shard_size: ranks among which one copy of the model is cut up. num_parameters: of the dense model, and of adapters.
    scratch_bytes: gradient shards that blocks take turns with (fsdp.step_in_backward). num_prompt, num_prefix: virtual
    tokens before those of a microbatch, which go through the blocks, or are keys and values of each.
    """

    model: ModelConfig
    units: tuple[UnitShape, ...]
    workload: Workload
    policy: ShardPolicy
    precision: Precision
    optim: OptimConfig
    recompute: RecomputeConfig
    adapter: str
    world_size: int
    shard_size: int
    link: Link
    num_parameters: int
    num_trainable_parameters: int
    scratch_bytes: int = 0
    num_prompt: int = 0
    num_prefix: int = 0

    @property
    def root(self) -> UnitShape:
        return self.units[0]

    @property
    def blocks(self) -> tuple[UnitShape, ...]:
        return self.units[1:]

    @property
    def head(self) -> ProjectionShape:
        return next(p for p in self.root.projections if p.name == "lm_head")

    @property
    def buckets(self) -> Iterator[BucketShape]:
        for unit in self.units:
            yield from unit.buckets

    @property
    def block_tokens(self) -> int:
        """Of a microbatch, in blocks and the last norm."""
        return self.num_prompt + self.workload.tokens

    @property
    def trains_before_blocks(self) -> bool:
        """Whether their input needs a gradient."""
        return any(p.trainable and ".embed_tokens." in p.name for p in self.root.parameters)

    @property
    def wire_itemsize(self) -> int:
        """Bytes an element of weights and activations in forward and backward."""
        return self.precision.wire_dtype.itemsize

    def adds_products_up_in(self, itemsize: int) -> bool:
        """Whether a product of what is in the wire dtype is added to gradients of so many bytes without a temporary."""
        if itemsize == self.wire_itemsize:
            return True
        return itemsize == 4 and adds_up_in(torch.float32, self.precision.wire_dtype, self.is_on_gpu)

    def widened_bytes(self, rows: int, inner: int, columns: int) -> int:
        """Of a product in the wire dtype, what a CPU that cannot multiply it has in fp32."""
        return 0 if self.is_on_gpu else widened_bytes(rows, inner, columns, self.precision.wire_dtype)

    @property
    def shares_memory(self) -> bool:
        return self.link == "shared memory" and self.shard_size > 1

    @property
    def is_on_gpu(self) -> bool:
        return self.link == "nccl"

    @property
    def host_updates(self) -> bool:
        """Whether a GPU's host has the masters, and its processor updates them."""
        return self.is_on_gpu and self.policy.offload
