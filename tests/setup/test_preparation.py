"""What a run says of itself is the same whether its weights are loaded or not."""

from __future__ import annotations

import json

import pytest

from pipeline.model.loading import UnloadedModel, load_model, open_model
from pipeline.settings.model_settings import ModelSettings
from pipeline.settings.run_settings import BatchConfig
from pipeline.setup.intake import open_rows
from pipeline.setup.preparation import prepare


@pytest.fixture
def config(fish, model_folder):
    return BatchConfig(
        input=(str(fish),),
        output="out.parquet",
        text_column="body",
        question="what?",
        model=str(model_folder),
    )


def prepared(config, model):
    return prepare(open_rows(config), model)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_weights_change_nothing_that_decides_or_is_told(config, dtype):
    names = {"dtype": dtype, "device": "cpu"}
    unloaded = open_model(ModelSettings(model=config.model, **names))
    models = [unloaded, unloaded.load(), load_model(config.model, **names)]
    runs = [prepared(config, model) for model in models]
    first, *others = (run.decides() for run in runs)
    assert first["model"]["fingerprint"].startswith("content:")
    assert all(decides == first for decides in others)
    told = [json.loads(run.schema().metadata[b"marsinfer"]) for run in runs]
    for description in told:
        del description["started"]
    assert told[0] == told[1] == told[2]
    for name in ("shape", "device", "dtype", "name"):
        assert len({getattr(model, name) for model in models}) == 1


def test_a_name_is_opened_as_the_settings_say(config):
    run = prepared(config, config.model)
    assert isinstance(run.model, UnloadedModel)
    assert [document.source.row for document in run.encode(run.rows())] == [0, 1, 2]
    assert run.schema().names[-3:] == ["doc", "ask", "year"]


def test_a_loaded_model_is_taken_as_it_is(config):
    model = load_model(config.model, device="cpu")
    assert prepared(config, model).model.load() is model
