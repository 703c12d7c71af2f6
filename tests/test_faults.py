"""Injected faults, and the required outcome of each: the table of docs/reliability.md. Kills and the loss of a
rank are tested in test_pretraining.py and test_distributed.py, hostile directories in test_foreign.py."""

import contextlib
import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from conftest import CLIRunner, nextword_command
from nextword import pretrain
from nextword.common import fs
from nextword.common.errors import CorruptFileError, DiskFullError, NextwordError, UsageError
from nextword.common.run_dir import RunDir
from nextword.training import checkpoint
from nextword.training.distributed import collective_timeout
from processes import PATIENCE, happens, kill, start_process
from runs import start, state_hashes, steps_of

SETTINGS: dict[str, Any] = {
    "model": {"n_layers": 1, "n_heads": 2, "d_model": 16, "context_length": 16},
    "training": {"batch_tokens": 64, "evaluations": 2, "save_every": 4},
}
STEPS = 12
FLIPS = int(os.environ.get("NEXTWORD_FLIPS", "20"))


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few steps, never disturbed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    pretrain(shards, run, steps=STEPS, **SETTINGS)
    return run


def unfinished(finished: Path, run: Path) -> Path:
    """A copy of a run, as if it was stopped after its last checkpoint."""
    shutil.copytree(finished, run)
    (run / "result.json").unlink()
    return run


# ---------------------------------------------------------------- damaged files


@contextlib.contextmanager
def damaged(path: Path, rng: random.Random, cut: bool) -> Iterator[None]:
    """A file with one bit flipped, or with its end cut off; restored afterwards."""
    content = path.read_bytes()
    changed = bytearray(content)
    if cut:
        del changed[rng.randrange(len(changed)) :]
    else:
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(changed))
    yield
    path.write_bytes(content)


@pytest.mark.parametrize("cut", [False, True], ids=["bits", "cuts"])
def test_every_flipped_bit_and_every_cut_in_checkpoints_and_shards_is_found(finished, shards, tmp_path, cut):
    rng = random.Random(int(cut))
    directories = [shutil.copytree(checkpoint.list_checkpoints(finished)[-1], tmp_path / "checkpoint")]
    directories.append(shutil.copytree(shards, tmp_path / "shards"))
    paths = [path for directory in directories for path in sorted(directory.iterdir()) if path.name != fs.MANIFEST]
    assert len(paths) >= 5
    for n in range(FLIPS):
        path = paths[n % len(paths)]
        with damaged(path, rng, cut), pytest.raises(CorruptFileError) as error:
            fs.verify_manifest(path.parent)
        assert str(path) in str(error.value)
    for directory in directories:
        fs.verify_manifest(directory)


@pytest.mark.parametrize("cut", [False, True], ids=["bits", "cuts"])
def test_damage_to_a_manifest_is_found_or_harmless(finished, tmp_path, cut):
    directory = shutil.copytree(checkpoint.list_checkpoints(finished)[-1], tmp_path / "checkpoint")
    rng, num_found, expected = random.Random(2 + cut), 0, fs.verify_manifest(directory)
    for _ in range(FLIPS):
        with damaged(directory / fs.MANIFEST, rng, cut):
            try:
                assert fs.verify_manifest(directory) == expected, "neither found nor harmless"
            except CorruptFileError as error:
                assert str(directory) in str(error)
                num_found += 1
    assert num_found >= FLIPS // 2


def test_strict_stops_at_a_damaged_checkpoint_and_the_default_uses_an_older_one(
    finished, tmp_path, nextword: CLIRunner
):
    run = unfinished(finished, tmp_path / "run")
    latest = checkpoint.list_checkpoints(run)[-1]
    (latest / "weights.safetensors").write_bytes(b"cut")
    done = nextword("pretrain", "--out", run, "--resume", "--strict")
    assert done.returncode == CorruptFileError.exit_code
    assert f"{latest / 'weights.safetensors'}: 3 bytes instead of" in done.stderr
    assert "Traceback" not in done.stderr
    assert steps_of(run) == STEPS, "nothing was changed"
    pretrain(out=run, resume=True)
    assert state_hashes(run) == state_hashes(finished)


