"""How documents become prompts."""

from __future__ import annotations

from pipeline.errors import ConfigError
from pipeline.settings.option import PROMPTS, Settings, option
from pipeline.settings.parse import read_template

ON_OVERLONG = ("error", "skip", "split", "truncate-left", "truncate-right", "truncate-middle")


class PromptSettings(Settings, panel=PROMPTS):
    """The prompt around a document, and what becomes of one that exceeds the context."""

    system: str | None = option(None, help="System message.")
    prompt_template: str | None = option(
        None,
        metavar="FILE",
        help="Jinja prompt with {{ document }}, {{ question }}, {{ system }}, {{ row.COLUMN }}.",
        shown_default="the model's chat template",
    )
    on_overlong: str = option(
        "error",
        help="What to do with a document over the context: error, skip, split (answer in parts, then "
        "combine), truncate-left, truncate-right, truncate-middle.",
        choices=ON_OVERLONG,
        shown_default="error, or split for a summary",
    )

    def template_text(self) -> str | None:
        """The prompt template's text, read from its file."""
        return read_template(self.prompt_template)


class SplitSettings(PromptSettings, panel=PROMPTS):
    """How a document over the context is answered in parts, which only a run does that decodes them."""

    split_overlap: int = option(
        128,
        metavar="TOKENS",
        help="With --on-overlong split: what a part shares with the one before.",
        least=0,
    )
    combine_template: str | None = option(
        None,
        metavar="FILE",
        help="With --on-overlong split: Jinja prompt that combines the answers of parts, which are its "
        "{{ document }}.",
        shown_default="one of ours",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.combine_template is not None and self.on_overlong not in (None, "split"):
            raise ConfigError("--combine-template needs --on-overlong split")

    def combine_text(self) -> str | None:
        """The text of the template that combines the answers of parts, read from its file."""
        return read_template(self.combine_template, "--combine-template")
