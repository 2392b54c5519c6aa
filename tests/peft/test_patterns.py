"""Module selection against PEFT's own matcher, and refusals."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from minift.peft.patterns import check_endings, first_match, select_modules, select_parameters

NAMES = [f"model.layers.{i}.{m}" for i in range(12) for m in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")]
NAMES.append("lm_head")
PIECES = ["q_proj", "k_proj", "self_attn.q_proj", "layers.1.mlp.up_proj", "1.self_attn.k_proj", "lm_head", NAMES[0]]

ENDINGS = ["1.mlp.up_proj", "proj", r"layers\.1.*", r"[qk]_proj", r".*\.1\d\..*"]  # the first two: after a dot only


@settings(max_examples=40, deadline=None)
@given(
    targets=st.lists(st.sampled_from(PIECES), min_size=1, max_size=4)
    | st.sampled_from([r".*proj", r"model\.layers\.[0-3]\..*", r".*(q|k)_proj", "lm_head"]),
    exclude=st.none() | st.lists(st.sampled_from(PIECES[3:]), min_size=1, max_size=2) | st.just(r".*\.1\..*"),
)
def test_selects_what_peft_selects(targets, exclude):
    peft_config = PeftLoraConfig(target_modules=targets, exclude_modules=exclude)
    expected = [name for name in NAMES if bool(check_target_module_exists(peft_config, name)) is True]
    if expected:
        assert select_modules(NAMES, targets, exclude) == expected
    else:
        with pytest.raises(ValueError, match="leaves no module"):
            select_modules(NAMES, targets, exclude)


def test_all_linear_leaves_the_head_alone():
    assert select_modules(NAMES, "all-linear", None) == NAMES[:-1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, *ENDINGS]), max_size=4))
def test_first_match_is_peft_pattern_key(patterns):
    for name in NAMES:
        key = get_pattern_key(patterns, name)
        assert first_match(patterns, name) == (key if key in patterns else None)


@pytest.mark.parametrize(
    ("targets", "exclude", "message"),
    [
        (["q_porj"], None, "targets: 'q_porj' matches none of 37 names; nearest: q_proj"),
        (["proj"], None, "'proj' matches none"),  # a suffix starts after a dot
        (["q_proj", "model.layers.99.mlp.up_proj"], None, "nearest: model.layers"),
        (r"layers\.0", None, "matches none"),  # a single string must match the full name
        ("q_proj", None, "is a regular expression for full names, and matches none of 37; valid as the ending of"),
        (["q_proj"], "q_proj", "exclude: 'q_proj' is a regular expression for full names"),
        ("(", None, "not a regular expression"),
        (["q_proj"], ["v_proj"], "exclude: 'v_proj' matches none"),
        (["q_proj"], ["q_proj"], "leaves no module"),
    ],
)
def test_refuses(targets, exclude, message):
    with pytest.raises(ValueError) as error:
        select_modules(NAMES, targets, exclude)
    assert message in str(error.value)


def test_parameters_are_searched():
    names = ["model.embed_tokens.weight", "model.layers.1.norm.weight", "model.layers.10.norm.weight"]
    assert select_parameters(names, [r"layers\.1\.", "embed"], "train") == set(names[:2])
    with pytest.raises(ValueError, match="freeze: 'embedding' matches none of 3 names"):
        select_parameters(names, ["embedding"], "freeze")


def test_endings_must_match_something():
    check_endings(["q_proj", r"layers\.\d\.mlp.up_proj"], NAMES, "rank_pattern")
    with pytest.raises(ValueError, match="rank_pattern: 'o_proj' matches none"):
        check_endings(["o_proj"], NAMES, "rank_pattern")
