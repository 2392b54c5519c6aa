"""The rows of the test matrix (test_matrix.py): one for each method, with the formula that it is held to.

A formula is the paper's, in plain PyTorch: autograd differentiates it, in fp64, with every matrix spelled out. To add a
method, add a row.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from minift.checkpoint.initial import InitialAdapter
from minift.model.decoder import CausalLM
from minift.model.linear import Linear, LinearBase
from minift.peft.adapter import Adapter, AdapterConfig
from minift.peft.bitfit import BitFitConfig
from minift.peft.bottleneck import BottleneckConfig
from minift.peft.dora import DoraConfig
from minift.peft.ia3 import IA3Config
from minift.peft.iec import IecConfig
from minift.peft.inject import adapter_parameters, init_tensor, inject
from minift.peft.lora import LoraConfig
from minift.quant.linear import QuantConfig
from minift.quant.model import load_model

Formula = Callable[[Tensor, Tensor, Tensor | None, dict[str, Tensor]], Tensor]
"""(x (N, in), W (out, in), b (out,) or None, own parameters by local name) -> y (N, out). The embedding gets tokens
(N,) for x, and its weight (vocabulary, out)."""
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Row:
    """One method, as some settings have it.

    formulas: last part of the name of a projection -> what it computes with the method.
    own: likewise, the local names of what is trained there, as files call them.
    is_dense_weight: whether it can be merged.
    """

    config: AdapterConfig
    formulas: dict[str, Formula]
    own: dict[str, tuple[str, ...]]
    is_identity_at_start: bool = True
    is_dense_weight: bool = True
    stored_as: type[AdapterConfig] | None = None
    """Of which method its files are; None: of its own."""
    spread: float = field(default=0.1)
    """Standard deviation of what is added to initial values before anything is compared."""
    quant: QuantConfig | None = None
    """How a dense base is quantised on the way."""
    initial: InitialAdapter | None = None
    """What was found out about the start, once that is prepared."""

    def trainable(self, model: CausalLM) -> list[str]:
        """The exact names, in any order."""
        return [
            f"{name}.{local_name}"
            for name in projections(model)
            for local_name in self.own.get(name.rpartition(".")[2], ())
        ]

    def started(self, folder: Path, start: Path) -> Row:
        """This row over the model in `folder`. What there is to find out about its start is in `start` then."""
        return self

    def base(self, folder: Path, start: Path) -> Path:
        """The folder of the model that the exported adapter is for."""
        return folder

    def values(self, model: CausalLM, name: str) -> Tensor:
        """Of the adapter parameter `name`: initial ones and noise, so that no gradient is zero. The same everywhere."""
        return self.initial_values(model, name) + self.noise(name, model.get_parameter(name).shape)

    def initial_values(self, model: CausalLM, name: str) -> Tensor:
        return init_tensor(model, name, seed=2)

    def noise(self, name: str, shape: torch.Size) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        return self.spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def at_start(self, folder: Path, dtype: torch.dtype) -> CausalLM:
        """The model in `folder`, before its first step."""
        model = load_model(folder, None, dtype)
        inject(model, self.config, dtype=dtype)
        return model

    @property
    def exported(self) -> AdapterConfig:
        """The settings that are written beside the trained tensors."""
        return self.config

    def adapted(self, folder: Path) -> CausalLM:
        """The model in `folder`, the adapter's base, whole, with `values`: fp32."""
        model = load_model(folder, None, torch.float32).eval()
        inject(model, self.config)
        for name, parameter in adapter_parameters(model).items():
            parameter.data.copy_(self.values(model, name))
        return model

    def as_formulas(self, model: CausalLM, own: dict[str, Tensor]) -> None:
        """Make `model`, dense and without adapters, compute the formulas of `own`: {full name: leaf}."""
        for name, projection in projections(model).items():
            formula = self.formulas.get(name.rpartition(".")[2])
            if formula is not None:
                prefix = f"{name}."
                mine = {full.removeprefix(prefix): leaf for full, leaf in own.items() if full.startswith(prefix)}
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, _AsFormula(projection, formula, mine))


