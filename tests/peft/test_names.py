from __future__ import annotations

import pytest

from minift.peft.inject import adapter_parameters, inject
from minift.peft.lora import LoraConfig
from minift.peft.names import canonical_name, fqn_of_peft_key, peft_key


def test_base_names_are_the_folder_names(tiny_model):
    model = tiny_model()
    before = list(model.state_dict())
    inject(model, LoraConfig(r=8))
    own = adapter_parameters(model)
    assert [canonical_name(name) for name in model.state_dict() if name not in own] == before


def test_peft_keys_are_the_names_peft_gives(tiny_model, hf_llama):
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model, get_peft_model_state_dict

    model = tiny_model()
    names = inject(model, LoraConfig(r=8))
    keys = get_peft_model_state_dict(get_peft_model(hf_llama(), PeftLoraConfig(target_modules="all-linear"))).keys()
    assert {peft_key(name) for name in names} == keys
    assert [fqn_of_peft_key(peft_key(name)) for name in names] == names
    with pytest.raises(ValueError, match="does not start with"):
        fqn_of_peft_key("model.layers.0.lora_A.weight")
