"""A model divided among processes gives what one process gives: logits, choices, keys and values, answers."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import SIZES, document, pack_of, sharpened

from pipeline.checkpoints.building import random_model
from pipeline.checkpoints.random_weights import byte_tokenizer
from pipeline.errors import RankFailed
from pipeline.families.decoder import Decoder
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.generation.guide import Guide
from pipeline.generation.sampling import Sampling, first_tokens
from pipeline.generation.token_masks import first_allowed
from pipeline.kernels.attention import SdpaAttention
from pipeline.model.prefill import prefill
from pipeline.model.shared import prefill_behind, prefill_prefixes
from pipeline.pruning.dense import Dense
from pipeline.pruning.mars import Mars
from pipeline.pruning.marsinfer import MarsInfer
from pipeline.ranks.collectives import Ranks
from pipeline.ranks.leading import Everywhere, Lead
from pipeline.records import ResponseFormat
from pipeline.structured.binding import BoundForms

CPU = torch.device("cpu")
WIDE = {**SIZES, "num_attention_heads": 8, "vocab_size": 259}
SETTINGS = {
    "qwen2": {**WIDE, "tie_word_embeddings": True},  # of two key/value heads, fewer than ranks
    "phi3": {**WIDE, "num_key_value_heads": 4},
}
METHODS = {
    "dense": Dense(),
    "marsinfer": MarsInfer(start_layer=1, eta=0.7, window=8, prefix=4),
    "mars": Mars(sparse_attention=0.6, local_from=3, last_full=1, window=16, most=32),
}


def own_decoder(ranks: Ranks | None, family: str) -> Decoder:
    """In float64, of weights that are larger than drawn ones."""
    model = random_model(
        family, SETTINGS[family], device=CPU, dtype=torch.float64, share=ranks and ranks.share
    )
    return Decoder(sharpened(model), ranks)


def attending() -> SdpaAttention:
    attention = SdpaAttention()
    attention.sparse_from = 300
    return attention


def everywhere(ranks: Ranks, family: str) -> Everywhere:
    """What a follower loads, by the name of this module."""
    torch.set_num_threads(1)
    return Everywhere((own_decoder(ranks, family), attending()), ((0, "piece_tokens"),))


@dataclass(frozen=True)
class Divided:
    whole: Decoder
    parts: Decoder
    attention: SdpaAttention
    lead: Lead


@pytest.fixture(scope="module", params=[("qwen2", 4), ("phi3", 2)], ids=lambda p: f"{p[0]}-{p[1]}")
def divided(request):
    family, count = request.param
    ranks = Ranks(rank=0, count=count, device=CPU)
    lead = Lead(ranks)
    lead.have_loaded(everywhere, ["cpu"] * (count - 1), family)
    here = everywhere(ranks, family)
    lead.begin(here)
    parts, attention = here.objects
    yield Divided(own_decoder(None, family), parts, attention, lead)
    lead.close()


def pack():
    return pack_of(document(330, seed=1), document(90, seed=2, row=1))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_prefill_is_that_of_one_process(divided, method):
    alone = prefill(divided.whole, attending(), method, pack(), 4)
    divided.parts.piece_tokens = 64
    made = prefill(divided.parts, divided.attention, method, pack(), 4)
    torch.testing.assert_close(made.logits_BV, alone.logits_BV, rtol=0, atol=1e-5)
    assert made.by_document() == alone.by_document()
    heads, here, there = divided.parts.own.kv_heads, made.cache, alone.cache
    for own, whole in zip(here.keys + here.values, there.keys + there.values, strict=True):
        torch.testing.assert_close(own, whole[:, :heads], rtol=0, atol=1e-6)
    if method.name != "dense":
        assert alone.by_document() != prefill(divided.whole, attending(), Dense(), pack(), 4).by_document()


def answers(decoder, attention, made, **options):
    rules = StopRules(max_new_tokens=6)
    return [each.tokens for each in decode(decoder, attention, made, rules, **options)]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=3)], ids=["greedy", "drawn"])
def test_answers_are_those_of_one_process(divided, sampling):
    method = METHODS["mars"]
    alone, made = (
        answers(decoder, attention, prefill(decoder, attention, method, pack(), 6), sampling=sampling)
        for decoder, attention in ((divided.whole, attending()), (divided.parts, divided.attention))
    )
    assert made == alone


def test_answers_in_a_form_are_those_of_one_process(divided, monkeypatch):
    """Also where a likely token is taken back, which all ranks must know of."""
    forms = BoundForms(byte_tokenizer(), WIDE["vocab_size"], {256})
    allowed, allows = [], Guide.allows
    monkeypatch.setattr(
        Guide, "allows", lambda self, token: allowed.append(allows(self, token)) or allowed[-1]
    )
    results = []
    for decoder, attention in ((divided.whole, attending()), (divided.parts, divided.attention)):
        form = ResponseFormat("regex", "[a-z0-9. ]{12}")
        guides = [
            Guide(matcher=forms.matcher(form), tokenizer=byte_tokenizer(), stops_W=forms.stops_W)
            for _ in range(2)
        ]
        made = prefill(decoder, attention, Dense(), pack(), 12)
        first = first_tokens(first_allowed(made.logits_BV, guides))
        rules = StopRules(max_new_tokens=12)
        rows = decode(decoder, attention, made, rules, first=first, guides=guides, late=1)
        results.append([(row.tokens, row.guide.matcher.text) for row in rows])
    assert set(allowed) == {True, False}
    assert results[1] == results[0]


@pytest.mark.parametrize("layers", [2, 4])
def test_rows_behind_a_shared_document_are_those_of_one_process(divided, layers):
    rows = [document(60, seed=7), document(60, seed=7, row=1)]
    rows[1] = replace(rows[1], input_ids=rows[1].input_ids.copy())
    rows[1].input_ids[50:] = rows[0].input_ids[:10]
    results = []
    for decoder, attention in ((divided.whole, attending()), (divided.parts, divided.attention)):
        shared = prefill_prefixes(decoder, attention, Dense(), [rows[0].input_ids[:50]], layers)
        made = prefill_behind(decoder, attention, Dense(), shared, rows, [0, 0], 6)
        results.append((made.logits_BV, answers(decoder, attention, made)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-5)
    assert results[1][1] == results[0][1]


def test_a_look_gives_a_prefill_up_on_all_ranks(divided):
    looks = iter(range(2))
    with pytest.raises(StopIteration):
        prefill(divided.parts, divided.attention, Dense(), pack(), 0, lambda: next(looks))
    test_a_prefill_is_that_of_one_process(divided, Dense())


def test_a_rank_that_is_killed_is_told_of_and_takes_the_others_along(divided):
    victim, *others = [each.process for each in divided.lead._followers]
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    with pytest.raises(
        RankFailed, match=r"^rank 1 of \d failed: it was killed by SIGKILL; finished rows are kep"
    ):
        prefill(divided.parts, divided.attention, Dense(), pack())
    divided.lead.close()
    assert all(each.poll() is not None for each in others)
