"""Oracles: the plan itself, printed; and what the command refuses."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minift.cli import main
from minift.planner.memory import PERSISTENT, TRANSIENT
from tests.tiny import write_model

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "sft_full.yaml"
FAR = ["--model.path", "llama-3.1-70b", "--loop.examples_per_step", "2048"]


@pytest.fixture(autouse=True)
def no_gpu_is_here(monkeypatch) -> None:
    """So that the default is an H100 everywhere."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def garbage_is_collected_again() -> Iterator[None]:
    """The command is the last thing that its process does."""
    yield
    gc.unfreeze()
    gc.enable()


def plan(*arguments: str) -> int:
    return main(["plan", *map(str, arguments)])


def test_a_recipe_that_does_not_fit(capsys) -> None:
    assert plan(RECIPE, *FAR, "--world-size", 512, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    asked, changed = record["plan"], record["smallest_change"]
    assert not asked["fits"] and asked["peak_bytes"] > asked["usable_bytes"] and asked["changes"] == []
    assert changed["fits"] and changed["changes"] and changed["peak_bytes"] < asked["peak_bytes"]
    assert asked["num_parameters"] == asked["num_trainable_parameters"] == 70_553_706_496
    assert set(asked["at_peak_bytes"]) == {*PERSISTENT, *TRANSIENT}
    assert sum(asked["at_peak_bytes"].values()) == asked["peak_bytes"] == max(asked["moments_bytes"].values())
    assert asked["step_seconds"] > 0

    assert plan(RECIPE, *FAR, "--world-size", 512) == 0
    text = capsys.readouterr().out
    assert "does not fit" in text and f"smallest change that fits: {' '.join(changed['changes'])}" in text
    for category, num_bytes in asked["at_peak_bytes"].items():
        assert (f"\n{category} " in text) == (num_bytes > 0)


def test_overrides_may_stand_anywhere_and_change_the_plan(capsys) -> None:
    for order in ([*FAR, "--recompute.policy", "full", "--json"], ["--json", "--recompute.policy", "full", *FAR]):
        assert plan(RECIPE, "--world-size", 512, *order) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["plan"]["fits"] and "smallest_change" not in record


def test_host_memory_is_asked_for_and_kept_to(capsys) -> None:
    """Masters, gradients and moments of 70.6e9 weights, 8 ranks with a 512th each: 12 GiB on a node."""
    offload = [*FAR, "--fsdp.offload", "true", "--recompute.policy", "full", "--world-size", 512]
    records = {}
    for gib in ("10", "100"):
        assert plan(RECIPE, *offload, "--host-memory", gib, "--json") == 0
        records[gib] = json.loads(capsys.readouterr().out)
        asked = records[gib]["plan"]
        assert asked["peak_bytes"] <= asked["usable_bytes"] and asked["usable_host_bytes"] == 0.9 * float(gib) * 2**30
    assert records["100"]["plan"]["fits"] and not records["10"]["plan"]["fits"]
    change = records["10"]["smallest_change"]
    assert 8 * sum(change["host_bytes"].values()) <= 0.9 * 10 * 2**30


@pytest.mark.parametrize(("device", "is_told"), [((), True), (("--device", "a100"), False)])
def test_a_gpu_without_figures_is_told(capsys, monkeypatch, device: tuple[str, ...], is_told: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100 80GB PCIe")
    assert plan(RECIPE, *FAR, "--world-size", 512, "--recompute.policy", "full", *device) == 0
    error = capsys.readouterr().err
    assert ("no figures of this machine's NVIDIA A100 80GB PCIe; planned for an h100" in error) == is_told


def test_ranks_without_work_are_told(capsys) -> None:
    assert plan(RECIPE, "--model.path", "llama-3.1-70b", "--world-size", 512) == 0
    assert "examples_per_step 64 leaves 448 of 512 ranks without an example" in capsys.readouterr().out


def test_a_search(capsys) -> None:
    assert plan(RECIPE, *FAR, "--world-size", 512, "--search", "--json") == 0
    found = json.loads(capsys.readouterr().out)["search"]
    assert found and all(other["fits"] for other in found)
    assert plan(RECIPE, *FAR, "--world-size", 512, "--search", "--network", 10) == 0
    assert "the fastest that fit" in capsys.readouterr().out


def test_one_line_for_each_method(capsys, tmp_path: Path) -> None:
    assert plan("llama-2-7b", "--picture", tmp_path / "plan.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("llama-2-7b: 6.74 billion parameters")
    by_method = {line[:31].strip(): line.split() for line in lines[3:]}
    assert list(by_method) == [
        "full fine-tuning", "full, 8-bit AdamW", "full, 8-bit AdamW, bf16 masters", "LoRA, r = 16", "QLoRA, r = 16",
    ]  # fmt: skip
    # 16 bytes a weight of 6.74e9 are 100.4 GiB; LoRA's frozen 2 bytes 12.6; QLoRA's base 3.87 GB (performance.md, 1.4).
    peaks = {method: float(words[-5]) for method, words in by_method.items()}
    assert 100.4 < peaks["full fine-tuning"] < 104
    assert 12.6 < peaks["LoRA, r = 16"] < 14.5
    assert 3.6 < peaks["QLoRA, r = 16"] < 5.5
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_a_model_folder(capsys, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", head_dim=16)  # k_proj and v_proj are as wide: room for a rank of 16
    for device in ("cpu", "CPU", "h100"):
        assert plan(RECIPE, "--model.path", folder, "--device", device, "--world-size", 2, "--json") == 0
        record = json.loads(capsys.readouterr().out)["plan"]
        assert record["fits"] and record["device"] == device.lower()
        assert ("step_seconds" in record) == (device == "h100")
    capsys.readouterr()
    assert plan(folder) == 0
    assert "QLoRA" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["missing.yaml"], "recipe missing.yaml does not exist"),
        (["llama-3-8b"], "a model that minift knows by name; valid: one of smollm2-135m"),
        ([RECIPE], "models/base is neither a folder"),
        ([RECIPE, *FAR, "--optim.lrr", "1"], "did you mean optim.lr"),
        ([RECIPE, *FAR, "--device", "h1000"], "did you mean h100"),
        ([RECIPE, *FAR, "--network", "slow"], "a number of GB/s"),
        ([RECIPE, *FAR, "--host-memory", "-1"], "--host-memory is -1; valid: GiB of a node, more than 0"),
        ([RECIPE, *FAR, "--host-memory", "9", "--device", "cpu"], "--host-memory is of what has GPUs"),
        ([RECIPE, *FAR, "--world-size", "0"], "world-size"),
        ([RECIPE, *FAR, "--world-size", "6", "--fsdp.replicas", "4"], "valid: a divisor of 6"),
        ([RECIPE, *FAR, "--supervised", "0"], "above 0, at most 1"),
        ([RECIPE, *FAR, "--document-tokens", "-5"], "document_tokens of a workload is -5"),
        (["llama-2-7b", "--recompute.policy", "none"], "give a recipe"),
    ],
)
def test_what_is_refused(capsys, arguments: list, sentence: str) -> None:
    assert plan(*arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
