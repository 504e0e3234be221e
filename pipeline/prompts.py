"""Prompts: which tokens are instruction, document and question, and what becomes of one that is too long.

A template is rendered once with a sentinel in the place of each user text and cut there. Its own pieces are
tokenized with control tokens parsed, user text without: a document that says `<|im_end|>` ends no turn.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING

from jinja2 import StrictUndefined, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment as Environment

from pipeline.errors import ConfigError, ModelError, RowError
from pipeline.records import Document, EncodedDocument
from pipeline.tokenizing import RENDER_ERRORS, SENTINELS, Codec, Layout, bos_ids, chat_source

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast


class OverLong(RowError):
    """The prompt exceeds the context: kind `over_long`, with the lengths in tokens."""

    def __init__(self, message: str, *, document_tokens: int, prompt_tokens: int, excess_tokens: int) -> None:
        super().__init__("over_long", message)
        self.document_tokens = document_tokens
        self.prompt_tokens = prompt_tokens
        self.excess_tokens = excess_tokens


@dataclass(frozen=True, eq=False)
class PromptBuilder:
    """Turns documents into prompts; `encode` may be called from any thread.

    `context` and `max_new_tokens` are tokens. `template` is the text of a Jinja prompt template over
    `document`, `question` and `system`, the latter two empty where there is none; without it the tokenizer's
    chat template is used, with the Jinja text `body` over the same names as the user's message, or else with
    the document and then the question. Raises `ConfigError` for settings that cannot work, `ModelError` for
    a tokenizer or chat template that cannot.
    """

    tokenizer: PreTrainedTokenizerFast
    _: KW_ONLY
    context: int
    max_new_tokens: int
    system: str | None = None
    template: str | None = None
    body: str | None = None
    on_overlong: str = "error"  # or skip, split, truncate-left, truncate-right, truncate-middle
    _source: str = field(init=False, repr=False)
    _codec: Codec = field(init=False, repr=False)
    _layouts: dict[bool, Layout] = field(init=False, repr=False)  # by: has a question
    # the document encoded last, as rows about one often follow each other
    _latest: list[tuple[str, bool, list[int]]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ConfigError(
                f"{self.max_new_tokens:,} new tokens leave no room in the context of {self.context:,} tokens"
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise ModelError(f"the tokenizer {type(self.tokenizer).__name__} has no fast version")
        chat = chat_source(self.tokenizer)
        if self.template is None and not chat:
            raise ModelError("the model has no chat template; give --prompt-template FILE")
        rendered = {asks: self._render(asks) for asks in (False, True)}
        bos = bos_ids(self.tokenizer, rendered[False]) if self.template is not None else []
        codec = Codec(self.tokenizer, [self.template or "", chat, *rendered.values()])
        try:
            layouts = {asks: codec.layout(text, self.system or "", bos) for asks, text in rendered.items()}
        except RowError as error:
            raise ConfigError(f"system message or prompt template: {error}") from error
        source = (f"{chat}\0{self.body}" if self.body else chat) if self.template is None else self.template
        for name, value in (("_source", source), ("_codec", codec), ("_layouts", layouts)):
            object.__setattr__(self, name, value)

    @property
    def limit(self) -> int:
        """The longest prompt, in tokens."""
        return self.context - self.max_new_tokens

    @property
    def uses_question(self) -> bool:
        """Whether the template has a place for a question."""
        return "question" in self._layouts[True].parts

    @property
    def template_hash(self) -> str:
        """SHA-256, in hex, of the template's text and the system prompt."""
        return hashlib.sha256(f"{self._source}\0{self.system or ''}".encode(errors="replace")).hexdigest()

    def encode(self, document: Document) -> EncodedDocument:
        """The prompt of one row, its document cut where the policy says so.

        A row without a question gets an empty span behind the document. A cut falls between tokens, so it can
        split a character of several bytes. Raises `RowError` of the kind `empty_document`, `bad_text` or
        `over_long` (an `OverLong`, for `error` as for `skip` and `split`), and `ConfigError` for a question
        that the template has no place for.
        """
        began = time.perf_counter()
        if document.question and not self.uses_question:
            raise ConfigError(
                f"{document.source.place} has a question, but the prompt template has no place for it:"
                " write {{ question }} there"
            )
        layout = self._layouts[bool(document.question)]
        ids = {
            "document": self._document_ids(document.text, layout.leading == "document"),
            "question": self._codec.user(document.question or "", layout.leading == "question"),
        }
        length = len(ids["document"])
        if not length:
            raise RowError("empty_document", "the document is empty")
        ids["document"] = self._fit(ids["document"], layout.fixed_tokens + len(ids["question"]))
        input_ids, spans = layout.fill(ids)
        ready_at = time.perf_counter()
        return EncodedDocument(
            source=document.source,
            input_ids=input_ids,
            spans=spans,
            truncated_tokens=length - len(ids["document"]),
            tokenize_ms=(ready_at - began) * 1e3,
            ready_at=ready_at,
        )

    def room(self, question: str | None) -> int:
        """Tokens that a document may have beside this question; without any room less than 1."""
        layout = self._layouts[bool(question)]
        return (
            self.limit
            - layout.fixed_tokens
            - len(self._codec.user(question or "", layout.leading == "question"))
        )

    def token_starts(self, text: str) -> np.ndarray:
        """(T,) the character of a document's text at which each token begins; see `Codec.starts`."""
        return self._codec.starts(text)

    def _document_ids(self, text: str, leading: bool) -> list[int]:
        """A document's tokens, which the caller does not change."""
        for known, led, ids in self._latest:  # of which another thread may have made another one
            if known == text and led == leading:
                return ids
        ids = self._codec.user(text, leading)
        self._latest[:] = [(text, leading, ids)]
        return ids

    def _fit(self, ids: list[int], other_tokens: int) -> list[int]:
        """The document's tokens that stay beside `other_tokens` of instruction and question."""
        keep = self.limit - other_tokens
        if len(ids) <= keep:
            return ids
        if keep < 1 or not self.on_overlong.startswith("truncate"):
            message = self._too_long(len(ids), other_tokens)
            raise OverLong(
                message,
                document_tokens=len(ids),
                prompt_tokens=len(ids) + other_tokens,
                excess_tokens=len(ids) - keep,
            )
        tail = {"truncate-left": keep, "truncate-right": 0, "truncate-middle": keep // 2}[self.on_overlong]
        return ids[: keep - tail] + ids[len(ids) - tail :]

    def _too_long(self, document_tokens: int, other_tokens: int) -> str:
        limit = f"{self.limit:,} (context {self.context:,} less {self.max_new_tokens:,} for the answer)"
        if other_tokens >= self.limit:
            return (
                f"instruction and question alone have {other_tokens:,} tokens, no room for the document"
                f" under the limit of {limit}; shorten them or lower --max-new-tokens"
            )
        total = document_tokens + other_tokens
        return (
            f"the prompt has {total:,} tokens, {total - self.limit:,} more than the limit of {limit};"
            " --on-overlong split answers it in parts, truncate-middle cuts it, skip leaves the row out"
        )

    def _render(self, asks: bool) -> str:
        """The template with a sentinel for each user text, each of which must come out once."""
        given = {"document": True, "question": asks, "system": bool(self.system)}
        fields = {name: SENTINELS[name] if present else "" for name, present in given.items()}
        chat = self.template is None
        body, template = self.body, self.template or ""
        text = _render_chat(self.tokenizer, fields, body) if chat else _render_file(template, fields)
        kind = ModelError if chat else ConfigError
        what = "model's chat template" if chat else "prompt template"
        for name, sentinel in fields.items():
            count = text.count(sentinel) if sentinel else 1
            if count != 1 and (chat or name != "question" or count > 1):
                raise kind(f"the {what} must write the {name} once and unchanged, but does so {count} times")
        return text


def _render_chat(tokenizer: PreTrainedTokenizerFast, fields: dict[str, str], body: str | None) -> str:
    if body is None:
        user = "\n\n".join(text for text in (fields["document"], fields["question"]) if text)
    else:
        user = _render_file(body, fields | {"system": ""})
    messages = [{"role": "user", "content": user}]
    if fields["system"]:
        messages.insert(0, {"role": "system", "content": fields["system"]})
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except RENDER_ERRORS as error:
        if fields["system"]:
            _render_chat(
                tokenizer, fields | {"system": ""}, body
            )  # fails if the system message is not at fault
            raise ConfigError(f"this model's chat template takes no system message: {error}") from error
        raise ModelError(f"the model's chat template fails: {error}; give --prompt-template FILE") from error
    if fields["system"] not in text:
        raise ConfigError("this model's chat template takes no system message: it leaves it out")
    return text


def _render_file(template: str, fields: dict[str, str]) -> str:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    try:
        _check_names(environment.parse(template), {*environment.globals, *fields})
        return environment.from_string(template).render(fields)
    except TemplateSyntaxError as error:
        raise ConfigError(f"prompt template line {error.lineno}: {error.message}") from error
    except RENDER_ERRORS as error:
        raise ConfigError(f"prompt template: {error}") from error


def _check_names(tree: nodes.Template, known: set[str]) -> None:
    """Refuse names that do not exist, and expressions on user text, which would see its sentinel."""
    unknown = meta.find_undeclared_variables(tree) - known
    for name in tree.find_all(nodes.Name):
        if name.name in unknown:
            where = f"prompt template line {name.lineno}"
            raise ConfigError(f"{where}: {name.name!r} is undefined; use document, question or system")
    inside = [part.find_all(nodes.Name) for output in tree.find_all(nodes.Output) for part in output.nodes]
    for name in (name for names in inside for name in names if name.name in SENTINELS):
        where = f"prompt template line {name.lineno}"
        raise ConfigError(f"{where}: write {{{{ {name.name} }}}} alone, without filter or expression")
