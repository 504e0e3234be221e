"""Decoding by replayed CUDA graphs: the tokens of the same steps from Python, and no memory left behind."""

from __future__ import annotations

import gc
from itertools import count
from typing import NamedTuple

import pytest
import torch
from conftest import FAMILY_SETTINGS, SIZES, document
from decode_steps import EndAt
from steps_from_python import FromPython

import pipeline.generation.graphs as graphs_module
from pipeline.checkpoints.building import random_model
from pipeline.errors import ConfigError
from pipeline.families.decoder import Decoder
from pipeline.generation.decode import decode
from pipeline.generation.decode_loop import DecodeLoop
from pipeline.generation.draft_steps import DraftSteps
from pipeline.generation.generated import Generated, StopRules
from pipeline.generation.graphs import FREE_BYTES, WARM_UP_STEPS, DecodeStats
from pipeline.generation.lookup import Lookup, drafts_of
from pipeline.generation.sampling import Sampling, first_tokens
from pipeline.generation.step_tables import Seat
from pipeline.kernels.attention import AttentionBackend, SdpaAttention, choose_attention
from pipeline.kernels.decode_slots import DecodeSlots
from pipeline.model.offload import KvLimits
from pipeline.model.prefill import Pack, prefill
from pipeline.model.reading_ahead import read_ahead
from pipeline.model.store import KvStore, slots_needed
from pipeline.pruning.registry import make_method
from pipeline.pruning.speculative import Speculative
from pipeline.records import RowError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda", 0)
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 64}
METHODS = {
    "dense": {},
    "sliminfer": {"layers": (1, 2, 3), "budget": (0.6, 0.4, 0.3), "block": 16, "unit": 4},
    "fastkv": {"layer": 1, "share": 0.4, "kv_share": 0.3},
}
LENGTHS = (400, 33, 490, 120, 210, 77, 300, 61)
ENDS = {1: [60], 3: [60, 15, 33], 8: [60, 12, 14, 60, 16, 18, 20, 22]}  # the last: two of eight remain
CAPTURES = {1: 1, 3: 3, 8: 3}  # of 3, 2 and 1 columns, which are all that there are; of 8, 4 and 2


@pytest.fixture
def fa3():
    try:
        return choose_attention("fa3", device=CUDA, dtype=torch.bfloat16, **HEADS)[0]
    except ConfigError as error:
        pytest.skip(str(error))


