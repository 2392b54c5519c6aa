"""Text <-> token ids, from the tokenizer files of a Hugging Face folder.

    tokenizer = Tokenizer.from_folder("model/")
    ids, spans = tokenizer.encode_with_offsets("Hello")     # spans: [(start, end)] in characters of the text

`tokenizer.json` is run by the `tokenizers` package, a lone SentencePiece `tokenizer.model` by `sentencepiece`; both
look the same from here. Encoding never adds a token: a chat template or a document format says where BOS and EOS go,
and a tokenizer that adds its own gives every row two of them. Nor does it truncate or pad, whatever the file says.

Special tokens written out in the text become their ids, as in transformers, unless `parse_special=False`: then
"</s>" in what a user wrote is six characters like any others.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from minift.json_file import read_object

Span = tuple[int, int]

TOKEN_ROLES = ("bos", "eos", "pad", "unk")
# ChatGLM's tokenizer is Python code beside tokenizer.model; these follow the model's own pieces, in this order.
CHATGLM_SPECIAL_TOKENS = (
    "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)  # fmt: skip


class Backend(Protocol):
    """What the two libraries have in common. `special_tokens` maps text to id."""

    special_tokens: dict[str, int]
    vocab_size: int
    adds_bos: bool

    def encode(self, text: str, parse_special: bool) -> tuple[list[int], list[Span]]: ...
    def decode(self, ids: list[int], skip_special: bool) -> str: ...
    def token_id(self, token: str) -> int | None: ...
    def token(self, index: int) -> str: ...
    def serialized(self) -> bytes: ...


class Tokenizer:
    """A tokenizer with its special tokens and chat templates.

    vocab_size      every id is below it (the embedding may have more rows)
    special_tokens  text -> id of the tokens that are no ordinary text
    bos_token, eos_token, pad_token, unk_token    str | None; and bos_id, eos_id, pad_id, unk_id
    adds_bos        whether transformers would put BOS before plain text
    chat_templates  name -> Jinja source; `chat_template` is the one named "default", or None
    """

    def __init__(
        self, backend: Backend, role_tokens: dict[str, str | None], chat_templates: dict[str, str] | None = None
    ) -> None:
        """`role_tokens`: "bos", "eos", "pad", "unk" -> token. ValueError for one that is not in the vocabulary."""
        self._backend = backend
        self.vocab_size = backend.vocab_size
        self.adds_bos = backend.adds_bos
        self.special_tokens = backend.special_tokens
        self.chat_templates = chat_templates or {}
        for role, token in role_tokens.items():
            if token is not None and backend.token_id(token) is None:
                raise ValueError(
                    f"The tokenizer's configuration names {token!r} as {role}; it is not in the vocabulary."
                )
        self.bos_token, self.eos_token, self.pad_token, self.unk_token = (role_tokens.get(role) for role in TOKEN_ROLES)
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            None if token is None else backend.token_id(token)
            for token in (self.bos_token, self.eos_token, self.pad_token, self.unk_token)
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json, else tokenizer.model, with tokenizer_config.json and chat templates beside it."""
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        roles = {**_read_json(folder / "special_tokens_map.json"), **config}
        role_tokens = {role: _content(roles.get(f"{role}_token")) for role in TOKEN_ROLES}
        if (folder / "tokenizer.json").is_file():
            backend: Backend = _JsonBackend(folder / "tokenizer.json", config, role_tokens)
        elif (folder / "tokenizer.model").is_file():
            backend = _SentencePieceBackend(
                folder / "tokenizer.model", config, _read_json(folder / "added_tokens.json")
            )
            role_tokens = {role: role_tokens[role] or backend.role_tokens[role] for role in TOKEN_ROLES}
        else:
            if not folder.is_dir():
                raise ValueError(f"{folder} is not a folder; valid: a Hugging Face model folder")
            raise ValueError(f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model is there.")
        return cls(backend, role_tokens, read_chat_templates(folder, config))

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    def encode(self, text: str, parse_special: bool = True) -> list[int]:
        """Ids of `text` and nothing else; see the module docstring for `parse_special`."""
        return self._backend.encode(text, parse_special)[0]

    def encode_with_offsets(self, text: str, parse_special: bool = True) -> tuple[list[int], list[Span]]:
        """Ids, and for each the characters [start, end) it stands for.

        A token of no character of its own (SentencePiece's dummy prefix, a leading byte of a character that took
        several tokens) may be empty: start == end.
        """
        return self._backend.encode(text, parse_special)

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        return self._backend.decode(list(ids), skip_special)

    def token_id(self, token: str) -> int | None:
        """The id of the token spelled exactly so in the vocabulary, or None."""
        return self._backend.token_id(token)

    def token(self, index: int) -> str:
        """The spelling of an id in the vocabulary ("Ġthe", "▁the", "</s>"), for messages to people."""
        return self._backend.token(index)

    def fingerprint(self) -> str:
        """Equal for tokenizers that give every text the same ids; changes whenever any text might get others."""
        digest = hashlib.sha256(self._backend.serialized())
        digest.update(json.dumps([self.bos_token, self.eos_token, sorted(self.special_tokens.items())]).encode())
        return digest.hexdigest()


class _JsonBackend:
    """tokenizer.json."""

    def __init__(self, file: Path, config: dict, role_tokens: dict[str, str | None]) -> None:
        text = file.read_text(encoding="utf-8")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"{file} is not a tokenizer that the package `tokenizers` can read: {error}") from error
        self.adds_bos = role_tokens["bos"] in self._tokenizer.encode("", add_special_tokens=True).tokens[:1]
        # The post-processor would trim offsets (byte-level BPE) or add tokens; truncation and padding are settings
        # somebody saved by accident. None of them belongs to the mapping from text to ids.
        self._tokenizer.post_processor = None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        for index, entry in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
            self._add_missing(tokenizers.AddedToken(**_added_token_fields(entry)), int(index))
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        for token in role_tokens.values():
            if token is not None and token not in added and self.token_id(token) is not None:
                self._tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])
        added_tokens = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in added_tokens.items() if token.special}
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def _add_missing(self, token: tokenizers.AddedToken, index: int) -> None:
        if self.token_id(token.content) is None:
            (self._tokenizer.add_special_tokens if token.special else self._tokenizer.add_tokens)([token])
        if self.token_id(token.content) != index:
            raise ValueError(
                f"tokenizer_config.json gives the added token {token.content!r} the id {index}, "
                f"tokenizer.json gives it {self.token_id(token.content)}."
            )

    def encode(self, text: str, parse_special: bool) -> tuple[list[int], list[Span]]:
        self._tokenizer.encode_special_tokens = not parse_special
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token(self, index: int) -> str:
        return self._tokenizer.id_to_token(index)

    def serialized(self) -> bytes:
        return self._tokenizer.to_str().encode()


