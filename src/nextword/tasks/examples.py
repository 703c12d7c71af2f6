"""Labeled examples read from tables. Rows that are not valid are reported with file and line, and left out."""

import hashlib
import json
import re
from collections import Counter, deque
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from nextword.common.errors import UsageError
from nextword.data.decoding import file_format
from nextword.data.issues import IssueLog, RowError, join_names, name_source
from nextword.data.readers import (
    TABLE_SUFFIXES,
    ColumnSelector,
    MissingColumnError,
    Record,
    TableFormat,
    read_records,
)
from nextword.tasks.schema import (
    TASKS,
    TEXT_FIELDS,
    convert_decimal_commas,
    infer_answer_format,
    infer_task,
    interpret_labels,
    is_score_column,
    parse_float,
    parse_inputs,
    parse_targets,
    parse_truth,
    resolve_columns,
)

ALL_COLUMNS = ("*",)
_MAX_PEEKED_RECORDS = 1000  # JSON records whose columns are collected before columns are assigned to roles
_TEXT_SUFFIXES = (".txt", ".md")


@dataclass
class Example:
    """A labeled example.

    Attributes:
        path: The file it was read from; empty if it was given as texts.
        line: The line in that file.
        fields: The canonical fields; targets may be missing.

            ==========  ===================================  ==========================================
            task        inputs                               targets
            ==========  ===================================  ==========================================
            classify    text                                 label, or labels (a tuple)
            entail      premise, hypothesis                  label
            similarity  sentence1, sentence2                 score (float), or label
            choose      question, choices (a tuple)          answer (index from 0)
            rewrite     prompt                               completion
            chat        messages (a tuple of role, content)  the last message, from the assistant
            prefer      messages                             chosen, rejected
            ==========  ===================================  ==========================================
    """

    path: str
    line: int
    fields: dict[str, Any]


@dataclass(slots=True)
class SourceRow:
    """A row of a table in its place.

    Attributes:
        path: The file it was read from.
        line: The line in that file.
        values: The values that are kept, by column; empty if the row could not be read.
        example: Its example, or None.
        error: Why it has no example.
    """

    path: str
    line: int
    values: dict[str, Any]
    example: Example | None = None
    error: str = ""


