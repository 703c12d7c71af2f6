"""Audit of a corpus: languages, duplicates, PII, repeated lines, and contamination by benchmark items.

Documents are streamed, and the bands of near-duplicate detection are kept on disk, 160 bytes per document.
"""

import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol
from zlib import crc32

import numpy as np

from nextword.audit.findings import MAX_EXAMPLES, Finding, count_finding, percentages
from nextword.audit.memorization import format_excerpt
from nextword.audit.near_duplicates import NearDuplicates, exact_duplicates_finding
from nextword.audit.pii import PII_KINDS, find_pii, mask_pii
from nextword.audit.text_index import CorpusIndex
from nextword.common import statistics
from nextword.common.console import Console
from nextword.common.errors import MissingDependencyError, import_optional
from nextword.data.issues import IssueLog
from nextword.tasks.benchmark_items import BenchmarkRow, generation_item, load_rows, loglikelihood_item, sample_indices
from nextword.tasks.benchmark_spec import Benchmark

SAMPLE_CHARS = 4096  # characters of a document from which its script and language are identified
MIN_LETTERS = 64  # letters needed to identify a language
MIN_LINE_BYTES = 24  # lines shorter than this are not counted as repeated
CONTAMINATION_NGRAM = 13  # words (Brown et al. 2020, appendix C)
MAX_ITEMS = 1000  # items looked up per benchmark


def audit_corpus(
    index: CorpusIndex, *, benchmarks: Sequence[Benchmark] = (), console: Console | None = None
) -> list[Finding]:
    """Audit an indexed corpus.

    Args:
        benchmarks: benchmarks whose items are looked up in the corpus.
    """
    console = console or Console(quiet=True)
    findings = [*_input_issue_findings(index), exact_duplicates_finding(index)]
    lines = RepeatedLines(index)
    with tempfile.TemporaryDirectory() as directory:
        near_duplicates = NearDuplicates(index, Path(directory))
        visitors: list[DocumentVisitor] = [script_counts(), PIIFindings(index), near_duplicates, lines]
        try:
            visitors.insert(1, language_counts())
        except MissingDependencyError as error:
            console.info(f"languages are not identified: {error}")
        _visit_documents(index, visitors, "reading the corpus", console)
        lines.start_exact_count()
        _visit_documents(index, [lines], "counting lines", console)
        for visitor in visitors:
            findings += visitor.findings()
    return findings + [contamination(index, benchmark, console) for benchmark in benchmarks]


class DocumentVisitor(Protocol):
    """Collects findings from the documents of a corpus, chunk by chunk."""

    def visit_chunk(self, document: int, offset: int, text: str) -> None:
        """Read a chunk of a document from its byte `offset` on."""
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
    """Issues found while reading the files."""
    if not index.problems:
        return []
    most_frequent = Counter(index.problems).most_common(MAX_EXAMPLES)
    examples = tuple({"issue": kind, "count": f"{count:,}"} for kind, count in most_frequent)
    note, total = "skipped or replaced while reading the files", sum(index.problems.values())
    return [
        Finding("corpus", "file issues", total, unit="found", n=len(index), reference=0.0, note=note, examples=examples)
    ]


# ---------------------------------------------------------------- scripts and languages


class CategoryCounts:
    """Documents by a category of their first `SAMPLE_CHARS` characters. A `DocumentVisitor`.

    Args:
        name: of the findings, before the category.
        classify: the category of a text.
    """

    def __init__(self, name: str, note: str, classify: Callable[[str], str]) -> None:
        self.name, self.note, self.classify = name, note, classify
        self.counts: Counter[str] = Counter()

    def visit_chunk(self, document: int, offset: int, text: str) -> None:
        if offset == 0:
            self.counts[self.classify(text[:SAMPLE_CHARS])] += 1

    def end_document(self, document: int) -> None:
        pass

    def findings(self) -> list[Finding]:
        n = self.counts.total()
        return [
            Finding("corpus", f"{self.name} {category}", 100 * count / n, unit="%", n=n, note=self.note)
            for category, count in self.counts.most_common(MAX_EXAMPLES)
        ]


