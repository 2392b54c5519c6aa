"""The adapter that a run goes on from (`model.adapter`): one that an earlier run has trained, or PEFT.

Its values are where the parameters start, instead of what the method would draw. Its settings have to be the run's, but
for those that only training and the start read: the same numbers with another alpha would be another model. Which
modules it was on is told by its tensors, so a list of names and the pattern that they come from are the same. Not here:
moments and steps, which begin anew (to continue a run is the run folder's business).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from minift.checkpoint.adapters import read_config, read_tensors
from minift.checkpoint.fingerprint import check_fingerprint
from minift.peft.adapter import AdapterConfig
from minift.peft.inject import from_file, stored_parameters
from minift.peft.peft_json import COMMON, SELECTION


def read_earlier(
    folder: str | Path,
    config: AdapterConfig,
    model: nn.Module,
    base_weight: Callable[[str], Tensor],
    is_quantized: Callable[[str], bool],
) -> dict[str, Tensor]:
    """{name: values} of all parameters that are stored with the adapter `config` of `model`, which may be on the meta
    device, as the adapter in `folder` has them, fp32.

    base_weight: name of a projection -> its dense weight. is_quantized: likewise, whether it was dequantised.
    ValueError for an adapter of another method, with other settings, of other modules, or for another base.
    """
    _check_settings(folder, config)
    check_fingerprint(folder, model, base_weight, is_quantized)
    shapes = {name: tuple(parameter.shape) for name, parameter in stored_parameters(model).items()}
    tensors = read_tensors(folder, shapes)
    return {name: from_file(model, name, tensors[name], base_weight) for name in shapes}


def _check_settings(folder: str | Path, config: AdapterConfig) -> None:
    there = read_config(folder)
    ours, theirs = ({"method": c.method} | c.to_peft() for c in (config, there))
    different = [
        f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here"
        for key in dict.fromkeys([*ours, *theirs])
        if key not in COMMON and key not in SELECTION and not _is_for_training(key) and ours.get(key) != theirs.get(key)
    ]
    if different:
        raise ValueError(
            f"model.adapter is {folder}, which this run's adapter cannot go on from: {'; '.join(different)}; valid: "
            "the same settings"
        )


def _is_for_training(key: str) -> bool:
    return "dropout" in key or "init" in key
