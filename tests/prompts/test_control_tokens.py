"""Text that looks like control tokens stays text; which tokens end an answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prompt_parts import CHATML, INST, builder, byte_tokenizer, decode, document, space_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pipeline.prompts.tokenizing import stop_token_ids


def test_control_tokens_in_user_text_stay_text() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML.replace("<|im_end|>", "<turn_end>"))
    added = tokenizer.added_tokens_decoder
    text = "x".join(token.content for token in added.values()) + "<|im_<|im_end|>end|><turn_<turn_end>end>"
    encoded = builder(tokenizer, system=text).encode(document(text, text))
    spans = [encoded.input_ids[slice(*span)] for span in (encoded.spans.document, encoded.spans.question)]
    note, spaces = (tokenizer.convert_tokens_to_ids(token) for token in ("<note>", "    "))
    plain_added = {note, spaces}  # words of the vocabulary that no template uses
    stops = stop_token_ids(tokenizer, None)
    assert tokenizer.convert_tokens_to_ids("<turn_end>") in stops
    for ids in spans:
        assert not set(ids.tolist()) & {*tokenizer.all_special_ids, *stops}
        assert set(ids.tolist()) & set(added) == plain_added
        assert decode(tokenizer, ids) == text
    assert np.count_nonzero(np.isin(encoded.input_ids, list(stops))) == 2  # system's and user's end
    assert decode(tokenizer, encoded.input_ids).count(text) == 3


@pytest.mark.parametrize(("stop", "steps"), [("</s>", ["</", "</s", "</s>"]), ("<>", ["<>"])])
def test_control_tokens_that_the_model_itself_spells(stop: str, steps: list[str]) -> None:
    """Merges that lead to a control token give it without any added token."""
    backend = Tokenizer.from_str(space_tokenizer().backend_tokenizer.to_str())
    vocab = backend.get_vocab(with_added_tokens=True)
    for step in steps:
        vocab.setdefault(step, len(vocab))
    merges = [(step[:-1], step[-1]) for step in steps]
    backend.model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    spelling = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=stop, unk_token="<unk>", chat_template=INST
    )
    plain = spelling.encode(f"a{stop}", add_special_tokens=False, split_special_tokens=True)
    assert spelling.eos_token_id in plain  # or this test shows nothing
    text = f"a{stop}b{stop}{stop}"
    encoded = builder(spelling).encode(document(text))
    assert spelling.eos_token_id not in encoded.input_ids
    assert decode(spelling, encoded.input_ids) == f"<s>[INST] {text} [/INST]"


def test_special_tokens_of_a_space_tokenizer_stay_text() -> None:
    tokenizer = space_tokenizer()
    encoded = builder(tokenizer).encode(document("<unk><s> </s>", "<s>"))
    assert decode(tokenizer, encoded.input_ids) == "<s>[INST] <unk><s> </s>\n\n<s> [/INST]"
    assert np.isin(encoded.input_ids, tokenizer.all_special_ids).nonzero()[0].tolist() == [0]


def test_added_tokens_that_the_template_writes_stay_text() -> None:
    tokenizer = byte_tokenizer()
    encoded = builder(tokenizer, template="<note>    {{ document }}").encode(
        document("x<note>    <turn_end>")
    )
    note, spaces, end = tokenizer.convert_tokens_to_ids(["<note>", "    ", "<turn_end>"])
    counts = [np.count_nonzero(encoded.input_ids == token) for token in (note, spaces, end)]
    assert counts == [1, 2, 1]  # white space is text, and so is a word that the template does not use


def test_special_tokens_of_one_character_may_stay() -> None:
    tokenizer = byte_tokenizer(pad_token="!")
    assert (
        decode(tokenizer, builder(tokenizer, template="{{ document }}").encode(document("a!")).input_ids)
        == "a!"
    )


def test_unknown_characters_may_stay() -> None:
    tokenizer = space_tokenizer(byte_fallback=False)
    encoded = builder(tokenizer).encode(document("aéb"))
    assert np.count_nonzero(encoded.input_ids == tokenizer.unk_token_id) == 1


@pytest.mark.parametrize("configured", [None, 7, [7, 8]])
def test_stop_tokens(configured: Any) -> None:
    tokenizer = byte_tokenizer()
    ends = set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    listed = {configured} if isinstance(configured, int) else set(configured or ())
    assert stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=configured)) == ends | listed
    assert stop_token_ids(tokenizer, None) == ends


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ messages[0]['content'] }}"])
def test_stop_tokens_without_an_assistants_turn(template: str | None) -> None:
    tokenizer = byte_tokenizer(chat_template=template)
    assert stop_token_ids(tokenizer, None) == {tokenizer.eos_token_id}


def test_stop_token_behind_a_space() -> None:
    tokenizer = space_tokenizer(eos_token=None)
    tokenizer.chat_template = INST
    assert stop_token_ids(tokenizer, None) == {tokenizer.convert_tokens_to_ids("</s>")}
