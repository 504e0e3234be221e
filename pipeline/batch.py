"""From files of documents to a file of answers: how the pieces fit together."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pipeline.config import BatchConfig
from pipeline.errors import MarsError, RowError
from pipeline.io import Columns, Source, open_source, parse_keep_columns
from pipeline.io.writing import AnswerWriter, check_output, output_schema
from pipeline.packing import windows
from pipeline.prefetch import ahead
from pipeline.pruning.registry import make_method
from pipeline.records import Answer, Document, EncodedDocument, RowFailure
from pipeline.summary import Summary

if TYPE_CHECKING:
    from pipeline.engines.local import LocalEngine
    from pipeline.model.loading import LoadedModel
    from pipeline.prompts import PromptBuilder
    from pipeline.pruning.base import PruningMethod

READ_AHEAD = 64  # rows tokenized while the device works

Item = EncodedDocument | RowFailure
Progress = Callable[[Summary], None]


def run_batch(
    input: str | Sequence[str],
    output: str,
    *,
    model: str | LoadedModel = "smollm2-135m",
    method: str | PruningMethod = "marsinfer",
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    **options: Any,
) -> Summary:
    """Answer every document of `input` and write `output`; what `marsinfer batch` runs.

    `options` are the fields of `BatchConfig`, which are the command's flags. `model` may be a model that
    `load_model` returned, `method` a method object. `progress` is called after every pack with the running
    summary, `note` with what a user should know before the run. A row that cannot be answered becomes an
    error row; a MarsError means that nothing was written.
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
    source = open_input(config)
    if note is not None:
        for text in source.notes:
            note(text)
    loaded = _load(config) if isinstance(model, str) else model
    return answer_all(config, source, loaded, chosen, progress)


def open_input(config: BatchConfig) -> Source:
    """The rows of a run, its output checked before anything is read."""
    check_output(config.output, (), config.overwrite)
    columns = Columns(
        text=config.text_column,
        question=config.question_column,
        fixed_question=config.question,
        id=config.id_column,
        keep=parse_keep_columns(config.keep_columns) if config.keep_columns else None,
    )
    source = open_source(config.input, columns)
    check_output(config.output, source.files, config.overwrite)
    return source


def answer_all(
    config: BatchConfig, source: Source, model: LoadedModel, method: PruningMethod, progress: Progress | None
) -> Summary:
    """Run every row of `source` through the model and into the output."""
    prompts = make_prompts(config, model)
    engine = make_engine(config, model, method)
    engine.warm_up()
    metadata = describe_run(config, model, method, prompts)
    summary = Summary(method=method.name, output=config.output)
    schema = output_schema(source.schema, {"marsinfer": json.dumps(metadata)})
    rows = ahead(encode_rows(source, prompts, config.on_overlong), READ_AHEAD)
    with AnswerWriter(config.output, schema, overwrite=config.overwrite) as writer:
        for window in windows(rows, _tokens):
            summary.expect(len(window), source.total_rows, source.fraction_read)
            held: list[Answer] = []
            for answers in answer_window(engine, window):
                summary.add(answers)
                if config.order == "completion":
                    writer.write(answers)
                else:
                    held.extend(answers)
                if progress is not None:
                    progress(summary)
            writer.write(sorted(held, key=lambda answer: answer.row))
    summary.finish()
    return summary


def encode_rows(
    source: Iterable[Document | RowFailure], prompts: PromptBuilder, on_overlong: str
) -> Iterator[Item]:
    """Tokenize what was read; a row that cannot be encoded becomes a failure in its place."""
    for row in source:
        if isinstance(row, RowFailure):
            yield row
            continue
        try:
            yield prompts.encode(row)
        except RowError as error:
            skipped = error.kind == "over_long" and on_overlong == "skip"
            yield RowFailure(
                source=row.source,
                kind=error.kind,
                message=f"{row.source.place}: {error}",
                status="skipped" if skipped else "error",
                document_tokens=getattr(error, "document_tokens", None),
                prompt_tokens=getattr(error, "prompt_tokens", None),
            )
        except MarsError:
            raise
        except Exception as error:  # noqa: BLE001 - a tokenizer's fault costs its row, not the run
            message = f"{row.source.place}: {type(error).__name__}: {error}"
            yield RowFailure(source=row.source, kind="tokenizer", message=message)


def answer_window(engine: LocalEngine, window: Sequence[Item]) -> Iterator[list[Answer]]:
    """Answers of one window's rows, pack by pack; failures first."""
    failures = [item for item in window if isinstance(item, RowFailure)]
    if failures:
        yield [Answer.from_failure(failure, engine.method.name) for failure in failures]
    for pack in engine.packs([item for item in window if isinstance(item, EncodedDocument)]):
        yield engine.answer(pack)


def make_prompts(config: BatchConfig, model: LoadedModel) -> PromptBuilder:
    from pipeline.prompts import PromptBuilder

    return PromptBuilder(
        model.tokenizer,
        context=model.adapter.shape.context,
        max_new_tokens=config.max_new_tokens,
        system=config.system,
        template=config.template_text(),
        on_overlong=config.on_overlong,
    )


def make_engine(config: BatchConfig, model: LoadedModel, method: PruningMethod) -> LocalEngine:
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
    return LocalEngine(model, method, rules=rules, sampling=sampling, pack_tokens=config.pack_tokens)


def describe_run(
    config: BatchConfig, model: LoadedModel, method: PruningMethod, prompts: PromptBuilder
) -> dict[str, Any]:
    """What the output's metadata says of the run that made it."""
    packages = ("marsinfer", "torch", "transformers", "tokenizers", "pyarrow")
    return {
        "config": config.resolved(),
        "method": {"name": method.name, "settings": asdict(method)},
        "model": {"name": model.name, "fingerprint": model.fingerprint, "dtype": str(model.adapter.dtype)},
        "device": model.device_name(),
        "attention": {"backend": model.attention.name, "refused": model.attention_refused},
        "template_sha256": prompts.template_hash,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


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


def _tokens(item: Item) -> int:
    return item.prompt_tokens if isinstance(item, EncodedDocument) else 0
