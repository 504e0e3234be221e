"""Templates, from the model or a file: what they must write, and which ones are refused."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
from prompt_parts import CHATML, INST, builder, byte_tokenizer, decode, document, space_tokenizer
from tokenizers import normalizers

from pipeline.errors import ConfigError, ModelError

ONCE = "the {} must write the {} once and unchanged, but does so {} times"
NO_SYSTEM = "this model's chat template takes no system message: "


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "a\n{{ document",
            "prompt template line 2: unexpected end of template, expected 'end of print statement'.",
        ),
        (
            "\n\n{{ document }}{{ text }}",
            "prompt template line 3: 'text' is undefined; use document, question, system or row",
        ),
        ("{{ question }}", ONCE.format("prompt template", "document", 0)),
        ("{{ document }}{{ document }}", ONCE.format("prompt template", "document", 2)),
        ("{{ document }}{{ question }}{{ question }}", ONCE.format("prompt template", "question", 2)),
        ("{% filter upper %}{{ document }}{% endfilter %}", ONCE.format("prompt template", "document", 0)),
        ("{% if question %}{{ document }}{% endif %}", ONCE.format("prompt template", "document", 0)),
        (
            "\n{{ document[:100] }}",
            "prompt template line 2: write {{ document }} alone, without filter or expression",
        ),
        ("{{ document }}{% for i in range(10 ** 9) %}{% endfor %}", "prompt template: Range too big."),
        (
            "{{ document }}{{ ''.__class__.__mro__ }}",
            "prompt template: access to attribute '__class__' of 'str' object is unsafe.",
        ),
        ("{{ document }}{{ 1 // 0 }}", "prompt template: integer division or modulo by zero"),
    ],
)
def test_template_errors(template: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        builder(template=template)
    assert str(caught.value).startswith(message)


def test_system_needs_a_place_in_the_template() -> None:
    with pytest.raises(ConfigError, match=r"must write the system once"):
        builder(template="{{ document }}", system="Be brief.")


def test_system_that_cannot_be_tokenized() -> None:
    with pytest.raises(
        ConfigError, match=r"^system message or prompt template: the text is not valid Unicode"
    ):
        builder(system="\udcff")


def test_question_needs_a_place_in_the_template() -> None:
    prompts = builder(template="Summarise: {{ document }}")
    assert not prompts.uses_question
    assert prompts.encode(document("abc")).spans.question == (14, 14)
    with pytest.raises(ConfigError) as caught:
        prompts.encode(document("abc", "Why?"))
    assert str(caught.value) == (
        "in.jsonl line 1 has a question, but the prompt template has no place for it:"
        " write {{ question }} there"
    )


def test_question_is_optional_in_a_template() -> None:
    tokenizer = byte_tokenizer()
    prompts = builder(
        tokenizer, template="{{ document }}\n{% if question %}\nQ: {{ question }}\n{% endif %}\nA:\n"
    )
    assert prompts.uses_question
    assert decode(tokenizer, prompts.encode(document("abc")).input_ids) == "abc\nA:"
    encoded = prompts.encode(document("abc", "Why?"))
    assert decode(tokenizer, encoded.input_ids) == "abc\nQ: Why?\nA:"


@pytest.mark.parametrize(
    ("template", "settings", "kind", "message"),
    [
        (None, {}, ModelError, "the model has no chat template; give --prompt-template FILE"),
        (INST, {"system": "S"}, ConfigError, NO_SYSTEM + "Only user and assistant roles are supported!"),
        ("{{ messages[-1]['content'] }}", {"system": "S"}, ConfigError, NO_SYSTEM + "it leaves it out"),
        (
            "{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}",
            {},
            ModelError,
            ONCE.format("model's chat template", "document", 2),
        ),
        (
            "{{ raise_exception('no') }}",
            {"system": "S"},
            ModelError,
            "the model's chat template fails: no; give --prompt-template FILE",
        ),
        ("{{ messages[0]['content'] + 1 }}", {}, ModelError, "the model's chat template fails: "),
    ],
)
def test_chat_template_errors(template: str | None, settings: Any, kind: type, message: str) -> None:
    with pytest.raises(kind) as caught:
        builder(byte_tokenizer(chat_template=template), **settings)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("template", "start"),
    [
        ("{{ document }}", "<s>▁hi"),
        ("<s>{{ document }}", "<s>hi"),
        ("he {{ document }}", "<s>▁he▁hi"),
    ],
)
def test_bos_of_a_template_file(template: str, start: str) -> None:
    tokenizer = space_tokenizer()
    encoded = builder(tokenizer, template=template).encode(document("hi"))
    assert "".join(tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())) == start


def test_tokenizers_that_lose_text_are_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
    with pytest.raises(ModelError, match=r"^the tokenizer .* does not decode to the text encoded$"):
        builder(tokenizer)


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(ModelError, match="has no fast version"):
        builder(SimpleNamespace(is_fast=False))


def test_template_hash() -> None:
    assert builder(system="S").template_hash == hashlib.sha256(f"{CHATML}\0S".encode()).hexdigest()
    hashes = [
        builder(**settings).template_hash
        for settings in ({}, {"template": "{{ document }}"}, {"system": "S"})
    ]
    assert len(set(hashes)) == 3
