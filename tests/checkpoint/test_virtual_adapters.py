"""Files of prefix and prompt tuning. Oracle: PEFT, which loads what minift wrote, writes what minift loads, and answers
with the same words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from minift.checkpoint.adapters import file_tensors, load_adapter, read_config, save_adapter
from minift.checkpoint.merge import merge_adapter
from minift.generate import generate
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.peft.inject import adapter_parameters, inject
from minift.peft.prefix import PrefixConfig
from minift.peft.prompt import PromptConfig
from minift.peft.virtual_tokens import VirtualTokensConfig
from tests.checkpoint.test_adapters import assert_close_logits
from tests.tiny import write_model, write_tokenizer

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 12, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "tie_word_embeddings": False,
    "eos_token_id": None, "bos_token_id": None, "sliding_window": 7,
}  # fmt: skip
"""More than ten layers, which are not in the order of their names, and a window that the prefix leaves on the way."""
CONFIGS: dict[str, VirtualTokensConfig] = {
    "prefix": PrefixConfig(num_virtual_tokens=3),
    "prefix, zero": PrefixConfig(num_virtual_tokens=9, init="zero"),
    "prefix, words": PrefixConfig(num_virtual_tokens=6, init="sample_vocab"),
    "prefix, projection": PrefixConfig(num_virtual_tokens=3, projection=True, encoder_hidden_size=5),
    "prefix, projection, zero": PrefixConfig(num_virtual_tokens=2, projection=True, init="zero"),
    "prompt": PromptConfig(num_virtual_tokens=4, init="random"),
    "prompt, vocabulary": PromptConfig(num_virtual_tokens=1),
}
TOKENS = torch.arange(13) * 3


def hf_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES)).eval()


def minift_model() -> CausalLM:
    hf = hf_model()
    model = CausalLM(ModelConfig.from_hf(hf.config.to_dict()))
    model.load_state_dict(hf.state_dict())
    return model.eval()


def logits_of(model: CausalLM | peft.PeftModel) -> Tensor:
    """Of the tokens; PEFT gives those of virtual tokens, too, if they are embedded."""
    if not isinstance(model, CausalLM):
        return model(TOKENS[None]).logits[0, -len(TOKENS) :]
    bounds = torch.tensor([0, len(TOKENS)], dtype=torch.int32)
    return model(TOKENS, torch.arange(len(TOKENS)), bounds, len(TOKENS), head=lambda hidden, lm_head: lm_head(hidden))


def adapted_model(config: VirtualTokensConfig) -> CausalLM:
    """With random values in all adapter parameters."""
    model = minift_model()
    inject(model, config)
    torch.manual_seed(1)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def in_peft(config: VirtualTokensConfig, **changes: Any) -> peft.PeftConfig:
    shared = {"task_type": "CAUSAL_LM", "num_virtual_tokens": config.num_virtual_tokens} | changes
    if isinstance(config, PromptConfig):
        return peft.PromptTuningConfig(prompt_tuning_init=config.init.upper(), **shared)
    return peft.PrefixTuningConfig(
        prefix_projection=config.projection, encoder_hidden_size=config.encoder_hidden_size,
        init_weights="zero" if config.init == "zero" else None, **shared,
    )  # fmt: skip


@pytest.mark.parametrize("tells_sizes", [True, False])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_peft_loads_what_minift_wrote(tmp_path: Path, config: VirtualTokensConfig, tells_sizes: bool) -> None:
    model = adapted_model(config)
    save_adapter(tmp_path / "adapter", config, file_tensors(model), model=model if tells_sizes else None)
    theirs = peft.PeftModel.from_pretrained(hf_model(), tmp_path / "adapter").eval()
    assert_close_logits(logits_of(model), logits_of(theirs))
    prompt = TOKENS[:5].tolist()
    expected = theirs.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, 5, dtype=torch.int64), max_new_tokens=12,
        do_sample=False,
    )  # fmt: skip
    answers = generate(model, [prompt, TOKENS.tolist()], max_new_tokens=12, stop_token_ids=())
    assert answers[0] == expected[0, 5:].tolist()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_minift_loads_what_peft_wrote(tmp_path: Path, config: VirtualTokensConfig) -> None:
    theirs = peft.get_peft_model(hf_model(), in_peft(config)).eval()
    theirs.save_pretrained(tmp_path)
    model = minift_model()
    read = load_adapter(model, tmp_path)
    assert type(read) is type(config) and read.num_virtual_tokens == config.num_virtual_tokens
    assert_close_logits(logits_of(model.eval()), logits_of(theirs))


@pytest.mark.parametrize("name", ["prefix", "prefix, words", "prompt"])
def test_training_goes_as_in_peft(tmp_path: Path, name: str) -> None:
    """Twenty steps from the same start have the same losses. Adam divides roundings by their own size where a gradient
    is next to nothing, so they may differ by 1e-4."""
    config, model = CONFIGS[name], minift_model()
    inject(model, config)
    save_adapter(tmp_path / "start", config, file_tensors(model))
    theirs = peft.PeftModel.from_pretrained(hf_model(), tmp_path / "start").eval()
    theirs.prompt_encoder.requires_grad_(True)
    ours, others = losses_of_training(model), losses_of_training(theirs)
    assert ours == pytest.approx(others, rel=1e-4)
    assert ours[-1] < 0.9 * ours[0]


def losses_of_training(model: CausalLM | peft.PeftModel) -> list[float]:
    losses = []
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.02)
    for _ in range(20):
        loss = cross_entropy(logits_of(model)[:-1], TOKENS[1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_loaded_is_written_again(tmp_path: Path, config: VirtualTokensConfig) -> None:
    """Bit for bit; a projection has become what it makes, up to the order of fp32 sums."""
    model, again = adapted_model(config), minift_model()
    save_adapter(tmp_path / "first", config, file_tensors(model))
    read = load_adapter(again, tmp_path / "first")
    assert_close_logits(logits_of(again.eval()), logits_of(model))
    save_adapter(tmp_path / "second", read, file_tensors(again))
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() == {"prompt_embeddings"}
    assert torch.equal(first["prompt_embeddings"], second["prompt_embeddings"])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_files_are_spelled_as_peft_spells_them(tmp_path: Path, config: VirtualTokensConfig) -> None:
    model = adapted_model(config)
    save_adapter(tmp_path / "ours", config, file_tensors(model), base_model="somewhere", model=model)
    theirs = peft.get_peft_model(hf_model(), in_peft(config))
    theirs.peft_config["default"].base_model_name_or_path = "somewhere"
    theirs.save_pretrained(tmp_path / "theirs")
    ours_fields, theirs_fields = (
        json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")
    )
    assert list(ours_fields.items()) == list(theirs_fields.items())

    def header(who: str) -> bytes:
        raw = (tmp_path / who / "adapter_model.safetensors").read_bytes()
        return raw[8 : 8 + int.from_bytes(raw[:8], "little")]

    assert header("ours") == header("theirs")


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("num_virtual_tokens", [3, 17])
def test_initial_values_from_a_text_are_peft_s(tmp_path: Path, num_virtual_tokens: int, adds_bos: bool) -> None:
    vocab_size = write_tokenizer(tmp_path)
    if adds_bos:
        path = tmp_path / "tokenizer.json"
        settings = json.loads(path.read_text())
        special = {"id": "</s>", "ids": [vocab_size - 3], "tokens": ["</s>"]}
        single = [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        settings["post_processor"] = {
            "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {"</s>": special},
        }  # fmt: skip
        path.write_text(json.dumps(settings))
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": "</s>", "add_bos_token": True, "tokenizer_class": "PreTrainedTokenizerFast"})
        )
    sizes = SIZES | {"vocab_size": vocab_size, "num_hidden_layers": 1}
    torch.manual_seed(0)
    hf = MistralForCausalLM(MistralConfig(**sizes))
    model = CausalLM(ModelConfig.from_hf(hf.config.to_dict()))
    model.load_state_dict(hf.state_dict())
    text = "Be brief."
    config = PromptConfig(num_virtual_tokens=num_virtual_tokens, init="text", text=text).for_base(str(tmp_path))
    inject(model, config)
    assert len(AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]) == len(text) + adds_bos
    theirs = peft.get_peft_model(
        hf,
        peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, prompt_tuning_init="TEXT",
            prompt_tuning_init_text=text, tokenizer_name_or_path=str(tmp_path),
        ),
    )  # fmt: skip
    ours = model.model.embed_tokens.prompt_embeddings
    assert torch.equal(ours, theirs.prompt_encoder["default"].embedding.weight)
    assert config.to_peft()["tokenizer_name_or_path"] == str(tmp_path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = PrefixConfig(num_virtual_tokens=3)
    save_adapter(tmp_path / "adapter", config, file_tensors(adapted_model(config)))
    return tmp_path / "adapter"


def test_reading_refuses_wrong_tensors(saved: Path) -> None:
    path = saved / "adapter_model.safetensors"
    whole = load_file(path)["prompt_embeddings"]
    cases = [
        ({"prompt_embeddings": whole[:, :-16]}, r"prompt_embeddings is \(3, 176\), the model needs \(3, 192\)"),
        ({"prompt_embeddings": whole[:2]}, r"prompt_embeddings is \(2, 192\), the model needs \(3, 192\)"),
        ({"prompt_embedding": whole}, "lacks 24 of 24"),
        ({"prompt_embeddings": whole, "more": whole[0]}, "has unexpected 1 of 24 adapter tensors, among them more"),
        ({"prompt_embeddings": whole / 0}, "has a value that is infinite or not a number"),
    ]
    for tensors, message in cases:
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path)
        with pytest.raises(ValueError, match=message):
            load_adapter(minift_model(), saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "sets 'modules_to_save'"),
        ({"num_transformer_submodules": 2}, "sets 'num_transformer_submodules' to 2"),
        ({"num_virtual_tokens": None}, "has no 'num_virtual_tokens'"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ({"a_feature_of_tomorrow": True}, "sets 'a_feature_of_tomorrow'"),
        ({"peft_type": "P_TUNING"}, "peft_type is 'P_TUNING'; valid: LORA"),
    ],
)
def test_reading_names_what_is_not_supported(saved: Path, change: dict[str, Any], message: str) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_config(saved)


def test_writing_refuses_what_is_incomplete(tmp_path: Path) -> None:
    for config in (CONFIGS["prefix"], CONFIGS["prefix, projection"]):
        tensors = file_tensors(adapted_model(config))
        for name in (next(iter(tensors)), list(tensors)[-1]):
            with pytest.raises(ValueError, match="lacks (prefix|encoder)"):
                save_adapter(tmp_path / "adapter", config, {k: t for k, t in tensors.items() if k != name})


@pytest.mark.parametrize("config", [CONFIGS["prefix"], CONFIGS["prompt"]], ids=["prefix", "prompt"])
def test_merging_says_what_to_do_instead(tmp_path: Path, config: VirtualTokensConfig) -> None:
    folder = write_model(tmp_path / "base")
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_hf(json.loads((folder / "config.json").read_text())))
    inject(model, config)
    save_adapter(tmp_path / "adapter", config, file_tensors(model))
    with pytest.raises(ValueError, match="is no weight and cannot be merged; keep it beside the model"):
        merge_adapter(folder, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
