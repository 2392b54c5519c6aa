"""ICQ's shifts. Oracle: every candidate tried, with the quantiser itself, and its codes counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minift.ops import nf4_shift
from minift.ops.nf4 import quantize_nf4
from minift.ops.nf4_shift import block_shifts, candidates, shifted

KINDS = {
    "normal": torch.randn,
    "uniform": torch.rand,
    "heavy": lambda *shape: torch.randn(*shape) ** 5,
    "shifted": lambda *shape: 3 + 0.1 * torch.randn(*shape),
    "few values": lambda *shape: torch.randint(-2, 3, shape).float(),
    "zero": torch.zeros,
}


def entropy(blocks_BN: Tensor) -> Tensor:
    """Of the codes of each block: bits, (B,) fp64."""
    size = blocks_BN.shape[1]
    codes, _ = quantize_nf4(blocks_BN, size)
    codes_BN = torch.stack((codes >> 4, codes & 15), dim=1).view(-1, size)
    shares_BC = torch.stack([(codes_BN == code).sum(1) for code in range(16)], dim=1).double() / size
    return -(shares_BC * shares_BC.clamp(min=1e-300).log2()).sum(1)


@settings(max_examples=25)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    block_size=st.sampled_from([32, 64, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    exponent=st.integers(-12, 6),
    seed=st.integers(0, 2**31),
)
def test_no_candidate_gives_more_entropy(kind, block_size, dtype, exponent, seed):
    """What was chosen is the first of the best, of the numbers of the paper and 0. So no block is below the median's
    entropy, which is the paper's guarantee, nor below plain NF4's."""
    torch.manual_seed(seed)
    blocks = (KINDS[kind](3, block_size) * 2.0**exponent).to(dtype)
    shifts = block_shifts(blocks, block_size)
    assert shifts.dtype == torch.bfloat16
    tried_FB = candidates(blocks.float().sort(1).values)
    assert len(tried_FB) == 202 and not tried_FB[-1].any()
    entropies_FB = torch.stack([entropy(shifted(blocks, tau_B)) for tau_B in tried_FB])
    found_B = entropy(shifted(blocks, shifts))
    # Entropies of at most 256 elements are equal or differ by more.
    assert (found_B >= entropies_FB.amax(0) - 1e-6).all()
    is_best_FB = entropies_FB >= entropies_FB.amax(0) - 1e-6
    first_B = tried_FB.gather(0, is_best_FB.int().argmax(0, keepdim=True))[0]
    assert torch.equal(shifts, first_B)

    median_B = blocks.float().median(1).values.bfloat16()
    assert torch.equal(tried_FB[100], median_B)
    assert (found_B >= entropy(shifted(blocks, median_B)) - 1e-6).all()
    assert (found_B >= entropy(blocks.float()) - 1e-6).all()


@pytest.mark.parametrize("num_blocks", [1, 15, 16, 37])
def test_the_kernel_finds_what_the_reference_finds(instruction_set, in_threads, num_blocks):
    """To the bit: entropies are whole numbers, and what is counted is compared alike."""
    torch.manual_seed(num_blocks)
    blocks = torch.cat([make(num_blocks, 64) for make in KINDS.values()]).sort(1).values
    arguments = (blocks.t().contiguous(), candidates(blocks), nf4_shift._lacks(64, blocks.device))
    for found in in_threads(lambda: nf4_shift._nf4_shifts(*arguments)):
        assert torch.equal(found, nf4_shift.nf4_shifts_reference(*arguments))


def test_opcheck():
    blocks = torch.randn(3, 32).sort(1).values
    arguments = (blocks.t().contiguous(), candidates(blocks), nf4_shift._lacks(32, blocks.device))
    torch.library.opcheck(torch.ops.minift.nf4_shifts.default, arguments)


def test_candidates_are_spread_as_in_the_paper():
    """λ σ = 0.1 / Φ⁻¹(0.9677083), of the largest distance from the median."""
    block = torch.randn(1, 64).sort(1).values
    reach = 0.1 / 1.848132
    median, size = block.median(), (block - block.median()).abs().max()
    expected = median + size * torch.linspace(-reach, reach, 201)
    assert torch.allclose(candidates(block)[:-1, 0].float(), expected, rtol=2**-8, atol=1e-6)


def test_entropy_of_normal_weights_rises():
    """Of most blocks, and of the average one: 3.69 bits with NF4, of 4."""
    torch.manual_seed(0)
    blocks = torch.randn(512, 64) * 0.02
    plain, found = entropy(blocks), entropy(shifted(blocks, block_shifts(blocks)))
    assert (found > plain + 1e-6).double().mean() > 0.9
    assert found.mean() - plain.mean() > 0.05


def test_a_block_does_not_know_its_neighbours(monkeypatch):
    monkeypatch.setattr(nf4_shift, "_CHUNK_BLOCKS", 4)
    torch.manual_seed(0)
    blocks = torch.randn(11, 64)
    assert torch.equal(block_shifts(blocks)[3:], block_shifts(blocks[3:]))
