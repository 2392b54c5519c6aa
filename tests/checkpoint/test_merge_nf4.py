"""Merging over NF4: what each target writes, by its definition in fp64, with bitsandbytes' own W and transformers.

The sum W + ΔW is made in fp32 by one product of rank r, so it is off by at most (r + 3) 2^-24 (|W| + |ΔW|), where |ΔW|
has absolute values inside; `Case.slack` is this. A dense target rounds it once to the dtype of the file.
"""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from minift.checkpoint import merge
from minift.checkpoint.adapters import load_adapter
from minift.checkpoint.merge import merge_adapter
from minift.checkpoint.quantize import quantize_folder
from minift.cli import main
from minift.model.weights import WeightReader
from minift.ops.nf4 import dequantize_nf4
from minift.ops.nf4_tables import CODEBOOK
from minift.peft.adapter import Adapter
from minift.peft.drift import MergeReport
from minift.quant.linear import NF4Linear, QuantConfig
from minift.quant.model import load_model
from minift.quant.weights import QuantWeights

TOKENS = torch.arange(13)[None] * 3
TARGETS = ["q_proj", "down_proj"]
RANK, ALPHA = 3, 6


@dataclass(frozen=True)
class Case:
    """A model, dense and in NF4, and an adapter; what each weight is, was, and should become."""

    folder: Path
    quant: QuantConfig

    def merge(self, out: str, base: str = "nf4", **options) -> MergeReport:
        return merge_adapter(self.folder / base, self.folder / "adapter", self.folder / out, **options)

    def original_names(self) -> list[str]:
        return WeightReader(self.folder / "dense").names()

    def original(self, name: str) -> Tensor:
        return WeightReader(self.folder / "dense").read(name)

    def trained(self, name: str) -> Tensor:
        """W in its dtype, quantized and back by bitsandbytes.

        As a vector: its AVX-512 kernel starts a block with every row of a matrix, also where a block spans two rows.
        """
        weight, quant = self.original(name), self.quant
        codes, state = bnb.quantize_4bit(
            weight.view(-1), blocksize=quant.block_size, quant_type="nf4", compress_statistics=quant.double_quant
        )
        return bnb.dequantize_4bit(codes, state).view(weight.shape)

    def update(self, name: str, absolute: bool = False) -> Tensor:
        """fp64; 0 for a weight without an adapter."""
        factors = load_file(self.folder / "adapter" / "adapter_model.safetensors")
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" not in factors:
            return torch.zeros(())
        A, B = (factors[f"{prefix}.lora_{factor}.weight"].double() for factor in "AB")
        return ALPHA / RANK * (B.abs() @ A.abs() if absolute else B @ A)

    def slack(self, name: str, weight: Tensor) -> Tensor:
        return (RANK + 3) * 2.0**-24 * (weight.double().abs() + self.update(name, absolute=True))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=[QuantConfig(), QuantConfig(block_size=32, double_quant=False)], ids=["double", "fp32 scales"])
def case(request, dtype: torch.dtype, tmp_path: Path) -> Case:
    write_models(tmp_path, dtype, request.param)
    return Case(tmp_path, request.param)


@pytest.fixture
def small_case(tmp_path: Path) -> Case:
    write_models(tmp_path, torch.bfloat16, QuantConfig())
    return Case(tmp_path, QuantConfig())


def write_models(folder: Path, dtype: torch.dtype, quant: QuantConfig) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(dtype)
    base.save_pretrained(folder / "dense")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False
    )
    peft.get_peft_model(base, settings).save_pretrained(folder / "adapter")
    quantize_folder(folder / "dense", folder / "nf4", quant)


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def is_quantized(name: str) -> bool:
    return "_proj" in name


