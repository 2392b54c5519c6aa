"""GGUF file -> Hugging Face folder.

    convert_gguf("model.Q4_1.gguf", "model/")

writes config.json, model.safetensors (one tensor in memory at a time), generation_config.json, and the tokenizer (see
gguf_tokenizer.py). The `gguf` package parses the file and dequantizes its blocks; this module knows what the names mean
and undoes the one change of layout llama.cpp makes: for the llama architecture the rows of every query and key
projection are reordered from Hugging Face's "rotate half" pairing (i, i + E/2) to interleaved pairs (2i, 2i + 1).
Left as they are, such weights load without complaint and generate garbage.

Not here: writing GGUF, mixture of experts, split files, and running in a quantized format; weights come out dense.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.gguf_tokenizer import VOCABULARY_LISTS, write_tokenizer
from minift.model.hf import TensorSpec, save_model

log = logging.getLogger(__name__)

# general.architecture -> (model_type, class). llama.cpp stores Mistral as llama; a sliding window gives it away.
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
PERMUTED_ARCHITECTURES = frozenset({"llama"})

TOP_LEVEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Llama 3.1+ files carry one divisor per frequency instead of the four numbers that made them; these are the published
# sets (factor, low_freq_factor, high_freq_factor, original context), and the divisors say which one it was.
ROPE_FACTORS_TENSOR = "rope_freqs.weight"
LLAMA3_ROPE_SCALINGS = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert_gguf(path: str | Path, folder: str | Path, dtype: str = "bfloat16") -> None:
    """Convert the GGUF file at `path` into a Hugging Face folder; `dtype` is float32, bfloat16 or float16.

    Raises ValueError for anything that could not be carried over faithfully: another architecture, tensors that are
    missing or have no place in the model, an unknown RoPE scaling or pre-tokenizer, a file that is damaged.
    """
    if dtype not in TORCH_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; valid: {', '.join(TORCH_DTYPES)}.")
    folder = Path(folder)
    reader = _open(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if name not in VOCABULARY_LISTS}
    if fields.get("split.count", 1) > 1:
        raise ValueError(f"{path} is one part of a split GGUF; join the parts first (llama-gguf-split --merge).")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    rope_factors = tensors.pop(ROPE_FACTORS_TENSOR, None)
    names = {name: hf_name(name) for name in tensors}
    hf_config = read_config(fields, tensors, rope_factors)
    specs = {
        names[name]: (TORCH_DTYPES[dtype], tuple(int(size) for size in reversed(tensor.shape)))
        for name, tensor in tensors.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    token_ids = write_tokenizer(reader, folder, max_length=hf_config["max_position_embeddings"])
    config = ModelConfig.from_hf({**hf_config, **token_ids})
    _check_specs(specs, config, path)

    heads_to_unpermute = {}
    if fields["general.architecture"] in PERMUTED_ARCHITECTURES:
        heads_to_unpermute = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
            if num_heads := heads_to_unpermute.get(name.split(".")[-2]):
                weight = unpermute(weight, num_heads)
            # A writable array of its own: some of these are views of the mapped file.
            yield names[name], torch.from_numpy(np.require(weight, np.float32, ["C", "W"])).to(TORCH_DTYPES[dtype])

    save_model(stream(), config, folder, specs)
    generation_config = {name: value for name, value in token_ids.items() if value is not None}
    (folder / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")
    log.info("%s: %d tensors of %s written to %s", path, len(names), fields["general.architecture"], folder)


def _open(path: str | Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:  # a download that broke off, or a page that says why there is no file
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from error


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; ValueError if we have no place for it."""
    match name.split("."):
        case [module, "weight"] if module in TOP_LEVEL_NAMES:
            return f"{TOP_LEVEL_NAMES[module]}.weight"
        case ["blk", layer, module, ("weight" | "bias") as kind] if module in BLOCK_NAMES:
            return f"model.layers.{layer}.{BLOCK_NAMES[module]}.{kind}"
    hint = " (mixture of experts is not supported)" if "_exps" in name else ""
    raise ValueError(f"GGUF tensor {name!r} has no place in a llama, mistral, qwen2 or qwen3 model{hint}.")


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows (or a bias) of a q or k projection from llama.cpp's order back to Hugging Face's.

    Inside a head of E rows llama.cpp's row 2i + j is Hugging Face's row i + j * E/2 (i < E/2, j in {0, 1}).
    Inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    half_head = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, half_head, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def read_config(fields: dict, tensors: dict, rope_factors: gguf.ReaderTensor | None) -> dict:
    """config.json (v4 spelling, without token ids) from GGUF metadata and the tensors that imply a setting."""
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(f"GGUF architecture {arch!r} is not supported; valid: {', '.join(ARCHITECTURES)}.")
    model_type, model_class = ARCHITECTURES[arch]

    def required(key: str):
        if f"{arch}.{key}" not in fields:
            raise ValueError(f"GGUF metadata has no {arch}.{key}; the file is incomplete.")
        return fields[f"{arch}.{key}"]

    sliding_window = fields.get(f"{arch}.attention.sliding_window")
    if arch == "llama" and sliding_window:
        model_type, model_class = "mistral", "MistralForCausalLM"
    elif sliding_window:
        raise ValueError(f"{arch}.attention.sliding_window is {sliding_window}; GGUF does not say for which layers.")

    hidden_size, num_heads = required("embedding_length"), required("attention.head_count")
    head_dim = fields.get(f"{arch}.attention.key_length", hidden_size // num_heads)
    rotary_dim = fields.get(f"{arch}.rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        raise ValueError(
            f"{arch}.rope.dimension_count is {rotary_dim} but heads are {head_dim} wide; "
            "partial rotation is not supported."
        )
    config = {
        "architectures": [model_class],
        "model_type": model_type,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden_size,
        "intermediate_size": required("feed_forward_length"),
        "num_hidden_layers": required("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.get(f"{arch}.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": required("context_length"),
        "initializer_range": 0.02,
        "rms_norm_eps": _shortest_float(required("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest_float(fields.get(f"{arch}.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    if sliding_window:
        config["sliding_window"] = sliding_window
    scaling = _rope_scaling(fields, arch, rope_factors, head_dim, config["rope_theta"])
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _rope_scaling(
    fields: dict, arch: str, rope_factors: gguf.ReaderTensor | None, head_dim: int, theta: float
) -> dict | None:
    kind = fields.get(f"{arch}.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": _shortest_float(fields[f"{arch}.rope.scaling.factor"])}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": _shortest_float(fields[f"{arch}.rope.scaling.factor"]),
            "original_max_position_embeddings": fields[f"{arch}.rope.scaling.original_context_length"],
        }
    if kind != "none":
        raise ValueError(f"{arch}.rope.scaling.type is {kind!r}; valid: none, linear, yarn.")
    if rope_factors is None:
        return None
    divisors = gguf.dequantize(rope_factors.data, rope_factors.tensor_type)
    for factor, low, high, original in LLAMA3_ROPE_SCALINGS:
        expected = llama3_divisors(head_dim, theta, factor, low, high, original)
        if divisors.shape == expected.shape and np.allclose(divisors, expected, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ValueError(f"{ROPE_FACTORS_TENSOR} matches none of the published Llama 3 scalings {LLAMA3_ROPE_SCALINGS}.")


def llama3_divisors(head_dim: int, theta: float, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """What Llama 3.1 divides each of the E/2 frequencies by: 1 for short waves, `factor` for long, smooth between."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _check_specs(specs: dict[str, TensorSpec], config: ModelConfig, path: str | Path) -> None:
    with torch.device("meta"):
        model = CausalLM(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: shape for name, (_, shape) in specs.items()}
    if found != wanted:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(
            f"{path}: {len(wrong)} tensors do not fit its metadata, e.g. {wrong[0]}: the file has "
            f"{found.get(wrong[0], 'none')}, the model needs {wanted.get(wrong[0], 'none')}."
        )


def _shortest_float(value: float) -> float:
    """9.999999747378752e-06 -> 1e-05: GGUF stores fp32, config.json wants the decimal that was meant."""
    return float(str(np.float32(value)))
