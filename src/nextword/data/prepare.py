"""One corpus that many processes prepare: the work in parts, any of which any of them can do, and the bytes of one alone.

There are three readings, to see what is there, to draw a sample for the tokenizer and to encode, each in n parts of whole
files; and between them what needs the whole: which documents are new and where each belongs, and the tokenizer. A piece of
work is a sealed folder that is made aside, under a lock, and renamed into place, so that it is there whole or not at all. Who
finds a piece locked does another one, and waits only where others do all that is left. The lock of a process that was killed
is free, and whoever waits does its piece anew. So any number of processes finish the corpus, down to one, in any order.
"""

import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nextword.common.errors import CorruptFile, NextwordError, UsageError
from nextword.common.fs import (
    MANIFEST,
    check_seal,
    move_into_place,
    read_json_lines,
    seal,
    to_json,
    write_durably,
    writing,
)
from nextword.data import corpus as corpus_module
from nextword.data.corpus import (
    PLAN,
    VERSION,
    Corpus,
    clear_parts,
    encode,
    find_sources,
    finish,
    holding,
    put_together,
    reusable,
    settings_of,
)
from nextword.data.documents import Problems, Source, without_surrogates
from nextword.data.provenance import Origin, OriginWriter
from nextword.data.scan import Bar, Progress, Survey, Text, read_source, seen, size_and_time, split_texts
from nextword.data.shards import Part, ShardWriter, Split, Tokens
from nextword.data.tokenizer import (
    DRAWS,
    Tokenizer,
    check_vocab_size,
    drawn,
    number_of,
    train_bpe_on,
    train_char,
    vocab_size_for,
)

MOST = 10_000  # parts; each is a few files
POLL = 0.2  # seconds between two looks at a lock that another process holds
RECORD = struct.Struct("<16sQQII")  # of a document: hash, characters, bytes, pieces, pieces in its first nine tenths


class Gone(Exception):
    """The work was thrown away by another process, which has put the corpus together; or a piece of it was damaged."""


