"""Values, scores and results as text for people, and the templates in which these functions are filters.

Both kinds of templates escape every expression. In HTML that is Jinja's autoescape. In Markdown `finalize` escapes whatever
would be markup; only values of type `Markup`, such as the output of the filter `fence`, are inserted as they are.
"""

import html
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nextword.common.format import format_bytes, format_count, format_duration
from nextword.common.results import BenchmarkResult, Provenance, is_number, short_path_name
from nextword.common.statistics import ScoreWithCI
from nextword.tasks.metrics import interval_method, missing_interval_reason

TEMPLATES = Path(__file__).parent / "templates"
SECTION_TITLES = {
    "bias": "Social bias",
    "memory": "Memorization of training text",
    "corpus": "Training corpus",
    "cost": "Energy and carbon",
}
MAX_GROUPS = 40
T = TypeVar("T")
_CONTROL_CHARACTERS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


# ---------------------------------------------------------------- text


def sanitize(text: str) -> str:
    """Replace control characters and lone surrogates, which no text file can hold, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").translate(_CONTROL_CHARACTERS)


def escape_markdown(value: Any) -> Markup:
    """Text without effect in Markdown: no HTML, table border, emphasis, heading or link. White space is collapsed."""
    if isinstance(value, Markup):
        return value
    text = html.escape(re.sub(r"\s+", " ", sanitize(str(value))), quote=False)
    return Markup("".join(f"\\{character}" if character in "\\`*_[]|#~" else character for character in text))


def fence(text: Any) -> Markup:
    """A fenced code block whose fence is longer than any run of backticks in the text."""
    content, marks = sanitize(str(text)), "```"
    while marks in content:
        marks += "`"
    return Markup(f"{marks}text\n{content}\n{marks}")


# ---------------------------------------------------------------- numbers


def number(value: float, unit: str | None = None, sign: str = "") -> str:
    """A number with as many digits as its unit deserves, and a true minus.

    Args:
        value: The number.
        unit: Unit of an audit finding. None for a score, which has three decimals below 10 and two above.
        sign: "+" to show the sign of positive numbers too.
    """
    if unit is None:
        spec = f"z,.{3 if abs(value) < 10 else 2}f" if abs(value) < 1e9 else ".3g"
    elif float(value).is_integer() or abs(value) >= 1000:
        spec = "z,.0f"
    else:
        spec = "z.1f" if unit == "%" and abs(value) >= 0.05 else ".2g" if abs(value) < 0.1 else ".3g"
    return f"{value:{sign}{spec}}".replace("-", "−")


def interval(result: ScoreWithCI, unit: str | None = None) -> str:
    """ "0.578 to 0.640", or "" without a confidence interval."""
    if result.low is None or result.high is None:
        return ""
    return f"{number(result.low, unit)} to {number(result.high, unit)}"


def score(result: ScoreWithCI) -> str:
    """ "0.610 (0.578 to 0.640)"."""
    return f"{number(result.value)} ({interval(result)})" if interval(result) else number(result.value)


def readable(value: Any) -> str:
    """Any JSON value as text: digits grouped, fractions with five significant digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:z,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.5g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def perplexity(loss: float) -> str:
    """exp(loss), for a loss in nats per token."""
    return f"{math.exp(loss):,.4g}" if loss < 14 else f"{math.exp(min(loss, 700)):.2e}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(name, text) of every value of a nested mapping, as in ("train tokens", "512,331"); None and NaN are left out."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += flatten(cast("Mapping[str, Any]", value), f"{name} ")
        elif value is not None and (not isinstance(value, float) or math.isfinite(value)):
            rows.append((name, readable(value)))
    return rows


# ---------------------------------------------------------------- benchmarks and audits


def versus_chance(benchmark: BenchmarkResult) -> str:
    """The side of chance on which the confidence interval lies; for stereotype benchmarks, the direction of the bias."""
    if benchmark.chance is None:
        return "–"
    side = str(benchmark.chance_side)
    if benchmark.metric == "stereotyped":
        names = {"above": "prefers stereotypes", "below": "prefers anti-stereotypes"}
        return names.get(side, "no significant preference")
    return {"above": "above chance", "below": "below chance"}.get(side, "not above chance")


