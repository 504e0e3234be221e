"""What a model answers to a prompt, and what it makes of a given answer: one prefill, one short forward.

Of a given answer no token is decoded. Teacher-forced: at each of the answer's tokens the model is asked for
the next one and then given the right one, so that an early difference does not make the rest incomparable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.generation.decode import NOT_FINITE_MESSAGE, decode
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling, first_tokens
from pipeline.model.continuation import continue_with
from pipeline.model.loading import LoadedModel
from pipeline.model.prefill import Pack, Prefilled, prefill
from pipeline.pruning.base import PruningMethod
from pipeline.records import EncodedDocument, RowError

VALUES_AT_ONCE = 1 << 28  # of logits: 1 GB as float32


@dataclass(frozen=True)
class Forced:
    """One document's answer of n tokens, as the model predicts it."""

    logprobs: np.ndarray  # (n,) float32, of the answer's own tokens
    choices: np.ndarray  # (n,) int64, the most likely tokens
    probed: np.ndarray  # (n, k) float32, log-probabilities of the tokens asked for
    probes: np.ndarray  # (n, k) int64, these tokens: the k most likely ones unless given


def score_answer(
    model: LoadedModel,
    method: PruningMethod,
    document: EncodedDocument,
    answer: Sequence[int],
    *,
    top: int = 0,
    probes: np.ndarray | None = None,
    kv: str = "auto",
) -> tuple[Forced, Prefilled, float]:
    """Score an answer of at least one token; also the prefill, and its TTFT in milliseconds.

    `top` asks for the log-probabilities of so many of the most likely tokens at each place, `probes`, (n, k),
    for those of given tokens. With `kv` fp8 the answer's tokens read the prompt's keys and values as e4m3
    leaves them; their own stay as they are. The time ends with the first choice on the host. Raises RowError
    where the model's output is not finite: of that nothing is a prediction.
    """
    pack = Pack.of([document], model.device)
    started = time.perf_counter()
    prefilled = prefill(model.decoder, model.attention, method, pack, len(answer), draft=model.draft)
    prefilled.logits_BV.argmax(-1).tolist()
    ttft_ms = (time.perf_counter() - started) * 1e3
    if kv == "fp8":
        prefilled.cache.round_to_e4m3()
    hidden_ND = continue_with(
        model.decoder, model.attention, prefilled.cache, [answer], prefilled.next_positions
    )
    return _score(model, prefilled.logits_BV, hidden_ND[:-1], answer, top, probes), prefilled, ttft_ms


@torch.inference_mode()
def _score(
    model: LoadedModel,
    first_1V: Tensor,
    rest_ND: Tensor,
    answer: Sequence[int],
    top: int,
    probes: np.ndarray | None,
) -> Forced:
    """As many tokens at a time as keep the logits within `VALUES_AT_ONCE`."""
    at_once = max(1, VALUES_AT_ONCE // model.shape.vocab)
    parts: list[tuple[Tensor, ...]] = []
    is_finite, done = True, 0
    for logits_NV in (first_1V, *map(model.decoder.logits, rest_ND.split(at_once) if len(rest_ND) else ())):
        span = slice(done, done + len(logits_NV))
        done = span.stop
        logprobs_NV = logits_NV.log_softmax(-1)
        tokens_N1 = torch.tensor(answer[span], device=logits_NV.device)[:, None]
        if probes is None:
            asked_NK = logprobs_NV.topk(top).indices
        else:
            asked_NK = torch.from_numpy(probes[span]).to(logits_NV.device)
        own_N, probed_NK = logprobs_NV.gather(1, tokens_N1)[:, 0], logprobs_NV.gather(1, asked_NK)
        best_N, choice_N = logits_NV.max(-1)
        is_finite &= bool(best_N.isfinite().all())
        parts.append((own_N, choice_N, probed_NK, asked_NK))
    if not is_finite:
        raise RowError("not_finite", NOT_FINITE_MESSAGE)
    return Forced(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def divergence(dense: Forced, other: Forced) -> float:
    """Mean KL divergence, in nats, of `other` from `dense` over dense's probes and all else as one.

    Joining tokens to one can only lower a divergence, so this is a lower bound, close where the probes hold
    nearly all of the probability. `other` must have been asked for dense's probes.
    """
    assert np.array_equal(dense.probes, other.probes), "asked for other tokens"
    p, q = dense.probed.astype(np.float64), other.probed.astype(np.float64)
    within = (np.exp(p) * (p - q)).sum(-1)
    rest_p, rest_q = (np.clip(1 - np.exp(x).sum(-1), 1e-12, 1) for x in (p, q))
    return float((within + rest_p * (np.log(rest_p) - np.log(rest_q))).mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedAnswer:
    """One document's answer."""

    tokens: list[int]  # without the stop token
    first: int  # the first token, even if it is a stop token

    @property
    def not_empty(self) -> list[int]:
        """The tokens; of an answer that is empty its stop token."""
        return self.tokens or [self.first]


def generate(
    model: LoadedModel,
    method: PruningMethod,
    document: EncodedDocument,
    rules: StopRules,
    check: Callable[[], None] = lambda: None,
    sampling: Sampling | None = None,
) -> GeneratedAnswer:
    """Answer a prompt, greedily without `sampling`, whose draws depend on the row's number.

    `check` is called between layers and steps, and may raise to give up.
    """
    sampling = sampling or Sampling()
    draws = [sampling.draws(document.source.row, rules.max_new_tokens)]
    pack = Pack.of([document], model.device)
    prefilled = prefill(
        model.decoder, model.attention, method, pack, rules.max_new_tokens, check, draft=model.draft
    )
    prompts = [document.input_ids]
    first = first_tokens(prefilled.logits_BV, draws, prompts)
    (answer,) = decode(
        model.decoder,
        model.attention,
        prefilled,
        rules,
        draws=draws,
        first=first,
        prompts=prompts,
        reasoning=[document.reasoning],
        check=check,
    )
    return GeneratedAnswer(tokens=answer.tokens, first=first[0])
