"""How answers are generated."""

from __future__ import annotations

from pipeline.errors import ConfigError
from pipeline.settings.data_settings import ANSWER_TOKENS, SUMMARY_TOKENS, SeedSettings
from pipeline.settings.option import ANSWERS, option


class AnswerSettings(SeedSettings, panel=ANSWERS):
    """Where an answer ends."""

    max_new_tokens: int = option(
        ANSWER_TOKENS,
        help="Longest answer, and longest part of a right answer, in tokens.",
        shown_default=f"{ANSWER_TOKENS}, or {SUMMARY_TOKENS} for a summary",
        least=1,
    )
    stop: tuple[str, ...] = option(
        (),
        help="Text that ends an answer; repeatable.",
        may_be_empty=True,  # a line's end is a text
        panel=ANSWERS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in self.stop:
            raise ConfigError("--stop takes a text that is not empty")


class SamplingSettings(AnswerSettings, panel=ANSWERS):
    """How tokens are drawn, where answers are generated and not forced."""

    temperature: float = option(0.0, help="0 is greedy.", least=0, most=100)
    top_p: float = option(
        1.0, help="Nucleus sampling's share of probability.", least=0, most=1, above_least=True
    )
