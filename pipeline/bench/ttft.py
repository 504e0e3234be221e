"""Time to first token of a prompt or a pack, for several methods and transformers itself, in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.bench.ceilings import Ceilings
from pipeline.bench.timing import Stopwatch, in_turns, now, peak_bytes, tidied
from pipeline.errors import ConfigError
from pipeline.generation.decode import decode
from pipeline.generation.draft_steps import with_steps
from pipeline.generation.generated import StopRules
from pipeline.kernels.fused import FP8
from pipeline.model.loading import LoadedModel
from pipeline.model.prefill import Pack, Prefilled, prefill
from pipeline.model.reading_ahead import Draft
from pipeline.model.store import slots_needed
from pipeline.model.variant import Variant, prepare
from pipeline.pruning.base import PruningMethod, Selection
from pipeline.pruning.capabilities import HoldsUnrotatedKeys, ReadsAhead
from pipeline.pruning.operations import dense_flops, dense_work, ffn_ratio, layer_tokens, passes_flops
from pipeline.pruning.view import LayerView
from pipeline.records import EncodedDocument, Spans

BASELINES = ("transformers", "transformers-cudnn")
Timed = tuple[float, dict[str, Any]]  # milliseconds of a run, and what it did
WARM_UP_TOKENS = 131_072  # of a pack, of which more would warm up nothing else
MOST_ANSWERS = 3  # timed runs to the end of an answer, which decoding makes slow


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One variant on one pack; times in milliseconds, device-synchronised, warm-up left out.

    Operations and bytes are of all documents together, shares of tokens means over documents.
    """

    variant: str
    tokens: int  # of all documents
    ttft_ms: float  # median
    fastest_ms: float
    slowest_ms: float
    repeats: int
    documents: int = 1
    peak_bytes: int | None  # of the device's allocator; None on the CPU
    ffn_ratio: float | None = None  # tokens through FFNs, of dense
    flops_ratio: float | None = None  # operations done, of dense
    tflops_per_second: float | None = None
    kv_bytes: int | None = None
    kv_ratio: float | None = None  # of the bytes that dense stores
    select_ms: float | None = None  # scoring and selection, in a run of their own
    sums_ms: float | None = None  # of what ranks of a divided model have made, in a run of their own
    floor_ms: float | None = None  # the operations at the ceilings measured in the same run
    end_to_end_ms: float | None = None  # with the new tokens asked for, of every document; median
    ffn_share_by_layer: tuple[float, ...] | None = None
    kept_share_by_layer: tuple[float, ...] | None = None


