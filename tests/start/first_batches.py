"""A model, and the first steps of some training, for tests of what is found out before it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minift.data.batch import Batch
from minift.data.documents import Encoded
from minift.data.loader import StepLoader
from minift.dist.process import World
from minift.model.decoder import CausalLM
from minift.model.hf import fill_parameters, load_config
from minift.objectives.sft import SupervisedTokens
from minift.quant.weights import QuantWeights

NUM_STEPS = 3


def first_steps(world: World, vocab_size: int = 200) -> list[list[Batch]]:
    """Of documents of 3 to 20 tokens, 8 a step, in several microbatches."""
    generator = np.random.default_rng(0)
    documents = [
        Encoded(generator.integers(0, vocab_size, size, dtype=np.int32), np.arange(size) % 3 > 0)
        for size in generator.integers(3, 21, 40)
    ]
    loader = StepLoader(
        documents, examples_per_step=8, microbatch_tokens=40, rank=world.rank, world_size=world.size, seed=1
    )
    return [microbatches for microbatches, _ in itertools.islice(loader, NUM_STEPS)]


def whole_gradients(folder: Path) -> dict[str, Tensor]:
    """{parameter: mean over the steps of the gradient of their mean losses}, by autograd, all of it. What is stored in
    NF4 is taken dequantised."""
    with torch.device("meta"):
        model = CausalLM(load_config(folder))
    fill_parameters(model, QuantWeights(folder).read)
    objective = SupervisedTokens()
    for microbatches in first_steps(World(0, 1, 0, torch.device("cpu"), "gloo", None)):
        weight = sum(batch.num_targets for batch in microbatches)
        for batch in microbatches:
            (objective(model, batch).loss_sum / weight / NUM_STEPS).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
