"""Copies of a run in remote storage: a directory as the storage, and storage that fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

import nextword as package
from nextword.common.console import Console
from nextword.common.errors import NextwordError, UsageError
from nextword.common.run_dir import RunInterruptedError
from nextword.training import remote_sync
from processes import PATIENCE, start_process, wait_until
from runs import InterruptingConsole, state_hashes, steps_of
from test_pretraining import SETTINGS

STEPS = 60
OPTIONS = {**SETTINGS, "training": {**SETTINGS["training"], "save_every": 10}, "steps": STEPS, "vocab_size": 400}
LAST = f"step-{STEPS:08d}"


@pytest.fixture(autouse=True)
def upload_at_once(monkeypatch):
    """Upload each checkpoint once the upload before it is done."""
    monkeypatch.setattr(remote_sync, "UPLOAD_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(remote_sync, "MIN_INTERVAL_RATIO", 0.0)


@pytest.fixture(scope="module")
def local_run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "local"
    package.pretrain(texts, run, **OPTIONS)
    return run


@pytest.fixture(scope="module")
def mirrored(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run with its copy, in run and remote."""
    folder = tmp_path_factory.mktemp("mirrored")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("UPLOAD_INTERVAL_SECONDS", "MIN_INTERVAL_RATIO"):
            patch.setattr(remote_sync, name, 0.0)
        pretrain(texts, folder / "run", folder / "remote")
    return folder


@pytest.fixture
def remote(mirrored: Path, tmp_path: Path) -> Path:
    """The copy of a complete run, which lies beside it."""
    shutil.copytree(mirrored, tmp_path, dirs_exist_ok=True)
    return tmp_path / "remote"


def pretrain(texts: Path, run: Path, url: Path | str, **options: Any) -> Any:
    return package.pretrain(texts, run, mirror=str(url), **{**OPTIONS, **options})


def commits(remote: Path) -> list[dict[str, Any]]:
    return [json.loads(json.loads(path.read_text())["commit"]) for path in sorted((remote / "commits").iterdir())]


# ---------------------------------------------------------------- upload and restore


@pytest.mark.skipif(os.name == "nt", reason="this system has no SIGTERM to catch")
def test_a_stopped_run_continues_from_remote_storage(texts, local_run, tmp_path, monkeypatch):
    """Its run directory is removed, the prepared corpus included. The state when it was stopped is in the storage."""
    run, remote = tmp_path / "run", tmp_path / "remote"
    with pytest.raises(RunInterruptedError):
        pretrain(texts, run, remote, console=InterruptingConsole(27, signal.SIGTERM))
    assert commits(remote)[-1]["checkpoint"] == "step-00000027"
    shutil.rmtree(run)
    assert pretrain(texts, run, remote, resume=True).steps == STEPS
    assert state_hashes(run) == state_hashes(local_run)


