"""Mars: where its window lies, what goes on, and what it equals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import document, pack_of, tiny_model

from pipeline.errors import ConfigError
from pipeline.kernels import sparse
from pipeline.model.prefill import prefill
from pipeline.pruning.dense import Dense
from pipeline.pruning.mars import Mars
from pipeline.pruning.operations import attended_pairs, attention_ratio, passes_flops
from pipeline.records import Spans

SMALL = Mars(last_full=1, window=4, most=16)


def spans(document, question):
    return Spans(document=document, question=question)


@pytest.mark.parametrize(
    ("where", "window"),
    [
        (spans((2, 80), (80, 95)), 20),  # from the question to the prompt's end
        (spans((2, 30), (30, 95)), 64),  # a question longer than `most`
        (spans((20, 95), (2, 18)), 8),  # a question before the document says nothing of where it is answered
        (spans((2, 95), (95, 95)), 8),  # no question
    ],
)
def test_the_window_reaches_from_the_question_to_the_end(where, window):
    assert Mars(window=8, most=64).window_of(100, where) == window
    assert Mars(window=8, most=64).protected(100, where) == ((100 - window, 100),)


def test_the_window_is_no_longer_than_the_prompt():
    assert Mars().window_of(10, spans((0, 5), (5, 8))) == 10


def test_by_default_short_documents_lose_nothing(sdpa):
    """Keys and values of a layer come from the hidden states that enter it, so the last layer misses none."""
    model, pack = tiny_model("qwen3"), pack_of(document(120), document(30, seed=1))
    dense = prefill(model, sdpa, Dense(), pack, new_tokens=1)
    late = prefill(model, sdpa, Mars(window=4, most=16), pack, new_tokens=1)
    assert (dense.logits_BV - late.logits_BV).abs().max() < 1e-4
    for ours, theirs in zip(late.cache.keys, dense.cache.keys, strict=True):
        assert (ours - theirs).abs().max() < 1e-4
    assert late.work.kept[-1] == (8, 8)
    assert late.work.ffn() == dense.work.ffn()


def test_stopping_earlier_keeps_what_was_read_within_reach(sdpa):
    model, doc = tiny_model("qwen3"), document(120)
    dense, early = (prefill(model, sdpa, method, pack_of(doc)) for method in (Dense(), SMALL))
    window = SMALL.window_of(120, doc.spans)
    assert early.work.kept == [(120,), (120,), (window,), (window,)]
    assert early.cache.prompt_tokens() == [[120]] * 4
    assert not torch.allclose(early.logits_BV, dense.logits_BV, atol=1e-3)


def test_long_documents_are_attended_to_in_part(sdpa):
    sdpa.sparse_from = 400
    model = tiny_model("qwen3")
    pack = pack_of(document(900), document(60, seed=1))
    prefilled = prefill(model, sdpa, replace(SMALL, sparse_attention=0.2, local_from=3), pack)
    (of_long,), (of_short,) = prefilled.by_document()
    *before, last = of_long
    assert [work.pairs < 900 * 901 // 2 for work in before] == [True] * 3
    assert (last.last_only, attended_pairs(last)) == (True, 900)
    computed, whole = sum(work.pairs for work in before) + 900, 3 * (900 * 901 // 2) + 900
    assert attention_ratio(model.shape, [of_long], 900) == pytest.approx(computed / whole)
    assert [work.pairs for work in of_short[:2]] == [60 * 61 // 2] * 2
    everywhere = replace(SMALL, sparse_attention=(1.0, 0.2, 1.0, 1.0))
    (of_long,), _ = prefill(model, sdpa, everywhere, pack).by_document()
    assert [work.pairs is None for work in of_long] == [True, False, False, True]
    assert [work.last_only for work in of_long] == [False, False, False, True]


def test_late_layers_attend_to_what_is_near():
    assert Mars().attention_masses(6) == (0.85, 0.85, 0.85, 0.85, 0.0, 0.0)
    assert Mars(local_from=1).attention_masses(3) == (0.85, 0.0, 0.0)
    assert Mars(local_from=3).attention_masses(3) == (0.85, 0.85, 0.85)
    assert Mars(sparse_attention=(1.0, 0.8, 0.5)).attention_masses(3) == (None, 0.8, 0.5)
    assert Mars(sparse_attention=(1.0, 0.8, 0.5), local_from=2).attention_masses(3) == (None, 0.8, 0.0)
    assert Mars(sparse_attention=None).attention_masses(3) == (None, None, None)


def test_local_layers_compute_few_pairs_but_all_of_the_prompts_end(sdpa):
    sdpa.sparse_from = 400
    model, doc = tiny_model("qwen3"), document(900)
    local = Mars(last_full=2, local_from=0)
    ((passes,),) = prefill(model, sdpa, local, pack_of(doc)).by_document()
    rows, last = 7, 900 - 7 * sparse.BLOCK
    near = rows * sparse.BLOCK * (sparse.BLOCK + 1) // 2 + last * (last + 1) // 2  # in the blocks themselves
    before = 1 + 4 * 2 + 6  # blocks before each: one, two, and of the last but one all
    assert passes[0].pairs == near + before * sparse.BLOCK**2 + last * rows * sparse.BLOCK


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window=0 is out of range: it must be at least 1"),
        ({"local_from": -1}, "local_from=-1 is out of range: it must be at least 0"),
        ({"most": 8}, "most=8 is less than window=64"),
        ({"sparse_attention": 1.5}, "sparse_attention=1.5 is out of range: it must be between 0 and 1"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError) as caught:
        Mars(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"last_full": 9}, r"^last_full=9, and the model has layers 0 to 3$"),
        ({"local_from": 5}, r"^local_from=5, and the model has layers 0 to 3; with 4 none is local$"),
        ({"sparse_attention": (0.9, 0.8)}, r"^sparse_attention has 2 values, and the model has 4 layers: "),
    ],
)
def test_settings_that_do_not_fit_the_model(sdpa, settings, message):
    with pytest.raises(ConfigError, match=message):
        prefill(tiny_model("llama"), sdpa, Mars(**settings), pack_of(document(20)))


def test_without_kernels_attention_is_whole(sdpa):
    """Plain torch takes longer for some blocks than whole attention for all."""
    model, doc = tiny_model("qwen3"), document(5000)
    doc = replace(doc, input_ids=doc.input_ids[:4200])
    mars, dense = (prefill(model, sdpa, method, pack_of(doc)) for method in (Mars(), Dense()))
    (passes,) = mars.by_document()
    assert attention_ratio(model.shape, passes, 4200) == 1
    assert [work.estimated_pairs for work in passes[0]] == [0] * 4
    assert torch.allclose(mars.logits_BV, dense.logits_BV, atol=1e-4)


def test_operations_count_the_estimate_that_chooses_blocks(sdpa):
    sdpa.sparse_from = 400
    model, pack = tiny_model("qwen3"), pack_of(document(900), document(60, seed=1))
    method = Mars(local_from=2, sparse_attention=(0.5, 1.0, 0.5, 0.5))
    of_long, of_short = prefill(model, sdpa, method, pack).by_document()
    # 7 blocks, whose 128 queries meet the means of 1 + 2 + ... + 7 blocks, and 4 tokens that meet 8
    pairs = 128 * 28 + 4 * 8
    # nothing is estimated for a mass of 1, by local layers, by the last one, and in short documents
    assert [work.estimated_pairs for work in of_long[0]] == [pairs, 0, 0, 0]
    assert [work.estimated_pairs for work in of_short[0]] == [0, 0, 0, 0]
    unestimated = [[work._replace(estimated_pairs=0) for work in of_long[0]]]
    # a product of vectors of 32 is 64 operations, in each of 4 heads
    added = passes_flops(model.shape, of_long) - passes_flops(model.shape, unestimated)
    assert (model.shape.heads, model.shape.head_dim) == (4, 32)
    assert added == 4 * 64 * pairs


def test_layers_with_windows_and_wide_heads_choose_no_blocks():
    shape = tiny_model("qwen3").shape
    masses = Mars().attention_masses(4)
    assert Mars().masses_in(shape) == masses
    windowed = replace(shape, windows=(None, 9, 9, None))
    assert Mars().masses_in(windowed) == (masses[0], None, None, masses[3])
    assert Mars().masses_in(replace(shape, head_dim=256)) == masses
    assert Mars().masses_in(replace(shape, head_dim=512)) == (None,) * 4
