"""Loading and writing folders. Oracle: transformers, which must load what we write and compute the same."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.hf import load_config, load_model, save_model


@pytest.fixture
def model(tiny_settings) -> CausalLM:
    model = CausalLM(ModelConfig.from_hf({"model_type": "llama", **tiny_settings("llama")}))
    model.init_weights(seed=0)
    return model


def write(model: CausalLM, folder: Path, **options: object) -> None:
    tensors = dict(model.named_parameters())
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    save_model(tensors.items(), model.config, folder, specs, **options)


@settings(max_examples=15)
@given(data=st.data())
def test_transformers_loads_what_we_write(data, hf_settings, pack, logits):
    family, drawn = data.draw(hf_settings())
    model = CausalLM(ModelConfig.from_hf({"model_type": family, **drawn}))
    model.init_weights(seed=0)
    tensors = list(model.named_parameters())
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors}
    order = data.draw(st.permutations(tensors))
    seed = data.draw(st.integers(0, 999))
    tokens_T = torch.randint(drawn["vocab_size"], (30,), generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as folder:
        save_model(order, model.config, folder, specs, max_shard_bytes=data.draw(st.sampled_from([2e3, 5e9])))
        theirs, report = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager"
        )
        ours = load_model(folder, torch.float32)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert theirs.dtype == torch.float32  # from config.json
    expected = theirs.eval()(tokens_T.unsqueeze(0)).logits[0]
    error = (model(*pack([tokens_T]), head=logits) - expected).abs().max()
    # Norms of few features can make much of little: as much of our roundings as of theirs.
    their_error = (theirs.double()(tokens_T.unsqueeze(0)).logits[0] - expected).abs().max()
    assert error <= 2e-5 * expected.abs().max() + 8 * their_error
    assert ours.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), model.parameters(), strict=True))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == drawn["tie_word_embeddings"]


def test_shards_and_index(model, tmp_path):
    """Greedy in order, at most the limit (or one tensor), sizes in the index as transformers writes them."""
    write(model, tmp_path, max_shard_bytes=2500)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    parameters = dict(model.named_parameters())
    assert list(index["weight_map"]) == list(parameters)
    assert index["metadata"] == {
        "total_parameters": sum(p.numel() for p in parameters.values()),
        "total_size": sum(4 * p.numel() for p in parameters.values()),
    }
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*files, "model.safetensors.index.json", "config.json"]
    )
    sizes = []
    for file in files:
        tensors = load_file(tmp_path / file)
        assert all(torch.equal(tensors[name], parameters[name]) for name in tensors)
        sizes.append([4 * tensor.numel() for tensor in tensors.values()])
        with safe_open(tmp_path / file, "pt") as library:
            assert library.metadata() == {"format": "pt"}
    assert all(sum(shard) <= 2500 or len(shard) == 1 for shard in sizes)


def test_mixed_dtypes_are_aligned_and_the_bigger_one_is_the_models(model, tmp_path):
    model.to(torch.bfloat16)
    model.model.norm.float()
    write(model, tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    header_bytes = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + header_bytes])
    offsets = [8 + header_bytes + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"]
    assert header["model.norm.weight"]["dtype"] == "F32" and all(offset % 2 == 0 for offset in offsets)
    assert (8 + header_bytes + header["model.norm.weight"]["data_offsets"][0]) % 4 == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_a_stored_copy_of_a_tied_head_is_ignored_and_not_written(tiny_settings, tmp_path):
    config = ModelConfig.from_hf({"model_type": "llama", **tiny_settings("llama", tie_word_embeddings=True)})
    model = CausalLM(config)
    model.init_weights(seed=0)
    tensors = {**dict(model.named_parameters()), "lm_head.weight": model.lm_head.weight}
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    save_model(tensors.items(), config, tmp_path / "a", specs)
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert stored.keys() == tensors.keys() - {"lm_head.weight"}

    extra = {"lm_head.weight": torch.zeros(29, 16), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)}
    save_file(stored | extra, tmp_path / "a" / "model.safetensors")
    loaded = load_model(tmp_path / "a", torch.float32)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_load_casts(model, tmp_path):
    write(model, tmp_path)
    loaded = load_model(tmp_path, torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())


def test_tokenizer_files_are_copied(model, tmp_path):
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md"):
        (source / name).write_text(name)
    write(model, tmp_path / "out", source_folder=source)
    copied = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert copied == {
        "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json",
        "additional_chat_templates/tools.jinja",
    }  # fmt: skip


def test_weights_that_do_not_fit_are_named(model, tmp_path):
    write(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["surplus"] = stored.pop("model.norm.weight")
    stored["lm_head.weight"] = stored["lm_head.weight"].t().contiguous()
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_model(tmp_path, torch.float32)
    problems = "model.norm.weight is missing; surplus has no place in the model; lm_head.weight has shape (16, 29)"
    assert problems in str(error.value)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "bert"}'])
def test_bad_configs(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json"):
        load_config(tmp_path)


def test_tensors_and_specs_must_agree(model, tmp_path):
    specs = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    cases = {
        "not announced": [("c", torch.zeros(2))],
        "came twice": [("a", torch.zeros(2)), ("a", torch.zeros(2))],
        "announced as": [("a", torch.zeros(3))],
        "did not come": [("a", torch.zeros(2))],
    }
    for message, tensors in cases.items():
        with pytest.raises(ValueError, match=message):
            save_model(tensors, model.config, tmp_path, specs)
        assert not list(tmp_path.glob("[!.]*"))  # nothing that looks like a model is left


def test_weights_are_not_overwritten(model, tmp_path):
    write(model, tmp_path)
    with pytest.raises(ValueError, match="has weights already"):
        write(model, tmp_path)
