"""Labeled data in the form in which sources publish it, as tables.

A source is a table under any name; two files of lines that belong together; a file of lines for each class; a folder of texts
for each class; or texts in pairs.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

from nextword.common.errors import UsageError
from nextword.common.fs import is_json_array, is_json_object
from nextword.data.decoding import LineReader, decode_chunks, file_format
from nextword.data.issues import IssueLog
from nextword.data.readers import (
    ARCHIVE_SUFFIXES,
    TABLE_SUFFIXES,
    ColumnSelector,
    MissingColumnError,
    Record,
    TableFormat,
    read_records,
)
from nextword.tasks.schema import TASKS, fitting_tasks, resolve_columns

MAX_PEEKED_RECORDS = 1000  # whose columns and values decide how a table is read
HEADER_NAMES = frozenset(name.lower() for s in TASKS.values() for names in s.columns.values() for name in names)
SPLIT_COLUMNS = ("split", "partition", "subset", "set")
SPLITS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "devel", "development"), "validation"),
    **dict.fromkeys(("test", "testing", "tst", "eval"), "test"),
}
_SPLIT_NAME = re.compile(rf"(?:^|[-_. ])({'|'.join(SPLITS)})(?=$|[-_. 0-9])", re.IGNORECASE)
_UNLABELED = ("unsup", "unsupervised", "unlabeled", "unlabelled")
_CLASS_NAMES = ("pos", "neg", "positive", "negative")
_SOURCE_NAMES = ("article", "document", "source", "src", "input", "stor", "question", "prompt", "original", "complex")
_TARGET_NAMES = ("summar", "target", "tgt", "output", "reference", "highlight", "abstract", "answer", "title", "simple")
_FASTTEXT = re.compile(r"((?:__label__\S+[ ,]*)+)(.*)")
_TAGGED_TOKEN = re.compile(r"\S+(?:[ \t]\S+)*[ \t](?:O|[BIES]-\S+)\s*")
_SECTION = re.compile(r"^@([a-z]+)[0-9]*[ \t]*$", re.MULTILINE)

PAIR_COLUMNS = ["prompt", "completion"]
_SECTION_NOTE = "each text is the prompt, and the section after its @ line the completion"

Rows = Iterator[tuple[Path, Record]]
TextRows = Iterator[tuple[Path, int, dict[str, Any]]]  # file, line, and the value of each column


@dataclass
class Source:
    """A table, or files that are read as one.

    Attributes:
        path: The file or folder, for messages.
        columns: Its columns.
        read: Reads its rows, each with its file, given an issue log, the columns to read (of texts, all are read) and whether
            all values are kept.
        sample: The values of its first rows.
        split: train, validation or test, if the name says which part of the data it is.
        task: The task that its form belongs to; "" if the columns decide.
        note: What was decided, and how to decide otherwise, for a message.
    """

    path: Path
    columns: list[str]
    read: Callable[[IssueLog, ColumnSelector, bool], Rows]
    sample: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    split: str = ""
    task: str = ""
    note: str = ""


def find_sources(
    paths: Iterable[Path], task: str | None, columns: Mapping[str, str], issues: IssueLog, is_labeled: bool = True
) -> tuple[list[Source], list[Path]]:
    """The sources at paths, and the texts that belong to none.

    Args:
        paths: Files and folders.
        task: The task, if it is known.
        columns: Columns chosen by the user, {role: column}.
        issues: Log for files that are not read.
        is_labeled: Whether the data has targets. Else each line of a text file, and each text file of a folder, is a row.

    Raises:
        UsageError: A path does not exist, or files do not belong together as the task demands.
    """
    sources: list[Source] = []
    texts: list[Path] = []
    folders: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder")
        if not path.is_dir():
            suffix = table_suffix(path) if task != "continue" or file_format(path)[0] in TABLE_SUFFIXES else ""
            texts += [] if suffix else [path]
            sources += [_table(path, suffix, "", task, columns, is_labeled)] if suffix else []
            continue
        visible = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        files = sorted(p for p in visible if p.is_file())
        tables = [p for p in files if file_format(p)[0] in TABLE_SUFFIXES and p.parent == path]
        tables = tables or [p for p in files if file_format(p)[0] in TABLE_SUFFIXES]
        if tables:
            if skipped := sum(p.parent == path for p in visible) - sum(p.parent == path for p in tables):
                issues.info(path, None, "skipped files that are not tables, and subfolders", count=skipped)
            splits = [split_of(p.relative_to(path)) for p in tables]
            has_splits = "train" in splits and len(set(splits)) > 1
            sources += [
                _table(p, table_suffix(p), split if has_splits else "", task, columns, is_labeled)
                for p, split in zip(tables, splits, strict=True)
            ]
            if has_splits:
                sources[-1].note = "the names of the files say which examples are for training, validation and test"
        elif any(p.parent != path for p in files) and task != "continue":
            folders.append(path)
        elif is_labeled or not files:
            texts += [p for p in files if p.parent == path and file_format(p)[0] not in ARCHIVE_SUFFIXES]
        else:
            sources.append(_documents(path, [(p, {}) for p in files], task or "classify"))
    if len(folders) == 2 and not sources and not texts and (pairs := _match_folders(folders)):
        return [_pairs(folders[0].parent, pairs, "the files of two folders with the same names are pairs")], []
    for folder in folders:
        sources += _folder_sources(folder, task, issues)
    if texts and not sources and task != "continue":
        sources, texts = _text_sources(texts, task, issues, is_labeled)
    return sources, texts


def split_of(path: Path) -> str:
    """The split that a path names: train, validation or test; else ""."""
    for part in reversed(path.parts):
        if match := _SPLIT_NAME.search(part):
            return SPLITS[match[1].lower()]
    return ""


# ---------------------------------------------------------------- tables


def table_suffix(path: Path) -> str:
    """The format of a table, by its name or else by its first lines; "" for text."""
    suffix = file_format(path)[0]
    if suffix in TABLE_SUFFIXES and suffix != ".json":
        return suffix
    if suffix in (".md", *ARCHIVE_SUFFIXES):
        return ""
    lines = [line for line in islice(_lines(path, IssueLog()), 200) if line.strip()]
    if re.match(r"\s*(\{|\[\s*\{)", "\n".join(lines[:2])) or suffix == ".json":
        are_objects = [line.lstrip().startswith("{") and line.rstrip().endswith("}") for line in lines]
        return ".jsonl" if len(lines) > 1 - (suffix != ".json") and all(are_objects) else ".json"
    tabs = Counter(line.count("\t") for line in lines)
    if len(lines) > 1 and (most := tabs.most_common(1)[0])[0] > 0 and most[1] >= 0.9 * len(lines):
        return "" if sum(_TAGGED_TOKEN.fullmatch(line) is not None for line in lines) > len(lines) / 2 else ".tsv"
    for separator in ";|" if len(lines) > 4 else "":  # labels at the end of all lines
        ends = {line.rpartition(separator)[2].strip() for line in lines}
        are_labels = len(ends) <= len(lines) / 2 and all(0 < len(end) <= 40 for end in ends)
        if are_labels and len({line.count(separator) for line in lines}) == 1 and separator in lines[0]:
            return ".csv"
    names = [cell.strip("\"' ").lower() for cell in re.split(r"[,;|]", lines[0])] if len(lines) > 1 else []
    is_header = len(names) > 1 and all(re.fullmatch(r"[\w#.:-]+", name) for name in names)
    return ".csv" if is_header and not HEADER_NAMES.isdisjoint(names) else ""


def _table(
    path: Path, suffix: str, split: str, task: str | None, columns: Mapping[str, str], is_labeled: bool
) -> Source:
    """A table, with its columns and first rows. Nested records become rows, unless the other columns fit the task."""
    is_numbered = bool(columns) and all(name.isdigit() for name in columns.values())
    table_format = TableFormat(suffix, HEADER_NAMES, is_numbered)
    names: dict[str, None] = {}

    def collect_names(found: list[str]) -> list[str]:
        names.update(dict.fromkeys(found))
        return found

    records = read_records(path, IssueLog(), collect_names, table_format=table_format)
    sample = [record.values for record in islice(records, MAX_PEEKED_RECORDS)]
    source = Source(path, list(names), partial(_read_table, path, table_format), sample, split)
    is_nested = any(_is_nested(value) for row in sample for value in row.values())
    if is_nested and not _fits(task, columns, source.columns, is_labeled):
        sample = [row for values in sample for row in flatten(values)]
        names = dict.fromkeys(name for row in sample for name in row)
        read = partial(_read_table, path, table_format, is_nested=True)
        return Source(path, list(names), read, sample, split, note="nested records are read as rows")
    return source


def _fits(task: str | None, columns: Mapping[str, str], names: list[str], is_labeled: bool) -> bool:
    task = task or next(iter(fitting_tasks([*columns, *names])), "continue")
    with suppress(UsageError):
        resolve_columns(task, names, columns, is_labeled)
        return task != "continue"
    return False


def _is_nested(value: Any) -> bool:
    return is_json_object(value) or (is_json_array(value) and bool(value) and all(map(is_json_object, value)))


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[dict[str, Any]]:
    """The rows of a record: one for each object in its lists, with the values around it. Names are joined by dots."""
    rows: list[dict[str, Any]] = [{}]
    for name, value in values.items():
        if not _is_nested(value) or name in ("choices", "options"):
            rows = [{**row, prefix + name: value} for row in rows]
            continue
        items = cast(list[dict[str, Any]], [value] if is_json_object(value) else value)
        inner = [row for item in items for row in flatten(item, f"{prefix}{name}.")]
        rows = [{**row, **more} for row in rows for more in inner] if len(rows) * len(inner) < 10_000 else rows
    return rows


def _read_table(
    path: Path,
    table_format: TableFormat,
    issues: IssueLog,
    select: ColumnSelector,
    keeps_rows: bool,
    *,
    is_nested: bool = False,
) -> Rows:
    if not is_nested:
        table_format = replace(table_format, keeps_rows=keeps_rows)
        yield from ((path, record) for record in read_records(path, issues, select, table_format=table_format))
        return
    for record in read_records(path, issues, None, table_format=table_format):
        for row in flatten(record.values):
            try:
                values = {name: row[name] for name in select(list(row)) if name in row}
            except MissingColumnError as error:
                issues.lose_row(path, record.line, error.kind, error.detail)
                continue
            yield path, Record(record.line, values, row if keeps_rows else {})


# ---------------------------------------------------------------- lines


def _text_source(
    path: Path,
    columns: list[str],
    read_rows: Callable[[IssueLog], TextRows],
    task: str = "",
    split: str = "",
    note: str = "",
) -> Source:
    """Texts with these columns."""

    def read(issues: IssueLog, select: ColumnSelector, keeps_rows: bool) -> Rows:
        for file, line, row in read_rows(issues):
            yield file, Record(line, row, row if keeps_rows else {})

    return Source(path, columns, read, split=split, task=task, note=note)


def _lines(path: Path, issues: IssueLog) -> Iterator[str]:
    for line in LineReader(path, decode_chunks(path, issues), issues):
        yield line.removesuffix("\n")


def _read_lines(paths: Sequence[Path], columns: Sequence[str], issues: IssueLog) -> TextRows:
    """The lines of files that belong together."""
    for number, lines in enumerate(zip(*(_lines(path, issues) for path in paths), strict=False), 1):
        yield paths[0], number, dict(zip(columns, lines, strict=True))


def _read_classes(names: Mapping[Path, str], issues: IssueLog) -> TextRows:
    """The lines of a file for each class."""
    for path, label in names.items():
        for number, line in enumerate(_lines(path, issues), 1):
            yield path, number, {"text": line, "label": label}


def _fasttext_rows(path: Path, issues: IssueLog) -> Iterator[tuple[str, list[str]]]:
    """The text and the labels of each line, such as ``__label__positive So good.``"""
    for line in _lines(path, issues):
        match = _FASTTEXT.fullmatch(line)
        yield (match[2], re.findall(r"__label__([^\s,]+)", match[1])) if match else (line, [])


def _read_fasttext(role: str, path: Path, issues: IssueLog) -> TextRows:
    for number, (text, labels) in enumerate(_fasttext_rows(path, issues), 1):
        yield path, number, {"text": text, role: labels if role == "labels" else next(iter(labels), None)}


def _text_sources(
    texts: list[Path], task: str | None, issues: IssueLog, is_labeled: bool
) -> tuple[list[Source], list[Path]]:
    """Text files as sources, as far as they belong together."""
    first = next(_lines(texts[0], IssueLog()), "")
    if all(_FASTTEXT.match(next(_lines(path, IssueLog()), "")) for path in texts):
        has_several = any(len(labels) > 1 for path in texts for _, labels in _fasttext_rows(path, IssueLog()))
        role = "labels" if has_several else "label"
        return [_text_source(p, ["text", role], partial(_read_fasttext, role, p), "classify") for p in texts], []
    head = [line for line in islice(_lines(texts[0], IssueLog()), 200) if line.strip()]
    if len(head) > 3 and sum(_TAGGED_TOKEN.fullmatch(line) is not None for line in head) > 0.8 * len(head):
        raise UsageError(
            f"{texts[0]}: one token with its tags on each line ({first[:40]!r}), as for named entities. No task labels tokens. "
            "To classify sentences, make a table of text and label; to continue pre-training on it: --task continue"
        )
    if not is_labeled:
        role = "instruction" if task == "chat" else TASKS[task or "classify"].inputs[0][0]
        note = "each line is a row"
        return [_text_source(path, [role], partial(_read_lines, [path], [role]), note=note) for path in texts], []
    if all(map(_has_sections, texts[:20])):
        return [_documents(texts[0], [(path, {}) for path in texts], "rewrite", "", _SECTION_NOTE)], []
    stems: dict[str, list[Path]] = {}
    for path in texts:
        stems.setdefault(_without_compression(path).stem, []).append(path)
    suffixes = [{_without_compression(path).suffix for path in group} for group in stems.values()]
    are_pairs = all(len(group) == 2 for group in stems.values()) and all(s == suffixes[0] for s in suffixes)
    names = {path: _class_name(path, len(stems) == 1) for path in texts}
    are_classes = len(texts) > 1 and all(name.lower() in _CLASS_NAMES for name in names.values())
    if task == "classify" or (task is None and are_classes):
        if len(texts) < 2:
            raise UsageError(
                f"{texts[0]}: text without labels. Give a table, a file of lines for each class, or a folder for each class"
            )
        note = f"each line is an example, and its label the name of the file ({', '.join(names.values())})"
        return [_text_source(texts[0], ["text", "label"], partial(_read_classes, names), "classify", note=note)], []
    if task == "rewrite" and not are_pairs and len(texts) == 2:
        stems, are_pairs = {"": texts}, True
    if are_pairs and task in ("rewrite", None):
        return _parallel_sources(stems, task), []
    return [], texts


def _without_compression(path: Path) -> Path:
    return path.with_suffix("") if file_format(path)[1] else path


def _class_name(path: Path, by_suffix: bool) -> str:
    path = _without_compression(path)
    return path.suffix.removeprefix(".") if by_suffix and path.suffix else path.stem


def _parallel_sources(stems: Mapping[str, list[Path]], task: str | None) -> list[Source]:
    """Files of two kinds that belong together: line by line, or each as a whole if they are many."""
    groups = list(stems.values())
    splits = [split_of(Path(stem)) for stem in stems]
    if len(groups) > 1 and not all(splits):
        return [_pairs(groups[0][0].parent, [(a, b) for a, b in groups], "files of one name are a pair")]
    sources: list[Source] = []
    for (first, second), split in zip(groups, splits, strict=True):
        counts = [sum(1 for _ in _lines(path, IssueLog())) for path in (first, second)]
        if counts[0] != counts[1]:
            raise UsageError(
                f"{first} has {counts[0]:,} lines and {second} {counts[1]:,}: lines that belong together need the same number"
            )
        a, b = first.name, second.name
        note = f"line by line, {a} is the prompt and {b} the completion; for the other direction exchange the files"
        read_rows = partial(_read_lines, (first, second), PAIR_COLUMNS)
        split = split if len(groups) > 1 else ""
        sources.append(_text_source(first, PAIR_COLUMNS, read_rows, "rewrite", split, note))
    return sources


# ---------------------------------------------------------------- folders of texts


def _read_text(path: Path, issues: IssueLog) -> str:
    return "".join(decode_chunks(path, issues)).strip()


def _documents(
    path: Path, files: list[tuple[Path, dict[str, str]]], task: str, split: str = "", note: str = ""
) -> Source:
    """Whole texts: with the label of each, or with their sections."""

    def read_rows(issues: IssueLog) -> TextRows:
        for file, more in files:
            text = _read_text(file, issues)
            yield file, 1, _sections(text) if task == "rewrite" else {"text": text, **more}

    columns = PAIR_COLUMNS if task == "rewrite" else ["text", *files[0][1]]
    return _text_source(path, columns, read_rows, task, split, note)


def _has_sections(path: Path) -> bool:
    return _SECTION.search("".join(islice(decode_chunks(path, IssueLog()), 4))) is not None


def _sections(text: str) -> dict[str, str]:
    """The text before the first @ line, and the sections of its name (@subject, @highlight)."""
    before, *parts = _SECTION.split(text)
    sections = [content.strip() for name, content in zip(parts[::2], parts[1::2], strict=True) if name == parts[0]]
    return {"prompt": before.strip(), "completion": "\n".join(sections)}


def _pairs(path: Path, pairs: Sequence[tuple[Path, Path]], note: str) -> Source:
    """Whole texts in pairs; the first is the prompt, unless the names or the lengths say otherwise."""
    parts = [pairs[0][i].parts for i in range(2)]
    names = [" ".join(part for part in parts[i] if part not in parts[1 - i]).lower() for i in range(2)]
    sizes = [sum(pair[i].stat().st_size for pair in pairs) for i in range(2)]
    is_named = any(name in names[1] for name in _TARGET_NAMES) and not any(name in names[0] for name in _TARGET_NAMES)
    if not is_named and (sizes[1] > sizes[0] or any(name in names[0] for name in _TARGET_NAMES)):
        pairs = [(second, first) for first, second in pairs]

    def read_rows(issues: IssueLog) -> TextRows:
        for first, second in pairs:
            yield first, 1, {"prompt": _read_text(first, issues), "completion": _read_text(second, issues)}

    first, second = pairs[0]
    note += f": {first} is a prompt, and {second} its completion"
    return _text_source(path, PAIR_COLUMNS, read_rows, "rewrite", note=note)


def _match_folders(folders: Sequence[Path]) -> list[tuple[Path, Path]]:
    """The files of the same name in two folders; [] if most have no partner."""
    first, second = ({p.relative_to(f).with_suffix(""): p for p in f.rglob("*") if p.is_file()} for f in folders)
    shared = sorted(first.keys() & second.keys())
    return [(first[name], second[name]) for name in shared] if len(shared) > 0.9 * max(len(first), len(second)) else []


def _folder_sources(folder: Path, task: str | None, issues: IssueLog) -> list[Source]:
    """A folder of texts for each class, within a folder for each split, if there are such; or two folders of pairs."""
    groups: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and file_format(path)[0] not in ARCHIVE_SUFFIXES:
            groups.setdefault(path.parent, []).append(path)
    leaves = {parent: files for parent, files in groups.items() if not any(parent in other.parents for other in groups)}
    if ignored := sum(len(files) for parent, files in groups.items() if parent not in leaves):
        issues.info(folder, None, "left out: files beside the folders of texts", count=ignored)
    tops = sorted({folder / parent.relative_to(folder).parts[0] for parent in leaves})
    if len(tops) == 2 and task in ("rewrite", None) and (pairs := _match_folders(tops)):
        names = [top.name.lower() for top in tops]
        is_named = all(any(n in name for n in (*_SOURCE_NAMES, *_TARGET_NAMES)) for name in names)
        if task == "rewrite" or is_named or (len(leaves) > 2 and not all(map(split_of, map(Path, names)))):
            note = (
                "the files of two folders with the same names are pairs (if the folders are classes: --task classify)"
            )
            return [_pairs(folder, pairs, note)]
    by_split: dict[str, list[tuple[Path, dict[str, str]]]] = {}
    is_classes = len(leaves) > 1 and not all(SPLITS.get(parent.name.lower()) for parent in leaves)
    has_sections = all(_has_sections(files[0]) for files in leaves.values())
    for parent, files in leaves.items():
        inside = parent.relative_to(folder)
        split = split_of(inside.parent if is_classes and not has_sections else inside)
        if parent.name.lower() in _UNLABELED:
            issues.info(parent, None, "left out: texts without labels", count=len(files))
        else:
            by_split.setdefault(split, []).extend((path, {"label": parent.name}) for path in files)
    if "train" not in by_split:
        by_split = {"": [item for items in by_split.values() for item in items]}
    if has_sections:
        return [_documents(folder, items, "rewrite", split, _SECTION_NOTE) for split, items in by_split.items()]
    if not is_classes:
        raise UsageError(
            f"{folder}: texts without labels. Give a folder of texts for each class, or a table; to continue pre-training "
            "on them: --task continue"
        )
    names = sorted({labels["label"] for items in by_split.values() for _, labels in items})
    note = f"the label of a text is the name of its folder ({', '.join(names[:6])}{', …' if len(names) > 6 else ''})"
    if task is None and len(tops) == 2 and _match_folders(tops):
        note += "; if the folders hold pairs: --task rewrite"
    return [_documents(folder, items, "classify", split, note) for split, items in by_split.items()]
