"""Preparation: text to a corpus of tokens, by one process or by many.

The text is read three times: to find out what there is, to sample it for the tokenizer, and to encode it. Each reading
is done in N shards of whole source files, followed by what needs all of them: deduplication and the split into training
and validation, the training of the tokenizer, the corpus itself. A single process has one shard. The result does not
depend on N, byte for byte.

Every step writes an artifact, a directory with a manifest, which is built under a lock and renamed into place: it
exists whole or not at all. A process whose artifact is locked builds another one, and waits only if all that remain are
locked. The lock of a killed process is released by the system, and the artifact is built by whoever waits. So any
number of processes complete the corpus, down to one.
"""

import fileinput
import glob
import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, islice, pairwise, repeat
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nextword.common import fs
from nextword.common.console import Console
from nextword.common.errors import CorruptFileError, NextwordError, UsageError, import_optional
from nextword.data.builtin_datasets import find_sources
from nextword.data.corpus import (
    FORMAT_VERSION,
    SPLITS,
    Corpus,
    DocumentSource,
    Split,
    SplitText,
    concatenate_shards,
    write_shards,
)
from nextword.data.issues import IssueLog, replace_surrogates
from nextword.data.readers import SourceFile
from nextword.data.scan import (
    PARTS,
    CorpusScan,
    HeldOutDocuments,
    Part,
    ProgressCallback,
    SourceReader,
    are_unchanged,
    choose_held_out,
    cut_chunks,
    document_table,
    file_size_and_mtime,
    report_issues,
)
from nextword.data.tokenizer import (
    FORM_KEY,
    Normalization,
    Tokenizer,
    check_vocab_size,
    hash_sample,
    lost_text_message,
    normalized,
    sample_key,
    train_bpe_from_sample,
    train_char,
    vocab_size_for,
)

MAX_SHARDS = 10_000  # each is a few files
ARTIFACTS_VERSION = 4
SAMPLE_FILE, PARTS_FILE = "texts.jsonl", "parts"
PLAN_FILE = "plan.json"  # without it the artifacts beside it are not valid
LOCK_POLL_SECONDS = 0.2

RECORD = struct.Struct("<16sQQ")  # of a document in the first reading: the hash of its text, characters, bytes

Log = Callable[[str], None]
Build = Callable[[Path], dict[str, Any]]  # fills the directory of an artifact, and returns what its manifest holds


class JobAborted(Exception):
    """Another process has completed the corpus, or an artifact was damaged: start again."""


def prepare(
    corpora: Iterable[str | Path],
    out: Path,
    *,
    shard: str | None = None,
    tokenizer: str | Path = "bpe",
    vocab_size: int | None = None,
    normalize: Normalization = "none",
    text_column: str | None = None,
    validation: Iterable[str | Path] = (),
    test: Iterable[str | Path] = (),
    validation_fraction: float | None = None,
    strict: bool = False,
    progress: ProgressCallback | None = None,
    log: Log | None = None,
) -> Corpus:
    """Prepare files, folders and built-in datasets as a corpus at `out`. A corpus of the same text and settings is reused.

    Args:
        corpora: paths, and names of built-in datasets.
        out: the directory of the corpus. It may hold another corpus, which is replaced.
        shard: "3/64" for the third of 64 processes that prepare the corpus together, with the same arguments otherwise.
            Each begins with its own shard, continues with any that no other process works on, and returns when the
            corpus is complete. They see the same files at the same paths, and file locks hold between them. Default:
            this process alone.
        tokenizer: "bpe", "char", or the path of an existing tokenizer.
        vocab_size: the size of a new BPE vocabulary. Default: chosen for the size of the corpus and its characters.
        normalize: the Unicode normalization of the text by a new tokenizer. An existing one has its own.
        text_column: the column of tables that holds the text. Default: the first of `TEXT_COLUMNS` that exists.
        validation: the text of the validation set. Default: documents of the corpus, see `choose_held_out`.
        test: the text of the test set. Default: documents of the corpus from 5 MB on, unless `validation` is given.
        validation_fraction: the share of the corpus in the validation set. Default: see `choose_held_out`.
        strict: raise `NextwordError` at the first issue of the text. By default issues are logged and written to
            `problems.jsonl`.
        progress: called with the stage ("reading", "tokenizer", "encoding"), the bytes done and the total bytes.
        log: called with messages for the user.

    Raises:
        UsageError: a path does not exist, `out` holds something else, or an option is invalid.
        NextwordError: there is too little text, or a file has changed while it was read.
    """
    out, inputs = Path(out), {"validation": list(validation), "test": list(test), "train": list(corpora)}
    log = log_reuse = log or _ignore
    shard_number, num_shards = (1, 1) if shard is None else parse_shard(shard)
    settings, existing_tokenizer = fingerprint_settings(tokenizer, vocab_size, normalize, text_column)
    if validation_fraction is not None and inputs["validation"]:
        raise UsageError("--validation-fraction and --validation exclude each other: the second names the whole set")
    while True:
        issues = IssueLog(strict)
        with fs.output_lock(out):
            found = {split: find_sources(paths, issues, text_column, exclude=out) for split, paths in inputs.items()}
            # Sets of the user's own come first: a document that is in one of them, too, is a duplicate in the corpus.
            sources = [source for split_sources in found.values() for source in split_sources]
            settings["held_out"] = [validation_fraction, len(found["validation"]), len(found["test"])]
            corpus = reuse_if_unchanged(out, settings, sources, strict, log_reuse)
            if corpus is not None:
                remove_artifacts(out)
                return corpus
            job = PreparationJob(
                out, sources, settings, existing_tokenizer, issues, shard_number, num_shards, progress or _ignore, log
            )
        log_reuse = _ignore  # what this call or another process makes from now on is no news for the user
        try:
            assemble = job.run()
            with fs.output_lock(out):
                job.raise_if_aborted()
                fs.build_directory(out, assemble)
                remove_artifacts(out)
            return Corpus.open(out)
        except JobAborted:
            continue
        except (NextwordError, OSError):
            if job.is_active:
                raise
        finally:
            if shard is None:
                _remove_work_dir(job.work_dir)


