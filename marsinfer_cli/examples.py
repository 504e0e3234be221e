"""One example of each command, as its --help ends with it."""

from __future__ import annotations

EXAMPLES = {
    "batch": "marsinfer batch contracts.parquet answers.parquet --question-column question --resume",
    "check": "marsinfer check contracts.parquet --question-column question --reference-column answer "
    "--method marsinfer --set start_layer=18 --scope rows --baseline accepted.parquet",
    "calibrate": "marsinfer calibrate contracts.parquet --question-column question --max-drop 2pt "
    "--minutes 10 --out profile.toml",
    "merge": "marsinfer merge answers.parquet answers-1.parquet answers-2.parquet",
    "report": "marsinfer report answers.parquet --html report.html",
    "methods": "marsinfer methods marsinfer",
    "doctor": "marsinfer doctor --json > doctor.json",
    "bench ttft": "marsinfer bench ttft --methods dense,marsinfer:share=0.5 --lengths 8k,32k "
    "--model random:qwen2-7b",
    "bench batch": "marsinfer bench batch contracts.parquet --method marsinfer --limit 200",
    "bench attention": "marsinfer bench attention --shape llama-3.1-8b --packs '32k;4x8k'",
    "bench offload": "marsinfer bench offload --lengths 128k --kv-memory 4GiB --model random:llama-3.1-8b",
    "bench decode": "marsinfer bench decode --documents 8 --lengths 32k --model random:qwen2-7b",
    "bench accuracy": "marsinfer bench accuracy --suite leval:leval --methods mars,marsinfer:eta=0.99",
}


def epilog(command: str) -> str:
    """The end of a command's --help."""
    return f"Example: {EXAMPLES[command]}"
