"""The command line as a hurried user meets it. Oracles: exit status, and who prints which sentence on which stream."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from minift import commands
from minift.checkpoint.adapters import file_tensors, save_adapter
from minift.cli import main
from minift.model.hf import load_model
from minift.model.weights import WeightReader
from minift.peft.inject import adapter_parameters, inject
from minift.peft.lora import LoraConfig
from minift.quant.bitsandbytes import StoredNF4
from minift.quant.linear import QuantConfig
from tests.tiny import write_inputs, write_model

ROOT = Path(__file__).parents[1]
RECIPE = "run_dir: run\nmodel: {path: model}\ndata: {train: [rows.jsonl], max_length_tokens: 16}\n"
LOOP = "loop: {examples_per_step: 1, microbatch_tokens: 16}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(RECIPE + LOOP)
    return tmp_path


MISTAKES = [
    (["train", "recipe.yml"], "recipe recipe.yml does not exist; nearest: recipe.yaml"),
    (["train", "model"], "recipe model is a folder"),
    (["train", "recipe.yaml", "--optim.rl", "1"], "--optim.rl is not a field; did you mean optim.lr?"),
    (["train", "recipe.yaml", "--data.train", "[gone.jsonl]"], "data.train names gone.jsonl, which does not exist"),
    (["train", "--optim.lr", "1", "recipe.yaml"], "--optim.lr is not an option of this command; the recipe comes"),
    (["train", "recipe.yaml", "--fsdp.replicas", "2"], "fsdp.replicas is 2 on 1 processes; valid: a divisor of 1"),
    (["data", "prepare", "recipe.yaml", "--objective", "x"], "--objective is x; valid: sft | lm"),
    (["convert", "recipe.yaml", "model"], "model exists already; give a new folder"),
    (["convert", "recipe.yaml", "run"], "recipe.yaml is not a whole GGUF file: "),
    (["plot", "nowhere"], "nowhere/metrics.jsonl: No such file or directory"),
    (["plot", "model", "--colour"], "--colour is not an option of this command"),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES)
def test_mistakes_are_one_line_and_status_2(folder, capsys, arguments, sentence):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"minift: error: {sentence}") and err.count("\n") == 1 and not out
    assert not (folder / "run").exists()


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # pytest has replaced stderr
def test_under_torchrun_rank_0_speaks_and_all_ranks_leave_their_reason(folder, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
    assert main(["train", "recipe.yaml", "--lr", "1"]) == 2
    assert capsys.readouterr().err == ""
    assert "--lr is not a field" in (folder / "error.json").read_text()


@pytest.mark.parametrize(
    ("rank", "launcher_shows_errors", "says"), [("0", True, True), ("1", True, False), ("1", False, True)]
)
def test_errors_of_a_running_job(monkeypatch, capsys, rank, launcher_shows_errors, says):
    def fail(options):
        raise_inside_minift()

    monkeypatch.setenv("RANK", rank)
    if launcher_shows_errors:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "error.json")
    monkeypatch.setattr(commands, "plot", fail)
    assert main(["plot", "run"]) == 2
    assert ("not a metrics record" in capsys.readouterr().err) == says


def raise_inside_minift():
    """A ValueError whose innermost frame is minift's own."""
    from minift.recipe.nodes import RecipeError, parse_overrides

    try:
        parse_overrides(["x"])
    except RecipeError as error:
        error.args = ("not a metrics record",)
        raise


def test_what_is_nobodys_fault_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(commands, "plot", lambda options: int("not from minift"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["plot", "run"])


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to write more into one, as it refuses on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_room_is_told_with_the_folder_that_was_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load_model(write_model(tmp_path / "model"), torch.float32)
    inject(model, LoraConfig(r=4))
    save_adapter("adapter", LoraConfig(r=4), file_tensors(model))
    monkeypatch.setattr("minift.model.gguf.convert_gguf", lambda _, folder: (folder / "x").write_bytes(bytes(9999)))
    for arguments in (
        ["quantize", "--model", "model", "--out", "new"],
        ["merge", "--model", "model", "--adapter", "adapter", "--out", "new"],
        ["convert", "model.gguf", "new"],
        ["combine", "adapter", "adapter", "--method", "cat", "--out", "new"],
    ):
        with no_file_above(4096):
            assert main(arguments) == 2
        assert re.fullmatch(r"minift: error: new.*: .*File too large.*\n", capsys.readouterr().err)
        assert sorted(os.listdir()) == ["adapter", "model"]


def test_ctrl_c_is_quiet(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "plot", interrupt)
    assert main(["plot", "run"]) == 130
    assert capsys.readouterr() == ("", "")


def test_train_gets_the_config_and_gives_the_status(folder, monkeypatch):
    seen = []
    monkeypatch.setattr("minift.train.train", lambda config: seen.append(config) or 130)
    assert main(["train", "recipe.yaml", "--optim.lr", "3e-5"]) == 130
    assert seen[0].optim.lr == 3e-5


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "recipe.yaml", "--help"]])
def test_help(folder, capsys, arguments):
    try:
        assert main(arguments) == 0
    except SystemExit as end:
        assert end.code == 0
    assert ("--optim.lr" in capsys.readouterr().out) == ("train" in arguments)


