"""Damaged files of a run and of its remote copy: every command reports them, and none ends with another result in silence."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nextword as package
from nextword.common import fs
from nextword.common.console import Console
from nextword.common.errors import CorruptFileError, NextwordError, RunLockedError, UsageError
from nextword.common.run_dir import RunDir, run_lock, verify_path
from nextword.training.remote_sync import CheckpointUploader
from nextword.training.spike_recovery import SkippedRange
from nextword.training.step_budget import StepBudgetDecision, read_decisions
from processes import PATIENCE, start_process

SETTINGS: dict[str, Any] = {
    "model": {"n_layers": 1, "n_heads": 2, "d_model": 32, "context_length": 32},
    "training": {"batch_tokens": 256, "evaluations": 2, "save_every": 4},
}


@pytest.fixture(scope="module")
def whole_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run, with results of an evaluation."""
    run = tmp_path_factory.mktemp("whole") / "run"
    package.pretrain(shards, run, steps=8, **SETTINGS)
    package.evaluate(run, run / "README.md")
    return run


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


@contextmanager
def deadline() -> Iterator[None]:
    """Fail instead of waiting for ever, for example for the other end of a pipe."""

    def fail(*_: object) -> None:
        raise AssertionError("it does not end")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(int(PATIENCE))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def flip(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ (1 << bit % 8)]) + data[bit // 8 + 1 :]


def flip_value(path: Path) -> None:
    """Flip a bit of a value in the middle of a file. (One of white space or of a checksum's name would change nothing.)"""
    data = path.read_bytes()
    middle = re.compile(rb'(?<=": )\S').search(data, len(data) // 2)
    path.write_bytes(flip(data, 8 * (middle.start() if middle else len(data) // 2)))


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip_value,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "a list": lambda path: path.write_text("[]\n"),
    "a number": lambda path: path.write_text("7\n"),
    "another object": lambda path: path.write_text('{"step": "x", "commit": 5}\n'),
    "nested": lambda path: path.write_text("[" * 100_000 + "\n"),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "a directory": lambda path: replace(path, Path.mkdir),
    "a dangling link": lambda path: replace(path, lambda p: p.symlink_to("nowhere")),
    "a loop of links": lambda path: replace(path, lambda p: p.symlink_to(p.name)),
    "a pipe": lambda path: replace(path, os.mkfifo),
}
ORDINARY_DAMAGES = ("flipped", "a list", "a pipe")
SMALL_FILES = (
    "run.json",
    "result.json",
    "metrics.jsonl",
    "measured/evaluation.json",
    "checkpoints/latest",
    "checkpoints/step-00000008/nextword.json",
    "model/nextword.json",
)


@pytest.mark.skipif(os.name == "nt", reason="this system has no pipes in directories")
@pytest.mark.parametrize(
    "damage",
    [d if d in ORDINARY_DAMAGES else pytest.param(d, marks=pytest.mark.needs("more time")) for d in DAMAGES],
)
def test_every_damaged_file_is_found_and_no_command_ends_with_a_traceback(
    whole_run: Path, tmp_path: Path, damage: str
) -> None:
    expected = package.evaluate(whole_run).loss
    for name in SMALL_FILES:
        run = Path(shutil.copytree(whole_run, tmp_path / "run", symlinks=True))
        DAMAGES[damage](run / name)
        with deadline():
            with pytest.raises(NextwordError, match=re.escape(name.removesuffix("/nextword.json"))):
                verify_path(run)
            for command in (package.report, package.evaluate, lambda run: package.pretrain(out=run, resume=True)):
                try:
                    result = command(run)
                except NextwordError as error:
                    assert "Traceback" not in str(error)
                else:
                    assert isinstance(result, Path) or result.loss == pytest.approx(expected, abs=1e-9)
        shutil.rmtree(run)


@pytest.fixture(scope="module")
def flipped_run(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(whole_run, tmp_path_factory.mktemp("flipped") / "run")


@given(data=st.data())
def test_a_flipped_bit_of_a_record_is_found(whole_run: Path, flipped_run: Path, data) -> None:
    """In run.json, result.json, an evaluation, `latest` or a line of a log; or the content is the same as before."""
    run = flipped_run
    path = run / data.draw(st.sampled_from(SMALL_FILES[:5]))
    before, raw = RunDir(run).metadata(), path.read_bytes()
    path.write_bytes(flip(raw, data.draw(st.integers(0, 8 * len(raw) - 1))))
    try:
        verify_path(run)
    except CorruptFileError as error:
        assert str(path) in str(error)
    else:
        # Only white space or the name of a checksum differs.
        if path.suffix == ".jsonl":
            assert fs.read_jsonl(path) == fs.read_jsonl(whole_run / path.name)
        else:
            assert fs.read_sealed_json(path) == fs.read_sealed_json(whole_run / path.relative_to(run))
        assert RunDir(run).metadata() == before
    finally:
        path.write_bytes(raw)


def test_verify_reports_every_damaged_place_at_once(run: Path) -> None:
    for name in SMALL_FILES[:5]:
        DAMAGES["flipped"](run / name)
    (run / "model" / "nextword.json").unlink()
    with pytest.raises(CorruptFileError) as error:
        verify_path(run)
    for name in (*SMALL_FILES[:5], "model"):
        assert str(run / name) in str(error.value)


def test_a_record_that_was_edited_on_purpose_opens_without_its_digest(run: Path) -> None:
    path = run / "run.json"
    edited = json.loads(path.read_text()) | {"command": "edited"}
    path.write_text(json.dumps(edited))
    with pytest.raises(CorruptFileError, match="remove its last entry"):
        RunDir(run).metadata()
    del edited["sha256"]
    path.write_text(json.dumps(edited))
    assert RunDir(run).metadata()["command"] == "edited"


# ---------------------------------------------------------------- logs

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(record=st.dictionaries(st.text(), VALUES))
def test_what_is_written_is_valid_json_and_read_as_it_was(record: dict[str, Any], tmp_path_factory) -> None:
    """NaN and infinity become null, since JSON has none of them. A file name of any bytes is kept."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    path = tmp_path_factory.mktemp("record") / "record.json"
    expected = json.loads(json.dumps(fs.finite(record)))
    fs.write_sealed_json(path, record | {"name": "caf\udce9"})
    json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert fs.read_sealed_json(path) == expected | {"name": "caf\udce9"}
    path.unlink()
    fs.append_line(path, fs.to_json_line(record))
    json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert fs.read_jsonl(path) == [expected]


def test_a_last_line_is_dropped_only_if_it_was_cut_off(tmp_path: Path) -> None:
    path, lines = tmp_path / "log.jsonl", [fs.to_json_line({"step": step}) + "\n" for step in (1, 2)]
    for cut in range(1, len(lines[1]) + 1):
        path.write_text("".join(lines)[:-cut])
        assert fs.read_jsonl(path) == [{"step": 1}]
    for bit in range(8):
        path.write_bytes(flip("".join(lines).encode(), 8 * (len("".join(lines)) - 1) + bit))
        try:
            assert fs.read_jsonl(path) == [{"step": 1}, {"step": 2}]  # another white space
        except CorruptFileError as error:
            assert "line 2" in str(error)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": -1, "total_steps": 5}',
        '{"step": 3, "total_steps": 5}',
        '{"step": 0, "total_steps": 0}',
        '{"step": 0, "total_steps": 5, "seconds": NaN}',
        '{"step": 0, "total_steps": 1e400}',
        '{"total_steps": 5}',
        "[]",
    ],
)
def test_impossible_decisions_are_refused(tmp_path: Path, line: str) -> None:
    """Also in a file without checksums, of an earlier version."""
    path = tmp_path / "decisions.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(CorruptFileError, match=re.escape(str(path))):
        read_decisions(path)
    path.write_text('{"step": 0, "total_steps": 5}\n')
    assert read_decisions(path, 1) == [StepBudgetDecision(0, 5)]
    with pytest.raises(CorruptFileError, match="saved after 2"):
        read_decisions(path, 2)
    path.write_text(line + "\n")
    with pytest.raises(CorruptFileError):
        fs.read_records(path, SkippedRange)


def test_a_run_whose_metrics_are_gone_says_so(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "result.json").unlink()
    (run / "metrics.jsonl").write_text("")
    package.pretrain(out=run, resume=True)
    assert "the records before step 8 are missing" in capfd.readouterr().err


# ---------------------------------------------------------------- locks and links


@pytest.mark.skipif(os.name == "nt", reason="this system has no pipes in directories")
@pytest.mark.parametrize("damage", [d for d in DAMAGES if d not in ("flipped", "nested")])
def test_a_damaged_lock_is_no_traceback(tmp_path: Path, damage: str) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / "holder.json").write_text('{"process": 1, "host": "a"}')
    with run_lock(tmp_path), deadline():
        DAMAGES[damage](tmp_path / "holder.json")
        with pytest.raises(NextwordError, match="in use by another process"), run_lock(tmp_path):
            pass
        if (tmp_path / "holder.json").is_dir():
            (tmp_path / "holder.json").rmdir()
    (tmp_path / "lock").touch()
    DAMAGES[damage](tmp_path / "lock")
    with deadline():
        try:
            with run_lock(tmp_path):
                pass
        except NextwordError as error:
            assert "lock" in str(error)


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="this system cannot refuse links")
def test_planted_links_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("before")
    for name in ("metrics.jsonl", "file", f".file.{os.getpid()}.partial"):
        (tmp_path / name).symlink_to(secret)
    with pytest.raises(NextwordError):
        RunDir(tmp_path).append_metrics({"step": 1})
    fs.atomic_write(tmp_path / "file", "new")
    assert not (tmp_path / "file").is_symlink()
    assert secret.read_text() == "before"


# ---------------------------------------------------------------- other places


def test_a_project_that_was_moved_continues(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    """Without arguments, and with the new places; the text itself may not differ."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(shards, old / "shards")
    package.pretrain(old / "shards", old / "run", steps=8, **SETTINGS)
    expected = json.loads((old / "run" / "result.json").read_text())["loss"]
    old.rename(new)
    assert package.evaluate(new / "run").loss == pytest.approx(expected)
    assert verify_path(new / "run")[str(new / "run")] == "run"
    for arguments in ((), (new / "shards",)):
        (new / "run" / "result.json").unlink()
        result = package.pretrain(*arguments, out=new / "run", resume=True)
        assert (result.loss, result.steps) == (expected, 8)
        assert json.loads((new / "run" / "run.json").read_text())["shards"] == str(new / "shards")
    (new / "shards").rename(tmp_path / "elsewhere")
    (new / "run" / "result.json").unlink()
    assert package.pretrain(tmp_path / "elsewhere", out=new / "run", resume=True).loss == expected
    (new / "run" / "result.json").unlink()
    with pytest.raises(UsageError, match="not the one that the run started with"):
        other = tmp_path / "other"
        other.mkdir()
        (other / "a.txt").write_text("Something else. " * 500)
        package.prepare(other, out=tmp_path / "others", vocab_size=300)
        package.pretrain(tmp_path / "others", out=new / "run", resume=True)
    assert package.pretrain(out=new / "run", resume=True).loss == expected


@pytest.mark.parametrize("settings", [{"tensor": 3}, {"tensor": 7}])
def test_a_resume_writes_no_setting_that_is_refused(run: Path, settings: dict[str, Any]) -> None:
    (run / "result.json").unlink()
    before = (run / "run.json").read_bytes()
    with pytest.raises(UsageError, match="does not divide"):
        package.pretrain(out=run, resume=True, training=settings)
    assert (run / "run.json").read_bytes() == before
    assert math.isfinite(package.pretrain(out=run, resume=True).loss or math.nan)


@pytest.fixture(scope="module")
def remote_copy(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mirrored")
    package.pretrain(shards, folder / "run", steps=8, mirror=str(folder / "remote"), **SETTINGS)
    return folder / "remote"


@pytest.mark.parametrize(
    "damage", ["flipped", "cut", "emptied", "a list", "a number", "another object", "binary", "nested"]
)
def test_a_damaged_remote_copy_is_reported(remote_copy: Path, tmp_path: Path, damage: str) -> None:
    run, remote = tmp_path / "run", shutil.copytree(remote_copy, tmp_path / "remote")
    files = [path for path in remote.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl")]
    for path in files:
        content = path.read_bytes()
        DAMAGES[damage](path)
        with deadline(), Console(quiet=True) as console:
            try:
                CheckpointUploader(str(remote), console).restore(run, resume=True)
                assert path.parent.name == "commits" or verify_path(run)
            except NextwordError as error:
                assert str(remote) in str(error)
        shutil.rmtree(run, ignore_errors=True)
        path.write_bytes(content)
    with Console(quiet=True) as console:
        CheckpointUploader(str(remote), console).restore(run, resume=True)
    assert verify_path(run)


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": "../../etc"},
        {"checkpoint": "step-1/../../x"},
        {"checkpoint": 5},
        {"folders": {"checkpoints/step-00000008": "../secret"}},
        {"folders": {"checkpoints/step-00000008": "checkpoints/step-00000008", "../x": "data"}},
        {"folders": {"checkpoints/step-00000008": "checkpoints/step-00000008", "model": "models/../../secret"}},
        {"folders": []},
        {"logs": ["../../run.json"]},
        {"logs": ["/etc/passwd"]},
        {"logs": None},
    ],
)
def test_a_commit_names_no_path_outside_of_the_run(tmp_path: Path, change: dict[str, Any]) -> None:
    """Even a commit whose checksum is right."""
    remote, run = tmp_path / "remote", tmp_path / "run"
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "nextword.json").write_text("secret")
    checkpoint = "checkpoints/step-00000008"
    commit = {"checkpoint": "step-00000008", "run": "", "folders": {checkpoint: checkpoint}, "logs": []} | change
    text = json.dumps(commit)
    (remote / "commits").mkdir(parents=True)
    record = {"commit": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (remote / "commits" / "step-00000008.json").write_text(json.dumps(record))
    with warnings.catch_warnings(), Console(quiet=True) as console:
        uploader = CheckpointUploader(str(remote), console)
        assert uploader.list_commits() == []
        uploader.restore(run, resume=True)
    assert not run.exists()


# ---------------------------------------------------------------- processes


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system cannot stop a process")
def test_a_run_of_a_stopped_process_is_locked(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from nextword.common.run_dir import run_lock\n"
    code += "with run_lock(Path(sys.argv[1])):\n  print('locked', flush=True)\n  sys.stdin.read()"
    first = start_process([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout is not None
    first.stdout.readline()
    os.kill(first.pid, signal.SIGSTOP)
    with pytest.raises(RunLockedError, match=f"process {first.pid}"), run_lock(tmp_path):
        pass
    os.kill(first.pid, signal.SIGCONT)
    first.kill()
    first.wait(PATIENCE)
    with run_lock(tmp_path):
        pass


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")
def test_the_peak_memory_is_that_of_the_process_alone() -> None:
    """`ru_maxrss` of a small process begins with the memory of the large one that started it."""
    child = "from nextword.common.environment import peak_resident_bytes as peak; print(peak())"
    parent = f"import subprocess, sys; a = b'x' * 2**29; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 10**7 < int(done.stdout.split()[0]) < 2**29
