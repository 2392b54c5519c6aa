"""Oracle: the recipe that the changes, typed on a command line, make; and every combination, tried."""

from __future__ import annotations

import random
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minift.config import RunConfig
from minift.planner.catalog import model_shape
from minift.planner.choices import Candidate, alternatives, smallest_changes, split
from minift.planner.plan import Machine, Planner, workload_of
from minift.planner.shapes import Workload
from minift.planner.show import change_text, fit_text, host_text

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
FULL, LORA, QLORA = (RECIPES / f"sft_{name}.yaml" for name in ("full", "lora", "qlora"))
CHANGES = [
    (),
    ("--recompute.policy", "full", "--recompute.every", "2"),
    ("--fsdp.strategy", "zero2"),
    ("--fsdp.reshard_after_forward", "false", "--fsdp.replicas", "2"),
    ("--fsdp.keep_gathered", "[layers.1]", "--precision.wire", "float32"),
    ("--fsdp.strategy", "ddp", "--loop.examples_per_step", "8"),
    (),
    ("--fsdp.offload_frozen", "[layers]"),
]


def asked_for(recipe: Path, overrides: tuple[str, ...], world_size: int = 8) -> Candidate:
    config = RunConfig.from_recipe(recipe, list(overrides))
    workload = workload_of(config.loop, config.data.max_length_tokens, world_size)
    return Candidate(config, workload, config.loop.examples_per_step * workload.document_tokens)


def every_change(asked: Candidate) -> list[Candidate]:
    """All candidates that are ever looked at."""
    seen: list[Candidate] = []
    smallest_changes(asked, lambda candidate: seen.append(candidate) is not None)
    return seen


@pytest.mark.parametrize(
    ("recipe", "overrides"), list(zip([FULL, LORA, QLORA] * 3, CHANGES, strict=False)), ids=lambda part: str(part)[-30:]
)
def test_changes_mean_what_they_say(recipe: Path, overrides: tuple[str, ...]) -> None:
    asked = asked_for(recipe, overrides)
    candidates = [*every_change(asked), *alternatives(asked, 8)]
    assert len(candidates) > 20
    few = random.Random(0).sample(candidates, min(60, len(candidates)))
    for candidate in [*(c for c in candidates if len(c.changes) == 1), *few]:
        flags = [word for change in candidate.changes for word in shlex.split(change)]
        typed = RunConfig.from_recipe(recipe, [*overrides, *flags, "--data.max_length_tokens", "2"])
        there = replace(candidate.setup, loop=typed.loop, data=typed.data)
        assert typed == there
        if candidate.workload != asked.workload:
            assert typed.loop.microbatch_tokens == candidate.workload.tokens


@given(
    documents=st.integers(1, 40),
    length=st.integers(1, 300),
    microbatches=st.integers(1, 9),
    parts=st.sampled_from([2, 4]),
)
def test_a_split_step_has_the_same_documents(documents: int, length: int, microbatches: int, parts: int) -> None:
    workload = Workload(tokens=documents * length, document_tokens=length, microbatches=microbatches)
    smaller = split(workload, parts)
    if smaller is None:
        assert documents < parts
        return
    each = smaller.tokens // length
    assert each * parts >= documents > (each - 1) * parts
    assert smaller.microbatches * each >= microbatches * documents > (smaller.microbatches - 1) * each


def test_fewest_changes_and_the_same_arithmetic_come_first() -> None:
    asked = asked_for(FULL, ())
    halved = lambda candidate: candidate.workload.tokens <= asked.workload.tokens // 2  # noqa: E731
    assert all(len(candidate.changes) == 1 for candidate in smallest_changes(asked, halved))
    narrow = lambda candidate: candidate.setup.optim.state == "8bit"  # noqa: E731
    assert [c.changes for c in smallest_changes(asked, narrow)] == [("--optim.state 8bit",)]
    either = smallest_changes(asked, lambda candidate: halved(candidate) or narrow(candidate))
    assert all(halved(candidate) for candidate in either)
    assert smallest_changes(asked, lambda candidate: False) == []


def test_the_smallest_change_fits_and_nothing_smaller_does() -> None:
    asked = asked_for(FULL, ())
    planner = Planner(model_shape("llama-3.1-8b"), Machine.of_gpus("a100-40g", 8, "nvlink"))
    assert not planner.plan(asked).fits
    found = planner.smallest_change(asked)
    assert found.fits and len(found.candidate.changes) == 1
    single = [planner.plan(c) for c in every_change(asked) if len(c.changes) == 1]
    assert found.timed.seconds == min(plan.timed.seconds for plan in single if plan.fits and plan.timed)


