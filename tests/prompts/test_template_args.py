"""Arguments of a user's own reach the model's chat template, and none is passed over in silence."""

from __future__ import annotations

import pytest
from prompt_parts import CHATML, builder, byte_tokenizer, decode, document

from pipeline.errors import ConfigError, ModelError
from pipeline.settings.parse import parse_template_arg
from pipeline.settings.prompt_settings import PromptSettings, SplitSettings
from pipeline.settings.sources import merge
from pipeline.setup.intake import make_splitter

CLOSED = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
THINKING = CHATML + CLOSED


def prompt(tokenizer, **settings):
    prompts = builder(tokenizer, **settings)
    return decode(tokenizer, prompts.encode(document("a", "b?")).input_ids)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=false", False),
        ("a=False", False),
        ("a=True", True),
        ("a=FALSE", False),
        ("a=None", None),
        ("a=null", None),
        ("a=12", 12),
        ("a=-0.5", -0.5),
        ('a={"b": [1, "c"]}', {"b": [1, "c"]}),
        ('a="true"', "true"),
        ("a=high", "high"),
        ("a=b=c", "b=c"),
        ("a=NaN", "NaN"),
        ("a={b", "{b"),
        (" a = x y ", "x y"),
    ],
)
def test_values(text, value):
    name, found = parse_template_arg(text)
    assert (name, found, type(found)) == ("a", value, type(value))


@pytest.mark.parametrize("text", ["a", "=1", "a=", "a b=1", "1a=2", "a.b=1", ""])
def test_what_is_no_argument(text):
    with pytest.raises(ConfigError) as caught:
        parse_template_arg(text)
    assert str(caught.value) == (
        f"--template-arg {text!r}: write it as NAME=VALUE, for example enable_thinking=false"
    )


def test_the_template_sees_an_argument():
    tokenizer = byte_tokenizer(chat_template=THINKING)
    begins = "<|im_start|>user\na\n\nb?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(tokenizer) == begins
    assert prompt(tokenizer, template_args={"enable_thinking": True}) == begins
    assert prompt(tokenizer, template_args={"enable_thinking": False}) == (begins + "<think>\n\n</think>\n\n")


@pytest.mark.parametrize("marked", ["{% generation %}{{ role_name }}{% endgeneration %}", "{{ role_name }}"])
def test_values_of_all_kinds_reach_it(marked):
    source = "{% for n in form.list %}{{ n }}{% endfor %}" + marked + CHATML
    arguments = {"form": {"list": [1, 2]}, "role_name": "judge"}
    assert prompt(byte_tokenizer(chat_template=source), template_args=arguments).startswith("12judge")


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        (
            THINKING,
            "enable_thinkng",
            "the model's chat template does not use it (did you mean 'enable_thinking'?); it takes "
            "enable_thinking",
        ),
        (CHATML, "x", "the model's chat template does not use it; it takes no arguments"),
        ("{% set x = 1 %}" + CHATML, "x", "the model's chat template does not use it; it takes no arguments"),
        *(
            (
                THINKING,
                name,
                f"what chat templates see as {name!r} comes from the prompt or the tokenizer, and "
                "cannot be given",
            )
            for name in (
                *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
                *("bos_token", "eos_token", "tokenize", "chat_template", "strftime_now", "range", "self"),
            )
        ),
    ],
)
def test_an_argument_without_effect_is_refused(source, name, said):
    with pytest.raises(ConfigError) as caught:
        builder(byte_tokenizer(chat_template=source), template_args={name: 1})
    assert str(caught.value) == f"--template-arg {name}: {said}"


def test_a_template_may_set_what_is_not_given():
    source = "{% if mode is not defined %}{% set mode = 'slow' %}{% endif %}{{ mode }}" + CHATML
    tokenizer = byte_tokenizer(chat_template=source)
    assert prompt(tokenizer).startswith("slow<|im_start|>")
    assert prompt(tokenizer, template_args={"mode": "fast"}).startswith("fast<|im_start|>")


def test_an_argument_may_not_make_a_template_endless():
    source = (
        "{% if x is defined %}{% for a in range(x) %}{% for b in range(x) %}{{ a }}{% endfor %}{% endfor %}"
    )
    tokenizer = byte_tokenizer(chat_template=source + "{% endif %}" + CHATML)
    assert prompt(tokenizer, template_args={"x": 2}).startswith("0011<|im_start|>")
    with pytest.raises(ModelError, match=r"^the model's chat template fails: "):
        builder(tokenizer, template_args={"x": 90_000})


def test_a_model_without_a_chat_template_takes_none():
    with pytest.raises(ModelError, match=r"^the model has no chat template; "):
        builder(byte_tokenizer(chat_template=None), template_args={"enable_thinking": False})


def test_a_prompt_template_takes_none():
    with pytest.raises(ConfigError, match=r"^--template-arg and --prompt-template exclude each other: "):
        PromptSettings(prompt_template="p.jinja", template_arg=("a=1",))
    with pytest.raises(ConfigError, match=r"^--template-arg a is given twice$"):
        PromptSettings(template_arg=("a=1", "a=2"))


def test_the_stronger_of_two_places_wins():
    file, flags = {"template_arg": ("a=1",)}, {"prompt_template": "p.jinja"}
    assert merge(file, flags) == flags
    assert merge(flags, file) == file


def test_answers_of_parts_are_combined_with_the_same_arguments(tmp_path):
    tokenizer = byte_tokenizer(chat_template=THINKING)
    prompts = builder(tokenizer, template_args={"enable_thinking": False})
    splitter = make_splitter(SplitSettings(on_overlong="split"), prompts)
    assert decode(tokenizer, splitter.combine.encode(document("a")).input_ids).endswith("</think>\n\n")
    (tmp_path / "c.jinja").write_text("{{ document }}.")
    own = SplitSettings(on_overlong="split", combine_template=str(tmp_path / "c.jinja"))
    combine = make_splitter(own, prompts).combine
    assert decode(tokenizer, combine.encode(document("a")).input_ids) == "a."
