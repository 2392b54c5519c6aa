"""Paragraphs and tables for README.md and its like."""

from __future__ import annotations

import textwrap

COLUMNS = 160


def paragraph(text: str) -> str:
    """Lines as long as the README's, however they are broken here."""
    return textwrap.fill(" ".join(text.split()), COLUMNS, break_long_words=False, break_on_hyphens=False)


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ("---",) * len(head), *lines))
