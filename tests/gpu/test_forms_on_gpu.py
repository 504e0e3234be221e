"""Answers in a form on a GPU: masks between two graphs give what they give between steps from Python."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import SIZES, document, loaded, sharpened
from steps_from_python import FromPython

import pipeline.model.graphs as graphs_module
from pipeline.checkpoints.building import random_model
from pipeline.checkpoints.random_weights import byte_tokenizer
from pipeline.engines.local import LocalEngine
from pipeline.errors import ConfigError
from pipeline.families.decoder import Decoder
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling
from pipeline.kernels.attention import choose_attention
from pipeline.pruning.dense import Dense
from pipeline.structured.grammars import choices_format, json_schema_format

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda", 0)
STOP = 256
YEARS = {"type": "array", "minItems": 2, "maxItems": 4, "items": {"enum": [1999, 2024, 7]}}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "years": YEARS},
    "required": ["name", "years"],
    "additionalProperties": False,
}
CHOICES = ("no", "not said", "not stated", "yes")


@pytest.fixture(scope="module")
def model():
    sizes = {**SIZES, "vocab_size": 320, "num_attention_heads": 4, "head_dim": 64}
    decoder = Decoder(sharpened(random_model("qwen2", sizes, device=CUDA, dtype=torch.bfloat16)))
    heads = {"heads": 4, "kv_heads": 2, "head_dim": 64}
    try:
        backend, _ = choose_attention("fa3", device=CUDA, dtype=torch.bfloat16, **heads)
    except ConfigError as error:
        pytest.skip(str(error))
    return loaded(decoder, tokenizer=byte_tokenizer(), attention=backend)


def answered(model, form, **options):
    """Answers, and how steps were run."""
    engine = LocalEngine(
        model,
        Dense(),
        rules=StopRules(max_new_tokens=200, token_ids=frozenset({STOP})),
        response_format=form,
        in_flight=8,
        logprobs=True,
        **options,
    )
    made = engine.answer([document(40 + 9 * n, seed=n, row=n) for n in range(20)])
    engine.close()
    return made, engine.stats


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_between_graphs_is_that_of_steps_from_python(model, monkeypatch, temperature):
    form, sampling = json_schema_format(SCHEMA), Sampling(temperature=temperature, seed=3)
    made, stats = answered(model, form, sampling=sampling)
    assert stats.failure is None
    assert stats.replayed_steps > stats.eager_steps
    assert [row.error_message for row in made] == [None] * 20
    for row in made:
        assert len(json.loads(row.answer)["years"]) >= 2
        assert row.min_logprob <= row.mean_logprob < 0
    monkeypatch.setattr(graphs_module, "recorder_for", lambda device, *_: FromPython(device))
    again, _ = answered(model, form, sampling=sampling)
    assert [row.answer for row in again] == [row.answer for row in made]
    assert len({row.answer for row in made}) > 10


def test_choices_that_begin_alike_all_have_their_share(model):
    made, _ = answered(model, choices_format(CHOICES), sampling=Sampling(temperature=8.0))
    assert {row.answer for row in made} <= set(CHOICES)
    for row in made:
        assert sum(math.exp(each.logprob) for each in row.choice_logprobs) == pytest.approx(1, abs=1e-3)
