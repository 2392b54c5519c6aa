"""Combining adapters. Oracle: PEFT's `add_weighted_adapter`, module by module, and what the papers say of dare."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from minift.checkpoint.adapters import read_config, save_adapter
from minift.checkpoint.combine import combine_adapters, read_updates
from minift.checkpoint.fingerprint import Sample, read_fingerprint
from minift.peft.combine import Combination, Update, combine, nearest_of_rank
from minift.peft.dora import DoraConfig
from minift.peft.lora import LoraConfig

SHAPES = {"q_proj": (16, 16), "k_proj": (8, 16), "up_proj": (24, 16), "embed_tokens": (40, 16)}
PARENTS = {"up_proj": "model.layers.0.mlp", "embed_tokens": "model"}
WEIGHTS = [0.7, -0.4, 1.3]


def write_adapter(folder, config: LoraConfig, seed: int, **options) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for target in config.targets:
        name, (rows, columns) = f"{PARENTS.get(target, 'model.layers.0.self_attn')}.{target}", SHAPES[target]
        A, B = (f"{name}.{local_name}" for local_name in config.parameter_sets[target == "embed_tokens"])
        if target == "embed_tokens":
            rows, columns = columns, rows
        tensors[A] = torch.randn(config.rank(name), columns, generator=generator)
        tensors[B] = torch.randn(rows, config.rank(name), generator=generator)
    save_adapter(folder, config, tensors, base_model="a-base", **options)


SAME_RANK = [
    LoraConfig(r=3, alpha=6, targets=["q_proj", "up_proj", "embed_tokens"]),
    LoraConfig(r=3, alpha=4, targets=["q_proj", "up_proj", "k_proj"], rslora=True),
    LoraConfig(r=3, alpha=5, targets=["q_proj", "up_proj"], alpha_pattern={"up_proj": 2.0}),
]
OTHER_RANKS = [
    SAME_RANK[0],
    LoraConfig(r=5, alpha=4, targets=["q_proj", "up_proj"], rank_pattern={"q_proj": 2}),
    LoraConfig(r=4, alpha=5, targets=["q_proj", "k_proj"], alpha_pattern={"q_proj": 2.0}),
]


def combined_by_peft(folders, **how) -> dict[str, torch.Tensor]:
    """Module -> its update."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM(config), folders[0], "0")
    for number, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, str(number))
    names = [str(number) for number in range(len(folders))]
    model.base_model.add_weighted_adapter(names, WEIGHTS, "both", **how)
    modules = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    return {
        name: module.get_delta_weight("both").detach()
        for name, module in modules.items()
        if isinstance(module, peft.tuners.lora.LoraLayer) and "both" in {*module.lora_A, *module.lora_embedding_A}
    }


def updates_of(folder) -> dict[str, torch.Tensor]:
    """Likewise, of a folder; those of an embedding are (vocabulary, hidden)."""
    dense = {factors: update.scale * update.B @ update.A for factors, update in read_updates(folder).items()}
    return {factors.module: W.t() if "embedding" in factors.A else W for factors, W in dense.items()}


