"""Stores results of `nextword evaluate` in the run directory of the evaluated model."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nextword.common.fs import atomic_write, read_json
from nextword.common.results import EVALUATION_FILE, Provenance, StoredResults, weights_digest


def make_provenance(arguments: Mapping[str, Any]) -> Provenance:
    """The present time, and the arguments of an evaluation that are set."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Provenance(now, {name: value for name, value in arguments.items() if value not in (None, False)})


def save_results(
    run_dir: Path,
    result: Mapping[str, Any],
    text_name: str,
    text_provenance: Provenance,
    benchmark_provenance: Provenance,
) -> None:
    """Add the result of `nextword evaluate` to a run directory.

    It replaces older results of the same names. All results of other weights than the run has now are removed.

    Args:
        run_dir: The run directory.
        result: The result, as in `nextword evaluate --json`.
        text_name: Name of the evaluated text.
        text_provenance: When and how the text was evaluated.
        benchmark_provenance: When and how the benchmarks were evaluated.

    Raises:
        CorruptFileError: The stored results cannot be read.
    """
    path = run_dir / EVALUATION_FILE
    StoredResults.load(run_dir)  # do not overwrite a file that a user has damaged
    previous = read_json(path) if path.is_file() else {}
    weights = weights_digest(run_dir)
    retained = previous if previous.get("weights") == weights else {}
    texts, benchmarks = dict(retained.get("texts") or {}), dict(retained.get("suites") or {})
    if "loss" in result:
        text_result = {key: value for key, value in result.items() if key != "suites"}
        texts[text_name] = text_result | {"measured": asdict(text_provenance)}
    for name, benchmark in result.get("suites", {}).items():
        benchmarks[name] = benchmark | {"measured": asdict(benchmark_provenance)}
    path.parent.mkdir(exist_ok=True)
    document = {"weights": weights, "texts": texts, "suites": benchmarks}
    atomic_write(path, json.dumps(document, indent=2) + "\n")  # in ASCII, because file names may hold any bytes
