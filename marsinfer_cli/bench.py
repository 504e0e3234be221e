"""`marsinfer bench`: how fast the methods are, measured beside transformers in the same run."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from marsinfer_cli import options
from marsinfer_cli.bench_accuracy import accuracy
from marsinfer_cli.bench_inputs import (
    Keep,
    RandomWeights,
    Repeats,
    load,
    parse_lengths,
    parse_shares,
    parse_variant,
    parse_variants,
    read_documents,
    read_references,
    real_documents,
)
from marsinfer_cli.bench_speed import attention as attention_alone
from marsinfer_cli.bench_speed import batch
from marsinfer_cli.examples import epilog
from marsinfer_cli.options import FILES, MEASURED, READING
from marsinfer_cli.tables import (
    conditions_of,
    print_agreement_table,
    print_decode_table,
    print_offload_table,
    print_ttft_table,
)

bench_app = typer.Typer(help="Measure speed.", epilog=epilog("bench ttft"))
bench_app.command("accuracy", epilog=epilog("bench accuracy"))(accuracy)
bench_app.command("attention", epilog=epilog("bench attention"))(attention_alone)
bench_app.command("batch", epilog=epilog("bench batch"))(batch)


@bench_app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Measure speed."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@bench_app.command(epilog=epilog("bench ttft"))
def ttft(
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated, with settings as marsinfer:eta=0.9:start_layer=8; the values of a list "
            "stand between slashes, as in sliminfer:budget=0.4/0.2/0.1; :fp8 and :mixed are --linear-dtype.",
            rich_help_panel=MEASURED,
        ),
    ] = "dense,marsinfer",
    keep: Keep = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: transformers, transformers-cudnn; none leaves them out.",
            show_default="transformers for one document, none for several",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    documents: Annotated[
        int,
        typer.Option(
            min=1,
            help="Documents that are prefilled together, each of the given length.",
            rich_help_panel=MEASURED,
        ),
    ] = 1,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Prompt lengths, e.g. 8k,32k; a real document is cut in its middle.",
            show_default="8k, or a real document's own",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    model: options.Model = "smollm2-135m",
    random_weights: RandomWeights = None,
    input: Annotated[
        str | None,
        typer.Option(
            help="File with a real document.", show_default="random tokens", rich_help_panel=READING
        ),
    ] = None,
    row: Annotated[
        int,
        typer.Option(min=0, help="Row of the file, from 0; of several, the first.", rich_help_panel=READING),
    ] = 0,
    text_column: options.TextColumn = "text",
    question: Annotated[
        str, typer.Option(help="Question asked of the document.", rich_help_panel=READING)
    ] = "Summarise this document.",
    new_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also time each method to the end of answers of so many tokens.",
            rich_help_panel=MEASURED,
        ),
    ] = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    repeats: Repeats = 5,
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Also draw the times: .png, .svg or .pdf.",
            show_default="none",
            rich_help_panel=FILES,
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Time to first token of a prompt, or of a pack of them: median and spread, operations, memory."""
    from pipeline.bench.ceilings import measure_ceilings
    from pipeline.bench.inputs import random_document
    from pipeline.bench.plot import check_plot, save_plot
    from pipeline.bench.ttft import check_baselines, measure_ttft

    if plot:
        check_plot(plot)
    chosen = parse_variants(methods, keep)
    wanted = parse_lengths(lengths) if lengths else [None]
    if baselines is None:
        baselines = "transformers" if documents == 1 else "none"
    stock = [] if baselines == "none" else baselines.split(",")
    check_baselines(stock, documents)
    loaded = load(model, random_weights, dtype=dtype, device=device, attention=attention)
    results, ceilings = [], []
    for length in wanted:
        pack = (
            real_documents(loaded, input, range(row, row + documents), text_column, question, length)
            if input
            else [random_document(loaded, length or 8192, number) for number in range(documents)]
        )
        ceilings.append(measure_ceilings(loaded, [document.prompt_tokens for document in pack]))
        results += measure_ttft(
            loaded,
            pack,
            chosen,
            baselines=stock,
            repeats=repeats,
            new_tokens=new_tokens,
            ceilings=ceilings[-1],
        )
    conditions = {**conditions_of(loaded), "ceilings": [measured.as_dict() for measured in ceilings]}
    if plot:
        save_plot(plot, f"{conditions['model']}, {conditions['device']}", results)
    if as_json:
        print(json.dumps({**conditions, "results": [result.as_dict() for result in results]}))
    else:
        print_ttft_table(conditions, results)


