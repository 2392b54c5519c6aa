"""Tokenizers trained on the spot, against transformers (tokenizer.json) and sentencepiece itself (tokenizer.model)."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as JsonTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from minift.data.tokenizer import CHATGLM_SPECIAL_TOKENS, Tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "Paris is the capital of France.", "naïve café 漢字"] * 20
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]

plain_text = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyz ABC 0123\n\t.,!<>|/_sé漢🙂e\u0301"), max_size=30)
marked_text = st.lists(plain_text | st.sampled_from(SPECIAL), max_size=6).map("".join)


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory):
    """A byte-level BPE saved the way people do: with a BOS post-processor, truncation and padding left on."""
    folder = tmp_path_factory.mktemp("json")
    tokenizer = JsonTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding()
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}}  # both spellings
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def model_proto():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def sentencepiece_model(model_proto):
    return sentencepiece.SentencePieceProcessor(model_proto=model_proto)


@pytest.fixture(scope="module")
def model_tokenizer(model_proto, tmp_path_factory):
    """With two tokens beyond the model, named in added_tokens.json."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "tokenizer.model").write_bytes(model_proto)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 330, "<|im_end|>": 331}))
    return Tokenizer.from_folder(folder)


@pytest.fixture
def model_folder(tmp_path, model_proto):
    """A function: extra configuration -> folder with a lone tokenizer.model."""

    def make(**config):
        (tmp_path / "tokenizer.model").write_bytes(model_proto)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


@pytest.fixture(scope="module")
def json_tokenizer(json_folder):
    return Tokenizer.from_folder(json_folder)


@pytest.fixture(scope="module")
def oracle(json_folder):
    import transformers
    return transformers.AutoTokenizer.from_pretrained(json_folder)


class TestJson:
    @given(text=marked_text)
    def test_same_ids_and_text_as_transformers(self, json_tokenizer, oracle, text):
        ids = json_tokenizer.encode(text)
        assert ids == oracle(text, add_special_tokens=False)["input_ids"]
        assert json_tokenizer.decode(ids) == text == oracle.decode(ids)
        assert json_tokenizer.decode(ids, skip_special=True) == oracle.decode(ids, skip_special_tokens=True)

    @given(text=marked_text)
    def test_offsets_tile_the_text(self, json_tokenizer, text):
        ids, spans = json_tokenizer.encode_with_offsets(text)
        assert ids == json_tokenizer.encode(text)
        assert_tiles(text, spans)

    @given(text=marked_text)
    def test_unparsed_special_tokens_are_characters(self, json_tokenizer, text):
        ids = json_tokenizer.encode(text, parse_special=False)
        assert not set(ids) & set(json_tokenizer.special_tokens.values())
        assert json_tokenizer.decode(ids) == text

    def test_attributes(self, json_tokenizer):
        assert (json_tokenizer.bos_token, json_tokenizer.bos_id) == ("<s>", 0)
        assert (json_tokenizer.eos_token, json_tokenizer.eos_id) == ("</s>", 1)
        assert (json_tokenizer.pad_token, json_tokenizer.pad_id) == (None, None)
        assert json_tokenizer.adds_bos
        assert json_tokenizer.special_tokens == {token: i for i, token in enumerate(SPECIAL)}
        assert json_tokenizer.vocab_size == 320
        assert json_tokenizer.token_id("<|im_end|>") == 3 and json_tokenizer.token(3) == "<|im_end|>"
        assert json_tokenizer.token_id("no such token") is None

    def test_added_tokens_decoder_of_transformers_4(self, json_folder, tmp_path):
        (tmp_path / "tokenizer.json").write_bytes((json_folder / "tokenizer.json").read_bytes())
        entries = {"320": {"content": "<call>", "special": False}, "321": {"content": "<|user|>", "special": True}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
        tokenizer = Tokenizer.from_folder(tmp_path)
        assert tokenizer.encode("<call><|user|>") == [320, 321] and tokenizer.vocab_size == 322
        assert "<|user|>" in tokenizer.special_tokens and "<call>" not in tokenizer.special_tokens

        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"added_tokens_decoder": {"7": {"content": "<s>", "special": True}}})
        )
        with pytest.raises(ValueError, match=r"'<s>' the id 7, tokenizer.json gives it 0"):
            Tokenizer.from_folder(tmp_path)

    def test_role_outside_the_vocabulary_is_refused(self, json_folder, tmp_path):
        (tmp_path / "tokenizer.json").write_bytes((json_folder / "tokenizer.json").read_bytes())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
        with pytest.raises(ValueError, match=r"'\[PAD\]' as pad"):
            Tokenizer.from_folder(tmp_path)


