from __future__ import annotations

import dataclasses

import pytest
import torch

from minift.precision import Precision


def test_default_is_fp32_masters_over_a_bf16_wire():
    precision = Precision()
    dtypes = (precision.master_dtype, precision.wire_dtype, precision.reduce_dtype)
    assert dtypes == (torch.float32, torch.bfloat16, torch.float32)


def test_every_field_has_a_dtype_property():
    precision = Precision(wire="float32", reduce="bfloat16")
    assert (precision.wire_dtype, precision.reduce_dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("field, value", [("master", "bfloat16"), ("wire", "bf16"), ("wire", "int8"), ("reduce", None)])
def test_an_invalid_name_is_refused_with_what_is_valid(field, value):
    with pytest.raises(ValueError, match=rf"precision\.{field} is {value!r}; valid: .*float32"):
        Precision(**{field: value})


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Precision().wire = "float32"
