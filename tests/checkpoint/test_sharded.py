"""Checkpoints of sharded runs: N ranks write, M ranks read, whoever cut the parameters and however.

Oracle: the value of every element, a function of its parameter and place (`states`); bit for bit.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from minift.checkpoint.manifest import MANIFEST, DamagedCheckpoint, Standing, list_checkpoints
from minift.checkpoint.saver import Saver
from minift.checkpoint.sharded import Loaded, load_checkpoint, load_newest
from minift.checkpoint.stored_ranges import StoredRanges
from minift.dist.process import World
from minift.optim.shard import ParamRange
from tests.checkpoint import states
from tests.checkpoint.states import Cut
from tests.ranks import run_ranks


def save(world: World, parent: Path, cut: Cut, steps: tuple[int, ...] = (7,), keep_last: int = 10) -> list[float]:
    """Checkpoints of the states after `steps`; returns what the generator says next."""
    optimizer = cut.optimizer(world)
    torch.manual_seed(100 + world.rank)
    with Saver(parent, optimizer, world, cut.replica_world(world), keep_last=keep_last) as saver:
        for step in steps:
            states.fill(optimizer, step)
            saver.start(Standing(step, {"epoch": 1}, {"a": "b"}, {"scaler": [step]}))
            saver.wait()
    return torch.rand(3).tolist()


def load(world: World, parent: Path, cut: Cut) -> tuple[Loaded | None, list[str], list[float]]:
    """What was loaded, where it differs from what `fill` makes, and what the generator says next."""
    optimizer = cut.optimizer(world)
    torch.manual_seed(0)
    loaded = load_newest(parent, optimizer, world)
    step = loaded.standing.step if loaded else 0
    return loaded, states.differences(optimizer, step), torch.rand(3).tolist()


def cuts(world_size: int) -> st.SearchStrategy[Cut]:
    """Every strategy of the engine, in more general form: ZeRO-1/2/3, HSDP, DDP."""
    return st.builds(
        Cut,
        replicas=st.sampled_from([r for r in range(1, world_size + 1) if world_size % r == 0]),
        is_whole=st.just(False),
        seed=st.integers(0, 10_000),
    ) | st.builds(Cut, is_whole=st.just(True), seed=st.integers(0, 10_000))


@pytest.mark.parametrize("writers", [1, 2, 3, 4])
@pytest.mark.parametrize("readers", [1, 2, 3, 4])
@settings(max_examples=8)
@given(data=st.data())
def test_any_cut_restores_the_same_bits(tmp_path_factory, writers: int, readers: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    in_halves = st.booleans() if dtype == torch.float32 else st.just(False)  # or not, on either side
    there = replace(data.draw(cuts(writers)), master=dtype, in_halves=data.draw(in_halves))
    here = replace(data.draw(cuts(readers)), master=dtype, in_halves=data.draw(in_halves))
    parent = tmp_path_factory.mktemp("run")
    written = run_ranks(writers, save, parent, there)
    for rank, (loaded, differences, random) in enumerate(run_ranks(readers, load, parent, here)):
        assert loaded == Loaded(
            parent / "step-00000007", Standing(7, {"epoch": 1}, {"a": "b"}, {"scaler": [7]}), passed_over=()
        )
        assert differences == []
        if writers == readers:
            assert random == written[rank]


def shards_in(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return {name.rpartition("/")[0] for name in file.keys() if name.endswith("/master")}


@pytest.mark.parametrize("cut", [Cut(is_whole=True), Cut(replicas=2)])
def test_replicas_share_the_writing(tmp_path: Path, cut: Cut) -> None:
    """Nothing is written twice."""
    run_ranks(4, save, tmp_path, cut)
    files = [shards_in(path) for path in sorted((tmp_path / "step-00000007").glob("rank-*"))]
    if cut.is_whole:  # three shards, four replicas
        assert [len(names) for names in files] == [1, 1, 1, 0] and len(set.union(*files)) == 3
    else:  # ranks 0 and 1 hold what 2 and 3 hold
        assert [len(names) for names in files] == [2, 2, 1, 1]
        assert files[0] == files[1] and files[2] == files[3] and not files[0] & files[2]


def load_error(world: World, parent: Path, cut: Cut, shapes: dict[str, tuple[int, ...]] | None = None) -> str:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError) as caught:
        if shapes is not None:
            patch.setattr(states, "SHAPES", shapes)
        optimizer = cut.optimizer(world)
        states.fill(optimizer, 3)
        try:
            load_checkpoint(list_checkpoints(parent)[-1], optimizer, world)
        finally:
            assert states.differences(optimizer, 3) == []  # nothing was changed
    return f"{type(caught.value).__name__}: {caught.value}"


def test_another_model_is_refused(tmp_path: Path) -> None:
    run_ranks(2, save, tmp_path, Cut())
    wider = states.SHAPES | {"a.weight": (3, 6)}
    fewer = {**states.SHAPES, "bias": (1,)}
    del fewer["norm"]
    for shapes, message in (
        (wider, "parameter a.weight is (3, 5) there and (3, 6) here"),
        (fewer, "parameter bias is not trained there and (1,) here"),
    ):
        for text in run_ranks(2, load_error, tmp_path, Cut(), shapes):
            assert text.startswith("ValueError: ") and message in text
    for message in run_ranks(2, load_error, tmp_path, Cut(master=torch.bfloat16)):
        assert "there is master float32, exp_avg float32" in message and "and here master bfloat16" in message


def test_bf16_weights_are_no_half_of_fp32_ones(tmp_path: Path) -> None:
    run_ranks(1, save, tmp_path, Cut(in_halves=True))
    (message,) = run_ranks(1, load_error, tmp_path, Cut(master=torch.bfloat16))
    assert "there is master bfloat16, lower int16, exp_avg" in message
    assert "and here master bfloat16, exp_avg" in message


def test_missing_elements_are_missed(tmp_path: Path) -> None:
    """A set of files that does not cover a parameter, which no save leaves."""
    run_ranks(2, save, tmp_path, Cut())
    stored = StoredRanges([tmp_path / "step-00000007" / "rank-00000-of-00002.safetensors"])
    dtypes = dict.fromkeys(("master", "exp_avg", "exp_avg_sq"), torch.float32)
    problem = stored.problem(ParamRange("embed", 0, 66, 0, (11, 6)), dtypes)
    assert re.fullmatch(r"it has [1-9]\d? of 66 elements of embed", problem), problem


def flip(path: Path, position: int, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1 << bit
    path.write_bytes(raw)


def every_flip(world: World, parent: Path, stride: int) -> int:
    """How many flipped bits were detected: one in every `stride` bytes of every file, which must be all of them."""
    optimizer = Cut().optimizer(world)
    (folder,) = list_checkpoints(parent)
    count = 0
    for path in sorted(folder.iterdir()):
        for position in range(0, path.stat().st_size, stride):
            flip(path, position, position % 8)
            with pytest.raises(DamagedCheckpoint) as caught:
                load_checkpoint(folder, optimizer, world)
            assert path.name in str(caught.value)
            flip(path, position, position % 8)
            count += 1
    load_checkpoint(folder, optimizer, world)
    assert states.differences(optimizer, 7) == []
    return count


def test_a_flipped_bit_anywhere_is_detected(tmp_path: Path) -> None:
    run_ranks(2, save, tmp_path, Cut())
    (count,) = run_ranks(1, every_flip, tmp_path, 23)
    assert count > 500


def test_damage_on_one_rank_is_everybodys(tmp_path: Path) -> None:
    """Each rank checks a share of the files; all of them refuse."""
    run_ranks(3, save, tmp_path, Cut())
    victim = tmp_path / "step-00000007" / "rank-00001-of-00003.safetensors"
    flip(victim, 5000, 3)
    for message in run_ranks(2, load_error, tmp_path, Cut()):
        assert "DamagedCheckpoint" in message and victim.name in message and "checksum" in message
    victim.unlink()
    for message in run_ranks(4, load_error, tmp_path, Cut()):
        assert "DamagedCheckpoint" in message and victim.name in message and "No such file" in message


def test_the_newest_good_one_is_taken(tmp_path: Path) -> None:
    assert run_ranks(2, load, tmp_path, Cut())[0][0] is None
    run_ranks(2, save, tmp_path, Cut(), (1, 2, 3, 4))
    flip(tmp_path / "step-00000004" / "rank-00001-of-00002.safetensors", 4000, 0)
    flip(tmp_path / "step-00000003" / MANIFEST, 30, 0)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000099.tmp")
    for loaded, differences, _ in run_ranks(3, load, tmp_path, Cut(seed=5)):
        assert loaded.folder.name == "step-00000002" and loaded.standing.extra == {"scaler": [2]}
        assert [note.partition(" is damaged")[0].partition(str(tmp_path))[2] for note in loaded.passed_over] == [
            "/step-00000004/rank-00001-of-00002.safetensors",
            "/step-00000003/manifest.json",
        ]
        assert differences == []

    # The run goes on from step 2 and comes by step 4 again: the damaged one is replaced, and what is older goes.
    run_ranks(2, save, tmp_path, Cut(), (4,), 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert run_ranks(1, load, tmp_path, Cut())[0][0].folder.name == "step-00000004"


def test_what_an_abandoned_future_left_does_not_push_out_the_newest(tmp_path: Path) -> None:
    """After going back to an older checkpoint, later steps are still on the disk; they count for nothing."""
    run_ranks(1, save, tmp_path, Cut(), (1, 2, 7, 8))
    run_ranks(1, save, tmp_path, Cut(), (3,), 1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000007", "step-00000008"]


def load_newest_error(world: World, parent: Path) -> str:
    with pytest.raises(DamagedCheckpoint) as caught:
        load_newest(parent, Cut().optimizer(world), world)
    return str(caught.value)


def test_a_run_does_not_begin_anew_behind_your_back(tmp_path: Path) -> None:
    run_ranks(1, save, tmp_path, Cut())
    (tmp_path / "step-00000007" / "rank-00000-of-00001.safetensors").unlink()
    for message in run_ranks(2, load_newest_error, tmp_path):
        assert message.startswith(f"no checkpoint in {tmp_path} is good") and "to begin anew" in message
