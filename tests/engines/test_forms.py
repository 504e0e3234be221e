"""Rows with a form beside rows without, in one batch: each has the answer that it has alone.

In float64, where sums in another order do not move a choice.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from conftest import SIZES, loaded, sharpened
from conftest import document as noise
from decode_steps import record_steps

from pipeline.checkpoints.building import random_model
from pipeline.checkpoints.random_weights import byte_tokenizer
from pipeline.engines.answering import add_answers
from pipeline.engines.local import LocalEngine
from pipeline.families.decoder import Decoder
from pipeline.generation.decode_batch import DecodeBatch
from pipeline.generation.generated import Generated, StopRules
from pipeline.generation.guide import Guide
from pipeline.generation.sampling import Sampling
from pipeline.generation.stopping import StopTexts
from pipeline.model.prefill import Pack, prefill
from pipeline.pruning.dense import Dense
from pipeline.records import Answer, EncodedDocument, Reasoning, ResponseFormat, SamplingParams
from pipeline.structured.grammars import choices_format, json_schema_format

NEW_TOKENS = 24
STOP = 256  # the end of a turn
LINE_END = byte_tokenizer().encode("\n")[0]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
CHOICES = ("apple", "banana", "cherry", "date")  # which differ in their first tokens
FORMS = {
    "free": None,
    "json": json_schema_format(SCHEMA),
    "number": ResponseFormat("regex", "[1-9][0-9]{2,4}"),
    "choice": choices_format(CHOICES),
    "endless": ResponseFormat("regex", "[ab]+c"),
}


@pytest.fixture(scope="module")
def model():
    settings = {**SIZES, "vocab_size": 320}
    made = random_model("qwen2", settings, device=torch.device("cpu"), dtype=torch.float64)
    return loaded(Decoder(sharpened(made)), tokenizer=byte_tokenizer())


@pytest.fixture(params=[0, 1])
def recorder(request, monkeypatch):
    """Of captured steps, and how many are queued before the tokens of one are looked at."""
    return record_steps(monkeypatch, request.param)


def engine_for(model, form=None, **options):
    rules = StopRules(max_new_tokens=NEW_TOKENS, token_ids=frozenset({STOP}))
    options = {"sampling": Sampling(), **options}
    return LocalEngine(model, Dense(), rules=rules, response_format=form, **options)


def document(length, seed=0, row=0):
    """Behind which an answer begins without a space."""
    made = noise(length, seed=seed, row=row)
    made.input_ids[-1] = LINE_END
    return made


def with_params(made, **params):
    return replace(made, source=replace(made.source, params=SamplingParams(**params)))


def rows(**params):
    """Of each form some, one of which is drawn."""
    made = []
    for number in range(4 * len(FORMS)):
        form = list(FORMS.values())[number % len(FORMS)]
        drawn = {"temperature": 1.0, "seed": number} if number % 3 == 0 else {}
        row = document(18 + 5 * number, seed=number, row=number)
        made.append(with_params(row, response_format=form, **drawn, **params))
    return made


def told(answer):
    return (answer.status, answer.error_type, answer.answer, answer.finish_reason, answer.new_tokens)


def in_one_batch(engine, given, order=0):
    """The answers of rows that come in any order and at any time."""
    waiting, draws, found = list(given), random.Random(order), {}
    draws.shuffle(waiting)
    while waiting or engine.is_busy:
        if waiting and (not engine.is_busy or draws.random() < 0.3):
            engine.add([waiting.pop()])
        found |= {answer.row: answer for _, answer, _ in engine.advance()}
    return [found[row] for row in range(len(given))]


@pytest.fixture(scope="module")
def alone(model):
    return [told(engine_for(model, pack_tokens=1).answer([row])[0]) for row in rows()]


@pytest.mark.parametrize(("in_flight", "pack_tokens", "lookup"), [(16, None, 0), (3, 100, 0), (5, 60, 3)])
def test_neighbours_change_no_answer(model, alone, recorder, in_flight, pack_tokens, lookup):
    engine = engine_for(model, in_flight=in_flight, pack_tokens=pack_tokens, lookup=lookup)
    made = in_one_batch(engine, rows(), order=in_flight)
    assert [told(answer) for answer in made] == alone
    assert engine.stats.replayed_steps > 0


OPEN = {
    "string": json_schema_format({"type": "string", "maxLength": 9}),
    "list": json_schema_format({"type": "array", "items": {"type": "string"}, "maxItems": 3}),
    "words": ResponseFormat("regex", "[a-z0-9. ]{3,30}!"),
    "free": None,
}


def test_a_likely_token_that_may_not_follow_is_taken_back(model, recorder, monkeypatch):
    """In a string a row has no mask; it has the answer that it has with one before every token."""
    given = [
        with_params(document(20 + 7 * number, seed=number, row=number), response_format=form)
        for number, form in enumerate(4 * list(OPEN.values()))
    ]
    places, place = [], DecodeBatch.place
    monkeypatch.setattr(DecodeBatch, "place", lambda self, some: places.extend(some) or place(self, some))
    made = in_one_batch(engine_for(model, in_flight=7, logprobs=True), given, order=1)
    assert len(places) > 20
    assert {answer.finish_reason for answer in made} >= {"stop", "length"}
    monkeypatch.setattr(Guide, "is_open", False)
    places.clear()
    masked = in_one_batch(engine_for(model, in_flight=7, logprobs=True), given, order=1)
    assert places == []
    assert [told(answer) for answer in made] == [told(answer) for answer in masked]
    for answer, other in zip(made, masked, strict=True):
        if answer.status == "ok":
            assert answer.mean_logprob == pytest.approx(other.mean_logprob)


def test_answers_have_their_forms_and_those_that_are_cut_are_errors(alone):
    by_form = {name: alone[number :: len(FORMS)] for number, name in enumerate(FORMS)}
    for status, _, text, reason, _ in by_form["json"]:
        value = json.loads(text)
        assert (status, reason) == ("ok", "stop")
        assert value["a"] in ("x", "yy")
        assert 0 <= value["b"] <= 99
    assert all(text.isdigit() and 3 <= len(text) <= 5 for _, _, text, *_ in by_form["number"])
    assert all(text in CHOICES for _, _, text, *_ in by_form["choice"])
    assert ("error", "incomplete", None, None, None) in by_form["endless"]
    assert {status for status, *_ in by_form["free"]} == {"ok"}


def test_rows_without_a_form_cost_no_masks(model):
    engine = engine_for(model)
    engine.answer([row for row in rows() if row.source.params.response_format is None])
    assert engine._table.loop._batch.masks._made is None
    assert not any(size.masked for size in engine._table.loop._chooser._warm)


def test_a_form_of_the_run_is_that_of_all_rows(model, recorder):
    engine = engine_for(model, FORMS["json"], in_flight=4, lookup=0)
    engine._open_table().loop.prepare()
    made = in_one_batch(engine, [document(20 + n, seed=n, row=n) for n in range(9)])
    assert {json.loads(answer.answer)["a"] for answer in made} <= {"x", "yy"}
    assert engine.stats.eager_steps == 0
    assert engine.stats.replayed_steps > 0


def test_a_row_that_runs_alone_has_its_form_too(model):
    engine = engine_for(model, FORMS["json"], logprobs=True)
    expected = told(engine.answer([document(30)])[0])
    alone = engine_for(model, FORMS["json"], logprobs=True)
    alone.packer = replace(alone.packer, store_bytes=0)
    (answer,) = alone.answer([document(30)])
    assert told(answer) == expected
    assert answer.mean_logprob < 0


def test_rows_about_one_document_have_their_forms(model):
    known = document(120)
    given = [
        replace(
            known,
            source=replace(known.source, row=n, id=str(n), params=SamplingParams(response_format=form)),
            input_ids=known.input_ids.copy(),
        )
        for n, form in enumerate(FORMS.values())
    ]
    for number, row in enumerate(given):
        row.input_ids[-2] = number
    alone, together = (
        [told(answer) for answer in engine_for(model, group=group).answer(given)] for group in ("off", "any")
    )
    assert together == alone


def test_what_is_cut_says_where_and_what_helps(model):
    (answer,) = engine_for(model, ResponseFormat("regex", "[ab]{50}c")).answer([document(30)])
    assert (answer.status, answer.error_type, answer.answer) == ("error", "incomplete", None)
    assert answer.error_message.startswith(
        f"row 0: the answer was cut after {NEW_TOKENS} tokens, before it had its form, and ends with '"
    )
    assert "--max-new-tokens" in answer.error_message


def test_an_answer_that_has_its_form_where_it_is_cut_is_one(model):
    (answer,) = engine_for(model, ResponseFormat("regex", "[ab]+")).answer([document(30)])
    assert (answer.status, answer.finish_reason) == ("ok", "length")
    assert set(answer.answer) <= {"a", "b"}
    assert len(answer.answer) == NEW_TOKENS


def test_an_answer_that_is_combined_with_others_has_no_form(model):
    plain = engine_for(model).answer([document(30)])[0]
    made = engine_for(model, FORMS["json"]).answer([replace(document(30), is_final=False)])[0]
    assert told(made) == told(plain)


def test_a_form_that_the_model_cannot_write_is_its_rows_error(model):
    rows = [document(30, row=0), document(30, row=1)]
    bad = with_params(rows[1], response_format=choices_format(("no", "no\0")))
    engine = engine_for(model)
    assert "stops_W" not in vars(engine.row_rules.forms)
    engine.row_rules.forms.stops = frozenset()
    first, second = engine.answer([rows[0], bad])
    assert first.status == "ok"
    assert (second.status, second.error_type) == ("error", "unsupported")
    assert "'no' begins another choice" in second.error_message


def next_logits(model, row, tokens):
    """Of what follows a row's prompt and these tokens."""
    ids = [*row.input_ids.tolist(), *tokens]
    longer = EncodedDocument(source=row.source, input_ids=torch.tensor(ids).numpy(), spans=row.spans)
    pack = Pack.of([longer], model.device)
    return prefill(model.decoder, model.attention, Dense(), pack, 1, lambda: None).logits_BV[0].double()


