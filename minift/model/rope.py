"""Rotary position embedding: the angle of every packed token, once per forward, for all layers.

`rotary_tables` gives cos and sin (T, E/2) in fp32; `minift.ops.rope.apply_rope` turns each pair (i, i + E/2) of a head
by them. Frequencies are *computed* from the config whenever they are needed and never kept in a buffer: a buffer would
be cast to bf16 along with the model (at position 4000 a bf16 angle is off by several radians) and would be missing
after construction on the meta device.

Papers: RoPE, Su et al. 2021, arXiv 2104.09864, eq. 34 · YaRN, Peng et al. 2023, arXiv 2309.00071, section 3. Types
`linear`, `dynamic` (NTK) and `llama3` have no paper; the formulas are those of transformers' `modeling_rope_utils.py`,
in the same fp32 order of operations, so that frequencies agree to the last bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# rope type -> the fields it uses beyond `theta`
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


@dataclass(frozen=True)
class RopeConfig:
    """The type of rotary embedding and its numbers, named as in transformers' `rope_parameters`.

    Fields a type does not use keep their defaults. Lengths are in tokens: `original_max_position_embeddings` is the
    context the model was trained with before its frequencies were changed.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        for name in ("theta", "factor"):
            if not self.__dict__[name] > 0:
                raise ValueError(f"The {name} of rotary embeddings is {self.__dict__[name]}; it must be positive.")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
        """From a whole config.json: `rope_parameters` (v5), or `rope_theta` + `rope_scaling` (v4), or both agreeing."""
        spellings = {key: hf[key] for key in ("rope_scaling", "rope_parameters") if hf.get(key)}
        parsed = {key: cls._from_dict(key, value, hf, max_position_embeddings) for key, value in spellings.items()}
        if len(set(parsed.values())) > 1:
            raise ValueError(
                "config.json contradicts itself: rope_scaling (transformers 4) and rope_parameters (transformers 5) "
                f"mean different things: {spellings}. Delete one of them."
            )
        return next(iter(parsed.values()), None) or cls._from_dict("rope_scaling", {}, hf, max_position_embeddings)

    @classmethod
    def _from_dict(
        cls, key: str, parameters: Mapping[str, Any], hf: Mapping[str, Any], max_position_embeddings: int
    ) -> RopeConfig:
        rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
        if any(isinstance(value, Mapping) for value in parameters.values()):
            raise ValueError(f"config.json: {key} differs from layer to layer ({sorted(parameters)}): not supported.")
        if rope_type not in ROPE_FIELDS:
            raise ValueError(
                f"config.json: {key} has type {rope_type!r}, not supported; supported: {', '.join(ROPE_FIELDS)}."
            )
        partial = parameters.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
        if partial != 1.0:
            raise ValueError(f"config.json: partial_rotary_factor {partial} is not supported; only 1.0 is.")
        values = {name: parameters[name] for name in ROPE_FIELDS[rope_type] if parameters.get(name) is not None}
        # The key inside, but a top-level one wins, as in transformers.
        original = hf.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
        if rope_type in ("llama3", "yarn"):
            values["original_max_position_embeddings"] = original or max_position_embeddings
        elif rope_type == "dynamic":
            values["original_max_position_embeddings"] = max_position_embeddings
        if rope_type == "yarn" and "factor" not in values:
            values["factor"] = max_position_embeddings / values["original_max_position_embeddings"]
        required = {"linear": ["factor"], "dynamic": ["factor"], "llama3": list(ROPE_FIELDS["llama3"])}
        missing = [name for name in required.get(rope_type, []) if name not in values]
        if missing:
            raise ValueError(f"config.json: {key} of type {rope_type!r} lacks {', '.join(missing)}: {parameters}.")
        return cls(rope_type, parameters.get("rope_theta") or hf.get("rope_theta") or 10000.0, **values)

    def to_hf(self) -> dict[str, Any]:
        """The v5 `rope_parameters` dict."""
        values = {name: self.__dict__[name] for name in ROPE_FIELDS[self.rope_type]}
        used = {name: value for name, value in values.items() if value is not None}
        return {"rope_type": self.rope_type, "rope_theta": self.theta, **used}


