"""The texts with measured numbers in README.md: a function for each region, which reads results and returns Markdown.
`readme` puts them where they belong.

Change a sentence here, not there. Ratios are rounded where they are shown.
"""

from __future__ import annotations

import statistics

from gpu_regions import GPU
from interview_cells import CELLS
from kept import NotMeasured, all_runs, any_was_disturbed, merged, picture, questions, rows, run
from markdown import paragraph, table

# ----------------------------------------------------------------------------------------------------------- quickstart


def quickstart() -> str:
    values = run("quickstart", note="")["values"]
    last = {key: values[key] for key in ("before_correct", "after_correct", "total", "train_seconds")}
    last |= {key: values[key] for key in ("train_tokens_per_second", "wall_seconds")}
    json_line = ", ".join(f'"{key}": {value}' for key, value in last.items())
    return f"```\n{values['table']}\n\n{{{json_line}}}\n```\n\n{picture('quickstart', 'curves of the quickstart')}"


def stage(name: str) -> int:
    """Seconds of a stage of the quickstart, found by how its headline begins."""
    stages = run("quickstart", note="")["values"]["stages_seconds"]
    return next(seconds for title, seconds in stages.items() if title.startswith(name))


def quickstart_time() -> str:
    values = run("quickstart", note="")["values"]
    rest = stage("fine-tune") - values["train_seconds"]
    return paragraph(f"""
        Where the time goes, on two virtual cores of a Zen 4 server (AVX-512 with bf16, no AMX): converting the model
        {stage("convert")} s, grading before {stage("grade the model")} s (the untrained model rambles to the token
        limit), training {values["train_seconds"]:.0f} s, starting, validations, checkpoints and export {rest:.0f} s,
        grading after {stage("grade the fine-tuned")} s. Training is matrix products, near what such cores give in
        bf16, attention, and LoRA's thin products; weights lie in memory that both processes share, so nothing is
        gathered.
        """)


def quickstart_lora() -> str:
    dense = run("quickstart", note="LoRA: no quant, r 16, 8 examples a step")["values"]
    nf4 = run("quickstart", note="QLoRA, r 16, 8 examples a step")["values"]
    return paragraph(f"""
        With rank 16 and 8 examples a step, LoRA over dense weights ended at {dense["after_correct"]} of
        {dense["total"]} in {dense["train_seconds"]:.0f} s, and QLoRA at {nf4["after_correct"]}: a model this small
        feels 4 bits. Rank, steps and learning rate were chosen by this same score, so expect a few less on fresh
        questions.
        """)


# --------------------------------------------------------------------------------------------------------------- engine


def prefetch() -> str:
    values, link = run("prefetch")["values"], run("prefetch")["parameters"]["link_gbit"]
    text = paragraph(f"""
        `loop.timeline_step` records a step and leaves `timeline.png` and `timeline.json` (a Chrome trace) in the run
        folder; `minift timeline RUN --dark` draws it again. Here a link of {link} Gbit/s between two processes, first
        without prefetch, then gathering one block ahead: the waits between the blocks go (a step is
        {values["prefetch_speedup"]:.2f} times as fast, {100 * values["hidden_share"]:.0f} % of the communication is
        hidden), and what remains is the first gather and the last reduction, which nothing can hide.
        """)
    return f"{text}\n\n{picture('prefetch', 'one step without and with prefetch')}"


def fsdp() -> str:
    lines = []
    for ranks, wire in ((2, "bfloat16"), (2, "float32"), (1, "bfloat16"), (4, "bfloat16")):
        values = run("fsdp_vs_fully_shard", ranks=ranks, wire=wire, layers=30)["values"]
        seconds = values["step_seconds"]
        peaks = [values["memory_mib"][side]["peak"] for side in ("minift", "fully_shard")]
        lines.append((
            f"{ranks}, {wire}", *(f"{seconds[name]:.2f}" for name in ("minift", "fully_shard", "compute")),
            f"**{values['step_time_ratio']:.2f}**", f"{values['overhead_vs_no_comm']:.2f}",
            f"{peaks[0]:.0f} / {peaks[1]:.0f} MiB = **{values['peak_memory_ratio']:.2f}**",
            f"{values['transient_memory_ratio']:.2f}",
        ))  # fmt: skip
    head = ("processes, wire", "s a step: minift", "`fully_shard`", "compute", "`fully_shard` / minift",
            "minift / compute", "peak memory, minift / `fully_shard`", "transient")  # fmt: skip
    return table(head, lines)


