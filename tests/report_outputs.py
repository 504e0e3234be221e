"""Outputs of runs that never were, with known numbers, for the tests of reports."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa

from pipeline.outputs.answers import answers_table, output_schema
from pipeline.outputs.writing import output_writer
from pipeline.pruning.tiers import FFN, LIVE, pack_layer
from pipeline.records import Answer

LAYERS = 6
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }} $x$ & \x1b[31m"
SETTINGS = {"method": {"name": "sliminfer", "settings": {"block": 64}}}
METADATA = {
    "config": {"method": "sliminfer", "seed": 0, "profile": None, "stop": ["</s>", "<b>stop</b>"]},
    "settings_that_decide": SETTINGS,
    "model": "tiny",
    "versions": {"python": "3.12"},
}


def answered(row, *, method="sliminfer", seed=0, **values):
    """A row whose tokens leave after layer 2 and whose FFN skips some in layer 4."""
    random = np.random.default_rng((seed, row))
    tokens = int(random.integers(100, 4_000))
    kept = [tokens] * 3 + [int(tokens * random.uniform(0.3, 0.9))] * 3
    ffn = [*kept[:4], int(kept[4] * 0.5), kept[5]]
    given = {
        "id": f"id {row}",
        "row": row,
        "answer": f"answer {row}",
        "document_tokens": tokens - 20,
        "prompt_tokens": tokens,
        "truncated_tokens": 0,
        "new_tokens": 5,
        "queue_ms": 3.0,
        "tokenize_ms": 0.5,
        "prefill_ms": tokens / 10,
        "ttft_ms": tokens / 10 + 1,
        "decode_ms": 40.0,
        "pack_documents": 1,
        "pack_tokens": tokens,
        "method": method,
        "kept_tokens": kept,
        "ffn_tokens": ffn,
        "ffn_fp8_tokens": [0, 0, 0, 0, 0, ffn[5] // 2],
        "kept_ratio": sum(kept) / LAYERS / tokens,
        "ffn_ratio": sum(ffn) / LAYERS / tokens,
        "attention_ratio": 0.5,
        "flops_ratio": 0.75,
        "kv_bytes": tokens * 100,
        "row_hash": f"hash {row}",
    }
    return Answer(**{**given, **values})


def failed(row, kind="over_long", message="too long", status="error"):
    return Answer(
        id=f"id {row}",
        row=row,
        status=status,
        error_type=kind,
        error_message=message,
        method="sliminfer",
        row_hash=f"hash {row}",
    )


def copied(**values):
    """The copied columns of one row."""
    return pa.RecordBatch.from_pylist([values])


def schema_of(metadata=METADATA, columns=(), **options):
    return output_schema(pa.schema(list(columns)), {"marsinfer": json.dumps(metadata)}, **options)


def write(path, answers, metadata=METADATA, **options):
    """An output, with the columns that the first answer has copied."""
    batch = answers[0].passthrough if answers else None
    schema = schema_of(metadata, () if batch is None else batch.schema, **options)
    with output_writer(path, schema, overwrite=True) as writer:
        if answers:
            writer.write_table(answers_table(answers, schema))
    return path


def selected(row, tokens=50, **values):
    """A row with a selection: half of the tokens leave after layer 1."""
    random = np.random.default_rng(row)
    marks = np.where(random.random(tokens) < 0.5, LIVE | FFN, 0).astype(np.uint8)
    marks[-1] = LIVE | FFN
    whole = np.full(tokens, LIVE | FFN, np.uint8)
    pieces = [f" w{n}" for n in range(tokens - 2)] + ["<b>&", "🐟\n"]
    alive = int((marks & LIVE > 0).sum())
    given = {
        "selection": [pack_layer(layer) for layer in (whole, marks, whole[:alive])],
        "prompt_text": "".join(pieces),
        "prompt_token_chars": [len(piece) for piece in pieces],
        "prompt_spans": [2, tokens - 8, tokens - 8, tokens - 2],
        "prompt_tokens": tokens,
        "document_tokens": tokens - 10,
    }
    return answered(row, **{**given, **values})
