"""Templates that would take all time or memory: one line, found out by a process of its own."""

from __future__ import annotations

import os

import pytest
from prompt_parts import CHATML, builder, byte_tokenizer, document

from pipeline.errors import ConfigError, ModelError
from pipeline.prompts import trial

MEMORY = "it takes more than 1 GiB of memory"
LENGTH = "it writes more than 20,000,000 characters"
GROWS = "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """Few characters, and so much time that no machine is too slow for the other limits."""
    monkeypatch.setattr(trial, "CPU_S", 600)
    monkeypatch.setattr(trial, "MOST_CHARACTERS", 1_000_000)
    trial.VERDICTS.clear()
    yield
    trial.VERDICTS.clear()


@pytest.fixture
def little_time(monkeypatch):
    monkeypatch.setattr(trial, "CPU_S", 1)


CASES = [
    pytest.param("{{ 'a' * 10 ** 10 }}", MEMORY, id="times"),
    pytest.param("{{ '%9999999999d' % 1 }}", MEMORY, id="width"),
    pytest.param(GROWS, MEMORY, id="grows"),
    pytest.param("{{ 'a' * 10 ** 7 }}", LENGTH, id="long"),
]


@pytest.mark.parametrize(("text", "fault"), CASES)
def test_a_template_that_explodes_is_an_error_in_one_line(text, fault):
    told_of(text, fault)


@pytest.mark.slow
def test_one_that_never_ends_is_an_error_in_one_line_too(little_time):
    told_of(NESTED, "it takes more than 1 s")


def told_of(text, fault):
    with pytest.raises(ConfigError) as refused:
        builder(template="{{ document }}" + text)
    assert str(refused.value) == f"prompt template: {fault}"
    with pytest.raises(ModelError) as told:
        builder(byte_tokenizer(chat_template=CHATML + text))
    assert str(told.value) == f"the model's chat template fails: {fault}; give --prompt-template FILE"


@pytest.mark.slow
def test_a_document_cannot_make_it_explode_either(little_time):
    loops = "{% for a in document.splitlines() %}" * 3 + "{{ 'a' }}" + "{% endfor %}" * 3
    with pytest.raises(ConfigError, match=r"^prompt template: it (takes more than 1 s|writes more than)"):
        builder(template="{{ document }}" + loops)


def test_one_that_is_nested_too_deeply_is_an_error_too():
    with pytest.raises(ConfigError, match=r"^prompt template: .*nested too deeply$"):
        builder(template="{{ document }}{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}")


def test_what_was_tried_once_and_what_is_but_text_is_not_tried(monkeypatch):
    prompts = builder(byte_tokenizer(), template=None)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("tried again"))
    assert builder(byte_tokenizer()).encode(document("a")).prompt_tokens
    assert builder(template="{% if question %}{{ question }}: {% endif %}{{ document }}").uses_question
    assert prompts.uses_question


def test_a_trial_that_brings_its_process_down_is_told():
    with pytest.raises(trial.TemplateError, match=r"^it brings down the process that renders it$"):
        trial.check_ends("abort", lambda: os.abort())


def test_a_signal_to_the_runs_group_is_no_fault_of_the_template():
    own = os.getpgrp()
    trial.check_ends("group", lambda: ["x"] if os.getpgrp() != own else os.abort())
