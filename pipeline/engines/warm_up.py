"""Loading kernels and libraries by prefills that are thrown away, so that no row's TTFT pays for it.

Kernels of ours are compiled once for documents of all lengths, but libraries choose theirs by size and load
each when it is first chosen, and the allocator grows with the first large prefill. So documents of a few
lengths come first, then, where it pays, some of the packs that the run begins with.
"""

from __future__ import annotations

import gc
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import torch

from pipeline.engines.clock import EngineTimes
from pipeline.engines.grouped import rehearse_group
from pipeline.engines.jobs import Job
from pipeline.engines.local import LocalEngine
from pipeline.engines.memory import least_free_bytes
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.kernels import sparse
from pipeline.model import precision
from pipeline.model.prefill import Pack, prefill
from pipeline.pruning.capabilities import HoldsUnrotatedKeys
from pipeline.records import EncodedDocument, Row, RowError, Spans

# of the longer of the two documents that warm up: kernels are chosen by size, and some load when first chosen
WARM_UP_TOKENS = {"cpu": 64, "cuda": 4096}
SHORT_WARM_UP_TOKENS = 64
# of a document that warms up where attention is block-sparse, unless all that are known are shorter
LONG_WARM_UP_TOKENS = 32768
WARM_UP_NEW_TOKENS = 3
# packs of the first window for each one that is prefilled beforehand, so an eighth at most; None: none is
PACKS_FOR_ONE: dict[str, int | None] = {"cpu": None, "cuda": 8}
MOST_PACKS = 3  # that are prefilled beforehand
LONGEST_WARM_UP_S = 60.0
WORTH_A_NOTE_S = 1.0  # of warming up, below which nobody wonders what the run is doing


def warm_up(
    engine: LocalEngine,
    limit_s: float,
    note: Callable[[str], None] = lambda text: None,
    prompts: Sequence[EncodedDocument] | None = None,
) -> bool:
    """Answer a short document and one of the length of a usual pack, on a GPU longer ones too; capture steps.

    `prompts` are those that the run begins with, None where they are not known: of many, some packs are
    prefilled once beforehand. Returns whether all ran: after `limit_s` seconds the warm-up is given up,
    between two layers. The time limit of a row does not count: loading kernels takes as long as it takes.
    """
    started = time.perf_counter()

    def check() -> None:
        engine.attempts.check()
        if time.perf_counter() - started > limit_s:
            raise RowError("timeout", f"the warm-up took longer than {limit_s:g} s")

    longest = max((document.prompt_tokens for document in prompts or ()), default=None)
    ran = all(_rehearse(engine, length, check) for length in _lengths(engine, longest))
    told = ""
    if engine.model.device.type == "cuda" and not isinstance(engine.method, HoldsUnrotatedKeys):
        told = f": {engine.prepare(least_free_bytes(engine.model.decoder))}"
    # behind all that gives memory back: the first of these packs finds the memory of the one before
    ran = ran and all(_prefill_once(engine, pack, check) for pack in _first_packs(engine, prompts or ()))
    engine.times = EngineTimes(warm_up_s=engine.attempts.now() - started)
    if not ran:
        note(
            f"the warm-up was given up after {limit_s:g} s: "
            "the TTFT of the first packs may hold the rest of it"
        )
    elif engine.times.warm_up_s >= WORTH_A_NOTE_S:
        note(f"warmed up in {engine.times.warm_up_s:.1f} s{told}")
    return ran


def _lengths(engine: LocalEngine, longest: int | None = None) -> list[int]:
    kind, shape = engine.model.device.type, engine.model.decoder.shape
    room = shape.context - min(engine.row_rules.rules.max_new_tokens, WARM_UP_NEW_TOKENS)
    # packs of one token mean one document at a time, of whatever length
    usual = engine.packer.pack_tokens if engine.packer.pack_tokens > 1 else WARM_UP_TOKENS[kind]
    short = min(room, SHORT_WARM_UP_TOKENS)
    lengths = {short, max(short, min(room, usual, WARM_UP_TOKENS[kind])), *_longer(engine, room, longest)}
    return sorted(
        n for n in lengths if n == short or engine.packer.planned_bytes([n]) <= engine.packer.all_bytes
    )


