"""Texts to tokens: prompts as transformers tokenizes them, in which user text is never a control token.

A prompt is tokenized whole. Where user text would be a control token, its texts are tokenized one by one,
the template's own with control tokens parsed and user text without, so that a document that says `<|im_end|>`
ends no turn. Only where the user wrote the whole prompt, and no template did, its control tokens are parsed.
"""

from __future__ import annotations

import copy
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ModelError
from pipeline.prompts.chat import chat_messages, check_chat
from pipeline.prompts.templates import RENDER_ERRORS, SENTINELS
from pipeline.prompts.whole import WholeTexts, encoded
from pipeline.records import RowError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

Segment = tuple[str | None, str]  # the name of a user text, or none for a template's own, and the text
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
    tail = _behind_answer(tokenizer, in_parts=False) or _behind_answer(tokenizer, in_parts=True)
    ids = tokenizer.encode(tail.lstrip(), add_special_tokens=False, split_special_tokens=False)
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def _behind_answer(tokenizer: PreTrainedTokenizerFast, *, in_parts: bool) -> str:
    """What the chat template writes behind an assistant's message, given as a text or as a list of parts."""
    sentinel = SENTINELS["document"]
    messages = chat_messages({"user": "a", "assistant": sentinel}, in_parts=in_parts)
    try:
        check_chat(tokenizer)
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except RENDER_ERRORS:  # no chat template, or one for prompts only: the other sources remain
        return ""
    return text.partition(sentinel)[2]


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


@dataclass(slots=True)
class Prompt:
    """Tokens of a prompt, and where its user texts stand in them: of each the first and the one behind."""

    ids: list[int]
    spans: dict[str, tuple[int, int]]

    def cut_document(self, kept: list[int]) -> None:
        """Put these tokens in the document's place."""
        start, end = self.spans["document"]
        gone = end - start - len(kept)
        self.ids = self.ids[:start] + kept + self.ids[end:]
        for name, (a, b) in self.spans.items():
            if a >= end:
                self.spans[name] = a - gone, b - gone
        self.spans["document"] = start, end - gone

    def others(self) -> Iterator[int]:
        """The tokens outside user texts."""
        at = 0
        for start, end in self.spans.values():
            yield from self.ids[at:start]
            at = end
        yield from self.ids[at:]


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """One form of the prompt: token ids of the instruction, and the names of the user texts between them."""

    bos: list[int]  # the first of the parts
    parts: tuple[list[int] | str, ...]
    leading: str | None  # the user text that the prompt begins with, if it does
    control_tokens: list[int]  # of the template, in their order
    parses_texts: bool = False  # whether a user text may be control tokens

    @property
    def fixed_tokens(self) -> int:
        return sum(len(part) for part in self.parts if not isinstance(part, str))

    def fill(self, texts: Mapping[str, list[int]]) -> Prompt:
        prompt = Prompt([], {})
        for part in self.parts:
            start = len(prompt.ids)
            prompt.ids += texts[part] if isinstance(part, str) else part
            if isinstance(part, str):
                prompt.spans[part] = (start, len(prompt.ids))
        return prompt


