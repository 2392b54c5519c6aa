"""Jinja as transformers runs it for chat templates.

    template = compile_template(source)
    text, spans = render(template, {"messages": [...], "add_generation_prompt": False})

Same sandbox, same white space rules, same extras: `{% break %}` and `{% continue %}`, a `tojson` that leaves "<" and
"é" as they are, `raise_exception`, `strftime_now`, and `{% generation %} ... {% endgeneration %}`, which marks what
the assistant wrote. A template is untrusted code from the internet; the sandbox (jinja2 >= 3.1.6) is why it may run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Span = tuple[int, int]


class GenerationTag(Extension):
    """`{% generation %}`: renders its body and appends the body's span, in characters of the whole, to `spans`.

    The start is the length of all text before the block, which only exists while the template is rendered piece by
    piece; `render` collects those pieces in `pieces`.
    """

    tags = {"generation"}

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(generation_tag=self)
        self.pieces: list[str] = []
        self.spans: list[Span] = []

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_record"), [], [], body).set_lineno(line)

    def _record(self, caller: Callable[[], str]) -> str:
        text = caller()
        start = sum(map(len, self.pieces))
        self.spans.append((start, start + len(text)))
        return text


def compile_template(source: str) -> jinja2.Template:
    """Parse `source` in an environment of its own. Raises ValueError for a syntax error, with its line."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"The chat template has a syntax error in line {error.lineno}: {error.message}") from error


def render(template: jinja2.Template, variables: dict[str, Any]) -> tuple[str, list[Span]]:
    """Text and generation spans. Raises ValueError with the template's own message when it refuses the input."""
    tag = template.environment.generation_tag
    tag.pieces, tag.spans = [], []
    try:
        # One append per piece, so that the tag sees all that came before it.
        for piece in template.generate(variables):
            tag.pieces.append(piece)
    except (jinja2.TemplateError, TypeError) as error:  # TypeError: a template adding text to something else
        raise ValueError(f"The chat template refuses this conversation: {error}") from error
    return "".join(tag.pieces), tag.spans


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
