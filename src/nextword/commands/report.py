"""``nextword report``: the report page of a run, or the comparison of several."""

from pathlib import Path

from nextword.commands.command import Context, command
from nextword.commands.shared import as_paths, check_output_file, optional
from nextword.common.errors import UsageError
from nextword.common.options import argument, option, options


@options
class ReportConfig:
    """Write the report of a run, or a page that compares several runs.

    The report and the model card of one run are written anew with all results of evaluate and audit. The comparison of
    several runs shows their results, training curves, differences of settings and generated samples side by side.

    Attributes:
        runs: One run directory or several.
        out: The page of several runs. Default: comparison.html.
    """

    runs: tuple[Path, ...] = argument(converter=as_paths)
    out: Path | None = option(default=None, converter=optional(Path), kw_only=False)


@command(ReportConfig, example="nextword report runs/mine", to_dict=lambda page: {"reports": [str(page)]})
def report(config: ReportConfig, context: Context) -> Path:
    """Write the page of one run or of several."""
    from nextword.reporting.comparison import write_comparison
    from nextword.reporting.report import regenerate

    run, *others = config.runs
    if others:
        out = config.out or Path("comparison.html")
        check_output_file(out, *config.runs)
        return write_comparison(config.runs, out)
    if config.out is not None:
        raise UsageError(f"--out is for the page of several runs; the report of one is {run / 'report.html'}")
    return regenerate(run)
