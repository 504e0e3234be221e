"""What each engine answers in a second of the same documents: the local one, and Ray with so many workers.

    python examples/engine_speed.py --model random:qwen2-7b --documents 200 --lengths 8k-32k \\
        --workers 1,2 --methods dense,sliminfer --repeats 3

The documents are pieces of the licence texts of this folder, over and over, of about so many tokens. Settings
of a method follow it as in `sliminfer:budget=0.4/0.2/0.1`; flags that are not listed here are `marsinfer
batch`'s. The table is made of what `marsinfer batch --json` says, of the median run where there are several:
rates are of the time from the first pack's start to the last one's end; `idle` is the share of the workers'
time between these that was neither prefill nor decode, when a GPU has nothing to do, a worker's wait for its
weights while others answer included; `load s` is the longest that a worker took for its weights, `run s` the
run with all that comes before and after.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.model.loading import open_model
from pipeline.settings.model_settings import ModelSettings
from pipeline.settings.parse import parse_count

LICENSES = Path(__file__).with_name("licenses.jsonl")
QUESTION = "What is this about?"
HEAD = ("method", "engine", "workers", "documents/s", "of one worker", "prompt tokens/s", "TTFT p50 / p95 ms")
HEAD += ("idle", "load s", "run s", "errors")

Run = dict[str, Any]  # what `marsinfer batch --json` says of it


def write_documents(path: Path, count: int, lengths: tuple[int, int], model: str) -> None:
    """As many documents as `count`, their lengths drawn evenly from a range in tokens of the model."""
    texts = [json.loads(line)["text"] for line in LICENSES.read_text(encoding="utf-8").splitlines()]
    words = " ".join(dict.fromkeys(texts)).split()
    tokenizer = open_model(ModelSettings(model=model, device="cpu")).tokenizer
    words_a_token = len(words) / len(tokenizer(" ".join(words), verbose=False)["input_ids"])
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            length, first = round(draw.randint(*lengths) * words_a_token), draw.randrange(len(words))
            piece = (words[(first + n) % len(words)] for n in range(length))
            file.write(json.dumps({"text": " ".join(piece)}) + "\n")


def measured(source: Path, output: Path, flags: list[str]) -> Run:
    command = [sys.executable, "-m", "marsinfer_cli", "batch", str(source), str(output)]
    command += ["--question", QUESTION, "--overwrite", "--json", "--quiet", *flags]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def rate(run: Run) -> float:
    """Documents a second."""
    return run["ok"] / run["answering_s"] if run["answering_s"] else 0.0


def row(method: str, engine: str, runs: list[Run], one_worker: list[Run] | None) -> list[str]:
    run = median(runs)
    rates = [rate(each) for each in runs]
    spread = f" ({min(rates):.3g}-{max(rates):.3g})" if len(runs) > 1 else ""
    workers = run["workers"] or 1
    seconds = run["answering_s"]
    if not seconds:
        return [method, engine, str(workers), *"-" * 7, str(run["errors"])]
    return [
        method,
        engine,
        str(workers),
        f"{rate(run):.3g}{spread}",
        f"{rate(run) / rate(median(one_worker)):.2f}" if one_worker else "-",
        f"{run['prompt_tokens'] / seconds:,.0f}",
        f"{run['ttft_ms_p50']:,.0f} / {run['ttft_ms_p95']:,.0f}",
        f"{1 - (run['prefill_s'] + run['decode_s']) / (workers * seconds):.1%}",
        f"{run['load_s']:.1f}",
        f"{run['seconds']:.1f}",
        str(run["errors"]),
    ]


def median(runs: list[Run]) -> Run:
    return sorted(runs, key=rate)[len(runs) // 2]


def conditions(output: Path) -> str:
    """What the numbers depend on, as the output's metadata has it."""
    told = json.loads(pq.read_schema(output).metadata[b"marsinfer"])
    dtype = told["settings_that_decide"]["model"]["dtype"].removeprefix("torch.")
    versions = ", ".join(f"{name} {told['versions'][name]}" for name in ("torch", "transformers"))
    attention = told["attention"]["backend"]
    return f"model {told['model']}, device {told['device']}, dtype {dtype}, attention {attention}, {versions}"


def flags_of(method: str) -> list[str]:
    name, *settings = method.split(":")
    return ["--method", name, *(word for each in settings for word in ("--set", each.replace("/", ",")))]


def parse_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    return parse_count("--lengths", first), parse_count("--lengths", last or first)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--lengths", type=parse_range, default="80-240", metavar="N[-N]", help="in tokens")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--methods", default="marsinfer")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--max-new-tokens", default="8")
    parser.add_argument("--repeats", type=int, default=1, help="of each run, in turn")
    parser.add_argument("--local", action=argparse.BooleanOptionalAction, default=True)
    arguments, others = parser.parse_known_args()
    engines = {"local": ["--engine", "local"]} if arguments.local else {}
    engines |= {f"ray {n}": ["--engine", "ray", "--workers", n] for n in arguments.workers.split(",")}
    methods = arguments.methods.split(",")
    common = ["--model", arguments.model, "--max-new-tokens", arguments.max_new_tokens, *others]
    runs: dict[tuple[str, str], list[Run]] = {
        (method, engine): [] for method in methods for engine in engines
    }
    with tempfile.TemporaryDirectory() as name:
        source, output = Path(name) / "in.jsonl", Path(name) / "out.parquet"
        write_documents(source, arguments.documents, arguments.lengths, arguments.model)
        for turn in range(arguments.repeats):
            for (method, engine), done in runs.items():
                run = measured(source, output, [*flags_of(method), *engines[engine], *common])
                done.append(run)
                print(f"{turn + 1}: {method}, {engine}: {run['seconds']:.1f} s", file=sys.stderr, flush=True)
        print(f"{conditions(output)}, {run['prompt_tokens']:,} prompt tokens\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for (method, engine), done in runs.items():
        print(f"| {' | '.join(row(method, engine, done, runs.get((method, 'ray 1'))))} |")


if __name__ == "__main__":
    main()
