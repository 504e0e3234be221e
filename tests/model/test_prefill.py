"""The layer loop against stock transformers, against itself in packs, and against generate()."""

from __future__ import annotations

import pytest
import torch
from conftest import document, pack_of, tiny_model

from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling
from pipeline.model.prefill import prefill
from pipeline.pruning.base import PruningMethod, Selection
from pipeline.pruning.dense import Dense
from pipeline.pruning.marsinfer import MarsInfer


def stock_logits(decoder, doc):
    with torch.inference_mode():
        return decoder.model(torch.from_numpy(doc.input_ids)[None]).logits[0, -1]


def test_dense_gives_the_logits_of_stock_transformers(decoder, sdpa):
    doc = document(97)
    ours = prefill(decoder, sdpa, Dense(), pack_of(doc)).logits_BV[0]
    stock = stock_logits(decoder, doc)
    assert stock.std() > 0.1  # not vacuous: the logits differ from each other
    assert (ours - stock).abs().max() <= 1e-4
    assert ours.argmax() == stock.argmax()


@pytest.mark.parametrize("method", [MarsInfer(eta=1.0, start_layer=0), MarsInfer(share=1.0, start_layer=1)])
def test_full_settings_equal_dense_through_the_real_gather(decoder, sdpa, method):
    pack = pack_of(document(97), document(40, seed=1))
    dense = prefill(decoder, sdpa, Dense(), pack)
    full = prefill(decoder, sdpa, method, pack)
    assert (full.logits_BV - dense.logits_BV).abs().max() <= 1e-4
    assert full.work.ffn() == dense.work.ffn()


@pytest.mark.parametrize(
    "method", [Dense(), MarsInfer(eta=0.6, start_layer=1, window=5, prefix=4)], ids=["dense", "marsinfer"]
)
def test_a_pack_gives_each_document_alone(decoder, sdpa, method):
    documents = [document(length, seed=length) for length in (61, 17, 130, 1 + 8)]
    together = prefill(decoder, sdpa, method, pack_of(*documents))
    for b, doc in enumerate(documents):
        alone = prefill(decoder, sdpa, method, pack_of(doc))
        assert (together.logits_BV[b] - alone.logits_BV[0]).abs().max() <= 1e-4
        assert [row[b] for row in together.work.ffn()] == [row[0] for row in alone.work.ffn()]


def answer(decoder, sdpa, documents, method, max_new_tokens, late=0, **settings):
    prefilled = prefill(decoder, sdpa, method, pack_of(*documents), new_tokens=max_new_tokens)
    sampling, rules = Sampling(**settings), StopRules(max_new_tokens=max_new_tokens)
    draws = [sampling.draws(doc.source.row, max_new_tokens) for doc in documents]
    generated = decode(decoder, sdpa, prefilled, rules, draws=draws, late=late)
    return [g.tokens for g in generated]


@pytest.mark.parametrize("late", [0, 1])
def test_greedy_decode_gives_the_tokens_of_generate(decoder, sdpa, late):
    documents = [document(61), document(23, seed=1)]
    answers = answer(decoder, sdpa, documents, Dense(), 12, late)
    for doc, tokens in zip(documents, answers, strict=True):
        ids = torch.from_numpy(doc.input_ids)[None]
        stock = decoder.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        assert tokens == stock[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("late", [0, 1])
def test_sampling_draws_do_not_depend_on_the_pack(sdpa, late):
    decoder = tiny_model("qwen2")
    documents = [document(30 + row, seed=row, row=row) for row in range(4)]
    settings = {"temperature": 1.5, "top_p": 0.9, "seed": 3}
    together = answer(decoder, sdpa, documents, Dense(), 8, late, **settings)
    alone = [answer(decoder, sdpa, [doc], Dense(), 8, **settings)[0] for doc in documents]
    assert together == alone
    other_seed = answer(decoder, sdpa, documents, Dense(), 8, **{**settings, "seed": 4})
    assert other_seed != together


class DropHalf(PruningMethod):
    """Every second token leaves after layer 1, but never the last eight."""

    name = "drop-half"

    def select(self, layer, view, state):
        if layer != 1:
            return Selection()
        late = view.mask_of([[(length - 8, length)] for length in view.lengths])
        return Selection(live=((view.positions % 2 == 0) | late).nonzero().flatten())


def test_dropped_tokens_leave_the_later_layers_and_keep_their_positions(sdpa):
    decoder = tiny_model("llama")
    documents = [document(60), document(33, seed=1)]
    method = DropHalf()
    together = prefill(decoder, sdpa, method, pack_of(*documents), new_tokens=2)
    assert together.work.kept == [(60, 33), (60, 33), (34, 21), (34, 21)]
    assert together.work.ffn() == [[60, 33], [34, 21], [34, 21], [1, 1]]
    # K/V of the pruning layer are those of all tokens that entered it
    assert together.cache.prompt_tokens() == [[60, 33], [60, 33], [34, 21], [34, 21]]
    expected = drop_half_reference(decoder, documents[0])
    assert (together.logits_BV[0] - expected).abs().max() <= 1e-4


def drop_half_reference(decoder, doc):
    """The same with transformers' own layers, fed with shortened hidden states and original positions."""
    body = decoder.model.model
    positions = torch.arange(60)
    keep = (positions % 2 == 0) | (positions >= 52)
    with torch.inference_mode():
        hidden = body.embed_tokens(torch.from_numpy(doc.input_ids))[None]
        for index, layer in enumerate(body.layers):
            rope = body.rotary_emb(hidden, positions[None])
            mixed, _ = layer.self_attn(layer.input_layernorm(hidden), rope, None)
            hidden = hidden + mixed
            if index == 1:
                hidden, positions = hidden[:, keep], positions[keep]
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return decoder.model.lm_head(body.norm(hidden))[0, -1]


@pytest.mark.parametrize("late", [0, 1])
def test_decoding_after_a_drop_goes_on_from_the_original_position(sdpa, late):
    decoder = tiny_model("llama")
    doc = document(60)
    prefilled = prefill(decoder, sdpa, DropHalf(), pack_of(doc), new_tokens=3)
    seen = []
    real = decoder.rope
    decoder.rope = lambda hidden, at, *rest: seen.append(at.tolist()) or real(hidden, at, *rest)
    (generated,) = decode(decoder, sdpa, prefilled, StopRules(max_new_tokens=3), first=[5], late=late)
    assert (generated.tokens[0], len(generated.tokens)) == (5, 3)
    assert seen == [[60], [61]]
