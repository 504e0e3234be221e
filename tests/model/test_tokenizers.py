"""A tokenizer from a model's folder: where its chat template may stand, and what cannot be read."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest

from pipeline.checkpoints import tokenizers
from pipeline.errors import ModelError
from pipeline.model.loading import open_model
from pipeline.settings.model_settings import ModelSettings

TEMPLATE = "X{% for m in messages %}{{ m.content }}{% endfor %}"
SPACES = b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"  # as a SentencePiece file begins
TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\n"


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of the model without its chat template."""
    shutil.copytree(model_folder, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").unlink()
    return tmp_path / "m"


def opened(folder):
    return open_model(ModelSettings(model=str(folder))).tokenizer


def set_config(folder, **values):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_no_template(folder):
    assert opened(folder).chat_template is None


@pytest.mark.parametrize("name", ["chat_template.json", "chat_template.jinja", "tokenizer_config.json"])
def test_each_place_of_a_template(folder, name):
    if name == "tokenizer_config.json":
        set_config(folder, chat_template=TEMPLATE)
    else:
        content = json.dumps({"chat_template": TEMPLATE}) if name.endswith("json") else TEMPLATE
        (folder / name).write_text(content)
    assert opened(folder).get_chat_template() == TEMPLATE


def test_a_list_of_templates(folder):
    set_config(folder, chat_template=[{"name": name, "template": name} for name in ("rag", "default")])
    assert opened(folder).chat_template == {"rag": "rag", "default": "default"}


def test_a_folder_of_templates(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert opened(folder).chat_template == {"rag": "R"}
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert opened(folder).get_chat_template() == TEMPLATE


def test_the_tokenizers_own_template_stands_above_the_processors(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "other"}))
    assert opened(folder).get_chat_template() == TEMPLATE


@pytest.mark.parametrize(
    ("content", "fault"),
    [("{", "is no JSON: "), ("[]", "is no JSON object: "), ("{}", "holds no chat template: ")],
)
def test_a_damaged_file(folder, content, fault):
    (folder / "chat_template.json").write_text(content)
    with pytest.raises(ModelError, match=rf"cannot be loaded: chat_template\.json {fault}"):
        opened(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_named(folder, name):
    (folder / name).write_text('{"version"')
    with pytest.raises(ModelError, match=rf"cannot be loaded: {name} is no JSON: download or copy it again"):
        opened(folder)


def test_a_class_without_a_vocabulary_is_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    set_config(folder, tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(ModelError, match=r"it has no tokenizer \(tokenizer.json, .*\): copy the tokenizer's"):
        opened(folder)


@pytest.fixture
def alone(folder):
    """Only the vocabulary of an older tokenizer."""
    (folder / "tokenizer.json").unlink()
    set_config(folder, tokenizer_class="LlamaTokenizer")
    return folder


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="it can be read here")
def test_sentencepiece_alone_says_what_it_needs(alone):
    (alone / "tokenizer.model").write_bytes(SPACES)
    with pytest.raises(ModelError) as caught:
        opened(alone)
    assert str(caught.value) == (
        f"model {str(alone)!r} cannot be loaded: its tokenizer is a SentencePiece file, tokenizer.model,"
        " which needs two more packages: pip install sentencepiece protobuf"
    )


def test_other_failures_are_told_as_they_are(alone, monkeypatch):
    (alone / "tokenizer.model").write_bytes(TIKTOKEN)
    with pytest.raises(ModelError) as caught:
        opened(alone)
    assert "SentencePiece" not in str(caught.value)
    monkeypatch.setattr(tokenizers, "_is_installed", lambda module: True)
    (alone / "tokenizer.model").write_bytes(SPACES)
    with pytest.raises(ModelError) as caught:
        opened(alone)
    assert "two more packages" not in str(caught.value)
