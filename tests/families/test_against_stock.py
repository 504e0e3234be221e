"""Every family against stock transformers: prefills of packs, answers past the windows, what follows."""

from __future__ import annotations

import pytest
import torch
from conftest import document, loaded, pack_of
from family_cases import (
    ALTERNATING,
    CASES,
    LENGTHS,
    SLIDING,
    WHOLE,
    WINDOW,
    documents,
    model_of,
    stock_answers,
    stock_logits,
    tokens_of,
)

from pipeline.doctor.selftest import full, small
from pipeline.engines.grouping import Grouping
from pipeline.engines.local import LocalEngine
from pipeline.errors import ConfigError
from pipeline.families.slots import ONE_ROPE
from pipeline.families.supported import FAMILIES
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.generation.lookup import MOST_QUERIES
from pipeline.generation.sampling import Sampling
from pipeline.model.continuation import continue_with
from pipeline.model.prefill import prefill
from pipeline.pruning.dense import Dense
from pipeline.pruning.mars import Mars
from pipeline.pruning.marsinfer import MarsInfer
from pipeline.pruning.operations import attended_pairs, dense_work
from pipeline.pruning.registry import method_names

NEW_TOKENS = 40  # so that also the shortest document comes to fill a window
TOLERANCE = 1e-4  # of logits, whose largest are about 3


@pytest.fixture(params=CASES)
def name(request):
    return request.param


def answers(decoder, sdpa, method, docs):
    prefilled = prefill(decoder, sdpa, method, pack_of(*docs), new_tokens=NEW_TOKENS)
    rules = StopRules(max_new_tokens=NEW_TOKENS)
    return [answer.tokens for answer in decode(decoder, sdpa, prefilled, rules)]


def test_every_family_is_tried():
    assert {family for family, _ in CASES.values()} == set(FAMILIES)
    assert all(model_of(each).shape.slides for each in SLIDING)
    assert not any(model_of(each).shape.slides for each in WHOLE)


@pytest.mark.parametrize("method", [Dense(), Mars(window=10)], ids=lambda method: method.name)
def test_logits_of_a_pack(name, method, sdpa):
    """By mars too, which stops nobody before the last layer, so that nothing is lost."""
    decoder = model_of(name)
    found = prefill(decoder, sdpa, method, pack_of(*documents())).logits_BV
    assert (found - stock_logits(decoder)).abs().max() < TOLERANCE


@pytest.mark.parametrize("method", [Dense(), Mars(window=10)], ids=lambda method: method.name)
def test_greedy_tokens_of_a_pack_and_of_a_document_alone(name, method, sdpa):
    decoder, expected = model_of(name), stock_answers(name, NEW_TOKENS)
    assert answers(decoder, sdpa, method, documents()) == expected
    assert answers(decoder, sdpa, method, documents()[2:]) == expected[2:]


def test_drafts_change_no_answer(name, monkeypatch):
    """Each query of a step has a window of its own."""
    monkeypatch.setitem(MOST_QUERIES, "cpu", 64)
    engine = LocalEngine(
        loaded(model_of(name)),
        Dense(),
        rules=StopRules(max_new_tokens=NEW_TOKENS),
        sampling=Sampling(),
        lookup=3,
    )
    rows = engine.answer(documents())
    expected = [" ".join(map(str, tokens)) for tokens in stock_answers(name, NEW_TOKENS)]
    assert [row.answer for row in rows] == expected
    assert all(row.draft_tokens is not None for row in rows)


def test_steps_as_on_a_gpu_where_layers_are_plain(name, sdpa, monkeypatch):
    """What its kernels do not compute is left to the separate operations, whatever the device."""
    decoder = model_of(name, torch.bfloat16)
    expected = answers(decoder, sdpa, Dense(), documents())
    monkeypatch.setattr("pipeline.families.decoder.has_kernels", lambda x: True)
    assert answers(decoder, sdpa, Dense(), documents()) == expected


