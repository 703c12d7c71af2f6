"""Audit of a corpus: languages, duplicates, PII, repeated lines, and contamination by benchmark items.

Near duplicates share 80 % of the shingles of five words that either has (Jaccard similarity, the "resemblance" of Broder
1997). Candidates come from MinHash signatures cut into bands (Leskovec, Rajaraman and Ullman 2014, section 3.4); the
similarity of each pair is then computed exactly.

Each measurement streams the documents. Bands are kept on disk, 160 bytes per document. Shapes: S signature values, n shingles
of a chunk, D documents, B bands.
"""

import re
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from nextword.audit.findings import MAX_EXAMPLES, Finding
from nextword.audit.pii import PII_KINDS, find_pii, format_excerpt, mask_pii
from nextword.audit.text_index import CorpusIndex
from nextword.common import statistics, text_units
from nextword.common.console import Console
from nextword.common.errors import MissingDependencyError, import_optional
from nextword.common.fs import is_json_array, is_json_object, map_disk_errors
from nextword.data.issues import IssueLog
from nextword.tasks.benchmark_items import (
    DEFAULT_ITEM_LIMIT,
    BenchmarkRow,
    generation_item,
    load_rows,
    loglikelihood_item,
    sample_indices,
)
from nextword.tasks.benchmark_spec import Benchmark

SAMPLE_CHARS = 4096  # characters of a document from which its script and language are identified
MIN_LANGUAGE_WIDTH = 64  # columns (`text_width`) of text needed to identify a language
MIN_LINE_WIDTH = 24  # lines narrower than this are not counted as repeated
# The scripts of languages that py3langid knows; those of all others are Latin.
LANGUAGE_SCRIPTS = {
    **dict.fromkeys(["be", "bg", "kk", "ky", "mk", "mn", "ru", "uk"], ("Cyrillic",)),
    "sr": ("Cyrillic", "Latin"),
    **dict.fromkeys(["ar", "fa", "ps", "ug", "ur"], ("Arabic",)),
    "ku": ("Arabic", "Latin"),
    **dict.fromkeys(["hi", "mr", "ne"], ("Devanagari",)),
    **dict.fromkeys(["as", "bn"], ("Bengali",)),
    "am": ("Ethiopic",),
    "dz": ("Tibetan",),
    "el": ("Greek",),
    "gu": ("Gujarati",),
    "he": ("Hebrew",),
    "hy": ("Armenian",),
    "ja": ("Hiragana", "Katakana", "Han"),
    "ka": ("Georgian",),
    "km": ("Khmer",),
    "kn": ("Kannada",),
    "ko": ("Hangul",),
    "lo": ("Lao",),
    "ml": ("Malayalam",),
    "or": ("Oriya",),
    "pa": ("Gurmukhi",),
    "si": ("Sinhala",),
    "ta": ("Tamil",),
    "te": ("Telugu",),
    "th": ("Thai",),
    "zh": ("Han",),
}
UNKNOWN_LANGUAGE = "not one of the languages that py3langid knows"
NUM_HASH_SLOTS, MAX_TRACKED_LINES = 2**22, 2**16
MAX_NGRAM, MIN_NGRAM = 13, 8  # consecutive words of an item that are evidence (Brown et al. 2020, appendix C)
MIN_PART_WORDS, MIN_ITEM_WORDS = (
    6,
    3,
)  # words of a whole part, such as a question, or of a whole item, that are evidence
SIMILARITY_THRESHOLD = 0.8
SHINGLE_SIZE = 5  # words
NUM_BANDS, ROWS_PER_BAND = 20, 6  # a pair of similarity 0.8 shares a band with probability 1 − (1 − 0.8⁶)²⁰ = 0.998
BATCH_SIZE = 2048  # shingles hashed at once
EMPTY_HASH = np.uint64(2**64 - 1)  # of a document without shingles
_SEPARATORS = re.compile(r"[-‐-―−/_]")
_PUNCTUATION = re.compile(r"[^\w\s]+")
HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def audit_corpus(index: CorpusIndex, benchmarks: Sequence[Benchmark], console: Console) -> list[Finding]:
    """Audit an indexed corpus.

    Args:
        index: The corpus.
        benchmarks: Benchmarks whose items are looked up in the corpus.
        console: Receives progress and messages.
    """
    return [
        *_input_issue_findings(index),
        exact_duplicates(index),
        *script_findings(index),
        *language_findings(index, console),
        *pii_findings(index, console),
        near_duplicates(index, console),
        repeated_lines(index, console),
        *(contamination(index, benchmark, console) for benchmark in benchmarks),
    ]


