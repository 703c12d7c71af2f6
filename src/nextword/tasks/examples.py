"""Labeled examples read from tables. Rows that are not valid are reported with file and line, and left out."""

import hashlib
import json
import re
from collections import Counter, deque
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nextword.common.errors import UsageError
from nextword.common.text_units import nfc
from nextword.data.decoding import file_format
from nextword.data.issues import IssueLog, RowError, join_names, name_source
from nextword.data.readers import TABLE_SUFFIXES, ColumnSelector, MissingColumnError, Record, find_column
from nextword.tasks.schema import (
    TASKS,
    TEXT_FIELDS,
    SuggestionError,
    ask_about_labels,
    convert_decimal_commas,
    infer_answer_format,
    infer_columns,
    interpret_labels,
    is_score_column,
    parse_float,
    parse_inputs,
    parse_targets,
    parse_truth,
    resolve_columns,
    suggest_columns,
)
from nextword.tasks.sources import SPLIT_COLUMNS, SPLITS, Source, find_sources

ALL_COLUMNS = ("*",)
_TEXT_SUFFIXES = (".txt", ".md")
_MARKUP = {
    "HTML entities": re.compile(r"&(?:[a-zA-Z]{2,8}|#[0-9]{1,5}|#x[0-9a-fA-F]{1,5});"),
    "HTML tags": re.compile(r"</?[a-zA-Z][a-zA-Z0-9]{0,9}(?:\s+[a-zA-Z-]+\s*=[^<>]*|\s*)/?>"),
}


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
        split: train, validation or test, if a column, a file or a folder says so.
    """

    path: str
    line: int
    fields: dict[str, Any]
    split: str = ""


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
        reason: Why this is the task, if it was inferred.
    """

    task: str
    columns: dict[str, str]
    items: list[Example]
    answer_format: str = ""
    labels: tuple[str, ...] = ()
    rows: list[SourceRow] = field(default_factory=list[SourceRow])
    reason: str = field(default="", compare=False)

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
    label_map: Mapping[str, str] | None = None,
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
        label_map: New names of labels; rows whose label becomes empty are left out. If it is given, even empty, labels that may
            be missing, or one label in several spellings, have to be in it.

    Raises:
        UsageError: A path does not exist, the task or a column cannot be inferred, the targets contradict each other, or the
            labels leave a question open.
        MissingDependencyError: A file format needs a package that is not installed.
    """
    paths = [paths] if isinstance(paths, Path | str) else paths
    like = ExampleSet("", {}, []) if like is None else like
    columns, task, reason = columns or {}, task or like.task or None, ""
    sources, texts = find_sources(map(Path, paths), task, columns, issues, require_targets)
    first = next((source for source in sources if source.columns), None)
    if first is None:
        return ExampleSet(_task_without_tables(sources, texts, task, issues), {}, [])
    names, first_table = first.columns, first.path
    with name_source(first_table):
        known = {
            role: name for role, name in like.columns.items() if name in names or set(name.split(",")) <= set(names)
        }
        if not require_targets and len(names) == 1 and len(roles := TEXT_FIELDS.get(task or "", ())) == 1:
            known[roles[0]] = names[0]
        if task is None:
            task, reason = first.task, "the form of the files"
            if not task:
                task, known, reason = infer_columns(names, first.sample, columns)
        try:
            mapping = resolve_columns(task, names, {**known, **columns}, require_targets)
        except SuggestionError as error:
            options = suggest_columns(task, names, first.sample, {**known, **columns}, require_targets)
            raise SuggestionError(str(error), options) from error
    if task == "continue":
        return ExampleSet(task, mapping, [], reason=reason)
    for note in dict.fromkeys(source.note for source in sources if source.note):
        issues.info(first_table, None, note)
    kept = names if keep_columns == ALL_COLUMNS else keep_columns
    if unknown := set(kept or ()) - set(names):
        raise UsageError(
            f"{first_table}: no column {join_names(sorted(unknown))} to keep; columns: {join_names(names)}"
        )
    split_column = find_split_column(first, mapping.values()) if require_targets and not like.task else None
    bits = {role: name.split(",") for role, name in mapping.items() if role == "labels" and name not in names}
    wanted = [name for role, name in mapping.items() if role not in bits] + sum(bits.values(), list[str]())

    def select_columns(names: list[str]) -> list[str]:
        for group in TASKS[task].required(require_targets):
            needed = [name for role in group if role in mapping for name in bits.get(role, [mapping[role]])]
            if not any(column in names for column in needed) and not kept:
                raise MissingColumnError(f"no column {' or '.join(needed)}", f"columns: {join_names(names)}")
        return [column for column in (*wanted, split_column) if column in names]

    rows, records, splits, num_lost = list[SourceRow](), list[Record](), list[str](), len(issues.lost_rows)
    for source in sources:
        for path, record in _read_source(source, issues, select_columns, bool(kept)):
            splits.append(source.split or SPLITS.get(str(record.values.get(split_column or "")).strip().lower(), ""))
            values = record.row if keep_columns == ALL_COLUMNS else {name: record.row.get(name) for name in kept or ()}
            record.values = _values_by_role(record.values, mapping, bits)
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
    if unused := [name for name in names if name not in (*wanted, split_column, *(kept or ()))]:
        issues.info(first_table, None, "unused columns", join_names(name or "(without a name)" for name in unused))
    unread = [row for row in rows if not row.error]
    items = list(_parse_rows(zip(unread, records, splits, strict=True), task, answer_format, require_targets, issues))
    if require_targets and not like.task:
        _count_markup(task, items, issues)
    if label_map:
        label_map = {nfc(old): nfc(new) for old, new in label_map.items()}
        items = _map_labels(items, label_map, issues)
    if label_map is not None and not like.labels:
        with name_source(first_table):
            ask_about_labels(Counter(name for item in items for name in _example_labels(item)), label_map)
    _unify_labels(items, like.labels)
    return ExampleSet(task, mapping, items, answer_format, rows=rows if keep_columns is not None else [], reason=reason)


def _task_without_tables(sources: Sequence[Source], texts: Sequence[Path], task: str | None, issues: IssueLog) -> str:
    """The task of files without columns: to continue pre-training on text. The issues say why there is no other."""
    if task is None and texts and all(file_format(path)[0] in _TEXT_SUFFIXES for path in texts):
        return "continue"
    if task == "continue":
        return task
    file_issues = issues if task else IssueLog()
    for source in sources:
        deque(_read_source(source, file_issues, list[str]), maxlen=0)
    for path in texts:
        file_issues.add(path, None, f"not a supported table ({', '.join(TABLE_SUFFIXES)}, plain, .gz or .zst)")
    if task is None:
        message = "cannot infer a task: there are neither examples nor texts"
        raise UsageError("\n".join([message, *file_issues.summary_lines()]))
    return task


def find_split_column(source: Source, used: Collection[str]) -> str | None:
    """The column that says whether a row is for training, validation or test."""
    name = find_column(source.columns, SPLIT_COLUMNS, exclude=used)
    values = {str(row.get(name)).strip().lower() for row in source.sample} if name else set[str]()
    return name if len(values) > 1 and values <= SPLITS.keys() else None


def _values_by_role(
    values: Mapping[str, Any], columns: Mapping[str, str], bits: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The value of each role; for columns of zeros and ones the list of those that are 1."""
    found = {role: values[name] for role, name in columns.items() if name in values}
    for role, names in bits.items():
        found[role] = [name for name in names if parse_truth(values.get(name))]
    return found


