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

from nextword.common.errors import CorruptFile, NextwordError, UsageError
from nextword.common.fs import MANIFEST, check_seal, move_into_place, read_manifest, seal, settle, writing
from nextword.data.builtin_datasets import NAMED, named_sources
from nextword.data.documents import Problems, Source, find_files
from nextword.data.provenance import Origin, OriginWriter, Span, names_in
from nextword.data.scan import Progress, Survey, split_texts, survey, unchanged
from nextword.data.shards import Part, ShardWriter, Split, Tokens
from nextword.data.tokenizer import Tokenizer, train_bpe, train_char, vocab_size_for

VERSION = 1  # of what these files hold; another one is prepared anew
PLAN = "plan.json"  # in a folder of parts that several processes make
BATCH = 2**21  # characters encoded at once; each takes some fifty bytes while it is


class Corpus:
    """A prepared corpus: its tokenizer, its two rows of tokens, and what is known of it.

    `fingerprint` is the identity of the tokens and the tokenizer, whatever the files they came from were called.
    """

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path, self.facts = path, facts
        self.tokenizer = Tokenizer.open(path)
        self.documents: int = facts["documents"]
        self.duplicates: int = facts["duplicates"]
        self.problems: dict[str, Any] = facts["problems"]
        self.train, self.validation = Part(**facts["train"]), Part(**facts["validation"])
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
        facts = check_seal(path)
        if facts.get("version") != VERSION:
            raise NextwordError(f"{path}: prepared by another version of nextword; prepare it anew")
        try:
            return cls(path, facts)
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptFile(f"{path / MANIFEST}: not the manifest of a prepared corpus ({error!r})") from error

    def tokens(self, split: Split) -> Tokens:
        """The row of tokens of "train" or "validation", each document followed by the end-of-text token."""
        return Tokens(sorted(self.path.glob(f"{split}-*.npy")))

    def names_in(self, spans: Iterable[Span]) -> list[str]:
        """The documents that some tokens of the training part came from, by file and line (see `origins`)."""
        sources = [source["name"] for source in self.facts["sources"]]
        return names_in(self.path, sources, self.tokens("train"), self.tokenizer, spans)


