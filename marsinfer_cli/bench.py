"""`marsinfer bench`: how fast and how accurate the methods are, measured beside dense in the same run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from marsinfer_cli import tables
from marsinfer_cli.events import note, saying
from marsinfer_cli.examples import epilog
from marsinfer_cli.in_parts import InParts
from marsinfer_cli.signature import takes
from marsinfer_cli.variants import parse_lengths, parse_packs, parse_shares, parse_variant, parse_variants
from pipeline.errors import ConfigError
from pipeline.settings.answer_settings import SamplingSettings
from pipeline.settings.bench_settings import (
    PACKS,
    AccuracyConfig,
    AgreementConfig,
    DecodeConfig,
    KernelConfig,
    OffloadConfig,
    ThroughputConfig,
    TtftConfig,
)
from pipeline.settings.console_settings import AccuracySwitches, BenchSwitches, JsonSwitch, PlotSwitch
from pipeline.settings.data_settings import DataSettings
from pipeline.settings.model_settings import ModelSettings
from pipeline.settings.prompt_settings import SplitSettings
from pipeline.settings.run_settings import PackSettings

if TYPE_CHECKING:
    from pipeline.bench.accuracy import Accuracy
    from pipeline.evaluate.check_rows import CheckRow
    from pipeline.model.loading import UnloadedModel
    from pipeline.model.variant import Variant

bench_app = typer.Typer(help="Measure speed and accuracy.", epilog=epilog("bench ttft"))


@bench_app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Measure speed and accuracy."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@takes(TtftConfig, BenchSwitches, PlotSwitch)
def ttft(config: TtftConfig, switches: BenchSwitches, drawn: PlotSwitch) -> None:
    """Time to first token of a prompt, or of a pack of them: median and spread, operations, memory."""
    from pipeline.bench.ceilings import measure_ceilings
    from pipeline.bench.inputs import random_document, real_documents
    from pipeline.bench.plot import check_plot, draw_ttft, save_picture
    from pipeline.bench.ttft import check_baselines, measure_ttft
    from pipeline.checkpoints.device_memory import Remedies
    from pipeline.families.projection import IN_FULL
    from pipeline.model.variant import precision_of
    from pipeline.setup.remedies import more_devices

    if drawn.plot is not None:
        check_plot(drawn.plot)
    chosen = parse_variants(config.methods, config.keep)
    for variant in chosen:
        config.check_divided(variant.method.name)
    wanted = parse_lengths(config.lengths) if config.lengths else [None]
    together, ranks = config.documents, config.tensor_parallel
    baselines = config.baselines or ("transformers" if together == ranks == 1 else "none")
    stock = [] if baselines == "none" else baselines.split(",")
    check_baselines(stock, together, ranks)
    # transformers computes with the weights in full
    opened = _told(_opened(config, chosen, ranks))
    more = None if stock else more_devices(config.device, opened, [variant.method for variant in chosen])
    loaded = opened.load(IN_FULL if stock else precision_of(chosen), Remedies(more_devices=more))
    results, ceilings = [], []
    parts = InParts("lengths", map(_named, wanted))
    with closing(loaded) as model, parts.measuring():
        for length in parts.each(wanted):
            pack = (
                real_documents(model, config.document, config, length)
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
                check=parts.check,
            )
    measured_at = {"ceilings": list(map(asdict, ceilings[: parts.ended]))}
    conditions = {**tables.conditions_of(model), **measured_at, **parts.missing}
    if drawn.plot:
        title = f"{conditions['model']}, {conditions['device']}"
        save_picture(drawn.plot, title, partial(draw_ttft, results))
    _show(switches, conditions, _dicts(results), tables.ttft_lines(results))
    parts.end()


@takes(OffloadConfig, BenchSwitches)
def offload(config: OffloadConfig, switches: BenchSwitches) -> None:
    """K/V in host memory: time of a decode step, bytes swapped, and how much of the copying is hidden."""
    from pipeline.bench.inputs import random_document
    from pipeline.bench.offload_speed import measure_offload
    from pipeline.engines.memory import host_kv_bytes
    from pipeline.model.variant import precision_of, prepare

    device_bytes = config.kv_memory
    assert device_bytes is not None, "it has a default"
    chosen = parse_variant(config.variant.strip(), parse_shares(config.keep) if config.keep else None)
    wanted = parse_lengths(str(config.lengths))
    model = _told(_opened(config, [chosen])).load(precision_of([chosen]))
    prepare(model, [chosen])
    results, parts = [], InParts("lengths", map(_named, wanted))
    with parts.measuring():
        for length in parts.each(wanted):
            results += measure_offload(
                model,
                random_document(model, length),
                chosen.use(model),
                device_bytes=device_bytes,
                host_bytes=host_kv_bytes(),
                new_tokens=config.new_tokens,
                repeats=config.repeats,
                with_resident=config.resident,
                check=parts.check,
            )
    settings = {"method": config.variant, "kv_memory": config.kv_memory, "new_tokens": config.new_tokens}
    conditions = {**tables.conditions_of(model), **settings, **parts.missing}
    _show(switches, conditions, _dicts(results), tables.offload_lines(results))
    parts.end()


@takes(DecodeConfig, BenchSwitches)
def decode(config: DecodeConfig, switches: BenchSwitches) -> None:
    """Time of a decode step with CUDA graphs and without, and its share of the memory's bandwidth."""
    from pipeline.bench.decode_speed import measure_decode
    from pipeline.model.variant import precision_of

    chosen = parse_variants(config.methods, config.keep)
    wanted = parse_lengths(str(config.lengths))
    model = _told(_opened(config, chosen)).load(precision_of(chosen))
    results, parts = [], InParts("lengths", map(_named, wanted))
    with parts.measuring():
        for length in parts.each(wanted):
            results += measure_decode(
                model,
                [length] * config.documents,
                chosen,
                new_tokens=config.new_tokens,
                repeats=config.repeats,
                check=parts.check,
            )
    conditions = {**tables.conditions_of(model), "new_tokens": config.new_tokens, **parts.missing}
    _show(switches, conditions, _dicts(results), tables.decode_lines(results))
    parts.end()


