"""MarsInfer with an accident in a prefill, named on command lines as FILE.py:Faulty.

What happens, and when, comes from the environment: it is no setting, so that a run can be resumed without it.
"""

import itertools
import json
import os
import shutil
import signal
from dataclasses import dataclass
from typing import ClassVar

import torch

from pipeline.pruning.marsinfer import MarsInfer


def out_of_memory(path):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def host_out_of_memory(path):
    raise MemoryError


def runtime_error(path):
    raise RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED\nwhen calling `cublasSgemm`")


def sigterm(path):
    os.kill(os.getpid(), signal.SIGTERM)


def remove(path):
    shutil.rmtree(path)


ACCIDENTS = {
    accident.__name__: accident
    for accident in (out_of_memory, host_out_of_memory, runtime_error, sigterm, remove)
}

packs = itertools.count()  # the engine's warm-up is number 0; a run loads this file anew


@dataclass(frozen=True, kw_only=True)
class Faulty(MarsInfer):
    """MarsInfer, and the accident that the environment asks for."""

    name: ClassVar[str] = "faulty"
    start_layer: int = 1  # of the four of the tests' models

    def begin(self, plan):
        accident = json.loads(os.environ.get("ACCIDENT", "{}"))
        strikes = next(packs) == accident.get("pack") or accident.get("tokens") in plan.lengths
        return (accident if strikes else None), super().begin(plan)

    def select(self, layer, view, state):
        accident, own = state
        if accident is not None and layer == 2:
            ACCIDENTS[accident["kind"]](accident.get("path"))
        return super().select(layer, view, own)