class _AsFormula(LinearBase):
    num_virtual_tokens = 0  # an embedding is asked for them

    def __init__(self, module: nn.Module, formula: Formula, own: dict[str, Tensor]) -> None:
        super().__init__()
        self.out_features, self.weight, self.bias = len(module.weight), module.weight, getattr(module, "bias", None)
        self.formula, self.own = formula, own
        self.leaves = nn.ParameterList(own.values())  # the loss asks the LM head what is trained in it

    def parts(self) -> None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.weight, self.bias, self.own)


def projections(model: CausalLM) -> dict[str, nn.Module]:
    """By full name, and the embedding; adapters are not told from what they wrap."""
    ends = {"model.embed_tokens": model.model.embed_tokens, "lm_head": model.lm_head}
    return ends | {
        f"model.layers.{index}.{part}.{name}": model.get_submodule(f"model.layers.{index}.{part}.{name}")
        for index in range(len(model.model.layers))
        for part, names in (("self_attn", ALL[:4]), ("mlp", ALL[4:]))
        for name in names
    }


def _affine(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    return x @ W.T if b is None else x @ W.T + b


def lora(scale: float) -> Formula:
    return lambda x, W, b, own: _affine(x, W + scale * own["lora_B.weight"] @ own["lora_A.weight"], b)


def lora_embedding(scale: float) -> Formula:
    def formula(tokens: Tensor, W: Tensor, b: None, own: dict[str, Tensor]) -> Tensor:
        return (W + scale * (own["lora_embedding_B"] @ own["lora_embedding_A"]).T)[tokens]

    return formula


def whole(x: Tensor, W: Tensor, b: Tensor | None, own: dict[str, Tensor]) -> Tensor:
    return _affine(x, own["weight"], b)


def whole_embedding(tokens: Tensor, W: Tensor, b: None, own: dict[str, Tensor]) -> Tensor:
    return own["weight"][tokens]


def dora(scale: float) -> Formula:
    def formula(x: Tensor, W: Tensor, b: Tensor | None, own: dict[str, Tensor]) -> Tensor:
        V = W + scale * own["lora_B.weight"] @ own["lora_A.weight"]
        m = W.norm(dim=1) + own["lora_magnitude_vector"]
        return _affine(x, (m / V.norm(dim=1).detach()).unsqueeze(1) * V, b)

    return formula


def iec(scale: float) -> Formula:
    """As the authors' code has it."""

    def formula(x: Tensor, W: Tensor, b: Tensor | None, own: dict[str, Tensor]) -> Tensor:
        A, B = own["lora_A.weight"], own["lora_B.weight"]
        u = x @ A.T + own["beta_1"] * x.reshape(len(x), len(A), -1).mean(-1)
        passed = (u @ B.T).reshape(*u.shape, -1) + own["beta_2"] * u.unsqueeze(-1)
        return _affine(x, W, b) + scale * passed.reshape(len(x), -1)

    return formula


def ia3_after(x: Tensor, W: Tensor, b: Tensor | None, own: dict[str, Tensor]) -> Tensor:
    return (1 + own["ia3_l"].view(-1)) * _affine(x, W, b)


def ia3_before(x: Tensor, W: Tensor, b: Tensor | None, own: dict[str, Tensor]) -> Tensor:
    return _affine((1 + own["ia3_l"].view(-1)) * x, W, b)


def bitfit(x: Tensor, W: Tensor, b: Tensor | None, own: dict[str, Tensor]) -> Tensor:
    return _affine(x, W, own["bias_change"] if b is None else b + own["bias_change"])


def bottleneck(activation: Callable[[Tensor], Tensor]) -> Formula:
    def formula(x: Tensor, W: Tensor, b: Tensor | None, own: dict[str, Tensor]) -> Tensor:
        z = _affine(x, W, b)
        hidden = activation(z @ own["adapter_down.weight"].T + own["adapter_down.bias"])
        return z + hidden @ own["adapter_up.weight"].T + own["adapter_up.bias"]

    return formula


def readme_method() -> type[AdapterConfig]:
    """The settings of the method that the README shows, from its text."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# krona\.py\n.*?)```", text, re.DOTALL)
    names = {
        "__name__": __name__, "Adapter": Adapter, "AdapterConfig": AdapterConfig, "Linear": Linear, "Literal": Literal,
        "dataclass": dataclass, "torch": torch,
    }  # fmt: skip
    exec(compile(code, "README.md", "exec"), names)
    return names["KronaConfig"]


def krona(x: Tensor, W: Tensor, b: Tensor | None, own: dict[str, Tensor]) -> Tensor:
    return _affine(x, W + torch.kron(own["krona_A.weight"], own["krona_B.weight"]), b)


README_METHOD = readme_method()
LORA_OWN = ("lora_A.weight", "lora_B.weight")
ROWS = {
    "lora": Row(LoraConfig(r=3, alpha=6), dict.fromkeys(ALL, lora(2.0)), dict.fromkeys(ALL, LORA_OWN)),
    "rslora": Row(
        LoraConfig(r=4, alpha=6, rslora=True, rank_pattern={"q_proj": 9}, alpha_pattern={"mlp.up_proj": 2}),
        dict.fromkeys(ALL, lora(3.0)) | {"q_proj": lora(2.0), "up_proj": lora(1.0)},
        dict.fromkeys(ALL, LORA_OWN),
    ),
    "lora, ends": Row(
        LoraConfig(r=3, alpha=6, targets=["embed_tokens", "v_proj", "lm_head"]),
        {"embed_tokens": lora_embedding(2.0), "v_proj": lora(2.0), "lm_head": lora(2.0)},
        {"embed_tokens": ("lora_embedding_A", "lora_embedding_B"), "v_proj": LORA_OWN, "lm_head": LORA_OWN},
    ),
    "lora, whole": Row(
        LoraConfig(r=3, alpha=6, targets=["v_proj"], modules_to_save=["embed_tokens", "lm_head"]),
        {"embed_tokens": whole_embedding, "v_proj": lora(2.0), "lm_head": whole},
        {"embed_tokens": ("weight",), "v_proj": LORA_OWN, "lm_head": ("weight",)},
    ),
    "iec": Row(
        IecConfig(r=4, alpha=8),
        dict.fromkeys(ALL, iec(2.0)),
        dict.fromkeys(ALL, (*LORA_OWN, "beta_1", "beta_2")),
        stored_as=LoraConfig,
    ),
    "dora": Row(
        DoraConfig(r=3, alpha=6),
        dict.fromkeys(ALL, dora(2.0)),
        dict.fromkeys(ALL, (*LORA_OWN, "lora_magnitude_vector")),
    ),
    "ia3": Row(
        IA3Config(),
        {"k_proj": ia3_after, "v_proj": ia3_after, "down_proj": ia3_before},
        dict.fromkeys(("k_proj", "v_proj", "down_proj"), ("ia3_l",)),
    ),
    "bitfit": Row(BitFitConfig(), dict.fromkeys(ALL, bitfit), dict.fromkeys(ALL, ("bias_change",))),
    "bottleneck": Row(
        BottleneckConfig(size=5),
        dict.fromkeys(("o_proj", "down_proj"), bottleneck(nn.GELU())),
        dict.fromkeys(("o_proj", "down_proj"), BottleneckConfig.parameter_names),
        is_dense_weight=False,
    ),
    "readme": Row(
        README_METHOD(size=4, exclude=["k_proj"]),
        dict.fromkeys((name for name in ALL if name != "k_proj"), krona),
        dict.fromkeys((name for name in ALL if name != "k_proj"), README_METHOD.parameter_names),
    ),
    "pfeiffer": Row(
        BottleneckConfig(size=3, activation="relu", targets=["down_proj"]),
        {"down_proj": bottleneck(nn.ReLU())},
        {"down_proj": BottleneckConfig.parameter_names},
        is_dense_weight=False,
    ),
}
assert math.isclose(6 / math.sqrt(9), 2.0), "rsLoRA divides by the root of the rank"