def rotary_tables(rope: RopeConfig, head_dim: int, positions_T: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (T, E/2), fp32, of integer positions (T,) counted from 0 in each document; cu_seqlens (S+1,).

    Dynamic NTK stretches the frequencies by the length of the sequence. That length is taken *per document* (its last
    position + 1), so that a document's result never depends on what it was packed with. For one sequence this is what
    transformers does; transformers' padded batches use the longest of the batch for all, and its caches remember the
    longest sequence seen so far.
    """
    scale = 1.0
    if rope.rope_type == "dynamic":
        lengths_S = positions_T[cu_seqlens[1:].long() - 1] + 1
        inv_freq_SR = _dynamic_frequencies(rope, head_dim, lengths_S)
        documents_S = cu_seqlens.diff().long()
        inv_freq = inv_freq_SR.repeat_interleave(documents_S, dim=0, output_size=len(positions_T))
    else:
        inv_freq, scale = inverse_frequencies(rope, head_dim, positions_T.device)
    angles_TR = positions_T.unsqueeze(-1).float() * inv_freq
    return angles_TR.cos() * scale, angles_TR.sin() * scale


def inverse_frequencies(rope: RopeConfig, dim: int, device: torch.device) -> tuple[Tensor, float]:
    """Radians per token (dim/2,) fp32, and the factor on cos and sin, for every type but `dynamic`."""
    inv_freq_R = 1.0 / (rope.theta ** _exponents(dim, device))
    if rope.rope_type == "default":
        return inv_freq_R, 1.0
    if rope.rope_type == "linear":
        return inv_freq_R / rope.factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3_frequencies(rope, inv_freq_R), 1.0
    assert rope.rope_type == "yarn", rope.rope_type
    return _yarn_frequencies(rope, dim, device), _yarn_attention_factor(rope)


def _exponents(dim: int, device: torch.device) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim


def _dynamic_frequencies(rope: RopeConfig, dim: int, lengths_S: Tensor) -> Tensor:
    """NTK-aware: the base grows with the sequence once it is longer than the model was trained for. (S, dim/2)."""
    original = rope.original_max_position_embeddings
    growth_S = (rope.factor * lengths_S.clamp(min=original) / original) - (rope.factor - 1)
    base_S = rope.theta * growth_S ** (dim / (dim - 2))
    return 1.0 / (base_S.unsqueeze(-1) ** _exponents(dim, lengths_S.device))


def _llama3_frequencies(rope: RopeConfig, inv_freq_R: Tensor) -> Tensor:
    """Long waves are divided by `factor`, short ones kept, those between interpolated."""
    original, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    wavelength_R = 2 * math.pi / inv_freq_R
    is_long_R = wavelength_R > original / low
    is_short_R = wavelength_R < original / high
    smooth_R = (original / wavelength_R - low) / (high - low)
    between_R = (1 - smooth_R) * inv_freq_R / rope.factor + smooth_R * inv_freq_R
    return torch.where(is_long_R, inv_freq_R / rope.factor, torch.where(is_short_R, inv_freq_R, between_R))


def _yarn_frequencies(rope: RopeConfig, dim: int, device: torch.device) -> Tensor:
    """NTK by parts: dimensions that turn often are kept, slow ones interpolated, with a linear ramp between."""

    def dimension_turning(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp_R = ((torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    period_R = rope.theta ** _exponents(dim, device)
    kept_R = 1 - ramp_R
    return 1.0 / (rope.factor * period_R) * (1 - kept_R) + 1.0 / period_R * kept_R


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """The temperature, which scales cos and sin; `mscale` and `mscale_all_dim` are DeepSeek's variant of it."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)
