"""CausalLM. Oracle: transformers, which built the random weights. Bound in fp32: 2e-5 of the largest logit."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minift.model.block import Block
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.hf import load_model

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def to_v4_spelling(hf: dict[str, Any], use_old_type_key: bool) -> dict[str, Any]:
    """What transformers 4 would have written for a config.json that transformers 5 wrote."""
    hf = dict(hf)
    rope = hf.pop("rope_parameters")
    hf["torch_dtype"] = hf.pop("dtype")
    hf["rope_theta"] = rope.pop("rope_theta")
    if use_old_type_key:
        rope["type"] = rope.pop("rope_type")
    hf["rope_scaling"] = None if "default" in rope.values() else rope
    hf.pop("layer_types", None)
    return hf


def documents_for(data: st.DataObject, vocab_size: int) -> list[Tensor]:
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4), label="document lengths")
    return [torch.randint(vocab_size, (length,)) for length in lengths]


@given(data=st.data())
def test_logits_equal_transformers_from_any_folder(data, hf_settings, hf_model, pack, logits):
    family, drawn = data.draw(hf_settings())
    hf = hf_model(family, drawn)
    documents = documents_for(data, drawn["vocab_size"])

    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder, max_shard_size=data.draw(st.sampled_from(["2KB", "5GB"])))
        path = Path(folder) / "config.json"
        if data.draw(st.booleans(), label="v4 spelling"):
            path.write_text(json.dumps(to_v4_spelling(json.loads(path.read_text()), data.draw(st.booleans()))))
        model = load_model(folder, torch.float32)
    ours = model(*pack(documents), head=logits).split([len(document) for document in documents])

    # Dynamic NTK of transformers remembers the longest sequence so far; shortest first, it never has to remember.
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    theirs = {i: hf(documents[i].unsqueeze(0)).logits[0] for i in order}
    for i in order:
        assert (ours[i] - theirs[i]).abs().max() <= 2e-5 * theirs[i].abs().max()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_transformers(family, tied, tiny_settings, hf_model, to_minift, pack, logits):
    hf = hf_model(family, tiny_settings(family, tie_word_embeddings=tied))
    model = to_minift(hf)
    documents = [torch.randint(29, (length,)) for length in (17, 1, 9)]
    targets = [torch.randint(29, (len(document),)) for document in documents]

    F.cross_entropy(model(*pack(documents), head=logits), torch.cat(targets), reduction="sum").backward()
    for document, target in zip(documents, targets, strict=True):
        F.cross_entropy(hf(document.unsqueeze(0)).logits[0], target, reduction="sum").backward()

    theirs = dict(hf.named_parameters())
    assert {name for name, _ in model.named_parameters()} == theirs.keys()
    for name, parameter in model.named_parameters():
        # Both are fp32; a gradient is a sum over 27 tokens of products through 2 layers, so ~50 roundings of 6e-8.
        error = (parameter.grad - theirs[name].grad).abs().max()
        assert error <= 3e-6 * theirs[name].grad.abs().max() + 1e-7, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trained", ["everything", "one bias or norm at the bottom"])
def test_weights_may_move_before_backward(family, trained, tiny_settings, hf_model, to_minift, pack, logits):
    """The reuse trap: FSDP overwrites a gathered weight after forward and gathers it elsewhere for backward."""
    model = to_minift(hf_model(family, tiny_settings(family)))
    if trained != "everything":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == "model.layers.0.input_layernorm.weight")
    arguments = pack([torch.randint(29, (length,)) for length in (11, 4)])

    def gradients(move_weights: bool) -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(*arguments, head=logits).square().sum()
        if move_weights:
            for parameter in model.parameters():
                values, abandoned = parameter.data.clone(), parameter.data
                parameter.data = values
                abandoned.fill_(float("nan"))
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients(move_weights=False)
    for name, gradient in gradients(move_weights=True).items():
        assert torch.equal(gradient, expected[name]), name


@settings(max_examples=15)
@given(data=st.data())
def test_packing_changes_nothing(data, hf_settings, pack, logits):
    """Also for dynamic NTK, whose frequencies depend on a document's length."""
    family, drawn = data.draw(hf_settings())
    model = CausalLM(ModelConfig.from_hf({"model_type": family, **drawn}))
    model.init_weights(seed=0)
    documents = documents_for(data, drawn["vocab_size"])
    packed = model(*pack(documents), head=logits)
    alone = torch.cat([model(*pack([document]), head=logits) for document in documents])
    assert (packed - alone).abs().max() <= 5e-6 * alone.abs().max()  # matrix products round differently by shape


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_meta_construction_and_names(family, tied, tiny_settings, hf_model):
    hf = hf_model(family, tiny_settings(family, tie_word_embeddings=tied))
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_hf(hf.config.to_dict()))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in hf.named_parameters()}
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert [type(unit) for unit in model.shard_units()] == [Block, Block]


def test_random_weights_depend_on_seed_and_name_only(tiny_settings):
    def weights(seed: int, **overrides: int) -> dict[str, Tensor]:
        hf = {"model_type": "llama", **tiny_settings("llama", **overrides)}
        model = CausalLM(ModelConfig.from_hf(hf))
        model.init_weights(seed)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    shallow, deep, other = weights(1), weights(1, num_hidden_layers=3), weights(2)
    assert all(torch.equal(shallow[name], deep[name]) for name in shallow)
    matrices = [name for name in shallow if shallow[name].ndim == 2]
    assert not any(torch.equal(shallow[name], other[name]) for name in matrices)
    projections = [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in (0, 1) for kind in "kv"]
    assert len({shallow[name].sum().item() for name in projections}) == 4  # one shape, four names
    big = shallow["lm_head.weight"]
    assert abs(big.std().item() - 0.2) < 0.2 * 5 / (2 * big.numel()) ** 0.5  # five standard errors
    assert torch.equal(shallow["model.norm.weight"], torch.ones(16))
    assert torch.equal(shallow["model.layers.0.mlp.up_proj.bias"], torch.zeros(20))


def test_bf16_stays_close_to_fp32(tiny_settings, hf_model, to_minift, pack, logits):
    """No operation falls back to another dtype, and rounding stays rounding: 2^-8 per operation, about 20 in a row."""
    model = to_minift(hf_model("qwen3", tiny_settings("qwen3")))
    arguments = pack([torch.randint(29, (33,))])
    exact = model(*arguments, head=logits)
    rounded = model.bfloat16()(*arguments, head=logits)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().max() <= 20 * 2**-8 * exact.abs().max()
