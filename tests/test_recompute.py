"""Recomputation changes memory and time, and no bit of anything else. Oracle: the same step with policy none.

Every comparison is `torch.equal`: a rerun runs the same kernels on the same numbers, and gradients of one tensor are
added up in the same order. Memory is counted by watching every storage that an operation makes, and compared with the
closed form in the docstring of minift/recompute.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import minift.recompute
from minift.dist.process import World
from minift.fsdp import ShardPolicy, shard
from minift.model.attention import Packing
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.rope import rotary_tables
from minift.peft.freeze import set_trainable
from minift.peft.inject import inject
from minift.peft.lora import LoraConfig
from minift.precision import Precision
from minift.recompute import RecomputeConfig, apply_recompute
from minift.trace import Recorder
from tests.ranks import run_ranks

CPU = torch.device("cpu")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
POLICIES = ["full", "selective", "offload"]
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"head_dim": 6, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},  # normed q and k
    "mistral": {"head_dim": 6, "sliding_window": 3},
}


@dataclass(frozen=True)
class Case:
    """A tiny model, what of it is trained, and how."""

    policy: str = "none"
    every: int = 1
    family: str = "llama"
    tied: bool = False
    layers: int = 3
    dtype: torch.dtype = torch.float32
    lora: str | None = None  # pattern of the projections with an adapter; None: full fine-tuning ...
    frozen: str = ""  # ... of what this pattern does not find
    dropout: float = 0.3
    microbatches: int = 1
    backwards: int = 1  # over each graph
    seed: int = 0
    device: str = "cpu"


def build(case: Case, recorder: Recorder | None = None) -> CausalLM:
    model = CausalLM(ModelConfig.from_hf({
        "model_type": case.family, "vocab_size": 19, "hidden_size": 16, "intermediate_size": 20,
        "num_hidden_layers": case.layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "tie_word_embeddings": case.tied, **FAMILIES[case.family],
    }))  # fmt: skip
    if case.lora is None:
        set_trainable(model, freeze=(case.frozen,) if case.frozen else ())
    else:
        inject(model, LoraConfig(targets=case.lora, r=3, dropout=case.dropout))
    generator = torch.Generator().manual_seed(case.seed)
    for parameter in model.parameters():  # lora_B too: with zeros, every gradient of lora_A would be zero
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.2).to(case.device, case.dtype)
    names = [name for name, _ in model.named_parameters()]
    recorder = recorder or Recorder(0, torch.device(case.device))
    apply_recompute(model, model.shard_units(), RecomputeConfig(case.policy, case.every), recorder)
    assert [name for name, _ in model.named_parameters()] == names == list(dict(model.named_parameters()))
    assert set(model.state_dict()) - {"lm_head.weight"} == set(names) - {"lm_head.weight"}
    return model


def loss(model: CausalLM, case: Case, index: int) -> Tensor:
    """Of two packed documents, a function of the case and `index`."""
    generator = torch.Generator().manual_seed(100 * case.seed + index)
    lengths = [2 + (case.seed + index) % 5, 5]
    tokens_T = torch.randint(19, (sum(lengths),), generator=generator).to(case.device)
    positions_T = torch.cat([torch.arange(length) for length in lengths]).to(case.device)
    bounds = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=case.device)

    def head(hidden_TD: Tensor, lm_head: nn.Module) -> Tensor:
        return lm_head(hidden_TD).float().logsumexp(-1).sum()

    return model(tokens_T, positions_T, bounds, max(lengths), head=head)


def step(model: CausalLM, case: Case) -> dict[str, Tensor]:
    """Losses, gradients, and the state in which the step leaves the generator."""
    torch.manual_seed(case.seed)
    result = {}
    for index in range(case.microbatches):
        value = loss(model, case, index)
        for backward in range(case.backwards):
            value.backward(retain_graph=backward + 1 < case.backwards)
        result[f"loss {index}"] = value.detach()
    result |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return result | {"generator": torch.get_rng_state(), "next": torch.rand(3, device=case.device)}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


# Bits #

cases = st.builds(
    Case,
    policy=st.sampled_from(POLICIES),
    every=st.integers(1, 4),
    family=st.sampled_from(list(FAMILIES)),
    tied=st.booleans(),
    layers=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    lora=st.sampled_from([None, r".*_proj", r".*layers\.0.*(q_proj|down_proj)", r".*(v_proj|o_proj)", ".*gate_proj"]),
    frozen=st.sampled_from(["", "embed_tokens", "norm", "layers", r"layers\.0", r"layers\.[02]", "mlp", "(embed|q)_"]),
    dropout=st.sampled_from([0.0, 0.3]),
    microbatches=st.integers(1, 2),
    backwards=st.integers(1, 2),
    seed=st.integers(0, 9),
    device=st.sampled_from(DEVICES),
)


@given(cases)
def test_no_bit_of_a_step_changes(case: Case) -> None:
    assert_equal(step(build(case), case), step(build(replace(case, policy="none")), case))


def step_on_rank(world: World, case: Case) -> dict[str, Tensor]:
    model = build(case)
    wire = str(case.dtype).removeprefix("torch.")
    engine = shard(model, model.shard_units(), world, ShardPolicy(), Precision(wire=wire, reduce=wire))
    started = step(model, replace(case, seed=case.seed + world.rank))
    assert engine.parameters_without_grad() == []
    grads = {f"{index} {s.name}": s.grad for index, s in enumerate(engine.trainable_shards())}
    return {name: value.clone() for name, value in (started | grads).items()}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("lora", [None, r".*_proj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_bit_of_a_sharded_step_changes(world_size: int, policy: str, lora: str | None, dtype: torch.dtype) -> None:
    case = Case(policy, family="qwen3", lora=lora, dtype=dtype, microbatches=2)
    expected = run_ranks(world_size, step_on_rank, replace(case, policy="none"))
    for ours, theirs in zip(run_ranks(world_size, step_on_rank, case), expected, strict=True):
        assert_equal(ours, theirs)


class KeepsParameterAndOutput(nn.Module):
    """What minift's own operations never do: autograd keeps the Parameter, and the exponential keeps its result."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 0.25]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x * self.weight)


