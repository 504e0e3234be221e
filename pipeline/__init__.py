"""marsinfer: batch answers over long documents with token-pruned prefill.

    from pipeline import answer, load_model, make_method, run_batch

    model = load_model("smollm2-135m")
    method = make_method("marsinfer", {"start_layer": 20})
    summary = run_batch("in.parquet", "out.parquet", model=model, method=method, question_column="question")
    print(summary.as_dict())
    for row in answer([{"text": "...", "question": "..."}], model=model):
        print(row["answer"])

`run_batch` is what `marsinfer batch` runs, and takes its settings under the same names: the fields of
`BatchConfig`. `answer` takes rows in memory instead, and yields their answers. `check` holds a method against
dense on the same rows, and `calibrate` finds settings, as the commands of these names do. `load_model` keeps
a model for several runs. `make_method` makes a pruning method by name; one of your own is a class like those
in pipeline/pruning/, whose contract is in pipeline/pruning/base.py.

Whatever a user can act on is raised as a `MarsError`, whose kinds are in pipeline/errors.py. Tokens are those
of the model's tokenizer, times in milliseconds (`..._ms`) or seconds (`..._s`), sizes in bytes.

Names are loaded on first use, so that importing the package costs nothing. `__version__` is that of the
installed package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.calibration.calibrating import calibrate
    from pipeline.checks.checking import check
    from pipeline.errors import MarsError
    from pipeline.in_memory import Answers, answer
    from pipeline.model.loading import load_model
    from pipeline.pruning.registry import make_method
    from pipeline.run import run_batch
    from pipeline.settings.run_settings import BatchConfig
    from pipeline.summary import Summary

    __version__: str

_WHERE = {
    "Answers": "pipeline.in_memory",
    "BatchConfig": "pipeline.settings.run_settings",
    "MarsError": "pipeline.errors",
    "Summary": "pipeline.summary",
    "answer": "pipeline.in_memory",
    "calibrate": "pipeline.calibration.calibrating",
    "check": "pipeline.checks.checking",
    "load_model": "pipeline.model.loading",
    "make_method": "pipeline.pruning.registry",
    "run_batch": "pipeline.run",
}
__all__ = [
    "Answers",
    "BatchConfig",
    "MarsError",
    "Summary",
    "answer",
    "calibrate",
    "check",
    "load_model",
    "make_method",
    "run_batch",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # of the installed package
        return import_module("pipeline.texts.versions").version_of("marsinfer")
    if name not in _WHERE:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