def cuda_decoder(family="qwen2"):
    sizes = {**SIZES, **FAMILY_SETTINGS[family], "num_attention_heads": 4, "head_dim": 64}
    model = random_model(family, sizes, device=CUDA, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return Decoder(model)


def prefilled_pack(decoder, attention, method, rows, new_tokens, limits=None):
    pack = Pack.of([document(n, seed=n, row=row) for row, n in enumerate(LENGTHS[:rows])], CUDA)
    chosen = make_method(method, METHODS[method])
    return prefill(decoder, attention, chosen, pack, new_tokens, limits=limits)


def answers(
    decoder, attention, method, rules, *, rows=8, check=lambda: None, limits=None, late=None, **sampling
):
    """Tokens of each document, and how the steps were run."""
    prefilled = prefilled_pack(decoder, attention, method, rows, rules.max_new_tokens, limits)
    chosen, stats = Sampling(**sampling), DecodeStats()
    generated = decode(
        decoder, attention, prefilled, rules, sampling=chosen, check=check, stats=stats, late=late
    )
    return [answer.tokens for answer in generated], stats


@pytest.mark.parametrize("family", sorted(FAMILY_SETTINGS))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", ENDS)
def test_a_graph_gives_the_tokens_of_its_steps_run_from_python(fa3, monkeypatch, family, method, rows):
    # head_dim 64 throughout: what cuda_decoder makes of every family
    decoder = cuda_decoder(family)
    ends = ENDS[rows]
    replayed, stats = answers(decoder, fa3, method, EndAt(ends), rows=rows)
    assert stats.failure is None
    assert stats.captures == CAPTURES[rows]
    assert stats.replayed_steps == max(ends) - 1 - stats.captures * WARM_UP_STEPS
    monkeypatch.setattr(graphs_module, "recorder_for", lambda device, *_: FromPython(device))
    from_python, _ = answers(decoder, fa3, method, EndAt(ends), rows=rows)
    assert replayed == from_python
    assert [len(tokens) for tokens in replayed] == ends
    assert len({token for tokens in replayed for token in tokens}) > 1  # not vacuous


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_one_document_gives_the_tokens_of_plain_decoding(fa3, monkeypatch, method, late):
    """Alone, no batch changes its size, so that not even the sums' order differs."""
    decoder = cuda_decoder()
    replayed, stats = answers(decoder, fa3, method, StopRules(max_new_tokens=60), rows=1, late=late)
    assert stats.replayed_steps > 0
    monkeypatch.setattr(graphs_module, "recorder_for", lambda *_: None)
    plain, without = answers(decoder, fa3, method, StopRules(max_new_tokens=60), rows=1, late=0)
    assert without.replayed_steps == 0
    assert replayed == plain


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_tokens_are_drawn_in_the_graph(fa3, monkeypatch, top_p):
    decoder, settings = cuda_decoder(), {"temperature": 1.5, "top_p": top_p, "seed": 3}
    replayed, stats = answers(decoder, fa3, "dense", EndAt(ENDS[8]), **settings)
    assert stats.replayed_steps > 0
    monkeypatch.setattr(graphs_module, "recorder_for", lambda device, *_: FromPython(device))
    assert answers(decoder, fa3, "dense", EndAt(ENDS[8]), **settings)[0] == replayed
    other_seed, _ = answers(decoder, fa3, "dense", EndAt(ENDS[8]), **{**settings, "seed": 4})
    assert other_seed != replayed


def test_rows_of_one_graph_are_drawn_each_in_its_way(fa3, monkeypatch):
    """Greedy, from the whole vocabulary, and from the likely tokens; the longest table of numbers is used."""
    ways = [
        Sampling(),
        Sampling(temperature=1.5, seed=3),
        Sampling(temperature=1.5, top_p=0.9, seed=4),
        Sampling(temperature=1.5, top_k=9, seed=4),
        Sampling(temperature=1.5, min_p=0.05, seed=4),
        Sampling(repetition_penalty=1.5),
        Sampling(),
        Sampling(temperature=1.5, top_k=30, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
    ]
    rules, decoder = StopRules(max_new_tokens=200), cuda_decoder()
    draws = [way.draws(row, 200) for row, way in enumerate(ways)]
    prompts = [document(n, seed=n, row=row).input_ids for row, n in enumerate(LENGTHS)]

    def drawn():
        prefilled, stats = prefilled_pack(decoder, fa3, "dense", 8, rules.max_new_tokens), DecodeStats()
        generated = decode(decoder, fa3, prefilled, rules, draws=draws, prompts=prompts, stats=stats)
        return [answer.tokens for answer in generated], stats

    replayed, stats = drawn()
    assert stats.replayed_steps > 0
    greedy, _ = answers(decoder, fa3, "dense", rules)
    monkeypatch.setattr(graphs_module, "recorder_for", lambda device, *_: FromPython(device))
    assert drawn()[0] == replayed
    same = [a == b for a, b in zip(replayed, greedy, strict=True)]
    assert same == [way == Sampling() for way in ways]


def answers_of_prepared_steps(decoder, attention, method, rules, lookup=None):
    """Rows of a store let in two at a time, with a few steps in between; and how the steps were run."""
    room = rules.max_new_tokens + drafts_of(lookup)
    prefilled = prefilled_pack(decoder, attention, method, 8, 0)
    by_row = list(zip(*prefilled.cache.prompt_tokens(), strict=True))
    slots = sum(slots_needed(layers, room, CUDA) for layers in by_row)
    store = KvStore(slots, decoder.shape, dtype=decoder.dtype, device=CUDA)
    extents, stats = store.adopt(prefilled.cache, [room] * 8), DecodeStats()
    loop = DecodeLoop(
        decoder,
        attention,
        store,
        new_tokens=rules.max_new_tokens,
        sampling=Sampling(),
        capacity=8,
        longest=max(LENGTHS) + rules.max_new_tokens,
        lookup=lookup,
        stats=stats,
    )
    assert loop.prepare() == (4 if lookup is None else 8)  # of 8, 4, 2 and 1 columns, without drafts and with
    rows = [Generated(rules=rules) for _ in by_row]
    for row, token in zip(rows, first_tokens(prefilled.logits_BV), strict=True):
        row.take(token)
    for first in range(0, 8, 2):
        pair = range(first, first + 2)
        seats = [
            Seat(
                starts=extents[b].starts,
                used=extents[b].stored,
                position=prefilled.next_positions[b],
                prompt=document(LENGTHS[b], seed=LENGTHS[b]).input_ids,
            )
            for b in pair
        ]
        loop.join([rows[b] for b in pair], seats)
        for _step in range(3):
            loop.step()
    while loop.is_busy:
        loop.step()
    loop.close()
    return rows, stats


def test_drafts_are_verified_by_captured_steps(fa3, monkeypatch):
    """The same tokens as by these steps from Python, and more than one a step."""
    decoder, rules = cuda_decoder("llama"), StopRules(max_new_tokens=200)
    lookup = Lookup(drafts=4, adaptive=False)
    replayed, stats = answers_of_prepared_steps(decoder, fa3, "dense", rules, lookup)
    assert (stats.eager_steps, stats.failure) == (0, None)
    assert {len(row.tokens) for row in replayed} == {200}
    accepted, drafts = sum(row.accepted for row in replayed), sum(row.drafts for row in replayed)
    assert 0 < accepted < drafts
    monkeypatch.setattr(graphs_module, "recorder_for", lambda device, *_: FromPython(device))
    from_python, _ = answers_of_prepared_steps(decoder, fa3, "dense", rules, lookup)
    assert [row.tokens for row in from_python] == [row.tokens for row in replayed]


@pytest.mark.parametrize("method", METHODS)
def test_steps_captured_beforehand_serve_rows_that_come_and_go(fa3, monkeypatch, method):
    decoder = cuda_decoder()
    replayed, stats = answers_of_prepared_steps(decoder, fa3, method, EndAt(ENDS[8]))
    assert (stats.eager_steps, stats.failure) == (0, None)
    assert stats.replayed_steps > 59
    monkeypatch.setattr(graphs_module, "recorder_for", lambda device, *_: FromPython(device))
    from_python, _ = answers_of_prepared_steps(decoder, fa3, method, EndAt(ENDS[8]))
    assert [row.tokens for row in replayed] == [row.tokens for row in from_python]
    assert [len(row.tokens) for row in replayed] == ENDS[8]


def test_memory_returns_to_its_start_after_a_pack_and_after_an_exception(fa3):
    decoder, rules = cuda_decoder(), EndAt
    steps = count()

    def give_up():
        if next(steps) == 30:
            raise RowError("timeout", "in the middle of the replayed steps")

    def settled():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    for _turn in range(2):  # kernels' workspaces stay
        answers(decoder, fa3, "dense", rules(ENDS[8]))
    before = settled()
    for _turn in range(3):
        _, stats = answers(decoder, fa3, "dense", rules(ENDS[8]))
        assert stats.captures == CAPTURES[8]
        assert settled() == before
    with pytest.raises(RowError, match="in the middle"):
        answers(decoder, fa3, "dense", StopRules(max_new_tokens=60), check=give_up)
    assert next(steps) == 31
    assert settled()[0] == before[0]
    answers(decoder, fa3, "dense", rules(ENDS[8]))
    assert settled() == before


@pytest.mark.parametrize("method", METHODS)
def test_what_memory_held_before_does_not_reach_an_answer(fa3, method):
    decoder = cuda_decoder()
    expected, _ = answers(decoder, fa3, method, EndAt(ENDS[3]), rows=3)
    torch.cuda.empty_cache()
    waste = [
        torch.full((n,), float("nan"), device=CUDA, dtype=torch.bfloat16) for n in [2**15] * 200 + [2**26]
    ]
    del waste
    got, stats = answers(decoder, fa3, method, EndAt(ENDS[3]), rows=3)
    assert got == expected
    assert stats.replayed_steps > 0


class Waits(SdpaAttention):
    """Says that it can be captured, which waiting for the device cannot be."""

    def decode(self, q_BHd, k_SKd, v_SKd, slots, sinks_H=None):
        slots.used_B.tolist()
        return super().decode(q_BHd, k_SKd, v_SKd, slots, sinks_H)


def test_a_step_that_cannot_be_captured_is_decoded_from_python():
    decoder, rules = cuda_decoder(), StopRules(max_new_tokens=30)
    expected, captured = answers(decoder, SdpaAttention(), "dense", rules, rows=3)
    attention = Waits()
    got, stats = answers(decoder, attention, "dense", rules, rows=3)
    assert got == expected
    assert captured.replayed_steps > 0  # any backend's steps, by kernels of ours
    assert (stats.captures, stats.replayed_steps, captured.failure) == (0, 0, None)
    assert attention.capture_failure == stats.failure is not None
    _, again = answers(decoder, attention, "dense", rules, rows=3)
    assert again == DecodeStats(eager_steps=29)  # a reason that stays is not tried twice


def test_a_failed_capture_leaves_the_allocator_in_order(fa3):
    """Later packs are captured, and memory used across streams is given back."""
    decoder = cuda_decoder()
    answers(decoder, Waits(), "dense", StopRules(max_new_tokens=30), rows=3)
    replayed, stats = answers(decoder, fa3, "dense", EndAt(ENDS[3]), rows=3)
    assert stats.captures == CAPTURES[3]
    assert [len(tokens) for tokens in replayed] == ENDS[3]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    side = torch.cuda.Stream(CUDA)
    for _turn in range(20):
        shared = torch.zeros(1 << 20, device=CUDA)
        shared.record_stream(side)
        del shared
    torch.cuda.synchronize()
    probe = torch.zeros(1, device=CUDA)  # an allocation looks through what other streams have done with
    del probe
    assert torch.cuda.memory_allocated() == before


def test_running_out_of_memory_while_capturing_is_decoded_from_python(fa3, monkeypatch):
    decoder, rules = cuda_decoder(), StopRules(max_new_tokens=30)
    expected, _ = answers(decoder, fa3, "dense", rules, rows=1)
    real = Decoder.head

    def head(self, hidden_BD):
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, hidden_BD)

    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "head", head)
        got, stats = answers(decoder, fa3, "dense", rules, rows=1)
    assert got == expected
    assert stats.failure == "OutOfMemoryError: CUDA out of memory"
    assert fa3.capture_failure is None  # the next pack is tried again
    assert answers(decoder, fa3, "dense", rules, rows=1)[1].captures == 1


