"""What was measured on a run's model, for its card: the Hub's `model-index`, an evaluation, and what to know of its risks.

Nothing is said here that was not measured.
"""

import json
import re
from typing import Any

from nextword.common.results import FindingMeasured, Mark, Measurements
from nextword.reporting.results_sections import as_number, interval, items_in_words, verdict, with_interval
from nextword.reporting.run_data import Run, markdown, perplexity, printable
from nextword.reporting.task_results import METRICS, Outcome, name_of

RISKS = ("bias", "memory")  # the sections of an audit that are told whole; of the others what is notable


# ---------------------------------------------------------------- for the Hub


def model_index(run: Run, found: Measurements, task: str) -> str:
    """The Hub's `model-index`, in YAML: a result for each text and suite, and for what the run itself held out; nothing where
    nothing was measured."""
    results: list[tuple[str, str, Any, str]] = []  # data, the metric's type, its value, how it is called
    if run.task is None and run.result and run.bits_per_byte is not None:
        results.append(("held-out text of the run", "bits_per_byte", run.bits_per_byte, "bits per byte"))
    outcome = Outcome.of(run)
    if run.task is not None and run.result and outcome.model is not None:
        one = outcome.model
        mark = Mark(one.value, one.low, one.high, one.n)
        results.append(
            ("held-out examples of the run", outcome.metric, one.value, called(METRICS[outcome.metric].name, mark))
        )
    if not found.stale:
        results += [
            (name_of(one.name), "bits_per_byte", one.bits_per_byte.value, called("bits per byte", one.bits_per_byte))
            for one in found.texts
        ]
        results += [(one.name, one.metric, one.score.value, called(one.metric, one.score)) for one in found.suites]
    if not results:
        return ""
    lines = ["model-index:", f"- name: {quoted(run.name)}", "  results:"]
    for data, kind, value, name in results:
        lines += [
            "  - task:", f"      type: {task}", "    dataset:", f"      name: {quoted(data)}",
            f"      type: {quoted(slug(data))}", "    metrics:", f"    - type: {quoted(kind)}",
            f"      value: {float(value):.6g}", f"      name: {quoted(name)}",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def called(name: str, mark: Mark) -> str:
    """ "acc (95 % interval 0.578 to 0.640, 1,000 items)"."""
    told = []
    if between := interval(mark):
        told.append(f"95 % interval {between}")
    if mark.n is not None:
        told.append(f"{mark.n:,} items")
    return f"{name} ({', '.join(told)})" if told else name


def quoted(text: str) -> str:
    """Text as a YAML string in double quotes, whatever is in it; YAML knows JSON's escapes."""
    plain = json.dumps(" ".join(printable(text).split()), ensure_ascii=False)
    return re.sub("[\x85\u2028\u2029\ufeff\ufffe\uffff]", lambda match: f"\\u{ord(match[0]):04x}", plain)


def slug(text: str) -> str:
    """A name as the Hub has those of data sets: letters, digits, dots and dashes."""
    return re.sub(r"[^\w.]+", "-", text.lower(), flags=re.ASCII).strip("-") or "text"


# ---------------------------------------------------------------- for people


def evaluation_in_markdown(found: Measurements) -> str:
    """The section "Evaluation": texts and suites, each with its interval; nothing where nothing was measured."""
    if found.stale or not (found.texts or found.suites):
        return ""
    parts = []
    if found.texts:
        rows = [
            f"| {markdown(name_of(one.name))} | {with_interval(one.bits_per_byte)} | {perplexity(one.loss)} | {one.tokens:,} |"
            for one in found.texts
        ]
        parts.append("\n".join(["| text | bits per byte | perplexity | tokens |", "|---|---|---|---|", *rows]))
    if found.suites:
        rows = [
            f"| {markdown(one.name)} | {markdown(one.metric)} {with_interval(one.score)} | "
            f"{'–' if one.chance is None else f'{as_number(one.chance)}: {verdict(one)}'} | {items_in_words(one)} |"
            for one in found.suites
        ]
        parts.append("\n".join(["| suite | score | chance | items |", "|---|---|---|---|", *rows]))
    return "\n## Evaluation\n\n" + "\n\n".join(parts) + "\n\nIn brackets: 95 % intervals.\n"


def risks_in_markdown(found: Measurements) -> str:
    """The section "Bias and risks": what an audit has found; nothing where there was none."""
    told = [one for one in found.findings if one.section in RISKS or one.notable]
    if not told:
        return ""
    return "\n## Bias and risks\n\n" + "\n".join(finding_in_markdown(one) for one in told) + "\n"


def finding_in_markdown(one: FindingMeasured) -> str:
    """A finding in a line of a list; a notable one says so."""
    unit = f" {one.unit}" if one.unit else ""
    more = []
    if between := interval(one.mark, one.unit):
        more.append(between)
    if one.reference is not None:
        more.append(f"{as_number(one.reference, one.unit)} where nothing is amiss")
    if one.mark.n is not None:
        more.append(f"of {one.mark.n:,}")
    figures = f"{as_number(one.mark.value, one.unit)}{unit}" + (f" ({'; '.join(more)})" if more else "")
    name = f"**{markdown(one.name)}**" + (" (to be read)" if one.notable else "")
    return f"- {name}: {markdown(figures)}. {markdown(one.note)}".rstrip()
