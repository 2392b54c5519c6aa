"""Encoded documents: the one form in which training data exists after preparation.

A *document* is what attention may see at once: one conversation, one prompt with its completion, one text. `Documents`
keeps all of them in three flat arrays, so that a million documents cost four memory maps and not a million objects:

    tokens   int32 (all tokens)      5 7 7 2 | 9 1 | 4 4 4 2 | ...
    mask     bool  (all tokens)      . . x x | . x | . . x x | ...      x = supervised: the model must predict it
    offsets  int64 (documents + 1)   0         4     6         10 ...

On disk these are plain `.npy` files in a folder, opened as memory maps: every rank on a machine shares one copy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

_ARRAYS = ("tokens", "mask", "offsets", "sources")


class Source(NamedTuple):
    """Where a document came from: a file and a line in it (in JSON arrays and Parquet: a row), counted from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Encoded:
    """One document.

    tokens        int32 (tokens,)
    targets_mask  bool (tokens,); True at i: the model must *predict* token i from the tokens before it. The entry of
                  token 0 has no effect, for nothing comes before it.
    """

    tokens: np.ndarray
    targets_mask: np.ndarray
    source: Source = Source("", 0)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        return int(np.count_nonzero(self.targets_mask[1:]))


@dataclass
class EncodeReport:
    """What became of the rows: nothing is left out without being counted here.

    formats           file -> format of its rows, and whether it was given or detected
    rows, bad_rows    rows of this split; bad ones were skipped, the first few with reasons in bad_row_examples
    overlong          documents above the limit; overlong_policy says what happened to them,
    lost_documents    ... how many went altogether,
    lost_targets      ... and how many supervised tokens with them or with their ends
    without_targets   documents (or cut-off pieces) left out because nothing in them is supervised
    documents, tokens, targets    what is left; targets = supervised tokens
    """

    max_length_tokens: int
    overlong_policy: str
    formats: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    bad_rows: int = 0
    bad_row_examples: list[str] = field(default_factory=list)
    overlong: int = 0
    lost_documents: int = 0
    lost_targets: int = 0
    without_targets: int = 0
    documents: int = 0
    tokens: int = 0
    targets: int = 0

    def lines(self) -> list[str]:
        """For people, one sentence a line."""
        lines = [f"{file}: {format}" for file, format in self.formats.items()]
        lines.append(
            f"{self.rows} rows -> {self.documents} documents, {self.tokens} tokens, {self.targets} of them supervised"
        )
        if self.bad_rows:
            lines.append(f"{self.bad_rows} bad rows were skipped, the first of them:")
            lines += [f"  {example}" for example in self.bad_row_examples]
        if self.overlong:
            lines.append(
                f"{self.overlong} documents exceed max_length_tokens = {self.max_length_tokens} "
                f"(overlong: {self.overlong_policy}): {self.lost_documents} documents and {self.lost_targets} "
                "supervised tokens were lost"
            )
        if self.without_targets:
            lines.append(f"{self.without_targets} documents were left out: no token in them is supervised")
        return lines


class Documents(Sequence[Encoded]):
    """A read-only sequence of `Encoded`.

    lengths  int64 (documents,), in tokens
    report   what was left out on the way here, if they came from rows
    """

    def __init__(
        self,
        tokens: np.ndarray,
        mask: np.ndarray,
        offsets: np.ndarray,
        sources: np.ndarray,
        files: Sequence[str],
        report: EncodeReport | None = None,
    ) -> None:
        """`sources` is int64 (documents, 2): index into `files`, line."""
        assert len(tokens) == len(mask) == offsets[-1] and len(sources) == len(offsets) - 1
        self.tokens, self.mask, self.offsets = tokens, mask, offsets
        self.sources, self.files = sources, list(files)
        self.report = report
        self.lengths = np.asarray(np.diff(offsets))

    @classmethod
    def from_encoded(cls, documents: Iterable[Encoded], report: EncodeReport | None = None) -> Documents:
        """Copies documents into flat arrays in memory. Raises ValueError for an empty document."""
        tokens, masks, sources, files = [], [], [], {}
        for document in documents:
            if len(document.tokens) == 0 or len(document.tokens) != len(document.targets_mask):
                raise ValueError(
                    f"{document.source}: a document needs at least one token and one mask entry per token, "
                    f"got {len(document.tokens)} tokens and {len(document.targets_mask)} mask entries"
                )
            tokens.append(np.asarray(document.tokens, np.int32))
            masks.append(np.asarray(document.targets_mask, bool))
            file, line = document.source
            sources.append((files.setdefault(file, len(files)), line))
        return cls(
            np.concatenate(tokens or [np.zeros(0, np.int32)]),
            np.concatenate(masks or [np.zeros(0, bool)]),
            np.cumsum([0, *map(len, tokens)], dtype=np.int64),
            np.array(sources, np.int64).reshape(-1, 2),
            list(files),
            report,
        )

    @classmethod
    def open(cls, folder: Path) -> Documents:
        """Maps what `save` wrote; pages are read from disk when they are first used."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        report = EncodeReport(**about["report"]) if about["report"] else None
        return cls(**arrays, files=about["files"], report=report)

    def save(self, folder: Path) -> None:
        for name, array in zip(_ARRAYS, (self.tokens, self.mask, self.offsets, self.sources), strict=True):
            np.save(folder / f"{name}.npy", array)
        about = {"files": self.files, "report": asdict(self.report) if self.report else None}
        (folder / "about.json").write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative indices and IndexError as in any sequence
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        file, line = self.sources[index]
        return Encoded(self.tokens[part], self.mask[part], Source(self.files[file], int(line)))

    def __iter__(self) -> Iterator[Encoded]:
        return (self[i] for i in range(len(self)))
