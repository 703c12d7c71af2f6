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

from nextword.audit.bias import scored
from nextword.audit.findings import Finding
from nextword.audit.group_templates import Groups
from nextword.common.console import Console
from nextword.common.errors import NextwordError, UsageError
from nextword.data.decoding import Problems
from nextword.data.readers import NoColumn, read_records
from nextword.pipeline.predictor import Predictor, has_gold
from nextword.tasks import metrics
from nextword.tasks.dataset import Form
from nextword.tasks.examples import Example, read_examples
from nextword.tasks.parsing import TEXTS
from nextword.tasks.schema import listed
from nextword.tasks.task_data import example_of

KINDS = ("label", "labels")  # of answers that can flip
SHOWN = 5  # of the texts whose answer changes
MOST = 12  # groups that are compared each with each

Answer = tuple[str, ...]  # the labels given


def takes_templates(form: Form) -> bool:
    """Whether a fine-tuned model gives labels to single texts, as templates are."""
    return form.kind in KINDS and TEXTS.get(form.task) == ("text",)


def read_labelled(predictor: Predictor, data: str | Path, console: Console) -> list[Example]:
    """The examples of a table for the task that a model was fine-tuned for.

    Raises:
        UsageError: the model answers with something else than labels.
        NextwordError: there is no example in it.
    """
    form, problems = predictor.form, Problems()
    if form.kind not in KINDS:
        raise UsageError(f"--data is for a model that answers with labels; this one was fine-tuned for {form.task}")
    items = read_examples([data], form.task, problems, dict(form.columns), gold=False).items
    if not items:
        raise NextwordError("\n".join([f"{data}: no example to be answered", *problems.lines()]))
    for line in problems.lines() if problems.total else []:  # a column that is not read may be the groups'
        console.warn(line)
    return items


# ---------------------------------------------------------------- when only the group changes


def audit_flips(predictor: Predictor, groups: Groups, console: Console | None = None) -> list[Finding]:
    """How often the answer to a template depends on whose words are in it, and which label then goes to whom. The model is one
    that `takes_templates`."""
    form = predictor.form
    texts = [sentence.texts[name] for name in groups.names for sentence in groups.sentences]
    each = _answers(predictor, [example_of(form.task, (text,)) for text in texts], console)
    count = len(groups.sentences)
    said = {name: each[i * count : (i + 1) * count] for i, name in enumerate(groups.names)}
    found = []
    for one, other in groups.pairs:
        changed = [i for i in range(count) if said[one][i] != said[other][i]]
        examples = [
            {one: f"{groups.sentences[i].texts[one]} → {_shown(said[one][i])}",
             other: f"{groups.sentences[i].texts[other]} → {_shown(said[other][i])}"}
            for i in changed[:SHOWN]
        ]  # fmt: skip
        note = "templates whose answer changes with the group's words alone"
        found.append(_flipped(f"{one}, {other}: answers that flip", changed, count, note, examples))
        for label in sorted({label for name in (one, other) for several in said[name] for label in several}):
            rates = [[float(label in several) for several in said[name]] for name in (one, other)]
            note = f"templates with {one}'s words answered so, less those with {other}'s"
            found.append(scored(f"{one}, {other}: answered {label}", metrics.difference(*rates), 0.0, note=note))
    return found


def audit_swaps(
    predictor: Predictor, groups: Groups, examples: Sequence[Example], console: Console | None = None
) -> list[Finding]:
    """How often the answer to a labelled text changes where the words of two groups in it change places. A pair of groups of
    whose words none stands in the texts has no finding."""
    before = _answers(predictor, examples, console)
    found = []
    for one, other in groups.pairs:
        swap = groups.swap(one, other)
        swapped = [_swapped(predictor, example, swap) for example in examples]
        places = [i for i, example in enumerate(examples) if swapped[i].fields != example.fields]
        if not places:
            continue
        after = _answers(predictor, [swapped[i] for i in places], console)
        changed = [k for k, i in enumerate(places) if after[k] != before[i]]
        shown = [
            {"text": f"{_texts(predictor, swapped[places[k]])} → {_shown(after[k])}", "before": _shown(before[places[k]]),
             "where": f"{examples[places[k]].path} line {examples[places[k]].line}"}
            for k in changed[:SHOWN]
        ]  # fmt: skip
        note = "texts of the data with such a word, whose answer changes where the groups' words change places"
        name = f"{one}, {other}: answers that flip in the data"
        found.append(_flipped(name, changed, len(places), note, shown))
    return found


def _swapped(predictor: Predictor, example: Example, swap: Callable[[str], str]) -> Example:
    roles = TEXTS[predictor.form.task]
    return replace(example, fields={k: swap(v) if k in roles else v for k, v in example.fields.items()})


def _texts(predictor: Predictor, example: Example) -> str:
    return " | ".join(example.fields[role] for role in TEXTS[predictor.form.task])


