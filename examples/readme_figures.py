"""The README's numbers and its picture, from examples/results/ and from the program's own arithmetic.

    python examples/readme_figures.py            # writes README.md and examples/results/readme.svg anew
    python examples/readme_figures.py --check    # exit code 1 if they are not what this would write

`examples/results/readme.toml` names the tables that are quoted, each with its date and card. A
table is found by its file, the heading of its section and the names of its columns. The picture needs the
extra `plot`.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

CHECKOUT = Path(__file__).parents[1]
RESULTS = CHECKOUT / "examples" / "results"
README = CHECKOUT / "README.md"
PICTURE = RESULTS / "readme.svg"
BEGINNING = "<!-- made by: python examples/readme_figures.py {} -->\n"
END = "<!-- end of what is made -->\n"
MODELS = ("qwen2.5-1.5b", "qwen2-7b", "qwen3-8b", "gpt-oss-20b", "qwen3-30b-a3b", "llama-3.1-70b")
LENGTHS = (8_192, 32_768, 131_072)
NEW_TOKENS = 256  # of the answer for which room is counted
BF16_BYTES = 2

Row = dict[str, str]  # cells by the names of their columns


# --- tables of results


def section(text: str, heading: str) -> str:
    """From a heading to the next one of its level or above. Raises ValueError where there is none."""
    found = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"no heading {heading!r}")
    level = len(found[1])
    return re.split(rf"^#{{1,{level}}} ", text[found.end() :], maxsplit=1, flags=re.MULTILINE)[0]


def tables(text: str) -> list[list[Row]]:
    """All Markdown tables of a text; marks of emphasis are left out."""
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    made = []
    for block in blocks:
        names, _, *rows = (
            [cell.strip(" *`") for cell in line.strip("|").split("|")] for line in block.splitlines()
        )
        made.append([_row(names, cells) for cells in rows])
    return made


def _row(names: Sequence[str], cells: Sequence[str]) -> Row:
    """Of columns that share a name, such as rates and ratios of one variant, the first counts."""
    row: Row = {}
    for name, cell in zip(names, cells, strict=True):
        row.setdefault(name, cell)
    return row


def quoted(about: Mapping[str, Any], columns: Sequence[str], date: str, card: str) -> dict[str, Row]:
    """The rows of the table with these columns, by their first cell. Raises ValueError if there is none."""
    text = (RESULTS / about["file"]).read_text(encoding="utf-8")
    own = section(text, about["heading"])
    told = text.partition("\n## ")[0] + own
    for word in (date, card):
        if word not in told:
            raise ValueError(f"{about['file']}, {about['heading']!r}: nothing says {word!r}")
    for table in tables(own):
        if table and set(columns) <= table[0].keys():
            return {next(iter(row.values())): row for row in table}
    raise ValueError(f"{about['file']}, {about['heading']!r}: no table has the columns {', '.join(columns)}")


def number(cell: str) -> float:
    """The first number of a cell."""
    found = re.search(r"-?[\d,]*\.?\d+", cell)
    if found is None:
        raise ValueError(f"no number in {cell!r}")
    return float(found[0].replace(",", ""))


def interval(cell: str) -> tuple[float, float]:
    """Of a drop such as `0.10 (-1.12 to 1.32)`; that of dense itself is nothing."""
    found = re.search(r"\((-?[\d.]+) to (-?[\d.]+)\)", cell)
    return (float(found[1]), float(found[2])) if found else (0.0, 0.0)


# --- what is quoted


def measured() -> dict[str, Any]:
    """All numbers of the README that were measured, as plain values."""
    settings = tomllib.loads((RESULTS / "readme.toml").read_text(encoding="utf-8"))
    accuracy, throughput = settings["accuracy"], settings["throughput"]
    keys = ("right", "drop", "fast", "ttft")
    names = [accuracy[key] for key in keys]
    rows = quoted(accuracy, names, accuracy["date"], accuracy["card"])
    variants = [*throughput["peers"], *throughput["ours"]]
    works = quoted(throughput, variants, throughput["date"], throughput["card"])
    return {
        "accuracy": {
            "about": accuracy["about"],
            "card": accuracy["card"],
            "date": accuracy["date"],
            "file": accuracy["file"],
            "rows": {
                label: dict(zip(keys, (rows[cell][name] for name in names), strict=True))
                for cell, label in accuracy["rows"].items()
            },
        },
        "throughput": {
            "about": throughput["about"],
            "card": throughput["card"],
            "date": throughput["date"],
            "file": throughput["file"],
            "peers": throughput["peers"],
            "hourly": throughput["hourly"],
            "works": {work: {name: row[name] for name in variants} for work, row in works.items()},
        },
    }


def accuracy_block(told: Mapping[str, Any]) -> str:
    own = told["accuracy"]
    lines = [
        f"{own['about']}, one {own['card']}, {own['date']}, dense and pruned on the same rows",
        f"([`{own['file']}`](examples/results/{own['file']})):\n",
        "| settings | right tokens | drop in points, 95% interval | times as fast | TTFT ms, long prompts |",
        "|---|---|---|---|---|",
    ]
    for label, row in own["rows"].items():
        lines.append(f"| {label} | {row['right']} | {row['drop']} | {row['fast']} | {row['ttft']} |")
    return "\n".join([*lines, ""])


def throughput_block(told: Mapping[str, Any]) -> str:
    own = told["throughput"]
    variants = list(next(iter(own["works"].values())))
    hourly = [f"{name}, an hour" for name in own["hourly"]]
    lines = [
        f"Documents a second of whole jobs on {own['about']}, one {own['card']}, {own['date']}, and",
        f"documents an hour for ours ([`{own['file']}`](examples/results/{own['file']})):\n",
        f"| documents x tokens x new tokens | {' | '.join([*variants, *hourly])} |",
        "|---" * (1 + len(variants) + len(hourly)) + "|",
    ]
    for work, rates in own["works"].items():
        hours = [f"{significant(3600 * number(rates[name])):,}" for name in own["hourly"]]
        lines.append(f"| {work} | {' | '.join([*rates.values(), *hours])} |")
    return "\n".join([*lines, ""])


def significant(value: float) -> int:
    """To three digits."""
    return int(float(f"{value:.3g}"))


# --- memory, by arithmetic


def memory_block() -> str:
    """What the program's own planning counts: weights, and one document alone beside them."""
    import torch

    from pipeline.checkpoints.building import bytes_needed
    from pipeline.checkpoints.random_weights import PREFIX, RandomWeights
    from pipeline.engines.memory import Packer
    from pipeline.families.configuration import shape_of
    from pipeline.families.projection import LinearPrecision
    from pipeline.pruning.registry import make_method

    lines = [
        f"GB (1e9 bytes) in bfloat16; a document's share has room for {NEW_TOKENS} new tokens:\n",
        "| model | weights | in fp8 | mixed | " + " | ".join(f"{n:,} tokens" for n in LENGTHS) + " |",
        "|---" * (4 + len(LENGTHS)) + "|",
    ]
    for name in MODELS:
        config = RandomWeights(name=PREFIX + name).config()
        shape = shape_of(config)
        held = [
            bytes_needed(config, torch.bfloat16, LinearPrecision(linears=linears))[0]
            for linears in ("auto", "fp8", "mixed")
        ]
        packer = Packer(
            device=torch.device("cuda"),  # on which nothing is put
            method=make_method("dense"),
            shape=shape,
            itemsize=BF16_BYTES,
            new_tokens=NEW_TOKENS,
            pack_tokens=1,
            max_bytes=0,
        )
        planned = [packer.planned_bytes([n]) if n <= shape.context else None for n in LENGTHS]
        cells = ["over the context" if each is None else f"{each / 1e9:.1f}" for each in [*held, *planned]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


# --- the README and the picture


def blocks() -> dict[str, str]:
    told = measured()
    return {
        "accuracy": accuracy_block(told),
        "throughput": throughput_block(told),
        "memory": memory_block(),
    }


def filled(text: str) -> str:
    """The README with its made parts anew. Raises ValueError for a part that is not there."""
    for name, block in blocks().items():
        before, mark, rest = text.partition(BEGINNING.format(name))
        _, end, after = rest.partition(END)
        if not mark or not end:
            raise ValueError(f"README.md has no part {name!r}")
        text = before + mark + block + end + after
    return text


def drawn() -> dict[str, Any]:
    """The numbers that the picture was drawn from, as it says itself."""
    for element in ElementTree.parse(PICTURE).iter("{http://purl.org/dc/elements/1.1/}description"):
        return json.loads(element.text or "{}")
    return {}


def draw(told: Mapping[str, Any]) -> None:
    """Two panels: right tokens against TTFT, and documents a second as shares of the first peer's."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    style = {"svg.fonttype": "none", "svg.hashsalt": "marsinfer", "font.size": 8, "axes.spines.top": False}
    with matplotlib.rc_context({**style, "axes.spines.right": False}):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(9, 3.2), width_ratios=(2, 3), layout="constrained"
        )
        _draw_accuracy(left, told)
        _draw_throughput(right, told)
        figure.savefig(PICTURE, metadata={"Date": None, "Description": json.dumps(told)})
        pyplot.close(figure)


def _draw_accuracy(axes: Any, told: Mapping[str, Any]) -> None:
    rows = told["accuracy"]["rows"]
    dense = number(next(iter(rows.values()))["right"])
    for mark, (label, row) in zip("os^Dvp*", rows.items(), strict=False):
        low, high = interval(row["drop"])
        value = number(row["right"])
        error = [[max(0.0, value - (dense - high))], [max(0.0, dense - low - value)]]
        axes.errorbar(number(row["ttft"]), value, yerr=error, fmt=mark, capsize=3, label=label)
    axes.set(xlim=(0, None), ylim=(dense - 5, dense + 5))
    axes.set(xlabel="time to first token, ms (long prompts)", ylabel="right tokens, %")
    axes.set_title(f"Right tokens against TTFT, {told['accuracy']['about']}", fontsize=8)
    axes.legend(loc="lower left", frameon=False)


def _draw_throughput(axes: Any, told: Mapping[str, Any]) -> None:
    own = told["throughput"]
    first, *_ = own["peers"]
    variants = list(next(iter(own["works"].values())))
    width = 0.85 / len(variants)
    for place, name in enumerate(variants):
        rates = [number(rates[name]) / number(rates[first]) for rates in own["works"].values()]
        across = [work + place * width for work in range(len(rates))]
        color = str(0.75 - 0.2 * place) if name in own["peers"] else None
        bars = axes.bar(across, rates, width, label=name, color=color)
        texts = [rates[name] for rates in own["works"].values()]
        axes.bar_label(bars, labels=texts, fontsize=5.5)
    axes.set_xticks([work + 0.4 - width / 2 for work in range(len(own["works"]))], list(own["works"]))
    axes.set(ylabel=f"{first} = 1", ylim=(0, 2.4))
    axes.set(xlabel="documents x prompt tokens x new tokens")
    axes.set_title(f"Documents a second, {own['about']}", fontsize=8)
    axes.legend(ncols=3, loc="upper left", frameon=False)


def main(arguments: Sequence[str]) -> int:
    """The exit code: 1 where --check finds a difference, 2 for what cannot be quoted."""
    text = README.read_text(encoding="utf-8")
    try:
        told, made = measured(), filled(text)
    except (OSError, KeyError, ValueError) as error:
        print(f"readme_figures: {error}", file=sys.stderr)
        return 2
    if "--check" in arguments:
        same = made == text and drawn() == told
        print("as the results say" if same else "run python examples/readme_figures.py", file=sys.stderr)
        return 0 if same else 1
    README.write_text(made, encoding="utf-8")
    draw(told)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
