"""One call of every kind of operation, as the engine makes it, in a few sizes: what `calibrate` measures.

In a step every layer's weights are met anew, results of forward are kept, and backward meets them when they have long
left the caches. So weights and what was kept are taken in turn from copies that together are larger than a core's own
caches, and results go where others have not been for as long; the rest is what the operation before has left.
Operations with a backward of their own go through autograd, which is part of what they cost.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minift.fsdp.transport import sum_chunks_
from minift.grad_slot import GradSlot, lay_slot
from minift.model.embedding import Embedding
from minift.objectives.cross_entropy import linear_cross_entropy
from minift.ops.adamw import AdamWStep, Weights, adamw_
from minift.ops.attention import causal_attention
from minift.ops.dropout import DROPOUT_STEPS, dropout
from minift.ops.low_rank import factor_gradients_, from_rank, reads_wide_once, to_rank, to_rank_and_gradients_
from minift.ops.matmul import addmm_, linear, mm
from minift.ops.nf4 import dequantize_nf4, dequantize_nf4_columns
from minift.ops.norm import rms_norm, rms_norm_backward
from minift.ops.rope import apply_rope
from minift.ops.swiglu import swiglu
from minift.ops.updated_swiglu import makes_updates, updated_swiglu, updated_swiglu_backward_
from minift.optim.config import OptimConfig
from minift.optim.moments import BlockwiseMoments
from minift.optim.segments import segments
from minift.optim.shard import FlatShard, ParamRange
from minift.planner import op
from minift.planner.op import Op
from minift.planner.trial import random_weights
from minift.quant.linear import NF4Linear

POOL_BYTES = 24 << 20
TOKENS = (64, 256, 1024)
WIDTHS = ((256, 768), (768, 256), (768, 768), (512, 2048))  # in, out
RANKS = (4, 8, 16, 48)
STEP = AdamWStep(beta1=0.9, beta2=0.999, eps=1e-8, step_size=1e-5, keep=1.0, key=0)


@dataclass(frozen=True)
class Sample:
    """An operation, and a function that does it once."""

    op: Op
    run: Callable[[], object]


def samples(device: torch.device, dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> Iterator[Callable[[], Sample]]:
    """What makes each sample; a sample holds its operands."""
    for dtype, tokens in itertools.product(dtypes, TOKENS):
        make = _Maker(device, dtype, tokens)
        for in_features, out_features in WIDTHS:
            yield from make.products(in_features, out_features)
        for width, rank in itertools.product((256, 1024), RANKS):
            yield from make.low_rank(width, width, rank)
        for width in (256, 768, 2048):
            yield from make.elementwise(width)
        for document_tokens in (tokens, tokens // 4):
            yield from make.attention(document_tokens)
        yield from make.head(vocab_size=4096)
        yield from make.head(vocab_size=1024)
    for dtype in dtypes:
        for in_features, out_features in ((256, 256), (768, 768), (1024, 2048)):
            yield from _Maker(device, dtype, 1).stored(in_features, out_features)
        for elements in (1 << 14, 1 << 18, 1 << 22):
            yield from _Maker(device, dtype, 1).flat(elements)


def _others(num_bytes: int) -> int:
    """How many more tensors of this size it takes for one to have left the caches when its turn comes again."""
    return min(63, POOL_BYTES // max(1, num_bytes))


class _Maker:
    """Samples in one dtype, of so many tokens."""

    def __init__(self, device: torch.device, dtype: str, tokens: int) -> None:
        self.device, self.dtype, self.tokens = device, dtype, tokens
        self._torch_dtype = getattr(torch, dtype)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self._torch_dtype)

    def turns(self, *shape: int) -> Callable[[], Tensor]:
        """One of several tensors, the next at each call."""
        one = self.random(*shape)
        return itertools.cycle([one, *(one.clone() for _ in range(_others(one.nbytes)))]).__next__

    def kept(self, run: Callable[[], Tensor]) -> Callable[[], object]:
        """`run`, whose results are kept for a while."""
        first = run()
        results = deque([first], maxlen=1 + _others(first.nbytes))
        return lambda: results.append(run())

    def backward(self, forward: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> Callable[[], object]:
        """Of `forward`, run before on several copies of its inputs."""
        graphs = []
        for _ in range(1 + _others(sum(x.nbytes for x in inputs))):
            copies = [x.detach().clone().requires_grad_() for x in inputs]
            graphs.append((forward(*copies), copies))
        turn = itertools.cycle(graphs).__next__
        return lambda: torch.autograd.grad(*turn(), dy, retain_graph=True)

    def products(self, I: int, O: int) -> Iterator[Callable[[], Sample]]:  # noqa: E741
        T, dtype = self.tokens, self.dtype

        def sample(kind: str, m: int, k: int, n: int, run: Callable[[], object]) -> Sample:
            return Sample(op.product(kind, dtype, m, k, n), run)

        def forward() -> Sample:
            x, weight = self.random(T, I), self.turns(O, I)
            return sample("linear", T, I, O, self.kept(lambda: linear(x, weight())))

        def input_gradient() -> Sample:
            dy, weight, dx = self.random(T, O), self.turns(O, I), self.random(T, I)
            return sample("input gradient", T, O, I, lambda: addmm_(dx, dy, weight()))

        def weight_gradient() -> Sample:
            dy, x, out = self.random(T, O), self.turns(T, I), self.turns(O, I)
            return sample("weight gradient", O, T, I, lambda: mm(dy.t(), x(), out=out()))

        yield from (forward, input_gradient, weight_gradient)

    def low_rank(self, I: int, O: int, r: int) -> Iterator[Callable[[], Sample]]:  # noqa: E741
        T, dtype = self.tokens, self.dtype

        def sample(kind: str, m: int, k: int, n: int, run: Callable[[], object]) -> Callable[[], Sample]:
            return lambda: Sample(op.product(kind, dtype, m, k, n), run)

        def operands() -> tuple[Tensor, ...]:
            return (self.random(T, I), self.random(T, O), self.random(T, r), self.random(r, I), self.random(O, r))

        x, y, h, A, B = operands()
        dA, dB = torch.empty_like(A), torch.empty_like(B)
        yield sample("x A", T, I, r, lambda: to_rank([x], [A.t()], [0.5]))
        yield sample("h B", T, r, O, lambda: from_rank([h], [B], [1], [None]))
        yield sample("dy B", T, O, r, lambda: to_rank([y], [B], [0.5]))
        yield sample("g A", T, r, I, lambda: from_rank([h], [A.t()], [1], [None]))
        yield sample("dy h", O, T, r, lambda: factor_gradients_([dB], [y], [h]))
        yield sample("g x", r, T, I, lambda: factor_gradients_([dA.t()], [x], [h]))
        if reads_wide_once([(O, r)], self._torch_dtype, self.device.type == "cuda"):
            both = op.both_of_dy(dtype, T, O, r)
            yield lambda: Sample(both, lambda: to_rank_and_gradients_([y], [B], [0.5], [h], [dB]))
        if makes_updates(O, [[r]], self._torch_dtype, self.device.type == "cuda"):
            gate, up, dy = (self.random(T, O) for _ in range(3))  # dy's values change from call to call
            forward = op.updated_swiglu("updated swiglu", dtype, T, O, 2 * r, 3)
            backward = op.updated_swiglu("updated swiglu backward", dtype, T, O, 3 * r, 5)
            yield lambda: Sample(forward, lambda: updated_swiglu(gate, up, [h] * 2, [B] * 2, [1, 1]))
            yield lambda: Sample(
                backward, lambda: updated_swiglu_backward_(dy, gate, up, [h] * 3, [B] * 3, [1, 1, 1])
            )

    def elementwise(self, D: int) -> Iterator[Callable[[], Sample]]:
        T, dtype = self.tokens, self.dtype

        def sample(kind: str, tensors: int, run: Callable[[], object]) -> Callable[[], Sample]:
            return lambda: Sample(op.elementwise(kind, dtype, T * D, tensors), run)

        x, y, weight = self.random(T, D), self.random(T, D), self.random(D)
        rstd = torch.ones(T, device=self.device)
        earlier = self.turns(T, D)
        yield sample("rms norm", 2, self.kept(lambda: rms_norm(x, weight, 1e-5)[0]))
        yield sample("rms norm backward", 3, lambda: rms_norm_backward(y, earlier(), weight, rstd, None, False))
        heads = x.view(T, -1, 64)
        angle = torch.rand(T, 32, device=self.device)
        cos, sin = angle.cos(), angle.sin()
        yield sample("rope", 2, self.kept(lambda: apply_rope(heads, cos, sin)))
        gate, up = x.clone().requires_grad_(), y.clone().requires_grad_()
        yield sample("swiglu", 3, self.kept(lambda: swiglu(gate, up)))
        yield sample("swiglu backward", 5, self.backward(swiglu, (gate, up), y))
        yield sample("add", 3, self.kept(lambda: x + y))
        yield sample("copy", 2, lambda: x.clone())
        yield sample("dropout", 2, lambda: dropout(x, 1, DROPOUT_STEPS // 10))
        yield sample("scale", 2, lambda: torch.mul(x, 0.5))
        yield lambda: Sample(op.elementwise("sum", dtype, T * D, 1), lambda: x.sum(0))
        table = Embedding(4096, D).to(device=self.device, dtype=self._torch_dtype)
        lay_slot(table.weight, GradSlot(torch.zeros_like(table.weight, dtype=torch.float32)))
        tokens = torch.randint(4096, (T,), device=self.device)
        yield sample("embedding", 2, lambda: table(tokens))
        rows = table(tokens)
        yield sample("embedding backward", 2, lambda: rows.backward(y, retain_graph=True))

    def attention(self, document_tokens: int) -> Iterator[Callable[[], Sample]]:
        T, H, K, E = self.tokens, 6, 2, 64
        lengths = [document_tokens] * (T // document_tokens)
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=self.device)
        q, k, v = (self.random(T, heads, E).requires_grad_() for heads in (H, K, K))
        dout = self.random(T, H, E)
        forward, backward = op.attention(self.dtype, T, op.visible_pairs(lengths, None), H, K, E)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return causal_attention(q, k, v, bounds, bounds)

        yield lambda: Sample(forward, self.kept(lambda: attend(q, k, v)))
        yield lambda: Sample(backward, self.backward(attend, (q, k, v), dout))

    def head(self, vocab_size: int) -> Iterator[Callable[[], Sample]]:
        """Loss and gradient of logits that cost nothing else to make: of a head with as few features as possible."""
        hidden = self.random(self.tokens, 8)
        lm_head = nn.Linear(8, vocab_size, bias=False, device=self.device, dtype=self._torch_dtype)
        lm_head.requires_grad_(False)
        targets = torch.randint(vocab_size, (self.tokens,), device=self.device)
        hidden.requires_grad_()
        softmax = op.elementwise("softmax", self.dtype, self.tokens * vocab_size, 2)
        yield lambda: Sample(softmax, lambda: linear_cross_entropy(hidden, lm_head, targets))

    def stored(self, I: int, O: int) -> Iterator[Callable[[], Sample]]:  # noqa: E741
        one = NF4Linear(I, O, False, 64, True, self._torch_dtype, self.device)
        for name, parameter in one.named_parameters():
            parameter.data.copy_(random_weights(name, 0, parameter.numel(), parameter.device))
        copies = [one, *(copy.deepcopy(one) for _ in range(_others(I * O // 2)))]
        weight = itertools.cycle([projection.nf4() for projection in copies]).__next__
        out = self.random(O, I)

        def sample(columns: bool, run: Callable[[], object]) -> Callable[[], Sample]:
            return lambda: Sample(op.dequantize(self.dtype, I * O, 64, nested=True, columns=columns), run)

        yield sample(False, lambda: dequantize_nf4(weight(), out.dtype, 0, I * O, out=out.view(-1)))
        yield sample(True, lambda: dequantize_nf4_columns(weight(), 0, out))

    def flat(self, elements: int) -> Iterator[Callable[[], Sample]]:
        """What happens to shards, in the dtype they are sent in; updates are fp32."""
        wide, sent = torch.randn(elements, device=self.device), self.random(elements)
        yield lambda: Sample(op.cast("float32", self.dtype, elements), lambda: sent.copy_(wide))
        others = self.random(elements)
        moved = elements * (2 * sent.itemsize + 12)
        yield lambda: Sample(Op("sum", self.dtype, moved), lambda: sum_chunks_(wide, sent, [others], False))
        if self.dtype != "float32":
            return
        norm = op.elementwise("square sum", self.dtype, elements, 1)
        yield lambda: Sample(norm, lambda: torch.linalg.vector_norm(wide, dtype=torch.float32).double().square())
        grad = torch.randn(elements, device=self.device)
        state = [torch.zeros(elements, device=self.device) for _ in range(2)]
        update = Op("adamw", self.dtype, 28 * elements)
        upper, lower = torch.zeros_like(wide, dtype=torch.bfloat16), torch.zeros_like(wide, dtype=torch.int16)
        weights = Weights(upper, grad, lower=lower)  # as a bf16 wire has them; as many bytes as fp32 in one piece
        yield lambda: Sample(update, lambda: adamw_(weights, *state, None, STEP))
        shard = FlatShard("x", wide, grad, [ParamRange("x", 0, elements, 0, (elements,))])
        moments = BlockwiseMoments(shard, lambda numel, dtype: torch.zeros(numel, dtype=dtype, device=self.device))
        (segment,) = segments(shard, OptimConfig(), moments.may_merge)
        views = moments.views(segment, slice(0, elements))
        update_8bit = Op("adamw 8bit", self.dtype, 16 * elements)
        yield lambda: Sample(update_8bit, lambda: moments.update(weights, views, None, STEP))
