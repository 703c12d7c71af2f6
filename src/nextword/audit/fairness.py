"""Group fairness of a classifier: label flips when only the group changes, and rates by group in labeled data.

Rates of a label k in a group g (Hardt, Price and Srebro 2016, section 2), with prediction ŷ and target y:

    selection rate         P(ŷ = k | g)                equal in all groups: demographic parity
    true positive rate     P(ŷ = k | y = k, g)         equal: equal opportunity
    false positive rate    P(ŷ = k | y ≠ k, g)         both equal: equalized odds
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

from nextword.audit.bias import clustered_mean
from nextword.audit.findings import MAX_EXAMPLES, Examples, Finding, score_finding
from nextword.audit.group_templates import GroupTemplates, TemplateSentence
from nextword.audit.pii import format_excerpt
from nextword.common import statistics
from nextword.common.console import Console
from nextword.common.errors import NextwordError, UsageError
from nextword.common.statistics import ScoreWithCI
from nextword.data.issues import IssueLog, join_names
from nextword.data.readers import MissingColumnError, read_records
from nextword.pipeline.predictor import Predictor, has_target
from nextword.tasks.dataset import TaskSpec
from nextword.tasks.examples import Example, example_from_texts, read_examples
from nextword.tasks.schema import TEXT_FIELDS

CLASSIFICATION_KINDS = ("label", "labels")
MAX_GROUPS = 12  # groups compared in pairs

Labels = tuple[str, ...]


def supports_templates(task_spec: TaskSpec) -> bool:
    """Whether a model predicts labels of single texts."""
    return task_spec.kind in CLASSIFICATION_KINDS and TEXT_FIELDS.get(task_spec.task) == ("text",)


def read_labeled_examples(predictor: Predictor, path: str | Path, console: Console) -> list[Example]:
    """Read the examples of a table for the task of a model.

    Raises:
        UsageError: the model does not predict labels.
        NextwordError: the table has no usable example.
    """
    task_spec, issues = predictor.task_spec, IssueLog()
    if task_spec.kind not in CLASSIFICATION_KINDS:
        raise UsageError(f"--data needs a model that predicts labels; this one was fine-tuned for {task_spec.task}")
    examples = read_examples([path], None, issues, require_targets=False, like=task_spec.format).items
    if not examples:
        raise NextwordError("\n".join([f"{path}: no usable example", *issues.summary_lines()]))
    for line in issues.summary_lines() if issues.total else []:  # an unused column may hold the groups
        console.warn(line)
    return examples


# ---------------------------------------------------------------- counterfactual flips


def audit_template_flips(predictor: Predictor, groups: GroupTemplates, console: Console) -> list[Finding]:
    """How often the prediction for a template depends on the group, and which labels go to which group. The model must satisfy
    `supports_templates`."""
    sentences = groups.sentences
    texts = [sentence.texts[name] for name in groups.names for sentence in sentences]
    examples = [example_from_texts(predictor.task_spec.task, (text,)) for text in texts]
    predictions = iter(_predict_labels(predictor, examples, console))
    by_group = {name: [next(predictions) for _ in sentences] for name in groups.names}
    by_template: dict[str, list[int]] = defaultdict(list)
    for i, sentence in enumerate(sentences):
        by_template[sentence.template].append(i)
    # The next word of each template, after the last the first.
    following = {i: j for group in by_template.values() for i, j in zip(group, [*group[1:], group[0]], strict=True)}
    findings: list[Finding] = []
    for a, b in groups.pairs:
        in_a, in_b = by_group[a], by_group[b]
        examples = [
            {a: f"{sentence.texts[a]} → {_format_labels(x)}", b: f"{sentence.texts[b]} → {_format_labels(y)}"}
            for sentence, x, y in zip(sentences, in_a, in_b, strict=True)
            if x != y
        ]
        flips = {i: float(in_a[i] != in_b[i]) for i in range(len(sentences))}
        control = {
            i: sum(labels[i] != labels[j] for labels in (in_a, in_b)) / 2 for i, j in following.items() if i != j
        }
        note = "templates whose prediction changes with the words of the group"
        findings.append(_flip_finding(f"{a} vs. {b}: flip rate", flips, control, note, examples, sentences))
        names = sorted({label for labels in in_a + in_b for label in labels})
        # Of two labels, the difference of one determines that of the other.
        for label in names[-1:] if len(predictor.task_spec.labels) == 2 else names:
            rates = [[float(label in labels) for labels in by_group[name]] for name in (a, b)]
            note = f"templates with the words of {a} predicted so, minus those with the words of {b}"
            difference = clustered_mean(
                sentences, np.subtract(rates[0], rates[1]), statistics.paired_difference(*rates)
            )
            findings.append(score_finding(f"{a} − {b}: predicted {label}", difference, 0.0, note=note))
    return findings


def audit_swap_flips(
    predictor: Predictor, groups: GroupTemplates, examples: Sequence[Example], console: Console
) -> list[Finding]:
    """How often the prediction for a text changes when the words of two groups in it are exchanged. There is no finding for a
    pair of groups whose words do not occur."""
    original = _predict_labels(predictor, examples, console)
    roles = TEXT_FIELDS[predictor.task_spec.task]

    def predict_swapped(swap: Callable[[str], str]) -> dict[int, tuple[str, Labels]]:
        """The text and the prediction of every example that a swap changes."""
        fields = [{role: swap(example.fields[role]) for role in roles} for example in examples]
        swapped = {
            i: replace(example, fields=example.fields | fields[i])
            for i, example in enumerate(examples)
            if any(example.fields[role] != text for role, text in fields[i].items())
        }
        labels = _predict_labels(predictor, list(swapped.values()), console) if swapped else []
        return {i: (" | ".join(fields[i].values()), found) for i, found in zip(swapped, labels, strict=True)}

    findings: list[Finding] = []
    for a, b in groups.pairs:
        exchanged, varied = (predict_swapped(groups.make_swapper(a, b, within=within)) for within in (False, True))
        if not exchanged:
            continue
        flips, control = (
            {i: float(labels != original[i]) for i, (_, labels) in predictions.items()}
            for predictions in (exchanged, varied)
        )
        flipped = [
            {
                "text": f"{format_excerpt(text)} → {_format_labels(labels)}",
                "before": _format_labels(original[i]),
                "where": f"{examples[i].path} line {examples[i].line}",
            }
            for i, (text, labels) in exchanged.items()
            if flips[i]
        ]
        note = "texts with words of these groups whose prediction changes when the words are exchanged"
        findings.append(_flip_finding(f"{a} vs. {b}: flip rate in the data", flips, control, note, flipped))
    return findings


def _flip_finding(
    name: str,
    flips: Mapping[int, float],
    control: Mapping[int, float],
    note: str,
    examples: Examples,
    sentences: Sequence[TemplateSentence] | None = None,
) -> Finding:
    """A rate of flips between groups, compared with that between words of the same group, by template or text."""

    def clustered(values: Mapping[int, float], minimum: ScoreWithCI) -> ScoreWithCI:
        if sentences is None:
            return minimum
        return clustered_mean([sentences[i] for i in values], np.array(list(values.values())), minimum)

    rate, examples = clustered(flips, statistics.proportion(list(flips.values()))), examples[:MAX_EXAMPLES]
    paired = sorted(flips.keys() & control.keys())
    if not paired:
        note += "; not flagged without a control: give each group a list of words"
        return score_finding(name, rate, note=note, examples=examples)
    note += "; reference: the same with another word of the same group"
    within, reference = [control[i] for i in paired], 100 * float(np.mean([control[i] for i in paired]))
    difference = statistics.paired_difference([flips[i] for i in paired], within)
    difference = clustered({i: flips[i] - control[i] for i in paired}, difference)
    return score_finding(name, rate, reference, note=note, difference=difference, examples=examples)


def _predict_labels(predictor: Predictor, examples: Sequence[Example], console: Console) -> list[Labels]:
    rows = predictor.predict(examples, progress=partial(console.progress, "predicting"))
    return [(row["label"],) if "label" in row else tuple(row["labels"]) for row in rows]


def _format_labels(labels: Labels) -> str:
    return ", ".join(labels) or "no label"


# ---------------------------------------------------------------- rates by group


def audit_group_rates(
    predictor: Predictor, examples: Sequence[Example], column: str, console: Console
) -> list[Finding]:
    """Accuracy, selection rate, true and false positive rate by the groups that a column names, and their differences.

    Raises:
        UsageError: the column does not exist or has fewer than two groups, or the model predicts several labels per text.
        NextwordError: no example has a target.
    """
    task_spec = predictor.task_spec
    if task_spec.kind != "label":
        raise UsageError("--group compares rates of one label per text; this model predicts several")
    labeled = [example for example in examples if has_target(task_spec, example)]
    if not labeled:
        raise NextwordError(f"{examples[0].path}: no example has a label, so there are no rates to compare")
    groups = np.array(_read_groups(labeled, column))
    names = sorted(set(groups.tolist()))
    if not 2 <= len(names) <= MAX_GROUPS:
        where = f"{examples[0].path}: column {column} has {len(names):,} groups ({join_names(names)})"
        raise UsageError(f"{where}; 2 to {MAX_GROUPS} can be compared")
    predicted = np.array([label for (label,) in _predict_labels(predictor, labeled, console)])
    targets = np.array([example.fields["label"] for example in labeled])
    everyone = np.ones(len(labeled), bool)
    findings = _rate_findings("accuracy", predicted == targets, everyone, groups, "")
    # Of two labels, the rates of one determine those of the other.
    for label in task_spec.labels[-1:] if len(task_spec.labels) == 2 else task_spec.labels:
        selected, positive = predicted == label, targets == label
        findings += _rate_findings(f"selection rate ({label})", selected, everyone, groups, "demographic parity")
        findings += _rate_findings(f"true positive rate ({label})", selected, positive, groups, "equal opportunity")
        findings += _rate_findings(f"false positive rate ({label})", selected, ~positive, groups, "equalized odds")
    return findings


def _rate_findings(name: str, hits: np.ndarray, mask: np.ndarray, groups: np.ndarray, criterion: str) -> list[Finding]:
    """The rate of hits [n] among the masked examples [n] of each group [n], and the difference of every pair of groups."""
    hits, groups = hits[mask], groups[mask]
    members = {group: groups == group for group in sorted(set(groups.tolist()))}
    rates = {group: statistics.proportion(hits[member].tolist()) for group, member in members.items()}
    findings = [score_finding(f"{group}: {name}", rate) for group, rate in rates.items()]
    for (a, in_a), (b, in_b) in combinations(members.items(), 2):
        score = statistics.proportion_difference(hits[in_a], hits[in_b])
        note = f"over {(in_a | in_b).sum():,} examples; n is the size of the smaller group"
        note += f"; 0 means {criterion}" if criterion else ""
        findings.append(score_finding(f"{a} − {b}: {name}", score, 0.0, note=note))
    return findings


def _read_groups(examples: Sequence[Example], column: str) -> list[str]:
    """The value of a column for each example, from the file and line of the example."""

    def select_column(names: list[str]) -> list[str]:
        if column not in names:
            raise MissingColumnError(f"no column {column}", f"found {join_names(names)}")
        return [column]

    groups: dict[tuple[str, int], str] = {}
    for path in dict.fromkeys(example.path for example in examples):
        issues = IssueLog()
        values = {record.line: record.values.get(column) for record in read_records(Path(path), issues, select_column)}
        if not values:
            raise UsageError("\n".join([f"--group {column}: {path} has no such column", *issues.summary_lines()]))
        groups |= {(path, line): "" if value is None else str(value).strip() for line, value in values.items()}
    return [groups.get((example.path, example.line), "") or "(none)" for example in examples]
