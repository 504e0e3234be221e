"""Documents a second of whole jobs, prefill and answers, for several settings of `marsinfer batch`.

    python examples/batch_speed.py --model random:qwen2-7b --works 64x8192x1,64x8192x256 \\
        --variants 'fp8=--method dense --linear-dtype fp8;mars=--method mars --linear-dtype mixed'

A work is documents x prompt tokens x new tokens. Documents are random letters: a model with random weights
has a token for each, and ends no answer before its last token. The table is made of what `marsinfer batch
--json` says: rates are of the time from the first pack's start to the last token, with the model loaded and
warmed up.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TEMPLATE_TOKENS = 32  # that question and template add to a document
QUESTION = "What is it?"
HEAD = (
    "work",
    "variant",
    "documents/s",
    "prefill s",
    "decode s",
    "the rest s",
    "TTFT p50 ms",
    "prompt tokens",
)


def write_documents(path: Path, count: int, tokens: int) -> None:
    letters, draw = string.ascii_lowercase + " ", random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            text = "".join(draw.choices(letters, k=max(1, tokens - TEMPLATE_TOKENS)))
            file.write(json.dumps({"text": text}) + "\n")


def measured(source: Path, model: str, new_tokens: int, flags: list[str]) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "marsinfer_cli",
        "batch",
        str(source),
        str(source.with_suffix(".parquet")),
    ]
    command += [
        "--model",
        model,
        "--question",
        QUESTION,
        "--max-new-tokens",
        str(new_tokens),
        "--group",
        "off",
    ]
    command += ["--overwrite", "--json", "--quiet", *flags]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def row(work: str, variant: str, run: dict[str, Any]) -> list[str]:
    """Raises SystemExit where not every document was answered to its last token."""
    count, _, new_tokens = numbers(work)
    if run["ok"] != count or run["new_tokens"] != count * new_tokens:
        raise SystemExit(
            f"{work} {variant}: {run['ok']} answers of {run['new_tokens']} tokens, {run['error_types']}"
        )
    seconds = run["answering_s"]
    return [
        work,
        variant,
        f"{count / seconds:.3f}",
        f"{run['prefill_s']:.2f}",
        f"{run['decode_s']:.2f}",
        f"{seconds - run['prefill_s'] - run['decode_s']:.2f}",
        f"{run['ttft_ms_p50']:,.0f}",
        f"{run['prompt_tokens']:,}",
    ]


def numbers(work: str) -> tuple[int, int, int]:
    count, tokens, new_tokens = map(int, work.split("x"))
    return count, tokens, new_tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="random:qwen2-7b")
    parser.add_argument("--works", default="64x8192x1,64x8192x256,16x32768x128,200x2048x64")
    parser.add_argument("--variants", default="dense=--method dense", help="NAME=FLAGS, with ; between them")
    options = parser.parse_args()
    print("|", " | ".join(HEAD), "|\n" + "|---" * len(HEAD) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for work in options.works.split(","):
            count, tokens, new_tokens = numbers(work)
            source = Path(folder) / f"{work}.jsonl"
            write_documents(source, count, tokens)
            for variant in options.variants.split(";"):
                name, _, flags = variant.partition("=")
                run = measured(source, options.model, new_tokens, flags.split())
                print("|", " | ".join(row(work, name, run)), "|", flush=True)


if __name__ == "__main__":
    main()
