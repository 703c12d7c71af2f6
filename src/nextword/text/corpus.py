"""Documents to shards: deduplicated, split, tokenised once, and read back as one long row of tokens.

The corpus is read three times as a stream: to see what is there, to train the tokenizer, to encode. What has to be
remembered between is one byte a document, so that a corpus may be larger than memory.
"""

import contextlib
import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from filelock import FileLock

from nextword.errors import CorruptFile, DiskFull, NextwordError, UsageError
from nextword.files import MANIFEST, check_seal, move_into_place, read_manifest, seal, settle, sha256, writing
from nextword.text.documents import Document, Problems, Source, find_files, without_surrogates
from nextword.text.named import NAMED, named_sources
from nextword.text.origins import Origin, OriginWriter, Span, names_in
from nextword.text.shards import Part, ShardWriter, Split, Tokens
from nextword.text.tokenizer import Tokenizer, train_bpe, train_char, vocab_size_for

Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all

VERSION = 1  # of what these files hold; another one is prepared anew
BATCH = 2**21  # characters encoded at once; each takes some fifty bytes while it is
FEW = 20  # documents; with fewer the validation part is the last tenth of each

# By its hash, a document is in the last 10 %, 5 % and 1 %, or in none of them; the parts are nested, so that a
# growing corpus only ever moves documents from validation to training.
DUPLICATE, TRAIN, TENTH, TWENTIETH, HUNDREDTH = range(5)


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
    if vocab_size is not None and tokenizer != "bpe":
        raise UsageError("--vocab-size is for a new BPE: leave it out, or leave out --tokenizer")
    ready = None if tokenizer in ("bpe", "char") else Tokenizer.open(Path(tokenizer))
    settings = {
        "tokenizer": str(tokenizer) if ready is None else hashlib.sha256(ready.backend.to_str().encode()).hexdigest(),
        "vocab_size": vocab_size,
        "text_column": text_column,
    }
    problems = Problems(strict)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(out.with_name(f".{out.name}.lock")).acquire()
    with held:  # a second process waits for this one, and then finds the shards done
        settle(out)
        sources = find_sources(corpora, problems, text_column, leave_out=out)
        corpus = _reusable(out, settings, sources, strict, say)
        if corpus is not None:
            say(f"{out}: the text and the settings are the same as before, so the shards are used as they are")
            return corpus
        aside = out.with_name(f".{out.name}.partial")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            with writing(aside):
                aside.mkdir()
            _prepare(sources, aside, settings, ready, problems, progress, say)
            move_into_place(aside, out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return Corpus.open(out)


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


def _reusable(
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
        return Corpus.open(out)
    except CorruptFile as error:
        say(f"{error}\nThe shards are damaged, so they are made anew")
        return None


def _stat(path: Path) -> tuple[int, int] | None:
    """Size and time of the last change; None where the file cannot be had."""
    try:
        status = path.stat()
    except OSError:  # the reader of the file reports it
        return None
    return status.st_size, status.st_mtime_ns


def unchanged(source: Source, known: dict[str, Any]) -> bool:
    """Whether a file is the one that a survey wrote these facts of."""
    now = _stat(source.path)
    if now is None or source.name != known["name"] or now[0] != known["bytes"]:
        return False
    return now[1] == known["mtime_ns"] or (known["sha256"] is not None and sha256(source.path) == known["sha256"])


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
        items = _split(sources, found, "tokenizer", progress)
        texts = (text for split, text in items if split == "train" and isinstance(text, str))
        if settings["tokenizer"] == "char":
            tokenizer = train_char(texts)
        else:
            tokenizer = train_bpe(texts, settings["vocab_size"] or vocab_size_for(found.size))
    tokenizer.save(directory)
    parts = _encode(_split(sources, found, "encoding", progress), tokenizer, directory)
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
        "vocab_size": tokenizer.vocab_size,
        "problems": {"total": problems.total, "kinds": dict(problems.kinds)},
        "sources": found.sources,
    }
    seal(directory, facts)


@dataclass
class Survey:
    """What the first reading found: `levels` has a byte for every document, `lengths` a number for the first few."""

    sources: list[dict[str, Any]] = field(default_factory=list)
    levels: bytearray = field(default_factory=bytearray)
    lengths: list[int] = field(default_factory=list)
    unique: int = 0
    duplicates: int = 0
    size: int = 0  # bytes of text, duplicates left out
    smallest: tuple[int, int] = (2**64, 0)  # the hash of the document that has the smallest, and its place

    def add(self, key: bytes, is_new: bool, characters: int, size: int) -> None:
        if not is_new:
            self.levels.append(DUPLICATE)
            self.duplicates += 1
            return
        self.smallest = min(self.smallest, (_number(key), len(self.levels)))
        self.levels.append(_level(key))
        self.unique += 1
        self.size += size
        if len(self.lengths) < FEW:
            self.lengths.append(characters)

    def split_of(self, place: int) -> Split | Literal["both", "neither"]:
        """Where a document goes, by its place in the corpus."""
        level = self.levels[place]
        if level == DUPLICATE:
            return "neither"
        if self.unique < FEW:
            return "both"
        # The smallest hash is in validation already, unless nothing is.
        return "validation" if level >= self.held_out or place == self.smallest[1] else "train"

    def split_by(self, key: bytes) -> Split | Literal["both"]:
        """Where the text of a hash goes, whichever of its copies it is."""
        if self.unique < FEW:
            return "both"
        return "validation" if _level(key) >= self.held_out or _number(key) == self.smallest[0] else "train"

    @property
    def held_out(self) -> int:
        """From which level on a document is held out."""
        return TENTH if self.size < 10_000_000 else TWENTIETH if self.size < 100_000_000 else HUNDREDTH


def _number(key: bytes) -> int:
    """The hash of a document as a number, by which it is drawn."""
    return int.from_bytes(key[:8], "big")


def _level(key: bytes) -> int:
    return TRAIN + sum(_number(key) < 2**64 * share // 100 for share in (10, 5, 1))


class Watcher(Protocol):
    """Sees the documents go by at the first reading."""

    def begin(self, source: int, document: Document) -> None: ...

    def add(self, piece: str) -> None: ...

    def end(self, key: bytes) -> None: ...


class _Bar:
    """Tells how far one reading of the sources has come, in bytes of their files."""

    def __init__(self, stage: str, sources: list[Source], progress: Progress):
        self._stage, self._progress = stage, progress
        self._sizes = [(_stat(source.path) or (0, 0))[0] for source in sources]
        self._total = sum(self._sizes)
        self._file = self._before = self._inside = self._told = 0

    def advance(self, count: int) -> None:
        """So many bytes of text went by. A compressed file holds more than its size, and is not counted past that."""
        self._inside = min(self._inside + count, self._sizes[self._file])
        if self._before + self._inside >= self._told + 2**20:
            self._tell()

    def end_file(self) -> None:
        self._before, self._inside, self._file = self._before + self._sizes[self._file], 0, self._file + 1
        if self._file == len(self._sizes):
            self._tell()

    def _tell(self) -> None:
        self._told = self._before + self._inside
        self._progress(self._stage, self._told, self._total)


class _Text:
    """A document's pieces, hashed and measured as they go by."""

    def __init__(self, document: Document, bar: _Bar):
        self._document, self._bar = document, bar
        self._hash = hashlib.blake2b(digest_size=16)
        self.characters = self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        for piece in self._document.pieces:
            data = piece.encode()
            self._hash.update(data)
            self.characters += len(piece)
            self.bytes += len(data)
            self._bar.advance(len(data))
            yield piece

    def finish(self) -> bytes:
        """Read what is left; the hash of the whole text."""
        for _ in self:
            pass
        return self._hash.digest()


@contextlib.contextmanager
def _seen(path: Path) -> Iterator[Callable[[bytes], bool]]:
    """Tells of each key whether it is new. The keys lie on disk, so that memory stays flat however many there are."""
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as table:
            table.execute("PRAGMA journal_mode=OFF")  # a crash throws the table away
            table.execute("PRAGMA synchronous=OFF")
            table.execute("CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID")
            table.execute("BEGIN")
            yield lambda key: table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount == 1
        path.unlink()
    except sqlite3.Error as error:
        free = shutil.disk_usage(path.parent).free
        kind = DiskFull if "full" in str(error) else NextwordError
        raise kind(f"{path}: {error} ({free:,} bytes free). Make room, and run the same command again") from error


def survey(
    sources: list[Source], directory: Path, problems: Problems, progress: Progress, say: Callable[[str], None],
    watcher: Watcher | None = None,
) -> Survey:  # fmt: skip
    """The first reading: what is there, what of it is new, and which split each document belongs to.

    Raises:
        NextwordError: there is no text at all; with what was there.
    """
    found, bar = Survey(), _Bar("reading", sources, progress)
    with _seen(directory / "seen.sqlite") as is_new:
        for number, source in enumerate(sources):
            size, time = _stat(source.path) or (None, None)
            texts = hashlib.blake2b(digest_size=16)
            for document in source.read(problems):
                text = _Text(document, bar)
                if watcher is not None:
                    watcher.begin(number, document)
                    for piece in text:
                        watcher.add(piece)
                key = text.finish()
                if watcher is not None:
                    watcher.end(key)
                texts.update(key)
                found.add(key, is_new(key), text.characters, text.bytes)
            bar.end_file()
            try:
                content = sha256(source.path)
            except OSError:  # its reader has reported it
                content = None
            facts = {"name": without_surrogates(source.name), "bytes": size, "mtime_ns": time, "sha256": content}
            found.sources.append({**facts, "texts": texts.hexdigest()})
    for line in problems.lines():
        say(line)
    if not found.unique:
        raise NextwordError(
            "no text was found. "
            + "\n".join(["What was there:", *problems.lines()] if problems.found else [])
            + "\nName files or folders of .txt, .md, .jsonl, .csv, .tsv or .parquet, plain, .gz or .zst"
        )
    return found


def _split(
    sources: list[Source], survey: Survey, stage: str, progress: Progress
) -> Iterator[tuple[Split, str | Origin]]:
    """A later reading: each new document's pieces with the split they belong to, and its origin where it ends.

    Raises `NextwordError` where a file no longer holds the texts that the survey found.
    """
    bar, place, lengths = _Bar(stage, sources, progress), 0, iter(survey.lengths)
    for number, (source, known) in enumerate(zip(sources, survey.sources, strict=True)):
        texts = hashlib.blake2b(digest_size=16)
        for document in source.read(Problems()):  # what is wrong was told the first time
            text = _Text(document, bar)
            where = survey.split_of(place) if place < len(survey.levels) else "neither"
            origin = Origin(number, document.line)
            if where == "both":
                yield from _last_tenth_held_out(text, next(lengths), origin)
            elif where != "neither":
                for piece in text:
                    yield where, piece
                yield where, origin
            texts.update(text.finish())
            place += 1
        bar.end_file()
        if texts.hexdigest() != known["texts"]:
            raise NextwordError(f"{source.path}: changed while it was read; run the same command again when it rests")


def _last_tenth_held_out(text: Iterable[str], length: int, origin: Origin) -> Iterator[tuple[Split, str | Origin]]:
    """The pieces of a document of so many characters, cut at nine tenths of them."""
    left = length * 9 // 10
    for piece in text:
        if left > 0:
            yield "train", piece[:left]
            if left <= len(piece):
                yield "train", origin
        if left < len(piece):
            yield "validation", piece[max(left, 0) :]
        left -= len(piece)
    yield "validation", origin


def _encode(items: Iterable[tuple[Split, str | Origin]], tokenizer: Tokenizer, directory: Path) -> dict[Split, Part]:
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
