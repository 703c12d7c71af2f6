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
from nextword.data.decoding import reason
from nextword.tasks.schema import listed

PUBLISHED = Path(__file__).with_name("published.toml")
# Of each kind what it must say, what it may say, and its scores, the one that counts first.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "minimal pairs": (("good", "bad"), ("prompt",), ("acc",)),
    "multiple choice": (("prompt", "choices", "answer"), (), ("acc", "acc_norm", "acc_bytes")),
    "completion": (("prompt", "choices", "answer"), (), ("acc_norm", "acc", "acc_bytes")),
    "cloze": ((), ("text", "prompt", "answer"), ("acc",)),
    "stereotypes": (("sentences",), ("prompt",), ("stereotyped",)),
    "writing": (("prompt", "reference"), ("metrics", "max_tokens", "stop"), ("exact_match",)),
    "free text": ((), ("prompt", "max_tokens"), ("repeated_4grams",)),
}
COMMON = ("kind", "files", "hub", "records", "within", "group", "delimiter", "metric", "clean")
LISTS = ("files", "metrics", "stop", "prompt", "choices")  # what may be a list; all else is one text, or a number
CLEANED = ("wikihow",)


@dataclass(frozen=True)
class Suite:
    """A declaration. `columns` are those of its kind, each as alternatives; `prompts` templates, of which the first that
    fits is taken; `metrics` the scores, the one that counts first; `delimiter` stands before each answer; `within` are columns
    by the patterns that find others in their texts."""

    name: str
    kind: str
    columns: dict[str, tuple[str, ...]]
    metrics: tuple[str, ...]
    prompts: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    hub: str = ""
    records: str = ""
    delimiter: str = " "
    clean: str = ""
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    within: tuple[tuple[str, re.Pattern[str]], ...] = ()


def find_suites(requests: Sequence[str]) -> dict[str, Suite | None]:
    """The suites that `--suite` asks for, by their names; None for a task of lm-eval's.

    Raises:
        UsageError: two of one name, or see `find_suite`.
    """
    asked: dict[str, Suite | None] = {}
    for request in requests:
        suite = None if request.startswith("lm-eval:") else find_suite(request)
        name = request if suite is None else suite.name
        if name in asked:
            raise UsageError(f"--suite {name} is said twice: give one of them another name, NAME=FILE.toml")
        asked[name] = suite
    return asked


def find_suite(request: str) -> Suite:
    """The suite of a request: NAME (fetched from the Hub), NAME=PATH (files, a folder or an archive), or a declaration in
    a .toml file, PATH or NAME=PATH, where NAME chooses among several.

    Raises:
        UsageError: no suite of that name, no such file, or a declaration that is wrong, by file and line.
    """
    name, _, given = request.partition("=")
    if request.endswith(".toml"):
        declared = read_declarations(Path(given or name))
        if given and name in declared:
            return declared[name]
        if len(declared) != 1:
            raise UsageError(f"{given or name}: declares {listed(declared)}; say which: NAME={given or name}")
        [suite] = declared.values()
        return replace(suite, name=name) if given else suite
    published = read_declarations(PUBLISHED)
    key = name.lower().replace("_", "-")
    if key not in published:
        hint = (
            f"declare it in a file and say {name}=FILE.toml" if given else f"or NAME=FILE.toml of your own, not {name}"
        )
        raise UsageError(f"there is no suite called {name!r}: {', '.join(published)}; {hint}")
    if given and not Path(given).exists():
        raise UsageError(f"{given}: no such file or folder")
    return replace(published[key], name=name, files=(Path(given),) if given else ())


def read_declarations(path: Path) -> dict[str, Suite]:
    """The suites that a file declares, by name; one alone needs no [name] and takes the file's.

    Raises:
        UsageError: no such file, no TOML, or a declaration that is wrong; with file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{path}: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not TOML: {reason(error)}") from error
    if {"kind", "like"} & tables.keys() or not any(isinstance(table, dict) for table in tables.values()):
        tables = {path.stem: tables}
    return {name: _declared(name, _whole(name, table, path, text), path, text) for name, table in tables.items()}


def _whole(name: str, table: Any, path: Path, text: str) -> Any:
    """A table, and below it the one that it is like: another suite's that goes by a name."""
    if not isinstance(table, dict) or "like" not in table:
        return table
    others = tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))
    other = others.get(table["like"]) if isinstance(table["like"], str) else None
    if other is None or "like" in other:
        line = _line_of(text, name, "like")
        raise UsageError(
            f"{path} line {line}: [{name}] like can be {', '.join(k for k in others if 'like' not in others[k])}"
        )
    return other | {key: value for key, value in table.items() if key != "like"}