def fsdp_sweep() -> str:
    runs = {ranks: run("fsdp_vs_fully_shard", ranks=ranks, ddp=True)["values"] for ranks in (1, 2, 4, 8)}
    shard = ", ".join(f"{values['step_time_ratio']:.2f}" for values in runs.values())
    ddp = ", ".join(f"{values['step_time_ratio_ddp']:.2f}" for values in runs.values())
    peaks = {name: mib["peak"] / 8 for name, mib in runs[8]["memory_mib"].items()}
    text = paragraph(f"""
        With a model of which eight copies fit (10 layers, 8192 words), on 1, 2, 4 and 8 processes a step takes
        {shard} times as long with `fully_shard` as with minift, and {ddp} times with DDP; of eight, a process peaks at
        {peaks["minift"]:.0f} MiB with minift, {peaks["fully_shard"]:.0f} with `fully_shard`, {peaks["ddp"]:.0f} with
        DDP.
        """)
    what = "step time and memory of minift, fully_shard and DDP on 1 to 8 processes"
    return f"{text}\n\n{picture('fsdp_vs_fully_shard', what)}"


def recompute() -> str:
    by_policy = rows("recompute", "policy", method="lora")
    names = {"none": "`none`", "selective": "`selective`", "full, every 4th": "`full`, every fourth block",
             "full, every 2nd": "`full`, every second block", "full": "`full`"}  # fmt: skip
    lines = [
        (text, f"{by_policy[name]['time']:.2f}", f"{by_policy[name]['kept_mib']:.0f} MiB")
        for name, text in names.items()
        if name in by_policy
    ]
    return table(("`recompute.policy`", "time of a step", "kept for backward"), lines)


def adapters_per_row() -> str:
    same = run("adapters_per_row", mixed=False)
    rows_, ranks = same["parameters"]["rows"], f"adapters of rank {same['parameters']['rank']}"
    values, mixed = same["values"], run("adapters_per_row", mixed=True)["values"]
    return paragraph(f"""
        On SmolLM2-135M's shapes in bf16, {rows_} rows with {rows_} {ranks} take
        {values["decode_over_one_adapter"]:.2f} of the time of one adapter for all in decoding and
        {values["prefill_over_one_adapter"]:.2f} in prefill (with ranks of 4 to 32
        {mixed["decode_over_one_adapter"]:.2f} and {mixed["prefill_over_one_adapter"]:.2f}); row by row it would be
        {values["decode_apart_over_each"]:.1f} and {values["prefill_apart_over_each"]:.1f} times as long
        (`python benchmarks/adapters_per_row.py`).
        """)


def methods() -> str:
    found = rows("peft_methods", "method")
    lines = []
    for name, row in found.items():
        like = "as LoRA" if "time" not in row else f"{row['time']:.2f}"
        peak = "as LoRA" if "time" not in row else f"{row['peak_mib']:.0f} MiB"
        stored = f"{row['stored_bytes'] / 2**20:.2f} MiB"
        correct = f"{row['correct']} of {row['questions']}"
        lines.append((name, correct, f"{row['validation_loss']:.3f}", f"{row['stored_weights']:,}", stored, like, peak))
    examples = run("peft_methods")["parameters"]["examples"]
    text = paragraph(f"""
        One task, one budget: SmolLM2-135M sees {examples} of the quickstart's conversations once, by each method, with
        a learning rate that nobody searched for; a few correct answers more or less say nothing
        (`python benchmarks/peft_methods.py --quickstart runs/quickstart`).
        """)
    head = ("", "correct calls", "held-out loss", "stored weights", "stored", "time of a step, LoRA = 1", "peak")
    return "\n\n".join([text, table(head, lines), picture("peft_methods", "what each method reaches and costs")])


