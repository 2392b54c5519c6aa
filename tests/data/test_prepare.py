"""From files to documents: the cache, several processes at once, the held-out share, and refusals."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import time
from dataclasses import replace

import pytest

from minift.data import prepare as module
from minift.data.config import DataConfig
from minift.data.loader import StepLoader
from minift.data.prepare import choose_template, prepare
from minift.data.rendered import Piece, Rendered
from minift.data.template import ChatTemplate


@pytest.fixture
def rows_file(tmp_path):
    def write(rows, name="rows.jsonl"):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
        return str(tmp_path / name)

    return write


def questions(n):
    return [{"prompt": f"say {i}:", "completion": " yes" * (1 + i % 5)} for i in range(n)]


def config_for(*files, **more) -> DataConfig:
    return DataConfig(train=files, **{"max_length_tokens": 64, **more})


def folders(cache):
    return sorted(path for path in cache.iterdir() if path.suffix != ".lock")


def test_second_call_reads_the_cache(tmp_path, rows_file, byte_tokenizer, monkeypatch):
    config = config_for(rows_file(questions(7)))
    made = prepare(config, byte_tokenizer, None, tmp_path / "cache")
    monkeypatch.setattr(module, "encode_split", None)
    again = prepare(config, byte_tokenizer, None, tmp_path / "cache")
    assert [document.tokens.tolist() for document in again] == [document.tokens.tolist() for document in made]
    assert again.report == made.report and again.report.rows == again.report.documents == 7
    assert again.report.lines()[0].endswith("rows.jsonl: prompt_completion (detected)")
    assert len(folders(tmp_path / "cache")) == 1


def test_key_depends_on_everything_that_matters(tmp_path, rows_file, byte_tokenizer):
    """Each change gives another folder; what only concerns the order does not."""
    config = config_for(rows_file(questions(7)), on_bad_row="skip")
    chatml = ChatTemplate.builtin("chatml")
    variants = [
        (config, None, "train"),
        (config, chatml, "train"),
        (config, ChatTemplate("chatml", None, (), "other source"), "train"),
        (replace(config, format="prompt_completion"), None, "train"),
        (replace(config, max_length_tokens=63), None, "train"),
        (replace(config, overlong="drop"), None, "train"),
        (replace(config, on_bad_row="error"), None, "train"),
        (replace(config, validation_share=0.4), None, "train"),
        (replace(config, validation_share=0.4), None, "validation"),
        (replace(config, validation_share=0.4, seed=1), None, "train"),
        (config, None, "train", "lm"),
    ]
    for count, (variant, template, *rest) in enumerate(variants, start=1):
        prepare(variant, byte_tokenizer, template, tmp_path / "cache", *rest)
        assert len(folders(tmp_path / "cache")) == count, variants[count - 1]
    prepare(replace(config, shuffle=False, seed=5), byte_tokenizer, None, tmp_path / "cache")
    assert len(folders(tmp_path / "cache")) == len(variants)
    rows_file(questions(8))  # the same name, other bytes
    assert len(prepare(config, byte_tokenizer, None, tmp_path / "cache")) == 8


@pytest.mark.parametrize("locks_work", [True, False])
def test_many_processes_at_once(tmp_path, rows_file, byte_tokenizer, monkeypatch, locks_work):
    """With file locks one process works and the others wait; without, all work and the first one wins."""
    config = config_for(rows_file(questions(5)))
    cache, log = tmp_path / "cache", tmp_path / "log"
    real = module.encode_split

    def slow(*arguments):
        with log.open("a") as file:
            file.write("encoded\n")
        time.sleep(0.3)
        return real(*arguments)

    monkeypatch.setattr(module, "encode_split", slow)
    if not locks_work:
        monkeypatch.setattr(module, "_lock", lambda path: contextlib.nullcontext())
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def work():
        documents = prepare(config, byte_tokenizer, None, cache)
        results.put([document.tokens.tolist() for document in documents])

    processes = [context.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    first, *others = [results.get() for _ in processes]
    assert len(first) == 5 and all(other == first for other in others)
    assert len(log.read_text().split()) == (1 if locks_work else 3)
    assert len(folders(cache)) == 1  # and no half-written one


def test_failure_leaves_nothing_behind(tmp_path, rows_file, byte_tokenizer):
    config = config_for(rows_file([*questions(3), {"prompt": "x"}]))
    with pytest.raises(ValueError, match=r"rows.jsonl:4: field completion is missing; there is: prompt"):
        prepare(config, byte_tokenizer, None, tmp_path / "cache")
    assert folders(tmp_path / "cache") == []


def test_held_out_share(tmp_path, rows_file, byte_tokenizer):
    """Disjoint, exhaustive, of about the right size, stable when rows are appended, another one for another seed."""

    def lines(config, split):
        return [document.source.line for document in prepare(config, byte_tokenizer, None, tmp_path / "cache", split)]

    config = config_for(rows_file(questions(300)), validation_share=0.2)
    train, validation = lines(config, "train"), lines(config, "validation")
    assert sorted(train + validation) == list(range(1, 301))
    assert abs(len(validation) - 60) < 35  # 5 standard deviations
    assert lines(replace(config, seed=1), "validation") != validation
    rows_file(questions(320))
    assert [line for line in lines(config, "validation") if line <= 300] == validation


def test_validation_files(tmp_path, rows_file, byte_tokenizer):
    config = config_for(rows_file(questions(3)), validation=(rows_file([{"text": "yes"}], "valid.jsonl"),))
    assert len(prepare(config, byte_tokenizer, None, tmp_path)) == 3
    (document,) = prepare(config, byte_tokenizer, None, tmp_path, "validation")
    assert document.source.file.endswith("valid.jsonl")
    with pytest.raises(ValueError, match="there is no validation data"):
        prepare(replace(config, validation=()), byte_tokenizer, None, tmp_path, "validation")


def test_losses_are_reported(tmp_path, rows_file, byte_tokenizer):
    rows = [*questions(4), {"prompt": "say", "completion": ""}, {"prompt": "a" * 90, "completion": " yes no"}, {}]
    config = config_for(rows_file(rows), on_bad_row="skip", overlong="truncate")
    report = prepare(config, byte_tokenizer, None, tmp_path / "cache").report
    assert (report.rows, report.documents, report.bad_rows) == (7, 4, 2)
    assert (report.overlong, report.lost_documents, report.lost_targets, report.without_targets) == (1, 0, 3, 1)
    text = "\n".join(report.lines())
    assert "2 bad rows were skipped" in text and "rows.jsonl:5: field completion is empty" in text
    assert "1 documents exceed max_length_tokens = 64 (overlong: truncate): 0 documents and 3 supervised tokens" in text
    assert "1 documents were left out: no token in them is supervised" in text


def test_language_modelling_learns_prompts_too(tmp_path, rows_file, byte_tokenizer):
    """Each token but a document's first is a target of exactly one piece, those of a prompt of several pieces too."""
    config = config_for(rows_file([*questions(3), {"prompt": "a b" * 60, "completion": " yes no"}]), overlong="split")
    whole = prepare(replace(config, max_length_tokens=999), byte_tokenizer, None, tmp_path)
    cut = prepare(config, byte_tokenizer, None, tmp_path, objective="lm")
    assert sum(document.num_targets for document in cut) == sum(len(document) - 1 for document in whole)
    assert cut.report.targets == sum(document.num_targets for document in cut)
    assert cut.report.overlong == 1 and cut.report.without_targets == cut.report.lost_targets == 0


