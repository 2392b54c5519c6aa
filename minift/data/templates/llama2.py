"""LLaMA-2 chat: `<s>[INST] question [/INST] answer </s>`, every turn encoded on its own.

Source: `meta-llama/llama` llama/generation.py, `Llama.chat_completion`. The system message goes into the first
question. The space after `[/INST]` belongs to the answer: the prompt for generation ends before it, and SentencePiece
joins it with the first word. So does the space before `</s>`, which the model sees in every earlier turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minift.data.rendered import Piece

STOP_TOKENS = ("</s>",)
SPECIAL_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


def pieces(messages: list[dict[str, Any]], tools: list[dict] | None, add_generation_prompt: bool) -> Iterator[Piece]:
    """Raises ValueError for tools, for roles that do not alternate, and for content with one of LLaMA-2's own tags."""
    if tools or any("tool_calls" in message for message in messages):
        raise ValueError("The llama2 chat format has no tools.")
    for i, message in enumerate(messages):
        for tag in SPECIAL_TAGS:
            if tag in message["content"]:
                raise ValueError(f"Message {i} contains {tag!r}, which is markup of the llama2 chat format.")
    contents = [message["content"] for message in messages]
    roles = [message["role"] for message in messages]
    if roles[0] == "system" and len(roles) > 1:
        contents[1] = f"<<SYS>>\n{contents[0]}\n<</SYS>>\n\n{contents[1]}"
        roles, contents = roles[1:], contents[1:]
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise ValueError(f"The llama2 chat format needs user and assistant by turns, not {', '.join(roles)}.")

    for question, answer in zip(contents[::2], contents[1::2], strict=False):
        prompt = f"[INST] {question.strip()} [/INST]"
        yield Piece("<s>", "token")
        yield Piece(f"{prompt} {answer.strip()} ", "plain", trained_from=len(prompt))
        yield Piece("</s>", "token", trained_from=0)
    if roles[-1] == "user":
        yield Piece("<s>", "token")
        yield Piece(f"[INST] {contents[-1].strip()} [/INST]", "plain")
