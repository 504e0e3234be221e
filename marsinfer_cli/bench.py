"""`marsinfer bench`: how fast the methods are, measured beside transformers in the same run."""

from __future__ import annotations

import json
import platform
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marsinfer_cli import options

if TYPE_CHECKING:
    from pipeline.bench.ttft import Measurement
    from pipeline.model.loading import LoadedModel
    from pipeline.pruning.base import PruningMethod
    from pipeline.records import EncodedDocument

bench_app = typer.Typer(help="Measure speed.")


@bench_app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Measure speed."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@bench_app.command()
def ttft(
    methods: Annotated[
        str, typer.Option(help="Comma-separated, with settings as marsinfer:eta=0.9:start_layer=8.")
    ] = "dense,marsinfer",
    baselines: Annotated[
        str, typer.Option(help="Comma-separated: transformers, transformers-cudnn; none leaves them out.")
    ] = "transformers",
    lengths: Annotated[
        str | None, typer.Option(help="Prompt lengths, e.g. 8k,32k; a real document is cut in its middle.")
    ] = None,
    model: options.Model = "smollm2-135m",
    random_weights: Annotated[
        str | None, typer.Option(help="Random weights instead: qwen2-7b, llama-3.1-8b, qwen2.5-1.5b.")
    ] = None,
    input: Annotated[str | None, typer.Option(help="File with a real document; else random tokens.")] = None,
    row: Annotated[int, typer.Option(min=0, help="Row of the file, from 0.")] = 0,
    text_column: Annotated[str, typer.Option(help="Column of the document.")] = "text",
    question: Annotated[
        str, typer.Option(help="Question asked of the document.")
    ] = "Summarise this document.",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    repeats: Annotated[
        int, typer.Option(min=1, help="Timed runs of each variant, after one to warm up.")
    ] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time to first token of one prompt: median and spread, operations, memory."""
    from pipeline.bench.ttft import measure_ttft, random_loaded_model
    from pipeline.config import parse_count
    from pipeline.model.loading import load_model

    chosen = [_method(spec) for spec in methods.split(",")]
    wanted = [parse_count("--lengths", text) for text in lengths.split(",")] if lengths else [None]
    stock = [] if baselines == "none" else baselines.split(",")
    if random_weights:
        loaded = random_loaded_model(random_weights, dtype=dtype, device=device, attention=attention)
    else:
        loaded = load_model(model, dtype=dtype, device=device, attention=attention)
    results = []
    for length in wanted:
        document = (
            _real_document(loaded, input, row, text_column, question, length)
            if input and loaded.tokenizer
            else _random_document(loaded, length or 8192)
        )
        results += measure_ttft(loaded, document, chosen, baselines=stock, repeats=repeats)
    if as_json:
        print(json.dumps({**_conditions(loaded), "results": [result.as_dict() for result in results]}))
    else:
        _print_table(_conditions(loaded), results)


def _method(spec: str) -> tuple[str, PruningMethod]:
    from pipeline.config import parse_settings
    from pipeline.pruning.registry import make_method

    name, *settings = spec.strip().split(":")
    return spec.strip(), make_method(name, parse_settings(settings))


def _random_document(model: LoadedModel, length: int) -> EncodedDocument:
    import numpy as np

    from pipeline.records import EncodedDocument, Row, Spans

    ids = np.random.default_rng(0).integers(0, model.adapter.shape.vocab, length)
    spans = Spans(document=(0, length), question=(length, length))
    return EncodedDocument(source=Row(row=0, id="random", place="random"), input_ids=ids, spans=spans)


def _real_document(
    model: LoadedModel, path: str, row: int, text_column: str, question: str, length: int | None
) -> EncodedDocument:
    from itertools import islice

    from pipeline.errors import InputError, RowError
    from pipeline.io import Columns, open_source
    from pipeline.prompts import PromptBuilder
    from pipeline.records import RowFailure

    source = open_source([path], Columns(text=text_column, fixed_question=question))
    document = next(islice(source, row, None), None)
    if document is None:
        raise InputError(f"{path} has no row {row}")
    if isinstance(document, RowFailure):
        raise InputError(document.message)
    context = model.adapter.shape.context
    prompts = PromptBuilder(
        model.tokenizer,
        context=min(length or context, context),
        max_new_tokens=0,
        on_overlong="truncate-middle" if length else "error",
    )
    try:
        return prompts.encode(document)
    except RowError as error:
        raise InputError(f"{document.source.place}: {error}") from error


def _conditions(model: LoadedModel) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "model": model.name,
        "device": model.device_name() if model.device.type == "cuda" else f"CPU ({platform.machine()})",
        "dtype": str(model.adapter.dtype).removeprefix("torch."),
        "attention": model.attention.name,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def _print_table(conditions: dict[str, Any], results: list[Measurement]) -> None:
    """A Markdown table: readable as it is, and ready to be kept."""
    from pipeline.bench.ttft import saving_reached

    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    print()
    header = (
        "tokens",
        "variant",
        "TTFT ms",
        "fastest-slowest",
        "speed-up",
        "FFN tokens",
        "operations",
        "of predicted saving",
        "TFLOP/s",
        "peak GB",
        "K/V GB",
    )
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    dense = {result.tokens: result for result in results if result.variant == "dense"}
    for result in results:
        base = dense.get(result.tokens)
        cells = (
            f"{result.tokens:,}",
            result.variant,
            f"{result.ttft_ms:,.1f}",
            f"{result.fastest_ms:,.1f}-{result.slowest_ms:,.1f}",
            f"{base.ttft_ms / result.ttft_ms:.3f}" if base else "-",
            _share(result.ffn_ratio),
            _share(result.flops_ratio),
            _share(saving_reached(result, base) if base else None),
            f"{result.tflops_per_second:,.2f}" if result.tflops_per_second else "-",
            f"{result.peak_bytes / 1e9:.2f}" if result.peak_bytes else "-",
            f"{result.kv_bytes / 1e9:.3f}" if result.kv_bytes else "-",
        )
        print("| " + " | ".join(cells) + " |")
    for result in results:
        if result.ffn_share_by_layer and result.ffn_ratio != 1:
            shares = " ".join(f"{share:.0%}" for share in result.ffn_share_by_layer)
            print(f"\n{result.variant}, {result.tokens:,} tokens: FFN tokens by layer: {shares}")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
