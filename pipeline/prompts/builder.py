"""Prompts: which tokens are instruction, document and question, and what becomes of one that is too long."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ConfigError, ModelError
from pipeline.prompts.chat import ChatTemplate, chat_source, no_template
from pipeline.prompts.forms import Form, Template
from pipeline.prompts.templates import ROW, FileTemplate, without_template
from pipeline.prompts.tokenizing import Codec, Prompt, PromptLayout, bos_ids, stop_token_ids
from pipeline.records import (
    CLOSES,
    OPENS,
    WHOLE,
    Document,
    EncodedDocument,
    Reasoning,
    Row,
    RowError,
    Spans,
    Turn,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SWITCH = "enable_thinking"  # what chat templates call it, of models that may reason or not
MOST_CONVERSATIONS = 64  # forms of messages that are held
OWN = (None, "document", "system")  # names of a prompt's texts that are no other text of the row


@dataclass(eq=False)
class PromptBuilder:
    """Turns documents into prompts; `encode` may be called from any thread.

    `context` and `max_new_tokens` are tokens. `template` is the text of a Jinja prompt template over
    `document`, `question` and `system`, the latter two empty where there is none, and columns of `row`, which
    are the fields of the document's source; without it the tokenizer's chat template is used, with the Jinja
    text `body` over the same names as the user's message, or else with the document and then the question.
    `template_args` are arguments of the chat template. `vocab` is of how many tokens the model knows the
    meaning, and `now` the moment whose date a template prints, else the present. Without `parts_reasoning`
    all that a model writes is its answer. Raises `ConfigError` for settings that cannot work, and
    `ModelError` for a tokenizer or chat template that cannot.
    """

    tokenizer: PreTrainedTokenizerFast
    _: KW_ONLY
    context: int
    max_new_tokens: int
    system: str | None = None
    template: str | None = None
    body: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    on_overlong: str = "error"  # or skip, split, truncate-left, truncate-right, truncate-middle
    vocab: int | None = None
    now: datetime = field(default_factory=datetime.now)
    parts_reasoning: bool = True

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ConfigError(
                f"{self.max_new_tokens:,} new tokens leave no room in the context of {self.context:,} tokens"
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise ModelError(f"the tokenizer {type(self.tokenizer).__name__} has no fast version")
        body = None if self.body is None else FileTemplate(self.body)
        self._template: Template = (
            ChatTemplate.of(self.tokenizer, body, self.now, self.template_args)
            if self.template is None
            else FileTemplate(self.template)
        )
        chat = chat_source(self.tokenizer)
        self._turns: tuple[Turn, ...] = ()  # of the messages that these prompts are made around
        self._conversations: dict[tuple[Turn, ...], PromptBuilder] = {}
        self._parses_texts = False
        unasked = frozenset(f"{ROW}{name}" for name in self._template.columns)
        self._asked = unasked | {"question"}
        # by the names of the user texts that are given
        self._forms = {
            given: Form.of(self._template, given=given, system=self.system or "")
            for given in (unasked, self._asked)
        }
        rendered = ["".join(text for _, text in form.segments) for form in self._forms.values()]
        self._bos = [] if self.template is None else bos_ids(self.tokenizer, rendered[0])
        self._codec = Codec(self.tokenizer, [self.template or "", chat, *rendered])
        try:
            self._layouts = {given: self._layout(form) for given, form in self._forms.items()}
        except RowError as error:
            raise ConfigError(f"system message or prompt template: {error}") from error
        texts = f"{self.template or ''}{chat}"
        self._knows_reasoning = CLOSES in texts or CLOSES in self.tokenizer.get_added_vocab()
        self._vocabulary = Vocabulary(self.tokenizer, self.vocab)
        self._vocabulary.check_template(self._template, self._layouts.values())
        self._source = self.template or (f"{chat}\0{self.body}" if self.body else chat)

    @property
    def limit(self) -> int:
        """The longest prompt, in tokens, of a row that says nothing of its answer's length."""
        return self.context - self.max_new_tokens

    def _limit_of(self, row: Row) -> int:
        """The longest prompt of a row, which may leave more or less for its answer; below 1 without any."""
        own = row.params.max_new_tokens
        return self.limit if own is None else self.context - own

    @property
    def uses_question(self) -> bool:
        """Whether the template has a place for a question."""
        return "question" in self._layouts[self._asked].parts

    @property
    def reasoning(self) -> Reasoning | None:
        """What a prompt says of reasoning: one with a question, where there is a place for it."""
        return self._reasoning_of(self._forms[self._asked])

    @property
    def is_to_reason(self) -> bool:
        """Whether the model will reason before it answers, as far as its chat template tells."""
        return self.reasoning is Reasoning.BEGUN or (
            self.reasoning is Reasoning.POSSIBLE and self._has_switch
        )

    @property
    def without_reasoning(self) -> str | None:
        """The flag that has the model answer at once; None where there is none."""
        return f"--template-arg {SWITCH}=false" if self._has_switch else None

    @property
    def _has_switch(self) -> bool:
        """Whether the chat template is one that turns reasoning on and off."""
        return isinstance(self._template, ChatTemplate) and SWITCH in self._template.source

    @property
    def moment(self) -> str | None:
        """The date that the chat template prints, if it prints one; see `ChatTemplate.moment`."""
        return self._template.moment if isinstance(self._template, ChatTemplate) else None

    @property
    def template_hash(self) -> str:
        """SHA-256, in hex, of the template's text and the system prompt."""
        return hashlib.sha256(f"{self._source}\0{self.system or ''}".encode(errors="replace")).hexdigest()

    def encode(self, document: Document) -> EncodedDocument:
        """The prompt of one row, its document cut where the policy says so.

        A row without a question gets an empty span behind the document. A cut falls between tokens, so it can
        split a character of several bytes. Raises `RowError` of the kind `empty_document`, `bad_text`,
        `template` or `over_long` (for `error` as for `skip` and `split`, with the lengths in tokens), and
        `ConfigError` for a question that the template has no place for, and for a column that rows of this
        kind do not have.
        """
        if document.source.turns and document.source.turns != self._turns:
            return self._around(document.source.turns).encode(document)
        began = time.perf_counter()
        if document.question and not self.uses_question:
            raise ConfigError(
                f"{document.source.place} has a question, but the prompt template has no place for it:"
                " write {{ question }} there"
            )
        prompt, form = self._prompt(document)
        self._vocabulary.check_text(prompt.ids)
        start, end = prompt.spans["document"]
        if start == end:
            raise RowError("empty_document", "the document is empty")
        limit = self._limit_of(document.source)
        kept = self._fit(prompt.ids[start:end], len(prompt.ids) - (end - start), limit)
        prompt.cut_document(kept)
        behind = prompt.spans["document"][1]
        ready_at = time.perf_counter()
        return EncodedDocument(
            source=document.source,
            input_ids=np.array(prompt.ids, dtype=np.int64),
            spans=Spans(
                document=prompt.spans["document"], question=prompt.spans.get("question", (behind, behind))
            ),
            truncated_tokens=end - start - len(kept),
            tokenize_ms=(ready_at - began) * 1e3,
            ready_at=ready_at,
            reasoning=self._reasoning_of(form),
        )

    def _reasoning_of(self, form: Form) -> Reasoning | None:
        """What the end of a prompt says of reasoning; and where it says nothing, the model's other texts."""
        if not self.parts_reasoning:
            return None
        name, text = form.segments[-1]
        end = "" if name else text.rstrip()
        if end.endswith(OPENS):
            return Reasoning.BEGUN
        known = self._knows_reasoning and not end.endswith(CLOSES)
        return Reasoning.POSSIBLE if known else Reasoning.UNEXPECTED

    def _around(self, turns: tuple[Turn, ...]) -> PromptBuilder:
        """The prompts of rows with such messages, or with whole prompts.

        Raises `RowError` of the kind `template` where the chat template does not take them as they are.
        """
        known = self._conversations
        made = known.get(turns)
        if made is None:
            made = copy(self)
            made._turns = turns
            if turns[0].role == WHOLE:
                made._take_whole_prompts(turns[0])
            else:
                made._template = self._chat().around(turns)
            asks = any("question" in turn.texts for turn in turns)
            made._asked = frozenset(f"{ROW}{name}" for name in made._template.columns)
            made._asked |= {"question"} if asks else set()
            try:
                form = Form.of(made._template, given=made._asked, system=self.system or "")
            except (ConfigError, ModelError) as error:
                raise RowError("template", str(error)) from error
            made._forms = {made._asked: form}
            made._layouts = {made._asked: made._layout(form)}
            if len(known) >= MOST_CONVERSATIONS:
                known.clear()
            known[turns] = made
        return made

    def _chat(self) -> ChatTemplate:
        if isinstance(self._template, ChatTemplate):
            return self._template
        if not chat_source(self.tokenizer):
            raise no_template(self.tokenizer)
        raise ConfigError("messages need the model's chat template, not a template of your own")

    def _take_whole_prompts(self, turn: Turn) -> None:
        """Become the prompts of rows that say all of them, control tokens too; no answer has reasoning."""
        if self.system:
            raise RowError("template", "a whole prompt has no place for the text of --system")
        self._template, self.parts_reasoning = without_template(turn), False
        self._bos = bos_ids(self.tokenizer, "")
        self._parses_texts = True

    def _prompt(self, document: Document) -> tuple[Prompt, Form]:
        """The prompt with the whole document, and what the template writes around it."""
        given = self._texts(document.text, document.source)
        form, layout = self._form(given)
        texts = form.trimmed(given)
        if not texts["document"]:
            what = "white space alone, which the template leaves out" if document.text else "empty"
            raise RowError("empty_document", f"the document is {what}")
        segments = form.filled(texts)
        form.check(given, "".join(text for _, text in segments))
        return self._codec.prompt(layout, segments), form

    def _texts(self, document: str, row: Row) -> dict[str, str]:
        """The user texts of a row's prompt by their names."""
        texts = {"document": document, "question": row.question or "", "system": self.system or ""}
        for name in self._template.columns:
            if name not in row.fields:
                raise ConfigError(f"{row.place} has no column {name!r}, which the prompt template writes")
            texts[f"{ROW}{name}"] = row.fields[name]
        return texts

    def _form(self, texts: Mapping[str, str]) -> tuple[Form, PromptLayout]:
        """What the template writes for such texts, by which of them are empty where that makes a difference.

        Raises `RowError` of the kind `template` where it writes a text otherwise than as it is.
        """
        always = {f"{ROW}{name}" for name in set(self._template.columns) - self._template.conditions}
        given = frozenset(
            name for name in self._asked if name in always or (name != "question" and texts[name])
        )
        given |= {"question"} if self._asks(texts["question"]) else set()
        if given not in self._layouts:
            try:
                form = Form.of(self._template, given=given, system=self.system or "")
            except (ConfigError, ModelError) as error:
                raise RowError("template", str(error)) from error
            self._forms[given] = form
            self._layouts[given] = self._layout(form)
        return self._forms[given], self._layouts[given]

    def _layout(self, form: Form) -> PromptLayout:
        return self._codec.layout(form.with_system(), self._bos, parses_texts=self._parses_texts)

    def _asks(self, question: str) -> bool:
        """Whether there is a question, be it of white space, unless the template would leave that out."""
        edges = self._forms[self._asked].edges.get("question")
        return bool(question) and (edges is None or bool(edges(question)))

    def room(self, row: Row) -> int:
        """About how many tokens a document may have in a row's prompt; without any room less than 1."""
        if row.turns and row.turns != self._turns:
            return self._around(row.turns).room(row)
        texts = self._texts("", row)
        form, layout = self._form(texts)
        others = [(name, text) for name, text in form.filled(form.trimmed(texts)) if name not in OWN]
        asked = sum(len(self._codec.user(text, layout.leading == name)) for name, text in others)
        return self._limit_of(row) - layout.fixed_tokens - asked

    def token_starts(self, text: str) -> np.ndarray:
        """(T,) the character of a document's text at which each token begins; see `Codec.starts`."""
        return self._codec.starts(text)

    def _fit(self, ids: list[int], other_tokens: int, limit: int) -> list[int]:
        """The document's tokens that stay beside `other_tokens` of instruction and question."""
        keep = limit - other_tokens
        if len(ids) <= keep:
            return ids
        if keep < 1 or not self.on_overlong.startswith("truncate"):
            message = self._too_long(len(ids), other_tokens, limit)
            raise RowError(
                "over_long",
                message,
                document_tokens=len(ids),
                prompt_tokens=len(ids) + other_tokens,
                excess_tokens=len(ids) - keep,
            )
        tail = {"truncate-left": keep, "truncate-right": 0, "truncate-middle": keep // 2}[self.on_overlong]
        return ids[: keep - tail] + ids[len(ids) - tail :]

    def _too_long(self, document_tokens: int, other_tokens: int, limit: int) -> str:
        answer, total = self.context - limit, document_tokens + other_tokens
        if limit < 1:
            return (
                f"{answer:,} new tokens leave no room for a prompt: the context has {self.context:,} tokens"
            )
        told = f"{limit:,} (context {self.context:,} less {answer:,} for the answer)"
        if other_tokens >= limit:
            return (
                f"instruction and question alone have {other_tokens:,} tokens, no room for the document"
                f" under the limit of {told}; shorten them or lower --max-new-tokens"
            )
        return (
            f"the prompt has {total:,} tokens, {total - limit:,} more than the limit of {told};"
            " --on-overlong split answers it in parts, truncate-middle cuts it, skip leaves the row out"
        )


class Vocabulary:
    """Of a tokenizer's tokens those that a model of `size` of them knows, by the rows of its embedding.

    All where `size` is None.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, size: int | None) -> None:
        self._tokenizer = tokenizer
        own = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
        count = max(own, *(token + 1 for token in tokenizer.added_tokens_decoder), 0)
        self._size = None if size is None or count <= size else size

    def check_template(self, template: Template, layouts: Iterable[PromptLayout]) -> None:
        """Raise `ModelError` where a prompt or the end of an answer would have a token beyond the model's."""
        if self._size is None:
            return
        fixed = [part for layout in layouts for part in layout.parts if not isinstance(part, str)]
        uses = {f"the {template.what} writes": [token for part in fixed for token in part]}
        uses["answers end with"] = sorted(stop_token_ids(self._tokenizer, None))
        for what, tokens in uses.items():
            if beyond := self._beyond(tokens):
                raise ModelError(f"{what} {beyond}; use the tokenizer that belongs to the model's weights")

    def check_text(self, ids: list[int]) -> None:
        """Raise `RowError`, of the kind `bad_text`, for a prompt with a token beyond the model's."""
        if beyond := self._beyond(ids):
            raise RowError("bad_text", f"the text has {beyond}; take it out of the text")

    def _beyond(self, ids: list[int]) -> str | None:
        """In words the first token that the model does not know; None where it knows all."""
        size = self._size
        if size is None or (token := next((token for token in ids if token >= size), None)) is None:
            return None
        name = self._tokenizer.convert_ids_to_tokens(token)
        return f"the token {name!r}, number {token:,}, and the model knows {size:,} tokens"
