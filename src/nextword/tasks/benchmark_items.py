"""From a suite's files to questions: rows read and checked, sampled, and scrambled. No model here."""

import hashlib
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.data.builtin_datasets import download_hub_files
from nextword.data.decoding import LineReader, decode_chunks, file_format
from nextword.data.issues import IssueLog, error_text
from nextword.data.readers import TABLE_SUFFIXES, Record, read_records
from nextword.tasks.benchmark_spec import Benchmark
from nextword.tasks.parsing import AnswerFormat, Row, RowError, infer_answer_format, parse_inputs, parse_targets
from nextword.tasks.schema import join_names
from nextword.tasks.text_diversity import split_words

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tar.xz", ".txz")
TEXT_SUFFIXES = (".txt", ".md")  # a row a line
PROMPT_WORDS = 16  # words of a text that a model goes on from


class LoglikelihoodItem(NamedTuple):
    """Contexts and continuations of which the likelihood is asked, the answers as they are measured by length, and which
    one is right."""

    requests: tuple[tuple[str, str], ...]
    choices: tuple[str, ...]
    gold_index: int


class GenerationItem(NamedTuple):
    """A text to be gone on from, and what may stand there."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class BenchmarkRow:
    """A row of a suite's files: where it was read, its values, the group it counts in, and how its answer is read."""

    path: str
    line: int
    values: dict[str, Any]
    group: str = ""
    answer_format: AnswerFormat | None = field(default=None, compare=False)


# ---------------------------------------------------------------- files


def load_rows(benchmark: Benchmark, issues: IssueLog) -> list[BenchmarkRow]:
    """The rows of a suite's files, each of them checked; those that are wrong go to `problems` and are left out.

    Raises:
        UsageError: the declaration names no files, or some that are not there.
        NextwordError: not one row can be used; with what was wrong.
        MissingExtra: the files are on the Hub, or in a format, that needs an optional package.
    """
    rows: list[BenchmarkRow] = []
    paths = _resolve_files(benchmark)
    for path in paths:
        for name, record in _iter_records(path, benchmark, issues):
            rows.append(BenchmarkRow(name, record.line, _extract_columns(benchmark, record.values)))
    has_choices = benchmark.kind in ("multiple choice", "completion")
    answer_format = infer_answer_format(_choice_row(benchmark, row, issues) for row in rows) if has_choices else None
    valid_rows = []
    for row in rows:
        try:
            group = _get_field(row.values, benchmark.columns["group"]) if "group" in benchmark.columns else ""
            row = BenchmarkRow(row.path, row.line, row.values, str(group), answer_format)
            loglikelihood_item(benchmark, row) if benchmark.kind not in ("writing", "free text") else generation_item(
                benchmark, row
            )
        except RowError as flaw:
            issues.add(row.path, row.line, flaw.kind, flaw.detail)
        else:
            valid_rows.append(row)
    if not valid_rows and paths:
        where = join_names(map(str, paths))
        raise NextwordError(
            "\n".join([f"{benchmark.name}: not one item to be judged by in {where}", *issues.summary_lines()])
        )
    return valid_rows


def _extract_columns(benchmark: Benchmark, values: dict[str, Any]) -> dict[str, Any]:
    """A row with the columns that stand inside others' texts."""
    for column, pattern in benchmark.extract:
        text = values.get(column)
        if isinstance(text, str) and (found := pattern.search(text)):
            values = found.groupdict() | values
    return values


def _choice_row(benchmark: Benchmark, row: BenchmarkRow, issues: IssueLog) -> Row:
    try:
        values = _choice_values(benchmark, row, False)
    except RowError:  # said when the row is checked
        values = {}
    return Row(Path(row.path), row.line, values)


