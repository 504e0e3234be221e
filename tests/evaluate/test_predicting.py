"""Scores of given answers against stock transformers, and divergences against their definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import document, tiny_model

from pipeline.evaluate import predicting
from pipeline.evaluate.predicting import divergence, score_answer
from pipeline.kernels.attention import SdpaAttention
from pipeline.model.loading import LoadedModel
from pipeline.pruning.dense import Dense
from pipeline.pruning.marsinfer import MarsInfer
from pipeline.records import RowError

ANSWERS = [[7, 200, 31, 9, 50], [4]]
PRUNED = MarsInfer(start_layer=1, window=4, prefix=2, share=0.4)


@pytest.fixture(scope="module")
def model():
    return LoadedModel(
        decoder=tiny_model("qwen2"),
        tokenizer=None,
        attention=SdpaAttention(),
        generation_config=None,
        name="tiny",
        fingerprint="random",
    )


def documents():
    return [document(60), document(20, seed=1)]


def scored(model, method, *, probes=None, **options):
    """What the model makes of each document's answer."""
    asked = [None, None] if probes is None else probes
    return [
        score_answer(model, method, doc, answer, probes=probe, **options)[0]
        for doc, answer, probe in zip(documents(), ANSWERS, asked, strict=True)
    ]


def logprobs_of(model, doc, answer):
    ids = torch.cat([torch.from_numpy(doc.input_ids), torch.tensor(answer)])
    with torch.inference_mode():
        logits = model.decoder.model(ids[None]).logits[0, -len(answer) - 1 : -1]
    return logits.log_softmax(-1).numpy()


def test_what_is_not_finite_predicts_nothing(model):
    broken = replace(model, decoder=tiny_model("qwen2"))
    broken.decoder.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RowError, match="not finite"):
        scored(broken, Dense())


@pytest.mark.parametrize("values_at_once", [1 << 28, 2 * 256])
def test_scores_are_those_of_the_whole_text(model, monkeypatch, values_at_once):
    monkeypatch.setattr(predicting, "VALUES_AT_ONCE", values_at_once)
    for doc, answer, length in zip(documents(), ANSWERS, (60, 20), strict=True):
        score, prefilled, ttft_ms = score_answer(model, Dense(), doc, answer, top=3)
        assert prefilled.lengths == (length,)
        assert ttft_ms > 0
        expected = logprobs_of(model, doc, answer)
        assert np.abs(score.logprobs - expected[range(len(answer)), answer]).max() < 1e-3
        assert score.choices.tolist() == expected.argmax(-1).tolist()
        assert score.probes.shape == (len(answer), 3)
        assert (score.probes[:, 0] == score.choices).all()
        best = np.sort(expected, axis=-1)[:, ::-1][:, :3]
        assert np.abs(score.probed - best).max() < 1e-3


def test_divergence_is_zero_from_itself_and_bounded_by_the_whole_one(model):
    dense = scored(model, Dense(), top=200)
    probes = [score.probes for score in dense]
    again = scored(model, Dense(), probes=probes)
    pruned = scored(model, PRUNED, probes=probes)
    full = scored(model, PRUNED, top=256)
    assert [divergence(a, b) for a, b in zip(dense, again, strict=True)] == pytest.approx([0, 0], abs=1e-7)
    for b, answer in enumerate(ANSWERS):
        p = logprobs_of(model, documents()[b], answer).astype(np.float64)
        q = np.empty_like(p)
        np.put_along_axis(q, full[b].probes, full[b].probed.astype(np.float64), -1)
        whole = (np.exp(p) * (p - q)).sum(-1).mean()
        assert 0 < divergence(dense[b], pruned[b]) <= whole + 1e-4
        assert divergence(dense[b], pruned[b]) > 0.5 * whole


def test_other_probes_cannot_be_compared(model):
    dense = scored(model, Dense(), top=3)
    fewer = scored(model, Dense(), top=2)
    with pytest.raises(AssertionError, match="other tokens"):
        divergence(dense[0], fewer[0])