def _ignore(*_: object) -> None:
    """The default of callbacks."""


def parse_shard(shard: str) -> tuple[int, int]:
    """The shard number and the number of shards: (3, 64) for "3/64". Raises `UsageError` if it is invalid."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard, re.ASCII)
    number, num_shards = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= num_shards <= MAX_SHARDS:
        raise UsageError(
            f"--shard {shard}: name the shard and the number of shards, as in 3/64 (from 1/64 to 64/64, {MAX_SHARDS:,} at most)"
        )
    return number, num_shards


def fingerprint_settings(
    tokenizer: str | Path, vocab_size: int | None, normalize: Normalization, text_column: str | None
) -> tuple[dict[str, Any], Tokenizer | None]:
    """The settings that a corpus depends on besides its text, and the tokenizer if it exists already."""
    if vocab_size is not None:
        if tokenizer != "bpe":
            raise UsageError("--vocab-size is for a new BPE: leave it out, or leave out --tokenizer")
        check_vocab_size(vocab_size)
    existing = None if tokenizer in ("bpe", "char") else Tokenizer.open(Path(tokenizer))
    if normalize != "none" and existing is not None and existing.normalization != normalize:
        raise UsageError("--normalize is for a new tokenizer: an existing one has its own normalization")
    name = str(tokenizer) if existing is None else hashlib.sha256(existing.backend.to_str().encode()).hexdigest()
    settings = {"tokenizer": name, "vocab_size": vocab_size, "text_column": text_column}
    # Corpora of earlier versions have no such setting.
    return settings | ({} if normalize == "none" else {"normalize": normalize}), existing


def reuse_if_unchanged(
    out: Path, settings: dict[str, Any], sources: list[SourceFile], strict: bool, log: Log
) -> Corpus | None:
    """The corpus at `out` if it was made from the same text with the same settings.

    Raises:
        UsageError: `out` holds something else, which must not be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / fs.MANIFEST).is_file():
        raise UsageError(f"{out}: exists and is not a prepared corpus; name another place with --out")
    manifest = fs.read_manifest(out)
    if manifest.get("kind") != "corpus":
        raise UsageError(f"{out}: holds something else that nextword made; name another place with --out")
    if (manifest.get("version"), manifest.get("settings")) != (FORMAT_VERSION, settings):
        log(f"{out}: prepared with other settings, so it is prepared again")
    elif not are_unchanged(sources, manifest["sources"]):
        log(f"{out}: the text has changed, so it is prepared again")
    elif not (strict and manifest["problems"]["total"]):  # otherwise the text is read to raise the first issue
        try:
            corpus = Corpus.open(out)
            log(f"{out}: the text and the settings are unchanged, so the existing shards are used")
            return corpus
        except CorruptFileError as error:
            log(f"{error}\nThe shards are damaged, so the corpus is prepared again")
    return None


