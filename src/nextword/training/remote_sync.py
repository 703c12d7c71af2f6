"""Copies of a run in remote storage: whatever fsspec opens (s3://…, gs://…, sftp://…, a local directory).

What a resume needs is uploaded while training continues, and downloaded if the run directory is gone. A commit names the files
that belong together and is written last, so a process killed at any moment leaves the previous commit.

    URL/run.json
        data/                     the prepared corpus, if the run prepared it
        checkpoints/step-…/
        models/HASH/              named by their content
        logs/step-…/
        commits/step-….json
"""

import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec

from nextword.common import fs
from nextword.common.console import Console
from nextword.common.errors import NextwordError, UsageError
from nextword.common.run_dir import LOG_FILES, RunDir, verify_path

UPLOAD_INTERVAL_SECONDS = 60.0
MIN_INTERVAL_RATIO = 10.0  # minimum interval between uploads, in durations of an upload
MAX_COMMITS = 2
RESULT_FILES = ("result.json", "report.html", "README.md")


# Neither what is read nor what is written lies outside of the remote directory and the run.
LocalFolder = Annotated[str, msgspec.Meta(pattern=r"^(checkpoints/step-[0-9]+|data|model|adapter)\Z")]
RemoteFolder = Annotated[str, msgspec.Meta(pattern=r"^(checkpoints/step-[0-9]+|data|models/[0-9a-f]{16})\Z")]
LogFile = Annotated[str, msgspec.Meta(pattern=rf"^({'|'.join(map(re.escape, (*LOG_FILES, *RESULT_FILES)))})\Z")]


class Commit(msgspec.Struct):
    """A state of a run in remote storage.

    Attributes:
        checkpoint: Name of the checkpoint.
        run: The SHA-256 of run.json.
        folders: Remote directories by their place in the run directory.
        logs: Names of the logs and results.
    """

    checkpoint: Annotated[str, msgspec.Meta(pattern=r"^step-[0-9]+\Z")]
    run: str
    folders: dict[LocalFolder, RemoteFolder]
    logs: list[LogFile]


class _CommitFile(msgspec.Struct):
    commit: str
    sha256: str


