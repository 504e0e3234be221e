"""What the commands of `marsinfer bench` are given: variants, lengths, documents, a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from marsinfer_cli.options import MEASURED, MODEL
from pipeline.config import LINEAR_DTYPES

if TYPE_CHECKING:
    from pipeline.bench.variant import Variant
    from pipeline.model.loading import LoadedModel
    from pipeline.records import EncodedDocument

RandomWeights = Annotated[
    str | None,
    typer.Option(
        help="Random weights instead, as --model random:SHAPE: qwen2-7b, llama-3.1-8b, qwen2.5-1.5b, tiny.",
        show_default="the weights of --model",
        rich_help_panel=MODEL,
    ),
]
Repeats = Annotated[
    int,
    typer.Option(min=1, help="Timed runs of each variant, after one to warm up.", rich_help_panel=MEASURED),
]
Keep = Annotated[
    str | None,
    typer.Option(
        metavar="S[,S...]",
        help="Fixed shares of the prompt to keep, one or one a pruning layer, for methods without "
        "settings of their own: random weights attend to nothing.",
        show_default="by attention",
        rich_help_panel=MEASURED,
    ),
]

# among a method's settings in --methods
LINEARS = tuple(name for name in LINEAR_DTYPES if name != "auto")
ATTENTION_IN_FP8 = "attention-fp8"


def read_documents(
    model: LoadedModel, path: str, columns: dict[str, str | None], limit: int | None, new_tokens: int
) -> tuple[list[EncodedDocument], list[str]]:
    """The prompts of a file, over-long ones cut in their middle, and why rows were left out."""
    from pipeline.config import BatchConfig
    from pipeline.errors import InputError
    from pipeline.intake import encode_rows, make_prompts, open_rows
    from pipeline.records import EncodedDocument, RowFailure
    from pipeline.selection import select_rows

    config = BatchConfig(
        input=(path,),
        output="",
        **columns,  # type: ignore[arg-type]
        limit=limit,
        max_new_tokens=new_tokens,
        on_overlong="truncate-middle",
    )
    source = open_rows(config)
    prompts = make_prompts(config, model.tokenizer, model.shape.context)
    rows = select_rows(source, config, source.total_rows)
    items = list(encode_rows(rows, prompts, config.on_overlong))
    documents = [item for item in items if isinstance(item, EncodedDocument)]
    failed = [item.message for item in items if isinstance(item, RowFailure)]
    if not documents:
        raise InputError(f"{path} has no row that can be answered" + (f": {failed[0]}" if failed else ""))
    return documents, failed


def read_references(model: LoadedModel, documents: list[EncodedDocument], column: str) -> list[list[int]]:
    from pipeline.errors import InputError

    references = []
    for document in documents:
        assert document.source.passthrough is not None
        # the only column that is kept, whose name may have changed
        text = document.source.passthrough.column(0)[0].as_py()
        tokens = model.tokenizer(text or "", add_special_tokens=False)["input_ids"]
        if not tokens:
            raise InputError(f"{document.source.place}: its reference in column {column!r} is empty")
        references.append(tokens)
    return references


def load(model: str, random_weights: str | None, *, dtype: str, device: str, attention: str) -> LoadedModel:
    from pipeline.model.loading import load_model
    from pipeline.model.random_weights import PREFIX

    name = PREFIX + random_weights if random_weights else model
    return load_model(name, dtype=dtype, device=device, attention=attention)


def parse_variants(specs: str, keep: str | None) -> list[Variant]:
    from pipeline.errors import ConfigError

    shares = parse_shares(keep) if keep else None
    names = [spec.strip() for spec in specs.split(",")]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--methods names {twice!r} twice")
    return [parse_variant(name, shares) for name in names]


def parse_variant(spec: str, keep: tuple[float, ...] | None) -> Variant:
    from pipeline.bench.variant import Variant
    from pipeline.config import parse_settings
    from pipeline.errors import ConfigError
    from pipeline.pruning.registry import make_method

    if spec.startswith("@"):
        return _profile_variant(spec)
    parts = spec.split(":")
    linears = [part for part in parts if part in LINEARS]
    if len(linears) > 1:
        raise ConfigError(f"--methods {spec!r}: give fp8 or mixed, not both")
    precisions = linears[0] if linears else "auto", ATTENTION_IN_FP8 in parts
    parts = [part for part in parts if part not in (*LINEARS, ATTENTION_IN_FP8)]
    settings = [part.replace("/", ",") for part in parts if "=" in part]
    method = make_method(":".join(part for part in parts if "=" not in part), parse_settings(settings))
    return Variant(spec, method if settings or keep is None else method.with_keep(keep), *precisions)


def _profile_variant(spec: str) -> Variant:
    """`@FILE`: the settings and precisions of a profile."""
    from pipeline.bench.variant import Variant
    from pipeline.profile import load_profile
    from pipeline.pruning.registry import make_method

    batch = load_profile(spec[1:]).batch
    method = make_method(batch["method"], batch["settings"])
    in_fp8 = batch.get("attention_dtype") == "fp8"
    return Variant(spec, method, batch.get("linear_dtype", "auto"), in_fp8)


def parse_lengths(text: str) -> list[int]:
    from pipeline.config import parse_count
    from pipeline.errors import ConfigError

    lengths = [parse_count("--lengths", part) for part in text.split(",")]
    if not all(lengths):
        raise ConfigError(f"--lengths {text!r}: a prompt has at least one token")
    return lengths


def parse_packs(text: str) -> dict[str, list[int]]:
    """Packs such as `8k;4x8k;16k+8k+5k`: of each as written, the lengths of its documents."""
    from pipeline.config import parse_count
    from pipeline.errors import ConfigError

    packs: dict[str, list[int]] = {}
    for pack in text.replace(";", " ").split():
        lengths: list[int] = []
        for part in pack.split("+"):
            count, times, length = part.rpartition("x")
            repeats = parse_count("--packs", count) if times else 1
            lengths += [parse_count("--packs", length)] * repeats
        if not lengths or not all(lengths):
            raise ConfigError(f"--packs {pack!r}: a pack has documents, and a document at least one token")
        packs[pack] = lengths
    if not packs:
        raise ConfigError(f"--packs {text!r}: name a pack, such as 32k, 4x8k or 16k+8k+5k")
    return packs


def parse_shares(text: str) -> tuple[float, ...]:
    from pipeline.errors import ConfigError

    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--keep {text!r}: give shares such as 0.25,0.125,0.0625") from None
    if not all(0 < share <= 1 for share in shares):
        raise ConfigError(f"--keep {text!r}: a share is above 0 and at most 1")
    return shares


def real_documents(
    model: LoadedModel, path: str, rows: range, text_column: str, question: str, length: int | None
) -> list[EncodedDocument]:
    """The prompts of these rows, with `length` cut in their middle to so many tokens."""
    from itertools import islice

    from pipeline.errors import InputError, RowError
    from pipeline.io import Columns, open_source
    from pipeline.prompts import PromptBuilder
    from pipeline.records import RowFailure

    context = model.adapter.shape.context
    prompts = PromptBuilder(
        model.tokenizer,
        context=min(length or context, context),
        max_new_tokens=0,
        on_overlong="truncate-middle" if length else "error",
    )
    source = open_source([path], Columns(text=text_column, fixed_question=question))
    encoded = []
    for document in islice(source, rows.start, rows.stop):
        if isinstance(document, RowFailure):
            raise InputError(document.message)
        try:
            encoded.append(prompts.encode(document))
        except RowError as error:
            raise InputError(f"{document.source.place}: {error}") from error
    if len(encoded) < len(rows):
        raise InputError(f"{path} has no row {rows.start + len(encoded)}")
    return encoded
