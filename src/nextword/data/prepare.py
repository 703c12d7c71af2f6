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

from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.common.fs import (
    MANIFEST,
    atomic_replace_dir,
    atomic_write,
    map_disk_errors,
    read_jsonl,
    to_json,
    verify_manifest,
    write_manifest,
)
from nextword.data import corpus as corpus_module
from nextword.data.corpus import (
    FORMAT_VERSION,
    PLAN_FILE,
    Corpus,
    build_atomically,
    find_sources,
    fingerprint_settings,
    prepare_lock,
    remove_partials,
    reuse_if_unchanged,
    write_corpus_manifest,
    write_shards,
)
from nextword.data.decoding import replace_surrogates
from nextword.data.documents import IssueLog, SourceFile
from nextword.data.provenance import DocumentSource, ProvenanceWriter
from nextword.data.scan import (
    ByteProgress,
    CorpusScan,
    HashedDocument,
    ProgressCallback,
    dedup_index,
    file_size_and_mtime,
    iter_split_texts,
    scan_source,
)
from nextword.data.shards import ShardedTokens, ShardWriter, Split, SplitStats
from nextword.data.tokenizer import (
    HASH_RANGE,
    Tokenizer,
    check_vocab_size,
    hash_sample,
    sample_key,
    train_bpe_from_sample,
    train_char,
    vocab_size_for,
)

MAX_SHARDS = 10_000  # parts; each is a few files
LOCK_POLL_SECONDS = 0.2  # seconds between two looks at a lock that another process holds
DOCUMENT_RECORD = struct.Struct(
    "<16sQQII"
)  # of a document: hash, characters, bytes, pieces, pieces in its first nine tenths


class JobAborted(Exception):
    """The work was thrown away by another process, which has put the corpus together; or a piece of it was damaged."""


