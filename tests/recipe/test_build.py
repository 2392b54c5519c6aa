"""YAML and command line -> dataclasses. Oracles: the value itself after a round trip through PyYAML's writer, Python's
own `float`, and sentences written by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from minift.recipe.build import build, differences
from minift.recipe.describe import field_docs, show, to_plain, walk
from minift.recipe.nodes import RecipeError, merge, parse_overrides, read_yaml


@dataclass(frozen=True)
class Inner:
    """An optional section.

    rank: how big.
    names: one name or several,
        over two lines.

    This is about neither.
    """

    rank: int = 4
    names: str | list[str] = "all"

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; valid: 1 or more")


@dataclass(frozen=True)
class Round:
    """One shape.

    kind: which.
    radius: in meters.
    """

    kind: Literal["round"] = "round"
    radius: float = 1.0


@dataclass(frozen=True)
class Square(Round):
    """Another.

    side: in meters, too.
    """

    kind: Literal["square"] = "square"
    side: float = 2.0


@dataclass(frozen=True)
class Outer:
    text: str
    """Any words."""
    number: float = 1.0
    """Peak learning rate."""
    count: int | None = None
    either: str | float = 0.5
    switch: bool = False
    choice: Literal["constant", "cosine"] = "cosine"
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[str, ...] = ()
    ratios: dict[str, float] = field(default_factory=dict)
    inner: Inner | None = None
    shape: Round | Square | None = None


def load(folder, text, *overrides):
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return build(Outer, merge(read_yaml(path), parse_overrides(list(overrides))))


def is_number(text):
    try:
        return float(text) is not None
    except ValueError:
        return False


# Without the exotic line ends, which PyYAML writes unescaped and reads as spaces.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029"), max_size=12) | st.sampled_from(
    ["null", "~", "", "yes", "true", "1e-4", "0x10", "1:30", "2001-01-01", "# x", "a: b", "[a", "{b", "- c", "!t", "*a"]
)
finite = st.floats(allow_nan=False, allow_infinity=False)
outers = st.builds(
    Outer,
    text=texts,
    number=finite,
    count=st.none() | st.integers(),
    either=finite | texts.filter(lambda text: not is_number(text)),  # PyYAML writes the text 0E0 without quotes
    switch=st.booleans(),
    choice=st.sampled_from(["constant", "cosine"]),
    pair=st.tuples(finite, finite),
    many=st.lists(texts, max_size=3).map(tuple),
    ratios=st.dictionaries(texts, finite, max_size=3),
    inner=st.none() | st.builds(Inner, rank=st.integers(1, 2**70), names=texts | st.lists(texts, max_size=3)),
    shape=st.none() | st.builds(Round, radius=finite) | st.builds(Square, radius=finite, side=finite),
)


@given(outers)
def test_yaml_round_trip(tmp_path_factory, outer):
    text = yaml.safe_dump(to_plain(outer), sort_keys=False, allow_unicode=True)
    assert load(tmp_path_factory.getbasetemp(), text) == outer


@given(outers)
def test_any_field_can_be_given_on_the_command_line(tmp_path_factory, outer):
    overrides = [part for name, value in to_plain(outer).items() for part in (f"--{name}", show(value))]
    assert load(tmp_path_factory.getbasetemp(), "text: replaced\nnumber: 7\n", *overrides) == outer


@given(finite)
def test_numbers_as_python_writes_them(tmp_path_factory, number):
    for spelling in (repr(number), f"{number:.16e}", f"{number:.20G}"):
        assert load(tmp_path_factory.getbasetemp(), f"text: a\nnumber: {spelling}\n").number == float(spelling)


def test_precedence_and_what_words_mean(tmp_path):
    text = "text: no\nnumber: 1e-4\ninner:\n  rank: 8\n"
    assert load(tmp_path, text) == Outer("no", 1e-4, inner=Inner(8))
    assert load(tmp_path, text, "--number", "2e-4", "--inner.rank=32") == Outer("no", 2e-4, inner=Inner(32))
    assert load(tmp_path, text, "--inner", "null") == Outer("no", 1e-4)
    anew = load(tmp_path, text, "--inner", "null", "--inner.names", "[a, b]")
    assert anew == Outer("no", 1e-4, inner=Inner(4, ["a", "b"]))
    assert load(tmp_path, text, "--inner", "{}") == Outer("no", 1e-4, inner=Inner())
    assert load(tmp_path, text, "--number", "-1", "--text", "a: b: {") == Outer("a: b: {", -1.0, inner=Inner(8))
    assert load(tmp_path, "text: a\nswitch: true\ncount:\n") == Outer("a", switch=True)


MISTAKES = [
    ("nunber: 1", [], "nunber (recipe.yaml:2) is not a field; did you mean number? valid in a recipe: text, number"),
    ("inner:\n  rnak: 1", [], "inner.rnak (recipe.yaml:3) is not a field; did you mean inner.rank? valid in inner:"),
    ("rank: 1", [], "rank (recipe.yaml:2) is not a field; did you mean inner.rank?"),
    ("inner:\n  switch: true", [], "did you mean switch?"),
    ("learning_rate: 1", [], "did you mean number?"),
    ("number: fast", [], "number (recipe.yaml:2) is fast; valid: a number"),
    ("number: '1'", [], "is the quoted text '1'; valid: a number"),
    ("number: .inf", [], "is .inf; valid: a number"),
    ("number: 1e999", [], "is 1e999; valid: a number"),
    ("number: nan", [], "is nan; valid: a number"),
    ("number: [1]", [], "is the list [1]; valid: a number"),
    ("count: 8.5", [], "is 8.5; valid: a whole number | null"),
    ("switch: 1", [], "is 1; valid: true or false"),
    ("switch: yes", [], "is yes; valid: true or false"),
    ("choice: cosin", [], "valid: constant | cosine; did you mean cosine?"),
    ("pair: [1]", [], "is the list [1]; valid: [a number, a number]"),
    ("pair: [1, x]", [], "pair[1] (recipe.yaml:2) is x; valid: a number"),
    ("many: a.jsonl", [], "is a.jsonl; valid: [text, ...]"),
    ("many: {a: 1}", [], "is the mapping {a}; valid: [text, ...]"),
    ("ratios: [1]", [], "valid: {name: a number, ...}"),
    ("ratios: {a: b}", [], "ratios.a (recipe.yaml:2) is b; valid: a number"),
    ("inner: 4", [], "is 4; valid: a section with rank, names"),
    ("inner:\n  rank: 0", [], "inner: rank is 0; valid: 1 or more (recipe.yaml:3)"),
    ("inner:\n  rank: 0", ["--inner.rank", "-2"], "inner: rank is -2; valid: 1 or more (--inner.rank)"),
    ("number: 1\nnumber: 2", [], "recipe.yaml:3: 'number' is written twice, first at recipe.yaml:2"),
    ("number: &a 1\ncount: *a", [], "recipe.yaml:3: YAML aliases"),
    ("number: !!python/object/apply:os.getpid []", [], "aliases (*name) and tags (!name)"),
    ("\tnumber: 1", [], "recipe.yaml:2: not valid YAML: found character '\\t'"),
    ("? [a]\n: 1", [], "a key must be a word"),
    ("", ["--number", "x"], "--number is x; valid: a number"),
    ("", ["--nunber=1"], "--nunber is not a field; did you mean number?"),
    ("", ["--switch"], "--switch needs a value"),
    ("", ["--switch", "--number", "1"], "--switch needs a value"),
    ("", ["number=1"], "'number=1' on the command line is not an override; write --section.field VALUE"),
    ("", ["--text.more", "1"], "text (--text.more) is the mapping {more}; valid: text"),
    ("", ["--text", "null"], "--text is null; valid: text"),
    ("shape: round", [], "shape (recipe.yaml:2) is round; valid: a section with kind: round | square | null"),
    ("shape: {kind: squre}", [], "shape.kind (recipe.yaml:2) is squre; valid: round | square; did you mean square?"),
    ("shape: {side: 1}", [], "shape.side (recipe.yaml:2) is not a field; it belongs to kind: square; valid"),
    ("shape: {kind: square, sid: 1}", [], "shape.sid (recipe.yaml:2) is not a field; did you mean shape.side?"),
    ("shape: {kind: square, side: x}", ["--shape.kind", "round"], "shape.side (recipe.yaml:2) is not a field"),
]


@pytest.mark.parametrize(("text", "overrides", "sentence"), MISTAKES)
def test_mistakes_are_named(tmp_path, monkeypatch, text, overrides, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, f"text: a\n{text}\n", *overrides)
    assert sentence in str(caught.value).replace(f"{tmp_path}/", "")


def test_all_problems_come_at_once_and_required_fields_are_named(tmp_path):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, "number: x\nswitch: x\ninner: {rank: x}\n")
    assert len(caught.value.problems) == 4
    assert str(caught.value).startswith("4 problems\n  ")
    assert caught.value.problems[3].startswith("text is missing")


def test_files_that_are_not_recipes(tmp_path):
    (tmp_path / "sft_lora.yaml").write_text("- a\n")
    with pytest.raises(FileNotFoundError, match=r"sft_loar.yaml does not exist; nearest: .*sft_lora.yaml"):
        read_yaml(tmp_path / "sft_loar.yaml")
    with pytest.raises(RecipeError, match="a recipe has lines such as"):
        read_yaml(tmp_path / "sft_lora.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_yaml(tmp_path / "binary.yaml")


@given(outers, st.sampled_from(["text", "number", "count", "either", "switch", "pair", "many"]), outers)
def test_differences_name_the_unequal_leaves(a, name, other):
    b = replace(a, **{name: getattr(other, name)})
    expected = [] if getattr(a, name) == getattr(b, name) else [(name, to_plain(a)[name], to_plain(b)[name])]
    assert differences(a, b) == expected
    assert differences(replace(a, inner=Inner(1)), replace(a, inner=Inner(2))) == [("inner.rank", 1, 2)]


def test_variants_of_a_section(tmp_path):
    assert load(tmp_path, "text: a\nshape: {radius: 3}\n").shape == Round(radius=3.0)
    assert load(tmp_path, "text: a\nshape: {}\n", "--shape.kind", "square").shape == Square()
    entries = [(entry.key, entry.section) for entry in walk(Outer) if entry.key.startswith("shape")]
    round_fields = [("shape.kind", None), ("shape.radius", None)]
    assert entries == [("shape", Round), *round_fields, ("shape", Square), *round_fields, ("shape.side", None)]


def test_fields_are_documented_from_either_place():
    assert field_docs(Inner) == {"rank": "how big.", "names": "one name or several, over two lines."}
    fields = {entry.key: entry for entry in walk(Outer)}
    assert fields["text"].doc == "Any words." and fields["text"].default == ""
    assert fields["inner"].section is Inner and fields["inner"].default == "null"
    assert fields["inner.names"].default == "all" and fields["pair"].default == "[0.0, 1.0]"