def intruders() -> str:
    found, by_variant = run("intruders"), rows("intruders", "variant")
    values, parameters = found["values"], found["parameters"]

    def cell(part: str, factor: float) -> str:
        as_good = "trained" if factor == 1.0 else "base" if (part, factor) == ("update", 0.0) else ""
        row = by_variant[as_good or f"{part} x {factor:g}"]
        return f"{row['correct']} of {row['questions']}; {row['forgotten']:+.2f}"

    lines = [
        (f"× {factor:g}", *(cell(part, factor) for part in ("intruders", "along", "update")))
        for factor in (1.0, *parameters["factors"])
    ]
    text = paragraph(f"""
        On a real adapter: the quickstart's task, learnt with rank {parameters["rank"]} and a learning rate of
        {parameters["lr"]:g}, makes {values["intruders"]} intruders in {values["weights_with_intruders"]} of
        {values["weights"]} weights. Correct calls, and nats a token that the model has forgotten of prose, when they
        are scaled (`python benchmarks/intruders.py`; one training, so a few calls more or less say nothing):
        """)
    why = paragraph(f"""
        Here that brings nothing back: *base's* in the table of `minift analyze`, {values["base_share"]:.2f} in the
        median, is how much of an intruder's σ the base has by itself, and that goes down, too. Scaling only what
        training did in those directions brings a part back; scaling all of ΔW by a half nearly everything, and the task
        does not suffer.
        """)
    head = ("", "intruders, σ u vᵀ", "what training did to them, u uᵀ ΔW", "all of ΔW")
    what = "what scaling intruders and what scaling the update does to forgetting and task"
    return "\n\n".join([text, table(head, lines), why, picture("intruders", what)])


def checkpoint() -> str:
    values = run("checkpoint")["values"]
    seconds, mib = values["seconds"], values["async_memory_mib"]
    stall = {name: 1e3 * value for name, value in seconds["stall"].items()}
    return paragraph(f"""
        Checkpoints are saved by a thread straight from the live tensors while training goes on; the optimizer asks
        before it overwrites what is not on disk yet. Against `torch.distributed.checkpoint`
        (`python benchmarks/checkpoint.py`, 135 M parameters with fp32 masters and moments, 2 processes): a synchronous
        save takes {seconds["save"]["minift"]:.2f} s against {seconds["save"]["dcp"]:.2f} s although it reads
        everything back, an asynchronous one stops training for {stall["minift"]:.0f} ms against
        {stall["dcp staged"]:.0f} (its best setting) and {stall["dcp"]:.0f} (its default), and takes
        {mib["minift"]:.0f} MiB against {mib["dcp staged"]:.0f}.
        """)


# ------------------------------------------------------------------------------------------------------------- planning


def planning() -> str:
    """How far plans were off, and what they say of thousands of GPUs."""
    text = f"""
        Of {_off_by("plan_time")} (`python benchmarks/plan_time.py`: model, method, recomputation, sharding, tokens and
        microbatches drawn at random, on 1 to 3 processes).
        """
    return f"{paragraph(text)}\n\n{picture('plan_time', 'planned over measured seconds of steps')}"


def planning_links() -> str:
    text = f"Over slow links, in network namespaces: of {_off_by('plan_links')} (`python benchmarks/plan_links.py`)."
    return f"{paragraph(text)}\n\n{picture('plan_links', 'simulated over measured seconds of steps on slow links')}"


def scaling() -> str:
    found = run("scaling")["values"]["efficiency_on_4096"]
    zero3, hsdp, qlora = (
        found[f"llama-3.1-8b, 2048 tokens, {way}"] for way in ("ZeRO-3, full", "HSDP, full", "QLoRA, NF4 base")
    )
    text = f"""
        The same simulation, with figures of H100s and NCCL's rings from `minift/planner/catalog.py`, says when more
        GPUs stop paying. With 8192 tokens each, little is lost on 2048 GPUs; with 2048 on 4096, latency leaves
        {zero3:.2f} of ZeRO-3, {qlora:.2f} of QLoRA, whose weights are gathered in 4 bits, and {hsdp:.2f} of HSDP, whose
        rings do not grow (`python benchmarks/scaling.py`; simulated: one GPU was measured, not many).
        """
    return f"{paragraph(text)}\n\n{picture('scaling', 'efficiency against the number of GPUs')}"


