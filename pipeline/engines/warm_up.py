"""Loading kernels and libraries with throw-away documents, so that no row's TTFT pays for it."""

from __future__ import annotations

import gc
import time
from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import torch

from pipeline.engines.grouped import rehearse_group
from pipeline.engines.local import LocalEngine
from pipeline.engines.memory import free_bytes
from pipeline.errors import RowError
from pipeline.kernels import sparse
from pipeline.model import precision
from pipeline.model.decode import StopRules, decode
from pipeline.model.prefill import Pack, prefill
from pipeline.records import EncodedDocument, Row, Spans
from pipeline.summary import EngineTimes

# of the longer of the two documents that warm up: kernels are chosen by size, and some load when first chosen
WARM_UP_TOKENS = {"cpu": 64, "cuda": 4096}
SHORT_WARM_UP_TOKENS = 64
# of a document that warms up where attention is block-sparse: longer ones choose among more blocks
LONG_WARM_UP_TOKENS = 32768
WARM_UP_NEW_TOKENS = 3
LONGEST_WARM_UP_S = 60.0
WORTH_A_NOTE_S = 1.0  # of warming up, below which nobody wonders what the run is doing


def warm_up(engine: LocalEngine, limit_s: float, note: Callable[[str], None] = lambda text: None) -> bool:
    """Answer a short document and one of the length of a usual pack, on a GPU longer ones too; capture steps.

    Returns whether all ran: after `limit_s` seconds the warm-up is given up, between two layers. The time
    limit of a row does not count here: loading kernels takes as long as it takes.
    """
    started = time.perf_counter()

    def check() -> None:
        engine.check()
        if time.perf_counter() - started > limit_s:
            raise RowError("timeout", f"the warm-up took longer than {limit_s:g} s")

    ran = all(_rehearse(engine, length, check) for length in _lengths(engine))
    told = ""
    if engine.model.device.type == "cuda":
        told = f": {engine.prepare(free_bytes(engine.model.device))}"
    engine.times = EngineTimes(warm_up_s=engine.now() - started)
    if not ran:
        note(
            f"the warm-up was given up after {limit_s:g} s: "
            "the TTFT of the first packs may hold the rest of it"
        )
    elif engine.times.warm_up_s >= WORTH_A_NOTE_S:
        note(f"warmed up in {engine.times.warm_up_s:.1f} s{told}")
    return ran


def _lengths(engine: LocalEngine) -> list[int]:
    kind, shape = engine.model.device.type, engine.model.adapter.shape
    room = shape.context - min(engine.rules.max_new_tokens, WARM_UP_NEW_TOKENS)
    # packs of one token mean one document at a time, of whatever length
    usual = engine.packer.pack_tokens if engine.packer.pack_tokens > 1 else WARM_UP_TOKENS[kind]
    short = min(room, SHORT_WARM_UP_TOKENS)
    lengths = {short, max(short, min(room, usual, WARM_UP_TOKENS[kind])), *_longer(engine, room)}
    return sorted(
        n for n in lengths if n == short or engine.packer.planned_bytes([n]) <= engine.packer.all_bytes
    )


def _longer(engine: LocalEngine, room: int) -> set[int]:
    """Lengths from which a GPU runs other kernels: fp8 in `mixed` precision, and block-sparse attention.

    Kernels are compiled apart for numbers of tokens that divide by 16 and for others.
    """
    adapter, device = engine.model.adapter, engine.model.device
    shape = adapter.shape
    if device.type == "cpu":
        return set()
    lengths: set[int] = set()
    if adapter.linears == "mixed":
        lengths.add(_first(lambda n: precision.worthwhile(n, shape, device), room) + precision.WINDOW)
    if any(mass is not None for mass in engine.method.attention_masses(shape.layers)):
        first = _first(lambda n: sparse.worthwhile(n, shape.heads * shape.head_dim, device), room)
        lengths |= {first, first // 16 * 16 + 16, first // 16 * 16 + 17, LONG_WARM_UP_TOKENS}
    return {n for n in lengths if n <= room}


def _first(begins: Callable[[int], bool], most: int) -> int:
    """The smallest number of tokens for which this is so, or one more than `most`."""
    return bisect_left(range(most + 1), True, key=begins)


def _rehearse(engine: LocalEngine, length: int, check: Callable[[], None]) -> bool:
    """Answer a document of so many tokens; False where there was no time for it."""
    model = engine.model
    ids = np.arange(length, dtype=np.int64) % model.adapter.shape.vocab
    try:
        _answer(engine, ids, check)
        if engine.packs.group != "off" and model.device.type == "cuda":
            rehearse_group(model, ids, check)
        return True
    except RowError as error:  # where even this exceeds --kv-memory, say, the rows will say so
        return error.kind != "timeout"
    except torch.OutOfMemoryError:  # likewise
        pass
    # outside the handler, whose traceback keeps the failed prefill's tensors alive
    gc.collect()
    torch.cuda.empty_cache()
    return True


def _answer(engine: LocalEngine, ids: np.ndarray, check: Callable[[], None]) -> None:
    model, length = engine.model, len(ids)
    # whatever the answer says, it goes on: an early stop would leave steps without their kernels
    rules = StopRules(max_new_tokens=min(engine.rules.max_new_tokens, WARM_UP_NEW_TOKENS))
    spans = Spans(document=(0, length), question=(length, length))
    document = EncodedDocument(source=Row(row=0, id="", place=""), input_ids=ids, spans=spans)
    pack = Pack.of([document], model.device)
    limits, new_tokens = engine.packer.limits, rules.max_new_tokens
    prefilled = prefill(model.adapter, model.attention, engine.method, pack, new_tokens, check, limits)
    decode(model.adapter, model.attention, prefilled, rules, check=check, graphs=False)
