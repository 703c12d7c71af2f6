"""What is in a corpus that a person should know of: its languages, copies, personal data, lines that come again and again, and
questions of evaluation suites. All is read as a stream; what grows with the corpus lies on disk."""

import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import numpy as np

from nextword.audit.findings import Finding
from nextword.audit.memorization import SHOWN, shown
from nextword.audit.near_duplicates import NearCopies, exact_copies
from nextword.audit.pii import KINDS, data_in, masked
from nextword.audit.text_index import Index, build_index
from nextword.common.console import Console
from nextword.common.errors import MissingExtra
from nextword.data.documents import Problems
from nextword.tasks import metrics
from nextword.tasks.benchmark_items import Item, question_of, read_items, sample, wanted_of
from nextword.tasks.benchmark_spec import Suite

OPENING = 4096  # characters of a document that tell its script and its language
CERTAIN = 64  # letters that these must have at least
LINE = 24  # characters that a line has at least to be one that can come again
RUN = 13  # words of an item that stand together in the corpus (Brown et al. 2020, appendix C)
LIMIT = 1000  # items of a suite


def audit_corpus(
    corpora: Sequence[str | Path],
    *,
    suites: Sequence[Suite] = (),
    index: Index | None = None,
    console: Console | None = None,
) -> list[Finding]:
    """What is in a corpus.

    Args:
        suites: the evaluation suites of which it is told how much of them the corpus holds.
        index: that of these corpora, where there is one; else one is made for the while.
    """
    console = console or Console(quiet=True)
    if index is None:
        with tempfile.TemporaryDirectory() as made:
            built = build_index(corpora, Path(made) / "index", console=console)
            return audit_corpus(corpora, suites=suites, index=built, console=console)
    found = [*_flaws(index), exact_copies(index)]
    with tempfile.TemporaryDirectory() as made:
        lines = Lines(index)
        readers: list[Reader] = [scripts(), PersonalData(index), NearCopies(index, Path(made)), lines]
        try:
            readers.insert(1, languages())
        except MissingExtra as error:
            console.say(f"the languages of the corpus are left out: {error}")
        _read(index, readers, "reading the corpus", console)
        lines.count()
        _read(index, [lines], "counting lines", console)
        for reader in readers:
            found += reader.findings()
    return found + [overlap(index, suite, console) for suite in suites if suite.files or suite.hub]


class Reader(Protocol):
    """Something that is found out of the documents as they go by, piece by piece."""

    def add(self, document: int, at: int, text: str) -> None:
        """A piece of a document, from its byte `at` on."""
        ...

    def end(self, document: int) -> None: ...

    def findings(self) -> list[Finding]: ...


def _read(index: Index, readers: Sequence[Reader], stage: str, console: Console) -> None:
    done = 0
    for document in range(len(index)):
        for at, text in index.pieces(document):
            for reader in readers:
                reader.add(document, at, text)
            done += len(text)
            console.progress(stage, min(done, index.size), index.size)
        for reader in readers:
            reader.end(document)
    console.progress(stage, index.size, index.size)


def _flaws(index: Index) -> list[Finding]:
    """What was wrong with the files, as their readers reported it."""
    if not index.problems:
        return []
    flaws = Counter(index.problems).most_common(SHOWN)
    return [
        Finding(
            "corpus", "flaws of its files", sum(index.problems.values()), unit="found", n=len(index), reference=0.0,
            note="what was left out or replaced when the files were read",
            examples=tuple({"flaw": kind, "count": f"{count:,}"} for kind, count in flaws),
        )
    ]  # fmt: skip


# ---------------------------------------------------------------- scripts and languages


