"""What a row means: alpaca, sharegpt, messages, prompt_completion, text -> `Conversation` or `Document`.

    alpaca             {"instruction", "input"?, "output", "system"?, "history"?: [[question, answer], ...]}
    sharegpt           {"conversations": [{"from", "value"}, ...], "system"?, "tools"?}
    messages           {"messages": [{"role", "content", "tool_calls"?}, ...], "tools"?}
    prompt_completion  {"prompt", "completion"}: two texts, or two lists of messages
    text               {"text"}

Other fields of a row are ignored. An optional field may be absent, null or empty. Tools and the arguments of tool calls
may be JSON text (in Parquet they should be: a column of objects gives every row the keys of all the others).

A `Conversation` needs a chat template to become text; a `Document` is text already, supervised from some character on.
In a conversation every assistant message is supervised, alpaca's history included; of prompt and completion only the
completion.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minift.data.documents import Source
from minift.data.rows import Row, RowError, kind

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "observation": "tool",
    "gpt": "assistant",
    "function_call": "assistant",
}
ASKING, ANSWERING = ("human", "observation"), ("gpt", "function_call")


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates want them; assistant messages before `first_supervised` are context only.

    The `input` of an alpaca row stands beside `content` in its user message.
    """

    messages: list[Message]
    tools: list[dict] | None
    source: Source
    first_supervised: int = 0


@dataclass(frozen=True)
class Document:
    """A text whose characters from `supervised_from` on are to be learnt."""

    text: str
    source: Source
    supervised_from: int = 0


def detect(row: Row) -> str:
    """The format whose fields the row has; the first in the order above, if several. Raises RowError if none."""
    for name, needed in (
        ("alpaca", {"instruction", "output"}),
        ("sharegpt", {"conversations"}),
        ("messages", {"messages"}),
        ("prompt_completion", {"prompt", "completion"}),
        ("text", {"text"}),
    ):
        if needed <= row.fields.keys():
            return name
    there = ", ".join(row.fields) or "no field at all"
    raise RowError(
        row.file,
        row.line,
        f"no known format has only these fields: {there}; "
        "valid: instruction + output (alpaca), conversations (sharegpt), messages, prompt + completion, text",
    )


def convert(row: Row, format: str) -> Conversation | Document:
    """Raises RowError naming file, line, field and reason."""
    return _CONVERTERS[format](row)


def _alpaca(row: Row) -> Conversation:
    instruction, extra = _text(row, row.fields, "instruction"), _text(row, row.fields, "input", optional=True)
    messages = _system(row)
    history = row.fields.get("history") or []
    if not isinstance(history, list):
        raise _error(row, "history", f"must be a list of [question, answer] pairs, this is {kind(history)}")
    for i, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) and text for text in pair)):
            raise _error(row, f"history[{i}]", "must be [question, answer], two texts that are not empty")
        messages += [_message("user", pair[0]), _message("assistant", pair[1])]
    question = _message("user", instruction)
    if extra:
        question["input"] = extra
    messages += [question, _message("assistant", _text(row, row.fields, "output"))]
    return Conversation(messages, None, _source(row))


def _sharegpt(row: Row) -> Conversation:
    turns = _list(row, row.fields, "conversations")
    messages = _system(row)
    for i, turn in enumerate(turns):
        where = f"conversations[{i}]"
        role = _choice(row, turn, "from", where, tuple(SHAREGPT_ROLES))
        value = _text(row, turn, "value", where, allow_empty=role == "observation")
        if role == "system":
            if messages:
                raise _error(row, f"{where}.from", "is a second system message; valid: one, and first")
            messages.append(_message("system", value))
            continue
        valid = ANSWERING if messages and messages[-1]["role"] in ("user", "tool") else ASKING
        if role not in valid:
            raise _error(
                row, f"{where}.from", f"is {role!r} here; valid: {' or '.join(valid)}, for the two sides take turns"
            )
        if role == "function_call":
            messages.append({"role": "assistant", "content": "", "tool_calls": _function_calls(row, value, where)})
        else:
            messages.append(_message(SHAREGPT_ROLES[role], value))
    if messages[-1]["role"] != "assistant":
        raise _error(row, "conversations", f"must end with {' or '.join(ANSWERING)}: the last message has no answer")
    return Conversation(messages, _tools(row), _source(row))


def _messages(row: Row) -> Conversation:
    return _conversation(row, _message_list(row, "messages"), 0)


def _prompt_completion(row: Row) -> Conversation | Document:
    """Texts are joined as they are: whatever stands between prompt and completion has to be in one of them."""
    if isinstance(row.fields.get("prompt"), list):
        prompt = _message_list(row, "prompt")
        return _conversation(row, prompt + _message_list(row, "completion"), len(prompt))
    prompt, completion = _text(row, row.fields, "prompt"), _text(row, row.fields, "completion")
    return Document(prompt + completion, _source(row), len(prompt))


