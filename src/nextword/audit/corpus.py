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
from nextword.audit.memorization import MAX_EXAMPLES, format_excerpt
from nextword.audit.near_duplicates import NearDuplicates, exact_duplicates_finding
from nextword.audit.pii import PII_KINDS, find_pii, mask_pii
from nextword.audit.text_index import CorpusIndex, build_index
from nextword.common import statistics
from nextword.common.console import Console
from nextword.common.errors import MissingDependencyError
from nextword.data.issues import IssueLog
from nextword.tasks.benchmark_items import BenchmarkRow, generation_item, load_rows, loglikelihood_item, sample_indices
from nextword.tasks.benchmark_spec import Benchmark

SAMPLE_CHARS = 4096  # characters of a document that tell its script and its language
MIN_LETTERS = 64  # letters that these must have at least
MIN_LINE_BYTES = 24  # characters that a line has at least to be one that can come again
CONTAMINATION_NGRAM = 13  # words of an item that stand together in the corpus (Brown et al. 2020, appendix C)
MAX_ITEMS = 1000  # items of a suite


def audit_corpus(
    corpora: Sequence[str | Path],
    *,
    benchmarks: Sequence[Benchmark] = (),
    index: CorpusIndex | None = None,
    console: Console | None = None,
) -> list[Finding]:
    """What is in a corpus.

    Args:
        suites: the evaluation suites of which it is told how much of them the corpus holds.
        index: that of these corpora, where there is one; else one is made for the while.
    """
    console = console or Console(quiet=True)
    if index is None:
        with tempfile.TemporaryDirectory() as temp_dir:
            temp_index = build_index(corpora, Path(temp_dir) / "index", console=console)
            return audit_corpus(corpora, benchmarks=benchmarks, index=temp_index, console=console)
    findings = [*_input_issue_findings(index), exact_duplicates_finding(index)]
    with tempfile.TemporaryDirectory() as temp_dir:
        repeated_lines = RepeatedLines(index)
        visitors: list[DocumentVisitor] = [
            script_counts(),
            PIIFindings(index),
            NearDuplicates(index, Path(temp_dir)),
            repeated_lines,
        ]
        try:
            visitors.insert(1, language_counts())
        except MissingDependencyError as error:
            console.info(f"the languages of the corpus are left out: {error}")
        _visit_documents(index, visitors, "reading the corpus", console)
        repeated_lines.start_exact_count()
        _visit_documents(index, [repeated_lines], "counting lines", console)
        for visitor in visitors:
            findings += visitor.findings()
    return findings + [contamination(index, suite, console) for suite in benchmarks if suite.files or suite.hub_dataset]


class DocumentVisitor(Protocol):
    """Something that is found out of the documents as they go by, piece by piece."""

    def visit_chunk(self, document: int, offset: int, text: str) -> None:
        """A piece of a document, from its byte `at` on."""
        ...

    def end_document(self, document: int) -> None: ...

    def findings(self) -> list[Finding]: ...


def _visit_documents(index: CorpusIndex, visitors: Sequence[DocumentVisitor], stage: str, console: Console) -> None:
    chars_done = 0
    for document in range(len(index)):
        for offset, text in index.iter_chunks(document):
            for visitor in visitors:
                visitor.visit_chunk(document, offset, text)
            chars_done += len(text)
            console.progress(stage, min(chars_done, index.num_text_bytes), index.num_text_bytes)
        for visitor in visitors:
            visitor.end_document(document)
    console.progress(stage, index.num_text_bytes, index.num_text_bytes)


def _input_issue_findings(index: CorpusIndex) -> list[Finding]:
    """What was wrong with the files, as their readers reported it."""
    if not index.problems:
        return []
    issue_counts = Counter(index.problems).most_common(MAX_EXAMPLES)
    return [
        Finding(
            "corpus", "flaws of its files", sum(index.problems.values()), unit="found", n=len(index), reference=0.0,
            note="what was left out or replaced when the files were read",
            examples=tuple({"flaw": kind, "count": f"{count:,}"} for kind, count in issue_counts),
        )
    ]  # fmt: skip


# ---------------------------------------------------------------- scripts and languages


