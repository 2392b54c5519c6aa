"""What each command of the command line does with its parsed options: read, call, show. Nothing is computed here.

Modules that import torch are imported inside the commands, so that help and mistakes in a recipe's YAML do not wait.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minift.recipe.nodes import read_yaml

if TYPE_CHECKING:
    from minift.config import RunConfig
    from minift.dist.process import World
    from minift.inference import Assistant
    from minift.quant.linear import QuantConfig


def train(options: Namespace) -> int:
    """`minift train RECIPE ...`; under torchrun with `record`, so that it shows why the first failing rank failed."""
    if "--help" in options.overrides or "-h" in options.overrides:
        list_fields()
        return 0
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return _train(options)

    from torch.distributed.elastic.multiprocessing.errors import record

    return record(_train)(options)


def _train(options: Namespace) -> int:
    config = _read_recipe(options)
    # Everything that can be refused is refused before a process group starts.
    config.check_files()
    config.fsdp.shard_size(int(os.environ.get("WORLD_SIZE", "1")))

    from minift.train import train

    return train(config)


def plan(options: Namespace) -> None:
    """`minift plan RECIPE ...`, `minift plan MODEL`, or `minift plan --calibrate`."""
    if options.calibrate:
        _calibrate(options)
    if options.recipe is None:
        if options.calibrate:
            return
        raise ValueError("plan what? valid: a recipe, or a model such as llama-3.1-8b; or --calibrate")
    # Half a million small objects are made on the way, and kept until the end: nothing of it is worth looking through.
    gc.disable()
    is_recipe = options.recipe.endswith((".yaml", ".yml")) or Path(options.recipe).is_file()
    config = _read_recipe(options) if is_recipe else None

    import torch

    from minift.planner.answer import answer_for_model, answer_for_recipe
    from minift.planner.catalog import this_gpu
    from minift.planner.plan import Machine

    if options.device is None and torch.cuda.is_available() and this_gpu() is None:
        name = torch.cuda.get_device_name()
        print(f"minift: there are no figures of this machine's {name}; planned for an h100", file=sys.stderr)
    machine = Machine.named(options.device, options.world_size, options.network, options.host_memory)
    if config is None:
        if options.overrides:
            raise ValueError(f"{options.overrides[0]} is of a recipe, and {options.recipe} is a model; give a recipe")
        answer = answer_for_model(options.recipe, machine, options.document_tokens or 2048)
    else:
        answer = answer_for_recipe(config, machine, options.document_tokens, options.supervised, options.search)
    print(json.dumps(answer.to_json(), indent=1) if options.json else answer.text)
    if options.picture:
        print(answer.draw(Path(options.picture)), file=sys.stderr)
    gc.freeze()  # nor when the process ends


def _calibrate(options: Namespace) -> None:
    from minift.planner.calibrate import calibrate
    from minift.planner.calibration import calibration_path

    calibration = calibrate("cpu", sorted({1, 2, options.world_size}))
    calibration.save(calibration_path("cpu"))
    for number, device in calibration.devices.items():
        rates = f"{device.peak_flops_per_s / 1e9:.0f} GFLOP/s, {device.memory_bytes_per_s / 1e9:.1f} GB/s copied"
        print(f"{number} processes: each {rates}", file=sys.stderr)
    print(calibration_path("cpu"), file=sys.stderr)


def list_fields() -> None:
    """`minift train --help`"""
    from minift.config import help_text

    print(help_text(), flush=True)  # now, so that a closed pipe is noticed while somebody can handle it


def prepare_data(options: Namespace) -> None:
    """`minift data prepare RECIPE ...`: fills the cache that `train` uses, and shows what is in it."""
    config = _read_recipe(options)

    from rich.console import Console

    from minift.data.prepare import choose_template, prepare
    from minift.data.preview import preview
    from minift.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(config.model.path)
    template, folder = choose_template(config.data, tokenizer), Path(config.run_dir) / "data"
    documents = prepare(config.data, tokenizer, template, folder, objective=config.objective)
    console = Console()
    console.print(preview(documents, tokenizer))
    console.print("\n".join(documents.report.lines()), markup=False, highlight=False)


def write_bfcl(options: Namespace) -> None:
    from minift.eval.bfcl import prepare

    prepared = prepare(Path(options.out))
    print(f"{prepared.train_file}: {prepared.num_train_rows} rows to train on")
    print(f"{prepared.heldout_file}: {prepared.num_heldout_rows} rows held out")
    print(f"{prepared.answers_file}: their questions, for `minift eval bfcl --data`")


def convert(options: Namespace) -> None:
    from minift.checkpoint.atomic import atomic_folder
    from minift.model.gguf import convert_gguf

    with atomic_folder(Path(options.out)) as folder:
        convert_gguf(options.gguf, folder)
    print(f"wrote {options.out}")


def quantize(options: Namespace) -> None:
    from minift.checkpoint.quantize import quantize_folder

    quantize_folder(options.model, options.out, _nf4_settings(options))
    print(f"wrote {options.out}")


def merge(options: Namespace) -> None:
    from minift.checkpoint.merge import merge_adapter

    report = merge_adapter(
        options.model,
        options.adapter,
        options.out,
        target=options.target,
        quant=_quant(options),
        original_folder=options.original,
    )
    print(report.table())
    print(report)
    print(f"wrote {options.out}")


def combine(options: Namespace) -> None:
    from minift.checkpoint.adapter_files import STORAGE_DTYPES
    from minift.checkpoint.combine import combine_adapters
    from minift.peft.combine import Combination

    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGE_DTYPES}
    if options.dtype not in dtypes:
        raise ValueError(f"--dtype is {options.dtype}; valid: {', '.join(dtypes)}")
    config = combine_adapters(
        options.adapters,
        options.out,
        weights=options.weights,
        how=Combination(method=options.method, rank=options.rank, density=options.density, seed=options.seed),
        dtype=dtypes[options.dtype],
        max_shard_bytes=None if options.max_shard_mib is None else options.max_shard_mib << 20,
    )
    print(f"wrote {options.out}: LoRA of rank {config.r} on {len(config.targets)} modules")


def analyze(options: Namespace) -> None:
    from minift.analysis.picture import table, write_analysis
    from minift.analysis.spectrum import Intruders, analyze_weight, find_intruders
    from minift.analysis.weights import IntruderScaling, adapted_weights, changed_weights
    from minift.checkpoint.adapters import CONFIG_FILE, base_model_of

    if (options.scale_intruders is None) != (options.adapter_out is None):
        raise ValueError("--scale-intruders F and --adapter-out DIR belong together; give both, or none")
    tuned, model, quant = Path(options.tuned), options.model, _quant(options)
    is_run = (tuned / "config.yaml").is_file()
    if is_run:
        from minift.config import RunConfig

        config = RunConfig.from_recipe(tuned / "config.yaml")
        own_base, quant = tuned / "export" / "base", config.quant
        model = model or (own_base if own_base.is_dir() else config.model.path)
        tuned = tuned / "export" / ("model" if config.adapter is None else "adapter")
    is_adapter = (tuned / CONFIG_FILE).is_file()
    if model is None and is_adapter:
        model = base_model_of(tuned)
    if model is None:
        raise ValueError(f"what was {tuned} made from? it does not say; give the base with --model DIR")
    out, factor = options.adapter_out, options.scale_intruders
    scaling = None if out is None else IntruderScaling(tuned, out, factor)
    weights = adapted_weights(model, tuned, quant) if is_adapter else changed_weights(model, tuned)
    intruders: dict[str, Intruders] = {}
    analyses = []
    for name, before, after in weights:
        found = find_intruders(before, after, options.top, options.threshold)
        analyses.append(analyze_weight(name, before, after, found.found))
        if scaling is not None:
            intruders[name] = found
        print(f"\r{len(analyses)} weights", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(table(analyses))
    for path in write_analysis(Path(options.out or (options.tuned if is_run else "analysis")), analyses):
        print(f"wrote {path}")
    if scaling is not None:
        print(f"wrote {out}: {sum(scaling.write(intruders).values())} intruders times {factor:g}")


def plot(options: Namespace) -> None:
    from minift.curves import draw_runs
    from minift.style import DARK, LIGHT

    default = Path(options.runs[0]) / "loss.png" if len(options.runs) == 1 else Path("runs.png")
    print(draw_runs(options.runs, Path(options.out) if options.out else default, DARK if options.dark else LIGHT))


def timeline(options: Namespace) -> None:
    from minift.style import DARK, LIGHT
    from minift.timeline import redraw_timeline

    print(redraw_timeline(Path(options.run), DARK if options.dark else LIGHT))


def generate(options: Namespace) -> None:
    from minift.inference import answer, answer_each

    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    sampling = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
    }

    def go(assistant: Assistant, world: World) -> None:
        if options.each:
            adapters = [None, *assistant.residents]
            answers = answer_each(assistant, [prompt] * len(adapters), adapters, **sampling)
            text = "\n".join(f"[{name or 'no adapter'}] {said}" for name, said in zip(adapters, answers, strict=True))
        else:
            text = answer(assistant, prompt, **sampling)
        if world.is_main:
            print(text)

    _with_assistant(options, go)


def grade_calls(options: Namespace) -> None:
    from minift.inference import grade_calls

    def go(assistant: Assistant, world: World) -> None:
        def show(done: int, total: int) -> None:
            if world.is_main:
                print(f"rank 0 answered {done} of its {total}", file=sys.stderr)

        _show_result(options, grade_calls(assistant, Path(options.data), world, show), world)

    _with_assistant(options, go)


def measure_loss(options: Namespace) -> None:
    from minift.data.config import DataConfig
    from minift.inference import measure_loss

    longest = options.max_length_tokens
    config = DataConfig(train=(options.data,), max_length_tokens=longest, template=options.template)
    _with_assistant(options, lambda assistant, world: _show_result(
        options, measure_loss(assistant, config, longest, world), world
    ))  # fmt: skip


def _read_recipe(options: Namespace) -> RunConfig:
    read_yaml(options.recipe)  # a missing or broken file is told before torch is imported

    from minift.config import RunConfig

    return RunConfig.from_recipe(options.recipe, options.overrides)


def _quant(options: Namespace) -> QuantConfig | None:
    """How --nf4, --icq and the settings beside them say that the base is held; None: as it is stored."""
    settings = _nf4_settings(options)
    if options.nf4 or options.icq:
        return replace(settings, icq=options.icq)
    if settings != type(settings)():
        raise ValueError("--block-size, --no-double-quant and --skip say how --nf4 or --icq holds the weights; add one")
    return None


def _nf4_settings(options: Namespace) -> QuantConfig:
    from minift.quant.linear import QuantConfig

    return QuantConfig(
        block_size=options.block_size, double_quant=not options.no_double_quant, skip=tuple(options.skip)
    )


def _with_assistant(options: Namespace, go: Callable[[Assistant, World], None]) -> None:
    """Call `go` with what --model, --adapter, --nf4, --template and --device name, in torchrun's process group or
    alone."""
    from minift.dist.process import init_world, shutdown
    from minift.inference import load_assistant

    world = init_world(options.device)
    try:
        assistant = load_assistant(
            options.model, options.adapter or (), template=options.template, quant=_quant(options), device=world.device
        )
        go(assistant, world)
    finally:
        shutdown()


def _show_result(options: Namespace, result: dict[str, Any], world: World) -> None:
    """The scores as one line of JSON; with --out, everything that was measured into a file."""
    if not world.is_main:
        return
    if options.out:
        full = {"model": options.model, "adapter": options.adapter, "data": options.data, **result}
        Path(options.out).write_text(json.dumps(full, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "results"}))
