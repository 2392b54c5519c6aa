"""GGUF files written here, the way llama.cpp's converter writes them, and converted back: weights and logits against
the transformers model they came from, ids against the tokenizer they came from."""

from __future__ import annotations

import io
import json

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from minift.model.gguf import convert_gguf, unpermute
from minift.model.hf import load_model

VOCAB = 400
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# case -> (GGUF architecture, transformers class, its extra settings)
MODELS = {
    "llama": ("llama", "LlamaForCausalLM", {"head_dim": 16}),
    "llama tied": ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True, "rope_theta": 100000.0}),
    "llama biases": ("llama", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.2": ("llama", "LlamaForCausalLM", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
    "mistral": ("llama", "MistralForCausalLM", {"sliding_window": 5}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", {}),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {"head_dim": 32}),
}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip

SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
# Strings that a byte-level BPE made below joins, character by character, wherever its rule does not split them; every
# rule must prevent some of them.
JOINED = ["1234", "12345", " 12", "'LLx", "'sx", "E'", "the", " the", "the the", "!!\n", ".\n\n", "  ", "\n ", "\r\n\n"]
JOINED += ["x'", "é", "e\u0301", "漢字", "_a", "\tthe", "!the"]
PIECES = [*"abthe' \n\r\t.!_12345éLEx漢字🙂", *JOINED, *SPECIAL, "quick", "\u0301"]
CORPUS = [
    "the quick brown fox jumps over another other there, 1234 12345 345 5 1 12",
    "Paris, naïve café 漢字 12345! this is it; his history thins that throat's WE'LL THE",
    "it's  we'll\n\n\tdo\n\n  what   he had nothing then they're thirsty\n...\n!!!\n",
] * 5
text_strategy = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in GGUF_NAMES:
        return f"{GGUF_NAMES[module]}.{kind}"
    _, _, layer, module = module.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[module]}.{kind}"


def write_weights(writer: gguf.GGUFWriter, arch: str, model, quantization: gguf.GGMLQuantizationType) -> None:
    config = model.config
    head_dim = (
        config.head_dim if getattr(config, "head_dim", None) else config.hidden_size // config.num_attention_heads
    )
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "mistral":
        writer.add_sliding_window(config.sliding_window)
    if config.rope_parameters["rope_type"] == "llama3":
        frequencies = 1 / 500000.0 ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        factors = (frequencies / model.model.rotary_emb.inv_freq.double()).float()  # what transformers divided by
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.numpy()
        if arch == "llama" and ".q_proj." in name:
            weight = permute(weight, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            weight = permute(weight, config.num_key_value_heads)
        kind = quantization if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)


