"""Prefix and prompt tuning: initial values, settings, and what the blocks of a model share.

Values and gradients: tests/peft/test_matrix.py. Files: tests/checkpoint/test_virtual_adapters.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minift.build import ModelSource, build_model
from minift.dist.process import World
from minift.fsdp import ShardPolicy
from minift.generate import generate
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.hf import load_config
from minift.peft.inject import adapter_parameters, init_tensor, inject, named_generator
from minift.peft.prefix import PrefixConfig
from minift.peft.prompt import PromptConfig
from minift.peft.virtual_tokens import VirtualTokensConfig
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.quant.model import load_model
from minift.recompute import RecomputeConfig
from minift.trace import Recorder
from tests.ranks import run_ranks
from tests.tiny import write_model

LLAMA = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
WIDTH = 32  # of the keys of a block


def model_with(config: VirtualTokensConfig, seed: int = 0) -> CausalLM:
    model = CausalLM(ModelConfig.from_hf(LLAMA))
    model.init_weights(seed=0)
    inject(model, config, seed=seed)
    return model


def test_prefixes_start_as_peft_s() -> None:
    """Normal with deviation 1: of 8192 values within 5 standard errors, 1 / sqrt(2 · 8192). Or zero."""
    drawn = adapter_parameters(model_with(PrefixConfig(num_virtual_tokens=64)))
    assert all(parameter.shape == (64, 2, 16) for parameter in drawn.values())
    values = torch.cat([parameter.flatten() for parameter in drawn.values()])
    assert abs(values.std() - 1) < 5 / math.sqrt(2 * len(values)) and abs(values.mean()) < 5 / math.sqrt(len(values))
    assert len({parameter.sum().item() for parameter in drawn.values()}) == 4
    for parameter in adapter_parameters(model_with(PrefixConfig(init="zero"))).values():
        assert not parameter.any()


@pytest.mark.parametrize("init", ["normal", "zero"])
def test_a_projection_starts_as_torch_s_linear_layers(init: str) -> None:
    """As PEFT's do: uniform in ±1/√in, weights and biases; e normal."""
    config = PrefixConfig(num_virtual_tokens=40, projection=True, encoder_hidden_size=81, init=init)
    for name, parameter in adapter_parameters(model_with(config)).items():
        if "embedding" in name:
            assert parameter.shape == (40, WIDTH) and abs(parameter.std() - 1) < 0.1
        elif "prefix_proj" in name and init == "zero":
            assert not parameter.any()
        else:
            bound = 1 / math.sqrt(81 if "prefix_proj" in name else WIDTH)
            # The largest of n uniforms is 10/n of the bound below it except with probability e^-10.
            assert bound * (1 - 10 / parameter.numel()) <= parameter.abs().max() <= bound


def test_blocks_share_the_encoder_and_nothing_else() -> None:
    model = model_with(PrefixConfig(num_virtual_tokens=3, projection=True))
    first, second = (layer.self_attn for layer in model.model.layers)
    assert first.encoder is second.encoder and first.prefix_proj is not second.prefix_proj
    prefixes = [layer.self_attn.prefix() for layer in model.model.layers]
    sum(part.square().sum() for pair in prefixes for part in pair).backward()
    names = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert names == list(adapter_parameters(model))
    assert sum("encoder" in name for name in names) == 3 and sum("prefix_proj" in name for name in names) == 4


def rows_of_vocabulary(prompt: Tensor, embedding: Tensor) -> list[int]:
    """Which rows of the embedding those of the prompt are."""
    return [int((embedding == row).all(dim=1).nonzero().squeeze(1)) for row in prompt]


def test_a_prompt_starts_as_words_drawn_from_the_vocabulary() -> None:
    model = model_with(PromptConfig(num_virtual_tokens=30, init="sample_vocab"))
    embedding = model.model.embed_tokens
    ids = rows_of_vocabulary(embedding.prompt_embeddings, embedding.base.weight)
    assert len(set(ids)) > 15 and max(ids) > 60
    again = model_with(PromptConfig(num_virtual_tokens=30, init="sample_vocab"), seed=1)
    assert rows_of_vocabulary(again.model.embed_tokens.prompt_embeddings, embedding.base.weight) != ids


def prompt_on_rank(world: World, folder: Path, config: PromptConfig, quant: QuantConfig | None) -> Tensor:
    built = build_model(
        ModelSource(str(folder)), config, quant=quant, precision=Precision(wire="float32"), policy=ShardPolicy(),
        recompute=RecomputeConfig(), recorder=Recorder(world.rank, world.device), world=world, seed=5,
    )  # fmt: skip
    (prompt,) = (tensor.clone() for _, tensor in built.engine.full_tensors(trainable_only=True))
    return prompt


@pytest.mark.parametrize("quant", [None, QuantConfig()])
@pytest.mark.parametrize("init", [{"init": "sample_vocab"}, {"init": "text", "text": "ab"}])
def test_a_sharded_model_reads_the_same_words_from_the_folder(
    tmp_path: Path, init: dict[str, str], quant: QuantConfig | None
) -> None:
    folder = write_model(tmp_path / "model")
    config = PromptConfig(num_virtual_tokens=7, **init).for_base(str(folder))
    whole = CausalLM(load_config(folder))
    whole.init_weights(seed=0)
    inject(whole, config, seed=5)
    for world_size in (1, 2):
        for prompt in run_ranks(world_size, prompt_on_rank, folder, config, quant):
            assert torch.equal(prompt, whole.model.embed_tokens.prompt_embeddings)


