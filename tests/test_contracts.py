"""examples/contracts: the table that is made of answers, and the form that the questions ask for."""

from __future__ import annotations

import json
import runpy
from itertools import product
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.outputs.answers import answers_table, output_schema
from pipeline.outputs.layout import layout_of
from pipeline.outputs.own_columns import VALIDITY_NAMES
from pipeline.outputs.writing import output_writer
from pipeline.records import Answer
from pipeline.settings.questions import read_questions
from pipeline.structured.grammars import check_format, json_schema_format
from pipeline.values.json_answers import is_valid, schema_text

CONTRACTS = Path(__file__).parents[1] / "examples" / "contracts"
ASKED = read_questions(str(CONTRACTS / "questions.toml"))
SCHEMAS = {each.name: each.schema for each in ASKED if each.schema is not None}


@pytest.fixture
def contracts(tmp_path):
    """What table.py makes of an output with these answers to the questions about two contracts."""
    table = runpy.run_path(str(CONTRACTS / "table.py"))["contracts"]
    layout = layout_of((each.name for each in ASKED), SCHEMAS)
    about = {"marsinfer": json.dumps({"layout": layout.as_dict()})}
    schema = output_schema(pa.schema([]), about, added=VALIDITY_NAMES)

    def contracts(**said: list[str]):
        answers = []
        for row, (index, each) in product(range(2), enumerate(ASKED)):
            text = said.get(each.name, ["no JSON"] * 2)[row]
            valid = None if each.schema is None else is_valid(text, schema_text(each.schema))
            id = f"{row}.txt#{each.name}"
            answers.append(Answer(id=id, row=row, question_index=index, answer=text, valid=valid))
        with output_writer(tmp_path / "out.parquet", schema) as writer:
            writer.write_table(answers_table(answers, schema))
        return table(str(tmp_path / "out.parquet")).to_pylist()

    return contracts


def test_the_table_has_what_valid_answers_say(contracts):
    parties = [{"name": "Halder", "role": "Landlord"}, {"name": "Nordlicht", "role": "Tenant"}]
    first, second = contracts(
        parties=[json.dumps(parties), json.dumps([{"name": "Halder"}])],
        law=['{"governing_law": "Germany", "disputes": "Hamburg", "arbitration": false}', "Germany"],
        term=['```json\n{"begins": "2024-03-01", "months": 60, "renews": true}\n```', '{"months": 60}'],
        payment=['{"amount": 4250, "currency": "EUR", "per": "month"}', '{"amount": 3, "per": "week"}'],
    )
    assert first == {
        **{"contract": "0.txt", "parties": 2, "law": "Germany", "arbitration": False},
        **{"begins": "2024-03-01", "months": 60, "amount": 4250.0, "currency": "EUR", "per": "month"},
    }
    assert second == {**dict.fromkeys(first), "contract": "1.txt"}


def test_each_schema_is_one_that_answers_can_be_held_to_and_nothing_in_it_is_without_end():
    """But for what stands beside a bound of its own: a date, a number, a word of a list."""
    for name, schema in SCHEMAS.items():
        check_format(json_schema_format(schema), name)
        told = json.dumps(schema)
        texts = told.count('"string"')
        assert texts == told.count('"maxLength"') + told.count('"format"')
        assert told.count('"array"') == told.count('"maxItems"')
        assert told.count('"object"') == told.count('"additionalProperties": false')
