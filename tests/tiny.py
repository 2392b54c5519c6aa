"""A complete model folder and data set that take milliseconds to make: a two-layer Llama with random weights, a
byte-level tokenizer with ChatML's special tokens, and conversations of very unequal lengths."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.hf import save_model

SPECIAL = ["</s>", "<|im_start|>", "<|im_end|>"]


def write_tokenizer(folder: Path) -> int:
    """One token per byte, then the special ones; returns the vocabulary size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return backend.get_vocab_size()


def write_model(folder: Path, *, tied: bool = True, seed: int = 0, **changes: object) -> Path:
    """A Hugging Face folder in fp32. changes: other fields of config.json, or other values. Biases are random."""
    vocab_size = write_tokenizer(folder)
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "hidden_act": "silu",
            "max_position_embeddings": 512,
            "initializer_range": 0.1,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": tied,
            "bos_token_id": None,
            "eos_token_id": vocab_size - 3,
        }
        | changes
    )
    model = CausalLM(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=generator)
    tensors = dict(model.named_parameters())
    save_model(
        ((name, p.detach()) for name, p in tensors.items()),
        config,
        folder,
        {name: (torch.float32, tuple(p.shape)) for name, p in tensors.items()},
    )
    return folder


def write_conversations(file: Path, count: int) -> Path:
    """`count` rows in messages format, 30 to 120 tokens each."""
    with file.open("w") as out:
        for i in range(count):
            question, answer = "ab" * (1 + 7 * i % 20), f"{i} is " + "yes " * (1 + i % 4)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]
            out.write(json.dumps({"messages": messages}) + "\n")
    return file


def write_inputs(folder: Path) -> Path:
    """What a run needs: `folder`/model and, as 24 conversations, `folder`/train.jsonl."""
    write_model(folder / "model")
    write_conversations(folder / "train.jsonl", 24)
    return folder