def _resolve_files(benchmark: Benchmark) -> list[Path]:
    resolved: list[Path] = []
    for file in benchmark.files:
        cut = next((i for i, part in enumerate(file.parts) if set("*?[") & set(part)), len(file.parts))
        root, pattern = Path(*file.parts[:cut]), file.parts[cut:]
        paths = [file] if file.exists() else sorted(root.glob(str(Path(*pattern)))) if pattern else []
        if not paths:
            raise UsageError(f"{file}: no such file, which the suite {benchmark.name} is read from")
        resolved += paths
    if resolved:
        return resolved
    if benchmark.hub_dataset:
        return download_hub_files(benchmark.name, *benchmark.hub_dataset.split(" ", 1))[1]
    if benchmark.kind == "free text":
        return []
    raise UsageError(f"{benchmark.name}: say where its files are: --suite {benchmark.name}=PATH")


def _iter_records(path: Path, benchmark: Benchmark, issues: IssueLog) -> Iterator[tuple[str, Record]]:
    """The rows below a path, each with the name of its file: a table, a text of one row a line, a folder or an archive."""
    if path.is_dir():
        allowed_suffixes = (
            (*TABLE_SUFFIXES, *TEXT_SUFFIXES) if benchmark.kind in ("cloze", "free text") else TABLE_SUFFIXES
        )  # else a README is no data
        table_paths = sorted(
            p for p in path.rglob("*") if file_format(p)[0] in allowed_suffixes and not p.name.startswith(".")
        )
        if not table_paths:
            issues.add(path, None, f"a folder without tables ({', '.join(allowed_suffixes)})")
        for table_path in table_paths:
            yield from _iter_records(table_path, benchmark, issues)
    elif path.name.lower().endswith(ARCHIVE_SUFFIXES):
        yield from _iter_archive_records(path, issues)
    elif file_format(path)[0] in TEXT_SUFFIXES:
        lines = LineReader(path, decode_chunks(path, issues), issues)
        yield from (
            (str(path), Record(lines.line_number, {"text": line.rstrip("\n")})) for line in lines if line.strip()
        )
    elif benchmark.records_field and file_format(path)[0] == ".json":
        yield from _iter_json_records(path, benchmark.records_field, issues)
    else:
        yield from ((str(path), record) for record in read_records(path, issues))


