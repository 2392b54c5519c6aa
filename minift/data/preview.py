"""What the model will be trained on, for people to look at before they spend a day on it.

    Console().print(preview(documents, tokenizer, count=3))

Every document is shown as decoded from its token ids, so what is seen is what is trained: special tokens, doubled
BOS, missing EOS. Supervised text is green; where there is no colour (a file, a pipe) it stands in ⟦ ⟧.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.rule import Rule
from rich.text import Text

from minift.data.documents import Documents, Encoded
from minift.data.tokenizer import Tokenizer

SUPERVISED_STYLE = "green"
MAX_TOKENS = 600
"""Tokens shown of one document."""


@dataclass(frozen=True)
class Preview:
    """A rich renderable: `count` documents, evenly spread over all of them."""

    documents: Documents
    tokenizer: Tokenizer
    count: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        brackets = console.color_system is None
        chosen = np.linspace(0, len(self.documents) - 1, min(self.count, len(self.documents))).astype(int)
        for document in (self.documents[i] for i in chosen):
            tokens, targets = f"{len(document)} tokens", f"{document.num_targets} supervised"
            yield Rule(Text(f"{document.source}: {tokens}, {targets}"), align="left")
            yield _marked(document, self.tokenizer, brackets)
        yield Rule("supervised text stands in ⟦ ⟧" if brackets else f"[{SUPERVISED_STYLE}]supervised text is green[/]")


def preview(documents: Documents, tokenizer: Tokenizer, count: int = 3) -> Preview:
    return Preview(documents, tokenizer, count)


def _marked(document: Encoded, tokenizer: Tokenizer, brackets: bool) -> Text:
    """The decoded text, with every run of supervised tokens marked."""
    ids, mask = document.tokens[:MAX_TOKENS].tolist(), document.targets_mask[:MAX_TOKENS].copy()
    mask[0] = False
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    text, decoded = Text(), ""
    for start, stop in zip(borders, borders[1:], strict=False):
        # Decoding a run alone would lose the space that SentencePiece puts before its first word.
        upto = tokenizer.decode(ids[:stop])
        part, decoded = upto[len(decoded) :], upto
        supervised = bool(mask[start])
        if supervised and brackets:
            part = f"⟦{part}⟧"
        text.append(part, style=SUPERVISED_STYLE if supervised else "")
    if len(document) > MAX_TOKENS:
        text.append(f" … {len(document) - MAX_TOKENS} more tokens", style="dim")
    return text
