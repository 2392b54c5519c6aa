"""Takes training steps on a device that is not there, and prints what the gradient of the embedding needs there beside
that of its rows, as planned and as counted: JSON, {case: [planned bytes, measured bytes]}."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from minift.fsdp import ShardPolicy
from minift.grad_slot import GradSlot
from minift.model.config import ModelConfig
from minift.planner.catalog import MODELS
from minift.planner.describe import describe
from minift.planner.memory import plan_memory
from minift.planner.meter import TensorMeter
from minift.planner.shapes import Workload
from minift.planner.trial import TrialSetup
from minift.precision import Precision
from tests.pretended_cuda.device import print_found
from tests.pretended_cuda.training import training


@dataclass(frozen=True)
class Case:
    setup: TrialSetup
    model: str = "llama-3.2-1b"
    microbatches: int = 1


IN_BACKWARD = ShardPolicy(step_in_backward=True)  # so that gradients are in the dtype in which they are reduced
CASES = {
    "tied": Case(TrialSetup()),
    "tied, several microbatches": Case(TrialSetup(), microbatches=2),
    "not tied": Case(TrialSetup(), "llama-3.1-8b"),
    "fp16": Case(TrialSetup(precision=Precision(wire="float16"))),
    "fp32": Case(TrialSetup(precision=Precision(wire="float32"))),
    "gradients in bf16": Case(TrialSetup(precision=Precision(reduce="bfloat16"), fsdp=IN_BACKWARD)),
    "gradients in bf16, added up in fp32": Case(TrialSetup(precision=Precision(reduce="bfloat16"))),
}


def planned_and_measured(case: Case) -> tuple[int, int]:
    config = ModelConfig.from_hf(MODELS[case.model] | {"num_hidden_layers": 1})
    workload = Workload(tokens=256, document_tokens=256, microbatches=case.microbatches)
    plan = plan_memory(describe(config, case.setup, world_size=1, link="nccl", workload=workload))
    (planned,) = (moment.bytes["backward"] for moment in plan.moments if moment.name == "backward of embedding")
    measured = []
    add_repeated_rows = GradSlot.add_repeated_rows

    def metered(slot: GradSlot, rows_N: Tensor, values_ND: Tensor) -> None:
        with TensorMeter(torch.device("cuda", 0)) as meter:
            add_repeated_rows(slot, rows_N, values_ND)
        measured.append(meter.peak_bytes)

    with training(config, case.setup, workload) as run, mock.patch.object(GradSlot, "add_repeated_rows", metered):
        run.step()
    assert len(measured) == case.microbatches
    return planned, max(measured)


def main() -> None:
    print_found(CASES, lambda name: planned_and_measured(CASES[name]))


if __name__ == "__main__":
    main()
