"""Seconds that each engine takes for the same documents: the local one, and Ray with so many workers.

    python examples/engine_speed.py --documents 200 --words 250 --workers 1,2 --model smollm2-135m

The documents are pieces of the licence texts of this folder, of half to one and a half times so many words.
The table is made of what `marsinfer batch --json` says: `seconds` is the run, from the first row that is read
to the output; `answering` the time from the first pack's start to the last one's end, without loading.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

LICENSES = Path(__file__).with_name("licenses.jsonl")


def write_documents(path: Path, count: int, words: int) -> None:
    texts = [json.loads(line)["text"].split() for line in LICENSES.read_text(encoding="utf-8").splitlines()]
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            text, length = draw.choice(texts), draw.randint(words // 2, words * 3 // 2)
            first = draw.randint(0, max(0, len(text) - length))
            file.write(json.dumps({"text": " ".join(text[first : first + length])}) + "\n")


def measured(source: Path, folder: Path, flags: list[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "marsinfer_cli", "batch", str(source), str(folder / "out.parquet")]
    command += ["--question", "What is this about?", "--overwrite", "--json", "--quiet", *flags]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--words", type=int, default=250)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--local", action=argparse.BooleanOptionalAction, default=True)
    arguments, others = parser.parse_known_args()
    runs = {"local": []} if arguments.local else {}
    runs |= {f"ray {n}": ["--engine", "ray", "--workers", n] for n in arguments.workers.split(",")}
    print(f"{'engine':>8}  {'seconds':>8}  {'answering':>9}  {'tokens/s':>8}  {'errors':>6}")
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "in.jsonl"
        write_documents(source, arguments.documents, arguments.words)
        for engine, flags in runs.items():
            summary = measured(source, Path(name), ["--model", arguments.model, *flags, *others])
            speed = summary["prompt_tokens"] / summary["answering_s"]
            seconds, answering = summary["seconds"], summary["answering_s"]
            print(
                f"{engine:>8}  {seconds:8.1f}  {answering:9.1f}  {speed:8.0f}  {summary['errors']:6}",
                flush=True,
            )


if __name__ == "__main__":
    main()
