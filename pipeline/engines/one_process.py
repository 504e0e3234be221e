"""The local engine: rows are answered in this process, as they are read."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pipeline.engines.blocks import Key, Window, key_of
from pipeline.engines.clock import EngineTimes
from pipeline.engines.redrawing import Redrawing
from pipeline.errors import MarsError
from pipeline.interrupts import nothing_to_lose
from pipeline.prompts.mapreduce import Reduction
from pipeline.prompts.splitting import SplitDocument
from pipeline.records import Answer, EncodedDocument, RowError
from pipeline.settings.parse import parse_lookup
from pipeline.setup.intake import Item

if TYPE_CHECKING:
    from pipeline.engines.local import LocalEngine
    from pipeline.engines.restarting import Restarting
    from pipeline.families.projection import LinearPrecision
    from pipeline.model.loading import LoadedModel, Model
    from pipeline.setup.preparation import Setup

PATIENCE_S = 0.002  # for rows to be read, while others are being answered
# answers go to the journal a few at a time, since each time costs a write that is waited for
MOST_ROWS = 64
MOST_S = 1.0  # that an answer waits for others
LARGE_BYTES = 1 << 30  # of weights, from which on their memory is worth a note


class Hooks(NamedTuple):
    """What is called during a run: `check` often, and it may raise; `note` and `phase` with texts."""

    check: Callable[[], None] = lambda: None
    note: Callable[[str], None] = lambda text: None  # of what a user should know
    phase: Callable[[str], None] = lambda text: None  # of what is being done, whenever that changes


class Engine(Protocol):
    """What answers the rows of a run, wherever its models are; the first row that needs one loads them."""

    patience_s: float | None  # how long it waits for a window before it is given None; None: however long

    def answers(self, windows: Iterable[Sequence[Item] | None]) -> Generator[list[Answer], None, None]:
        """Answers of all rows, some at a time, in no order; a list may be empty."""
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

    patience_s: float | None = PATIENCE_S
    workers: int | None = None

    def __init__(self, setup: Setup, hooks: Hooks) -> None:
        self._setup, self._hooks = setup, hooks
        self._engine: LocalEngine | Restarting | None = None

    def answers(self, windows: Iterable[Sequence[Item] | None]) -> Generator[list[Answer], None, None]:
        """As an engine does. Raises ConfigError where the model is one that answers other rows meanwhile."""
        with self._setup.model.in_use():
            yield from self._answers(windows)

    def _answers(self, windows: Iterable[Sequence[Item] | None]) -> Iterator[list[Answer]]:
        try:
            yield from answer_windows(self._start, windows, self._setup)
            if self._engine is not None:
                for text in last_notes(self._engine):
                    self._hooks.note(text)
        finally:
            if self._engine is not None:
                self._engine.close()

    @property
    def times(self) -> EngineTimes:
        return EngineTimes() if self._engine is None else self._engine.times

    def _start(self, prompts: Sequence[EncodedDocument]) -> LocalEngine | Restarting:
        if self._engine is None:
            start = partial(start_engine, self._setup, self._hooks)
            engine = start(prompts)
            self._engine = engine
            if engine.model.lead is not None:
                from pipeline.engines.restarting import Restarting

                self._engine = Restarting(engine, start, self._hooks.note)
        return self._engine


def last_notes(engine: LocalEngine | Restarting) -> Iterator[str]:
    """What there is to say of an engine once it has answered."""
    if engine.model.attention.capture_failure:
        yield f"decoded without CUDA graphs: {engine.model.attention.capture_failure}"


def answer_windows(
    engine: Callable[[Sequence[EncodedDocument]], LocalEngine | Restarting],
    windows: Iterable[Sequence[Item] | None],
    setup: Setup,
) -> Iterator[list[Answer]]:
    """Answers to the rows of all windows, each a short while after it is there.

    The next window is taken in when few documents wait, while others are being answered. A window's failures
    come behind its other rows, lest their share look too large. `engine` is called with the first
    prompts that there are.
    """
    reduction = Reduction(setup.splitter, setup.method.name)
    redrawing = Redrawing(setup.validity, setup.config)
    outgoing = Outgoing(setup.method.name)
    incoming, is_more = iter(windows), True
    started: LocalEngine | Restarting | None = None
    while is_more or (started is not None and started.is_busy):
        while is_more and (started is None or started.wants_more):
            window = next(incoming, ())
            if window is None:  # none is read yet
                break
            is_more = bool(window)
            outgoing.expect(window)
            redrawing.expect(window)
            prompts = _prompts(window, reduction)
            if prompts:
                started = started or engine(prompts)
                # no more than a kill costs anyway
                outgoing.most_rows = min(MOST_ROWS, started.packer.in_flight)
                started.add(prompts)
        try:
            for answered in started.advance() if started is not None else ():
                outgoing.put(redrawing.take(reduction.take(answered)))
        except MarsError:  # which ends the run: an interrupt, say
            yield from outgoing.rest()
            raise
        if started is not None:
            started.add(_prompts(redrawing.items(), reduction))
        yield from outgoing.due()
    yield from outgoing.rest()


class Outgoing:
    """Answers that are to be handed on, and the failures of windows of which all else is answered."""

    def __init__(self, method: str) -> None:
        """`method` is what rows name that never reached one."""
        self._method = method
        self.most_rows = MOST_ROWS  # that wait for others
        self._ready: list[Answer] = []
        self._since = 0.0
        self._window_of: dict[Key, Window] = {}

    def expect(self, items: Sequence[Item]) -> None:
        """Learn which rows a window has."""
        failures = [item for item in items if isinstance(item, RowError)]
        keys = [key_of(item.source) for item in items if not isinstance(item, RowError)]
        window = Window(failures=failures, unfinished=len(keys))
        self._window_of |= dict.fromkeys(keys, window)
        self._finish(window, 0)

    def put(self, answer: Answer | None) -> None:
        """Take in a row's answer, if there is one, and behind its window's last one the failures."""
        if answer is not None:
            self._put([answer])
            self._finish(self._window_of.pop(key_of(answer)), 1)

    def _finish(self, window: Window, rows: int) -> None:
        self._put([Answer.from_failure(failure, self._method) for failure in window.finish(rows)])

    def _put(self, answers: Sequence[Answer]) -> None:
        if not self._ready:
            self._since = time.perf_counter()
        self._ready += answers

    def due(self) -> Iterator[list[Answer]]:
        """What is there, if it is enough or has waited long enough."""
        if len(self._ready) >= self.most_rows or (
            self._ready and time.perf_counter() - self._since >= MOST_S
        ):
            yield from self.rest()

    def rest(self) -> Iterator[list[Answer]]:
        """Whatever is there."""
        if self._ready:
            ready, self._ready = self._ready, []
            yield ready


def _prompts(window: Sequence[Item], reduction: Reduction) -> list[EncodedDocument]:
    """What is to be answered next, of these items at first."""
    for item in window:
        if isinstance(item, SplitDocument):
            reduction.add(item)
    return [item for item in window if isinstance(item, EncodedDocument)] + reduction.prompts()


def start_engine(setup: Setup, hooks: Hooks, prompts: Sequence[EncodedDocument] | None = None) -> LocalEngine:
    """Load the weights and warm up, and note how long that took where it took long.

    `prompts` are the first that will be answered, None where they are not known.
    """
    hooks.phase("loading the model")
    started = time.perf_counter()
    config = setup.config
    hooks.check()
    precision = setup.precision
    _tell_memory(setup.model, precision, hooks)
    with nothing_to_lose():
        model = setup.model.load(precision, setup.remedies)
    if model is setup.model:  # who gave a loaded model may want its own precision later
        for decoder in model.decoders:
            decoder.use_linears(config.linear_dtype, ffn=precision.ffn, keep=True)
    try:
        return _warmed_up(setup, model, hooks, prompts, started)
    except BaseException:
        if model is not setup.model:
            model.close()
        raise


def _warmed_up(
    setup: Setup,
    model: LoadedModel,
    hooks: Hooks,
    prompts: Sequence[EncodedDocument] | None,
    started: float,
) -> LocalEngine:
    """An engine with a model whose loading `started` then."""
    from pipeline.engines.answering import rules_of, sampling_of
    from pipeline.engines.local import LocalEngine
    from pipeline.engines.warm_up import LONGEST_WARM_UP_S, warm_up
    from pipeline.families.exit_maps import exit_maps
    from pipeline.pruning.capabilities import HoldsUnrotatedKeys

    config, alone = setup.config, isinstance(setup.method, HoldsUnrotatedKeys)
    exit_maps(model.decoder, setup.method)  # before memory is planned
    engine = LocalEngine(
        model,
        setup.method,
        rules=rules_of(config, model),
        sampling=sampling_of(config),
        response_format=setup.response_format,
        logprobs=config.logprobs,
        pack_tokens=config.pack_tokens,
        row_timeout=config.row_timeout,
        kv_memory=config.kv_memory,
        kv_dtype=config.kv_dtype,
        lookup=parse_lookup(config.lookup),
        in_flight=config.in_flight,
        n=config.n,
        # marks are kept of rows that run on their own alone, as those of some methods all do
        group="off" if config.save_selection or alone else config.group,
        guard=setup.guard,
        save_selection=config.save_selection,
        remedies=setup.remedies,
        **hooks._asdict(),
    )
    loaded_s = engine.attempts.now() - started
    hooks.phase("warming up")
    warm_up(engine, LONGEST_WARM_UP_S, hooks.note, prompts)
    engine.times.load_s = loaded_s
    return engine


def _tell_memory(model: Model, precision: LinearPrecision, hooks: Hooks) -> None:
    """Say what the weights take that are about to be read, in a note where they are large."""
    memory = model.memory(precision)
    if memory is None:
        return
    hooks.phase(f"loading the model: {memory}")
    if memory.held >= LARGE_BYTES:
        hooks.note(str(memory))