class _SentencePieceBackend:
    """tokenizer.model, and special tokens that the model does not know or (control pieces) does not parse.

    Text between special tokens is encoded on its own, so each stretch starts with SentencePiece's dummy prefix, as in
    Meta's code and transformers' `legacy` tokenizers.
    """

    def __init__(self, file: Path, config: dict, added_tokens: dict[str, int]) -> None:
        if config.get("legacy") is False:
            raise ValueError(
                f"{file.parent} has a SentencePiece model with legacy=false and no tokenizer.json; "
                "write one first (transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...))."
            )
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except RuntimeError as error:
            raise ValueError(f"{file} is not a SentencePiece model: {error}") from error
        is_chatglm = config.get("tokenizer_class") == "ChatGLMTokenizer"
        self.adds_bos = config.get("add_bos_token", not is_chatglm)
        num_pieces = self._model.get_piece_size()
        pieces = ((i, self._model.id_to_piece(i)) for i in range(num_pieces))
        self.special_tokens = {piece: i for i, piece in pieces if self._model.is_control(i)}
        ordinary: dict[str, int] = {}
        rules = {int(i): entry for i, entry in config.get("added_tokens_decoder", {}).items()}
        rules.update({index: {"content": token} for token, index in added_tokens.items() if index not in rules})
        if is_chatglm:
            rules.update({num_pieces + i: {"content": token} for i, token in enumerate(CHATGLM_SPECIAL_TOKENS)})
        for index, entry in rules.items():
            target = self.special_tokens if entry.get("special", True) else ordinary
            target[entry["content"]] = index
        self._added = {**self.special_tokens, **ordinary}
        self._added_by_id = {index: token for token, index in self._added.items()}
        self.vocab_size = 1 + max([num_pieces - 1, *self._added.values()])
        # Longest first, so that no token hides another that starts with it.
        strip = {entry["content"]: (entry.get("lstrip"), entry.get("rstrip")) for entry in rules.values()}
        self._special_pattern = _any_of(self.special_tokens | ordinary, strip)
        self._ordinary_pattern = _any_of(ordinary, strip)
        role_ids = (self._model.bos_id(), self._model.eos_id(), self._model.pad_id(), self._model.unk_id())
        self.role_tokens = {
            role: self._model.id_to_piece(index) if index >= 0 else None
            for role, index in zip(TOKEN_ROLES, role_ids, strict=True)
        }

    def encode(self, text: str, parse_special: bool) -> tuple[list[int], list[Span]]:
        pattern = self._special_pattern if parse_special else self._ordinary_pattern
        ids: list[int] = []
        spans: list[Span] = []
        position = 0
        for match in pattern.finditer(text):
            self._encode_plain(text[position : match.start()], position, ids, spans)
            ids.append(self._added[match[match.lastindex]])
            spans.append(match.span())
            position = match.end()
        self._encode_plain(text[position:], position, ids, spans)
        return ids, spans

    def _encode_plain(self, text: str, position: int, ids: list[int], spans: list[Span]) -> None:
        if text:
            mapping = self._model.encode(text, return_type="offset_mapping")
            ids.extend(mapping["ids"])
            spans.extend((start + position, end + position) for start, end in mapping["offsets"])

    def decode(self, ids: list[int], skip_special: bool) -> str:
        text, run = [], []
        for index in ids:
            if index in self._added_by_id:
                token = self._added_by_id[index]
                text += [self._model.decode(run), "" if skip_special and token in self.special_tokens else token]
                run = []
            else:
                run.append(index)
        return "".join([*text, self._model.decode(run)])

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        index = self._model.piece_to_id(token)
        return index if self._model.id_to_piece(index) == token else None

    def token(self, index: int) -> str:
        return self._added_by_id.get(index) or self._model.id_to_piece(index)

    def serialized(self) -> bytes:
        return self._model.serialized_model_proto() + json.dumps(sorted(self._added.items())).encode()


