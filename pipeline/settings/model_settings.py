"""The model, and how it is loaded."""

from __future__ import annotations

from pipeline.errors import ConfigError
from pipeline.settings.option import MODEL, Settings, option
from pipeline.settings.parse import parse_regex, parse_rope_scaling

DTYPES = ("auto", "bfloat16", "float16", "float32")
DIVIDED = ("dense", "marsinfer", "mars")  # methods that know of models whose heads are on several GPUs
ATTENTION = ("auto", "fa3", "flash", "cudnn", "varlen", "sdpa")


class DeviceSettings(Settings, panel=MODEL):
    """Where tensors are, and in what numbers."""

    dtype: str = option(
        "auto",
        help="auto (bfloat16 on a GPU, float32 on the CPU), bfloat16, float16, float32.",
        choices=DTYPES,
    )
    device: str = option("auto", help="auto, cpu, cuda or cuda:N.")


class WeightsSettings(Settings, panel=MODEL):
    """Which weights."""

    model: str = option(
        "smollm2-135m",
        help="Hub id, local folder, .gguf file, smollm2-135m (embedded, for demonstration: often wrong), or "
        "random:SHAPE (for speed: its weights are random and its answers noise).",
        offered="models",
    )
    revision: str | None = option(None, help="Commit, tag or branch on the hub.", shown_default="the newest")


class ModelSettings(WeightsSettings, DeviceSettings, panel=MODEL):
    """All that `open_model` takes."""

    attention: str = option(
        "auto",
        help="Attention backend: auto (the first that works), fa3, flash, cudnn, varlen, sdpa.",
        choices=ATTENTION,
    )
    rope_scaling: str | None = option(
        None,
        metavar="SPEC",
        help="yarn:FACTOR (or yarn:FACTOR:ORIGINAL): extend the context so many times, by YaRN.",
        shown_default="the model's own",
        check=parse_rope_scaling,
    )
    adapter: str | None = option(
        None,
        metavar="DIR",
        help="Folder of a LoRA adapter that is merged into the model as its weights are read.",
        shown_default="none",
    )
    draft_model: str | None = option(
        None,
        metavar="MODEL",
        help="Smaller model with the same tokenizer that reads each prompt first, for --method speculative.",
        shown_default="none",
        offered="models",
    )
    ignore_unused_tensors: str | None = option(
        None,
        metavar="REGEX",
        help="Load a folder although it has tensors that its model does not use, if this matches their "
        "names.",
        check=parse_regex,
    )
    trust_remote_code: bool = option(False, help="Run code that a model folder brings.", brings_code=bool)


class ParallelSettings(Settings, panel=MODEL):
    """Among how many devices the model is divided."""

    tensor_parallel: int = option(
        1,
        metavar="N",
        help="Divide the model among N GPUs of this machine: for models that one does not hold; for methods "
        f"{', '.join(DIVIDED)}.",
        least=1,
    )

    def check_divided(self, method: str) -> None:
        """Raise ConfigError for a method that cannot be run on a divided model."""
        if self.tensor_parallel > 1 and method not in DIVIDED:
            raise ConfigError(
                f"--tensor-parallel {self.tensor_parallel} and --method {method} exclude each other: choose "
                f"from {', '.join(DIVIDED)}"
            )