def script_counts() -> CategoryCounts:
    """Documents by script, from the Unicode names of their letters."""

    def dominant_script(text: str) -> str:
        counts: Counter[str] = Counter()
        for character, count in Counter(text).items():
            if character.isalpha():
                counts[unicode_script(character)] += count
        return counts.most_common(1)[0][0] if counts else "none (no letters)"

    note = f"the script of most letters in the first {SAMPLE_CHARS:,} characters"
    return CategoryCounts("documents in script", note, dominant_script)


@cache
def unicode_script(letter: str) -> str:
    """The first word of a letter's Unicode name: "LATIN SMALL LETTER A" is Latin."""
    name = unicodedata.name(letter, "UNKNOWN").split()[0]
    return {"CJK": "Han"}.get(name, name.capitalize())


def language_counts() -> CategoryCounts:
    """Documents by language, identified by py3langid (Lui and Baldwin 2012), which knows 97.

    Raises:
        MissingDependencyError: py3langid is not installed.
    """
    langid = import_optional("py3langid", "identifying languages", "languages")

    def identify_language(text: str) -> str:
        return str(langid.classify(text)[0]) if sum(map(str.isalpha, text)) >= MIN_LETTERS else "none (too short)"

    note = f"identified by py3langid from the first {SAMPLE_CHARS:,} characters"
    return CategoryCounts("documents in language", note, identify_language)


# ---------------------------------------------------------------- PII


class PIIFindings:
    """Matches of PII by kind, with masked examples. A `DocumentVisitor`."""

    def __init__(self, index: CorpusIndex):
        self._index = index
        self.counts: Counter[str] = Counter()
        self.document_counts: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {kind: [] for kind in PII_KINDS}
        self._document_kinds: set[str] = set()

    def visit_chunk(self, document: int, offset: int, text: str) -> None:
        for kind, start, end in find_pii(text):
            self.counts[kind] += 1
            self._document_kinds.add(kind)
            if len(self.examples[kind]) < MAX_EXAMPLES:
                name, masked = self._index.document_name(document), mask_pii(kind, text[start:end])
                self.examples[kind].append({"document": name, "masked": masked})

    def end_document(self, document: int) -> None:
        self.document_counts.update(self._document_kinds)
        self._document_kinds.clear()

    def findings(self) -> list[Finding]:
        findings: list[Finding] = []
        for kind in PII_KINDS:
            note = f"in {self.document_counts[kind]:,} documents; recognized by pattern"
            examples, count = tuple(self.examples[kind]), self.counts[kind]
            findings.append(count_finding("corpus", kind, count, "found", len(self._index), note, examples))
        return findings


# ---------------------------------------------------------------- repeated lines