def test_as_a_process(folder):
    """Status and streams of the real thing, and a reader that stops reading."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "minift", "train", "recipy.yaml"]
    bad = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "minift: error: recipe recipy.yaml does not exist; nearest: recipe.yaml\n"
    pipe = f"{sys.executable} -m minift train --help | true"
    headed = subprocess.run(["bash", "-o", "pipefail", "-c", pipe], env=environment, capture_output=True, text=True)
    assert (headed.returncode, headed.stderr) == (0, "")


IN_A_PROCESS = """
import glob, sys
from pathlib import Path
from minift.cli import main
from minift.model.weights import WeightReader
from minift.quant.bitsandbytes import StoredNF4
from minift.quant.linear import QuantConfig
from tests.tiny import write_inputs, write_model
status = main(["train", sys.argv[1]])
print(status, *(Path(thread).read_text().strip() for thread in glob.glob("/proc/self/task/*/comm")))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed where there is /proc")
def test_no_thread_of_a_process_group_outlives_a_command(tmp_path):
    """One that asks for the interpreter when that is gone aborts the process, after all work is done."""
    write_inputs(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run_dir: {tmp_path}/run\nmodel: {{path: {tmp_path}/model}}\ndevice: cpu\nadapter: {{r: 2}}\n"
        f"data: {{train: [{tmp_path}/train.jsonl], max_length_tokens: 256, template: chatml}}\n"
        "loop: {examples_per_step: 4, microbatch_tokens: 256, max_steps: 1}\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", IN_A_PROCESS, str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    status, *threads = done.stdout.splitlines()[-1].split()
    assert status == "0", done.stderr
    assert not [name for name in threads if "gloo" in name]


def test_quantize_takes_its_options(tmp_path, capsys):
    options = ["--block-size", "32", "--no-double-quant", "--skip", "down_proj", "--skip", r"layers\.0\.self_attn"]
    dense = str(write_model(tmp_path / "dense"))
    assert main(["quantize", "--model", dense, "--out", str(tmp_path / "nf4"), *options]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'nf4'}\n"
    stored = StoredNF4(WeightReader(tmp_path / "nf4"))
    assert stored.config() == QuantConfig(block_size=32, double_quant=False)
    assert len(stored.projections) == 2 + 4 + 2
    assert not any("down_proj" in name or "layers.0.self_attn" in name for name in stored.projections)
    assert main(["generate", "--model", dense, "--prompt", "abab", *options]) == 2  # there they need a format
    assert "--skip say how --nf4 or --icq holds the weights; add one" in capsys.readouterr().err


def test_adapters_are_combined_and_stacked(tmp_path, capsys, monkeypatch):
    """A stack of two is their exact sum, which `combine --method cat` writes as one."""
    monkeypatch.chdir(write_inputs(tmp_path).resolve())
    for number in range(2):
        model = load_model("model", torch.float32)
        config = LoraConfig(r=2, targets=["o_proj", "down_proj"])
        inject(model, config)
        torch.manual_seed(number)
        for parameter in adapter_parameters(model).values():
            torch.nn.init.normal_(parameter, std=0.5 + number)
        save_adapter(f"adapter{number}", config, file_tensors(model))
    measure = ["eval", "loss", "--model", "model", "--data", "train.jsonl", "--template", "chatml", "--device", "cpu"]
    losses = {}
    weights = ["--method", "cat", "--weights", "1", "1", "--dtype", "float32"]
    assert main(["combine", "adapter0", "adapter1", "--out", "both", *weights]) == 0
    assert capsys.readouterr().out == "wrote both: LoRA of rank 4 on 4 modules\n"
    for adapters in (["adapter0"], ["adapter1"], ["adapter0", "adapter1"], ["both"]):
        assert main([*measure, "--adapter", *adapters]) == 0
        losses[tuple(adapters)] = json.loads(capsys.readouterr().out)["loss"]
    *alone, stacked, combined = losses.values()
    assert stacked == pytest.approx(combined, rel=1e-4)  # in bf16, of many tokens
    assert min(abs(loss - stacked) for loss in alone) > 1e-3 * stacked
    ask = ["generate", "--model", "model", "--template", "chatml", "--device", "cpu", "--prompt", "abab"]
    alone = []
    for adapters in ([], ["--adapter", "adapter0"], ["--adapter", "adapter1"]):
        assert main([*ask, *adapters, "--max-new-tokens", "4"]) == 0
        alone.append(capsys.readouterr().out)
    labels = ("no adapter", "adapter0", "adapter1")
    expected = "".join(f"[{label}] {text}" for label, text in zip(labels, alone, strict=True))
    for adapters in (["--adapter", "adapter0", "adapter1"], ["--adapter", "adapter0", "--adapter", "adapter1"]):
        assert main([*ask, *adapters, "--each", "--max-new-tokens", "4"]) == 0
        assert capsys.readouterr().out == expected
    assert main(["combine", "adapter0", "--out", "x", "--dtype", "int8"]) == 2
    assert "--dtype is int8; valid: float32, bfloat16, float16" in capsys.readouterr().err
