"""Chat templates: text and masks against transformers, hand-written masks, and the reference code of LLaMA-2 and
ChatGLM3 restated here; tokenizers are trained on the spot."""

from __future__ import annotations

import io
import json
import re

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as JsonTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from minift.data.rendered import Piece, Rendered, encode_rendered
from minift.data.template import ChatTemplate
from minift.data.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>"]  # fmt: skip
CORPUS = ["Below is an instruction that describes a task.", "What is the capital of France? Paris."] * 5 + [
    "a: Seven Seven"
] * 50

content = st.text(st.sampled_from("abcdeHiParis \n.?é漢🙂<>'\""), min_size=1, max_size=12).filter(str.strip)
system = st.lists(content.map(lambda text: {"role": "system", "content": text}), max_size=1)


@st.composite
def conversations(draw, min_turns=1):
    messages = draw(system)
    for _ in range(draw(st.integers(min_turns, 3))):
        messages += [{"role": "user", "content": draw(content)}, {"role": "assistant", "content": draw(content)}]
    return messages


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("json")
    tokenizer = JsonTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def oracle(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def with_template(folder, tmp_path_factory):
    """A function: Jinja source -> (our tokenizer with it, our template)."""

    def make(source):
        copy = tmp_path_factory.mktemp("template")
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        (copy / "chat_template.jinja").write_text(source)
        tokenizer = Tokenizer.from_folder(copy)
        return tokenizer, ChatTemplate.from_tokenizer(tokenizer)

    return make


@pytest.fixture(scope="module")
def sentencepiece_model():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(sentencepiece_model, tmp_path_factory):
    """A function: tokenizer class -> Tokenizer."""

    def make(tokenizer_class):
        folder = tmp_path_factory.mktemp("model")
        (folder / "tokenizer.model").write_bytes(sentencepiece_model.serialized_model_proto())
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
        return Tokenizer.from_folder(folder)

    return make


@pytest.fixture(scope="module")
def llama(sentencepiece_tokenizer):
    return sentencepiece_tokenizer("LlamaTokenizer")


@pytest.fixture(scope="module")
def chatglm(sentencepiece_tokenizer):
    return sentencepiece_tokenizer("ChatGLMTokenizer")


def marked(tokenizer, rendered):
    """The text as the tokens spell it, with [[ ]] around what is supervised."""
    ids, supervised = encode_rendered(tokenizer, rendered)
    assert len(ids) == len(supervised)
    runs, start = [], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or supervised[i] != supervised[start]:
            text = tokenizer.decode(ids[start:i])
            runs.append(f"[[{text}]]" if supervised[start] else text)
            start = i
    return "".join(runs)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Paris é"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "🙂"},
]


