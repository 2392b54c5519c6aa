"""What an adapter is: a module that wraps another one, as `base`, and owns a few trainable parameters.

Adding a method is adding one file with two classes, and one line in `methods.py`:

  * a frozen dataclass derived from `AdapterConfig`: the user's settings, which modules to wrap (inherited: projections)
    and how, and how the settings are spelled in PEFT's `adapter_config.json`;
  * a module derived from `Adapter`, a projection around a projection: the low-rank updates that it adds (`parts`),
    what it does to their sum (`after`), or its forward if it is something else; its parameters' initial values; and the
    dense weight and bias it amounts to. What wraps another kind of module derives from `AdapterModule`.

`inject` wraps and freezes, `manage` merges, `checkpoint.adapters` stores, `checkpoint.merge` merges on disk, `planner`
counts memory: none of them knows a method. Two rules hold for every method: all parameters outside `base` are trainable
and stored, unless they only keep a start that was found out (`residual`); and a parameter that backward needs is read
again in backward from the Parameter (see `model.project`), never saved.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol, Self, get_type_hints

import torch
from torch import Tensor, nn

from minift.model.linear import Linear, LinearBase, LowRank
from minift.peft.drift import MergeTarget, check_target
from minift.peft.names import fqn_of_peft_key, in_model_order, peft_key
from minift.peft.patterns import ALL_LINEAR, is_all_linear, is_within, select_modules
from minift.peft.peft_json import COMMON, SELECTION, in_order, optional, refuse_unsupported, required


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(ABC):
    """Settings that all methods share.

    method: which method this is; lora if it is left out.
    targets: which projections get an adapter: "all-linear" (all but lm_head), a list of names or suffixes after a dot
        (["q_proj", "v_proj"]), or one regular expression for the full name.
    exclude: projections left alone although `targets` matches them; a list or one regular expression, as above.
    modules_to_save: modules that are trained whole and stored beside the adapters (["lm_head"]), names or suffixes.
    """

    method: str
    targets: str | list[str] = ALL_LINEAR
    exclude: str | list[str] | None = None
    modules_to_save: list[str] = field(default_factory=list)

    peft_type: ClassVar[str]
    """The method's name in `adapter_config.json`: PEFT's, or one of minift's own if PEFT has no such method."""

    parameter_names: ClassVar[tuple[str, ...]]
    """Names of an adapter's own parameters below its module, e.g. ("lora_A.weight", "lora_B.weight")."""

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (LinearBase,)
    """What `targets` chooses from. Where projections are among it, "all-linear" means these alone."""

    def for_base(self, folder: str) -> Self:
        """These settings, and what they leave open filled in for the base model in `folder`."""
        return self

    @classmethod
    def candidates(cls, model: nn.Module) -> dict[str, nn.Module]:
        """Full name -> module, in the model's order, of what `targets` chooses from."""
        return {name: module for name, module in model.named_modules() if isinstance(module, cls.kinds)}

    def select(self, model: nn.Module) -> dict[str, nn.Module]:
        """Of these, the chosen ones. ValueError if a pattern matches nothing, or nothing is left."""
        candidates = self.candidates(model)
        linear = [name for name, module in candidates.items() if isinstance(module, LinearBase)]
        among = linear if linear and is_all_linear(self.targets) else list(candidates)
        return {name: candidates[name] for name in select_modules(among, self.targets, self.exclude)}

    @abstractmethod
    def wrap(self, name: str, base: nn.Module, dtype: torch.dtype, device: torch.device) -> AdapterModule:
        """The adapter around `base`, whose full name in the model is `name`; own parameters uninitialised."""

    def wrap_all(self, bases: Mapping[str, nn.Module], dtype: torch.dtype) -> dict[str, AdapterModule]:
        """The adapters around `bases`, by the same names, on their devices; one by one unless some share something."""
        wrapped = {}
        for name, base in bases.items():
            device = next(itertools.chain(base.parameters(), base.buffers())).device
            wrapped[name] = self.wrap(name, base, dtype, device).train(base.training)
        return wrapped

    def computed_values(self, model: nn.Module, seed: int) -> dict[str, Tensor]:
        """{full name: values} of own parameters that start as what the base computes, which has to be loaded for that;
        the adapters are in place in `model`. Collective if it is sharded."""
        return {}

    def check(self, names: Sequence[str]) -> None:  # noqa: B027 (most methods have no such setting)
        """ValueError if a setting speaks of a module that is not among the wrapped ones, `names`."""

    @property
    def parameter_sets(self) -> tuple[tuple[str, ...], ...]:
        """`parameter_names` of each kind of module."""
        return (self.parameter_names,)

    def to_peft(self) -> dict[str, Any]:
        """Every key of `adapter_config.json`; "target_modules" as in `targets`, storage spells out a string. A method
        that PEFT has writes PEFT's keys; one that it has not, its settings by their names."""
        own = {name: getattr(self, name) for name in self._own_settings()}
        return COMMON | self.selection_to_peft() | own | {"peft_type": self.peft_type}

    def base_fields(self, model: nn.Module) -> dict[str, Any]:
        """Those of these keys that say what the base looks like. PEFT looks for itself where they are null."""
        return {}

    def selection_to_peft(self) -> dict[str, Any]:
        """Of these keys, those that all methods share."""
        return {
            "exclude_modules": in_order(self.exclude),
            "modules_to_save": in_order(self.modules_to_save) or None,
            "target_modules": in_order(self.targets),
        }

    @classmethod
    def selection_from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Inverse, as arguments for the class."""
        return {
            "targets": required(fields, "target_modules", str | list[str], cls.__name__.removesuffix("Config")),
            "exclude": optional(fields, "exclude_modules", str | list[str], None),
            "modules_to_save": optional(fields, "modules_to_save", list[str], []),
        }

    @classmethod
    def reads(cls, fields: Mapping[str, Any]) -> bool:
        """Whether an `adapter_config.json` is of this method: PEFT has several of one `peft_type`."""
        return fields.get("peft_type") == cls.peft_type

    @classmethod
    def from_peft(cls, stored: Mapping[str, Any]) -> Self:
        """Inverse of `to_peft` for any file of this method. ValueError names a setting that minift does not have."""
        own, hints = cls._own_settings(), get_type_hints(cls)
        refuse_unsupported(stored, {"peft_type": cls.peft_type}, SELECTION | set(own))
        settings = {name: required(stored, name, hints[name], cls.__name__) for name in own}
        return cls(**cls.selection_from_peft(stored), **settings)

    @classmethod
    def _own_settings(cls) -> list[str]:
        """Names of the settings that are not shared."""
        shared = {shared.name for shared in fields(AdapterConfig)}
        return [own.name for own in fields(cls) if own.name not in shared]

    def to_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of an adapter file by key, from those of a model by in-memory name (fp32, see `to_file`).
        ValueError if some are missing, or are of no adapter."""
        self.adapted_modules(tensors)
        return {peft_key(name): tensors[name] for name in sorted(tensors)}

    def from_stored(self, stored: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Inverse of `to_stored`; `shapes` are those of what the model stores, in its order. What the model has no
        place for keeps the name that it would have, and what is missing is left out."""
        return {fqn_of_peft_key(key): tensor for key, tensor in stored.items()}

    def adapted_modules(self, names: Iterable[str]) -> list[str]:
        """The adapted modules, in order. ValueError unless `names` are all own parameters of each, and nothing else but
        what is in `modules_to_save`."""
        endings = [local_name for local_names in self.parameter_sets for local_name in local_names]
        modules: dict[str, set[str]] = {}
        for name in names:
            local_name = next((ending for ending in endings if name.endswith(f".{ending}")), None)
            if local_name is not None:
                modules.setdefault(name.removesuffix(f".{local_name}"), set()).add(local_name)
            elif not is_within(name, self.modules_to_save):
                raise ValueError(f"{name} is not an adapter parameter; valid endings: {', '.join(endings)}")
        if not modules:
            raise ValueError("there is no adapter tensor to save")
        for module, local_names in modules.items():
            expected = next(names for names in self.parameter_sets if local_names & set(names))
            missing = set(expected) - local_names
            if missing:
                raise ValueError(f"the adapter of {module} lacks {', '.join(sorted(missing))}")
        return sorted(modules, key=in_model_order)


class BaseWeight(Protocol):
    """Elements [start, stop) of the flattened dense weight of a base, as it is trained with; all of them if no range
    is given. Read when it is called, and nothing else is."""

    def __call__(self, start: int = 0, stop: int | None = None) -> Tensor: ...


class AdapterModule(nn.Module):
    """A module with an adapter: `base` is frozen, every other parameter is the method's own."""

    base: nn.Module

    num_virtual_tokens = 0
    """What an attention or an embedding has, which this may be in the place of."""

    def init_parameter(self, local_name: str, generator: torch.Generator) -> Tensor:
        """Initial value of the own parameter `local_name`, fp32 on the CPU, random numbers from `generator` only."""
        raise NotImplementedError

    def hold_weights(self, held: bool) -> None:
        """Until this is called with False no weight changes: what is made of weights alone may be kept."""

    def init_from_base(self, local_name: str, generator: torch.Generator, base_weight: BaseWeight) -> Tensor:
        """Likewise, for a method whose initial values depend on the base's weight as well."""
        return self.init_parameter(local_name, generator)

    def effective_weight(self, weight: Tensor) -> Tensor:
        """The dense weight that the adapter makes of the base weight `weight`, in its shape and dtype: fp32 or fp64.
        ValueError, with what to do instead, for a method that is no dense weight."""
        raise ValueError(f"{type(self).__name__} is no weight and cannot be merged; keep it beside the model")

    @torch.no_grad()
    def exact_weight(self, weight: Tensor) -> Tensor:
        """The effective weight over the base weight `weight`, not yet rounded to its dtype: fp32, or fp64 for fp64."""
        return self.effective_weight(weight.to(torch.promote_types(weight.dtype, torch.float32)))

    def to_file(self, local_name: str, values: Tensor, base_weight: Callable[[], Tensor]) -> Tensor:
        """What an adapter file holds where the own parameter `local_name` is `values` (fp32): the same, as a rule.

        base_weight: the base's dense weight as it was trained with, read when it is called.
        """
        return values

    def from_file(self, local_name: str, values: Tensor, base_weight: Callable[[], Tensor]) -> Tensor:
        """Inverse of `to_file`."""
        return values

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(local name, Parameter) of everything outside `base`: what is stored, and trained unless it is frozen."""
        return ((name, p) for name, p in self.named_parameters() if not name.startswith("base."))


class Adapter(AdapterModule, LinearBase):
    """A projection around a projection.

    Merged in memory, the adapter costs no time and another base takes the place of its own, with the weight W + ΔW,
    added in fp32 (fp64 for fp64 weights) and rounded once; see `drift` for the choice of W and of the format. Its own
    base is kept and put back by `unmerge`, so every bit is: while merged, the weight exists twice. (Keeping only the
    rounding residue would need fewer bytes, but also unchanged adapter weights at unmerge.)
    """

    def __init__(self, base: LinearBase) -> None:
        super().__init__()
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.base = base
        self._own_base: tuple[LinearBase] | None = None  # while merged; in a tuple, as it is no submodule then

    # What a method writes, beside `init_parameter`, `effective_weight` and perhaps `after` #

    def parts(self) -> tuple[LinearBase, tuple[LowRank, ...]] | None:
        """The base and the updates added to it, see `LinearBase`; None for a method with a `forward` of its own."""
        raise NotImplementedError

    def effective_bias(self, bias: nn.Parameter | None) -> nn.Parameter | None:
        """The bias (out,) that goes with it."""
        return bias

    # What they all share #

    @property
    def bias(self) -> nn.Parameter | None:
        """Of the projection as it is, adapter included."""
        return self.base.bias if self.merged else self.effective_bias(self.base.bias)

    def dense_weight(self) -> Tensor:
        """The effective weight (out, in), rounded once to the base weight's dtype. A copy unless merged."""
        weight = self.base.dense_weight()
        return weight if self.merged else self.exact_weight(weight).to(weight.dtype)

    def weight_slices(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.dense_weight().to(dtype)

    @property
    def merged(self) -> bool:
        return self._own_base is not None

    def merge(self, target: MergeTarget = "dequantized", original: Tensor | None = None) -> None:
        """Fold the adapter into another base. Not for sharded models: their weights exist only inside forward.

        original: the full-precision base weight (out, in), which the target "original" needs; a dense base is its own.
        """
        check_target(target)
        if self.merged:
            raise ValueError("the adapter is merged already; unmerge it first")
        weight = self.base.dense_weight()
        if target == "original" and original is None and not isinstance(self.base, Linear):
            raise ValueError(
                f"merging into the original weight needs that weight, which {type(self.base).__name__} no longer has; "
                "give it, or merge into the dequantized base"
            )
        exact = self.exact_weight(weight if target != "original" or original is None else original)
        if target == "requantized":
            merged_base = self.base.storing(exact)
            merged_base.bias = self.bias
        else:
            merged_base = Linear.holding(exact.to(weight.dtype), self.bias)
        self._own_base = (self.base,)
        self.base = merged_base.train(self.training)

    def unmerge(self) -> None:
        """Put back the base of before `merge`: the same module, so the same bits."""
        if self._own_base is None:
            raise ValueError("the adapter is not merged")
        (self.base,) = self._own_base
        self._own_base = None
