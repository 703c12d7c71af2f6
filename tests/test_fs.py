"""Durable files: atomic writes, disk errors, and manifests that detect every change."""

import errno
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextword.audit.group_templates import _read_yaml
from nextword.common import fs
from nextword.common.errors import CorruptFileError, DiskFullError, NextwordError
from nextword.common.fs import read_json
from nextword.data.tokenizer import Tokenizer, train_bpe
from nextword.tasks.benchmark_spec import load_benchmarks
from processes import kill, start_process


def test_a_manifest_detects_bit_flips_and_truncation(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.bin").write_bytes(random.Random(0).randbytes(300))
    (tmp_path / "inner" / "b.txt").write_text("text")
    fs.write_manifest(tmp_path, {"fact": 1})
    assert fs.verify_manifest(tmp_path)["fact"] == 1
    rng = random.Random(1)
    for path in (tmp_path / "a.bin", tmp_path / "inner" / "b.txt"):
        content = path.read_bytes()
        for _ in range(40):
            data = bytearray(content)
            if rng.random() < 0.5:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            else:
                del data[rng.randrange(len(data)) :]
            path.write_bytes(bytes(data))
            with pytest.raises(CorruptFileError, match=path.name):
                fs.verify_manifest(tmp_path)
        path.write_bytes(content)
    fs.verify_manifest(tmp_path)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(CorruptFileError, match=r"a\.bin: missing"):
        fs.verify_manifest(tmp_path)


def test_a_manifest_cannot_name_files_outside_of_its_directory(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_text("x")
    fs.atomic_write(inside / fs.MANIFEST, '{"files": {"../secret": {"bytes": 1, "sha256": "0"}}}')
    with pytest.raises(CorruptFileError, match="outside of its directory"):
        fs.verify_manifest(inside)


@given(st.binary(max_size=200))
def test_malformed_manifests_and_logs_raise_an_error_with_the_path(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    (folder / fs.MANIFEST).write_bytes(data)
    for read in (lambda: fs.verify_manifest(folder), lambda: fs.read_jsonl(folder / fs.MANIFEST)):
        try:
            read()
        except NextwordError as error:
            assert fs.MANIFEST in str(error)


def test_read_jsonl_drops_an_incomplete_last_line(tmp_path):
    path = tmp_path / "log.jsonl"
    fs.append_line(path, '{"a": 1}', durable=True)
    with path.open("a") as file:
        file.write('{"a": ')
    assert fs.read_jsonl(path) == [{"a": 1}]
    assert fs.read_jsonl(tmp_path / "none") == []


def test_a_full_disk_raises_disk_full_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    fs.atomic_write(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskFullError, match=r"the disk is full \([\d,]+ bytes free\)"):
        fs.atomic_write(path, "new")
    assert path.read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, a device that is always full, does not exist")
def test_a_real_full_device():
    with pytest.raises(DiskFullError), fs.map_disk_errors(Path("/dev/full")), Path("/dev/full").open("w") as file:
        file.write("x")
        file.flush()


def test_an_interrupted_swap_is_recovered(tmp_path):
    """Killed between the two renames, the old directory is restored. Killed after both, it is removed."""
    target = tmp_path / "model"
    for content in ("first", "second"):
        fs.build_directory(target, lambda directory, content=content: (directory / "x").write_text(content))
    assert (target / "x").read_text() == "second"
    target.rename(tmp_path / ".model.old")
    fs.recover_interrupted_swap(target)
    assert (target / "x").read_text() == "second"
    (tmp_path / ".model.old").mkdir()
    fs.recover_interrupted_swap(target)
    assert not (tmp_path / ".model.old").exists()
    assert (target / "x").read_text() == "second"


def test_atomic_write_survives_a_kill(tmp_path):
    """A process that writes two contents in turn is killed: the file has one of them."""
    path = tmp_path / "file"
    code = (
        "import sys, pathlib; from nextword.common.fs import atomic_write\n"
        "p = pathlib.Path(sys.argv[1]); atomic_write(p, 'a' * 100000); print('on', flush=True)\n"
        "while True:\n  atomic_write(p, 'a' * 100000); atomic_write(p, 'b' * 100000)"
    )
    process = start_process([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    process.stdout.readline()
    kill(process)
    assert path.read_text() in ("a" * 100000, "b" * 100000)


def test_a_byte_order_mark_is_no_part_of_a_small_file(tmp_path):
    content = {
        "a.json": '{"a": 1}',
        "a.toml": 'kind = "writing"\nfiles = ["x"]\nprompt = "{x}"\nreference = "y"\n',
        "a.yaml": 'groups: {a: [[x, y]], b: [[z, y]]}\ntemplates: [{text: "{a} likes {b}"}]\n',
        "tokenizer.json": train_bpe(["abc"], 258).backend.to_str(),
    }
    read = {"a.json": read_json, "a.toml": load_benchmarks, "a.yaml": _read_yaml, "tokenizer.json": Tokenizer.open}
    for name, text in content.items():
        results = []
        for encoding in ("utf-8", "utf-8-sig"):
            (tmp_path / name).write_text(text, encoding=encoding)
            results.append(read[name](tmp_path / name))
        if name in ("a.json", "a.toml"):
            assert results[0] == results[1]
