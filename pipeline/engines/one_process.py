"""The local engine: rows are answered in this process, one window after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Protocol

from pipeline.guard import Answering, Guard, Guarded
from pipeline.intake import Item
from pipeline.interrupts import nothing_to_lose
from pipeline.mapreduce import Reduction
from pipeline.records import Answer, EncodedDocument, RowFailure
from pipeline.splitting import SplitDocument
from pipeline.summary import EngineTimes

if TYPE_CHECKING:
    from pipeline.engines.local import LocalEngine
    from pipeline.preparation import Setup

WORTH_A_NOTE_S = 1.0  # of warming up, below which nobody wonders what the run is doing


class Engine(Protocol):
    """What answers the rows of a run, wherever its models are; the first row that needs one loads them."""

    patience_s: float | None  # how long it waits for a window before it is given None; None: however long

    def answers(self, windows: Iterable[Sequence[Item] | None]) -> Iterator[list[Answer]]:
        """Answers of all rows, a pack or a part of one at a time, in no order; a list may be empty."""
        ...

    @property
    def times(self) -> EngineTimes:
        """So far, of all packs."""
        ...

    @property
    def workers(self) -> int | None:
        """How many models are at work, where there can be several."""
        ...


class OneProcess:
    """The engine of this process, on one device."""

    patience_s: float | None = None
    workers: int | None = None

    def __init__(self, setup: Setup, check: Callable[[], None], note: Callable[[str], None]) -> None:
        self._setup, self._note = setup, note
        self._engine = cache(partial(start_engine, setup, check, note))

    def answers(self, windows: Iterable[Sequence[Item] | None]) -> Iterator[list[Answer]]:
        for window in windows:
            if window is not None:
                yield from answer_window(self._engine, window, self._setup)
        if self._started:
            for text in last_notes(self._engine()):
                self._note(text)

    @property
    def times(self) -> EngineTimes:
        return self._engine().times if self._started else EngineTimes()

    @property
    def _started(self) -> bool:
        return self._engine.cache_info().currsize > 0


def last_notes(engine: LocalEngine) -> Iterator[str]:
    """What there is to say of an engine once it has answered."""
    if engine.model.attention.capture_failure:
        yield f"decoded without CUDA graphs: {engine.model.attention.capture_failure}"


def answer_window(
    engine: Callable[[], LocalEngine], window: Sequence[Item], setup: Setup
) -> Iterator[list[Answer]]:
    """Answers of one window's rows, pack by pack; failures last, lest their share look too large.

    A pack of nothing but parts of rows may complete none: then it yields an empty list.
    """
    split = [item for item in window if isinstance(item, SplitDocument)]
    reduction = Reduction(split, setup.splitter, setup.method.name)
    waiting = [item for item in window if isinstance(item, EncodedDocument)] + reduction.prompts()
    while waiting:
        for documents, answers in guarded(engine(), setup.guard).answers(waiting):
            yield reduction.take(documents, answers)
        waiting = reduction.prompts()
    failures = [item for item in window if isinstance(item, RowFailure)]
    if failures:
        yield [Answer.from_failure(failure, setup.method.name) for failure in failures]


def guarded(engine: LocalEngine, guard: Guard | None) -> Answering:
    """The engine, with a dense one beside it where there is a guard."""
    if guard is None:
        return engine
    from pipeline.pruning.dense import Dense

    return Guarded(guard=guard, pruned=engine, dense=engine.beside(Dense()))


def start_engine(setup: Setup, check: Callable[[], None], note: Callable[[str], None]) -> LocalEngine:
    """Load the weights and warm up, and note how long that took where it took long."""
    from pipeline.engines.local import LONGEST_WARM_UP_S, LocalEngine
    from pipeline.model.decode import StopRules
    from pipeline.model.sampling import Sampling
    from pipeline.tokenizing import stop_token_ids

    config = setup.config
    check()
    started = time.perf_counter()
    with nothing_to_lose():
        model = setup.model.load()
    model.adapter.use_linears(
        config.linear_dtype,
        ffn=setup.method.ffn_in_fp8,
        keep=model is setup.model,  # who gave a loaded model may want its own precision later
    )
    rules = StopRules(
        max_new_tokens=config.max_new_tokens,
        token_ids=stop_token_ids(model.tokenizer, model.generation_config),
        texts=config.stop,
        decode_text=partial(model.tokenizer.decode, skip_special_tokens=True),
    )
    engine = LocalEngine(
        model,
        setup.method,
        rules=rules,
        sampling=Sampling(temperature=config.temperature, top_p=config.top_p, seed=config.seed),
        pack_tokens=config.pack_tokens,
        row_timeout=config.row_timeout,
        kv_memory=config.kv_memory,
        # marks are kept of rows that run on their own alone
        group=config.group == "auto" and not config.save_selection,
        save_selection=config.save_selection,
        check=check,
        note=note,
    )
    loaded_s = engine.now() - started
    warmed_up = engine.warm_up(LONGEST_WARM_UP_S)
    engine.times.load_s = loaded_s
    if not warmed_up:
        note(
            f"the warm-up was given up after {LONGEST_WARM_UP_S:g} s: "
            "the TTFT of the first packs may hold the rest of it"
        )
    elif engine.times.warm_up_s >= WORTH_A_NOTE_S:
        note(f"warmed up in {engine.times.warm_up_s:.1f} s")
    return engine
