"""Dot plots of scores, and audit findings by section."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from nextword.common.results import AuditFinding, BenchmarkResult, ScoreWithCI, StoredResults
from nextword.reporting import formatting as fmt
from nextword.reporting.task_results import THIS_MODEL, TaskResults

SECTION_TITLES = {
    "bias": "Social bias",
    "memory": "Memorisation of training text",
    "corpus": "Training corpus",
    "cost": "Energy and carbon",
}


# ---------------------------------------------------------------- dot plots


@dataclass(frozen=True)
class DotRow:
    """A row of a dot plot: a score with its interval, and the score of guessing and of shuffled words if there are any."""

    label: str
    score: ScoreWithCI
    is_highlighted: bool
    chance: float | None = None
    shuffled: float | None = None


@dataclass(frozen=True)
class DotPlot:
    """Scores on one axis, drawn in HTML and CSS. `ticks` are the marks of the axis, its ends included."""

    caption: str
    description: str
    rows: list[DotRow]
    ticks: Sequence[float]

    def position(self, value: float) -> str:
        """Distance of a value from the start of the axis, as a CSS percentage."""
        return self.width(self.ticks[0], max(self.ticks[0], min(self.ticks[-1], value)))

    def width(self, low: float, high: float) -> str:
        return f"{100 * (high - low) / (self.ticks[-1] - self.ticks[0]):.2f}%"


def task_score_plot(results: TaskResults) -> DotPlot | None:
    """The selection metric of the model, the base model and the baselines; None for one score without an interval."""
    scores = results.metric_scores
    values = [x for _, score in scores for x in (score.value, score.low, score.high) if x is not None]
    if len(values) < 2:
        return None
    low, high = min(values), max(values)
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0.0 if 0 < low < 0.6 * high else low, high)
    description = "; ".join(f"{system} {fmt.score(score)}" for system, score in scores)
    return DotPlot(
        caption=f"{results.info.name} on the validation set, with 95 % confidence intervals",
        description=f"{results.info.name}: {description}.",
        rows=[DotRow(system, score, system == THIS_MODEL) for system, score in scores],
        ticks=[float(tick) + 0.0 for tick in ticks],
    )


def benchmark_plot(benchmarks: Sequence[BenchmarkResult]) -> DotPlot | None:
    """The benchmarks for which guessing has a score, on one axis from 0 to 1."""
    plotted = [
        benchmark for benchmark in benchmarks if benchmark.chance is not None and 0 <= benchmark.score.value <= 1
    ]
    if not plotted:
        return None
    description = "; ".join(f"{entry.name} {fmt.score(entry.score)}, {fmt.versus_chance(entry)}" for entry in plotted)
    return DotPlot(
        caption="Benchmark scores with 95 % confidence intervals. Vertical line: chance. Ring: score with the words shuffled. "
        "Grey: not significantly different from chance.",
        description=f"{description}.",
        rows=[
            DotRow(
                benchmark.name,
                benchmark.score,
                benchmark.chance_side is not None,
                benchmark.chance,
                benchmark.shuffled_control and benchmark.shuffled_control.value,
            )
            for benchmark in plotted
        ],
        ticks=[0.0, 0.25, 0.5, 0.75, 1.0],
    )


# ---------------------------------------------------------------- audits


def group_by_section(findings: Sequence[AuditFinding]) -> dict[str, list[AuditFinding]]:
    """Findings by section, in the order of `SECTION_TITLES`, unknown sections last."""
    names = dict.fromkeys([*SECTION_TITLES, *(finding.section for finding in findings)])
    sections = {name: [finding for finding in findings if finding.section == name] for name in names}
    return {name: group for name, group in sections.items() if group}


def results_context(stored: StoredResults) -> dict[str, Any]:
    """The variables of `results.html`."""
    return {
        "stored": stored,
        "benchmark_plot": benchmark_plot(stored.benchmarks),
        "findings_by_section": group_by_section(stored.findings),
        "section_titles": SECTION_TITLES,
    }
