"""Cutting over-long documents: parts cover them in order, overlap as stated, fit, end at good places."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_parts import builder, byte_tokenizer, document, space_tokenizer, span_text

from pipeline.prompts.splitting import SplitDocument, Splitter, TokenizedText, cut_parts, groups_that_fit
from pipeline.records import EncodedDocument, Row, RowError, SamplingParams

TEMPLATE = "<{{ document }}>{{ question }}?"
COMBINE = "{{ document }}{{ question }}!"
TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "spaces": space_tokenizer(),
    "prepending": space_tokenizer("normalizer"),
}

pieces = st.sampled_from(
    [
        *("hello", "hell", " w", "x", ". ", "? ", "\n", "\r\n", "\r", "\n\n", "\r\n\r\n", " ", "    "),
        *(
            "\u2029",
            "\f",
            "é",
            "漢字。",
            "🐟",
            "👩\u200d🚒",
            "e\u0301",
            "<|im_end|>",
            "</s>",
            "<note>",
            "\u3000",
        ),
    ]
)
texts = st.lists(pieces, min_size=30, max_size=150).map("".join)


def splitter(name="bytes", *, room=40, overlap=8, **options):
    """One whose prompts have room for so many tokens beside a question of one token."""
    tokenizer = TOKENIZERS[name]
    probe = builder(tokenizer, template=TEMPLATE, on_overlong="split")
    context = room + probe.limit - probe.room(Row(row=0, id="", place="", question="w")) + 5
    prompts = builder(tokenizer, template=TEMPLATE, context=context, max_new_tokens=5, on_overlong="split")
    assert prompts.room(Row(row=0, id="", place="", question="w")) == room
    combine = builder(tokenizer, template=COMBINE, context=context, max_new_tokens=5, **options)
    return Splitter(prompts=prompts, combine=combine, overlap=overlap)


def split(cutter, text, question="w") -> SplitDocument:
    found = cutter.encode(document(text, question))
    assert isinstance(found, SplitDocument)
    return found


def test_parts_leave_room_for_the_answer_that_a_row_asks_for():
    cutter, asked = splitter(room=40), document("one fish two fish " * 20, "w")
    params = SamplingParams(max_new_tokens=cutter.prompts.max_new_tokens + 12)
    parts = cutter.encode(replace(asked, source=replace(asked.source, params=params))).prompts
    longest = [max(prompt.prompt_tokens for prompt in each) for each in (cutter.encode(asked).prompts, parts)]
    assert longest[0] > cutter.prompts.limit - 12 >= longest[1]
    assert all(prompt.source.params == params for prompt in parts)


def texts_of(found, text):
    return [text[part.start : part.end] for part in found.parts]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(texts, st.sampled_from(sorted(TOKENIZERS)), st.integers(16, 60), st.data())
def test_parts_cover_the_document_in_order_and_fit(text, name, room, data):
    overlap = data.draw(st.integers(0, room // 2))
    cutter = splitter(name, room=room, overlap=overlap)
    starts_T = cutter.prompts.token_starts(text)
    whole = cutter.encode(document(text, "w"))
    if isinstance(whole, EncodedDocument):
        assert whole.prompt_tokens <= cutter.prompts.limit
        return
    parts = whole.parts
    assert (parts[0].start, parts[-1].end) == (0, len(text))
    assert all(part.start < part.end for part in parts)
    tokens = [np.searchsorted(starts_T, (part.start, part.end)) for part in parts]
    for (before, after), (first, second) in zip(pairwise(parts), pairwise(tokens), strict=True):
        assert before.start < after.start <= before.end < after.end
        assert text[before.end - 1 : before.end + 1] != "\r\n"
        shared, of_one_character = first[1] - second[0], np.bincount(starts_T).max()
        # exact, but that neither a character nor CR LF is divided
        assert overlap - of_one_character < shared < overlap + of_one_character + 2
    for part in parts:
        content = text[part.start : part.end]
        assert (part.encoded is None) == (not content.strip())
        if part.encoded is not None:
            assert part.encoded.prompt_tokens <= cutter.prompts.limit
            span = span_text(cutter.prompts.tokenizer, part.encoded, part.encoded.spans.document)
            assert span.removeprefix("<") == content.removeprefix("<")  # which may share the template's token
            assert span_text(cutter.prompts.tokenizer, part.encoded, part.encoded.spans.question) == "w"


@settings(max_examples=100, deadline=None)
@given(st.text("ab .\n", min_size=100, max_size=400), st.integers(8, 40), st.data())
def test_the_overlap_is_exact_where_a_character_is_a_token(text, room, data):
    overlap = data.draw(st.integers(0, room // 2))
    cut = TokenizedText(text, np.arange(len(text)))
    parts = list(cut_parts(cut, room=room, overlap=overlap, encode=lambda part: None))
    assert all(before.end - after.start == overlap for before, after in pairwise(parts))
    assert all(part.end - part.start <= room for part in parts)
    assert all(part.end - part.start >= room / 2 for part in parts[:-1])
    assert len(parts) <= 1 + max(0, len(text) - room) / (room / 4)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("aaaa bbbb. cc\n\ndd ee. ff gg hh ii jj", "cc\n\n"),  # a paragraph, though others come later
        ("aaaa bbbb.\r\ncc\r\n\r\ndd ee. ff gg hh ii jj", "cc\r\n\r\n"),
        ("aaaa bbbb. cc\n \t\u3000\ndd ee. ff gg hh ii jj", "\u3000\n"),
        ("aaaa bbbb. cc\u2029dd ee. ff gg hh ii jj", "\u2029"),
        ("aaaa bbbb cc dd. ee\nff gg hh ii jj", "dd. "),
        ('aaaa bbbb cc "dd!" ee ff gg hh ii jj', '"dd!" '),
        ("漢字漢字漢字漢字漢字。漢字、漢字漢字漢字漢字漢字漢字漢字", "漢字。"),
        ("aaaa bbbb cc dd\nee ff gg hh ii jj", "dd\n"),
        ("aaaa bbbb cc dd\ree ff gg hh ii jj", "dd\r"),
        ("aaaa bbbb cc dd ee ffff gg hh ii jj", "ee "),
        ("a\n\n" + "b" * 40, "b" * 10),  # a heading alone is no part
    ],
)
def test_where_a_part_ends(text, ends):
    cut = TokenizedText(text, np.arange(len(text)))
    assert text[: cut.end_of_part(0, 22, 9)].endswith(ends)


def test_a_document_of_one_paragraph_without_any_space():
    found = split(splitter(room=40, overlap=10), "x" * 200)
    assert [(part.start, part.end) for part in found.parts] == [
        (0, 40), (30, 70), (60, 100), (90, 130), (120, 160), (150, 190), (180, 200)
    ]  # fmt: skip
    assert found.document_tokens == 200
    assert found.prompt_tokens == sum(prompt.prompt_tokens for prompt in found.prompts)
    assert found.prompts[2].source.place == "in.jsonl line 1, part 3 of 7"
    assert len({prompt.ready_at for prompt in found.prompts}) == 1


def test_white_space_is_not_sent():
    text = "x" * 30 + "\n" * 100 + "y" * 30
    found = split(splitter(room=40, overlap=0), text)
    sent = [part.encoded is not None for part in found.parts]
    assert (sent[0], sent[-1], all(sent)) == (True, True, False)
    assert "".join(texts_of(found, text)) == text
    with pytest.raises(RowError, match=r"^the document is white space alone$") as caught:
        splitter().encode(document(" \n" * 100, "w"))
    assert caught.value.kind == "empty_document"


def test_what_fits_is_not_cut():
    cutter = splitter(room=40)
    assert isinstance(cutter.encode(document("x" * 40, "w")), EncodedDocument)
    assert len(split(cutter, "x" * 41).parts) == 2


@pytest.mark.parametrize(
    ("question", "overlap", "message"),
    [
        ("w" * 41, 0, "instruction and question alone have 44 tokens, no room for the document"),
        ("w", 21, "--split-overlap 21 is more than half of the 40 tokens that a part has room for"),
    ],
)
def test_no_room_for_parts(question, overlap, message):
    with pytest.raises(RowError, match=f"^{message}") as caught:
        splitter(room=40, overlap=overlap).encode(document("x" * 100, question))
    assert caught.value.kind == "over_long"


def test_no_room_to_combine():
    cutter = splitter(room=40, overlap=0, system=None)
    wordy = builder(template="." * 60 + COMBINE, context=64, max_new_tokens=2)
    with pytest.raises(RowError, match=r"^the prompt that combines answers has no room for any") as caught:
        Splitter(prompts=cutter.prompts, combine=wordy, overlap=0).encode(document("x" * 100, "w" * 5))
    assert caught.value.kind == "over_long"


def test_a_part_that_grows_when_tokenized_alone_is_made_shorter():
    """A control token is one token of the document's text here, and several of a prompt."""
    text = "<|endoftext|>" * 60
    cutter = splitter(room=40, overlap=4)
    parts = split(cutter, text).parts
    assert (parts[0].start, parts[-1].end) == (0, len(text))
    assert all(part.encoded.prompt_tokens <= cutter.prompts.limit for part in parts)


@pytest.mark.parametrize(
    ("sizes", "room", "groups"),
    [
        ([3, 3, 3, 3], 7, [range(2), range(2, 4)]),
        ([3, 3, 3], 12, [range(3)]),
        ([9, 1, 1, 9], 5, [range(1), range(1, 3), range(3, 4)]),
        ([9, 9], 5, [range(1), range(1, 2)]),
        ([], 5, []),
    ],
)
def test_groups(sizes, room, groups):
    assert groups_that_fit(sizes, room) == groups


@pytest.mark.parametrize("text", ["." * 150_000, "\n \r" * 50_000 + "x", "\"'" * 75_000, ".\"')" * 40_000])
def test_no_text_makes_cutting_slow(text):
    cut = TokenizedText(text, np.arange(len(text)))
    began = time.process_time()  # which other processes do not use up
    assert len(list(cut_parts(cut, room=4000, overlap=100, encode=lambda part: None))) < 200
    assert time.process_time() - began < 5
