"""Documents to shards: deduplicated, split, tokenised once, and read back as one long row of tokens.

The corpus is read three times as a stream: to see what is there, to train the tokenizer, to encode. What has to be
remembered between is one byte a document, so that a corpus may be larger than memory.
"""

import contextlib
import glob
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.common.fs import (
    MANIFEST,
    atomic_replace_dir,
    map_disk_errors,
    read_manifest,
    recover_interrupted_swap,
    verify_manifest,
    write_manifest,
)
from nextword.data.builtin_datasets import BUILTIN_DATASETS, builtin_sources
from nextword.data.documents import IssueLog, SourceFile, find_files
from nextword.data.provenance import DocumentSource, ProvenanceWriter, TokenSpan, document_names
from nextword.data.scan import CorpusScan, ProgressCallback, is_unchanged, iter_split_texts, scan_corpus
from nextword.data.shards import ShardedTokens, ShardWriter, Split, SplitStats
from nextword.data.tokenizer import Tokenizer, train_bpe, train_char, vocab_size_for

FORMAT_VERSION = 1  # of what these files hold; another one is prepared anew
PLAN_FILE = "plan.json"  # in a folder of parts that several processes make
ENCODE_BATCH_CHARS = 2**21  # characters encoded at once; each takes some fifty bytes while it is


class Corpus:
    """A prepared corpus: its tokenizer, its two rows of tokens, and what is known of it.

    `fingerprint` is the identity of the tokens and the tokenizer, whatever the files they came from were called.
    """

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path, self.manifest = path, facts
        self.tokenizer = Tokenizer.open(path)
        self.documents: int = facts["documents"]
        self.duplicates: int = facts["duplicates"]
        self.problems: dict[str, Any] = facts["problems"]
        self.train, self.validation = SplitStats(**facts["train"]), SplitStats(**facts["validation"])
        files = sorted((name, file["sha256"]) for name, file in facts["files"].items())
        content = [entry for entry in files if entry[0] == "tokenizer.json" or entry[0].endswith(".npy")]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @classmethod
    def open(cls, path: Path) -> "Corpus":
        """Open what `prepare` wrote, every file checked against its hash.

        Raises `CorruptFile` naming each file that differs, `NextwordError` where this is no prepared corpus.
        """
        path = Path(path)
        if read_manifest(path).get("kind") != "corpus":
            raise NextwordError(f"{path}: not a prepared corpus; make one with: nextword prepare CORPUS --out {path}")
        manifest = verify_manifest(path)
        if manifest.get("version") != FORMAT_VERSION:
            raise NextwordError(f"{path}: prepared by another version of nextword; prepare it anew")
        try:
            return cls(path, manifest)
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(f"{path / MANIFEST}: not the manifest of a prepared corpus ({error!r})") from error

    def tokens(self, split: Split) -> ShardedTokens:
        """The row of tokens of "train" or "validation", each document followed by the end-of-text token."""
        return ShardedTokens(sorted(self.path.glob(f"{split}-*.npy")))

    def document_names(self, spans: Iterable[TokenSpan]) -> list[str]:
        """The documents that some tokens of the training part came from, by file and line (see `origins`)."""
        sources = [source["name"] for source in self.manifest["sources"]]
        return document_names(self.path, sources, self.tokens("train"), self.tokenizer, spans)


def prepare(
    corpora: Iterable[str | Path],
    out: Path,
    *,
    tokenizer: str | Path = "bpe",
    vocab_size: int | None = None,
    text_column: str | None = None,
    strict: bool = False,
    progress: ProgressCallback | None = None,
    log: Callable[[str], None] | None = None,
) -> Corpus:
    """Turn files, folders and named corpora into shards at `out`; where they are there already, use them.

    `tokenizer` is "bpe", "char" or the path of an existing one; `vocab_size` is for "bpe", and suits the corpus if it
    is not given. `text_column` is the column of tables that holds the text. Whatever is wrong in the input is told
    through `say` and written to `problems.jsonl`, and the rest goes on; with `strict` the first problem is a
    `NextwordError`, as it always is that no text is left, or that a file changes while it is read. Raises
    `UsageError` for a path or an option that cannot be.
    """
    out, log, progress = Path(out), log or (lambda line: None), progress or (lambda stage, done, total: None)
    settings, existing_tokenizer = fingerprint_settings(tokenizer, vocab_size, text_column)
    problems = IssueLog(strict)
    with prepare_lock(out):  # a second process waits for this one, and then finds the shards done
        sources = find_sources(corpora, problems, text_column, exclude=out)
        corpus = reuse_if_unchanged(out, settings, sources, strict, log)
        if corpus is None:
            build_atomically(
                out, lambda aside: _prepare(sources, aside, settings, existing_tokenizer, problems, progress, log)
            )
    return corpus or Corpus.open(out)


