"""The texts of README.md with what was measured on an H100. See `readme_regions`."""

from __future__ import annotations

from typing import Any

from kept import NotMeasured, picture, run
from markdown import paragraph, table

H100 = "h100-80gb-hbm3"
HALF = "[13579]$"  # every other block
STEPS = (  # (what, model, method, recompute, whose frozen weights wait on the host, peer)
    ("Llama-3.1-8B, LoRA r 16", "llama-3.1-8b", "lora", "none", None, "peft"),
    ("Llama-3.1-8B, LoRA r 16", "llama-3.1-8b", "lora", "full", None, "peft"),
    ("... and half of the weights on the host", "llama-3.1-8b", "lora", "full", HALF, "peft"),
    ("Llama-3.1-8B, QLoRA r 16", "llama-3.1-8b", "qlora", "none", None, "none"),
    ("Llama-3.1-8B, QLoRA r 16", "llama-3.1-8b", "qlora", "selective", None, "none"),
    ("Llama-3.1-8B, QLoRA r 16", "llama-3.1-8b", "qlora", "full", None, "peft"),
    ("Llama-3.2-1B, full", "llama-3.2-1b", "full", "none", None, "fully_shard"),
    ("Llama-3.2-1B, full", "llama-3.2-1b", "full", "selective", None, "fully_shard"),
    ("Llama-3.2-3B, full", "llama-3.2-3b", "full", "none", None, "none"),
)
PEERS = {"peft": "transformers + PEFT", "fully_shard": "our model under `fully_shard`"}


def steps() -> str:
    """A line for each kind of step, with its peer."""
    lines = []
    for what, model, method, recompute, offload_frozen, peer in STEPS:
        found = run(
            "step_cuda", H100, model=model, method=method, recompute=recompute, offload_frozen=offload_frozen, peer=peer
        )
        ours, *theirs = found["rows"]
        lines.append((what, recompute, *side(ours), f"{100 * ours['mfu']:.0f} %", *compared(ours, theirs)))
    head = ("step of 8192 tokens", "recompute", "tokens/s", "GB", "MFU", "against", "recompute", "tokens/s", "GB",
            "times as fast", "of the memory")  # fmt: skip
    return f"{table(head, lines)}\n\n{picture('step_cuda', 'tokens a second and peak memory of steps', H100)}"


def side(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['tokens_per_second']:,.0f}", f"{row['peak_gb']:.1f}"


def compared(ours: dict[str, Any], theirs: list[dict[str, Any]]) -> tuple[str, ...]:
    if not theirs:
        return ("",) * 6
    (row,) = theirs
    speed = ours["tokens_per_second"] / row["tokens_per_second"]
    memory = ours["peak_gb"] / row["peak_gb"]
    return PEERS[row["side"]], row["recompute"], *side(row), f"{speed:.2f}", f"{memory:.2f}"


def ops() -> str:
    """What part of the card's own rates the kernels reach."""
    found = run("ops_cuda", H100)
    rows, values = {row["name"]: row for row in found["rows"]}, found["values"]
    dequantize, quantize, head = rows["NF4 dequantize, nested"], rows["NF4 quantize"], rows["LM head, 16384 rows"]
    if "bitsandbytes" not in dequantize["ratios"]:
        raise NotMeasured("bitsandbytes was not there")

    def share(name: str) -> str:
        return f"{rows[name]['share']:.2f}"

    text = f"""
        Kernels, with the shapes of Llama-3.1-8B and 8192 tokens (`python benchmarks/ops_cuda.py`; a copy moves
        {values["copy_gb_per_s"]:,.0f} GB/s on this card, and a product of 8192³ in bf16 makes
        {values["products_tflops"]:.0f} TFLOP/s). Of the copy's rate: NF4 dequantize, scales in 8 bits
        {share("NF4 dequantize, nested")} ({dequantize["ratios"]["bitsandbytes"]:.2f}× bitsandbytes), quantize
        {share("NF4 quantize")} ({quantize["ratios"]["bitsandbytes"]:.1f}× bitsandbytes), RMSNorm {share("rms_norm")},
        its backward {share("rms_norm backward, frozen weight")}, SwiGLU {share("swiglu")} and
        {share("swiglu backward")}, with LoRA's updates made in it {share("swiglu with updates")} and
        {share("swiglu with updates backward")}, RoPE {share("rope")}, AdamW {share("AdamW, fp32 masters")}
        ({rows["AdamW, fp32 masters"]["ratios"]["torch fused"]:.2f}× PyTorch's fused one), in 8 bits
        {share("AdamW, 8-bit, fp32 masters")}. The LM head and its loss, forward and backward over a vocabulary of
        128256, make {head["tflops"]:.0f} TFLOP/s in {head["extra_gb"]:.2f} GB.
        """
    return f"{paragraph(text)}\n\n{picture('ops_cuda', 'share of the rates of a copy and a product', H100)}"


def cell() -> str:
    """For INTERVIEW.md."""
    lora = run("step_cuda", H100, model="llama-3.1-8b", method="lora", recompute="none", peer="peft")["rows"][0]
    return (
        f"{lora['tokens_per_second']:,.0f} tokens/s with Llama-3.1-8B, {100 * lora['mfu']:.0f} % MFU, "
        f"{lora['of_products']:.2f} of a large product's rate (`benchmarks/step_cuda.py`)"
    )


GPU = {"gpu-steps": steps, "gpu-ops": ops, "gpu-cell": cell}
