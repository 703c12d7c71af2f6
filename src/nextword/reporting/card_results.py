"""What was measured on a run's model, for its card: the Hub's `model-index`, an evaluation, and what to know of its risks.

Nothing is said here that was not measured.
"""

import json
import re
from typing import Any

from nextword.common.results import AuditFinding, ScoreWithCI, StoredResults
from nextword.reporting.results_sections import (
    compare_with_chance,
    format_interval,
    format_number,
    format_number_with_ci,
)
from nextword.reporting.run_data import RunData, escape_markdown, sanitize_text
from nextword.reporting.task_results import METRICS, TaskResults, short_path_name

RISK_SECTIONS = ("bias", "memory")  # the sections of an audit that are told whole; of the others what is notable


# ---------------------------------------------------------------- for the Hub


def model_index(run: RunData, stored_results: StoredResults, pipeline_tag: str) -> str:
    """The Hub's `model-index`, in YAML: a result for each text and suite, and for what the run itself held out; nothing where
    nothing was measured."""
    results: list[tuple[str, str, Any, str]] = []  # data, the metric's type, its value, how it is called
    if run.task is None and run.result and run.bits_per_byte is not None:
        results.append(("held-out text of the run", "bits_per_byte", run.bits_per_byte, "bits per byte"))
    task_results = TaskResults.from_run(run)
    if run.task is not None and run.result and task_results.model_score is not None:
        one = task_results.model_score
        mark = ScoreWithCI(one.value, one.low, one.high, one.n)
        results.append(
            (
                "held-out examples of the run",
                task_results.metric,
                one.value,
                metric_label(METRICS[task_results.metric].name, mark),
            )
        )
    if not stored_results.stale:
        results += [
            (
                short_path_name(one.name),
                "bits_per_byte",
                one.bits_per_byte.value,
                metric_label("bits per byte", one.bits_per_byte),
            )
            for one in stored_results.texts
        ]
        results += [
            (one.name, one.metric, one.score.value, metric_label(one.metric, one.score))
            for one in stored_results.benchmarks
        ]
    if not results:
        return ""
    lines = ["model-index:", f"- name: {yaml_quote(run.name)}", "  results:"]
    for data, kind, value, name in results:
        lines += [
            "  - task:", f"      type: {pipeline_tag}", "    dataset:", f"      name: {yaml_quote(data)}",
            f"      type: {yaml_quote(slugify(data))}", "    metrics:", f"    - type: {yaml_quote(kind)}",
            f"      value: {float(value):.6g}", f"      name: {yaml_quote(name)}",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def metric_label(name: str, score: ScoreWithCI) -> str:
    """ "acc (95 % interval 0.578 to 0.640, 1,000 items)"."""
    details = []
    if interval_text := format_interval(score):
        details.append(f"95 % interval {interval_text}")
    if score.n is not None:
        details.append(f"{score.n:,} items")
    return f"{name} ({', '.join(details)})" if details else name


def yaml_quote(text: str) -> str:
    """Text as a YAML string in double quotes, whatever is in it; YAML knows JSON's escapes."""
    plain = json.dumps(" ".join(sanitize_text(text).split()), ensure_ascii=False)
    return re.sub("[\x85\u2028\u2029\ufeff\ufffe\uffff]", lambda match: f"\\u{ord(match[0]):04x}", plain)


def slugify(text: str) -> str:
    """A name as the Hub has those of data sets: letters, digits, dots and dashes."""
    return re.sub(r"[^\w.]+", "-", text.lower(), flags=re.ASCII).strip("-") or "text"


# ---------------------------------------------------------------- for people


def evaluation_markdown(stored_results: StoredResults) -> str:
    """The section "Evaluation": texts and suites, each with its interval; nothing where nothing was measured."""
    if stored_results.stale or not (stored_results.texts or stored_results.benchmarks):
        return ""
    parts = []
    if stored_results.texts:
        rows = [
            f"| {escape_markdown(short_path_name(one.name))} | {format_number_with_ci(one.bits_per_byte)} | {format_perplexity(one.loss)} | {one.tokens:,} |"
            for one in stored_results.texts
        ]
        parts.append("\n".join(["| text | bits per byte | perplexity | tokens |", "|---|---|---|---|", *rows]))
    if stored_results.benchmarks:
        rows = [
            f"| {escape_markdown(one.name)} | {escape_markdown(one.metric)} {format_number_with_ci(one.score)} | "
            f"{'–' if one.chance is None else f'{format_number(one.chance)}: {compare_with_chance(one)}'} | {format_item_count(one)} |"
            for one in stored_results.benchmarks
        ]
        parts.append("\n".join(["| suite | score | chance | items |", "|---|---|---|---|", *rows]))
    return "\n## Evaluation\n\n" + "\n\n".join(parts) + "\n\nIn brackets: 95 % intervals.\n"


def risks_markdown(stored_results: StoredResults) -> str:
    """The section "Bias and risks": what an audit has found; nothing where there was none."""
    findings = [one for one in stored_results.findings if one.section in RISK_SECTIONS or one.flagged]
    if not findings:
        return ""
    return "\n## Bias and risks\n\n" + "\n".join(finding_markdown(one) for one in findings) + "\n"


def finding_markdown(finding: AuditFinding) -> str:
    """A finding in a line of a list; a notable one says so."""
    unit = f" {finding.unit}" if finding.unit else ""
    details = []
    if interval_text := format_interval(finding.score, finding.unit):
        details.append(interval_text)
    if finding.reference is not None:
        details.append(f"{format_number(finding.reference, finding.unit)} where nothing is amiss")
    if finding.score.n is not None:
        details.append(f"of {finding.score.n:,}")
    value_text = f"{format_number(finding.score.value, finding.unit)}{unit}" + (
        f" ({'; '.join(details)})" if details else ""
    )
    name = f"**{escape_markdown(finding.name)}**" + (" (to be read)" if finding.flagged else "")
    return f"- {name}: {escape_markdown(value_text)}. {escape_markdown(finding.note)}".rstrip()