def fingerprint_settings(
    tokenizer: str | Path, vocab_size: int | None, text_column: str | None
) -> tuple[dict[str, Any], Tokenizer | None]:
    """What makes the shards what they are, besides the text; and the tokenizer, where it is there already."""
    if vocab_size is not None and tokenizer != "bpe":
        raise UsageError("--vocab-size is for a new BPE: leave it out, or leave out --tokenizer")
    existing_tokenizer = None if tokenizer in ("bpe", "char") else Tokenizer.open(Path(tokenizer))
    name = (
        str(tokenizer)
        if existing_tokenizer is None
        else hashlib.sha256(existing_tokenizer.backend.to_str().encode()).hexdigest()
    )
    return {"tokenizer": name, "vocab_size": vocab_size, "text_column": text_column}, existing_tokenizer


@contextlib.contextmanager
def prepare_lock(out: Path) -> Iterator[None]:
    """Inside, no other process changes what is at `out`; what a crash left there is settled."""
    with map_disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out.with_name(f".{out.name}.lock")).acquire()
    with lock:
        recover_interrupted_swap(out)
        yield


def build_atomically(out: Path, build: Callable[[Path], None]) -> None:
    """Let a folder aside be filled and sealed, and put it at `out`."""
    temp_dir = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(temp_dir, ignore_errors=True)
        with map_disk_errors(temp_dir):
            temp_dir.mkdir()
        build(temp_dir)
        atomic_replace_dir(temp_dir, out)
        remove_partials(out)
    finally:
        shutil.rmtree(temp_dir, ignore_errors=True)


