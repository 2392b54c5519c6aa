"""PEFT itself is the oracle: it loads what minift wrote, minift loads what it wrote, and the logits agree."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from minift.checkpoint.adapters import (
    base_model_of,
    file_tensors,
    load_adapter,
    read_config,
    read_tensors,
    save_adapter,
)
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.peft.adapter import AdapterConfig
from minift.peft.bitfit import BitFitConfig
from minift.peft.bottleneck import BottleneckConfig
from minift.peft.dora import DoraConfig
from minift.peft.ia3 import IA3Config
from minift.peft.inject import inject, stored_parameters
from minift.peft.lora import LoraConfig
from minift.peft.methods import METHODS
from minift.peft.prefix import PrefixConfig
from minift.peft.prompt import PromptConfig
from minift.recipe.describe import to_plain

TOKENS = torch.arange(13) * 3
# fp32 logits through two blocks: a few dozen roundings of 6e-8 each, relative to the largest logit.
LOGIT_TOLERANCE = 2e-5

CONFIGS = {
    "all-linear": LoraConfig(r=4, alpha=8),
    "rslora, list": LoraConfig(r=4, alpha=6, rslora=True, targets=["q_proj", "down_proj"]),
    "patterns": LoraConfig(
        r=4, alpha=8, targets=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 2, "up_proj": 7}, alpha_pattern={r"layers\.1.*": 3},
    ),
    "regex, exclude": LoraConfig(r=3, targets=r"model\.layers.*(gate|up)_proj", exclude=["layers.1.mlp.up_proj"]),
    "lm_head": LoraConfig(r=2, alpha=5, targets=["lm_head", "k_proj"], dropout=0.25),
    "dora": DoraConfig(r=3, alpha=6, targets=["q_proj", "up_proj", "lm_head"], rslora=True, rank_pattern={"q_proj": 5}),
    "embeddings": LoraConfig(r=3, alpha=4, targets=["embed_tokens", "lm_head", "q_proj"], rank_pattern={".*tokens": 5}),
    "modules_to_save": LoraConfig(r=2, targets=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "ia3": IA3Config(modules_to_save=["lm_head"]),
    "ia3, all": IA3Config(targets="all-linear", feedforward=["down_proj", "o_proj"], exclude=["layers.0.mlp.up_proj"]),
}  # fmt: skip
# In transformers' model this also matches an activation function and the MLP's own name, which PEFT cannot wrap.
BROAD_REGEX = LoraConfig(r=3, targets=r"model\.layers\.\d\.mlp.*")
# PEFT takes "norm" for every norm.
LAST_NORM = LoraConfig(r=2, targets=["q_proj"], modules_to_save=["norm"])

_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
JSON_VALUES = _SCALARS | st.lists(_SCALARS, max_size=2) | st.dictionaries(st.text(max_size=4), _SCALARS, max_size=2)


def hf_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def minift_llama() -> CausalLM:
    hf = hf_llama()
    model = CausalLM(ModelConfig.from_hf(hf.config.to_dict()))
    model.load_state_dict(hf.state_dict())
    return model.eval()


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    if not isinstance(model, CausalLM):
        return model(TOKENS[None]).logits[0]
    num_tokens = len(TOKENS)
    return model(
        TOKENS, torch.arange(num_tokens), torch.tensor([0, num_tokens], dtype=torch.int32), num_tokens,
        head=lambda hidden_TD, lm_head: lm_head(hidden_TD),
    )  # fmt: skip


def assert_close_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= LOGIT_TOLERANCE * expected.abs().max()


def adapted_model(config: LoraConfig) -> CausalLM:
    """With random A and B, so that an adapter that is not loaded shows."""
    model = minift_llama()
    inject(model, config)
    torch.manual_seed(1)
    for parameter in stored_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


tensors_of = file_tensors


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter, and the names and shapes of its tensors."""
    model = adapted_model(LoraConfig(r=2))
    save_adapter(tmp_path / "adapter", LoraConfig(r=2), tensors_of(model), base_model="a-base-model")
    return tmp_path / "adapter", {name: tuple(t.shape) for name, t in tensors_of(model).items()}