def write_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer, pre: str) -> None:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    types = [TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens]
    unused = range(len(tokens), VOCAB)  # llama.cpp fills up to the rows of the embedding
    writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in unused)])
    writer.add_token_types([*types, *(TokenType.UNUSED for _ in unused)])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(2)
    writer.add_chat_template("{{ messages }}")


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level_tokenizer(pre: str) -> Tokenizer:
    """A BPE that joins JOINED, with the pre-tokenizer of the models that `pre` stands for, taken from transformers."""
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    split = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "qwen2": [pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")],
        "llama-bpe": [pre_tokenizers.Split(Regex(TikTokenConverter(vocab_file="unused").pattern), "isolated")],
    }[pre]
    spelled = [as_bytes.pre_tokenize_str(text)[0][0] for text in JOINED]
    merges = dict.fromkeys((text[:i], text[i]) for text in spelled for i in range(1, len(text)))
    # "quick" is no join of anything: only a model that ignores merges finds it.
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges), "quick"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges), ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A function: case, quantization -> (the transformers model, folder converted from its GGUF, the GGUF)."""

    def make(case, quantization=gguf.GGMLQuantizationType.F32, dtype="float32"):
        arch, name, extra = MODELS[case]
        torch.manual_seed(0)
        model_class = getattr(transformers, name)
        model = model_class(model_class.config_class(**{**SIZES, "tie_word_embeddings": False, **extra})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.uniform_(0.5, 1.5)  # as constants they would hide a mix-up
        folder = tmp_path_factory.mktemp("gguf")
        writer = gguf.GGUFWriter(folder / "model.gguf", arch)
        write_weights(writer, arch, model, quantization)
        write_vocabulary(writer, byte_level_tokenizer("smollm"), "smollm")
        finish(writer)
        convert_gguf(folder / "model.gguf", folder / "hf", dtype)
        return model, folder / "hf", folder / "model.gguf"

    return make


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """pre -> (the original tokenizer, the converted one as transformers loads it)."""
    made = {}
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        original = byte_level_tokenizer(pre)
        folder = tmp_path_factory.mktemp("tokenizer")
        convert_with_vocabulary(
            folder, lambda writer, original=original, pre=pre: write_vocabulary(writer, original, pre)
        )
        made[pre] = original, transformers.AutoTokenizer.from_pretrained(folder / "hf")
    return made


def convert_with_vocabulary(folder, write):
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    write_weights(writer, "llama", model, gguf.GGMLQuantizationType.F32)
    write(writer)
    finish(writer)
    convert_gguf(folder / "model.gguf", folder / "hf")


@pytest.fixture(scope="module", params=[True, False], ids=["space prefix", "no prefix"])
def sentencepieces(tmp_path_factory, request):
    """(the SentencePiece model, the converted tokenizer)."""
    trained_model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=trained_model, model_type="bpe", vocab_size=VOCAB,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        add_dummy_prefix=request.param,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_proto=trained_model.getvalue())

    def kind(index):
        if model.is_unknown(index):
            return TokenType.UNKNOWN
        if model.is_control(index):
            return TokenType.CONTROL
        return TokenType.BYTE if model.is_byte(index) else TokenType.NORMAL

    def write(writer):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(request.param)
        writer.add_token_list([model.id_to_piece(i) for i in range(VOCAB)])
        writer.add_token_scores([model.get_score(i) for i in range(VOCAB)])
        writer.add_token_types([kind(i) for i in range(VOCAB)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    folder = tmp_path_factory.mktemp("sentencepiece")
    convert_with_vocabulary(folder, write)
    return model, transformers.AutoTokenizer.from_pretrained(folder / "hf")


class TestWeights:
    @pytest.mark.parametrize("case", MODELS)
    def test_transformers_loads_the_same_model(self, converted, case):
        """Weights bit for bit; logits to fp32 rounding (the configuration says the same, RoPE included)."""
        model, folder, _ = converted(case)
        again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert again.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        tokens = torch.arange(3, 60).unsqueeze(0)
        with torch.no_grad():
            expected, logits = model(tokens).logits, again(tokens).logits
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert again.config.eos_token_id == again.generation_config.eos_token_id == [0, 2]
        assert (again.config.bos_token_id, again.config.pad_token_id) == (1, None)

    def test_our_model_loads(self, converted):
        model, folder, _ = converted("llama tied")
        ours = load_model(folder, torch.float32).state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())

    @pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
    def test_quantized_as_transformers_reads_it(self, converted, kind):
        _, folder, path = converted("llama", gguf.GGMLQuantizationType[kind])
        expected = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
        again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for name, tensor in expected.state_dict().items():
            assert torch.equal(again[name], tensor.float()), name

    def test_dtype(self, converted):
        model, folder, _ = converted("llama", dtype="bfloat16")
        again = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert again.dtype == torch.bfloat16
        name = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(again.state_dict()[name], model.state_dict()[name].bfloat16())

    @given(heads=st.integers(1, 4), half=st.integers(1, 4), columns=st.integers(0, 3), seed=st.integers(0, 9))
    def test_unpermute(self, heads, half, columns, seed):
        shape = (heads * 2 * half, columns) if columns else (heads * 2 * half,)
        weight = np.random.default_rng(seed).random(shape)
        assert np.array_equal(unpermute(permute(weight, heads), heads), weight)


class TestRefusals:
    @pytest.fixture
    def refused(self, tmp_path):
        def check(match, arch="llama", change=lambda writer: None, drop=()):
            torch.manual_seed(0)
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
            writer = gguf.GGUFWriter(tmp_path / "model.gguf", arch)
            write_weights(writer, arch, model, gguf.GGMLQuantizationType.F32)
            write_vocabulary(writer, byte_level_tokenizer("gpt-2"), "gpt-2")
            change(writer)
            for name in drop:
                del writer.tensors[0][name]
            finish(writer)
            with pytest.raises(ValueError, match=match):
                convert_gguf(tmp_path / "model.gguf", tmp_path / "hf")

        return check

    def test_architecture(self, refused):
        refused("architecture 'gemma' is not supported; valid: llama, qwen2, qwen3", arch="gemma")

    def test_mixture_of_experts(self, refused):
        experts = np.zeros((2, 4, 4), np.float32)
        refused("mixture of experts", change=lambda writer: writer.add_tensor("blk.0.ffn_gate_exps.weight", experts))

    def test_missing_tensor(self, refused):
        refused("1 tensors do not fit .* model.norm.weight: the file has none", drop=["output_norm.weight"])

    def test_rope_factors_nobody_published(self, refused):
        factors = np.linspace(1, 3, 8, dtype=np.float32)
        refused("none of the published", change=lambda writer: writer.add_tensor("rope_freqs.weight", factors))

    def test_split_file(self, refused):
        refused("one part of a split", change=lambda writer: writer.add_uint16("split.count", 2))

    @pytest.mark.parametrize("size", [0, 3, 30, 1000, -1000])
    def test_half_a_download(self, converted, tmp_path, size):
        *_, whole = converted("llama")
        (tmp_path / "part.gguf").write_bytes(whole.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"part\.gguf is not a whole GGUF file: "):
            convert_gguf(tmp_path / "part.gguf", tmp_path / "hf")

    def test_dtype(self):
        with pytest.raises(ValueError, match="dtype is 'int8'"):
            convert_gguf("model.gguf", "folder", "int8")


class TestTokenizer:
    @pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
    @given(text=text_strategy)
    def test_byte_level(self, pairs, pre, text):
        original, converted = pairs[pre]
        ids = original.encode(text).ids
        assert converted(text, add_special_tokens=False)["input_ids"] == ids
        assert converted.decode(ids) == original.decode(ids, skip_special_tokens=False)

    def test_special_tokens_and_template(self, pairs):
        _, converted = pairs["smollm"]
        assert (converted.bos_token, converted.eos_token, converted.pad_token) == ("<|im_start|>", "<|end|>", None)
        assert set(SPECIAL) <= {str(token) for token in converted.added_tokens_decoder.values()}
        assert converted.chat_template == "{{ messages }}" and converted.model_max_length == 128
        assert converted("a")["input_ids"] == converted("a", add_special_tokens=False)["input_ids"]
        with_bos = pairs["llama-bpe"][1]("a")["input_ids"]  # Llama 3's tokenizer puts BOS first
        assert with_bos[0] == 1 and len(with_bos) == 2

    @pytest.mark.parametrize("pre", ["bloom", None])
    def test_unknown_pre_tokenizer_is_refused_by_name(self, tmp_path, pre):
        def write(writer):
            write_vocabulary(writer, byte_level_tokenizer("gpt-2"), pre or "gpt-2")
            if pre is None:
                del writer.kv_data[0]["tokenizer.ggml.pre"]

        with pytest.raises(ValueError, match=f"= {pre!r} is not known here; valid: gpt-2, smollm, llama-bpe"):
            convert_with_vocabulary(tmp_path, write)

    def test_unknown_kind_is_refused_by_name(self, tmp_path):
        with pytest.raises(ValueError, match="is 'bert'; valid: gpt2"):
            convert_with_vocabulary(tmp_path, lambda writer: writer.add_tokenizer_model("bert"))

    @given(
        text=st.lists(st.sampled_from(" ".join(CORPUS[:3]).split() + [*" \n\t'é漢🙂xyz"]), min_size=1, max_size=8).map(
            " ".join
        )
    )
    def test_sentencepiece(self, sentencepieces, text):
        model, converted = sentencepieces
        ids = converted(text, add_special_tokens=False)["input_ids"]
        assert ids == model.encode(text)
        assert converted.decode(ids) == text == model.decode(ids)
        assert converted(text)["input_ids"] == [1, *ids]
