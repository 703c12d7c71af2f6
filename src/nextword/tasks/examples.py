"""Labelled examples, read from tables: every row checked, every bad one named by its file and line and left out."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nextword.common.errors import UsageError
from nextword.data.decoding import file_format
from nextword.data.issues import IssueLog
from nextword.data.readers import TABLE_SUFFIXES, MissingColumnError, read_records
from nextword.tasks.parsing import (
    TEXT_FIELDS,
    AnswerFormat,
    Row,
    RowError,
    infer_answer_format,
    is_multilabel_column,
    is_score_column,
    parse_float,
    parse_inputs,
    parse_targets,
)
from nextword.tasks.schema import INPUT_ROLES, TARGET_ROLES, infer_task, join_names, resolve_columns

__all__ = [
    "Example",
    "Examples",
    "guess_task",
    "hold_out",
    "inputs_of",
    "keep_known_labels",
    "label_names",
    "read_examples",
]

_MAX_PEEKED_RECORDS = 1000  # records of JSON whose columns are looked at before the columns are chosen
_TEXT_SUFFIXES = (".txt", ".md")


@dataclass
class Example:
    """One row: where it was read, and its fields by their canonical names.

    classify: text; label, or labels (a tuple). entail: premise, hypothesis; label. similarity: sentence1, sentence2;
    score (float) or label. choose: question, choices (a tuple); answer (from 0). rewrite: prompt; completion. chat:
    messages (a tuple of {"role", "content"}), of which the last assistant turn is the gold. prefer: messages; chosen,
    rejected. What stands after the semicolon, the gold, is absent where it was not there to be read.
    """

    path: str
    line: int
    fields: dict[str, Any]


@dataclass
class ExampleSet:
    """Examples of one task, and the column that each role was read from.

    Give `columns` of the training data to `read_examples` for the validation data, and both are read alike.
    """

    task: str
    columns: dict[str, str]
    items: list[Example]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def read_examples(
    paths: Path | str | Iterable[Path | str],
    task: str | None,
    problems: IssueLog,
    columns: Mapping[str, str] | None = None,
    require_targets: bool = True,
) -> ExampleSet:
    """The labelled examples in some files, or in those of a folder in the order of their names.

    Without a task it is guessed from the columns of the first file that has any. `columns` names columns by hand,
    {role: column}, such as {"prompt": "english", "completion": "french"}. Without `gold` rows need nothing that is
    learned from; where it is there, it is read all the same.

    A label is a text, a whole number, or true and false; it is kept as str. Several labels at once are a JSON list, or
    the text of a column called `labels` (or tags, categories, …), split at ";" and "|"; to have such a column as one
    label, say {"label": "labels"}. Numbers that are not all whole, in the label column of `similarity`, are scores.
    An answer of `choose` is a number from 0, a letter, or the choice's own text: whichever fits the most rows.

    `continue` has no examples, its texts are documents: `items` is empty, and `columns` says which column is the text.

    Bad rows go to `problems` and are left out. Raises `UsageError` for a missing path, and where the task or a column
    cannot be told; `MissingExtra` for a format without its package.
    """
    files = _resolve_files([paths] if isinstance(paths, Path | str) else paths, problems)
    first, names = _peek_columns(files)
    if first is None:
        task = task or _infer_task_without_columns(files)
        if task != "continue":
            _report_empty_files(files, problems)
        return ExampleSet(task, {}, [])
    try:
        others = [name for name in names if name not in (columns or {}).values()]
        task = task or infer_task([*(columns or {}), *others])
        mapping = resolve_columns(task, names, columns, require_targets)
    except UsageError as error:
        raise UsageError(f"{first}: {error}") from error
    if task == "continue":
        return ExampleSet(task, mapping, [])
    if unread := [name for name in names if name not in mapping.values()]:
        problems.info(first, None, "columns that are not read", join_names(unread))
    rows: list[Row] = []
    for path in files:
        rows += _iter_rows(path, task, mapping, require_targets, problems)
    mapping = _resolve_label_role(task, mapping, rows)
    answer_format = infer_answer_format(rows) if task == "choose" else None
    items = [item for row in rows if (item := _parse_example(row, task, answer_format, require_targets, problems))]
    return ExampleSet(task, mapping, items)


def _resolve_files(paths: Iterable[Path | str], problems: IssueLog) -> list[Path]:
    """The files, and those of each folder that are tables (or texts, where it has no tables), in the order of names."""
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder")
        if not path.is_dir():
            files.append(path)
            continue
        entries = sorted((p for p in path.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
        tables = [p for p in entries if file_format(p)[0] in TABLE_SUFFIXES and p.is_file()]
        selected = tables or [p for p in entries if file_format(p)[0] in _TEXT_SUFFIXES and p.is_file()]
        if len(entries) > len(selected):
            what = "left out: what is no table in the folder, and the folders in it"
            problems.info(path, None, what, count=len(entries) - len(selected))
        files += selected
    return files


def _peek_columns(files: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """The first file that has columns, and they in order; None and [] where none has."""
    names: dict[str, None] = {}

    def note(found: list[str]) -> list[str]:
        names.update(dict.fromkeys(found))
        return []

    for path in files:
        if file_format(path)[0] in TABLE_SUFFIXES:
            for _ in islice(read_records(path, IssueLog(), note), _MAX_PEEKED_RECORDS):
                pass  # what is wrong with the file is said when it is read for good
        if names:
            return path, list(names)
    return None, []


def _infer_task_without_columns(files: Sequence[Path]) -> str:
    """`continue` where there are texts alone. Raises `UsageError` with what is wrong with the tables else."""
    if files and all(file_format(path)[0] in _TEXT_SUFFIXES for path in files):
        return "continue"
    problems = IssueLog()
    _report_empty_files(files, problems)
    raise UsageError("\n".join(["there are no examples and no texts to guess a task from", *problems.summary_lines()]))


def _report_empty_files(files: Iterable[Path], problems: IssueLog) -> None:
    for path in files:
        before = problems.total
        for _ in read_records(path, problems):
            pass
        if problems.total == before:
            problems.add(path, None, "there is no example in the file")


def _iter_rows(
    path: Path, task: str, mapping: dict[str, str], require_targets: bool, problems: IssueLog
) -> Iterator[Row]:
    """The rows of one file, by role. A table, or a record, without a column that it needs is a problem."""
    required_roles = INPUT_ROLES[task] + (TARGET_ROLES[task] if require_targets else ())

    def choose(names: list[str]) -> list[str]:
        for group in required_roles:
            known = [mapping[role] for role in group if role in mapping]
            if not any(column in names for column in known):
                raise MissingColumnError(f"no column {' or '.join(known)}", f"found {resolve_columns(names)}")
        return [column for column in mapping.values() if column in names]

    before, found = problems.total, False
    for record in read_records(path, problems, choose):
        found = True
        values = {role: record.values[column] for role, column in mapping.items() if column in record.values}
        yield Row(path, record.line, values)
    if not found and problems.total == before:
        problems.add(path, None, "there is no example in the file")


def _resolve_label_role(task: str, mapping: dict[str, str], rows: Sequence[Row]) -> dict[str, str]:
    """The mapping, and the rows' values with it, with the label column called what its values are."""
    labels = [row.values.get("label") for row in rows]
    if task == "classify" and is_multilabel_column(labels):
        role = "labels"
    elif task == "similarity" and is_score_column(labels):
        role = "score"
    else:
        return mapping
    for row in rows:
        row.values = {role if name == "label" else name: value for name, value in row.values.items()}
    return {role if name == "label" else name: column for name, column in mapping.items()}


