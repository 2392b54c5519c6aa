"""Dataclasses -> words: the fields with type, default and documentation, for `--help`, error messages and config.yaml.

A field is documented by the string literal under it, or by a line `name: text` in the docstring of its class; inherited
fields are documented in the base class.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml


class Field(NamedTuple):
    """One field below a dataclass. `default`: as typed by a user, "" when required; `section`: the dataclass in it, one
    entry for each variant."""

    key: str
    hint: Any
    default: str
    doc: str
    section: type | None


def walk(cls: type, prefix: str = "") -> Iterator[Field]:
    """Every field below `cls`, depth first, with dotted keys."""
    hints, docs = get_type_hints(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], prefix + field.name
        sections = sections_of(hint)
        default = ""
        if not (is_required(field) or hint in sections):
            value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            default = show(value)
        for section in sections or [None]:
            yield Field(key, hint, default, docs.get(field.name, ""), section)
            if section:
                yield from walk(section, key + ".")


def sections_of(hint: Any) -> list[type]:
    """The dataclasses among the members of a type: more than one where a section has variants."""
    return [member for member in (hint, *get_args(hint)) if dataclasses.is_dataclass(member)]


def variants(sections: list[type]) -> tuple[str, dict[str, type]]:
    """(name of the field, {its value: section}) by which sections are told apart: its type is a Literal of one value.

    The first section is meant where the field is not given.
    """
    hints = [get_type_hints(section) for section in sections]
    for name in hints[0]:
        if all(get_origin(of_one.get(name)) is Literal and len(get_args(of_one[name])) == 1 for of_one in hints):
            return name, {get_args(of_one[name])[0]: section for of_one, section in zip(hints, sections, strict=True)}
    raise TypeError(f"no field tells {', '.join(section.__name__ for section in sections)} apart")


def field_docs(cls: type) -> dict[str, str]:
    """Documentation of each field of `cls`, white space folded."""
    bases = [base for base in cls.__bases__ if dataclasses.is_dataclass(base)]
    docs = {name: doc for base in bases for name, doc in field_docs(base).items()}
    names = [field.name for field in dataclasses.fields(cls)]
    current = None
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        found = re.match(r"`?(\w+)`?: +(.*)", line)
        if found and found[1] in names:
            current, line = found[1], found[2]
            docs[current] = ""
        elif not line.strip():
            current = None
        if current:
            docs[current] = f"{docs[current]} {line.strip()}".strip()
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    for field, text in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docs[field.target.id] = " ".join(str(text.value.value).split())
    return docs


def describe(hint: Any) -> str:
    """A type in words and YAML: `a number | null`, `[text, ...]`, `{name: a number, ...}`."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in words:
        return words[hint]
    if origin is Literal:
        return " | ".join(show(choice) for choice in arguments)
    if is_union(hint):
        sections = sections_of(hint)
        if len(sections) > 1:
            name, choices = variants(sections)
            others = [describe(member) for member in arguments if member not in sections]
            return " | ".join([f"a section with {name}: {' | '.join(choices)}", *others])
        return " | ".join(describe(member) for member in arguments)
    if origin is dict:
        return f"{{name: {describe(arguments[1])}, ...}}"
    if origin in (list, tuple):
        fixed = origin is tuple and Ellipsis not in arguments
        return f"[{', '.join(map(describe, arguments))}]" if fixed else f"[{describe(arguments[0])}, ...]"
    return f"a section with {', '.join(field.name for field in dataclasses.fields(hint))}"


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and dicts as plain mappings and lists, ready for YAML or JSON."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return {name: to_plain(item) for name, item in value.items()} if isinstance(value, dict) else value


def show(value: Any) -> str:
    """A value in the one-line YAML a user would type."""
    if isinstance(value, float):
        return repr(value)
    text = yaml.safe_dump(to_plain(value), default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.strip().removesuffix("...").strip()


def is_union(hint: Any) -> bool:
    """X | Y in either spelling."""
    return get_origin(hint) in (Union, types.UnionType)


def is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
