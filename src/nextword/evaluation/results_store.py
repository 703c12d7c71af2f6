"""What was measured on a run's model stays in its run folder, and the run's report and card tell it."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nextword.common.console import Console
from nextword.common.errors import NextwordError
from nextword.common.results import Provenance, StoredResults, save_results, short_path_name
from nextword.common.run_dir import RunDir
from nextword.pipeline.language_model import Paths, as_list


def check_results_readable(path: str | Path) -> None:
    """Before anything is measured: raises `CorruptFile` where what a run has kept so far cannot be read."""
    if RunDir(Path(path)).exists:
        StoredResults.load(Path(path))


def save_results_to_run(
    path: str | Path, result: Mapping[str, Any], texts: Paths, console: Console, *,
    text_settings: Mapping[str, Any], benchmark_settings: Mapping[str, Any],
) -> None:  # fmt: skip
    """Keep a result of `evaluate` where the model was named by its run folder, and draw its report and card anew. A folder
    that cannot be written to is told of, and does not undo what was measured.

    Args:
        of_text, of_suites: the arguments that matter to what they say; those that were not given are left out.
    """
    run = RunDir(Path(path))
    if not run.exists:
        return
    from nextword.reporting.report import refresh_unmodified  # what draws takes half a second to import

    now = datetime.now(UTC).isoformat(timespec="seconds")
    provenance = [
        Provenance(now, {name: one for name, one in given.items() if one not in (None, False)})
        for given in (text_settings, benchmark_settings)
    ]
    name = ", ".join(short_path_name(str(text)) for text in as_list(texts)) or "held-out text"
    try:
        save_results(run.path, result, name, *provenance)
        refresh_unmodified(run.path, console.info)
    except NextwordError as error:
        console.warn(f"what was measured is not kept in the run folder: {error}")
