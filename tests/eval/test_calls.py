"""Function calls as text, and the judge.

Oracles: Python itself (`eval` of the rendered literal; a call to a function that returns its keyword arguments), and a
judge written the naive way, by listing every right answer.
"""

from __future__ import annotations

import itertools
import keyword
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minift.eval.calls import Call, ExpectedCall, check_call, parse_call, render_call, render_literal

names = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name))
text = st.text(st.characters(codec="utf-8"), max_size=12)
numbers = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | text
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=8
)


def same(a: object, b: object) -> bool:
    """Equal including the types at every level (1, 1.0 and True are three things)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return a == b and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


@given(value=values)
def test_rendered_literals_mean_the_same_to_python(value):
    assert same(eval(render_literal(value), {"__builtins__": {}}), value)


@given(parts=st.lists(names, min_size=1, max_size=3), arguments=st.dictionaries(names, values, max_size=4))
def test_calls_survive_the_round_trip_and_are_python(parts, arguments):
    call = Call(".".join(parts), arguments)
    line = render_call(call)
    assert "\n" not in line
    parsed = parse_call(f"  {line}\n")
    assert parsed.name == call.name
    assert same(parsed.arguments, arguments)

    collect = lambda **keywords: keywords  # noqa: E731
    for name in reversed(parts[1:]):
        collect = type("Namespace", (), {name: staticmethod(collect)})
    assert same(eval(line, {parts[0]: collect}), arguments)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "not a Python call"),
        ("I cannot do that.", "not a Python call"),
        ("f(a=1", "not a Python call"),
        ("f(a=1)\nf(a=1)", "not a Python call"),
        ("f(a=1); f(a=1)", "not a Python call"),
        ("f(a=1) is the answer", "not a Python call"),
        ("f(a=\x00)", "not a Python call"),
        ("f(a=" + "[" * 5000 + "]" * 5000 + ")", "not a Python call"),
        ("f", "not a call"),
        ("[f(a=1)]", "not a call"),
        ("f(1)", "positional"),
        ("f(*[1])", "positional"),
        ("f(**{'a': 1})", "unpacked"),
        ("f(a=1, a=1)", "twice|repeated"),
        ("f(a=b)", "'a' is not a literal"),
        ("f(a=true)", "'a' is not a literal"),
        ("f(a=g())", "'a' is not a literal"),
        ("f(a=__import__('os'))", "'a' is not a literal"),
        ("f(a=f'{1}')", "'a' is not a literal"),
        ("f(a={[]: 1})", "'a' is not a literal"),
        ("f()(a=1)", "plain"),
        ("f[0](a=1)", "plain"),
        ("g(a=1)", "calls 'g' instead of 'f'"),
        ("m.f(a=1)", "calls 'm.f' instead of 'f'"),
        ("f(a=2)", r"a=2 is not one of \[1\]"),
        ("f(a='1')", r"a='1' is not one of"),
        ("f(a=True)", r"a=True is not one of"),
        ("f(a=1, b=1)", "unknown argument 'b'"),
        ("f()", "'a' is missing"),
    ],
)
def test_wrong_answers_are_wrong_for_the_reason_given(answer, reason):
    verdict = check_call(answer, ExpectedCall("f", ("a",), {"a": [1]}))
    assert not verdict.correct
    assert re.search(reason, verdict.reason), verdict.reason
    wrong_part = "function" if "calls" in reason else "arguments" if re.search("a=|unknown|missing", reason) else None
    assert verdict.kind == (f"wrong {wrong_part}" if wrong_part else "not a call")


@pytest.mark.parametrize(
    ("value", "alternatives", "right"),
    [
        ("5", [5], True),
        ("5.0", [5], True),
        ("5", [5.0], True),
        ("-5", [-5], True),
        ("True", [True], True),
        ("1", [True], False),
        ("1.0", [True], False),
        ("False", [0], False),
        ("None", [0, False, "", "None"], False),
        ("'a'", ["a"], True),
        ("'A'", ["a"], False),
        ("'a '", ["a"], False),
        ("'b'", ["a", "b"], True),
        ("b'a'", ["a"], False),
        ("''", ["a", ""], True),
        ("[1, 2]", [[1, 2]], True),
        ("(1, 2)", [[1, 2]], True),
        ("[1.0, 2]", [[1, 2]], True),
        ("[2, 1]", [[1, 2]], False),
        ("[1]", [[1, 2]], False),
        ("[1, True]", [[1, 1]], False),
        ("1", [[1]], False),
        ("[]", [[]], True),
        ("[[1, 2], [3]]", [[[1, 2], [3]]], True),
        ("{'k': 1}", [{"k": [1, 2]}], True),
        ("{'k': 2}", [{"k": [1, 2]}], True),
        ("{'k': 3}", [{"k": [1, 2]}], False),
        ("{'k': 1, 'l': 1}", [{"k": [1]}], False),
        ("{}", [{"k": [1]}], False),
        ("{}", [{"k": [1, ""]}], True),
        ("{'k': {'l': 'x'}}", [{"k": [{"l": ["x"]}]}], True),
        ("{'k': ['x', 'y']}", [{"k": [["x", "y"]]}], True),
        ("[{'k': 1}, {'k': 2}]", [[{"k": [1]}, {"k": [2, 3]}]], True),
        ("[{'k': 1}, {'k': 4}]", [[{"k": [1]}, {"k": [2, 3]}]], False),
        ("[{'k': 1}]", [{"k": [1]}], False),
    ],
)
def test_values_match_one_of_the_alternatives_exactly(value, alternatives, right):
    assert check_call(f"f(a={value})", ExpectedCall("f", ("a",), {"a": alternatives})).correct is right


@pytest.mark.parametrize(
    ("required", "alternatives", "right"),
    [((), [1, ""], True), ((), [1], False), (("a",), [1, ""], False), (("a",), [1], False)],
)
def test_an_argument_may_be_left_out_if_the_answers_and_the_schema_say_so(required, alternatives, right):
    assert check_call("f()", ExpectedCall("f", required, {"a": alternatives})).correct is right


small = st.sampled_from([0, 1, 2, 0.5, True, False, "x", "X", "y", [1], [1, 2]])


@given(
    allowed=st.dictionaries(
        st.sampled_from("abc"),
        st.tuples(st.lists(small, min_size=1, max_size=3), st.booleans()).map(lambda t: t[0] + [""] * t[1]),
    ),
    required=st.sets(st.sampled_from("abc")),
    changes=st.dictionaries(st.sampled_from("abcd"), small | st.just(""), max_size=1),
    name=st.sampled_from(["f", "f", "f", "g.f"]),
    data=st.data(),
)
def test_judge_agrees_with_a_list_of_all_right_answers(allowed, required, changes, name, data):
    expected = ExpectedCall("f", tuple(required & allowed.keys()), allowed)
    chosen = {argument: data.draw(st.sampled_from(alternatives)) for argument, alternatives in allowed.items()}
    left_out = data.draw(st.sets(st.sampled_from("abc"), max_size=2))
    given_arguments = {argument: value for argument, value in chosen.items() if argument not in left_out} | changes
    absent = object()
    choices = [
        [*alternatives, *([absent] if "" in alternatives and argument not in expected.required else [])]
        for argument, alternatives in allowed.items()
    ]

    def key(value: object) -> object:  # numbers are one kind, flags and text others
        kind = type(value) if isinstance(value, bool | str | list) else float
        return kind, tuple(value) if isinstance(value, list) else value

    right_answers = {
        frozenset((argument, key(value)) for argument, value in zip(allowed, row, strict=True) if value is not absent)
        for row in itertools.product(*choices)
    }
    answer = frozenset((argument, key(value)) for argument, value in given_arguments.items())
    verdict = check_call(render_call(Call(name, given_arguments)), expected)
    assert verdict.correct == (name == "f" and answer in right_answers), verdict.reason
    assert verdict.correct == (verdict.reason == "")
