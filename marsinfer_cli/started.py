"""When this process began: what a user who waits counts from."""

from __future__ import annotations

import time


def process_began() -> float:
    """By time.perf_counter(), from which all times of a run are told."""
    import psutil

    age_s = time.time() - psutil.Process().create_time()
    return time.perf_counter() - max(0.0, age_s)
