"""The items of a benchmark: rows read from its files and checked, sampled, and shuffled for the control."""

import bz2
import gzip
import hashlib
import json
import lzma
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from string import Formatter
from types import SimpleNamespace
from typing import Any, NamedTuple

from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.common.fs import is_json_array, is_json_object
from nextword.common.text_units import split_words, uses_spaces
from nextword.data.builtin_datasets import download_hub_files
from nextword.data.decoding import BLOCK_BYTES, LineReader, decode_chunks, file_format, limit_expansion
from nextword.data.issues import IssueLog, RowError, error_text, join_names, name_source
from nextword.data.readers import TABLE_SUFFIXES, Record, join_chunks, read_records
from nextword.tasks.benchmark_spec import Benchmark
from nextword.tasks.schema import infer_answer_format, parse_inputs, parse_targets

DEFAULT_ITEM_LIMIT = 1000  # evaluated items of a benchmark
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tar.xz", ".txz")
_ARCHIVE_OPENERS: dict[str, Any] = {
    **dict.fromkeys((".gz", ".tgz"), gzip.open),
    **dict.fromkeys((".bz2", ".tbz"), bz2.open),
    **dict.fromkeys((".xz", ".txz"), lzma.open),
}
TEXT_SUFFIXES = (".txt", ".md")  # one row per line
SHUFFLE_ATTEMPTS = 16
PROMPT_WORDS = 16  # words of a text that are the prompt of a free-text item
CHOICE_KINDS = ("multiple choice", "completion")


class LoglikelihoodItem(NamedTuple):
    """Requests (context, continuation), the choices that lengths are counted on, and the index of the correct one."""

    requests: tuple[tuple[str, str], ...]
    choices: tuple[str, ...]
    gold_index: int


