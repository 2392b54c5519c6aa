"""What a run could do otherwise: the smallest changes that make it fit, and everything worth trying.

    asked = Candidate(setup, workload, 131072)      as the recipe says
    smallest_changes(asked, fits)                   [Candidate(changes=("--recompute.policy selective",), ...), ...]
    for other in alternatives(asked, 8): ...        for `minift plan --search`

A change is written as the command line takes it. They are tried alone, then two of them, then three: first those that
compute the same to the bit or nearly (recomputation, tokens at a time, sharding, where things lie), then those that
round more (8-bit moments, bf16 masters, weights in 4 bits).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from minift.fsdp.policy import ShardPolicy
from minift.optim.config import OptimConfig
from minift.peft.adapter import AdapterConfig
from minift.peft.lora import LoraConfig
from minift.planner.shapes import Setup, Workload
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.recompute import RecomputeConfig

MOST_CHANGES = 3


@dataclass(frozen=True, kw_only=True)
class Method:
    """A `shapes.Setup` without a recipe around it."""

    adapter: AdapterConfig | None = None
    quant: QuantConfig | None = None
    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: Precision = field(default_factory=Precision)
    fsdp: ShardPolicy = field(default_factory=ShardPolicy)
    recompute: RecomputeConfig = field(default_factory=lambda: RecomputeConfig("full"))


METHODS = {
    "full fine-tuning": Method(),
    "full, 8-bit AdamW": Method(optim=OptimConfig(state="8bit")),
    "full, 8-bit AdamW, bf16 masters": Method(
        optim=OptimConfig(state="8bit"), precision=Precision(master="bfloat16", stochastic_rounding=True)
    ),
    "LoRA, r = 16": Method(adapter=LoraConfig()),
    "QLoRA, r = 16": Method(adapter=LoraConfig(), quant=QuantConfig()),
}
"""What people ask of a model, in the order of what it takes."""


@dataclass(frozen=True)
class Candidate:
    """A run that could be. setup: a frozen dataclass with the fields of `shapes.Setup`; changes: what makes it of the
    one that was asked for; step_tokens: of all ranks in a step."""

    setup: Setup
    workload: Workload
    step_tokens: int
    changes: tuple[str, ...] = ()

    def with_(self, change: str, workload: Workload | None = None, **fields: Any) -> Candidate:
        return replace(
            self,
            setup=replace(self.setup, **fields),
            workload=workload or self.workload,
            changes=(*self.changes, change),
        )


Change = Callable[[Candidate], Candidate | None]
"""The candidate with it; None where it has it already, or it makes no sense."""


def smallest_changes(asked: Candidate, fits: Callable[[Candidate], bool]) -> list[Candidate]:
    """All candidates that fit with as few changes as possible, and of these only such as compute the same, if there are
    any; empty if not even `MOST_CHANGES` help."""
    for count in range(1, MOST_CHANGES + 1):
        for known in (_EXACT, {**_EXACT, **_ROUNDING}):
            found = [candidate for candidate in _with_changes(asked, known, count) if fits(candidate)]
            if found:
                return found
    return []


def _with_changes(asked: Candidate, known: dict[str, tuple[Change, ...]], count: int) -> Iterator[Candidate]:
    """With `count` changes of different things."""
    for things in itertools.combinations(known, count):
        for changes in itertools.product(*(known[thing] for thing in things)):
            candidate = _apply(asked, changes)
            if candidate is not None:
                yield candidate


def alternatives(asked: Candidate, world_size: int) -> Iterator[Candidate]:
    """What computes the same step in another way, as it is asked for included: recomputation, what is sharded, how long
    it stays gathered, and how many tokens at a time."""
    recompute, policy = asked.setup.recompute, asked.setup.fsdp
    recomputes = [RecomputeConfig(), RecomputeConfig("selective"), RecomputeConfig("full", 2), RecomputeConfig("full")]
    policies = []
    if world_size > 1 and policy.strategy not in ("ddp", "zero1"):  # which know no such thing as resharding
        policies = [replace(policy, strategy="zero3", reshard_after_forward=True)]
        if not policy.offload_frozen:  # which is for blocks that take turns
            policies.append(replace(policy, strategy="zero3", reshard_after_forward=False))
            policies.append(replace(policy, strategy="zero2"))
    for choice in itertools.product(
        [recompute, *(other for other in recomputes if other != recompute)],
        [policy, *(other for other in policies if other != policy)],
        _workloads(asked.workload),
    ):
        setup = replace(asked.setup, recompute=choice[0], fsdp=choice[1])
        yield replace(asked, setup=setup, workload=choice[2], changes=_flags(asked, *choice))


def _flags(asked: Candidate, recompute: RecomputeConfig, policy: ShardPolicy, workload: Workload) -> tuple[str, ...]:
    """What makes these of what was asked for, on the command line."""
    pairs = [
        *((f"recompute.{name}", recompute, asked.setup.recompute, name) for name in ("policy", "every")),
        *((f"fsdp.{name}", policy, asked.setup.fsdp, name) for name in ("strategy", "reshard_after_forward")),
    ]
    flags = [
        f"--{key} {str(getattr(new, name)).lower()}"
        for key, new, old, name in pairs
        if getattr(new, name) != getattr(old, name)
    ]
    if workload.tokens != asked.workload.tokens:
        flags.append(f"--loop.microbatch_tokens {workload.tokens}")
    return tuple(flags)


def split(workload: Workload, parts: int) -> Workload | None:
    """The same documents in more microbatches of fewer; None if a microbatch has too few of them for that."""
    documents = workload.tokens // workload.document_tokens
    if documents < parts:
        return None
    each = math.ceil(documents / parts)
    return replace(
        workload,
        tokens=each * workload.document_tokens,
        microbatches=math.ceil(workload.microbatches * documents / each),
        targets=None if workload.targets is None else workload.targets * each // documents,
    )


def _workloads(workload: Workload) -> list[Workload]:
    """As it is, half and a quarter of it at a time, and all at once or twice as much."""
    smaller = [split(workload, parts) for parts in (2, 4)]
    larger = []
    if workload.microbatches > 1:
        documents = workload.tokens // workload.document_tokens
        larger.append(
            replace(
                workload,
                tokens=2 * documents * workload.document_tokens,
                microbatches=math.ceil(workload.microbatches / 2),
                targets=None if workload.targets is None else 2 * workload.targets,
            )
        )
    return [workload, *filter(None, smaller), *larger]


# Changes, the cheapest first #


def _shard_everything(candidate: Candidate) -> Candidate | None:
    policy = candidate.setup.fsdp
    if policy.strategy == "zero3" and policy.reshard_after_forward and not policy.keep_gathered:
        return None
    sharded = replace(policy, strategy="zero3", reshard_after_forward=True, keep_gathered=())
    what = "" if policy.strategy == "zero3" else "--fsdp.strategy zero3"
    kept = "" if policy.reshard_after_forward else " --fsdp.reshard_after_forward true"
    names = " --fsdp.keep_gathered []" if policy.keep_gathered else ""
    return candidate.with_(f"{what}{kept}{names}".strip(), fsdp=sharded)


def _one_replica(candidate: Candidate) -> Candidate | None:
    policy = candidate.setup.fsdp
    return candidate.with_("--fsdp.replicas 1", fsdp=replace(policy, replicas=1)) if policy.replicas > 1 else None


def _recompute(policy: str) -> Change:
    def change(candidate: Candidate) -> Candidate | None:
        now = candidate.setup.recompute
        order = ["none", "selective", "full", "offload"]
        is_less = order.index(now.policy) < order.index(policy) or (now.policy == policy and now.every > 1)
        frees_the_host = (now.policy, policy) == ("offload", "full")
        if not is_less and not frees_the_host:
            return None
        every = " --recompute.every 1" if now.every > 1 else ""
        return candidate.with_(f"--recompute.policy {policy}{every}", recompute=RecomputeConfig(policy))

    return change


def _fewer_tokens(parts: int) -> Change:
    def change(candidate: Candidate) -> Candidate | None:
        workload = split(candidate.workload, parts)
        if workload is None or candidate.setup.fsdp.step_in_backward:
            return None
        return candidate.with_(f"--loop.microbatch_tokens {workload.tokens}", workload)

    return change


def _8bit_moments(candidate: Candidate) -> Candidate | None:
    optim = candidate.setup.optim
    return None if optim.state == "8bit" else candidate.with_("--optim.state 8bit", optim=replace(optim, state="8bit"))


def _bf16_masters(candidate: Candidate) -> Candidate | None:
    precision = candidate.setup.precision
    if candidate.setup.adapter is not None or precision.master == "bfloat16":
        return None
    narrow = replace(precision, master="bfloat16", stochastic_rounding=True)
    return candidate.with_("--precision.master bfloat16 --precision.stochastic_rounding true", precision=narrow)


def _4bit_weights(candidate: Candidate) -> Candidate | None:
    if candidate.setup.adapter is None or candidate.setup.quant is not None:
        return None
    return candidate.with_("--quant '{}'", quant=QuantConfig())


def _update_in_backward(candidate: Candidate) -> Candidate | None:
    """Blocks take turns with gradients; without clipping."""
    setup = candidate.setup
    is_possible = setup.fsdp.strategy in ("zero2", "zero3") and candidate.workload.microbatches == 1
    if (
        setup.adapter is not None
        or setup.fsdp.step_in_backward
        or not is_possible
        or setup.precision.needs_loss_scaling
    ):
        return None
    return candidate.with_(
        "--fsdp.step_in_backward true --optim.max_grad_norm null",
        fsdp=replace(setup.fsdp, step_in_backward=True),
        optim=replace(setup.optim, max_grad_norm=None),
    )


def _paged_moments(candidate: Candidate) -> Candidate | None:
    optim = candidate.setup.optim
    return None if optim.paged else candidate.with_("--optim.paged true", optim=replace(optim, paged=True))


def _offload(candidate: Candidate) -> Candidate | None:
    policy = candidate.setup.fsdp
    if policy.offload or policy.replicas > 1 or policy.strategy not in ("zero2", "zero3"):
        return None
    names = " --fsdp.offload_frozen []" if policy.offload_frozen else ""
    return candidate.with_(f"--fsdp.offload true{names}", fsdp=replace(policy, offload=True, offload_frozen=()))


def _offload_frozen(pattern: str) -> Change:
    """On a CPU it frees nothing, so it never helps there."""

    def change(candidate: Candidate) -> Candidate | None:
        policy = candidate.setup.fsdp
        if candidate.setup.adapter is None or policy.offload or policy.offload_frozen:
            return None
        return candidate.with_(
            f"--fsdp.offload_frozen '[\"{pattern}\"]'", fsdp=replace(policy, offload_frozen=(pattern,))
        )

    return change


def _on_the_device(section: str, name: str) -> Change:
    """Again, where it waits in host memory, which may be too small."""

    def change(candidate: Candidate) -> Candidate | None:
        settings = getattr(candidate.setup, section)
        waits = getattr(settings, name)
        if not waits:
            return None
        nothing, shown = (False, "false") if waits is True else ((), "[]")
        return candidate.with_(f"--{section}.{name} {shown}", **{section: replace(settings, **{name: nothing})})

    return change


_EXACT: dict[str, tuple[Change, ...]] = {  # what is changed -> how
    "recompute": (_recompute("selective"), _recompute("full"), _recompute("offload")),
    "tokens": (_fewer_tokens(2), _fewer_tokens(4), _fewer_tokens(16)),
    "sharding": (_shard_everything, _one_replica),
    "update": (_update_in_backward,),
    "moments": (_paged_moments, _on_the_device("optim", "paged")),
    "masters": (_offload, _on_the_device("fsdp", "offload")),
    "frozen weights": (
        _offload_frozen("[13579]$"), _offload_frozen("layers"), _on_the_device("fsdp", "offload_frozen"),
    ),
}  # fmt: skip
_ROUNDING: dict[str, tuple[Change, ...]] = {
    "moments": (_8bit_moments, _paged_moments),
    "masters": (_bf16_masters, _offload),
    "frozen weights": (_4bit_weights,),
}


def _apply(asked: Candidate, changes: Sequence[Change]) -> Candidate | None:
    """`asked` with all of them; None if one makes no sense there, or two exclude each other."""
    candidate: Candidate | None = asked
    try:
        for change in changes:
            candidate = change(candidate)
            if candidate is None:
                return None
    except ValueError:  # what a configuration of this kind refuses
        return None
    return candidate