def _plain_text(row: Row) -> Document:
    return Document(_text(row, row.fields, "text"), _source(row))


_CONVERTERS: dict[str, Callable[[Row], Conversation | Document]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "text": _plain_text,
}


def _conversation(row: Row, messages: list[Message], first_supervised: int) -> Conversation:
    if not any(message["role"] == "assistant" for message in messages[first_supervised:]):
        field = "completion" if first_supervised else "messages"
        raise _error(row, field, "has no message of the assistant: nothing to learn")
    return Conversation(messages, _tools(row), _source(row), first_supervised)


def _message_list(row: Row, key: str) -> list[Message]:
    return [_checked_message(row, message, f"{key}[{i}]") for i, message in enumerate(_list(row, row.fields, key))]


def _checked_message(row: Row, message: Any, where: str) -> Message:
    """The message without null fields, its tool calls in one spelling. Fields that only some templates know stay."""
    role = _choice(row, message, "role", where, ROLES)
    message = {key: value for key, value in message.items() if value is not None}
    if role == "assistant" and message.get("tool_calls"):
        calls = _list(row, message, "tool_calls", where)
        message["tool_calls"] = [_call(row, call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
        message["content"] = _text(row, message, "content", where, optional=True)
    else:
        message.pop("tool_calls", None)
        message["content"] = _text(row, message, "content", where, allow_empty=role == "tool")
    return message


def _function_calls(row: Row, value: str, where: str) -> list[dict]:
    """sharegpt writes one call, or a list of calls, as JSON text."""
    calls = _json(row, value, f"{where}.value")
    return [_call(row, call, f"{where}.value") for call in (calls if isinstance(calls, list) else [calls])]


def _call(row: Row, call: Any, where: str) -> dict:
    """{"name", "arguments"}, bare or inside {"type": "function", "function": ...}; arguments as an object."""
    outer = call if isinstance(call, dict) else {}
    function = outer.get("function", outer)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _error(row, where, 'must be {"name": ..., "arguments": {...}}, or {"function": {...}} around it')
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):  # as OpenAI's API returns them; templates want the object
        arguments = _json(row, arguments, f"{where}.arguments")
    if not isinstance(arguments, dict):
        raise _error(row, f"{where}.arguments", f"must be an object, this is {kind(arguments)}")
    rest = {key: value for key, value in outer.items() if key not in ("name", "arguments")}  # an id, say
    return {**rest, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(row: Row) -> list[dict] | None:
    """Function descriptions in the wrapping that templates expect; None without any."""
    tools = row.fields.get("tools") or None
    if isinstance(tools, str):
        tools = _json(row, tools, "tools") or None
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _error(row, "tools", "must be a list of objects (or that list as JSON text)")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _system(row: Row) -> list[Message]:
    system = _text(row, row.fields, "system", optional=True)
    return [_message("system", system)] if system else []


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _source(row: Row) -> Source:
    return Source(row.file, row.line)


def _text(
    row: Row, fields: dict, key: str, where: str = "", *, optional: bool = False, allow_empty: bool = False
) -> str:
    value = _present(row, fields, key, where) if not optional else fields.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _error(row, _join(where, key), f"must be text, this is {kind(value)}")
    if not (value.strip() or optional or allow_empty):
        raise _error(row, _join(where, key), "is empty")
    return value


def _list(row: Row, fields: dict, key: str, where: str = "") -> list:
    value = _present(row, fields, key, where)
    if not isinstance(value, list):
        raise _error(row, _join(where, key), f"must be a list, this is {kind(value)}")
    if not value:
        raise _error(row, _join(where, key), "is empty")
    return value


def _choice(row: Row, fields: Any, key: str, where: str, valid: tuple[str, ...]) -> str:
    if not isinstance(fields, dict):
        raise _error(row, where, f"must be an object, this is {kind(fields)}")
    value = _present(row, fields, key, where)
    if value not in valid:
        raise _error(row, _join(where, key), f"is {value!r}; valid: {', '.join(valid)}")
    return value


def _present(row: Row, fields: dict, key: str, where: str) -> Any:
    value = fields.get(key)
    if value is None:
        there = ", ".join(name for name, content in fields.items() if content is not None) or "nothing"
        raise _error(row, _join(where, key), f"is missing; there is: {there}")
    return value


def _json(row: Row, text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _error(row, field, f"is not valid JSON ({error.msg} at character {error.pos})") from error


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _error(row: Row, field: str, reason: str) -> RowError:
    return RowError(row.file, row.line, f"field {field} {reason}")
