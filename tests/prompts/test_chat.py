"""Which chat template is used, and which day it prints."""

from __future__ import annotations

from datetime import datetime

import pytest
from prompt_parts import CHATML, builder, byte_tokenizer, decode, document

from pipeline.errors import ModelError
from pipeline.prompts.chat import ChatTemplate, parse_moment

NOW = datetime(2026, 2, 3, 4, 5, 6)
DATED = "{% set today = strftime_now('FORMAT') %}Today: {{ today }}\n" + CHATML


def named(**templates):
    return byte_tokenizer(chat_template=templates)


def test_of_several_templates_the_default_is_used():
    tokenizer = named(rag="RAG" + CHATML, default=CHATML)
    assert decode(tokenizer, builder(tokenizer).encode(document("a")).input_ids).startswith(
        "<|im_start|>user"
    )


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("tool_use", "rag"), "the model has the chat templates rag, tool_use, and no default"),
        (("rag",), "the model has the chat template rag, and no default"),
        ((), "the model has no chat template"),
    ],
)
def test_without_a_default_the_names_are_told(names, said):
    tokenizer = named(**dict.fromkeys(names, CHATML))
    with pytest.raises(ModelError, match=f"^{said}; give --prompt-template FILE$"):
        builder(tokenizer)
    assert builder(tokenizer, template="{{ document }}").encode(document("a")).prompt_tokens == 1


def rendered(form, now=NOW):
    prompts = builder(byte_tokenizer(chat_template=DATED.replace("FORMAT", form)), now=now)
    return decode(prompts.tokenizer, prompts.encode(document("a")).input_ids).split("\n")[0], prompts.moment


@pytest.mark.slow
@pytest.mark.parametrize(
    "form", ["%d %b %Y", "%Y-%m-%d", "%-d.%-m.%y", "%A, %B %-d", "%j", "100%% %Y", "%%d", "no day", "so %F"]
)
def test_the_day_is_the_given_one(form):
    text, moment = rendered(form)
    assert text == f"Today: {NOW.strftime(form)}"
    assert moment == (None if form in ("%%d", "no day") else "2026-02-03")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["%H:%M", "%d %b %Y %X", "%-I %p"])
def test_where_the_time_is_printed_the_moment_is_kept(form):
    text, moment = rendered(form)
    assert (text, moment) == (f"Today: {NOW.strftime(form)}", "2026-02-03T04:05:06")
    assert parse_moment(moment) == NOW


def test_the_given_day_prints_the_same_again():
    text, moment = rendered("%d %b %Y")
    assert rendered("%d %b %Y", parse_moment(moment)) == (text, moment)


@pytest.mark.parametrize("start", ["", "\n", " \n{%- if true %}\n{% endif %}"])
def test_a_clock_that_stands_still_changes_nothing_else(start):
    source = start + DATED.replace("FORMAT", "%Y") + "{{ strftime_now is defined }}"
    tokenizer = byte_tokenizer(chat_template=source)
    messages = [{"role": "user", "content": "a"}]
    own = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    chat = ChatTemplate.of(tokenizer, None, datetime.now())
    assert chat.render({"document": "a", "question": "", "system": ""}) == own


def test_a_day_that_is_not_printed_is_none_of_the_prompts():
    never = "{% if tools %}{{ strftime_now('%Y') }}{% endif %}" + CHATML
    assert builder(byte_tokenizer(chat_template=never)).moment is None
    assert builder().moment is None
    assert builder(byte_tokenizer(chat_template=DATED), template="{{ document }}").moment is None


def test_the_day_is_no_part_of_the_templates_hash():
    tokenizer = byte_tokenizer(chat_template=DATED.replace("FORMAT", "%Y"))
    assert len({builder(tokenizer, now=NOW).template_hash, builder(tokenizer).template_hash}) == 1
