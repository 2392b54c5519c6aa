"""The training step, and the loop around it.

One loop for every objective: an objective is a function (model, batch) -> sum of losses, PPO's rollouts are a source
of batches. Periodic work (validation, checkpoints) stands outside of the step, between rulers. Everything that is
logged is reduced over all ranks.

Not here: how the model is put together (`build`), what a batch is (`data`), where parameters live (`fsdp`).
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from minift.build import BuiltModel, ModelSource, base_fingerprint, build_model
from minift.checkpoint.export import Exported, export_run
from minift.checkpoint.initial import InitialAdapter
from minift.checkpoint.manifest import Standing, list_checkpoints
from minift.checkpoint.saver import Saver
from minift.checkpoint.sharded import load_newest
from minift.data.batch import Batch
from minift.data.config import DataConfig
from minift.data.documents import Documents
from minift.data.loader import LoaderState, StepLoader, eval_batches
from minift.data.prepare import choose_template, prepare
from minift.data.tokenizer import Tokenizer
from minift.dist.collectives import barrier, gather_objects, max_over_ranks, sum_over_ranks
from minift.dist.process import World, init_world, launched_rank, shutdown
from minift.dist.seeds import seed_everything
from minift.dist.signals import StopRequest, stop_requests
from minift.eval.loss import mean_loss
from minift.fsdp import ShardPolicy
from minift.loop import TrainConfig
from minift.metrics import JsonlWriter, peak_device_bytes
from minift.objectives.sft import SupervisedTokens
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.loss_scaler import LossScaler
from minift.optim.schedule import Schedule
from minift.peft.adapter import AdapterConfig
from minift.peft.manage import is_mergeable
from minift.planner.check import PlanCheck
from minift.precision import Precision
from minift.progress import Progress
from minift.quant.linear import QuantConfig
from minift.recompute import RecomputeConfig
from minift.report import RunFacts, write_report
from minift.run_lock import run_lock
from minift.start.prepare import needs_gradients, needs_start, prepare_start
from minift.step import NonFiniteError, StepResult, train_step
from minift.timeline import write_timeline
from minift.trace import Recorder


class Settings(Protocol):
    """What `train` reads of a run's configuration (`config.RunConfig` has it all)."""

    run_dir: str
    model: ModelSource
    data: DataConfig
    objective: str
    adapter: AdapterConfig | None
    quant: QuantConfig | None
    train: tuple[str, ...]
    freeze: tuple[str, ...]
    optim: OptimConfig
    precision: Precision
    fsdp: ShardPolicy
    recompute: RecomputeConfig
    loop: TrainConfig
    device: str

    def changes(self) -> list[str]: ...

    def save(self) -> None: ...


# ---------------------------------------------------------------------------------------------------------- the loop


def train(config: Settings) -> int:
    """Run (or continue) what `config` describes and leave the run folder complete. Returns the exit status: 0 when done
    or stopped by SIGTERM with everything saved, 130 when stopped by Ctrl-C."""
    with run_lock(Path(config.run_dir)) if launched_rank() == 0 else nullcontext():  # the others are not met then
        world = init_world(config.device)
        try:
            with stop_requests() as stop:
                Run(config, world, stop).go()
            return 130 if stop.signal == signal.SIGINT else 0
        finally:
            shutdown()