def _answers(predictor: Predictor, examples: Sequence[Example], console: Console | None) -> list[Answer]:
    said = console or Console(quiet=True)
    found = predictor.predict(examples, progress=lambda i, n: said.progress("answers", i, n))
    return [(one["label"],) if "label" in one else tuple(one["labels"]) for one in found]


def _shown(answer: Answer) -> str:
    return ", ".join(answer) or "no label"


def _flipped(name: str, changed: Sequence[int], count: int, note: str, examples: list[dict[str, str]]) -> Finding:
    flips = [0.0] * count
    for i in changed:
        flips[i] = 1.0
    return scored(name, metrics.share(flips), 0.0, note=note, examples=examples)


# ---------------------------------------------------------------- groups that the data name


def audit_rates(
    predictor: Predictor, examples: Sequence[Example], column: str, console: Console | None = None
) -> list[Finding]:
    """Accuracy, selection, true and false positives of each group that a column of the data names, and their differences.

    Raises:
        UsageError: no such column; fewer than two groups in it; or the model gives several labels.
        NextwordError: not one example says what is right.
    """
    form = predictor.form
    if form.kind != "label":
        raise UsageError("--group compares the rates of one label a text; this model gives several")
    known = [example for example in examples if has_gold(form, example)]
    if not known:
        raise NextwordError(f"{examples[0].path}: no example says which label is right, so no rates can be told")
    whose = np.array(_group_of(known, column))
    names = sorted(set(whose))
    if not 2 <= len(names) <= MOST:
        few = "one alone" if len(names) == 1 else f"{len(names):,}, and more than {MOST} are not compared"
        raise UsageError(f"{examples[0].path}: the groups of column {column} are {few} ({listed(names)})")
    said = np.array([answer for (answer,) in _answers(predictor, known, console)])
    gold = np.array([example.fields["label"] for example in known])
    found = _rates("accuracy", said == gold, np.ones(len(known), bool), whose, names, "")
    # Of two labels either says what the other does.
    for label in form.labels[-1:] if len(form.labels) == 2 else form.labels:
        is_said, is_gold = said == label, gold == label
        everyone = np.ones(len(known), bool)
        found += _rates(f"selected as {label}", is_said, everyone, whose, names, "0 where all are selected alike")
        found += _rates(f"true positives of {label}", is_said, is_gold, whose, names, "0 where odds are equal")
        found += _rates(f"false positives of {label}", is_said, ~is_gold, whose, names, "0 where odds are equal")
    return found


def _rates(
    what: str, hits: np.ndarray, among: np.ndarray, whose: np.ndarray, names: Sequence[str], even: str
) -> list[Finding]:
    """The share of hits [n] among some [n] of each group, and the differences of every two groups that have any."""
    having = [name for name in names if (among & (whose == name)).any()]
    found = [
        scored(f"{name}: {what}", metrics.share(hits[among & (whose == name)].astype(float).tolist()))
        for name in having
    ]  # fmt: skip
    for one, other in combinations(having, 2):
        parts = [among & (whose == name) for name in (one, other)]
        n = int((parts[0] | parts[1]).sum())
        columns = np.stack([column for part in parts for column in (part & hits, part)], 1)[parts[0] | parts[1]]
        score = replace(metrics.of_sums(columns, _difference), n=min(int(part.sum()) for part in parts))
        note = f"over {n:,} examples, n the smaller group's" + (f"; {even}" if even else "")
        found.append(scored(f"{one} less {other}: {what}", score, 0.0, note=note))
    return found


def _difference(sums: np.ndarray) -> np.ndarray:
    """[R] of hits and counts of two groups [R, 4]; a resample without one of the groups says nothing of it: 0."""
    first, second = (
        np.divide(sums[:, i], sums[:, i + 1], out=np.zeros(len(sums)), where=sums[:, i + 1] > 0) for i in (0, 2)
    )
    return np.where((sums[:, 1] > 0) & (sums[:, 3] > 0), first - second, 0.0)


def _group_of(examples: Sequence[Example], column: str) -> list[str]:
    """What a column says of each example, in the file and line that it was read from."""
    found: dict[tuple[str, int], str] = {}

    def only(names: list[str]) -> list[str]:
        if column not in names:
            raise NoColumn(f"no column {column}", f"found {listed(names)}")
        return [column]

    for path in dict.fromkeys(example.path for example in examples):
        problems = Problems()
        for record in read_records(Path(path), problems, only):
            value = record.values.get(column)
            found[path, record.line] = "" if value is None else str(value).strip()
        if not any(place[0] == path for place in found):
            raise UsageError("\n".join([f"--group {column}: {path} names no groups so", *problems.lines()]))
    return [found.get((example.path, example.line), "") or "(none)" for example in examples]
