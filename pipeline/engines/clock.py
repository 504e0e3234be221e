"""How long an engine has been decoding, its prefills left out: the time that rows in one batch share."""

from __future__ import annotations

import time


class DecodeClock:
    """Runs while steps are queued or on their way."""

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
