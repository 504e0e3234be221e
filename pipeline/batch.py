"""From files of documents to a file of answers: how the pieces fit together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.config import BatchConfig, parse_max_errors
from pipeline.errors import TooManyErrors
from pipeline.intake import Item, encode_rows, item_tokens, make_prompts, new_rows, open_rows
from pipeline.io import Source
from pipeline.io.journal import Journal
from pipeline.io.lock import OutputLock
from pipeline.io.rowindex import Order
from pipeline.io.writing import check_output, output_schema
from pipeline.packing import windows
from pipeline.prefetch import ahead
from pipeline.provenance import deciding_settings, describe_run
from pipeline.pruning.registry import make_method
from pipeline.records import Answer, EncodedDocument, RowFailure
from pipeline.selection import most_rows, select_rows, selected_rows
from pipeline.summary import Summary

if TYPE_CHECKING:
    from pipeline.engines.local import LocalEngine
    from pipeline.model.loading import LoadedModel
    from pipeline.pruning.base import PruningMethod

READ_AHEAD = 64  # rows tokenized while the device works
FEWEST_FOR_PER_CENT = 20  # finished rows before a share of errors means anything

Progress = Callable[[Summary], None]
Note = Callable[[str], None]


def _nothing(*_: Any) -> None:
    pass


def run_batch(
    input: str | Sequence[str],
    output: str,
    *,
    model: str | LoadedModel = "smollm2-135m",
    method: str | PruningMethod = "marsinfer",
    progress: Progress = _nothing,
    note: Note = _nothing,
    check: Callable[[], None] = _nothing,
    **options: Any,
) -> Summary:
    """Answer every document of `input` and write `output`; what `marsinfer batch` runs.

    `options` are the fields of `BatchConfig`, which are the command's flags. `model` may be a model that
    `load_model` returned, `method` a method object. `progress` is called after every pack with the running
    summary, `note` with what a user should know, `check` between layers: it may raise to end the run. A row
    that cannot be answered becomes an error row. After a MarsError the finished rows are in the journal, from
    which `resume=True` goes on.
    """
    options["model"] = model if isinstance(model, str) else model.name
    if isinstance(method, str):
        options["method"] = method
    else:
        options["method"] = f"{type(method).__module__}:{type(method).__qualname__}"
        options["settings"] = asdict(method)
    inputs = (input,) if isinstance(input, str) else tuple(map(str, input))
    config = BatchConfig(input=inputs, output=str(output), **options)
    chosen = make_method(config.method, config.settings) if isinstance(method, str) else method
    check_output(config.output, (), config.overwrite or config.resume)
    with OutputLock(Path(config.output)):
        source = open_input(config)
        for text in source.notes:
            note(text)
        loaded = _load(config) if isinstance(model, str) else model
        return answer_all(config, source, loaded, chosen, progress=progress, note=note, check=check)


def open_input(config: BatchConfig) -> Source:
    """The rows of a run, its output checked against the files that they come from."""
    source = open_rows(config)
    check_output(config.output, source.files, config.overwrite or config.resume)
    return source


def answer_all(
    config: BatchConfig,
    source: Source,
    model: LoadedModel,
    method: PruningMethod,
    *,
    progress: Progress,
    note: Note,
    check: Callable[[], None],
) -> Summary:
    """Run every new row of `source` through the model, into the journal, and publish the output."""
    prompts = make_prompts(config, model.tokenizer, model.adapter.shape.context)
    engine = make_engine(config, model, method, check)
    decides = deciding_settings(config, model, method, prompts)
    metadata = json.dumps(describe_run(config, model, decides))
    schema = output_schema(source.schema, {"marsinfer": metadata})
    summary = Summary(method=method.name, output=config.output)
    with Journal.open(
        Path(config.output),
        schema,
        decides,
        resume=config.resume,
        retry_errors=config.retry_errors,
        overwrite=config.overwrite,
    ) as journal:
        if journal.resumed:
            note(f"resuming: {journal.done_at_start.total():,} rows are done")
        total_rows = selected_rows(config, source.total_rows)
        records = new_rows(select_rows(source, config, source.total_rows), journal)
        with closing(ahead(encode_rows(records, prompts, config.on_overlong), READ_AHEAD)) as rows:
            for window in windows(rows, item_tokens):
                if not summary.documents:
                    engine.warm_up()
                summary.expect(len(window), total_rows, source.fraction_read, most_rows(config))
                for answers in answer_window(engine, window):
                    journal.append(answers)
                    summary.add(answers)
                    progress(summary)
                    stop_if_broken(config, summary)
                    check()
        if journal.resumed and not summary.documents:
            note("nothing new: every row was done")
        journal.publish(cast(Order, config.order))
    summary.finish()
    return summary


def stop_if_broken(config: BatchConfig, summary: Summary) -> None:
    """Raise TooManyErrors when more rows have failed than `--max-errors` allows."""
    if config.max_errors is None:
        return
    bound, per_cent = parse_max_errors(config.max_errors)
    failed, finished = summary.status["error"], summary.documents
    if per_cent and (finished < FEWEST_FOR_PER_CENT or failed <= bound / 100 * finished):
        return
    if not per_cent and failed <= bound:
        return
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in summary.errors.most_common(3))
    raise TooManyErrors(
        f"{failed:,} of {finished:,} rows failed ({kinds}), more than --max-errors {config.max_errors} allows"
        "; finished rows are kept: mend the cause, then --resume --retry-errors"
    )


def answer_window(engine: LocalEngine, window: Sequence[Item]) -> Iterator[list[Answer]]:
    """Answers of one window's rows, pack by pack; failures last, lest their share look too large."""
    for pack in engine.packs([item for item in window if isinstance(item, EncodedDocument)]):
        yield engine.answer(pack)
    failures = [item for item in window if isinstance(item, RowFailure)]
    if failures:
        yield [Answer.from_failure(failure, engine.method.name) for failure in failures]


def make_engine(
    config: BatchConfig, model: LoadedModel, method: PruningMethod, check: Callable[[], None]
) -> LocalEngine:
    from pipeline.engines.local import LocalEngine
    from pipeline.model.decode import StopRules
    from pipeline.model.sampling import Sampling
    from pipeline.tokenizing import stop_token_ids

    rules = StopRules(
        max_new_tokens=config.max_new_tokens,
        token_ids=stop_token_ids(model.tokenizer, model.generation_config),
        texts=config.stop,
        decode_text=partial(model.tokenizer.decode, skip_special_tokens=True),
    )
    sampling = Sampling(temperature=config.temperature, top_p=config.top_p, seed=config.seed)
    return LocalEngine(
        model,
        method,
        rules=rules,
        sampling=sampling,
        pack_tokens=config.pack_tokens,
        row_timeout=config.row_timeout,
        check=check,
    )


def _load(config: BatchConfig) -> LoadedModel:
    from pipeline.model.loading import load_model

    return load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        attention=config.attention,
    )