@bench_app.command(epilog=epilog("bench offload"))
def offload(
    method: Annotated[
        str, typer.Option(help="Method, with settings as in bench ttft.", rich_help_panel=MEASURED)
    ] = "sliminfer",
    keep: Keep = None,
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths, e.g. 32k,128k.", rich_help_panel=MEASURED)
    ] = "8k",
    kv_memory: Annotated[
        str,
        typer.Option(metavar="BYTES", help="K/V bytes on the device, e.g. 1GiB.", rich_help_panel=MEASURED),
    ] = "1GiB",
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of the answer.", rich_help_panel=MEASURED)
    ] = 64,
    resident: Annotated[
        bool,
        typer.Option(
            help="Also run with all K/V on the device, to compare the answers.", rich_help_panel=MEASURED
        ),
    ] = True,
    model: options.Model = "smollm2-135m",
    random_weights: RandomWeights = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    repeats: Repeats = 3,
    as_json: options.AsJson = False,
) -> None:
    """K/V in host memory: time of a decode step, bytes swapped, and how much of the copying is hidden."""
    from pipeline.bench.inputs import random_document
    from pipeline.bench.offload import measure_offload
    from pipeline.bench.variant import prepare
    from pipeline.config import parse_bytes
    from pipeline.engines.memory import host_kv_bytes

    chosen = parse_variant(method.strip(), parse_shares(keep) if keep else None)
    wanted = parse_lengths(lengths)
    device_bytes = parse_bytes("--kv-memory", kv_memory)
    loaded = load(model, random_weights, dtype=dtype, device=device, attention=attention)
    prepare(loaded, [chosen])
    results = []
    for length in wanted:
        results += measure_offload(
            loaded,
            random_document(loaded, length),
            chosen.use(loaded),
            device_bytes=device_bytes,
            host_bytes=host_kv_bytes(),
            new_tokens=new_tokens,
            repeats=repeats,
            with_resident=resident,
        )
    conditions = {**conditions_of(loaded), "method": method, "kv_memory": kv_memory, "new_tokens": new_tokens}
    if as_json:
        print(json.dumps({**conditions, "results": [result.as_dict() for result in results]}))
    else:
        print_offload_table(conditions, results)


@bench_app.command(epilog=epilog("bench decode"))
def decode(
    methods: Annotated[
        str, typer.Option(help="Comma-separated, with settings as in bench ttft.", rich_help_panel=MEASURED)
    ] = "dense,sliminfer",
    keep: Keep = None,
    documents: Annotated[
        int, typer.Option(min=1, help="Documents answered together.", rich_help_panel=MEASURED)
    ] = 8,
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths, each of a batch of its own.", rich_help_panel=MEASURED)
    ] = "8k",
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of each answer.", rich_help_panel=MEASURED)
    ] = 64,
    model: options.Model = "smollm2-135m",
    random_weights: RandomWeights = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    repeats: Repeats = 3,
    as_json: options.AsJson = False,
) -> None:
    """Time of a decode step with CUDA graphs and without, and its share of the memory's bandwidth."""
    from pipeline.bench.decode import measure_decode

    chosen = parse_variants(methods, keep)
    wanted = parse_lengths(lengths)
    loaded = load(model, random_weights, dtype=dtype, device=device, attention=attention)
    results = []
    for length in wanted:
        results += measure_decode(
            loaded, [length] * documents, chosen, new_tokens=new_tokens, repeats=repeats
        )
    conditions = {**conditions_of(loaded), "new_tokens": new_tokens}
    if as_json:
        print(json.dumps({**conditions, "results": [result.as_dict() for result in results]}))
    else:
        print_decode_table(conditions, results)


@bench_app.command(epilog=epilog("bench agreement"))
def agreement(
    input: Annotated[str, typer.Argument(metavar="INPUT", help="File of documents.")],
    methods: Annotated[
        str, typer.Option(help="Comma-separated, with settings as in bench ttft.", rich_help_panel=MEASURED)
    ] = "dense,marsinfer,sliminfer,uniprefill,fastkv,gemfilter",
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
    reference_column: Annotated[
        str | None,
        typer.Option(
            help="Column of right answers to compare with.",
            show_default="dense's answers",
            rich_help_panel=READING,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="First N rows.", show_default="all rows", rich_help_panel=READING
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer in tokens.", rich_help_panel=MEASURED)
    ] = 32,
    model: options.Model = "smollm2-135m",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    as_json: options.AsJson = False,
) -> None:
    """How often each method would choose the next token of the dense model's answers, and its TTFT."""
    from pipeline.model.loading import load_model
    from pipeline.quality.agreement import measure_agreement
    from pipeline.tokenizing import stop_token_ids

    chosen = parse_variants(methods, None)
    loaded = load_model(model, dtype=dtype, device=device, attention=attention)
    columns = {
        "text_column": text_column,
        "question_column": question_column,
        "question": question or (None if question_column else "Summarise this document."),
        "keep_columns": f"{reference_column}:string" if reference_column else None,
    }
    documents, failed = read_documents(loaded, input, columns, limit, new_tokens)
    for message in failed:
        print(f"left out: {message}", file=sys.stderr)
    stop_ids = stop_token_ids(loaded.tokenizer, loaded.generation_config)
    results = measure_agreement(
        loaded,
        documents,
        chosen,
        new_tokens=new_tokens,
        stop_ids=stop_ids,
        references=read_references(loaded, documents, reference_column) if reference_column else None,
    )
    conditions = {**conditions_of(loaded), "documents": len(documents), "left out": len(failed)}
    if as_json:
        print(json.dumps({**conditions, "results": [result.as_dict() for result in results]}))
    else:
        print_agreement_table(conditions, results)
