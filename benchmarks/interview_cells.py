"""The cells of INTERVIEW.md that have measured numbers: a function for each region, see `readme_regions`."""

from __future__ import annotations

from kept import rows, run


def nf4_error_cell() -> str:
    error = run("nf4_error")["values"]
    return (
        f"rms error {error['rms normal NF4']:.3f} against {error['rms normal INT4 absmax']:.3f} of INT4 "
        "(`benchmarks/nf4_error.py`)"
    )


def adam_cell() -> str:
    states = rows("optimizer", "name")
    return (
        f"{states['8bit']['state_bytes_per_weight']:.2f} bytes a weight instead of "
        f"{states['fp32']['state_bytes_per_weight']:.0f}; `benchmarks/optimizer.py`"
    )


def precision_cell() -> str:
    bf16, fp32 = (rows("precision_policies", "policy")[name] for name in ("bf16", "fp32"))
    return (
        f"a step {bf16['speedup']:.2f}× as fast, {bf16['peak_mib']:.0f} instead of {fp32['peak_mib']:.0f} MiB a rank "
        "(`benchmarks/precision_policies.py`)"
    )


def masters_cell() -> str:
    bf16, fp32 = (rows("precision_policies", "policy")[name] for name in ("bf16, bf16 master", "bf16"))
    return (
        f"{bf16['peak_mib']:.0f} instead of {fp32['peak_mib']:.0f} MiB a rank; after some steps the loss is "
        f"{bf16['last_loss']:.3f} instead of {fp32['last_loss']:.3f}, which is chance: other roundings move either as "
        "far (`benchmarks/precision_policies.py`)"
    )


def accumulation_cell() -> str:
    found = run("accumulation")["rows"]
    last = {row["policy"]: row for row in found if row["microbatches"] == found[-1]["microbatches"]}
    return (
        f"of {found[-1]['microbatches']} microbatches, a rank sends "
        + ", ".join(f"{row['sent_mib']:.0f} MiB under {name}" for name, row in last.items() if name != "zero3, kept")
        + " (`benchmarks/accumulation.py`)"
    )


def packing_cell() -> str:
    values = run("packing")["values"]
    return f"packed {values['speedup_over_padded']:.2f}× as fast as padded (`benchmarks/packing.py`)"


def strategies_cell() -> str:
    found = rows("memory_per_rank", "strategy", method="full")  # later rows, of more ranks, replace earlier ones
    most = max(row["ranks"] for row in found.values())
    return (
        f"on {most} ranks: "
        + ", ".join(f"{name} {found[name]['measured_mib']:.0f}" for name in ("ddp", "zero1", "zero2", "zero3"))
        + " MiB each (`benchmarks/memory_per_rank.py`)"
    )


def recompute_cell() -> str:
    found = rows("recompute", "policy", method="lora")
    return (
        f"full: {found['full']['kept_mib']:.0f} instead of {found['none']['kept_mib']:.0f} MiB for "
        f"{found['full']['time']:.2f} times the time (`benchmarks/recompute.py`)"
    )


def intruders_cell() -> str:
    values, by_variant = run("intruders")["values"], rows("intruders", "variant")
    trained, mild, update = (by_variant[name] for name in ("trained", "intruders x 0.75", "update x 0.75"))
    return (
        f"{values['intruders']} in {values['weights_with_intruders']} of {values['weights']} weights; forgotten "
        f"{trained['forgotten']:.2f} nats a token, with intruders × 0.75 {mild['forgotten']:.2f}, with ΔW × 0.75 "
        f"{update['forgotten']:.2f}, and {trained['correct']}, {mild['correct']}, {update['correct']} of "
        f"{mild['questions']} calls right (`benchmarks/intruders.py`)"
    )


def host_time_cell() -> str:
    values = run("host_time")["values"]
    share, enough = values["host_over_gpu"], values["enough_tokens"]
    return (
        f"the host's time over an H100's with 8192 tokens: Llama-3.1-8B {share['llama-3.1-8b, LoRA']:.2f} with LoRA, "
        f"{share['llama-3.1-8b, QLoRA']:.2f} with QLoRA, Llama-3.2-1B {share['llama-3.2-1b, full']:.2f} in full; it is "
        f"the slower one below {enough['llama-3.1-8b, LoRA']}, {enough['llama-3.1-8b, QLoRA']} and "
        f"{enough['llama-3.2-1b, full']} tokens (`benchmarks/host_time.py`; the GPU's side on paper)"
    )


CELLS = {
    "precision-cell": precision_cell,
    "masters-cell": masters_cell,
    "accumulation-cell": accumulation_cell,
    "packing-cell": packing_cell,
    "strategies-cell": strategies_cell,
    "recompute-cell": recompute_cell,
    "nf4-error-cell": nf4_error_cell,
    "adam-cell": adam_cell,
    "intruders-cell": intruders_cell,
    "host-time-cell": host_time_cell,
}