class GenerationItem(NamedTuple):
    """A prompt and its reference texts."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class BenchmarkRow:
    """A row of a benchmark: file and line, values, group, and the format of its answer."""

    path: str
    line: int
    values: dict[str, Any]
    group: str = ""
    answer_format: str = ""


# ---------------------------------------------------------------- files


def load_rows(benchmark: Benchmark, issues: IssueLog) -> list[BenchmarkRow]:
    """Read and check the rows of a benchmark. Rows that are not valid are reported and left out.

    Raises:
        UsageError: The benchmark has no files, or they do not exist.
        NextwordError: No row is valid.
        MissingDependencyError: The Hub or a file format needs a package that is not installed.
    """
    paths = _resolve_files(benchmark)
    rows = [
        BenchmarkRow(name, record.line, _extract_columns(benchmark, record.values))
        for path in paths
        for name, record in _iter_records(path, benchmark, issues)
    ]
    answer_format = note = ""
    if benchmark.kind in CHOICE_KINDS:
        with name_source(benchmark.name):
            answer_format, note = infer_answer_format(_iter_choices(benchmark, rows))
    build_item = generation_item if benchmark.kind in ("writing", "free text") else loglikelihood_item
    valid_rows: list[BenchmarkRow] = []
    for row in rows:
        try:
            group = _get_field(row.values, benchmark.columns["group"]) if "group" in benchmark.columns else ""
            row = replace(row, group=str(group), answer_format=answer_format)
            build_item(benchmark, row)
            valid_rows.append(row)
        except RowError as error:
            issues.add(row.path, row.line, error.kind, error.detail)
    if note:
        issues.info(paths[0], None, f"answers are read as {answer_format}; they would also fit", note)
    if not valid_rows and paths:
        message = f"{benchmark.name}: no valid item in {join_names(map(str, paths))}"
        raise NextwordError("\n".join([message, *issues.summary_lines()]))
    return valid_rows


def _extract_columns(benchmark: Benchmark, values: dict[str, Any]) -> dict[str, Any]:
    """The values with the columns that patterns extract from other columns."""
    for column, pattern in benchmark.extract:
        text = values.get(column)
        if isinstance(text, str) and (match := pattern.search(text)):
            values = match.groupdict() | values
    return values


def _iter_choices(benchmark: Benchmark, rows: Iterable[BenchmarkRow]) -> Iterator[dict[str, Any]]:
    for row in rows:
        with suppress(RowError):  # reported when the row is checked
            yield _choice_values(benchmark, row, shuffled=False)


def _resolve_files(benchmark: Benchmark) -> list[Path]:
    resolved: list[Path] = []
    for file in benchmark.files:
        root = file.anchor
        paths = [file] if file.exists() else sorted(Path(root).glob(str(file.relative_to(root))))
        if not paths:
            raise UsageError(f"{file}: no such file, needed by the benchmark {benchmark.name}")
        resolved += paths
    if resolved:
        return resolved
    if benchmark.hub_dataset:
        return download_hub_files(benchmark.name, *benchmark.hub_dataset.split(" ", 1))[1]
    if benchmark.kind == "free text":
        return []
    raise UsageError(f"{benchmark.name}: give the path of its files: --benchmark {benchmark.name}=PATH")


def _iter_records(path: Path, benchmark: Benchmark, issues: IssueLog) -> Iterator[tuple[str, Record]]:
    """The records of a table, a text file (one row per line), a folder or an archive, each with the name of its file."""
    if path.is_dir():
        reads_text = benchmark.kind in ("cloze", "free text")  # otherwise a README is not data
        suffixes = (*TABLE_SUFFIXES, *TEXT_SUFFIXES) if reads_text else TABLE_SUFFIXES
        files = sorted(p for p in path.rglob("*") if file_format(p)[0] in suffixes and not p.name.startswith("."))
        if not files:
            issues.add(path, None, f"the folder has no tables ({', '.join(suffixes)})")
        for file in files:
            yield from _iter_records(file, benchmark, issues)
    elif path.name.lower().endswith(ARCHIVE_SUFFIXES):
        yield from _iter_archive_records(path, issues)
    elif file_format(path)[0] in TEXT_SUFFIXES:
        lines = LineReader(path, decode_chunks(path, issues), issues)
        for line in lines:
            if line.strip():
                yield str(path), Record(lines.line_number, {"text": line.rstrip("\n")})
    elif benchmark.records_field and file_format(path)[0] == ".json":
        yield from _iter_json_records(path, benchmark.records_field, issues)
    else:
        yield from ((str(path), record) for record in read_records(path, issues))


def _iter_archive_records(path: Path, issues: IssueLog) -> Iterator[tuple[str, Record]]:
    """The records of the tables in an archive, streamed without extracting files."""
    try:
        with _ARCHIVE_OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            # Limited before `tarfile` reads it, which holds the headers of a member in memory whole.
            blocks = limit_expansion(path, iter(partial(file.read, BLOCK_BYTES), b""))

            def read_block(_size: int) -> bytes:
                return next(blocks, b"")

            stream: Any = SimpleNamespace(read=read_block)
            for member in (archive := tarfile.open(fileobj=stream, mode="r|")):  # noqa: SIM115 (it holds no file)
                name = path / member.name
                if not member.isfile() or file_format(name)[0] not in TABLE_SUFFIXES or name.name.startswith("."):
                    continue
                if member.name.startswith("/") or ".." in Path(member.name).parts:
                    raise CorruptFileError(f"{path}: the path of {member.name} is outside the archive")
                content = archive.extractfile(member)
                assert content is not None
                member_blocks = iter(partial(content.read, BLOCK_BYTES), b"")
                yield from ((str(name), record) for record in read_records(name, issues, blocks=member_blocks))
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise CorruptFileError(f"{path}: cannot read the archive ({error_text(error)})") from error


def _iter_json_records(path: Path, field_path: str, issues: IssueLog) -> Iterator[tuple[str, Record]]:
    """The objects of a list inside a JSON file; `line` is the position in the list."""
    try:
        document = json.loads(join_chunks(path, decode_chunks(path, issues), issues))
        records = _get_field(document, (field_path,)) if is_json_object(document) else document
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: not valid JSON ({error_text(error)})") from error
    except RowError as error:
        issues.add(path, 1, error.kind, error.detail)
        return
    for number, record in enumerate(records if is_json_array(records) else [records], start=1):
        if is_json_object(record):
            yield str(path), Record(number, record)
        else:
            issues.add(path, number, "the record is not an object", f"its type is {type(record).__name__}")


# ---------------------------------------------------------------- items


def loglikelihood_item(benchmark: Benchmark, row: BenchmarkRow, shuffled: bool = False) -> LoglikelihoodItem:
    """The requests of a row of a benchmark that is scored by log-likelihood.

    Args:
        benchmark: The benchmark.
        row: One of its rows.
        shuffled: Shuffle the words of the context; without a context, the words of the sentences.

    Raises:
        RowError: A value is missing or not valid.
    """
    if benchmark.kind in CHOICE_KINDS:
        values = _choice_values(benchmark, row, shuffled)
        inputs = parse_inputs("choose", values)
        gold_index = parse_targets("choose", values, inputs, row.answer_format)["answer"]
        choices = tuple(_clean_text(benchmark, choice) for choice in inputs["choices"])
        if empty := [i for i, choice in enumerate(choices, 1) if not choice]:
            raise RowError("a choice is empty", f"choice {empty[0]}")
        requests = tuple((inputs["question"], benchmark.delimiter + choice) for choice in choices)
        return LoglikelihoodItem(requests, choices, gold_index)
    if benchmark.kind == "cloze":
        context, answer = _split_cloze(benchmark, row)
        if shuffled:
            [context] = shuffle_words([context], str(row.line))
        return LoglikelihoodItem(((context, answer),), (answer.strip(),), 0)
    context = _render_prompt(benchmark, row, shuffled) if benchmark.prompt_templates else ""
    if benchmark.kind == "minimal pairs":
        sentences = [_get_text(row.values, benchmark.columns[side], side) for side in ("good", "bad")]
    else:
        sentences = _stereotype_sentences(benchmark, row)
    if shuffled and not benchmark.prompt_templates:
        sentences = shuffle_words(sentences, str(row.line))
    requests = tuple((context, benchmark.delimiter + sentence) for sentence in sentences)
    return LoglikelihoodItem(requests, tuple(sentences), 0)


def generation_item(benchmark: Benchmark, row: BenchmarkRow, shuffled: bool = False) -> GenerationItem:
    """The prompt and references of a row of a benchmark that is scored by generated text. Raises as `loglikelihood_item`."""
    if benchmark.kind == "free text":
        return _open_ended_item(benchmark, row)
    prompt = _render_prompt(benchmark, row, shuffled)
    value = _get_field(row.values, benchmark.columns["reference"])
    references = value if is_json_array(value) else [value]
    if not references or not all(isinstance(reference, str) and reference.strip() for reference in references):
        raise RowError("the reference is neither a text nor a list of texts")
    return GenerationItem(prompt, tuple(map(str, references)))


def _open_ended_item(benchmark: Benchmark, row: BenchmarkRow) -> GenerationItem:
    """A prompt; or the first words of a text, whose rest is the reference."""
    if benchmark.prompt_templates:
        return GenerationItem(_render_prompt(benchmark, row, shuffled=False), ())
    if row.values.get("prompt") is not None:
        return GenerationItem(_get_text(row.values, ("prompt",), "prompt"), ())
    text = _get_text(row.values, ("text",), "text")
    word_ends = [word.end() for word in re.finditer(r"\S+", text)]
    if len(word_ends) < 2 * PROMPT_WORDS:
        return GenerationItem(text, ())
    prompt_end = word_ends[PROMPT_WORDS - 1]
    return GenerationItem(text[:prompt_end], (text[prompt_end:],))


def _choice_values(benchmark: Benchmark, row: BenchmarkRow, shuffled: bool) -> dict[str, Any]:
    """Question, choices and answer as `tasks.schema` reads them."""
    columns = benchmark.columns["choices"]
    if len(columns) == 1:
        choices = {"choices": _get_field(row.values, tuple(map(str.strip, columns[0].split("|"))))}
    else:
        choices = {f"choice{i}": row.values.get(column) for i, column in enumerate(columns, 1)}
    answer = _get_field(row.values, benchmark.columns["answer"])
    return {"question": _render_prompt(benchmark, row, shuffled), **choices, "answer": answer}


def _split_cloze(benchmark: Benchmark, row: BenchmarkRow) -> tuple[str, str]:
    """The context and the answer; for a text, its last word."""
    if "text" not in benchmark.columns:
        answer = _get_text(row.values, benchmark.columns["answer"], "answer")
        return _render_prompt(benchmark, row, shuffled=False), benchmark.delimiter + answer
    context, space, word = _get_text(row.values, benchmark.columns["text"], "text").rstrip().rpartition(" ")
    if not context.strip():
        raise RowError("the text has fewer than two words")
    return context, space + word


def _stereotype_sentences(benchmark: Benchmark, row: BenchmarkRow) -> list[str]:
    """The stereotype, the anti-stereotype and the unrelated sentence, stored as parallel lists or as objects."""
    value = _get_field(row.values, benchmark.columns["sentences"])
    labeled: list[tuple[Any, Any]] = []
    if is_json_object(value):
        texts, labels = value.get("sentence"), value.get("gold_label")
        if is_json_array(texts) and is_json_array(labels):
            labeled = list(zip(texts, labels, strict=False))
    elif is_json_array(value):
        labeled = [(record.get("sentence"), record.get("gold_label")) for record in value if is_json_object(record)]
    label_names = ("anti-stereotype", "stereotype", "unrelated")  # a numeric label is an index into these
    by_label: dict[Any, Any] = {}
    for text, label in labeled:
        if isinstance(label, str | int):
            by_label[label_names[label] if label in (0, 1, 2) else label] = text
    sentences = [by_label.get(name) for name in ("stereotype", "anti-stereotype", "unrelated")]
    if not all(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
        raise RowError("there is not one sentence for each gold_label: stereotype, anti-stereotype, unrelated")
    return list(map(str, sentences))


def _render_prompt(benchmark: Benchmark, row: BenchmarkRow, shuffled: bool) -> str:
    """The first template whose columns exist, filled in."""
    errors: list[RowError] = []
    for template in benchmark.prompt_templates:
        try:
            return _clean_text(benchmark, _fill_template(template, row, shuffled))
        except RowError as error:
            errors.append(error)
    raise errors[0]


def _fill_template(template: str, row: BenchmarkRow, shuffled: bool) -> str:
    filled = ""
    for literal, column, format_spec, _ in Formatter().parse(template):
        filled += literal
        if column is not None:
            text = _get_text(row.values, (column,), column, allow_empty=True)
            text = text.capitalize() if format_spec == "capitalize" else text
            filled += shuffle_words([text], str(row.line))[0] if shuffled else text
    return filled


def _get_text(values: dict[str, Any], columns: tuple[str, ...], role: str, allow_empty: bool = False) -> str:
    value = _get_field(values, columns)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise RowError(f"the {role} is not a text", f"its type is {type(value).__name__}")
    if not (allow_empty or value.strip()):
        raise RowError(f"the {role} is empty")
    return value


def _get_field(values: dict[str, Any], columns: tuple[str, ...]) -> Any:
    """The value of the first column that exists. "a.b" is the field b of a, if there is no column "a.b"."""
    for column in columns:
        value: Any = values
        for part in column.split("."):
            value = value.get(part) if is_json_object(value) else None
        value = value if values.get(column) is None else values[column]
        if value is not None:
            return value
    raise RowError(f"no column {' or '.join(columns)}", f"columns: {join_names(values)}")


def _clean_text(benchmark: Benchmark, text: str) -> str:
    """A text of HellaSwag's WikiHow part without the remains of its markup, cleaned as lm-eval does."""
    if benchmark.text_cleaner != "wikihow":
        return text
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