def test_a_nearly_full_device_gives_cached_memory_back_before_the_capture(fa3):
    decoder, rules = cuda_decoder(), StopRules(max_new_tokens=30)
    expected, _ = answers(decoder, fa3, "dense", rules)
    torch.cuda.empty_cache()
    cached = []
    while torch.cuda.mem_get_info(CUDA)[0] > FREE_BYTES:
        cached.append(torch.empty(FREE_BYTES // 2, dtype=torch.uint8, device=CUDA))
    del cached
    got, stats = answers(decoder, fa3, "dense", rules)
    torch.cuda.empty_cache()
    assert (got, stats.failure, stats.captures) == (expected, None, 1)


def test_an_offloaded_cache_is_not_captured(fa3):
    decoder = cuda_decoder("llama")
    method = make_method("sliminfer", METHODS["sliminfer"])
    planned = method.plan(decoder.shape, [LENGTHS[0]]).kv_bytes(2, 40)
    limits = KvLimits(device_bytes=int(planned * 0.7), host_bytes=1 << 30)
    rules = StopRules(max_new_tokens=40)
    _, stats = answers(decoder, fa3, "sliminfer", rules, rows=1, limits=limits)
    assert stats == DecodeStats(eager_steps=39)


@pytest.mark.parametrize("used", [(20_000,), (20_000, 3, 4_000), (1, 900, 65_000)])
def test_split_keys_agree_with_the_reference(fa3, used):
    """Long documents, whose keys are read in parts; slots that are not in use hold what must not be read."""
    room, generator = 64, torch.Generator(device=CUDA).manual_seed(0)
    total = sum(used) + room * len(used)
    q = torch.randn(len(used), 8, 64, generator=generator, device=CUDA).bfloat16()
    k, v = (torch.randn(total, 2, 64, generator=generator, device=CUDA).bfloat16() for _ in "kv")
    starts, expected = [sum(used[:b]) + room * b for b in range(len(used))], []
    for b, (start, n) in enumerate(zip(starts, used, strict=True)):
        k[start + n : start + n + room], v[start + n : start + n + room] = 1e4, 1e4
        alone = [x[start : start + n] for x in (k, v)]
        scores = (
            torch.einsum("kgd,tkd->kgt", q[b].unflatten(0, (2, 4)).double(), alone[0].double()) * 64**-0.5
        )
        expected.append(torch.einsum("kgt,tkd->kgd", scores.softmax(-1), alone[1].double()).flatten(0, 1))
    slots = DecodeSlots.of(starts, used, total, CUDA)
    slots.longest = max(used) + room
    got = fa3.decode(q, k, v, slots)
    wanted = torch.stack(expected)
    for b in range(len(used)):
        assert (got[b].double() - wanted[b]).norm() / wanted[b].norm() < 0.01


class OneDraft(NamedTuple):
    decoder: Decoder
    attention: AttentionBackend


class ScoresOnly(Speculative):
    """Notes the scores, and leaves out the choice, in which the host waits once."""

    def chosen(self, scores_ST, segments, protected_T):
        self.__dict__["scores_ST"] = scores_ST
        return torch.arange(3, device=scores_ST.device)


@pytest.mark.parametrize("attention", ["sdpa", "fa3"])
def test_a_drafts_look_ahead_is_replayed_and_waits_for_nothing(attention, request, monkeypatch):
    backend = request.getfixturevalue("fa3") if attention == "fa3" else SdpaAttention()
    draft, method = OneDraft(cuda_decoder(), backend), ScoresOnly(look_ahead=8, window=16)

    @torch.inference_mode()
    def scores(steps, pack):
        read_ahead(steps, method, pack)
        return method.__dict__.pop("scores_ST")

    lengths = ((400,), (490, 33), (210, 77, 300), (120,), (61, 300))
    packs = [Pack.of([document(n, seed=n) for n in each], CUDA) for each in lengths]
    replaying = DraftSteps(draft, slots=4 * 2000, look_ahead=8)
    replayed = [scores(replaying, pack) for pack in packs]
    stats = replaying.stats
    assert (stats.captures, stats.failure) == (3, None)
    assert stats.replayed_steps == len(packs) * 8 - stats.captures * WARM_UP_STEPS
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        replayed.append(scores(replaying, packs[1]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    replaying.close()
    monkeypatch.setattr(graphs_module, "recorder_for", lambda device, *_: FromPython(device))
    from_python = DraftSteps(draft, slots=4 * 2000, look_ahead=8)
    for got_ST, pack in zip(replayed, (*packs, packs[1]), strict=True):
        assert torch.allclose(got_ST, scores(from_python, pack), rtol=0.02, atol=1e-5)
        assert got_ST.sum(1).amin() > 0.5  # not vacuous
