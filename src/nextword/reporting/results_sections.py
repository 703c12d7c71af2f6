"""What was measured on a run's model, as parts of its page: texts, suites beside chance, and what an audit has found."""

from collections.abc import Iterable, Sequence

from nextword.common.results import FindingMeasured, Mark, Measurements, SuiteMeasured, When
from nextword.reporting.run_data import escaped, figure, perplexity, readable, section

# What an audit's sections are called on a page; one that is not named here goes by its own name.
SECTIONS = {"bias": "Bias", "memory": "Memory of the training text", "corpus": "The training text", "cost": "Cost"}
SHOWN_GROUPS, SHOWN_EXAMPLES = 40, 10
# Beside a finding that is to be read before a model is used: a shape, for the dots are runs.
MARK = '<span class="mark" aria-hidden="true">▲</span><span class="unseen"> to be read: </span> '


def measured_sections(found: Measurements) -> str:
    """The page's parts about all that was measured; nothing where nothing was."""
    stale = "<p>These were measured before the run's weights changed: measure them again.</p>" if found.stale else ""
    evaluated = "".join((stale, texts_table(found), suites_plot(found.suites), suites_table(found.suites)))
    groups = "".join(groups_table(suite) for suite in found.suites)
    return section("Evaluation", evaluated + groups, bool(found.texts or found.suites)) + audit_section(found.findings)


# ---------------------------------------------------------------- numbers in words


def as_number(value: float, unit: str | None = None) -> str:
    """As many digits as a score deserves, or a finding of a unit: a percentage one, what is counted none; with a true minus."""
    if unit is None:
        shape = f"z,.{3 if abs(value) < 10 else 2}f"
    elif float(value).is_integer() or abs(value) >= 1000:
        shape = "z,.0f"
    else:
        shape = "z.1f" if unit == "%" and abs(value) >= 0.05 else ".2g" if abs(value) < 0.1 else ".3g"
    return f"{value:{shape}}".replace("-", "−")


def interval(mark: Mark, unit: str | None = None) -> str:
    """ "0.578 to 0.640", or nothing where none is known."""
    if mark.low is None or mark.high is None:
        return ""
    return f"{as_number(mark.low, unit)} to {as_number(mark.high, unit)}"


def with_interval(mark: Mark) -> str:
    return f"{as_number(mark.value)} ({between})" if (between := interval(mark)) else as_number(mark.value)


def cell(mark: Mark | None, unit: str | None = None) -> str:
    """A table's cell with a number, its unit, and its interval under it."""
    if mark is None:
        return "<td>–</td>"
    under = f"<small>{interval(mark, unit)}</small>" if interval(mark) else ""
    return f"<td>{as_number(mark.value, unit)}{f' {escaped(unit)}' if unit else ''}{under}</td>"


def items_in_words(suite: SuiteMeasured) -> str:
    """ "1,000 of 67,000"."""
    n = "–" if suite.score.n is None else f"{suite.score.n:,}"
    return f"{n} of {suite.of:,}" if suite.of and suite.of != suite.score.n else n


def verdict(suite: SuiteMeasured) -> str:
    """On which side of chance a score is; of a preference for stereotypes, which way it leans."""
    if suite.chance is None:
        return "–"
    if suite.metric == "stereotyped":
        return {"above": "leans towards stereotypes", "below": "leans against them"}.get(
            str(suite.side), "no leaning seen"
        )
    return {"above": "above chance", "below": "below chance"}.get(str(suite.side), "not above chance")


def when_in_words(when: When) -> str:
    told = [f"{name.replace('_', ' ')} {readable(value)}" for name, value in when.arguments.items()]
    return " · ".join([when.date[:10], *told])


def head_of(names: Iterable[str]) -> str:
    return "".join(f'<th scope="col">{name}</th>' for name in names)


# ---------------------------------------------------------------- texts and suites


def texts_table(found: Measurements) -> str:
    if not found.texts:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escaped(one.name)}<small>{escaped(when_in_words(one.when))}</small></th>'
        f"{cell(one.bits_per_byte)}<td>{perplexity(one.loss)}</td><td>{one.tokens:,}</td></tr>"
        for one in found.texts
    )
    head = head_of(("text", "bits per byte", "perplexity", "tokens"))
    return f'<table class="scores"><caption>Texts</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def suites_plot(suites: Sequence[SuiteMeasured]) -> str:
    """Those suites for which guessing has a score, on one axis from 0 to 1: the score with its interval, chance as a stroke,
    the score in scrambled words as a ring."""
    drawn = [one for one in suites if one.chance is not None and 0 <= one.score.value <= 1]
    if not drawn:
        return ""

    def place(value: float) -> str:
        return f"{100 * min(1.0, max(0.0, value)):.2f}%"

    lines = "".join(f'<u style="left:{place(x)}"></u>' for x in (0, 0.25, 0.5, 0.75, 1))
    rows = []
    for one in drawn:
        score, chance = one.score, one.chance or 0.0
        bar = ""
        if score.low is not None and score.high is not None:
            bar = f'<i style="left:{place(score.low)};width:{place(score.high - score.low)}"></i>'
        ring = f'<s style="left:{place(one.scrambled.value)}"></s>' if one.scrambled else ""
        stroke = f'<em class="chance" style="left:{place(chance)}"></em>'
        strip = f'{lines}{stroke}{bar}{ring}<b style="left:{place(score.value)}"></b>'
        kind = "own" if one.side else ""
        rows.append(
            f'<div class="{kind}"><span>{escaped(one.name)}</span><span class="strip">{strip}</span>'
            f'<span class="number">{as_number(score.value)}</span></div>'
        )
    axis = "".join(f'<em style="left:{place(x)}">{x:g}</em>' for x in (0, 0.25, 0.5, 0.75, 1))
    rows.append(f'<div class="axis"><span></span><span class="strip">{axis}</span><span></span></div>')
    words = "; ".join(f"{one.name} {with_interval(one.score)}, {verdict(one)}" for one in drawn)
    caption = (
        "Suites of questions: the dot is the score, the bar its 95 % interval, the stroke what guessing has, the ring what "
        "it has with the words scrambled. Grey is what cannot be told from guessing."
    )
    return figure(f'<div class="dots suites">{"".join(rows)}</div>', f"{words}.", caption)