def offload() -> str:
    """Pairs of rows: an H100's and an RTX 4090's."""
    rows = run("offload")["rows"]
    lines = []
    for h100, rtx in zip(rows[::2], rows[1::2], strict=True):
        assert (h100["device"], rtx["device"]) == ("h100", "rtx4090")
        name = h100["model"].replace("llama", "Llama").replace("b", "B")
        speeds = [f"{row['tokens_per_second']:,.0f}" if row["fits"] else "too small" for row in (h100, rtx)]
        sizes = f"{h100['peak_gb']:.1f}", f"{h100['host_gb']:.1f}"
        lines.append((f"{name}, {h100['method']}", h100["away"], *sizes, *speeds))
    head = ("8192 tokens, blocks run again", "in host memory", "GB on the GPU", "on the host", "tokens/s of an H100",
            "of an RTX 4090")  # fmt: skip
    text = """
        And it says what it costs to keep something in host memory, beyond a bus of 53 and of 25 GB/s
        (`python benchmarks/offload.py`; simulated; measured was half of the weights with LoRA on an H100, see below).
        With all frozen weights there, LoRA over 16 bits takes less of a GPU than QLoRA.
        """
    return f"{paragraph(text)}\n\n{table(head, lines)}\n\n{picture('offload', 'seconds of steps, and of waiting')}"


def host_time() -> str:
    found = run("host_time")["rows"]
    host = {row["method"]: row for row in found if "gpu_block_us" in row}
    models = {(row["model"], row["method"]): row for row in found if "model" in row}

    def tokens(model: str, method: str) -> str:
        count = models[model, method]["enough_tokens"]
        return f"{round(count, 2 - len(str(count))):,}"

    full, lora, qlora = (f"{host[method]['gpu_block_us'] / 1e3:.1f}" for method in host)
    share = models["llama-3.1-8b", "LoRA"]["host_over_gpu"]
    text = f"""
        Nor does it take a GPU to say whether one would wait for its host, the process that launches its kernels.
        Python, autograd and hooks take {full} ms for a block's forward and backward in full fine-tuning, {lora} ms with
        LoRA, {qlora} ms with QLoRA (and more of large weights, which a GPU multiplies in slices): measured on this
        processor, in steps of models so narrow that nothing else counts, with 5 µs added for each launch. On paper an
        H100 takes longer, and the host runs ahead of it, from these tokens of a microbatch on (`python
        benchmarks/host_time.py`; with LoRA on Llama-3.1-8B and 8192 tokens it needs {share:.2f} of the GPU's time).
        `minift plan` says where a step is launch-bound.
        """
    names = {model: None for model, _ in models}
    lines = [(model, *(tokens(model, method) for method in host)) for model in names]
    return f"{paragraph(text)}\n\n{table(('enough tokens', *host), lines)}\n\n" + picture(
        "host_time", "host's time over an H100's, by tokens of a microbatch"
    )


def _off_by(question: str) -> str:
    """Over all runs that were kept."""
    errors = sorted(abs(row["error"]) for one in all_runs(question) for row in one["rows"])
    if not errors:
        raise NotMeasured(question)
    within = sum(error <= 0.15 for error in errors)
    return (
        f"{len(errors)} runs {within} took what was planned to within 15 %, half of them to within "
        f"{100 * statistics.median(errors):.0f} %, the worst {100 * errors[-1]:.0f} %"
    )


# ----------------------------------------------------------------------------------------------- what each switch costs


