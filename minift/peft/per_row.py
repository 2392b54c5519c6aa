"""One batch in which every row has an adapter of its own, or none.

    with per_row(residents, ["sql", None, "tone"]) as rows:
        answers = generate(model, prompts, ..., before_forward=rows.begin)

The product with the base weight is one for all rows; behind it `ops.sgmv` adds to each row its own update. Factors are
kept on top of each other in the weights' dtype, copied when the block begins: a hot swap inside of it is not seen.
Inference only. For adapters that are low-rank updates of projections; others have no form in which rows can be mixed.

Whoever runs a forward says before it which rows its documents continue, as rows leave a batch when they are done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minift.model.linear import LinearBase
from minift.ops.sgmv import sgmv_
from minift.peft.adapter import Adapter
from minift.peft.resident import Residents, is_low_rank


class Rows:
    """What the documents of the next forward are. `adapter_of_row`: an index for each row."""

    def __init__(self, adapter_of_row: Sequence[int]) -> None:
        self._adapter_of_row = adapter_of_row
        self._num_tokens = -1
        self._bounds: tuple[Tensor, Tensor]
        self.choice: Tensor
        """The adapter of each document, int32 on the CPU."""

    def begin(self, rows: Sequence[int], cu_seqlens: Tensor) -> None:
        """The next forward has document i, tokens cu_seqlens[i] to cu_seqlens[i + 1], of row rows[i].

        cu_seqlens: int32 on the CPU, where kernels read it; so nobody has to wait for a GPU."""
        if len(cu_seqlens) != len(rows) + 1:
            raise ValueError(f"{len(cu_seqlens) - 1} documents were announced as {len(rows)} rows; valid: one for each")
        self.choice = torch.tensor([self._adapter_of_row[row] for row in rows], dtype=torch.int32)
        self._num_tokens = int(cu_seqlens[-1])
        self._bounds = (cu_seqlens, torch.arange(len(cu_seqlens), dtype=torch.int32))

    def bounds(self, count: int) -> Tensor:
        """Where documents begin among `count` vectors: all tokens of the forward, or the last of each document, of
        which an LM head sees no others."""
        if count not in (self._num_tokens, len(self.choice) if self._num_tokens >= 0 else -1):
            raise ValueError(f"a forward of {count} tokens was not announced; call `begin` of the rows before it")
        return self._bounds[count != self._num_tokens]


class _PerRow(Adapter):
    """A projection with an update for each document. `updates`: index of an adapter -> its module here."""

    def __init__(self, base: LinearBase, updates: dict[int, nn.Module], num_adapters: int, rows: Rows) -> None:
        super().__init__(base)
        self._rows = rows
        As, Bs, ranks = [], [], [0]
        for index in range(num_adapters):
            for update in updates[index].parts()[1] if index in updates else ():
                As.append(update.scale * update.A.detach())
                Bs.append(update.B.detach().t())
            ranks.append(sum(map(len, As)))
        self._factors = torch.cat(As), torch.cat(Bs)
        self._ranks = torch.tensor([ranks[:-1], ranks[1:]], dtype=torch.int32).t().contiguous()

    def parts(self) -> None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("an adapter for each row is for inference; call the model under torch.no_grad()")
        x_NI = x.reshape(-1, self.in_features)
        out_NO = self.base(x_NI)
        if self._factors[0].dtype != x.dtype:
            self._factors = tuple(factor.to(x.dtype) for factor in self._factors)
        sgmv_(out_NO, x_NI, *self._factors, self._ranks, self._rows.bounds(len(x_NI)), self._rows.choice)
        return out_NO.view(*x.shape[:-1], self.out_features)


@contextmanager
def per_row(residents: Residents, adapter_of_row: Sequence[str | None]) -> Iterator[Rows]:
    """For a block, the model with the adapter adapter_of_row[i] for row i, None for the base alone; then with those
    that were active before. ValueError for an adapter that is not there, or more than low-rank updates."""
    names = list(dict.fromkeys(name for name in adapter_of_row if name is not None))
    chosen: dict[object, dict[int, nn.Module]] = {}
    for index, name in enumerate(names):
        for site, module in residents[name].modules.items():
            if not is_low_rank(module):
                kind = type(module).__name__
                raise ValueError(f"{name} cannot be mixed with others in a batch: {kind} is no low-rank update")
            chosen.setdefault(site, {})[index] = module
    rows = Rows([len(names) if name is None else names.index(name) for name in adapter_of_row])
    with residents.using() as model, torch.no_grad():
        # One index more than there are names: no adapter.
        residents.put_in_place(
            {site: _PerRow(residents.base(site), updates, len(names) + 1, rows) for site, updates in chosen.items()}
        )
        was_training = model.training
        model.eval()
        try:
            yield rows
        finally:
            model.train(was_training)
