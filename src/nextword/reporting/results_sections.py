"""What was measured on a run's model, as parts of its page: texts, suites beside chance, and what an audit has found."""

from collections.abc import Iterable, Sequence

from nextword.common.results import AuditFinding, BenchmarkResult, Provenance, ScoreWithCI, StoredResults
from nextword.reporting.run_data import escape_html, render_figure, render_section

# What an audit's sections are called on a page; one that is not named here goes by its own name.
SECTION_TITLES = {
    "bias": "Bias",
    "memory": "Memory of the training text",
    "corpus": "The training text",
    "cost": "Cost",
}
MAX_GROUPS, MAX_EXAMPLES = 40, 10
# Beside a finding that is to be read before a model is used: a shape, for the dots are runs.
FLAGGED_BADGE = '<span class="mark" aria-hidden="true">▲</span><span class="unseen"> to be read: </span> '


def results_sections(stored_results: StoredResults) -> str:
    """The page's parts about all that was measured; nothing where nothing was."""
    stale_note = (
        "<p>These were measured before the run's weights changed: measure them again.</p>"
        if stored_results.stale
        else ""
    )
    evaluated = "".join(
        (
            stale_note,
            texts_table(stored_results),
            benchmarks_plot(stored_results.benchmarks),
            benchmarks_table(stored_results.benchmarks),
        )
    )
    groups = "".join(groups_table(suite) for suite in stored_results.benchmarks)
    return render_section(
        "Evaluation", evaluated + groups, bool(stored_results.texts or stored_results.benchmarks)
    ) + audit_section(stored_results.findings)


# ---------------------------------------------------------------- numbers in words


def format_number(value: float, unit: str | None = None) -> str:
    """As many digits as a score deserves, or a finding of a unit: a percentage one, what is counted none; with a true minus."""
    if unit is None:
        number_format = f"z,.{3 if abs(value) < 10 else 2}f"
    elif float(value).is_integer() or abs(value) >= 1000:
        number_format = "z,.0f"
    else:
        number_format = "z.1f" if unit == "%" and abs(value) >= 0.05 else ".2g" if abs(value) < 0.1 else ".3g"
    return f"{value:{number_format}}".replace("-", "−")


def format_interval(score: ScoreWithCI, unit: str | None = None) -> str:
    """ "0.578 to 0.640", or nothing where none is known."""
    if score.low is None or score.high is None:
        return ""
    return f"{format_number(score.low, unit)} to {format_number(score.high, unit)}"


def format_number_with_ci(score: ScoreWithCI) -> str:
    return (
        f"{format_number(score.value)} ({interval_text})"
        if (interval_text := format_interval(score))
        else format_number(score.value)
    )


def number_cell(score: ScoreWithCI | None, unit: str | None = None) -> str:
    """A table's cell with a number, its unit, and its interval under it."""
    if score is None:
        return "<td>–</td>"
    interval_html = f"<small>{format_interval(score, unit)}</small>" if format_interval(score) else ""
    return f"<td>{format_number(score.value, unit)}{f' {escape_html(unit)}' if unit else ''}{interval_html}</td>"


def format_item_count(benchmark: BenchmarkResult) -> str:
    """ "1,000 of 67,000"."""
    n = "–" if benchmark.score.n is None else f"{benchmark.score.n:,}"
    return (
        f"{n} of {benchmark.total_items:,}"
        if benchmark.total_items and benchmark.total_items != benchmark.score.n
        else n
    )


def compare_with_chance(benchmark: BenchmarkResult) -> str:
    """On which side of chance a score is; of a preference for stereotypes, which way it leans."""
    if benchmark.chance is None:
        return "–"
    if benchmark.metric == "stereotyped":
        return {"above": "leans towards stereotypes", "below": "leans against them"}.get(
            str(benchmark.chance_side), "no leaning seen"
        )
    return {"above": "above chance", "below": "below chance"}.get(str(benchmark.chance_side), "not above chance")


def format_provenance(provenance: Provenance) -> str:
    parts = [f"{name.replace('_', ' ')} {format_value(value)}" for name, value in provenance.arguments.items()]
    return " · ".join([provenance.date[:10], *parts])


