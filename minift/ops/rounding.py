"""Stochastic rounding of fp32 to bf16: up or down at random, so that the mean of the result is the value.

bf16 keeps 8 bits of a number. Of a value between two bf16 neighbours, fp32 knows 16 bits more: f / 2^16 of the way from
the neighbour nearer to zero, and with that probability the value is rounded to the other one. So an update of a
thousandth of the spacing moves one weight in a thousand by a whole spacing, where rounding to nearest would move none.
Gupta et al. 2015, arXiv 1502.02551, section 3; the trick of adding random bits below the cut is as old.

The random bits are a function of (seed, optimizer step, parameter name, element index in the parameter) alone. What a
weight becomes therefore does not depend on the number of ranks, on where shards are cut, on the order of updates or on
the device. They come from SplitMix64 (Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195), whose n-th output is a
hash of seed + n * GAMMA: a generator without state. Each output serves four elements.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# As signed integers, because that is what torch multiplies; it wraps around like an unsigned one.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def stream_key(seed: int, step: int, name: str) -> int:
    """Where the random bits of parameter `name` at `step` begin: 64 bits, as a signed integer."""
    digest = hashlib.blake2b(f"{seed} {step} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def splitmix64(key: int, first: int, last: int, device: torch.device) -> Tensor:
    """Outputs first .. last - 1, counted from 0, of the generator with seed `key`: (last - first,) int64."""
    words = torch.arange(first + 1, last + 1, device=device).mul_(_GAMMA).add_(key)
    words.bitwise_xor_(_shift_right(words, 30)).mul_(_MIX_1)
    words.bitwise_xor_(_shift_right(words, 27)).mul_(_MIX_2)
    return words.bitwise_xor_(_shift_right(words, 31))


def random_bits(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """16 random bits for each of the elements start .. start + count - 1 of a parameter: (count,) int32, below 2^16."""
    first_word = start // 4
    words = splitmix64(key, first_word, -(-(start + count) // 4), device)
    return words.view(torch.uint16)[start - 4 * first_word :][:count].to(torch.int32)


def round_stochastically_(out: Tensor, values: Tensor, bits: Tensor) -> None:
    """out (n,) bf16 = values (n,) fp32, rounded away from zero with the probability that makes the mean exact.

    bits (n,) int32 as `random_bits` gives them; overwritten. What bf16 can represent stays as it is. Infinities become
    NaN, which is as useless for a weight.
    """
    # Sign and magnitude: adding to the bit pattern moves away from zero, and a carry out of the low half is a step.
    rounded = bits.add_(values.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
    # A NaN may have been carried around to zero. 0 * values is NaN for it and zero for every number.
    out.copy_(rounded.add_(values, alpha=0.0))


def _shift_right(words: Tensor, bits: int) -> Tensor:
    """As if unsigned: torch's shift fills up with the sign."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)
