"""EarlyExit tokens against stock layers whose hidden states are simply not updated any more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from conftest import document, pack_of

from pipeline.model.continuation import continue_with
from pipeline.model.prefill import prefill
from pipeline.pruning.base import KEEP_ALL, PruningMethod, Selection
from pipeline.pruning.operations import LayerWork

ANSWERS = [[7, 200, 31], [4], [90, 91]]


@dataclass(frozen=True, kw_only=True)
class Exiting(PruningMethod):
    """After layer `at` all but each document's last `tail` tokens stop."""

    name: ClassVar[str] = "exiting"
    at: int
    tail: int

    def select(self, layer: int, view: Any, state: Any) -> Selection:
        if layer != self.at:
            return KEEP_ALL
        ends = torch.tensor(view.segments.offsets[1:])[view.segments.document_T]
        live = (view.all_indices >= ends - self.tail).nonzero().flatten()
        return Selection(live=live, ffn=view.all_indices, early_exit=True)


@torch.inference_mode()
def naive_logits(decoder, method, ids, prompt_tokens):
    """(T, vocabulary): all tokens pass all layers, but what one that has left becomes is thrown away."""
    body = decoder.model.model
    decoder.model.set_attn_implementation("eager")
    n = len(ids)
    hidden = body.embed_tokens(ids)[None]
    goes_on = torch.ones(n, dtype=torch.bool)
    rope = body.rotary_emb(hidden, torch.arange(n)[None])
    mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
    for index, layer in enumerate(body.layers):
        after = hidden + layer.self_attn(layer.input_layernorm(hidden), rope, mask)[0]
        after = after + layer.mlp(layer.post_attention_layernorm(after))
        hidden = torch.where(goes_on[None, :, None], after, hidden)
        if index == method.at:
            goes_on[: prompt_tokens - method.tail] = False
    return decoder.model.lm_head(body.norm(hidden))[0]


def documents():
    return [document(60), document(9, seed=1), document(33, seed=2)]


@pytest.mark.parametrize(
    "method",
    [Exiting(at=0, tail=1), Exiting(at=1, tail=4), Exiting(at=2, tail=30), Exiting(at=3, tail=2)],
    ids=str,
)
def test_prompt_and_answer_equal_the_naive_ones(decoder, sdpa, method):
    prefilled = prefill(decoder, sdpa, method, pack_of(*documents()), new_tokens=3)
    hidden = continue_with(decoder, sdpa, prefilled.cache, ANSWERS, prefilled.next_positions)
    answers = decoder.logits(hidden).split([len(answer) for answer in ANSWERS])
    for b, (doc, answer) in enumerate(zip(documents(), ANSWERS, strict=True)):
        ids = torch.cat([torch.from_numpy(doc.input_ids), torch.tensor(answer)])
        expected = naive_logits(decoder, method, ids, doc.prompt_tokens)
        assert (prefilled.logits_BV[b] - expected[doc.prompt_tokens - 1]).abs().max() < 1e-3
        assert (answers[b] - expected[doc.prompt_tokens :]).abs().max() < 1e-3


def test_what_was_computed_is_counted(decoder, sdpa):
    method = Exiting(at=1, tail=4)
    prefilled = prefill(decoder, sdpa, method, pack_of(*documents()))
    for doc, (layers,) in zip(documents(), prefilled.by_document(), strict=True):
        n = doc.prompt_tokens
        whole = LayerWork(tokens=n, ffn_tokens=n)
        late = LayerWork(tokens=4, ffn_tokens=4, pairs=sum(range(n - 3, n + 1)), kv_only=n - 4)
        assert list(layers) == [whole, whole, late, late._replace(ffn_tokens=1)]
    assert prefilled.cache.prompt_tokens() == [[60, 9, 33]] * 4
