"""Seeds: one function for every entry point, so that the same seed means the same run."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(seed: int, rank: int) -> None:
    """Seed Python, NumPy and torch (all devices) for this rank.

    Ranks get different streams, because they see different data (dropout masks must differ); whatever must agree across
    ranks (data order, parameter initialisation) is a function of the seed alone and never of these global generators.
    """
    mixed = (seed * 1_000_003 + rank) % 2**31
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def rng_state() -> dict[str, torch.Tensor]:
    """State of torch's generators on this rank, for a checkpoint: {"cpu": uint8, "cuda": uint8 if there is a GPU}."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
