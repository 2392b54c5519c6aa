"""The leaderboard task, on rows made up here in its format; oracle: the judge itself, and hand-written descriptions.

Marked slow: the same property on the real 400 rows, when the package is installed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minift.eval.bfcl import (
    BfclRow,
    describe_function,
    package_folder,
    prepare,
    prompt_messages,
    read_rows,
    target_call,
)
from minift.eval.calls import ExpectedCall, check_call, render_call
from minift.eval.tasks import read_call_examples

WEATHER = {
    "name": "weather.forecast",
    "description": "Forecast the weather.",
    "parameters": {
        "type": "dict",
        "properties": {
            "city": {"type": "string", "description": "City and state, e.g. Oslo, NO. "},
            "days": {"type": "integer", "description": "How many days.", "default": 7},
            "unit": {"type": "string", "enum": ["C", "F"], "description": "Unit. Default is C.", "default": "C"},
            "hours": {"type": "array", "items": {"type": "float"}, "description": "Hours."},
            "area": {
                "type": "dict",
                "properties": {"width": {"type": "integer", "description": "Width."}, "tags": {"type": "array"}},
                "description": "Area.",
            },
        },
        "required": ["city", "days"],
    },
}


def row(allowed: dict, question: str = "?", required: tuple[str, ...] = ()) -> BfclRow:
    return BfclRow("id", question, {"name": "f", "parameters": {}}, ExpectedCall("f", required, allowed))


def test_description_by_hand():
    assert describe_function(WEATHER) == "\n".join(
        [
            "weather.forecast",
            "city: str City and state, e.g. Oslo, NO.",
            "days: int How many days. Default 7.",
            'unit?: "C"|"F" Unit. Default is C.',
            "hours?: list[float] Hours.",
            "area?: {width: int, tags: list} Area.",
        ]
    )


@pytest.mark.parametrize(
    ("allowed", "question", "call"),
    [
        ({"a": [1, 2]}, "?", "f(a=1)"),  # the first
        ({"a": ["Paris, FR", "Paris"]}, "Weather in Paris?", 'f(a="Paris")'),  # what the question says
        ({"a": ["a", "b"]}, "because of ab", 'f(a="a")'),  # a word of its own only
        ({"a": ["", 6]}, "a die with 6 sides", "f(a=6)"),
        ({"a": ["", 6]}, "in 1960, 6.5 times 16", "f()"),
        ({"a": ["", 6.0]}, "It is 6.", "f(a=6.0)"),
        ({"a": ["", True]}, "True or not?", "f()"),
        ({"a": ["", [1]]}, "[1]", "f()"),
        ({"a": [""]}, "?", "f()"),
        ({"a": [{"k": [1, 2], "l": ["", 3], "m": [{"n": ["x"]}]}]}, "?", 'f(a={"k": 1, "m": {"n": "x"}})'),
        ({"a": [[{"k": ["x"]}, {"k": ["y", "z"]}]]}, "?", 'f(a=[{"k": "x"}, {"k": "y"}])'),
    ],
)
def test_target_by_hand(allowed, question, call):
    assert render_call(target_call(row(allowed, question))) == call


def test_a_required_argument_is_given_even_where_the_answers_would_let_it_go():
    assert render_call(target_call(row({"a": ["", 25.0]}, required=("a",)))) == "f(a=25.0)"


plain = st.integers(-9, 9) | st.floats(-9, 9) | st.booleans() | st.text(min_size=1, max_size=4)
options = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3), st.lists(inner, min_size=1, max_size=2), max_size=3),
    max_leaves=6,
)


@given(
    allowed=st.dictionaries(
        st.sampled_from(["a", "b", "c"]),
        st.tuples(st.lists(options, min_size=1, max_size=3), st.booleans()).map(lambda t: t[0] + [""] * t[1]),
    ),
    question=st.text(max_size=20),
    required=st.sets(st.sampled_from(["a", "b", "c"])),
)
def test_every_target_is_judged_right(allowed, question, required):
    made = row(allowed, question, tuple(required & allowed.keys()))
    verdict = check_call(render_call(target_call(made)), made.expected)
    assert verdict.correct, verdict.reason


def write_leaderboard(folder: Path, count: int) -> None:
    (folder / "possible_answer").mkdir(parents=True)
    questions, answers = [], []
    for i in range(count):
        content = f"Weather in Oslo for {i} days?"
        questions.append({"id": f"r{i}", "question": [[{"role": "user", "content": content}]], "function": [WEATHER]})
        allowed = {"city": ["Oslo", "Oslo, NO"], "days": [i], "unit": ["C", ""]}
        answers.append({"id": f"r{i}", "ground_truth": [{"weather.forecast": allowed}]})
    for name, records in ((".", questions), ("possible_answer", answers)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / name / "BFCL_v4_simple_python.json").write_text(lines, encoding="utf-8")


def test_prepare_holds_out_every_fifth_row_and_no_other(tmp_path):
    write_leaderboard(tmp_path / "in", 23)
    prepared = prepare(tmp_path / "out", tmp_path / "in")
    assert (prepared.num_train_rows, prepared.num_heldout_rows) == (18, 5)

    def days(file: Path) -> list[int]:
        rows = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
        assert all([message["role"] for message in row] == ["system", "user", "assistant"] for row in rows)
        return [int(row[2]["content"].split("days=")[1].rstrip(")")) for row in rows]

    assert days(prepared.heldout_file) == [0, 5, 10, 15, 20]
    assert days(prepared.train_file) == [i for i in range(23) if i % 5]

    heldout = [json.loads(line)["messages"] for line in prepared.heldout_file.read_text().splitlines()]
    examples = read_call_examples(prepared.answers_file)
    assert [example.prompt for example in examples] == [messages[:-1] for messages in heldout]
    assert all(
        check_call(messages[-1]["content"], example.expected).correct
        for messages, example in zip(heldout, examples, strict=True)
    )


def test_reading_says_where_a_row_is_broken(tmp_path):
    write_leaderboard(tmp_path, 3)
    questions = tmp_path / "BFCL_v4_simple_python.json"
    lines = questions.read_text().splitlines()
    for change, message in (
        (lambda record: record.update(id="other"), "line 2: 'other' has no entry"),
        (lambda record: record["question"].append([]), "line 2: expected one question"),
        (lambda record: record["function"][0].update(name="g"), "line 2: the allowed call .* not of the function 'g'"),
    ):
        record = json.loads(lines[1])
        change(record)
        questions.write_text("\n".join([lines[0], json.dumps(record), lines[2]]))
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere.*does not exist"):
        read_rows(tmp_path / "nowhere")


def test_answers_file_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match="answers.json does not exist"):
        read_call_examples(tmp_path / "answers.json")
    (tmp_path / "answers.json").write_text('[{"id": 1}]')
    with pytest.raises(ValueError, match=r"answers.json is not what .* writes"):
        read_call_examples(tmp_path / "answers.json")


@pytest.mark.slow
def test_every_real_target_is_judged_right():
    rows = read_rows(package_folder())
    assert len(rows) == 400
    for real in rows:
        verdict = check_call(render_call(target_call(real)), real.expected)
        assert verdict.correct, (real.id, verdict.reason)
        assert real.question == prompt_messages(real)[1]["content"]
