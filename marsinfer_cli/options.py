"""One spelling of each flag, shared by the commands."""

from __future__ import annotations

from typing import Annotated

import typer

READING, PROMPTS, MODEL, METHOD, ANSWERS, RUN, TRYING, LOGS = (
    "Reading",
    "Prompts",
    "Model",
    "Pruning method",
    "Answers",
    "Running and writing",
    "Trying a run first",
    "Messages",
)
SUITES = "Suites"

Suite = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SUITE",
        help="leval:DIR, longbench:DIR, or needles, hidden in DATA's documents, without DATA in the suites'; "
        "repeatable.",
        rich_help_panel=SUITES,
    ),
]
NeedleKinds = Annotated[
    str | None,
    typer.Option(
        metavar="K[,K...]",
        help="single, multi-key, multi-value, tracking; else all.",
        rich_help_panel=SUITES,
    ),
]
NeedleLengths = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N...]",
        help="Prompt lengths; else those of 8k,16k,30k that the context holds.",
        rich_help_panel=SUITES,
    ),
]
NeedleCount = Annotated[int, typer.Option(help="Needles of each kind.", rich_help_panel=SUITES)]
Tasks = Annotated[
    str | None,
    typer.Option(metavar="T[,T...]", help="Tasks to take; else all.", rich_help_panel=SUITES),
]
TaskColumn = Annotated[
    str | None,
    typer.Option(help="Column of a row's kind of task, told apart by profiles.", rich_help_panel=READING),
]
DocumentShard = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Of N parts of the documents, by the hash of their text, the I-th alone: to search on one, "
        "and measure on another.",
        rich_help_panel=READING,
    ),
]

Model = Annotated[
    str,
    typer.Option(help="Hub id, local folder, .gguf file, or smollm2-135m (embedded).", rich_help_panel=MODEL),
]
Revision = Annotated[
    str | None, typer.Option(help="Commit, tag or branch on the hub.", rich_help_panel=MODEL)
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (bfloat16 on a GPU, float32 on the CPU), bfloat16, float16, float32.",
        rich_help_panel=MODEL,
    ),
]
LinearDtype = Annotated[
    str,
    typer.Option(
        help="auto (as --dtype), or fp8: all linear layers but the head, on a GPU that can.",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=MODEL)]
Attention = Annotated[
    str,
    typer.Option(
        help="Attention backend: auto (the first that works), fa3, flash, cudnn, varlen, sdpa.",
        rich_help_panel=MODEL,
    ),
]
AttentionDtype = Annotated[
    str,
    typer.Option(
        help="auto (as --dtype), or fp8: attention of the prefill, with FlashAttention-3.",
        rich_help_panel=MODEL,
    ),
]
RopeScaling = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="yarn:FACTOR (or yarn:FACTOR:ORIGINAL): YaRN, for a context so many times as long.",
        rich_help_panel=MODEL,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that a model folder brings.", rich_help_panel=MODEL),
]
Method = Annotated[
    str,
    typer.Option(help="Name (see `marsinfer methods`) or FILE.py:Class.", rich_help_panel=METHOD),
]
SparseAttention = Annotated[
    float | None,
    typer.Option(
        metavar="MASS",
        help="Block-sparse attention in documents of 4,096 tokens or more, to reach this share of the "
        "attention, e.g. 0.95; off unless given (mars sets it itself).",
        rich_help_panel=METHOD,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="A method's parameter as NAME=VALUE; repeatable.", rich_help_panel=METHOD),
]
Engine = Annotated[
    str,
    typer.Option(
        help="local (this process, one device) or ray (workers, each with a model).", rich_help_panel=RUN
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="With --engine ray: a cluster of which this machine is one, or auto, the one that runs here; "
        "else a Ray of the run's own, on this machine.",
        rich_help_panel=RUN,
    ),
]
Workers = Annotated[
    str,
    typer.Option(
        metavar="N|all",
        help="With --engine ray: how many; all is one a GPU, or without GPUs one a CPU core.",
        rich_help_panel=RUN,
    ),
]
GpusPerWorker = Annotated[
    int | None,
    typer.Option(
        metavar="1|0",
        help="With --engine ray: a GPU for each worker, or a CPU core; else 1 where there are GPUs.",
        rich_help_panel=RUN,
    ),
]
