"""What the commands of `marsinfer bench` measure. These settings are given on the command line alone."""

from __future__ import annotations

from functools import partial

from pipeline.settings.answer_settings import SamplingSettings
from pipeline.settings.data_settings import SUMMARIES, DataSettings, TextSettings
from pipeline.settings.kinds import TEXT, WHOLE
from pipeline.settings.model_settings import DeviceSettings, ModelSettings, ParallelSettings
from pipeline.settings.option import MEASURED, READING, Renamed, Settings
from pipeline.settings.option import option as any_option
from pipeline.settings.parse import check_at_least
from pipeline.settings.prompt_settings import PromptSettings, SplitSettings
from pipeline.settings.row_settings import RowSettings
from pipeline.settings.run_settings import KvSettings, PackSettings

option = partial(any_option, panel=MEASURED, in_file=False, in_environment=False)

PACKS = {"cuda": "8k;32k;128k;4x8k;16k+8k+5k+3k;16x2k", "cpu": "1k;2k;4x512;1k+512+320+192"}


class RepeatSettings(Settings):
    """How often each thing is timed."""

    repeats: int = option(5, help="Timed runs of each variant, after one to warm up.", least=1)


class VariantSettings(Settings):
    """One method."""

    variant: str = option("mars", flag="--method", help="Method, with settings as in bench ttft.")


class VariantsSettings(Settings):
    """Several methods, side by side."""

    methods: str = option(
        "dense,mars",
        help="Comma-separated, with settings as marsinfer:eta=0.9:start_layer=8 or "
        "FILE.py:Class:share=0.5; the values of a list stand between slashes, as in "
        "sliminfer:budget=0.4/0.2/0.1; :fp8 and :mixed are --linear-dtype, :kv-fp8 is --kv-dtype; @FILE is "
        "a profile.",
    )


class TimedSettings(ModelSettings, RepeatSettings):
    """Prompts of given lengths, whose speed is that of any other."""

    renamed = (
        Renamed(
            name="random_weights",
            kind=TEXT,
            now="--model random:SHAPE",
            values=lambda shape: {"model": f"random:{shape}"},
            metavar="SHAPE",
        ),
    )

    keep: str | None = option(
        None,
        metavar="S[,S...]",
        help="Fixed shares of the prompt to keep, one or one a pruning layer, for methods without "
        "settings of their own: random weights attend to nothing.",
        shown_default="by attention",
    )
    lengths: str | None = option(
        "8k",
        help="Prompt lengths, e.g. 8k,32k; a real document is cut in its middle.",
        shown_default="8k, or a real document's own",
    )
    new_tokens: int = option(
        64, help="Tokens of each answer; of bench ttft 0 is the first token alone.", least=0
    )


class TogetherSettings(VariantsSettings, TimedSettings):
    """Documents that share a pack or a batch."""

    documents: int = option(1, help="Documents together, each of the given length.", least=1)


class TtftConfig(
    TextSettings,
    PromptSettings,
    TogetherSettings,
    ParallelSettings,
    defaults={"lengths": None, "new_tokens": 0, "question": SUMMARIES["short"]},
):
    """Of `bench ttft`."""

    baselines: str | None = option(
        None,
        help="Comma-separated: transformers, transformers-cudnn; none leaves them out.",
        shown_default="transformers for one document, none for several",
    )
    document: str | None = option(
        None,
        flag="--input",
        help="File with a real document.",
        shown_default="random tokens",
        panel=READING,
    )
    row: int = option(0, help="Row of the file, from 0; of several, the first.", least=0, panel=READING)


class OffloadConfig(
    VariantSettings,
    TimedSettings,
    KvSettings,
    defaults={"variant": "sliminfer", "repeats": 3, "kv_memory": 1 << 30},
):
    """Of `bench offload`."""

    resident: bool = option(True, help="Also run with all K/V on the device, to compare the answers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("--new-tokens", self.new_tokens, 2)


class DecodeConfig(TogetherSettings, defaults={"methods": "dense,sliminfer", "repeats": 3, "documents": 8}):
    """Of `bench decode`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("--new-tokens", self.new_tokens, 2)


class ThroughputConfig(
    DataSettings,
    SplitSettings,
    ModelSettings,
    SamplingSettings,
    PackSettings,
    VariantSettings,
    defaults={"max_new_tokens": 32},
):
    """Of `bench batch`."""


class KernelConfig(DeviceSettings, RepeatSettings):
    """Of `bench attention`."""

    shape: str = option("qwen2-7b", help="Heads of a published shape: qwen2-7b, llama-3.1-8b, qwen2.5-1.5b.")
    heads: int | None = option(
        None, help="Query heads, instead of the shape's.", shown_default="the shape's", least=1
    )
    kv_heads: int | None = option(
        None, help="Key/value heads, likewise.", shown_default="the shape's", least=1
    )
    head_dim: int | None = option(
        None, help="Size of a head, likewise.", shown_default="the shape's", least=1
    )
    packs: str | None = option(
        None,
        help="Packs with ; or a space between them: 32k is one document, 4x8k are four, 16k+8k+5k three.",
        shown_default=f"{PACKS['cuda']} on a GPU, {PACKS['cpu']} on the CPU",
    )
    backends: str = option(
        "auto", help="Comma-separated: fa3, flash, cudnn, varlen, sdpa; auto takes them all."
    )


OTHERS = "marsinfer,sliminfer,uniprefill,fastkv,gemfilter"


class AccuracyConfig(
    VariantsSettings, RowSettings, defaults={"methods": f"mars,{OTHERS}", "max_new_tokens": 64}
):
    """Of `bench accuracy`."""

    long_tokens: int = option(24_000, help="TTFT is that of prompts with more tokens than this.", least=0)


class AgreementConfig(
    AccuracyConfig,
    defaults={"methods": f"dense,{OTHERS}", "max_new_tokens": 32},
):
    """Of `bench agreement`, which was the name of `bench accuracy` without right answers."""

    renamed = (
        Renamed(
            name="new_tokens",
            kind=WHOLE,
            now="--max-new-tokens",
            values=lambda count: {"max_new_tokens": count},
        ),
    )