@takes(KernelConfig, BenchSwitches)
def attention(config: KernelConfig, switches: BenchSwitches) -> None:
    """TFLOP/s of causal attention by every backend that works here, for single documents and packs."""
    from pipeline.bench.attention_speed import CANDIDATES, attention_shape, available, measure_attention
    from pipeline.kernels.devices import pick_device, pick_dtype, use_device
    from pipeline.texts.versions import version_of

    sizes = attention_shape(
        config.shape, heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim
    )
    wanted = parse_packs(config.packs) if config.packs is not None else None
    target = use_device(pick_device(config.device))
    number = pick_dtype(config.dtype, target)
    names = [name.strip() for name in config.backends.split(",")]
    candidates, refused = available(
        list(CANDIDATES) if names == ["auto"] else names, sizes, device=target, dtype=number
    )
    results = measure_attention(
        candidates,
        wanted or parse_packs(PACKS[target.type]),
        sizes,
        device=target,
        dtype=number,
        repeats=config.repeats,
    )
    conditions = {
        "heads": sizes.heads,
        "kv_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "device": tables.device_named(target),
        "dtype": str(number).removeprefix("torch."),
        "torch": version_of("torch"),
    }
    measured = {**_dicts(results), "not_available": refused}
    _show(switches, conditions, measured, tables.attention_lines(results, refused))


@takes(ThroughputConfig, BenchSwitches)
def batch(config: ThroughputConfig, switches: BenchSwitches) -> None:
    """Documents and tokens a second of a whole run, its answers thrown away, and the GPU's idle share.

    On a GPU the run is made twice: for the throughput, and once more under the profiler, which slows it
    down, for the share of the time in which neither a kernel nor a copy ran. Without a question a summary
    is asked for.
    """
    from pipeline.bench.throughput import measure_throughput
    from pipeline.model.variant import precision_of, prepare

    if not config.input:
        raise ConfigError("Missing argument 'INPUT...'")
    if "-" in config.input:
        raise ConfigError("bench batch reads its input more than once: give a file instead of -")
    chosen = parse_variant(config.variant.strip(), None)
    options = config.options_of(DataSettings, SplitSettings, SamplingSettings, PackSettings)
    model = _opened(config, [chosen]).load(precision_of([chosen]))
    prepare(model, [chosen])
    result = measure_throughput(model, chosen, options.pop("input"), note=note, **options)
    conditions = {**tables.conditions_of(model), "max_new_tokens": config.max_new_tokens}
    _show(switches, conditions, asdict(result), tables.throughput_lines(result))


