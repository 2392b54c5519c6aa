"""Chat templates: a conversation -> the exact text a model was trained on, and which part of it the assistant wrote.

    template = ChatTemplate.from_tokenizer(tokenizer)        # the model's own Jinja template
    template = ChatTemplate.builtin("llama3")                # one of ours, for a base model
    template.check(tokenizer)                                # before anything is trained on it
    ids, supervised = encode_rendered(tokenizer, template.render(messages))

Messages are dicts: `role` (system, user, assistant, tool), `content`, and what else a template reads (`tool_calls`).

What the assistant wrote is known from `{% generation %}` blocks. Most templates have none; then message i is what the
rendering of messages[:i + 1] adds to the prompt made of messages[:i], up to its stop token, and both renderings must be
the beginning of the whole one. A template that rewrites earlier turns (dropping their reasoning, say) fails that test
and is refused for conversations with several assistant turns: trained so, the model would see one text and produce
another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from jinja2 import meta

from minift.data.jinja import compile_template, render
from minift.data.rendered import Piece, Rendered, Span, encode_rendered
from minift.data.templates import chatglm3, llama2
from minift.data.tokenizer import TOKEN_ROLES, Tokenizer

__all__ = ["ChatTemplate", "Rendered", "encode_rendered"]

Message = dict[str, Any]
Renderer = Callable[[list[Message], list[dict] | None, bool], Rendered]

# Formats with token ids that no text produces, or whose turns are encoded apart, are functions; the others Jinja files.
PIECE_TEMPLATES = {"llama2": llama2, "chatglm3": chatglm3}
JINJA_TEMPLATES = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "alpaca": None}  # None: the tokenizer's EOS token
BUILTIN_NAMES = (*JINJA_TEMPLATES, *PIECE_TEMPLATES)

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE_TURNS = (
    ("Name a fruit.", "Seven green apples."),
    ("And another one?", "Nine yellow pears."),
)


class ChatTemplate:
    """A chat format.

    name         "chatml", ... for ours, "tokenizer" for the model's own
    stop_tokens  the special tokens that end the assistant's turn
    source       Jinja, to be saved as chat_template.jinja beside an exported model; None where Jinja cannot say it
    """

    def __init__(self, name: str, renderer: Renderer, stop_tokens: tuple[str, ...], source: str | None = None) -> None:
        self.name = name
        self.stop_tokens = stop_tokens
        self.source = source
        self._renderer = renderer

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, name: str = "default") -> ChatTemplate:
        """The template that came with the tokenizer; `name` picks one where there are several."""
        if name not in tokenizer.chat_templates:
            known = ", ".join(tokenizer.chat_templates) or "none"
            raise ValueError(
                f"The tokenizer has no chat template named {name!r} (it has: {known}). "
                f"Choose a built-in one: {', '.join(BUILTIN_NAMES)}."
            )
        return cls._from_jinja("tokenizer", tokenizer.chat_templates[name], tokenizer, stop_token=None)

    @classmethod
    def builtin(cls, name: str, tokenizer: Tokenizer | None = None) -> ChatTemplate:
        """chatml, llama2, llama3, chatglm3 or alpaca.

        Alpaca alone has no tokens of its own and needs `tokenizer`: answers end with its EOS, and the text begins with
        its BOS if it is one of those that put BOS before plain text.
        """
        if name in PIECE_TEMPLATES:
            module = PIECE_TEMPLATES[name]
            return cls(name, lambda *args: Rendered.from_pieces(module.pieces(*args)), module.STOP_TOKENS)
        if name not in JINJA_TEMPLATES:
            raise ValueError(f"There is no built-in chat template {name!r}; valid: {', '.join(BUILTIN_NAMES)}.")
        stop_token = JINJA_TEMPLATES[name] or (tokenizer and tokenizer.eos_token)
        if stop_token is None:
            raise ValueError(f"Chat template {name!r} ends answers with the EOS token: pass a tokenizer that has one.")
        source = (resources.files("minift.data.templates") / f"{name}.jinja").read_text(encoding="utf-8")
        if name == "alpaca" and tokenizer.adds_bos:
            source = "{{- bos_token }}" + source
        return cls._from_jinja(name, source, tokenizer, stop_token)

    @classmethod
    def _from_jinja(cls, name: str, source: str, tokenizer: Tokenizer | None, stop_token: str | None) -> ChatTemplate:
        renderer = JinjaRenderer(source, tokenizer)
        if stop_token is None:
            stop_token = renderer.find_stop_token(tokenizer.special_tokens)
        renderer.stop_token = stop_token
        return cls(name, renderer, (stop_token,) if stop_token else (), source)

    def render(
        self, messages: Sequence[Message], tools: list[dict] | None = None, add_generation_prompt: bool = False
    ) -> Rendered:
        """Raises ValueError for a conversation this format cannot express, or with tools it has no place for."""
        if not messages:
            raise ValueError("An empty conversation cannot be rendered.")
        # APIs write None for what a message does not have; templates test whether the key is there.
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        return self._renderer(messages, tools or None, add_generation_prompt)

    def stop_token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Ids at which generation ends: the template's stop tokens and the tokenizer's EOS."""
        ids = [tokenizer.token_id(token) for token in self.stop_tokens] + [tokenizer.eos_id]
        return sorted({index for index in ids if index is not None})

    def check(self, tokenizer: Tokenizer, turns: int = 2) -> None:
        """Render a probe of `turns` questions and answers and refuse, with the reason, what would train a broken model.

        Every answer must be supervised from its first token to a stop token, and the prompt used for generation must
        consist of exactly the tokens before it. `turns=1` for templates that only serve single-turn data.
        """
        messages = probe_messages(turns)
        ids, supervised = encode_rendered(tokenizer, self.render(messages))
        if not any(supervised):
            raise ValueError(f"Chat template {self.name!r}: no token is supervised; there is nothing to learn.")
        for token in self.stop_tokens:
            if tokenizer.token_id(token) is None:
                raise ValueError(
                    f"Chat template {self.name!r} ends answers with {token!r}, which is no token of this "
                    "tokenizer; the model could not learn to stop."
                )
        stop_ids = {tokenizer.token_id(token) for token in self.stop_tokens}
        runs = _true_runs(supervised)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(runs) != len(answers):
            raise ValueError(f"Chat template {self.name!r}: {len(runs)} supervised runs for {len(answers)} answers.")
        for message, (start, stop) in zip(answers, runs, strict=True):
            answer = tokenizer.decode(ids[start:stop])
            if messages[message]["content"] not in answer:
                raise ValueError(
                    f"Chat template {self.name!r}: of the answer {messages[message]['content']!r} only "
                    f"{answer!r} is supervised (a token reaches from the prompt into the answer)."
                )
            if not stop_ids.intersection(ids[start:stop]):
                expected = " or ".join(map(repr, self.stop_tokens)) or "any special token"
                raise ValueError(
                    f"Chat template {self.name!r}: the supervised text {answer!r} does not contain the "
                    f"stop token ({expected}); the model would never learn to stop."
                )
            prompt, _ = encode_rendered(tokenizer, self.render(messages[:message], add_generation_prompt=True))
            if len(prompt) < start or prompt != ids[: len(prompt)]:
                raise ValueError(
                    f"Chat template {self.name!r}: the prompt for generation ends in "
                    f"{tokenizer.decode(prompt[-8:])!r}, but training shows the answer after "
                    f"{tokenizer.decode(ids[max(0, start - 8) : start])!r}."
                )


