"""Models with windows, experts and LongRoPE in the engine: rows of several packs, decoded together."""

from __future__ import annotations

import pytest
from conftest import loaded
from family_cases import documents, model_of, stock_answers

from pipeline.engines.local import LocalEngine
from pipeline.model.decode import StopRules
from pipeline.model.sampling import Sampling
from pipeline.pruning.dense import Dense
from pipeline.pruning.mars import Mars

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
