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

from nextword.common.errors import CorruptFile, NextwordError, UsageError
from nextword.data.builtin_datasets import hub_files
from nextword.data.decoding import Lines, Problems, decoded, reason, suffixes
from nextword.data.readers import TABLES, Record, read_records
from nextword.tasks.benchmark_spec import Suite
from nextword.tasks.parsing import Flaw, Reading, Row, gold_of, reading_of, what_is_given
from nextword.tasks.schema import listed
from nextword.tasks.text_diversity import words

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tar.xz", ".txz")
LINES = (".txt", ".md")  # a row a line
OPENING = 16  # words of a text that a model goes on from


class Question(NamedTuple):
    """Contexts and continuations of which the likelihood is asked, the answers as they are measured by length, and which
    one is right."""

    asked: tuple[tuple[str, str], ...]
    answers: tuple[str, ...]
    gold: int


class Wanted(NamedTuple):
    """A text to be gone on from, and what may stand there."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """A row of a suite's files: where it was read, its values, the group it counts in, and how its answer is read."""

    path: str
    line: int
    values: dict[str, Any]
    group: str = ""
    reading: Reading | None = field(default=None, compare=False)


# ---------------------------------------------------------------- files


def read_items(suite: Suite, problems: Problems) -> list[Item]:
    """The rows of a suite's files, each of them checked; those that are wrong go to `problems` and are left out.

    Raises:
        UsageError: the declaration names no files, or some that are not there.
        NextwordError: not one row can be used; with what was wrong.
        MissingExtra: the files are on the Hub, or in a format, that needs an optional package.
    """
    found: list[Item] = []
    paths = _paths(suite)
    for path in paths:
        for name, record in _records(path, suite, problems):
            found.append(Item(name, record.line, _with_parts(suite, record.values)))
    choosing = suite.kind in ("multiple choice", "completion")
    how = reading_of(_choice_row(suite, item, problems) for item in found) if choosing else None
    kept = []
    for item in found:
        try:
            group = _value(item.values, suite.columns["group"]) if "group" in suite.columns else ""
            item = Item(item.path, item.line, item.values, str(group), how)
            question_of(suite, item) if suite.kind not in ("writing", "free text") else wanted_of(suite, item)
        except Flaw as flaw:
            problems.add(item.path, item.line, flaw.kind, flaw.detail)
        else:
            kept.append(item)
    if not kept and paths:
        where = listed(map(str, paths))
        raise NextwordError("\n".join([f"{suite.name}: not one item to be judged by in {where}", *problems.lines()]))
    return kept


def _with_parts(suite: Suite, values: dict[str, Any]) -> dict[str, Any]:
    """A row with the columns that stand inside others' texts."""
    for column, pattern in suite.within:
        text = values.get(column)
        if isinstance(text, str) and (found := pattern.search(text)):
            values = found.groupdict() | values
    return values


def _choice_row(suite: Suite, item: Item, problems: Problems) -> Row:
    try:
        values = _choice_values(suite, item, False)
    except Flaw:  # said when the row is checked
        values = {}
    return Row(Path(item.path), item.line, values)


def _paths(suite: Suite) -> list[Path]:
    found: list[Path] = []
    for file in suite.files:
        cut = next((i for i, part in enumerate(file.parts) if set("*?[") & set(part)), len(file.parts))
        root, pattern = Path(*file.parts[:cut]), file.parts[cut:]
        paths = [file] if file.exists() else sorted(root.glob(str(Path(*pattern)))) if pattern else []
        if not paths:
            raise UsageError(f"{file}: no such file, which the suite {suite.name} is read from")
        found += paths
    if found:
        return found
    if suite.hub:
        return hub_files(suite.name, *suite.hub.split(" ", 1))[1]
    if suite.kind == "free text":
        return []
    raise UsageError(f"{suite.name}: say where its files are: --suite {suite.name}=PATH")


def _records(path: Path, suite: Suite, problems: Problems) -> Iterator[tuple[str, Record]]:
    """The rows below a path, each with the name of its file: a table, a text of one row a line, a folder or an archive."""
    if path.is_dir():
        kinds = (*TABLES, *LINES) if suite.kind in ("cloze", "free text") else TABLES  # else a README is no data
        inside = sorted(p for p in path.rglob("*") if suffixes(p)[0] in kinds and not p.name.startswith("."))
        if not inside:
            problems.add(path, None, f"a folder without tables ({', '.join(kinds)})")
        for one in inside:
            yield from _records(one, suite, problems)
    elif path.name.lower().endswith(ARCHIVES):
        yield from _archived(path, problems)
    elif suffixes(path)[0] in LINES:
        lines = Lines(path, decoded(path, problems), problems)
        yield from ((str(path), Record(lines.number, {"text": line.rstrip("\n")})) for line in lines if line.strip())
    elif suite.records and suffixes(path)[0] == ".json":
        yield from _nested(path, suite.records, problems)
    else:
        yield from ((str(path), record) for record in read_records(path, problems))


