"""One function call as text: write it, read it back, and judge it against the allowed answers.

The text is a Python call with keyword arguments and literal values, `weather.forecast(city="Oslo", days=3)`: about half
the tokens of the same thing in JSON, and `ast` reads it without ever running it.

The judge is strict on purpose: exact function name, every argument value exactly one of the allowed ones. Strings are
not normalised; the leaderboard's own checker drops case, spaces and some punctuation first, so its numbers are a little
higher than ours for the same answers. What does not parse is wrong.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Call:
    """A function's (possibly dotted) name and its keyword arguments as plain Python values."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ExpectedCall:
    """What counts as right: the name, and for each parameter the values that are allowed.

    `allowed` has the leaderboard's form: parameter -> list of alternatives, where the alternative "" also means that
    the argument may be left out unless it is in `required`. A dictionary among the alternatives maps each of its keys
    to such a list again.
    """

    name: str
    required: tuple[str, ...]
    allowed: dict[str, list[Any]]

    def may_omit(self, argument: str) -> bool:
        """True when a call without this argument can be right."""
        return "" in self.allowed[argument] and argument not in self.required


VerdictKind = Literal["correct", "not a call", "wrong function", "wrong arguments"]


@dataclass(frozen=True)
class Verdict:
    """What an answer is; if not correct, `reason` says what was wrong first."""

    kind: VerdictKind
    reason: str = ""

    @property
    def correct(self) -> bool:
        return self.kind == "correct"


def render_call(call: Call) -> str:
    """The call as one line of Python that `parse_call` reads back to the same value."""
    return f"{call.name}({', '.join(f'{key}={render_literal(value)}' for key, value in call.arguments.items())})"


def render_literal(value: Any) -> str:
    """A Python literal with double-quoted strings always, so that a model meets only one way to quote."""
    match value:
        case str():
            return json.dumps(value, ensure_ascii=False)
        case None | bool() | int() | float():
            return repr(value)
        case list() | tuple():
            return f"[{', '.join(render_literal(item) for item in value)}]"
        case dict():
            return f"{{{', '.join(f'{render_literal(k)}: {render_literal(v)}' for k, v in value.items())}}}"
    raise ValueError(f"a call argument of type {type(value).__name__} has no literal form: {value!r}")


def parse_call(text: str) -> Call:
    """Read `name(key=literal, ...)`. Nothing is evaluated but literals.

    Raises `ValueError` saying what is wrong: not Python, not one call, positional or unpacked arguments, a value that
    is not a literal, an argument given twice.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"not a Python call: {error}") from None
    if not isinstance(node, ast.Call):
        raise ValueError("not a call")
    if node.args:
        raise ValueError("positional arguments; every argument needs its name")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("arguments are unpacked with **; every argument needs its name")
        if keyword.arg in arguments:
            raise ValueError(f"argument {keyword.arg!r} is given twice")
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, MemoryError, RecursionError):
            raise ValueError(f"argument {keyword.arg!r} is not a literal") from None
    return Call(_dotted_name(node.func), arguments)


def _dotted_name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=parent, attr=name):
            return f"{_dotted_name(parent)}.{name}"
    raise ValueError("what is called is not a plain (dotted) name")


def check_call(text: str, expected: ExpectedCall) -> Verdict:
    """Judge one answer. Every way of being wrong is a `Verdict`, never an exception."""
    try:
        call = parse_call(text)
    except ValueError as error:
        return Verdict("not a call", str(error))
    if call.name != expected.name:
        return Verdict("wrong function", f"calls {call.name!r} instead of {expected.name!r}")
    for argument, value in call.arguments.items():
        if argument not in expected.allowed:
            return Verdict("wrong arguments", f"unknown argument {argument!r}")
        if not _is_allowed(value, expected.allowed[argument]):
            alternatives = [option for option in expected.allowed[argument] if option != ""]
            return Verdict("wrong arguments", f"{argument}={value!r} is not one of {alternatives!r}")
    for argument in expected.allowed:
        if argument not in call.arguments and not expected.may_omit(argument):
            return Verdict("wrong arguments", f"argument {argument!r} is missing")
    return Verdict("correct")


def _is_allowed(value: Any, alternatives: Sequence[Any]) -> bool:
    return any(_matches(value, option) for option in alternatives)


def _matches(value: Any, option: Any) -> bool:
    """Whether `value` is the alternative `option`. A dictionary's own values are lists of alternatives again."""
    if isinstance(option, Mapping):
        return (
            isinstance(value, Mapping)
            and all(key in option and _is_allowed(item, option[key]) for key, item in value.items())
            and all(key in value or "" in alternatives for key, alternatives in option.items())
        )
    if isinstance(option, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(option)
            and all(_matches(item, wanted) for item, wanted in zip(value, option, strict=True))
        )
    if isinstance(option, bool) or isinstance(value, bool):
        return value is option  # in Python True == 1; here a flag is not a number
    if isinstance(option, int | float) and isinstance(value, int | float):
        return value == option  # 5 and 5.0 are the same number
    return type(value) is type(option) and value == option
