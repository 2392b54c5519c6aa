"""cross_entropy_ against torch's, in fp64, of the same logits.

Tolerances, with u = 2^-24 and r the range of a row's logits: an exponent x - max is off by r u, exp by 4 u, the sum of
the exponentials (32 in a lane, tails of 31, then 4 * LANES at a time) by another 80 + V / 256 of them. So a probability
is within (2 r + V / 256 + 91) u of itself, and the target's minus one by another u. The loss is as near, and off by
2 u of the logarithm and of itself besides. A thread of the CUDA kernel sums V / 512, and when a larger logit comes it
scales what it has: by exponents off by r u all together, and another 5 u each time, for each of its V / 4096 packs.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minift.ops import cross_entropy as module
from minift.ops.cross_entropy import cross_entropy_

HAS_CUDA_KERNELS = True
U = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The fixtures hold no state between examples.
property_test = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def run(implementation, logits, targets, need_gradient):
    function = module.cross_entropy_reference if implementation == "reference" else cross_entropy_
    return function(logits, targets, need_gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@property_test
@given(
    num_rows=st.integers(1, 5),
    vocab_size=st.one_of(st.integers(1, 150), st.integers(1000, 3000), st.integers(20_000, 40_000)),
    scale=st.sampled_from([0.1, 3.0, 60.0]),
    shift=st.sampled_from([0.0, -500.0, 500.0]),
    seed=st.integers(0, 999),
)
def test_losses_and_gradients_are_the_formula(
    implementation, rounding, dtype, num_rows, vocab_size, scale, shift, seed
):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num_rows, vocab_size, generator=generator) * scale + shift).to(dtype)
    targets = torch.randint(vocab_size, (num_rows,), generator=generator)
    exact_logits = logits.double().requires_grad_()
    exact = F.cross_entropy(exact_logits, targets, reduction="none")
    (exact_gradient,) = torch.autograd.grad(exact.sum(), exact_logits)
    evaluated = run(implementation, logits.clone(), targets, False)
    losses = run(implementation, logits, targets, True)

    assert losses.dtype == torch.float32 and torch.equal(losses, evaluated)
    x, exact = exact_logits.detach(), exact.detach()
    smallest, largest = x.aminmax(dim=1)
    error_N = (2 * (largest - smallest) + vocab_size / 256 + 91) * U
    log_total_N = (x - largest.unsqueeze(1)).logsumexp(1)
    assert ((losses - exact).abs() <= error_N + 2 * U * (log_total_N + exact)).all()
    bound = error_N.unsqueeze(1) * x.softmax(1) + U * F.one_hot(targets, vocab_size)
    assert ((logits.double() - exact_gradient).abs() <= bound + 1.01 * rounding(exact_gradient, dtype)).all()


def test_what_is_not_finite_stays_so(implementation):
    """As torch's: -inf has probability 0; +inf and NaN make their row NaN, and no other."""
    logits = torch.randn(4, 700)
    logits[0, :400], logits[1, 3], logits[2, 699] = -torch.inf, torch.inf, torch.nan
    targets = torch.full((4,), 500)
    expected = F.cross_entropy(logits, targets, reduction="none")
    softmax = logits.softmax(1) - F.one_hot(targets, 700)
    losses = run(implementation, logits, targets, True)
    torch.testing.assert_close(losses, expected, equal_nan=True)
    torch.testing.assert_close(logits, softmax, equal_nan=True)


def test_many_threads_give_the_same_bits(instruction_set, in_threads):
    logits, targets = torch.randn(9, 40_000), torch.randint(40_000, (9,))

    def losses_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        gradient = logits.clone()
        return cross_entropy_(gradient, targets, True), gradient

    one, two, three = in_threads(losses_and_gradient)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three, strict=True))


def test_float64_stays_float64():
    logits, targets = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 4, 2])
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(cross_entropy_(logits, targets, True), expected, rtol=1e-14, atol=0)


def test_wrong_targets_are_refused():
    with pytest.raises(ValueError, match=r"logits are \(2, 5\) but targets \(3,\)"):
        cross_entropy_(torch.randn(2, 5), torch.zeros(3, dtype=torch.int64), True)


@pytest.mark.parametrize("outside", [-1, 70, 2**40])
def test_a_target_outside_the_vocabulary(implementation, outside):
    """Is refused; on CUDA, for which nobody waits, it makes its loss and its row NaN, and no other."""
    logits, targets = torch.randn(3, 70), torch.tensor([0, outside, 69])
    if not implementation.startswith("cuda"):
        with pytest.raises(RuntimeError):
            run(implementation, logits, targets, True)
        return
    losses = run(implementation, logits, targets, True)
    assert losses.isnan().tolist() == [False, True, False]
    assert logits.isnan().all(1).tolist() == logits.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(instruction_set, dtype):
    logits, targets = torch.randn(3, 20).to(dtype), torch.tensor([0, 19, 7])
    torch.library.opcheck(torch.ops.minift.cross_entropy_.default, (logits, targets, True))