def _archived(path: Path, problems: Problems) -> Iterator[tuple[str, Record]]:
    """The tables in an archive, read as streams, so that nothing is unpacked to the disk."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = path / member.name
                if not member.isfile() or suffixes(name)[0] not in TABLES or name.name.startswith("."):
                    continue
                if member.name.startswith("/") or ".." in Path(member.name).parts:
                    raise CorruptFile(f"{path}: the name {member.name} in it leads out of the archive")
                stream = archive.extractfile(member)
                assert stream is not None
                blocks = iter(partial(stream.read, 2**18), b"")
                yield from ((str(name), record) for record in read_records(name, problems, blocks=blocks))
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise CorruptFile(f"{path}: not an archive that can be read ({reason(error)})") from error


def _nested(path: Path, where: str, problems: Problems) -> Iterator[tuple[str, Record]]:
    """The objects of a list inside a JSON file; `line` is the number of each in it."""
    try:
        value = json.loads("".join(decoded(path, problems)))
        rows = _value(value, (where,)) if isinstance(value, dict) else value
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path}: not valid JSON ({reason(error)})") from error
    except Flaw as flaw:
        problems.add(path, 1, flaw.kind, flaw.detail)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        if isinstance(row, dict):
            yield str(path), Record(number, row)
        else:
            problems.add(path, number, "not an object", f"it is a {type(row).__name__}")


# ---------------------------------------------------------------- questions


def question_of(suite: Suite, item: Item, scrambled: bool = False) -> Question:
    """What is asked of a model in a row of a likelihood suite.

    Args:
        scrambled: the words of what comes before the answers in another order; of whole sentences, where nothing comes
            before them, the words of the sentences themselves.

    Raises:
        Flaw: the row lacks what the declaration names, or it is not what it should be.
    """
    if suite.kind in ("multiple choice", "completion"):
        values = _choice_values(suite, item, scrambled)
        given = what_is_given("choose", values)
        assert item.reading is not None
        gold = gold_of("choose", values, given, item.reading)["answer"]
        choices = tuple(_cleaned(suite, choice) for choice in given["choices"])
        if empty := [i for i, choice in enumerate(choices, 1) if not choice]:
            raise Flaw("a choice is empty", f"the {empty[0]}th")
        return Question(tuple((given["question"], suite.delimiter + choice) for choice in choices), choices, gold)
    if suite.kind == "cloze":
        context, answer = _blank(suite, item)
        if scrambled:
            context = shuffled(context, str(item.line))
        return Question(((context, answer),), (answer.strip(),), 0)
    context = _prompt(suite, item, scrambled) if suite.prompts else ""
    if suite.kind == "minimal pairs":
        sentences = [_text(item.values, suite.columns[side], side) for side in ("good", "bad")]
    else:
        sentences = _stereotypes(suite, item)
    if scrambled and not suite.prompts:
        sentences = [shuffled(sentence, str(item.line)) for sentence in sentences]
    return Question(tuple((context, suite.delimiter + one) for one in sentences), tuple(sentences), 0)


def wanted_of(suite: Suite, item: Item, scrambled: bool = False) -> Wanted:
    """What a model is to go on from in a row of a suite of writing, and the references. Raises `Flaw` as above."""
    if suite.kind == "free text":
        return _opening(suite, item)
    prompt = _prompt(suite, item, scrambled)
    found = _value(item.values, suite.columns["reference"])
    references = found if isinstance(found, list) else [found]
    if not references or not all(isinstance(one, str) and one.strip() for one in references):
        raise Flaw("the reference is not a text, nor a list of texts")
    return Wanted(prompt, tuple(references))


def _opening(suite: Suite, item: Item) -> Wanted:
    """A prompt; or of a text its first words, which a person has gone on from as well."""
    if suite.prompts:
        return Wanted(_prompt(suite, item, False), ())
    if item.values.get("prompt") is not None:
        return Wanted(_text(item.values, ("prompt",), "prompt"), ())
    text = _text(item.values, ("text",), "text")
    parts = list(re.finditer(r"\S+", text))
    if len(parts) < 2 * OPENING:
        return Wanted(text, ())
    return Wanted(text[: parts[OPENING - 1].end()], (text[parts[OPENING - 1].end() :],))


def _choice_values(suite: Suite, item: Item, scrambled: bool) -> dict[str, Any]:
    """Question, choices and answer, as `tasks.rows` reads them."""
    columns = suite.columns["choices"]
    if len(columns) > 1:
        choices: Any = [item.values.get(column) for column in columns]
        while choices and choices[-1] in (None, ""):  # questions may have fewer choices than there are columns
            choices.pop()
    else:
        choices = _value(item.values, tuple(map(str.strip, "|".join(columns).split("|"))))
    answer = _value(item.values, suite.columns["answer"])
    return {"question": _prompt(suite, item, scrambled), "choices": choices, "answer": answer}


def _blank(suite: Suite, item: Item) -> tuple[str, str]:
    """A context and the answer that is to follow it: of a text its last word, after the last space."""
    if "text" not in suite.columns:
        return _prompt(suite, item, False), suite.delimiter + _text(item.values, suite.columns["answer"], "answer")
    context, space, word = _text(item.values, suite.columns["text"], "text").rstrip().rpartition(" ")
    if not context.strip():
        raise Flaw("a text of fewer than two words")
    return context, space + word


def _stereotypes(suite: Suite, item: Item) -> list[str]:
    """The stereotype, what contradicts it, and what has nothing to do with it; as lists side by side or as objects."""
    found = _value(item.values, suite.columns["sentences"])
    if isinstance(found, dict):
        texts, labels = found.get("sentence"), found.get("gold_label")
        both = list(zip(texts, labels, strict=False)) if isinstance(texts, list) and isinstance(labels, list) else []
    else:
        rows = found if isinstance(found, list) else []
        both = [(row.get("sentence"), row.get("gold_label")) for row in rows if isinstance(row, dict)]
    names = ("anti-stereotype", "stereotype", "unrelated")  # a number is the place in this order
    by_label = {names[label] if label in (0, 1, 2) else label: text for text, label in both}
    sentences = [by_label.get(name) for name in ("stereotype", "anti-stereotype", "unrelated")]
    if not all(isinstance(one, str) and one.strip() for one in sentences):
        raise Flaw("not one sentence for each gold_label: stereotype, anti-stereotype, unrelated")
    return [str(one) for one in sentences]


def _prompt(suite: Suite, item: Item, scrambled: bool) -> str:
    """The first template whose columns are all there, filled in."""
    missing = ""
    for template in suite.prompts:
        parts = []
        for literal, column, change, _ in Formatter().parse(template):
            parts.append(literal)
            if column is None:
                continue
            try:
                text = _text(item.values, (column,), column, blank=True)
            except Flaw as flaw:
                missing = missing or f"{flaw.kind}{f' ({flaw.detail})' if flaw.detail else ''}"
                break
            text = text.capitalize() if change == "capitalize" else text
            parts.append(shuffled(text, str(item.line)) if scrambled else text)
        else:
            return _cleaned(suite, "".join(parts))
    raise Flaw(missing)


def _text(values: dict[str, Any], columns: tuple[str, ...], role: str, blank: bool = False) -> str:
    found = _value(values, columns)
    if isinstance(found, int | float) and not isinstance(found, bool):
        found = str(found)
    if not isinstance(found, str):
        raise Flaw(f"the {role} is not a text", f"it is a {type(found).__name__}")
    if not (blank or found.strip()):
        raise Flaw(f"the {role} is empty")
    return found


def _value(values: dict[str, Any], columns: tuple[str, ...]) -> Any:
    """What the first of some columns that is there holds; "a.b" is b inside a, where there is no column "a.b"."""
    for column in columns:
        if values.get(column) is not None:
            return values[column]
        found: Any = values
        for part in column.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found is not None:
            return found
    raise Flaw(f"no column {' or '.join(columns)}", f"there are {listed(values)}")


def _cleaned(suite: Suite, text: str) -> str:
    """HellaSwag's texts from WikiHow without what is left of their markup, as lm-eval cleans them."""
    if suite.clean != "wikihow":
        return text
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


