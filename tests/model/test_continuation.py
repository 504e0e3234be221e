"""A short forward behind a prefill: against stock transformers, and against steps of one token."""

from __future__ import annotations

import pytest
import torch
from conftest import document, pack_of, tiny_model

from pipeline.families.decoder import Decoder
from pipeline.generation.decode_batch import DecodeBatch
from pipeline.generation.step_tables import Seat
from pipeline.kernels import reference
from pipeline.kernels.decode_slots import DecodeSlots
from pipeline.kernels.segments import Segments
from pipeline.model.continuation import continue_with
from pipeline.model.graphs import StepSize
from pipeline.model.prefill import prefill
from pipeline.pruning.dense import Dense
from pipeline.pruning.registry import make_method

ANSWERS = [[7, 200, 31, 9, 50], [4], [90, 91, 5]]


def documents():
    return [document(60), document(9, seed=1), document(33, seed=2)]


def test_it_equals_the_whole_text_in_one_forward(decoder, sdpa):
    prefilled = prefill(decoder, sdpa, Dense(), pack_of(*documents()), new_tokens=5)
    hidden = continue_with(decoder, sdpa, prefilled.cache, ANSWERS, prefilled.next_positions)
    parts = decoder.logits(hidden).split([len(answer) for answer in ANSWERS])
    for doc, answer, logits in zip(documents(), ANSWERS, parts, strict=True):
        ids = torch.cat([torch.from_numpy(doc.input_ids), torch.tensor(answer)])
        with torch.inference_mode():
            expected = decoder.model(ids[None]).logits[0, -len(answer) :]
        assert (logits - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sliminfer", {"layers": "1,2", "budget": "0.6,0.4", "block": "8", "unit": "2"}),
        ("fastkv", {"share": "0.5", "kv_share": "0.3", "window": "4"}),
        ("gemfilter", {"keep": "7"}),
    ],
)
def test_it_equals_steps_of_one_token_where_layers_hold_different_tokens(name, settings, sdpa, monkeypatch):
    model, method = tiny_model("qwen3"), make_method(name, settings)
    together = prefill(model, sdpa, method, pack_of(*documents()), new_tokens=8)
    hidden = continue_with(model, sdpa, together.cache, ANSWERS, together.next_positions)
    parts = model.logits(hidden).split([len(answer) for answer in ANSWERS])
    for doc, answer, logits in zip(documents(), ANSWERS, parts, strict=True):
        alone = prefill(model, sdpa, method, pack_of(doc), new_tokens=8)
        steps = steps_of_one_token(model, sdpa, alone, answer, monkeypatch)
        for n, step in enumerate(steps):
            assert (step - logits[n]).abs().max() < 1e-3


def steps_of_one_token(model, sdpa, prefilled, answer, monkeypatch):
    """The logits that decode steps make of each of an answer's tokens, whatever they would choose."""
    cache, seen, head = prefilled.cache, [], Decoder.head

    def watched(decoder, hidden):
        seen.append(head(decoder, hidden)[0])
        return seen[-1][None]

    monkeypatch.setattr(Decoder, "head", watched)
    batch = DecodeBatch(model, sdpa, cache, capacity=1, longest=100, new_tokens=100)
    seat = Seat(starts=cache.starts(0), used=cache.used(0), position=prefilled.next_positions[0])
    batch.join([seat], [answer[0]])
    for token in answer:
        batch._tokens_C.fill_(token)
        batch.step(StepSize(1, 1))
    monkeypatch.setattr(Decoder, "head", head)
    assert len(seen) == len(answer)
    return seen


def test_it_can_be_continued(sdpa):
    model = tiny_model("llama")
    whole, halves = (prefill(model, sdpa, Dense(), pack_of(document(40)), new_tokens=6) for _ in "ab")
    expected = continue_with(model, sdpa, whole.cache, [[5, 6, 7, 8]], whole.next_positions)
    first = continue_with(model, sdpa, halves.cache, [[5, 6]], [40])
    second = continue_with(model, sdpa, halves.cache, [[7, 8]], [42])
    assert (torch.cat([first, second]) - expected).abs().max() < 1e-3


def test_a_full_cache_is_not_overwritten(sdpa):
    model = tiny_model("llama")
    prefilled = prefill(model, sdpa, Dense(), pack_of(document(40)), new_tokens=2)
    with pytest.raises(AssertionError, match="full"):
        continue_with(model, sdpa, prefilled.cache, [[1, 2, 3]], [40])


def test_a_documents_last_queries_see_what_stands_before_them(sdpa):
    segments = Segments.of((9, 5, 12))
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(segments.total, heads, 16, generator=generator) for heads in (4, 2, 2))
    expected = reference.causal_attention(q, k, v, segments)
    queries = (3, 5, 1)
    last = torch.cat(
        [torch.arange(end - n, end) for (_, end), n in zip(segments.ranges(), queries, strict=True)]
    )
    slots = DecodeSlots.of(segments.offsets[:-1], segments.lengths, segments.total, segments.device, queries)
    assert (sdpa.decode(q[last], k, v, slots) - expected[last]).abs().max() < 1e-5
