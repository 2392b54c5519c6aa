"""Greedy generation token for token against transformers; sampling against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from minift.generate import generate, sample
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,  # large, so that the model has something to say
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 6}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
}


def reference(family):
    """A tiny random fp32 model of transformers, and ours with its weights."""
    import transformers
    name, extra = FAMILIES[family]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    theirs = model_class(model_class.config_class(**SIZES, **extra)).eval()
    ours = CausalLM(ModelConfig.from_hf(theirs.config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture(scope="module")
def model():
    return reference("llama")[1]


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (7, 1, 19, 4, 12)]


@pytest.fixture(scope="module")
def unstopped(model, prompts):
    return generate(model, prompts, max_new_tokens=24, stop_token_ids=())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family, prompts):
    """Each prompt alone in transformers; all together, unpadded, in ours."""
    theirs, ours = reference(family)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    assert generate(ours, prompts, max_new_tokens=24, stop_token_ids=[]) == expected
    assert len({token for tokens in expected for token in tokens}) > 10, "the model must not just repeat itself"


@given(stops=st.sets(st.integers(0, VOCAB - 1), max_size=30), max_new_tokens=st.integers(1, 24))
def test_stop_tokens_cut_each_sequence_on_its_own(model, prompts, unstopped, stops, max_new_tokens):
    expected = []
    for tokens in unstopped:
        first = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
        expected.append(tokens[: min(first + 1, max_new_tokens)])
    assert generate(model, prompts, max_new_tokens=max_new_tokens, stop_token_ids=stops) == expected


@pytest.mark.parametrize("pack", [1, 5, 12, 20])
def test_prefill_in_packs(model, prompts, unstopped, pack, monkeypatch):
    """Several prompts in one pack, one prompt in several."""
    monkeypatch.setattr("minift.generate.PREFILL_TOKENS", pack)
    assert generate(model, prompts, max_new_tokens=24, stop_token_ids=()) == unstopped


def test_bfloat16_runs_in_bfloat16(prompts):
    model = reference("llama")[1].to(torch.bfloat16)
    answers = generate(model, prompts, max_new_tokens=3, stop_token_ids=())
    assert [len(answer) for answer in answers] == [3] * len(prompts)


def test_sampling_is_repeatable(model, prompts):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate(
            model, prompts, max_new_tokens=8, stop_token_ids=(), temperature=1.5, top_p=0.9, generator=generator
        )

    assert run(0) == run(0) != run(1)


class TestSample:
    DRAWS = 4000

    def frequencies(self, logits_V, temperature, top_p):
        generator = torch.Generator().manual_seed(0)
        drawn = sample(logits_V.expand(self.DRAWS, -1), temperature, top_p, generator)
        return (torch.bincount(drawn, minlength=len(logits_V)) / self.DRAWS).tolist()

    def distribution(self, logits_V, temperature, top_p):
        """Sorted, cut, divided again in Python floats; and how close a cumulative probability comes to top_p."""
        weights = torch.softmax(logits_V.double() / temperature, -1).tolist()
        nucleus, reached, margin = set(), 0.0, 1.0
        for token in sorted(range(len(weights)), key=lambda token: -weights[token]):
            if reached >= top_p:
                break
            nucleus.add(token)
            reached += weights[token]
            margin = min(margin, abs(reached - top_p))
        return [weight / reached if token in nucleus else 0.0 for token, weight in enumerate(weights)], margin

    @given(
        logits=st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True),
        temperature=st.sampled_from([0.5, 1.0, 3.0]),
        top_p=st.sampled_from([0.05, 0.5, 0.83, 1.0]),
    )
    def test_distribution(self, logits, temperature, top_p):
        logits_V = torch.tensor(logits) / 10
        expected, margin = self.distribution(logits_V, temperature, top_p)
        assume(top_p == 1 or margin > 1e-5)  # fp32 may round across the border
        for frequency, probability in zip(self.frequencies(logits_V, temperature, top_p), expected, strict=True):
            # Five standard deviations of a frequency among DRAWS draws; tokens outside the nucleus never come.
            assert abs(frequency - probability) <= 5 * math.sqrt(probability * (1 - probability) / self.DRAWS)

    def test_nucleus_larger_than_the_first_candidates(self):
        """1000 tokens that are nearly alike: 900 of them make the nucleus, more than are looked at first."""
        logits_V = torch.linspace(0.001, 0, 1000)
        expected, _ = self.distribution(logits_V, 1.0, 0.9)
        support = {token for token, frequency in enumerate(self.frequencies(logits_V, 1.0, 0.9)) if frequency}
        assert support <= {token for token, probability in enumerate(expected) if probability}
        assert len(support) > 850

    def test_temperature_zero_is_argmax(self):
        logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
        assert torch.equal(sample(logits, 0.0), logits.argmax(-1))
        assert torch.equal(sample(logits, 1e-4), logits.argmax(-1))
        assert torch.equal(sample(logits, 1.0, top_p=1e-6), logits.argmax(-1))


class TestRefusals:
    def test_lengths(self, model):
        with pytest.raises(ValueError, match="Prompt 1 has no tokens"):
            generate(model, [[1], []], max_new_tokens=2, stop_token_ids=())
        with pytest.raises(ValueError, match="max_new_tokens is 0"):
            generate(model, [[1]], max_new_tokens=0, stop_token_ids=())
        with pytest.raises(ValueError, match="60 tokens; with max_new_tokens = 6 .* 64 positions"):
            generate(model, [[1] * 60], max_new_tokens=6, stop_token_ids=())
        assert len(generate(model, [[1] * 60], max_new_tokens=5, stop_token_ids=())[0]) == 5
        assert generate(model, [], max_new_tokens=1, stop_token_ids=()) == []

    @pytest.mark.parametrize("temperature, top_p", [(-1.0, 1.0), (1.0, 0.0), (1.0, 1.5)])
    def test_sampling(self, model, temperature, top_p):
        with pytest.raises(ValueError, match="valid: 0 or more, and above 0 up to 1"):
            generate(model, [[1]], max_new_tokens=1, stop_token_ids=(), temperature=temperature, top_p=top_p)
