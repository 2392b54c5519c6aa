"""A batch with an adapter for each row. Oracle: a run for each row, with its adapter alone."""

from __future__ import annotations

import pytest
import torch

from minift.generate import generate
from minift.model.linear import Linear
from minift.peft.dora import DoraConfig
from minift.peft.inject import adapter_modules
from minift.peft.lora import LoraConfig
from minift.peft.per_row import per_row
from minift.peft.resident import Residents
from minift.quant.linear import NF4Linear

TOLERANCE = 2e-5  # of the largest logit: fp32 through two blocks
CONFIGS = {
    "a": LoraConfig(r=4),
    "b": LoraConfig(r=1, targets=["q_proj", "lm_head"]),
    "c": LoraConfig(r=7, rslora=True, targets=["o_proj", "up_proj", "down_proj"], rank_pattern={"up_proj": 2}),
    "d": LoraConfig(r=3, targets=["lm_head"]),
    "e": LoraConfig(r=2, exclude=["layers.0.mlp.up_proj"]),
    "f": LoraConfig(r=5, targets=r".*layers\.1\..*_proj"),
}
ROWS = ["b", None, "a", "c", "a", "f", "d", "e"]
LENGTHS = [3, 1, 7, 2, 1, 5, 4, 6]


def resident_model(model, nf4):
    """With CONFIGS at random, and a bias in places; projections in NF4 if that is asked for."""
    torch.manual_seed(3)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and name.endswith("_proj"):
            if "k_proj" in name:
                module.bias = torch.nn.Parameter(torch.randn(module.out_features))
            if nf4:
                sizes = (module.in_features, module.out_features)
                like = NF4Linear(*sizes, False, 64, True, torch.float32, torch.device("meta"))
                like.bias = module.bias
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, like.storing(module.weight))
    residents = Residents(model)
    for name, config in CONFIGS.items():
        residents.add(name, config)
        for _, parameter in residents[name].tensors():
            torch.nn.init.normal_(parameter, std=0.2)
    return residents


@torch.no_grad()
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("ignore_stop", [True, False])
def test_eight_rows_are_eight_runs(tiny_model, nf4, ignore_stop):
    """Generated tokens are equal, whether rows leave the batch or not; so are prompts' lengths of one."""
    model = tiny_model()
    residents = resident_model(model, nf4)
    prompts = [[(7 * row + 3 * i) % 40 for i in range(length)] for row, length in enumerate(LENGTHS)]
    stop = () if ignore_stop else range(0, 40, 5)
    options = {"max_new_tokens": 9, "stop_token_ids": stop}
    expected = []
    for name, prompt in zip(ROWS, prompts, strict=True):
        with residents.using(*[name] if name else []):
            expected += generate(model, [prompt], **options)
    residents.activate("e")
    with per_row(residents, ROWS) as rows:
        assert generate(model, prompts, **options, before_forward=rows.begin) == expected
    assert residents.active == ("e",)
    assert list(adapter_modules(model).values()) == list(residents["e"].modules.values())
    assert len({tuple(tokens) for tokens in expected}) > 4, "the adapters do something"
    assert ignore_stop or len({len(tokens) for tokens in expected}) > 2, "rows leave at different times"


@torch.no_grad()
@pytest.mark.parametrize("last_only", [False, True])
def test_logits_of_a_packed_forward(tiny_model, logits_of, last_only):
    model = tiny_model()
    residents = resident_model(model, False)
    documents = [torch.arange(length) * (row + 1) % 40 for row, length in enumerate(LENGTHS)]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    picked = (bounds[1:] - 1).long() if last_only else torch.arange(int(bounds[-1]))
    with per_row(residents, ROWS) as rows:
        order = [4, 2, 0, 1, 3, 5, 7, 6]  # documents may be of any rows
        rows.begin(order, bounds)
        actual = model(
            torch.cat(documents), torch.cat([torch.arange(length) for length in LENGTHS]), bounds, max(LENGTHS),
            head=lambda hidden_TD, lm_head: lm_head(hidden_TD[picked]),
        )  # fmt: skip
    expected = []
    for row, document in zip(order, documents, strict=True):
        with residents.using(*[ROWS[row]] if ROWS[row] else []):
            expected.append(logits_of(model, document)[-1:] if last_only else logits_of(model, document))
    expected = torch.cat(expected)
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_what_cannot_be_is_refused(tiny_model, logits_of):
    model = tiny_model()
    residents = resident_model(model, False)
    residents.add("dora", DoraConfig(r=2))
    residents.add("rows", LoraConfig(r=2, targets=["embed_tokens"]))
    for names, sentence in [(["a", "x"], "no adapter 'x'"), (["dora"], "dora cannot be mixed"), (["rows"], "LoraEmb")]:
        with pytest.raises(ValueError, match=sentence), per_row(residents, names):
            pass
        assert residents.active == () and not adapter_modules(model)
    with per_row(residents, ["a", None]) as rows:
        with pytest.raises(ValueError, match="a forward of 3 tokens was not announced"):
            logits_of(model, torch.arange(3))
        with pytest.raises(ValueError, match="1 documents were announced as 2 rows"):
            rows.begin([0, 1], torch.tensor([0, 3]))
        rows.begin([0], torch.tensor([0, 3]))
        with pytest.raises(ValueError, match="a forward of 4 tokens was not announced"):
            logits_of(model, torch.arange(4))
        with torch.enable_grad(), pytest.raises(ValueError, match="is for inference"):
            model.model.layers[0].mlp.up_proj(torch.ones(3, 16, requires_grad=True))