@pytest.mark.parametrize("lookup", [0, 3])
@pytest.mark.parametrize("form", ["free", "json", "choice"])
def test_log_probabilities_are_those_of_the_model(model, form, lookup, monkeypatch):
    """Before a form, a temperature or a draw has its say."""
    row = with_params(document(40, seed=3), temperature=1.5, seed=1, response_format=FORMS[form])
    others = [document(25 + n, seed=n, row=n) for n in range(1, 4)]
    engine, finished = engine_for(model, logprobs=True, lookup=lookup), {}
    finish = engine._finish
    monkeypatch.setattr(
        engine,
        "_finish",
        lambda some: finished.update({e.row.answer.row: e for e in some}) or finish(some),
    )
    answer = engine.answer([row, *others])[0]
    tokens = finished[0].tokens
    expected = [
        next_logits(model, row, tokens[:count]).log_softmax(-1)[token].item()
        for count, token in enumerate(tokens)
    ]
    assert finished[0].logprobs == pytest.approx(expected, rel=1e-4)
    assert answer.mean_logprob == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert answer.min_logprob == pytest.approx(min(expected), rel=1e-4)


@pytest.mark.parametrize(("text", "stop", "mean"), [("ab\n\nc", "\n\n", -1.5), ("a\n\n", "a\n", None)])
def test_tokens_of_a_stop_text_are_none_of_the_answer(model, text, stop, mean):
    texts = StopTexts(texts=(stop,), tokenizer=model.tokenizer)
    growing = Generated(rules=StopRules(max_new_tokens=9, texts=texts))
    for count, token in enumerate(model.tokenizer.encode(text), start=1):
        if growing.grows:
            growing.take(token, [-float(count)])
    row = Answer.begin(document(20).source, "dense")
    add_answers(row, [growing], model)
    assert (row.answer, row.mean_logprob) == (text.partition(stop)[0], mean)


