from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from minift.data.batch import IGNORE, Batch
from minift.model.linear import Linear
from minift.objectives.sft import SupervisedTokens


class WordModel(nn.Module):
    """Predicts from the last word alone; takes and returns what a `CausalLM` does."""

    def __init__(self):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(9, 4), Linear(4, 9)
        nn.init.normal_(self.lm_head.weight)

    def forward(self, tokens_T, positions_T, cu_seqlens, max_seqlen, *, head):
        assert len(positions_T) == len(tokens_T) == cu_seqlens[-1] and max_seqlen == 3
        return head(self.embed(tokens_T), self.lm_head)


def make_batch(targets):
    tokens = torch.tensor([1, 2, 3, 4, 5])
    positions, borders = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 3, 5], dtype=torch.int32)
    return Batch(tokens, positions, borders, 3, torch.tensor(targets))


def test_is_the_sum_over_supervised_tokens_with_their_number_as_weight():
    torch.manual_seed(0)
    model, objective = WordModel(), SupervisedTokens()
    batch = make_batch([IGNORE, 3, 0, IGNORE, 8])
    result = objective(model, batch)
    logits = model.lm_head(model.embed(batch.tokens_T))
    torch.testing.assert_close(result.loss_sum, F.cross_entropy(logits, batch.targets_T, reduction="sum"))
    assert result.weight == objective.weight(batch) == 3
    assert result.extra == {}


def test_a_batch_without_targets_still_runs_a_backward():
    model = WordModel()
    result = SupervisedTokens()(model, make_batch([IGNORE] * 5))
    result.loss_sum.backward()
    assert result.weight == 0 and result.loss_sum.item() == 0.0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())
