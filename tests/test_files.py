"""Files that survive: whole or not there, and every flipped bit found."""

import errno
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextword import files
from nextword.errors import CorruptFile, DiskFull, NextwordError
from processes import kill, start_process


def test_a_manifest_finds_every_flipped_bit_and_every_cut(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.bin").write_bytes(random.Random(0).randbytes(300))
    (tmp_path / "inner" / "b.txt").write_text("text")
    files.seal(tmp_path, {"fact": 1})
    assert files.check_seal(tmp_path)["fact"] == 1
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
            with pytest.raises(CorruptFile, match=path.name):
                files.check_seal(tmp_path)
        path.write_bytes(whole)
    files.check_seal(tmp_path)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(CorruptFile, match=r"a\.bin: missing"):
        files.check_seal(tmp_path)


def test_a_manifest_cannot_point_outside(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_text("x")
    files.write_durably(inside / files.MANIFEST, '{"files": {"../secret": {"bytes": 1, "sha256": "0"}}}')
    with pytest.raises(CorruptFile, match="outside of its directory"):
        files.check_seal(inside)


@given(st.binary(max_size=200))
def test_any_bytes_as_a_manifest_or_log_are_a_clear_error(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    (folder / files.MANIFEST).write_bytes(data)
    for read in (lambda: files.check_seal(folder), lambda: files.read_json_lines(folder / files.MANIFEST)):
        try:
            read()
        except NextwordError as error:
            assert files.MANIFEST in str(error)


def test_a_line_that_was_never_finished_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    files.append_durably(path, '{"a": 1}')
    with path.open("a") as file:
        file.write('{"a": ')
    assert files.read_json_lines(path) == [{"a": 1}]
    assert files.read_json_lines(tmp_path / "none") == []


def test_a_full_disk_has_its_own_error_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_durably(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskFull, match=r"the disk is full \([\d,]+ bytes free\)"):
        files.write_durably(path, "new")
    assert path.read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, where every write finds no room, is not here")
def test_a_real_full_device():
    with pytest.raises(DiskFull), files.writing(Path("/dev/full")), Path("/dev/full").open("w") as file:
        file.write("x")
        file.flush()


def test_an_interrupted_move_is_settled(tmp_path):
    """Killed between the two renames: the old directory comes back. Killed after both: it is cleared away."""
    final = tmp_path / "model"
    for content in ("first", "second"):
        aside = tmp_path / "aside"
        aside.mkdir()
        (aside / "x").write_text(content)
        files.move_into_place(aside, final)
    assert (final / "x").read_text() == "second"
    final.rename(tmp_path / ".model.old")
    files.settle(final)
    assert (final / "x").read_text() == "second"
    (tmp_path / ".model.old").mkdir()
    files.settle(final)
    assert not (tmp_path / ".model.old").exists()
    assert (final / "x").read_text() == "second"


def test_write_durably_survives_a_kill(tmp_path):
    """A process that writes without end, killed: what is left is one whole content or the other."""
    path = tmp_path / "file"
    code = (
        "import sys, pathlib; from nextword.files import write_durably\n"
        "p = pathlib.Path(sys.argv[1]); write_durably(p, 'a' * 100000); print('on', flush=True)\n"
        "while True:\n  write_durably(p, 'a' * 100000); write_durably(p, 'b' * 100000)"
    )
    process = start_process([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    process.stdout.readline()
    kill(process)
    assert path.read_text() in ("a" * 100000, "b" * 100000)