def header_cells(names: Iterable[str]) -> str:
    return "".join(f'<th scope="col">{name}</th>' for name in names)


# ---------------------------------------------------------------- texts and suites


def texts_table(stored_results: StoredResults) -> str:
    if not stored_results.texts:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape_html(one.name)}<small>{escape_html(format_provenance(one.get_provenance))}</small></th>'
        f"{number_cell(one.bits_per_byte)}<td>{format_perplexity(one.loss)}</td><td>{one.tokens:,}</td></tr>"
        for one in stored_results.texts
    )
    head = header_cells(("text", "bits per byte", "perplexity", "tokens"))
    return f'<table class="scores"><caption>Texts</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def benchmarks_plot(benchmarks: Sequence[BenchmarkResult]) -> str:
    """Those suites for which guessing has a score, on one axis from 0 to 1: the score with its interval, chance as a stroke,
    the score in scrambled words as a ring."""
    plotted = [
        benchmark for benchmark in benchmarks if benchmark.chance is not None and 0 <= benchmark.score.value <= 1
    ]
    if not plotted:
        return ""

    def to_percent(value: float) -> str:
        return f"{100 * min(1.0, max(0.0, value)):.2f}%"

    gridlines = "".join(f'<u style="left:{to_percent(x)}"></u>' for x in (0, 0.25, 0.5, 0.75, 1))
    rows = []
    for benchmark in plotted:
        score, chance = benchmark.score, benchmark.chance or 0.0
        bar = ""
        if score.low is not None and score.high is not None:
            bar = f'<i style="left:{to_percent(score.low)};width:{to_percent(score.high - score.low)}"></i>'
        control_ring = (
            f'<s style="left:{to_percent(benchmark.shuffled_control.value)}"></s>' if benchmark.shuffled_control else ""
        )
        chance_mark = f'<em class="chance" style="left:{to_percent(chance)}"></em>'
        strip = f'{gridlines}{chance_mark}{bar}{control_ring}<b style="left:{to_percent(score.value)}"></b>'
        kind = "own" if benchmark.chance_side else ""
        rows.append(
            f'<div class="{kind}"><span>{escape_html(benchmark.name)}</span><span class="strip">{strip}</span>'
            f'<span class="number">{format_number(score.value)}</span></div>'
        )
    axis = "".join(f'<em style="left:{to_percent(x)}">{x:g}</em>' for x in (0, 0.25, 0.5, 0.75, 1))
    rows.append(f'<div class="axis"><span></span><span class="strip">{axis}</span><span></span></div>')
    alt_text = "; ".join(
        f"{benchmark.name} {format_number_with_ci(benchmark.score)}, {compare_with_chance(benchmark)}"
        for benchmark in plotted
    )
    caption = (
        "Suites of questions: the dot is the score, the bar its 95 % interval, the stroke what guessing has, the ring what "
        "it has with the words scrambled. Grey is what cannot be told from guessing."
    )
    return render_figure(f'<div class="dots suites">{"".join(rows)}</div>', f"{alt_text}.", caption)


def benchmarks_table(benchmarks: Sequence[BenchmarkResult]) -> str:
    if not benchmarks:
        return ""
    rows = []
    for benchmark in benchmarks:
        metric_note = f"{benchmark.metric} · {format_provenance(benchmark.get_provenance)}"
        chance = "–" if benchmark.chance is None else format_number(benchmark.chance)
        control_note = (
            ""
            if benchmark.shuffled_control is None
            else "order matters"
            if benchmark.order_matters
            else "no difference seen"
        )
        control_cell = (
            "<td>–</td>"
            if benchmark.shuffled_control is None
            else f"<td>{format_number(benchmark.shuffled_control.value)}<small>{control_note}</small></td>"
        )
        rows.append(
            f'<tr><th scope="row">{escape_html(benchmark.name)}<small>{escape_html(metric_note)}</small></th>'
            f"{number_cell(benchmark.score)}<td>{chance}<small>{compare_with_chance(benchmark) if benchmark.chance is not None else ''}</small></td>{control_cell}"
            f"<td>{format_item_count(benchmark)}</td></tr>"
        )
    head = header_cells(("suite", "score", "chance", "scrambled", "items"))
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    table = f'<table class="scores"><caption>Suites</caption>{body}</table>'
    return f'<div class="sideways" tabindex="0" role="group" aria-label="Suites">{table}</div>'


