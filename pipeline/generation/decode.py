"""Answers to the prompts of one prefill, beside no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from pipeline.families.decoder import Decoder
from pipeline.generation.decode_loop import DecodeLoop
from pipeline.generation.generated import Generated, StopRules
from pipeline.generation.guide import Guide
from pipeline.generation.sampling import RowDraws, Sampling, first_tokens
from pipeline.generation.step_tables import Seat
from pipeline.kernels.attention import AttentionBackend
from pipeline.model.graphs import DecodeStats
from pipeline.model.prefill import Prefilled
from pipeline.model.store import rows_in
from pipeline.pruning.capabilities import StepSkips
from pipeline.records import Reasoning, RowError

NOT_FINITE_MESSAGE = "the model's output is not finite; try another --dtype or --attention"


@torch.inference_mode()
def decode(
    decoder: Decoder,
    attention: AttentionBackend,
    prefilled: Prefilled,
    rules: StopRules,
    *,
    sampling: Sampling | None = None,
    draws: Sequence[RowDraws | None] = (),
    first: Sequence[int] | None = None,
    prompts: Sequence[np.ndarray] = (),
    reasoning: Sequence[Reasoning | None] | None = None,
    guides: Sequence[Guide | None] | None = None,
    scores: Sequence[Sequence[float]] | None = None,
    scored: int | None = None,
    check: Callable[[], None] = lambda: None,
    graphs: bool = True,
    stats: DecodeStats | None = None,
    late: int | None = None,
    kv_dtype: torch.dtype | None = None,
    again: bool = False,
    skips: StepSkips | None = None,
) -> list[Generated]:
    """Answers to all prompts of one prefill, beside no others; greedy ones without `sampling`.

    Of answers that are drawn `draws` says by what, by default as rows 0, 1, ... are. `first` are the first
    tokens, if they have been chosen, with `scores` as `Generated.take` has them, `prompts` the token ids of
    each, which a repetition penalty is for, `reasoning` is what each prompt says of it, and `guides` hold
    answers to forms. `scored` is as `DecodeBatch` takes it. With a `kv_dtype` of float8_e4m3fn keys and
    values are rounded to it first, where the prefill's are not in it, and those of the prefill freed, unless
    it is to be decoded `again`.
    With `skips` a pack of one prompt leaves feed-forward networks out. `check` is called before every step,
    and may raise to give the pack up. Raises RowError where the model's output is not finite.
    """
    sampling = sampling or Sampling()
    count = len(prefilled.lengths)
    draws = draws or [sampling.draws(row, rules.max_new_tokens) for row in range(count)]
    if first is None:
        first = first_tokens(prefilled.logits_BV, draws, prompts)
    none = [None] * count
    answers = [
        Generated(rules=rules, reasoning=each, guide=guide)
        for each, guide in zip(reasoning or none, guides or none, strict=True)
    ]
    for answer, token, of_token in zip(answers, first, scores or [()] * count, strict=True):
        answer.take(token, of_token)
        if answer.weighs is not None and not prefilled.cache.on_device_alone:
            answer.end_visits()
    cache = prefilled.cache
    cache.check_rows(count, again=again)
    own = [cache.used(b) for b in range(count)]
    dtype = kv_dtype or decoder.dtype
    converts = dtype != (cache.dtype or decoder.dtype)
    frees = converts and not again
    kv, extents, documents = rows_in(
        cache, decoder, rules.max_new_tokens, dtype=dtype, converts=converts, frees=frees
    )
    shared = [None] * count if cache.shared is None else [documents[g] for g in cache.shared.of_row]
    loop = DecodeLoop(
        decoder,
        attention,
        kv,
        new_tokens=rules.max_new_tokens,
        sampling=sampling,
        capacity=count,
        longest=max(map(max, own)) + rules.max_new_tokens,
        scored=scored,
        graphs=graphs,
        stats=stats,
        late=late,
        skips=skips,
    )
    live = [b for b, answer in enumerate(answers) if answer.finish_reason is None]
    seats = [
        Seat(
            starts=extents[b].starts if extents else cache.starts(b),
            used=own[b],
            position=prefilled.next_positions[b],
            reach=cache.reaches[b],
            line=extents[b].line if extents else b,
            shared=shared[b],
            prompt=prompts[b] if prompts else None,
        )
        for b in live
    ]
    try:
        if live:
            loop.join([answers[b] for b in live], seats, [draws[b] for b in live])
        while loop.is_busy and not _any_not_finite(answers):
            check()
            loop.step()
    finally:
        loop.close()
    if _any_not_finite(answers):
        raise RowError("not_finite", NOT_FINITE_MESSAGE)
    return answers


def _any_not_finite(answers: Sequence[Generated]) -> bool:
    return any(answer.finish_reason == "not_finite" for answer in answers)
