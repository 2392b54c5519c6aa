"""A model that one process holds whole, with its tokenizer and chat template: it answers, is graded, has a loss.

    assistant = load_assistant("model/", "runs/first/export/adapter")
    print(answer(assistant, "What is 2 + 2?"))
    scores = grade_calls(assistant, Path("answers.json"), world)

Grading under `torchrun` splits the questions, not the model. Adapters stay beside the weights, as they were trained;
merging first (`minift merge`) makes generation faster and rounds the weights once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minift.checkpoint.adapters import load_resident
from minift.data.config import DataConfig
from minift.data.loader import eval_batches
from minift.data.prepare import choose_template, encode_split
from minift.data.rendered import encode_rendered
from minift.data.template import ChatTemplate
from minift.data.tokenizer import Tokenizer
from minift.dist.collectives import gather_objects, sum_over_ranks
from minift.dist.process import World
from minift.eval.loss import mean_loss, perplexity
from minift.eval.tasks import CallScore, evaluate_function_calls, in_order, read_call_examples
from minift.generate import generate
from minift.model.decoder import CausalLM
from minift.objectives.sft import SupervisedTokens
from minift.peft.manage import constant_weights
from minift.peft.resident import Residents
from minift.quant.linear import QuantConfig
from minift.quant.model import load_model


@dataclass(frozen=True)
class Assistant:
    """Ready to answer. `template` is None where the tokenizer has none: prompts are then continued as plain text.
    `residents`: the model's adapters, by the folders they came from."""

    model: CausalLM
    residents: Residents
    tokenizer: Tokenizer
    template: ChatTemplate | None
    device: torch.device


def load_assistant(
    model_folder: str,
    adapter_folders: str | Sequence[str] = (),
    *,
    template: str = "auto",
    quant: QuantConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
) -> Assistant:
    """Read a Hugging Face folder and any PEFT adapter folders, all of which are active. `template`: auto (the
    tokenizer's) or a built-in name. `quant`: hold the weights in 4 bits, as an adapter was trained on. `device`: the
    first GPU, or the CPU where there is none. Raises ValueError for folders that do not fit."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_folder(model_folder)
    if template != "auto":
        chosen = ChatTemplate.builtin(template, tokenizer)
    else:
        chosen = ChatTemplate.from_tokenizer(tokenizer) if tokenizer.chat_template else None
    model = load_model(model_folder, quant, dtype, device)
    residents = Residents(model.eval())
    folders = [adapter_folders] if isinstance(adapter_folders, str) else adapter_folders
    for folder in folders:
        load_resident(residents, folder, folder, dtype=dtype)
    residents.activate(*folders)
    return Assistant(model, residents, tokenizer, chosen, device)


def answer(
    assistant: Assistant,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """What the model says to `prompt`, without special tokens. Equal seeds give equal answers on one device."""
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    with constant_weights(assistant.model):
        (text,) = _answers(assistant, [prompt], **options)
    return text


def answer_each(
    assistant: Assistant, prompts: Sequence[str], adapters: Sequence[str | None], **options: Any
) -> list[str]:
    """What prompt i gets from the model with the resident adapter adapters[i], None for the base alone; all of them in
    one batch (see `peft.per_row`). options: as of `answer`."""
    from minift.peft.per_row import per_row

    if len(prompts) != len(adapters):
        raise ValueError(f"{len(prompts)} prompts and {len(adapters)} adapters; valid: one adapter, or None, for each")
    with per_row(assistant.residents, adapters) as rows:
        return _answers(assistant, prompts, before_forward=rows.begin, **options)


def _answers(assistant: Assistant, prompts: Sequence[str], *, seed: int = 0, **options: Any) -> list[str]:
    tokenizer, template = assistant.tokenizer, assistant.template
    if template is None:
        start = [index for index in [tokenizer.bos_id] if index is not None]
        ids = [start + tokenizer.encode(prompt) for prompt in prompts]
        stops = [index for index in [tokenizer.eos_id] if index is not None]
    else:
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        rendered = [template.render(message, add_generation_prompt=True) for message in messages]
        ids = [encode_rendered(tokenizer, text)[0] for text in rendered]
        stops = template.stop_token_ids(tokenizer)
    if not all(ids):
        raise ValueError("the prompt is empty; give it at least one token")
    generator = torch.Generator(assistant.device).manual_seed(seed)
    options = {"max_new_tokens": 256} | options
    new_ids = generate(assistant.model, ids, stop_token_ids=stops, generator=generator, **options)
    return [tokenizer.decode(new, skip_special=True) for new in new_ids]


def grade_calls(
    assistant: Assistant, answers_file: Path, world: World, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Exact function calls over all ranks: {"correct", "total", "results": one object per question}. Collective."""
    if assistant.template is None:
        raise ValueError("this tokenizer has no chat template, and questions are asked in one; give --template NAME")
    with constant_weights(assistant.model):
        results = evaluate_function_calls(
            assistant.model,
            assistant.tokenizer,
            assistant.template,
            read_call_examples(answers_file),
            rank=world.rank,
            world_size=world.size,
            on_progress=on_progress,
        )
    ordered = in_order(gather_objects(results, world))
    return {**asdict(CallScore.of(ordered)), "results": [asdict(result) for result in ordered]}


def measure_loss(assistant: Assistant, config: DataConfig, microbatch_tokens: int, world: World) -> dict[str, Any]:
    """Mean loss in nats per supervised token of `config.train` over all ranks, and its perplexity. Collective."""
    template = assistant.template or choose_template(config, assistant.tokenizer)
    documents = encode_split(config, assistant.tokenizer, template)
    batches = eval_batches(documents, microbatch_tokens, world.rank, world.size)
    loss, targets = mean_loss(
        assistant.model, SupervisedTokens(), batches, assistant.device, partial(sum_over_ranks, world=world)
    )
    return {"loss": loss, "perplexity": perplexity(loss), "targets": targets, "documents": len(documents)}
