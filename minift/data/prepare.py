"""Rows -> `Documents`, once: every later run maps the result from a cache folder.

    template = choose_template(config.data, tokenizer)
    documents = prepare(config.data, tokenizer, template, cache_folder)
    validation = prepare(config.data, tokenizer, template, cache_folder, split="validation")

The folder's name is a hash of all that the result depends on: the bytes of the files, tokenizer, template, policies. It
is written under another name and renamed when complete. Any number of processes may call this at the same time: one of
them works, the others wait at a file lock (on file systems without locks all of them work, and the first to finish
wins). No collective is waiting meanwhile, so none can time out.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from minift.data.config import DataConfig
from minift.data.documents import Documents, Encoded, EncodeReport
from minift.data.encode import encode, fit
from minift.data.formats import Conversation, Document, convert, detect
from minift.data.rows import BadRows, RowError, read_rows
from minift.data.template import ChatTemplate
from minift.data.tokenizer import Tokenizer

Split = Literal["train", "validation"]

Objective = Literal["sft", "lm"]
"""What is supervised. sft: what the assistant says, or the completion. lm: every token."""

VERSION = 1
"""Goes up whenever the same rows would be encoded differently."""


def choose_template(config: DataConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """What `data.template` asks for. auto: the tokenizer's own; where there is none, alpaca's if there are alpaca rows.

    None: there is none, and conversations will be refused; texts need none.
    """
    if config.template != "auto":
        return ChatTemplate.builtin(config.template, tokenizer)
    if tokenizer.chat_template:
        return ChatTemplate.from_tokenizer(tokenizer)
    if any(_format(file, config) == "alpaca" for file in (*config.train, *config.validation)):
        return ChatTemplate.builtin("alpaca", tokenizer)
    return None


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    cache_folder: str | Path,
    split: Split = "train",
    objective: Objective = "sft",
) -> Documents:
    """The encoded documents of a split, from the cache if they are there. `documents.report` says what was left out.

    template: from `choose_template`. Raises ValueError for files, rows and documents that the config's policies refuse,
    for a template that would train a broken model, and when nothing is left to train on.
    """
    if split == "validation" and not (config.validation or config.validation_share):
        raise ValueError("there is no validation data; set data.validation (files) or data.validation_share")
    cache_folder = Path(cache_folder)
    cache_folder.mkdir(parents=True, exist_ok=True)
    folder = cache_folder / _key(config, tokenizer, template, split, objective)
    with _lock(folder.with_suffix(".lock")):
        if not folder.exists():
            documents = encode_split(config, tokenizer, template, split, objective)
            with tempfile.TemporaryDirectory(dir=cache_folder, prefix=".writing-") as temporary:
                written = Path(temporary) / "documents"
                written.mkdir()
                documents.save(written)
                _rename_unless_there(written, folder)
    return Documents.open(folder)


def encode_split(
    config: DataConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    split: Split = "train",
    objective: Objective = "sft",
) -> Documents:
    """`prepare` without the cache: in memory."""
    report = EncodeReport(config.max_length_tokens, config.overlong)
    bad_rows = BadRows(config.on_bad_row)
    documents: list[Encoded] = []
    template_is_checked = False
    for item in _items(config, split, bad_rows, report):
        if isinstance(item, Conversation) and template is not None and not template_is_checked:
            template.check(tokenizer, turns=1)  # templates for a single turn are fine as long as rows have no more
            template_is_checked = True
        try:
            encoded = encode(item, tokenizer, template)
        except RowError as error:
            bad_rows.add(error)
        else:
            if objective == "lm":  # before `fit`, which leaves out what has nothing to be learnt
                encoded = replace(encoded, targets_mask=np.ones(len(encoded), bool))
            documents += fit(encoded, config.max_length_tokens, config.overlong, report)
    report.bad_rows, report.bad_row_examples = bad_rows.count, bad_rows.examples
    if not documents:
        raise ValueError("\n  ".join([f"nothing to learn from in the {split} data:", *report.lines()]))
    return Documents.from_encoded(documents, report)


def is_held_out(number: int, config: DataConfig) -> bool:
    """Whether row `number` (from 1, over all files) belongs to the validation share: a hash of seed and number decides.

    So rows that are appended later do not move the others from one side to the other.
    """
    digest = hashlib.blake2b(f"{config.seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < config.validation_share * 2**64


def _items(
    config: DataConfig, split: Split, bad_rows: BadRows, report: EncodeReport
) -> Iterator[Conversation | Document]:
    """The rows of a split with their meaning; bad ones are noted and left out."""
    number = 0
    for file in _files(config, split):
        format = _format(file, config)
        report.formats[file] = format if config.format != "auto" else f"{format} (detected)"
        for row in read_rows(file, bad_rows):
            number += 1
            if config.validation_share and is_held_out(number, config) != (split == "validation"):
                continue
            report.rows += 1
            try:
                item = convert(row, format)
            except RowError as error:
                bad_rows.add(error)
            else:
                yield item


def _format(file: str, config: DataConfig) -> str:
    """The format of a file: as configured, or as its first row looks (skipping bad rows: the first of any format)."""
    if config.format != "auto":
        return config.format
    bad_rows = BadRows(config.on_bad_row)
    for row in read_rows(file, bad_rows):
        try:
            return detect(row)
        except RowError as error:
            bad_rows.add(error)
    raise ValueError("\n  ".join([f"{file}: there is no usable row in it", *bad_rows.examples]))


def _key(
    config: DataConfig, tokenizer: Tokenizer, template: ChatTemplate | None, split: Split, objective: Objective
) -> str:
    """A name for the result that changes whenever the result might."""
    depends_on = {
        "version": VERSION,
        "files": {file: _sha256(file) for file in _files(config, split)},
        "tokenizer": tokenizer.fingerprint(),
        "template": [template.name, template.source] if template else None,
        "policies": [config.format, config.max_length_tokens, config.overlong, config.on_bad_row, objective],
        "share": [split, config.validation_share, config.seed] if config.validation_share else None,
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]


def _files(config: DataConfig, split: Split) -> tuple[str, ...]:
    return config.validation if split == "validation" and config.validation else config.train


def _sha256(file: str) -> str:
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{file}: no such file")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _rename_unless_there(written: Path, folder: Path) -> None:
    try:
        written.rename(folder)
    except OSError:
        if not folder.exists():  # it exists where, without locks, another process was faster; its result is equal
            raise


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time, where the file system can do that; released by the system if the process dies."""
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