class JinjaRenderer:
    """Renders one Jinja template; `tokenizer` provides the variables bos_token, eos_token, pad_token, unk_token."""

    def __init__(self, source: str, tokenizer: Tokenizer | None) -> None:
        self.stop_token: str | None = None
        self._source = source
        self._template = compile_template(source)
        self._has_generation_tag = GENERATION_TAG.search(source) is not None
        environment = self._template.environment
        self._variables_read = meta.find_undeclared_variables(environment.parse(source))
        self._special = {}
        if tokenizer is not None:
            role_tokens = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
            named = zip(TOKEN_ROLES, role_tokens, strict=True)
            self._special = {f"{role}_token": token for role, token in named if token is not None}

    def __call__(self, messages: list[Message], tools: list[dict] | None, add_generation_prompt: bool) -> Rendered:
        if tools and "tools" not in self._variables_read:
            raise ValueError(
                "This chat template has no place for tools and would leave them out without a word; "
                "describe them in the system message."
            )
        if any("tool_calls" in message for message in messages) and "tool_calls" not in self._source:
            raise ValueError(
                "This chat template has no place for an assistant's tool_calls and would leave them out "
                "without a word; write them into the message's content."
            )
        text, spans = self._render(messages, tools, add_generation_prompt)
        if not self._has_generation_tag:
            spans = self._spans_by_prefix(text, messages, tools)
        return Rendered(text, spans, [Piece(text, "markup")])

    def find_stop_token(self, special_tokens: dict[str, int]) -> str | None:
        """The first special token that follows an answer."""
        messages = probe_messages(1)
        text, _ = self._render(messages, None, False)
        _, _, tail = text.rpartition(messages[-1]["content"])
        found = [(tail.find(token), -len(token), token) for token in special_tokens if token in tail]
        return min(found)[2] if found else None

    def _render(
        self, messages: list[Message], tools: list[dict] | None, add_generation_prompt: bool
    ) -> tuple[str, list[Span]]:
        variables = {
            **self._special,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return render(self._template, variables)

    def _spans_by_prefix(self, text: str, messages: list[Message], tools: list[dict] | None) -> list[Span]:
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, _ = self._render(messages[:i], tools, True)
            upto, _ = self._render(messages[: i + 1], tools, False)
            stop = upto.find(self.stop_token, len(prompt)) if self.stop_token else -1
            end = stop + len(self.stop_token) if stop >= 0 else len(upto)
            if not text.startswith(prompt) or end <= len(prompt) or text[:end] != upto[:end]:
                raise ValueError(
                    f"Message {i}: rendered with what follows it, the conversation begins differently than without "
                    "(the template rewrites earlier turns), so there is no telling what the assistant wrote. "
                    "Split the conversation so that every assistant message comes last."
                )
            spans.append((len(prompt), end))
        return spans


def probe_messages(turns: int) -> list[Message]:
    return [
        {"role": role, "content": content}
        for turn in range(turns)
        for role, content in zip(("user", "assistant"), PROBE_TURNS[turn % len(PROBE_TURNS)], strict=True)
    ]


def _true_runs(mask: list[bool]) -> list[Span]:
    """Maximal runs of True as [start, stop)."""
    starts = [i for i, value in enumerate(mask) if value and (i == 0 or not mask[i - 1])]
    stops = [i + 1 for i, value in enumerate(mask) if value and (i + 1 == len(mask) or not mask[i + 1])]
    return list(zip(starts, stops, strict=True))
