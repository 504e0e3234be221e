"""Whether the first row of a run is as fast as the tenth: ten equal documents, one at a time.

    python examples/first_row.py [MODEL] [FLAG...]

For each length the command `marsinfer batch` runs in a process of its own, with an empty cache of compiled
kernels, so that whatever the warm-up leaves out is compiled within the first row's time to first token.
The flags are those of the command, such as `--method mars --linear-dtype mixed`. The documents are letters
without sense: models whose weights are random have a token for each.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LENGTHS = (8192, 16384, 32768, 12345)  # tokens of a prompt, about
ROWS = 10
AROUND = 160  # tokens of a prompt that are no document, and of the answer


def main(arguments: list[str]) -> None:
    model, *flags = arguments or ["random:qwen2.5-1.5b"]
    print(f"{model} {' '.join(flags)}\n")
    print("| prompt tokens | first ms | second ms | median of the others ms | tenth ms | first / tenth |")
    print("|---|---|---|---|---|---|")
    for length in LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            rows = answered(Path(folder), model, length, flags)
        ttft_ms = [row["ttft_ms"] for row in rows]
        first, second, *others, tenth = ttft_ms
        figures = f"{first:,.1f} | {second:,.1f} | {statistics.median(others):,.1f} | {tenth:,.1f}"
        print(f"| {rows[0]['prompt_tokens']:,} | {figures} | {first / tenth:.3f} |", flush=True)


def answered(folder: Path, model: str, length: int, flags: list[str]) -> list[dict]:
    """The rows of a run over documents of so many letters; raises CalledProcessError where it fails."""
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    letters = random.Random(length)
    with source.open("w") as lines:
        for number in range(ROWS):
            text = "".join(letters.choices("abcdefghijklmnopqrstuvwxyz ", k=length - AROUND))
            lines.write(json.dumps({"id": str(number), "text": text, "question": "What is it about?"}) + "\n")
    words = ["batch", source, output, "--model", model, "--pack-tokens", "1", "--max-new-tokens", "8"]
    subprocess.run(
        [sys.executable, "-m", "marsinfer_cli", *map(str, words), "--quiet", *flags],
        env={**os.environ, "TRITON_CACHE_DIR": str(folder / "kernels")},
        stderr=sys.stderr if "--verbose" in flags else subprocess.DEVNULL,
        check=True,
    )
    return [json.loads(line) for line in output.open()]


if __name__ == "__main__":
    main(sys.argv[1:])