def _iter_archive_records(path: Path, issues: IssueLog) -> Iterator[tuple[str, Record]]:
    """The tables in an archive, read as streams, so that nothing is unpacked to the disk."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = path / member.name
                if not member.isfile() or file_format(name)[0] not in TABLE_SUFFIXES or name.name.startswith("."):
                    continue
                if member.name.startswith("/") or ".." in Path(member.name).parts:
                    raise CorruptFileError(f"{path}: the name {member.name} in it leads out of the archive")
                stream = archive.extractfile(member)
                assert stream is not None
                blocks = iter(partial(stream.read, 2**18), b"")
                yield from ((str(name), record) for record in read_records(name, issues, blocks=blocks))
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise CorruptFileError(f"{path}: not an archive that can be read ({error_text(error)})") from error


def _iter_json_records(path: Path, field_path: str, issues: IssueLog) -> Iterator[tuple[str, Record]]:
    """The objects of a list inside a JSON file; `line` is the number of each in it."""
    try:
        value = json.loads("".join(decode_chunks(path, issues)))
        rows = _get_field(value, (field_path,)) if isinstance(value, dict) else value
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: not valid JSON ({error_text(error)})") from error
    except RowError as flaw:
        issues.add(path, 1, flaw.kind, flaw.detail)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        if isinstance(row, dict):
            yield str(path), Record(number, row)
        else:
            issues.add(path, number, "not an object", f"it is a {type(row).__name__}")


# ---------------------------------------------------------------- questions


def loglikelihood_item(benchmark: Benchmark, row: BenchmarkRow, shuffled_control: bool = False) -> LoglikelihoodItem:
    """What is asked of a model in a row of a likelihood suite.

    Args:
        scrambled: the words of what comes before the answers in another order; of whole sentences, where nothing comes
            before them, the words of the sentences themselves.

    Raises:
        Flaw: the row lacks what the declaration names, or it is not what it should be.
    """
    if benchmark.kind in ("multiple choice", "completion"):
        values = _choice_values(benchmark, row, shuffled_control)
        inputs = parse_inputs("choose", values)
        assert row.answer_format is not None
        gold = parse_targets("choose", values, inputs, row.answer_format)["answer"]
        choices = tuple(_clean_text(benchmark, choice) for choice in inputs["choices"])
        if empty := [i for i, choice in enumerate(choices, 1) if not choice]:
            raise RowError("a choice is empty", f"the {empty[0]}th")
        return LoglikelihoodItem(
            tuple((inputs["question"], benchmark.delimiter + choice) for choice in choices), choices, gold
        )
    if benchmark.kind == "cloze":
        context, answer = _split_cloze(benchmark, row)
        if shuffled_control:
            context = shuffle_words(context, str(row.line))
        return LoglikelihoodItem(((context, answer),), (answer.strip(),), 0)
    context = _render_prompt(benchmark, row, shuffled_control) if benchmark.prompt_templates else ""
    if benchmark.kind == "minimal pairs":
        sentences = [_get_text(row.values, benchmark.columns[side], side) for side in ("good", "bad")]
    else:
        sentences = _stereotype_sentences(benchmark, row)
    if shuffled_control and not benchmark.prompt_templates:
        sentences = [shuffle_words(sentence, str(row.line)) for sentence in sentences]
    return LoglikelihoodItem(tuple((context, benchmark.delimiter + one) for one in sentences), tuple(sentences), 0)


def generation_item(benchmark: Benchmark, row: BenchmarkRow, shuffled_control: bool = False) -> GenerationItem:
    """What a model is to go on from in a row of a suite of writing, and the references. Raises `Flaw` as above."""
    if benchmark.kind == "free text":
        return _open_ended_item(benchmark, row)
    prompt = _render_prompt(benchmark, row, shuffled_control)
    reference = _get_field(row.values, benchmark.columns["reference"])
    references = reference if isinstance(reference, list) else [reference]
    if not references or not all(isinstance(one, str) and one.strip() for one in references):
        raise RowError("the reference is not a text, nor a list of texts")
    return GenerationItem(prompt, tuple(references))


def _open_ended_item(benchmark: Benchmark, row: BenchmarkRow) -> GenerationItem:
    """A prompt; or of a text its first words, which a person has gone on from as well."""
    if benchmark.prompt_templates:
        return GenerationItem(_render_prompt(benchmark, row, False), ())
    if row.values.get("prompt") is not None:
        return GenerationItem(_get_text(row.values, ("prompt",), "prompt"), ())
    text = _get_text(row.values, ("text",), "text")
    word_matches = list(re.finditer(r"\S+", text))
    if len(word_matches) < 2 * PROMPT_WORDS:
        return GenerationItem(text, ())
    return GenerationItem(text[: word_matches[PROMPT_WORDS - 1].end()], (text[word_matches[PROMPT_WORDS - 1].end() :],))


def _choice_values(benchmark: Benchmark, row: BenchmarkRow, shuffled_control: bool) -> dict[str, Any]:
    """Question, choices and answer, as `tasks.rows` reads them."""
    columns = benchmark.columns["choices"]
    if len(columns) > 1:
        choices: Any = [row.values.get(column) for column in columns]
        while choices and choices[-1] in (None, ""):  # questions may have fewer choices than there are columns
            choices.pop()
    else:
        choices = _get_field(row.values, tuple(map(str.strip, "|".join(columns).split("|"))))
    answer = _get_field(row.values, benchmark.columns["answer"])
    return {"question": _render_prompt(benchmark, row, shuffled_control), "choices": choices, "answer": answer}


def _split_cloze(benchmark: Benchmark, row: BenchmarkRow) -> tuple[str, str]:
    """A context and the answer that is to follow it: of a text its last word, after the last space."""
    if "text" not in benchmark.columns:
        return _render_prompt(benchmark, row, False), benchmark.delimiter + _get_text(
            row.values, benchmark.columns["answer"], "answer"
        )
    context, space, word = _get_text(row.values, benchmark.columns["text"], "text").rstrip().rpartition(" ")
    if not context.strip():
        raise RowError("a text of fewer than two words")
    return context, space + word


def _stereotype_sentences(benchmark: Benchmark, source_row: BenchmarkRow) -> list[str]:
    """The stereotype, what contradicts it, and what has nothing to do with it; as lists side by side or as objects."""
    value = _get_field(source_row.values, benchmark.columns["sentences"])
    if isinstance(value, dict):
        texts, labels = value.get("sentence"), value.get("gold_label")
        labelled_sentences = (
            list(zip(texts, labels, strict=False)) if isinstance(texts, list) and isinstance(labels, list) else []
        )
    else:
        rows = value if isinstance(value, list) else []
        labelled_sentences = [(row.get("sentence"), row.get("gold_label")) for row in rows if isinstance(row, dict)]
    names = ("anti-stereotype", "stereotype", "unrelated")  # a number is the place in this order
    by_label = {names[label] if label in (0, 1, 2) else label: text for text, label in labelled_sentences}
    sentences = [by_label.get(name) for name in ("stereotype", "anti-stereotype", "unrelated")]
    if not all(isinstance(one, str) and one.strip() for one in sentences):
        raise RowError("not one sentence for each gold_label: stereotype, anti-stereotype, unrelated")
    return [str(one) for one in sentences]


def _render_prompt(benchmark: Benchmark, row: BenchmarkRow, shuffled_control: bool) -> str:
    """The first template whose columns are all there, filled in."""
    error_text = ""
    for template in benchmark.prompt_templates:
        parts = []
        for literal, column, format_spec, _ in Formatter().parse(template):
            parts.append(literal)
            if column is None:
                continue
            try:
                text = _get_text(row.values, (column,), column, allow_empty=True)
            except RowError as flaw:
                error_text = error_text or f"{flaw.kind}{f' ({flaw.detail})' if flaw.detail else ''}"
                break
            text = text.capitalize() if format_spec == "capitalize" else text
            parts.append(shuffle_words(text, str(row.line)) if shuffled_control else text)
        else:
            return _clean_text(benchmark, "".join(parts))
    raise RowError(error_text)


def _get_text(values: dict[str, Any], columns: tuple[str, ...], role: str, allow_empty: bool = False) -> str:
    value = _get_field(values, columns)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise RowError(f"the {role} is not a text", f"it is a {type(value).__name__}")
    if not (allow_empty or value.strip()):
        raise RowError(f"the {role} is empty")
    return value


def _get_field(values: dict[str, Any], columns: tuple[str, ...]) -> Any:
    """What the first of some columns that is there holds; "a.b" is b inside a, where there is no column "a.b"."""
    for column in columns:
        if values.get(column) is not None:
            return values[column]
        value: Any = values
        for part in column.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return value
    raise RowError(f"no column {' or '.join(columns)}", f"there are {join_names(values)}")


def _clean_text(benchmark: Benchmark, text: str) -> str:
    """HellaSwag's texts from WikiHow without what is left of their markup, as lm-eval cleans them."""
    if benchmark.text_cleaner != "wikihow":
        return text
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


