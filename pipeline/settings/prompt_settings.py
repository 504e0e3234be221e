"""How documents become prompts."""

from __future__ import annotations

from typing import Any

from pipeline.errors import ConfigError
from pipeline.settings.option import PROMPTS, Settings, option
from pipeline.settings.parse import parse_template_arg, read_template

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
    template_arg: tuple[str, ...] = option(
        (),
        metavar="NAME=VALUE",
        help="Argument of the model's chat template, such as enable_thinking=false; repeatable.",
        check=parse_template_arg,
    )
    on_overlong: str = option(
        "error",
        help="What to do with a document over the context: error, skip, truncate-left, truncate-right, "
        "truncate-middle; of batch, split too (answer in parts, then combine).",
        choices=ON_OVERLONG,
        shown_default="error, or split for a summary",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template_arg and self.prompt_template is not None:
            raise ConfigError(
                "--template-arg and --prompt-template exclude each other: arguments are for the model's chat "
                "template, in whose place that file is used"
            )
        names = [parse_template_arg(text)[0] for text in self.template_arg]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"--template-arg {name} is given twice")

    @property
    def template_args(self) -> dict[str, Any]:
        """The arguments of the chat template by their names."""
        return dict(map(parse_template_arg, self.template_arg))

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
