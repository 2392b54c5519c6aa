"""Keys and values of sequences that are being generated.

    cache = model.new_cache(len(prompts), max_tokens)
    model(prompt_tokens_T, positions_T, cu_seqlens, max_seqlen, head=head, cache=cache)     # prefill, packed
    while ...:                                                                              # one token per sequence
        model(last_tokens_B, torch.tensor(cache.lengths), torch.arange(B + 1), 1, head=head, cache=cache)
        cache.keep(rows_still_running)

**Contract.** Document s of a packed forward *continues row s*: its tokens are written behind the `lengths[s]` tokens
the row holds already, and each attends to the row from its start up to itself. So prefill and decode are the same call,
a prompt may be fed in pieces, and rows of different lengths need no padding. Every row gets exactly one document of at
least one token per forward, in order. The caller passes positions that continue the row (`lengths[s]`, `lengths[s]+1`,
...). `CausalLM.forward` moves `lengths` on when all layers have written. Inference only: call under `torch.no_grad()`.
Where documents begin with virtual tokens (see `decoder`), rows do: a new one holds these, and nothing else knows.

Rows are allocated once, at `max_tokens`; a sliding window masks what it no longer sees but does not free it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minift.model.config import ModelConfig


class KVCache:
    """Per layer a pair of tensors (B, max_tokens, K, E); the first `lengths[b]` tokens of row b are valid.

    `lengths` is a list of host integers: the loop that generates reads tokens on the host anyway.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        self.keys = keys
        self.values = values
        self.lengths = [0] * keys[0].shape[0]

    @classmethod
    def allocate(
        cls, config: ModelConfig, batch_size: int, max_tokens: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVCache:
        """Empty rows for `batch_size` sequences of at most `max_tokens` tokens each, prompt included.

        Takes 2 · num_layers · batch_size · max_tokens · num_kv_heads · head_dim elements.
        """
        shape = (batch_size, max_tokens, config.num_kv_heads, config.head_dim)

        def empty_rows() -> list[Tensor]:
            # Zeros, because a masked position has probability 0 and 0 times an uninitialised NaN is NaN.
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

        return cls(empty_rows(), empty_rows())

    @property
    def max_tokens(self) -> int:
        return self.keys[0].shape[1]

    def begin(self, virtual: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        """Let every row, now empty, begin with the same keys and values (P, K, E): a pair for each layer, or None."""
        for keys, values, pair in zip(self.keys, self.values, virtual, strict=True):
            if pair is not None:
                num_virtual = len(pair[0])
                keys[:, :num_virtual], values[:, :num_virtual] = pair
                self.lengths = [num_virtual] * len(self.lengths)

    def first(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the first row in each layer, (L, K, E) both: what `begin` takes."""
        return [(keys[0], values[0]) for keys, values in zip(self.keys, self.values, strict=True)]

    def part(self, start: int, stop: int) -> KVCache:
        """Rows [start, stop) in the same memory, with `lengths` of their own."""
        part = KVCache([keys[start:stop] for keys in self.keys], [values[start:stop] for values in self.values])
        part.lengths = self.lengths[start:stop]
        return part

    def plan(self, cu_seqlens: Tensor) -> Append:
        """Where the tokens of one forward go. Refuses documents that do not match the rows or do not fit."""
        bounds = cu_seqlens.tolist()
        counts = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
        if len(counts) != len(self.lengths) or min(counts) < 1:
            raise ValueError(
                f"A cache of {len(self.lengths)} rows takes one document of at least one token for each, in order; "
                f"got documents of {counts} tokens."
            )
        for row, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            if length + count > self.max_tokens:
                raise ValueError(
                    f"Row {row} of the KV cache holds {length} tokens and cannot take {count} more: it was allocated "
                    f"for {self.max_tokens}."
                )
        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        slots = [length + i for length, count in zip(self.lengths, counts, strict=True) for i in range(count)]
        lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        rows_T, slots_T, lengths_B = (torch.tensor(x, device=self.keys[0].device) for x in (rows, slots, lengths))
        return Append(self, rows_T, slots_T, lengths_B, lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] is now; rows not named are dropped.

        `rows` needs rows[i] >= i, which any ascending list satisfies; then rows move down in place. Only rows with
        rows[i] != i are copied, so the cheapest way to drop a row is to fill its place with the last one. Memory is
        not given back before the cache itself is.
        """
        moves = [(target, row) for target, row in enumerate(rows) if row != target]
        if any(row < target for target, row in moves):
            raise ValueError(f"rows[i] must be at least i for every i, so that rows can move in place: {list(rows)}.")
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                for target, row in moves:
                    tensor[target, : self.lengths[row]] = tensor[row, : self.lengths[row]]
                tensors[layer] = tensor[: len(rows)]
        self.lengths = [self.lengths[row] for row in rows]


@dataclass(frozen=True)
class Append:
    """One forward's additions to a cache: token t goes to slot `slots_T[t]` of row `rows_T[t]`, in every layer.

    `lengths` (and `lengths_B`, the same on the device) count the tokens of each row with the new ones.
    """

    cache: KVCache
    rows_T: Tensor
    slots_T: Tensor
    lengths_B: Tensor
    lengths: list[int]

    def write(self, layer: int, k_TKE: Tensor, v_TKE: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's keys and values; returns all rows of that layer, the new tokens included."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows_T, self.slots_T] = k_TKE
        values[self.rows_T, self.slots_T] = v_TKE
        return keys, values

    def commit(self) -> None:
        """All layers have written: the new tokens now belong to the rows."""
        self.cache.lengths = self.lengths