def test_frozen_weights_may_wait_in_host_memory_where_nothing_else_helps() -> None:
    """LoRA on 70 billion weights in 16 bits, 141 GB, on one GPU of 85: only they can be elsewhere."""
    asked = asked_for(LORA, ("--recompute.policy", "full"), 1)
    planner = Planner(model_shape("llama-3.1-70b"), Machine.of_gpus("h100", 1, "nvlink"))
    found = planner.smallest_change(asked)
    assert found.fits and found.candidate.changes == ("--fsdp.offload_frozen '[\"layers\"]'",)
    assert sum(found.memory.host.values()) == pytest.approx(80 * 2 * 856e6, rel=1e-3)
    assert "127.50 GiB in host memory" in change_text(found)


@pytest.mark.parametrize(
    ("ranks", "host_gib", "fits"), [(1, 141, False), (1, 142, True), (4, 141, False), (16, 70, False), (16, 71, True)]
)
def test_what_waits_in_host_memory_must_fit_there(ranks: int, host_gib: float, fits: bool) -> None:
    """127.5 GiB of frozen weights, 0.9 of a node's memory usable, and at most 8 ranks, with a part each, to a node."""
    asked = asked_for(LORA, ("--recompute.policy", "full", "--fsdp.offload_frozen", "[layers]"), ranks)
    machine = replace(Machine.of_gpus("h100", ranks, "nvlink"), host_bytes=host_gib * 2**30)
    planner = Planner(model_shape("llama-3.1-70b"), machine)
    plan = planner.plan(asked)
    on_node = plan.memory.host_bytes * min(ranks, 8) / 2**30
    assert on_node == pytest.approx(127.5 * min(8, ranks) / ranks, rel=1e-3)
    assert plan.memory.peak_bytes <= machine.usable_bytes and plan.fits == fits
    verdict = "fits" if fits else "does not fit"
    assert f"{verdict} in the {0.9 * host_gib:.2f} GiB that there are" in host_text(plan)
    assert (f"{on_node:.2f} GiB for the {min(ranks, 8)} ranks of a node" in host_text(plan)) == (ranks > 1)


@pytest.mark.parametrize(
    ("recipe", "waits", "change"),
    [
        (LORA, ("--fsdp.offload_frozen", "[layers]"), "--fsdp.offload_frozen []"),
        (LORA, ("--recompute.policy", "offload"), "--recompute.policy full"),
        (FULL, ("--optim.paged", "true"), "--optim.paged false"),
        (FULL, ("--fsdp.offload", "true"), "--fsdp.offload false"),
    ],
)
def test_what_finds_no_room_in_host_memory_stays_on_the_device(
    recipe: Path, waits: tuple[str, ...], change: str
) -> None:
    asked = asked_for(recipe, waits)
    machine = replace(Machine.of_gpus("h100", 8, "nvlink"), host_bytes=2**27)
    planner = Planner(model_shape("llama-3.1-8b"), machine)
    plan, found = planner.plan(asked), planner.smallest_change(asked)
    assert plan.memory.peak_bytes <= machine.usable_bytes and not plan.fits
    assert fit_text(plan).startswith("fits, but not in host memory: ")
    assert found.fits and found.candidate.changes == (change,)


def test_the_search_begins_with_the_fastest() -> None:
    asked = asked_for(LORA, ())
    planner = Planner(model_shape("llama-3.1-8b"), Machine.of_gpus("h100", 8, "100g"))
    found = planner.search(asked)
    assert all(plan.fits for plan in found)
    seconds = [plan.timed.seconds for plan in found]
    assert seconds == sorted(seconds) and seconds[0] <= planner.plan(asked).timed.seconds


@pytest.mark.parametrize(
    ("examples", "world_size", "document_tokens", "expected"),
    [
        (64, 8, None, (8192, 2048, 2)),
        (64, 64, None, (2048, 2048, 1)),
        (64, 8, 512, (4096, 512, 1)),
        (63, 8, 1000, (8000, 1000, 1)),
        (640, 8, 3000, (6000, 3000, 40)),
    ],
)
def test_the_work_of_a_rank(examples, world_size, document_tokens, expected) -> None:
    config = RunConfig.from_recipe(FULL, ["--loop.examples_per_step", str(examples)])
    work = workload_of(config.loop, config.data.max_length_tokens, world_size, document_tokens)
    assert (work.tokens, work.document_tokens, work.microbatches) == expected
    half = workload_of(config.loop, 2048, world_size, document_tokens, supervised=0.5)
    assert half.num_targets == half.tokens // 2