def read_chat_templates(folder: Path, config: dict) -> dict[str, str]:
    """name -> Jinja source. transformers 4 keeps them in tokenizer_config.json (a string, or a list of named ones),
    transformers 5 in chat_template.jinja and additional_chat_templates/NAME.jinja; a file wins over the config."""
    templates = config.get("chat_template") or {}
    if isinstance(templates, list):
        templates = {entry["name"]: entry["template"] for entry in templates}
    elif isinstance(templates, str):
        templates = {"default": templates}
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    return {**templates, **{name: file.read_text(encoding="utf-8") for name, file in files.items()}}


def _any_of(tokens: dict[str, int], strip: dict[str, tuple[bool | None, bool | None]]) -> re.Pattern[str]:
    """Matches any of the tokens, as the one group that takes part, with the white space its entry says it swallows."""
    alternatives = []
    for token in sorted(tokens, key=len, reverse=True):
        left, right = strip.get(token, (False, False))
        alternatives.append((r"\s*" if left else "") + f"({re.escape(token)})" + (r"\s*" if right else ""))
    return re.compile("|".join(alternatives) if alternatives else r"(?!)")


def _added_token_fields(entry: dict[str, Any]) -> dict[str, Any]:
    keys = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {key: entry[key] for key in keys if key in entry}


def _content(token: str | dict | None) -> str | None:
    """A token in a configuration is a string, or an object with a `content` (transformers 4)."""
    return token["content"] if isinstance(token, dict) else token


def _read_json(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}
