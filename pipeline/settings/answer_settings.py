"""How answers are generated."""

from __future__ import annotations

from typing import Any

from pipeline.errors import ConfigError
from pipeline.settings.data_settings import ANSWER_TOKENS, SUMMARY_TOKENS, SeedSettings
from pipeline.settings.option import ANSWERS, Settings, option

# a temperature below it is 0: of logits near 16 float32 tells differences of 2e-6 apart, so that a draw would
# only choose among those that rounding made different
COLDEST = 1e-5
MOST_ANSWERS = 1024  # to a prompt, all of which are decoded together


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


class SeveralSettings(Settings, panel=ANSWERS):
    """How many answers a prompt gets."""

    n: int = option(
        1,
        metavar="COUNT",
        help="Answers to each prompt, drawn from one prefill; the column answers lists them.",
        least=1,
        most=MOST_ANSWERS,
    )


class SamplingSettings(AnswerSettings, panel=ANSWERS):
    """How tokens are drawn, where answers are generated and not forced."""

    temperature: float = option(0.0, help="0 is greedy.", least=0, most=100)
    top_k: int = option(0, help="Draw from the N likeliest tokens; 0: from all.", metavar="N", least=0)
    top_p: float = option(
        1.0, help="Nucleus sampling's share of probability.", least=0, most=1, above_least=True
    )
    min_p: float = option(
        0.0, help="Draw no token below this share of the likeliest one's probability.", least=0, most=1
    )
    repetition_penalty: float = option(
        1.0,
        help="Divides the logits of tokens that the prompt or the answer has, and multiplies negative ones; "
        "for greedy answers too.",
        least=0,
        most=100,
        above_least=True,
    )

    @property
    def sampling_that_decides(self) -> dict[str, Any]:
        """The settings by which tokens are chosen, those that came later only where they are set."""
        later = {name: getattr(self, name) for name in ("top_k", "min_p", "repetition_penalty")}
        unset = {name: getattr(SamplingSettings, name) for name in later}
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            **{name: value for name, value in later.items() if value != unset[name]},
        }
