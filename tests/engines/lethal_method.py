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
        order = self._order()
        if order.get("tokens") in plan.lengths:  # whenever this document runs
            os.kill(os.getpid(), signal.SIGKILL)
        if "pack" not in order:
            return
        number, is_meant = next(packs), order.get("node") == os.environ.get("NODE_OF_TEST")
        while number and not is_meant and "pack" in self._order():
            time.sleep(0.05)  # else this worker could do all, before the one that is meant has started
        if is_meant and number == order["pack"]:
            self._fulfil(order)
            if "node" in order:  # with the worker's parent its machine leaves the cluster
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def _order(self):
        try:
            return json.loads(Path(self.orders).read_text())
        except OSError:
            return {}

    def _fulfil(self, order):
        """A pack is deadly only once, a document stays so."""
        if "tokens" not in order:
            return os.unlink(self.orders)
        left = Path(f"{self.orders}.left")
        left.write_text(json.dumps({"tokens": order["tokens"]}))
        left.replace(self.orders)
