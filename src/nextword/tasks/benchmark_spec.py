r"""Benchmark specifications in TOML, one table for each benchmark. `published.toml` holds the built-in ones.

    [agreement]
    kind = "minimal pairs"
    files = ["pairs/*.jsonl"]          # relative to the TOML file; or given on the command line
    good = "sentence_good"
    bad = "sentence_bad"
    group = "phenomenon"

A column is given by its name in the file. "question.stem" is a field of an object, and "answerKey | answer" the first column
that exists. A prompt is a template such as "Question: {question}\nAnswer:", or a list of templates of which the first whose
columns exist is used. `within = {id = '(?P<noun>\w+)-(?P<verb>\w+)'}` extracts columns from the text of another column, and
`like = "blimp"` takes all keys of a built-in benchmark that the table does not set itself. The kinds:

    minimal pairs     good, bad, optionally a prompt before both: which one is more likely
    multiple choice   prompt, choices (one column, or a list of columns), answer: which choice is most likely
    completion        the same, with the log-likelihood per character
    cloze             text, whose last word is predicted; or prompt and answer: whether greedy decoding gives it
    stereotypes       sentences, each with a gold_label (StereoSet), optionally a prompt
    writing           prompt, reference: generated text by exact match, chrF, BLEU or ROUGE
    free text         optionally a prompt: how repetitive the generated text is
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from nextword.common.errors import UsageError
from nextword.common.fs import is_json_array, is_json_object
from nextword.data.issues import error_text, join_names
from nextword.tasks.metrics import GENERATION_METRICS

BUILTIN_BENCHMARKS = Path(__file__).with_name("published.toml")


class BenchmarkKind(NamedTuple):
    """The keys that a kind of benchmark requires and allows, and its metrics, the primary one first."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    metrics: tuple[str, ...]


