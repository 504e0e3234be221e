"""What runs in each worker of the Ray engine: one model on one device, and the blocks that it is given."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import ray

from pipeline.engines.blocks import Unit, moved
from pipeline.engines.clock import EngineTimes
from pipeline.engines.one_process import Hooks, answer_windows, last_notes, start_engine
from pipeline.errors import ConfigError, MarsError, ModelError, RankFailed
from pipeline.records import Answer
from pipeline.settings.run_settings import BatchConfig
from pipeline.setup.preparation import Setup, open_for_run

if TYPE_CHECKING:
    from pipeline.engines.local import LocalEngine
    from pipeline.model.loading import UnloadedModel


class Started(NamedTuple):
    """A worker that is ready for rows."""

    node: str  # its address
    batch_tokens: int  # of prompts that it can work on at once


class Told(NamedTuple):
    """What a worker sends from time to time, or after its last row."""

    answers: list[Answer]
    notes: list[str]
    times: EngineTimes  # with ages in place of times
    is_last: bool


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a worker's device makes of a model: what another process cannot know."""

    dtype: str
    device_name: str
    attention_name: str
    attention_refused: dict[str, str]
    fp8_refused: str | None  # why linear layers cannot be computed in fp8


def model_facts(config: BatchConfig) -> ModelFacts:
    """Raises ConfigError or ModelError, as opening the model does; loads no weights."""
    model = open_for_run(config, device="cuda")
    try:
        model.check_fp8()
        refused = None
    except ConfigError as error:
        refused = str(error)
    return ModelFacts(
        dtype=str(model.dtype).removeprefix("torch."),
        device_name=model.device_name(),
        attention_name=model.attention_name,
        attention_refused=model.attention_refused,
        fp8_refused=refused,
    )


class Worker:
    """One model, in a process that Ray makes, and makes again should it die."""

    def __init__(self, *, gpus: int, workers: int) -> None:
        """`workers` is how many there are, of which several may share a machine."""
        self._gpus, self._workers = gpus, workers
        self._notes: list[str] = []
        self._ready: tuple[Setup, LocalEngine] | None = None

    def start(self, setup: Setup, fingerprint: str) -> Started:
        """Load the weights and warm up; raises a MarsError that names this machine where that cannot be."""
        node = ray.util.get_node_ip_address()
        try:
            setup = replace(setup, model=self._open(setup, fingerprint))
            engine = start_engine(setup, Hooks(note=lambda text: self._notes.append(text)))
        except MarsError as error:
            raise type(error)(f"on {node}: {error}") from error
        self._share_memory(engine)
        self._ready = setup, engine
        return Started(node, engine.packer.batch_tokens)

    def _open(self, setup: Setup, fingerprint: str) -> UnloadedModel:
        dtype = str(setup.model.dtype).removeprefix("torch.")
        # a branch may have moved since the run opened its model
        pinned = {} if setup.model.commit is None else {"revision": setup.model.commit}
        device = "cuda" if self._gpus else "cpu"
        model = open_for_run(setup.config, dtype=dtype, device=device, **pinned)
        if model.fingerprint != fingerprint:
            raise ModelError(
                f"{model.name} ({model.fingerprint[:20]}) is not the model of this run ({fingerprint[:20]}):"
                " put the same files on all machines"
            )
        return model

    def answer(self, units: list[Unit], *, apart: bool) -> Iterator[Told]:
        """Answers of a block; with `apart`, unit by unit. Of the rows, `ready_at` is an age."""
        assert self._ready is not None
        (setup, engine), now = self._ready, time.perf_counter()
        here = [[moved(item, now) for item in unit] for unit in units]
        try:
            for items in here if apart else [list(chain.from_iterable(here))]:
                for answers in answer_windows(lambda prompts: engine, [items], setup):
                    yield self._told(engine, answers)
        except RankFailed:
            os._exit(1)  # Ray makes this process again, with others that have parts of the model
        self._notes += last_notes(engine)
        yield self._told(engine, [], is_last=True)

    def _told(self, engine: LocalEngine, answers: list[Answer], *, is_last: bool = False) -> Told:
        notes, self._notes = self._notes, []
        return Told(answers, notes, engine.times.mirrored(time.perf_counter()), is_last)

    def _share_memory(self, engine: LocalEngine) -> None:
        """Leave the other workers on this machine their part of its memory; a GPU's is its worker's own."""
        here = next(node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
        places = int(here["Resources"].get("GPU" if self._gpus else "CPU", 1))
        shares = max(1, min(self._workers, places // max(1, self._gpus)))
        packer = engine.packer
        engine.packer = replace(
            packer,
            host_bytes=packer.host_bytes // shares,
            max_bytes=packer.max_bytes if self._gpus else packer.max_bytes // shares,
            store_bytes=packer.store_bytes if self._gpus else packer.store_bytes // shares,
        )
