"""Templates that do more with a text than write it: those that trim are followed, others refused."""

from __future__ import annotations

import re

import pytest
from prompt_parts import CHATML, builder, byte_tokenizer, decode, document

from pipeline.errors import ConfigError, ModelError
from pipeline.records import RowError

REMEDY = "give --prompt-template FILE"


def chat(content, **settings):
    """Prompts of a chat template that writes a message by this expression."""
    return builder(byte_tokenizer(chat_template=CHATML.replace("{{ m['content'] }}", content)), **settings)


def own(tokenizer, text, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize(
    "content",
    [
        "{{ m.content | trim }}",
        "{{ m.content.strip() }}",
        "{{ m.content.lstrip() }}",
        "{{ m.content.rstrip() }}",
        "{{ m.content.strip('\n') }}",
        "{{ m.content.rstrip(' ') }}",
        "{% filter trim %}{{ m.content }}{% endfilter %}",
    ],
)
@pytest.mark.parametrize("text", ["plain", " \n a  b \u3000\n", "\ta\t", "\na\n ", "é\u00a0"])
@pytest.mark.parametrize("question", [None, "Why?", " Why? \n", " \n"])
def test_what_a_template_trims_is_trimmed(content, text, question):
    prompts = chat(content, system=" Be brief.\n")
    encoded = prompts.encode(document(text, question))
    message = text if question is None else f"{text}\n\n{question}"
    assert encoded.input_ids.tolist() == own(prompts.tokenizer, message, " Be brief.\n")


def test_a_document_that_is_trimmed_away_is_empty():
    with pytest.raises(RowError) as caught:
        chat("{{ m.content | trim }}").encode(document(" \n ", "Why?"))
    assert (caught.value.kind, str(caught.value)) == (
        "empty_document",
        "the document is white space alone, which the template leaves out",
    )


@pytest.mark.parametrize(
    ("content", "change"),
    [
        ("{{ m.content.replace('\"', '') }}", '\'"so" & <b>'),
        (r"{{ m.content | replace('\r\n', '\n') }}", r"'\r\nd"),
        ("{{ m.content | e }}", "'\\'s \"so\" &"),
        ("{{ m.content | tojson }}", '\'"so" & <b>'),
        ("{{ m.content | trim | replace('&', 'and') }}", "'& <b>"),
        ("{{ m.content[:5000] }}", "in one of 10,001 characters"),
        (
            "{% if m.content | length > 50000 %}LONG {% endif %}{{ m.content }}",
            "in one of 300,001 characters",
        ),
        ("{% if m.content | length < 9 %}SHORT {% endif %}{{ m.content }}", "becomes 'SHORT "),
    ],
)
def test_other_changes_are_refused_before_anything_runs(content, change):
    with pytest.raises(ModelError) as caught:
        chat(content)
    message = str(caught.value)
    assert message.startswith("the model's chat template changes the document: ")
    assert message.endswith(f"; {REMEDY}")
    assert change in message


@pytest.mark.parametrize("content", ["{{ m.content | upper }}", "{{ m.content | title }}"])
def test_texts_that_are_not_to_be_found_again_are_refused(content):
    message = "the model's chat template must write the document once and unchanged, but does so 0 times"
    with pytest.raises(ModelError, match=f"^{re.escape(message)}; {REMEDY}$"):
        chat(content)


def test_a_question_or_a_system_message_that_is_changed_is_named():
    upper = "{{ m.content.replace('Why', 'why') if m.role == 'system' else m.content }}"
    with pytest.raises(ModelError, match=r"^the model's chat template changes the system: 'Why\?"):
        chat(upper, system="Why?")
    template = "{{ document }}{% if question | length > 100 %}!{% endif %}{{ question }}"
    with pytest.raises(ConfigError, match=r"^the prompt template changes the question: .* in one of 101 cha"):
        builder(template=template)


@pytest.mark.parametrize("where", ["{{ document }}", "x{% filter trim %}{{ document }}{% endfilter %}y"])
def test_a_prompt_template_of_a_users_own_is_held_to_the_same(where):
    tokenizer = byte_tokenizer()
    encoded = builder(tokenizer, template=where).encode(document(" a "))
    assert decode(tokenizer, encoded.input_ids) == (" a " if where == "{{ document }}" else "xay")
    with pytest.raises(
        ConfigError, match=r"^the prompt template changes the document: .*without filter or c"
    ):
        builder(template="{% if document | length > 20000 %}!{% endif %}{{ document }}")


def test_a_text_that_the_template_treats_otherwise_is_a_row_of_its_own():
    prompts = chat("{{ m.content }}{% if '/brief' in m.content %} (briefly){% endif %}")
    assert prompts.encode(document("hello")).prompt_tokens
    with pytest.raises(RowError) as caught:
        prompts.encode(document("hello /brief"))
    assert (caught.value.kind, str(caught.value)) == (
        "template",
        "the model's chat template changes this text: '<|im_end|>\\n<|im_start|>a' becomes"
        f" ' (briefly)<|im_end|>\\n<|i'; {REMEDY}",
    )
    failing = chat(
        "{{ raise_exception('no tables') if '|' in m.content and 'x' not in m.content else m.content }}"
    )
    with pytest.raises(RowError, match=r"^the model's chat template fails for this text: no tables; give"):
        failing.encode(document("a|b"))


@pytest.mark.parametrize("question", [None, "Why?"])
def test_templates_that_look_at_the_last_message_are_followed(question):
    content = "{{ m.content }}{% if loop.last %} /think{% endif %}"
    prompts = chat(content)
    encoded = prompts.encode(document("hello", question))
    message = "hello" if question is None else f"hello\n\n{question}"
    assert encoded.input_ids.tolist() == own(prompts.tokenizer, message)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without end"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
)
def test_templates_without_end_are_one_line(content, said):
    with pytest.raises(ModelError, match=f"^the model's chat template fails: {said}.*; {REMEDY}$") as caught:
        chat(content)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=f"^prompt template: {said}"):
        builder(template=content + "{{ document }}")