def remove_artifacts(out: Path) -> None:
    """Remove the artifacts of every preparation of `out`. Processes that still work on one notice it."""
    for directory in out.parent.glob(f".{glob.escape(out.name)}.parts-*"):
        _remove_work_dir(directory)


def _remove_work_dir(directory: Path) -> None:
    (directory / PLAN_FILE).unlink(missing_ok=True)  # first: it makes the others invalid
    shutil.rmtree(directory, ignore_errors=True)


@dataclass
class PreparationJob:
    """The steps of a preparation, as one process of several takes part in it.

    Attributes:
        out: the directory of the corpus.
        sources: the source files.
        settings: see `fingerprint_settings`.
        tokenizer: the existing tokenizer; None to train one.
        issues: the issues of finding the sources.
        shard_number: the shard that this process begins with, from 1.
        num_shards: the number of shards.
        progress, log: see `prepare`.
    """

    out: Path
    sources: list[SourceFile]
    settings: dict[str, Any]
    tokenizer: Tokenizer | None
    issues: IssueLog
    shard_number: int
    num_shards: int
    progress: ProgressCallback
    log: Log

    def __post_init__(self) -> None:
        stats = [file_size_and_mtime(source.path) for source in self.sources]
        names = [replace_surrogates(source.name) for source in self.sources]
        versions = [FORMAT_VERSION, ARTIFACTS_VERSION]
        identity = [*versions, self.num_shards, self.settings, self.issues.strict, names, stats]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self.work_dir = self.out.with_name(f".{self.out.name}.parts-{digest}")
        self.bounds = partition_by_size([size or 0 for size, _ in stats], self.num_shards)
        self.shard_sources = [self.sources[i:j] for i, j in pairwise(self.bounds)]
        normalization = self.settings.get("normalize") if self.tokenizer is None else self.tokenizer.normalization
        self._normalize = normalization == "nfc"
        self._log_step: Log = self.log if self.num_shards > 1 else _ignore
        with fs.map_disk_errors(self.work_dir):
            self.work_dir.mkdir(exist_ok=True)
        if not self.is_active:
            fs.atomic_write(
                self.work_dir / PLAN_FILE, fs.to_json({"parts": self.num_shards, "settings": self.settings})
            )

    @property
    def is_active(self) -> bool:
        """Whether the artifacts are valid: nobody has completed the corpus yet."""
        return (self.work_dir / PLAN_FILE).is_file()

    def raise_if_aborted(self) -> None:
        """Raise `JobAborted` if the job is not active."""
        if not self.is_active:
            raise JobAborted

    def run(self) -> Callable[[Path], None]:
        """Build all artifacts, or wait until others have built them. Returns the function that writes the corpus."""
        self._run_stage("reading", self._scan_shard)
        self._build("scan", self._merge_scans, wait=True)
        state = self._verify("scan")["scan"]
        scan = CorpusScan(**state)
        scan.held_out = HeldOutDocuments(**state["held_out"])
        tokenizer = self.tokenizer
        if tokenizer is None:
            self._run_stage("sample", partial(self._sample_shard, scan))
            self._build("tokenizer", partial(self._train_tokenizer, scan), wait=True)
            self._verify("tokenizer")
            tokenizer = Tokenizer.open(self.work_dir / "tokenizer")
        self._run_stage("encoding", partial(self._encode_shard, scan, tokenizer))
        return partial(self._assemble, scan, tokenizer)

    # ------------------------------------------------------------ artifacts

    def _artifacts(self, stage: str) -> list[str]:
        """The names of the artifacts of a stage, one for each shard."""
        return [f"{stage}-{number:05d}" for number in range(1, self.num_shards + 1)]

    def _run_stage(self, stage: str, build: Callable[[int, Path], dict[str, Any]]) -> None:
        """Build the artifacts of all shards: first this process's own, then those that no other process works on."""
        names, first = self._artifacts(stage), self.shard_number - 1
        if self._is_complete(names[first]):
            self._log_step(f"shard {self.shard_number:,} of {self.num_shards:,}: {stage} is complete already")
        order = [*range(first, self.num_shards), *range(first)]
        while missing := [shard for shard in order if not self._is_complete(names[shard])]:
            built = [self._build(names[shard], partial(build, shard)) for shard in missing]
            if not any(built):
                shard = missing[0]
                self._log_step(
                    f"{stage}: other processes work on the remaining shards; waiting for shard {shard + 1:,}"
                )
                self._build(names[shard], partial(build, shard), wait=True)

    def _is_complete(self, name: str) -> bool:
        return (self.work_dir / name / fs.MANIFEST).is_file()

    def _build(self, name: str, build: Build, wait: bool = False) -> bool:
        """Build an artifact unless it exists. Returns False if another process works on it and `wait` is False."""
        try:
            lock = FileLock(self.work_dir / f".{name}.lock").acquire(-1 if wait else 0, poll_interval=LOCK_POLL_SECONDS)
        except Timeout:
            return False
        with lock:
            self.raise_if_aborted()
            if not self._is_complete(name):
                self._log_step(f"{name} of {self.num_shards:,}")

                def build_sealed(directory: Path) -> None:
                    fs.write_manifest(directory, {"kind": "part", **build(directory)})

                fs.build_directory(self.work_dir / name, build_sealed)
        return True

    def _verify(self, name: str) -> dict[str, Any]:
        """The manifest of an artifact, whose files are checked. A damaged artifact is removed, to be built again."""
        try:
            return fs.verify_manifest(self.work_dir / name)
        except CorruptFileError as error:
            self.raise_if_aborted()
            self.log(f"{error}\n{name} is damaged, so it is built again")
            shutil.rmtree(self.work_dir / name, ignore_errors=True)
            raise JobAborted from error

    # ------------------------------------------------------------ first reading

    def _scan_shard(self, shard: int, directory: Path) -> dict[str, Any]:
        issues = IssueLog(self.issues.strict)
        reader = SourceReader(self.shard_sources[shard], "reading", self.progress, self._normalize)
        with fs.map_disk_errors(directory), (directory / "documents").open("wb") as records:
            for _, hashed in reader.documents(issues):
                key = hashed.finalize()
                records.write(RECORD.pack(key, hashed.num_characters, hashed.num_bytes))
        return {"sources": reader.found, "issues": issues.to_dict()}

    def _iter_records(self) -> Iterator[tuple[bytes, int, int]]:
        """The record of every document."""
        for name in self._artifacts("reading"):
            with (self.work_dir / name / "documents").open("rb") as file:
                while block := file.read(RECORD.size * 2**14):
                    yield from RECORD.iter_unpack(block)

    def _merge_scans(self, directory: Path) -> dict[str, Any]:
        """Find the unique documents, and the part of the corpus that each belongs to."""
        scan, num_documents = CorpusScan(), [0]
        for name in self._artifacts("reading"):
            manifest = self._verify(name)
            scan.sources += manifest["sources"]
            num_documents.append(sum(source["documents"] for source in manifest["sources"]))
            self.issues.merge(manifest["issues"])
        scan.shard_starts = list(accumulate(num_documents))
        fraction, num_validation, num_test = self.settings["held_out"]
        own: list[Part] = [*repeat("validation", num_validation), *repeat("test", num_test)]  # of the first sources
        source_parts: list[Part] = [*own, *repeat("train", len(scan.sources) - len(own))]
        parts, repeated = bytearray(), dict[str, None]()

        def iter_documents() -> Iterator[tuple[dict[str, Any], Part, tuple[bytes, int, int]]]:
            records = self._iter_records()
            for source, part in zip(scan.sources, source_parts, strict=True):
                for record in islice(records, source["documents"]):
                    yield source, part, record

        with document_table(directory / "documents.sqlite") as table:
            for _, part, (key, _, num_bytes) in iter_documents():
                is_new = table.add(key, num_bytes if part == "train" else 0)
                parts.append(PARTS.index(part if is_new else "neither"))
                if part == "train" and is_new:
                    scan.size += num_bytes
                elif part == "train" and table.is_own(key):
                    repeated[key.hex()] = None
            counts = {part: parts.count(number) for number, part in enumerate(PARTS)}
            scan.duplicates = counts["neither"]
            scan.unique = len(parts) - scan.duplicates
            report_issues(self.issues, not counts["train"], self.log)
            shares = (0.0 if num_validation else fraction), (0.0 if own else None)
            scan.held_out = choose_held_out(table, counts["train"], scan.size, *shares)
        if repeated:
            scan.held_out.repeated = list(repeated)
            self.log(f"{len(repeated):,} documents that are in the validation or test set, too, are not trained on")
        for index, (source, _, (key, num_characters, _)) in enumerate(iter_documents()):
            part = PARTS[parts[index]]
            if part == "train":
                part = scan.held_out.part_of(key.hex())
                parts[index] = PARTS.index(part)
            if part == "cut":
                scan.cut_lengths.append((index, num_characters))
            source[part] = source.get(part, 0) + 1
        with fs.map_disk_errors(directory):
            (directory / PARTS_FILE).write_bytes(parts)
        return {"scan": asdict(scan), "issues": self.issues.to_dict()}

    # ------------------------------------------------------------ second reading

    def _iter_documents(self, scan: CorpusScan, shard: int, stage: str) -> Iterator[tuple[int, Iterator[SplitText]]]:
        """Read the unique documents of a shard once more.

        Yields:
            The index of each document; and its chunks with their split, and at the end of each part its source.

        Raises:
            NextwordError: a file has changed since the scan.
        """
        first_source, first_document = self.bounds[shard], scan.shard_starts[shard]
        parts, cut_lengths = (self.work_dir / "scan" / PARTS_FILE).read_bytes(), dict(scan.cut_lengths)
        reader, reported_before = (
            SourceReader(self.shard_sources[shard], stage, self.progress, self._normalize),
            IssueLog(),
        )
        documents = reader.documents(reported_before, scan.sources[first_source:])
        for index, (source_index, hashed) in enumerate(documents, first_document):
            part = PARTS[parts[index]] if index < len(parts) else "neither"  # a file has grown, as its end will show
            source = DocumentSource(first_source + source_index, hashed.document.line)
            if part == "cut":
                yield index, cut_chunks(hashed, scan.held_out.cut_points(cut_lengths[index]), source)
            elif part != "neither":
                items: list[tuple[Split, Iterable[str | DocumentSource]]] = [(part, hashed), (part, [source])]
                yield index, ((split, item) for split, group in items for item in group)

    def _sample_shard(self, scan: CorpusScan, shard: int, directory: Path) -> dict[str, Any]:
        """The shard's characters for a character tokenizer, its sample for a BPE."""
        texts = (
            (sample_key(index, number), text)
            for index, items in self._iter_documents(scan, shard, "tokenizer")
            for number, (split, text) in enumerate(items)
            if split == "train" and isinstance(text, str)
        )
        if self.settings["tokenizer"] == "char":
            return {"characters": sorted({character for _, text in texts for character in replace_surrogates(text)})}
        sample, limit = hash_sample(texts)
        with fs.map_disk_errors(directory), (directory / SAMPLE_FILE).open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in sample)
        return {"limit": limit}

    def _train_tokenizer(self, scan: CorpusScan, directory: Path) -> dict[str, Any]:
        names = self._artifacts("sample")
        manifests = [self._verify(name) for name in names]
        if self.settings["tokenizer"] == "char":
            characters = ("".join(manifest["characters"]) for manifest in manifests)
            normalized(train_char(characters), self._normalize).save(directory)
            return {}
        with fileinput.FileInput([self.work_dir / name / SAMPLE_FILE for name in names], encoding="utf-8") as lines:
            sample: Iterable[tuple[int, str]] = map(json.loads, lines)  # one at a time: it may be large
            if self.num_shards > 1:
                sample = hash_sample(sample, min(manifest["limit"] for manifest in manifests))[0]
            texts = [text for _, text in sample]
        vocab_size = self.settings["vocab_size"] or vocab_size_for(scan.size, texts)
        normalized(train_bpe_from_sample(texts, vocab_size), self._normalize).save(directory)
        return {}

    # ------------------------------------------------------------ third reading

    def _encode_shard(self, scan: CorpusScan, tokenizer: Tokenizer, shard: int, directory: Path) -> dict[str, Any]:
        documents = self._iter_documents(scan, shard, "encoding")
        stats = write_shards((item for _, items in documents for item in items), tokenizer, directory)
        return {"stats": {split: asdict(split_stats) for split, split_stats in stats.items()}}

    def _assemble(self, scan: CorpusScan, tokenizer: Tokenizer, directory: Path) -> None:
        """Write the corpus to an empty directory. Raises `NextwordError` if a split is empty."""
        parts = [self.work_dir / name for name in self._artifacts("encoding")]
        shard_stats = [self._verify(part.name)["stats"] for part in parts]
        stats = {
            split: {name: sum(part[split][name] for part in shard_stats) for name in shard_stats[0][split]}
            for split in SPLITS
        }
        for split, num_own in zip(("validation", "test"), self.settings["held_out"][1:], strict=True):
            if num_own and not stats[split]["tokens"]:
                raise NextwordError(f"there is no text in what --{split} names")
        if not all(stats[split]["tokens"] for split in ("train", "validation")):
            raise NextwordError("there is too little text to hold some of it out for validation; add more")
        lost, size = (sum(split_stats[name] for split_stats in stats.values()) for name in ("unknown", "bytes"))
        if lost == size or (lost and self.issues.strict and self.tokenizer is not None):
            raise NextwordError(lost_text_message(lost, size))
        forms = [form for form in ("NFC", "NFD") if not any(part[f"not_{form.lower()}"] for part in stats.values())]
        tokenizer.config |= {FORM_KEY: forms[0]} if len(forms) == 1 and self.tokenizer is None else {}
        tokenizer.save(directory)
        if len(parts) == 1:  # moved, not copied: the disk may not have room for both
            for path in parts[0].iterdir():
                if path.name != fs.MANIFEST:
                    path.rename(directory / path.name)
        else:
            concatenate_shards(parts, tokenizer.vocab_size, directory)
        issues = IssueLog()
        issues.merge(fs.read_manifest(self.work_dir / "scan")["issues"])
        if issues.issues:
            lines = [json.dumps(asdict(issue), ensure_ascii=False) + "\n" for issue in issues.issues]
            fs.atomic_write(directory / "problems.jsonl", "".join(lines))
        manifest = {
            "kind": "corpus",
            "version": FORMAT_VERSION,
            "settings": self.settings,
            "documents": scan.unique,
            "duplicates": scan.duplicates,
            **stats,
            "vocab_size": tokenizer.vocab_size,
            "problems": {"total": issues.total, "kinds": dict(issues.counts_by_kind)},
            "sources": scan.sources,
            "held_out": asdict(scan.held_out),
        }
        fs.write_manifest(directory, manifest)


