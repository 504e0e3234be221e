"""A baseline: results in a Parquet file, to be compared with again and again.

It holds dense's, and a method's as they were accepted last, of which only the rows have to be the same. Of
dense's it holds what decides them too, and is refused where that, or a row, differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError
from pipeline.evaluate.check_rows import CheckRow
from pipeline.evaluate.row_results import RowResult
from pipeline.outputs.beginnings import check_settings, plain
from pipeline.outputs.own import BASELINE_KEY
from pipeline.storage.whole_file import writing

VERSION = 3
_DENSE_ALONE = 2  # the version before, which says of no row whose it is
_ANEW = "--overwrite-baseline makes it anew"
_DENSE = "dense"
_SIDES = (_DENSE, "accepted")

_TEXT, _COUNT, _NUMBER = pa.string(), pa.int64(), pa.float64()
_SCHEMA = pa.schema(
    [
        *((name, _TEXT) for name in ("side", "id", "task", "document_key", "row_hash", "generated")),
        *((name, _COUNT) for name in ("prompt_tokens", "tokens", "correct", "agreed", "parted_at")),
        *((name, _NUMBER) for name in ("nll", "ttft_ms", "kept_ratio", "ffn_ratio", "flops_ratio")),
        *((name, _NUMBER) for name in ("attention_ratio", "kv_ratio", "divergence", "parts_found")),
        *((name, pa.list_(pa.int32())) for name in ("answer", "choices", "probes")),
        *((name, pa.list_(pa.float32())) for name in ("logprobs", "probed")),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Results by id: dense's, and a method's that were accepted, if any were."""

    dense: dict[str, RowResult]
    accepted: dict[str, RowResult]  # none, or of every row
    about: Mapping[str, Any]  # decides nothing
    is_whole: bool  # whether it has no other rows than those that were asked for


def write_baseline(
    path: Path,
    dense: Sequence[RowResult],
    accepted: Sequence[RowResult],
    decides: Mapping[str, Any],
    about: Mapping[str, Any],
) -> None:
    """Store results; what `about` says decides nothing. Raises StorageError."""
    content = {"version": VERSION, "settings_that_decide": plain(decides), "about": plain(about)}
    schema = _SCHEMA.with_metadata({BASELINE_KEY: json.dumps(content)})
    rows = [
        {"side": side, **result.as_dict()}
        for side, own in zip(_SIDES, (dense, accepted), strict=True)
        for result in own
    ]
    with writing(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema), file)


def read_baseline(path: Path, rows: Sequence[CheckRow], decides: Mapping[str, Any]) -> Baseline:
    """The results of `rows`.

    Raises ConfigError for one that cannot be read, has other settings, or lacks one of the rows as it is.
    """
    found: dict[str, dict[str, RowResult]] = {side: {} for side in _SIDES}
    try:
        table = pq.read_table(path)
        content = json.loads((table.schema.metadata or {})[BASELINE_KEY])
        if content["version"] not in (_DENSE_ALONE, VERSION):
            raise ConfigError(f"--baseline {path} is of another version of marsinfer; {_ANEW}")
        for each in table.to_pylist():
            side = each.get("side", _DENSE)
            found[side][each["id"]] = RowResult.from_dict(each, is_dense=side == _DENSE)
        then, about = content["settings_that_decide"], content["about"]
    except (OSError, pa.ArrowException, LookupError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--baseline {path} is no baseline of marsinfer check; name another file, which will be made"
        ) from error
    check_settings(path, then, plain(decides), _ANEW)
    for side, results in found.items():
        for row in rows if results or side == _DENSE else ():
            what = _misfit(row, results.get(row.sample.id))
            if what is not None:
                raise ConfigError(f"--baseline {path} is of other rows: {row.sample.id!r} {what}; {_ANEW}")
    dense, accepted = ({row.sample.id: own[row.sample.id] for row in rows if own} for own in found.values())
    return Baseline(dense=dense, accepted=accepted, about=about, is_whole=len(found[_DENSE]) == len(rows))


def baseline_settings(path: Path) -> dict[str, Any]:
    """With which settings it was made; none where it is not there, or is none, which reading it tells."""
    try:
        return dict(json.loads((pq.read_schema(path).metadata or {})[BASELINE_KEY])["settings_that_decide"])
    except (OSError, pa.ArrowException, LookupError, ValueError, TypeError):
        return {}


def _misfit(row: CheckRow, result: RowResult | None) -> str | None:
    if result is None:
        return "is not in it"
    return None if result.row_hash == row.row_hash else "has another text, question or reference there"