CASES = [
    *[(SAME_RANK, Combination(method=method, density=0.6), {"combination_type": method, "density": 0.6})
      for method in ("linear", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd")],
    *[(configs, Combination(method="cat"), {"combination_type": "cat"}) for configs in (SAME_RANK, OTHER_RANKS)],
    (SAME_RANK, Combination(method="svd"), {"combination_type": "svd"}),
    (OTHER_RANKS, Combination(method="svd", rank=2), {"combination_type": "svd", "svd_rank": 2}),
    (OTHER_RANKS, Combination(method="ties_svd", rank=4, density=0.3),
     {"combination_type": "ties_svd", "svd_rank": 4, "density": 0.3}),
    (SAME_RANK, Combination(method="dare_ties", density=1.0), {"combination_type": "dare_ties", "density": 1.0}),
    (OTHER_RANKS, Combination(method="dare_linear_svd", density=1.0, rank=3),
     {"combination_type": "dare_linear_svd", "density": 1.0, "svd_rank": 3}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("configs", "how", "theirs"), CASES, ids=lambda case: getattr(case, "method", ""))
def test_as_peft_combines(tmp_path, configs, how, theirs):
    folders = [tmp_path / str(number) for number in range(len(configs))]
    for number, (folder, part) in enumerate(zip(folders, configs, strict=True)):
        write_adapter(folder, part, seed=number)
    config = combine_adapters(folders, tmp_path / "both", weights=WEIGHTS, how=how)
    assert read_config(tmp_path / "both") == config
    expected, actual = combined_by_peft(folders, **theirs), updates_of(tmp_path / "both")
    assert actual.keys() == expected.keys()
    for module, update in expected.items():
        # fp32 sums of a dozen terms, and an SVD in fp64 against one in fp32.
        torch.testing.assert_close(actual[module], update, rtol=0, atol=2e-5 * update.abs().max().item())
        ranks = [part.rank(module) for part in configs if module.endswith(tuple(part.targets))]
        assert config.rank(module) == (sum(ranks) if how.method == "cat" else how.rank or max(ranks))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4), rank=st.integers(1, 9))
def test_svd_is_the_nearest_of_its_rank(seed, ranks, rank):
    """Eckart and Young: the error is the norm of the singular values that are left out, of the sum in fp64."""
    generator = torch.Generator().manual_seed(seed)
    updates = [
        Update(torch.randn(r, 11, generator=generator), torch.randn(7, r, generator=generator), 0.5 * r) for r in ranks
    ]
    weights = [1.0 - 0.6 * r for r in ranks]
    exact = sum(w * u.scale * u.B.double() @ u.A.double() for w, u in zip(weights, updates, strict=True))
    A, B = combine("x", updates, weights, Combination(method="svd", rank=rank))
    assert len(A) == B.shape[1] <= rank
    left_out = torch.linalg.svdvals(exact)[rank:].norm()
    error = torch.linalg.matrix_norm(exact - B.double() @ A.double())
    slack = 1e-6 * exact.norm()  # factors are rounded to fp32
    assert left_out - slack <= error <= left_out + slack


def test_dare_drops_at_random_and_keeps_the_mean():
    """Each value is kept with probability d and divided by it: counts within 5 standard deviations of a binomial."""
    ones = Update(torch.ones(100, 500), torch.ones(200, 100), 4.0)
    A, B = combine("x", [ones], [1.0], Combination(method="dare_linear", density=0.3, seed=1))
    for factor in (A, B):
        kept, count = (factor != 0).sum().item(), factor.numel()
        assert abs(kept - 0.3 * count) < 5 * (0.21 * count) ** 0.5
        torch.testing.assert_close(factor[factor != 0].unique(), torch.tensor([2.0 / 0.3]))  # √4 on each side
    again = combine("x", [ones], [1.0], Combination(method="dare_linear", density=0.3, seed=1))
    assert torch.equal(A, again[0]) and torch.equal(B, again[1])
    for name, seed in (("x", 2), ("y", 1)):
        other = combine(name, [ones], [1.0], Combination(method="dare_linear", density=0.3, seed=seed))
        assert not torch.equal(A, other[0])
    two = combine("x", [ones, ones], [1.0, 1.0], Combination(method="dare_linear", density=0.3, seed=1))[0]
    assert {round(v, 3) for v in two.unique().tolist()} == {0.0, 6.667, 13.333}, "every adapter has a mask of its own"
    elected = combine("x", [ones, ones], [1.0, 1.0], Combination(method="dare_ties", density=0.3, seed=1))[0]
    assert {round(v, 3) for v in elected.unique().tolist()} == {0.0, 6.667}, "the mean of those that are there"


def test_bases_and_settings_are_carried_over(tmp_path):
    sample = {"model.layers.0.self_attn.q_proj": Sample(False, (16, 16), 1.0, (0.5, 0.25))}
    for number in range(2):
        write_adapter(tmp_path / str(number), SAME_RANK[number], number, fingerprint=sample)
    config = combine_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "both", how=Combination(method="cat"))
    fields = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "a-base"
    assert read_fingerprint(tmp_path / "both") == sample
    assert {config.scale(module) for module in updates_of(tmp_path / "both")} == {1.0}
    other = {"model.layers.0.self_attn.q_proj": Sample(False, (16, 16), 1.0, (0.5, 0.75))}
    write_adapter(tmp_path / "2", SAME_RANK[2], 2, fingerprint=other)
    with pytest.raises(ValueError, match=r"were trained on different bases: model.layers.0.self_attn.q_proj has other"):
        combine_adapters([tmp_path / "0", tmp_path / "2"], tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_combined_is_refused(tmp_path):
    write_adapter(tmp_path / "a", OTHER_RANKS[0], 0)
    write_adapter(tmp_path / "b", OTHER_RANKS[1], 1)
    config = DoraConfig(r=2, targets=["q_proj"])
    name = "model.layers.0.self_attn.q_proj"
    tensors = {"lora_A.weight": (2, 16), "lora_B.weight": (16, 2), "lora_magnitude_vector": (16,)}
    save_adapter(tmp_path / "dora", config, {f"{name}.{local}": torch.ones(shape) for local, shape in tensors.items()})
    both = [tmp_path / "a", tmp_path / "b"]
    for folders, options, sentence in [
        (both, {"how": Combination(method="linear")}, "up_proj has ranks 3, 5, and linear adds factors up; valid: cat"),
        (both, {"weights": [1.0]}, "1 weights were given for 2 adapters"),
        ([], {"weights": []}, "0 weights were given for 0"),
        ([tmp_path / "a", tmp_path / "dora"], {}, "dora has dora; valid: lora and nothing else"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            combine_adapters(folders, tmp_path / "out", **options)
    for settings_, sentence in [
        ({"method": "mean"}, "method is 'mean'; valid: cat, svd, linear"),
        ({"method": "cat", "rank": 3}, "rank for cat is 3; valid: none"),
        ({"method": "svd", "rank": 0}, "rank for svd is 0; valid: 1 or more"),
        ({"density": 0.0}, "density is 0.0"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            Combination(**settings_)
    write_adapter(tmp_path / "c", LoraConfig(r=3, targets=["q_proj"]), 0)
    path = tmp_path / "c" / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 3', '"r": 2'))
    with pytest.raises(ValueError, match=r"q_proj has factors \(3, 16\) and \(16, 3\), its rank is 2"):
        read_updates(tmp_path / "c")


def test_one_adapter_alone_is_a_copy_that_may_be_stored_smaller(tmp_path):
    write_adapter(tmp_path / "a", OTHER_RANKS[1], 1)
    options = {"how": Combination(method="cat"), "dtype": torch.bfloat16, "max_shard_bytes": 300}
    combine_adapters([tmp_path / "a"], tmp_path / "small", **options)
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    for module, update in updates_of(tmp_path / "a").items():
        # Both factors are rounded to 8 bits: 2⁻⁹ of each product, of which there are 5 at most.
        torch.testing.assert_close(updates_of(tmp_path / "small")[module], update, rtol=0, atol=0.1)


def test_nearest_of_rank_orders_and_spans():
    torch.manual_seed(0)
    A, B = nearest_of_rank(torch.randn(6, 9), torch.randn(8, 6), 4)
    torch.testing.assert_close(A @ A.t(), torch.eye(4), rtol=0, atol=1e-6)
    lengths = B.norm(dim=0)
    assert (lengths.diff() <= 0).all()
    torch.testing.assert_close(B.t() @ B, torch.diag(lengths.square()), rtol=0, atol=1e-4)