def _lost_rows(issues: IssueLog, start: int) -> list[SourceRow]:
    """The rows that were lost since there were `start`."""
    return [SourceRow(path, line, {}, error=reason) for path, line, reason in issues.lost_rows[start:]]


def _read_source(
    source: Source, issues: IssueLog, select_columns: ColumnSelector, keeps_rows: bool = False
) -> Iterator[tuple[Path, Record]]:
    """The rows of a source. One without any is reported."""
    total_before, has_values = issues.total, False
    for path, record in source.read(issues, select_columns, keeps_rows):
        has_values = has_values or bool(record.values)
        yield path, record
    if not has_values and issues.total == total_before:
        issues.add(source.path, None, "the file has no examples")


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
        if require_targets and is_score_column(values) and len(set(map(str, values))) > 20:
            first = next(value for value in values if parse_float(value) is not None)
            raise UsageError(
                f"{columns[role]} has numbers such as {first}, which are no classes, and no task predicts a number for one "
                "text: round them, or name another column with --column label=COLUMN"
            )
        new_role, values, note = interpret_labels(values, role, may_change=role not in chosen)
    for record, value in zip(records, values, strict=True) if new_role else ():
        record.values[new_role] = value
    return {role: new_role}, note


def _count_markup(task: str, examples: Sequence[Example], issues: IssueLog) -> None:
    """Report how many examples have HTML entities or tags, which are read as they are."""
    for kind, pattern in _MARKUP.items():
        found = [(e, m) for e in examples if (m := next(filter(None, map(pattern.search, input_texts(task, e))), None))]
        if found:
            example, match = found[0]
            detail = f"{match[0]} in {len(found):,} of {len(examples):,} examples; they are kept as they are"
            issues.info(example.path, example.line, kind, detail)


def _map_labels(examples: Sequence[Example], label_map: Mapping[str, str], issues: IssueLog) -> list[Example]:
    """The examples with the new names of their labels, without those that have no label left."""
    kept: list[Example] = []
    for example in examples:
        names = _example_labels(example)
        new = tuple(dict.fromkeys(name for old in names if (name := label_map.get(old, old))))
        if names and not new:
            issues.lose_row(example.path, example.line, "its label is left out by --map-label", ", ".join(names))
            continue
        if names != new:
            example.fields |= {"label": new[0]} if "label" in example.fields else {"labels": new}
        kept.append(example)
    return kept


def _unify_labels(examples: Sequence[Example], known_labels: Sequence[str]) -> None:
    """Spell labels as `known_labels`; without those, truth values of a column that has nothing else as True and False."""
    names = known_labels or label_names(examples)
    is_binary = all(parse_truth(name) is not None for name in names)

    def key(name: str) -> str | bool | None:
        return parse_truth(name) if is_binary else nfc(name).lower()

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
    rows: Iterable[tuple[SourceRow, Record, str]],
    task: str,
    answer_format: str,
    require_targets: bool,
    issues: IssueLog,
) -> Iterator[Example]:
    """The examples of rows by role, which are also put into the rows. Rows that are not valid are reported."""
    target_roles = [role for group in TASKS[task].targets for role in group]
    for row, record, split in rows:
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
        row.example = Example(path, record.line, fields, split)
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
