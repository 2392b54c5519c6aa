"""Which tokens are supervised, and what becomes of documents that are too long."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.data.documents import Encoded, EncodeReport, Source
from minift.data.encode import encode, fit
from minift.data.formats import Conversation, Document
from minift.data.rendered import Piece, Rendered
from minift.data.rows import RowError
from minift.data.template import ChatTemplate

SOURCE = Source("rows.jsonl", 4)
# Pieces from which merges arise at random places, and characters of several bytes.
texts = st.lists(st.sampled_from([" yes", "yes", " ", "A:", "é", "😀", "\n", "s"]), min_size=1, max_size=6).map("".join)
lines = texts.filter(str.strip)


def runs(encoded: Encoded, tokenizer) -> list[str]:
    """The text of each maximal run of supervised tokens."""
    found, current = [], []
    for token, supervised in zip(encoded.tokens.tolist(), [*encoded.targets_mask.tolist()], strict=True):
        if supervised:
            current.append(token)
        elif current:
            found, current = [*found, tokenizer.decode(current)], []
    return [*found, tokenizer.decode(current)] if current else found


@settings(max_examples=40, deadline=None)
@given(prompt=texts, completion=texts)
def test_completion_is_supervised_after_exactly_the_prompt_s_tokens(byte_tokenizer, prompt, completion):
    """What generation will be given (the prompt, encoded alone) is what training shows before the first target."""
    encoded = encode(Document(prompt + completion, SOURCE, len(prompt)), byte_tokenizer, None)
    first = encoded.targets_mask.tolist().index(True)
    assert encoded.tokens[:first].tolist() == byte_tokenizer.encode(prompt)
    assert byte_tokenizer.decode(encoded.tokens.tolist()) == f"{prompt}{completion}</s>"
    assert runs(encoded, byte_tokenizer) == [f"{completion}</s>"]
    assert (encoded.tokens.dtype, encoded.targets_mask.dtype, encoded.source) == (np.int32, bool, SOURCE)


def test_border_inside_a_token(byte_tokenizer):
    """' yes' is one token; a prompt that ends in the space must not swallow the answer."""
    assert len(byte_tokenizer.encode(" yes")) == 1
    encoded = encode(Document("A: yes", SOURCE, len("A: ")), byte_tokenizer, None)
    assert runs(encoded, byte_tokenizer) == ["yes</s>"]
    encoded = encode(Document("A: yes", SOURCE, len("A:")), byte_tokenizer, None)
    assert encoded.tokens.tolist() == [*byte_tokenizer.encode("A: yes"), byte_tokenizer.eos_id]


@settings(max_examples=15, deadline=None)
@given(text=texts)
def test_plain_text(byte_tokenizer, text):
    encoded = encode(Document(text, SOURCE), byte_tokenizer, None)
    assert encoded.tokens.tolist() == [*byte_tokenizer.encode(text), byte_tokenizer.eos_id]
    assert encoded.targets_mask.all() and encoded.num_targets == len(encoded) - 1


@settings(max_examples=30, deadline=None)
@given(turns=st.lists(st.tuples(lines, lines), min_size=1, max_size=4), data=st.data())
def test_conversation_against_hand_written_chatml(byte_tokenizer, turns, data):
    messages, text, answers = [], "", []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        answers.append(f"{answer}<|im_end|>")
    first = data.draw(st.integers(0, len(messages) - 1))  # messages before it are context
    encoded = encode(Conversation(messages, None, SOURCE, first), byte_tokenizer, ChatTemplate.builtin("chatml"))
    assert byte_tokenizer.decode(encoded.tokens.tolist()) == text
    assert runs(encoded, byte_tokenizer) == answers[first // 2 :]


def test_alpaca_input_goes_where_the_template_has_room(byte_tokenizer):
    messages = [{"role": "user", "content": "Add.", "input": "1 2"}, {"role": "assistant", "content": "3"}]
    conversation = Conversation(messages, None, SOURCE)
    chatml = encode(conversation, byte_tokenizer, ChatTemplate.builtin("chatml"))
    assert "<|im_start|>user\nAdd.\n1 2<|im_end|>" in byte_tokenizer.decode(chatml.tokens.tolist())
    # The text of stanford_alpaca's train.py.
    alpaca = encode(conversation, byte_tokenizer, ChatTemplate.builtin("alpaca", byte_tokenizer))
    assert byte_tokenizer.decode(alpaca.tokens.tolist()) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:3</s>"
    )
    assert runs(alpaca, byte_tokenizer) == ["3</s>"]


def test_what_the_template_leaves_out_is_refused(byte_tokenizer):
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    def only_content(messages, tools, add_generation_prompt):
        pieces = [Piece(m["content"] + "</s>", "markup", 0 if m["role"] == "assistant" else None) for m in messages]
        return Rendered.from_pieces(pieces)

    with pytest.raises(RowError, match="rows.jsonl:4: the chat template does not write out the call of 'weather'"):
        encode(Conversation(messages, None, SOURCE), byte_tokenizer, ChatTemplate("plain", only_content, ("</s>",)))
    with pytest.raises(RowError, match="rows.jsonl:4: .*tools"):
        encode(Conversation(messages, [{}], SOURCE), byte_tokenizer, ChatTemplate.builtin("alpaca", byte_tokenizer))
    with pytest.raises(ValueError, match="rows.jsonl:4: a conversation needs a chat template"):
        encode(Conversation(messages, None, SOURCE), byte_tokenizer, None)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), limit=st.integers(2, 12), policy=st.sampled_from(["error", "drop", "truncate", "split"]))
def test_fit_accounts_for_every_supervised_token(documents_strategy, data, limit, policy):
    """Tokens are unique, so each prediction can be followed from the document into the pieces."""
    (document,) = data.draw(documents_strategy(max_size=1))
    report = EncodeReport(limit, policy)
    too_long = len(document) > limit
    if too_long and policy == "error":
        with pytest.raises(ValueError, match=f"{len(document)} tokens, more than max_length_tokens = {limit}") as told:
            fit(document, limit, policy, report)
        assert "--max-length-tokens" in str(told.value)  # of a command without a recipe, which has no more to offer
        assert "of a recipe, choose data.overlong" in str(told.value)
        return

    pieces = fit(document, limit, policy, report)

    def predicted(piece):
        return [(piece.tokens[i - 1], piece.tokens[i]) for i in range(1, len(piece)) if piece.targets_mask[i]]

    before, after = predicted(document), [pair for piece in pieces for pair in predicted(piece)]
    assert all(len(piece) <= limit and piece.num_targets and piece.source == document.source for piece in pieces)
    if not too_long or policy == "split":
        assert after == before
    elif policy == "truncate":
        assert after == [pair for pair in before if pair[1] < document.tokens[0] + limit]
    else:
        assert after == []
    assert report.overlong == too_long
    assert report.targets == len(after) and report.targets + report.lost_targets == len(before)
    assert report.documents == len(pieces) and report.tokens == sum(map(len, pieces))
    assert report.lost_documents == (too_long and policy == "drop")
    if policy != "split":
        assert report.documents + report.lost_documents + report.without_targets == 1
