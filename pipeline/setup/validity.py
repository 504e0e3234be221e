"""Which JSON schema an answer is held against, and how often one that is not valid is drawn again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError
from pipeline.outputs.layout import NO_QUESTION, RowLayout, layout_of
from pipeline.outputs.own_columns import VALIDITY_NAMES, VALUE
from pipeline.records import Row
from pipeline.settings.questions import AskedQuestion
from pipeline.settings.validity_settings import ValiditySettings
from pipeline.values.json_answers import Schema, is_valid, schema_text


@dataclass(frozen=True, kw_only=True)
class Validity:
    """Of a run; `schema`, as JSON, is that of the rows that have none of their own."""

    schema: str | None
    retries: int

    def of(self, row: Row, answer: str | None) -> bool | None:
        """Whether a row's answer is valid; None where there is nothing to hold it against, or no answer."""
        schema = row.params.schema or self.schema
        return None if schema is None or answer is None else is_valid(answer, schema)

    def decides(self) -> dict[str, Any]:
        """What of it can change an answer; the schemas of rows are part of their hashes."""
        if self.schema is None:
            return {"retries": self.retries} if self.retries else {}
        return {"schema_sha256": hashlib.sha256(self.schema.encode()).hexdigest(), "retries": self.retries}


@dataclass(frozen=True, kw_only=True)
class AnswerForm:
    """What settings say of the answers' JSON: what they are held against, and how they are written."""

    validity: Validity | None  # None where nothing has a schema
    layout: RowLayout

    @property
    def added(self) -> frozenset[str]:
        """The columns that the output has for it; questions that come later may have schemas."""
        values = (VALUE,) if self.layout.schemas else ()
        return frozenset((*(VALIDITY_NAMES if self.validity or self.layout.questions else ()), *values))

    @classmethod
    def of(
        cls, settings: ValiditySettings, asked: Sequence[AskedQuestion], form: Schema | None = None
    ) -> AnswerForm:
        """Of answers that have the schema `form` by themselves, if it is given.

        Raises ConfigError for a schema that cannot be used, and for what needs one where there is none.
        """
        schema = settings.schema()
        typed = form if schema is None else schema
        own = {each.name: typed if each.schema is None else each.schema for each in asked}
        found = (own or {NO_QUESTION: typed}).items()
        schemas: dict[str, Schema] = {name: each for name, each in found if each is not None}
        is_held = any(each is not None for each in (schema, *(each.schema for each in asked)))
        if settings.retries and not is_held:
            raise ConfigError("--retries needs a JSON schema: give --validate FILE, or one in --questions")
        if settings.expand and not schemas:
            raise ConfigError(
                "--expand needs a JSON schema: give --validate FILE or --json-schema, or one in --questions"
            )
        text = None if schema is None else schema_text(schema)
        return cls(
            validity=Validity(schema=text, retries=settings.retries) if is_held else None,
            layout=layout_of(own, schemas if settings.expand else {}),
        )
