"""Documents that begin with virtual tokens, embedded or as keys and values, packed and in a cache.

Oracle: transformers, one document at a time: with `inputs_embeds` that begin with the rows, or with a cache that holds
the keys and values. The stand-ins for adapters are as short as they can be. Bound in fp32: 2e-5 of the largest logit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from minift.model.attention import Attention, Packing, copies_of_shared
from minift.model.decoder import CausalLM
from minift.model.embedding import Embedding
from minift.ops.attention import causal_attention

KINDS = ["embedded", "attended", "both"]


class Prompted(nn.Module):
    def __init__(self, base: Embedding, rows_PD: Tensor) -> None:
        super().__init__()
        self.base, self.rows_PD, self.num_virtual_tokens, self.weight = base, rows_PD, len(rows_PD), base.weight

    def forward(self, tokens_T: Tensor) -> Tensor:
        return torch.cat([self.rows_PD, self.base(tokens_T)])


class Prefixed(nn.Module):
    def __init__(self, base: Attention, pair: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.base, self.pair, self.num_virtual_tokens = base, pair, len(pair[0])

    def prefix(self) -> tuple[Tensor, Tensor]:
        return self.pair

    def forward(self, hidden_TD: Tensor, packing: Packing) -> Tensor:
        return self.base(hidden_TD, packing, None if packing.append else self.pair)


def draw_virtual(hf: PreTrainedModel, kind: str, num_tokens: int) -> tuple[Tensor | None, list[Tensor] | None]:
    """Rows (P, D), and for each layer keys and values (2, P, K, E): leaves."""
    config, rows, pairs = hf.config, None, None
    torch.manual_seed(1)
    if kind != "attended":
        rows = torch.randn(num_tokens, config.hidden_size).requires_grad_()
    if kind != "embedded":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (2, num_tokens, config.num_key_value_heads, head_dim)
        pairs = [torch.randn(shape).requires_grad_() for _ in range(config.num_hidden_layers)]
    return rows, pairs


def begin_documents(model: CausalLM, rows: Tensor | None, pairs: list[Tensor] | None) -> CausalLM:
    if rows is not None:
        model.model.embed_tokens = Prompted(model.model.embed_tokens, rows)
    if pairs is not None:
        for layer, pair in zip(model.model.layers, pairs, strict=True):
            layer.self_attn = Prefixed(layer.self_attn, (pair[0], pair[1]))
    return model


def in_transformers(hf: PreTrainedModel, rows: Tensor | None, pairs: list[Tensor] | None, document: Tensor) -> Tensor:
    """Logits of the tokens of one document."""
    embeds = hf.get_input_embeddings()(document)
    cache = None
    if rows is not None:
        embeds = torch.cat([rows, embeds])
    if pairs is not None:
        cache = DynamicCache([tuple(x.transpose(0, 1).unsqueeze(0) for x in pair) for pair in pairs])
    out = hf(inputs_embeds=embeds.unsqueeze(0), past_key_values=cache, use_cache=cache is not None)
    return out.logits[0, -len(document) :]


def without_dynamic(drawn: dict[str, Any]) -> dict[str, Any]:
    """Dynamic NTK turns a virtual token by the length of its document, and here there is one for all of them."""
    dynamic = drawn["rope_parameters"]["rope_type"] == "dynamic"
    return drawn | ({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}} if dynamic else {})


@given(data=st.data(), kind=st.sampled_from(KINDS), num_virtual=st.integers(1, 9))
def test_logits_are_those_of_transformers(data, kind, num_virtual, hf_settings, hf_model, to_minift, pack, logits):
    family, drawn = data.draw(hf_settings())
    hf = hf_model(family, without_dynamic(drawn))
    documents = [torch.randint(drawn["vocab_size"], (n,)) for n in data.draw(st.lists(st.integers(1, 30), min_size=1))]
    virtual = draw_virtual(hf, kind, num_virtual)
    model = begin_documents(to_minift(hf), *virtual)
    ours = model(*pack(documents), head=logits).split([len(document) for document in documents])
    for document, packed in zip(documents, ours, strict=True):
        theirs = in_transformers(hf, *virtual, document)
        assert (packed - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_gradients_are_those_of_transformers(kind, family, tiny_settings, hf_model, to_minift, pack, logits):
    hf = hf_model(family, tiny_settings(family))
    documents = [torch.randint(29, (length,)) for length in (17, 1, 9)]
    targets = [torch.randint(29, (len(document),)) for document in documents]
    rows, pairs = draw_virtual(hf, kind, 6)
    leaves = [leaf for leaf in (rows, *(pairs or [])) if leaf is not None]

    for document, target in zip(documents, targets, strict=True):
        F.cross_entropy(in_transformers(hf, rows, pairs, document), target, reduction="sum").backward()
    theirs = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    model = begin_documents(to_minift(hf), rows, pairs)
    F.cross_entropy(model(*pack(documents), head=logits), torch.cat(targets), reduction="sum").backward()
    for leaf, expected in zip(leaves, theirs, strict=True):
        # Sums over 27 tokens of products through two layers, in fp32: some 50 roundings of 6e-8.
        assert (leaf.grad - expected).norm() <= 1e-5 * expected.norm()


@given(data=st.data(), kind=st.sampled_from(KINDS), num_virtual=st.integers(1, 9))
def test_a_cache_begins_with_them(data, kind, num_virtual, hf_settings, hf_model, to_minift, pack, logits):
    """Any cut of documents into pieces gives the logits of the whole pack, which has no cache."""
    family, drawn = data.draw(hf_settings())
    hf = hf_model(family, without_dynamic(drawn))
    model = begin_documents(to_minift(hf), *draw_virtual(hf, kind, num_virtual))
    rows = data.draw(st.integers(1, 3))
    documents = torch.randint(drawn["vocab_size"], (rows, 12))
    with torch.no_grad():
        whole = model(*pack(list(documents)), head=logits).view(rows, 12, -1)
        cache = model.new_cache(rows, 12)
        assert cache.lengths == [model.num_virtual_tokens] * rows and cache.max_tokens == cache.lengths[0] + 12
        start = 0
        while start < 12:
            stop = start + data.draw(st.integers(1, 12 - start))
            tokens_T, _, bounds, longest = pack([document[start:stop] for document in documents])
            positions_T = model.num_virtual_tokens + torch.arange(start, stop).repeat(rows)
            new = model(tokens_T, positions_T, bounds, longest, head=logits, cache=cache)
            expected = whole[:, start:stop]
            assert (new.view(expected.shape) - expected).abs().max() <= 2e-5 * whole.abs().max()
            start = stop


@given(
    num_keys=st.integers(0, 5),
    has_queries=st.booleans(),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
def test_copies_for_kernels_that_do_not_share(num_keys, has_queries, lengths):
    num_queries = num_keys if has_queries else 0
    q_bounds, kv_bounds = (torch.tensor([n, *lengths]).cumsum(0).to(torch.int32) for n in (num_queries, num_keys))
    q, k = torch.randn(num_queries + sum(lengths), 2, 4), torch.randn(num_keys + sum(lengths), 1, 4)
    rows, *bounds = copies_of_shared(q_bounds, kv_bounds, num_queries, num_keys, len(k))
    # The compiled op sees the same numbers in the same order either way.
    assert torch.equal(
        causal_attention(q, k[rows], k[rows] + 1, *bounds), causal_attention(q, k, k + 1, q_bounds, kv_bounds)
    )
