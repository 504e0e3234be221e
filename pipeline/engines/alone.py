"""Decoding a row that runs while no other does, from the keys and values of its prefill."""

from __future__ import annotations

import torch

from pipeline.engines.attempts import Check
from pipeline.engines.prefilling import PrefilledPack
from pipeline.model.decode import decode
from pipeline.model.generated import Generated, StopRules
from pipeline.model.graphs import DecodeStats
from pipeline.model.loading import LoadedModel


def decoded_alone(
    model: LoadedModel,
    pack: PrefilledPack,
    rules: StopRules,
    check: Check,
    *,
    scored: int | None,
    stats: DecodeStats,
    kv_dtype: torch.dtype,
) -> list[Generated]:
    """The answers to a pack's only prompt, one after the other, so that they take the memory of one.

    `scored` is as `DecodeBatch` takes it, and `kv_dtype` that of keys and values while they are decoded.
    Raises RowError where the model's output is not finite, and what `check` raises.
    """
    (job,), (draws,), (tokens,) = pack.jobs, pack.draws, pack.tokens
    (guides,), (scores,) = pack.guides, pack.scores
    answers: list[Generated] = []
    for own, token, guide, of_token in zip(draws, tokens, guides, scores, strict=True):
        answers += decode(
            model.decoder,
            model.attention,
            pack.prefilled,
            rules,
            draws=[own],
            first=[token],
            prompts=[job.document.input_ids],
            reasoning=[job.document.reasoning],
            guides=[guide],
            scores=[of_token],
            scored=scored,
            check=check,
            stats=stats,
            kv_dtype=kv_dtype,
            again=len(answers) + 1 < len(draws),
        )
    return answers
