"""Documents' prefixes computed once for several questions: the same as each prompt's own prefill."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import FAMILY_SETTINGS, SIZES, document, pack_of, tiny_model

from pipeline.errors import Interrupted
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.kernels import sparse
from pipeline.model.prefill import prefill
from pipeline.model.shared import prefill_behind, prefill_prefixes
from pipeline.pruning.dense import Dense
from pipeline.pruning.operations import LayerWork, attended_pairs, layer_flops
from pipeline.pruning.registry import make_method
from pipeline.records import EncodedDocument, Row, Spans

# of each: settings that prune short documents, and how many of 4 layers come before that
METHODS = {
    "dense": ({}, 4),
    "marsinfer": ({"start_layer": "2", "window": "6", "prefix": "4", "eta": "0.7"}, 2),
    "sliminfer": ({"layers": "1,3", "budget": "0.6,0.4", "block": "8", "unit": "2"}, 1),
    "uniprefill": (
        {"first_layer": "1", "every": "2", "p": "0.6", "block": "4", "sink": "3", "window": "5"},
        1,
    ),
    "fastkv": ({"layer": "2", "share": "0.5", "kv_share": "1.0", "window": "4"}, 2),
    "gemfilter": ({"layer": "2", "keep": "9"}, 2),
    "mars": ({"window": "6", "most": "12", "last_full": "1"}, 1),
}
QUESTIONS = (9, 1, 23, 4, 2)
OF_PREFIX = (0, 1, 0, 2, 0)


def prefixes():
    return [document(length, seed=length).input_ids for length in (70, 5, 133)]


def asked():
    """Prompts of five questions about three documents, in no order."""
    prompts = []
    for row, (g, length) in enumerate(zip(OF_PREFIX, QUESTIONS, strict=True)):
        known = prefixes()[g]
        question = np.random.default_rng(row).integers(0, SIZES["vocab_size"], length)
        spans = Spans(document=(1, len(known)), question=(len(known), len(known) + length))
        prompts.append(
            EncodedDocument(
                source=Row(row=row, id=str(row), place=""),
                input_ids=np.concatenate([known, question]),
                spans=spans,
            )
        )
    return prompts


def grouped(model, sdpa, method, **options):
    shared = prefill_prefixes(model, sdpa, method, prefixes(), method.shared_layers(model.shape))
    return prefill_behind(model, sdpa, method, shared, asked(), OF_PREFIX, new_tokens=6, **options)


@pytest.mark.parametrize("family", sorted(FAMILY_SETTINGS))
@pytest.mark.parametrize("name", METHODS)
def test_it_equals_the_prefill_of_each_prompt(name, family, sdpa):
    settings, layers = METHODS[name]
    model, method = tiny_model(family), make_method(name, settings)
    assert method.shared_layers(model.shape) == layers
    together = grouped(model, sdpa, method)
    whole = prefill(model, sdpa, method, pack_of(*asked()), new_tokens=6)
    assert (together.logits_BV - whole.logits_BV).abs().max() < 1e-4
    assert together.next_positions == whole.next_positions
    assert together.cache.prompt_tokens() == whole.cache.prompt_tokens()
    assert together.by_document() == whole.by_document()
    rules = StopRules(max_new_tokens=7)
    expected = [answer.tokens for answer in decode(model, sdpa, whole, rules)]
    assert [answer.tokens for answer in decode(model, sdpa, together, rules)] == expected
    assert len({tuple(tokens) for tokens in expected}) > 1


def test_work_that_is_shared_is_counted_apart(sdpa):
    model, method = tiny_model("qwen2"), make_method("marsinfer", {"start_layer": "2"})
    shared = prefill_prefixes(model, sdpa, method, prefixes(), 2)
    expected = [2 * layer_flops(model.shape, LayerWork(len(part), len(part))) for part in prefixes()]
    assert shared.flops(model) == expected


def test_block_sparse_attention_is_shared_at_no_loss(sdpa, monkeypatch):
    sdpa.sparse_from = 300
    monkeypatch.setattr(sparse, "BLOCK", 32)
    model, method = tiny_model("llama"), Dense(sparse_attention=0.2)
    ids = document(450, seed=3).input_ids
    spans = Spans(document=(0, 420), question=(420, 450))
    prompt = EncodedDocument(source=Row(row=0, id="0", place=""), input_ids=ids, spans=spans)
    shared = prefill_prefixes(model, sdpa, method, [ids[:420]], model.shape.layers)
    together = prefill_behind(model, sdpa, method, shared, [prompt], [0])
    whole = prefill(model, sdpa, method, pack_of(prompt))
    exact = prefill(model, sdpa, Dense(), pack_of(prompt))
    before = (-(-420 // sparse.BLOCK) - sparse.WHOLE_ROWS) * sparse.BLOCK  # whose blocks are the same in both
    for layer in range(model.shape.layers):
        mine, other = (cache.keys[layer][:before] for cache in (shared.cache, whole.cache))
        assert (mine - other).abs().max() < 1e-4
    assert (whole.cache.keys[-1][:before] - exact.cache.keys[-1][:before]).abs().max() > 1e-2
    # 13 blocks of 32 queries meet 1 + 2 + ... + 13 means of keys, 4 queries 14; shared layers estimate once
    estimated = 32 * 91 + 4 * 14
    ((layers,),) = together.by_document()
    assert [work.estimated_pairs for work in layers] == [estimated] * 3 + [0]
    (counted,) = shared.flops(model)
    unestimated = [work._replace(estimated_pairs=0) for (work,) in shared.work.by_layer()]
    a_pair = 2 * model.shape.heads * model.shape.head_dim
    assert counted == sum(layer_flops(model.shape, work) for work in unestimated) + 3 * estimated * a_pair
    *pairs, last = zip(*(pairs_of(p) for p in (together, whole, exact)), strict=True)
    for mine, other, all_pairs in pairs:
        assert other <= mine < all_pairs
    assert last == (450, 450, 450)


def pairs_of(prefilled):
    ((layers,),) = prefilled.by_document()
    return [attended_pairs(work) for work in layers]


def test_layers_of_both_parts_can_be_given_up_between(sdpa):
    model, method = tiny_model("llama"), make_method("sliminfer", METHODS["sliminfer"][0])
    shared = prefill_prefixes(model, sdpa, method, prefixes(), 1)
    for calls in (1, 2, 4):  # one layer behind the prefixes, three over whole prompts
        seen = []

        def check(calls=calls, seen=seen):
            seen.append(1)
            if len(seen) == calls:
                raise Interrupted("enough", 143)

        with pytest.raises(Interrupted):
            prefill_behind(model, sdpa, method, shared, asked(), OF_PREFIX, check=check)
        assert len(seen) == calls
