"""How often a pruned model would have gone on as the dense one did, token by token.

Teacher-forced: every method is given the dense model's own answer and asked, at each of its tokens, which it
would have chosen next. Unlike free generation, one early difference does not make the rest incomparable.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.bench.flops import dense_work, layer_tokens
from pipeline.bench.variant import Variant, prepare
from pipeline.engines.memory import Packer
from pipeline.model.decode import StopRules
from pipeline.model.loading import LoadedModel
from pipeline.model.prefill import Pack, Prefilled, prefill
from pipeline.pruning.base import PruningMethod
from pipeline.pruning.dense import Dense
from pipeline.quality.forced import score_answers
from pipeline.quality.generate import generate
from pipeline.records import EncodedDocument


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One method over all documents."""

    variant: str
    documents: int
    tokens: int  # of the dense answers
    agreement: float  # share of them that the method would have chosen
    first_tokens: float  # share of the answers whose first token it would have chosen
    ttft_ms: float  # median, each document prefilled alone
    kv_ratio: float  # of the bytes that dense stores, mean over the documents
    kept_share_by_layer: tuple[float, ...]  # mean over the documents
    ffn_share_by_layer: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_agreement(
    model: LoadedModel,
    documents: Sequence[EncodedDocument],
    methods: Sequence[Variant],
    *,
    new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    references: Sequence[Sequence[int]] | None = None,
) -> list[Agreement]:
    """Compare each method with the dense answers, or else with `references`, at most `new_tokens` tokens.

    A reference is the tokens of one document's right answer, at least one: agreement with it is accuracy.
    """
    prepare(model, methods)
    packs = _packs(model, Dense(), documents, new_tokens)
    rules = StopRules(max_new_tokens=new_tokens, token_ids=stop_ids)
    answers: dict[int, list[int]] = {}
    if references is not None:
        answers = {id(d): list(r)[:new_tokens] for d, r in zip(documents, references, strict=True)}
    for pack in packs if references is None else ():
        dense = (answer.not_empty for answer in generate(model, Dense(), pack, rules))
        answers |= zip(map(id, pack), dense, strict=True)
    return [_measure(model, packs, answers, variant.name, variant.use(model)) for variant in methods]


def _measure(
    model: LoadedModel,
    packs: Sequence[Sequence[EncodedDocument]],
    answers: dict[int, list[int]],
    name: str,
    method: PruningMethod,
) -> Agreement:
    agreed: list[list[bool]] = []
    for pack in packs:
        agreed += _agreed(model, method, pack, [answers[id(document)] for document in pack])
    times, works = [], []
    documents = [document for pack in packs for document in pack]
    _alone(model, method, documents[0])  # a warm-up
    for document in documents:
        milliseconds, prefilled = _alone(model, method, document)
        times.append(milliseconds)
        works.append(_work(model, prefilled))
    kept, ffn, kv = zip(*works, strict=True)
    flat = [same for document in agreed for same in document]
    return Agreement(
        variant=name,
        documents=len(agreed),
        tokens=len(flat),
        agreement=statistics.mean(flat),
        first_tokens=statistics.mean(document[0] for document in agreed),
        ttft_ms=statistics.median(times),
        kv_ratio=statistics.mean(kv),
        kept_share_by_layer=tuple(map(statistics.mean, zip(*kept, strict=True))),
        ffn_share_by_layer=tuple(map(statistics.mean, zip(*ffn, strict=True))),
    )


def _packs(
    model: LoadedModel, method: PruningMethod, documents: Sequence[EncodedDocument], new_tokens: int
) -> list[list[EncodedDocument]]:
    return Packer.on(
        model.device,
        method,
        model.shape,
        itemsize=model.dtype.itemsize,
        new_tokens=new_tokens,
        pack_tokens=None,
        in_flight=0,
    ).packs(documents)


def _agreed(
    model: LoadedModel,
    method: PruningMethod,
    pack: Sequence[EncodedDocument],
    answers: Sequence[Sequence[int]],
) -> list[list[bool]]:
    """Of each document and each token of its dense answer, whether the method would have chosen it."""
    scores, _, _ = score_answers(model, method, pack, answers)
    return [(score.choices == answer).tolist() for score, answer in zip(scores, answers, strict=True)]


def _prefill(
    model: LoadedModel, method: PruningMethod, documents: Sequence[EncodedDocument], new_tokens: int
) -> Prefilled:
    pack = Pack.of(documents, model.device)
    return prefill(model.adapter, model.attention, method, pack, new_tokens)


def _alone(model: LoadedModel, method: PruningMethod, document: EncodedDocument) -> tuple[float, Prefilled]:
    started = time.perf_counter()
    prefilled = _prefill(model, method, [document], 0)
    prefilled.logits_BV.argmax(-1).tolist()  # the first token on the host, so all before it is done
    return (time.perf_counter() - started) * 1e3, prefilled


def _work(model: LoadedModel, prefilled: Prefilled) -> tuple[list[float], list[float], float]:
    """Of dense's tokens in each layer those that entered it and passed its FFN; of dense K/V those stored."""
    (length,), (passes,) = prefilled.lengths, prefilled.by_document()
    dense = layer_tokens([dense_work(model.shape.layers, length)])
    stored = sum(tokens for (tokens,) in prefilled.cache.prompt_tokens())
    kept, ffn = (
        [n / most for n, most in zip(own, of_dense, strict=True)]
        for own, of_dense in zip(layer_tokens(passes), dense, strict=True)
    )
    return kept, ffn, stored / (length * model.shape.layers)
