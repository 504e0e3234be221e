"""Which rows form a group, and what the count of operations says is the best way to answer it."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.engines.grouping import Grouping, same_documents
from pipeline.pruning.registry import make_method
from pipeline.pruning.shape import ModelShape
from pipeline.records import EncodedDocument, Row, Spans

SHAPE = ModelShape(
    layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256, context=131072
)


def row(number, document, question, before=5, behind=3):
    """A prompt of a document's seed and length, and a question's length."""
    seed, length = document
    ids = np.concatenate(
        [
            np.arange(before),
            np.random.default_rng(seed).integers(0, 1000, length),
            np.random.default_rng(number).integers(0, 1000, question + behind),
        ]
    )
    end = before + length
    spans = Spans(document=(before, end), question=(end, end + question))
    return EncodedDocument(source=Row(row=number, id=str(number), place=""), input_ids=ids, spans=spans)


def numbers(groups):
    return [[each.source.row for each in rows] for rows in groups]


def test_rows_with_the_same_beginning_are_put_together():
    a, b, shorter = (1, 50), (2, 50), (1, 49)
    given = [row(n, each, 4) for n, each in enumerate([a, b, shorter, a, b, a])]
    given.append(row(6, a, 4, before=6))  # another instruction
    assert numbers(same_documents(given)) == [[0, 3, 5], [1, 4], [2], [6]]


def test_prompts_that_end_with_their_document_share_nothing():
    given = [row(n, (1, 50), 0, behind=0) for n in range(3)]
    assert numbers(same_documents(given)) == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("name", "settings", "rows", "chosen"),
    [
        ("dense", {}, 2, ("dense", 32)),
        ("sliminfer", {}, 2, ("sliminfer", 10)),
        ("sliminfer", {}, 40, ("dense", 32)),
        (
            "marsinfer",
            {},
            2,
            ("dense", 32),
        ),  # half of the FFN's work in 22 layers is more than the document's
        ("marsinfer", {"start_layer": "31"}, 3, ("dense", 32)),
        ("fastkv", {"kv_share": "1"}, 2, ("fastkv", 15)),
        ("fastkv", {}, 4, ("dense", 32)),  # each question chooses the keys that are kept
        ("gemfilter", {}, 40, ("dense", 32)),
        ("gemfilter", {}, 2, ("gemfilter", 13)),
        ("uniprefill", {"share": "0.2"}, 2, ("uniprefill", 7)),
        ("mars", {"last_full": "20"}, 3, ("mars", 20)),
    ],
)
def test_the_way_with_the_fewest_operations_is_chosen(name, settings, rows, chosen):
    grouping = Grouping(method=make_method(name, settings), shape=SHAPE, any_method=True)
    given = [row(n, (1, 32_000), 40) for n in range(rows)]
    (group,), alone = grouping.split(given)
    assert (group.sharing.method.name, group.sharing.layers) == chosen
    assert (numbers([group.rows]), alone) == ([list(range(rows))], [])
    assert group.reason.startswith(f"{rows} rows about a document of 32,000 tokens: ")


def test_the_reason_says_what_becomes_of_the_method():
    grouping = Grouping(method=make_method("sliminfer"), shape=SHAPE, any_method=True)
    (group,), _ = grouping.split([row(n, (1, 32_000), 40) for n in range(40)])
    assert group.reason == (
        "40 rows about a document of 32,000 tokens: answered with dense, because sharing the document that "
        "way is cheapest (--group off keeps sliminfer); it takes 6% of the work of each row on its own"
    )


@pytest.mark.parametrize(("name", "layers"), [("sliminfer", 10), ("marsinfer", 10), ("gemfilter", 13)])
def test_a_method_that_was_asked_for_is_not_replaced(name, layers):
    grouping = Grouping(method=make_method(name), shape=SHAPE)
    (group,), _ = grouping.split([row(n, (1, 32_000), 40) for n in range(40)])
    assert (group.sharing.method.name, group.sharing.layers) == (name, layers)


def test_a_method_that_shares_no_layer_answers_each_row_on_its_own():
    given = [row(n, (1, 32_000), 40) for n in range(4)]
    assert Grouping(method=make_method("fastkv"), shape=SHAPE).split(given) == ([], given)


def test_little_that_is_shared_is_not_worth_it():
    grouping = Grouping(method=make_method("dense"), shape=SHAPE)
    given = [row(n, (1, 20), 400) for n in range(5)]
    assert grouping.split(given) == ([], given)


@pytest.mark.parametrize(
    ("name", "rows", "new_tokens", "chosen"),
    [
        ("sliminfer", 6, 0, ["sliminfer"]),
        ("sliminfer", 6, 256, ["dense"]),  # all rows read the document in the store together
        ("fastkv", 2, 0, ["dense"]),
        ("fastkv", 2, 256, []),  # it has few keys to read, and a document that is shared has all
    ],
)
def test_the_steps_of_the_answers_count_by_what_they_read(name, rows, new_tokens, chosen):
    grouping = Grouping(method=make_method(name), shape=SHAPE, any_method=True, new_tokens=new_tokens)
    groups, _ = grouping.split([row(n, (1, 32_000), 40) for n in range(rows)])
    assert [group.sharing.method.name for group in groups] == chosen


def test_a_method_that_says_nothing_of_its_cost_is_left_to_itself():
    method = make_method("examples/custom_method.py:KeyNorm")
    given = [row(n, (1, 3_000), 40) for n in range(5)]
    assert Grouping(method=method, shape=SHAPE).split(given) == ([], given)


def test_what_does_not_fit_gives_way_to_the_next_best():
    method = make_method("sliminfer")
    given = [row(n, (1, 32_000), 40) for n in range(3)]

    def all_but_own(sharing, shared, rows):
        assert shared == 32_005
        assert [row.prompt_tokens for row in rows] == [32_048] * 3
        return sharing.method.name != "sliminfer"

    (group,), _ = Grouping(method=method, shape=SHAPE, fits=all_but_own, any_method=True).split(given)
    assert group.sharing.method.name == "dense"
    nothing = Grouping(method=method, shape=SHAPE, fits=lambda *_: False, any_method=True)
    assert nothing.split(given) == ([], given)


def test_block_sparse_attention_stays_where_dense_replaces_a_method():
    method = make_method("marsinfer", {"sparse_attention": "0.95"})
    grouping = Grouping(method=method, shape=SHAPE, any_method=True)
    (group,), _ = grouping.split([row(n, (1, 32_000), 40) for n in range(9)])
    assert group.sharing.method == make_method("dense", {"sparse_attention": "0.95"})
