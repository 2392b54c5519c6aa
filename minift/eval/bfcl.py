"""The Berkeley Function Calling Leaderboard's `simple_python`: a task learnt in minutes and judged exactly.

    minift data bfcl OUT      # OUT/train.jsonl, OUT/heldout.jsonl (messages format), OUT/answers.json (for the judge)

The questions and the allowed answers are read from the files of the installed package `bfcl-eval`; none of its code is
imported. Each row is one function description, one question and one call that answers it. Rows 0, 5, 10, ... (every
fifth) are held out: 80 of 400.

The function is described in a few lines instead of its JSON schema, with the same content less the punctuation: 54
tokens in the mean instead of 139. On a machine without an accelerator, prompt length is training time.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minift.eval.calls import Call, ExpectedCall, render_call, render_literal

PACKAGE = "bfcl_eval"
HELD_OUT_EVERY = 5
_TYPE_NAMES = {
    "string": "str", "integer": "int", "float": "float", "boolean": "bool",
    "array": "list", "tuple": "list", "dict": "dict", "any": "any",
}  # fmt: skip


@dataclass(frozen=True)
class BfclRow:
    """One question. `function` is the leaderboard's schema (name, description, parameters), `expected` the answer."""

    id: str
    question: str
    function: dict[str, Any]
    expected: ExpectedCall


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote."""

    train_file: Path
    heldout_file: Path
    answers_file: Path
    num_train_rows: int
    num_heldout_rows: int


def package_folder() -> Path:
    """Where the installed package keeps its data; found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            "the data package bfcl-eval is not installed here; only its files are needed: "
            "pip install --no-deps bfcl-eval==2026.3.23"
        )
    return Path(spec.origin).parent / "data"


def read_rows(folder: Path, category: str = "simple_python") -> list[BfclRow]:
    """Join the questions in `folder` with their allowed answers in `folder/possible_answer`.

    Raises `ValueError` naming file and line for a row without an answer, or with more than one turn or function (the
    other categories of the leaderboard have those; this task does not).
    """
    name = f"BFCL_v4_{category}.json"
    answers = {record["id"]: record for _, record in _read_json_lines(folder / "possible_answer" / name)}
    rows = []
    for line, record in _read_json_lines(folder / name):
        where = f"{folder / name}, line {line}"
        answer = answers.get(record["id"])
        if answer is None:
            raise ValueError(f"{where}: {record['id']!r} has no entry among the possible answers")
        turns, functions, truths = record["question"], record["function"], answer["ground_truth"]
        if len(turns) != 1 or len(turns[0]) != 1 or len(functions) != 1 or len(truths) != 1:
            raise ValueError(f"{where}: expected one question, one function and one call")
        function = functions[0]
        allowed = truths[0].get(function["name"])
        if allowed is None:
            raise ValueError(f"{where}: the allowed call {list(truths[0])} is not of the function {function['name']!r}")
        expected = ExpectedCall(function["name"], tuple(function["parameters"]["required"]), allowed)
        rows.append(BfclRow(record["id"], turns[0][0]["content"], function, expected))
    return rows


def _read_json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist; is this the data folder of bfcl-eval 2026.3.23?")
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, json.loads(line)


def describe_function(function: dict[str, Any]) -> str:
    """The schema in a few lines: the name, then `parameter: type Description`, `?` after parameters that are optional.

    Alternatives (enum) stand in place of the type, and a default that the description does not mention is added. The
    function's own description is left out: with one function on offer it decides nothing.
    """
    parameters = function["parameters"]
    lines = [function["name"]]
    for name, schema in parameters["properties"].items():
        optional = "" if name in parameters["required"] else "?"
        line = f"{name}{optional}: {_describe_type(schema)} {schema['description'].strip()}"
        if "default" in schema and str(schema["default"]).lower() not in schema["description"].lower():
            line += f" Default {render_literal(schema['default'])}."
        lines.append(line)
    return "\n".join(lines)


def _describe_type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return "|".join(render_literal(value) for value in schema["enum"])
    if "properties" in schema:
        fields = (f"{name}: {_describe_type(field)}" for name, field in schema["properties"].items())
        return f"{{{', '.join(fields)}}}"
    if "items" in schema:
        return f"list[{_describe_type(schema['items'])}]"
    return _TYPE_NAMES[schema["type"]]


def prompt_messages(row: BfclRow) -> list[dict[str, str]]:
    """System message: the function. User message: the question."""
    return [
        {"role": "system", "content": describe_function(row.function)},
        {"role": "user", "content": row.question},
    ]


def target_call(row: BfclRow) -> Call:
    """The one right answer to train on.

    Where several values are allowed, the one the question spells out, else the first. An argument that may be left out
    is given only when the question spells out its value. Both make the rule learnable: copy what was said, no more.
    """
    arguments = {}
    for argument, alternatives in row.expected.allowed.items():
        spelled_out = [option for option in alternatives if option != "" and _is_spelled_out(option, row.question)]
        if spelled_out:
            arguments[argument] = _first_choice(spelled_out[0])
        elif not row.expected.may_omit(argument):
            arguments[argument] = _first_choice(next(option for option in alternatives if option != ""))
    return Call(row.expected.name, arguments)


def _is_spelled_out(option: Any, question: str) -> bool:
    """Whether a string or number stands in the question as a word of its own (6 does not in "1960" or "6.5")."""
    if isinstance(option, bool) or not isinstance(option, str | int | float):
        return False
    text = option if isinstance(option, str) else f"{option:.15g}"
    return re.search(rf"(?<![\w.]){re.escape(text)}(?!\w|\.\d)", question) is not None


def _first_choice(option: Any) -> Any:
    """An alternative as a plain value: inside a dictionary every value is a list of alternatives; take the first."""
    if isinstance(option, dict):
        return {key: _first_choice(alternatives[0]) for key, alternatives in option.items() if "" not in alternatives}
    if isinstance(option, list):
        return [_first_choice(item) for item in option]
    return option


def prepare(out_folder: Path, data_folder: Path | None = None) -> Prepared:
    """Write `train.jsonl`, `heldout.jsonl` and `answers.json` into `out_folder`.

    `data_folder` is where the leaderboard's JSON files are; by default inside the installed package.
    """
    rows = read_rows(data_folder or package_folder())
    heldout, train = rows[::HELD_OUT_EVERY], [row for i, row in enumerate(rows) if i % HELD_OUT_EVERY]
    out_folder.mkdir(parents=True, exist_ok=True)
    prepared = Prepared(
        train_file=out_folder / "train.jsonl",
        heldout_file=out_folder / "heldout.jsonl",
        answers_file=out_folder / "answers.json",
        num_train_rows=len(train),
        num_heldout_rows=len(heldout),
    )
    _write_messages(prepared.train_file, train)
    _write_messages(prepared.heldout_file, heldout)
    answers = [
        {
            "id": row.id,
            "prompt": prompt_messages(row),
            "name": row.expected.name,
            "required": row.expected.required,
            "allowed": row.expected.allowed,
        }
        for row in heldout
    ]
    prepared.answers_file.write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return prepared


def _write_messages(file: Path, rows: list[BfclRow]) -> None:
    with file.open("w", encoding="utf-8") as out:
        for row in rows:
            answer = {"role": "assistant", "content": render_call(target_call(row))}
            out.write(json.dumps({"messages": [*prompt_messages(row), answer]}, ensure_ascii=False) + "\n")
