"""The tokenizer inside a GGUF file -> tokenizer.json, tokenizer_config.json, chat_template.jinja.

GGUF stores the vocabulary, the merges or scores, and a *name* for the pre-tokenizer; the rules behind the name live in
llama.cpp's source. The table below spells out the rules of the names we know. A wrong rule would still produce valid
ids, only not the ones the model was trained on, so an unknown name is refused, never guessed.

Two kinds: `gpt2` (byte-level BPE with a merge list) and `llama` (SentencePiece BPE; its merges follow from the scores).
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

Keys = gguf.Keys.Tokenizer
VOCABULARY_LISTS = frozenset({Keys.LIST, Keys.MERGES, Keys.SCORES, Keys.TOKEN_TYPE})

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLIT_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _SPLIT_REST
QWEN2_PATTERN = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _SPLIT_REST

# tokenizer.ggml.pre (with llama.cpp's aliases) -> rule
PRE_TOKENIZERS = {
    "gpt-2": "gpt-2",
    "smollm": "smollm",
    "llama-bpe": "llama-bpe",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}


def write_tokenizer(reader: gguf.GGUFReader, folder: Path, max_length: int) -> dict:
    """Write the tokenizer files and return `{bos_token_id, eos_token_id, pad_token_id}` for config.json (None: none).

    `eos_token_id` is a list when the file names an end-of-turn or end-of-message token besides the end of text.
    """
    fields = reader.fields

    def contents(key: str, default=None):
        return fields[key].contents() if key in fields else default

    tokens = contents(Keys.LIST)
    kind = contents(Keys.MODEL)
    types = contents(Keys.TOKEN_TYPE, [TokenType.NORMAL] * len(tokens or ()))
    if kind == "gpt2":
        tokenizer = byte_level_bpe(tokens, types, contents(Keys.MERGES), contents(Keys.PRE))
    elif kind == "llama":
        space_prefix = contents(Keys.ADD_PREFIX, True)
        tokenizer = sentencepiece_bpe(tokens, types, contents(Keys.SCORES), space_prefix)
    else:
        raise ValueError(f"{Keys.MODEL} is {kind!r}; valid: gpt2 (byte-level BPE), llama (SentencePiece).")

    special_ids = {
        name: contents(key)
        for name, key in (("bos", Keys.BOS_ID), ("eos", Keys.EOS_ID), ("unk", Keys.UNK_ID), ("pad", Keys.PAD_ID))
    }
    llama3 = PRE_TOKENIZERS.get(contents(Keys.PRE)) == "llama-bpe"
    if contents(Keys.ADD_BOS, kind == "llama" or llama3) and special_ids["bos"] is not None:
        bos = tokens[special_ids["bos"]]
        tokenizer.post_processor = processors.Sequence(
            [
                *([tokenizer.post_processor] if tokenizer.post_processor else []),
                processors.TemplateProcessing(
                    single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, special_ids["bos"])]
                ),
            ]
        )
    tokenizer.save(str(folder / "tokenizer.json"))

    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[index] for name, index in special_ids.items() if index is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n")
    if template := contents(Keys.CHAT_TEMPLATE):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    eos_ids = dict.fromkeys((special_ids["eos"], contents(Keys.EOT_ID), contents(Keys.EOM_ID)))
    eos_ids = [index for index in eos_ids if index is not None]
    return {
        "bos_token_id": special_ids["bos"],
        "eos_token_id": eos_ids if len(eos_ids) > 1 else special_ids["eos"],
        "pad_token_id": special_ids["pad"],
    }


def byte_level_bpe(tokens: list[str], types: list[int], merges: list[str], pre: str | None) -> Tokenizer:
    """A `gpt2` tokenizer: merges given, bytes mapped to printable characters, text split first by the rule `pre`."""
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"pre-tokenizer {Keys.PRE} = {pre!r} is not known here; valid: {', '.join(PRE_TOKENIZERS)}. "
            "Without its splitting rule the ids would differ from those the model was trained on."
        )
    rule = PRE_TOKENIZERS[pre]
    # Unused slots are llama.cpp's filling between the tokenizer's size and the embedding's; no text produces them.
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != TokenType.UNUSED}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(BPE(vocab, pairs, ignore_merges=rule == "llama-bpe"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule in ("gpt-2", "smollm"))
    if rule == "gpt-2":
        tokenizer.pre_tokenizer = byte_level
    elif rule == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        pattern = LLAMA3_PATTERN if rule == "llama-bpe" else QWEN2_PATTERN
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    _add_special_tokens(tokenizer, tokens, types)
    return tokenizer


def sentencepiece_bpe(tokens: list[str], types: list[int], scores: list[float], space_prefix: bool) -> Tokenizer:
    """A `llama` tokenizer. SentencePiece merges any two neighbours whose join is a piece, best score first; as a merge
    list that is every split of every piece into two pieces, ordered by the score of the whole."""
    vocab = {token: i for i, token in enumerate(tokens)}
    # Unknown, control, user-defined and byte pieces are never joined from parts.
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind in (TokenType.NORMAL, TokenType.UNUSED)}
    merges = [
        (scores[vocab[piece]], piece[:cut], piece[cut:])
        for piece in tokens
        if piece in normal
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    merges.sort(key=lambda merge: (-merge[0], len(merge[1]), len(merge[2])))
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.UNKNOWN), None)
    has_bytes = TokenType.BYTE in types
    tokenizer = Tokenizer(
        BPE(
            vocab,
            [(left, right) for _, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    )
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if space_prefix else replace
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", left=1, right=0)] if space_prefix else []),
        ]
    )
    _add_special_tokens(tokenizer, tokens, types)
    return tokenizer


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control tokens become special added tokens, user-defined ones ordinary added tokens; ids stay as they are."""
    kinds = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in kinds
            if kind in (TokenType.CONTROL, TokenType.UNKNOWN)
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token, kind in kinds if kind == TokenType.USER_DEFINED]
    )