def parse_shard(shard: str) -> tuple[int, int]:
    """The 3 and the 64 of "3/64". Raises `UsageError` for what is no part of so many."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
    number, num_shards = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= num_shards <= MAX_SHARDS:
        raise UsageError(
            f"--shard {shard}: write which part of how many, as in 3/64 (from 1/64 to 64/64, {MAX_SHARDS:,} at most)"
        )
    return number, num_shards


def prepare(
    corpora: Iterable[str | Path],
    out: Path,
    shard: str | None,
    *,
    tokenizer: str | Path = "bpe",
    vocab_size: int | None = None,
    text_column: str | None = None,
    strict: bool = False,
    progress: ProgressCallback | None = None,
    log: Callable[[str], None] | None = None,
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
            progress=progress, log=log,
        )  # fmt: skip
    number, num_shards = parse_shard(shard)
    out, log, progress = Path(out), log or (lambda line: None), progress or (lambda stage, done, total: None)
    settings, existing_tokenizer = fingerprint_settings(tokenizer, vocab_size, text_column)
    if vocab_size is not None:
        check_vocab_size(vocab_size)
    corpora, has_run = list(corpora), False
    while True:
        problems = IssueLog(strict)
        with prepare_lock(out):
            sources = find_sources(corpora, problems, text_column, exclude=out)
            corpus = reuse_if_unchanged(out, settings, sources, strict, (lambda line: None) if has_run else log)
            if corpus is not None:
                remove_partials(out)
                return corpus
            job = PreparationJob(
                out, sources, settings, existing_tokenizer, problems, (number, num_shards), progress, log
            )
            job.initialize()
        has_run = True
        try:
            job.run()
            with prepare_lock(out):
                job.raise_if_aborted()
                build_atomically(out, job.assemble)
        except JobAborted:
            continue
        except (NextwordError, OSError):
            if job.is_active:
                raise


class PreparationJob:
    """What is done already, and what one process does of the rest."""

    def __init__(
        self, out: Path, sources: list[SourceFile], settings: dict[str, Any], existing_tokenizer: Tokenizer | None, problems: IssueLog,
        shard: tuple[int, int], progress: ProgressCallback, log: Callable[[str], None],
    ):  # fmt: skip
        """`problems` are those of finding the sources; `shard` is a number from 1, and how many parts there are."""
        self.settings, self.existing_tokenizer, self.problems = settings, existing_tokenizer, problems
        self.progress, self.log = progress, log
        self.shard_number, self.num_shards = shard
        stats = [file_size_and_mtime(source.path) for source in sources]
        names = [replace_surrogates(source.name) for source in sources]
        identity = [FORMAT_VERSION, self.num_shards, settings, problems.strict, names, stats]
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self.work_dir = out.with_name(f".{out.name}.parts-{name}")
        self.shard_bounds = partition_by_size([0 if stat is None else stat[0] for stat in stats], self.num_shards)
        self.shard_sources = [sources[i:j] for i, j in zip(self.shard_bounds, self.shard_bounds[1:], strict=False)]

    # ------------------------------------------------------------ pieces of work

    @property
    def is_active(self) -> bool:
        """Whether nobody has thrown the work away, as is done when the corpus is there."""
        return (self.work_dir / PLAN_FILE).is_file()

    def raise_if_aborted(self) -> None:
        if not self.is_active:
            raise JobAborted

    def initialize(self) -> None:
        with map_disk_errors(self.work_dir):
            self.work_dir.mkdir(exist_ok=True)
        if not self.is_active:
            atomic_write(
                self.work_dir / PLAN_FILE,
                to_json({"kind": "parts", "parts": self.num_shards, "settings": self.settings}),
            )

    def run(self) -> None:
        """Do, or see done, all but putting the parts together."""
        self._run_stage("reading", self._scan_shard)
        self._build_artifact("survey", self._merge_scans, wait=True)
        if self.existing_tokenizer is None:
            self._run_stage("sample", self._sample_shard)
            self._build_artifact("tokenizer", self._train_tokenizer, wait=True)
        self._run_stage("encoding", self._encode_shard)

    def _run_stage(self, stage: str, build: Callable[[int, Path], dict[str, Any]]) -> None:
        """All parts of one reading: this process's own first, then each that nobody has, then those that others leave."""
        order = [(self.shard_number - 1 + i) % self.num_shards for i in range(self.num_shards)]
        if self._is_complete(_artifact_name(stage, order[0])):
            self.log(f"part {self.shard_number:,} of {self.num_shards:,}: {stage} is done already")
        while missing := [i for i in order if not self._is_complete(_artifact_name(stage, i))]:
            built = [self._build_artifact(_artifact_name(stage, i), partial(build, i)) for i in missing]
            if not any(built):
                self.log(f"{stage}: what is left is being done by others; waiting for part {missing[0] + 1:,}")
                self._build_artifact(_artifact_name(stage, missing[0]), partial(build, missing[0]), wait=True)

    def _is_complete(self, name: str) -> bool:
        return (self.work_dir / name / MANIFEST).is_file()

    def _build_artifact(self, name: str, build: Callable[[Path], dict[str, Any]], wait: bool = False) -> bool:
        """See to it that a piece is there. False where another process has it in hand, and `wait` is not said."""
        temp_dir = self.work_dir / f".{name}.partial"
        try:
            lock = FileLock(self.work_dir / f".{name}.lock").acquire(-1 if wait else 0, poll_interval=LOCK_POLL_SECONDS)
        except Timeout:
            return False
        with lock:
            self.raise_if_aborted()
            if not self._is_complete(name):
                self.log(f"{name} of {self.num_shards:,}")
                shutil.rmtree(temp_dir, ignore_errors=True)  # of one that was killed
                with map_disk_errors(temp_dir):
                    temp_dir.mkdir()
                write_manifest(temp_dir, {"kind": "part", **build(temp_dir)})
                atomic_replace_dir(temp_dir, self.work_dir / name)
        return True

    def _load_manifest(self, name: str) -> dict[str, Any]:
        """What a piece was sealed with, its files checked. One that was damaged is taken away, to be made anew."""
        try:
            return verify_manifest(self.work_dir / name)
        except CorruptFileError as error:
            self.raise_if_aborted()
            self.log(f"{error}\n{name} is damaged, so it is made anew")
            shutil.rmtree(self.work_dir / name, ignore_errors=True)
            raise JobAborted from error

    # ------------------------------------------------------------ to see what is there

    def _scan_shard(self, shard: int, temp_dir: Path) -> dict[str, Any]:
        byte_progress = ByteProgress("reading", self.shard_sources[shard], self.progress)
        with (
            map_disk_errors(temp_dir),
            (temp_dir / "documents").open("wb") as documents,
            _open_text(temp_dir / "sources.jsonl", "w") as lines,
        ):

            def add(key: bytes, text: HashedDocument) -> None:
                documents.write(DOCUMENT_RECORD.pack(key, text.num_characters, text.num_bytes, *text.chunk_counts()))

            for source in self.shard_sources[shard]:
                problems = IssueLog(self.problems.strict)
                source_info = scan_source(source, problems, byte_progress, add)
                lines.write(
                    json.dumps({"facts": source_info, "problems": problems.to_dict()}, ensure_ascii=False) + "\n"
                )
        return {}

    def _iter_document_records(self) -> Iterator[tuple[int, bytes, int, int, int, int]]:
        """Of every document the part it is in, and its record."""
        for i in range(self.num_shards):
            with (self.work_dir / _artifact_name("reading", i) / "documents").open("rb") as file:
                while block := file.read(DOCUMENT_RECORD.size * 2**14):
                    for record in DOCUMENT_RECORD.iter_unpack(block):
                        yield i, *record

    def _merge_scans(self, temp_dir: Path) -> dict[str, Any]:
        """What only all parts together show: which documents are new, and which split each belongs to."""
        scan, problems = CorpusScan(), IssueLog()
        problems.merge(self.problems.to_dict())
        for i in range(self.num_shards):
            self._load_manifest(_artifact_name("reading", i))
            for line in read_jsonl(self.work_dir / _artifact_name("reading", i) / "sources.jsonl"):
                scan.sources.append(line["facts"])
                problems.merge(line["problems"])
        with dedup_index(temp_dir / "seen.sqlite") as is_new:
            for _, key, characters, size, _, _ in self._iter_document_records():
                scan.add(key, is_new(key), characters, size)
        scan.report(problems, self.log)
        documents_per_shard, chunks_per_shard = [0] * self.num_shards, [0] * self.num_shards
        for place, (i, *_, all_chunks, train_chunks) in enumerate(self._iter_document_records()):
            documents_per_shard[i] += 1
            chunks_per_shard[i] += {"train": all_chunks, "both": train_chunks}.get(scan.split_for_index(place), 0)
        with map_disk_errors(temp_dir):
            (temp_dir / "levels").write_bytes(scan.levels)
        scan_state = {name: value for name, value in vars(scan).items() if name != "levels"}
        starts = [(sum(documents_per_shard[:i]), sum(chunks_per_shard[:i])) for i in range(self.num_shards)]
        return {"survey": scan_state, "starts": starts, "problems": problems.to_dict()}

    @cached_property
    def _scan_manifest(self) -> dict[str, Any]:
        return self._load_manifest("survey")

    @cached_property
    def _scan(self) -> CorpusScan:
        scan_state = self._scan_manifest["survey"] | {"smallest": tuple(self._scan_manifest["survey"]["smallest"])}
        return CorpusScan(**scan_state, levels=bytearray((self.work_dir / "survey" / "levels").read_bytes()))

    # ------------------------------------------------------------ the tokenizer

    def _iter_texts(self, shard: int, stage: str) -> Iterator[tuple[Split, str | DocumentSource]]:
        first_document, _ = self._scan_manifest["starts"][shard]
        return iter_split_texts(
            self.shard_sources[shard], self._scan, stage, self.progress, self.shard_bounds[shard], first_document
        )

    def _sample_shard(self, shard: int, temp_dir: Path) -> dict[str, Any]:
        """What the tokenizer has to see of a part: the characters in it, or the texts that draw a small number."""
        texts = (
            text for split, text in self._iter_texts(shard, "tokenizer") if split == "train" and isinstance(text, str)
        )
        if self.settings["tokenizer"] == "char":
            return {"characters": sorted({character for text in texts for character in replace_surrogates(text)})}
        _, start = self._scan_manifest["starts"][shard]
        sampled, limit = hash_sample(((sample_key(place), text) for place, text in enumerate(texts, start)), HASH_RANGE)
        with map_disk_errors(temp_dir), _open_text(temp_dir / "texts.jsonl", "w") as lines:
            lines.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in sampled)
        return {"limit": limit}

    def _train_tokenizer(self, temp_dir: Path) -> dict[str, Any]:
        names = [_artifact_name("sample", i) for i in range(self.num_shards)]
        manifests = [self._load_manifest(name) for name in names]
        if self.settings["tokenizer"] == "char":
            tokenizer = train_char("".join(one["characters"]) for one in manifests)
        else:
            size = self.settings["vocab_size"] or vocab_size_for(self._scan.size)
            sampled, _ = hash_sample(self._iter_sampled(names), min(one["limit"] for one in manifests))
            tokenizer = train_bpe_from_sample([text for _, text in sampled], size)
        tokenizer.save(temp_dir)
        return {}

    def _iter_sampled(self, names: list[str]) -> Iterator[tuple[int, str]]:
        for name in names:
            with _open_text(self.work_dir / name / "texts.jsonl", "r") as lines:
                for line in lines:
                    number, text = json.loads(line)
                    yield number, text

    # ------------------------------------------------------------ the tokens

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        if self.existing_tokenizer is None:
            self._load_manifest("tokenizer")
        return self.existing_tokenizer or Tokenizer.open(self.work_dir / "tokenizer")

    def _encode_shard(self, shard: int, temp_dir: Path) -> dict[str, Any]:
        stats = write_shards(self._iter_texts(shard, "encoding"), self._tokenizer, temp_dir)
        return {"rows": {split: asdict(part) for split, part in stats.items()}}

    def assemble(self, output_dir: Path) -> None:
        """Fill and seal an empty folder with what one process alone would have made."""
        artifact_names = [_artifact_name("encoding", i) for i in range(self.num_shards)]
        shard_stats = [self._load_manifest(name)["rows"] for name in artifact_names]
        self._tokenizer.save(output_dir)
        split_stats: dict[Split, SplitStats] = {}
        for split in ("train", "validation"):
            writer = ShardWriter(output_dir, split, self._tokenizer)
            for name in artifact_names:
                writer.append_from(ShardedTokens(sorted((self.work_dir / name).glob(f"{split}-*.npy"))))
            writer.close()
            split_stats[split] = SplitStats(
                **{key: sum(stats[split][key] for stats in shard_stats) for key in asdict(SplitStats())}
            )
        provenance, token_offset = ProvenanceWriter(output_dir), 0
        for name, stats in zip(artifact_names, shard_stats, strict=True):
            provenance.append_from(self.work_dir / name, token_offset)
            token_offset += stats["train"]["tokens"]
        problems = IssueLog()
        problems.merge(self._scan_manifest["problems"])
        write_corpus_manifest(
            output_dir, self.settings, self._scan, split_stats, self._tokenizer.vocab_size, problems, self.log
        )


def _artifact_name(stage: str, shard: int) -> str:
    """A piece's name: parts are counted from 1, as a person counts them."""
    return f"{stage}-{shard + 1:05d}"


def _open_text(path: Path, mode: str) -> Any:
    return path.open(mode, encoding="utf-8", newline="\n")


def partition_by_size(sizes: list[int], num_parts: int) -> list[int]:
    """Where each part of a row of files begins, and where the last one ends: about as many bytes in each."""
    total, before, bounds = sum(sizes) + len(sizes), 0, [0]
    for i, size in enumerate(sizes):
        part = (2 * before + size + 1) * num_parts // (2 * total)  # the one that the middle of the file falls into
        bounds += [i] * (part + 1 - len(bounds))
        before += size + 1
    return bounds + [len(sizes)] * (num_parts + 1 - len(bounds))
