"""Times of what runs on a device, read when it has done its work; and the memory that it took."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

LONGEST_TRIAL_S = 1.0
FEWEST_TRIALS, MOST_TRIALS = 3, 50
K = TypeVar("K")
T = TypeVar("T")


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Seconds of a clock, read when the device has done all that it was given."""
    wait_for(device)
    return time.perf_counter()


def tidied(device: torch.device) -> float:
    """`now`, with what nobody holds freed, and the peak of the device's memory forgotten."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return now(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most that the device's allocator held since `tidied`; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


class Stopwatch:
    """Adds up what parts of some work take, without making the device wait."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[float | tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, act: Callable[[], T]) -> T:
        """Do one part."""
        if self._device.type != "cuda":
            started = time.perf_counter()
            result = act()
            self._spans.append((time.perf_counter() - started) * 1e3)
            return result
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        result = act()
        last.record()
        self._spans.append((first, last))
        return result

    def milliseconds(self) -> float:
        """Of all parts together, once the device has done its work."""
        wait_for(self._device)
        return sum(span[0].elapsed_time(span[1]) if isinstance(span, tuple) else span for span in self._spans)


def in_turns(
    runs: Mapping[K, Callable[[], T]], turns: int, check: Callable[[], None] = lambda: None
) -> dict[K, list[T]]:
    """What all runs give, one after the other in each turn, so that a drifting clock touches all alike.

    `check` is called before each run, and may raise to give up.
    """
    results: dict[K, list[T]] = {name: [] for name in runs}
    for _turn in range(turns):
        for name, run in runs.items():
            check()
            results[name].append(run())
    return results


def best_seconds(
    run: Callable[[], object],
    device: torch.device,
    *,
    longest_s: float = LONGEST_TRIAL_S,
    fewest: int = FEWEST_TRIALS,
) -> float:
    """The shortest of several runs, after one that warms up: of at least `fewest`, until `longest_s`."""
    best, began, trials = float("inf"), time.perf_counter(), 0
    run()
    while trials < fewest or (time.perf_counter() - began < longest_s and trials < MOST_TRIALS):
        started = now(device)
        run()
        best = min(best, now(device) - started)
        trials += 1
    return max(best, 1e-9)