class TestSentencePiece:
    @given(text=plain_text)
    def test_plain_text_as_sentencepiece(self, model_tokenizer, sentencepiece_model, text):
        ids, spans = model_tokenizer.encode_with_offsets(text, parse_special=False)
        assert ids == sentencepiece_model.encode(text)
        assert model_tokenizer.decode(ids) == text
        assert_tiles(text, spans)

    @given(parts=st.lists(plain_text | st.sampled_from(SPECIAL), max_size=6))
    def test_text_between_special_tokens_is_encoded_on_its_own(self, model_tokenizer, sentencepiece_model, parts):
        merged: list[str] = []  # brute force: neighbouring texts belong together
        for part in parts:
            if merged and merged[-1] not in SPECIAL and part not in SPECIAL:
                merged[-1] += part
            else:
                merged.append(part)
        assume(not any(token in text for text in merged if text not in SPECIAL for token in SPECIAL))
        special_ids = {"<s>": [1], "</s>": [2], "<|im_start|>": [330], "<|im_end|>": [331]}
        expected = [i for part in merged for i in special_ids.get(part) or sentencepiece_model.encode(part)]
        ids, spans = model_tokenizer.encode_with_offsets("".join(parts))
        assert ids == expected
        assert model_tokenizer.decode(ids) == "".join(parts)
        assert model_tokenizer.decode(ids, skip_special=True) == "".join(part for part in merged if part not in SPECIAL)
        assert_tiles("".join(parts), spans)

    def test_roles_come_from_the_model(self, model_folder):
        tokenizer = Tokenizer.from_folder(model_folder())
        assert (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token) == ("<unk>", "<s>", "</s>")
        assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, None)
        assert tokenizer.special_tokens == {"<s>": 1, "</s>": 2}
        assert tokenizer.vocab_size == 330 and tokenizer.adds_bos

    def test_chatglm(self, model_folder):
        tokenizer = Tokenizer.from_folder(model_folder(tokenizer_class="ChatGLMTokenizer"))
        assert [tokenizer.token_id(token) for token in CHATGLM_SPECIAL_TOKENS] == list(range(330, 339))
        assert tokenizer.vocab_size == 339 and not tokenizer.adds_bos
        assert max(tokenizer.encode("<|user|>", parse_special=False)) < 330

    def test_white_space_a_token_swallows(self, model_folder):
        entry = {"content": "<|end|>", "lstrip": False, "rstrip": True, "special": True}
        tokenizer = Tokenizer.from_folder(model_folder(added_tokens_decoder={"330": entry}))
        ids, spans = tokenizer.encode_with_offsets("a <|end|>  b")
        assert ids == [*tokenizer.encode("a "), 330, *tokenizer.encode("b")]
        assert spans[ids.index(330)] == (2, 11)

    def test_non_legacy_is_refused(self, model_folder):
        with pytest.raises(ValueError, match="legacy=false"):
            Tokenizer.from_folder(model_folder(legacy=False))


class TestFolder:
    def test_no_tokenizer(self, tmp_path):
        with pytest.raises(ValueError, match="neither tokenizer.json nor tokenizer.model"):
            Tokenizer.from_folder(tmp_path)
        with pytest.raises(ValueError, match="nowhere is not a folder"):
            Tokenizer.from_folder(tmp_path / "nowhere")

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
    @pytest.mark.parametrize("text", ["", "[]", "version https://git-lfs.github.com/spec/v1\n"])
    def test_damaged_files_are_named(self, tmp_path, name, text):
        """Among them what git leaves in the place of a large file that was not fetched."""
        (tmp_path / name).write_text(text)
        kind = "JSON: " if name == "tokenizer_config.json" and text != "[]" else "a "
        with pytest.raises(ValueError, match=f"{name} is not {kind}"):
            Tokenizer.from_folder(tmp_path)

    def test_chat_templates(self, model_folder):
        assert Tokenizer.from_folder(model_folder()).chat_template is None
        assert Tokenizer.from_folder(model_folder(chat_template="one")).chat_template == "one"
        named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
        folder = model_folder(chat_template=named)
        assert Tokenizer.from_folder(folder).chat_templates == {"default": "one", "tool_use": "two"}
        (folder / "chat_template.jinja").write_text("file")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "rag.jinja").write_text("three")
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer.chat_templates == {"default": "file", "tool_use": "two", "rag": "three"}
        assert tokenizer.chat_template == "file"

    def test_fingerprint(self, json_folder, tmp_path, model_folder):
        content = json.loads((json_folder / "tokenizer.json").read_text())
        (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=3))
        config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "does not change ids"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        same = Tokenizer.from_folder(json_folder).fingerprint()
        assert Tokenizer.from_folder(tmp_path).fingerprint() == same
        content["model"]["merges"].pop()
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        assert Tokenizer.from_folder(tmp_path).fingerprint() != same
        (tmp_path / "tokenizer.json").unlink()
        assert Tokenizer.from_folder(model_folder()).fingerprint() != same


def assert_tiles(text: str, spans: list[tuple[int, int]]) -> None:
    """Spans go forward, and every character is in one. Several tokens may share a character, some have none."""
    previous_start = covered = 0
    for start, end in spans:
        assert previous_start <= start <= end
        assert start <= covered, "a gap"
        previous_start, covered = start, max(covered, end)
    assert covered == len(text)