def prepare(
    corpora: Iterable[str | Path],
    out: Path,
    *,
    tokenizer: str | Path = "bpe",
    vocab_size: int | None = None,
    text_column: str | None = None,
    strict: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Corpus:
    """Turn files, folders and named corpora into shards at `out`; where they are there already, use them.

    `tokenizer` is "bpe", "char" or the path of an existing one; `vocab_size` is for "bpe", and suits the corpus if it
    is not given. `text_column` is the column of tables that holds the text. Whatever is wrong in the input is told
    through `say` and written to `problems.jsonl`, and the rest goes on; with `strict` the first problem is a
    `NextwordError`, as it always is that no text is left, or that a file changes while it is read. Raises
    `UsageError` for a path or an option that cannot be.
    """
    out, say, progress = Path(out), say or (lambda line: None), progress or (lambda stage, done, total: None)
    settings, ready = settings_of(tokenizer, vocab_size, text_column)
    problems = Problems(strict)
    with holding(out):  # a second process waits for this one, and then finds the shards done
        sources = find_sources(corpora, problems, text_column, leave_out=out)
        corpus = reusable(out, settings, sources, strict, say)
        if corpus is None:
            put_together(out, lambda aside: _prepare(sources, aside, settings, ready, problems, progress, say))
    return corpus or Corpus.open(out)


def settings_of(
    tokenizer: str | Path, vocab_size: int | None, text_column: str | None
) -> tuple[dict[str, Any], Tokenizer | None]:
    """What makes the shards what they are, besides the text; and the tokenizer, where it is there already."""
    if vocab_size is not None and tokenizer != "bpe":
        raise UsageError("--vocab-size is for a new BPE: leave it out, or leave out --tokenizer")
    ready = None if tokenizer in ("bpe", "char") else Tokenizer.open(Path(tokenizer))
    name = str(tokenizer) if ready is None else hashlib.sha256(ready.backend.to_str().encode()).hexdigest()
    return {"tokenizer": name, "vocab_size": vocab_size, "text_column": text_column}, ready


@contextlib.contextmanager
def holding(out: Path) -> Iterator[None]:
    """Inside, no other process changes what is at `out`; what a crash left there is settled."""
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(out.with_name(f".{out.name}.lock")).acquire()
    with held:
        settle(out)
        yield


def put_together(out: Path, fill: Callable[[Path], None]) -> None:
    """Let a folder aside be filled and sealed, and put it at `out`."""
    aside = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        with writing(aside):
            aside.mkdir()
        fill(aside)
        move_into_place(aside, out)
        clear_parts(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def clear_parts(out: Path) -> None:
    """Throw away what several processes made to put together at `out`; those that still work on it see that it is gone."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.parts-*"):
        (folder / PLAN).unlink(missing_ok=True)  # first: without it nothing in there counts
        shutil.rmtree(folder, ignore_errors=True)


def find_sources(
    corpora: Iterable[str | Path], problems: Problems, text_column: str | None = None, leave_out: Path | None = None
) -> list[Source]:
    """The files of paths and of named corpora, in the order given."""
    sources: list[Source] = []
    for corpus in corpora:
        if str(corpus) in NAMED:
            sources += named_sources(str(corpus), problems)
        else:
            sources += find_files([Path(corpus)], problems, text_column, leave_out)
    return sources


def reusable(
    out: Path, settings: dict[str, Any], sources: list[Source], strict: bool, say: Callable[[str], None]
) -> Corpus | None:
    """The corpus at `out` where it was made from the same text in the same way. Raises `UsageError` where `out` holds
    something else, which is not ours to replace."""
    if not out.exists():
        return None
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise UsageError(f"{out}: exists and is not a prepared corpus; name another place with --out")
    if not any(out.iterdir()):
        return None
    facts = read_manifest(out)
    if facts.get("kind") != "corpus":
        raise UsageError(f"{out}: holds something else that nextword made; name another place with --out")
    if facts.get("version") != VERSION or facts.get("settings") != settings:
        say(f"{out}: prepared with other settings, so it is made anew")
        return None
    known = facts["sources"]
    if len(known) != len(sources) or not all(map(unchanged, sources, known)):
        say(f"{out}: the text has changed, so it is prepared anew")
        return None
    if strict and facts["problems"]["total"]:
        return None  # it stops at the first problem, as strict asks
    try:
        corpus = Corpus.open(out)
    except CorruptFile as error:
        say(f"{error}\nThe shards are damaged, so they are made anew")
        return None
    say(f"{out}: the text and the settings are the same as before, so the shards are used as they are")
    return corpus


def _prepare(
    sources: list[Source],
    directory: Path,
    settings: dict[str, Any],
    tokenizer: Tokenizer | None,
    problems: Problems,
    progress: Progress,
    say: Callable[[str], None],
) -> None:
    """Fill and seal an empty directory."""
    found = survey(sources, directory, problems, progress, say)
    if tokenizer is None:
        items = split_texts(sources, found, "tokenizer", progress)
        texts = (text for split, text in items if split == "train" and isinstance(text, str))
        if settings["tokenizer"] == "char":
            tokenizer = train_char(texts)
        else:
            tokenizer = train_bpe(texts, settings["vocab_size"] or vocab_size_for(found.size))
    tokenizer.save(directory)
    parts = encode(split_texts(sources, found, "encoding", progress), tokenizer, directory)
    finish(directory, settings, found, parts, tokenizer.vocab_size, problems, say)


def finish(
    directory: Path, settings: dict[str, Any], found: Survey, parts: dict[Split, Part], vocab_size: int,
    problems: Problems, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Seal a folder that holds the tokenizer and the rows of both splits. Raises `NextwordError` where one is empty."""
    if not parts["train"].tokens or not parts["validation"].tokens:
        raise NextwordError("there is too little text to hold some of it out for validation; add more")
    if unknown := parts["train"].unknown + parts["validation"].unknown:
        say(f"{unknown:,} characters are not known to the tokenizer; each became its token for the unknown")
    if problems.found:
        lines = [json.dumps(asdict(problem), ensure_ascii=False) for problem in problems.found]
        with writing(directory):
            (directory / "problems.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    facts = {
        "kind": "corpus",
        "version": VERSION,
        "settings": settings,
        "documents": found.unique,
        "duplicates": found.duplicates,
        **{split: asdict(part) for split, part in parts.items()},
        "vocab_size": vocab_size,
        "problems": {"total": problems.total, "kinds": dict(problems.kinds)},
        "sources": found.sources,
    }
    seal(directory, facts)


def encode(items: Iterable[tuple[Split, str | Origin]], tokenizer: Tokenizer, directory: Path) -> dict[Split, Part]:
    """Write the shards of both splits, and where the training part's documents came from; what each split holds."""
    shards: dict[Split, ShardWriter] = {
        split: ShardWriter(directory, split, tokenizer) for split in ("train", "validation")
    }
    origins = OriginWriter(directory)
    batch: list[tuple[Split, str | Origin]] = []
    size = 0
    for split, text in items:
        batch.append((split, text))
        size += (len(text) if isinstance(text, str) else 0) + 64  # many short texts cost memory too
        if size >= BATCH:
            _encode_batch(batch, tokenizer, shards, origins)
            batch, size = [], 0
    _encode_batch(batch, tokenizer, shards, origins)
    return {split: row.close() for split, row in shards.items()}


def _encode_batch(
    batch: list[tuple[Split, str | Origin]],
    tokenizer: Tokenizer,
    shards: "dict[Split, ShardWriter]",
    origins: OriginWriter,
) -> None:
    encoded = iter(tokenizer.encode_batch([text for _, text in batch if isinstance(text, str)]))
    for split, text in batch:
        if isinstance(text, str):
            shards[split].add(text, next(encoded))
            continue
        shards[split].end_document()
        if split == "train":
            origins.add(shards[split].added, text)
    for writer in (*shards.values(), origins):
        writer.write()