class CategoryCounts:
    """Documents by what most of their opening is.

    Args:
        name: of a finding, with a place for the kind.
        kind: what the opening of a document is.
    """

    def __init__(self, name_template: str, note: str, classify: Callable[[str], str]) -> None:
        self.name_template, self.note, self.classify = name_template, note, classify
        self.counts: Counter[str] = Counter()
        self.num_documents = 0

    def visit_chunk(self, document: int, offset: int, text: str) -> None:
        if offset == 0:
            self.num_documents += 1
            self.counts[self.classify(text[:SAMPLE_CHARS])] += 1

    def end_document(self, document: int) -> None:
        pass

    def findings(self) -> list[Finding]:
        return [
            Finding("corpus", self.name_template.format(kind), 100 * count / self.num_documents, unit="%", n=self.num_documents, note=self.note)
            for kind, count in self.counts.most_common(MAX_EXAMPLES)
        ]  # fmt: skip


def script_counts() -> CategoryCounts:
    """In which script a document is, by the names of its letters."""

    def dominant_script(text: str) -> str:
        counts: Counter[str] = Counter()
        for character, count in Counter(text).items():
            if character.isalpha():
                counts[unicode_script(character)] += count
        return counts.most_common(1)[0][0] if counts else "none (no letters)"

    return CategoryCounts(
        "documents in the script {}",
        f"by most of the letters in the first {SAMPLE_CHARS:,} characters of each",
        dominant_script,
    )


@cache
def unicode_script(letter: str) -> str:
    """The script that a letter's Unicode name begins with: "LATIN SMALL LETTER A" is Latin."""
    name = unicodedata.name(letter, "UNKNOWN").split()[0]
    return {"CJK": "Han"}.get(name, name.capitalize())


def language_counts() -> CategoryCounts:
    """In which language a document is, by py3langid (Lui and Baldwin 2012), which knows 97 of them.

    Raises:
        MissingExtra: py3langid is not installed.
    """
    try:
        langid: Any = import_module("py3langid")
    except ImportError as error:
        raise MissingDependencyError("telling languages", "languages") from error

    def identify_language(text: str) -> str:
        return (
            str(langid.classify(text)[0]) if sum(map(str.isalpha, text)) >= MIN_LETTERS else "none (too short to tell)"
        )

    return CategoryCounts(
        "documents in the language {}",
        f"guessed by py3langid from the first {SAMPLE_CHARS:,} characters of each",
        identify_language,
    )


# ---------------------------------------------------------------- personal data


class PIIFindings:
    """Counts of personal data, with a few of each kind by document and mask."""

    def __init__(self, index: CorpusIndex):
        self._index = index
        self.counts: Counter[str] = Counter()
        self.document_counts: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {kind: [] for kind in PII_KINDS}
        self._document_kinds: set[str] = set()  # kinds in the document that is read

    def visit_chunk(self, document: int, offset: int, text: str) -> None:
        for kind, start, end in find_pii(text):
            self.counts[kind] += 1
            self._document_kinds.add(kind)
            if len(self.examples[kind]) < MAX_EXAMPLES:
                name, masked_text = self._index.document_name(document), mask_pii(kind, text[start:end])
                self.examples[kind].append({"document": name, "masked": masked_text})

    def end_document(self, document: int) -> None:
        self.document_counts.update(self._document_kinds)
        self._document_kinds.clear()

    def findings(self) -> list[Finding]:
        return [
            Finding(
                "corpus", kind, self.counts[kind], unit="found", n=len(self._index), reference=0.0,
                notable=self.counts[kind] > 0, note=f"in {self.num_documents[kind]:,} documents; told by their form",
                examples=tuple(self.examples[kind]),
            )
            for kind in PII_KINDS
        ]  # fmt: skip


# ---------------------------------------------------------------- lines


