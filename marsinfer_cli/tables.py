"""Measurements as lines of Markdown tables: readable as they are, and ready to be kept."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

from pipeline.texts.shown import in_cell, markdown_table
from pipeline.texts.versions import version_of
from pipeline.texts.words import percent_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from pipeline.bench.accuracy import Accuracy
    from pipeline.bench.attention_speed import AttentionMeasurement
    from pipeline.bench.decode_speed import DecodeMeasurement
    from pipeline.bench.offload_speed import OffloadMeasurement
    from pipeline.bench.throughput import Throughput
    from pipeline.bench.ttft import Measurement
    from pipeline.evaluate.drops import Drop
    from pipeline.model.loading import LoadedModel


def conditions_of(model: LoadedModel) -> dict[str, Any]:
    """What the numbers depend on, beside the settings of the command."""
    return {
        "model": model.name,
        "device": device_named(model.device),
        "dtype": str(model.decoder.dtype).removeprefix("torch."),
        "attention": model.attention.name,
        **({} if model.lead is None else {"tensor_parallel": model.lead.ranks.count}),
        "torch": version_of("torch"),
        "transformers": version_of("transformers"),
    }


def device_named(device: torch.device) -> str:
    """A GPU's name, or what kind of CPU it is."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def ttft_lines(results: Sequence[Measurement]) -> Iterator[str]:
    from pipeline.bench.ttft import saving_reached

    dense = {result.tokens: result for result in results if result.variant == "dense"}
    rows = []
    for result in results:
        base = dense.get(result.tokens)
        rows.append(
            {
                "documents": "-" if result.documents == 1 else str(result.documents),
                "tokens": f"{result.tokens:,}",
                "variant": result.variant,
                "TTFT ms": f"{result.ttft_ms:,.1f}",
                "fastest-slowest": f"{result.fastest_ms:,.1f}-{result.slowest_ms:,.1f}",
                "speed-up": f"{base.ttft_ms / result.ttft_ms:.3f}" if base else "-",
                "operations": percent_of(result.flops_ratio),
                "of predicted saving": percent_of(saving_reached(result, base) if base else None),
                "TFLOP/s": _number(result.tflops_per_second),
                "of ceiling": percent_of(result.floor_ms / result.ttft_ms if result.floor_ms else None),
                "selection": percent_of(result.select_ms / result.ttft_ms if result.select_ms else None),
                "sums": percent_of(result.sums_ms / result.ttft_ms if result.sums_ms else None),
                "peak GB": _gigabytes(result.peak_bytes),
                "K/V GB": _gigabytes(result.kv_bytes),
                "K/V of dense": percent_of(result.kv_ratio),
                "end to end ms": _number(result.end_to_end_ms),
            }
        )
    yield from _table(rows)
    for result in results:
        by_layer = {"tokens": result.kept_share_by_layer, "FFN tokens": result.ffn_share_by_layer}
        for what, shares in by_layer.items():
            if shares and set(shares) != {1}:
                told = " ".join(f"{share:.0%}" for share in shares)
                yield f"\n{result.variant}, {result.tokens:,} tokens: {what} by layer: {told}"


def offload_lines(results: Sequence[OffloadMeasurement]) -> Iterator[str]:
    return _table(
        [
            {
                "tokens": f"{result.tokens:,}",
                "variant": result.variant,
                "TTFT ms": f"{result.ttft_ms:,.1f}",
                "ms a step": f"{result.step_ms:,.2f}",
                "fastest-slowest": "-".join(f"{ms:,.2f}" for ms in result.step_ms_spread),
                "K/V GB, device": _gigabytes(result.device_kv_bytes),
                "K/V GB, host": _gigabytes(result.host_kv_bytes),
                "peak GB": _gigabytes(result.peak_bytes),
                "decisions": str(result.decisions),
                "swaps": str(result.swaps),
                "MB swapped a step": f"{result.swapped_bytes_per_step / 1e6:,.2f}",
                "copy ms a step": _number(result.copy_ms_per_step),
                "waited ms a step": _number(result.stall_ms_per_step),
                "hidden": percent_of(result.hidden),
                "tokens as resident": percent_of(result.same_as_resident),
                "as synchronous": percent_of(result.same_as_synchronous),
            }
            for result in results
        ]
    )


def decode_lines(results: Sequence[DecodeMeasurement]) -> Iterator[str]:
    yield from _table(
        [
            {
                "documents": str(result.documents),
                "tokens": f"{result.tokens:,}",
                "variant": result.variant,
                "ms a step": f"{result.step_ms:,.2f}",
                "without graphs": f"{result.eager_step_ms:,.2f}",
                "answer ms": _number(result.graph_answer_ms),
                "answer without graphs": f"{result.eager_answer_ms:,.1f}",
                "weights GB": _gigabytes(result.weight_bytes),
                "K/V GB": _gigabytes(result.kv_bytes),
                "GB/s": f"{result.bytes_per_second / 1e9:,.1f}",
                "copy GB/s": f"{result.copy_bytes_per_second / 1e9:,.1f}",
                "of copy": percent_of(result.bandwidth_share),
                "same tokens": "-" if result.same_tokens is None else str(result.same_tokens),
            }
            for result in results
        ]
    )
    for result in results:
        if result.capture_failure:
            yield f"\n{result.variant}: decoded without graphs: {result.capture_failure}"


