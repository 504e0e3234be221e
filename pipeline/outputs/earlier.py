"""What is known of rows that earlier runs finished, as the rows of the input come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from pipeline.outputs.rowindex import RowIndex


class EarlierRows:
    """A view of the index that a journal, or a dry run, made of them."""

    def __init__(
        self,
        index: RowIndex,
        *,
        files: list[tuple[str, int]] | None = None,
        can_drop: bool = True,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """To be made when all of them are in the index, and none of the input's rows.

        `files` are names and rows of the files that the output was made of, None where it does not say.
        `can_drop` says whether rows that leave can be kept beside the output; if not, they must stay.
        `guard` tells errors of the index.
        """
        self._index, self._guard = index, guard
        self.files, self.can_drop = files, can_drop
        with guard():
            self.at_start: Counter[str] = index.counts()
            self.lasting_at_start = index.leaving()  # but for errors that are worth nothing by themselves

    def done_now(self) -> Counter[str]:
        """Those that were done at the start, by status, without those that have another version now."""
        return self.at_start - self._index.replaced

    @property
    def returned(self) -> int:
        """How many had left the output, and came back."""
        return self._index.returned

    def leaving(self) -> int:
        """How many have not come, and leave the output."""
        with self._guard():
            return self._index.leaving()

    def stay(self, *, fleeting: bool) -> int:
        """Keep in the output what has not come; returns how many would have left.

        With `fleeting` errors of rows that could not be read stay too: else this run has tried them again.
        """
        with self._guard():
            return self._index.stay(fleeting=fleeting)