class Run:
    """One process's part of a run: assemble, resume, loop, export."""

    def __init__(self, config: Settings, world: World, stop: StopRequest) -> None:
        self.config, self.world, self.stop = config, world, stop
        self.run_dir = Path(config.run_dir)
        self.seconds: dict[str, float] = {}
        self.recorder = Recorder(world.rank, world.device)
        self.adapter = None if config.adapter is None else config.adapter.for_base(config.model.path)
        self.changes: list[str] = []  # since the run was last here; `check_files` has seen them
        if world.is_main:
            self.changes = config.changes()
            config.save()

        with self.phase("data"):
            self.training, self.validation = self.documents()
        self.objective = SupervisedTokens()
        self.loader = self.make_loader()
        initial = self.prepare_start() if needs_start(self.adapter) else None
        self.initial = initial if initial is not None and initial.has_factors else None
        with self.phase("load model"):
            seed_everything(config.loop.seed, world.rank)
            self.built: BuiltModel = build_model(
                config.model,
                self.adapter,
                quant=config.quant,
                train=config.train,
                freeze=config.freeze,
                precision=config.precision,
                recompute=config.recompute,
                policy=config.fsdp,
                recorder=self.recorder,
                world=world,
                seed=config.loop.seed,
                initial=self.initial,
            )
        config.optim.check_names(self.built.trainable)
        self.optimizer = AdamW(self.built.engine.trainable_shards(), config.optim)
        self.scaler = LossScaler() if config.precision.needs_loss_scaling else None
        self.total_steps = config.loop.total_steps(self.loader.steps_per_epoch)
        if config.loop.timeline_step > self.total_steps:
            raise ValueError(
                f"loop.timeline_step is {config.loop.timeline_step}; valid: 0 (none) to {self.total_steps}, the last "
                "optimizer step of this run"
            )
        self.schedule = Schedule.from_config(config.optim, self.total_steps)
        self.plan_check = PlanCheck(replace(config, adapter=self.adapter), self.built, self.optimizer)
        self.is_checked = False
        self.step = 0
        self.saved_step = 0
        self.base = base_fingerprint(config.model.path)
        self.notes: tuple[str, ...] = ()
        self.resume()
        self.saver = Saver(
            self.run_dir / "checkpoints",
            self.optimizer,
            world,
            replica_world=self.built.engine.replica_world,
            keep_last=config.loop.keep_checkpoints,
            staging_bytes=config.loop.checkpoint_staging_mib << 20,
            on_saved=lambda folder: self.progress.say(f"checkpoint {folder}"),
        )

    def documents(self) -> tuple[Documents, Documents | None]:
        """Encoded training and validation documents, from the run folder's cache if they are there."""
        data, folder, objective = self.config.data, self.run_dir / "data", self.config.objective
        tokenizer = Tokenizer.from_folder(self.config.model.path)
        template = choose_template(data, tokenizer)
        training = prepare(data, tokenizer, template, folder, "train", objective)
        validation = None
        if data.validation or data.validation_share:
            validation = prepare(data, tokenizer, template, folder, "validation", objective)
        return training, validation

    def make_loader(self) -> StepLoader:
        """Of the training documents, at the beginning."""
        config = self.config
        return StepLoader(
            self.training,
            examples_per_step=config.loop.examples_per_step,
            microbatch_tokens=config.loop.microbatch_tokens,
            rank=self.world.rank,
            world_size=self.world.size,
            seed=config.data.seed,
            shuffle=config.data.shuffle,
        )

    def prepare_start(self) -> InitialAdapter:
        """What the adapter's settings leave to the base: found out before the first step, read again after it. The
        adapter's settings are complete then."""
        folder, config = self.run_dir / "start", self.config
        with self.phase("prepare adapter"):
            if list_checkpoints(self.run_dir / "checkpoints"):
                initial = InitialAdapter(folder, self.adapter)
            else:
                num_steps = self.adapter.gradient_steps if needs_gradients(self.adapter) else 0
                steps = [batches for batches, _ in itertools.islice(self.make_loader(), num_steps)]
                initial = prepare_start(
                    folder,
                    self.adapter,
                    steps,
                    source=config.model,
                    quant=config.quant,
                    objective=self.objective,
                    precision=config.precision,
                    recompute=config.recompute,
                    world=self.world,
                    seed=config.loop.seed,
                )
        self.adapter = initial.config
        return initial

    def resume(self) -> None:
        """Continue from the newest good checkpoint of this run folder, if there is one."""
        with self.phase("resume"):
            loaded = load_newest(self.run_dir / "checkpoints", self.optimizer, self.world)
        if loaded is None:
            return
        if loaded.standing.base != self.base:
            raise ValueError(
                f"{loaded.folder} was trained on another base model than {self.config.model.path} is now "
                f"(its files differ); give another --run_dir"
            )
        self.step = self.saved_step = loaded.standing.step
        self.loader.load_state(LoaderState(**loaded.standing.loader))
        if self.scaler is not None and "loss_scaler" in loaded.standing.extra:
            self.scaler.load_state_dict(loaded.standing.extra["loss_scaler"])
        self.built.engine.weights_changed()
        self.notes = tuple(f"{damage}; going back to {loaded.folder}" for damage in loaded.passed_over)

    def go(self) -> None:
        """The loop. Steps are counted from 0; `self.step` is the number of finished ones."""
        config, world = self.config, self.world
        with self.saver, Progress(self.total_steps, self.step, enabled=world.is_main) as self.progress:
            for note in self.notes:
                self.progress.say(note)
            if self.step == self.total_steps and self.is_finished():
                self.progress.say(f"finished already; see {self.run_dir / 'report.md'}")
                return
            if world.is_main:
                (self.run_dir / "report.md").unlink(missing_ok=True)  # of a state that is left now
            # -1: a run that died before its first checkpoint begins anew, validation before the first step included
            metrics = JsonlWriter(self.run_dir / "metrics.jsonl", self.step or -1) if world.is_main else None
            if self.step:
                self.progress.say(f"continuing after step {self.step}")
                for change in self.changes:
                    self.progress.say(change.replace(" there", " before"))
            if self.step == 0:
                self.validate(metrics)
            for microbatches, loader_state in self.loader:
                if self.step >= self.total_steps or self.stop_requested():
                    break

                # -------------------------------------------------------------------- one optimizer step
                if self.step + 1 == config.loop.timeline_step:
                    self.recorder.start()
                started, sent_bytes = time.perf_counter(), self.built.engine.sent_bytes()
                lr_scale = self.schedule(self.step)
                with self.checked(microbatches):
                    result = self.guarded_step(microbatches, lr_scale)
                seconds = time.perf_counter() - started
                self.seconds["train"] = self.seconds.get("train", 0.0) + seconds
                self.step += 1
                # ------------------------------------------------------------------------------------ log

                if self.step == 1:
                    self.check_gradients_arrived()
                if self.step == config.loop.timeline_step:
                    self.draw_timeline()
                memory = int(max_over_ranks(peak_device_bytes(world.device), world))
                record = {
                    "step": self.step,
                    "epoch": self.step / self.loader.steps_per_epoch,
                    "loss": result.loss,
                    "lr": config.optim.lr * lr_scale,
                    "grad_norm": result.grad_norm,
                    "tokens": result.tokens,
                    "targets": int(result.weight),
                    "tokens_per_second": result.tokens / seconds,
                    "step_seconds": seconds,
                    "memory_bytes": memory,
                    "sent_bytes": self.built.engine.sent_bytes() - sent_bytes,
                }
                if self.scaler is not None:
                    record |= {"loss_scale": self.scaler.scale, "was_skipped": result.was_skipped}
                if metrics is not None:
                    metrics.write(record)
                self.progress.step(record)

                # -------------------------------------------------------------------------- once in a while
                last = self.step == self.total_steps
                if last or _is_due(self.step, config.loop.validate_every_steps):
                    self.validate(metrics)
                self.loader_state = loader_state
                if last or _is_due(self.step, config.loop.checkpoint_every_steps):
                    self.checkpoint()
            else:
                raise AssertionError("the loader is endless")
            self.finish()

    def checked(self, microbatches: list[Batch]) -> AbstractContextManager[None]:
        """Around a step: one is set against its plan, once the order of the blocks has been learnt, then some timed."""
        if self.is_checked:
            return self.plan_check.timed(microbatches)
        is_first = self.seconds.get("train", 0.0) == 0
        if is_first and self.step + 1 < self.total_steps:
            return nullcontext()
        self.is_checked = True
        return self.plan_check.step(self.step + 1, microbatches)

    def guarded_step(self, microbatches: list[Batch], lr_scale: float) -> StepResult:
        """`train_step`; a non-finite loss or gradient leaves the batch on disk and stops the run."""
        try:
            return train_step(
                self.built.module,
                self.built.engine,
                self.optimizer,
                self.objective,
                microbatches,
                lr_scale=lr_scale,
                max_grad_norm=self.config.optim.max_grad_norm,
                scaler=self.scaler,
                recorder=self.recorder,
            )
        except NonFiniteError as error:
            dumped, also = self.dump(microbatches), ""
            try:
                self.saver.wait()
            except OSError as lost:  # the same full disk, perhaps: it must not hide what happened here
                also = f". {lost}"
            kept = list_checkpoints(self.run_dir / "checkpoints")
            where = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been saved yet"
            raise NonFiniteError(
                f"step {self.step + 1}: {error}. {self.what_was_updated}; {dumped}; {where}{also}"
            ) from None

    def dump(self, microbatches: list[Batch]) -> str:
        """Leave this rank's part of a step on disk; says where, or why not."""
        path = self.run_dir / "nonfinite" / f"step-{self.step + 1:08d}-rank-{self.world.rank:05d}.safetensors"
        tensors = {
            f"{index}/{name}": tensor.contiguous()
            for index, batch in enumerate(microbatches)
            for name, tensor in asdict(batch).items()
            if isinstance(tensor, torch.Tensor)
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path)
        except (OSError, SafetensorError) as error:
            return f"this rank's batch could not be written ({error})"
        return f"this rank's batch is in {path}"

    def draw_timeline(self) -> None:
        """Leave what was recorded of the step just taken in timeline.png and timeline.json."""
        with self.phase("timeline"):
            traces = gather_objects(self.recorder.stop(), self.world)
            if self.world.is_main:
                picture = write_timeline(traces, self.run_dir, f"{self.run_dir.resolve().name}, step {self.step}")
                self.progress.say(f"timeline {picture}")

    @property
    def what_was_updated(self) -> str:
        if self.config.fsdp.step_in_backward:
            return "The weights were updated in this backward and are spoiled (fsdp.step_in_backward)"
        return "Nothing was updated"

    def check_gradients_arrived(self) -> None:
        """A trainable parameter that backward does not reach would silently stay as it was."""
        missing = self.built.engine.parameters_without_grad()
        if missing:
            raise RuntimeError(
                f"{len(missing)} trainable parameters got no gradient in the first step: {', '.join(missing[:4])} ..."
            )

    def validate(self, metrics: JsonlWriter | None) -> None:
        """Mean loss over the validation documents, if there are any."""
        if self.validation is None:
            return
        with self.phase("validate"):
            batches = eval_batches(
                self.validation, self.config.loop.microbatch_tokens, self.world.rank, self.world.size
            )
            loss, targets = mean_loss(self.built.module, self.objective, batches, self.world.device, self.sum)
        if metrics is not None:
            metrics.write({"step": self.step, "validation_loss": loss, "validation_targets": targets})
        self.progress.say(f"validation loss {loss:.4f} after step {self.step}")

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return sum_over_ranks(value, self.world)

    def checkpoint(self) -> None:
        """Begin to save; training goes on meanwhile."""
        with self.phase("checkpoint"):
            extra = {} if self.scaler is None else {"loss_scaler": self.scaler.state_dict()}
            self.saver.start(Standing(self.step, asdict(self.loader_state), self.base, extra))
        self.saved_step = self.step

    def is_finished(self) -> bool:
        """Whether the export is there and the report, which is written last; the same answer on every rank."""
        has_export = any((self.run_dir / "export" / kind).is_dir() for kind in ("adapter", "model"))
        return bool(max_over_ranks(float(has_export and (self.run_dir / "report.md").is_file()), self.world))

    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop; all ranks must leave the loop at the same step. OSError, likewise, if a
        checkpoint could not be written."""
        flags = torch.tensor([float(self.stop.signal is not None), float(self.saver.failed)])
        stop, failed = max_over_ranks(flags, self.world).tolist()
        if failed:
            self.saver.wait()
        return bool(stop)

    def finish(self) -> None:
        """Save what is not saved yet, export, report."""
        stopped = self.step < self.total_steps
        if stopped and self.step > self.saved_step:
            self.checkpoint()
        exported = Exported()
        if not stopped:
            with self.phase("export"):
                exported = export_run(
                    self.built.engine, self.built.config, self.adapter, self.config.model.path,
                    self.run_dir / "export", self.initial, self.config.quant,
                )  # fmt: skip
        with self.phase("checkpoint"):
            self.saver.wait()
        if self.world.is_main and self.step:
            facts = RunFacts(
                status=f"stopped after step {self.step} of {self.total_steps}" if stopped else "finished",
                objective=self.config.objective,
                method=str(self.config.adapter) if self.config.adapter else "full fine-tuning",
                earlier_adapter=self.config.model.adapter,
                model_path=self.config.model.path,
                model_family=self.built.config.family,
                num_parameters=self.built.num_parameters,
                num_trainable_parameters=self.built.num_trainable_parameters,
                data={
                    label: documents.report.lines()
                    for label, documents in (("training", self.training), ("validation", self.validation))
                    if documents is not None and documents.report is not None
                },
                world_size=self.world.size,
                device=str(self.world.device),
                seconds_by_phase=self.seconds,
                adapter_folder=exported.adapter,
                adapter_base=exported.base,
                adapter_quant=exported.base_quant,
                adapter_is_mergeable=is_mergeable(self.built.module),
                model_folder=exported.model,
                template=self.config.data.template,
                plan=self.plan_check.result(),
            )
            write_report(self.run_dir, facts)
            if stopped:
                self.progress.say(f"stopped after step {self.step} of {self.total_steps}; the same command goes on")
            self.progress.say(f"report: {self.run_dir / 'report.md'}")
        barrier(self.world)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the wall seconds of a part of the run under `name`."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
