"""The recipe of a run. Oracles: sentences written by hand, the value itself after a round trip, and the disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from minift.config import HOW, RunConfig, help_text
from minift.optim.config import OptimConfig
from minift.peft.ia3 import IA3Config
from minift.peft.lora import LoraConfig
from minift.recipe.describe import to_plain, walk
from minift.recompute import RecomputeConfig

RECIPES = Path(__file__).parents[1] / "launch" / "recipes"
RECIPE = """\
run_dir: {folder}/run
model: {{path: {folder}/model}}
data:
  train: [{folder}/rows.jsonl]
  max_length_tokens: 512
loop:
  examples_per_step: 8
  microbatch_tokens: 1024
optim:
  lr: 5e-4
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose files exist."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


words = st.text(st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029"), min_size=1, max_size=8)
configs = st.builds(
    replace,
    st.just(RunConfig(**{
        "run_dir": "run",
        **{name: walked.section(**fields) for name, fields in {
            "model": {"path": "m"},
            "data": {"train": ("a",), "max_length_tokens": 64},
            "loop": {"examples_per_step": 1, "microbatch_tokens": 64},
        }.items() for walked in walk(RunConfig) if walked.key == name},
    })),
    run_dir=words.filter(str.strip),
    objective=st.sampled_from(["sft", "lm"]),
    adapter=st.none() | st.builds(
        LoraConfig,
        r=st.integers(1, 256),
        alpha=st.floats(1e-3, 1e3),
        rslora=st.booleans(),
        targets=st.just("all-linear") | st.lists(words, min_size=1, max_size=3),
        exclude=st.none() | st.lists(words, max_size=2),
        rank_pattern=st.dictionaries(words, st.integers(1, 8), max_size=2),
    ) | st.builds(IA3Config, feedforward=words | st.lists(words, max_size=2)),
    optim=st.builds(
        OptimConfig,
        lr=st.floats(1e-8, 1.0),
        betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
        max_grad_norm=st.none() | st.floats(1e-3, 10),
        schedule=st.sampled_from(["constant", "linear", "cosine"]),
    ),
    recompute=st.builds(
        RecomputeConfig, policy=st.sampled_from(["none", "full", "selective", "offload"]), every=st.integers(1, 9)
    ),
)  # fmt: skip


@given(configs)
def test_saved_configs_load_equal(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert RunConfig.from_recipe(path) == config


def test_recipe_then_command_line(recipe):
    config = RunConfig.from_recipe(recipe)
    assert config.optim.lr == 5e-4 and config.adapter is None and config.objective == "sft"
    config = RunConfig.from_recipe(recipe, ["--optim.lr", "2e-4", "--adapter.r=32", "--adapter.targets", "[q_proj]"])
    assert config.optim.lr == 2e-4 and config.adapter == LoraConfig(r=32, targets=["q_proj"])
    config.check_files()


MISTAKES = [
    (["--optim.learning_rate", "1"], ["--optim.learning_rate is not a field; did you mean optim.lr?"]),
    (["--lr", "1"], ["--lr is not a field; did you mean optim.lr?"]),
    (["--adapter.rank", "8"], ["--adapter.rank is not a field; did you mean adapter."]),
    (["--adapter.method", "ia4"], ["--adapter.method is ia4", "did you mean ia3?"]),
    (["--adapter", "{method: ia3, r: 8}"], ["is not a field; it belongs to method: lora", "valid in adapter: method"]),
    (["--lora.r", "8"], ["lora (--lora.r) is not a field"]),
    (["--loop.epoch", "8"], ["did you mean loop.epochs?"]),
    (["--optim.lr", "-1"], ["optim.lr is -1.0", "> 0"]),
    (["--optim.schedule", "cosin"], ["did you mean cosine?"]),
    (["--objective", "dpo"], ["--objective is dpo; valid: sft | lm"]),
    (["--loop.examples_per_step", "0"], ["loop.examples_per_step is 0; valid: 1 or more"]),
    (["--loop.examples_per_step", "8.5"], ["--loop.examples_per_step is 8.5; valid: a whole number"]),
    (["--loop.microbatch_tokens", "100"], ["loop.microbatch_tokens is 100", "data.max_length_tokens is 512"]),
    (["--loop.validate_every_steps", "10"], ["loop.validate_every_steps is 10", "data.validation_share"]),
    (["--adapter", "{}", "--train", "[norm]"], ["train is [norm] but adapter is set too", "--adapter null"]),
    (["--adapter", "{}", "--freeze", "[norm]"], ["freeze is [norm] but adapter is set too"]),
    (["--recompute.policy", "ful"], ["--recompute.policy is ful", "did you mean full?"]),
    (["--recompute.every", "0"], ["recompute.every is 0; valid: an integer, 1 or more"]),
    (["--precision.wire", "fp16"], ["precision.wire", "fp16", "bfloat16"]),
    (["--data.train", "[]"], ["data.train is ()", "one or more files"]),
    (["--run_dir", " "], ["run_dir is empty"]),
]


@pytest.mark.parametrize(("overrides", "sentences"), MISTAKES)
def test_mistakes_are_refused_by_name(recipe, overrides, sentences):
    with pytest.raises(ValueError) as caught:
        RunConfig.from_recipe(recipe, overrides)
    for sentence in sentences:
        assert sentence in str(caught.value)


def test_missing_files_are_named_together(recipe, tmp_path):
    overrides = ["--model.path", str(tmp_path), "--data.train", "[gone.jsonl]", "--data.validation", f"[{tmp_path}]"]
    with pytest.raises(ValueError) as caught:
        RunConfig.from_recipe(recipe, overrides).check_files()
    assert f"model.path is {tmp_path}, which has no config.json" in caught.value.problems[0]
    assert "data.train names gone.jsonl, which does not exist" in caught.value.problems[1]
    assert f"data.validation names {tmp_path}, which is a folder" in caught.value.problems[2]


def test_a_run_folder_is_continued_by_its_own_recipe_only(recipe, tmp_path):
    config = RunConfig.from_recipe(recipe)
    config.save()
    other = RunConfig.from_recipe(recipe, ["--optim.lr", "1e-5", "--adapter", "{r: 4}"])
    other.check_files()  # nothing was trained yet
    assert other.changes() == []
    saved = tmp_path / "run" / "config.yaml"
    written = saved.read_text()
    saved.write_text("warp: 9\n")  # by another version
    assert other.changes() == []
    saved.write_text(written)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "validation_loss": 3.0}\n')
    other.check_files()  # nor now
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    config.check_files()
    assert config.changes() == []
    cheaper = RunConfig.from_recipe(
        recipe, ["--fsdp.strategy", "zero2", "--recompute.policy", "full", "--loop.keep_checkpoints", "3"]
    )
    cheaper.check_files()
    assert cheaper.changes() == [
        "fsdp.strategy is zero2 now and zero3 there", "recompute.policy is full now and none there",
        "loop.keep_checkpoints is 3 now and 2 there",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"another run: adapter is .* now and null there; optim.lr is 1e-05 now"):
        other.check_files()
    replace(other, run_dir=str(tmp_path / "elsewhere")).check_files()

    saved.write_text(written + "warp: 9\n")
    with pytest.raises(ValueError, match="whose run this version cannot continue .*warp"):
        config.check_files()
    saved.unlink()
    with pytest.raises(ValueError, match="holds results but no config.yaml"):
        config.check_files()
    with pytest.raises(ValueError, match="which is a file"):
        replace(config, run_dir=str(recipe)).check_files()


def test_what_decides_how_are_fields():
    keys = {entry.key for entry in walk(RunConfig)}
    assert set(HOW) <= keys


def test_every_field_has_documentation_and_is_in_the_help():
    text = help_text()
    for entry in walk(RunConfig):
        assert entry.doc, f"{entry.key} has no documentation: write a string under the field"
        assert (entry.key + ":" if entry.section else f"--{entry.key} ") in text
    assert "--optim.lr  a number  (default: 0.0002)" in text
    assert "  with method: ia3\n" in text and text.count("--adapter.exclude ") == 1
    assert "--data.train  [text, ...]  (required)" in text


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_recipes_are_valid(path):
    RunConfig.from_recipe(path)


def test_the_saved_file_is_plain_yaml(recipe):
    config = RunConfig.from_recipe(recipe)
    assert yaml.safe_load(config.to_yaml()) == to_plain(config)