def test_the_answer_is_the_likeliest_choice_and_all_have_their_share(model):
    given = [document(20 + 3 * n, seed=n, row=n) for n in range(12)]
    made = in_one_batch(engine_for(model, FORMS["choice"], logprobs=True, in_flight=5), given)
    firsts = [model.tokenizer.encode(choice)[0] for choice in CHOICES]
    for row, answer in zip(given, made, strict=True):
        logprobs = next_logits(model, row, ())[firsts].log_softmax(-1)
        assert answer.answer == CHOICES[logprobs.argmax()]
        assert [each.choice for each in answer.choice_logprobs] == list(CHOICES)
        assert [each.logprob for each in answer.choice_logprobs] == pytest.approx(logprobs.tolist(), rel=1e-4)
    assert len({answer.answer for answer in made}) > 1


ALIKE = ("nay", "no", "note", "not said", "not stated", "yes", "yea", "\xe9t\xe9")  # which begin alike


def by_the_model(model, row, choices, tokens=()):
    """The log-probability of each choice that begins with these tokens, by all that the model may write."""
    ids = {choice: [*model.tokenizer.encode(choice), STOP] for choice in choices}
    count = len(tokens)
    begun = {choice: ids for choice, ids in ids.items() if ids[:count] == list(tokens) and len(ids) > count}
    following = sorted({ids[count] for ids in begun.values()})
    logprobs = next_logits(model, row, tokens)[following].log_softmax(-1).tolist()
    found = {}
    for token, logprob in zip(following, logprobs, strict=True):
        ended = [choice for choice, ids in begun.items() if ids[count] == token]
        deeper = {ended[0]: 0.0} if len(ended) == 1 else by_the_model(model, row, choices, (*tokens, token))
        found |= {choice: logprob + rest for choice, rest in deeper.items()}
    return found


