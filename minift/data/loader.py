"""From documents to optimizer steps: which examples, in which microbatch, on which rank.

1. Epoch order: a permutation of all documents, a pure function of (seed, epoch).
2. Step: the next `examples_per_step` documents of that order; the last step of an epoch takes what is left.
3. Bins: the step's documents go into `world_size x G` bins of at most `microbatch_tokens`, of nearly equal size.
4. Rank: in each of the G rounds every rank takes one bin and packs it into one `Batch`.

          epoch order   7 2 9 0 | 4 8 1 3 | 6 5            examples_per_step = 4
                        ------+--
          step 0        {7 2 9 0}                          the same set for every world_size
                         /     \
          round 0      {9}    {2 7 0}                      one bin per rank: what is summed over rounds and ranks
                      rank 0   rank 1                      does not depend on how it was cut

Nothing here communicates. Every rank computes the whole assignment from the lengths alone and so agrees with the
others on the number of rounds G, without which a collective would wait for ever. Steps 1 and 2 do not know the number
of ranks: a run that resumes on another machine continues with the same examples.

The loader yields `(microbatches, state)`; `state` says where the *next* step begins, so whoever saves it after a step
resumes exactly there.

Not here: prefetching (packing a step takes a millisecond), streaming from a network, mixing of several sets.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minift.data.batch import Batch, pack
from minift.data.documents import Documents, Encoded


@dataclass(frozen=True)
class LoaderState:
    """Where the next step begins. Integers only: `dataclasses.asdict` gives JSON, `LoaderState(**d)` reads it.

    The last three say what the step number counts; a loader over other documents refuses the state instead of skipping
    or repeating examples in silence. (0 = unknown, not checked.)
    """

    seed: int
    epoch: int = 0
    step_in_epoch: int = 0
    examples_per_step: int = 0
    num_documents: int = 0
    lengths_crc32: int = 0


class StepLoader:
    """Yields `(microbatches, state)` for one optimizer step after another, epoch after epoch, without end.

    documents          anything that can be indexed and gives `Encoded`
    examples_per_step  documents per optimizer step, summed over all ranks (the global batch)
    microbatch_tokens  most tokens in one forward pass of one rank; bounds activation memory
    """

    def __init__(
        self,
        documents: Sequence[Encoded],
        *,
        examples_per_step: int,
        microbatch_tokens: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        assert 0 <= rank < world_size
        self.documents = _as_documents(documents, microbatch_tokens)
        if examples_per_step < 1:
            raise ValueError(f"examples_per_step must be at least 1, got {examples_per_step}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.examples_per_step = examples_per_step
        self.microbatch_tokens = microbatch_tokens
        self.rank, self.world_size = rank, world_size
        self.shuffle = shuffle
        self.lengths_crc32 = zlib.crc32(self.documents.lengths.tobytes())
        self.state = self._state(seed, epoch=0, step_in_epoch=0)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.documents) // self.examples_per_step)

    def load_state(self, state: LoaderState) -> None:
        """Continue where `state` was taken (its seed included). To be called before iterating.

        Raises ValueError when the state counts steps of another size or of another set of documents.
        """
        for name, saved, here in (
            ("examples_per_step", state.examples_per_step, self.examples_per_step),
            ("num_documents", state.num_documents, len(self.documents)),
            ("checksum of document lengths", state.lengths_crc32, self.lengths_crc32),
        ):
            if saved not in (0, here):
                raise ValueError(
                    f"cannot resume: the checkpoint counts steps with {name} = {saved}, this run has {here}. "
                    "Resume with the old value, or start a new run from the checkpoint's weights."
                )
        if not 0 <= state.step_in_epoch < self.steps_per_epoch:
            raise ValueError(
                f"cannot resume at step {state.step_in_epoch} of an epoch: it has only {self.steps_per_epoch} steps"
            )
        self.state = self._state(state.seed, state.epoch, state.step_in_epoch)

    def __iter__(self) -> Iterator[tuple[list[Batch], LoaderState]]:
        state = self.state
        while True:
            order = epoch_order(len(self.documents), state.seed, state.epoch, self.shuffle)
            for step in range(state.step_in_epoch, self.steps_per_epoch):
                chosen = order[step * self.examples_per_step : (step + 1) * self.examples_per_step]
                rounds = assign_bins(self.documents.lengths[chosen], self.microbatch_tokens, self.world_size)
                microbatches = [pack([self.documents[chosen[i]] for i in bins[self.rank]]) for bins in rounds]
                at_end = step + 1 == self.steps_per_epoch
                position = (state.epoch + 1, 0) if at_end else (state.epoch, step + 1)
                self.state = self._state(state.seed, *position)
                yield microbatches, self.state
            state = self.state

    def _state(self, seed: int, epoch: int, step_in_epoch: int) -> LoaderState:
        num_documents = len(self.documents)
        return LoaderState(seed, epoch, step_in_epoch, self.examples_per_step, num_documents, self.lengths_crc32)


def eval_batches(
    documents: Sequence[Encoded], microbatch_tokens: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """Every document exactly once over all ranks, and equally many batches on every rank.

    There is no step to balance, so bins are filled one after the other from the longest document to the shortest (next
    fit): fast for any number of documents, and bins of one round hold documents of like length.
    """
    assert 0 <= rank < world_size
    documents = _as_documents(documents, microbatch_tokens)
    bins: list[list[int]] = []
    room = 0
    for i in np.argsort(-documents.lengths, kind="stable"):
        if documents.lengths[i] > room:
            bins.append([])
            room = microbatch_tokens
        bins[-1].append(i)
        room -= documents.lengths[i]
    for start in range(0, len(bins), world_size):
        mine = bins[start + rank] if start + rank < len(bins) else []
        yield pack([documents[i] for i in mine])


def epoch_order(num_documents: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The order (int64, a permutation) in which an epoch visits its documents.

    Sorts random keys instead of calling a library's shuffle: numpy promises the raw stream of a bit generator to be the
    same in every version (NEP 19), and promises no such thing for `permutation`. A checkpoint must outlive an upgrade.
    """
    if not shuffle:
        return np.arange(num_documents)
    keys = np.random.PCG64([seed, epoch]).random_raw(num_documents)
    return np.argsort(keys, kind="stable")


