"""Where an engine's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self


class DecodeClock:
    """How long an engine has been decoding, its prefills left out, which rows in one batch share."""

    def __init__(self) -> None:
        self._before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """So far."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def start(self) -> None:
        """Go on, if it does not run."""
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> float:
        """Stop, and tell how long it ran since it was started; 0 if it did not run."""
        if self._started is None:
            return 0.0
        ran = time.perf_counter() - self._started
        self._before, self._started = self._before + ran, None
        return ran


@dataclass(kw_only=True)
class EngineTimes:
    """Where an engine's time went, in seconds; packs that failed and ran again are in none of them."""

    load_s: float = 0.0  # of the weights
    warm_up_s: float = 0.0
    packs: int = 0
    prefill_s: float = 0.0  # until the first tokens were known: TTFT, pack by pack
    shared_s: float = 0.0  # of prefill_s, documents that several rows shared
    again_s: float = 0.0  # of prefill_s, documents that a guard had prefilled a second time
    decode_s: float = 0.0  # in steps, during which no prefill runs
    began: float | None = None  # the first pack, by time.perf_counter()
    ended: float | None = None  # the last first token or step

    def add_prefill(self, started: float, first_at: float, *, again: bool = False) -> None:
        """Count a pack, from its start to its first tokens; `again` where a guard had it prefilled anew."""
        self.packs += 1
        self.prefill_s += first_at - started
        self.again_s += first_at - started if again else 0.0
        self.began, self.ended = self.began or started, first_at

    def add_decode(self, seconds: float, ended: float) -> None:
        """Count steps that have ended."""
        self.decode_s += seconds
        self.ended = max(self.ended or ended, ended)

    def add_shared(self, started: float, ended: float) -> None:
        """Count the prefill of what the rows of later packs share."""
        self.prefill_s += ended - started
        self.shared_s += ended - started
        self.began = self.began or started

    @classmethod
    def together(cls, several: Iterable[EngineTimes]) -> Self:
        """Of engines side by side: sums, but the longest load and warm-up, first start and last end."""
        all_times = list(several)
        return cls(
            load_s=max((each.load_s for each in all_times), default=0.0),
            warm_up_s=max((each.warm_up_s for each in all_times), default=0.0),
            packs=sum(each.packs for each in all_times),
            prefill_s=sum(each.prefill_s for each in all_times),
            shared_s=sum(each.shared_s for each in all_times),
            again_s=sum(each.again_s for each in all_times),
            decode_s=sum(each.decode_s for each in all_times),
            began=min((each.began for each in all_times if each.began is not None), default=None),
            ended=max((each.ended for each in all_times if each.ended is not None), default=None),
        )

    def mirrored(self, now: float) -> Self:
        """With ages at `now` in place of times of a clock, or such times in place of ages.

        Clocks of two machines have nothing to do with each other; ages can be told.
        """
        began = None if self.began is None else now - self.began
        ended = None if self.ended is None else now - self.ended
        return replace(self, began=began, ended=ended)

    @property
    def span_s(self) -> float:
        """From the first pack's start to the last pack's end, what lies between packs included."""
        return 0.0 if self.began is None or self.ended is None else self.ended - self.began
