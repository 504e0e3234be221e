"""The model, and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.settings.option import MODEL, Settings, option
from pipeline.settings.parse import parse_regex, parse_rope_scaling

DTYPES = ("auto", "bfloat16", "float16", "float32")
ATTENTION = ("auto", "fa3", "flash", "cudnn", "varlen", "sdpa")


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(Settings):
    """Where tensors are, and in what numbers."""

    dtype: str = option(
        "auto",
        help="auto (bfloat16 on a GPU, float32 on the CPU), bfloat16, float16, float32.",
        choices=DTYPES,
        panel=MODEL,
    )
    device: str = option("auto", help="auto, cpu, cuda or cuda:N.", panel=MODEL)


@dataclass(frozen=True, kw_only=True)
class WeightsSettings(Settings):
    """Which weights."""

    model: str = option(
        "smollm2-135m",
        help="Hub id, local folder, .gguf file, smollm2-135m (embedded, for demonstration: often wrong), or "
        "random:SHAPE (for speed: its weights are random and its answers noise).",
        offered="models",
        panel=MODEL,
    )
    revision: str | None = option(
        None, help="Commit, tag or branch on the hub.", shown_default="the newest", panel=MODEL
    )


@dataclass(frozen=True, kw_only=True)
class ModelSettings(WeightsSettings, DeviceSettings):
    """All that `open_model` takes."""

    attention: str = option(
        "auto",
        help="Attention backend: auto (the first that works), fa3, flash, cudnn, varlen, sdpa.",
        choices=ATTENTION,
        panel=MODEL,
    )
    rope_scaling: str | None = option(
        None,
        metavar="SPEC",
        help="yarn:FACTOR (or yarn:FACTOR:ORIGINAL): YaRN, for a context so many times as long.",
        shown_default="the model's own",
        check=parse_rope_scaling,
        panel=MODEL,
    )
    ignore_unused_tensors: str | None = option(
        None,
        metavar="REGEX",
        help="Load a folder in spite of tensors that its model does not use, of names that this matches.",
        shown_default="none",
        check=parse_regex,
        panel=MODEL,
    )
    trust_remote_code: bool = option(
        False, help="Run code that a model folder brings.", brings_code=bool, panel=MODEL
    )