def shard_of(shard: str) -> tuple[int, int]:
    """The 3 and the 64 of "3/64". Raises `UsageError` for what is no part of so many."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
    number, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= parts <= MOST:
        raise UsageError(
            f"--shard {shard}: write which part of how many, as in 3/64 (from 1/64 to 64/64, {MOST:,} at most)"
        )
    return number, parts


def prepare(
    corpora: Iterable[str | Path],
    out: Path,
    shard: str | None,
    *,
    tokenizer: str | Path = "bpe",
    vocab_size: int | None = None,
    text_column: str | None = None,
    strict: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Corpus:
    """Prepare a corpus together with other processes that are given the same, and another `shard`; return when it is there.

    `shard` is "3/64": the work is cut into 64 parts, and this process begins with the third, then does whatever nobody else
    does. All see the same files, and the folder of `out`, whose locks must hold between them. The other arguments, and what
    is raised, are those of `corpus.prepare`, as are the bytes at `out`; without a shard it is that. Raises `UsageError` for a
    shard that cannot be.
    """
    if shard is None:
        return corpus_module.prepare(
            corpora, out, tokenizer=tokenizer, vocab_size=vocab_size, text_column=text_column, strict=strict,
            progress=progress, say=say,
        )  # fmt: skip
    number, parts = shard_of(shard)
    out, say, progress = Path(out), say or (lambda line: None), progress or (lambda stage, done, total: None)
    settings, ready = settings_of(tokenizer, vocab_size, text_column)
    if vocab_size is not None:
        check_vocab_size(vocab_size)
    corpora, worked = list(corpora), False
    while True:
        problems = Problems(strict)
        with holding(out):
            sources = find_sources(corpora, problems, text_column, leave_out=out)
            corpus = reusable(out, settings, sources, strict, (lambda line: None) if worked else say)
            if corpus is not None:
                clear_parts(out)
                return corpus
            work = Work(out, sources, settings, ready, problems, (number, parts), progress, say)
            work.begin()
        worked = True
        try:
            work.do()
            with holding(out):
                work.check()
                put_together(out, work.join)
        except Gone:
            continue
        except (NextwordError, OSError):
            if work.is_on:
                raise


class Work:
    """What is done already, and what one process does of the rest."""

    def __init__(
        self, out: Path, sources: list[Source], settings: dict[str, Any], ready: Tokenizer | None, problems: Problems,
        shard: tuple[int, int], progress: Progress, say: Callable[[str], None],
    ):  # fmt: skip
        """`problems` are those of finding the sources; `shard` is a number from 1, and how many parts there are."""
        self.settings, self.ready, self.problems = settings, ready, problems
        self.progress, self.say = progress, say
        self.number, self.parts = shard
        stats = [size_and_time(source.path) for source in sources]
        names = [without_surrogates(source.name) for source in sources]
        identity = [VERSION, self.parts, settings, problems.strict, names, stats]
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self.folder = out.with_name(f".{out.name}.parts-{name}")
        self.bounds = cut([0 if stat is None else stat[0] for stat in stats], self.parts)
        self.sources = [sources[i:j] for i, j in zip(self.bounds, self.bounds[1:], strict=False)]

    # ------------------------------------------------------------ pieces of work

    @property
    def is_on(self) -> bool:
        """Whether nobody has thrown the work away, as is done when the corpus is there."""
        return (self.folder / PLAN).is_file()

    def check(self) -> None:
        if not self.is_on:
            raise Gone

    def begin(self) -> None:
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        if not self.is_on:
            write_durably(
                self.folder / PLAN, to_json({"kind": "parts", "parts": self.parts, "settings": self.settings})
            )

    def do(self) -> None:
        """Do, or see done, all but putting the parts together."""
        self._in_parts("reading", self._read)
        self._make("survey", self._survey, wait=True)
        if self.ready is None:
            self._in_parts("sample", self._sample)
            self._make("tokenizer", self._train, wait=True)
        self._in_parts("encoding", self._encode)

    def _in_parts(self, stage: str, fill: Callable[[int, Path], dict[str, Any]]) -> None:
        """All parts of one reading: this process's own first, then each that nobody has, then those that others leave."""
        order = [(self.number - 1 + i) % self.parts for i in range(self.parts)]
        if self._is_there(_name(stage, order[0])):
            self.say(f"part {self.number:,} of {self.parts:,}: {stage} is done already")
        while missing := [i for i in order if not self._is_there(_name(stage, i))]:
            taken = [self._make(_name(stage, i), partial(fill, i)) for i in missing]
            if not any(taken):
                self.say(f"{stage}: what is left is being done by others; waiting for part {missing[0] + 1:,}")
                self._make(_name(stage, missing[0]), partial(fill, missing[0]), wait=True)

    def _is_there(self, name: str) -> bool:
        return (self.folder / name / MANIFEST).is_file()

    def _make(self, name: str, fill: Callable[[Path], dict[str, Any]], wait: bool = False) -> bool:
        """See to it that a piece is there. False where another process has it in hand, and `wait` is not said."""
        aside = self.folder / f".{name}.partial"
        try:
            held = FileLock(self.folder / f".{name}.lock").acquire(-1 if wait else 0, poll_interval=POLL)
        except Timeout:
            return False
        with held:
            self.check()
            if not self._is_there(name):
                self.say(f"{name} of {self.parts:,}")
                shutil.rmtree(aside, ignore_errors=True)  # of one that was killed
                with writing(aside):
                    aside.mkdir()
                seal(aside, {"kind": "part", **fill(aside)})
                move_into_place(aside, self.folder / name)
        return True

    def _facts(self, name: str) -> dict[str, Any]:
        """What a piece was sealed with, its files checked. One that was damaged is taken away, to be made anew."""
        try:
            return check_seal(self.folder / name)
        except CorruptFile as error:
            self.check()
            self.say(f"{error}\n{name} is damaged, so it is made anew")
            shutil.rmtree(self.folder / name, ignore_errors=True)
            raise Gone from error

    # ------------------------------------------------------------ to see what is there

    def _read(self, i: int, aside: Path) -> dict[str, Any]:
        bar = Bar("reading", self.sources[i], self.progress)
        with (
            writing(aside),
            (aside / "documents").open("wb") as documents,
            _lines(aside / "sources.jsonl", "w") as lines,
        ):

            def add(key: bytes, text: Text) -> None:
                documents.write(RECORD.pack(key, text.characters, text.bytes, *text.pieces()))

            for source in self.sources[i]:
                problems = Problems(self.problems.strict)
                facts = read_source(source, problems, bar, add)
                lines.write(json.dumps({"facts": facts, "problems": problems.facts()}, ensure_ascii=False) + "\n")
        return {}

    def _documents(self) -> Iterator[tuple[int, bytes, int, int, int, int]]:
        """Of every document the part it is in, and its record."""
        for i in range(self.parts):
            with (self.folder / _name("reading", i) / "documents").open("rb") as file:
                while block := file.read(RECORD.size * 2**14):
                    for record in RECORD.iter_unpack(block):
                        yield i, *record

    def _survey(self, aside: Path) -> dict[str, Any]:
        """What only all parts together show: which documents are new, and which split each belongs to."""
        found, problems = Survey(), Problems()
        problems.take_over(self.problems.facts())
        for i in range(self.parts):
            self._facts(_name("reading", i))
            for line in read_json_lines(self.folder / _name("reading", i) / "sources.jsonl"):
                found.sources.append(line["facts"])
                problems.take_over(line["problems"])
        with seen(aside / "seen.sqlite") as is_new:
            for _, key, characters, size, _, _ in self._documents():
                found.add(key, is_new(key), characters, size)
        found.tell(problems, self.say)
        documents, pieces = [0] * self.parts, [0] * self.parts
        for place, (i, *_, every, first) in enumerate(self._documents()):
            documents[i] += 1
            pieces[i] += {"train": every, "both": first}.get(found.split_of(place), 0)
        with writing(aside):
            (aside / "levels").write_bytes(found.levels)
        known = {name: value for name, value in vars(found).items() if name != "levels"}
        starts = [(sum(documents[:i]), sum(pieces[:i])) for i in range(self.parts)]
        return {"survey": known, "starts": starts, "problems": problems.facts()}

    @cached_property
    def _known(self) -> dict[str, Any]:
        return self._facts("survey")

    @cached_property
    def _found(self) -> Survey:
        known = self._known["survey"] | {"smallest": tuple(self._known["survey"]["smallest"])}
        return Survey(**known, levels=bytearray((self.folder / "survey" / "levels").read_bytes()))

    # ------------------------------------------------------------ the tokenizer

    def _texts(self, i: int, stage: str) -> Iterator[tuple[Split, str | Origin]]:
        place, _ = self._known["starts"][i]
        return split_texts(self.sources[i], self._found, stage, self.progress, self.bounds[i], place)

    def _sample(self, i: int, aside: Path) -> dict[str, Any]:
        """What the tokenizer has to see of a part: the characters in it, or the texts that draw a small number."""
        texts = (text for split, text in self._texts(i, "tokenizer") if split == "train" and isinstance(text, str))
        if self.settings["tokenizer"] == "char":
            return {"characters": sorted({character for text in texts for character in without_surrogates(text)})}
        _, start = self._known["starts"][i]
        kept, limit = drawn(((number_of(place), text) for place, text in enumerate(texts, start)), DRAWS)
        with writing(aside), _lines(aside / "texts.jsonl", "w") as lines:
            lines.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in kept)
        return {"limit": limit}

    def _train(self, aside: Path) -> dict[str, Any]:
        names = [_name("sample", i) for i in range(self.parts)]
        facts = [self._facts(name) for name in names]
        if self.settings["tokenizer"] == "char":
            tokenizer = train_char("".join(one["characters"]) for one in facts)
        else:
            size = self.settings["vocab_size"] or vocab_size_for(self._found.size)
            kept, _ = drawn(self._sampled(names), min(one["limit"] for one in facts))
            tokenizer = train_bpe_on([text for _, text in kept], size)
        tokenizer.save(aside)
        return {}

    def _sampled(self, names: list[str]) -> Iterator[tuple[int, str]]:
        for name in names:
            with _lines(self.folder / name / "texts.jsonl", "r") as lines:
                for line in lines:
                    number, text = json.loads(line)
                    yield number, text

    # ------------------------------------------------------------ the tokens

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        if self.ready is None:
            self._facts("tokenizer")
        return self.ready or Tokenizer.open(self.folder / "tokenizer")

    def _encode(self, i: int, aside: Path) -> dict[str, Any]:
        rows = encode(self._texts(i, "encoding"), self._tokenizer, aside)
        return {"rows": {split: asdict(part) for split, part in rows.items()}}

    def join(self, aside: Path) -> None:
        """Fill and seal an empty folder with what one process alone would have made."""
        names = [_name("encoding", i) for i in range(self.parts)]
        facts = [self._facts(name)["rows"] for name in names]
        self._tokenizer.save(aside)
        rows: dict[Split, Part] = {}
        for split in ("train", "validation"):
            row = ShardWriter(aside, split, self._tokenizer)
            for name in names:
                row.copy(Tokens(sorted((self.folder / name).glob(f"{split}-*.npy"))))
            row.close()
            rows[split] = Part(**{key: sum(one[split][key] for one in facts) for key in asdict(Part())})
        origins, before = OriginWriter(aside), 0
        for name, one in zip(names, facts, strict=True):
            origins.copy(self.folder / name, before)
            before += one["train"]["tokens"]
        problems = Problems()
        problems.take_over(self._known["problems"])
        finish(aside, self.settings, self._found, rows, self._tokenizer.vocab_size, problems, self.say)


def _name(stage: str, part: int) -> str:
    """A piece's name: parts are counted from 1, as a person counts them."""
    return f"{stage}-{part + 1:05d}"


def _lines(path: Path, mode: str) -> Any:
    return path.open(mode, encoding="utf-8", newline="\n")


def cut(sizes: list[int], parts: int) -> list[int]:
    """Where each part of a row of files begins, and where the last one ends: about as many bytes in each."""
    total, before, bounds = sum(sizes) + len(sizes), 0, [0]
    for i, size in enumerate(sizes):
        part = (2 * before + size + 1) * parts // (2 * total)  # the one that the middle of the file falls into
        bounds += [i] * (part + 1 - len(bounds))
        before += size + 1
    return bounds + [len(sizes)] * (parts + 1 - len(bounds))