def switches() -> str:
    """One line for each question that a recipe's reader has, of those that were measured."""
    lines = []
    for benchmark, line in (
        ("memory_per_rank", strategies_line), ("precision_policies", precision_line), ("packing", packing_line),
        ("loss_chunk", loss_chunk_line), ("accumulation", accumulation_line),
    ):  # fmt: skip
        try:
            lines.append((*line(), f"`{benchmark}.py`"))
        except NotMeasured:
            continue
    drawn = [picture("memory_per_rank", "memory per rank under each strategy")]
    return "\n\n".join([table(("", "", "`python benchmarks/`…"), lines), *drawn])


def strategies_line() -> tuple[str, str]:
    found = rows("memory_per_rank", "strategy", method="full")  # later rows, of more ranks, replace earlier ones
    most = max(row["ranks"] for row in found.values())
    measured = ", ".join(f"`{name}` {found[name]['measured_mib']:.0f}" for name in ("ddp", "zero1", "zero2", "zero3"))
    return f"what does each strategy hold, on {most} ranks?", f"{measured} MiB a rank"


def precision_line() -> tuple[str, str]:
    found = rows("precision_policies", "policy")
    fp32, bf16, masters = (found[name] for name in ("fp32", "bf16", "bf16, bf16 master"))
    return "bf16 instead of fp32?", (
        f"{bf16['speedup']:.2f}× as fast, {bf16['peak_mib']:.0f} instead of {fp32['peak_mib']:.0f} MiB; with bf16 "
        f"masters {masters['speedup']:.2f}×, {masters['peak_mib']:.0f} MiB"
    )


def packing_line() -> tuple[str, str]:
    values = run("packing")["values"]
    return "packing instead of padding?", (
        f"{values['speedup_over_padded']:.2f}× as fast as padding to the longest of the batch, "
        f"{values['speedup_over_limit']:.2f}× as padding to the limit"
    )


def loss_chunk_line() -> tuple[str, str]:
    found = run("loss_chunk", trainable=False)
    *chunks, whole = found["rows"]
    near = min(chunks, key=lambda row: abs(row["chunk_tokens"] - found["values"]["default_chunk_tokens"]))
    return "the loss in chunks?", (
        f"{near['speedup']:.2f}× as fast as all logits at once, {near['peak_mib']:.0f} instead of "
        f"{whole['peak_mib']:.0f} MiB"
    )


def accumulation_line() -> tuple[str, str]:
    found = run("accumulation")["rows"]
    count = max(row["microbatches"] for row in found)
    last = [row for row in found if row["microbatches"] == count]
    return f"accumulating {count} microbatches over a slow link?", (
        ", ".join(f"`{row['policy']}` {row['seconds_per_microbatch']:.2f}" for row in last) + " s a microbatch"
    )


# -------------------------------------------------------------------------------------------------------------- numbers