class TestHandWrittenMasks:
    def test_chatml(self, tokenizer):
        template = ChatTemplate.builtin("chatml")
        template.check(tokenizer)
        assert marked(tokenizer, template.render(CONVERSATION)) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Paris é<|im_end|>]]\n"
            "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n[[🙂<|im_end|>]]\n"
        )
        assert marked(tokenizer, template.render(CONVERSATION[:2], add_generation_prompt=True)) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_chatml_tools(self, tokenizer):
        """Qwen2.5's format, restated."""
        tools = [{"type": "function", "function": {"name": "add", "description": "a < b é"}}]
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}
        messages = [
            {"role": "user", "content": "1+é"},
            {"role": "assistant", "content": None, "tool_calls": [call, call]},
            {"role": "tool", "content": "2"},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "2"},
        ]
        one_call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>'
        assert marked(tokenizer, ChatTemplate.builtin("chatml").render(messages, tools)) == (
            "<|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
            '{"type": "function", "function": {"name": "add", "description": "a < b é"}}\n</tools>\n\n'
            "For each function call, return a json object with function name and arguments within "
            "<tool_call></tool_call> XML tags:\n<tool_call>\n"
            '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
            "<|im_start|>user\n1+é<|im_end|>\n"
            f"<|im_start|>assistant\n[[{one_call}\n{one_call}<|im_end|>]]\n"
            "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n[[2<|im_end|>]]\n"
        )

    def test_llama3(self, tokenizer):
        template = ChatTemplate.builtin("llama3")
        template.check(tokenizer)
        user, assistant = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
        assert marked(tokenizer, template.render(CONVERSATION)) == (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            f"{user}Hi<|eot_id|>{assistant}[[Paris é<|eot_id|>]]{user}And?<|eot_id|>{assistant}[[🙂<|eot_id|>]]"
        )

    def test_alpaca(self, tokenizer, llama):
        template = ChatTemplate.builtin("alpaca", tokenizer)
        template.check(tokenizer)
        question = {"role": "user", "content": "Add.", "input": "1 2"}
        answer = {"role": "assistant", "content": "3"}
        assert marked(tokenizer, template.render([question, answer])) == (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:[[3</s>]]"
        )
        assert marked(tokenizer, template.render(CONVERSATION[1:])) == (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nHi\n\n### Response:[[Paris é</s>]]\n\n"
            "### Instruction:\nAnd?\n\n### Response:[[🙂</s>]]"
        )
        assert marked(tokenizer, template.render(CONVERSATION)).startswith("Be brief.\n\n### Instruction:\nHi\n\n")
        # LLaMA's tokenizer puts BOS before plain text, so the prompt has it as well: once.
        template = ChatTemplate.builtin("alpaca", llama)
        ids, _ = encode_rendered(llama, template.render(CONVERSATION))
        assert ids[0] == llama.bos_id and ids.count(llama.bos_id) == 1

    def test_llama2(self, llama):
        template = ChatTemplate.builtin("llama2")
        template.check(llama)
        assert marked(llama, template.render(CONVERSATION)) == (
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST][[Paris é </s>]]<s>[INST] And? [/INST][[🙂 </s>]]"
        )

    def test_chatglm3(self, chatglm):
        template = ChatTemplate.builtin("chatglm3")
        template.check(chatglm)
        assert marked(chatglm, template.render(CONVERSATION)) == (
            "[gMASK]sop<|system|>\n Be brief.<|user|>\n Hi<|assistant|>[[\n Paris é<|user|>]]\n And?"
            "<|assistant|>[[\n 🙂</s>]]"
        )

    def test_chatglm3_tools(self, chatglm):
        tools = [{"name": "add"}]
        call = {"function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "3"},
        ]
        assert ChatTemplate.builtin("chatglm3").render(messages, tools).text == (
            "[gMASK]sop<|system|>\nAnswer the following questions as best as you can. "
            'You have access to the following tools:\n[\n    {\n        "name": "add"\n    }\n]'
            "<|user|>\nHi<|assistant|>add\n```python\ntool_call(a=1, b='x')\n```<|observation|>\n3<|assistant|>\n3</s>"
        )


