"""The prompts of a run, as the model would see them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.prompts.splitting import SplitDocument
from pipeline.records import RowFailure
from pipeline.settings.run_settings import BatchConfig
from pipeline.setup.intake import item_prompts, open_rows
from pipeline.setup.preparation import prepare


def rendered_prompts(config: BatchConfig, count: int) -> Iterator[dict[str, Any]]:
    """The first `count` prompts as the model will see them, and the errors of rows before and between."""
    run = prepare(open_rows(config), config.model)
    for item in run.encode(run.rows()):
        if isinstance(item, RowFailure):
            yield {"row": item.source.row, "id": item.source.id, "error": item.message}
            continue
        prompts = item_prompts(item)
        for number, prompt in enumerate(prompts, start=1):
            ids = prompt.input_ids.tolist()
            yield {
                "row": item.source.row,
                "id": item.source.id,
                **({"part": number, "parts": len(prompts)} if isinstance(item, SplitDocument) else {}),
                "prompt_tokens": prompt.prompt_tokens,
                "document_tokens": prompt.document_tokens,
                "truncated_tokens": prompt.truncated_tokens,
                "prompt": run.model.tokenizer.decode(ids, clean_up_tokenization_spaces=False),
            }
            count -= 1
            if not count:
                return