# ---------------------------------------------------------------- samples and shuffling


def sample_indices(rows: Sequence[BenchmarkRow], limit: int | None) -> list[int]:
    """Indices of at most `limit` rows, stratified by group, in ascending order. The same rows give the same sample.

    Rows are ordered by group and by a hash within the group; the sample is evenly spaced in this order.
    """
    if limit is None or limit >= len(rows):
        return list(range(len(rows)))
    order = sorted(range(len(rows)), key=lambda i: (rows[i].group, _hash(str(i))))
    return sorted(order[(2 * k + 1) * len(rows) // (2 * limit)] for k in range(limit))


def shuffle_words(texts: Sequence[str], salt: str) -> list[str]:
    """The words of texts in another order, final punctuation kept in place; the graphemes of a text without spaces.

    Words are ordered by a hash, so that the words that two sentences of a pair share keep the same order in both. The hash is
    the first of `SHUFFLE_ATTEMPTS` that leaves no text in its order. None does if two words stand in one order here and in the
    other there; both texts are equal then.
    """
    bodies = [text[: max((i for i, c in enumerate(text, 1) if c.isalnum()), default=len(text))] for text in texts]
    shuffled = words = [split_words(body) for body in bodies]
    for attempt in range(SHUFFLE_ATTEMPTS):
        shuffled = [_order_by_hash(row, salt + "\0" * attempt) for row in words]
        if not any(row == other and len(set(row)) > 1 for row, other in zip(words, shuffled, strict=True)):
            break
    return [
        (" " if uses_spaces(body) else "").join(row) + text[len(body) :]
        for row, body, text in zip(shuffled, bodies, texts, strict=True)
    ]


def _order_by_hash(words: Sequence[str], salt: str) -> list[str]:
    occurrences: defaultdict[str, count[int]] = defaultdict(lambda: count(1))
    keys = [_hash(f"{salt} {next(occurrences[word])} {word}") for word in words]
    return [word for _, word in sorted(zip(keys, words, strict=True))]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