def suites_table(suites: Sequence[SuiteMeasured]) -> str:
    if not suites:
        return ""
    rows = []
    for one in suites:
        about = f"{one.metric} · {when_in_words(one.when)}"
        chance = "–" if one.chance is None else as_number(one.chance)
        seen = "" if one.scrambled is None else "order matters" if one.order_matters else "no difference seen"
        mixed = (
            "<td>–</td>" if one.scrambled is None else f"<td>{as_number(one.scrambled.value)}<small>{seen}</small></td>"
        )
        rows.append(
            f'<tr><th scope="row">{escaped(one.name)}<small>{escaped(about)}</small></th>'
            f"{cell(one.score)}<td>{chance}<small>{verdict(one) if one.chance is not None else ''}</small></td>{mixed}"
            f"<td>{items_in_words(one)}</td></tr>"
        )
    head = head_of(("suite", "score", "chance", "scrambled", "items"))
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    table = f'<table class="scores"><caption>Suites</caption>{body}</table>'
    return f'<div class="sideways" tabindex="0" role="group" aria-label="Suites">{table}</div>'


def groups_table(suite: SuiteMeasured) -> str:
    """A suite's groups, the lowest first, to be unfolded."""
    order = sorted(suite.groups, key=lambda name: suite.groups[name].value)
    rows = "".join(
        f'<tr><th scope="row">{escaped(name)}</th>{cell(suite.groups[name])}<td>{suite.groups[name].n or "–"}</td></tr>'
        for name in (order if len(order) <= SHOWN_GROUPS else order[: SHOWN_GROUPS // 2] + order[-SHOWN_GROUPS // 2 :])
    )
    if not rows:
        return ""
    shown = (
        f"{len(order)} groups" if len(order) <= SHOWN_GROUPS else f"the lowest and the highest of {len(order)} groups"
    )
    table = f'<table class="scores"><thead><tr>{head_of(("group", "score", "items"))}</tr></thead><tbody>{rows}</tbody></table>'
    return f"<details><summary>{escaped(suite.name)}: {shown}</summary>{table}</details>"


# ---------------------------------------------------------------- findings


def by_section(findings: Sequence[FindingMeasured]) -> dict[str, list[FindingMeasured]]:
    """Findings under their sections, in the order of `SECTIONS`; others behind them."""
    names = dict.fromkeys([*SECTIONS, *(one.section for one in findings)])
    return {name: some for name in names if (some := [one for one in findings if one.section == name])}


def section_name(section: str) -> str:
    return SECTIONS.get(section, section)


def audit_section(findings: Sequence[FindingMeasured]) -> str:
    notable = sum(one.notable for one in findings)
    are = "is" if notable == 1 else "are"
    said = (
        f"{notable} of {len(findings)} findings {are} to be read before this model is used: they are marked."
        if notable
        else f"Of {len(findings)} findings none stands out."
    )
    parts = [findings_table(section_name(name), some) for name, some in by_section(findings).items()]
    return section("Audit", f"<p>{said}</p>{''.join(parts)}", bool(findings))


def findings_table(name: str, findings: Sequence[FindingMeasured]) -> str:
    rows = []
    for one in findings:
        mark = MARK if one.notable else ""
        note = f"<small>{escaped(one.note)}</small>" if one.note else ""
        reference = "–" if one.reference is None else as_number(one.reference, one.unit)
        n = "–" if one.mark.n is None else f"{one.mark.n:,}"
        kind = ' class="notable"' if one.notable else ""
        rows.append(
            f'<tr{kind}><th scope="row">{mark}{escaped(one.name)}{note}{examples_list(one)}</th>{cell(one.mark, one.unit)}'
            f"<td>{reference}</td><td>{n}</td></tr>"
        )
    head = head_of(("", "measured", "reference", "of"))
    head = head.replace('<th scope="col"></th>', "<td></td>")
    return (
        f'<table class="scores findings"><caption>{escaped(name)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def examples_list(finding: FindingMeasured) -> str:
    if not finding.examples:
        return ""
    items = "".join(
        "<li>"
        + "".join(f"<div><b>{escaped(name)}</b> {escaped(text)}</div>" for name, text in example.items())
        + "</li>"
        for example in finding.examples[:SHOWN_EXAMPLES]
    )
    count = len(finding.examples)
    shown = (
        f"{count} example{'s' if count > 1 else ''}"
        if count <= SHOWN_EXAMPLES
        else f"{SHOWN_EXAMPLES} of {count} examples"
    )
    return f'<details><summary>{shown}</summary><ul class="examples">{items}</ul></details>'
