"""The methods there are. A new one is a line here: recipes, their help and adapter files know it by that."""

from __future__ import annotations

from typing import get_args

from minift.peft.adapter import AdapterConfig
from minift.peft.bitfit import BitFitConfig
from minift.peft.bottleneck import BottleneckConfig
from minift.peft.dora import DoraConfig
from minift.peft.ia3 import IA3Config
from minift.peft.iec import IecConfig
from minift.peft.lora import LoraConfig
from minift.peft.lora_ga import LoraGaConfig
from minift.peft.pissa import PissaConfig
from minift.peft.prefix import PrefixConfig
from minift.peft.prompt import PromptConfig

Method = (
    LoraConfig
    | LoraGaConfig
    | PissaConfig
    | IecConfig
    | DoraConfig
    | IA3Config
    | BitFitConfig
    | BottleneckConfig
    | PrefixConfig
    | PromptConfig
)
METHODS: tuple[type[AdapterConfig], ...] = get_args(Method)