def groups_table(benchmark: BenchmarkResult) -> str:
    """A suite's groups, the lowest first, to be unfolded."""
    order = sorted(benchmark.groups, key=lambda name: benchmark.groups[name].value)
    rows = "".join(
        f'<tr><th scope="row">{escape_html(name)}</th>{number_cell(benchmark.groups[name])}<td>{benchmark.groups[name].n or "–"}</td></tr>'
        for name in (order if len(order) <= MAX_GROUPS else order[: MAX_GROUPS // 2] + order[-MAX_GROUPS // 2 :])
    )
    if not rows:
        return ""
    shown = f"{len(order)} groups" if len(order) <= MAX_GROUPS else f"the lowest and the highest of {len(order)} groups"
    table = f'<table class="scores"><thead><tr>{header_cells(("group", "score", "items"))}</tr></thead><tbody>{rows}</tbody></table>'
    return f"<details><summary>{escape_html(benchmark.name)}: {shown}</summary>{table}</details>"


# ---------------------------------------------------------------- findings


def group_by_section(findings: Sequence[AuditFinding]) -> dict[str, list[AuditFinding]]:
    """Findings under their sections, in the order of `SECTIONS`; others behind them."""
    names = dict.fromkeys([*SECTION_TITLES, *(one.section for one in findings)])
    return {name: some for name in names if (some := [one for one in findings if one.section == name])}


def section_title(section: str) -> str:
    return SECTION_TITLES.get(section, section)


def audit_section(findings: Sequence[AuditFinding]) -> str:
    flagged_count = sum(one.flagged for one in findings)
    are = "is" if flagged_count == 1 else "are"
    summary = (
        f"{flagged_count} of {len(findings)} findings {are} to be read before this model is used: they are marked."
        if flagged_count
        else f"Of {len(findings)} findings none stands out."
    )
    parts = [findings_table(section_title(name), some) for name, some in group_by_section(findings).items()]
    return render_section("Audit", f"<p>{summary}</p>{''.join(parts)}", bool(findings))


def findings_table(title: str, findings: Sequence[AuditFinding]) -> str:
    rows = []
    for finding in findings:
        badge = FLAGGED_BADGE if finding.flagged else ""
        note = f"<small>{escape_html(finding.note)}</small>" if finding.note else ""
        reference = "–" if finding.reference is None else format_number(finding.reference, finding.unit)
        n = "–" if finding.score.n is None else f"{finding.score.n:,}"
        kind = ' class="notable"' if finding.flagged else ""
        rows.append(
            f'<tr{kind}><th scope="row">{badge}{escape_html(finding.name)}{note}{examples_list(finding)}</th>{number_cell(finding.score, finding.unit)}'
            f"<td>{reference}</td><td>{n}</td></tr>"
        )
    head = header_cells(("", "measured", "reference", "of"))
    head = head.replace('<th scope="col"></th>', "<td></td>")
    return (
        f'<table class="scores findings"><caption>{escape_html(title)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def examples_list(finding: AuditFinding) -> str:
    if not finding.examples:
        return ""
    items = "".join(
        "<li>"
        + "".join(f"<div><b>{escape_html(name)}</b> {escape_html(text)}</div>" for name, text in example.items())
        + "</li>"
        for example in finding.examples[:MAX_EXAMPLES]
    )
    count = len(finding.examples)
    shown = (
        f"{count} example{'s' if count > 1 else ''}" if count <= MAX_EXAMPLES else f"{MAX_EXAMPLES} of {count} examples"
    )
    return f'<details><summary>{shown}</summary><ul class="examples">{items}</ul></details>'