@dataclass
class ExampleSet:
    """Examples of one task, and how they were read.

    Pass that of the training data to `read_examples` for other data, so that both are read alike.

    Attributes:
        task: Name of the task.
        columns: The column of each role.
        items: The examples.
        answer_format: How answers of `choose` are read, one of `schema.ANSWER_FORMATS`.
        labels: The names of the labels, if they are known.
        rows: All rows in their order, those without an example included, if they are kept.
    """

    task: str
    columns: dict[str, str]
    items: list[Example]
    answer_format: str = ""
    labels: tuple[str, ...] = ()
    rows: list[SourceRow] = field(default_factory=list[SourceRow])

    def __iter__(self) -> Iterator[Example]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def read_examples(
    paths: Path | str | Iterable[Path | str],
    task: str | None,
    issues: IssueLog,
    columns: Mapping[str, str] | None = None,
    require_targets: bool = True,
    like: ExampleSet | None = None,
    keep_columns: Collection[str] | None = None,
) -> ExampleSet:
    """Read the labeled examples of files and folders.

    A label is a string, a number or a boolean, and is kept as a string; 1, 1.0 and "1" are one label, and so is true if all
    labels are true, false, 0 or 1. Several labels are lists, as `schema.interpret_labels` describes; to read such a column as
    one label, pass {"label": "labels"}. In `similarity`, a label column with numbers that are not all integers is a score. An
    answer of `choose` is an index from 0 or from 1, a letter or the text of a choice, whichever fits most rows.

    `continue` has documents, not examples: `items` is empty, and `columns` names the text column.

    Args:
        paths: Files and folders. The tables of a folder are read in the order of their names.
        task: Name of the task; by default it is inferred from the columns of the first file that has any.
        issues: Log for rows that are left out.
        columns: Columns chosen by the user, {role: column}, such as {"prompt": "english", "completion": "french"}.
        require_targets: If false, rows may lack their targets. Valid targets are read all the same.
        like: The training data: its task, its columns where they exist, its labels and its format of answers.
        keep_columns: Keep all rows with the values of these columns, or of all columns (`ALL_COLUMNS`).

    Raises:
        UsageError: A path does not exist, the task or a column cannot be inferred, or the targets contradict each other.
        MissingDependencyError: A file format needs a package that is not installed.
    """
    files = _resolve_files([paths] if isinstance(paths, Path | str) else paths, issues)
    like = ExampleSet("", {}, []) if like is None else like
    columns, task = columns or {}, task or like.task or None
    first_table, names = _peek_columns(files)
    if first_table is None:
        if task is None and files and all(file_format(path)[0] in _TEXT_SUFFIXES for path in files):
            task = "continue"
        if task != "continue":
            file_issues = issues if task else IssueLog()
            for path in files:
                deque(_read_table(path, file_issues), maxlen=0)
            if task is None:
                message = "cannot infer a task: there are neither examples nor texts"
                raise UsageError("\n".join([message, *file_issues.summary_lines()]))
        return ExampleSet(task, {}, [])
    with name_source(first_table):
        task = task or infer_task([*columns, *(name for name in names if name not in columns.values())])
        known = {role: name for role, name in like.columns.items() if name in names}
        mapping = resolve_columns(task, names, {**known, **columns}, require_targets)
    if task == "continue":
        return ExampleSet(task, mapping, [])

    kept = names if keep_columns == ALL_COLUMNS else keep_columns
    if unknown := set(kept or ()) - set(names):
        raise UsageError(
            f"{first_table}: no column {join_names(sorted(unknown))} to keep; columns: {join_names(names)}"
        )

    def select_columns(names: list[str]) -> list[str]:
        for group in TASKS[task].required(require_targets):
            needed = [mapping[role] for role in group if role in mapping]
            if not any(column in names for column in needed) and not kept:
                raise MissingColumnError(f"no column {' or '.join(needed)}", f"columns: {join_names(names)}")
        return [column for column in mapping.values() if column in names]

    rows, records, num_lost = list[SourceRow](), list[Record](), len(issues.lost_rows)
    for path in files:
        for record in _read_table(path, issues, select_columns, TableFormat(keeps_rows=bool(kept))):
            record.values = {role: record.values[name] for role, name in mapping.items() if name in record.values}
            values = record.row if keep_columns == ALL_COLUMNS else {name: record.row.get(name) for name in kept or ()}
            record.row = {}
            records.append(record)
            rows += _lost_rows(issues, num_lost)
            rows.append(SourceRow(str(path), record.line, values))
            num_lost = len(issues.lost_rows)
        rows += _lost_rows(issues, num_lost)
        num_lost = len(issues.lost_rows)
    answer_format, kind, note = like.answer_format, "", ""
    with name_source(first_table):
        roles, note = _interpret_labels(task, records, mapping, {**known, **columns}, require_targets)
        if note:
            kind = f"how {mapping[next(iter(roles))]} is read"
        if task == "choose":
            # Choices in columns that are numbered from 1 have answers from 1, unless the answers say otherwise.
            numbered = re.fullmatch(r"\D+1", mapping.get("choice1", ""))
            default = answer_format or ("indices from 1" if numbered else "")
            answer_format, note = infer_answer_format((record.values for record in records), default)
            kind = f"answers are read as {answer_format}; they would also fit"
    mapping = {roles.get(role, role): name for role, name in mapping.items() if roles.get(role, role)}
    if note:
        issues.info(first_table, None, kind, note)
    if unused := [name for name in names if name not in mapping.values() and name not in (kept or ())]:
        issues.info(first_table, None, "unused columns", join_names(unused))
    unread = (row for row in rows if not row.error)
    items = list(_parse_rows(zip(unread, records, strict=True), task, answer_format, require_targets, issues))
    _unify_labels(items, like.labels)
    return ExampleSet(task, mapping, items, answer_format, rows=rows if keep_columns is not None else [])


def _lost_rows(issues: IssueLog, start: int) -> list[SourceRow]:
    """The rows that were lost since there were `start`."""
    return [SourceRow(path, line, {}, error=reason) for path, line, reason in issues.lost_rows[start:]]


def _resolve_files(paths: Iterable[Path | str], issues: IssueLog) -> list[Path]:
    """The files, and the tables of each folder (or its text files, if it has no tables), in the order of their names."""
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
        if skipped := len(entries) - len(selected):
            issues.info(path, None, "skipped files that are not tables, and subfolders", count=skipped)
        files += selected
    return files


