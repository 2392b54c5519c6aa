"""How far are weights from their quantised selves? NF4, with fp32 and double-quantised scales, INT4 and INT8 absmax.

    python benchmarks/nf4_error.py                              # normal weights
    python benchmarks/nf4_error.py --model DIR                  # and those of a Hugging Face folder (safetensors)

Every matrix of the model is quantised as fine-tuning would (2-D weights, without embeddings and the output layer).
Errors are of fp32 copies in blocks of 64: the root mean square relative to that of the weights, the mean and the
largest absolute one relative to the block's largest magnitude.

Nothing is timed. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from results import Result, finish, parse
from safetensors import safe_open

from minift.ops.absmax import dequantize_absmax, quantize_absmax
from minift.ops.nf4 import NESTED_BLOCK_SIZE, Nf4, absmax_of, dequantize_nf4, quantize_nf4, quantize_scales
from minift.style import label_bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

BLOCK_SIZE = 64


def nf4(weight: torch.Tensor) -> torch.Tensor:
    codes, absmax = quantize_nf4(weight, BLOCK_SIZE)
    return dequantize_nf4(Nf4(codes=codes, absmax=absmax, shape=tuple(weight.shape)), torch.float32)


def nf4_double_quantised(weight: torch.Tensor) -> torch.Tensor:
    codes, absmax = quantize_nf4(weight, BLOCK_SIZE)
    scales, nested_absmax, offset = quantize_scales(absmax)
    matrix = Nf4(codes=codes, scales=scales, nested_absmax=nested_absmax, offset=offset, shape=tuple(weight.shape))
    return dequantize_nf4(matrix, torch.float32)


def absmax_integers(num_bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weight: dequantize_absmax(*quantize_absmax(weight, num_bits, BLOCK_SIZE), num_bits, BLOCK_SIZE)


METHODS = {  # name: restored weight (n,) of a weight, bits per weight
    "NF4": (nf4, 4 + 32 / BLOCK_SIZE),
    "NF4 + DQ": (nf4_double_quantised, 4 + (8 + 32 / NESTED_BLOCK_SIZE) / BLOCK_SIZE),
    "INT4 absmax": (absmax_integers(4), 4 + 32 / BLOCK_SIZE),
    "INT8 absmax": (absmax_integers(8), 8 + 32 / BLOCK_SIZE),
}


def model_weights(folder: Path) -> Iterator[torch.Tensor]:
    """The matrices of the decoder blocks, one at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if len(tensors.get_slice(name).get_shape()) == 2 and ".layers." in name:
                    yield tensors.get_tensor(name)


def errors(restore: Callable[[torch.Tensor], torch.Tensor], weights: Iterator[torch.Tensor]) -> dict[str, float]:
    squares = total = relative_sum = largest = 0.0
    num_elements = 0
    for weight in weights:
        flat = weight.reshape(-1).float()
        error = (restore(weight) - flat).abs()
        absmax = absmax_of(weight, BLOCK_SIZE).repeat_interleave(BLOCK_SIZE)[: flat.numel()]
        relative = torch.where(absmax > 0, error / absmax, 0.0)
        squares += flat.double().square().sum().item()
        total += error.double().square().sum().item()
        relative_sum += relative.double().sum().item()
        largest = max(largest, relative.max().item())
        num_elements += flat.numel()
    return {"rms": (total / squares) ** 0.5, "mean": relative_sum / num_elements, "largest": largest}


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    rows = [row for row in runs[-1]["rows"] if row["weights"] == "normal"]
    figure.set_size_inches(7, 2)
    axes = figure.subplots()
    names = [f"{row['method']}, {row['bits']:.2f} bits" for row in rows]
    colours = [theme.ours if row["method"].startswith("NF4") else theme.quiet for row in rows]
    bars = axes.barh(names, [row["rms"] for row in rows], color=colours)
    label_bars(axes, bars, [f"{row['rms']:.4f}" for row in rows])
    axes.set_title("relative rms error of normal weights, blocks of 64")
    axes.invert_yaxis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder with *.safetensors")
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the normal weight")
    args = parse(parser, is_timed=False)

    normal = torch.randn(args.size, args.size, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    sources: dict[str, Callable[[], Iterator[torch.Tensor]]] = {"normal": lambda: iter([normal])}
    if args.model is not None:
        if next(model_weights(args.model), None) is None:
            raise SystemExit(f"{args.model} holds no *.safetensors with matrices of decoder blocks")
        sources[args.model.name] = lambda: model_weights(args.model)

    result = Result("nf4_error")
    print(f"{'weights':24}{'method':14}{'bits':>7}{'rms error':>12}{'mean / absmax':>15}{'largest / absmax':>18}")
    for source, weights in sources.items():
        for method, (restore, bits) in METHODS.items():
            found = errors(restore, weights())
            print(f"{source:24}{method:14}{bits:7.3f}{found['rms']:12.5f}{found['mean']:15.5f}{found['largest']:18.5f}")
            result.rows.append({"weights": source, "method": method, "bits": bits, **found})
    result.values = {"block_size": BLOCK_SIZE} | {f"rms {r['weights']} {r['method']}": r["rms"] for r in result.rows}
    finish(args, result, draw)


if __name__ == "__main__":
    main()
