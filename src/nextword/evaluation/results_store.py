"""What was measured on a run's model stays in its run folder, and the run's report and card tell it."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nextword.common.console import Console
from nextword.common.errors import NextwordError
from nextword.common.results import Measurements, When, keep
from nextword.common.run_dir import RunFolder
from nextword.pipeline.language_model import Paths, as_list
from nextword.reporting.task_results import name_of


def refuse_damaged(path: str | Path) -> None:
    """Before anything is measured: raises `CorruptFile` where what a run has kept so far cannot be read."""
    if RunFolder(Path(path)).begun:
        Measurements.read(Path(path))


def keep_in_run(
    path: str | Path, result: Mapping[str, Any], texts: Paths, console: Console, *,
    of_text: Mapping[str, Any], of_suites: Mapping[str, Any],
) -> None:  # fmt: skip
    """Keep a result of `evaluate` where the model was named by its run folder, and draw its report and card anew. A folder
    that cannot be written to is told of, and does not undo what was measured.

    Args:
        of_text, of_suites: the arguments that matter to what they say; those that were not given are left out.
    """
    run = RunFolder(Path(path))
    if not run.begun:
        return
    from nextword.reporting.report import refresh  # what draws takes half a second to import

    now = datetime.now(UTC).isoformat(timespec="seconds")
    said = [
        When(now, {name: one for name, one in given.items() if one not in (None, False)})
        for given in (of_text, of_suites)
    ]
    name = ", ".join(name_of(str(text)) for text in as_list(texts)) or "held-out text"
    try:
        keep(run.path, result, name, *said)
        refresh(run.path, console.say)
    except NextwordError as error:
        console.warn(f"what was measured is not kept in the run folder: {error}")