def test_damaged_shards_stop_a_resume_before_its_first_step(finished, shards, tmp_path):
    run = unfinished(finished, tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    copy = shutil.copytree(shards, tmp_path / "shards")
    metadata = RunDir(run).metadata()
    RunDir(run).write_metadata({**metadata, "shards": str(copy)})
    with damaged(copy / "train-00000.npy", random.Random(0), cut=False):
        with pytest.raises(CorruptFileError, match=r"train-00000\.npy: the content does not match"):
            pretrain(out=run, resume=True)
        assert steps_of(run) == 0
    pretrain(out=run, resume=True)
    assert checkpoint.list_checkpoints(run)[-1].name == checkpoint.list_checkpoints(finished)[-1].name


# ---------------------------------------------------------------- full disks


class FailingWrites:
    """Makes the n-th file system call that writes below a run directory fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: Path, n: int, error_number: int):
        self.run, self.n, self.error_number, self.count = str(run), n, error_number, 0
        self.lock = threading.Lock()  # checkpoints are written by a thread
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir"), (Path, "open")):
            monkeypatch.setattr(owner, name, self.failing(getattr(owner, name)))
        monkeypatch.setattr("nextword.model.hf.save_file", self.failing(save_file))

    def failing(self, call: Any) -> Any:
        is_open = call is Path.open

        def wrapper(*arguments: Any, **named: Any) -> Any:
            is_descriptor = isinstance(arguments[0], int)
            target = str(Path(f"/proc/self/fd/{arguments[0]}").readlink() if is_descriptor else arguments)
            if self.run in target and (not is_open or "wb" in arguments):
                with self.lock:
                    self.count += 1
                    fails = self.count == self.n
                if fails:
                    raise OSError(self.error_number, os.strerror(self.error_number))
            return call(*arguments, **named)

        return wrapper


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system has no /proc")
@pytest.mark.parametrize(
    ("name", "error"), [("ENOSPC", DiskFullError), ("EDQUOT", DiskFullError), ("EROFS", NextwordError)]
)
def test_a_failed_write_leaves_complete_checkpoints(finished, shards, tmp_path, monkeypatch, name, error):
    """At every NEXTWORD_EVERY_WRITE-th write of a run, in turn: the run ends with the error, and its resume is exact."""
    expected, every = state_hashes(finished), int(os.environ.get("NEXTWORD_EVERY_WRITE", "70"))
    n, num_failed = {"ENOSPC": 7, "EDQUOT": 30, "EROFS": 53}[name] % every or every, 0
    while True:
        run = tmp_path / f"run-{n}"
        with monkeypatch.context() as patched:
            writes = FailingWrites(patched, run, n, getattr(errno, name))
            try:
                pretrain(shards, run, steps=STEPS, **SETTINGS)
            except NextwordError as raised:
                assert isinstance(raised, error)
                assert str(run) in str(raised)
        if writes.count < n:
            break
        num_failed += 1
        for path in checkpoint.list_checkpoints(run):
            fs.verify_manifest(path)
        if not (run / "run.json").exists():  # the same command starts it
            pretrain(shards, run, steps=STEPS, resume=True, **SETTINGS)
        pretrain(out=run, resume=True)
        assert state_hashes(run) == expected, f"after write {n}"
        shutil.rmtree(run)
        n += every
    print(f"\n{name}: {num_failed} of {writes.count} writes failed in turn")
    assert num_failed >= 1


def test_a_disk_that_is_too_small_is_reported_before_training(shards, tmp_path, monkeypatch):
    usage = type("Usage", (), {"total": 10**9, "used": 10**9 - 5000, "free": 5000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskFullError, match=r"[\d,]+ bytes, and the disk has 5,000 free"):
        pretrain(shards, tmp_path / "run", steps=STEPS, **SETTINGS)
    assert not (tmp_path / "run" / "checkpoints").exists()


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes, if this process may mount one."""
    path.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform != "linux" or libc.mount(b"none", str(path).encode(), b"tmpfs", 0, f"size={size}".encode()):
        pytest.skip("this process may not mount a file system")
    try:
        yield path
    finally:
        libc.umount2(str(path).encode(), 2)


def test_a_disk_that_fills_up_during_a_run(shards, tmp_path):
    arguments = ["pretrain", shards, "--resume", "--steps", "100000", "--training.save-every", "20"]
    arguments += ["--model.n-layers", "2", "--model.n-heads", "2", "--model.d-model", "32"]
    arguments += ["--model.context-length", "32", "--training.batch-tokens", "256"]
    with small_disk(tmp_path / "disk", 12 * 2**20) as disk:
        run = disk / "run"
        process = start(1, *arguments, "--out", run)
        assert happens(lambda: len(checkpoint.list_checkpoints(run)) >= 1, process)
        with contextlib.suppress(OSError), (disk / "other").open("wb", buffering=0) as other:
            while True:
                other.write(b"\0" * 4096)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == DiskFullError.exit_code, err
        assert "the disk is full" in err
        assert "Traceback" not in err
        assert checkpoint.list_checkpoints(run)
        for path in checkpoint.list_checkpoints(run):
            fs.verify_manifest(path)
        (disk / "other").unlink()
        process = start(1, *arguments, "--out", run)
        stopped_at = steps_of(run)
        assert happens(lambda: steps_of(run) > stopped_at, process)
        kill(process)


# ---------------------------------------------------------------- another corpus, other settings


def test_a_resume_with_another_text_tokenizer_or_setting_is_rejected(finished, texts, tmp_path):
    from nextword.data.prepare import prepare

    run = unfinished(finished, tmp_path / "run")
    metadata = RunDir(run).metadata()
    for name, tokenizer in (("text", "bpe"), ("tokenizer", "char")):
        other = tmp_path / name
        files = sorted(texts.iterdir())[: 25 if name == "text" else None]
        prepare(files, other, tokenizer=tokenizer, vocab_size=400 if tokenizer == "bpe" else None)
        RunDir(run).write_metadata({**metadata, "shards": str(other)})
        with pytest.raises(UsageError, match=r"(vocab_size|tokens): "):
            pretrain(out=run, resume=True)
    RunDir(run).write_metadata(metadata)
    with pytest.raises(UsageError, match=r"training\.lr: None → 0\.5"):
        pretrain(out=run, resume=True, training={"lr": 0.5})
    pretrain(out=run, resume=True, device="cpu", strict=True)
    assert state_hashes(run) == state_hashes(finished)


# ---------------------------------------------------------------- signals


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers these signals differently")
def test_a_second_signal_ends_the_process_at_once(tmp_path):
    code = (
        "import time\nfrom nextword.common.run_dir import catch_signals\n"
        "with catch_signals() as caught:\n    print('on', flush=True)\n"
        "    while not caught: time.sleep(0.01)\n    print('first', flush=True)\n    time.sleep(100_000)"
    )
    process = start_process([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "first\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 143


# ---------------------------------------------------------------- a network failure


@pytest.mark.parametrize("value", ["soon", "0", "nan", "1e9", ""])
def test_an_invalid_collective_timeout_is_rejected(monkeypatch, value):
    monkeypatch.setenv("NEXTWORD_PATIENCE", value)
    with pytest.raises(UsageError, match="NEXTWORD_PATIENCE="):
        collective_timeout()


def succeeds(*command: str) -> bool:
    return shutil.which(command[0]) is not None and not subprocess.run(command, capture_output=True).returncode


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a link between them: 10.213.0.1 and 10.213.0.2."""
    names = f"nw{os.getpid()}a", f"nw{os.getpid()}b"
    created = all(succeeds("ip", "netns", "add", name) for name in names)
    try:
        links = f"v{os.getpid()}a", f"v{os.getpid()}b"
        created = created and succeeds("ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for i, (name, link) in enumerate(zip(names, links, strict=True), start=1):
            created = created and succeeds("ip", "link", "set", link, "netns", name, "name", "wire")
            created = created and succeeds("ip", "-n", name, "addr", "add", f"10.213.0.{i}/24", "dev", "wire")
            created = created and all(succeeds("ip", "-n", name, "link", "set", dev, "up") for dev in ("lo", "wire"))
        if not created:
            pytest.skip("this process may not create network namespaces (ip netns)")
        yield names
    finally:
        for name in names:
            succeeds("ip", "netns", "delete", name)


@pytest.mark.needs("more time")
def test_a_cut_network_link_ends_both_ranks_and_a_restart_resumes(shards, tmp_path):
    run = tmp_path / "run"
    arguments = ["pretrain", shards, "--out", run, "--resume", "--steps", "100000", "--training.save-every", "3"]
    arguments += ["--model.n-layers", "1", "--model.n-heads", "2", "--model.d-model", "16"]
    arguments += ["--model.context-length", "16", "--training.batch-tokens", "64"]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.213.0.1", "MASTER_PORT": "29512", "NEXTWORD_PATIENCE": "20"}

    def start_ranks(hosts: tuple[str, str]) -> list["subprocess.Popen[str]"]:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes = []
        for rank, host in enumerate(hosts):
            shell = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host]
            environment = {**os.environ, **variables, "RANK": str(rank), "GLOO_SOCKET_IFNAME": "wire"}
            command = [*shell, *nextword_command(*arguments)]
            processes.append(start_process(command, env=environment, encoding="utf-8", **pipes))
        return processes

    with two_hosts() as hosts:
        processes = start_ranks(hosts)
        assert happens(lambda: len(checkpoint.list_checkpoints(run)) >= 1, processes[0])
        assert succeeds("ip", "-n", hosts[1], "link", "set", "wire", "down")
        cut = time.monotonic()
        errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
        print(f"\nboth ranks ended {time.monotonic() - cut:.1f} s after the link was cut")
        for rank, (process, err) in enumerate(zip(processes, errors, strict=True)):
            assert process.returncode == 1, err
            assert f"does not answer (process {1 - rank} on {hosts[1 - rank]})" in err
            assert "Traceback" not in err
        stopped_at = steps_of(run)
        assert succeeds("ip", "-n", hosts[1], "link", "set", "wire", "up")
        processes = start_ranks(hosts)
        assert happens(lambda: steps_of(run) > stopped_at, processes[0])
        for process in processes:
            process.kill()


# ---------------------------------------------------------------- a broken compiler


@pytest.mark.skipif(os.name == "nt", reason="the broken compiler is a shell script")
@pytest.mark.needs("more time")
def test_a_broken_compiler_costs_only_speed(shards, tmp_path, nextword_process: CLIRunner):
    """torch.compile fails at the start or at a resume; the run then uses PyTorch's eager operators."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'no such header' >&2; exit 1\n")
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    shape = [f"--model.{name.replace('_', '-')}={value}" for name, value in SETTINGS["model"].items()]
    for run, compile_option in ((eager, "no"), (compiled, "yes")):
        options = ("--steps", "4", "--training.batch-tokens", "64", *shape, "--training.compile", compile_option)
        done = nextword_process("pretrain", shards, "--out", run, *options, NEXTWORD_NATIVE="0", **environment)
        assert done.returncode == 0, done.stderr
        assert ("torch.compile fails" in done.stderr) == (compile_option == "yes"), done.stderr
        assert "Traceback" not in done.stderr
    assert state_hashes(eager) == state_hashes(compiled)
    metadata = RunDir(compiled).metadata()
    assert metadata["fixed"]["step_kind"] == "plain"
    metadata["fixed"]["step_kind"] = "compiled"  # as if it was started with a working compiler
    RunDir(compiled).write_metadata(metadata)
    (compiled / "result.json").unlink()
    done = nextword_process("pretrain", "--out", compiled, "--resume", **environment)
    assert done.returncode == 0, done.stderr
    assert "torch.compile fails" in done.stderr