def partition_by_size(sizes: list[int], num_parts: int) -> list[int]:
    """Divide a sequence of files into parts of about the same number of bytes.

    Returns:
        The index of the first file of each part, and the number of files.
    """
    total, before, bounds = sum(sizes) + len(sizes), 0, [0]
    for i, size in enumerate(sizes):
        part = (2 * before + size + 1) * num_parts // (2 * total)  # where the middle of the file falls
        bounds += [i] * (part + 1 - len(bounds))
        before += size + 1
    return bounds + [len(sizes)] * (num_parts + 1 - len(bounds))


# ---------------------------------------------------------------- Ray


def prepare_on_ray(corpora: list[str], out: Path, settings: dict[str, Any], console: Console) -> Corpus:
    """Prepare a corpus on a Ray cluster, in a shard for each CPU.

    The cluster is the one at RAY_ADDRESS, or one that is started on this machine. All of its nodes see the same files
    at the same paths. A task that is lost is started again, at most three times.

    Args:
        corpora: paths, and names of built-in datasets.
        out: the directory of the corpus.
        settings: the other arguments of `prepare`.
        console: where messages and progress are printed.

    Raises:
        MissingDependencyError: Ray is not installed.
        NextwordError: a task has failed; with the exit code of its error.
    """
    ray = import_optional("ray", "--engine ray", "ray")
    started_ray = not ray.is_initialized()
    if started_ray:
        ray.init(log_to_driver=False, logging_level="error")
    try:
        count = max(1, min(MAX_SHARDS, int(ray.cluster_resources().get("CPU", 1))))
        task = ray.remote(num_cpus=1, max_retries=3)(_prepare_shard)
        pending = [task.remote(corpora, str(out), f"{number}/{count}", settings) for number in range(1, count + 1)]
        while pending:
            console.progress("preparing", count - len(pending), count)
            done, pending = ray.wait(pending, timeout=1.0)
            for message, exit_code in filter(None, ray.get(done)):
                error = NextwordError(message)
                error.exit_code = exit_code
                raise error
    except ray.exceptions.RayError as error:
        raise NextwordError(f"--engine ray: {str(error).strip().splitlines()[-1]}") from error
    finally:
        if started_ray:
            ray.shutdown()
    console.close()
    return prepare(corpora, out, **settings, log=console.info)  # the corpus is complete, and is opened


def _prepare_shard(corpora: list[str], out: str, shard: str, settings: dict[str, Any]) -> tuple[str, int] | None:
    """The task of each process. Returns the message and exit code of an error: not every exception can be pickled."""
    try:
        prepare(corpora, Path(out), shard=shard, **settings)
    except NextwordError as error:
        return str(error), error.exit_code
    return None