def test_initial_values_of_a_meta_model_need_the_weights() -> None:
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_hf(LLAMA))
    inject(model, PromptConfig(num_virtual_tokens=2))
    asked = []

    def read(name: str, start: int, stop: int) -> Tensor:
        asked.append((name, start, stop))
        return torch.arange(start, stop)

    values = init_tensor(model, "model.embed_tokens.prompt_embeddings", 0, read)
    assert [(name, stop - start, start % 64) for name, start, stop in asked] == [("model.embed_tokens", 64, 0)] * 2
    assert torch.equal(values, torch.stack([torch.arange(start, start + 64).float() for _, start, _ in asked]))


@pytest.mark.parametrize("config", [PrefixConfig(num_virtual_tokens=50), PromptConfig(num_virtual_tokens=50)])
def test_virtual_tokens_take_positions(config: VirtualTokensConfig) -> None:
    """Of 64: 50, a prompt of 5, and 10 new tokens, the last of which is never read."""
    model = model_with(config)
    assert len(generate(model, [[1, 2, 3, 4, 5]], max_new_tokens=10, stop_token_ids=())[0]) == 10
    with pytest.raises(ValueError, match="after the adapter's 50 virtual tokens; with max_new_tokens = 11"):
        generate(model, [[1, 2, 3, 4, 5]], max_new_tokens=11, stop_token_ids=())


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (PrefixConfig, {"num_virtual_tokens": 0}, "num_virtual_tokens is 0; valid: 1 or more"),
        (PrefixConfig, {"targets": ["q_proj"]}, r"targets is \['q_proj'\], but prefix tuning chooses no modules"),
        (PromptConfig, {"exclude": ["q_proj"]}, "exclude is .* but prompt tuning chooses no modules"),
        (PromptConfig, {"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        (PrefixConfig, {"encoder_hidden_size": 4}, "encoder_hidden_size is 4 and projection is False"),
        (PrefixConfig, {"encoder_hidden_size": 0, "projection": True}, "encoder_hidden_size is 0"),
        (PrefixConfig, {"init": "text", "text": "a", "projection": True}, "init is 'text' and projection is True"),
        (PrefixConfig, {"text": "abc"}, "init is 'normal' and text is 'abc'"),
        (PromptConfig, {"init": "text"}, "init is 'text' and text is None; valid: a text with init text"),
        (PromptConfig, {"text": "abc"}, "init is 'sample_vocab' and text is 'abc'"),
        (PromptConfig, {"tokenizer": "folder"}, "tokenizer is 'folder', but init is 'sample_vocab'"),
    ],
)
def test_settings_are_refused(method: type[VirtualTokensConfig], settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**settings)


def test_a_text_without_tokenizer_or_tokens_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    with pytest.raises(ValueError, match="give the tokenizer's"):
        model_with(PromptConfig(init="text", text="a"))
    assert PromptConfig(init="text", text="a").for_base(str(tmp_path)).tokenizer == str(tmp_path)
    assert PromptConfig(init="text", text="a", tokenizer="mine").for_base(str(tmp_path)).tokenizer == "mine"
    assert PromptConfig().for_base(str(tmp_path)) == PromptConfig()


def logits_on_rank(
    world: World, folder: Path, config: PrefixConfig, quant: QuantConfig | None
) -> tuple[Tensor, dict[str, Tensor]]:
    built = build_model(
        ModelSource(str(folder)), config, quant=quant, precision=Precision(wire="float32"), policy=ShardPolicy(),
        recompute=RecomputeConfig(), recorder=Recorder(world.rank, world.device), world=world, seed=5,
    )  # fmt: skip
    with torch.no_grad():
        logits = logits_of(built.module, DOCUMENT)
    return logits, {name: values.clone() for name, values in built.engine.full_tensors(trainable_only=True)}


DOCUMENT = [7, 3, 90, 41, 5, 5, 12]


def logits_of(model: CausalLM, tokens: list[int]) -> Tensor:
    bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
    return model(
        torch.tensor(tokens), torch.arange(len(tokens)), bounds, len(tokens),
        head=lambda hidden_TD, lm_head: lm_head(hidden_TD),
    )  # fmt: skip


@pytest.mark.parametrize("quant", [None, QuantConfig()])
@pytest.mark.parametrize("init", [{"init": "sample_vocab"}, {"init": "text", "text": "abcdef"}])
@torch.no_grad()
def test_prefixes_of_words_are_the_base_that_has_read_them(
    tmp_path: Path, init: dict[str, str], quant: QuantConfig | None
) -> None:
    """Whole in memory, and sharded. 1e-5 of the largest logit: sums in fp32, in another order."""
    folder = write_model(tmp_path / "model", model_type="qwen3", head_dim=8)
    config = PrefixConfig(num_virtual_tokens=9, **init).for_base(str(folder))
    model = load_model(folder, quant, torch.float32)
    words = config.token_ids(model.config.vocab_size, named_generator(5, "prefix"))
    assert len(words) == 9 and len(set(words)) > 5
    expected = logits_of(model, words + DOCUMENT)[9:]
    inject(model, config, seed=5)
    own = adapter_parameters(model)
    assert all(parameter.any() for parameter in own.values())
    ranks = [run_ranks(world_size, logits_on_rank, folder, config, quant) for world_size in (1, 2)]
    for logits in [logits_of(model, DOCUMENT)] + [logits for on_ranks in ranks for logits, _ in on_ranks]:
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    for _, values in [of_rank for on_ranks in ranks for of_rank in on_ranks]:
        assert values.keys() == own.keys()
        assert all((values[name] - own[name]).abs().max() <= 1e-5 * own[name].abs().max() for name in own)
