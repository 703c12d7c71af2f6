"""Rows as the text of a table, in the format that the name of the file says."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from nextword.common.errors import UsageError
from nextword.common.fs import finite
from nextword.data.issues import replace_surrogates

WRITABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
UNSUPPORTED_SUFFIXES = (".parquet", ".xlsx", ".xls", ".ods", ".feather", ".arrow", ".gz", ".zst", ".bz2", ".zip")


def check_table_suffix(path: Path) -> None:
    """Raise `UsageError` for the name of a table in a format that is not written. A name without a format is JSON Lines."""
    if path.suffix.lower() in UNSUPPORTED_SUFFIXES:
        raise UsageError(f"--out {path}: {path.suffix} is not written; choose {', '.join(WRITABLE_SUFFIXES)}")


def to_plain_value(value: Any) -> Any:
    """A value as JSON can hold it: a number that is not finite becomes None, and a date its text."""
    return json.loads(json.dumps(finite(value), default=str))


def format_table(rows: Sequence[dict[str, Any]], path: Path) -> str:
    """The rows as CSV, TSV, JSON or else JSON Lines, by the suffix of the file.

    CSV and TSV have a column for each name, in the order of their first occurrence, and one for the probability of each label:
    probability_LABEL. Their cells hold lists and objects as JSON.
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv"):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        return "[\n" + ",\n".join(lines) + "\n]\n" if suffix == ".json" else "".join(f"{line}\n" for line in lines)
    flat = [dict(_cells(row)) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return replace_surrogates(file.getvalue())


def _cells(row: dict[str, Any]) -> list[tuple[str, Any]]:
    cells: list[tuple[str, Any]] = []
    for name, value in row.items():
        if name == "probabilities" and isinstance(value, dict):
            probabilities = cast(dict[str, float], value)
            cells += [(f"probability_{label}", probability) for label, probability in probabilities.items()]
        else:
            cells.append((name, json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value))
    return cells
