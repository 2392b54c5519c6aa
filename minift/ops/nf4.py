"""NF4: weights as 4-bit codes with a scale per block, in the format of bitsandbytes, to the byte.

    scale = max |block|        code = number of THRESHOLDS below w / scale        w ~ CODEBOOK[code] * scale

A tensor is flattened and cut into blocks; rows do not matter. With double quantisation the scales become bytes too, a
map value times an fp32 number per 256 scales plus one offset per tensor: 4.127 bits per weight instead of 4.5.
A block knows nothing of its neighbours, so a tensor can be cut at block borders, quantised in parts and put together
again. csrc/nf4.h is the definition of the format.

Paper: Dettmers et al. 2023, arXiv 2305.14314, section 3.
What is not here: matrix products with such weights (nf4_linear.py), modules and files (minift/quant), gradients.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from minift.ops import extension
from minift.ops.nf4_tables import (
    BLOCK_SIZE,
    BLOCK_SIZES,
    CODEBOOK,
    DYNAMIC_MAP,
    NESTED_BLOCK_SIZE,
    SMALLEST_DIVISOR,
    THRESHOLDS,
)


@dataclass(frozen=True, kw_only=True)
class Nf4:
    """One quantised matrix: codes, and either `absmax` or `scales`, `nested_absmax` and `offset`.

    The tensors are contiguous and may be views of one buffer of bytes; nothing here owns memory or copies it.
    """

    codes: Tensor  # uint8 (ceil(n / 2),): the even element in the high nibble
    shape: tuple[int, ...]
    block_size: int = BLOCK_SIZE
    absmax: Tensor | None = None  # fp32 (blocks,)
    scales: Tensor | None = None  # uint8 (blocks,)
    nested_absmax: Tensor | None = None  # fp32 (ceil(blocks / 256),)
    offset: Tensor | None = None  # fp32 (1,)

    def __post_init__(self) -> None:
        _check_block_size(self.block_size)
        num_blocks = -(-self.numel // self.block_size)
        expected = {"codes": (torch.uint8, -(-self.numel // 2))}
        if self.absmax is not None:
            expected |= {"absmax": (torch.float32, num_blocks)}
        else:
            expected |= {
                "scales": (torch.uint8, num_blocks),
                "nested_absmax": (torch.float32, -(-num_blocks // NESTED_BLOCK_SIZE)),
                "offset": (torch.float32, 1),
            }
        given = {"codes": self.codes, "absmax": self.absmax, "scales": self.scales}
        given |= {"nested_absmax": self.nested_absmax, "offset": self.offset}
        for name, tensor in given.items():
            if (tensor is not None) != (name in expected):
                raise ValueError(
                    f"Nf4: {name} is {'missing' if tensor is None else 'one too many'}; "
                    "give codes and absmax, or codes, scales, nested_absmax and offset"
                )
            if tensor is not None and (tensor.dtype, tensor.numel()) != expected[name]:
                dtype, count = expected[name]
                raise ValueError(
                    f"Nf4: {name} is {tensor.dtype} with {tensor.numel()} elements; a {self.shape} matrix in blocks of "
                    f"{self.block_size} has {dtype} with {count}"
                )

    @property
    def numel(self) -> int:
        """Number of elements of the matrix."""
        return torch.Size(self.shape).numel()


def quantize_nf4(weight: Tensor, block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    """Codes uint8 (ceil(n / 2),) and absmax fp32 (ceil(n / block_size),) of n elements of any floating dtype.

    Computed in fp32. Byte for byte what bitsandbytes gives on the CPU, its one oddity included: an incomplete last
    block of zeros has the scale 1e-38. ValueError if an element is NaN or infinite.
    """
    _check_block_size(block_size)
    codes, absmax = _quantize(_at_most_fp32(weight), block_size)
    _check_finite(absmax, block_size)
    return codes, absmax


def absmax_of(weight: Tensor, block_size: int = BLOCK_SIZE) -> Tensor:
    """The scales alone: absmax fp32 (ceil(n / block_size),), as `quantize_nf4` returns them."""
    _check_block_size(block_size)
    absmax = _absmax(_at_most_fp32(weight), block_size)
    _check_finite(absmax, block_size)
    return absmax


def quantize_scales(absmax: Tensor, offset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation of absmax fp32 (blocks,): scales uint8 (blocks,), nested_absmax fp32 (ceil(blocks / 256),)
    and offset fp32 (1,).

    The offset is the mean of absmax unless given; a shard is given that of the whole tensor, and starts at a
    multiple of 256 blocks. Byte for byte what bitsandbytes gives on the CPU, which looks up the nearest map value for
    one of 65536 points between -1 and 1 and not for the number itself (its CUDA kernel does the latter).
    """
    if absmax.dtype != torch.float32 or absmax.dim() != 1:
        raise ValueError(f"quantize_scales: absmax is {absmax.dtype} {tuple(absmax.shape)}; expected 1-D float32")
    offset = absmax.mean().reshape(1) if offset is None else offset
    if not offset.isfinite():
        raise ValueError("quantize_scales: the mean of absmax is not a finite fp32 number; keep these scales in fp32")
    num_blocks, num_groups = absmax.numel(), -(-absmax.numel() // NESTED_BLOCK_SIZE)
    padded = absmax.new_zeros(num_groups, NESTED_BLOCK_SIZE)
    padded.view(-1)[:num_blocks] = absmax - offset
    nested_absmax = padded.abs().amax(1)

    # Every operation rounds as in bitsandbytes: the product and the sum together once, which fp64 holds exactly.
    position = ((padded * nested_absmax.reciprocal().unsqueeze(1)).clamp(-1, 1) + 1) * 0.5
    position = (position.double() * 65535 + 0.5).float().nan_to_num(0).int()
    points = torch.arange(65536, device=absmax.device).float() * 2 / 65535 - 1
    dynamic_map = DYNAMIC_MAP.to(absmax.device)
    nearest = torch.bucketize(points, (dynamic_map[:-1] + dynamic_map[1:]) / 2).to(torch.uint8)
    scales = torch.where(nested_absmax.unsqueeze(1) > 0, nearest[position], 0)
    return scales.view(-1)[:num_blocks].clone(), nested_absmax, offset


def dequantize_nf4(
    nf4: Nf4, dtype: torch.dtype, start: int = 0, stop: int | None = None, out: Tensor | None = None
) -> Tensor:
    """Elements [start, stop) of the flattened matrix, 1-D, in `dtype`: fp32 products rounded once.

    start and stop (default: the end) are multiples of block_size, or the end. `out`, contiguous, of `dtype` and
    stop - start elements in any shape, is written and returned if given. float64 holds the fp32 products.
    """
    stop = nf4.numel if stop is None else stop
    for name, position in (("start", start), ("stop", stop)):
        if not 0 <= position <= nf4.numel or (position % nf4.block_size and position != nf4.numel) or start > stop:
            raise ValueError(
                f"dequantize_nf4: {name} is {position} in [{start}, {stop}) of {nf4.numel} elements; expected a "
                f"multiple of the block size {nf4.block_size}, or the end"
            )
    if out is None:
        out = torch.empty(stop - start, dtype=dtype, device=nf4.codes.device)
    elif out.dtype != dtype or out.numel() != stop - start or not out.is_contiguous():
        raise ValueError(
            f"dequantize_nf4: out is {out.dtype} with {out.numel()} elements; expected contiguous {dtype} with "
            f"{stop - start}"
        )
    if start < stop:
        _dequantize_rows(nf4, out.view(1, -1), start, 0)
    return out


def dequantize_nf4_columns(nf4: Nf4, start: int, out: Tensor) -> Tensor:
    """Columns [start, start + width) of a matrix with rows of whole blocks, into contiguous `out` (rows, width).

    start and width are multiples of block_size.
    """
    rows, columns = nf4.shape
    width = out.shape[-1]
    if (
        columns % nf4.block_size
        or start % nf4.block_size
        or width % nf4.block_size
        or not 0 <= start <= columns - width
    ):
        raise ValueError(
            f"dequantize_nf4_columns: columns [{start}, {start + width}) of {columns}; all three must be multiples of "
            f"the block size {nf4.block_size}"
        )
    if out.shape != (rows, width) or not out.is_contiguous():
        raise ValueError(f"dequantize_nf4_columns: out is {tuple(out.shape)}; expected contiguous ({rows}, {width})")
    if out.numel() > 0:
        _dequantize_rows(nf4, out, start, columns)
    return out


def _dequantize_rows(nf4: Nf4, out: Tensor, start: int, stride: int) -> None:
    dequantize = dequantize_nf4_reference if out.dtype == torch.float64 else _dequantize
    dequantize(out, nf4.codes, *scale_tensors(nf4), nf4.block_size, start, stride)


def scale_tensors(nf4: Nf4) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What the ops take as scales: (absmax, None, None, None) or (scales, nested_absmax, offset, nested_map)."""
    if nf4.absmax is not None:
        return nf4.absmax, None, None, None
    return nf4.scales, nf4.nested_absmax, nf4.offset, _dynamic_map(nf4.codes.device)


@functools.cache
def _dynamic_map(device: torch.device) -> Tensor:
    """DYNAMIC_MAP, copied to a device once: the host waits for a copy."""
    return DYNAMIC_MAP.to(device)


def quantize_nf4_reference(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """`quantize_nf4` in plain PyTorch."""
    flat = weight.reshape(-1).float()
    absmax = absmax_of_reference(weight, block_size)
    num_complete = flat.numel() // block_size
    complete = flat[: num_complete * block_size].view(num_complete, block_size)
    inverse = 1 / absmax[:num_complete].clamp(min=SMALLEST_DIVISOR)
    # bitsandbytes multiplies complete blocks by the reciprocal and divides an incomplete one.
    normalised = torch.cat(
        (
            (complete * inverse.unsqueeze(1)).view(-1),
            flat[num_complete * block_size :] / absmax[num_complete:],
            flat.new_zeros(flat.numel() % 2),
        )
    )
    codes = torch.bucketize(normalised, THRESHOLDS.to(flat.device)).to(torch.uint8)
    return codes[::2] << 4 | codes[1::2], absmax


def absmax_of_reference(weight: Tensor, block_size: int) -> Tensor:
    """`absmax_of` in plain PyTorch."""
    magnitude = weight.reshape(-1).float().abs()
    num_complete = magnitude.numel() // block_size
    complete, incomplete = magnitude.tensor_split([num_complete * block_size])
    absmax = complete.view(num_complete, block_size).amax(1)
    if incomplete.numel() == 0:
        return absmax
    return torch.cat((absmax, incomplete.amax().clamp(min=SMALLEST_DIVISOR).view(1)))


def dequantize_nf4_reference(
    out: Tensor,
    codes: Tensor,
    scales: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    nested_map: Tensor | None,
    block_size: int,
    start: int,
    stride: int,
) -> None:
    """Elements [start + r stride, start + r stride + width) into row r of `out` (rows, width), in plain PyTorch.

    scales as `scale_tensors` gives them.
    """
    rows, width = out.shape
    for row in range(rows):
        first = start + row * stride
        packed = codes[first // 2 : (first + width + 1) // 2]
        unpacked = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[:width]
        blocks = torch.arange(first // block_size, -(-(first + width) // block_size), device=codes.device)
        absmax = scales[blocks]
        if nested_absmax is not None:
            absmax = nested_map[absmax.int()] * nested_absmax[blocks // NESTED_BLOCK_SIZE] + offset
        out[row] = CODEBOOK.to(codes.device)[unpacked.int()] * absmax.repeat_interleave(block_size)[:width]


def _at_most_fp32(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype == torch.float64 else weight


def _check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"NF4: the block size is {block_size}; expected one of {BLOCK_SIZES}")


def _check_finite(absmax: Tensor, block_size: int) -> None:
    finite = absmax.isfinite()
    if not finite.all():
        block = int((~finite).nonzero()[0])
        raise ValueError(
            f"NF4: the weight has a NaN or an infinity among elements {block * block_size} to "
            f"{(block + 1) * block_size - 1}; only finite numbers can be quantised"
        )


def _quantize_fake(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    codes = weight.new_empty((weight.numel() + 1) // 2, dtype=torch.uint8)
    return codes, _absmax_fake(weight, block_size)


def _absmax_fake(weight: Tensor, block_size: int) -> Tensor:
    return weight.new_empty((weight.numel() + block_size - 1) // block_size, dtype=torch.float32)


def _dequantize_fake(out, codes, scales, nested_absmax, offset, nested_map, block_size, start, stride) -> None:
    return None


_quantize = extension.op("nf4_quantize", reference=quantize_nf4_reference, fake=_quantize_fake)
_absmax = extension.op("nf4_absmax", reference=absmax_of_reference, fake=_absmax_fake)
_dequantize = extension.op("nf4_dequantize", reference=dequantize_nf4_reference, fake=_dequantize_fake)