BENCHMARK_KINDS = {
    "minimal pairs": BenchmarkKind(("good", "bad"), ("prompt",), ("acc",)),
    "multiple choice": BenchmarkKind(("prompt", "choices", "answer"), (), ("acc", "acc_norm", "acc_bytes")),
    "completion": BenchmarkKind(("prompt", "choices", "answer"), (), ("acc_norm", "acc", "acc_bytes")),
    "cloze": BenchmarkKind((), ("text", "prompt", "answer"), ("acc",)),
    "stereotypes": BenchmarkKind(("sentences",), ("prompt",), ("stereotyped",)),
    "writing": BenchmarkKind(("prompt", "reference"), ("metrics", "max_tokens", "stop"), ("exact_match",)),
    "free text": BenchmarkKind((), ("prompt", "max_tokens"), ("repeated_4grams",)),
}
COMMON_KEYS = ("kind", "files", "hub", "records", "within", "group", "delimiter", "metric", "clean")
LIST_KEYS = ("files", "metrics", "stop", "prompt", "choices")  # may be a list of strings; all others are one string
COLUMN_KEYS = ("good", "bad", "choices", "answer", "text", "sentences", "reference", "group")
TEXT_CLEANERS = ("wikihow",)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark specification.

    Attributes:
        name: Name of the benchmark.
        kind: A key of `BENCHMARK_KINDS`.
        columns: The columns of the kind, each as alternatives.
        metrics: The metrics, the primary one first.
        prompt_templates: Templates of which the first whose columns exist is used.
        files: Files, folders, archives or glob patterns.
        hub_dataset: Repository and file pattern on the Hugging Face Hub, for a benchmark without files.
        records_field: The field of a JSON file that holds the list of records.
        delimiter: Text between the context and each answer.
        text_cleaner: Name of a text cleaner; empty for none.
        max_tokens: Maximum number of generated tokens.
        stop: Stop strings of generation.
        extract: Columns, and patterns whose named groups become columns.
    """

    name: str
    kind: str
    columns: dict[str, tuple[str, ...]]
    metrics: tuple[str, ...]
    prompt_templates: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    hub_dataset: str = ""
    records_field: str = ""
    delimiter: str = " "
    text_cleaner: str = ""
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    extract: tuple[tuple[str, re.Pattern[str]], ...] = ()


def find_benchmarks(requests: Sequence[str]) -> dict[str, Benchmark | None]:
    """The benchmarks of `--benchmark` by name; None for a task of lm-eval ("lm-eval:TASK").

    Raises:
        UsageError: Two benchmarks have one name, or a benchmark is not found.
    """
    benchmarks: dict[str, Benchmark | None] = {}
    for request in requests:
        benchmark = None if request.startswith("lm-eval:") else find_benchmark(request)
        name = request if benchmark is None else benchmark.name
        if name in benchmarks:
            raise UsageError(f"--benchmark {name} is given twice: give one of them another name, NAME=FILE.toml")
        benchmarks[name] = benchmark
    return benchmarks


def find_benchmark(request: str) -> Benchmark:
    """The benchmark of a request.

    Args:
        request: NAME (downloaded from the Hub), NAME=PATH (files, a folder or an archive), FILE.toml, or NAME=FILE.toml, where
            NAME selects one of several specifications or renames a single one.

    Raises:
        UsageError: There is no such benchmark or file, or the specification is not valid.
    """
    name, _, location = request.partition("=")
    if request.endswith(".toml"):
        path = location or name
        benchmarks = load_benchmarks(Path(path))
        if location and name in benchmarks:
            return benchmarks[name]
        if len(benchmarks) != 1:
            raise UsageError(f"{path}: specifies {join_names(benchmarks)}; select one: NAME={path}")
        [benchmark] = benchmarks.values()
        return replace(benchmark, name=name) if location else benchmark
    builtin = load_benchmarks(BUILTIN_BENCHMARKS)
    key = name.lower().replace("_", "-")
    if key not in builtin:
        hint = f"specify it in a file and pass {name}=FILE.toml" if location else "or pass NAME=FILE.toml"
        raise UsageError(f"unknown benchmark {name!r}: choose from {', '.join(builtin)}; {hint}")
    if location and not Path(location).exists():
        raise UsageError(f"{location}: no such file or folder")
    return replace(builtin[key], name=name, files=(Path(location),) if location else ())


def load_benchmarks(path: Path) -> dict[str, Benchmark]:
    """The benchmarks of a TOML file by name. A single one needs no [name] and takes that of the file.

    Raises:
        UsageError: The file does not exist, is not TOML, or a specification is not valid; with file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        tables = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{path}: {error_text(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid TOML: {error_text(error)}") from error
    if {"kind", "like"} & tables.keys() or not any(isinstance(table, dict) for table in tables.values()):
        tables = {path.stem: tables}
    benchmarks: dict[str, Benchmark] = {}
    for name, table in tables.items():
        try:
            benchmarks[name] = _parse_benchmark(name, table, path.parent)
        except _SpecError as error:
            line = _find_line(text, name, error.key)
            raise UsageError(f"{path} line {line}: [{name}] {error.message}") from error
    return benchmarks


class _SpecError(Exception):
    """What is wrong with a key of a specification."""

    def __init__(self, key: str, message: str):
        self.key, self.message = key, message


def _parse_benchmark(name: str, table: Any, folder: Path) -> Benchmark:
    """A benchmark from its table, with files relative to a folder."""
    if not is_json_object(table):
        raise _SpecError(name, "is not a table: write [NAME], and kind = … below it")
    if "like" in table:
        builtin = tomllib.loads(BUILTIN_BENCHMARKS.read_text(encoding="utf-8-sig"))
        bases = {base: values for base, values in builtin.items() if "like" not in values}
        if not isinstance(table["like"], str) or table["like"] not in bases:
            raise _SpecError("like", f"like must be one of {', '.join(bases)}")
        table = bases[table["like"]] | {key: value for key, value in table.items() if key != "like"}
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in BENCHMARK_KINDS:
        raise _SpecError("kind", f"kind must be one of {', '.join(BENCHMARK_KINDS)}")
    _check_keys(table, kind)
    columns = {
        key: tuple(_as_list(table[key])) if key == "choices" else tuple(map(str.strip, table[key].split("|")))
        for key in COLUMN_KEYS
        if key in table
    }
    return Benchmark(
        name=name,
        kind=kind,
        columns=columns,
        metrics=_parse_metrics(table, kind),
        prompt_templates=tuple(_as_list(table.get("prompt"))),
        files=tuple(folder / file for file in _as_list(table.get("files"))),
        hub_dataset=table.get("hub", ""),
        records_field=table.get("records", ""),
        delimiter=table.get("delimiter", " "),
        text_cleaner=table.get("clean", ""),
        max_tokens=table.get("max_tokens", 128 if kind == "free text" else 64),
        stop=tuple(_as_list(table.get("stop"))),
        extract=_compile_patterns(table.get("within", {})),
    )


def _check_keys(table: dict[str, Any], kind: str) -> None:
    required, optional, _ = BENCHMARK_KINDS[kind]
    allowed = (*required, *optional, *COMMON_KEYS)
    for key, value in table.items():
        if key not in allowed:
            raise _SpecError(key, f"{kind} has no key {key!r}; its keys are {', '.join(allowed)}")
        if key == "max_tokens":
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise _SpecError(key, "max_tokens must be an integer of at least 1")
        elif key != "within":
            values = value if is_json_array(value) and key in LIST_KEYS else [value]
            if not values or not all(isinstance(entry, str) for entry in values):
                expected = "a string or a list of strings" if key in LIST_KEYS else "a string"
                raise _SpecError(key, f"{key} must be {expected}")
    if missing := [key for key in required if key not in table]:
        raise _SpecError(kind, f"{kind} requires the key {missing[0]}")
    if kind == "cloze" and ("text" in table) == ("answer" in table and "prompt" in table):
        raise _SpecError(kind, "cloze requires text (whose last word is predicted), or prompt and answer")
    if table.get("clean") not in (None, *TEXT_CLEANERS):
        raise _SpecError("clean", f"clean must be one of {', '.join(TEXT_CLEANERS)}")
    for template in _as_list(table.get("prompt")):
        try:
            list(Formatter().parse(template))
        except ValueError as error:
            raise _SpecError("prompt", f"the prompt {template!r} is not a valid template: {error}") from error


def _compile_patterns(extract: Any) -> tuple[tuple[str, re.Pattern[str]], ...]:
    if not is_json_object(extract) or not all(isinstance(pattern, str) for pattern in extract.values()):
        raise _SpecError("within", "within must map columns to regular expressions: {id = '(?P<noun>.*)'}")
    try:
        compiled = tuple((column, re.compile(str(pattern))) for column, pattern in extract.items())
    except (re.error, OverflowError, RecursionError) as error:
        raise _SpecError("within", f"within has an invalid regular expression: {error}") from error
    if unnamed := [column for column, pattern in compiled if not pattern.groupindex]:
        raise _SpecError("within", f"the pattern of {unnamed[0]} in within has no named group: (?P<noun>.*)")
    return compiled


def _parse_metrics(table: dict[str, Any], kind: str) -> tuple[str, ...]:
    """The metrics of the kind, with the one that `metric` names first."""
    metrics = BENCHMARK_KINDS[kind].metrics
    if kind == "writing":
        known = ("exact_match", *GENERATION_METRICS)
        metrics = tuple(_as_list(table.get("metrics"))) or metrics
        if unknown := set(metrics) - set(known):
            raise _SpecError("metrics", f"unknown metric {min(unknown)!r}; choose from {', '.join(known)}")
    primary = table.get("metric", metrics[0])
    if kind == "minimal pairs" and primary == "stereotyped":  # the accuracy under a name that says that 0.5 is best
        return (primary,)
    if primary not in metrics:
        raise _SpecError("metric", f"metric must be one of {', '.join(metrics)}")
    return (primary, *(name for name in metrics if name != primary))


def _as_list(value: Any) -> list[str]:
    return [] if value is None else value if is_json_array(value) else [value]


def _find_line(text: str, name: str, key: str) -> int:
    """The line of a key of a table; of the table if the key is not found; else 1."""
    lines = text.splitlines()
    header, assignment = (rf"\s*[\"']?{re.escape(word)}[\"']?\s*" for word in (name, key))
    start = next((i for i, line in enumerate(lines) if re.match(rf"\s*\[{header}\]", line)), 0)
    for i, line in enumerate(lines[start:], start):
        if i > start and re.match(r"\s*\[", line):
            break
        if re.match(rf"{assignment}[.=]", line):
            return i + 1
    return start + 1
