"""One spelling of each flag, shared by the commands."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from marsinfer_cli import completion
from pipeline.config import ATTENTION, ATTENTION_DTYPES, DTYPES, ENGINES, LINEAR_DTYPES

# panels of --help, by what a flag is about
MEASURED, READING, PROMPTS, MODEL, METHOD, ANSWERS, SUITES, FILES, RUN, TRYING, LOGS = (
    "What is measured",
    "Reading",
    "Prompts",
    "Model",
    "Pruning method",
    "Answers",
    "Suites",
    "Files",
    "Running and writing",
    "Trying a run first",
    "Messages",
)

Suite = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:DIR]",
        help="leval:DIR, longbench:DIR, or needles, hidden in DATA's documents, without DATA in the suites'; "
        "repeatable.",
        show_default="none",
        rich_help_panel=SUITES,
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(metavar="T[,T...]", help="Tasks to take.", show_default="all", rich_help_panel=SUITES),
]
LimitPerTask = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="N rows of each task, of as many documents as can be.",
        show_default="all rows",
        rich_help_panel=READING,
    ),
]
TaskColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of the kind of task, which profiles tell apart.",
        show_default="none",
        rich_help_panel=READING,
    ),
]
DocumentShard = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Of N parts of the documents, by the hash of their text, the I-th alone: to search on one, "
        "and measure on another.",
        show_default="all documents",
        rich_help_panel=READING,
    ),
]

TextColumn = Annotated[str, typer.Option(help="Column of the document.", rich_help_panel=READING)]
QuestionColumn = Annotated[
    str | None, typer.Option(help="Column of the question.", show_default="none", rich_help_panel=READING)
]
Question = Annotated[
    str | None, typer.Option(help="One question for all rows.", show_default="none", rich_help_panel=READING)
]
IdColumn = Annotated[
    str | None,
    typer.Option(help="Column of the id.", show_default="file and row number", rich_help_panel=READING),
]
ReferenceColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of the right answer, or of a list of them.",
        show_default="dense's answers count as right",
        rich_help_panel=READING,
    ),
]
System = Annotated[
    str | None, typer.Option(help="System message.", show_default="none", rich_help_panel=PROMPTS)
]
PromptTemplate = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Jinja prompt with {{ document }}, {{ question }}, {{ system }}.",
        show_default="the model's chat template",
        rich_help_panel=PROMPTS,
    ),
]
NeedleKinds = Annotated[
    str | None,
    typer.Option(
        metavar="K[,K...]",
        help="Of single, multi-key, multi-value, tracking.",
        show_default="all",
        rich_help_panel=SUITES,
    ),
]
NeedleLengths = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N...]",
        help="Prompt lengths in tokens.",
        show_default="of 8k,16k,30k those that the context holds",
        rich_help_panel=SUITES,
    ),
]
NeedleCount = Annotated[int, typer.Option(help="Needles of each kind.", rich_help_panel=SUITES)]
Model = Annotated[
    str,
    typer.Option(
        help="Hub id, local folder, .gguf file, smollm2-135m (embedded), or random:SHAPE (for speed: its "
        "weights are random and its answers noise).",
        autocompletion=completion.models,
        rich_help_panel=MODEL,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Commit, tag or branch on the hub.", show_default="the newest", rich_help_panel=MODEL),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (bfloat16 on a GPU, float32 on the CPU), bfloat16, float16, float32.",
        autocompletion=completion.one_of(DTYPES),
        rich_help_panel=MODEL,
    ),
]
LinearDtype = Annotated[
    str,
    typer.Option(
        help="auto (as --dtype); on a GPU that can, fp8: all linear layers but the head; or mixed: most of"
        " them, but neither for the prompt's end nor for short documents or the answer.",
        autocompletion=completion.one_of(LINEAR_DTYPES),
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=MODEL)]
Attention = Annotated[
    str,
    typer.Option(
        help="Attention backend: auto (the first that works), fa3, flash, cudnn, varlen, sdpa.",
        autocompletion=completion.one_of(ATTENTION),
        rich_help_panel=MODEL,
    ),
]
AttentionDtype = Annotated[
    str,
    typer.Option(
        help="auto (as --dtype), or fp8: attention of the prefill, with FlashAttention-3.",
        autocompletion=completion.one_of(ATTENTION_DTYPES),
        rich_help_panel=MODEL,
    ),
]
RopeScaling = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="yarn:FACTOR (or yarn:FACTOR:ORIGINAL): YaRN, for a context so many times as long.",
        show_default="the model's own",
        rich_help_panel=MODEL,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that a model folder brings.", rich_help_panel=MODEL),
]
Method = Annotated[
    str,
    typer.Option(
        help="Name (see `marsinfer methods`) or FILE.py:Class.",
        autocompletion=completion.methods,
        rich_help_panel=METHOD,
    ),
]
SparseAttention = Annotated[
    float | None,
    typer.Option(
        metavar="MASS",
        help="Block-sparse attention in documents of 4,096 tokens or more, to reach this share of the "
        "attention, e.g. 0.95.",
        show_default="off, but for mars",
        rich_help_panel=METHOD,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A method's parameter as NAME=VALUE; repeatable.",
        show_default="the method's own",
        rich_help_panel=METHOD,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.", rich_help_panel=LOGS)]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=LOGS)
]
Engine = Annotated[
    str,
    typer.Option(
        help="local (this process, one device) or ray (workers, each with a model).",
        autocompletion=completion.one_of(ENGINES),
        rich_help_panel=RUN,
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="With --engine ray: the cluster that this machine belongs to, or auto, which finds it.",
        show_default="a Ray of the run's own, here",
        rich_help_panel=RUN,
    ),
]
Workers = Annotated[
    str,
    typer.Option(
        metavar="N|all",
        help="With --engine ray: how many; all is one for each GPU, or CPU core where there is none.",
        rich_help_panel=RUN,
    ),
]
GpusPerWorker = Annotated[
    int | None,
    typer.Option(
        metavar="1|0",
        help="With --engine ray: a GPU for each worker, or a CPU core.",
        show_default="1 where there are GPUs",
        rich_help_panel=RUN,
    ),
]


def suite_settings(
    suite: list[str] | None,
    tasks: str | None,
    needle_kinds: str | None,
    needle_lengths: str | None,
    needle_count: int,
) -> dict[str, Any]:
    """Fields of a check's or a calibration's configuration, from the flags of the panel `SUITES`."""
    from pipeline.config import parse_count
    from pipeline.quality.check_config import parse_list
    from pipeline.quality.needles import KINDS

    lengths = None if needle_lengths is None else parse_list("--needle-lengths", needle_lengths)
    return {
        "suites": tuple(suite or ()),
        "tasks": () if tasks is None else tuple(parse_list("--tasks", tasks)),
        "needle_kinds": KINDS if needle_kinds is None else tuple(parse_list("--needle-kinds", needle_kinds)),
        "needle_lengths": None
        if lengths is None
        else tuple(parse_count("--needle-lengths", length) for length in lengths),
        "needle_count": needle_count,
    }
