"""Tokens that the tokenizer has and the model has not."""

from __future__ import annotations

import pytest
from prompt_parts import CHATML, builder, byte_tokenizer, document

from pipeline.errors import ModelError
from pipeline.records import RowError

TOKENIZER = byte_tokenizer()
MARK, END, NOTE = TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<note>"])
REMEDY = "use the tokenizer that belongs to the model's weights"


def test_a_model_that_knows_all_tokens():
    prompts = builder(vocab=NOTE + 100)
    assert prompts.encode(document("<note>")).prompt_tokens


def test_a_template_that_writes_a_token_beyond_the_models():
    with pytest.raises(ModelError) as caught:
        builder(vocab=MARK)
    assert str(caught.value) == (
        f"the model's chat template writes the token '<|im_start|>', number {MARK}, and the model knows"
        f" {MARK} tokens; {REMEDY}"
    )


def test_an_end_of_answers_beyond_the_models():
    tokenizer = byte_tokenizer(chat_template=CHATML.replace("<|im_end|>\n", ""), eos_token="<|im_end|>")
    with pytest.raises(ModelError, match=rf"^answers end with the token '<\|im_end\|>', number {END}, and"):
        builder(tokenizer, vocab=END)


def test_a_text_with_a_token_beyond_the_models():
    prompts = builder(vocab=NOTE)
    assert prompts.encode(document("note")).prompt_tokens
    with pytest.raises(RowError) as caught:
        prompts.encode(document("a <note>"))
    assert (caught.value.kind, str(caught.value)) == (
        "bad_text",
        f"the text has the token '<note>', number {NOTE}, and the model knows {NOTE} tokens;"
        " take it out of the text",
    )
