"""What a model is, read from and written to Hugging Face's `config.json`.

    config = ModelConfig.from_hf(json.loads(path.read_text()))

transformers 5 renamed fields (`torch_dtype` -> `dtype`) and folded `rope_theta` + `rope_scaling` into
`rope_parameters`. `from_hf` reads both spellings and `to_hf` writes both. Keys that do not change the function a model
computes are ignored; a key that would change it and that minift does not implement is refused by name, because a model
that loads without complaint and computes something else is the worst outcome.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from minift.model.rope import RopeConfig

# family -> (architecture, what config.json means when it leaves a key out: transformers' class defaults)
FAMILIES = {
    "llama": ("LlamaForCausalLM", {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}),
    "mistral": (
        "MistralForCausalLM",
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
}
COMMON_DEFAULTS = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False}


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Sizes are numbers of elements, lengths are tokens.

    `sliding_windows` has one entry per layer: None = attend to everything before, w = to the last w tokens, oneself
    included. `o_bias` is the bias of the attention's output projection, `qkv_bias` of its three inputs.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    rope: RopeConfig
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    initializer_range: float

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if self.__dict__[name] < 1:
                raise ValueError(f"{name} is {self.__dict__[name]}; it must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key/value heads evenly: "
                "num_attention_heads must be a multiple of num_key_value_heads."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding pairs dimensions, so it must be even.")
        if len(self.sliding_windows) != self.num_layers:
            raise ValueError(f"{len(self.sliding_windows)} attention types for {self.num_layers} layers.")
        if len(set(self.sliding_windows) - {None}) > 1:
            raise ValueError(f"Sliding windows of different sizes ({self.sliding_windows}) cannot be written to disk.")
        if any(window is not None and window < 1 for window in self.sliding_windows):
            raise ValueError(f"sliding_window must be at least 1 token or null: {self.sliding_windows}.")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """From the dict in config.json, either spelling.

        Raises ValueError for a model this package would compute wrongly, naming the key and what is supported.
        """
        family = hf.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"config.json: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}.")
        architecture, family_defaults = FAMILIES[family]
        _refuse_unsupported(hf, architecture)
        given = {**COMMON_DEFAULTS, **family_defaults, **hf}
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        wrong = [key for key in needed if type(given.get(key)) is not int or given[key] < 1]
        if wrong:
            raise ValueError(f"config.json: {', '.join(wrong)} must be there, each a positive integer.")
        attention_bias = bool(given.get("attention_bias", False)) and family in ("llama", "qwen3")
        eos = given.get("eos_token_id")
        return cls(
            family=family,
            vocab_size=given["vocab_size"],
            hidden_size=given["hidden_size"],
            intermediate_size=given["intermediate_size"],
            num_layers=given["num_hidden_layers"],
            num_heads=given["num_attention_heads"],
            num_kv_heads=given.get("num_key_value_heads") or given["num_attention_heads"],
            head_dim=given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"],
            rms_norm_eps=given["rms_norm_eps"],
            max_position_embeddings=given["max_position_embeddings"],
            tie_word_embeddings=bool(given["tie_word_embeddings"]),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=bool(given.get("mlp_bias", False)) and family == "llama",
            qk_norm=family == "qwen3",
            sliding_windows=_sliding_windows(family, given),
            rope=RopeConfig.from_hf(hf, given["max_position_embeddings"]),
            bos_token_id=given.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,),
            pad_token_id=given.get("pad_token_id"),
            initializer_range=given["initializer_range"],
        )

    def with_biases(self, projections: Iterable[str]) -> ModelConfig:
        """This model with a bias on each of `projections` (q_proj, ...), and on those that share a switch with them.
        ValueError where the family's config.json has no such switch."""
        wanted = set(projections)
        config = replace(
            self,
            qkv_bias=self.qkv_bias or bool(wanted & {"q_proj", "k_proj", "v_proj"}),
            o_bias=self.o_bias or "o_proj" in wanted,
            mlp_bias=self.mlp_bias or bool(wanted & {"gate_proj", "up_proj", "down_proj"}),
        )
        if self.family != "qwen2":  # attention_bias is for all four
            config = replace(config, qkv_bias=config.qkv_bias or config.o_bias, o_bias=config.qkv_bias or config.o_bias)
        stored = ModelConfig.from_hf(config.to_hf())
        kept = all(getattr(stored, name) == getattr(config, name) for name in ("qkv_bias", "o_bias", "mlp_bias"))
        if "lm_head" in wanted or not kept:
            raise ValueError(
                f"a {self.family} model on disk has no place for a bias on some of {', '.join(sorted(wanted))}"
            )
        return config

    def to_hf(self, dtype: str | None = None) -> dict[str, Any]:
        """The dict for config.json in both spellings; `dtype` ("bfloat16") is the weights' on disk, if known."""
        rope_parameters = self.rope.to_hf()
        rope_scaling = {name: value for name, value in rope_parameters.items() if name != "rope_theta"}
        eos: int | list[int] | None = list(self.eos_token_ids)
        if len(self.eos_token_ids) < 2:
            eos = self.eos_token_ids[0] if self.eos_token_ids else None
        hf: dict[str, Any] = {
            "architectures": [FAMILIES[self.family][0]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "initializer_range": self.initializer_range,
            "rms_norm_eps": self.rms_norm_eps,
            "use_cache": True,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_dropout": 0.0,
            "rope_theta": self.rope.theta,
            "rope_scaling": None if self.rope.rope_type == "default" else rope_scaling,
            "rope_parameters": rope_parameters,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_token_id,
        }
        window = next((window for window in self.sliding_windows if window is not None), None)
        if self.family in ("llama", "qwen3"):
            hf["attention_bias"] = self.qkv_bias
        if self.family == "llama":
            hf["mlp_bias"] = self.mlp_bias
        if self.family == "mistral":
            hf["sliding_window"] = window
        if self.family in ("qwen2", "qwen3"):
            is_sliding = [window is not None for window in self.sliding_windows]
            hf["use_sliding_window"] = window is not None
            hf["sliding_window"] = window
            hf["max_window_layers"] = is_sliding.index(True) if window is not None else self.num_layers
            hf["layer_types"] = ["sliding_attention" if sliding else "full_attention" for sliding in is_sliding]
        if dtype is not None:
            hf["torch_dtype"] = hf["dtype"] = dtype
        return hf


def _refuse_unsupported(hf: Mapping[str, Any], architecture: str) -> None:
    architectures = hf.get("architectures") or [architecture]
    if architecture.lower() not in [name.lower() for name in architectures]:
        raise ValueError(
            f"config.json: architectures {architectures} is not supported; for model_type {hf['model_type']!r} "
            f"only {architecture} is."
        )
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported; only 'silu' is.")
    quantization = hf.get("quantization_config") or {}
    kind = [quantization.get(key) for key in ("quant_method", "load_in_4bit", "bnb_4bit_quant_type")]
    if quantization and kind != ["bitsandbytes", True, "nf4"]:
        raise ValueError(
            "config.json: the weights are quantized in a way that is not supported (quantization_config with "
            f"quant_method {kind[0]!r}, load_in_4bit {kind[1]!r}, bnb_4bit_quant_type {kind[2]!r}); supported: NF4 of "
            "bitsandbytes, and unquantized weights, which minift quantizes by itself."
        )
    if hf.get("attention_dropout"):
        raise ValueError(f"config.json: attention_dropout {hf['attention_dropout']} is not supported; set it to 0.0.")


def _sliding_windows(family: str, given: Mapping[str, Any]) -> tuple[int | None, ...]:
    num_layers = given["num_hidden_layers"]
    if family == "llama":
        return (None,) * num_layers
    if family == "mistral":  # transformers ignores layer_types here: one window for all layers
        return (given["sliding_window"],) * num_layers
    window = given["sliding_window"] if given.get("use_sliding_window") else None
    layer_types = given.get("layer_types")
    if layer_types is None:
        first = given["max_window_layers"]
        return tuple(window if layer >= first else None for layer in range(num_layers))
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(
            f"config.json: layer_types {sorted(unknown)} not supported; supported: full_attention, sliding_attention."
        )
    if window is None and "sliding_attention" in layer_types:
        raise ValueError(
            "config.json: layer_types has sliding_attention, but use_sliding_window is false or sliding_window null."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