def test_a_short_forward_behind_a_prefill(name, sdpa):
    decoder, added = model_of(name), [[7, 200, 31], [4], list(range(40, 75))]
    prefilled = prefill(decoder, sdpa, Dense(), pack_of(*documents()), new_tokens=40)
    hidden = continue_with(decoder, sdpa, prefilled.cache, added, prefilled.next_positions)
    parts = decoder.logits(hidden).split([len(tokens) for tokens in added])
    for doc, tokens, logits in zip(documents(), added, parts, strict=True):
        ids = torch.cat([tokens_of(doc), torch.tensor([tokens])], dim=1)
        with torch.inference_mode():
            expected = decoder.model(ids).logits[0, -len(tokens) :]
        assert (logits - expected).abs().max() < TOLERANCE


def test_pieces_change_nothing(name, sdpa):
    decoder = model_of(name)
    whole = prefill(decoder, sdpa, Dense(), pack_of(*documents())).logits_BV
    decoder.piece_tokens = 7
    assert (prefill(decoder, sdpa, Dense(), pack_of(*documents())).logits_BV - whole).abs().max() < TOLERANCE


def test_a_document_whose_answer_may_outgrow_the_short_frequencies_has_the_long_ones(sdpa):
    """As all tokens have them in stock transformers, once there are more."""
    decoder, doc = model_of("phi3-long"), document(45)
    with torch.inference_mode():
        short = decoder.model(tokens_of(doc)).logits[0, -1]
        beyond = torch.cat([tokens_of(doc), torch.zeros(1, 10, dtype=torch.int64)], dim=1)
        long = decoder.model(beyond).logits[0, 44]
    assert (short - long).abs().max() > 100 * TOLERANCE
    for room, expected in ((5, short), (6, long)):
        pack = pack_of(doc, *documents())
        found = prefill(decoder, sdpa, Dense(), pack, new_tokens=room).logits_BV[0]
        assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", WHOLE)
def test_a_method_that_drops_gives_a_pack_what_it_gives_documents(name, sdpa):
    decoder, method = model_of(name), small("sliminfer")
    together = prefill(decoder, sdpa, method, pack_of(*documents()))
    kept = [layer[2].tokens for layer in together.work.by_layer()]
    assert kept[0] == 133
    assert kept[-1] < 133
    for b, doc in enumerate(documents()):
        alone = prefill(decoder, sdpa, method, pack_of(doc)).logits_BV[0]
        assert (together.logits_BV[b] - alone).abs().max() < TOLERANCE


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_every_method(name, method, sdpa):
    decoder = model_of(name)
    exact = prefill(decoder, sdpa, full(small(method)), pack_of(*documents())).logits_BV
    assert (exact - stock_logits(decoder)).abs().max() < TOLERANCE
    together = prefill(decoder, sdpa, small(method), pack_of(*documents())).logits_BV
    alone = [prefill(decoder, sdpa, small(method), pack_of(doc)).logits_BV for doc in documents()]
    assert (together - torch.cat(alone)).abs().max() < TOLERANCE


@pytest.mark.parametrize("method", sorted(set(method_names()) - {"dense", "ffn-skip", "mars"}))
def test_methods_that_do_not_suit_windows_are_refused(method, sdpa):
    decoder = model_of("mistral-windows")
    with pytest.raises(ConfigError) as caught:
        prefill(decoder, sdpa, small(method), pack_of(*documents()))
    assert str(caught.value) == (
        f"method {method} does not suit this model, all of whose layers have sliding windows of 24 tokens:"
        " take dense or mars"
    )