@pytest.mark.parametrize("policy", POLICIES)
def test_backward_reads_what_parameters_hold_then(policy: str) -> None:
    """As when FSDP frees and gathers again: other memory with the same numbers, and garbage where they were."""
    case = Case(family="qwen3", lora=r".*_proj")

    def gradients(case: Case) -> dict[str, Tensor]:
        model, other = build(case), nn.Sequential(KeepsParameterAndOutput(), KeepsParameterAndOutput())
        apply_recompute(other, list(other), RecomputeConfig(case.policy), Recorder(0, CPU))
        torch.manual_seed(0)
        value = loss(model, case, 0) + other(torch.ones(2)).sum()
        parameters = dict(model.model.layers.named_parameters()) | dict(other.named_parameters())
        for parameter in parameters.values():
            old, parameter.data = parameter.data, parameter.data.clone()
            old.fill_(torch.nan)
        value.backward()
        return {name: parameter.grad for name, parameter in parameters.items() if parameter.requires_grad}

    assert_equal(gradients(replace(case, policy=policy)), gradients(case))


# Memory #


def storages_of(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Storages(TorchDispatchMode):
    """Every storage that an operation makes, and how often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        read = {storage._cdata for storage in storages_of((args, kwargs))}
        for storage in storages_of(result):
            if storage._cdata not in read:  # else a view, or the result of an operation in place
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes_alive(self) -> int:
        return sum(num_bytes for storage, num_bytes in self.made.values() if not storage.expired())

    def matrix_products(self) -> int:
        """Those of projections, and attention's, which come two or five at a time."""
        return sum(self.calls[name] for name in ("mm", "addmm", "addmm_", "attention", "attention_backward"))


def kept_by_a_block(case: Case, tokens: int) -> tuple[int, int, int]:
    """Bytes that the last block's forward leaves behind: before a backward, after one that keeps the graph, after one
    that does not. In between, results of recipes may exist, but none may stay."""
    model = build(case)
    config = model.config
    positions_T = torch.arange(tokens)
    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    packing = Packing(bounds, tokens, *rotary_tables(config.rope, config.head_dim, positions_T, bounds))
    source = torch.randn(tokens, config.hidden_size, dtype=case.dtype, requires_grad=True)
    with Storages() as storages:
        out = model.model.layers[-1](source * 1, packing)
        kept_bytes = [storages.bytes_alive() - out.nbytes]
        for retain_graph in (True, False):
            out.backward(torch.ones_like(out), retain_graph=retain_graph)
            model.zero_grad()
            source.grad = None
            kept_bytes.append(storages.bytes_alive() - out.nbytes)
    return tuple(kept_bytes)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("policy", ["none", *POLICIES])
@pytest.mark.parametrize("lora", [None, r".*_proj"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bytes_kept_for_backward(family: str, policy: str, lora: str | None, dropout: float, dtype: torch.dtype):
    T, D, F, heads, kv_heads, r, b = 7, 16, 20, 4, 2, 3, dtype.itemsize
    Q, K = (count * FAMILIES[family].get("head_dim", D // heads) for count in (heads, kv_heads))
    if policy in ("full", "offload"):  # on a CPU, host memory is the memory there is
        expected = b * T * D
    elif policy == "selective":
        expected = b * T * (2 * D + 2 * Q + 2 * K + 2 * F) + 4 * T * (heads + 2)
    else:
        expected = b * T * (4 * D + 2 * Q + 2 * K + 3 * F) + 4 * T * (heads + 2)
    if policy in ("none", "selective"):
        if lora:
            expected += 7 * b * T * r
        if family == "qwen3":
            expected += 4 * T * (heads + kv_heads) + b * T * (Q + K) * (policy == "none")
    case = Case(policy, family=family, lora=lora, dropout=dropout, dtype=dtype)
    product = b * T * F if policy == "none" else 0  # given away by the first backward, made again by others
    assert kept_by_a_block(case, T) == (expected, expected - product, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_graph_that_is_dropped_leaves_nothing(policy: str) -> None:
    case = Case(policy, lora=r".*_proj")
    model, other = build(case), nn.Sequential(KeepsParameterAndOutput())
    apply_recompute(other, list(other), RecomputeConfig(policy), Recorder(0, CPU))
    with Storages() as storages:
        results = [loss(model, case, 0), other(torch.ones(2))]
        del results
    assert storages.bytes_alive() == 0, "a node holds itself"


@pytest.mark.parametrize("policy", POLICIES)
def test_evaluation_keeps_nothing(policy: str) -> None:
    case = Case(policy)
    model = build(case)
    with Storages() as storages, torch.no_grad():
        value = loss(model, case, 0)
        assert storages.bytes_alive() == value.nbytes and value.grad_fn is None


class FakeTransfers(minift.recompute._Transfers):
    """Host and device as two memories: what arrives on the device is a copy, and is watched."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.log: list[str] = []
        self.on_device: list[StorageWeakRef] = []
        self.most_on_device = 0

    def to_host(self, x: Tensor) -> Tensor:
        self.log.append(f"out {float(x.flatten()[0])}")
        return x.clone()

    def to_device(self, x_host: Tensor) -> Tensor:
        self.log.append(f"in {float(x_host.flatten()[0])}")
        x = x_host.clone()
        self.on_device = [storage for storage in self.on_device if not storage.expired()]
        self.on_device.append(StorageWeakRef(x.untyped_storage()))
        self.most_on_device = max(self.most_on_device, len(self.on_device))
        return x


class Add(nn.Module):
    """x + number; keeps nothing, logs when it runs."""

    def __init__(self, number: float, log: list[str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(number))
        self.log = log

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(f"run {x[0].item()}")
        return x + self.weight


def test_offloaded_inputs_come_back_one_unit_ahead(monkeypatch) -> None:
    monkeypatch.setattr(minift.recompute, "_Transfers", FakeTransfers)
    log: list[str] = []
    model = nn.Sequential(*(Add(1.0, log) for _ in range(4)))
    apply_recompute(model, list(model), RecomputeConfig("offload"), Recorder(0, CPU))
    transfers = model[0].forward._transfers
    transfers.log = log
    for _ in range(2):
        log.clear()
        out = model(torch.zeros(3))
        assert log == ["out 0.0", "run 0.0", "out 1.0", "run 1.0", "out 2.0", "run 2.0", "out 3.0", "run 3.0"]
        log.clear()
        out.sum().backward()
        assert log == ["in 3.0", "in 2.0", "run 3.0", "in 1.0", "run 2.0", "in 0.0", "run 1.0", "run 0.0"]
        log.clear()
        with torch.no_grad():
            model(torch.zeros(3))
        assert log == ["run 0.0", "run 1.0", "run 2.0", "run 3.0"]
    assert transfers.most_on_device == 2
    assert all(storage.expired() for storage in transfers.on_device)


# Work #


@pytest.mark.parametrize(
    ("lora", "frozen"), [(None, ""), (None, "embed_tokens"), (None, r"embed_tokens|layers\.0"), (r".*_proj", "")]
)
def test_what_runs_twice(lora: str | None, frozen: str) -> None:
    """In particular: no product for a gradient that nobody asked for (that of embeddings that are frozen, by themselves
    or by LoRA), and nothing of a unit that backward does not come to."""

    def count(case: Case) -> Storages:
        model = build(case)
        with Storages() as storages:
            step(model, case)
        return storages

    case = Case(family="qwen3", lora=lora, frozen=frozen, layers=3)
    plain, model = count(case), build(case)
    with Storages() as forward, torch.no_grad():
        loss(model, case, 0)
    in_blocks = forward.matrix_products() - 1  # the head's
    assert in_blocks % 3 == 0 and in_blocks >= 3 * 8
    for every in (1, 2, 3):
        treated = len(range(0, 3, every)) - (r"layers\.0" in frozen)
        for policy in ("full", "offload"):
            again = count(replace(case, policy=policy, every=every)).matrix_products() - plain.matrix_products()
            last = 2 if lora else 1  # the result's, and its update's, is not read
            assert again == (in_blocks // 3 - last) * treated
        selective = count(replace(case, policy="selective", every=every))
        assert selective.matrix_products() == plain.matrix_products()
        more = {op: selective.calls[op] - plain.calls[op] for op in ("rms_norm", "rope", "swiglu")}
        # each once, however many projections and adapters read the result; silu · up by what gives its gradients
        assert more == {"rms_norm": 4 * treated, "rope": 2 * treated, "swiglu": 0}


def test_reruns_are_recorded_under_the_name_of_the_unit() -> None:
    for policy, per_unit in (("full", 1), ("offload", 1), ("selective", 2)):  # norms are told apart
        case = Case(policy, every=2)
        recorder = Recorder(0, CPU)
        model = build(case, recorder)
        recorder.start()
        step(model, case)
        spans = [(span.lane, span.kind, span.name) for span in recorder.stop().spans]
        assert spans == [("compute", "recompute", f"model.layers.{layer}") for layer in (2, 0) for _ in range(per_unit)]


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_appear_unit_by_unit(policy: str) -> None:
    """Hooks on parameters run inside backward, the last unit's before the first's."""
    model, order = build(Case(policy)), []
    for name, parameter in model.model.layers.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name.split(".")[0]))
    step(model, Case(policy))
    assert order == sorted(order, reverse=True) and len(order) == len(list(model.model.layers.parameters()))


class FailsInBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        noise = torch.rand(2)
        if self.runs == 2:
            raise ArithmeticError("in the rerun")
        return x * self.weight * noise


@pytest.mark.parametrize("policy", ["full", "offload"])
def test_an_exception_in_the_rerun_leaves_the_generator_alone(policy: str) -> None:
    model = nn.Sequential(FailsInBackward())
    apply_recompute(model, list(model), RecomputeConfig(policy), Recorder(0, CPU))
    out = model(torch.ones(2)).sum()
    torch.rand(5)
    before = torch.get_rng_state()
    with pytest.raises(ArithmeticError, match="in the rerun"):
        out.backward()
    assert torch.equal(torch.get_rng_state(), before)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y


@pytest.mark.parametrize("policy", ["full", "offload"])
def test_a_gradient_that_would_be_lost_is_refused(policy: str) -> None:
    model = nn.Sequential(TwoInputs())
    apply_recompute(model, list(model), RecomputeConfig(policy), Recorder(0, CPU))
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    with pytest.raises(AssertionError, match="only x may need a gradient"):
        model[0](x, y)
    model[0](x, y=y.detach()).sum().backward()
    assert torch.equal(x.grad, torch.ones(2))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="recompute.policy is 'some'; valid: none, full, selective, offload"):
        RecomputeConfig("some")
    for every in (0, -1, 1.5):
        with pytest.raises(ValueError, match="recompute.every is .*; valid: an integer, 1 or more"):
            RecomputeConfig("full", every)