def remove_partials(out: Path) -> None:
    """Throw away what several processes made to put together at `out`; those that still work on it see that it is gone."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.parts-*"):
        (folder / PLAN_FILE).unlink(missing_ok=True)  # first: without it nothing in there counts
        shutil.rmtree(folder, ignore_errors=True)


def find_sources(
    corpora: Iterable[str | Path], problems: IssueLog, text_column: str | None = None, exclude: Path | None = None
) -> list[SourceFile]:
    """The files of paths and of named corpora, in the order given."""
    sources: list[SourceFile] = []
    for corpus in corpora:
        if str(corpus) in BUILTIN_DATASETS:
            sources += builtin_sources(str(corpus), problems)
        else:
            sources += find_files([Path(corpus)], problems, text_column, exclude)
    return sources


def reuse_if_unchanged(
    out: Path, settings: dict[str, Any], sources: list[SourceFile], strict: bool, log: Callable[[str], None]
) -> Corpus | None:
    """The corpus at `out` where it was made from the same text in the same way. Raises `UsageError` where `out` holds
    something else, which is not ours to replace."""
    if not out.exists():
        return None
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise UsageError(f"{out}: exists and is not a prepared corpus; name another place with --out")
    if not any(out.iterdir()):
        return None
    manifest = read_manifest(out)
    if manifest.get("kind") != "corpus":
        raise UsageError(f"{out}: holds something else that nextword made; name another place with --out")
    if manifest.get("version") != FORMAT_VERSION or manifest.get("settings") != settings:
        log(f"{out}: prepared with other settings, so it is made anew")
        return None
    recorded_sources = manifest["sources"]
    if len(recorded_sources) != len(sources) or not all(map(is_unchanged, sources, recorded_sources)):
        log(f"{out}: the text has changed, so it is prepared anew")
        return None
    if strict and manifest["problems"]["total"]:
        return None  # it stops at the first problem, as strict asks
    try:
        corpus = Corpus.open(out)
    except CorruptFileError as error:
        log(f"{error}\nThe shards are damaged, so they are made anew")
        return None
    log(f"{out}: the text and the settings are the same as before, so the shards are used as they are")
    return corpus


def _prepare(
    sources: list[SourceFile],
    directory: Path,
    settings: dict[str, Any],
    tokenizer: Tokenizer | None,
    problems: IssueLog,
    progress: ProgressCallback,
    log: Callable[[str], None],
) -> None:
    """Fill and seal an empty directory."""
    scan = scan_corpus(sources, directory, problems, progress, log)
    if tokenizer is None:
        items = iter_split_texts(sources, scan, "tokenizer", progress)
        texts = (text for split, text in items if split == "train" and isinstance(text, str))
        if settings["tokenizer"] == "char":
            tokenizer = train_char(texts)
        else:
            tokenizer = train_bpe(texts, settings["vocab_size"] or vocab_size_for(scan.size))
    tokenizer.save(directory)
    stats = write_shards(iter_split_texts(sources, scan, "encoding", progress), tokenizer, directory)
    write_corpus_manifest(directory, settings, scan, stats, tokenizer.vocab_size, problems, log)


def write_corpus_manifest(
    directory: Path, settings: dict[str, Any], scan: CorpusScan, stats: dict[Split, SplitStats], vocab_size: int,
    problems: IssueLog, log: Callable[[str], None],
) -> None:  # fmt: skip
    """Seal a folder that holds the tokenizer and the rows of both splits. Raises `NextwordError` where one is empty."""
    if not stats["train"].tokens or not stats["validation"].tokens:
        raise NextwordError("there is too little text to hold some of it out for validation; add more")
    if unknown_tokens := stats["train"].unknown + stats["validation"].unknown:
        log(f"{unknown:,} characters are not known to the tokenizer; each became its token for the unknown")
    if problems.issues:
        lines = [json.dumps(asdict(problem), ensure_ascii=False) for problem in problems.issues]
        with map_disk_errors(directory):
            (directory / "problems.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    manifest = {
        "kind": "corpus",
        "version": FORMAT_VERSION,
        "settings": settings,
        "documents": scan.unique,
        "duplicates": scan.duplicates,
        **{split: asdict(part) for split, part in stats.items()},
        "vocab_size": vocab_size,
        "problems": {"total": problems.total, "kinds": dict(problems.counts_by_kind)},
        "sources": scan.sources,
    }
    write_manifest(directory, manifest)


def write_shards(
    items: Iterable[tuple[Split, str | DocumentSource]], tokenizer: Tokenizer, directory: Path
) -> dict[Split, SplitStats]:
    """Write the shards of both splits, and where the training part's documents came from; what each split holds."""
    writers: dict[Split, ShardWriter] = {
        split: ShardWriter(directory, split, tokenizer) for split in ("train", "validation")
    }
    provenance = ProvenanceWriter(directory)
    batch: list[tuple[Split, str | DocumentSource]] = []
    size = 0
    for split, text in items:
        batch.append((split, text))
        size += (len(text) if isinstance(text, str) else 0) + 64  # many short texts cost memory too
        if size >= ENCODE_BATCH_CHARS:
            _encode_batch(batch, tokenizer, writers, provenance)
            batch, size = [], 0
    _encode_batch(batch, tokenizer, writers, provenance)
    return {split: row.close() for split, row in writers.items()}


def _encode_batch(
    batch: list[tuple[Split, str | DocumentSource]],
    tokenizer: Tokenizer,
    writers: "dict[Split, ShardWriter]",
    provenance: ProvenanceWriter,
) -> None:
    encoded = iter(tokenizer.encode_batch([text for _, text in batch if isinstance(text, str)]))
    for split, text in batch:
        if isinstance(text, str):
            writers[split].add(text, next(encoded))
            continue
        writers[split].end_document()
        if split == "train":
            provenance.add(writers[split].tokens_added, text)
    for writer in (*writers.values(), provenance):
        writer.flush()