@torch.inference_mode()
def stopped_early(decoder, doc, last_full, live):
    """Logits by transformers' blocks over all tokens, of which after a layer only the last `live` change."""
    body, length = decoder.model.model, doc.prompt_tokens
    decoder.model.set_attn_implementation("eager")
    hidden, positions = body.embed_tokens(tokens_of(doc)), torch.arange(length)[None]
    behind = positions[0][:, None] - positions[0]
    for layer, block in enumerate(body.layers):
        window = decoder.shape.window(layer) or length
        mask = torch.zeros(length, length).masked_fill((behind < 0) | (behind >= window), float("-inf"))
        kind = decoder._slots.ropes[layer]
        rope = body.rotary_emb(hidden, positions, *([] if kind == ONE_ROPE else [kind]))
        options = {"position_ids": positions, "position_embeddings": rope}
        made = block(hidden, attention_mask=mask[None, None], **options)
        changed = length if layer <= last_full else live
        hidden = torch.cat([hidden[:, : length - changed], made[:, length - changed :]], dim=1)
    return decoder.model.lm_head(body.norm(hidden))[0, -1]


@pytest.mark.parametrize("name", [*SLIDING, "qwen3_moe", "llama"])
def test_mars_stops_early_within_windows(name, sdpa):
    decoder, docs = model_of(name), documents()
    method = Mars(last_full=1, window=30)
    found = prefill(decoder, sdpa, method, pack_of(*docs)).logits_BV
    for logits, doc in zip(found, docs, strict=True):
        live = min(30, doc.prompt_tokens)
        assert (logits - stopped_early(decoder, doc, 1, live)).abs().max() < TOLERANCE


def test_what_windows_leave_of_attention_is_counted(sdpa):
    decoder = model_of("gemma3_text")
    assert decoder.shape.windows == tuple(WINDOW if "sliding" in kind else None for kind in ALTERNATING)
    by_document = prefill(decoder, sdpa, Dense(), pack_of(*documents())).by_document()
    for (layers,), length in zip(by_document, LENGTHS, strict=True):
        seen = [sum(min(n + 1, WINDOW) for n in range(length)), length * (length + 1) // 2]
        assert [attended_pairs(work) for work in layers] == [*seen, seen[0], length]
        assert layers == dense_work(decoder.shape, length)
    mars = Mars(last_full=1, window=30)
    for (layers,), length in zip(
        prefill(decoder, sdpa, mars, pack_of(*documents())).by_document(), LENGTHS, strict=True
    ):
        (expected,) = mars.expected_passes(decoder.shape, length)
        assert [attended_pairs(work) for work in layers] == [attended_pairs(work) for work in expected]


def test_mars_leaves_windows_out_of_its_choice_of_blocks(sdpa):
    decoder, doc = model_of("gemma3_text"), document(900)
    sdpa.sparse_from = 256
    (layers,) = prefill(decoder, sdpa, Mars(sparse_attention=0.3), pack_of(doc)).by_document()[0]
    within = sum(min(n + 1, WINDOW) for n in range(900))
    assert [attended_pairs(work) for work in layers[::2]] == [within, within]
    assert [work.estimated_pairs > 0 for work in layers] == [False, True, False, False]
    assert attended_pairs(layers[1]) < 900 * 901 // 2


def test_marsinfer_judges_by_the_layers_that_see_everything(sdpa):
    decoder, chosen = model_of("gemma3_text"), []

    class Recording(MarsInfer):
        def select(self, layer, view, state):
            selection = super().select(layer, view, state)
            expected = self._mask(self.score(layer, view), view, self.eta, None).nonzero().flatten()
            chosen.append((selection.ffn.tolist(), expected.tolist()))
            return selection

    method = Recording(start_layer=0, eta=0.7, window=8, prefix=4)
    made = prefill(decoder, sdpa, method, pack_of(document(60)))
    of_first, of_second, of_third = (found for found, _ in chosen)
    assert of_first == list(range(60))
    assert of_second == of_third == chosen[1][1] != chosen[2][1]
    assert 12 <= len(of_second) < 60
    (layers,) = made.by_document()[0]
    (expected,) = method.expected_passes(decoder.shape, 60)
    assert [attended_pairs(work) for work in layers] == [attended_pairs(work) for work in expected]


def test_documents_are_not_shared_where_their_keys_or_windows_are_a_rows_own():
    shapes = [model_of(name).shape for name in ("mistral-windows", "phi3-long", "mistral")]
    assert [len(Grouping(method=Dense(), shape=shape).sharings) for shape in shapes] == [0, 0, 1]
