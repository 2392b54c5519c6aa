"""What rows mean: one conversation in every format, and file, line and field in the message for every broken row."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.data.formats import Conversation, Document, convert, detect
from minift.data.rows import Row, RowError

WEATHER = {"name": "weather", "description": "Looks outside.", "parameters": {"type": "object", "properties": {}}}


def row(**fields) -> Row:
    return Row(fields, "data.jsonl", 17)


words = st.text(min_size=1, max_size=6).filter(str.strip)


@settings(max_examples=30, deadline=None)
@given(
    turns=st.lists(st.tuples(words, words), min_size=1, max_size=4), system=st.none() | words, top_level=st.booleans()
)
def test_one_conversation_in_three_formats(turns, system, top_level):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    sharegpt = [{"from": "system", "value": system}] if system and not top_level else []
    for question, answer in turns:
        sharegpt += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    at_top = {"system": system if top_level else ""}
    history, (question, answer) = [list(turn) for turn in turns[:-1]], turns[-1]
    rows = [
        row(messages=messages),
        row(conversations=sharegpt, tools="", **at_top),
        row(instruction=question, input="", output=answer, history=history, system=system),
    ]
    for made, format in zip(rows, ("messages", "sharegpt", "alpaca"), strict=True):
        assert detect(made) == format
        conversation = convert(made, format)
        assert conversation.messages == messages
        assert (conversation.tools, conversation.first_supervised) == (None, 0)
        assert str(conversation.source) == "data.jsonl:17"


@pytest.mark.parametrize("as_text", [False, True])
def test_tool_calls_in_two_formats(as_text):
    """Bare or wrapped, objects or JSON text: templates get one spelling."""
    arguments = {"city": "Oslo", "when": None}
    written = json.dumps(arguments) if as_text else arguments
    sharegpt = row(
        conversations=[
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": written})},
            {"from": "observation", "value": ""},
            {"from": "gpt", "value": "Silence."},
        ],
        tools=json.dumps([WEATHER]) if as_text else [WEATHER],
    )
    call = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": written}}
    messages = row(
        messages=[
            {"role": "user", "content": "Weather?", "name": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "", "name": "weather", "tool_calls": None},
            {"role": "assistant", "content": "Silence."},
        ],
        tools=[{"type": "function", "function": WEATHER}],
    )
    one, other = convert(sharegpt, "sharegpt"), convert(messages, "messages")
    expected = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    assert one.tools == other.tools == [{"type": "function", "function": WEATHER}]
    assert one.messages[1] == {"role": "assistant", "content": "", "tool_calls": [expected]}
    assert other.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **expected}]}
    assert one.messages[2] == {"role": "tool", "content": ""}
    assert other.messages[2] == {"role": "tool", "content": "", "name": "weather"}


def test_alpaca_input_stands_apart():
    conversation = convert(row(instruction="Add.", input="1 2", output="3"), "alpaca")
    assert conversation.messages[0] == {"role": "user", "content": "Add.", "input": "1 2"}


def test_prompt_and_completion():
    assert convert(row(prompt="2+2=", completion="4"), "prompt_completion") == Document("2+2=4", ("data.jsonl", 17), 4)
    prompt = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "context only"}]
    completion = [{"role": "user", "content": "again"}, {"role": "assistant", "content": "learn me"}]
    conversation = convert(row(prompt=prompt, completion=completion), "prompt_completion")
    assert conversation == Conversation(prompt + completion, None, ("data.jsonl", 17), 2)
    assert convert(row(text="once"), "text") == Document("once", ("data.jsonl", 17), 0)


@pytest.mark.parametrize(
    ("keys", "format"),
    [
        ("text output instruction", "alpaca"),  # tatsu-lab/alpaca has a column `text` as well
        ("conversations tools", "sharegpt"),
        ("messages prompt", "messages"),
        ("prompt completion id", "prompt_completion"),
        ("text url", "text"),
    ],
)
def test_detection(keys, format):
    assert detect(row(**dict.fromkeys(keys.split()))) == format


VALID = {
    "alpaca": {"instruction": "a", "output": "b"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "text": {"text": "a"},
}


def required_places(value, path=()):
    """Every object field below `value`: none of those in VALID may be missing."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield (*path, key)
            yield from required_places(child, (*path, key))
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield from required_places(child, (*path, i))