# ---------------------------------------------------------------- samples, and what is scrambled


def sample_indices(rows: Sequence[BenchmarkRow], limit: int | None) -> list[int]:
    """The places of at most `limit` of the items, of each group its share, the same ones every time, in their order.

    In the order of their groups, and of a hash within each, every so-manieth is taken.
    """
    if limit is None or limit >= len(rows):
        return list(range(len(rows)))
    order = sorted(range(len(rows)), key=lambda i: (rows[i].group, _hash(str(i))))
    return sorted(order[(2 * k + 1) * len(rows) // (2 * limit)] for k in range(limit))


def shuffle_words(text: str, salt: str) -> str:
    """The words of a text in another order, what ends its sentence still at the end; of a text that has no spaces, its
    characters.

    The order is that of a hash of each word, so that what two sentences of a pair share stays in one order.
    """
    body_length = len(text)
    while body_length and not text[body_length - 1].isalnum():
        body_length -= 1
    body_length = body_length or len(text)
    units = split_words(text[:body_length])
    counts: dict[str, int] = {}
    keys = []
    for unit in units:
        counts[unit] = counts.get(unit, 0) + 1
        keys.append(_hash(f"{salt} {counts[unit]} {unit}"))
    order = sorted(range(len(units)), key=lambda i: keys[i])
    return ("" if len(units) > len(text.split()) else " ").join(units[i] for i in order) + text[body_length:]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