def _read_documents(
    index: CorpusIndex, stage: str, console: Console, trained: bool = False
) -> Iterator[tuple[int, Iterator[str]]]:
    """The chunks of each document or of its training part, to be read before the next document, with a report of progress."""
    done, total = 0, index.num_text_bytes

    def read_chunks(document: int) -> Iterator[str]:
        nonlocal done
        for _, text in index.iter_chunks(document, trained):
            yield text
            done += len(text)
            console.progress(stage, done, total)

    for document in range(len(index)):
        yield document, read_chunks(document)
    console.progress(stage, total, total)


def _input_issue_findings(index: CorpusIndex) -> list[Finding]:
    """Issues found while reading the files."""
    if not index.problems:
        return []
    most_frequent = Counter(index.problems).most_common(MAX_EXAMPLES)
    examples = [{"issue": kind, "count": f"{count:,}"} for kind, count in most_frequent]
    note, total = "skipped or replaced while reading the files", sum(index.problems.values())
    return [
        Finding("corpus", "file issues", total, unit="found", n=len(index), reference=0.0, note=note, examples=examples)
    ]


# ---------------------------------------------------------------- scripts and languages


def script_findings(index: CorpusIndex) -> list[Finding]:
    """Documents by script, as Unicode assigns it to their letters."""

    def dominant_script(text: str) -> str:
        return text_units.script_of(text) or "none (no letters)"

    note = f"the script of most letters in the first {SAMPLE_CHARS:,} characters"
    return _category_findings(index, "documents in script", note, dominant_script)


def language_findings(index: CorpusIndex, console: Console) -> list[Finding]:
    """Documents by language, identified by py3langid (Lui and Baldwin 2012), which knows 97. None without that package."""
    try:
        langid = import_optional("py3langid", "identifying languages", "languages")
    except MissingDependencyError as error:
        console.info(f"languages are not identified: {error}")
        return []

    def identify_language(text: str) -> str:
        if text_units.text_width("".join(text_units.words(text))) < MIN_LANGUAGE_WIDTH:
            return "none (too short)"
        language = str(langid.classify(text)[0])
        return (
            language if text_units.script_of(text) in LANGUAGE_SCRIPTS.get(language, ("Latin",)) else UNKNOWN_LANGUAGE
        )

    note = f"identified by py3langid from the first {SAMPLE_CHARS:,} characters"
    return _category_findings(index, "documents in language", note, identify_language)


def _category_findings(index: CorpusIndex, name: str, note: str, classify: Callable[[str], str]) -> list[Finding]:
    """The share of documents in each of the most frequent categories."""
    samples = (index.read_bytes(document, 0, 4 * SAMPLE_CHARS) for document in range(len(index)))
    counts = Counter(classify(sample.decode("utf-8", "ignore")[:SAMPLE_CHARS]) for sample in samples)
    return [
        Finding("corpus", f"{name} {category}", 100 * count / len(index), unit="%", n=len(index), note=note)
        for category, count in counts.most_common(MAX_EXAMPLES)
    ]


# ---------------------------------------------------------------- PII


def pii_findings(index: CorpusIndex, console: Console) -> list[Finding]:
    """Matches of PII by kind, with masked examples."""
    counts: Counter[str] = Counter()
    document_counts: Counter[str] = Counter()
    examples: dict[str, list[dict[str, str]]] = defaultdict(list)
    for document, chunks in _read_documents(index, "searching for PII", console):
        in_document: Counter[str] = Counter()
        for text in chunks:
            for kind, start, end in find_pii(text):
                in_document[kind] += 1
                if len(examples[kind]) < MAX_EXAMPLES:
                    masked = mask_pii(kind, text[start:end])
                    examples[kind].append({"document": index.document_name(document), "masked": masked})
        counts += in_document
        document_counts.update(in_document.keys())
    findings: list[Finding] = []
    for kind in PII_KINDS:
        count, note = counts[kind], f"in {document_counts[kind]:,} documents; recognized by pattern"
        where = tuple(examples[kind])
        findings.append(Finding("corpus", kind, count, None, None, "found", len(index), 0.0, count > 0, note, where))
    return findings


# ---------------------------------------------------------------- duplicates


