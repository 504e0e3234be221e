"""`marsinfer bench attention` and `bench batch`: attention alone, and a whole run."""

from __future__ import annotations

import json
import sys

from marsinfer_cli.signature import takes
from marsinfer_cli.tables import conditions_of, print_attention_table, print_throughput_table, processor
from marsinfer_cli.variants import parse_packs, parse_variant
from pipeline.errors import ConfigError
from pipeline.settings.answer_settings import SamplingSettings
from pipeline.settings.bench_settings import PACKS, KernelConfig, ThroughputConfig
from pipeline.settings.console_settings import BenchSwitches
from pipeline.settings.data_settings import DataSettings
from pipeline.settings.prompt_settings import SplitSettings
from pipeline.settings.run_settings import PackSettings


@takes(KernelConfig, BenchSwitches)
def attention(config: KernelConfig, switches: BenchSwitches) -> None:
    """TFLOP/s of causal attention by every backend that works here, for single documents and packs."""
    from pipeline.bench.attention_speed import CANDIDATES, attention_shape, available, measure_attention
    from pipeline.model.loading import pick_device, pick_dtype, use_device
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
        "device": _device_name(str(target)),
        "dtype": str(number).removeprefix("torch."),
        "torch": version_of("torch"),
    }
    if switches.as_json:
        measured = [result.as_dict() for result in results]
        print(json.dumps({**conditions, "results": measured, "not_available": refused}))
    else:
        print_attention_table(conditions, results, refused)


@takes(ThroughputConfig, BenchSwitches)
def throughput(config: ThroughputConfig, switches: BenchSwitches) -> None:
    """Documents and tokens a second of a whole run, its answers thrown away, and the GPU's idle share.

    On a GPU the run is made twice: for the throughput, and once more under the profiler, which slows it
    down, for the share of the time in which neither a kernel nor a copy ran. Without a question a summary
    is asked for.
    """
    from pipeline.bench.throughput import measure_throughput
    from pipeline.model.loading import open_model
    from pipeline.model.variant import prepare

    if not config.input:
        raise ConfigError("Missing argument 'INPUT...'")
    if "-" in config.input:
        raise ConfigError("bench batch reads its input more than once: give a file instead of -")
    chosen = parse_variant(config.variant.strip(), None)
    options = config.options_of(DataSettings, SplitSettings, SamplingSettings, PackSettings)
    model = open_model(config).load()
    prepare(model, [chosen])
    result = measure_throughput(model, chosen, options.pop("input"), note=_note, **options)
    conditions = {**conditions_of(model), "max_new_tokens": config.max_new_tokens}
    if switches.as_json:
        print(json.dumps({**conditions, **result.as_dict()}))
    else:
        print_throughput_table(conditions, result)


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()


def _note(text: str) -> None:
    print(f"marsinfer: note: {text}", file=sys.stderr)
