"""A model's tokenizer from its files, with what transformers leaves out."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import cached_file

from pipeline.values.json_files import read_object

SENTENCEPIECE = "tokenizer.model"
VOCABULARIES = ("tokenizer.json", SENTENCEPIECE, "vocab.json", "tekken.json")  # any of them may be enough
JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
NEEDED = ("sentencepiece", "google.protobuf")  # to read such a file
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")  # a token in base 64, and its number
CHAT_TEMPLATE = "chat_template.json"  # where processors had it, whose tokenizers do not read it


def open_tokenizer(location: str, options: Mapping[str, Any]) -> Any:
    """transformers' tokenizer of a folder or hub id, with its chat template, wherever that is.

    Raises ValueError for a file that cannot be read, or not with what is installed, and whatever transformers
    raises.
    """
    own_code = options.get("trust_remote_code")  # which may read files of other names
    if not own_code and all(_found(location, options, name) is None for name in VOCABULARIES):
        # transformers would make a tokenizer without tokens of tokenizer_config.json alone
        raise ValueError(f"it has no tokenizer ({', '.join(VOCABULARIES)}): copy the tokenizer's files too")
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
    except Exception as error:
        if _needs_sentencepiece(location, options):
            raise ValueError(
                f"its tokenizer is a SentencePiece file, {SENTENCEPIECE}, which needs two more packages:"
                " pip install sentencepiece protobuf"
            ) from error
        fault = _fault(location, options)
        if fault is not None:
            raise ValueError(fault) from error
        raise
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _chat_template(location, options)
    return tokenizer


def _fault(location: str, options: Mapping[str, Any]) -> str | None:
    """What is wrong with the files of a tokenizer that does not load, as far as they tell by themselves."""
    for name in JSON_FILES:
        path = _found(location, options, name)
        try:
            _ = {} if path is None else read_object(path)
        except ValueError as error:
            return str(error)
    return None


def _needs_sentencepiece(location: str, options: Mapping[str, Any]) -> bool:
    """Whether there is such a file alone, of that kind (some are tiktoken's), and nothing that reads it."""
    path = _found(location, options, SENTENCEPIECE)
    if path is None or _found(location, options, "tokenizer.json") is not None:
        return False
    with path.open("rb") as file:
        is_tiktoken = _TIKTOKEN.match(file.read(1 << 12)) is not None
    return not is_tiktoken and not all(map(_is_installed, NEEDED))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


def _chat_template(location: str, options: Mapping[str, Any]) -> Any:
    """What stands in the file of its own; None where there is none."""
    path = _found(location, options, CHAT_TEMPLATE)
    if path is None:
        return None
    template = read_object(path).get("chat_template")
    if template is None:
        raise ValueError(f"{CHAT_TEMPLATE} holds no chat template: it is to have the key 'chat_template'")
    if isinstance(template, list):
        return {each["name"]: each["template"] for each in template}
    return template


def _found(location: str, options: Mapping[str, Any], name: str) -> Path | None:
    """A file of the model, fetched if it is on the hub; None where there is no such file."""
    path = cached_file(
        location,
        name,
        revision=options.get("revision"),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)
