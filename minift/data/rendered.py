"""A rendered conversation, and its way into token ids with a mask.

Text and assistant spans are characters; the model wants tokens. `encode_rendered` maps one to the other by the offsets
the tokenizer reports, never by searching for token patterns, whose ids depend on their neighbours.

Most templates render one text that is encoded as a whole. Some formats are defined by token ids that no text produces
(ChatGLM3) or encode every turn apart (LLaMA-2). Therefore a rendering is made of pieces, each encoded on its own; one
piece is the common case.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from minift.data.tokenizer import Tokenizer

Span = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """A stretch of text that is encoded on its own.

    kind          "markup": special tokens written out in the text become their ids
                  "plain": they are characters like any others
                  "token": the text is the name of one special token
    trained_from  the model shall learn to produce the text from this character on; None: nothing of it
    """

    text: str
    kind: Literal["markup", "plain", "token"]
    trained_from: int | None = None


@dataclass(frozen=True)
class Rendered:
    """The whole text; what the assistant wrote in it, stop tokens included, as spans in order; and the pieces it is
    made of, which concatenate to the text."""

    text: str
    assistant_spans: list[Span]
    pieces: list[Piece]

    @classmethod
    def from_pieces(cls, pieces: Iterable[Piece]) -> Rendered:
        """Spans follow from `trained_from`; spans that touch become one."""
        pieces = [piece for piece in pieces if piece.text]
        spans: list[Span] = []
        position = 0
        for piece in pieces:
            end = position + len(piece.text)
            if piece.trained_from is not None:
                start = position + piece.trained_from
                touches = bool(spans) and spans[-1][1] == start
                start = spans.pop()[0] if touches else start
                spans.append((start, end))
            position = end
        return cls("".join(piece.text for piece in pieces), spans, pieces)


def encode_rendered(tokenizer: Tokenizer, rendered: Rendered) -> tuple[list[int], list[bool]]:
    """Token ids, and for each whether it is supervised: the model must learn to predict it.

    A token is supervised if its first character lies in an assistant span. So a token that reaches into a span from
    outside is not (after the prompt alone the model would have to produce something else), and a token without a
    character of its own counts where it stands. Raises ValueError for a special token the tokenizer does not have.
    """
    ids: list[int] = []
    starts: list[int] = []
    position = 0
    for piece in rendered.pieces:
        if piece.kind == "token":
            index = tokenizer.token_id(piece.text)
            if index is None:
                raise ValueError(
                    f"The chat template needs the token {piece.text!r}, which this tokenizer does not have."
                )
            ids.append(index)
            starts.append(position)
        else:
            piece_ids, offsets = tokenizer.encode_with_offsets(piece.text, parse_special=piece.kind == "markup")
            ids.extend(piece_ids)
            starts.extend(position + start for start, _ in offsets)
        position += len(piece.text)
    if not rendered.assistant_spans:
        return ids, [False] * len(ids)
    span_starts, span_ends = np.array(rendered.assistant_spans).T
    token_starts = np.array(starts, np.int64)
    span = np.searchsorted(span_starts, token_starts, side="right") - 1  # the last span that starts before the token
    supervised = (span >= 0) & (token_starts < span_ends[span])
    return ids, supervised.tolist()
