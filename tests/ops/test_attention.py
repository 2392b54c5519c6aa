"""causal_attention and its gradients against the formula with a T x T mask in fp64.

Tolerances, with u = 2^-24. Rounding errors of a sum of n terms add up like a random walk, so it is given
c(n) = 4 + 3 sqrt(n) units u of the sum of absolute terms, where the worst case would be n. A score is such a sum, and
an error in a score is a relative error of its probability, as is u |score| from the subtraction of the maximum or of
lse. The rest is propagated term by term in `exact_attention`: in particular, backward uses `out` as it was rounded, so
the row sum of dout * out is off by up to |dout| times the rounding of out. Results are rounded once (conftest.py).
Kernels that multiply pairs of bf16 also round p and ds to bf16: each term t of the sums over them is then off by up to
2^-8 |t|, by 2^-8 |t| / sqrt(3) in the mean square, so the sum by at most 2^-8 sum |t|, and by 4 * 2^-8 sqrt(sum t^2),
which is 7 standard deviations; the smaller of the two is allowed.

Keys that documents share are given to the formula as a copy in front of each document, and what it says of the copies
is added up.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minift.ops import attention as module
from minift.ops import blocked_attention
from minift.ops.attention import causal_attention

U32 = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "slice of wider rows", "every second row", "slice of a fused projection", "transposed"]
# (queries, keys before the first query) of each document; more than 192 lanes, or 96 rows, take more than one block
DOCUMENTS = st.lists(st.tuples(st.integers(0, 130), st.sampled_from([0, 0, 0, 1, 50])), min_size=1, max_size=3)
SHARED = st.sampled_from([(0, 0), (0, 0), (1, 0), (7, 7), (70, 0), (65, 64), (130, 130)])  # keys, queries of them
# The fixtures hold no state between examples.
property_test = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass
class Inputs:
    """q, k, v, dout and the bounds of documents with (queries, keys before the first query). shared: keys that they
    have in common, queries of these."""

    documents: list[tuple[int, int]]
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    window: int | None = None
    shared: tuple[int, int] = (0, 0)

    def rounds_probabilities(self, implementation: str) -> bool:
        """Whether p and ds are rounded to bf16, to be multiplied in pairs."""
        return implementation == "avx512_bf16" and self.q.dtype == torch.bfloat16

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        queries, keys = [n for n, _ in self.documents], [n + before for n, before in self.documents]
        of_q, of_k = [self.shared[1], *queries], [self.shared[0], *keys]
        return tuple(torch.tensor(x).cumsum(0).to(torch.int32) for x in (of_q, of_k))

    def copied(self) -> tuple[Inputs, Tensor]:
        """The same without sharing: each document with a copy of the shared keys, and which row each key is."""
        num_keys, num_queries = self.shared
        own = torch.arange(num_keys, len(self.k)).split([n + before for n, before in self.documents])
        rows = [torch.arange(num_keys), *(torch.cat([torch.arange(num_keys), keys]) for keys in own)]
        documents = [(num_queries, num_keys - num_queries), *((n, before + num_keys) for n, before in self.documents)]
        row_of_key = torch.cat(rows)
        k, v = self.k[row_of_key], self.v[row_of_key]
        return Inputs(documents, self.q, k, v, self.dout, self.window), row_of_key

    def run(self, implementation: str) -> tuple[Tensor, ...]:
        """out, lse, dq, dk, dv."""
        forward, backward = module._attention, module._attention_backward
        if implementation == "reference":
            forward, backward = blocked_attention.blocked_attention, blocked_attention.blocked_attention_backward
        out, lse = forward(self.q, self.k, self.v, *self.bounds, self.window)
        return out, lse, *backward(self.dout, self.q, self.k, self.v, out, lse, *self.bounds, self.window)


def draw_inputs(
    documents, kv_heads, group, dim, dtype=torch.float32, window=None, shared=(0, 0), seed=0, draw=None
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    draw = draw or (lambda shape: torch.randn(shape, generator=generator).to(dtype))
    tokens = shared[1] + sum(n for n, _ in documents)
    keys = shared[0] + sum(n + before for n, before in documents)
    q, dout = (draw((tokens, kv_heads * group, dim)) for _ in range(2))
    k, v = (draw((keys, kv_heads, dim)) for _ in range(2))
    return Inputs(documents, q, k, v, dout, window, shared)


def sum_error(terms: int) -> float:
    return (4 + 3 * terms**0.5) * U32


def exact_attention(inputs: Inputs, implementation: str, rounding) -> list[tuple[Tensor, Tensor]]:
    """Exact values of out, lse, dq, dk, dv in fp64, each with how far the implementation's may be from them."""
    if inputs.shared[0]:
        return exact_sharing(inputs, implementation, rounding)
    dtype, (tokens, heads, dim), kv_heads = inputs.q.dtype, inputs.q.shape, inputs.k.shape[1]
    q, k, v, dout = (x.detach().double() for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    # One mask for the whole pack: a query sees the keys of its document up to its own, as far back as the window goes.
    query_document = torch.repeat_interleave(torch.tensor([n for n, _ in inputs.documents]))
    key_document = torch.repeat_interleave(torch.tensor([n + before for n, before in inputs.documents]))
    query_bounds, key_bounds = (x.long() for x in inputs.bounds)
    own_key = torch.arange(tokens) + (key_bounds[1:] - query_bounds[1:])[query_document]
    distance = own_key.unsqueeze(1) - torch.arange(len(k))
    hidden = (
        (query_document.unsqueeze(1) != key_document) | (distance < 0) | (distance >= (inputs.window or len(k) + 1))
    )
    most = int((~hidden).sum(1).max()) if tokens else 0
    scale = dim**-0.5

    def over_e(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:  # (H, T, T'), and of absolute values
        return torch.einsum("qhe,khe->hqk", a, b), torch.einsum("qhe,khe->hqk", a.abs(), b.abs())

    def over_keys(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("hqk,khe->qhe", a, b)

    def over_queries(a: Tensor, b: Tensor) -> Tensor:  # and over the heads that share a key head
        return torch.einsum("hqk,qhe->khe", a, b).unflatten(1, (kv_heads, -1)).sum(2)

    def rounded(sum_of_products, p: Tensor, x: Tensor) -> Tensor | float:  # error of that sum as p or ds is rounded
        if not inputs.rounds_probabilities(implementation):
            return 0.0
        each = rounding(p, torch.bfloat16)
        return torch.minimum(sum_of_products(each, x.abs()), 4 * sum_of_products(each**2, x**2).sqrt())

    scores, score_terms = over_e(q, k)
    scores = (scores * scale).masked_fill(hidden, -torch.inf)
    p, lse = scores.softmax(-1), scores.logsumexp(-1, keepdim=True)
    largest = (score_terms * scale).masked_fill(hidden, 0).amax(-1, keepdim=True) if tokens else lse
    lse_error = (sum_error(dim) + 3 * U32) * largest + sum_error(most) + 2 * U32 * lse.abs()
    p_error = 2 * lse_error + 8 * U32  # relative
    out = over_keys(p, v)
    out_error = over_keys(p * (p_error + sum_error(most)), v.abs()) + rounded(over_keys, p, v)
    out_error = out_error + 1.01 * rounding(out, dtype)

    dp, dp_terms = over_e(dout, v)
    delta, delta_terms = ((dout * out).sum(-1).T.unsqueeze(-1), (dout * out).abs().sum(-1).T.unsqueeze(-1))
    delta_error = (dout.abs() * out_error).sum(-1).T.unsqueeze(-1)
    ds = p * (dp - delta)
    ds_error = p_error * ds.abs() + p * (sum_error(dim) * (dp_terms + delta_terms) + delta_error)
    many = most * heads // kv_heads
    dq, dk, dv = over_keys(ds, k) * scale, over_queries(ds, q) * scale, over_queries(p, dout)
    largest_ds = ds.abs() + ds_error
    dq_error = over_keys(ds_error + sum_error(most) * ds.abs(), k.abs()) + rounded(over_keys, largest_ds, k)
    dk_error = over_queries(ds_error + sum_error(many) * ds.abs(), q.abs()) + rounded(over_queries, largest_ds, q)
    dv_error = over_queries(p * (p_error + sum_error(many)), dout.abs()) + rounded(over_queries, p, dout)
    errors = (scale * dq_error, scale * dk_error, dv_error)
    gradients = [(x, error + 1.01 * rounding(x, dtype)) for x, error in zip((dq, dk, dv), errors, strict=True)]
    return [(out, out_error), (lse.squeeze(-1).T, lse_error.squeeze(-1).T), *gradients]


def exact_sharing(inputs: Inputs, implementation: str, rounding) -> list[tuple[Tensor, Tensor]]:
    """Of the copies, with the gradients of all copies of a key added up, and the fp32 rounding of that sum."""
    copied, row_of_key = inputs.copied()
    out, lse, dq, *of_copies = exact_attention(copied, implementation, rounding)
    gradients = []
    for copies, errors in of_copies:
        value, terms, error = (
            torch.zeros(inputs.k.shape, dtype=torch.float64).index_add_(0, row_of_key, x)
            for x in (copies, copies.abs(), errors)
        )
        error += sum_error(len(copied.documents)) * terms + 1.01 * rounding(value, inputs.q.dtype)
        gradients.append((value, error))
    return [out, lse, dq, *gradients]


def assert_exact(results: tuple[Tensor, ...], exact: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    for name, result, (value, error) in zip(("out", "lse", "dq", "dk", "dv"), results, exact, strict=True):
        assert result.dtype == (torch.float32 if name == "lse" else dtype) and result.shape == value.shape
        assert ((result.double() - value).abs() <= error).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
@property_test
@given(
    documents=DOCUMENTS,
    shared=SHARED,
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 7]),
    dim=st.sampled_from([1, 3, 8, 17, 32, 64, 65, 128]),
    window=st.sampled_from([None, 1, 2, 10, 63, 64, 100, 1000]),
    layout=st.sampled_from(LAYOUTS),
    dout_layout=st.sampled_from([*LAYOUTS, "expanded"]),
    scale=st.sampled_from([0.1, 1.0, 6.0]),
    seed=st.integers(0, 999),
)
def test_values_and_gradients_are_the_formula(
    implementation,
    draw_tensor,
    rounding,
    dtype,
    documents,
    shared,
    kv_heads,
    group,
    dim,
    window,
    layout,
    dout_layout,
    scale,
    seed,
):
    generator = torch.Generator().manual_seed(seed)
    inputs = draw_inputs(
        documents,
        kv_heads,
        group,
        dim,
        window=window,
        shared=shared,
        draw=lambda shape: draw_tensor(generator, shape, dtype, layout),
    )
    inputs.q.mul_(scale)
    inputs.dout = draw_tensor(generator, inputs.q.shape, dtype, dout_layout)
    assert_exact(inputs.run(implementation), exact_attention(inputs, implementation, rounding), dtype)


def test_bf16_is_as_exact_as_pytorchs(instruction_set):
    """Its CPU kernel rounds p and ds to bf16 too, and sums the gradients of a key head's query heads in bf16: here they
    are fewer roundings. The mean square errors of the rest are equal up to chance: 2 % for 10^5 elements."""
    inputs = draw_inputs([(300, 0)], kv_heads=2, group=3, dim=64, dtype=torch.bfloat16)

    def sdpa(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        attend = torch.nn.functional.scaled_dot_product_attention
        out = attend(*(x.transpose(0, 1)[None] for x in leaves), is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        return [out.detach(), *torch.autograd.grad(out, leaves, inputs.dout.to(dtype))]

    out, _, *gradients = inputs.run(instruction_set)
    for ours, theirs, exact in zip([out, *gradients], sdpa(torch.bfloat16), sdpa(torch.float64), strict=True):
        assert (ours.double() - exact).norm() <= 1.02 * (theirs.double() - exact).norm()


def test_probabilities_to_the_last_places(implementation):
    """Documents of two keys with the scores s and 0: p = e^s / (1 + e^s). Relative to p: 3 |s| u from two roundings of
    the scaled q and one of the product, 9 u from e^s, the sum, its inverse, the product. Below 2^-126, p may be 0."""
    s = -torch.linspace(0, 100, 4001)
    keys = torch.stack([s, torch.zeros_like(s)], 1).view(-1, 1, 1)
    values = torch.tensor([1.0, 0.0]).repeat(len(s)).view(-1, 1, 1)
    q = torch.ones(len(s), 1, 1)
    p = Inputs([(1, 1)] * len(s), q, keys, values, q).run(implementation)[0].flatten()
    exact = s.double().sigmoid()
    assert ((p.double() - exact).abs() <= (3 * s.abs() + 9) * U32 * exact + torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shared", "window"), [((0, 0), 70), ((0, 0), 700), ((40, 40), None), ((900, 0), 700)])
@pytest.mark.parametrize("documents", [[(1100, 0)], [(2, 0), (1500, 600), (40, 1200)], [(300, 5000), (7, 0)]])
def test_long_documents(implementation, rounding, documents, shared, window, dtype):
    """From 1024 keys on, dq is the sum of several chunks' parts; some chunks are seen by no query."""
    inputs = draw_inputs(documents, kv_heads=1, group=2, dim=5, dtype=dtype, window=window, shared=shared)
    assert_exact(inputs.run(implementation), exact_attention(inputs, implementation, rounding), dtype)


def test_more_heads_than_a_block_has_lanes(implementation, rounding):
    inputs = draw_inputs([(3, 2), (5, 0)], kv_heads=1, group=200, dim=4)
    assert_exact(inputs.run(implementation), exact_attention(inputs, implementation, rounding), torch.float32)


def test_autograd_is_the_same_two_functions(implementation):
    inputs = draw_inputs([(70, 3), (0, 2), (20, 0)], kv_heads=2, group=2, dim=16, window=30, shared=(5, 2))
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    if implementation == "reference":  # which is what float64 takes
        leaves = [x.detach().double().requires_grad_() for x in leaves]
        values = [x.detach() for x in leaves]
        inputs = Inputs(inputs.documents, *values, inputs.dout.double(), inputs.window, inputs.shared)
    out = causal_attention(*leaves, *inputs.bounds, inputs.window)
    results = (out.detach(), *torch.autograd.grad(out, leaves, inputs.dout))
    expected_out, _, *expected_gradients = inputs.run(implementation)
    for result, expected in zip(results, (expected_out, *expected_gradients), strict=True):
        assert torch.equal(result, expected)


def test_gradcheck_in_float64():
    inputs = draw_inputs([(5, 2), (4, 0)], kv_heads=2, group=2, dim=3, shared=(3, 3))
    leaves = [x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, *inputs.bounds, 4), leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_threads_give_the_same_bits(instruction_set, dtype):
    documents = [(2100, 0), (130, 3), (1, 0), (1030, 100)]
    inputs = draw_inputs(documents, kv_heads=2, group=3, dim=16, dtype=dtype, shared=(70, 70))
    num_threads = torch.get_num_threads()
    results = {}
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results[threads] = inputs.run(instruction_set)
    torch.set_num_threads(num_threads)
    for threads in (2, 5):
        assert all(torch.equal(one, many) for one, many in zip(results[1], results[threads], strict=True))


@pytest.mark.parametrize("shared", [(0, 0), (50, 0)])
def test_a_document_has_the_same_bits_in_any_pack(instruction_set, shared):
    packed = draw_inputs([(20, 0), (150, 30), (600, 0)], kv_heads=2, group=2, dim=24, shared=shared)
    out, lse, dq, dk, dv = packed.run(instruction_set)
    queries, num_shared = slice(20, 170), shared[0]
    keys = torch.cat([torch.arange(num_shared), torch.arange(num_shared + 20, num_shared + 200)])
    alone = Inputs(
        [(150, 30)], packed.q[queries], packed.k[keys], packed.v[keys], packed.dout[queries], shared=shared
    )
    expected = (out[queries], lse[queries], dq[queries], dk[keys][num_shared:], dv[keys][num_shared:])
    *results, dk, dv = alone.run(instruction_set)
    for result, value in zip((*results, dk[num_shared:], dv[num_shared:]), expected, strict=True):
        assert torch.equal(result, value)


def test_sharing_gives_the_bits_of_copies(instruction_set):
    """Of everything but the gradients of the shared keys, which are added up in fp32 before they are rounded."""
    inputs = draw_inputs([(150, 30), (10, 0), (600, 700)], 2, 2, 24, dtype=torch.bfloat16, window=90, shared=(50, 30))
    copied, row_of_key = inputs.copied()
    out, lse, dq, dk, dv = inputs.run(instruction_set)
    expected_out, expected_lse, expected_dq, *of_copies = copied.run(instruction_set)
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse) and torch.equal(dq, expected_dq)
    own = row_of_key >= 50
    for result, copies in zip((dk, dv), of_copies, strict=True):
        assert torch.equal(result[row_of_key[own]], copies[own])


def test_what_is_not_finite_stays_visible(implementation):
    """A NaN reaches every query that sees it; scores far from zero do no harm."""
    inputs = draw_inputs([(40, 0)], kv_heads=1, group=1, dim=8)
    for tensor in (inputs.q, inputs.k, inputs.v):
        was, tensor[20, 0, 3] = tensor[20, 0, 3].item(), torch.nan
        out, _, dq, dk, dv = inputs.run(implementation)
        sees = slice(20, 21) if tensor is inputs.q else slice(20, 40)
        assert out[sees].isnan().any(-1).all() and dq[sees].isnan().any(-1).all() and dk.isnan().any()
        tensor[20, 0, 3] = was
    inputs.q *= 1e15
    inputs.k *= 1e15
    assert all(result.isfinite().all() for result in inputs.run(implementation)[:2])


@pytest.mark.parametrize("shared", [(0, 0), (3, 0)])
@pytest.mark.parametrize("documents", [[], [(0, 0)], [(0, 5), (0, 0)]])
def test_nothing_to_do(implementation, documents, shared):
    inputs = draw_inputs(documents, kv_heads=2, group=2, dim=8, shared=shared)
    out, lse, dq, dk, dv = inputs.run(implementation)
    assert out.shape == dq.shape == (0, 4, 8) and lse.shape == (0, 4)
    assert torch.equal(dk, torch.zeros_like(inputs.k)) and torch.equal(dv, torch.zeros_like(inputs.v))


def test_saves_inputs_out_and_lse():
    saved = []
    inputs = draw_inputs([(6, 0)], kv_heads=1, group=2, dim=8)
    leaves, bounds = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)], inputs.bounds
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = causal_attention(*leaves, *bounds)
    lse = blocked_attention.blocked_attention(*(x.detach() for x in leaves), *bounds, None)[1]
    assert {x.data_ptr() for x in (*leaves, out, *bounds)} < {x.data_ptr() for x in saved} and len(saved) == 7
    assert sum(x.shape == lse.shape and torch.allclose(x, lse) for x in saved) == 1


@pytest.mark.parametrize("window", [None, 300])
def test_extra_memory_of_the_reference_is_a_block_of_scores(window, monkeypatch):
    """No tensor of the order tokens² exists: scores never exceed the block budget, whatever the length."""
    largest = 0
    bmm = torch.bmm

    def spy(a: Tensor, b: Tensor) -> Tensor:
        nonlocal largest
        result = bmm(a, b)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(blocked_attention.torch, "bmm", spy)
    draw_inputs([(3000, 0)], kv_heads=1, group=2, dim=2, window=window).run("reference")
    most_keys = 3000 if window is None else window + 96
    assert 0 < largest <= min(blocked_attention.SCORES_PER_BLOCK, 96 * 2 * most_keys)


def refused(match: str, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, window: int | None = None) -> None:
    with pytest.raises(ValueError, match=match):
        causal_attention(q, k, v, bounds, bounds, window)


def test_wrong_arguments_are_refused():
    x, bounds = torch.ones(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    refused(r"k \(4, 2, 8\) torch.float32, v \(4, 1, 8\)", x, x, x[:, :1], bounds)
    refused("all three one dtype", x, x.double(), x.double(), bounds)
    refused(r"expected \(T, H, E\) and \(T', K, E\)", torch.ones(4, 3, 8), x, x, bounds)
    refused("q_bounds is torch.int64", x, x, x, bounds.long())
    refused("window is 0", x, x, x, bounds, window=0)


@pytest.mark.parametrize(
    ("q_bounds", "kv_bounds", "match"),
    [
        ([0, 3], [0, 4], "q_bounds must rise to q's tokens"),
        ([0, 5, 4], [0, 4, 4], "q_bounds must rise"),
        ([0, 4], [-1, 4], "kv_bounds must rise to k's tokens"),
        ([0, 3, 4], [0, 2, 4], "a document has more queries than keys"),
        ([2, 4], [1, 4], "more queries than keys before the first document"),
    ],
)
def test_wrong_bounds_are_refused(instruction_set, q_bounds, kv_bounds, match):
    x = torch.ones(4, 2, 8)
    with pytest.raises(RuntimeError, match=match):
        causal_attention(x, x, x, *(torch.tensor(bounds, dtype=torch.int32) for bounds in (q_bounds, kv_bounds)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(instruction_set, draw_tensor, dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = draw_inputs(
        [(7, 2), (5, 0)],
        2,
        2,
        8,
        shared=(3, 2),
        draw=lambda shape: draw_tensor(generator, shape, dtype, "slice of a fused projection"),
    )
    q, k, v, window = inputs.q, inputs.k, inputs.v, 3
    torch.library.opcheck(torch.ops.minift.attention.default, (q, k, v, *inputs.bounds, window))
    out, lse = torch.ops.minift.attention(q, k, v, *inputs.bounds, window)
    arguments = (inputs.dout, q, k, v, out, lse, *inputs.bounds, window)
    torch.library.opcheck(torch.ops.minift.attention_backward.default, arguments)