class Codec:
    """Private copies of the tokenizer's backend: settings that others change on theirs cannot reach them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, sources: list[str]) -> None:
        self._parsing = copy.deepcopy(tokenizer.backend_tokenizer)
        self._parsing.no_truncation()
        self._parsing.no_padding()
        self._parsing.encode_special_tokens = False
        self._texts = WholeTexts(self._parsing)
        self._alone: tuple[str, bool, list[int]] | None = None  # the last document made alone
        self._control_ids = _control_ids(tokenizer, sources)
        # special tokens that a text may turn into, but not by spelling them, such as the unknown one
        self._unspelled = tuple(
            token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special and number not in self._control_ids and len(token.content.strip()) > 1
        )
        self._anchors: dict[str, list[int]] = {}
        if not any(self._joins(anchors) for anchors in (("",), _ANCHORS)):
            raise ModelError(f"the tokenizer {type(tokenizer).__name__} does not decode to the text encoded")

    @cached_property
    def _plain(self) -> Tokenizer:
        """The backend that parses no special tokens, copied only if a text needs it, as that takes long."""
        backend = copy.deepcopy(self._parsing)
        backend.encode_special_tokens = True
        return backend

    def _joins(self, anchors: tuple[str, ...]) -> bool:
        """Whether texts encoded on their own decode to the joined one (some begin each with a space)."""
        self._anchors = {text: self._parsing.encode(text, add_special_tokens=False).ids for text in anchors}
        try:
            ids = [
                *self._encode("ab", True, self._parsing)[0],
                *self._encode(" c", False, self._parsing)[0],
                *self._encode("d e", False, self._parsing)[0],
            ]
        except RowError:
            return False
        return self._parsing.decode(ids, skip_special_tokens=False).removeprefix(" ") == "ab cd e"

    def layout(
        self, segments: Sequence[Segment], bos: list[int], *, parses_texts: bool = False
    ) -> PromptLayout:
        """Tokenize what is the same for every row, a system message included."""
        parts: list[list[int] | str] = [bos]
        control_tokens: list[int] = []
        for index, (name, text) in enumerate(segments):
            if name is None:
                ids = self._encode(text, index == 0, self._parsing)[0]
                control_tokens += [token for token in ids if token in self._control_ids]
                parts.append(ids)
            else:
                parts.append(self.user(text, index == 0) if name == "system" else name)
        return PromptLayout(bos, tuple(parts), segments[0][0], control_tokens, parses_texts)

    def prompt(self, layout: PromptLayout, segments: Sequence[Segment]) -> Prompt:
        """The prompt of these texts, tokenized whole unless user text would then be a control token.

        Where texts may be control tokens, one that begins with those of `bos` has them once.
        """
        prompt = None if self._spells_any(segments) and not layout.parses_texts else self._whole(segments)
        if prompt is None or not (layout.parses_texts or self._has_only(prompt, layout.control_tokens)):
            return layout.fill({name: self._part(name, text, layout) for name, text in segments if name})
        begins = layout.parses_texts and prompt.ids[: len(layout.bos)] == layout.bos
        bos = [] if begins else layout.bos
        spans = {name: (start + len(bos), end + len(bos)) for name, (start, end) in prompt.spans.items()}
        return Prompt(bos + prompt.ids, spans)

    def _part(self, name: str, text: str, layout: PromptLayout) -> list[int]:
        """Tokens of a user text alone; rows about one document, which takes long, follow each other."""
        leads, latest = layout.leading == name, self._alone
        if latest is not None and latest[:2] == (text, leads):
            return latest[2]
        ids = self.user(text, leads)
        if name == "document":
            self._alone = text, leads, ids
        return ids

    def _has_only(self, prompt: Prompt, control_tokens: list[int]) -> bool:
        """Whether these are the prompt's control tokens, and none of them stands in a user text."""
        if not all(self._control_ids.isdisjoint(prompt.ids[a:b]) for a, b in prompt.spans.values()):
            return False
        return [token for token in prompt.others() if token in self._control_ids] == control_tokens

    def _whole(self, segments: Sequence[Segment]) -> Prompt:
        """All texts as one; a token that a user text shares with the template counts to the user text."""
        text = "".join(text for _, text in segments)
        behind = [name for name, _ in segments].index("document") + 1
        tokens = self._texts.encode(text, sum(len(text) for _, text in segments[:behind]))
        ids, every = tokens.ids, range(len(tokens.ids))
        spans: dict[str, tuple[int, int]] = {}
        end = place = 0
        for name, text in segments:
            start, place = place, place + len(text)
            if name is not None:
                # the first token that ends behind the text's beginning, which the text before may share
                first = max(end, bisect_right(every, start, key=lambda token: tokens.span(token)[1]))
                # the first that begins at the text's end or later
                end = max(first, bisect_left(every, place, key=lambda token: tokens.span(token)[0]))
                # the template's own, which may swallow white space beside them
                if first < end and ids[first] in self._control_ids and tokens.span(first)[0] < start:
                    first += 1
                if first < end and ids[end - 1] in self._control_ids:
                    end -= tokens.span(end - 1)[1] > place
                spans[name] = first, end
        return Prompt(ids, spans)

    def _spells_any(self, segments: Sequence[Segment]) -> bool:
        """Whether a user text spells a special token."""
        return any(self._spells(text) for name, text in segments if name)

    def _spells(self, text: str) -> bool:
        return any(content in text for content in self._unspelled)

    def user(self, text: str, leading: bool) -> list[int]:
        """Tokens of user text alone, encoded in pieces where it would become a control token."""
        if not self._spells(text):
            ids, *_ = self._encode(text, leading, self._parsing)
            if self._control_ids.isdisjoint(ids):
                return ids
        ids, encoding, anchor = self._encode(text, leading, self._plain)
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
        encoding = encoded(self._parsing, text)
        if self._spells(text) or not self._control_ids.isdisjoint(encoding.ids):
            encoding = encoded(self._plain, text)
        offsets = encoding.offsets
        starts_T = np.fromiter((start for start, _ in offsets), np.int64, len(offsets))
        starts_T[:1] = 0  # whatever a normaliser took away in front
        return np.maximum.accumulate(starts_T)

    def _encode(self, text: str, leading: bool, backend: Tokenizer) -> tuple[list[int], Encoding, str]:
        """Token ids, with a space in front only if they begin the prompt; their encoding; its anchor."""
        for anchor, anchor_ids in ({"": []} if leading else self._anchors).items():
            encoding = encoded(backend, anchor + text)
            ids, skip = encoding.ids, len(anchor_ids)
            if ids[:skip] == anchor_ids:
                return ids[skip:], encoding, anchor
        raise RowError("bad_text", "the tokenizer does not split the text from the one before it")