@pytest.mark.skipif(os.name == "nt", reason="this system has no SIGKILL")
def test_a_killed_run_continues_from_remote_storage(texts, local_run, tmp_path):
    run, remote = tmp_path / "run", tmp_path / "remote"
    code = "import sys, json; from nextword import pretrain; from nextword.training import remote_sync\n"
    code += "remote_sync.UPLOAD_INTERVAL_SECONDS = remote_sync.MIN_INTERVAL_RATIO = 0\n"
    code += "pretrain(sys.argv[1], sys.argv[2], mirror=sys.argv[3], **json.loads(sys.argv[4]))"
    arguments = [str(texts), str(run), str(remote), json.dumps(OPTIONS)]
    process = start_process([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE)
    wait_until(lambda: (remote / "commits").is_dir() and steps_of(run) >= 25, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and steps_of(run) < STEPS
    shutil.rmtree(run)
    assert pretrain(texts, run, remote, resume=True).steps == STEPS
    assert state_hashes(run) == state_hashes(local_run)


def test_a_complete_run_is_restored(texts, local_run, tmp_path, remote):
    run, restored = tmp_path / "run", tmp_path / "restored"
    assert pretrain(texts, restored, remote, resume=True).steps == STEPS
    assert state_hashes(restored) == state_hashes(local_run)
    assert (restored / "report.html").read_bytes() == (run / "report.html").read_bytes()
    assert package.verify(restored)
    assert not list(tmp_path.glob(".*.partial")) and not (run / ".mirror").exists()


def test_files_that_no_commit_names_are_removed(remote):
    def filled(name: str) -> set[str]:
        return {path.name for path in (remote / name).iterdir() if any(path.iterdir())}

    remaining = commits(remote)
    assert len(remaining) <= remote_sync.MAX_COMMITS
    assert filled("checkpoints") == filled("logs") == {commit["checkpoint"] for commit in remaining}
    assert {f"models/{name}" for name in filled("models")} == {commit["folders"]["model"] for commit in remaining}


# ---------------------------------------------------------------- what is refused


def test_other_runs_and_bad_urls_are_refused(texts, tmp_path, remote):
    new, other = tmp_path / "new", tmp_path / "other"
    with pytest.raises(UsageError, match="already holds a run"):
        pretrain(texts, new, remote)
    package.pretrain(texts, other, **{**OPTIONS, "steps": 10})
    with pytest.raises(UsageError, match="holds another run"):
        pretrain(texts, other, remote, resume=True, steps=10)
    with pytest.raises(UsageError, match="inside the run directory"):
        pretrain(texts, new, new / "remote")
    with pytest.raises(UsageError, match="nowhere"):
        pretrain(texts, new, "nowhere://bucket/run")
    assert not new.exists()


def test_a_later_remote_state_is_not_overwritten(texts, tmp_path, remote):
    run = tmp_path / "run"
    (run / "result.json").unlink()
    for path in (run / "checkpoints").glob("step-*"):
        path.rename(path.with_name("step-00000001"))
        break
    shutil.rmtree(run / "checkpoints" / LAST, ignore_errors=True)
    with pytest.raises(UsageError, match=f"holds a later state .{LAST}"):
        pretrain(texts, run, remote, resume=True)


def test_the_commit_before_a_corrupt_one_is_restored(texts, local_run, tmp_path, remote, capfd):
    run = tmp_path / "restored"
    before, last = commits(remote)
    weights = remote / "checkpoints" / last["checkpoint"] / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    pretrain(texts, run, remote, resume=True)
    assert f"{last['checkpoint']}.json is corrupt and skipped" in capfd.readouterr().err
    assert state_hashes(run) == state_hashes(local_run)
    for path in remote.glob("checkpoints/*/optimizer.safetensors"):
        path.unlink()
    with pytest.raises(NextwordError, match=r"every copy is corrupt:[\s\S]*optimizer.safetensors: missing"):
        pretrain(texts, tmp_path / "third", remote, resume=True)
    assert not (tmp_path / "third").exists()
    newest = sorted((remote / "commits").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-20])
    uploader = remote_sync.CheckpointUploader(str(remote), Console(quiet=True))
    assert uploader.list_commits()[0].checkpoint == before["checkpoint"], "an interrupted commit does not count"


# ---------------------------------------------------------------- storage that fails


class FailingFileSystem(LocalFileSystem):
    """A directory whose first writes fail."""

    protocol = "failing"
    failures = 0

    def put_file(self, *arguments: Any, **options: Any) -> None:
        if FailingFileSystem.failures > 0:
            FailingFileSystem.failures -= 1
            raise ConnectionError("storage unreachable")
        super().put_file(*arguments, **options)


fsspec.register_implementation("failing", FailingFileSystem, clobber=True)


def test_training_continues_while_uploads_fail(texts, local_run, tmp_path, capfd):
    FailingFileSystem.failures = 3
    pretrain(texts, tmp_path / "run", f"failing://{tmp_path}/remote")
    assert "storage unreachable" in capfd.readouterr().err
    assert state_hashes(tmp_path / "run") == state_hashes(local_run)
    assert commits(tmp_path / "remote")[-1]["checkpoint"] == LAST


def test_a_failed_last_upload_is_an_error(texts, local_run, tmp_path):
    run, url = tmp_path / "run", f"failing://{tmp_path}/remote"
    FailingFileSystem.failures = 10**6
    with pytest.raises(NextwordError, match=r"complete, but .* not be uploaded to failing://.*storage unreachable"):
        pretrain(texts, run, url)
    assert state_hashes(run) == state_hashes(local_run)
    FailingFileSystem.failures = 0
    pretrain(texts, run, url, resume=True)
    assert commits(tmp_path / "remote")[-1]["checkpoint"] == LAST