def describe_intervals(units: str, scores: Iterable[tuple[str, str, ScoreWithCI]]) -> str:
    """How the intervals of scores were computed, and why a score has none; "" without scores.

    Args:
        units: What the scores are means over, such as "examples".
        scores: Display name, metric and score.
    """
    by_method: dict[str, list[str]] = {}
    missing: list[str] = []
    for name, metric, score in scores:
        if score.low is None:
            missing.append(f"{name} has no interval: {missing_interval_reason(metric, score.n)}")
        else:
            by_method.setdefault(interval_method(metric), []).append(name)
    methods = "; ".join(f"{', '.join(names)} {method}" for method, names in by_method.items())
    known = [f"95 % confidence intervals over the {units}, for {units} like them: {methods}"] if methods else []
    return "".join(f"{sentence}. " for sentence in [*known, *missing]).rstrip()


def benchmark_intervals(benchmarks: Sequence[BenchmarkResult]) -> str:
    """How the intervals of benchmark scores were computed, and why a score has none."""
    return describe_intervals("items", ((entry.name, entry.metric, entry.score) for entry in benchmarks))


def item_count(benchmark: BenchmarkResult) -> str:
    """ "1,000 of 67,000"."""
    evaluated, total = benchmark.score.n, benchmark.total_items
    text = "–" if evaluated is None else f"{evaluated:,}"
    return f"{text} of {total:,}" if total and total != evaluated else text


def provenance(source: Provenance) -> str:
    """Date and arguments of an evaluation."""
    arguments = [f"{name.replace('_', ' ')} {readable(value)}" for name, value in source.arguments.items()]
    return " · ".join([source.date[:10], *arguments])


def extreme_groups(benchmark: BenchmarkResult) -> list[tuple[str, ScoreWithCI]]:
    """The groups of a benchmark by score; only the lowest and the highest if there are many."""
    ordered = sorted(benchmark.groups.items(), key=lambda group: group[1].value)
    return ordered if len(ordered) <= MAX_GROUPS else ordered[: MAX_GROUPS // 2] + ordered[-MAX_GROUPS // 2 :]


def group_by_section(entries: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """(section, entry) of audits as entries by the title of their section, in the order of `SECTION_TITLES`."""
    groups: dict[str, list[T]] = {title: [] for title in SECTION_TITLES.values()}
    for section, entry in entries:
        groups.setdefault(SECTION_TITLES.get(section, section), []).append(entry)
    return {title: group for title, group in groups.items() if group}


# ---------------------------------------------------------------- templates


def render(template: str, **context: Any) -> str:
    """Render a template; every value is escaped, for Markdown where the name of the template ends so and else for HTML."""
    return sanitize(_environment(template.endswith(".md")).get_template(template).render(context))


FILTERS: tuple[Callable[..., Any], ...] = (
    *(fence, interval, number, perplexity, readable, score),
    *(benchmark_intervals, extreme_groups, item_count, provenance, versus_chance),
)


def to_script_json(value: Any) -> Markup:
    """A value as JSON that a template does not escape."""
    return Markup(json.dumps(value))


def to_shell_word(text: str) -> Markup:
    """A text as one word of a shell's command line that a template does not escape."""
    return Markup(shlex.quote(text))


@cache
def _environment(markdown: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=escape_markdown if markdown else None,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    filters = cast(dict[str, Any], environment.filters)  # pyright: ignore[reportUnknownMemberType]  # untyped in Jinja
    filters |= {function.__name__: function for function in FILTERS}
    filters |= {
        "shell": to_shell_word,
        "bytes": format_bytes,
        "count": format_count,
        "duration": format_duration,
        "json": to_script_json,
        "short_name": short_path_name,
    }
    environment.tests["finite"] = is_number  # pyright: ignore[reportUnknownMemberType]  # the same
    return environment
