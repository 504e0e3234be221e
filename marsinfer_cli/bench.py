"""`marsinfer bench`: how fast the methods are, measured beside transformers in the same run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import typer

from marsinfer_cli.bench_accuracy import accuracy, agreement
from marsinfer_cli.bench_speed import attention, throughput
from marsinfer_cli.examples import epilog
from marsinfer_cli.signature import takes
from marsinfer_cli.tables import conditions_of, print_decode_table, print_offload_table, print_ttft_table
from marsinfer_cli.variants import parse_lengths, parse_shares, parse_variant, parse_variants
from pipeline.settings.bench_settings import DecodeConfig, OffloadConfig, TtftConfig
from pipeline.settings.console_settings import BenchSwitches, PlotSwitch

bench_app = typer.Typer(help="Measure speed.", epilog=epilog("bench ttft"))


@bench_app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Measure speed."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@takes(TtftConfig, BenchSwitches, PlotSwitch)
def ttft(config: TtftConfig, switches: BenchSwitches, drawn: PlotSwitch) -> None:
    """Time to first token of a prompt, or of a pack of them: median and spread, operations, memory."""
    from pipeline.bench.ceilings import measure_ceilings
    from pipeline.bench.inputs import random_document, real_documents
    from pipeline.bench.plot import check_plot, save_plot
    from pipeline.bench.ttft import check_baselines, measure_ttft
    from pipeline.model.loading import open_model

    if drawn.plot is not None:
        check_plot(drawn.plot)
    chosen = parse_variants(config.methods, config.keep)
    wanted = parse_lengths(config.lengths) if config.lengths else [None]
    together = config.documents
    baselines = config.baselines or ("transformers" if together == 1 else "none")
    stock = [] if baselines == "none" else baselines.split(",")
    check_baselines(stock, together)
    model = open_model(config).load()
    results, ceilings = [], []
    for length in wanted:
        rows = range(config.row, config.row + together)
        pack = (
            real_documents(model, config.document, rows, config, config, length)
            if config.document
            else [random_document(model, length or 8192, number) for number in range(together)]
        )
        ceilings.append(measure_ceilings(model, [document.prompt_tokens for document in pack]))
        results += measure_ttft(
            model,
            pack,
            chosen,
            baselines=stock,
            repeats=config.repeats,
            new_tokens=config.new_tokens,
            ceilings=ceilings[-1],
        )
    conditions = {**conditions_of(model), "ceilings": [measured.as_dict() for measured in ceilings]}
    if drawn.plot:
        save_plot(drawn.plot, f"{conditions['model']}, {conditions['device']}", results)
    if switches.as_json:
        _print_json(conditions, results)
    else:
        print_ttft_table(conditions, results)


@takes(OffloadConfig, BenchSwitches)
def offload(config: OffloadConfig, switches: BenchSwitches) -> None:
    """K/V in host memory: time of a decode step, bytes swapped, and how much of the copying is hidden."""
    from pipeline.bench.inputs import random_document
    from pipeline.bench.offload_speed import measure_offload
    from pipeline.engines.memory import host_kv_bytes
    from pipeline.model.loading import open_model
    from pipeline.model.variant import prepare

    device_bytes = config.kv_memory
    assert device_bytes is not None, "it has a default"
    chosen = parse_variant(config.variant.strip(), parse_shares(config.keep) if config.keep else None)
    wanted = parse_lengths(str(config.lengths))
    model = open_model(config).load()
    prepare(model, [chosen])
    results = []
    for length in wanted:
        results += measure_offload(
            model,
            random_document(model, length),
            chosen.use(model),
            device_bytes=device_bytes,
            host_bytes=host_kv_bytes(),
            new_tokens=config.new_tokens,
            repeats=config.repeats,
            with_resident=config.resident,
        )
    settings = {"method": config.variant, "kv_memory": config.kv_memory, "new_tokens": config.new_tokens}
    conditions = {**conditions_of(model), **settings}
    if switches.as_json:
        _print_json(conditions, results)
    else:
        print_offload_table(conditions, results)


@takes(DecodeConfig, BenchSwitches)
def decode(config: DecodeConfig, switches: BenchSwitches) -> None:
    """Time of a decode step with CUDA graphs and without, and its share of the memory's bandwidth."""
    from pipeline.bench.decode_speed import measure_decode
    from pipeline.model.loading import open_model

    chosen = parse_variants(config.methods, config.keep)
    wanted = parse_lengths(str(config.lengths))
    model = open_model(config).load()
    results = []
    for length in wanted:
        results += measure_decode(
            model,
            [length] * config.documents,
            chosen,
            new_tokens=config.new_tokens,
            repeats=config.repeats,
        )
    conditions = {**conditions_of(model), "new_tokens": config.new_tokens}
    if switches.as_json:
        _print_json(conditions, results)
    else:
        print_decode_table(conditions, results)


def _print_json(conditions: dict[str, Any], results: Sequence[Any]) -> None:
    print(json.dumps({**conditions, "results": [result.as_dict() for result in results]}))


for name, command in {
    "accuracy": accuracy,
    "attention": attention,
    "batch": throughput,
    "ttft": ttft,
    "offload": offload,
    "decode": decode,
}.items():
    bench_app.command(name, epilog=epilog(f"bench {name}"))(command)
bench_app.command("agreement", hidden=True)(agreement)