def test_all_choices_have_their_share_that_begin_alike(model, recorder):
    """Each that the answer has left is visited behind it, beside others whose answers grow."""
    given = [document(20 + 3 * n, seed=n, row=n) for n in range(10)]
    form, drawn = choices_format(ALIKE), Sampling(temperature=20)
    made = in_one_batch(engine_for(model, form, logprobs=True, in_flight=4, sampling=drawn), given)
    plain = engine_for(model, form, in_flight=4, sampling=drawn).answer(given)
    assert [told(answer) for answer in made] == [told(answer) for answer in plain]
    for row, answer in zip(given, made, strict=True):
        expected = by_the_model(model, row, ALIKE)
        found = {each.choice: each.logprob for each in answer.choice_logprobs}
        assert found == pytest.approx(expected, rel=1e-4)
        assert sum(map(math.exp, found.values())) == pytest.approx(1)
    assert len({answer.answer for answer in made}) > 3


def test_so_have_those_of_a_row_that_runs_alone(model):
    engine = engine_for(model, choices_format(ALIKE), logprobs=True)
    engine.packer = replace(engine.packer, store_bytes=0)
    (answer,) = engine.answer([document(33)])
    found = {each.choice: each.logprob for each in answer.choice_logprobs}
    assert found == pytest.approx(by_the_model(model, document(33), ALIKE), rel=1e-4)


def test_a_row_that_takes_too_long_while_it_is_weighed_is_late(model, recorder):
    engine = engine_for(model, choices_format(ALIKE), logprobs=True, row_timeout=1e9)
    engine.add([document(30)])
    while not any(row.weighs for row in engine._running):
        assert engine.advance() == []
    engine.attempts.row_timeout = 0.0
    ended = []
    while engine.is_busy:
        ended += engine.advance()
    assert [(answer.status, answer.error_type) for _, answer, _ in ended] == [("error", "timeout")]
    assert engine._table.loop.drain() == []


def test_places_beyond_the_longest_answer_are_not_visited(model):
    choices = ("a", "b" * 30 + "c", "b" * 30 + "d")
    engine = engine_for(model, choices_format(choices), logprobs=True)
    made = engine.answer([document(20 + row, seed=row, row=row) for row in range(8)])
    short = [answer for answer in made if answer.status == "ok"]
    assert short
    for answer in short:
        assert [each.logprob is None for each in answer.choice_logprobs] == [False, True, True]


def test_without_the_option_nothing_is_scored(model):
    engine = engine_for(model, FORMS["choice"])
    (answer,) = engine.answer([document(30)])
    assert (answer.mean_logprob, answer.min_logprob, answer.choice_logprobs) == (None, None, None)
    assert engine._open_table().loop._batch.scores_CX is None


def test_reasoning_has_no_form_and_what_follows_has(model):
    """A model of noise does not come to an end of its reasoning."""
    row = replace(document(30), reasoning=Reasoning.BEGUN)
    (answer,) = engine_for(model, FORMS["json"]).answer([row])
    assert (answer.status, answer.error_type) == ("error", "incomplete")
    assert "reasoned for all of its 24 tokens" in answer.error_message