# ---------------------------------------------------------------- samples, and what is scrambled


def sample(items: Sequence[Item], limit: int | None) -> list[int]:
    """The places of at most `limit` of the items, of each group its share, the same ones every time, in their order.

    In the order of their groups, and of a hash within each, every so-manieth is taken.
    """
    if limit is None or limit >= len(items):
        return list(range(len(items)))
    order = sorted(range(len(items)), key=lambda i: (items[i].group, _hash(str(i))))
    return sorted(order[(2 * k + 1) * len(items) // (2 * limit)] for k in range(limit))


def shuffled(text: str, salt: str) -> str:
    """The words of a text in another order, what ends its sentence still at the end; of a text that has no spaces, its
    characters.

    The order is that of a hash of each word, so that what two sentences of a pair share stays in one order.
    """
    cut = len(text)
    while cut and not text[cut - 1].isalnum():
        cut -= 1
    cut = cut or len(text)
    units = words(text[:cut])
    counts: dict[str, int] = {}
    keys = []
    for unit in units:
        counts[unit] = counts.get(unit, 0) + 1
        keys.append(_hash(f"{salt} {counts[unit]} {unit}"))
    order = sorted(range(len(units)), key=lambda i: keys[i])
    return ("" if len(units) > len(text.split()) else " ").join(units[i] for i in order) + text[cut:]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