@pytest.mark.parametrize(
    "config", [*CONFIGS.values(), BROAD_REGEX, LAST_NORM], ids=[*CONFIGS, "broad regex", "last norm"]
)
def test_peft_loads_what_minift_wrote(tmp_path, config):
    model = adapted_model(config)
    save_adapter(tmp_path / "adapter", config, tensors_of(model), model=model)
    theirs = peft.PeftModel.from_pretrained(hf_llama(), tmp_path / "adapter")
    assert_close_logits(logits_of(model), logits_of(theirs))
    own = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[key], stored[key]) for key in own)


def in_peft(config: AdapterConfig) -> peft.PeftConfig:
    """The same settings, with initial values at random."""
    shared = {
        "task_type": "CAUSAL_LM", "target_modules": config.targets, "exclude_modules": config.exclude,
        "modules_to_save": config.modules_to_save or None,
    }  # fmt: skip
    if isinstance(config, IA3Config):
        return peft.IA3Config(feedforward_modules=config.feedforward, init_ia3_weights=False, **shared)
    return peft.LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, use_rslora=config.rslora,
        rank_pattern=config.rank_pattern, alpha_pattern=config.alpha_pattern, use_dora=config.uses_dora,
        init_lora_weights=False, **shared,
    )  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_minift_loads_what_peft_wrote(tmp_path, config):
    theirs = peft.get_peft_model(hf_llama(), in_peft(config)).eval()
    for name, parameter in theirs.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    model = minift_llama()
    read = load_adapter(model, tmp_path)
    assert_close_logits(logits_of(model.eval()), logits_of(theirs))
    settings, expected = to_plain(read), to_plain(config)
    assert settings.pop("targets") and expected.pop("targets")  # PEFT spells "all-linear" out
    assert settings.keys() == expected.keys()
    for name, value in expected.items():  # it holds lists as sets, and writes them in any order
        assert sorted(settings[name]) == sorted(value) if isinstance(value, list) else settings[name] == value


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip(tmp_path, config):
    model = adapted_model(config)
    save_adapter(tmp_path / "adapter", config, tensors_of(model))
    again = minift_llama()
    load_adapter(again, tmp_path / "adapter")
    assert tensors_of(again).keys() == tensors_of(model).keys()
    # LoRA is held as it is stored: bit for bit. IA3 is held less one, DoRA less norms that are below 4.
    error = 0.0 if type(config) is LoraConfig else 1e-6
    for name, tensor in tensors_of(again).items():
        torch.testing.assert_close(tensor, tensors_of(model)[name], rtol=0.0, atol=error)
    assert_close_logits(logits_of(again.eval()), logits_of(model))


def test_files_are_spelled_as_peft_spells_them(tmp_path):
    """Same keys, same values, same order, same safetensors header; only target_modules is sorted, in PEFT it is not."""
    config = LoraConfig(r=4, alpha=16.0, dropout=0.1, targets=["v_proj", "q_proj"], rank_pattern={"v_proj": 2})
    theirs = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["v_proj", "q_proj"],
        rank_pattern={"v_proj": 2},
    )  # fmt: skip
    model = adapted_model(config)
    save_adapter(tmp_path / "ours", config, tensors_of(model), base_model=str(tmp_path))
    theirs_model = peft.get_peft_model(hf_llama(), theirs)
    theirs_model.peft_config["default"].base_model_name_or_path = str(tmp_path)
    theirs_model.save_pretrained(tmp_path / "theirs")

    ours_text, theirs_text = ((tmp_path / who / "adapter_config.json").read_text() for who in ("ours", "theirs"))
    ours_fields, theirs_fields = json.loads(ours_text), json.loads(theirs_text)
    assert list(ours_fields) == list(theirs_fields)
    assert ours_fields["target_modules"] == ["q_proj", "v_proj"]
    theirs_fields["target_modules"].sort()
    assert ours_fields == theirs_fields
    assert type(ours_fields["lora_alpha"]) is int

    def header(who):
        raw = (tmp_path / who / "adapter_model.safetensors").read_bytes()
        return raw[8 : 8 + int.from_bytes(raw[:8], "little")]

    assert header("ours") == header("theirs")


