"""What the engine's benchmarks train: SmolLM2-135M's shapes with random weights, and minift stepping it as its trainer
does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from minift.data.batch import Batch, pack
from minift.data.documents import Encoded
from minift.dist.process import World
from minift.fsdp import ShardPolicy, shard
from minift.fsdp.sharded import connect
from minift.fsdp.transport import Transport
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.objectives.cross_entropy import linear_cross_entropy
from minift.objectives.sft import SupervisedTokens
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.loss_scaler import LossScaler
from minift.peft.adapter import AdapterConfig
from minift.peft.inject import inject
from minift.precision import Precision
from minift.recompute import RecomputeConfig, apply_recompute
from minift.step import train_step
from minift.trace import Recorder

VOCAB_SIZE = 49152
_CONFIG = {
    "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 576, "intermediate_size": 1536,
    "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
    "rope_theta": 100000.0, "tie_word_embeddings": True, "initializer_range": 0.02,
}  # fmt: skip


def make_model(num_layers: int, vocab_size: int = VOCAB_SIZE) -> CausalLM:
    """The same weights in every process."""
    model = CausalLM(ModelConfig.from_hf(_CONFIG | {"num_hidden_layers": num_layers, "vocab_size": vocab_size}))
    model.init_weights(seed=0)
    return model


def loss_of(model: nn.Module, tokens_T: Tensor) -> Tensor:
    """Sum of the losses of every token but the first of one document."""
    inputs_T, targets_T = tokens_T[:-1], tokens_T[1:]
    length = len(inputs_T)
    return model(
        inputs_T,
        torch.arange(length),
        torch.tensor([0, length], dtype=torch.int32),
        length,
        head=lambda hidden_TD, lm_head: linear_cross_entropy(hidden_TD, lm_head, targets_T),
    )


def random_document(num_tokens: int, seed: int, vocab_size: int = VOCAB_SIZE) -> Encoded:
    """Every token supervised."""
    generator = np.random.default_rng(seed)
    return Encoded(generator.integers(vocab_size, size=num_tokens, dtype=np.int32), np.ones(num_tokens, bool))


def random_batch(num_tokens: int, seed: int, vocab_size: int = VOCAB_SIZE) -> Batch:
    """One document."""
    return pack([random_document(num_tokens, seed, vocab_size)])


class Trainee:
    """A model of `num_layers`, sharded over the ranks of `world`, with AdamW: fully trained, or an adapter of it."""

    def __init__(
        self,
        world: World,
        num_layers: int,
        vocab_size: int = VOCAB_SIZE,
        *,
        policy: ShardPolicy | None = None,
        precision: Precision | None = None,
        recompute: RecomputeConfig | None = None,
        adapter: AdapterConfig | None = None,
        connect: Callable[[World], Transport] = connect,
        chunk_tokens: int | None = None,
        lr: float = 1e-4,
    ) -> None:
        precision = precision or Precision()
        self.model = make_model(num_layers, vocab_size)
        self.recorder = Recorder(world.rank, world.device)
        self.objective = SupervisedTokens(chunk_tokens)
        self.scaler = LossScaler() if precision.needs_loss_scaling else None
        if adapter is not None:
            inject(self.model, adapter, seed=0)
        units = self.model.shard_units()
        apply_recompute(self.model, units, recompute or RecomputeConfig(), self.recorder)
        self.engine = shard(self.model, units, world, policy or ShardPolicy(), precision, self.recorder, connect)
        config = OptimConfig(lr=lr, weight_decay=0.0, max_grad_norm=None)
        self.optimizer = AdamW(self.engine.trainable_shards(), config)

    def step(self, microbatches: Sequence[Batch]) -> float:
        """The mean loss over all ranks, before the update."""
        return train_step(
            self.model, self.engine, self.optimizer, self.objective, microbatches,
            lr_scale=1.0, max_grad_norm=None, scaler=self.scaler, recorder=self.recorder,
        ).loss  # fmt: skip
