"""Dense and pruned answers to the questions of licenses.jsonl, and the scores of both.

    python examples/demo.py [MODEL]

Each row is answered by both methods before the next one is, and which is first changes from row to row: what
else the machine does slows both alike. An answer is a run of one row; the model is loaded once.
"""

import os
import sys
from pathlib import Path

import pyarrow.parquet as pq
import score

import pipeline  # which imports the rest when it is used

EXAMPLES = Path(__file__).parent
FOLDER = Path("demo")
METHODS: dict[str, dict[str, int]] = {"dense": {}, "marsinfer": {"start_layer": 20}}
OPTIONS = {
    "question_column": "question",
    "id_column": "id",
    "max_new_tokens": 32,
    "group": "off",
    "pack_tokens": 1,
    "overwrite": True,
}


def main(arguments: list[str]) -> int:
    """The exit code: that of the scores, or of what went wrong before."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries, which read this when they are imported
    name = arguments[0] if arguments else "smollm2-135m"
    source = EXAMPLES / "licenses.jsonl"
    rows = len(score.read_references(source))
    print("Row by row in turn, in one process, what these two commands do one after the other:\n")
    for method in METHODS:
        print(f"    {command(name, method)}\n")
    try:
        model = pipeline.load_model(name)
        for row in range(rows):
            order = list(METHODS) if row % 2 == 0 else list(reversed(METHODS))
            answers = {method: answered(source, model, method, row, rows) for method in order}
            print(told(row, rows, {method: answers[method] for method in METHODS}), flush=True)
    except pipeline.MarsError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code
    print()
    return score.main([str(source), *(str(FOLDER / method) for method in METHODS)])


def command(model: str, method: str) -> str:
    """The command line that answers all rows with one method."""
    flags = [f"--{key.replace('_', '-')} {value}" for key, value in OPTIONS.items() if value is not True]
    flags += [f"--set {key}={value}" for key, value in METHODS[method].items()]
    words = ["marsinfer batch examples/licenses.jsonl", f"{FOLDER}/{method}.parquet", f"--model {model}"]
    return " ".join([*words, f"--method {method}", *flags, "--overwrite"])


def answered(source: Path, model: object, method: str, row: int, rows: int) -> dict:
    """A row's columns, as the run of that row alone wrote them."""
    output = FOLDER / method / f"{row}.parquet"
    output.parent.mkdir(parents=True, exist_ok=True)
    shard = f"{row + 1}/{rows}"
    pipeline.run_batch(
        str(source), str(output), model=model, method=method, settings=METHODS[method], shard=shard, **OPTIONS
    )
    (answer,) = pq.read_table(output).to_pylist()
    return answer


def told(row: int, rows: int, answers: dict[str, dict]) -> str:
    """One line: how long each method took to a row's first token."""
    first = next(iter(answers.values()))
    taken = [f"{method} {seconds(answer)}" for method, answer in answers.items()]
    return f"{row + 1}/{rows}  {first['id']}: {first['prompt_tokens']} tokens, TTFT {', '.join(taken)}"


def seconds(answer: dict) -> str:
    """Until the first token, as the run measured it; without an answer the row's status."""
    return f"{answer['ttft_ms'] / 1e3:.1f} s" if answer["status"] == "ok" else f"({answer['status']})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
