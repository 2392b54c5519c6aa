"""Text -> tokens and mask, and what happens to documents that are too long.

    conversation   the chat template renders it once, the tokenizer encodes that text once, and the characters that the
                   assistant wrote tell which tokens are supervised; templates end answers themselves, nothing is added
    document       text + EOS, supervised from `supervised_from` on; EOS always is, or the model never learns to stop

BOS comes from chat templates only.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from minift.data.config import OverlongPolicy
from minift.data.documents import Encoded, EncodeReport
from minift.data.formats import Conversation, Document, Message
from minift.data.rendered import Piece, Rendered, encode_rendered
from minift.data.rows import RowError
from minift.data.template import ChatTemplate
from minift.data.tokenizer import Tokenizer

__all__ = ["EncodeReport", "Encoded", "encode", "fit"]


def encode(item: Conversation | Document, tokenizer: Tokenizer, template: ChatTemplate | None) -> Encoded:
    """Raises RowError for what the template cannot express, ValueError when there is no template for a conversation."""
    if isinstance(item, Document):
        ids, mask = _encode_document(item, tokenizer)
    elif template is None:
        raise ValueError(
            f"{item.source}: a conversation needs a chat template and the tokenizer has none; "
            "valid for data.template (of a recipe; elsewhere --template): chatml, llama2, llama3, chatglm3, alpaca"
        )
    else:
        try:
            ids, mask = encode_rendered(tokenizer, render(item, template))
        except ValueError as error:
            raise RowError(*item.source, str(error)) from error
    return Encoded(np.array(ids, np.int32), np.array(mask, bool), item.source)


def render(conversation: Conversation, template: ChatTemplate) -> Rendered:
    """The conversation's text, with the spans of those assistant messages that are to be learnt.

    Raises ValueError if the template leaves out a tool call: an empty answer would be learnt in its place.
    """
    messages = conversation.messages
    if template.name != "alpaca":  # the only format with a place of its own for the input
        messages = [_with_input_in_content(message) for message in messages]
    rendered = template.render(messages, conversation.tools)

    answers = [rendered.text[start:end] for start, end in rendered.assistant_spans]
    for message in messages:
        for call in message.get("tool_calls", ()):
            name = call["function"]["name"]
            if not any(name in answer for answer in answers):
                raise ValueError(
                    f"the chat template does not write out the call of {name!r}; write calls as text into `content`, "
                    "or choose a template that knows `tool_calls`"
                )

    prompt = messages[: conversation.first_supervised]
    if any(message["role"] == "assistant" for message in prompt):
        prompt_text = template.render(prompt, conversation.tools).text
        if not rendered.text.startswith(prompt_text):
            raise ValueError(
                "the chat template renders the prompt differently when a completion follows, so there is no telling "
                "where the completion starts; end the prompt before its last assistant message"
            )
        spans = [(max(start, len(prompt_text)), end) for start, end in rendered.assistant_spans]
        rendered = replace(rendered, assistant_spans=[(start, end) for start, end in spans if start < end])
    return rendered


def fit(document: Encoded, max_length_tokens: int, policy: OverlongPolicy, report: EncodeReport) -> list[Encoded]:
    """The document, or what the policy makes of it when it is longer than max_length_tokens; counts what is lost.

    error     ValueError
    drop      nothing
    truncate  its first tokens
    split     pieces that overlap by one token: the last token of a piece is the first of the next, where it is context
              only. So every supervised token is still predicted exactly once. Pieces do not see each other.

    Documents and pieces in which nothing is supervised are left out.
    """
    length, limit = len(document), max_length_tokens
    pieces = [document]
    if length > limit:
        report.overlong += 1
        if policy == "error":
            raise ValueError(
                f"{document.source}: this document has {length} tokens, more than max_length_tokens = {limit}. "
                "Raise it (data.max_length_tokens of a recipe; elsewhere --max-length-tokens); or, of a recipe, choose "
                "data.overlong: drop, truncate (keeps the start) or split."
            )
        starts = {"drop": (), "truncate": (0,), "split": range(0, length - 1, limit - 1)}[policy]
        tokens, mask = document.tokens, document.targets_mask
        parts = [slice(start, start + limit) for start in starts]
        pieces = [Encoded(tokens[part], mask[part], document.source) for part in parts]
        report.lost_documents += not pieces
        report.lost_targets += document.num_targets - sum(piece.num_targets for piece in pieces)
    useful = [piece for piece in pieces if piece.num_targets]
    report.without_targets += len(pieces) - len(useful)
    report.documents += len(useful)
    report.tokens += sum(map(len, useful))
    report.targets += sum(piece.num_targets for piece in useful)
    return useful


def _encode_document(document: Document, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer names no EOS token, and texts without an end teach the model never to stop")
    text, border = document.text, document.supervised_from
    ids, mask = encode_rendered(tokenizer, Rendered(text, [(border, len(text))], [Piece(text, "markup")]))
    if border:
        # A token may reach over the border ("A: " + "yes" gives " yes"). A model that is given the prompt alone never
        # gets to choose that token, so then the two are encoded apart.
        prompt, completion = Piece(text[:border], "markup"), Piece(text[border:], "markup", trained_from=0)
        if tokenizer.encode(prompt.text) != ids[: mask.index(True) if True in mask else len(ids)]:
            ids, mask = encode_rendered(tokenizer, Rendered.from_pieces([prompt, completion]))
    return [*ids, tokenizer.eos_id], [*mask, True]


def _with_input_in_content(message: Message) -> Message:
    if "input" not in message:
        return message
    return {"role": message["role"], "content": f"{message['content']}\n{message['input']}"}