class Shares:
    """Documents by what most of their opening is.

    Args:
        name: of a finding, with a place for the kind.
        kind: what the opening of a document is.
    """

    def __init__(self, name: str, note: str, kind: Callable[[str], str]) -> None:
        self.name, self.note, self.kind = name, note, kind
        self.counts: Counter[str] = Counter()
        self.documents = 0

    def add(self, document: int, at: int, text: str) -> None:
        if at == 0:
            self.documents += 1
            self.counts[self.kind(text[:OPENING])] += 1

    def end(self, document: int) -> None:
        pass

    def findings(self) -> list[Finding]:
        return [
            Finding("corpus", self.name.format(kind), 100 * count / self.documents, unit="%", n=self.documents, note=self.note)
            for kind, count in self.counts.most_common(SHOWN)
        ]  # fmt: skip


def scripts() -> Shares:
    """In which script a document is, by the names of its letters."""

    def kind(text: str) -> str:
        counts: Counter[str] = Counter()
        for character, count in Counter(text).items():
            if character.isalpha():
                counts[script_of(character)] += count
        return counts.most_common(1)[0][0] if counts else "none (no letters)"

    return Shares(
        "documents in the script {}", f"by most of the letters in the first {OPENING:,} characters of each", kind
    )


@cache
def script_of(letter: str) -> str:
    """The script that a letter's Unicode name begins with: "LATIN SMALL LETTER A" is Latin."""
    name = unicodedata.name(letter, "UNKNOWN").split()[0]
    return {"CJK": "Han"}.get(name, name.capitalize())


def languages() -> Shares:
    """In which language a document is, by py3langid (Lui and Baldwin 2012), which knows 97 of them.

    Raises:
        MissingExtra: py3langid is not installed.
    """
    try:
        module: Any = import_module("py3langid")
    except ImportError as error:
        raise MissingExtra("telling languages", "languages") from error

    def kind(text: str) -> str:
        return str(module.classify(text)[0]) if sum(map(str.isalpha, text)) >= CERTAIN else "none (too short to tell)"

    return Shares(
        "documents in the language {}", f"guessed by py3langid from the first {OPENING:,} characters of each", kind
    )


# ---------------------------------------------------------------- personal data


class PersonalData:
    """Counts of personal data, with a few of each kind by document and mask."""

    def __init__(self, index: Index):
        self._index = index
        self.counts: Counter[str] = Counter()
        self.documents: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {kind: [] for kind in KINDS}
        self._seen: set[str] = set()  # kinds in the document that is read

    def add(self, document: int, at: int, text: str) -> None:
        for kind, start, end in data_in(text):
            self.counts[kind] += 1
            self._seen.add(kind)
            if len(self.examples[kind]) < SHOWN:
                name, shape = self._index.name(document), masked(kind, text[start:end])
                self.examples[kind].append({"document": name, "masked": shape})

    def end(self, document: int) -> None:
        self.documents.update(self._seen)
        self._seen.clear()

    def findings(self) -> list[Finding]:
        return [
            Finding(
                "corpus", kind, self.counts[kind], unit="found", n=len(self._index), reference=0.0,
                notable=self.counts[kind] > 0, note=f"in {self.documents[kind]:,} documents; told by their form",
                examples=tuple(self.examples[kind]),
            )
            for kind in KINDS
        ]  # fmt: skip


# ---------------------------------------------------------------- lines


