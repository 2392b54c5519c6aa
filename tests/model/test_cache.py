"""KVCache and attention against it. Oracle: the same model run on the whole sequence without a cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minift.model.attention import decode_attention
from minift.model.cache import KVCache
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM


@given(data=st.data())
def test_any_schedule_gives_the_logits_of_the_whole_sequence(data, hf_settings, pack, logits):
    """Prefill, decode, prompts in pieces, dropped rows, in any order. Products round differently by shape, so 1e-5."""
    family, drawn = data.draw(hf_settings())
    if drawn["rope_parameters"]["rope_type"] == "dynamic":  # keys are cached with the frequencies of their time
        drawn["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0}
    model = CausalLM(ModelConfig.from_hf({"model_type": family, **drawn}))
    model.init_weights(seed=0)
    batch_size = data.draw(st.integers(1, 4), label="rows")
    sequences = [torch.randint(drawn["vocab_size"], (40,)) for _ in range(batch_size)]
    whole = [model(*pack([sequence]), head=logits) for sequence in sequences]
    cache = KVCache.allocate(model.config, batch_size, 40, torch.float32, "cpu")

    rows = list(range(batch_size))
    with torch.no_grad():
        for _ in range(data.draw(st.integers(1, 4), label="steps")):
            counts = data.draw(
                st.one_of(st.just([1] * len(rows)), st.lists(st.integers(1, 9), min_size=len(rows), max_size=len(rows)))
            )
            spans = [(start, start + count) for start, count in zip(cache.lengths, counts, strict=True)]
            pieces = [sequences[row][start:stop] for row, (start, stop) in zip(rows, spans, strict=True)]
            tokens_T, _, cu_seqlens, max_seqlen = pack(pieces)
            positions_T = torch.cat([torch.arange(start, stop) for start, stop in spans])
            new = model(tokens_T, positions_T, cu_seqlens, max_seqlen, head=logits, cache=cache)
            for row, (start, stop), ours in zip(rows, spans, new.split(counts), strict=True):
                assert (ours - whole[row][start:stop]).abs().max() <= 1e-5 * whole[row].abs().max()
            assert cache.lengths == [stop for _, stop in spans]

            kept = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True).map(sorted))
            if data.draw(st.booleans()) and len(kept) < len(rows) and kept[0] == 0:
                kept[1:] = kept[:0:-1]  # fill holes with the last rows instead
                kept = [row for i, row in enumerate(kept) if row >= i]
            cache.keep(kept)
            rows = [rows[i] for i in kept]


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    window=st.sampled_from([None, 1, 5, 50]),
)
def test_decode_attention_equals_the_formula(lengths, kv_heads, group, window):
    keys, values = torch.randn(2, len(lengths), 20, kv_heads, 8)
    q = torch.randn(len(lengths), kv_heads * group, 8)
    out = decode_attention(q, keys, values, torch.tensor(lengths), window)
    for row, length in enumerate(lengths):
        visible = slice(max(0, length - (window or length)), length)
        k, v = (x[row, visible].double().repeat_interleave(group, dim=1) for x in (keys, values))
        scores = torch.einsum("he,khe->hk", q[row].double(), k) / 8**0.5
        expected = torch.einsum("hk,khe->he", scores.softmax(-1), v)
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def cache(tiny_settings) -> KVCache:
    config = ModelConfig.from_hf({"model_type": "llama", **tiny_settings("llama")})
    return KVCache.allocate(config, batch_size=3, max_tokens=4, dtype=torch.bfloat16, device="cpu")


def test_allocation(cache):
    assert [tuple(tensor.shape) for tensor in cache.keys + cache.values] == [(3, 4, 2, 6)] * 4
    assert cache.max_tokens == 4 and cache.lengths == [0, 0, 0]
    assert {tensor.dtype for tensor in cache.keys + cache.values} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [([0, 1, 2], "3 rows"), ([0, 1, 1, 2], "at least one token"), ([0, 1, 6, 7], "Row 1 .* cannot take 5 more")],
)
def test_documents_that_do_not_fit_are_refused(cache, cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        cache.plan(torch.tensor(cu_seqlens, dtype=torch.int32))


def test_rows_only_move_down(cache):
    with pytest.raises(ValueError, match="at least i"):
        cache.keep([1, 0])


def test_dropping_all_rows(cache):
    cache.keep([])
    assert cache.lengths == []
