"""Models with windows, experts and LongRoPE in the engine: rows of several packs, decoded together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import document, loaded
from family_cases import SHORT, documents, model_of, stock_answers, tokens_of

from pipeline.engines.local import LocalEngine
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling
from pipeline.pruning.dense import Dense
from pipeline.pruning.mars import Mars
from pipeline.records import SamplingParams

NEW_TOKENS = 40


@pytest.mark.parametrize("method", [Dense(), Mars(window=10)], ids=lambda method: method.name)
@pytest.mark.parametrize(
    "name",
    [
        *("mistral-windows", "gemma3_text", "qwen3_moe", "phi3-long", "ministral3"),
        *("gpt_oss", "gpt_oss-windows"),
    ],
)
def test_rows_are_answered_as_by_stock_transformers(name, method):
    engine = LocalEngine(
        loaded(model_of(name)), method, rules=StopRules(max_new_tokens=NEW_TOKENS), sampling=Sampling()
    )
    rows = engine.answer(documents())
    expected = [" ".join(map(str, tokens)) for tokens in stock_answers(name, NEW_TOKENS)]
    assert [row.error_message for row in rows] == [None] * len(rows)
    assert [row.answer for row in rows] == expected


@pytest.mark.parametrize("pack_tokens", [None, 1])
def test_rows_whose_answers_may_outgrow_the_short_frequencies_have_the_long_ones(pack_tokens):
    """Each by its own limit, wherever it is decoded."""
    decoder, doc = model_of("phi3-long"), document(45, seed=10)
    with torch.inference_mode():
        ids = torch.cat([tokens_of(doc), torch.zeros(1, SHORT - 44, dtype=torch.int64)], dim=1)
        short, long = (decoder.model(ids[:, :end]).logits[0, 44].argmax().item() for end in (45, SHORT + 1))
    assert short != long
    rows = [
        replace(doc, source=replace(doc.source, row=row, params=params))
        for row, params in enumerate((SamplingParams(max_new_tokens=5), SamplingParams()))
    ]
    rules = StopRules(max_new_tokens=6)
    engine = LocalEngine(loaded(decoder), Dense(), rules=rules, sampling=Sampling(), pack_tokens=pack_tokens)
    assert [int(row.answer.split()[0]) for row in engine.answer(rows)] == [short, long]