def _peek_columns(files: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """The first file with columns, and its columns in order; None and [] if there is none."""
    names: dict[str, None] = {}

    def collect_names(columns: list[str]) -> list[str]:
        names.update(dict.fromkeys(columns))
        return []

    for path in files:
        if file_format(path)[0] in TABLE_SUFFIXES:
            for _ in islice(read_records(path, IssueLog(), collect_names), _MAX_PEEKED_RECORDS):
                pass  # issues are reported when the file is read completely
        if names:
            return path, list(names)
    return None, []


def _read_table(
    path: Path,
    issues: IssueLog,
    select_columns: ColumnSelector | None = None,
    table_format: TableFormat = TableFormat(),
) -> Iterator[Record]:
    """The records of a table. A file without any is reported."""
    total_before, has_values = issues.total, False
    for record in read_records(path, issues, select_columns, table_format=table_format):
        has_values = has_values or bool(record.values)
        yield record
    if not has_values and issues.total == total_before:
        issues.add(path, None, "the file has no examples")


def _interpret_labels(
    task: str,
    records: Sequence[Record],
    columns: Mapping[str, str],
    chosen: Container[str],
    require_targets: bool,
) -> tuple[dict[str, str], str]:
    """Decide by all values of the label column what it is, and give its values their role.

    Args:
        task: Name of the task.
        records: The values of each role.
        columns: The column of each role.
        chosen: The roles whose columns were chosen by the user or for the training data.
        require_targets: Whether the examples are learned from.

    Returns:
        {role: new role}, with "" for a column that is not used; and what was decided, for a message.
    """
    role = next((role for role in ("label", "labels", "score") if role in columns), "")
    if not role:
        return {}, ""
    values, new_role, note = [record.values.pop(role, None) for record in records], role, ""
    if task in ("rewrite", "chat"):
        marks = {parse_truth(value) for value in values}
        if require_targets and False in marks and None not in marks:
            raise UsageError(
                f"{columns[role]} marks some answers as undesired (unpaired preferences), and they would be learned like the "
                f"others. Keep the rows whose {columns[role]} is true, and leave the column out; or pair two answers to each "
                "prompt in the columns prompt, chosen and rejected"
            )
        new_role = ""
    elif task == "similarity":
        scores, decimal_note = convert_decimal_commas(values)
        if role == "score" or is_score_column(scores):
            new_role, values, note = "score", scores, decimal_note
    elif task == "classify":
        new_role, values, note = interpret_labels(values, role, may_change=role not in chosen)
    for record, value in zip(records, values, strict=True) if new_role else ():
        record.values[new_role] = value
    return {role: new_role}, note


def _unify_labels(examples: Sequence[Example], known_labels: Sequence[str]) -> None:
    """Spell labels as `known_labels`; without those, truth values of a column that has nothing else as True and False."""
    names = known_labels or label_names(examples)
    is_binary = all(parse_truth(name) is not None for name in names)

    def key(name: str) -> str | bool | None:
        return parse_truth(name) if is_binary else name.lower()

    spellings: dict[Any, str] = {key(name): name for name in names}
    if not known_labels:
        spellings = {False: "False", True: "True"} if is_binary and not set(names) <= {"0", "1"} else {}
    elif len(spellings) < len(names):  # labels that differ only by their case
        spellings = {}
    for example in examples if spellings else ():
        labels = (name if name in known_labels else spellings.get(key(name), name) for name in _example_labels(example))
        if "label" in example.fields:
            example.fields["label"] = next(labels)
        elif "labels" in example.fields:
            example.fields["labels"] = tuple(dict.fromkeys(labels))


def _parse_rows(
    rows: Iterable[tuple[SourceRow, Record]], task: str, answer_format: str, require_targets: bool, issues: IssueLog
) -> Iterator[Example]:
    """The examples of rows by role, which are also put into the rows. Rows that are not valid are reported."""
    target_roles = [role for group in TASKS[task].targets for role in group]
    for row, record in rows:
        path, values, fields = row.path, record.values, dict[str, Any]()
        try:
            fields = parse_inputs(task, values)
            if require_targets or any(values.get(role) not in (None, "") for role in target_roles):
                fields |= parse_targets(task, values, fields, answer_format)
        except RowError as error:
            if require_targets or not fields:
                row.error = issues.lose_row(path, record.line, f"{error.kind}; left out", error.detail)
                continue
            if "messages" not in values:  # a conversation that ends with a user message is a valid input
                issues.info(path, record.line, f"{error.kind}; read without its target", error.detail)
        row.example = Example(path, record.line, fields)
        yield row.example


def input_texts(task: str, example: Example) -> tuple[str, ...]:
    """The input texts of an example, without its target; for a conversation, all messages but the last answer."""
    fields = example.fields
    if task == "choose":
        return (fields["question"], *fields["choices"])
    if task in ("chat", "prefer"):
        messages = fields["messages"]
        has_answer = task == "chat" and messages[-1]["role"] == "assistant"
        return tuple(message["content"] for message in (messages[:-1] if has_answer else messages))
    if task not in TEXT_FIELDS:
        raise UsageError(f"{task}: not a task with labeled examples; choose from {', '.join(TASKS)}")
    return tuple(fields[role] for role in TEXT_FIELDS[task])


def example_from_texts(task: str, texts: Sequence[str]) -> Example:
    """An example without target from its texts, such as those of a command line.

    Raises:
        UsageError: The number of texts does not fit the task.
    """
    if task == "choose":
        if len(texts) < 3:
            raise UsageError(f"choose takes a question and at least two choices; {len(texts)} texts were given")
        return Example("", 0, {"question": texts[0], "choices": tuple(texts[1:])})
    roles = TEXT_FIELDS.get(task, ("message",))
    if len(texts) != len(roles):
        raise UsageError(f"{task} takes {' and '.join(roles)}; {len(texts)} texts were given")
    if task not in TEXT_FIELDS:
        return Example("", 0, {"messages": ({"role": "user", "content": texts[0]},)})
    return Example("", 0, dict(zip(roles, texts, strict=True)))


def label_names(examples: Iterable[Example]) -> list[str]:
    """The distinct labels: in numerical order if all are numbers, else in lexical order."""
    names = sorted({name for example in examples for name in _example_labels(example)})
    numbers = [number for name in names if (number := parse_float(name)) is not None]
    return [name for _, name in sorted(zip(numbers, names, strict=True))] if len(numbers) == len(names) else names


def _example_labels(example: Example) -> tuple[str, ...]:
    fields = example.fields
    return (fields["label"],) if "label" in fields else fields.get("labels", ())


def filter_known_labels(examples: Iterable[Example], known_labels: Iterable[str], issues: IssueLog) -> list[Example]:
    """The examples whose labels are all known; other examples are reported. Examples without a label are kept."""
    known = set(known_labels)
    kept: list[Example] = []
    for example in examples:
        if unknown := [name for name in _example_labels(example) if name not in known]:
            kind = "a label that does not occur in the training data; left out"
            issues.add(example.path, example.line, kind, ", ".join(unknown))
        else:
            kept.append(example)
    return kept


def split_examples(
    examples: ExampleSet, validation_fraction: float, test_fraction: float = 0.0, *, version: int = 2
) -> tuple[list[Example], list[Example], list[Example]]:
    """Split examples into training, validation and test set, by a hash of the input.

    Inputs are taken in the order of their hash until each set has its share of the examples. An input is in one set only,
    whatever its targets, and the order of the examples has no effect. Two sentences are one input in either order; for
    entailment only the premise counts, because data sets ask several questions about one premise. The training set has at
    least one input, and so has the validation set if there are two.

    Args:
        examples: The examples.
        validation_fraction: The share of the validation set.
        test_fraction: The share of the test set.
        version: 1 for the split of runs that were started before there was a test set: the validation set has the inputs
            whose hash is below a threshold.
    """
    counts = Counter(hash_inputs(examples.task, example) for example in examples)
    hashes = sorted(counts)
    sets: list[set[int]] = []
    for fraction in (validation_fraction, test_fraction):
        chosen, total = set[int](), 0
        for value in hashes[:-1] if fraction else ():
            is_full = value >= fraction * 2**64 and bool(chosen) if version == 1 else total >= fraction * len(examples)
            if is_full:
                break
            chosen.add(value)
            total += counts[value]
        sets.append(chosen)
        hashes = hashes[len(chosen) :]
    parts: tuple[list[Example], list[Example], list[Example]] = ([], [], [])
    for example in examples:
        value = hash_inputs(examples.task, example)
        parts[1 if value in sets[0] else 2 if value in sets[1] else 0].append(example)
    return parts


def hash_inputs(task: str, example: Example) -> int:
    """A 64-bit hash of the input."""
    texts = input_texts(task, example)
    texts = {"similarity": tuple(sorted(texts)), "entail": texts[:1]}.get(task, texts)
    return int.from_bytes(hashlib.blake2b(json.dumps(texts).encode(), digest_size=8).digest(), "big")
