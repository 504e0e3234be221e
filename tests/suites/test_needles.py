import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.errors import ConfigError, InputError
from pipeline.settings.row_settings import NEEDLE_KINDS
from pipeline.suites.haystack import token_counter
from pipeline.suites.metrics import score
from pipeline.suites.needles import (
    CHAINS,
    COMMON,
    FRAME_TOKENS,
    FREQUENCY,
    HOPS,
    QUERIES,
    VALUES,
    make_needles,
)
from pipeline.suites.samples import Sample

HIDDEN = tuple(kind for kind in NEEDLE_KINDS if kind != "common-words")  # in documents
ORDERED = ("single", "multi-key", "multi-value", "tracking")  # asked for in the order of the document
SENTENCES = [f"Sentence {number} says that ship {number} sails." for number in range(900)]
TEXTS = [
    "\n\n".join(" ".join(SENTENCES[start : start + 5]) for start in range(first, first + 300, 5))
    for first in (0, 300, 600)
]


def count_words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def make(texts: Sequence[str] = TEXTS, **changes: Any) -> list[Sample]:
    settings: dict[str, Any] = {"lengths": (1100, 2000), "count": 10, "seed": 1, "count_tokens": count_words}
    return make_needles(texts, **settings | changes)


def items(sample: Sample) -> list[str]:
    return sample.references[0].split(", ")


def numbers_in(sample: Sample) -> list[int]:
    return [int(number) for number in re.findall(r"Sentence (\d+) says", sample.text)]


@pytest.mark.parametrize("kind", NEEDLE_KINDS)
def test_what_a_sample_says(kind: str) -> None:
    for sample in make(kinds=(kind,)):
        assert sample.task == f"needles-{kind}"
        assert sample.facets["kind"] == kind
        room = sample.facets["length"] - FRAME_TOKENS
        (tokens,) = count_words([sample.text])
        assert tokens == sample.facets["tokens"]
        assert room - 10 < tokens <= room  # a sentence is 7 words
        places = [sample.text.index(item) for item in items(sample)]
        assert kind not in ORDERED or places == sorted(places)
        answer = f"They are {' and '.join(items(sample))}."
        assert score(sample.metric, answer, sample.references, sample.choices) == 1.0
        assert score(sample.metric, "I do not know.", sample.references, sample.choices) == 0.0
        share = score(sample.metric, items(sample)[0], sample.references, sample.choices)
        assert share == 1 / len(items(sample))


@pytest.mark.parametrize("kind", HIDDEN)
def test_the_document_stays_whole_around_its_needles(kind: str) -> None:
    for sample in make(kinds=(kind,)):
        numbers = numbers_in(sample)
        steps = Counter(after - before for before, after in itertools.pairwise(numbers))
        assert steps[1] >= len(numbers) - 4  # but at the joints of 3 documents
        assert all(f"Sentence {number} says that ship {number} sails." in sample.text for number in numbers)
        assert "\n\nSentence" in sample.text
        assert not re.search(r"  |\n\n\n|\.[A-Z]", sample.text)


def test_single_has_one_code_and_multi_key_many() -> None:
    for sample in make(kinds=("single", "multi-key")):
        codes = re.findall(r"The access code of ([\w-]+) is (\d{7})\.", sample.text)
        assert len(codes) == len({*dict(codes)}) == (1 if sample.facets["kind"] == "single" else 41)
        (key,) = (key for key, _ in codes if f"of {key}?" in sample.question)
        assert dict(codes)[key] == sample.references[0]


def test_multi_value_asks_for_all_values() -> None:
    for sample in make(kinds=("multi-value",)):
        codes = re.findall(r"One of the access codes of ([\w-]+) is (\d{7})\.", sample.text)
        assert len({key for key, _ in codes}) == 1
        assert [value for _, value in codes] == items(sample)
        assert len(set(items(sample))) == VALUES


