"""Files that survive: whole or not there, and every flipped bit found."""

import errno
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nextword.errors import CorruptFileError, DiskFullError, NextwordError

from nextword import files
from processes import kill, start_process


def test_a_manifest_finds_every_flipped_bit_and_every_cut(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.bin").write_bytes(random.Random(0).randbytes(300))
    (tmp_path / "inner" / "b.txt").write_text("text")
    fs.write_manifest(tmp_path, {"fact": 1})
    assert fs.check_seal(tmp_path)["fact"] == 1
    rng = random.Random(1)
    for path in (tmp_path / "a.bin", tmp_path / "inner" / "b.txt"):
        whole = path.read_bytes()
        for _ in range(40):
            data = bytearray(whole)
            if rng.random() < 0.5:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            else:
                del data[rng.randrange(len(data)) :]
            path.write_bytes(bytes(data))
            with pytest.raises(CorruptFileError, match=path.name):
                fs.check_seal(tmp_path)
        path.write_bytes(whole)
    fs.check_seal(tmp_path)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(CorruptFileError, match=r"a\.bin: missing"):
        fs.check_seal(tmp_path)


def test_a_manifest_cannot_point_outside(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_text("x")
    fs.atomic_write(inside / fs.MANIFEST, '{"files": {"../secret": {"bytes": 1, "sha256": "0"}}}')
    with pytest.raises(CorruptFileError, match="outside of its directory"):
        fs.check_seal(inside)


@given(st.binary(max_size=200))
def test_any_bytes_as_a_manifest_or_log_are_a_clear_error(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    (folder / fs.MANIFEST).write_bytes(data)
    for read in (lambda: fs.check_seal(folder), lambda: fs.read_jsonl(folder / fs.MANIFEST)):
        try:
            read()
        except NextwordError as error:
            assert fs.MANIFEST in str(error)


def test_a_line_that_was_never_finished_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    fs.append_line_durably(path, '{"a": 1}')
    with path.open("a") as file:
        file.write('{"a": ')
    assert fs.read_jsonl(path) == [{"a": 1}]
    assert fs.read_jsonl(tmp_path / "none") == []


def test_a_full_disk_has_its_own_error_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    fs.atomic_write(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskFullError, match=r"the disk is full \([\d,]+ bytes free\)"):
        fs.atomic_write(path, "new")
    assert path.read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, where every write finds no room, is not here")
def test_a_real_full_device():
    with pytest.raises(DiskFullError), fs.map_disk_errors(Path("/dev/full")), Path("/dev/full").open("w") as file:
        file.write("x")
        file.flush()


def test_an_interrupted_move_is_settled(tmp_path):
    """Killed between the two renames: the old directory comes back. Killed after both: it is cleared away."""
    final = tmp_path / "model"
    for content in ("first", "second"):
        aside = tmp_path / "aside"
        aside.mkdir()
        (aside / "x").write_text(content)
        fs.atomic_replace_dir(aside, final)
    assert (final / "x").read_text() == "second"
    final.rename(tmp_path / ".model.old")
    fs.recover_interrupted_swap(final)
    assert (final / "x").read_text() == "second"
    (tmp_path / ".model.old").mkdir()
    fs.recover_interrupted_swap(final)
    assert not (tmp_path / ".model.old").exists()
    assert (final / "x").read_text() == "second"


def test_write_durably_survives_a_kill(tmp_path):
    """A process that writes without end, killed: what is left is one whole content or the other."""
    path = tmp_path / "file"
    code = (
        "import sys, pathlib; from nextword.common.fs import write_durably\n"
        "p = pathlib.Path(sys.argv[1]); write_durably(p, 'a' * 100000); print('on', flush=True)\n"
        "while True:\n  write_durably(p, 'a' * 100000); write_durably(p, 'b' * 100000)"
    )
    process = start_process([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    process.stdout.readline()
    kill(process)
    assert path.read_text() in ("a" * 100000, "b" * 100000)
