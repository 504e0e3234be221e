"""What tests of decoding share: steps repeated without a GPU, answers that end at chosen lengths, and models
whose tokens no batch changes.
"""

from __future__ import annotations

import torch
from conftest import FAMILY_SETTINGS, SIZES, sharpened

from pipeline.checkpoints.building import random_model
from pipeline.families.decoder import Decoder
from pipeline.generation import decode_loop
from pipeline.model import graphs

METHODS = {
    "dense": {},
    "sliminfer": {"layers": (1, 2, 3), "budget": (0.6, 0.4, 0.3), "block": 16, "unit": 4},
    "fastkv": {"layer": 1, "share": 0.4, "kv_share": 0.3},
    "gemfilter": {"layer": 1, "keep": 12.0},
}


class Again:
    """Repeats a step by running it, on the tensors it was given at first."""

    def __init__(self, step):
        self.step, self.closed = step, False

    def replay(self):
        assert not self.closed
        self.step()

    def close(self):
        self.closed = True


class EagerRecorder:
    """Stands where a GPU's recorder does, so that batches are padded as they are there."""

    def __init__(self, error=None):
        self.error, self.recorded = error, []

    def warm_up(self, step):
        step()

    def record(self, step):
        if self.error is not None:
            raise self.error
        self.recorded.append(Again(step))
        return self.recorded[-1]


def record_steps(monkeypatch, late):
    """Have engines repeat captured steps, `late` of them before the tokens of one are looked at."""
    made = EagerRecorder()
    monkeypatch.setattr(graphs, "recorder_for", lambda *_: made)
    monkeypatch.setitem(decode_loop.LATE, "cpu", late)
    return made


class EndAt:
    """Stop rules by the number of tokens, of each document its own."""

    def __init__(self, ends):
        self.ends, self.max_new_tokens, self._of = ends, max(ends), {}

    def reason(self, tokens, start):
        document = self._of.setdefault(id(tokens), len(self._of))
        return "length" if len(tokens) >= self.ends[document] else None


def exact_model(family="qwen2"):
    """In float64: sums in another order, as other batch sizes have them, never choose another token."""
    settings = {**SIZES, **FAMILY_SETTINGS[family]}
    model = random_model(family, settings, device=torch.device("cpu"), dtype=torch.float64)
    return Decoder(sharpened(model))