def test_low_precision_tensors_are_stored_in_fp32(tmp_path):
    tensors = {name: t.bfloat16() for name, t in tensors_of(adapted_model(LoraConfig(r=2))).items()}
    save_adapter(tmp_path / "adapter", LoraConfig(r=2), tensors)
    read = read_tensors(tmp_path / "adapter", {name: tuple(t.shape) for name, t in tensors.items()})
    assert all(read[name].dtype == torch.float32 and torch.equal(read[name], t.float()) for name, t in tensors.items())


def test_writing_refuses_what_would_not_load(tmp_path):
    tensors = tensors_of(adapted_model(LoraConfig(r=2)))
    first = next(iter(tensors))
    cases = [
        ({}, "no adapter tensor"),
        ({k: v for k, v in tensors.items() if k != first}, "q_proj lacks lora_A.weight"),
        (tensors | {"model.layers.0.self_attn.q_proj.base.weight": torch.zeros(1)}, "is not an adapter parameter"),
        (tensors | {first: torch.full_like(tensors[first], float("nan"))}, "not a number"),
        (tensors | {first: torch.full_like(tensors[first], float("inf"))}, "q_proj.lora_A.weight has a value"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            save_adapter(tmp_path / "adapter", LoraConfig(r=2), bad)
        assert list(tmp_path.iterdir()) == []
    save_adapter(tmp_path / "adapter", LoraConfig(r=2), tensors)
    with pytest.raises(ValueError, match="exists already"):
        save_adapter(tmp_path / "adapter", LoraConfig(r=2), tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_reading_refuses_wrong_tensors(saved):
    folder, shapes = saved
    path = folder / "adapter_model.safetensors"
    original = load_file(path)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    other = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    cases = [
        ({k: t for k, t in original.items() if k != first}, "lacks 1 of 28 adapter tensors, among them model.layers.0"),
        (original | {other: original[first].clone()}, "has unexpected 1 of 28"),
        (original | {first: torch.zeros(3, 16)}, r"q_proj.lora_A.weight is \(3, 16\), the model needs \(2, 16\)"),
        (original | {first: torch.full((2, 16), float("nan"))}, "q_proj.lora_A.weight has a value"),
        ({}, "is empty"),
        ({key.replace("base_model.model.", "_orig_mod."): t for key, t in original.items()}, "does not start with"),
    ]
    for bad, message in cases:
        save_file(bad, path)
        with pytest.raises(ValueError, match=message):
            read_tensors(folder, shapes)
    save_file(original, path)
    assert list(read_tensors(folder, shapes)) == list(shapes)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_tensors(folder, shapes)
    path.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle"):
        read_tensors(folder, shapes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_bias": True}, "sets 'lora_bias'"),
        ({"bias": "all"}, "sets 'bias' to 'all'"),
        ({"fan_in_fan_out": True}, "sets 'fan_in_fan_out'"),
        ({"layers_to_transform": [0]}, "sets 'layers_to_transform'"),
        ({"trainable_token_indices": [1]}, "sets 'trainable_token_indices'"),
        ({"a_feature_of_tomorrow": {"x": 1}}, "sets 'a_feature_of_tomorrow'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': that initialisation changes the base"),
        ({"peft_type": "OFT"}, "peft_type is 'OFT'; valid: LORA, IA3"),
        ({"r": None}, "has no 'r'"),
        ({"target_modules": None}, "has no 'target_modules'"),
    ],
)
def test_reading_names_what_is_not_supported(saved, change, message):
    path = saved[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_config(saved[0])


@pytest.mark.parametrize(
    ("config", "change", "sentence"),
    [
        (LoraConfig(), {"lora_alpha": "8"}, "lora_alpha is '8'; valid: a number"),
        (LoraConfig(), {"r": "4"}, "r is '4'; valid: a whole number"),
        (LoraConfig(), {"r": 2.5}, "r is 2.5; valid: a whole number"),
        (LoraConfig(), {"r": True}, "r is True; valid: a whole number"),
        (LoraConfig(), {"lora_dropout": "x"}, "lora_dropout is 'x'; valid: a number"),
        (LoraConfig(), {"use_rslora": "no"}, "use_rslora is 'no'; valid: true or false"),
        (LoraConfig(), {"use_dora": "no"}, "use_dora is 'no'; valid: true or false"),
        (LoraConfig(), {"rank_pattern": {"q_proj": "4"}}, "rank_pattern is {'q_proj': '4'}; valid: {name: a whole"),
        (LoraConfig(), {"alpha_pattern": ["q_proj"]}, "alpha_pattern is ['q_proj']; valid: {name: a number, ...}"),
        (DoraConfig(), {"target_modules": 5}, "target_modules is 5; valid: text | [text, ...]"),
        (IA3Config(), {"feedforward_modules": [1]}, "feedforward_modules is [1]; valid: text | [text, ...]"),
        (IA3Config(), {"exclude_modules": {}}, "exclude_modules is {}; valid: text | [text, ...]"),
        (BitFitConfig(), {"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; valid: [text, ...]"),
        (BottleneckConfig(), {"size": "8"}, "size is '8'; valid: a whole number"),
        (BottleneckConfig(), {"activation": 3}, "activation is 3; valid: relu | gelu | silu"),
        (PrefixConfig(), {"num_virtual_tokens": "4"}, "num_virtual_tokens is '4'; valid: a whole number"),
        (PromptConfig(), {"num_virtual_tokens": 4.5}, "num_virtual_tokens is 4.5; valid: a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path, config, change, sentence):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(config.to_peft() | change))
    with pytest.raises(ValueError) as told:
        read_config(tmp_path)
    assert str(told.value).startswith(f"{path}: {sentence}")


@settings(max_examples=300)
@given(st.data())
def test_whatever_stands_in_a_config_it_is_read_or_refused(tmp_path_factory, data):
    """Never a traceback, for any value of any key of any method."""
    path = tmp_path_factory.getbasetemp() / "adapter_config.json"
    fields = data.draw(st.sampled_from(METHODS))().to_peft()
    key, value = data.draw(st.sampled_from(sorted(fields))), data.draw(JSON_VALUES)
    path.write_text(json.dumps(fields | {key: value}))
    try:
        config = read_config(path.parent)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")
    else:
        assert isinstance(config, AdapterConfig)


def test_the_base_is_read_as_strictly(tmp_path):
    path = tmp_path / "adapter_config.json"
    base = "base_model_name_or_path"
    wrong = {"{": " is not JSON", "[]": " is not a JSON object", f'{{"{base}": 5}}': f": {base} is 5; valid: text"}
    for text, sentence in wrong.items():
        path.write_text(text)
        with pytest.raises(ValueError) as told:
            base_model_of(tmp_path)
        assert str(told.value).startswith(f"{path}{sentence}")
    path.write_text("{}")
    assert base_model_of(tmp_path) is None


def test_minimal_and_newer_configs_are_read(saved, tmp_path):
    path = saved[0] / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2, "lora_alpha": 4}))
    assert read_config(saved[0]) == LoraConfig(r=2, alpha=4, targets=["q_proj"])
    path.write_text(path.read_text().replace("{", '{"a_feature_of_tomorrow": false, ', 1))
    assert read_config(saved[0]) == LoraConfig(r=2, alpha=4, targets=["q_proj"])
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_config(saved[0])
    shutil.rmtree(saved[0])
    with pytest.raises(ValueError, match="not a PEFT adapter folder"):
        read_config(saved[0])
