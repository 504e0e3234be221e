"""Trying what may fail for one row, so that others get their answers; and the device's memory and time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from pipeline.engines.answering import describe
from pipeline.engines.jobs import JobPacker
from pipeline.errors import MarsError, is_failure
from pipeline.families.decoder import Decoder
from pipeline.ranks.leading import at_the_end
from pipeline.records import EncodedDocument, RowError

Check = Callable[[], None]  # called between layers and steps; it may raise
T = TypeVar("T")


@dataclass(kw_only=True)
class Attempts:
    """What an engine tries on its device, within the time that a row may take."""

    decoder: Decoder
    packs: JobPacker  # whose packer knows what memory there is
    check: Check  # what it raises ends the run
    row_timeout: float | None = None  # seconds

    def run(self, act: Callable[[Check], T], document: EncodedDocument, taken_s: float = 0.0) -> T | RowError:
        """What `act` makes, given the check between its steps; or what went wrong, with the memory freed.

        `document` is the one that messages name; `taken_s` counts as time that its row has taken before.
        """
        try:
            made = act(partial(self._check, time.perf_counter() - taken_s))
            self._check_ranks()
            return made
        except MarsError:
            raise
        except BaseException as error:  # whatever one row does, the others get their answers
            if not is_failure(error):
                raise
            self._check_ranks()
            failure = self.described(error, document)
        self.free()  # outside the handler, whose traceback keeps the failed pack's tensors alive
        return failure

    def described(self, error: BaseException, document: EncodedDocument) -> RowError:
        """What a document's row says of an error."""
        return describe(error, document, self.packs.packer)

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    def _check_ranks(self) -> None:
        """Raise RankFailed where another process has failed that has a part of the model."""
        if self.decoder.lead is not None:
            self.decoder.lead.raise_if_failed()

    def timeout(self) -> RowError:
        return RowError("timeout", f"not answered within --row-timeout {self.row_timeout:g} s")

    def free(self) -> None:
        """Give back the device's memory of what failed or has ended; that of the host frees itself."""
        if self.device.type == "cuda":
            free_cached(self.decoder)

    def now(self) -> float:
        """Seconds, after all work on the device has ended."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _check(self, started: float) -> None:
        """Give up a prefill that takes longer than one row may."""
        self._check_ranks()
        self.check()
        if self.row_timeout is not None and time.perf_counter() - started > self.row_timeout:
            raise self.timeout()


@at_the_end
def free_cached(decoder: Decoder) -> None:
    """Give back what nobody holds of the memory of a GPU, or of all that have a part of the model."""
    gc.collect()
    torch.cuda.empty_cache()
