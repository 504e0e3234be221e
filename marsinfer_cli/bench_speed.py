"""`marsinfer bench attention` and `bench batch`: attention alone, and a whole run."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from marsinfer_cli import options
from marsinfer_cli.bench_inputs import Repeats, parse_packs, parse_variant
from marsinfer_cli.options import MEASURED, READING
from marsinfer_cli.tables import conditions_of, print_attention_table, print_throughput_table, processor

PACKS = {"cuda": "8k;32k;128k;4x8k;16k+8k+5k+3k;16x2k", "cpu": "1k;2k;4x512;1k+512+320+192"}


def attention(
    shape: Annotated[
        str,
        typer.Option(
            help="Heads of a published shape: qwen2-7b, llama-3.1-8b, qwen2.5-1.5b.", rich_help_panel=MEASURED
        ),
    ] = "qwen2-7b",
    heads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Query heads, instead of the shape's.",
            show_default="the shape's",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Key/value heads, likewise.", show_default="the shape's", rich_help_panel=MEASURED
        ),
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option(
            min=1, help="Size of a head, likewise.", show_default="the shape's", rich_help_panel=MEASURED
        ),
    ] = None,
    packs: Annotated[
        str | None,
        typer.Option(
            help="Packs with ; or a space between them: 32k is one document, 4x8k are four, 16k+8k+5k three.",
            show_default=f"{PACKS['cuda']} on a GPU, {PACKS['cpu']} on the CPU",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    backends: Annotated[
        str,
        typer.Option(
            help="Comma-separated: fa3, flash, cudnn, varlen, sdpa, fa3-fp8; auto takes them all.",
            rich_help_panel=MEASURED,
        ),
    ] = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    repeats: Repeats = 5,
    as_json: options.AsJson = False,
) -> None:
    """TFLOP/s of causal attention by every backend that works here, for single documents and packs."""
    from importlib.metadata import version

    from pipeline.bench.attention import CANDIDATES, attention_shape, available, measure_attention
    from pipeline.model.loading import pick_device, pick_dtype, use_device

    sizes = attention_shape(shape, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    wanted = parse_packs(packs) if packs is not None else None
    target = use_device(pick_device(device))
    number = pick_dtype(dtype, target)
    names = list(CANDIDATES) if backends == "auto" else [name.strip() for name in backends.split(",")]
    candidates, refused = available(names, sizes, device=target, dtype=number)
    results = measure_attention(
        candidates,
        wanted or parse_packs(PACKS[target.type]),
        sizes,
        device=target,
        dtype=number,
        repeats=repeats,
    )
    conditions = {
        "heads": sizes.heads,
        "kv_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "device": _device_name(str(target)),
        "dtype": str(number).removeprefix("torch."),
        "torch": version("torch"),
    }
    if as_json:
        measured = [result.as_dict() for result in results]
        print(json.dumps({**conditions, "results": measured, "not_available": refused}))
    else:
        print_attention_table(conditions, results, refused)


def batch(
    input: Annotated[str, typer.Argument(metavar="INPUT", help="File, glob, folder or URL of documents.")],
    method: Annotated[
        str, typer.Option(help="Method, with settings as in bench ttft.", rich_help_panel=MEASURED)
    ] = "marsinfer",
    text_column: options.TextColumn = "text",
    question_column: options.QuestionColumn = None,
    question: Annotated[
        str | None,
        typer.Option(
            help="One question for all rows.",
            show_default="a summary, without --question-column",
            rich_help_panel=READING,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="First N rows.", show_default="all rows", rich_help_panel=READING
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer in tokens.", rich_help_panel=MEASURED)
    ] = 32,
    pack_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Prompt tokens prefilled together, e.g. 32k.",
            show_default="from free memory",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    model: options.Model = "smollm2-135m",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Documents and tokens a second of a whole run, its answers thrown away, and the GPU's idle share.

    On a GPU the run is made twice: for the throughput, and once more under the profiler, which slows it
    down, for the share of the time in which neither a kernel nor a copy ran.
    """
    from pipeline.bench.throughput import measure_throughput
    from pipeline.bench.variant import prepare
    from pipeline.config import parse_count
    from pipeline.errors import ConfigError
    from pipeline.model.loading import load_model

    if input == "-":
        raise ConfigError("bench batch reads its input more than once: give a file instead of -")
    chosen = parse_variant(method.strip(), None)
    settings = {
        "text_column": text_column,
        "question_column": question_column,
        "question": question or (None if question_column else "Summarise this document."),
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "pack_tokens": None if pack_tokens is None else parse_count("--pack-tokens", pack_tokens),
    }
    loaded = load_model(model, dtype=dtype, device=device, attention=attention)
    prepare(loaded, [chosen])
    result = measure_throughput(loaded, chosen, input, note=_note, **settings)
    conditions = {**conditions_of(loaded), "max_new_tokens": max_new_tokens}
    if as_json:
        print(json.dumps({**conditions, **result.as_dict()}))
    else:
        print_throughput_table(conditions, result)


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()


def _note(text: str) -> None:
    print(f"marsinfer: note: {text}", file=sys.stderr)