class RepeatedLines:
    """Lines that stand in many documents. Read twice: first each line's hash is counted in a table of fixed size, where others
    may be counted with it; then those that may be frequent are counted by themselves."""

    NUM_HASH_SLOTS, MAX_TRACKED_LINES = (
        2**22,
        2**16,
    )  # counters of the first reading, and lines that the second follows at most

    def __init__(self, index: CorpusIndex):
        self._index = index
        self._slot_counts = np.zeros(self.NUM_HASH_SLOTS, np.uint32)
        self._tracked_lines: dict[bytes, list[int]] | None = None  # documents, bytes in all, and one of the documents
        self._document_lines: Counter[bytes] = Counter()  # of the document that is read

    @property
    def min_documents(self) -> int:
        """Documents from which on a line is one of many: a hundredth of them, and never fewer than five."""
        return max(5, len(self._index) // 100)

    def start_exact_count(self) -> None:
        """Begin the second reading."""
        self._tracked_lines = {}

    def visit_chunk(self, document: int, offset: int, text: str) -> None:
        for line in text.encode().split(b"\n"):
            line = line.strip()
            if len(line) >= MIN_LINE_BYTES:
                self._document_lines[line] += 1

    def end_document(self, document: int) -> None:
        if self._document_lines:
            lines = list(self._document_lines)
            slots = np.fromiter(map(crc32, lines), np.int64, len(lines)) % self.NUM_HASH_SLOTS
            if self._tracked_lines is None:
                self._slot_counts[np.unique(slots)] += 1
            else:
                self._track_lines(
                    [lines[i] for i in np.flatnonzero(self._slot_counts[slots] >= self.min_documents)], document
                )
        self._document_lines.clear()

    def _track_lines(self, lines: list[bytes], document: int) -> None:
        assert self._tracked_lines is not None
        for line in lines:
            if line in self._tracked_lines or len(self._tracked_lines) < self.MAX_TRACKED_LINES:
                stats = self._tracked_lines.setdefault(line, [0, 0, document])
                stats[0] += 1
                stats[1] += self._document_lines[line] * (len(line) + 1)

    def findings(self) -> list[Finding]:
        repeated_lines = {
            line: known for line, known in (self._tracked_lines or {}).items() if known[0] >= self.min_documents
        }
        most_frequent = sorted(repeated_lines, key=lambda line: (-repeated_lines[line][0], line))[:MAX_EXAMPLES]
        byte_share = 100 * sum(size for _, size, _ in repeated_lines.values()) / max(1, self._index.num_text_bytes)
        return [
            Finding(
                "corpus", "text in lines that come again and again", byte_share, unit="%", n=len(self._index), reference=0.0,
                notable=byte_share >= 1,
                note=f"of its bytes, those in lines of {MIN_LINE_BYTES} bytes or more that stand in {self.min_documents:,} documents or more; "
                f"{len(repeated_lines):,} different lines",
                examples=tuple(
                    {"line": format_excerpt(line.decode("utf-8", "replace"), 80), "documents": f"{repeated_lines[line][0]:,}",
                     "document": self._index.document_name(repeated_lines[line][2])} for line in most_frequent
                ),
            )
        ]  # fmt: skip


# ---------------------------------------------------------------- evaluation suites


def contamination(index: CorpusIndex, benchmark: Benchmark, console: Console) -> Finding:
    """How many of a suite's items stand in the corpus: whole, or a run of thirteen of their words."""
    problems = IssueLog()
    items = load_rows(benchmark, problems)
    sampled_items = [items[i] for i in sample_indices(items, MAX_ITEMS)]
    texts = [item_text(benchmark, item) for item in sampled_items]
    hits: list[float] = []
    examples: list[dict[str, str]] = []
    for number, (item, text) in enumerate(zip(sampled_items, texts, strict=True), start=1):
        match = find_overlap(index, text)
        hits.append(float(match is not None))
        if match is not None and len(examples) < MAX_EXAMPLES:
            document, passage = match
            location = {"document": index.document_name(document), "item": f"{item.path} line {item.line}"}
            examples.append({**location, "passage": format_excerpt(passage)})
        console.progress(f"looking up {benchmark.name}", number, len(sampled_items))
    score = statistics.proportion(hits)
    return Finding(
        "corpus", f"{benchmark.name}: items that stand in the corpus", 100 * score.value, 100 * score.low, 100 * score.high, "%",
        score.n, 0.0, score.value > 0,
        f"of {len(items):,} items {score.n:,}, whole or with {CONTAMINATION_NGRAM} words or more one after the other, letter for letter",
        tuple(examples),
    )  # fmt: skip


def item_text(benchmark: Benchmark, item: BenchmarkRow) -> str:
    """What a model could have learned of an item: its question with the right answer, the better sentence of a pair, or
    what it is to go on from."""
    if benchmark.kind in ("writing", "free text"):
        return generation_item(benchmark, item).prompt
    question = loglikelihood_item(benchmark, item)
    return "".join(question.requests[question.gold_index]).strip()


def find_overlap(index: CorpusIndex, text: str) -> tuple[int, str] | None:
    """A document with a whole text, or with a run of `RUN` of its words, and what of it stands there; None where none has."""
    data = text.encode("utf-8", "replace")
    for match in index.find_matches(data, min(MIN_LINE_BYTES, max(1, len(data)))):
        if match.end - match.start == len(data):
            return match.document, text
        # Words that a match holds in part are not counted: what is before the first space in it, and after the last.
        passage = data[match.start : match.end].decode()
        cuts_first_word = data[: match.start].decode()[-1:].strip() and passage[:1].strip()
        cuts_last_word = data[match.end :].decode()[:1].strip() and passage[-1:].strip()
        if len(passage.split()) - bool(cuts_first_word) - bool(cuts_last_word) >= CONTAMINATION_NGRAM:
            return match.document, passage
    return None