@pytest.mark.parametrize(
    ("format", "path"), [(format, path) for format, fields in VALID.items() for path in required_places(fields)]
)
def test_any_broken_field_is_named(format, path):
    """Each field in turn missing, null, empty, of another type: the message has file, line, the field and why."""
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    missing = object()
    is_list = path[-1] in ("conversations", "messages")
    is_choice = path[-1] in ("from", "role")
    for value, reason in (
        (missing, "is missing; there is: "),
        (None, "is missing; there is: "),
        ([] if is_list else "", "is ''; valid: " if is_choice else "is empty"),
        (5, "is 5; valid: " if is_choice else f"must be {'a list' if is_list else 'text'}, this is a number"),
    ):
        fields = copy.deepcopy(VALID[format])
        parent = fields
        for part in path[:-1]:
            parent = parent[part]
        if value is missing:
            del parent[path[-1]]
        else:
            parent[path[-1]] = value
        with pytest.raises(RowError) as caught:
            convert(Row(fields, "data.jsonl", 17), format)
        if format != "prompt_completion" or value != 5:
            assert f"data.jsonl:17: field {name} {reason}" in str(caught.value)


def turns(*roles):
    return {"conversations": [{"from": role, "value": "x"} for role in roles]}


def said(*roles, **more):
    return {"messages": [{"role": role, "content": "x", **more} for role in roles]}


@pytest.mark.parametrize(
    ("format", "fields", "message"),
    [
        ("alpaca", {**VALID["alpaca"], "history": [["q"]]}, r"field history\[0\] must be \[question, answer\]"),
        ("alpaca", {**VALID["alpaca"], "history": "q"}, "field history must be a list of .* pairs, this is text"),
        ("alpaca", {**VALID["alpaca"], "input": 3}, "field input must be text, this is a number"),
        ("sharegpt", turns("user", "gpt"), r"conversations\[0\].from is 'user'; valid: system, human, "),
        ("sharegpt", turns("gpt", "human"), r"conversations\[0\].from is 'gpt' here; valid: human or observation"),
        ("sharegpt", turns("human", "human"), r"conversations\[1\].from is 'human' here; valid: gpt or function_call"),
        ("sharegpt", turns("human", "gpt", "gpt"), r"conversations\[2\].from is 'gpt' here; valid: human"),
        ("sharegpt", turns("human", "gpt", "human"), "field conversations must end with gpt or function_call"),
        ("sharegpt", turns("human", "system"), r"conversations\[1\].from is a second system message"),
        ("sharegpt", {**turns("system", "human", "gpt"), "system": "y"}, "is a second system message"),
        ("sharegpt", turns("system"), "must end with"),
        ("sharegpt", turns("human", "function_call"), r"conversations\[1\].value is not valid JSON"),
        ("sharegpt", {**VALID["sharegpt"], "tools": "{"}, "field tools is not valid JSON"),
        ("messages", {**VALID["messages"], "tools": "{}x"}, "field tools is not valid JSON"),
        ("messages", {**VALID["messages"], "tools": ["f"]}, "field tools must be a list of objects"),
        ("messages", said("human", "gpt"), r"messages\[0\].role is 'human'; valid: system, user, assistant, tool"),
        ("messages", said("user"), "field messages has no message of the assistant"),
        ("messages", {"messages": ["hi"]}, r"field messages\[0\] must be an object, this is text"),
        ("messages", said("assistant", tool_calls=[{}]), r'messages\[0\].tool_calls\[0\] must be {"name"'),
        ("messages", said("assistant", tool_calls=[{"name": "f", "arguments": [1]}]), "must be an object"),
        ("prompt_completion", {"prompt": said("user")["messages"], "completion": "x"}, "completion must be a list"),
        ("prompt_completion", {"prompt": "x", "completion": []}, "field completion must be text, this is a list"),
        (
            "prompt_completion",
            {"prompt": said("user", "assistant")["messages"], "completion": said("user")["messages"]},
            "field completion has no message of the assistant",
        ),
    ],
)
def test_broken_rows(format, fields, message):
    with pytest.raises(RowError, match=f"^data.jsonl:17: .*{message}"):
        convert(Row(fields, "data.jsonl", 17), format)


def test_unknown_fields_are_listed():
    with pytest.raises(RowError, match="data.jsonl:17: no known format .* fields: chosen, rejected; valid: "):
        detect(row(chosen="a", rejected="b"))