def test_tracking_follows_a_chain() -> None:
    for sample in make(kinds=("tracking",)):
        values: dict[str, str] = {}
        for name, copied, number in re.findall(r"Variable (\w+) = (?:variable (\w+)|(\d{5}))\.", sample.text):
            values[name] = values[copied] if copied else number  # a copy stands behind what it copies
        assert len(values) == CHAINS * (HOPS + 1)
        assert len({*values.values()}) == CHAINS
        (asked,) = (value for value in {*values.values()} if value in sample.question)
        assert [name for name, value in values.items() if value == asked] == items(sample)


def test_multi_query_asks_for_several_keys_in_an_order_of_its_own() -> None:
    samples = make(kinds=("multi-query",))
    orders = set()
    for sample in samples:
        codes = dict(re.findall(r"The access code of ([\w-]+) is (\d{7})\.", sample.text))
        asked = re.findall(r"\w+-\w+", sample.question)
        assert {*asked} == {*codes}
        assert len(asked) == QUERIES
        assert [codes[key] for key in asked] == items(sample)
        orders.add(tuple(sorted(range(QUERIES), key=lambda place, s=sample: s.text.index(items(s)[place]))))
    assert len(orders) > 1


@pytest.mark.parametrize("length", [500, 2000, 8000])
def test_common_words_stand_more_often_than_others(length: int) -> None:
    for sample in make(kinds=("common-words",), lengths=(length,), count=5):
        counts = Counter(sample.text.split())
        most = [word for word, _ in counts.most_common(COMMON)]
        assert sorted(most) == items(sample)
        times = {counts[word] for word in most}
        assert len(times) == 1
        rest = [count for word, count in counts.items() if word not in most]
        assert len(rest) > 30
        assert max(rest) - min(rest) <= 1
        assert FREQUENCY / 1.5 < max(times) / (sum(rest) / len(rest)) <= FREQUENCY
        assert "depth" not in sample.facets
        thirds = [sample.text[part * len(sample.text) // 3 :][: len(sample.text) // 3] for part in range(3)]
        assert all(word in third for word in most for third in thirds)


def test_lengths_take_turns_and_depths_are_uniform() -> None:
    samples = make(kinds=("single",), lengths=(1000, 1500, 2000), count=200)
    lengths = Counter(sample.facets["length"] for sample in samples)
    assert lengths == {1000: 67, 1500: 67, 2000: 66}
    depths = sorted(sample.facets["depth"] for sample in samples)
    assert max(abs(depth - (n + 0.5) / 200) for n, depth in enumerate(depths)) < 0.12
    for sample in samples:
        place = sample.text.index("The access code") / (len(sample.text) - len("The access code of x is 1."))
        assert place == pytest.approx(sample.facets["depth"], abs=0.03)


@pytest.mark.parametrize("kind", ["multi-value", "tracking"])
def test_the_depth_of_several_needles_is_that_of_one(kind: str) -> None:
    for sample in make(kinds=(kind,), lengths=(3000,), count=20):
        wanted = sample.facets["depth"] * len(sample.text)
        assert min(abs(sample.text.index(item) - wanted) for item in items(sample)) < 250


def test_the_same_seed_gives_the_same() -> None:
    assert make() == make()
    assert {s.text for s in make()}.isdisjoint(s.text for s in make(seed=2))
    alone = list(make(kinds=("tracking",)))
    assert alone == [s for s in make() if s.task == "needles-tracking"]


def test_each_sample_is_a_draw_of_its_own() -> None:
    samples = make(kinds=("single",), lengths=(1100,), count=60)
    starts = [numbers_in(sample)[0] for sample in samples]
    assert len({*starts}) > 50  # of 900: few come twice
    firsts = Counter(start // 300 for start in starts)
    assert min(firsts[document] for document in range(3)) > 10
    # more samples, or other kinds, change none
    assert make(kinds=("tracking", "single"), lengths=(1100,), count=80)[80:140] == samples
    assert len({s.id for s in make()}) == len({s.document_key for s in make()}) == 10 * len(NEEDLE_KINDS)


def test_documents_come_in_random_order() -> None:
    orders = set()
    for sample in make(kinds=("single",), lengths=(6500,), count=40):  # nearly all of the 900 sentences
        orders.add(tuple(dict.fromkeys(number // 300 for number in numbers_in(sample))))
    assert len(orders) == 6


def test_the_sides_of_a_calibration_are_other_draws() -> None:
    searched, held_out = (
        make(side=side, kinds=("single", "common-words")) for side in ("search", "held-out")
    )
    assert {s.side for s in searched} == {"search"}
    assert {s.side for s in held_out} == {"held-out"}
    assert {s.side for s in make()} == {None}
    for distinct in (lambda s: s.id, lambda s: s.text, lambda s: s.references):
        assert {*map(distinct, searched)}.isdisjoint(map(distinct, held_out))
    assert searched[0].id == "needles-single/search/1100/1"


def test_short_texts_are_repeated() -> None:
    (sample,) = make(["Only one. And another."], kinds=("single",), lengths=(600,), count=1)
    assert sample.text.count("Only one.") > 50


def test_text_without_sentences_is_cut_all_the_same() -> None:
    def count_characters(texts: Sequence[str]) -> list[int]:
        return list(map(len, texts))

    texts = ["x" * 50_000, "没有空格的句子。" * 4_000]
    samples = make(texts, kinds=("single",), lengths=(5000,), count=8, count_tokens=count_characters)
    for sample in samples:
        assert 4000 < len(sample.text) <= 5000 - FRAME_TOKENS


def test_each_sentence_is_counted_once() -> None:
    counted: list[str] = []

    def count(texts: Sequence[str]) -> list[int]:
        counted.extend(texts)
        return count_words(texts)

    make(kinds=("single",), count=30, count_tokens=count)
    assert len(counted) == len(SENTENCES) + 30


def test_needles_are_not_in_the_text_already() -> None:
    keys = {re.search(r"code of ([\w-]+)", s.text).group(1) for s in make(kinds=("single",), count=60)}
    taken = sorted(keys)[::2]
    again = make([*TEXTS, f"There are {' and '.join(taken)}."], kinds=("single",), count=60)
    assert {re.search(r"code of ([\w-]+)", s.text).group(1) for s in again}.isdisjoint(taken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kinds": ("multikey",)},
            r"unknown kind of needles 'multikey' \(did you mean 'multi-key'\?\); known",
        ),
        ({"kinds": ()}, "at least one kind and one length"),
        ({"lengths": ()}, "at least one kind and one length"),
        ({"count": 0}, "0 needles of a kind: must be at least 1"),
        ({"lengths": (2000, 300)}, "needles of 300 tokens: must be more than 300"),
        ({"lengths": (400,)}, "needles of 400 tokens: no room for 41 needles"),
        (
            {"lengths": (317,), "kinds": ("common-words",)},
            "317 tokens: no room for a list with common words and a question; take lengths of 318 or more",
        ),
    ],
)
def test_needles_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)


@pytest.mark.parametrize("kind", NEEDLE_KINDS)
def test_the_least_length_that_is_named_will_do(kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(kinds=(kind,), lengths=(301,))
    least = int(re.search(r"lengths of ([\d,]+) or more", str(caught.value)).group(1).replace(",", ""))
    assert len(make(kinds=(kind,), lengths=(least,), count=3)) == 3


@pytest.mark.parametrize("texts", [[], [""], [" \n\n "]])
def test_no_text_to_hide_in(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no text in the documents"):
        make(texts)


def test_needles_counted_by_a_tokenizer_fit_the_prompt(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)  # a token a byte
    count = token_counter(tokenizer)
    assert count([]) == []
    assert count(["ab", "", " é"]) == [2, 0, 3]
    for sample in make(lengths=(6000,), count=3, count_tokens=count):
        prompt = [{"role": "user", "content": f"{sample.text}\n\n{sample.question}"}]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        stripped = sample.facets["tokens"] - len(
            tokenizer.encode(sample.text)
        )  # the white space at its start
        assert 1 <= stripped <= 2
        assert sample.facets["tokens"] <= 6000 - FRAME_TOKENS
        assert len(ids) <= 6000
