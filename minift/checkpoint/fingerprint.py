"""Which base an adapter is for: samples of a few of its weights, in a file beside the adapter.

An adapter for another model of the same shapes loads without complaint and talks nonsense. A hash of the base would see
that, but also refuse the same model in another number format, quantised, or cut into other files. So what is kept are
weights themselves, and what is compared is whether the ones could have been made from the others:

    dense        equal, perhaps after rounding both to bfloat16 or float16
    quantised    no further apart than NF4 rounds, the one or both: half of its widest gap, times the largest weight

The file is minift's own; PEFT does not read it, and adapters that it wrote have none and are not checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minift.ops.nf4_tables import CODEBOOK
from minift.peft.inject import frozen_projections

FINGERPRINT_FILE = "base_fingerprint.json"
_NUM_WEIGHTS = 8
_NUM_SAMPLES = 32
# Double quantisation moves a scale, too, by up to 1 part in 250 of the largest.
_NF4_ERROR = 0.5 * float((CODEBOOK[1:] - CODEBOOK[:-1]).max()) + 0.01


@dataclass(frozen=True)
class Sample:
    """Of one weight: `values` are evenly spaced elements, row by row; `largest`: of all absolute values. is_exact: it
    was made for the adapter, and has no other form."""

    is_quantized: bool
    shape: tuple[int, ...]
    largest: float
    values: tuple[float, ...]
    is_exact: bool = False

    @classmethod
    def of(cls, weight: Tensor, is_quantized: bool, is_exact: bool = False) -> Sample:
        stride = max(1, weight.numel() // _NUM_SAMPLES)
        values = weight.reshape(-1)[::stride][:_NUM_SAMPLES].float()
        return cls(is_quantized, tuple(weight.shape), float(weight.abs().max()), tuple(values.tolist()), is_exact)

    def could_be(self, other: Sample) -> bool:
        """Whether the two may be one weight in two formats."""
        if self.shape != other.shape:
            return False
        ours, theirs = torch.tensor(self.values), torch.tensor(other.values)
        times_rounded = self.is_quantized + other.is_quantized
        if times_rounded and not (self.is_exact or other.is_exact):
            limit = times_rounded * _NF4_ERROR * max(self.largest, other.largest)
            return bool(((ours - theirs).abs() <= limit).all())
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        return any(torch.equal(ours.to(dtype), theirs.to(dtype)) for dtype in dtypes)


def take_fingerprint(
    model: nn.Module, read: Callable[[str], Tensor], is_quantized: Callable[[str], bool], is_exact: bool = False
) -> dict[str, Sample]:
    """{name of a projection: sample} of some of the frozen projections of a model with an adapter.

    read: name of a projection -> its dense weight. is_quantized: likewise, whether that was dequantised.
    is_exact: see `Sample`.
    """
    names = list(frozen_projections(model))
    chosen = [names[index * len(names) // _NUM_WEIGHTS] for index in range(_NUM_WEIGHTS)] if names else []
    return {name: Sample.of(read(name), is_quantized(name), is_exact) for name in dict.fromkeys(chosen)}


def write_fingerprint(folder: Path, fingerprint: Mapping[str, Sample]) -> None:
    fields = {name: asdict(sample) for name, sample in fingerprint.items()}
    (folder / FINGERPRINT_FILE).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def read_fingerprint(folder: str | Path) -> dict[str, Sample] | None:
    """What the adapter in `folder` says about its base; None if it says nothing."""
    path = Path(folder) / FINGERPRINT_FILE
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: Sample(**(f | {"shape": tuple(f["shape"]), "values": tuple(f["values"])}))
            for name, f in fields.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged; delete it to load the adapter without checking its base") from None


def check_fingerprint(
    folder: str | Path, model: nn.Module, read: Callable[[str], Tensor], is_quantized: Callable[[str], bool]
) -> None:
    """ValueError if the adapter in `folder` says which base it is for, and that is not the base of `model`."""
    here = frozen_projections(model).keys()
    for name, sample in (read_fingerprint(folder) or {}).items():
        if name in here and not Sample.of(read(name), is_quantized(name)).could_be(sample):
            raise ValueError(
                f"{folder} was trained on another base: {name} has other values there. Load it on the model that its "
                f"adapter_config.json names, or delete {FINGERPRINT_FILE} if it is meant for this one all the same"
            )
