"""How a suite of questions is declared: what a person writes for their own language, and what the published ones say.

A declaration is TOML, a table a suite (`published.toml` beside this file holds those that go by a name):

    [agreement]
    kind = "minimal pairs"
    files = ["pairs/*.jsonl"]          # from the declaration's own folder; or given on the command line
    good = "sentence_good"
    bad = "sentence_bad"
    group = "phenomenon"

A column is named as in the file, "question.stem" inside another, "answerKey | answer" whichever there is; a prompt is a text
with columns in braces, "Question: {question}\\nAnswer:", or a list of which the first that fits is taken. What stands inside a
column's text is made columns by a regular expression, within = {id = '(?P<noun>\\w+)-(?P<verb>\\w+)'}; with like = "blimp" all
is as that suite says, but what the table says itself. The kinds:

    minimal pairs     good, bad, perhaps a prompt before them: which of the two is likelier
    multiple choice   prompt, choices (one column, or a list of columns), answer: which is likeliest
    completion        the same, judged by the likelihood a character
    cloze             text, whose last word is asked for; or prompt and answer: whether the likeliest is right
    stereotypes       sentences, each with its gold_label (StereoSet), perhaps a prompt
    writing           prompt, reference: what the model writes, by exact match, chrF, BLEU or ROUGE
    free text         perhaps a prompt: what the model writes, by how much it repeats itself
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import Any

from nextword.common.errors import UsageError
from nextword.data.issues import error_text
from nextword.tasks.schema import join_names

BUILTIN_BENCHMARKS = Path(__file__).with_name("published.toml")
# Of each kind what it must say, what it may say, and its scores, the one that counts first.
BENCHMARK_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "minimal pairs": (("good", "bad"), ("prompt",), ("acc",)),
    "multiple choice": (("prompt", "choices", "answer"), (), ("acc", "acc_norm", "acc_bytes")),
    "completion": (("prompt", "choices", "answer"), (), ("acc_norm", "acc", "acc_bytes")),
    "cloze": ((), ("text", "prompt", "answer"), ("acc",)),
    "stereotypes": (("sentences",), ("prompt",), ("stereotyped",)),
    "writing": (("prompt", "reference"), ("metrics", "max_tokens", "stop"), ("exact_match",)),
    "free text": ((), ("prompt", "max_tokens"), ("repeated_4grams",)),
}
COMMON_KEYS = ("kind", "files", "hub", "records", "within", "group", "delimiter", "metric", "clean")
LIST_KEYS = ("files", "metrics", "stop", "prompt", "choices")  # what may be a list; all else is one text, or a number
TEXT_CLEANERS = ("wikihow",)


@dataclass(frozen=True)
class Benchmark:
    """A declaration. `columns` are those of its kind, each as alternatives; `prompts` templates, of which the first that
    fits is taken; `metrics` the scores, the one that counts first; `delimiter` stands before each answer; `within` are columns
    by the patterns that find others in their texts."""

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
    """The suites that `--suite` asks for, by their names; None for a task of lm-eval's.

    Raises:
        UsageError: two of one name, or see `find_suite`.
    """
    benchmarks: dict[str, Benchmark | None] = {}
    for request in requests:
        benchmark = None if request.startswith("lm-eval:") else find_benchmark(request)
        name = request if benchmark is None else benchmark.name
        if name in benchmarks:
            raise UsageError(f"--suite {name} is said twice: give one of them another name, NAME=FILE.toml")
        benchmarks[name] = benchmark
    return benchmarks


def find_benchmark(request: str) -> Benchmark:
    """The suite of a request: NAME (fetched from the Hub), NAME=PATH (files, a folder or an archive), or a declaration in
    a .toml file, PATH or NAME=PATH, where NAME chooses among several.

    Raises:
        UsageError: no suite of that name, no such file, or a declaration that is wrong, by file and line.
    """
    name, _, location = request.partition("=")
    if request.endswith(".toml"):
        benchmarks = load_benchmarks(Path(location or name))
        if location and name in benchmarks:
            return benchmarks[name]
        if len(benchmarks) != 1:
            raise UsageError(
                f"{location or name}: declares {join_names(benchmarks)}; say which: NAME={location or name}"
            )
        [benchmark] = benchmarks.values()
        return replace(benchmark, name=name) if location else benchmark
    published = load_benchmarks(BUILTIN_BENCHMARKS)
    key = name.lower().replace("_", "-")
    if key not in published:
        hint = (
            f"declare it in a file and say {name}=FILE.toml"
            if location
            else f"or NAME=FILE.toml of your own, not {name}"
        )
        raise UsageError(f"there is no suite called {name!r}: {', '.join(published)}; {hint}")
    if location and not Path(location).exists():
        raise UsageError(f"{location}: no such file or folder")
    return replace(published[key], name=name, files=(Path(location),) if location else ())


def load_benchmarks(path: Path) -> dict[str, Benchmark]:
    """The suites that a file declares, by name; one alone needs no [name] and takes the file's.

    Raises:
        UsageError: no such file, no TOML, or a declaration that is wrong; with file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{path}: {error_text(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not TOML: {error_text(error)}") from error
    if {"kind", "like"} & tables.keys() or not any(isinstance(table, dict) for table in tables.values()):
        tables = {path.stem: tables}
    return {
        name: _parse_benchmark(name, _resolve_extends(name, table, path, text), path, text)
        for name, table in tables.items()
    }


def _resolve_extends(name: str, table: Any, path: Path, text: str) -> Any:
    """A table, and below it the one that it is like: another suite's that goes by a name."""
    if not isinstance(table, dict) or "like" not in table:
        return table
    builtin_tables = tomllib.loads(BUILTIN_BENCHMARKS.read_text(encoding="utf-8"))
    base_table = builtin_tables.get(table["like"]) if isinstance(table["like"], str) else None
    if base_table is None or "like" in base_table:
        line = _find_line(text, name, "like")
        raise UsageError(
            f"{path} line {line}: [{name}] like can be {', '.join(k for k in builtin_tables if 'like' not in builtin_tables[k])}"
        )
    return base_table | {key: value for key, value in table.items() if key != "like"}


def _parse_benchmark(name: str, table: Any, path: Path, text: str) -> Benchmark:
    def make_error(key: str, what: str) -> UsageError:
        return UsageError(f"{path} line {_find_line(text, name, key)}: [{name}] {what}")

    if not isinstance(table, dict):
        raise make_error(name, "is no table: write [NAME], and below it kind = …")
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in BENCHMARK_KINDS:
        raise make_error("kind", f"has no kind that there is: {', '.join(BENCHMARK_KINDS)}")
    required_keys, optional_keys, metrics = BENCHMARK_KINDS[kind]
    for key, value in table.items():
        if key not in COMMON_KEYS + required_keys + optional_keys:
            raise make_error(
                key,
                f"has {key!r}, which {kind} does not take: {', '.join((*required_keys, *optional_keys, *COMMON_KEYS))}",
            )
        is_list = isinstance(value, list) and key in LIST_KEYS
        if key == "max_tokens":
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise make_error(key, "max_tokens must be a whole number of at least 1")
        elif key == "within":
            _compile_patterns(value, make_error)
        elif not all(isinstance(one, str) for one in (value if is_list else [value])) or value == []:
            raise make_error(key, f"{key} must be a text" + (" or a list of texts" if key in LIST_KEYS else ""))
    if missing := [key for key in required_keys if key not in table]:
        raise make_error(kind, f"says no {missing[0]}, which {kind} needs")
    if kind == "cloze" and ("text" in table) == ("answer" in table and "prompt" in table):
        raise make_error(kind, "says text (whose last word is asked for), or prompt and answer")
    if table.get("clean") not in (None, *TEXT_CLEANERS):
        raise make_error("clean", f"clean can be {', '.join(TEXT_CLEANERS)}")
    prompts = _as_list(table.get("prompt"))
    for prompt in prompts:
        try:
            list(Formatter().parse(prompt))
        except ValueError as error:
            raise make_error("prompt", f"the prompt {prompt!r} is not well formed: {error}") from error
    columns = {
        key: tuple(_as_list(table[key])) if key == "choices" else tuple(map(str.strip, table[key].split("|")))
        for key in ("good", "bad", "choices", "answer", "text", "sentences", "reference", "group")
        if key in table
    }
    return Benchmark(
        name, kind, columns, _parse_metrics(table, kind, metrics, make_error), prompt_templates=tuple(prompts),
        files=tuple(path.parent / file for file in _as_list(table.get("files"))), hub_dataset=table.get("hub", ""),
        records_field=table.get("records", ""), delimiter=table.get("delimiter", " "), text_cleaner=table.get("clean", ""),
        max_tokens=table.get("max_tokens", 128 if kind == "free text" else 64), stop=tuple(_as_list(table.get("stop"))),
        extract=_compile_patterns(table.get("within", {}), make_error),
    )  # fmt: skip


def _compile_patterns(extract: Any, make_error: Any) -> tuple[tuple[str, re.Pattern[str]], ...]:
    """Columns, and the regular expressions whose named groups are found in them."""
    if not isinstance(extract, dict) or not all(isinstance(pattern, str) for pattern in extract.values()):
        raise make_error("within", "within must be columns and regular expressions: {id = '(?P<noun>.*)'}")
    try:
        compiled = tuple((column, re.compile(pattern)) for column, pattern in extract.items())
    except (re.error, OverflowError, RecursionError) as error:
        raise make_error("within", f"within has no regular expression: {error}") from error
    if unnamed := [column for column, pattern in compiled if not pattern.groupindex]:
        raise make_error("within", f"within finds nothing in {unnamed[0]}: name a part of its pattern, (?P<noun>.*)")
    return compiled


def _parse_metrics(
    table: dict[str, Any], kind: str, default_metrics: tuple[str, ...], make_error: Any
) -> tuple[str, ...]:
    """The scores of a suite: those of its kind, the one that it calls its metric first."""
    if kind == "writing":
        default_metrics = tuple(_as_list(table.get("metrics"))) or default_metrics
        if unknown := set(default_metrics) - {"exact_match", "chrf", "bleu", "rouge1", "rouge2", "rougeL"}:
            raise make_error(
                "metrics", f"metrics has {min(unknown)!r}: exact_match, chrf, bleu, rouge1, rouge2, rougeL"
            )
    metric = table.get("metric", default_metrics[0])
    if kind == "minimal pairs" and metric == "stereotyped":  # the same share by its own name: here 0.5 is best
        return (metric,)
    if metric not in default_metrics:
        raise make_error("metric", f"metric can be {', '.join(default_metrics)}")
    return (metric, *(one for one in default_metrics if one != metric))


def _as_list(value: Any) -> list[str]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _find_line(text: str, name: str, key: str) -> int:
    """The line that a key of a table stands at, or the table's own, or the first."""
    lines = text.splitlines()
    header_lines = [i for i, line in enumerate(lines) if re.match(rf"\s*\[\s*[\"']?{re.escape(name)}[\"']?\s*\]", line)]
    start = header_lines[0] if header_lines else 0
    for i in range(start, len(lines)):
        if i > start and re.match(r"\s*\[", lines[i]):
            break
        if re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[.=]", lines[i]):
            return i + 1
    return start + 1
