"""Tasks a model is graded on by what it writes: generate greedily, then judge every answer by exact rules.

    examples = read_call_examples(Path("data/bfcl/answers.json"))
    results = evaluate_function_calls(model, tokenizer, template, examples, rank=0, world_size=2)
    print(CallScore.of(results))

Every process has the whole model and answers its own share of the questions; who calls gathers the lists of all ranks
and puts them in order with `in_order`. Nothing here communicates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minift.data.rendered import encode_rendered
from minift.data.template import ChatTemplate
from minift.data.tokenizer import Tokenizer
from minift.eval.calls import ExpectedCall, VerdictKind, check_call
from minift.generate import generate
from minift.model.decoder import CausalLM


@dataclass(frozen=True)
class CallExample:
    """One question: its place in the file, the prompt as chat messages, and what counts as right."""

    index: int
    id: str
    prompt: list[dict[str, str]]
    expected: ExpectedCall


@dataclass(frozen=True)
class CallResult:
    """One answer, judged. `question` is the last message of the prompt; kind and reason are the `Verdict`'s."""

    index: int
    id: str
    question: str
    answer: str
    correct: bool
    kind: VerdictKind
    reason: str


@dataclass(frozen=True)
class CallScore:
    """How many of how many were right."""

    correct: int
    total: int

    @classmethod
    def of(cls, results: Sequence[CallResult]) -> CallScore:
        return cls(sum(result.correct for result in results), len(results))


def read_call_examples(file: Path) -> list[CallExample]:
    """The questions of an `answers.json` that `bfcl.prepare` wrote. Raises `ValueError` naming file and entry."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist; `minift data bfcl FOLDER` writes FOLDER/answers.json")
    try:
        return [
            CallExample(
                index,
                entry["id"],
                entry["prompt"],
                ExpectedCall(entry["name"], tuple(entry["required"]), entry["allowed"]),
            )
            for index, entry in enumerate(json.loads(file.read_text(encoding="utf-8")))
        ]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not what `minift data bfcl` writes: {error!r}") from None


def evaluate_function_calls(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    examples: Sequence[CallExample],
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 20,
    max_new_tokens: int = 96,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[CallResult]:
    """Answer and judge this rank's share: examples rank, rank + world_size, ...

    Decoding is greedy and stops at the template's stop tokens or after `max_new_tokens`. `batch_size` questions are
    answered at once, which bounds the KV cache. `on_progress(done, total)` is called after each batch with this rank's
    counts.
    """
    assert 0 <= rank < world_size
    local_examples = examples[rank::world_size]
    stop_token_ids = template.stop_token_ids(tokenizer)
    results: list[CallResult] = []
    for start in range(0, len(local_examples), batch_size):
        batch = local_examples[start : start + batch_size]
        prompts = [
            encode_rendered(tokenizer, template.render(example.prompt, add_generation_prompt=True))[0]
            for example in batch
        ]
        outputs = generate(model, prompts, max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids)
        for example, tokens in zip(batch, outputs, strict=True):
            answer = tokenizer.decode(tokens, skip_special=True).strip()
            verdict = check_call(answer, example.expected)
            results.append(
                CallResult(
                    index=example.index,
                    id=example.id,
                    question=example.prompt[-1]["content"],
                    answer=answer,
                    correct=verdict.correct,
                    kind=verdict.kind,
                    reason=verdict.reason,
                )
            )
        on_progress(len(results), len(local_examples))
    return results


def in_order(results_by_rank: Iterable[Iterable[CallResult]]) -> list[CallResult]:
    """The results of all ranks in the order of the file."""
    return sorted((result for results in results_by_rank for result in results), key=lambda result: result.index)