@takes(AccuracyConfig, AccuracySwitches)
def accuracy(config: AccuracyConfig, switches: AccuracySwitches) -> None:
    """Right tokens, needles found, shares kept and TTFT of many methods, each compared with dense.

    Teacher-forced: one prefill and one short forward over the right answer, or without one over dense's own,
    each document alone. Drops are below dense, with their 95% intervals over documents.
    """
    _run_accuracy(config, switches)


@takes(AgreementConfig, AccuracySwitches)
def agreement(config: AgreementConfig, switches: AccuracySwitches) -> None:
    """Now bench accuracy, which without --reference-column measures the agreement with dense."""
    note("bench agreement is now bench accuracy; the next version does not know it any more")
    _run_accuracy(config, switches)


def _opened(config: ModelSettings, variants: Iterable[Variant], ranks: int = 1) -> UnloadedModel:
    """The model that is measured, with the draft that its methods want. Raises ConfigError without one."""
    from pipeline.model.loading import open_model
    from pipeline.model.variant import check_draft

    model = open_model(config, ranks)
    check_draft(model, [variant.method for variant in variants])
    return model


def _told(model: UnloadedModel) -> UnloadedModel:
    """The same, when it is said what is to be known of its files, as a run itself says it."""
    for text in model.notes:
        note(text)
    return model


def _run_accuracy(config: AccuracyConfig, switches: AccuracySwitches) -> None:
    from pipeline.bench.plot import check_plot, draw_accuracy, save_picture

    config.check_data()
    if switches.plot is not None:
        check_plot(switches.plot)
    conditions, results, parts = _accuracies(config, saying(quiet=switches.quiet))
    if switches.plot is not None:
        title = f"{conditions['model']}, {conditions['device']}"
        save_picture(switches.plot, title, partial(draw_accuracy, results))
    _show(switches, conditions, _dicts(results), tables.accuracy_lines(results, config.long_tokens))
    parts.end()


def _accuracies(
    config: AccuracyConfig, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Accuracy], InParts]:
    """Conditions and results, those of the variants that ended if not all did."""
    from pipeline.bench.accuracy import measure_accuracy, read_cases
    from pipeline.suites.by_name import NOT_COMPARABLE

    variants = [each for each in parse_variants(config.methods, None) if each.name != "dense"]
    model = _told(_opened(config, variants)).load()
    results: list[Accuracy] = []
    cases: list[CheckRow] = []
    parts = InParts("variants", ["dense", *(variant.name for variant in variants)])
    with parts.measuring():
        cases, notes = read_cases(config, model, parts.check)
        for text in notes:
            note(text)
        measured = measure_accuracy(model, cases, variants, long_tokens=config.long_tokens, check=parts.check)
        for result in parts.each(measured):
            say(f"{result.variant}: {result.groups[0].token_accuracy:.1%} of {len(cases):,} rows' tokens")
            results.append(result)
    tokens = sum(case.document.prompt_tokens for case in cases)
    held = "right answers" if config.has_references else "dense's own answers"
    about: dict[str, Any] = {"held against": held, "rows": len(cases), "prompt tokens": tokens}
    conditions = {**tables.conditions_of(model), **about, **parts.missing}
    if config.suite:
        conditions["suites"] = NOT_COMPARABLE
    return conditions, results, parts


def _named(length: int | None) -> str:
    return "the document" if length is None else f"{length} tokens"


def _dicts(results: Sequence[Any]) -> dict[str, Any]:
    return {"results": list(map(asdict, results))}


def _show(
    switches: JsonSwitch, conditions: dict[str, Any], measured: dict[str, Any], lines: Iterable[str]
) -> None:
    """Print what was measured, as JSON or as lines of text."""
    if switches.as_json:
        print(json.dumps({**conditions, **measured}))
    else:
        print(*tables.condition_lines(conditions), *lines, sep="\n")


for command in (accuracy, attention, batch, ttft, offload, decode):
    bench_app.command(epilog=epilog(f"bench {command.__name__}"))(command)
bench_app.command("agreement", hidden=True)(agreement)