def test_nothing_to_learn_from(tmp_path, rows_file, byte_tokenizer):
    config = config_for(rows_file([{"prompt": "a" * 90, "completion": "yes"}]), overlong="truncate")
    with pytest.raises(ValueError, match="nothing to learn from in the train data:(.|\n)*no token in them"):
        prepare(config, byte_tokenizer, None, tmp_path / "cache")
    with pytest.raises(ValueError, match="there is no usable row in it(.|\n)*rows.jsonl:1: no known format"):
        prepare(config_for(rows_file([{}]), on_bad_row="skip"), byte_tokenizer, None, tmp_path / "cache")


def test_template_that_never_stops_is_refused(tmp_path, rows_file, byte_tokenizer):
    def without_stop(messages, tools, add_generation_prompt):
        return Rendered.from_pieces(
            Piece(f"{message['role']} {message['content']}", "markup", 0 if message["role"] == "assistant" else None)
            for message in messages
        )

    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    config = config_for(rows_file([{"messages": messages}]))
    template = ChatTemplate("endless", without_stop, ("</s>",))
    with pytest.raises(ValueError, match="Chat template 'endless'.* does not contain the stop token"):
        prepare(config, byte_tokenizer, template, tmp_path / "cache")


def test_first_bad_rows_do_not_decide_the_format(tmp_path, rows_file, byte_tokenizer):
    config = config_for(rows_file([{"id": 1}, {"text": "yes"}]), on_bad_row="skip")
    documents = prepare(config, byte_tokenizer, None, tmp_path)
    assert (len(documents), documents.report.bad_rows) == (1, 1)


def test_choice_of_template(rows_file, byte_tokenizer):
    alpaca = rows_file([{"instruction": "a", "output": "b"}], "alpaca.jsonl")
    text = rows_file([{"text": "a"}], "text.jsonl")
    assert choose_template(config_for(text), byte_tokenizer) is None
    assert choose_template(config_for(text, alpaca), byte_tokenizer).name == "alpaca"
    assert choose_template(config_for(alpaca, template="chatml"), byte_tokenizer).name == "chatml"


def test_rows_to_microbatches(tmp_path, rows_file, byte_tokenizer):
    """Everything together: what comes out of the loader in an epoch is what the rows say, EOS and all."""
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "yes" * (i + 1)}]}
        for i in range(6)
    ]
    config = config_for(rows_file(rows), template="chatml", seed=3)
    documents = prepare(config, byte_tokenizer, choose_template(config, byte_tokenizer), tmp_path / "cache")
    loader = StepLoader(documents, examples_per_step=4, microbatch_tokens=64, rank=0, world_size=1, seed=config.seed)
    learnt = []
    for (microbatches, _), _ in zip(loader, range(loader.steps_per_epoch), strict=False):
        for batch in microbatches:
            targets = batch.targets_T[batch.targets_T >= 0].tolist()
            learnt += byte_tokenizer.decode(targets).split("<|im_end|>")[:-1]
    assert sorted(learnt) == sorted("yes" * (i + 1) for i in range(6))
