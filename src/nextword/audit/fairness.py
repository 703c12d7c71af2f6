"""Whether a fine-tuned model treats groups alike: how often its answer changes where only the group does, and how its rates
differ between the groups that labelled data name.

Rates of a label k and a group g (Hardt, Price and Srebro 2016, section 2), ŷ the answer and y what is right:

    selected as k     P(ŷ = k | g)
    true positives    P(ŷ = k | y = k, g)
    false positives   P(ŷ = k | y ≠ k, g)

Odds are equal where both of the latter are the same in all groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np

from nextword.audit.bias import score_finding
from nextword.audit.findings import Finding
from nextword.audit.group_templates import GroupTemplates
from nextword.common import statistics
from nextword.common.console import Console
from nextword.common.errors import NextwordError, UsageError
from nextword.data.issues import IssueLog
from nextword.data.readers import MissingColumnError, read_records
from nextword.pipeline.predictor import Predictor, has_target
from nextword.tasks.examples import Example, example_from_texts, read_examples
from nextword.tasks.parsing import TEXT_FIELDS
from nextword.tasks.schema import join_names
from nextword.tasks.templates import TaskSpec

CLASSIFICATION_KINDS = ("label", "labels")  # of answers that can flip
MAX_EXAMPLES = 5  # of the texts whose answer changes
MAX_GROUPS = 12  # groups that are compared each with each

PredictedLabels = tuple[str, ...]  # the labels given


def supports_templates(task_spec: TaskSpec) -> bool:
    """Whether a fine-tuned model gives labels to single texts, as templates are."""
    return task_spec.kind in CLASSIFICATION_KINDS and TEXT_FIELDS.get(task_spec.task) == ("text",)


def read_labeled_examples(predictor: Predictor, path: str | Path, console: Console) -> list[Example]:
    """The examples of a table for the task that a model was fine-tuned for.

    Raises:
        UsageError: the model answers with something else than labels.
        NextwordError: there is no example in it.
    """
    task_spec, problems = predictor.task_spec, IssueLog()
    if task_spec.kind not in CLASSIFICATION_KINDS:
        raise UsageError(
            f"--data is for a model that answers with labels; this one was fine-tuned for {task_spec.task}"
        )
    examples = read_examples([path], task_spec.task, problems, dict(task_spec.columns), gold=False).items
    if not examples:
        raise NextwordError("\n".join([f"{path}: no example to be answered", *problems.summary_lines()]))
    for line in problems.summary_lines() if problems.total else []:  # a column that is not read may be the groups'
        console.warn(line)
    return examples


# ---------------------------------------------------------------- when only the group changes


def audit_template_flips(predictor: Predictor, groups: GroupTemplates, console: Console | None = None) -> list[Finding]:
    """How often the answer to a template depends on whose words are in it, and which label then goes to whom. The model is one
    that `takes_templates`."""
    task_spec = predictor.task_spec
    texts = [sentence.texts[name] for name in groups.names for sentence in groups.sentences]
    predictions = _predict_labels(predictor, [example_from_texts(task_spec.task, (text,)) for text in texts], console)
    num_templates = len(groups.sentences)
    predictions_by_group = {
        name: predictions[i * num_templates : (i + 1) * num_templates] for i, name in enumerate(groups.names)
    }
    findings = []
    for group_a, group_b in groups.pairs:
        changed = [
            i for i in range(num_templates) if predictions_by_group[group_a][i] != predictions_by_group[group_b][i]
        ]
        examples = [
            {group_a: f"{groups.sentences[i].texts[group_a]} → {_format_labels(predictions_by_group[group_a][i])}",
             group_b: f"{groups.sentences[i].texts[group_b]} → {_format_labels(predictions_by_group[group_b][i])}"}
            for i in changed[:MAX_EXAMPLES]
        ]  # fmt: skip
        note = "templates whose answer changes with the group's words alone"
        findings.append(
            _flip_rate_finding(f"{group_a}, {group_b}: answers that flip", changed, num_templates, note, examples)
        )
        for label in sorted(
            {label for name in (group_a, group_b) for several in predictions_by_group[name] for label in several}
        ):
            rates = [[float(label in several) for several in predictions_by_group[name]] for name in (group_a, group_b)]
            note = f"templates with {group_a}'s words answered so, less those with {group_b}'s"
            findings.append(
                score_finding(
                    f"{group_a}, {group_b}: answered {label}", statistics.paired_difference(*rates), 0.0, note=note
                )
            )
    return findings


def audit_swap_flips(
    predictor: Predictor, groups: GroupTemplates, examples: Sequence[Example], console: Console | None = None
) -> list[Finding]:
    """How often the answer to a labelled text changes where the words of two groups in it change places. A pair of groups of
    whose words none stands in the texts has no finding."""
    original_labels = _predict_labels(predictor, examples, console)
    findings = []
    for group_a, group_b in groups.pairs:
        swap = groups.make_swapper(group_a, group_b)
        swapped_examples = [_swap_groups(predictor, example, swap) for example in examples]
        affected = [i for i, example in enumerate(examples) if swapped_examples[i].fields != example.fields]
        if not affected:
            continue
        swapped_labels = _predict_labels(predictor, [swapped_examples[i] for i in affected], console)
        changed = [k for k, i in enumerate(affected) if swapped_labels[k] != original_labels[i]]
        example_rows = [
            {"text": f"{_joined_texts(predictor, swapped_examples[affected[k]])} → {_format_labels(swapped_labels[k])}", "before": _format_labels(original_labels[affected[k]]),
             "where": f"{examples[affected[k]].path} line {examples[affected[k]].line}"}
            for k in changed[:MAX_EXAMPLES]
        ]  # fmt: skip
        note = "texts of the data with such a word, whose answer changes where the groups' words change places"
        name = f"{group_a}, {group_b}: answers that flip in the data"
        findings.append(_flip_rate_finding(name, changed, len(affected), note, example_rows))
    return findings


def _swap_groups(predictor: Predictor, example: Example, swap: Callable[[str], str]) -> Example:
    roles = TEXT_FIELDS[predictor.task_spec.task]
    return replace(example, fields={k: swap(v) if k in roles else v for k, v in example.fields.items()})


def _joined_texts(predictor: Predictor, example: Example) -> str:
    return " | ".join(example.fields[role] for role in TEXT_FIELDS[predictor.task_spec.task])


def _predict_labels(
    predictor: Predictor, examples: Sequence[Example], console: Console | None
) -> list[PredictedLabels]:
    progress_console = console or Console(quiet=True)
    predictions = predictor.predict(examples, progress=lambda i, n: progress_console.progress("answers", i, n))
    return [(one["label"],) if "label" in one else tuple(one["labels"]) for one in predictions]


def _format_labels(labels: PredictedLabels) -> str:
    return ", ".join(labels) or "no label"


def _flip_rate_finding(
    name: str, changed: Sequence[int], count: int, note: str, examples: list[dict[str, str]]
) -> Finding:
    flips = [0.0] * count
    for i in changed:
        flips[i] = 1.0
    return score_finding(name, statistics.proportion(flips), 0.0, note=note, examples=examples)


# ---------------------------------------------------------------- groups that the data name


def audit_group_rates(
    predictor: Predictor, examples: Sequence[Example], column: str, console: Console | None = None
) -> list[Finding]:
    """Accuracy, selection, true and false positives of each group that a column of the data names, and their differences.

    Raises:
        UsageError: no such column; fewer than two groups in it; or the model gives several labels.
        NextwordError: not one example says what is right.
    """
    task_spec = predictor.task_spec
    if task_spec.kind != "label":
        raise UsageError("--group compares the rates of one label a text; this model gives several")
    labeled_examples = [example for example in examples if has_target(task_spec, example)]
    if not labeled_examples:
        raise NextwordError(f"{examples[0].path}: no example says which label is right, so no rates can be told")
    group_ids = np.array(_group_labels(labeled_examples, column))
    group_names = sorted(set(group_ids))
    if not 2 <= len(group_names) <= MAX_GROUPS:
        problem = (
            "one alone"
            if len(group_names) == 1
            else f"{len(group_names):,}, and more than {MAX_GROUPS} are not compared"
        )
        raise UsageError(f"{examples[0].path}: the groups of column {column} are {problem} ({join_names(group_names)})")
    predicted = np.array([answer for (answer,) in _predict_labels(predictor, labeled_examples, console)])
    gold = np.array([example.fields["label"] for example in labeled_examples])
    findings = _rate_findings(
        "accuracy", predicted == gold, np.ones(len(labeled_examples), bool), group_ids, group_names, ""
    )
    # Of two labels either says what the other does.
    for label in task_spec.labels[-1:] if len(task_spec.labels) == 2 else task_spec.labels:
        is_predicted, is_gold = predicted == label, gold == label
        all_examples = np.ones(len(labeled_examples), bool)
        findings += _rate_findings(
            f"selected as {label}", is_predicted, all_examples, group_ids, group_names, "0 where all are selected alike"
        )
        findings += _rate_findings(
            f"true positives of {label}", is_predicted, is_gold, group_ids, group_names, "0 where odds are equal"
        )
        findings += _rate_findings(
            f"false positives of {label}", is_predicted, ~is_gold, group_ids, group_names, "0 where odds are equal"
        )
    return findings


def _rate_findings(
    metric: str, hits: np.ndarray, mask: np.ndarray, group_ids: np.ndarray, group_names: Sequence[str], parity_note: str
) -> list[Finding]:
    """The share of hits [n] among some [n] of each group, and the differences of every two groups that have any."""
    nonempty_groups = [name for name in group_names if (mask & (group_ids == name)).any()]
    findings = [
        score_finding(f"{name}: {metric}", statistics.proportion(hits[mask & (group_ids == name)].astype(float).tolist()))
        for name in nonempty_groups
    ]  # fmt: skip
    for group_a, group_b in combinations(nonempty_groups, 2):
        group_masks = [mask & (group_ids == name) for name in (group_a, group_b)]
        n = int((group_masks[0] | group_masks[1]).sum())
        columns = np.stack([column for part in group_masks for column in (part & hits, part)], 1)[
            group_masks[0] | group_masks[1]
        ]
        score = replace(
            statistics.bootstrap_ratio(columns, _rate_difference), n=min(int(part.sum()) for part in group_masks)
        )
        note = f"over {n:,} examples, n the smaller group's" + (f"; {parity_note}" if parity_note else "")
        findings.append(score_finding(f"{group_a} less {group_b}: {metric}", score, 0.0, note=note))
    return findings


def _rate_difference(sums: np.ndarray) -> np.ndarray:
    """[R] of hits and counts of two groups [R, 4]; a resample without one of the groups says nothing of it: 0."""
    first, second = (
        np.divide(sums[:, i], sums[:, i + 1], out=np.zeros(len(sums)), where=sums[:, i + 1] > 0) for i in (0, 2)
    )
    return np.where((sums[:, 1] > 0) & (sums[:, 3] > 0), first - second, 0.0)


def _group_labels(examples: Sequence[Example], column: str) -> list[str]:
    """What a column says of each example, in the file and line that it was read from."""
    group_by_line: dict[tuple[str, int], str] = {}

    def select_group_column(names: list[str]) -> list[str]:
        if column not in names:
            raise MissingColumnError(f"no column {column}", f"found {join_names(names)}")
        return [column]

    for path in dict.fromkeys(example.path for example in examples):
        problems = IssueLog()
        for record in read_records(Path(path), problems, select_group_column):
            value = record.values.get(column)
            group_by_line[path, record.line] = "" if value is None else str(value).strip()
        if not any(place[0] == path for place in group_by_line):
            raise UsageError("\n".join([f"--group {column}: {path} names no groups so", *problems.summary_lines()]))
    return [group_by_line.get((example.path, example.line), "") or "(none)" for example in examples]