def exact_duplicates(index: CorpusIndex) -> Finding:
    """The share of documents whose text is that of an earlier one."""
    original = index.first_copies()
    duplicates = np.flatnonzero(original != np.arange(len(index))).tolist()
    share, byte_share = index.percentages(duplicates)
    note = f"{len(duplicates):,} documents, {byte_share:.1f} % of the bytes; preparation removes exact duplicates"
    examples = tuple(
        {"document": index.document_name(i), "duplicate of": index.document_name(int(original[i]))}
        for i in duplicates[:MAX_EXAMPLES]
    )
    n = len(index)
    return Finding("corpus", "exact duplicates", share, unit="%", n=n, reference=0.0, note=note, examples=examples)


def near_duplicates(index: CorpusIndex, console: Console) -> Finding:
    """The share of documents that nearly equal an earlier one, without exact duplicates."""
    is_exact_duplicate = index.first_copies() != np.arange(len(index))
    with tempfile.TemporaryFile() as file:
        with map_disk_errors(Path(tempfile.gettempdir())):
            for document, chunks in _read_documents(index, "comparing documents", console):
                file.write(minhash_bands(() if is_exact_duplicate[document] else chunks).tobytes())
            file.flush()
        pairs = _pairs_in_a_band(np.memmap(file, np.uint64, "r").reshape(-1, NUM_BANDS))
    originals: dict[int, tuple[int, float]] = {}
    for earlier, later in sorted(pairs):
        similarity = 0.0 if later in originals else jaccard_similarity(index, earlier, later)
        if similarity >= SIMILARITY_THRESHOLD:
            originals[later] = earlier, similarity
    share, byte_share = index.percentages(originals)
    note = (
        f"{len(originals):,} documents, {byte_share:.1f} % of the bytes, with a Jaccard similarity of "
        f"{SIMILARITY_THRESHOLD} or more to an earlier document, over shingles of {SHINGLE_SIZE} words"
    )
    examples = tuple(
        {
            "document": index.document_name(document),
            "near duplicate of": index.document_name(original),
            "similarity": f"{similarity:.0%}",
        }
        for document, (original, similarity) in sorted(originals.items())[:MAX_EXAMPLES]
    )
    n, flagged = len(index), bool(originals)
    return Finding("corpus", "near duplicates", share, None, None, "%", n, 0.0, flagged, note, examples)


def minhash_bands(chunks: Iterable[str]) -> np.ndarray:
    """A hash [B] of each band of a document's MinHash signature, `EMPTY_HASH` without shingles."""
    multipliers = _hash_multipliers()
    signature = np.full(len(multipliers), EMPTY_HASH)
    carried_words = np.zeros(0, np.uint64)  # the last words of a chunk, whose shingles end in the next
    for text in chunks:
        words = np.concatenate([carried_words, hash_words(normalized_words(text))])
        carried_words = words[-(SHINGLE_SIZE - 1) :]
        shingles = hash_shingles(words)
        for start in range(0, len(shingles), BATCH_SIZE):
            hashes = (multipliers * shingles[start : start + BATCH_SIZE]) >> np.uint64(32)  # [S, n]
            signature = np.minimum(signature, hashes.min(1))
    bands = np.full(NUM_BANDS, EMPTY_HASH)
    if signature[0] != EMPTY_HASH:
        for row in signature.reshape(NUM_BANDS, ROWS_PER_BAND).T:
            bands = (bands * HASH_FACTOR) ^ row
    return bands


@cache
def _hash_multipliers() -> np.ndarray:
    """Random odd numbers [S, 1]: a hash is the upper half of a product (multiply-shift, Dietzfelbinger et al. 1997)."""
    draws = np.random.default_rng(0).integers(2**63, size=(NUM_BANDS * ROWS_PER_BAND, 1), dtype=np.uint64)
    return draws * np.uint64(2) + np.uint64(1)


def _pairs_in_a_band(bands: np.ndarray) -> set[tuple[int, int]]:
    """Pairs of documents that share one of their bands [D, B]: each with the first that has the band and the one before it."""
    pairs: set[tuple[int, int]] = set()
    for band in range(NUM_BANDS):
        column = np.array(bands[:, band])
        order = np.argsort(column, kind="stable")
        column = column[order]
        group_starts = np.flatnonzero(np.append(True, column[1:] != column[:-1]))
        for start, end in pairwise([*group_starts.tolist(), len(column)]):
            if end - start > 1 and column[start] != EMPTY_HASH:
                group = order[start:end].tolist()
                pairs.update((group[0], other) for other in group[1:])
                pairs.update(pairwise(group))
    return pairs


