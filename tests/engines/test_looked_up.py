"""Drafts that a run looks up: answers are what they are without, and rows say how many were accepted."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import SIZES, document, loaded, tiny_model
from row_files import read, write

from marsinfer_cli.app import run
from pipeline.engines.answering import lookup_of
from pipeline.engines.local import LocalEngine
from pipeline.errors import ConfigError
from pipeline.generation.generated import StopRules
from pipeline.generation.lookup import USUAL_DRAFTS, Lookup
from pipeline.generation.sampling import Sampling
from pipeline.kernels import decoding
from pipeline.pruning.registry import make_method
from pipeline.records import Spans
from pipeline.settings.parse import parse_lookup

NEW_TOKENS = 40
METHODS = {
    "dense": {},
    "marsinfer": {"eta": 0.7, "start_layer": 0, "window": 2},
    "sliminfer": {"layers": (1,), "budget": (0.5,), "block": 16, "unit": 4},
}


@pytest.fixture(scope="module")
def model():
    """One whose answers repeat themselves."""
    return loaded(tiny_model("llama"))


def rows():
    """Of two documents, several about each."""
    made = []
    for row, questions in enumerate((9, 4, 21, 7, 3)):
        known = document((200, 90)[row > 2], seed=row > 2)
        behind = np.random.default_rng(row).integers(0, SIZES["vocab_size"], questions)
        length = known.prompt_tokens
        made.append(
            replace(
                known,
                source=replace(known.source, row=row, id=str(row)),
                input_ids=np.concatenate([known.input_ids, behind]),
                spans=Spans(document=(0, length), question=(length, length + questions)),
                ready_at=time.perf_counter(),
            )
        )
    return made


def answers(model, method="dense", sampling=None, **options):
    engine = LocalEngine(
        model,
        make_method(method, METHODS[method]),
        rules=StopRules(max_new_tokens=NEW_TOKENS),
        sampling=sampling or Sampling(),
        **options,
    )
    made = engine.answer(rows())
    assert [row.status for row in made] == ["ok"] * 5
    engine.close()
    return made


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("group", ["off", "any"])
@pytest.mark.parametrize("method", METHODS)
def test_answers_are_what_they_are_without(model, method, group, kv_dtype):
    plain = answers(model, method, group=group, kv_dtype=kv_dtype)
    assert {row.draft_tokens for row in plain} == {None}
    looked_up = answers(model, method, group=group, kv_dtype=kv_dtype, lookup=4)
    assert [row.answer for row in looked_up] == [row.answer for row in plain]
    assert {row.new_tokens for row in looked_up} == {NEW_TOKENS}
    accepted, drafts = (
        sum(getattr(row, name) for row in looked_up) for name in ("accepted_tokens", "draft_tokens")
    )
    assert 0 < accepted < drafts


@pytest.mark.parametrize("penalty", [1.0, 1.05])
@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_so_are_those_that_are_drawn_or_penalised(model, temperature, penalty):
    """A penalty counts the drafts that stand before a token, and none behind it."""
    sampling = Sampling(temperature=temperature, top_p=0.95, repetition_penalty=penalty, seed=3)
    plain, looked_up = (answers(model, sampling=sampling, lookup=count) for count in (0, 4))
    assert [row.answer for row in looked_up] == [row.answer for row in plain]
    assert sum(row.accepted_tokens for row in looked_up) > 0
    if penalty != 1:
        without = answers(model, sampling=replace(sampling, repetition_penalty=1.0))
        assert [row.answer for row in without] != [row.answer for row in plain]


def test_a_row_that_runs_alone_looks_nothing_up(model):
    engine = LocalEngine(
        model,
        make_method("dense", {}),
        rules=StopRules(max_new_tokens=NEW_TOKENS),
        sampling=Sampling(),
        lookup=4,
    )
    engine.packer = replace(engine.packer, store_bytes=0)
    (row,) = engine.answer(rows()[:1])
    assert (row.status, row.new_tokens, row.draft_tokens) == ("ok", NEW_TOKENS, None)


def test_auto_drafts_what_suits_the_device(model, monkeypatch):
    greedy, drawn = Sampling(), Sampling(temperature=1.0)
    assert lookup_of(0, greedy, model) is None
    assert lookup_of(None, greedy, model) == Lookup(drafts=USUAL_DRAFTS, adaptive=True)
    assert lookup_of(None, drawn, model) is None
    assert lookup_of(20, drawn, model) == Lookup(drafts=20, adaptive=False)
    monkeypatch.setattr(decoding, "available", lambda *_: True)
    shape = model.decoder.shape
    most = decoding.queries_of_a_range(shape.heads, shape.kv_heads) - 1
    assert lookup_of(64, greedy, model) == Lookup(drafts=most, adaptive=False)


WORDS = {"off": 0, "auto": None, "AUTO": None, "1": 1, "64": 64}


@pytest.mark.parametrize(("text", "value"), WORDS.items())
def test_what_may_be_given(text, value):
    assert parse_lookup(text) == value


@pytest.mark.parametrize("text", ["0", "65", "-1", "on", "1.5", "", "1000"])
def test_what_may_not(text):
    with pytest.raises(ConfigError, match=r"^--lookup '.*': give auto, off or a number .* from 1 to 64$"):
        parse_lookup(text)


TINY = ["--model", "random:tiny", "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "30"]


def test_a_run_says_how_many_were_accepted(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [{"text": "to be or not to be " * 9, "question": "or?"}] * 3)
    told = {}
    for lookup in ("off", "5"):
        output = tmp_path / f"{lookup}.parquet"
        flags = [*TINY, "--method", "dense", "--lookup", lookup, "--json", "--quiet"]
        assert run(["batch", str(source), str(output), *flags]) == 0
        told[lookup] = json.loads(capsys.readouterr().out), read(output)
    (plain, before), (summary, after) = told.values()
    assert [row["answer"] for row in after] == [row["answer"] for row in before]
    assert (plain["draft_tokens"], plain["accepted_tokens"]) == (0, 0)
    assert {row["draft_tokens"] for row in before} == {None}
    for name in ("draft_tokens", "accepted_tokens"):
        assert summary[name] == sum(row[name] for row in after) > 0
    assert run(["batch", str(source), str(tmp_path / "x.parquet"), *TINY, "--lookup", "many"]) == 2
    assert "--lookup 'many': give auto, off or a number" in capsys.readouterr().err
