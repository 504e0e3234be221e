"""Time to first token of one prompt, for several methods and transformers itself, in one run."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pipeline.bench.flops import dense_flops, prefill_flops
from pipeline.errors import ConfigError
from pipeline.kernels.attention import choose_attention
from pipeline.model.adapters import DecoderAdapter, random_model
from pipeline.model.loading import LoadedModel, pick_device, pick_dtype
from pipeline.model.prefill import Pack, Prefilled, prefill
from pipeline.pruning.base import PruningMethod
from pipeline.records import EncodedDocument

# the published dimensions, by the configuration names of transformers
RANDOM_WEIGHTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-7b": (
        "qwen2",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 131072,
        },
    ),
    "llama-3.1-8b": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
        },
    ),
    "qwen2.5-1.5b": (
        "qwen2",
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 131072,
        },
    ),
}
BASELINES = ("transformers", "transformers-cudnn")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One variant at one length; times in milliseconds, device-synchronised, warm-up left out."""

    variant: str
    tokens: int
    ttft_ms: float  # median
    fastest_ms: float
    slowest_ms: float
    repeats: int
    peak_bytes: int | None  # of the device's allocator; None on the CPU
    ffn_ratio: float | None = None  # share of tokens through the FFN, mean over layers
    flops_ratio: float | None = None  # operations done, of dense
    tflops_per_second: float | None = None
    kv_bytes: int | None = None
    ffn_share_by_layer: tuple[float, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def random_loaded_model(name: str, *, dtype: str, device: str, attention: str) -> LoadedModel:
    """A model of a published shape with random weights: for speed, which does not depend on their values."""
    if name not in RANDOM_WEIGHTS:
        raise ConfigError(f"--random-weights {name!r}: choose from {', '.join(RANDOM_WEIGHTS)}")
    family, settings = RANDOM_WEIGHTS[name]
    target = pick_device(device)
    weights = random_model(family, settings, device=target, dtype=pick_dtype(dtype, target))
    adapter = DecoderAdapter(weights)
    shape = adapter.shape
    sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    backend, refused = choose_attention(attention, device=target, dtype=adapter.dtype, **sizes)
    return LoadedModel(
        adapter=adapter,
        tokenizer=None,
        attention=backend,
        generation_config=None,
        name=f"{name} (random weights)",
        fingerprint="random",
        attention_refused=refused,
    )


def measure_ttft(
    model: LoadedModel,
    document: EncodedDocument,
    methods: Sequence[tuple[str, PruningMethod]],
    *,
    baselines: Sequence[str] = (),
    repeats: int = 5,
) -> list[Measurement]:
    """Measure every variant on one prompt, taking turns so that a drifting clock touches all alike."""
    pack = Pack.of([document], model.device)
    runs: dict[str, Callable[[], Prefilled | None]] = {}
    for baseline in baselines:
        runs[baseline] = _transformers_run(model, pack, baseline)
    for name, method in methods:
        runs[name] = _method_run(model, pack, method)
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int | None] = {}
    work: dict[str, dict[str, Any]] = {}
    for turn in range(repeats + 1):  # the first turn warms up
        for name, run in runs.items():
            milliseconds, peak, prefilled = _timed(run, model.device)
            if turn == 0:
                peaks[name] = peak
                work[name] = _work(model, prefilled)
            else:
                times[name].append(milliseconds)
            del prefilled
    return [_measurement(name, document, times[name], peaks[name], work[name]) for name in runs]


def _method_run(model: LoadedModel, pack: Pack, method: PruningMethod) -> Callable[[], Prefilled]:
    def run() -> Prefilled:
        prefilled = prefill(model.adapter, model.attention, method, pack)
        prefilled.logits_BV.argmax(-1).tolist()  # the first token, on the host
        return prefilled

    return run


def _transformers_run(model: LoadedModel, pack: Pack, baseline: str) -> Callable[[], None]:
    """Stock transformers on the same weights: `default` attention is its SDPA with torch's choice."""
    from contextlib import nullcontext

    from torch.nn.attention import SDPBackend, sdpa_kernel

    if baseline not in BASELINES:
        raise ConfigError(f"unknown baseline {baseline!r}; baselines: {', '.join(BASELINES)}")

    @torch.inference_mode()
    def run() -> None:
        forced = baseline == "transformers-cudnn"
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if forced else nullcontext():
            output = model.adapter.model(pack.input_ids[None], use_cache=True, logits_to_keep=1)
        output.logits[:, -1].argmax(-1).tolist()

    return run


def _timed(
    run: Callable[[], Prefilled | None], device: torch.device
) -> tuple[float, int | None, Prefilled | None]:
    cuda = device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = run()
    if cuda:
        torch.cuda.synchronize(device)
    milliseconds = (time.perf_counter() - started) * 1e3
    return milliseconds, torch.cuda.max_memory_allocated(device) if cuda else None, result


def _work(model: LoadedModel, prefilled: Prefilled | None) -> dict[str, Any]:
    """What the method did; a baseline is dense and reports nothing of its own."""
    if prefilled is None:
        return {}
    shape = model.adapter.shape
    (length,) = prefilled.lengths
    ffn = [layer[0] for layer in prefilled.work.ffn()]
    kept = [layer[0] for layer in prefilled.work.kept]
    done = prefill_flops(shape, kept, ffn, [layer[0] for layer in prefilled.work.scored_pairs])
    return {
        "flops": done,
        "flops_ratio": done / dense_flops(shape, length),
        "ffn_ratio": sum(ffn) / (length * shape.layers),
        "kv_bytes": prefilled.cache.nbytes,
        "ffn_share_by_layer": tuple(round(tokens / length, 4) for tokens in ffn),
    }


def _measurement(
    name: str, document: EncodedDocument, times: Sequence[float], peak: int | None, work: dict[str, Any]
) -> Measurement:
    work = dict(work)
    flops = work.pop("flops", None)
    median = statistics.median(times)
    return Measurement(
        variant=name,
        tokens=document.prompt_tokens,
        ttft_ms=median,
        fastest_ms=min(times),
        slowest_ms=max(times),
        repeats=len(times),
        peak_bytes=peak,
        tflops_per_second=flops / median / 1e9 if flops else None,
        **work,
    )


def saving_reached(measured: Measurement, dense: Measurement) -> float | None:
    """The time saved against dense, over what the operation count predicts: dense * (1 - flops_ratio)."""
    if measured.flops_ratio is None or measured.flops_ratio >= 1:
        return None
    predicted_ms = dense.ttft_ms * (1 - measured.flops_ratio)
    return (dense.ttft_ms - measured.ttft_ms) / predicted_ms