def _longer(engine: LocalEngine, room: int, longest: int | None = None) -> set[int]:
    """Lengths from which a GPU runs other kernels: fp8 in `mixed` precision, and block-sparse attention.

    The longest prompt that is known, if one is, bounds what is run to load the libraries' kernels.
    """
    decoder, device = engine.model.decoder, engine.model.device
    shape = decoder.shape
    if device.type == "cpu":
        return set()
    lengths: set[int] = set()
    if isinstance(engine.method, HoldsUnrotatedKeys):
        lengths.add(min(longest or LONG_WARM_UP_TOKENS, LONG_WARM_UP_TOKENS, room))
    if decoder.linears == "mixed":
        lengths.add(_first(lambda n: precision.worthwhile(n, shape, device), room) + precision.WINDOW)
    if any(mass is not None for mass in engine.method.masses_in(shape)):
        width, least = shape.heads * shape.head_dim, engine.model.attention.sparse_from
        first = sparse.shortest(width, device, least)
        if first is not None:
            known = LONG_WARM_UP_TOKENS if longest is None else longest
            lengths |= {first, max(first, min(known, LONG_WARM_UP_TOKENS, room))}
    return {n for n in lengths if n <= room}


def _first(begins: Callable[[int], bool], most: int) -> int:
    """The smallest number of tokens for which this is so, or one more than `most`."""
    return bisect_left(range(most + 1), True, key=begins)


def _first_packs(engine: LocalEngine, prompts: Sequence[EncodedDocument]) -> list[list[EncodedDocument]]:
    """Some of the packs that `prompts` make, the largest first; none where they are few.

    Rows about the same document come in no such packs, and who runs alone gives all memory back before.
    """
    for_one = PACKS_FOR_ONE[engine.model.device.type]
    if for_one is None:
        return []
    _, alone = engine.packs.groups.split(prompts) if engine.packs.group != "off" else ((), prompts)
    together = [document for document in alone if not engine.packer.runs_alone(document)]
    packs = sorted(engine.packer.packs(together), key=_tokens, reverse=True)
    count = min(MOST_PACKS, len(packs) // for_one)
    return [packs[place * (len(packs) - 1) // max(1, count - 1)] for place in range(count)]


def _tokens(pack: Sequence[EncodedDocument]) -> int:
    return sum(document.prompt_tokens for document in pack)


def _rehearse(engine: LocalEngine, length: int, check: Callable[[], None]) -> bool:
    """Answer a document of so many tokens; False where there was no time for it."""
    model = engine.model
    ids = np.arange(length, dtype=np.int64) % model.decoder.shape.vocab
    try:
        _answer(engine, ids, check)
        if (engine.packs.group != "off" or engine.row_rules.n > 1) and model.device.type == "cuda":
            rehearse_group(model, ids, check, engine.kv_dtype)
        return True
    except RowError as error:  # where even this exceeds --kv-memory, say, the rows will say so
        return error.kind != "timeout"
    except torch.OutOfMemoryError:  # likewise
        pass
    # outside the handler, whose traceback keeps the failed prefill's tensors alive
    gc.collect()
    torch.cuda.empty_cache()
    return True


def _prefill_once(
    engine: LocalEngine, documents: Sequence[EncodedDocument], check: Callable[[], None]
) -> bool:
    """Prefill a pack as the run will, and forget it; False where there was no time for it."""
    jobs = [Job(document=document, method=engine.method) for document in documents]
    # what fails here will fail in its row, which says why
    made = engine.attempts.run(lambda _: engine.prefiller.run(jobs, engine.packs, check), documents[0])
    return not (isinstance(made, RowError) and made.kind == "timeout")


def _answer(engine: LocalEngine, ids: np.ndarray, check: Callable[[], None]) -> None:
    model, length = engine.model, len(ids)
    # whatever the answer says, it goes on: an early stop would leave steps without their kernels
    rules = StopRules(max_new_tokens=min(engine.row_rules.rules.max_new_tokens, WARM_UP_NEW_TOKENS))
    spans = Spans(document=(0, length), question=(length, length))
    document = EncodedDocument(source=Row(row=0, id="", place=""), input_ids=ids, spans=spans)
    pack = Pack.of([document], model.device)
    limits, new_tokens = engine.packer.limits, rules.max_new_tokens
    prefilled = prefill(
        model.decoder,
        model.attention,
        engine.method,
        pack,
        new_tokens,
        check,
        limits,
        draft=engine.prefiller.draft,
    )
    decode(
        model.decoder,
        model.attention,
        prefilled,
        rules,
        check=check,
        graphs=False,
        kv_dtype=None if engine.packer.limits else engine.kv_dtype,
    )
