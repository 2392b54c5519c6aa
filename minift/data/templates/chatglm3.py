"""ChatGLM3: `[gMASK] sop`, then per message a role token, its metadata line and its content, each encoded apart.

Source: `THUDM/ChatGLM3` PROMPT.md, tokenization_chatglm.py (`build_single_message`), finetune_demo/finetune_hf.py. Role
tokens are ids that no text produces. Nothing separates messages, so an answer ends where the next role token stands;
that token (or the final `</s>`) is what the model learns to stop with, while `<|assistant|>` itself is given.

Tool calls: an assistant message whose metadata line is the tool's name and whose content is a Python block calling
`tool_call(...)`; the result comes back in the role `observation`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from minift.data.rendered import Piece

STOP_TOKENS = ("</s>", "<|user|>", "<|observation|>")
ROLES = {role: role for role in ("system", "user", "assistant", "observation")} | {"tool": "observation"}
TOOLS_INTRODUCTION = "Answer the following questions as best as you can. You have access to the following tools:"


def pieces(messages: list[dict[str, Any]], tools: list[dict] | None, add_generation_prompt: bool) -> Iterator[Piece]:
    """Raises ValueError for a role ChatGLM3 does not have."""
    yield Piece("[gMASK]", "token")
    yield Piece("sop", "token")
    answered = False  # whether the message before was the assistant's: then the next role token is its stop token
    for role, metadata, content in _parts(messages, tools):
        yield Piece(f"<|{role}|>", "token", trained_from=0 if answered else None)
        answered = role == "assistant"
        trained_from = 0 if answered else None
        yield Piece(f"{metadata}\n", "plain", trained_from)
        yield Piece(content, "plain", trained_from)
    if add_generation_prompt:
        yield Piece("<|assistant|>", "token")
    elif answered:
        yield Piece("</s>", "token", trained_from=0)


def _parts(messages: list[dict[str, Any]], tools: list[dict] | None) -> Iterator[tuple[str, str, str]]:
    """(role, metadata, content) of each ChatGLM3 message; one of ours may become several."""
    if tools and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": TOOLS_INTRODUCTION}, *messages]
    for i, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise ValueError(f"Message {i} has the role {message['role']!r}; ChatGLM3 has {', '.join(ROLES)}.")
        role, content, calls = ROLES[message["role"]], message.get("content", ""), message.get("tool_calls", ())
        if i == 0 and tools:
            content += "\n" + json.dumps(tools, indent=4, ensure_ascii=False)
        if content or not calls:
            yield role, message.get("metadata", ""), content
        for call in calls:
            function = call.get("function", call)
            arguments = ", ".join(f"{name}={value!r}" for name, value in function["arguments"].items())
            yield role, function["name"], f"```python\ntool_call({arguments})\n```"
