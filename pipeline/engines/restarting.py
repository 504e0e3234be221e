"""An engine whose model is divided among processes, begun anew when one of these fails."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.engines.answering import failed
from pipeline.engines.clock import EngineTimes
from pipeline.engines.local import LocalEngine
from pipeline.engines.memory import Packer
from pipeline.errors import KEPT, RankFailed
from pipeline.model.loading import LoadedModel
from pipeline.records import Answered, EncodedDocument, RowError
from pipeline.texts.words import counted

MOST_RESTARTS = 5  # of a run


class Restarting:
    """An engine as `answer_windows` wants it.

    Rows that were at work when a process failed run again one at a time, which tells whose fault it is: what
    makes a process fail alone becomes an error row.
    """

    def __init__(
        self,
        engine: LocalEngine,
        start: Callable[[Sequence[EncodedDocument]], LocalEngine],
        note: Callable[[str], None],
    ) -> None:
        """`start` loads the model anew, and makes another engine for these documents."""
        self.engine: LocalEngine | None = engine
        self._start, self._note = start, note
        self._unanswered: dict[int, EncodedDocument] = {}  # by id
        self._suspected: set[int] = set()
        self._restarts = 0
        self._before = EngineTimes()

    @property
    def is_busy(self) -> bool:
        return self._working.is_busy

    @property
    def wants_more(self) -> bool:
        return self._working.wants_more

    @property
    def packer(self) -> Packer:
        return self._working.packer

    @property
    def model(self) -> LoadedModel:
        return self._working.model

    @property
    def times(self) -> EngineTimes:
        """Of all engines so far."""
        own = EngineTimes() if self.engine is None else self.engine.times
        load_s, warm_up_s = self._before.load_s + own.load_s, self._before.warm_up_s + own.warm_up_s
        return replace(EngineTimes.together([self._before, own]), load_s=load_s, warm_up_s=warm_up_s)

    def add(self, documents: Sequence[EncodedDocument]) -> None:
        self._unanswered |= {id(document): document for document in documents}
        self._working.add(documents)

    def advance(self) -> list[Answered]:
        """As an engine does. Raises RankFailed where processes have failed too often."""
        try:
            answered = self._working.advance()
        except RankFailed as error:
            told = str(error)
        else:
            for document, *_ in answered:
                self._unanswered.pop(id(document), None)
            return answered
        # outside the handler, whose traceback keeps the failed engine's tensors alive
        return self._begin_anew(told)

    def close(self) -> None:
        """End the engine, and the processes that have parts of its model."""
        if self.engine is not None:
            self.engine.close()
            self.engine.model.close()

    @property
    def _working(self) -> LocalEngine:
        assert self.engine is not None, "the engine could not be begun anew"
        return self.engine

    def _begin_anew(self, told: str) -> list[Answered]:
        if self._restarts == MOST_RESTARTS:
            raise RankFailed(told)
        self._restarts += 1
        method = self._working.method.name
        waiting = {id(document) for document in self._working.waiting}
        at_work = [document for key, document in self._unanswered.items() if key not in waiting]
        others = [document for key, document in self._unanswered.items() if key in waiting]
        why, ended = told.removesuffix(f"; {KEPT}"), []
        if len(at_work) == 1 and id(at_work[0]) in self._suspected:
            culprit = self._unanswered.pop(id(at_work.pop()))
            message = f"{culprit.source.place}: {why}"
            no_memory, died = RowError("out_of_memory", message), RowError("worker_died", message)
            row = failed(culprit, method, no_memory if "OutOfMemory" in why else died)
            ended.append(Answered(culprit, row))
        self._suspected |= {id(document) for document in at_work}
        self._before = self.times
        self.close()
        self.engine = None
        gc.collect()  # its model's memory is needed for the next
        again = counted(len(at_work), "row")
        self._note(f"{why}: its processes begin anew, and {again} at work then run again, one at a time")
        self.engine = self._start([*at_work, *others])
        self.engine.add(at_work, apart=True)
        self.engine.add(others)
        return ended
