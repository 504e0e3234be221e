"""generation_config.json of a folder: where answers end by it, and what is told of the rest."""

from __future__ import annotations

import json

import pytest
from checkpoints import change_config, copied, opened, refusal

from pipeline.prompts.tokenizing import stop_token_ids

FILE = "generation_config.json"


@pytest.fixture
def folder(model_folder, tmp_path):
    return copied(model_folder, tmp_path / "model")


def stops(folder):
    model = opened(folder).load()
    return stop_token_ids(model.tokenizer, model.generation_config) - {model.tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"eos_token_id": [5, 6], "cache_implementation": "later"}', {5, 6}),
        ('{"eos_token_id": 5}', {5}),
        ('{"temperature": 0.7}', {7}),
        (None, {7}),
    ],
)
def test_its_ends_or_else_those_of_the_configuration(folder, text, expected):
    change_config(folder, eos_token_id=7)
    (folder / FILE).unlink()
    if text is not None:
        (folder / FILE).write_text(text)
    assert stops(folder) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"eos_token_id": 5', "is no JSON: download or copy it again"),
        ("[5]", "is no JSON object: download or copy it again"),
        (
            '{"eos_token_id": "5"}',
            "has eos_token_id '5': it must be the number of a token, or a list of them",
        ),
    ],
)
def test_a_damaged_one_is_not_taken_for_none(folder, text, message):
    (folder / FILE).write_text(text)
    assert refusal(folder).startswith(f"model '{folder}' cannot be loaded: {FILE} {message}")


def test_what_would_change_greedy_answers_is_told(folder):
    said = {"repetition_penalty": 1.1, "suppress_tokens": [3], "num_beams": 1, "temperature": 0.7}
    (folder / FILE).write_text(json.dumps(said))
    assert opened(folder).notes == (
        f"{FILE} says repetition_penalty 1.1, suppress_tokens [3], and only its stop tokens are used: flags"
        " say how answers are chosen",
    )
