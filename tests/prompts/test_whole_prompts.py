"""Prompts that a row says whole: their tokens are those of the text, whatever the chat template is."""

from __future__ import annotations

import random

import pytest
from prompt_parts import CHATML, builder, byte_tokenizer, space_tokenizer, span_text

from pipeline.errors import ModelError
from pipeline.inputs.conversations import conversation, whole_prompt
from pipeline.prompts.splitting import Splitter
from pipeline.records import Document, Row, RowError

BITS = ["hello", "The", " ", "\n", "\n\n", "é", "数据🙂", ".", "he", " w", "<|im_end|>", "</s>", "<note>"]
TOKENIZERS = {
    "bytes": byte_tokenizer,
    "space first": space_tokenizer,
    "space always": lambda: space_tokenizer("always"),
    "normalizer": lambda: space_tokenizer("normalizer"),
}


def row(said):
    source = Row(row=0, id="r", place="in.jsonl line 1", question=said.question, turns=said.turns)
    return Document(source=source, text=said.text)


def prompt(text):
    return row(whole_prompt("prompt", text))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_those_of_the_text(name):
    tokenizer, draw = TOKENIZERS[name](), random.Random(name)
    prompts, controls = builder(tokenizer), 0
    for _ in range(150):
        text = "a" + "".join(draw.choices(BITS, k=draw.randint(1, 12)))
        encoded = prompts.encode(prompt(text))
        assert encoded.input_ids.tolist() == tokenizer.encode(text), text
        controls += any(token in tokenizer.added_tokens_decoder for token in encoded.input_ids[1:])
    assert controls > 10


def test_a_prompt_that_begins_as_the_tokenizer_does_has_one_beginning():
    tokenizer = space_tokenizer()
    encoded = builder(tokenizer).encode(prompt("<s>he said</s>"))
    assert encoded.input_ids.tolist() == tokenizer.encode("<s>he said</s>", add_special_tokens=False)
    assert encoded.input_ids.tolist().count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("text", "document", "question"),
    [
        ("a long document\n\nWhy?", "a long document", "Why?"),
        ("Summarise.\n\na long document", "a long document", "Summarise."),
        ("one paragraph alone", "one paragraph alone", ""),
        ("the same\n\nthe same", "the same", "the same"),
    ],
)
def test_the_longer_part_is_the_document(text, document, question):
    tokenizer = byte_tokenizer()
    encoded = builder(tokenizer).encode(prompt(text))
    spans = [span_text(tokenizer, encoded, span) for span in (encoded.spans.document, encoded.spans.question)]
    assert spans == [document, question]
    assert encoded.reasoning is None


def test_messages_and_prompts_stand_beside_each_other():
    prompts = builder(byte_tokenizer(chat_template=CHATML))
    said = [{"role": "user", "content": "hello"}]
    chat, plain = prompts.encode(row(conversation("messages", said))), prompts.encode(prompt("hello"))
    assert chat.prompt_tokens > plain.prompt_tokens
    assert chat.reasoning is not None


def test_a_model_without_chat_template_takes_prompts_and_no_messages():
    prompts = builder(byte_tokenizer(chat_template=None), template="{{ document }}")
    assert prompts.encode(prompt("hello")).prompt_tokens == 1
    with pytest.raises(ModelError, match="the model has no chat template; give --prompt-template FILE"):
        prompts.encode(row(conversation("messages", [{"role": "user", "content": "hello"}])))


def test_a_system_message_has_no_place():
    with pytest.raises(RowError, match="a whole prompt has no place for the text of --system") as caught:
        builder(system="Be brief.").encode(prompt("hello"))
    assert caught.value.kind == "template"


def test_a_prompt_that_is_too_long_is_cut_or_split():
    text = "one two three. " * 40 + "\n\nWhy?"
    cut = builder(context=200, on_overlong="truncate-middle")
    assert cut.encode(prompt(text)).prompt_tokens == cut.limit
    prompts = builder(context=400, on_overlong="split")
    parts = Splitter(prompts=prompts, combine=prompts, overlap=8).encode(prompt(text)).prompts
    assert len(parts) > 1
    for part in parts:
        assert span_text(byte_tokenizer(), part, part.spans.question) == "Why?"
        assert part.prompt_tokens <= prompts.limit