def assign_bins(lengths: np.ndarray, capacity: int, world_size: int) -> list[list[list[int]]]:
    """Cuts one step into rounds: `result[g][rank]` lists indices into `lengths` (ascending), at most `capacity` tokens.

    Longest processing time first (Graham 1969): from the longest document to the shortest, each goes into the bin
    with the fewest tokens so far; no bin ends above 4/3 of the best possible maximum. The number of rounds is the
    smallest for which this fits (bins packed for fit alone, by first fit decreasing, need 1-2 % fewer rounds, and are
    not balanced). Ties go to the lower index, so the result is a function of the arguments. Bins are
    then dealt out by falling size, because the ranks of one round wait for each other; the fullest round comes first,
    so what does not fit in memory fails at once.

    Cost is tokens, without a quadratic term for attention: in a document of 4096 tokens attention is less than a tenth
    of the work of a 7B model, and memory, which `capacity` is for, is linear.
    """
    assert len(lengths) and lengths.max() <= capacity
    longest_first = np.argsort(-lengths, kind="stable").tolist()
    sizes = lengths.tolist()
    num_rounds = -(-_fewest_bins(lengths, capacity) // world_size)
    while True:
        num_bins = num_rounds * world_size
        heap = [(0, b) for b in range(num_bins)]
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        for i in longest_first:
            load, b = heap[0]
            if load + sizes[i] > capacity:
                break
            bins[b].append(i)
            heapq.heapreplace(heap, (load + sizes[i], b))
        else:
            break
        num_rounds += 1
    fullest_first = [bins[b] for _, b in sorted(heap, key=lambda entry: (-entry[0], entry[1]))]
    return [[sorted(b) for b in fullest_first[g : g + world_size]] for g in range(0, num_bins, world_size)]


def _fewest_bins(lengths: np.ndarray, capacity: int) -> int:
    """A lower bound: by tokens, and because at most k documents longer than capacity / (k + 1) share a bin."""
    by_tokens = -(-int(lengths.sum()) // capacity)
    by_count = (-(-int(np.count_nonzero(lengths * (k + 1) > capacity)) // k) for k in range(1, 9))
    return max(by_tokens, *by_count)


def _as_documents(documents: Sequence[Encoded], microbatch_tokens: int) -> Documents:
    if not isinstance(documents, Documents):
        documents = Documents.from_encoded(documents)
    if len(documents) == 0:
        raise ValueError("no documents: there is nothing to train on")
    longest = int(documents.lengths.argmax())
    if documents.lengths[longest] > microbatch_tokens:
        raise ValueError(
            f"{documents[longest].source}: this document has {documents.lengths[longest]} tokens, more than "
            f"microbatch_tokens = {microbatch_tokens}, and a document is never cut here. Raise microbatch_tokens to "
            f"at least {documents.lengths[longest]}, or lower max_length_tokens (`overlong` says what happens then)."
        )
    return documents
