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
from nextword.common.run_dir import RunFolder

SECONDS = 60.0  # from one copy to the next
REST = 10.0  # and at least so many times what a copy takes
KEPT = 2  # commits
LOGS = ("metrics.jsonl", "decisions.jsonl", "detours.jsonl")
RESULTS = ("result.json", "report.html", "README.md")


class Mirror:
    """The place, as the process sees it that leads the run.

    Raises:
        UsageError: no such kind of storage, or the package for it is not installed.
    """

    def __init__(self, place: str, console: Console):
        from fsspec.core import url_to_fs

        self.place, self.console = place, console
        try:
            self.fs, self.root = url_to_fs(place)
        except (ImportError, ValueError) as error:
            raise UsageError(f"--mirror {place}: {error}") from error
        self.threads = ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self.work: Future[None] | None = None
        self.copied: Path | None = None  # the checkpoint that was copied last, or is being copied
        self.begun, self.pause = -float("inf"), SECONDS
        self.trouble: str | None = None  # what went wrong with the last copy

    # ------------------------------------------------------------ there

    def offer(self, run: RunFolder, checkpoint: Path | None, urgent: bool = False) -> None:
        """Copy a checkpoint and what belongs to it, unless that was done, the one before is under way or was just made; with
        `urgent` return when it is there."""
        now = time.monotonic()
        idle = self.work is None or self.work.done()
        if checkpoint is not None and (
            urgent or (idle and checkpoint != self.copied and now >= self.begun + self.pause)
        ):
            if self.work is not None:
                self.work.result()
            self.begun, self.copied = now, checkpoint
            self.work = self.threads.submit(self._copy, run, hold(run, checkpoint))
        if urgent and self.work is not None:
            self.work.result()

    def close(self, run: RunFolder) -> None:
        """Copy what a finished run has besides. Raises `NextwordError` where the place does not have all of the run then."""
        self.offer(run, max((run.path / "checkpoints").glob("step-*"), default=None), urgent=True)
        if self.trouble is not None:
            raise NextwordError(
                f"{run.path}: the run is finished and whole, and {self.place} has no copy of its end: {self.trouble}"
            )

    def _copy(self, run: RunFolder, held: Path) -> None:
        """In the thread: everything, then the commit, then what no commit names is removed."""
        begin = time.monotonic()
        try:
            step = next((held / "checkpoints").iterdir()).name
            commit: dict[str, Any] = {"checkpoint": step, "run": fs.sha256(held / "run.json"), "folders": {}}
            self._put(held / "run.json", "run.json")
            if (run.data / fs.MANIFEST).is_file():
                commit["folders"]["data"] = self._put_folder(run.data, "data")
            commit["folders"][f"checkpoints/{step}"] = self._put_folder(
                held / "checkpoints" / step, f"checkpoints/{step}"
            )
            for name in ("model", "adapter"):
                if (held / name / fs.MANIFEST).is_file():
                    there = f"models/{fs.sha256(held / name / fs.MANIFEST)[:16]}"
                    commit["folders"][name] = self._put_folder(held / name, there)
            logs = [path for path in sorted(held.iterdir()) if path.name in (*LOGS, *RESULTS)]
            for path in logs:
                self._put(path, f"logs/{step}/{path.name}")
            commit["logs"] = [path.name for path in logs]
            text = json.dumps(commit)
            sealed = {"commit": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
            self._parent(f"commits/{step}.json")
            self.fs.pipe_file(self._at(f"commits/{step}.json"), fs.to_json(sealed).encode())
            self._prune()
            self.trouble = None
        except Exception as error:  # each kind of storage has errors of its own; the run goes on, and it is tried again
            self.trouble = f"{type(error).__name__}: {error}"
            self.console.warn(f"no copy to {self.place} ({self.trouble}); the run goes on, and the next one is tried")
        finally:
            shutil.rmtree(held, ignore_errors=True)
            self.pause = max(SECONDS, REST * (time.monotonic() - begin))

    def _put_folder(self, folder: Path, there: str) -> str:
        """A sealed folder, its manifest last; nothing where it is there already. Where it is."""
        manifest = (folder / fs.MANIFEST).read_bytes()
        if self._read(f"{there}/{fs.MANIFEST}") != manifest:
            paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != fs.MANIFEST]
            for path in [*paths, folder / fs.MANIFEST]:
                self._put(path, f"{there}/{path.relative_to(folder).as_posix()}")
        return there

    def _put(self, path: Path, there: str) -> None:
        self._parent(there)
        self.fs.put_file(str(path), self._at(there))

    def _parent(self, there: str) -> None:
        self.fs.makedirs(self._at(there).rpartition("/")[0], exist_ok=True)

    def _at(self, there: str) -> str:
        return f"{self.root.rstrip('/')}/{there}"

    def _prune(self) -> None:
        """Remove older commits, and then what none of the others names."""
        commits = self._commits()
        for name, _ in commits[KEPT:]:
            self.fs.rm_file(self._at(name))
        named = {there for _, commit in commits[:KEPT] for there in commit["folders"].values()}
        named |= {f"logs/{commit['checkpoint']}" for _, commit in commits[:KEPT]}
        for kind in ("checkpoints", "models", "logs"):
            for path in self._files(kind):
                if "/".join(path.split("/")[:2]) not in named:
                    self.fs.rm_file(self._at(path))

    # ------------------------------------------------------------ and back

    def bring(self, out: Path, resume: bool) -> None:
        """Before a run begins or goes on: bring it here where it is there alone.

        Raises:
            UsageError: the place has another run, or one that is further, or one that `resume` was not said for.
            NextwordError: the place cannot be read, or what it has is damaged.
        """
        if "file" in self.fs.protocol and fs.is_inside(Path(self.root), out):
            raise UsageError(f"--mirror {self.place}: is in the run folder itself. Choose a place elsewhere")
        try:
            commits = self._commits()
            if not commits:
                return
            run, commit = RunFolder(out), commits[0][1]
            if run.begun:
                self._refuse_other(run, commit)
            elif not resume:
                raise UsageError(
                    f"--mirror {self.place}: holds a run already. Go on with it by --resume, or choose another place"
                )
            elif not out.exists() or not any(out.iterdir()):
                self._fetch_newest(commits, out)
        except (OSError, ValueError) as error:
            raise NextwordError(f"--mirror {self.place}: cannot be read: {error}") from error

    def _refuse_other(self, run: RunFolder, commit: dict[str, Any]) -> None:
        if commit["run"] != fs.sha256(run.path / "run.json"):
            raise UsageError(f"--mirror {self.place}: holds another run than {run.path}. Choose another place")
        here = max((path.name for path in (run.path / "checkpoints").glob("step-*")), default="")
        if commit["checkpoint"] > here:
            raise UsageError(
                f"--mirror {self.place}: is further ({commit['checkpoint']}) than {run.path} ({here or 'no checkpoint'}): move "
                "that folder away, and the same command goes on from there"
            )

    def _fetch_newest(self, commits: list[tuple[str, dict[str, Any]]], out: Path) -> None:
        """Bring the newest commit that is whole, in one move."""
        aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
        damage = ""
        for name, commit in commits:
            shutil.rmtree(aside, ignore_errors=True)
            with fs.writing(out):
                self._fetch(commit, aside)
            try:
                fs.verify(aside)
            except NextwordError as error:
                damage = str(error).replace(str(aside), self.place)
                self.console.warn(f"{self.place}: {name} is damaged and passed over:\n{damage}")
                continue
            if out.exists():
                out.rmdir()
            aside.rename(out)
            self.console.say(f"{out}: brought from {self.place}, as it was at {commit['checkpoint']}")
            return
        shutil.rmtree(aside, ignore_errors=True)
        raise NextwordError(f"--mirror {self.place}: every copy is damaged:\n{damage}")

    def _fetch(self, commit: dict[str, Any], aside: Path) -> None:
        wanted = [("run.json", "run.json")]
        for here, there in commit["folders"].items():
            wanted += [(path, here + path.removeprefix(there)) for path in self._files(there)]
        wanted += [(f"logs/{commit['checkpoint']}/{name}", name) for name in commit["logs"]]
        for number, (there, here) in enumerate(wanted, start=1):
            path = aside / here
            if not fs.is_inside(path, aside):
                raise NextwordError(f"--mirror {self.place}: names a file outside of the run folder: {here}")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.fs.get_file(self._at(there), str(path))
            self.console.progress("bringing the run", number, len(wanted))
        self.console.close()
        (aside / "checkpoints" / "latest").write_text(commit["checkpoint"] + "\n")

    def _commits(self) -> list[tuple[str, dict[str, Any]]]:
        """Every whole commit by its name, the newest first."""
        found = []
        for name in sorted(self._files("commits"), reverse=True):
            try:
                sealed = json.loads(self._read(name) or b"")
                if hashlib.sha256(sealed["commit"].encode()).hexdigest() == sealed["sha256"]:
                    found.append((name, json.loads(sealed["commit"])))
            except (ValueError, KeyError, TypeError, AttributeError):  # cut short by a kill: never committed
                continue
        return found

    def _files(self, there: str) -> Iterator[str]:
        """Every file below a folder of the place, by its path from the root of it."""
        for path in self.fs.find(self._at(there)):
            yield str(path)[len(self.root.rstrip("/")) + 1 :]

    def _read(self, there: str) -> bytes | None:
        """A small file's bytes, None where it is not there."""
        try:
            return self.fs.cat_file(self._at(there))
        except FileNotFoundError:
            return None


def hold(run: RunFolder, checkpoint: Path) -> Path:
    """A folder of the run's present state that stays as it is: links to what is never changed, copies of what grows."""
    held = run.path / ".mirror"
    shutil.rmtree(held, ignore_errors=True)
    with fs.writing(held):
        shutil.copytree(checkpoint, held / "checkpoints" / checkpoint.name, copy_function=link)
        for folder in (run.model, run.adapter):
            if folder.is_dir():
                shutil.copytree(folder, held / folder.name, copy_function=link)
        for name in ("run.json", *LOGS, *RESULTS):
            if (run.path / name).is_file():
                shutil.copy(run.path / name, held / name)
    return held


def link(source: str, target: str) -> None:
    """A second name of a file; a copy where the system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
