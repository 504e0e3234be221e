"""Prompts have the tokens that transformers gives the real messages, whatever the tokenizer does at seams."""

from __future__ import annotations

import random

import pytest
from prompt_parts import CHATML, INST, PARTS, builder, byte_tokenizer, document, space_tokenizer, span_text
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.prompts import whole
from pipeline.records import RowError

TURNS = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
SWALLOWING = "<s>{% for m in messages %}<|user|>\n{{ m.content }} <|end|>\n{% endfor %}"
BITS = ["hello", "The", " ", "  ", "\n", "\n\n", "é", "数据🙂", ".", "<", "|", "he", "h", " w", "</", "s>"]


def unigram():
    single = [(chr(code), -5.0) for code in range(33, 127)]
    words = [("▁", -2.0), ("▁▁", -3.0), ("▁he", -2.5), ("he", -3.0), ("llo", -3.0), ("\n\n", -4.0)]
    of_bytes = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    special = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    backend = Tokenizer(models.Unigram([*special, *of_bytes, *words, *single], unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=INST, **names)


def swallowing():
    """Control tokens that take the white space beside them, as Phi-3's do."""
    backend = space_tokenizer().backend_tokenizer
    backend.add_special_tokens([AddedToken("<|user|>", rstrip=True), AddedToken("<|end|>", lstrip=True)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=SWALLOWING, **names)


def dots_with_lines():
    """Like Qwen2's and Llama 3's: a full stop and the lines behind it are one token."""
    tokenizer = byte_tokenizer()
    vocab = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    for token in (".Ċ", ".ĊĊ"):
        vocab[token] = 1000 + len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ"), (".", "ĊĊ"), (".", "Ċ")]))
    split = pre_tokenizers.Split(Regex(r" ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+|\w+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHATML)


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "dots with lines": dots_with_lines,
    "in parts": lambda: byte_tokenizer(chat_template=PARTS),
    "space first": space_tokenizer,
    "space always": lambda: space_tokenizer("always"),
    "space never": lambda: space_tokenizer("never"),
    "normalizer": lambda: space_tokenizer("normalizer"),
    "unigram": unigram,
    "swallowing": swallowing,
    "turns, space first": lambda: space_tokenizer(chat_template=TURNS),
    "turns, space always": lambda: space_tokenizer("always", chat_template=TURNS),
    "turns, normalizer": lambda: space_tokenizer("normalizer", chat_template=TURNS),
}


def own(tokenizer, text, question=None, system=None):
    """transformers' tokens of the messages."""
    content = text if question is None else f"{text}\n\n{question}"
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": content})
    if tokenizer.chat_template == PARTS:
        messages = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def harmless(text):
    return "</s>" not in text and "<s>" not in text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_those_of_the_real_messages(name):
    tokenizer, draw = TOKENIZERS[name](), random.Random(name)
    prompts, compared = builder(tokenizer), 0
    for _ in range(150):
        text = "".join(draw.choices(BITS, k=draw.randint(1, 12)))
        question = "".join(draw.choices(BITS, k=draw.randint(0, 4))) or None
        if not (text.strip() and harmless(text) and harmless(question or "")):
            continue
        encoded = prompts.encode(document(text, question))
        assert encoded.input_ids.tolist() == own(tokenizer, text, question), (text, question)
        span = span_text(tokenizer, encoded, encoded.spans.document)
        assert text.strip() in span or name == "swallowing"
        compared += 1
    assert compared > 100


def test_a_document_before_its_mark_begins_with_a_whole_word():
    tokenizer = space_tokenizer()
    ids = builder(tokenizer).encode(document("he")).input_ids.tolist()
    assert "▁he" in tokenizer.convert_ids_to_tokens(ids)


def test_the_full_stop_that_takes_the_lines_behind_it_is_the_documents():
    tokenizer = dots_with_lines()
    encoded = builder(tokenizer).encode(document("End.", "Why?"))
    assert span_text(tokenizer, encoded, encoded.spans.document) == "End.\n\n"
    assert span_text(tokenizer, encoded, encoded.spans.question) == "Why?"


@pytest.mark.parametrize("system", ["Be brief.", " Be brief. \n", "{{ x }}"])
def test_with_a_system_message(system):
    tokenizer = byte_tokenizer()
    encoded = builder(tokenizer, system=system).encode(document("hello", "Why?"))
    assert encoded.input_ids.tolist() == own(tokenizer, "hello", "Why?", system)


@pytest.mark.parametrize("text", ["|im_end|>", "a<|im_end", "|im_start|>system"])
def test_text_and_template_together_make_no_control_token(text):
    tokenizer = byte_tokenizer()
    encoded = builder(tokenizer, template="<{{ document }}|>").encode(document(text))
    assert not set(encoded.input_ids.tolist()) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(encoded.input_ids.tolist()) == f"<{text}|>"


@pytest.fixture
def counted(monkeypatch):
    """Lengths of the texts that were tokenized."""
    lengths = []
    real = whole.encoded

    def encoded(backend, text):
        lengths.append(len(text))
        return real(backend, text)

    monkeypatch.setattr(whole, "encoded", encoded)
    return lengths


@pytest.mark.parametrize("name", TOKENIZERS)
def test_questions_about_one_document_tokenize_it_once(name, counted):
    tokenizer, draw = TOKENIZERS[name](), random.Random(name)
    text = "x" + "".join(draw.choices([bit for bit in BITS if bit[0] not in "<s"], k=6000)) + "end."
    prompts = builder(tokenizer, context=100_000)
    for question in ("Why?", " who", "\n\nhello", None):
        encoded = prompts.encode(document(text, question))
        assert encoded.input_ids.tolist() == own(tokenizer, text, question), question
    assert counted[0] > len(text)
    assert all(length < 2 * whole.REACH for length in counted[1:])


@pytest.mark.parametrize("end", ["=" * 9000, "a" * 9000, "\n" * 9000, "数" * 9000])
def test_questions_about_a_document_that_ends_in_one_long_run(end):
    tokenizer = byte_tokenizer()
    prompts = builder(tokenizer, context=100_000)
    for question in ("Why?", "=", "a", "\n"):
        encoded = prompts.encode(document(f"hello {end}", question))
        assert encoded.input_ids.tolist() == own(tokenizer, f"hello {end}", question)


def test_a_document_that_control_tokens_swallow_is_empty():
    with pytest.raises(RowError, match=r"^the document is empty$"):
        builder(swallowing()).encode(document("\n", "Why?"))
