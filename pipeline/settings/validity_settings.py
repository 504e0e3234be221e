"""What answers are held against, and what becomes of those that are wrong."""

from __future__ import annotations

from pipeline.settings.option import ANSWERS, Settings, option
from pipeline.values.json_answers import Schema, schema_in

MOST_RETRIES = 100


class ValiditySettings(Settings, panel=ANSWERS):
    """A JSON schema, and what it is for."""

    validate: str | None = option(
        None,
        metavar="FILE",
        help="JSON schema that finished answers are checked against, a file or {...} itself; the column "
        "valid has the result.",
    )
    retries: int = option(
        0,
        metavar="N",
        help="With a JSON schema: draw an answer that is not valid again, by another seed, up to N times.",
        least=0,
        most=MOST_RETRIES,
    )
    expand: bool = option(
        False,
        help="With a JSON schema: add a column value with what an answer says, as structs and lists of the "
        "schema's types.",
    )

    @property
    def holds_by_masks(self) -> bool:
        """Whether answers to questions with schemas are held to them while they are written.

        Otherwise they are held against them once they are there.
        """
        return self.validate is None and self.retries == 0

    def schema(self) -> Schema | None:
        """That of all answers, read from its file. Raises ConfigError."""
        return None if self.validate is None else schema_in(self.validate, "--validate")