def normalized_words(text: str) -> list[str]:
    """The words of a text without case, punctuation and combining marks; the letters of scripts without spaces."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _PUNCTUATION.sub("", _SEPARATORS.sub(" ", text))
    return text.split() if text.isascii() else text_units.words(text)


def hash_words(words: Sequence[str]) -> np.ndarray:
    """A hash per word."""
    return np.fromiter((crc32(word.encode()) for word in words), np.uint64, len(words))


def hash_shingles(word_hashes: np.ndarray, size: int = SHINGLE_SIZE) -> np.ndarray:
    """A hash per run of `size` words."""
    length = max(0, len(word_hashes) - size + 1)
    hashes = np.zeros(length, np.uint64)
    for i in range(size):
        hashes = (hashes ^ word_hashes[i : i + length]) * HASH_FACTOR
        hashes ^= hashes >> np.uint64(29)
    return hashes


def jaccard_similarity(index: CorpusIndex, first: int, second: int) -> float:
    """The number of shingles that two documents share, over the number that either has."""
    a, b = (
        np.unique(
            hash_shingles(
                np.concatenate([hash_words(normalized_words(text)) for _, text in index.iter_chunks(document)])
            )
        )
        for document in (first, second)
    )
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(1, len(a) + len(b) - shared)


# ---------------------------------------------------------------- repeated lines


def _is_wide(line: bytes) -> bool:
    """Whether a line has enough text to count as repeated. No character has more columns than bytes."""
    return len(line) >= MIN_LINE_WIDTH and (line.isascii() or text_units.text_width(line.decode()) >= MIN_LINE_WIDTH)


def repeated_lines(index: CorpusIndex, console: Console) -> Finding:
    """The share of bytes in lines that many documents contain.

    The first of two passes counts hashes of lines in a table of fixed size, where lines may collide. The second counts exactly
    those lines whose hash is frequent.
    """

    def read_lines(stage: str) -> Iterator[tuple[int, Counter[bytes], list[bytes], np.ndarray]]:
        """Each document, how often it has each line, its distinct lines, and their hashes."""
        for document, chunks in _read_documents(index, stage, console):
            lines = (line.strip() for text in chunks for line in text.encode().split(b"\n"))
            counts = Counter(line for line in lines if _is_wide(line))
            slots = np.fromiter(map(crc32, counts), np.int64, len(counts)) % NUM_HASH_SLOTS
            yield document, counts, list(counts), slots

    min_documents = max(5, len(index) // 100)
    slot_counts = np.zeros(NUM_HASH_SLOTS, np.uint32)
    for *_, slots in read_lines("hashing lines"):
        slot_counts[np.unique(slots)] += 1
    tracked: dict[bytes, tuple[int, int, int]] = {}  # documents, total bytes, and the first of the documents
    for document, counts, lines, slots in read_lines("counting lines"):
        for line in (lines[i] for i in np.flatnonzero(slot_counts[slots] >= min_documents)):
            if line in tracked or len(tracked) < MAX_TRACKED_LINES:
                num_documents, size, first = tracked.get(line, (0, 0, document))
                tracked[line] = num_documents + 1, size + counts[line] * (len(line) + 1), first
    repeated = {line: stats for line, stats in tracked.items() if stats[0] >= min_documents}
    byte_share = 100 * sum(size for _, size, _ in repeated.values()) / max(1, index.num_text_bytes)
    note = (
        f"share of bytes in lines at least {MIN_LINE_WIDTH} columns wide that {min_documents:,} documents or more contain"
        f"; {len(repeated):,} distinct lines"
    )
    examples: list[dict[str, str]] = []
    for line, (count, _, first) in sorted(repeated.items(), key=lambda item: (-item[1][0], item[0]))[:MAX_EXAMPLES]:
        excerpt, name = format_excerpt(line.decode("utf-8", "replace"), 80), index.document_name(first)
        examples.append({"line": excerpt, "documents": f"{count:,}", "document": name})
    n, flagged = len(index), byte_share >= 1
    return Finding("corpus", "repeated lines", byte_share, None, None, "%", n, 0.0, flagged, note, tuple(examples))


# ---------------------------------------------------------------- contamination


def contamination(index: CorpusIndex, benchmark: Benchmark, console: Console) -> Finding:
    """The share of a benchmark's items that the training text contains, whole or in part. Paraphrases are not found."""
    rows = load_rows(benchmark, IssueLog())
    sampled = [rows[i] for i in sample_indices(rows, DEFAULT_ITEM_LIMIT)]
    items_by_hash: dict[int, list[int]] = defaultdict(list)
    passages: dict[int, list[str]] = {}
    for i, row in enumerate(sampled):
        for words in item_passages(benchmark, row):
            [key] = hash_shingles(hash_words(words), len(words)).tolist()
            items_by_hash[key].append(i)
            passages[key] = words
    # What many items share is the text of a template.
    passages = {key: words for key, words in passages.items() if len(items_by_hash[key]) <= max(2, len(sampled) // 10)}
    found: dict[int, tuple[list[str], int]] = {}  # by item: a passage, and the first document with it
    for key, document in _find_passages(index, passages, f"looking up {benchmark.name}", console):
        for i in items_by_hash[key]:
            found.setdefault(i, (passages[key], document))
    examples: list[dict[str, str]] = []
    for i, (words, document) in sorted(found.items())[:MAX_EXAMPLES]:
        text, row = item_text(benchmark, sampled[i]), sampled[i]
        masked = {word for _, start, end in find_pii(text) for word in normalized_words(text[start:end])}
        passage = " ".join("…" if word in masked else word for word in words)
        item = f"{row.path} line {row.line}"
        examples.append({"document": index.document_name(document), "item": item, "passage": passage})
    note = (
        f"at least; {len(sampled):,} of {len(rows):,} items were looked up; contaminated if the training text contains one "
        f"whole, a part of {MIN_PART_WORDS} words or more whole, or {MAX_NGRAM} consecutive words of it (half of a shorter "
        f"one, but at least {MIN_NGRAM}), whatever their case, punctuation and spaces"
    )
    score = statistics.proportion([i in found for i in range(len(sampled))])
    name = f"{benchmark.name}: contaminated items"
    return Finding.from_score(
        "corpus", name, score, reference=0.0, notable=bool(found), note=note, examples=tuple(examples)
    )


def item_text(benchmark: Benchmark, row: BenchmarkRow) -> str:
    """The text of an item that a model could memorize: a prompt with the correct answer, or the better sentence of a pair."""
    if benchmark.kind in ("writing", "free text"):
        item = generation_item(benchmark, row)
        return "\n".join((item.prompt, *item.references))
    item = loglikelihood_item(benchmark, row)
    return "".join(item.requests[item.gold_index])


def item_passages(benchmark: Benchmark, row: BenchmarkRow) -> list[list[str]]:
    """The words of the passages of an item that are evidence of contamination, each alone."""
    whole = normalized_words(item_text(benchmark, row))
    text = f" {' '.join(whole)} "
    parts = [words for words in map(normalized_words, _iter_strings(row.values)) if f" {' '.join(words)} " in text]
    # A character of a script without spaces says about half as much as a word.
    unit = 1 if all(map(text_units.uses_spaces, whole)) else 2
    length = unit * min(MAX_NGRAM, max(MIN_NGRAM, max(map(len, parts), default=0) // 2 // unit))
    complete = [part for part in parts if unit * MIN_PART_WORDS <= len(part) < length]
    if unit * MIN_ITEM_WORDS <= len(whole) < length:
        complete.append(whole)
    return complete + [whole[i : i + length] for i in range(len(whole) - length + 1)]


def _iter_strings(value: Any) -> Iterator[str]:
    """The strings in the fields of a row."""
    if isinstance(value, str):
        yield value
    elif is_json_object(value) or is_json_array(value):
        for each in value.values() if is_json_object(value) else value:
            yield from _iter_strings(each)


def _find_passages(
    index: CorpusIndex, passages: Mapping[int, Sequence[str]], stage: str, console: Console
) -> Iterator[tuple[int, int]]:
    """The hashes of passages in the training text, each with a document that contains it."""
    lengths = sorted(set(map(len, passages.values())))
    slots = np.zeros(NUM_HASH_SLOTS, bool)
    slots[np.fromiter(passages, np.uint64, len(passages)) % NUM_HASH_SLOTS] = True
    for document, chunks in _read_documents(index, stage, console, trained=True):
        words = np.zeros(0, np.uint64)
        for text in chunks:
            words = np.concatenate([words[max(0, len(words) - lengths[-1] + 1) :], hash_words(normalized_words(text))])
            for length in lengths:
                hashes = hash_shingles(words, length)
                for key in set(hashes[slots[hashes % NUM_HASH_SLOTS]].tolist()) & passages.keys():
                    yield key, document