def _parse_example(
    row: Row, task: str, answer_format: AnswerFormat | None, require_targets: bool, problems: IssueLog
) -> Example | None:
    """A row's example; None, and a problem, where it cannot be had."""
    try:
        fields = parse_inputs(task, row.values)
    except RowError as flaw:
        problems.add(row.path, row.line, f"{flaw.kind}; left out", flaw.detail)
        return None
    target_values = [row.values.get(role) for group in TARGET_ROLES[task] for role in group]
    if require_targets or any(value is not None and value != "" for value in target_values):
        try:
            fields |= parse_targets(task, row.values, fields, answer_format)
        except RowError as flaw:
            if require_targets:
                problems.add(row.path, row.line, f"{flaw.kind}; left out", flaw.detail)
                return None
            if "messages" not in row.values:  # a conversation that ends with the user is what is asked for
                problems.info(row.path, row.line, f"{flaw.kind}; read without it", flaw.detail)
    return Example(str(row.path), row.line, fields)


def input_texts(task: str, example: Example) -> tuple[str, ...]:
    """The texts that are given, without the gold: of a conversation all turns but the last answer."""
    fields = example.fields
    if task == "choose":
        return (fields["question"], *fields["choices"])
    if task in ("chat", "prefer"):
        messages = fields["messages"]
        answered = task == "chat" and messages[-1]["role"] == "assistant"
        return tuple(message["content"] for message in (messages[:-1] if answered else messages))
    if task not in TEXT_FIELDS:
        raise UsageError(f"{task}: no task with labelled examples; there are {', '.join(TARGET_ROLES)}")
    return tuple(fields[role] for role in TEXT_FIELDS[task])