def numbers() -> str:
    start = run("quickstart", note="")["values"]
    suite = run("test_suite")["values"]
    ops, steps = merged("ops_cpu"), merged("lora_step")
    nf4 = run("nf4_cpu", double_quant=False)["values"]
    error = run("nf4_error")["values"]
    adam = run("optimizer")["values"]

    def op(name: str) -> str:
        return f"{ops[f'{name}, bfloat16']:.1f}×"

    def step(method: str) -> str:
        """Of what was measured."""
        if f"{method}_step_ratio" not in steps:
            return "not measured"
        return f"{steps[f'{method}_step_ratio']:.2f}× as fast in {steps[f'{method}_memory_ratio']:.2f} of the memory"

    limit = steps["lora_step_ratio_limit"]
    lines = [
        ("logits against transformers, fp32, every family and SmolLM2 itself", "≤ 2e-5 of the largest logit",
         "`launch/test.sh tests/model tests/integration`"),
        ("gradients and weights, 1–4 processes against one, fp32, every strategy", "≤ 1e-6 relative",
         "`launch/test.sh tests/fsdp`"),
        ("collectives per step of a model with B blocks, zero3",
         "2B all-gathers (root 1, blocks 2, the last one 1) and 1 + B reduce-scatters", "`test_collectives_per_step`"),
        ("throughput of the quickstart's training",
         f"{start['train_tokens_per_second']:.0f} tokens/s, {start['train_seconds']:.0f} s",
         "`./launch/quickstart.sh`"),
        ("C++ operations against eager PyTorch, bf16, one thread",
         f"RMSNorm {op('rms_norm')} forward, {op('rms_norm backward, frozen weight')} backward; RoPE {op('rope')}, "
         f"{op('rope backward')}; SwiGLU {op('swiglu')}, {op('swiglu backward')}", "`python benchmarks/ops_cpu.py`"),
        ("attention against PyTorch's, forward and backward, bf16, one thread",
         f"thirty documents of 40 tokens {op('attention, 30 of 40, forward + backward (sdpa)')}, eight of 100–250 "
         f"{op('attention, 8 of 100-250, forward + backward (sdpa)')}, one of 2048 "
         f"{op('attention, 1 of 2048, forward + backward (sdpa)')}", "`python benchmarks/ops_cpu.py`"),
        ("NF4 on a CPU against bitsandbytes, 4096², bf16, one thread",
         f"quantise {nf4['quantize_ratio']:.0f}×; dequantise {nf4['dequantize_ratio']:.1f}× "
         f"({nf4['dequantize_ratio_new_memory']:.1f}× if both allocate, theirs always does), at "
         f"{nf4['dequantize_fraction_of_copy']:.2f} of copy bandwidth; product with 512 tokens "
         f"{nf4['linear_ratio_T512']:.2f}×, {nf4['linear_ratio_T512_dense']:.0%} of a dense one; one token "
         f"{nf4['gemv_ratio']:.0f}× ({nf4['gemv_ratio_packed']:.1f}× against its packed inference format)",
         "`python benchmarks/nf4_cpu.py`"),
        ("error of NF4, normal weights, blocks of 64",
         f"relative rms {error['rms normal NF4']:.3f}, with double quantisation {error['rms normal NF4 + DQ']:.3f} "
         f"(4.13 bits); INT4 absmax {error['rms normal INT4 absmax']:.3f}, INT8 {error['rms normal INT8 absmax']:.3f}",
         "`python benchmarks/nf4_error.py`"),
        ("AdamW, one thread",
         f"{adam['torch_fused_over_fp32']:.2f}× as fast as PyTorch's fused one; in 8 bits "
         f"{adam['bitsandbytes_over_8bit']:.0f}× as fast as bitsandbytes'", "`python benchmarks/optimizer.py`"),
        ("a step against transformers + PEFT + bitsandbytes, SmolLM2-135M, 2 × 512 tokens",
         f"LoRA {step('lora')} ({limit:.1f}× is what free everything but the dense products would give), QLoRA "
         f"{step('qlora')}, full fine-tuning {step('full')}", "`python benchmarks/lora_step.py`"),
        ("test suite", f"{suite['tests']} tests in {suite['pytest_seconds'] / 60:.1f} min", "`launch/test.sh`"),
    ]  # fmt: skip
    drawn = picture("lora_step", "seconds and memory of a step, minift against transformers + PEFT")
    return f"{table(('what', 'number', 'where'), lines)}\n\n{drawn}"


def conditions() -> str:
    """Which of all these were measured beside other work."""
    disturbed = sorted(question for question in questions() if any_was_disturbed(question))
    text = "Each file says under `conditions` what else the machine did meanwhile."
    if disturbed:
        text += f"""
            For {", ".join(f"`{name}`" for name in disturbed)} that was more than a tenth of it: variants take turns, so
            ratios hold, but seconds are longer than they would be alone.
            """
    return paragraph(text)


REGIONS = {
    "quickstart": quickstart,
    "quickstart-time": quickstart_time,
    "quickstart-lora": quickstart_lora,
    "prefetch": prefetch,
    "fsdp": fsdp,
    "fsdp-sweep": fsdp_sweep,
    "recompute": recompute,
    "adapters-per-row": adapters_per_row,
    "methods": methods,
    "intruders": intruders,
    "checkpoint": checkpoint,
    "planning": planning,
    "planning-links": planning_links,
    "scaling": scaling,
    "offload": offload,
    "host-time": host_time,
    "switches": switches,
    "numbers": numbers,
    "conditions": conditions,
} | GPU | CELLS
