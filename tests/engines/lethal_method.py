"""No pruning, and a death in a prefill, named on command lines as FILE.py:Lethal.

What happens stands in a file, which need not be there: then nothing does, under the same settings.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.pruning.dense import Dense

packs = itertools.count()  # of this process, those of the warm-up too


@dataclass(frozen=True, kw_only=True)
class Lethal(Dense):
    """Dense, and the death that a file asks for."""

    name: ClassVar[str] = "lethal"

    orders: str = ""

    def begin(self, plan):
        path = Path(self.orders)
        try:
            order = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        if order.get("tokens") in plan.lengths:  # whenever this document runs
            os.kill(os.getpid(), signal.SIGKILL)
        number, is_meant = next(packs), order.get("node") == os.environ.get("NODE_OF_TEST")
        while "pack" in order and number and not is_meant and path.exists():
            time.sleep(0.05)  # else this worker could do all, before the one that is meant has started
        if is_meant and number == order.get("pack"):
            path.unlink()  # only once
            if "node" in order:  # with the worker's parent its machine leaves the cluster
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return None