def check_drifts(case: Case, report: MergeReport, written: QuantWeights) -> None:
    """Every number of the report, from the files, in fp64."""
    assert [drift.name for drift in report.drifts] == [n for n in written.names() if any(t in n for t in TARGETS)]
    sums = {"error": 0.0, "update": 0.0}
    for drift in report.drifts:
        W, update = case.trained(drift.name), case.update(drift.name)
        slack = case.slack(drift.name, W)
        error = (written.read(drift.name).double() - (W.double() + update)).abs()
        assert abs(drift.update_norm - update.norm()) <= slack.norm()
        assert abs(drift.error_norm - error.norm()) <= slack.norm()
        assert abs(drift.mean_error - error.mean()) <= slack.mean()
        assert abs(drift.max_error - error.max()) <= slack.max()
        sums["error"] += drift.error_norm**2
        sums["update"] += drift.update_norm**2
    assert report.lost_ratio == pytest.approx(math.sqrt(sums["error"] / sums["update"]), rel=1e-12)
    rows = report.table().splitlines()[1:]
    for projection in TARGETS:
        (worst,) = (drift for drift in report.worst() if projection in drift.name)
        assert worst.lost_ratio == max(drift.lost_ratio for drift in report.drifts if projection in drift.name)
        assert any(row.startswith(worst.name) and f"{worst.lost_ratio:.2%}" in row for row in rows)
    assert len(rows) == len(TARGETS)
    assert f"overall {report.lost_ratio:.2%}" in str(report)


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("target", ["dequantized", "original"])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_dense_targets(case: Case, dtype: torch.dtype, target: str, base: str, out_dtype: torch.dtype | None) -> None:
    """From a folder in NF4, and from a dense one that was quantized on the way into training."""
    options = {"quant": case.quant} if base == "dense" else {}
    if target == "original" and base == "nf4":
        options["original_folder"] = case.folder / "dense"
    report = case.merge("out", base, target=target, dtype=out_dtype, **options)
    written = stored_tensors(case.folder / "out")
    assert written.keys() == stored_tensors(case.folder / "dense").keys()
    for name, tensor in written.items():
        W = case.trained(name) if target == "dequantized" and is_quantized(name) else case.original(name)
        assert tensor.dtype == (out_dtype or dtype)
        if not any(target in name for target in TARGETS):
            assert torch.equal(tensor, W.to(tensor.dtype)), name
            continue
        exact = W.double() + case.update(name)
        bound = torch.finfo(tensor.dtype).eps / 2 * exact.abs() + case.slack(name, W)
        assert ((tensor.double() - exact).abs() <= bound).all(), name
    check_drifts(case, report, QuantWeights(case.folder / "out"))
    assert "quantization_config" not in (case.folder / "out" / "config.json").read_text()


def test_requantized(case: Case) -> None:
    """Codes are the nearest to the exact sum under its own scale; what has no adapter keeps its bytes."""
    report = case.merge("out", target="requantized")
    written, before = stored_tensors(case.folder / "out"), stored_tensors(case.folder / "nf4")
    assert written.keys() == before.keys()
    block = case.quant.block_size
    for name in WeightReader(case.folder / "dense").names():
        if not any(target in name for target in TARGETS):
            own = [other for other in before if other == name or other.startswith(f"{name}.")]
            assert own and all(torch.equal(written[other], before[other]) for other in own)
            continue
        W = case.trained(name)
        exact = (W.double() + case.update(name)).view(-1, block)
        codes = torch.stack((written[name] >> 4, written[name] & 15), dim=-1).view(-1, block)
        normalised = exact / exact.abs().amax(1, keepdim=True)
        distances = (CODEBOOK.double() - normalised[..., None]).abs()
        chosen = distances.gather(-1, codes[..., None].long()).squeeze(-1)
        # Off by the slack of both the sum and the scale, and a rounding each of scale, quotient and threshold.
        slack = case.slack(name, W).view(-1, block).amax(1, keepdim=True) / exact.abs().amax(1, keepdim=True)
        assert (chosen <= distances.amin(-1) + 4 * slack + 2.0**-22).all()
    check_drifts(case, report, QuantWeights(case.folder / "out"))
    again = case.merge("again", "dense", target="requantized", quant=case.quant)
    assert again == report
    assert all(torch.equal(tensor, written[name]) for name, tensor in stored_tensors(case.folder / "again").items())


def test_requantized_says_what_is_dense(tmp_path: Path) -> None:
    """As the folder that it was made from, or transformers would look for codes where there are none."""
    case = Case(tmp_path, QuantConfig(skip=("down_proj", r"layers\.0\..*v_proj")))
    write_models(tmp_path, torch.bfloat16, case.quant)
    case.merge("out", target="requantized")
    before, after = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("nf4", "out"))
    assert after["quantization_config"] == before["quantization_config"]
    dense = [
        "lm_head",
        *(f"model.layers.{name}" for name in ("0.mlp.down_proj", "0.self_attn.v_proj", "1.mlp.down_proj")),
    ]
    assert after["quantization_config"]["llm_int8_skip_modules"] == dense
    written, base = stored_tensors(tmp_path / "out"), stored_tensors(tmp_path / "nf4")
    assert {name: tensor.dtype for name, tensor in written.items()} == {name: t.dtype for name, t in base.items()}


