"""Tokens that the tokenizer has and the model has not: beyond the rows of its embedding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pipeline.errors import ModelError, RowError
from pipeline.prompts.tokenizing import PromptLayout, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pipeline.prompts.forms import Template


class Vocabulary:
    """Of a tokenizer the tokens that a model of `size` of them knows; all where `size` is None."""

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
            beyond = next((token for token in tokens if token >= self._size), None)
            if beyond is not None:
                raise ModelError(
                    f"{what} {self._told(beyond)}; use the tokenizer that belongs to the model's weights"
                )

    def check_text(self, ids: list[int]) -> None:
        """Raise `RowError`, of the kind `bad_text`, for a prompt with a token beyond the model's."""
        if self._size is None:
            return
        beyond = next((token for token in ids if token >= self._size), None)
        if beyond is not None:
            raise RowError("bad_text", f"the text has {self._told(beyond)}; take it out of the text")

    def _told(self, token: int) -> str:
        name = self._tokenizer.convert_ids_to_tokens(token)
        return f"the token {name!r}, number {token:,}, and the model knows {self._size or 0:,} tokens"