class Lines:
    """Lines that stand in many documents. Read twice: first each line's hash is counted in a table of fixed size, where others
    may be counted with it; then those that may be frequent are counted by themselves."""

    SLOTS, MOST = 2**22, 2**16  # counters of the first reading, and lines that the second follows at most

    def __init__(self, index: Index):
        self._index = index
        self._slots = np.zeros(self.SLOTS, np.uint32)
        self._own: dict[bytes, list[int]] | None = None  # documents, bytes in all, and one of the documents
        self._lines: Counter[bytes] = Counter()  # of the document that is read

    @property
    def many(self) -> int:
        """Documents from which on a line is one of many: a hundredth of them, and never fewer than five."""
        return max(5, len(self._index) // 100)

    def count(self) -> None:
        """Begin the second reading."""
        self._own = {}

    def add(self, document: int, at: int, text: str) -> None:
        for line in text.encode().split(b"\n"):
            line = line.strip()
            if len(line) >= LINE:
                self._lines[line] += 1

    def end(self, document: int) -> None:
        if self._lines:
            lines = list(self._lines)
            at = np.fromiter(map(crc32, lines), np.int64, len(lines)) % self.SLOTS
            if self._own is None:
                self._slots[np.unique(at)] += 1
            else:
                self._follow([lines[i] for i in np.flatnonzero(self._slots[at] >= self.many)], document)
        self._lines.clear()

    def _follow(self, lines: list[bytes], document: int) -> None:
        assert self._own is not None
        for line in lines:
            if line in self._own or len(self._own) < self.MOST:
                known = self._own.setdefault(line, [0, 0, document])
                known[0] += 1
                known[1] += self._lines[line] * (len(line) + 1)

    def findings(self) -> list[Finding]:
        many = {line: known for line, known in (self._own or {}).items() if known[0] >= self.many}
        often = sorted(many, key=lambda line: (-many[line][0], line))[:SHOWN]
        share = 100 * sum(size for _, size, _ in many.values()) / max(1, self._index.size)
        return [
            Finding(
                "corpus", "text in lines that come again and again", share, unit="%", n=len(self._index), reference=0.0,
                notable=share >= 1,
                note=f"of its bytes, those in lines of {LINE} bytes or more that stand in {self.many:,} documents or more; "
                f"{len(many):,} different lines",
                examples=tuple(
                    {"line": shown(line.decode("utf-8", "replace"), 80), "documents": f"{many[line][0]:,}",
                     "document": self._index.name(many[line][2])} for line in often
                ),
            )
        ]  # fmt: skip


# ---------------------------------------------------------------- evaluation suites


def overlap(index: Index, suite: Suite, console: Console) -> Finding:
    """How many of a suite's items stand in the corpus: whole, or a run of thirteen of their words."""
    problems = Problems()
    items = read_items(suite, problems)
    chosen = [items[i] for i in sample(items, LIMIT)]
    texts = [text_of(suite, item) for item in chosen]
    hits: list[float] = []
    examples: list[dict[str, str]] = []
    for number, (item, text) in enumerate(zip(chosen, texts, strict=True), start=1):
        found = run_in(index, text)
        hits.append(float(found is not None))
        if found is not None and len(examples) < SHOWN:
            document, passage = found
            where = {"document": index.name(document), "item": f"{item.path} line {item.line}"}
            examples.append({**where, "passage": shown(passage)})
        console.progress(f"looking up {suite.name}", number, len(chosen))
    score = metrics.share(hits)
    return Finding(
        "corpus", f"{suite.name}: items that stand in the corpus", 100 * score.value, 100 * score.low, 100 * score.high, "%",
        score.n, 0.0, score.value > 0,
        f"of {len(items):,} items {score.n:,}, whole or with {RUN} words or more one after the other, letter for letter",
        tuple(examples),
    )  # fmt: skip


def text_of(suite: Suite, item: Item) -> str:
    """What a model could have learned of an item: its question with the right answer, the better sentence of a pair, or
    what it is to go on from."""
    if suite.kind in ("writing", "free text"):
        return wanted_of(suite, item).prompt
    question = question_of(suite, item)
    return "".join(question.asked[question.gold]).strip()


def run_in(index: Index, text: str) -> tuple[int, str] | None:
    """A document with a whole text, or with a run of `RUN` of its words, and what of it stands there; None where none has."""
    data = text.encode("utf-8", "replace")
    for match in index.matches(data, min(LINE, max(1, len(data)))):
        if match.end - match.start == len(data):
            return match.document, text
        # Words that a match holds in part are not counted: what is before the first space in it, and after the last.
        passage = data[match.start : match.end].decode()
        before = data[: match.start].decode()[-1:].strip() and passage[:1].strip()
        after = data[match.end :].decode()[:1].strip() and passage[-1:].strip()
        if len(passage.split()) - bool(before) - bool(after) >= RUN:
            return match.document, passage
    return None