def accuracy_lines(results: Sequence[Accuracy], long_tokens: int) -> Iterator[str]:
    """One table of all rows that are no needles with speed and shares, then one of each kind of needles."""
    heads = dict.fromkeys(group.name for result in results for group in result.groups)
    for head in heads:
        rows = []
        for result in results:
            group = next(group for group in result.groups if group.name == head)
            is_dense = result is results[0]  # from which the others drop
            row = {
                "variant": result.variant,
                "right tokens": percent_of(group.token_accuracy),
                "drop, points": "0" if is_dense else _drop(group.token_drop),
                "found": percent_of(group.found),
                "drop of found, points": "0" if is_dense else _drop(group.found_drop),
                "NLL": f"{group.nll:.3f}",
                "times as fast": f"{group.speed_up:.2f}",
                **{f"x at {n:,}": f"{ratio:.2f}" for n, ratio in group.speed_up_by_length.items()},
            }
            if head == next(iter(heads)):
                row |= {
                    "KL": "-" if result.divergence is None else f"{result.divergence:.4f}",
                    f"TTFT > {long_tokens:,}, ms": _number(result.long_ttft_ms),
                    "all cases, times as fast": f"{result.speed_up:.2f}",
                    **{_SHARE_HEADS[name]: percent_of(share) for name, share in result.shares.items()},
                }
            rows.append(row)
        group = next(group for group in results[0].groups if group.name == head)
        yield f"{head}: {group.rows:,} of {group.documents:,} documents\n"
        yield from _table(rows)
        yield ""


_SHARE_HEADS = {
    "kept_ratio": "tokens kept",
    "ffn_ratio": "FFN",
    "attention_ratio": "attention",
    "flops_ratio": "operations",
    "kv_ratio": "K/V",
}


def _drop(drop: Drop) -> str:
    from pipeline.evaluate.drops import hundredths

    return f"{hundredths(drop.drop)} ({drop.interval})"


def attention_lines(results: Sequence[AttentionMeasurement], refused: dict[str, str]) -> Iterator[str]:
    """TFLOP/s, a row a backend and a column a pack; below it, what could not be measured."""
    packs = dict.fromkeys(pack for result in results for pack in (*rates_of(result), *result.failures))
    rows = [
        {
            "backend": result.backend,
            "relative error": f"{result.relative_error:.1e}",
            **{f"{pack} TFLOP/s": _number(rates_of(result).get(pack)) for pack in packs},
        }
        for result in results
    ]
    if rows:
        yield from _table(rows)
    for name, reason in refused.items():
        yield f"\n{name}: not available: {reason}"
    for result in results:
        for pack, reason in result.failures.items():
            yield f"\n{result.backend}, {pack}: failed: {reason}"


def rates_of(result: AttentionMeasurement) -> dict[str, float]:
    return {rate.pack: rate.tflops_per_second for rate in result.rates}


def throughput_lines(result: Throughput) -> Iterator[str]:
    yield from _table(
        [
            {
                "variant": result.variant,
                "documents": f"{result.documents:,}",
                "errors": str(result.errors) if result.errors else "-",
                "packs": f"{result.packs:,}",
                "documents/s": _number(result.documents_per_second),
                "prompt tokens/s": _number(result.prompt_tokens_per_second),
                "new tokens/s": _number(result.new_tokens_per_second),
                "wall s": _number(result.wall_s),
                "prefill": percent_of(result.prefill_share),
                "decode": percent_of(result.decode_share),
                "between packs": percent_of(result.between_packs_share),
                "idle": percent_of(result.idle),
                "wall s, profiled": _number(result.profiled_wall_s),
            }
        ]
    )
    yield (
        "\nwall: from the first pack's start to the last one's end; the whole run took "
        f"{result.run_s:,.2f} s, {result.warm_up_s:,.2f} s of it warming up"
    )
    if result.idle is not None:
        yield "idle: without a kernel or a copy on the device, in a second run, under the profiler"
    else:
        yield "idle: not measured: no GPU, or the profiler saw nothing of it"


def condition_lines(conditions: dict[str, Any]) -> Iterator[str]:
    """What the numbers depend on, above their tables."""
    yield ", ".join(f"{name} {value}" for name, value in conditions.items() if name != "ceilings")
    for measured in conditions.get("ceilings", []):
        rate = measured["fp8_matrix_tflops"]
        fp8 = f" (fp8 {rate:,.2f})" if rate else ""
        yield (
            f"ceilings at {measured['tokens']:,} tokens: matrix product "
            f"{measured['matrix_tflops']:,.2f} TFLOP/s{fp8}, "
            f"attention {measured['attention_tflops']:,.2f} TFLOP/s"
        )
    yield ""


def _table(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """A Markdown table without the columns in which no row has anything."""
    columns = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    yield markdown_table(columns, [[row[name] for name in columns] for row in rows], in_cell)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _gigabytes(value: float | None) -> str:
    return "-" if not value else f"{value / 1e9:.3f}"