def _declared(name: str, table: Any, path: Path, text: str) -> Suite:
    def wrong(key: str, what: str) -> UsageError:
        return UsageError(f"{path} line {_line_of(text, name, key)}: [{name}] {what}")

    if not isinstance(table, dict):
        raise wrong(name, "is no table: write [NAME], and below it kind = …")
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise wrong("kind", f"has no kind that there is: {', '.join(KINDS)}")
    needed, allowed, metrics = KINDS[kind]
    for key, value in table.items():
        if key not in COMMON + needed + allowed:
            raise wrong(key, f"has {key!r}, which {kind} does not take: {', '.join((*needed, *allowed, *COMMON))}")
        several = isinstance(value, list) and key in LISTS
        if key == "max_tokens":
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise wrong(key, "max_tokens must be a whole number of at least 1")
        elif key == "within":
            _patterns(value, wrong)
        elif not all(isinstance(one, str) for one in (value if several else [value])) or value == []:
            raise wrong(key, f"{key} must be a text" + (" or a list of texts" if key in LISTS else ""))
    if missing := [key for key in needed if key not in table]:
        raise wrong(kind, f"says no {missing[0]}, which {kind} needs")
    if kind == "cloze" and ("text" in table) == ("answer" in table and "prompt" in table):
        raise wrong(kind, "says text (whose last word is asked for), or prompt and answer")
    if table.get("clean") not in (None, *CLEANED):
        raise wrong("clean", f"clean can be {', '.join(CLEANED)}")
    prompts = _list(table.get("prompt"))
    for prompt in prompts:
        try:
            list(Formatter().parse(prompt))
        except ValueError as error:
            raise wrong("prompt", f"the prompt {prompt!r} is not well formed: {error}") from error
    columns = {
        key: tuple(_list(table[key])) if key == "choices" else tuple(map(str.strip, table[key].split("|")))
        for key in ("good", "bad", "choices", "answer", "text", "sentences", "reference", "group")
        if key in table
    }
    return Suite(
        name, kind, columns, _metrics(table, kind, metrics, wrong), prompts=tuple(prompts),
        files=tuple(path.parent / file for file in _list(table.get("files"))), hub=table.get("hub", ""),
        records=table.get("records", ""), delimiter=table.get("delimiter", " "), clean=table.get("clean", ""),
        max_tokens=table.get("max_tokens", 128 if kind == "free text" else 64), stop=tuple(_list(table.get("stop"))),
        within=_patterns(table.get("within", {}), wrong),
    )  # fmt: skip


def _patterns(within: Any, wrong: Any) -> tuple[tuple[str, re.Pattern[str]], ...]:
    """Columns, and the regular expressions whose named groups are found in them."""
    if not isinstance(within, dict) or not all(isinstance(pattern, str) for pattern in within.values()):
        raise wrong("within", "within must be columns and regular expressions: {id = '(?P<noun>.*)'}")
    try:
        found = tuple((column, re.compile(pattern)) for column, pattern in within.items())
    except (re.error, OverflowError, RecursionError) as error:
        raise wrong("within", f"within has no regular expression: {error}") from error
    if unnamed := [column for column, pattern in found if not pattern.groupindex]:
        raise wrong("within", f"within finds nothing in {unnamed[0]}: name a part of its pattern, (?P<noun>.*)")
    return found


def _metrics(table: dict[str, Any], kind: str, usual: tuple[str, ...], wrong: Any) -> tuple[str, ...]:
    """The scores of a suite: those of its kind, the one that it calls its metric first."""
    if kind == "writing":
        usual = tuple(_list(table.get("metrics"))) or usual
        if unknown := set(usual) - {"exact_match", "chrf", "bleu", "rouge1", "rouge2", "rougeL"}:
            raise wrong("metrics", f"metrics has {min(unknown)!r}: exact_match, chrf, bleu, rouge1, rouge2, rougeL")
    metric = table.get("metric", usual[0])
    if kind == "minimal pairs" and metric == "stereotyped":  # the same share by its own name: here 0.5 is best
        return (metric,)
    if metric not in usual:
        raise wrong("metric", f"metric can be {', '.join(usual)}")
    return (metric, *(one for one in usual if one != metric))


def _list(value: Any) -> list[str]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _line_of(text: str, name: str, key: str) -> int:
    """The line that a key of a table stands at, or the table's own, or the first."""
    lines = text.splitlines()
    heads = [i for i, line in enumerate(lines) if re.match(rf"\s*\[\s*[\"']?{re.escape(name)}[\"']?\s*\]", line)]
    start = heads[0] if heads else 0
    for i in range(start, len(lines)):
        if i > start and re.match(r"\s*\[", lines[i]):
            break
        if re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[.=]", lines[i]):
            return i + 1
    return start + 1
