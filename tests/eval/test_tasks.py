"""Grading by generated text, with a stand-in for the model that knows what it was asked.

Oracle: who answers which question with what is decided here, so the grades are known beforehand.
"""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from minift.data.template import ChatTemplate
from minift.data.tokenizer import Tokenizer
from minift.eval import tasks
from minift.eval.calls import ExpectedCall
from minift.eval.tasks import CallExample, CallScore, evaluate_function_calls, in_order


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """One token per byte, and ChatML's two markers."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return Tokenizer.from_folder(folder)


def examples(count: int) -> list[CallExample]:
    prompts = ([{"role": "system", "content": "f"}, {"role": "user", "content": f"{i}?"}] for i in range(count))
    return [CallExample(i, f"id{i}", prompt, ExpectedCall("f", ("a",), {"a": [i]})) for i, prompt in enumerate(prompts)]


@given(
    answers=st.lists(st.sampled_from(["right", "wrong", "noise"]), max_size=12),
    world_size=st.integers(1, 3),
    batch_size=st.integers(1, 5),
)
def test_every_question_is_asked_once_and_graded(tokenizer, answers, world_size, batch_size):
    template = ChatTemplate.builtin("chatml", tokenizer)
    asked, progress = [], []

    def stand_in(model, prompts, *, max_new_tokens, stop_token_ids):
        assert (model, max_new_tokens) == ("model", 7)
        assert list(stop_token_ids) == [tokenizer.token_id("<|im_end|>")]
        assert len(prompts) <= batch_size
        outputs = []
        for prompt in map(tokenizer.decode, prompts):
            system, user, rest = prompt.split("<|im_end|>\n")
            assert (system, rest) == ("<|im_start|>system\nf", "<|im_start|>assistant\n")
            i = int(user.removeprefix("<|im_start|>user\n").rstrip("?"))
            asked.append(i)
            text = {"right": f"f(a={i})<|im_end|>", "wrong": " f(a='x') <|im_end|>", "noise": "f(a="}[answers[i]]
            outputs.append(tokenizer.encode(text))
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "generate", stand_in)
        by_rank = [
            evaluate_function_calls(
                "model", tokenizer, template, examples(len(answers)), rank=rank, world_size=world_size,
                batch_size=batch_size, max_new_tokens=7, on_progress=lambda *counts: progress.append(counts),
            )
            for rank in range(world_size)
        ]  # fmt: skip

    assert sorted(asked) == list(range(len(answers)))
    assert max(map(len, by_rank)) - min(map(len, by_rank)) <= 1
    assert [counts for counts in progress if counts[0] == counts[1]] == [(len(r), len(r)) for r in by_rank if r]
    results = in_order(by_rank)
    kinds = {"right": "correct", "wrong": "wrong arguments", "noise": "not a call"}
    assert [result.kind for result in results] == [kinds[answer] for answer in answers]
    assert [result.question for result in results] == [f"{i}?" for i in range(len(answers))]
    assert all(result.answer == "f(a='x')" for result in results if result.kind == "wrong arguments")
    assert CallScore.of(results) == CallScore(answers.count("right"), len(answers))
