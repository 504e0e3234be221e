"""What ends by itself has its form, whatever the tokenizer and whatever is drawn."""

from __future__ import annotations

import json
import math
import random
import re

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from prompt_parts import byte_tokenizer, space_tokenizer

from pipeline.checkpoints.random_weights import byte_tokenizer as single_bytes
from pipeline.errors import ConfigError
from pipeline.generation.guide import Guide, fill_guided
from pipeline.records import ResponseFormat
from pipeline.structured.binding import BoundForms
from pipeline.structured.grammars import JSON_OBJECT, choices_format, json_schema_format
from pipeline.structured.matchers import fill_masks, mask_of
from pipeline.values.json_answers import is_valid, schema_text

VOCAB = 512
TOKENIZERS = {
    "bytes": single_bytes,
    "byte-level BPE": byte_tokenizer,
    "SentencePiece": space_tokenizer,
    "SentencePiece, by a normalizer": lambda: space_tokenizer("normalizer"),
    "SentencePiece without bytes": lambda: space_tokenizer(byte_fallback=False),
}
SCHEMA = {
    "type": "object",
    "properties": {
        "law": {"type": "string", "maxLength": 6},
        "year": {"type": ["integer", "null"], "minimum": 0, "maximum": 3000},
        "parties": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": {"role": {"enum": ["buyer", "seller"]}, "named": {"type": "boolean"}},
                "required": ["role", "named"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["law", "year", "parties"],
    "additionalProperties": False,
}
REGEXES = (r"[0-9]{4}-[a-z ]{1,9}", r" ?yes|  no|he+llo", r"(a|b\nc){2,4}\.?", r"[^x]{3}", r"[a/]*")
CHOICES = ("yes", "no", "not stated", "not said", "he said hello", "he", "<|im_end|>", "\N{EURO SIGN} 5")


def bound(name="bytes", vocab=VOCAB, stops=None):
    tokenizer = TOKENIZERS[name]()
    return BoundForms(tokenizer, vocab, [tokenizer.eos_token_id] if stops is None else stops)


def allowed(mask_W, vocab=VOCAB):
    return np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little")[:vocab]).tolist()


def drawn(forms, form, seed, most=400, after=None):
    """A matcher at its end, and the tokens that were drawn of those that it allows."""
    matcher, tokens, draws = forms.matcher(form, after), [], random.Random(seed)
    mask_W = np.zeros(forms.words, np.int32)
    while not matcher.is_ended:
        fill_masks({0: matcher}, mask_W[None])
        assert matcher.error is None
        token = draws.choice(allowed(mask_W))
        matcher.take(token)
        if token in forms.stops:
            break
        tokens.append(token)
        assert len(tokens) < most
    assert matcher.is_complete
    return matcher, tokens


@pytest.mark.parametrize("name", TOKENIZERS)
def test_json_is_valid_under_its_schema(name):
    forms, check = bound(name), Draft202012Validator(SCHEMA)
    answers = set()
    for seed in range(20):
        matcher, tokens = drawn(forms, json_schema_format(SCHEMA), seed)
        check.validate(json.loads(matcher.text))
        assert list(json.loads(matcher.text)) == list(SCHEMA["properties"])
        assert "\n" not in matcher.text
        assert matcher.text == forms._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        answers.add(matcher.text)
    assert len(answers) > 10


@pytest.mark.parametrize("regex", REGEXES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_match_their_regular_expression(name, regex):
    if "without bytes" in name and r"\n" in regex:
        pytest.skip("the tokenizer writes no line's end")
    forms = bound(name)
    texts = {drawn(forms, ResponseFormat("regex", regex), seed)[0].text for seed in range(20)}
    assert all(re.fullmatch(regex, text) for text in texts), texts
    assert len(texts) > 2


@pytest.mark.parametrize("after", [None, ord("a")], ids=["turn", "word"])
@pytest.mark.parametrize("name", [name for name in TOKENIZERS if "without bytes" not in name])
def test_choices_are_written_as_the_tokenizer_does(name, after):
    forms = bound(name)
    texts = set()
    for seed in range(200):
        matcher, tokens = drawn(forms, choices_format(CHOICES), seed, after=after)
        texts.add(matcher.text)
        assert forms._tokenizer.decode(tokens).strip() == matcher.text
    assert texts == set(CHOICES)


def test_behind_a_word_a_choice_begins_with_a_space():
    forms = bound("byte-level BPE")
    space = forms._tokenizer.convert_tokens_to_ids("Ġ")

    def first(after):
        matcher, mask_W = forms.matcher(choices_format(("yes", "no")), after), np.zeros(forms.words, np.int32)
        fill_masks({0: matcher}, mask_W[None])
        return allowed(mask_W)

    tokens = forms._tokenizer.convert_tokens_to_ids
    assert first(tokens(":")) == [space]
    begins = sorted([tokens("y"), tokens("n")])
    assert first(tokens("Ċ")) == first(tokens("<|im_start|>")) == first(None) == begins


def test_an_object_is_json_of_any_kind():
    forms = bound()
    matcher, mask_W = forms.matcher(JSON_OBJECT), np.zeros(forms.words, np.int32)
    fill_masks({0: matcher}, mask_W[None])
    assert allowed(mask_W) == forms._tokenizer.encode("{")
    for token in forms._tokenizer.encode('{"a": [1, {}]}'):
        matcher.take(token)
    assert (matcher.is_complete, matcher.is_ended, matcher.text) == (True, True, '{"a": [1, {}]}')


NAMES = {"type": "object", "properties": {"a": {"type": "integer"}, 'q"': {}}}
BY_PATTERN = {"patternProperties": {"^a": {"type": "integer"}}, "type": "object"}


@pytest.mark.parametrize("name", ["bytes", "SentencePiece"])
@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        (NAMES, r'{"a":1,"\u0061":"x"}'),
        (NAMES, r'{"\u0061":"x"}'),
        ({**NAMES, "additionalProperties": {"type": "string"}}, r'{"a":1,"\u0061":"x"}'),
        ({"anyOf": [{"type": "null"}, BY_PATTERN]}, r'{"\u0061b":"x"}'),
    ],
)
def test_no_name_is_spelled_so_that_its_schema_is_passed_over(schema, answer, name):
    assert not is_valid(answer, schema_text(schema))
    assert not may_write(answer, json_schema_format(schema), name)
    others = '{"a":1,"é\\n\\\\":"\\"é"}'
    assert is_valid(others, schema_text(NAMES))
    assert may_write(others, json_schema_format(NAMES), name)


def may_write(answer, form, name):
    matcher = bound(name).matcher(form)
    for token in TOKENIZERS[name]().encode(answer, add_special_tokens=False):
        if not matcher.allows(token):
            return False
        matcher.take(token)
    return matcher.is_complete


def test_all_tokens_that_end_answers_end_one_and_none_ends_it_early():
    forms = bound(stops=[7, 256, 257])
    matcher, mask_W = forms.matcher(ResponseFormat("regex", "[0-9]+")), np.zeros(forms.words, np.int32)
    fill_masks({0: matcher}, mask_W[None])
    digits = sorted(forms._tokenizer.encode("0123456789"))
    assert allowed(mask_W) == digits
    matcher.take(digits[3])
    fill_masks({0: matcher}, mask_W[None])
    assert allowed(mask_W) == sorted([*digits, 7, 256, 257])
    assert (matcher.is_complete, matcher.is_ended) == (True, False)


def test_what_the_model_has_no_token_for_is_told():
    forms = bound(vocab=single_bytes().convert_tokens_to_ids("c"))
    matcher = forms.matcher(ResponseFormat("regex", "a?c"))
    mask_W = np.zeros(forms.words, np.int32)
    fill_masks({0: matcher}, mask_W[None])
    assert (allowed(mask_W), matcher.error) == (forms._tokenizer.encode("a"), None)
    matcher.take(forms._tokenizer.encode("a")[0])
    mask_W = np.zeros(forms.words, np.int32)
    fill_masks({0: matcher}, mask_W[None])
    assert matcher.error == "the model has no token that can follow"
    assert not matcher.is_complete
    assert (mask_W == -1).all()
    for made, choice in ((forms, "c"), (bound("SentencePiece without bytes"), "\N{EURO SIGN}")):
        with pytest.raises(ConfigError, match=rf"^--choices: the model has no tokens for '{choice}'$"):
            made.check(choices_format(("a", choice)), "--choices", 9)


def test_a_choice_that_begins_another_needs_a_token_to_end_it():
    form = choices_format(("no", "not said"))
    bound().check(form, "--choices", 9)
    with pytest.raises(ConfigError, match=r"^--choices: 'no' begins another choice, and the model has"):
        bound(stops=[]).check(form, "--choices", 9)


def test_a_choice_that_has_more_tokens_than_an_answer_may_is_refused():
    form = choices_format(("no", "not said"))
    bound().check(form, "--choices", 9)  # behind a word it begins with a space
    with pytest.raises(ConfigError, match=r"^--choices: 'not said' has 9 tokens, more than --max-new"):
        bound().check(form, "--choices", 8)


def test_choices_that_the_tokenizer_writes_alike_are_refused():
    with pytest.raises(ConfigError, match="writes 'no' and ' no' alike"):
        bound("SentencePiece").check(choices_format(("no", " no")), "--choices", 9)


def weighed(choices, taken, logits_of):
    """The probabilities of choices, once these tokens have been taken."""
    forms = bound()
    matcher = forms.matcher(choices_format(choices))
    for token in [*forms._tokenizer.encode(taken), 256]:
        if matcher.is_ended:
            break
        matcher.weigh([logits_of.get(each, 0.0) for each in matcher.asked])
        matcher.take(token)
    assert matcher.text == taken
    return {each.choice: each.logprob for each in matcher.logprobs}


def test_each_choice_has_its_share_where_it_parts_from_the_answer():
    ids = dict(zip("aybnoe", single_bytes().encode("aybnoe"), strict=True))
    found = weighed(("yes", "yea", "no"), "yea", {ids["y"]: 1.0, ids["n"]: 2.0, ids["a"]: 3.0})
    of_y, of_a = math.e / (math.e + math.e**2), math.e**3 / (math.e**3 + 1)
    expected = {"yes": of_y * (1 - of_a), "yea": of_y * of_a, "no": 1 - of_y}
    assert {choice: math.exp(logprob) for choice, logprob in found.items()} == pytest.approx(expected)


def test_choices_that_part_from_it_together_cannot_be_told_apart():
    found = weighed(("yes", "no", "nay"), "yes", {})
    assert found == {"yes": pytest.approx(math.log(1 / 2)), "no": None, "nay": None}


def test_an_end_is_weighed_against_what_may_follow():
    found = weighed(("no", "none"), "no", {256: 1.0})
    expected = {"no": math.e / (math.e + 1), "none": 1 / (math.e + 1)}
    assert {choice: math.exp(logprob) for choice, logprob in found.items()} == pytest.approx(expected)


def test_masks_are_bits_the_lowest_first():
    assert mask_of([0, 33], 2).tolist() == [1, 2]
    assert mask_of([31], 1).tolist() == [-(2**31)]


def test_a_guide_that_reasons_lets_all_follow_but_an_end():
    forms = bound()
    guide = Guide(
        matcher=forms.matcher(choices_format(("yes", "no"))),
        tokenizer=forms._tokenizer,
        stops_W=mask_of(forms.stops, forms.words),
        reasoning=None,
    )
    guide.start = None
    mask_W = np.zeros(forms.words, np.int32)
    fill_guided([guide], mask_W[None])
    assert sorted(set(range(VOCAB)) - set(allowed(mask_W))) == sorted(forms.stops)
    assert (guide.asked, guide.is_complete, guide.reason("length")) == ([], False, "length")


def test_rows_side_by_side_have_the_masks_that_each_has_alone():
    forms = BoundForms(single_bytes(), VOCAB, {256})
    long = json_schema_format({"type": "string", "minLength": 50})
    wanted = [long, choices_format(("yes", "no")), long, json_schema_format({"enum": [1, "a"]})]

    def grown(form, steps):
        matcher, draws = forms.matcher(form), random.Random(steps)
        mask_W = np.zeros(forms.words, np.int32)
        for _ in range(steps):
            fill_masks({0: matcher}, mask_W[None])
            matcher.take(draws.choice(sorted(set(allowed(mask_W)) - {256})))
        return matcher

    steps = [3, 1, 9, 0]
    together_BW = np.zeros((5, forms.words), np.int32)
    rows = [0, 1, 3, 4]
    fill_masks(
        {row: grown(form, count) for row, form, count in zip(rows, wanted, steps, strict=True)}, together_BW
    )
    assert not together_BW[2].any()
    for row, form, count in zip(rows, wanted, steps, strict=True):
        alone_W = np.zeros(forms.words, np.int32)
        fill_masks({0: grown(form, count)}, alone_W[None])
        assert np.array_equal(together_BW[row], alone_W)
        assert allowed(alone_W)
