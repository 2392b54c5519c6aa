"""What a user may say about the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Format = Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text"]
OverlongPolicy = Literal["error", "drop", "truncate", "split"]
BadRowPolicy = Literal["error", "skip"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows to train on, and what to do with those that do not fit."""

    train: tuple[str, ...]
    """Files to train on: JSON array, JSON lines or Parquet (told apart by content, not by name)."""

    max_length_tokens: int
    """Most tokens in one document (conversation, prompt with completion, text); `overlong` says what happens above."""

    validation: tuple[str, ...] = ()
    """Files to compute the validation loss on, in any of the formats of `train`."""

    validation_share: float = 0.0
    """Without validation files: hold out about this share (0 to 1) of the training rows, by seed and row number."""

    format: Format = "auto"
    """How rows are laid out; auto: by the fields of the first row of each file, and reported."""

    template: str = "auto"
    """Chat template; auto: the tokenizer's own. Built in: chatml, llama2, llama3, chatglm3, alpaca."""

    overlong: OverlongPolicy = "error"
    """Documents above max_length_tokens: refuse, drop, keep the start, or cut into several documents."""

    on_bad_row: BadRowPolicy = "error"
    """Rows with a missing, empty or wrongly typed field: refuse, or skip and count."""

    shuffle: bool = True
    """A new order in every epoch, a function of the seed and the epoch; false: the order of the files."""

    seed: int = 0
    """Seed of the order and of the rows held out."""

    def __post_init__(self) -> None:
        if not self.train or isinstance(self.train, str):
            raise ValueError(f"data.train is {self.train!r}; valid: a list of one or more files")
        if isinstance(self.validation, str):
            raise ValueError(f"data.validation is {self.validation!r}; valid: a list of files")
        if self.max_length_tokens < 2:
            raise ValueError(f"data.max_length_tokens is {self.max_length_tokens}; valid: 2 or more")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"data.validation_share is {self.validation_share}; valid: from 0 to below 1")
        if self.validation and self.validation_share:
            raise ValueError("data.validation and data.validation_share are both set; valid: one of the two")
        if self.seed < 0:
            raise ValueError(f"data.seed is {self.seed}; valid: 0 or more")
        for name, value, valid in (
            ("format", self.format, get_args(Format)),
            ("overlong", self.overlong, get_args(OverlongPolicy)),
            ("on_bad_row", self.on_bad_row, get_args(BadRowPolicy)),
        ):
            if value not in valid:
                raise ValueError(f"data.{name} is {value!r}; valid: {', '.join(valid)}")