def test_an_original_in_another_dtype_keeps_it(small_case: Case) -> None:
    """The base was quantized from bf16; the same numbers in fp32 are an original, too, of which nothing is rounded."""
    wide = LlamaForCausalLM.from_pretrained(small_case.folder / "dense", dtype=torch.float32)
    wide.save_pretrained(small_case.folder / "wide")
    report = small_case.merge("out", target="original", original_folder=small_case.folder / "wide")
    for name, tensor in stored_tensors(small_case.folder / "out").items():
        assert tensor.dtype == torch.float32
        exact = small_case.original(name).double() + small_case.update(name)
        assert ((tensor - exact).abs() <= small_case.slack(name, small_case.original(name))).all()
    check_drifts(small_case, report, QuantWeights(small_case.folder / "out"))


@torch.no_grad()
def test_logits(case: Case, dtype: torch.dtype) -> None:
    """fp32 arithmetic on the weights of the files, so each target is as exact as the weights that it writes."""
    wants_dequantized = peft_logits(case, case.trained)
    wants_original = peft_logits(case, case.original)
    for target, expected in (("dequantized", wants_dequantized), ("original", wants_original)):
        original = {"original_folder": case.folder / "dense"} if target == "original" else {}
        case.merge(target, target=target, dtype=torch.float32, **original)
        merged = AutoModelForCausalLM.from_pretrained(case.folder / target, dtype=torch.float32).eval()
        # fp32 roundings through two blocks, relative to the largest logit
        assert (merged(TOKENS).logits - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (wants_original - wants_dequantized).abs().max() > 1e-2 * wants_original.abs().max()

    if dtype == torch.float32:  # or W is rounded once more, when it is made dense
        model = load_model(case.folder / "nf4", None, torch.float32)
        load_adapter(model, case.folder / "adapter")
        assert (minift_logits(model) - wants_dequantized[0]).abs().max() <= 2e-5 * wants_dequantized.abs().max()

    case.merge("requantized", target="requantized")
    ours = minift_logits(load_model(case.folder / "requantized", None, torch.float32))
    config = LlamaConfig.from_pretrained(case.folder / "dense")
    dense = LlamaForCausalLM(config).float().eval()
    dense.load_state_dict(codebook_times_scale(case.folder / "requantized"))
    assert (dense(TOKENS).logits[0] - ours).abs().max() <= 2e-5 * ours.abs().max()
    # Else config.json asks transformers to compute in bf16, or `Case.trained` has the reason.
    if dtype == torch.float32 and config.intermediate_size % case.quant.block_size == 0:
        theirs = AutoModelForCausalLM.from_pretrained(case.folder / "requantized", dtype=torch.float32)
        theirs.train()  # in inference bitsandbytes computes in bf16 on a CPU, and only with widths that it likes
        assert (theirs(TOKENS).logits[0] - ours).abs().max() <= 2e-5 * ours.abs().max()


def codebook_times_scale(folder: Path) -> dict[str, Tensor]:
    """The weights of an NF4 folder in fp32."""
    model, weights = load_model(folder, None, torch.float32), QuantWeights(folder)
    quantized = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    return {
        name: dequantize_nf4(quantized[name].nf4(), torch.float32).view(weights.shape(name))
        if name in quantized
        else weights.read(name)
        for name in weights.names()
    }


def peft_logits(case: Case, weight_of) -> Tensor:
    """transformers + PEFT over `weight_of(name)` for each quantized weight, fp32."""
    base = LlamaForCausalLM(LlamaConfig.from_pretrained(case.folder / "dense")).float()
    originals = WeightReader(case.folder / "dense")
    base.load_state_dict({n: weight_of(n) if is_quantized(n) else originals.read(n) for n in originals.names()})
    return peft.PeftModel.from_pretrained(base, case.folder / "adapter").eval()(TOKENS).logits


def minift_logits(model) -> Tensor:
    count = TOKENS.shape[1]
    bounds = torch.tensor([0, count], dtype=torch.int32)
    return model(TOKENS[0], torch.arange(count), bounds, count, head=lambda hidden_TD, lm_head: lm_head(hidden_TD))


# Bad input #


def test_the_default_is_the_model_that_was_trained(small_case: Case) -> None:
    assert small_case.merge("nf4 out").target == "dequantized"
    assert small_case.merge("nf4 on the way", "dense", quant=QuantConfig()).target == "dequantized"
    assert small_case.merge("dense out", "dense").target == "original"


def refusals(folder: Path) -> dict[str, tuple[dict, str]]:
    return {
        "unknown": ({"target": "nf4"}, "merge target is 'nf4'; valid: dequantized, original, requantized"),
        "original where": ({"target": "original"}, "needs the folder of the model from which it was quantized: give"),
        "dense dequantized": ({"base": "dense", "target": "dequantized"}, "nothing to be dequantized in .*--nf4"),
        "dense requantized": ({"base": "dense", "target": "requantized"}, "nothing to be requantized in .*--nf4"),
        "original unused": ({"original_folder": folder / "dense"}, "--original is .* but the target is dequantized"),
        "original of dense": (
            {"base": "dense", "original_folder": folder / "dense"}, "--original is .* is dense, its own original"
        ),
        "original missing": ({"target": "original", "original_folder": folder / "gone"}, "gone is not a folder"),
        "original in nf4": (
            {"target": "original", "original_folder": folder / "nf4"}, "--original .* is stored in NF4 itself; give"
        ),
        "other shapes": (
            {"target": "original", "original_folder": folder / "narrow"},
            r"narrow is not the model from which .*nf4 was quantized: \S+ is .*\(40, 32\) in the first and \(40, 64\)",
        ),
        "fewer layers": (
            {"target": "original", "original_folder": folder / "short"},
            r"short is not the model .*: model.layers.1.\S+ is missing in the first",
        ),
        "other weights": (
            {"target": "original", "original_folder": folder / "tuned"},
            r"tuned is not the model .*nf4 was quantized: of model.\S+_proj.weight, \d+% of the 4-bit codes differ",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("which", list(refusals(Path())))
def test_what_does_not_fit_is_refused(small_case: Case, which: str) -> None:
    folder = small_case.folder
    config = LlamaConfig.from_pretrained(folder / "dense")
    LlamaForCausalLM(LlamaConfig(**config.to_dict() | {"hidden_size": 32})).save_pretrained(folder / "narrow")
    LlamaForCausalLM(LlamaConfig(**config.to_dict() | {"num_hidden_layers": 1})).save_pretrained(folder / "short")
    tuned = LlamaForCausalLM.from_pretrained(folder / "dense", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in tuned.parameters():  # by a twentieth of their standard deviation
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    tuned.save_pretrained(folder / "tuned")
    options, sentence = refusals(folder)[which]
    with pytest.raises(ValueError, match=sentence):
        small_case.merge("out", **options)
    assert not (folder / "out").exists() and not list(folder.glob("*partial*"))


def test_the_command(small_case: Case, capsys) -> None:
    folder = small_case.folder
    command = ["merge", "--model", str(folder / "nf4"), "--adapter", str(folder / "adapter"), "--out"]
    assert main([*command, str(folder / "original"), "--target", "original", "--original", str(folder / "dense")]) == 0
    out, err = capsys.readouterr()
    *table, total, wrote = out.splitlines()
    assert [line.split()[0].split(".")[-2] for line in table[1:]] == ["q_proj", "down_proj"]
    assert total.startswith("merged 4 weights (original); error / update: overall ")
    assert wrote == f"wrote {folder / 'original'}" and not err
    assert main([*command, str(folder / "other"), "--target", "original"]) == 2
    assert "give it with --original" in capsys.readouterr().err
    command[2] = str(folder / "dense")
    assert main([*command, str(folder / "requantized"), "--nf4", "--target", "requantized"]) == 0
    assert "merged 4 weights (requantized)" in capsys.readouterr().out
    assert QuantWeights(folder / "requantized").stored.config() == QuantConfig()


# Memory #


@pytest.mark.parametrize("target", ["dequantized", "original", "requantized"])
def test_one_projection_at_a_time(small_case: Case, monkeypatch, target: str) -> None:
    """Whenever another weight is read or dequantized, all dense tensors of the one before are gone."""
    shapes = {name: WeightReader(small_case.folder / "dense").shape(name) for name in small_case.original_names()}
    made: list[weakref.ref[Tensor]] = []
    num_watched = 0

    def alive() -> set[tuple[int, ...]]:
        return {tuple(tensor.shape) for ref in made if (tensor := ref()) is not None}

    def watch(owner, function_name: str, shape_of=None, track=lambda result, args: [result]) -> None:
        function = getattr(owner, function_name)

        def watching(*args):
            nonlocal num_watched
            if shape_of is not None:
                num_watched += 1
                assert alive() <= {shape_of(*args)}, args
            result = function(*args)
            made.extend(map(weakref.ref, track(result, args)))
            return result

        monkeypatch.setattr(owner, function_name, watching)

    watch(QuantWeights, "read", lambda weights, name: shapes[name])
    watch(merge.AdapterBase, "filled", lambda base, projection: shapes[f"{projection}.weight"], lambda *_: [])
    watch(merge, "measure_drift", lambda name, *_: shapes[name], lambda result, args: args[1:])
    watch(NF4Linear, "dense_weight")
    watch(Adapter, "exact_weight")
    original = {"original_folder": small_case.folder / "dense"} if target == "original" else {}
    small_case.merge("out", target=target, **original)
    assert num_watched >= len(shapes) and len(made) >= len(shapes) and not alive()
