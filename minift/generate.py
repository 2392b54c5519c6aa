"""Generation: a batch of prompts -> what the model writes after each. Used by evaluation, the CLI and rollouts.

    answers = generate(model, prompts, max_new_tokens=64, stop_token_ids=template.stop_token_ids(tokenizer))

Prompts of different lengths need no padding: they are prefilled packed, some thousand tokens at a time, and decoding
continues every row of the KV cache at its own length. A finished sequence leaves the batch, so the last steps cost
what the last sequences cost. Sequences never see each other; what one of them gets does not depend on the rest except
through the rounding of matrix products of another size (and, when sampling, the order of random numbers).

For a model that is whole on this process. Not here: beam search, repetition penalties, speculative decoding, streaming.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from minift.model.cache import KVCache
from minift.model.decoder import CausalLM

# Prompts are prefilled in packs of about this many tokens, which bounds activations, not the number of prompts.
PREFILL_TOKENS = 4096


@torch.inference_mode()
def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    before_forward: Callable[[Sequence[int], Tensor], None] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, in the order of the prompts; a stop token ends a sequence and is part of it.

    temperature 0 takes the likeliest token, else see `sample`; `generator` (on the model's device) makes sampling
    repeatable. before_forward(prompts, cu_seqlens) is told before each forward which prompts, by index, its documents
    are of, and where they lie (as in `CausalLM.forward`, but on the CPU). The cache takes len(prompts) · (longest
    prompt + max_new_tokens) tokens: split large sets of prompts. Raises ValueError for an empty prompt and for lengths
    beyond the model's positions.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; valid: 1 or more.")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature is {temperature}, top_p is {top_p}; valid: 0 or more, and above 0 up to 1.")
    if not prompts:
        return []
    if not all(map(len, prompts)):
        raise ValueError(f"Prompt {[len(prompt) for prompt in prompts].index(0)} has no tokens.")
    # The last new token is never fed back.
    max_tokens, num_virtual = max(map(len, prompts)) + max_new_tokens - 1, model.num_virtual_tokens
    if num_virtual + max_tokens > model.config.max_position_embeddings:
        virtual = f", after the adapter's {num_virtual} virtual tokens" if num_virtual else ""
        raise ValueError(
            f"The longest prompt has {max(map(len, prompts))} tokens{virtual}; with max_new_tokens = {max_new_tokens} "
            f"it would exceed the model's {model.config.max_position_embeddings} positions."
        )
    cache = model.new_cache(len(prompts), max_tokens)

    outputs: list[list[int]] = [[] for _ in prompts]
    owners = list(range(len(prompts)))  # row of the cache -> prompt
    tell = before_forward or (lambda prompts, cu_seqlens: None)
    logits_BV = _prefill(model, prompts, cache, tell)
    for _ in range(max_new_tokens - 1):
        tokens = sample(logits_BV, temperature, top_p, generator).tolist()
        for owner, token in zip(owners, tokens, strict=True):
            outputs[owner].append(token)
        rows = _without_gaps([token not in stop_token_ids for token in tokens])
        if not rows:
            return outputs
        cache.keep(rows)
        owners = [owners[row] for row in rows]
        logits_BV = _next_logits(model, [[tokens[row]] for row in rows], cache, partial(tell, owners))
    for owner, token in zip(owners, sample(logits_BV, temperature, top_p, generator).tolist(), strict=True):
        outputs[owner].append(token)
    return outputs


def sample(
    logits_BV: Tensor, temperature: float, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """One token per row: int64 (B,). Probabilities are softmax(logits / temperature) in fp32.

    With top_p < 1 only the nucleus is drawn from: the likeliest tokens, as few as reach the probability top_p
    (Holtzman et al., arXiv 1904.09751, section 3.1). Temperature 0 is argmax.
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    probabilities_BV = torch.softmax(logits_BV.float() / temperature, dim=-1)
    if top_p == 1:
        return torch.multinomial(probabilities_BV, 1, generator=generator).squeeze(1)
    # A nucleus is small as a rule, and sorting a whole vocabulary would take as long as the model: look at the top
    # few, and at more only if they do not reach top_p.
    num_candidates = 0
    reached = False
    while not reached and num_candidates < probabilities_BV.shape[1]:
        num_candidates = min(max(256, 16 * num_candidates), probabilities_BV.shape[1])
        candidates_BN, tokens_BN = probabilities_BV.topk(num_candidates, dim=-1)
        cumulative_BN = candidates_BN.cumsum(dim=-1)
        reached = bool((cumulative_BN[:, -1] >= top_p).all())
    # A token belongs to the nucleus if those before it do not reach top_p; so the first always does.
    nucleus_BN = candidates_BN.masked_fill(cumulative_BN - candidates_BN >= top_p, 0.0)
    choice_B1 = torch.multinomial(nucleus_BN, 1, generator=generator)
    return tokens_BN.gather(1, choice_B1).squeeze(1)


def _prefill(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    cache: KVCache,
    tell: Callable[[Sequence[int], Tensor], None],
) -> Tensor:
    """Fill the rows of a new cache; returns the logits (B, V) that follow each prompt."""
    logits = []
    start = 0
    while start < len(prompts):
        stop, num_tokens = start + 1, len(prompts[start])
        while stop < len(prompts) and num_tokens + len(prompts[stop]) <= PREFILL_TOKENS:
            num_tokens += len(prompts[stop])
            stop += 1
        # These rows as a cache of their own: the same memory, fewer documents per forward.
        part = cache.part(start, stop)
        # More than one piece only where a single prompt is longer than a pack.
        for offset in range(0, max(map(len, prompts[start:stop])), PREFILL_TOKENS):
            pieces = [prompt[offset : offset + PREFILL_TOKENS] for prompt in prompts[start:stop]]
            last_logits = _next_logits(model, pieces, part, partial(tell, range(start, stop)))
        logits.append(last_logits)
        cache.lengths[start:stop] = part.lengths
        start = stop
    return torch.cat(logits)


def _next_logits(
    model: CausalLM, documents: Sequence[Sequence[int]], cache: KVCache, tell: Callable[[Tensor], None]
) -> Tensor:
    """Append one document to each row of the cache; returns the logits (B, V) that follow each."""
    device = cache.keys[0].device
    lengths = torch.tensor([len(document) for document in documents])
    tokens = [token for document in documents for token in document]
    positions = [
        held + i for held, document in zip(cache.lengths, documents, strict=True) for i in range(len(document))
    ]
    ends_B = lengths.cumsum(0)
    cu_seqlens = torch.nn.functional.pad(ends_B, (1, 0)).to(torch.int32)
    last_B = (ends_B - 1).to(device)
    tell(cu_seqlens)
    return model(
        torch.tensor(tokens, device=device),
        torch.tensor(positions, device=device),
        cu_seqlens.to(device),
        int(lengths.max()),
        head=lambda hidden_TD, lm_head: lm_head(hidden_TD[last_B]),
        cache=cache,
    )


def _without_gaps(running: Sequence[bool]) -> list[int]:
    """The rows that go on, in the order that moves fewest: gaps are filled from the end."""
    count = sum(running)
    movers = iter(row for row in range(count, len(running)) if running[row])
    return [row if running[row] else next(movers) for row in range(count)]
