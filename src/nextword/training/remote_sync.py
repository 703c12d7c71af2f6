"""A second place for a run, beyond its machine: whatever fsspec opens (s3://…, gs://…, sftp://…, or a folder elsewhere).

What a resume needs is copied there from time to time, while the steps go on; where the run folder is gone, it is brought back.
PLACE/commits/step-….json names what belongs together, and is written last: a kill at any moment leaves the one before.

    run.json · data/ (where the run prepared its text) · checkpoints/step-… · models/… (by what is in them) · logs/step-…
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nextword.common import fs
from nextword.common.console import Console
from nextword.common.errors import NextwordError, UsageError
from nextword.common.run_dir import RunDir

UPLOAD_INTERVAL_SECONDS = 60.0  # from one copy to the next
MIN_INTERVAL_RATIO = 10.0  # and at least so many times what a copy takes
KEPT_COMMITS = 2  # commits
LOG_FILES = ("metrics.jsonl", "decisions.jsonl", "detours.jsonl")
RESULT_FILES = ("result.json", "report.html", "README.md")


class CheckpointUploader:
    """The place, as the process sees it that leads the run.

    Raises:
        UsageError: no such kind of storage, or the package for it is not installed.
    """

    def __init__(self, url: str, console: Console):
        from fsspec.core import url_to_fs

        self.url, self.console = url, console
        try:
            self.fs, self.root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"--mirror {url}: {error}") from error
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self.pending_upload: Future[None] | None = None
        self.last_uploaded: Path | None = None  # the checkpoint that was copied last, or is being copied
        self.last_upload_start, self.upload_interval = -float("inf"), UPLOAD_INTERVAL_SECONDS
        self.last_error: str | None = None  # what went wrong with the last copy

    # ------------------------------------------------------------ there

    def maybe_upload(self, run_dir: RunDir, checkpoint: Path | None, force: bool = False) -> None:
        """Copy a checkpoint and what belongs to it, unless that was done, the one before is under way or was just made; with
        `urgent` return when it is there."""
        now = time.monotonic()
        is_idle = self.pending_upload is None or self.pending_upload.done()
        if checkpoint is not None and (
            force
            or (is_idle and checkpoint != self.last_uploaded and now >= self.last_upload_start + self.upload_interval)
        ):
            if self.pending_upload is not None:
                self.pending_upload.result()
            self.last_upload_start, self.last_uploaded = now, checkpoint
            self.pending_upload = self.executor.submit(self._upload, run_dir, snapshot(run_dir, checkpoint))
        if force and self.pending_upload is not None:
            self.pending_upload.result()

    def upload_final(self, run_dir: RunDir) -> None:
        """Copy what a finished run has besides. Raises `NextwordError` where the place does not have all of the run then."""
        self.maybe_upload(run_dir, max((run_dir.path / "checkpoints").glob("step-*"), default=None), force=True)
        if self.last_error is not None:
            raise NextwordError(
                f"{run_dir.path}: the run is finished and whole, and {self.url} has no copy of its end: {self.last_error}"
            )

    def _upload(self, run_dir: RunDir, snapshot_dir: Path) -> None:
        """In the thread: everything, then the commit, then what no commit names is removed."""
        upload_start = time.monotonic()
        try:
            step = next((snapshot_dir / "checkpoints").iterdir()).name
            commit: dict[str, Any] = {
                "checkpoint": step,
                "run": fs.sha256_file(snapshot_dir / "run.json"),
                "folders": {},
            }
            self._upload_file(snapshot_dir / "run.json", "run.json")
            if (run_dir.data_dir / fs.MANIFEST).is_file():
                commit["folders"]["data"] = self._upload_dir(run_dir.data_dir, "data")
            commit["folders"][f"checkpoints/{step}"] = self._upload_dir(
                snapshot_dir / "checkpoints" / step, f"checkpoints/{step}"
            )
            for name in ("model", "adapter"):
                if (snapshot_dir / name / fs.MANIFEST).is_file():
                    remote_path = f"models/{fs.sha256_file(snapshot_dir / name / fs.MANIFEST)[:16]}"
                    commit["folders"][name] = self._upload_dir(snapshot_dir / name, remote_path)
            logs = [path for path in sorted(snapshot_dir.iterdir()) if path.name in (*LOG_FILES, *RESULT_FILES)]
            for path in logs:
                self._upload_file(path, f"logs/{step}/{path.name}")
            commit["logs"] = [path.name for path in logs]
            text = json.dumps(commit)
            signed_commit = {"commit": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
            self._make_parent_dir(f"commits/{step}.json")
            self.fs.pipe_file(self._absolute_path(f"commits/{step}.json"), fs.to_json(signed_commit).encode())
            self._prune_old_commits()
            self.last_error = None
        except Exception as error:  # each kind of storage has errors of its own; the run goes on, and it is tried again
            self.last_error = f"{type(error).__name__}: {error}"
            self.console.warn(f"no copy to {self.url} ({self.last_error}); the run goes on, and the next one is tried")
        finally:
            shutil.rmtree(snapshot_dir, ignore_errors=True)
            self.upload_interval = max(UPLOAD_INTERVAL_SECONDS, MIN_INTERVAL_RATIO * (time.monotonic() - upload_start))

    def _upload_dir(self, directory: Path, remote_path: str) -> str:
        """A sealed folder, its manifest last; nothing where it is there already. Where it is."""
        manifest = (directory / fs.MANIFEST).read_bytes()
        if self._read_bytes(f"{remote_path}/{fs.MANIFEST}") != manifest:
            paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != fs.MANIFEST]
            for path in [*paths, directory / fs.MANIFEST]:
                self._upload_file(path, f"{remote_path}/{path.relative_to(directory).as_posix()}")
        return remote_path

    def _upload_file(self, path: Path, remote_path: str) -> None:
        self._make_parent_dir(remote_path)
        self.fs.put_file(str(path), self._absolute_path(remote_path))

    def _make_parent_dir(self, remote_path: str) -> None:
        self.fs.makedirs(self._absolute_path(remote_path).rpartition("/")[0], exist_ok=True)

    def _absolute_path(self, remote_path: str) -> str:
        return f"{self.root.rstrip('/')}/{remote_path}"

    def _prune_old_commits(self) -> None:
        """Remove older commits, and then what none of the others names."""
        commits = self._list_commits()
        for name, _ in commits[KEPT_COMMITS:]:
            self.fs.rm_file(self._absolute_path(name))
        referenced_paths = {there for _, commit in commits[:KEPT_COMMITS] for there in commit["folders"].values()}
        referenced_paths |= {f"logs/{commit['checkpoint']}" for _, commit in commits[:KEPT_COMMITS]}
        for kind in ("checkpoints", "models", "logs"):
            for path in self._list_files(kind):
                if "/".join(path.split("/")[:2]) not in referenced_paths:
                    self.fs.rm_file(self._absolute_path(path))

    # ------------------------------------------------------------ and back

    def restore(self, run_path: Path, resume: bool) -> None:
        """Before a run begins or goes on: bring it here where it is there alone.

        Raises:
            UsageError: the place has another run, or one that is further, or one that `resume` was not said for.
            NextwordError: the place cannot be read, or what it has is damaged.
        """
        if "file" in self.fs.protocol and fs.is_inside(Path(self.root), run_path):
            raise UsageError(f"--mirror {self.url}: is in the run folder itself. Choose a place elsewhere")
        try:
            commits = self._list_commits()
            if not commits:
                return
            run_dir, commit = RunDir(run_path), commits[0][1]
            if run_dir.exists:
                self._check_same_run(run_dir, commit)
            elif not resume:
                raise UsageError(
                    f"--mirror {self.url}: holds a run already. Go on with it by --resume, or choose another place"
                )
            elif not run_path.exists() or not any(run_path.iterdir()):
                self._restore_newest(commits, run_path)
        except (OSError, ValueError) as error:
            raise NextwordError(f"--mirror {self.url}: cannot be read: {error}") from error

    def _check_same_run(self, run_dir: RunDir, commit: dict[str, Any]) -> None:
        if commit["run"] != fs.sha256_file(run_dir.path / "run.json"):
            raise UsageError(f"--mirror {self.url}: holds another run than {run_dir.path}. Choose another place")
        local_checkpoint = max((path.name for path in (run_dir.path / "checkpoints").glob("step-*")), default="")
        if commit["checkpoint"] > local_checkpoint:
            raise UsageError(
                f"--mirror {self.url}: is further ({commit['checkpoint']}) than {run_dir.path} ({local_checkpoint or 'no checkpoint'}): move "
                "that folder away, and the same command goes on from there"
            )

    def _restore_newest(self, commits: list[tuple[str, dict[str, Any]]], run_path: Path) -> None:
        """Bring the newest commit that is whole, in one move."""
        staging_dir = run_path.with_name(f".{run_path.name}.{os.getpid()}.partial")
        integrity_error = ""
        for name, commit in commits:
            shutil.rmtree(staging_dir, ignore_errors=True)
            with fs.map_disk_errors(run_path):
                self._download(commit, staging_dir)
            try:
                fs.verify_tree(staging_dir)
            except NextwordError as error:
                integrity_error = str(error).replace(str(staging_dir), self.url)
                self.console.warn(f"{self.url}: {name} is damaged and passed over:\n{integrity_error}")
                continue
            if run_path.exists():
                run_path.rmdir()
            staging_dir.rename(run_path)
            self.console.info(f"{run_path}: brought from {self.url}, as it was at {commit['checkpoint']}")
            return
        shutil.rmtree(staging_dir, ignore_errors=True)
        raise NextwordError(f"--mirror {self.url}: every copy is damaged:\n{integrity_error}")

    def _download(self, commit: dict[str, Any], staging_dir: Path) -> None:
        downloads = [("run.json", "run.json")]
        for local_name, remote_path in commit["folders"].items():
            downloads += [(path, local_name + path.removeprefix(remote_path)) for path in self._list_files(remote_path)]
        downloads += [(f"logs/{commit['checkpoint']}/{name}", name) for name in commit["logs"]]
        for number, (remote_path, local_name) in enumerate(downloads, start=1):
            path = staging_dir / local_name
            if not fs.is_inside(path, staging_dir):
                raise NextwordError(f"--mirror {self.url}: names a file outside of the run folder: {local_name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.fs.get_file(self._absolute_path(remote_path), str(path))
            self.console.progress("bringing the run", number, len(downloads))
        self.console.close()
        (staging_dir / "checkpoints" / "latest").write_text(commit["checkpoint"] + "\n")

    def _list_commits(self) -> list[tuple[str, dict[str, Any]]]:
        """Every whole commit by its name, the newest first."""
        commits = []
        for name in sorted(self._list_files("commits"), reverse=True):
            try:
                sealed = json.loads(self._read_bytes(name) or b"")
                if hashlib.sha256(sealed["commit"].encode()).hexdigest() == sealed["sha256"]:
                    commits.append((name, json.loads(sealed["commit"])))
            except (ValueError, KeyError, TypeError, AttributeError):  # cut short by a kill: never committed
                continue
        return commits

    def _list_files(self, remote_path: str) -> Iterator[str]:
        """Every file below a folder of the place, by its path from the root of it."""
        for path in self.fs.find(self._absolute_path(remote_path)):
            yield str(path)[len(self.root.rstrip("/")) + 1 :]

    def _read_bytes(self, remote_path: str) -> bytes | None:
        """A small file's bytes, None where it is not there."""
        try:
            return self.fs.cat_file(self._absolute_path(remote_path))
        except FileNotFoundError:
            return None


def snapshot(run_dir: RunDir, checkpoint: Path) -> Path:
    """A folder of the run's present state that stays as it is: links to what is never changed, copies of what grows."""
    snapshot_dir = run_dir.path / ".mirror"
    shutil.rmtree(snapshot_dir, ignore_errors=True)
    with fs.map_disk_errors(snapshot_dir):
        shutil.copytree(checkpoint, snapshot_dir / "checkpoints" / checkpoint.name, copy_function=hardlink_or_copy)
        for folder in (run_dir.model_dir, run_dir.adapter_dir):
            if folder.is_dir():
                shutil.copytree(folder, snapshot_dir / folder.name, copy_function=hardlink_or_copy)
        for name in ("run.json", *LOG_FILES, *RESULT_FILES):
            if (run_dir.path / name).is_file():
                shutil.copy(run_dir.path / name, snapshot_dir / name)
    return snapshot_dir


def hardlink_or_copy(source: str, target: str) -> None:
    """A second name of a file; a copy where the system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
