"""The state of one whole parameter as bitsandbytes' 8-bit optimizers keep it, and back. Nothing is computed.

    ours, small parameters     exp_avg                             exp_avg_sq
    theirs                     state1 (fp32)                       state2 (fp32)
    ours, others               exp_avg_codes    exp_avg_absmax     exp_avg_sq_codes    exp_avg_sq_absmax
    theirs                     state1 (uint8)   absmax1   qmap1    state2 (uint8)      absmax2     qmap2

Theirs have the parameter's shape where ours are flat, and count steps per parameter. Blocks, maps and what is small are
the same by default on both sides (bitsandbytes >= 0.44), so these are the tensors of `AdamW8bit.state[parameter]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minift.ops.blockwise import BLOCK, dynamic_map

_NAMES = {
    "exp_avg": "state1",
    "exp_avg_sq": "state2",
    "exp_avg_codes": "state1",
    "exp_avg_sq_codes": "state2",
    "exp_avg_absmax": "absmax1",
    "exp_avg_sq_absmax": "absmax2",
}
_MAPS = {"qmap1": True, "qmap2": False}  # signed?


def to_bitsandbytes(state: dict[str, Tensor], shape: torch.Size, num_steps: int) -> dict[str, Any]:
    """`state`: what `AdamW.places` names of a whole parameter. The result shares its memory."""
    theirs: dict[str, Any] = {"step": num_steps}
    for what, tensor in state.items():
        theirs[_NAMES[what]] = tensor if what.endswith("absmax") else tensor.view(shape)
    if "absmax1" in theirs:
        device = theirs["absmax1"].device
        theirs |= {name: dynamic_map(signed).values.to(device) for name, signed in _MAPS.items()}
    return theirs


def from_bitsandbytes(theirs: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """The tensors of a whole parameter, by our names, and the number of steps. The result shares their memory.

    ValueError if they are quantised by other maps or blocks, or not the state of an AdamW.
    """
    is_8bit = "state1" in theirs and theirs["state1"].dtype == torch.uint8
    needed = {"step", "state1", "state2"} | ({"qmap1", "qmap2", "absmax1", "absmax2"} if is_8bit else set())
    if missing := needed - theirs.keys():
        raise ValueError(f"not the state of bitsandbytes' AdamW: it has {sorted(theirs)}, but no {sorted(missing)}")
    if is_8bit:
        blocks = -(-theirs["state1"].numel() // BLOCK)
        for name, signed in _MAPS.items():
            if not torch.equal(theirs[name].cpu(), dynamic_map(signed).values):
                raise ValueError(f"bitsandbytes state: {name} is not the dynamic map; valid: states of optim_bits=8")
            absmax = theirs[f"absmax{name[-1]}"]
            if absmax.shape != (blocks,):
                raise ValueError(
                    f"bitsandbytes state: absmax{name[-1]} has shape {tuple(absmax.shape)} for "
                    f"{theirs['state1'].numel()} elements; valid: ({blocks},), one for every {BLOCK} elements"
                )
    ours = ("exp_avg_codes", "exp_avg_absmax", "exp_avg_sq_codes", "exp_avg_sq_absmax")
    wanted = ours if is_8bit else ("exp_avg", "exp_avg_sq")
    return {what: theirs[_NAMES[what]].reshape(-1) for what in wanted}, int(theirs["step"])