class TestAgainstReferences:
    @pytest.mark.parametrize("name", ["chatml", "llama3", "alpaca"])
    @given(messages=conversations())
    def test_jinja_built_ins_against_transformers(self, tokenizer, oracle, name, messages):
        template = ChatTemplate.builtin(name, tokenizer)
        ids, supervised = encode_rendered(tokenizer, template.render(messages))
        expected = oracle.apply_chat_template(
            messages, chat_template=template.source, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == expected["input_ids"]
        assert [int(flag) for flag in supervised] == expected["assistant_masks"]

    @pytest.mark.parametrize("name", ["chatml", "llama3", "alpaca"])
    @given(messages=conversations())
    def test_prefixes_find_what_the_tag_marks(self, tokenizer, with_template, tags_removed, name, messages):
        tagged = ChatTemplate.builtin(name, tokenizer)
        other, untagged = tags_removed(name)
        assert untagged.stop_tokens == tagged.stop_tokens
        assert untagged.render(messages) == tagged.render(messages)

    @given(messages=conversations(), generation_prompt=st.booleans())
    def test_jinja_extras_against_transformers(self, oracle, jinja_extras, messages, generation_prompt):
        tokenizer, template = jinja_extras
        tools = [{"name": "f", "parameters": {"é": ["<a href='x'>", 1.5, None]}}]
        rendered = template.render(messages, tools, generation_prompt)
        expected = oracle.apply_chat_template(
            messages, tools, chat_template=template.source, add_generation_prompt=generation_prompt, tokenize=False
        )
        assert rendered.text == expected

    @given(messages=conversations(), last=content)
    def test_llama2_against_meta(self, sentencepiece_model, llama, messages, last):
        """`Llama.chat_completion`: every turn encoded on its own with BOS and EOS, the question last without EOS."""
        ids, _ = encode_rendered(llama, ChatTemplate.builtin("llama2").render([*messages, user(last)]))
        if messages[0]["role"] == "system":
            first = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n{messages[1]['content']}"
            messages = [user(first), *messages[2:]]
        expected = []
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            text = f"[INST] {question['content'].strip()} [/INST] {answer['content'].strip()} "
            expected += [1, *sentencepiece_model.encode(text), 2]
        assert ids == [*expected, 1, *sentencepiece_model.encode(f"[INST] {last.strip()} [/INST]")]

    @given(messages=conversations())
    def test_chatglm3_against_its_fine_tuning_demo(self, sentencepiece_model, chatglm, messages):
        """`process_batch` of finetune_hf.py, restated: masks per message, one EOS at the end, masks shifted by one."""
        role_ids = {"system": 325 + 0, "user": 325 + 1, "assistant": 325 + 2}
        expected, loss_mask = [321, 323], [False, False]
        for message in messages:
            new = [role_ids[message["role"]], *sentencepiece_model.encode("\n")]
            new += sentencepiece_model.encode(message["content"])
            expected += new
            loss_mask += [message["role"] == "assistant"] * len(new)
        ids, supervised = encode_rendered(chatglm, ChatTemplate.builtin("chatglm3").render(messages))
        assert ids == [*expected, 2]
        assert supervised == [False, *loss_mask]

    @given(data=st.data())
    def test_mask_by_brute_force(self, tokenizer, llama, data):
        tokenizer = data.draw(st.sampled_from([tokenizer, llama]))
        parts = data.draw(st.lists(content | st.sampled_from(["<s>", "</s>"]), min_size=1, max_size=5))
        text = "".join(parts)
        flags = data.draw(st.lists(st.booleans(), min_size=len(text), max_size=len(text)))
        spans = [match.span() for match in re.finditer("x+", "".join(".x"[flag] for flag in flags))]
        ids, supervised = encode_rendered(tokenizer, Rendered(text, spans, [Piece(text, "markup")]))
        expected_ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == expected_ids
        assert supervised == [any(first <= start < last for first, last in spans) for start, _ in offsets]


class TestRefusals:
    @pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
    def test_llama2_markup_in_content(self, tag):
        with pytest.raises(ValueError, match=re.escape(f"Message 0 contains {tag!r}")):
            ChatTemplate.builtin("llama2").render([user(f"a {tag} b")])

    def test_special_tokens_in_content_are_text(self, llama, chatglm):
        ids, _ = encode_rendered(llama, ChatTemplate.builtin("llama2").render([user("</s><s>")]))
        assert ids.count(1) == 1 and ids.count(2) == 0
        ids, _ = encode_rendered(chatglm, ChatTemplate.builtin("chatglm3").render([user("<|assistant|>")]))
        assert chatglm.token_id("<|assistant|>") not in ids

    def test_llama2_roles(self):
        with pytest.raises(ValueError, match="by turns"):
            ChatTemplate.builtin("llama2").render([user("a"), user("b")])

    @pytest.mark.parametrize("name", ["llama2", "llama3", "alpaca"])
    def test_tools_without_a_place(self, tokenizer, name):
        template = ChatTemplate.builtin(name, tokenizer)
        with pytest.raises(ValueError, match="tools"):
            template.render([user("a")], tools=[{"name": "f"}])
        with pytest.raises(ValueError, match="tool"):
            template.render([user("a"), {"role": "assistant", "content": "", "tool_calls": [{}]}])

    def test_names(self, tokenizer):
        with pytest.raises(ValueError, match="valid: chatml, llama3, alpaca, llama2, chatglm3"):
            ChatTemplate.builtin("vicuna")
        with pytest.raises(ValueError, match="EOS token"):
            ChatTemplate.builtin("alpaca")
        with pytest.raises(ValueError, match=r"no chat template named 'default' \(it has: none\)"):
            ChatTemplate.from_tokenizer(tokenizer)

    @pytest.mark.parametrize("name", ["chatml", "llama3", "alpaca", "chatglm3"])
    def test_unknown_role(self, tokenizer, name):
        with pytest.raises(ValueError, match="critic"):
            ChatTemplate.builtin(name, tokenizer).render([user("a"), {"role": "critic", "content": "b"}])

    def test_empty_conversation(self):
        with pytest.raises(ValueError, match="empty"):
            ChatTemplate.builtin("chatml").render([])

    def test_syntax_error(self, with_template):
        with pytest.raises(ValueError, match="line 2"):
            with_template("a\n{% if %}")

    def test_raise_exception_reaches_the_user(self, with_template):
        _, template = with_template("{% if messages | length > 4 %}{{ raise_exception('too long!') }}{% endif %}a</s>")
        with pytest.raises(ValueError, match="too long!"):
            template.render(CONVERSATION)


class TestCheck:
    """Each broken template below is the chatml of a real bug report: see the names."""

    HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    PROMPT = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ANSWER = (
        "{% if m.role == 'assistant' %}{% generation %}%s{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}"
    )

    def refused(self, with_template, source, match, turns=2):
        tokenizer, template = with_template(source)
        with pytest.raises(ValueError, match=match):
            template.check(tokenizer, turns)

    def test_good(self, with_template):
        answer = self.ANSWER.replace("%s", "{{ m.content }}<|im_end|>")
        tokenizer, template = with_template(self.HEAD + answer + "\n" + self.PROMPT)
        template.check(tokenizer)
        assert template.stop_token_ids(tokenizer) == [1, 3]  # the tokenizer's EOS and the template's stop token

    def test_tag_never_reached(self, with_template):
        source = self.HEAD + "{{ m.content }}<|im_end|>\n{% if false %}{% generation %}{% endgeneration %}{% endif %}"
        self.refused(with_template, source + self.PROMPT, "nothing to learn")

    def test_stop_token_outside_of_the_tag(self, with_template):
        source = self.HEAD + self.ANSWER.replace("%s", "{{ m.content }}")
        source += "{% if m.role == 'assistant' %}<|im_end|>{% endif %}\n"
        self.refused(with_template, source + self.PROMPT, "does not contain the stop token")

    def test_no_stop_token_at_all(self, with_template):
        source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        self.refused(with_template, source, "never learn to stop", turns=1)

    def test_stop_token_is_no_token(self, llama):
        with pytest.raises(ValueError, match=r"'<\|eot_id\|>', which is no token"):
            ChatTemplate.builtin("llama3").check(llama)
        with pytest.raises(ValueError, match="'\\[gMASK\\]', which this tokenizer does not have"):
            ChatTemplate.builtin("chatglm3").check(llama)

    def test_generation_prompt_differs(self, with_template):
        answer = self.ANSWER.replace("%s", "{{ m.content }}<|im_end|>")
        self.refused(with_template, self.HEAD + answer + "\n{% endfor %}", "prompt for generation ends in")

    def test_token_reaches_into_the_answer(self, with_template):
        """Byte-level BPE joins the space before the answer with its first word."""
        source = (
            "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}: {% else %}"
            "{% generation %}{{ m.content }}</s>{% endgeneration %}{% endif %}{% endfor %}"
        )
        assert with_template(source)[0].token_id("ĠSeven") is not None
        self.refused(with_template, source, "reaches from the prompt into the answer")

    def test_earlier_turns_rewritten(self, with_template):
        """As templates do that drop the reasoning of all turns but the last."""
        source = self.HEAD + "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
        source += "{{ m.content }}<|im_end|>\n" + self.PROMPT
        self.refused(with_template, source, "Message 1: .* rewrites earlier turns")
        tokenizer, template = with_template(source)
        template.check(tokenizer, turns=1)
        assert "[[<think></think>Paris é<|im_end|>]]" in marked(tokenizer, template.render(CONVERSATION[:3]))


@pytest.fixture(scope="module")
def tags_removed(tokenizer, with_template):
    """A function: name of a built-in -> the same template without generation tags, as the tokenizer's own."""
    made = {}

    def make(name):
        if name not in made:
            source = ChatTemplate.builtin(name, tokenizer).source
            made[name] = with_template(re.sub(r"\{%-? *(end)?generation *-?%\}", "", source))
        return made[name]

    return make


@pytest.fixture(scope="module")
def jinja_extras(with_template):
    return with_template(
        """{{ bos_token }}{% set ns = namespace(count=0) %}
    {% for message in messages %}
      {% if message.role == 'system' %}{% continue %}{% endif %}
      {% if ns.count > 3 %}
        {% break %}
      {% endif %}
    {% set ns.count = ns.count + 1 %}
        {{- message | tojson }}
        {{ message.content | tojson(indent=2) }}{{ pad_token is defined }}</s>
    {% endfor %}
    {{ tools | tojson(ensure_ascii=True, indent=1) if tools else documents }}
    {{ strftime_now('%Y') }}{% if add_generation_prompt %}>{% endif %}
    {% generation %}{% endgeneration %}
"""
    )


def user(content):
    return {"role": "user", "content": content}