def label_names(examples: Iterable[Example]) -> list[str]:
    """The labels that occur: in the order of numbers where all are numbers, else by code point."""
    names = sorted({name for example in examples for name in _example_labels(example)})
    numbers = {name: value for name in names if (value := parse_float(name)) is not None}
    return sorted(names, key=lambda name: numbers[name]) if len(numbers) == len(names) else names


def _example_labels(example: Example) -> tuple[str, ...]:
    fields = example.fields
    return (fields["label"],) if "label" in fields else fields.get("labels", ())


def filter_known_labels(examples: Iterable[Example], known_labels: Iterable[str], problems: IssueLog) -> list[Example]:
    """The examples whose labels are among `names`; each other one is a problem. One without a label is kept."""
    known, kept = set(known_labels), []
    for example in examples:
        unknown = [name for name in _example_labels(example) if name not in known]
        if unknown:
            what = "a label that the training data does not have; left out"
            problems.add(example.path, example.line, what, ", ".join(unknown))
        else:
            kept.append(example)
    return kept


def train_validation_split(
    examples: ExampleSet, validation_fraction: float = 0.1
) -> tuple[list[Example], list[Example]]:
    """The examples to train on and those to validate on, about `share` of the inputs, each in the order as read.

    A hash of the input decides, so that one input is never on both sides, whatever its gold, and the order of the
    examples does not matter. Two sentences are one input in either order; of premise and hypothesis the premise alone
    decides, since data sets ask several things of one. Each side has one input at least, where there are two or more.
    Raises `UsageError` for a share that is not between 0 and 1.
    """
    if not 0 < validation_fraction < 1:
        raise UsageError(f"a share of {validation_fraction} cannot be held out; it is between 0 and 1")
    hashes = [_hash_inputs(examples.task, example) for example in examples]
    distinct = sorted(set(hashes))
    if len(distinct) < 2:
        return list(examples), []
    held_out_hashes = {place for place in distinct if place < validation_fraction * 2**64} or {distinct[0]}
    held_out_hashes -= {distinct[-1]} if len(held_out_hashes) == len(distinct) else set()
    train = [example for example, place in zip(examples, hashes, strict=True) if place not in held_out_hashes]
    return train, [example for example, place in zip(examples, hashes, strict=True) if place in held_out_hashes]


def _hash_inputs(task: str, example: Example) -> int:
    """A number below 2⁶⁴ that an input always has."""
    texts = input_texts(task, example)
    texts = {"similarity": tuple(sorted(texts)), "entail": texts[:1]}.get(task, texts)
    data = json.dumps(texts).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