class RepeatedLines:
    """Lines that many documents contain. A `DocumentVisitor` that reads the corpus twice.

    The first pass counts hashes of lines in a table of fixed size, where lines may collide. The second counts exactly those
    lines whose hash is frequent.
    """

    NUM_HASH_SLOTS, MAX_TRACKED_LINES = 2**22, 2**16

    def __init__(self, index: CorpusIndex):
        self._index = index
        self.min_documents = max(5, len(index) // 100)
        self._slot_counts = np.zeros(self.NUM_HASH_SLOTS, np.uint32)
        self._tracked_lines: dict[bytes, list[int]] | None = None  # documents, total bytes, and one of the documents
        self._document_lines: Counter[bytes] = Counter()

    def start_exact_count(self) -> None:
        """Begin the second pass."""
        self._tracked_lines = {}

    def visit_chunk(self, document: int, offset: int, text: str) -> None:
        lines = (line.strip() for line in text.encode().split(b"\n"))
        self._document_lines.update(line for line in lines if len(line) >= MIN_LINE_BYTES)

    def end_document(self, document: int) -> None:
        lines = list(self._document_lines)
        slots = np.fromiter(map(crc32, lines), np.int64, len(lines)) % self.NUM_HASH_SLOTS
        if self._tracked_lines is None:
            self._slot_counts[np.unique(slots)] += 1
        else:
            for i in np.flatnonzero(self._slot_counts[slots] >= self.min_documents):
                self._track_line(self._tracked_lines, lines[i], document)
        self._document_lines.clear()

    def _track_line(self, tracked: dict[bytes, list[int]], line: bytes, document: int) -> None:
        if line in tracked or len(tracked) < self.MAX_TRACKED_LINES:
            stats = tracked.setdefault(line, [0, 0, document])
            stats[0] += 1
            stats[1] += self._document_lines[line] * (len(line) + 1)

    def findings(self) -> list[Finding]:
        tracked = self._tracked_lines or {}
        repeated = {line: stats for line, stats in tracked.items() if stats[0] >= self.min_documents}
        byte_share = 100 * sum(size for _, size, _ in repeated.values()) / max(1, self._index.num_text_bytes)
        note = (
            f"share of bytes in lines of at least {MIN_LINE_BYTES} bytes that {self.min_documents:,} documents or more contain"
            f"; {len(repeated):,} distinct lines"
        )
        examples: list[dict[str, str]] = []
        for line in sorted(repeated, key=lambda line: (-repeated[line][0], line))[:MAX_EXAMPLES]:
            count, _, document = repeated[line]
            excerpt = format_excerpt(line.decode("utf-8", "replace"), 80)
            name = self._index.document_name(document)
            examples.append({"line": excerpt, "documents": f"{count:,}", "document": name})
        n, flagged = len(self._index), byte_share >= 1
        return [
            Finding("corpus", "repeated lines", byte_share, None, None, "%", n, 0.0, flagged, note, tuple(examples))
        ]


# ---------------------------------------------------------------- contamination


def contamination(index: CorpusIndex, benchmark: Benchmark, console: Console) -> Finding:
    """The share of a benchmark's items that are in the corpus, whole or with 13 consecutive words."""
    rows = load_rows(benchmark, IssueLog())
    sampled_rows = [rows[i] for i in sample_indices(rows, MAX_ITEMS)]
    hits: list[float] = []
    examples: list[dict[str, str]] = []
    for number, row in enumerate(sampled_rows, start=1):
        overlap = find_overlap(index, item_text(benchmark, row))
        hits.append(float(overlap is not None))
        if overlap is not None and len(examples) < MAX_EXAMPLES:
            document, passage = index.document_name(overlap[0]), format_excerpt(overlap[1])
            examples.append({"document": document, "item": f"{row.path} line {row.line}", "passage": passage})
        console.progress(f"looking up {benchmark.name}", number, len(sampled_rows))
    score = statistics.proportion(hits)
    note = (
        f"{score.n:,} of {len(rows):,} items were looked up; contaminated if the corpus contains one whole, or "
        f"{CONTAMINATION_NGRAM} consecutive words of it, verbatim"
    )
    value, low, high = percentages(score)
    name, flagged = f"{benchmark.name}: contaminated items", value > 0
    return Finding("corpus", name, value, low, high, "%", score.n, 0.0, flagged, note, tuple(examples))


def item_text(benchmark: Benchmark, row: BenchmarkRow) -> str:
    """The text of an item that a model could memorize: the prompt with the correct answer, the preferred sentence of a pair, or
    the prompt of a generation."""
    if benchmark.kind in ("writing", "free text"):
        return generation_item(benchmark, row).prompt
    item = loglikelihood_item(benchmark, row)
    return "".join(item.requests[item.gold_index]).strip()


def find_overlap(index: CorpusIndex, text: str) -> tuple[int, str] | None:
    """A document that contains a whole text, or `CONTAMINATION_NGRAM` consecutive words of it, and the passage."""
    data = text.encode("utf-8", "replace")
    for match in index.find_matches(data, min(MIN_LINE_BYTES, max(1, len(data)))):
        if match.end - match.start == len(data):
            return match.document, text
        passage = data[match.start : match.end].decode()
        cuts_first_word = data[: match.start].decode()[-1:].strip() and passage[:1].strip()
        cuts_last_word = data[match.end :].decode()[:1].strip() and passage[-1:].strip()
        if len(passage.split()) - bool(cuts_first_word) - bool(cuts_last_word) >= CONTAMINATION_NGRAM:
            return match.document, passage
    return None