def measure_ttft(
    model: LoadedModel,
    documents: Sequence[EncodedDocument],
    methods: Sequence[Variant],
    *,
    baselines: Sequence[str] = (),
    repeats: int = 5,
    new_tokens: int = 0,
    ceilings: Ceilings | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[Measurement]:
    """Measure every variant on one pack, taking turns so that a drifting clock touches all alike.

    With `new_tokens`, methods are also timed to the end of answers of that length, in turns of their own.
    What is longer than `WARM_UP_TOKENS` is warmed up by a part of it, and its selection is not timed.
    `check` is called before each run, and may raise to give up. Raises ConfigError for baselines that cannot
    run here, or not with several documents.
    """
    ranks = model.decoder.ranks
    check_baselines(baselines, len(documents), 1 if ranks is None else ranks.count)
    if any(variant.kv != "auto" for variant in methods):
        model.check_fp8()
    part = _beginnings(documents)
    if part is not None:
        measure_ttft(model, part, methods, baselines=baselines, repeats=1, check=check)
    pack = Pack.of(documents, model.device)
    runs = {name: partial(_timed, model, _transformers_run(model, pack, name)) for name in baselines}
    answers = {}
    prepare(model, methods)
    with ExitStack() as held:
        for variant in methods:
            draft = with_steps(model.draft, variant.method, _draft_slots(model, pack, variant.method), held)
            run, to_the_end = (_method_run(model, draft, pack, variant, tokens) for tokens in (0, new_tokens))
            runs[variant.name] = partial(_timed, model, run, ceilings, variant.linears_in_fp8)
            answers[variant.name] = partial(_timed, model, to_the_end)
        # the first turn warms up, if nothing has before, and tells what was done
        times = in_turns(runs, repeats + (part is None), check)
        if part is not None:
            times = {name: [of_turns[0], *of_turns] for name, of_turns in times.items()}
        timed = methods if part is None else ()
        within = {variant.name: _within(model, pack, variant.use(model)) for variant in timed}
        ends = in_turns(answers, min(repeats, MOST_ANSWERS) if new_tokens else 0, check)
    return [
        _measurement(name, documents, times[name], within.get(name, _Within()), ends.get(name, ()))
        for name in runs
    ]


def _beginnings(documents: Sequence[EncodedDocument]) -> list[EncodedDocument] | None:
    """As many first tokens of documents as warm up; None where these have no more."""
    if sum(document.prompt_tokens for document in documents) <= WARM_UP_TOKENS:
        return None
    most = max(1, WARM_UP_TOKENS // len(documents))
    return [
        replace(
            document,
            input_ids=document.input_ids[:most],
            spans=Spans(document=(0, n := min(most, document.prompt_tokens)), question=(n, n)),
        )
        for document in documents
    ]


def check_baselines(baselines: Sequence[str], documents: int, ranks: int = 1) -> None:
    """Raise ConfigError for what stock transformers cannot be measured with."""
    if baselines and ranks > 1:
        raise ConfigError(f"baseline {baselines[0]} runs on one GPU, not on {ranks}: give --baselines none")
    if baselines and documents > 1:
        raise ConfigError(
            f"baseline {baselines[0]} runs one document at a time, and --documents is {documents}: "
            "give --baselines none"
        )
    unknown = next((name for name in baselines if name not in BASELINES), None)
    if unknown is not None:
        raise ConfigError(f"unknown baseline {unknown!r}; baselines: {', '.join(BASELINES)}")


def _draft_slots(model: LoadedModel, pack: Pack, method: PruningMethod) -> int:
    """That a draft's look-ahead steps need for this pack."""
    if model.draft is None or not isinstance(method, ReadsAhead):
        return 0
    layers, room = model.draft.shape.layers, method.look_ahead
    return sum(slots_needed([length] * layers, room, model.device) for length in pack.lengths)


def _method_run(
    model: LoadedModel, draft: Draft | None, pack: Pack, variant: Variant, new_tokens: int = 0
) -> Callable[[], Prefilled]:
    """A prefill to the first tokens on the host, or to the end of answers of `new_tokens`."""
    rules, kv_dtype = StopRules(max_new_tokens=new_tokens), FP8 if variant.kv == "fp8" else None

    def run() -> Prefilled:
        method = variant.use(model)  # which sets the model's attention, too
        decoder, attention = model.decoder, model.attention
        # of several documents keys and values are rounded where they are decoded
        stored = kv_dtype if len(pack.segments) == 1 else None
        prefilled = prefill(decoder, attention, method, pack, new_tokens, kv_dtype=stored, draft=draft)
        if new_tokens:
            decode(decoder, attention, prefilled, rules, kv_dtype=kv_dtype)
        else:
            prefilled.logits_BV.argmax(-1).tolist()
        return prefilled

    return run


class _TimedMethod:
    """Passes everything on to a method, and times its `select`."""

    def __init__(self, method: PruningMethod, stopwatch: Stopwatch) -> None:
        self._method, self._stopwatch = method, stopwatch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _untimed, (self._method,)  # on other ranks

    def select(self, layer: int, view: LayerView, state: Any) -> Selection:
        return self._stopwatch.time(partial(self._method.select, layer, view, state))


def _untimed(method: PruningMethod) -> PruningMethod:
    return method


class _Within(NamedTuple):
    """Milliseconds of parts of a prefill."""

    select_ms: float | None = None
    sums_ms: float | None = None


def _within(model: LoadedModel, pack: Pack, method: PruningMethod) -> _Within:
    """Time in the method's scoring and selection over one prefill, and in sums over ranks over another.

    A method that holds keys itself selects nothing.
    """
    if isinstance(method, HoldsUnrotatedKeys):
        return _Within()
    select, sums, ranks = Stopwatch(model.device), Stopwatch(model.device), model.decoder.ranks
    timed = _TimedMethod(method, select)
    prefill(model.decoder, model.attention, cast(PruningMethod, timed), pack, draft=model.draft)
    if ranks is None:
        return _Within(select.milliseconds())
    ranks.timer = sums.time
    try:
        prefill(model.decoder, model.attention, method, pack)
    finally:
        ranks.timer = None
    return _Within(select.milliseconds(), sums.milliseconds())


def _transformers_run(model: LoadedModel, pack: Pack, baseline: str) -> Callable[[], None]:
    """Stock transformers on the same weights: `default` attention is its SDPA with torch's choice."""
    if baseline == "transformers-cudnn" and model.device.type != "cuda":
        raise ConfigError(f"baseline {baseline} needs an NVIDIA GPU; leave it out")

    @torch.inference_mode()
    def run() -> None:
        forced = baseline == "transformers-cudnn"
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if forced else nullcontext():
            output = model.decoder.model(pack.input_ids[None], use_cache=True, logits_to_keep=1)
        output.logits[:, -1].argmax(-1).tolist()

    return run


def _timed(
    model: LoadedModel,
    run: Callable[[], Prefilled | None],
    ceilings: Ceilings | None = None,
    linears_in_fp8: bool = False,
) -> Timed:
    """Time a run to its end, and note the peak of the device's memory."""
    started = tidied(model.device)
    prefilled = run()
    milliseconds, peak = (now(model.device) - started) * 1e3, peak_bytes(model.device)
    # a baseline is dense and reports nothing of its own
    done = {} if prefilled is None else _work(model, prefilled, ceilings, linears_in_fp8)
    return milliseconds, {"peak_bytes": peak, **done}


def _work(
    model: LoadedModel, prefilled: Prefilled, ceilings: Ceilings | None, linears_in_fp8: bool
) -> dict[str, Any]:
    """What the method did."""
    shape = model.decoder.shape
    lengths, by_document = prefilled.lengths, prefilled.by_document()
    done = sum(passes_flops(shape, passes) for passes in by_document) + sum(prefilled.draft_flops)
    tokens_D2L = np.array([layer_tokens(passes) for passes in by_document])  # that entered, or passed FFNs
    dense_D2L = np.array([layer_tokens([dense_work(shape, length)]) for length in lengths])
    kept_shares, ffn_shares = (tokens_D2L / dense_D2L).mean(0).round(4).tolist()
    floors = [ceilings.floor_ms(shape, passes, linears_in_fp8) for passes in by_document] if ceilings else []
    if prefilled.reading is not None:  # by a model of another shape, for which no ceilings were measured
        floors = []
    devices = 1 if model.decoder.ranks is None else model.decoder.ranks.count
    dense_kv = sum(lengths) * shape.layers * model.own.kv_bytes_per_token(model.decoder.dtype.itemsize)
    return {
        "flops": done,
        "flops_ratio": done / sum(dense_flops(shape, length) for length in lengths),
        "floor_ms": sum(floors) / devices if floors else None,
        "ffn_ratio": statistics.mean(
            ffn_ratio(shape, passes, length) for passes, length in zip(by_document, lengths, strict=True)
        ),
        "kv_bytes": prefilled.cache.nbytes,
        "kv_ratio": prefilled.cache.nbytes / dense_kv,
        "ffn_share_by_layer": tuple(ffn_shares),
        "kept_share_by_layer": tuple(kept_shares),
    }


def _measurement(
    name: str,
    documents: Sequence[EncodedDocument],
    timed: Sequence[Timed],
    within: _Within,
    to_the_end: Sequence[Timed],
) -> Measurement:
    (_, work), *turns = timed
    times = [milliseconds for milliseconds, _ in turns]
    flops, median = work.pop("flops", None), statistics.median(times)
    return Measurement(
        variant=name,
        tokens=sum(document.prompt_tokens for document in documents),
        documents=len(documents),
        ttft_ms=median,
        fastest_ms=min(times),
        slowest_ms=max(times),
        repeats=len(times),
        tflops_per_second=flops / median / 1e9 if flops else None,
        select_ms=within.select_ms,
        sums_ms=within.sums_ms,
        end_to_end_ms=statistics.median(ms for ms, _ in to_the_end) if to_the_end else None,
        **work,
    )


def saving_reached(measured: Measurement, dense: Measurement) -> float | None:
    """The time saved against dense, over what the operation count predicts: dense * (1 - flops_ratio)."""
    if measured.flops_ratio is None or measured.flops_ratio >= 1:
        return None
    predicted_ms = dense.ttft_ms * (1 - measured.flops_ratio)
    return (dense.ttft_ms - measured.ttft_ms) / predicted_ms