class CheckpointUploader:
    """Uploads the checkpoints of a run in a thread. Used by the main rank.

    Args:
        url: The remote directory.
        console: Where failed uploads are reported.

    Raises:
        UsageError: unknown kind of storage, or its package is not installed.
    """

    def __init__(self, url: str, console: Console):
        from fsspec.core import url_to_fs  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]  (untyped)
        from fsspec.implementations.dirfs import DirFileSystem  # pyright: ignore[reportMissingTypeStubs]  (untyped)

        self.url, self.console = url, console
        try:
            filesystem, self.root = cast(tuple[Any, str], url_to_fs(url))
        except (ImportError, ValueError) as error:
            raise UsageError(f"--mirror {url}: {error}") from error
        self.is_local = "file" in filesystem.protocol
        self.filesystem: Any = DirFileSystem(self.root, filesystem)
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self.pending: Future[None] | None = None
        self.last_checkpoint: Path | None = None
        self.last_start, self.interval = -float("inf"), UPLOAD_INTERVAL_SECONDS
        self.last_error: str | None = None

    # ------------------------------------------------------------ upload

    def maybe_upload(self, run_dir: RunDir, checkpoint: Path | None, urgent: bool = False) -> None:
        """Start to upload a checkpoint and what belongs to it.

        Does nothing if that is done, if an upload is running, or if the last one has just started.

        Args:
            run_dir: The run.
            checkpoint: Its last checkpoint.
            urgent: Upload at once, and return when it is done.
        """
        is_due = (
            checkpoint != self.last_checkpoint
            and (self.pending is None or self.pending.done())
            and time.monotonic() >= self.last_start + self.interval
        )
        if self.pending is not None and urgent:
            self.pending.result()
        if checkpoint is not None and (urgent or is_due):
            self.last_start, self.last_checkpoint = time.monotonic(), checkpoint
            self.pending = self.executor.submit(self._upload, run_dir, snapshot(run_dir, checkpoint))
            if urgent:
                self.pending.result()

    def close(self, run_dir: RunDir) -> None:
        """Upload the rest of a complete run. Raises `NextwordError` if that fails."""
        self.maybe_upload(run_dir, max((run_dir.path / "checkpoints").glob("step-*"), default=None), urgent=True)
        if self.last_error is not None:
            raise NextwordError(
                f"{run_dir.path}: the run is complete, but its end could not be uploaded to {self.url}: {self.last_error}"
            )

    def _upload(self, run_dir: RunDir, snapshot_dir: Path) -> None:
        """In the thread: upload the files, then the commit, then remove what no commit names."""
        start = time.monotonic()
        try:
            checkpoint = next((snapshot_dir / "checkpoints").iterdir())
            logs = sorted(name for name in (*LOG_FILES, *RESULT_FILES) if (snapshot_dir / name).is_file())
            directories = {
                f"checkpoints/{checkpoint.name}": checkpoint,
                "data": run_dir.data_dir,
                "model": snapshot_dir / "model",
                "adapter": snapshot_dir / "adapter",
            }
            folders: dict[str, str] = {}
            self._upload_file(snapshot_dir / "run.json", "run.json")
            for name, directory in directories.items():
                manifest = directory / fs.MANIFEST
                if manifest.is_file():
                    is_model = name in ("model", "adapter")
                    folders[name] = f"models/{fs.sha256_file(manifest)[:16]}" if is_model else name
                    self._upload_dir(directory, folders[name])
            for name in logs:
                self._upload_file(snapshot_dir / name, f"logs/{checkpoint.name}/{name}")
            run_hash = fs.sha256_file(snapshot_dir / "run.json")
            commit = msgspec.json.encode(Commit(checkpoint.name, run_hash, folders, logs)).decode()
            record = snapshot_dir / "commit.json"
            record.write_text(fs.to_json({"commit": commit, "sha256": hashlib.sha256(commit.encode()).hexdigest()}))
            self._upload_file(record, commit_path(checkpoint.name))
            self._prune()
            self.last_error = None
        except Exception as error:  # each kind of storage has its own; training continues, and the next upload retries
            self.last_error = f"{type(error).__name__}: {error}"
            self.console.warn(f"upload to {self.url} failed ({self.last_error}); training continues and will retry")
        finally:
            shutil.rmtree(snapshot_dir, ignore_errors=True)
            self.interval = max(UPLOAD_INTERVAL_SECONDS, MIN_INTERVAL_RATIO * (time.monotonic() - start))

    def _upload_dir(self, directory: Path, remote_path: str) -> None:
        """Upload a directory, its manifest last, unless it is there already."""
        manifest = directory / fs.MANIFEST
        if self._read_bytes(f"{remote_path}/{fs.MANIFEST}") == manifest.read_bytes():
            return
        paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path != manifest]
        for path in [*paths, manifest]:
            self._upload_file(path, f"{remote_path}/{path.relative_to(directory).as_posix()}")

    def _upload_file(self, path: Path, remote_path: str) -> None:
        self.filesystem.makedirs(remote_path.rpartition("/")[0], exist_ok=True)
        self.filesystem.put_file(str(path), remote_path)

    def _prune(self) -> None:
        """Remove old commits, and the files that no remaining commit names."""
        commits, used = self.list_commits(), set[str]()
        for commit in commits[:MAX_COMMITS]:
            used |= {*commit.folders.values(), f"logs/{commit.checkpoint}"}
        for commit in commits[MAX_COMMITS:]:
            self.filesystem.rm_file(commit_path(commit.checkpoint))
        for kind in ("checkpoints", "models", "logs"):
            for path in self.filesystem.find(kind):
                if "/".join(path.split("/")[:2]) not in used:
                    self.filesystem.rm_file(path)

    # ------------------------------------------------------------ restore

    def restore(self, run_path: Path, resume: bool) -> None:
        """Before a run starts or resumes: download it if the run directory is missing.

        Raises:
            UsageError: the storage holds another run, a later state of this one, or a run while `resume` is false.
            NextwordError: the storage cannot be read, or all copies are corrupt.
        """
        if self.is_local and fs.is_inside(Path(self.root), run_path):
            raise UsageError(f"--mirror {self.url}: inside the run directory. Choose another place")
        try:
            commits = self.list_commits()
            if not commits:
                return
            run_dir = RunDir(run_path)
            if run_dir.exists:
                self._check_same_run(run_dir, commits[0])
            elif not resume:
                raise UsageError(
                    f"--mirror {self.url}: already holds a run. Continue it with --resume, or choose another place"
                )
            elif not run_path.exists() or not any(run_path.iterdir()):
                self._restore_newest(commits, run_path)
        except (OSError, ValueError) as error:  # storages raise either
            raise NextwordError(f"--mirror {self.url}: cannot be read: {error}") from error

    def _check_same_run(self, run_dir: RunDir, commit: Commit) -> None:
        with tempfile.TemporaryDirectory() as remote_run:
            self.filesystem.get_file("run.json", f"{remote_run}/run.json")
            is_same = RunDir(Path(remote_run)).identity() == run_dir.identity()
        if not is_same:
            raise UsageError(f"--mirror {self.url}: holds another run than {run_dir.path}. Choose another place")
        local = max((path.name for path in (run_dir.path / "checkpoints").glob("step-*")), default="")
        if commit.checkpoint > local:
            raise UsageError(
                f"--mirror {self.url}: holds a later state ({commit.checkpoint}) than {run_dir.path} "
                f"({local or 'no checkpoint'}). Move that directory away, and the same command continues from the copy"
            )

    def _restore_newest(self, commits: list[Commit], run_path: Path) -> None:
        """Download the newest valid commit, and move it into place at once."""
        staging_dir = run_path.with_name(f".{run_path.name}.{secrets.token_hex(4)}.partial")
        problems = ""
        for commit in commits:
            shutil.rmtree(staging_dir, ignore_errors=True)
            try:
                with fs.map_disk_errors(run_path):
                    self._download(commit, staging_dir)
                verify_path(staging_dir)
            except NextwordError as error:
                problems = str(error).replace(str(staging_dir), self.url)
                name = commit_path(commit.checkpoint)
                self.console.warn(f"{self.url}: {name} is corrupt and skipped:\n{problems}")
                continue
            if run_path.exists():
                run_path.rmdir()
            staging_dir.rename(run_path)
            self.console.info(f"{run_path}: restored from {self.url} at {commit.checkpoint}")
            return
        shutil.rmtree(staging_dir, ignore_errors=True)
        raise NextwordError(f"--mirror {self.url}: every copy is corrupt:\n{problems}")

    def _download(self, commit: Commit, staging_dir: Path) -> None:
        files = {"run.json": "run.json"}
        for name, remote_dir in commit.folders.items():
            files |= {path: name + path.removeprefix(remote_dir) for path in self.filesystem.find(remote_dir)}
        files |= {f"logs/{commit.checkpoint}/{name}": name for name in commit.logs}
        for number, (remote_path, name) in enumerate(files.items(), start=1):
            path = staging_dir / name
            if not fs.is_inside(path, staging_dir):
                raise NextwordError(f"--mirror {self.url}: names a file outside of the run directory: {name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.filesystem.get_file(remote_path, str(path))
            self.console.progress("restoring the run", number, len(files))
        self.console.close()
        (staging_dir / "checkpoints" / "latest").write_text(commit.checkpoint + "\n")

    def list_commits(self) -> list[Commit]:
        """Return the valid commits, newest first."""
        commits: list[Commit] = []
        for path in sorted(self.filesystem.find("commits"), reverse=True):
            try:
                record = msgspec.json.decode(self._read_bytes(path) or b"", type=_CommitFile)
                if hashlib.sha256(record.commit.encode()).hexdigest() != record.sha256:
                    raise ValueError("the content does not match its SHA-256")
                commits.append(msgspec.json.decode(record.commit, type=Commit))
            except (msgspec.DecodeError, ValueError) as error:  # an interrupted upload
                self.console.warn(f"{self.url}: {path} is skipped: {error}")
        return commits

    def _read_bytes(self, remote_path: str) -> bytes | None:
        """The content of a small file; None if it does not exist."""
        try:
            return self.filesystem.cat_file(remote_path)
        except FileNotFoundError:
            return None


def commit_path(checkpoint_name: str) -> str:
    """The remote path of the commit of a checkpoint."""
    return f"commits/{checkpoint_name}.json"


def snapshot(run_dir: RunDir, checkpoint: Path) -> Path:
    """Freeze the present state of a run in RUN/.mirror: links to files that never change, copies of those that grow."""
    snapshot_dir = run_dir.path / ".mirror"
    shutil.rmtree(snapshot_dir, ignore_errors=True)
    with fs.map_disk_errors(snapshot_dir):
        shutil.copytree(checkpoint, snapshot_dir / "checkpoints" / checkpoint.name, copy_function=hardlink_or_copy)
        for directory in (run_dir.model_dir, run_dir.adapter_dir):
            if directory.is_dir():
                shutil.copytree(directory, snapshot_dir / directory.name, copy_function=hardlink_or_copy)
        for name in ("run.json", *LOG_FILES, *RESULT_FILES):
            if (run_dir.path / name).is_file():
                shutil.copy(run_dir.path / name, snapshot_dir / name)
    return snapshot_dir


def hardlink_or_copy(source: str, target: str) -> None:
    """Create a hard link, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
