"""Texts to tokens: user text that cannot turn into control tokens, layouts of templates, stop tokens."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from pipeline.errors import ModelError, RowError
from pipeline.records import Spans

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

SENTINELS = {name: f"Mars{name.title()}Sentinel7c1e49" for name in ("document", "question", "system")}
RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_ANCHORS = ("\n", "a", ".")  # several, because a text may merge with the one before it


def stop_token_ids(tokenizer: PreTrainedTokenizerFast, generation_config: Any) -> frozenset[int]:
    """The tokens that end an answer: generation config's, tokenizer's EOS and chat template's end of turn.

    `generation_config` may be None, and its `eos_token_id` an int, a list or None.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    stops = {configured} if isinstance(configured, int) else set(configured or ())
    return frozenset((stops | {tokenizer.eos_token_id, _end_of_turn(tokenizer)}) - {None})


def _end_of_turn(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The added token that the chat template writes right behind an assistant's message, if it writes one."""
    sentinel = SENTINELS["document"]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": sentinel}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except RENDER_ERRORS:  # no chat template, or one for prompts only: the other sources remain
        return None
    tail = text.partition(sentinel)[2].lstrip()
    ids = tokenizer.encode(tail, add_special_tokens=False, split_special_tokens=False)
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def chat_source(tokenizer: PreTrainedTokenizerFast) -> str:
    try:
        return tokenizer.get_chat_template() if tokenizer.chat_template else ""
    except ValueError:  # several by name, none of them the default
        return ""


def bos_ids(tokenizer: PreTrainedTokenizerFast, rendered: str) -> list[int]:
    """What the tokenizer itself puts before a text, unless the template has written it."""
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    count = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return [] if rendered.startswith(str(tokenizer.decode(whole[:count]))) else whole[:count]


def _control_ids(tokenizer: PreTrainedTokenizerFast, sources: list[str]) -> frozenset[int]:
    """Tokens that user text must not turn into: special ones, stops, and added ones that a template writes.

    Left out are tokens that ordinary text may well be: the unknown token, white space and single characters.
    """
    stops = stop_token_ids(tokenizer, None)
    always = {*tokenizer.all_special_ids, *stops}
    names = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in always}
    for token, added in tokenizer.added_tokens_decoder.items():
        if added.special or any(added.content in source for source in sources):
            names[token] = added.content
    unknown = {tokenizer.unk_token_id} - stops
    return frozenset(token for token, name in names.items() if len(name.strip()) > 1 and token not in unknown)


@dataclass(frozen=True, slots=True)
class Layout:
    """One rendered template: token ids of the instruction, and the names of the user texts between them."""

    parts: tuple[list[int] | str, ...]
    leading: str | None  # the user text that the rendered prompt begins with, if it does

    @property
    def fixed_tokens(self) -> int:
        return sum(len(part) for part in self.parts if not isinstance(part, str))

    def fill(self, texts: dict[str, list[int]]) -> tuple[np.ndarray, Spans]:
        ids: list[int] = []
        spans: dict[str, tuple[int, int]] = {}
        for part in self.parts:
            start = len(ids)
            ids += texts[part] if isinstance(part, str) else part
            if isinstance(part, str):
                spans[part] = (start, len(ids))
        end = spans["document"][1]
        spans.setdefault("question", (end, end))
        return np.array(ids, dtype=np.int64), Spans(document=spans["document"], question=spans["question"])


class Codec:
    """A private copy of the tokenizer's backend: settings that others change on theirs cannot reach it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, sources: list[str]) -> None:
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._control_ids = _control_ids(tokenizer, sources)
        self._anchors: dict[str, list[int]] = {}
        if not any(self._joins(anchors) for anchors in (("",), _ANCHORS)):
            raise ModelError(f"the tokenizer {type(tokenizer).__name__} does not decode to the text encoded")

    def _joins(self, anchors: tuple[str, ...]) -> bool:
        """Whether texts encoded on their own decode to the joined one (some begin each with a space)."""
        self._anchors = {text: self._backend.encode(text, add_special_tokens=False).ids for text in anchors}
        try:
            ids = [
                *self._encode("ab", True)[0],
                *self._encode(" c", False)[0],
                *self._encode("d e", False)[0],
            ]
        except RowError:
            return False
        return self._backend.decode(ids, skip_special_tokens=False).removeprefix(" ") == "ab cd e"

    def layout(self, rendered: str, system: str, bos: list[int]) -> Layout:
        """Cut a rendered template at its sentinels and tokenize what is the same for every row."""
        names = {sentinel: name for name, sentinel in SENTINELS.items()}
        pieces = [piece for piece in re.split(f"({'|'.join(names)})", rendered) if piece]
        parts: list[list[int] | str] = [bos]
        for index, piece in enumerate(pieces):
            name = names.get(piece)
            self._backend.encode_special_tokens = name is not None
            if name is None:
                parts.append(self._encode(piece, index == 0)[0])
            else:
                parts.append(self.user(system, index == 0) if name == "system" else name)
        self._backend.encode_special_tokens = True
        return Layout(tuple(parts), names.get(pieces[0]))

    def user(self, text: str, leading: bool) -> list[int]:
        """Tokens of user text, encoded in pieces where it would become a control token."""
        ids, encoding, anchor = self._encode(text, leading)
        if self._control_ids.isdisjoint(ids):
            return ids
        offsets = encoding.offsets[len(encoding.offsets) - len(ids) :]
        spans = [span for token, span in zip(ids, offsets, strict=True) if token in self._control_ids]
        if any(end - start < 2 for start, end in spans):
            raise RowError("bad_text", "the tokenizer has only a control token for a character of the text")
        bounds = [0, *((start + end) // 2 - len(anchor) for start, end in spans), len(text)]
        return [token for a, b in pairwise(bounds) for token in self.user(text[a:b], leading and a == 0)]

    def starts(self, text: str) -> np.ndarray:
        """(T,) int64 the character at which each token of a text begins, ascending, the first 0.

        Tokens that share a character share its place. Of text that would become control tokens, and of where
        the text meets the one before it, these can differ from the tokens of a prompt.
        """
        offsets = self._backend.encode(text, add_special_tokens=False).offsets
        starts_T = np.fromiter((start for start, _ in offsets), np.int64, len(offsets))
        starts_T[:1] = 0  # whatever a normaliser took away in front
        return np.maximum.accumulate(starts_T)

    def _encode(self, text: str, leading: bool) -> tuple[list[int], Encoding, str]:
        """Token ids, with a space in front only if they begin the prompt; their encoding; its anchor."""
        for anchor, anchor_ids in ({"": []} if leading else self._anchors).items():
            try:
                encoding = self._backend.encode(anchor + text, add_special_tokens=False)
            except (TypeError, UnicodeError) as error:
                raise RowError("bad_text", "the text is not valid Unicode (a lone surrogate)") from error
            ids, skip = encoding.ids, len(anchor_ids)
            if ids[:skip] == anchor_ids:
                return ids[skip:], encoding, anchor
        raise RowError("bad_text", "the tokenizer does not split the text from the one before it")
