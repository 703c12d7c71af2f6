"""Faults, made for real, and what must come of each: the table of docs/reliability.md. Kills, two processes on one run, and
the loss of a rank are tested in test_pretraining.py and test_distributed.py; foreign directories in test_foreign.py."""

import contextlib
import ctypes
import errno
import json
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

import nextword as package
from conftest import CLIRunner, nextword_command
from nextword.common import fs
from nextword.common.errors import CorruptFileError, DiskFullError, NextwordError, UsageError
from nextword.training import checkpoint
from nextword.training.distributed import collective_timeout
from processes import PATIENCE, happens, kill, start_process
from test_pretraining import start, state_hashes, steps_of

SETTINGS: dict[str, Any] = {
    "model": {"n_layers": 1, "n_heads": 2, "d_model": 16, "context_length": 16},
    "training": {"batch_tokens": 64, "evaluations": 2, "save_every": 4},
}
STEPS = 12
FLIPS = int(os.environ.get("NEXTWORD_FLIPS", "20"))


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few steps, never disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    package.pretrain(shards, run, steps=STEPS, **SETTINGS)
    return run


def unfinished(whole: Path, run: Path) -> Path:
    """A copy of a run that was stopped after its last checkpoint."""
    shutil.copytree(whole, run)
    (run / "result.json").unlink()
    return run


# ---------------------------------------------------------------- flipped bits and cuts


@contextlib.contextmanager
def damaged(path: Path, rng: random.Random, cut: bool) -> Iterator[None]:
    """One bit of a file turned, or its end cut off; as it was, afterwards."""
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
def test_every_flipped_bit_and_every_cut_of_a_checkpoint_and_of_shards_is_found(whole, shards, tmp_path, cut):
    """Over every file of both, the manifest included, whose own damage is found where it changes what is said of a file."""
    rng = random.Random(int(cut))
    folders = [shutil.copytree(checkpoint.list_checkpoints(whole)[-1], tmp_path / "checkpoint")]
    folders.append(shutil.copytree(shards, tmp_path / "shards"))
    paths = [path for folder in folders for path in sorted(folder.iterdir()) if path.name != fs.MANIFEST]
    assert len(paths) >= 5
    for n in range(FLIPS):
        path = paths[n % len(paths)]
        with damaged(path, rng, cut), pytest.raises(CorruptFileError) as error:
            fs.verify_manifest(path.parent)
        assert str(path) in str(error.value)
    for folder in folders:
        fs.verify_manifest(folder)
    print(f"\n{FLIPS} of {FLIPS} found, over {len(paths)} files")


@pytest.mark.parametrize("cut", [False, True], ids=["bits", "cuts"])
def test_damage_to_a_manifest_is_found_or_changes_nothing_that_it_says(whole, tmp_path, cut):
    """White space and the name of its own hash may change, and nothing else."""
    folder = shutil.copytree(checkpoint.list_checkpoints(whole)[-1], tmp_path / "checkpoint")
    rng, found = random.Random(2 + cut), 0
    facts = fs.verify_manifest(folder)
    for _ in range(FLIPS):
        with damaged(folder / fs.MANIFEST, rng, cut):
            try:
                assert fs.verify_manifest(folder) == facts, "a change that is neither found nor harmless"
            except CorruptFileError as error:
                assert str(folder) in str(error)
                found += 1
    assert found >= FLIPS // 2


def test_strict_stops_where_else_the_checkpoint_before_is_used(whole, tmp_path, nextword: CLIRunner):
    run = unfinished(whole, tmp_path / "run")
    newest = checkpoint.list_checkpoints(run)[-1]
    (newest / "weights.safetensors").write_bytes(b"cut")
    done = nextword("pretrain", "--out", run, "--resume", "--strict")
    assert done.returncode == CorruptFileError.exit_code
    assert f"{newest / 'weights.safetensors'}: 3 bytes instead of" in done.stderr
    assert "Traceback" not in done.stderr
    assert steps_of(run) == STEPS, "nothing was done"
    package.pretrain(out=run, resume=True)
    assert state_hashes(run) == state_hashes(whole)


def test_damaged_shards_stop_a_resume_before_a_step(whole, shards, tmp_path):
    run = unfinished(whole, tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    own = shutil.copytree(shards, tmp_path / "shards")
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "shards": str(own)}))
    with damaged(own / "train-00000.npy", random.Random(0), num_truncated_tokens=False):
        with pytest.raises(CorruptFileError, match=r"train-00000\.npy: the content does not match"):
            package.pretrain(out=run, resume=True)
        assert steps_of(run) == 0
    package.pretrain(out=run, resume=True)
    assert checkpoint.list_checkpoints(run)[-1].name == checkpoint.list_checkpoints(whole)[-1].name


# ---------------------------------------------------------------- no room


class Fails:
    """The n-th of some calls that write below a run folder finds no room; those before and after it are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: Path, n: int, number: int):
        self.run_dir, self.n, self.line_number, self.count = str(run), n, number, 0
        self.counting = threading.Lock()  # checkpoints are written by a thread
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir"), (Path, "open")):
            monkeypatch.setattr(owner, name, self.guarded(getattr(owner, name)))
        monkeypatch.setattr("nextword.model.hf.save_file", self.guarded(save_file))

    def guarded(self, call: Any) -> Any:
        opens = call is Path.open

        def instead(*arguments: Any, **named: Any) -> Any:
            of = str(Path(f"/proc/self/fd/{arguments[0]}").readlink() if isinstance(arguments[0], int) else arguments)
            if self.run_dir in of and (not opens or "wb" in arguments):
                with self.counting:
                    self.count += 1
                    fails = self.count == self.n
                if fails:
                    raise OSError(self.line_number, os.strerror(self.line_number))
            return call(*arguments, **named)

        return instead


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not tell which file is flushed")
@pytest.mark.parametrize(
    ("name", "error"), [("ENOSPC", DiskFullError), ("EDQUOT", DiskFullError), ("EROFS", NextwordError)]
)
def test_a_write_that_fails_leaves_the_last_checkpoint_whole(whole, shards, tmp_path, monkeypatch, name, error):
    """At every n-th write of a run, in turn: the run ends with the error and with whole checkpoints, and goes on to the same
    end. A small form tries some of them."""
    expected, every = state_hashes(whole), int(os.environ.get("NEXTWORD_EVERY_WRITE", "45"))
    n, tried = {"ENOSPC": 7, "EDQUOT": 20, "EROFS": 36}[name] % every or every, 0
    while True:
        run = tmp_path / f"run-{n}"
        with monkeypatch.prefix_offset() as patched:
            fails = Fails(patched, run, n, getattr(errno, name))
            try:
                package.pretrain(shards, run, steps=STEPS, **SETTINGS)
            except NextwordError as raised:
                assert isinstance(raised, error)
                assert str(run) in str(raised)
        if fails.count < n:
            break
        tried += 1
        for left in checkpoint.list_checkpoints(run):
            fs.verify_manifest(left)
        if not (run / "run.json").exists():  # not begun: the same command begins it
            package.pretrain(shards, run, steps=STEPS, resume=True, **SETTINGS)
        package.pretrain(out=run, resume=True)
        assert state_hashes(run) == expected, f"after the write {n}"
        shutil.rmtree(run)
        n += every
    print(f"\n{name}: {tried} writes failed in turn, of {fails.count}")
    assert tried >= 1


def test_a_disk_that_is_too_small_is_refused_before_anything_is_trained(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(DiskFullError, match=r"this needs up to [\d,]+ bytes, and the disk has 5,000 free"):
        package.pretrain(shards, tmp_path / "run", steps=STEPS, **SETTINGS)
    assert not (tmp_path / "run" / "checkpoints").exists()


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes, where this process may make one."""
    path.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform != "linux" or libc.mount(b"none", str(path).encode(), b"tmpfs", 0, f"size={size}".encode()):
        pytest.skip("this process may not mount a file system of its own")
    try:
        yield path
    finally:
        libc.umount2(str(path).encode(), 2)


def test_a_disk_that_fills_up_on_the_way(shards, tmp_path):
    """Really full: another file takes the room after the start."""
    with small_disk(tmp_path / "disk", 12 * 2**20) as disk:
        run = disk / "run"
        process = start(run, shards, "--steps", "100000")
        assert happens(lambda: len(checkpoint.list_checkpoints(run)) >= 1, process)
        with contextlib.suppress(OSError), (disk / "other").open("wb", buffering=0) as other:
            while True:
                other.write(b"\0" * 4096)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == DiskFullError.exit_code, err
        assert "the disk is full" in err and "bytes free" in err and "up to" in err
        assert "Traceback" not in err
        assert checkpoint.list_checkpoints(run)
        for left in checkpoint.list_checkpoints(run):
            fs.verify_manifest(left)
        (disk / "other").unlink()
        process = start(run, shards, "--steps", "100000")
        stopped = steps_of(run)
        assert happens(lambda: steps_of(run) > stopped, process)
        kill(process)


# ---------------------------------------------------------------- another recipe, another text, another tokenizer


def test_another_text_or_tokenizer_is_refused_and_harmless_settings_are_not(whole, texts, tmp_path):
    from nextword.data.prepare import prepare

    run = unfinished(whole, tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    for name, tokenizer in (("text", "bpe"), ("tokenizer", "char")):
        other = tmp_path / name
        some = sorted(texts.iterdir())[: 25 if name == "text" else None]
        prepare(some, other, tokenizer=tokenizer, vocab_size=400 if tokenizer == "bpe" else None)
        (run / "run.json").write_text(json.dumps({**facts, "shards": str(other)}))
        with pytest.raises(UsageError, match="is not the one that this run began with") as error:
            package.pretrain(out=run, resume=True)
        assert "vocab_size: " in str(error.value) or "tokens: " in str(error.value)
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match=r"training\.lr: None → 0\.5"):
        package.pretrain(out=run, resume=True, training={"lr": 0.5})
    package.pretrain(out=run, resume=True, device="cpu", strict=True)
    assert state_hashes(run) == state_hashes(whole)


# ---------------------------------------------------------------- signals


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers these signals otherwise")
def test_a_second_signal_leaves_at_once(tmp_path):
    """While the first is waited for, whatever the process is at."""
    code = (
        "import time\nfrom nextword.common.run_dir import catching_signals\n"
        "with catching_signals() as caught:\n    print('on', flush=True)\n"
        "    while not caught: time.sleep(0.01)\n    print('first', flush=True)\n    time.sleep(100_000)"
    )
    process = start_process([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "first\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 143


# ---------------------------------------------------------------- a cut link


@pytest.mark.parametrize("said", ["soon", "0", "nan", "1e9", ""])
def test_a_patience_that_is_none_is_refused(monkeypatch, said):
    monkeypatch.setenv("NEXTWORD_PATIENCE", said)
    with pytest.raises(UsageError, match="NEXTWORD_PATIENCE="):
        collective_timeout()


def system(*arguments: str) -> bool:
    return shutil.which(arguments[0]) is not None and not subprocess.run(arguments, capture_output=True).returncode


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces, as good as hosts, with a link between them: 10.213.0.1 and 10.213.0.2."""
    names = f"nw{os.getpid()}a", f"nw{os.getpid()}b"
    made = all(system("ip", "netns", "add", name) for name in names)
    try:
        links = f"v{os.getpid()}a", f"v{os.getpid()}b"
        made = made and system("ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for i, (name, link) in enumerate(zip(names, links, strict=True), start=1):
            made = made and system("ip", "link", "set", link, "netns", name, "name", "wire")
            made = made and system("ip", "-n", name, "addr", "add", f"10.213.0.{i}/24", "dev", "wire")
            made = made and all(system("ip", "-n", name, "link", "set", one, "up") for one in ("lo", "wire"))
        if not made:
            pytest.skip("this process may not make network namespaces (ip netns)")
        yield names
    finally:
        for name in names:
            system("ip", "netns", "delete", name)


def test_a_cut_link_ends_both_sides_and_a_restart_goes_on(shards, tmp_path):
    """Each rank on a host of its own; the link goes down on the way."""
    run = tmp_path / "run"
    arguments = [
        "pretrain", shards, "--out", run, "--resume", "--steps", "100000", "--training.save-every", "3",
        "--model.n-layers", "1", "--model.n-heads", "2", "--model.d-model", "16", "--model.context-length", "16",
        "--training.batch-tokens", "64",
    ]  # fmt: skip
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.213.0.1", "MASTER_PORT": "29512", "NEXTWORD_PATIENCE": "20"}

    def begin(hosts: tuple[str, str]) -> list["subprocess.Popen[str]"]:
        return [
            start_process(
                ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host,
                 *nextword_command(*arguments)],
                env={**os.environ, **variables, "RANK": str(rank), "GLOO_SOCKET_IFNAME": "wire"}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
            )
            for rank, host in enumerate(hosts)
        ]  # fmt: skip

    with two_hosts() as hosts:
        processes = begin(hosts)
        assert happens(lambda: len(checkpoint.list_checkpoints(run)) >= 1, processes[0])
        assert system("ip", "-n", hosts[1], "link", "set", "wire", "down")
        cut = time.monotonic()
        said = [process.communicate(timeout=PATIENCE)[1] for process in processes]
        print(f"\nboth sides ended {time.monotonic() - cut:.1f} s after the link was cut")
        for rank, (process, err) in enumerate(zip(processes, said, strict=True)):
            assert process.returncode == 1, err
            assert f"does not answer (process {1 - rank} on {hosts[1 - rank]})" in err
            assert "Traceback" not in err
        stopped = steps_of(run)
        assert system("ip", "-n", hosts[1], "link", "set", "wire", "up")
        processes = begin(hosts)
        assert happens(lambda: steps_of(run) > stopped, processes[0])
        for process in processes:
            process.kill()
        assert "going on from step" in processes[0].communicate()[1]


# ---------------------------------------------------------------- a compiler that is broken


@pytest.mark.skipif(os.name == "nt", reason="the broken compiler is a shell script")
def test_a_compiler_that_is_broken_costs_speed_alone(shards, tmp_path, nextword: CLIRunner):
    """torch.compile fails, from the start or at a resume; the run is that of PyTorch's own operations."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'no such header' >&2; exit 1\n")
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    runs = [tmp_path / "plain", tmp_path / "compiled"]
    shape = [f"--model.{name.replace('_', '-')}={value}" for name, value in SETTINGS["model"].items()]
    for run, wanted in zip(runs, ("no", "yes"), strict=True):
        settings = ("--steps", "4", "--training.batch-tokens", "64", *shape, "--training.compile", wanted)
        done = nextword("pretrain", shards, "--out", run, *settings, NEXTWORD_NATIVE="0", **environment)
        assert done.returncode == 0, done.stderr
        assert ("since torch.compile fails here" in done.stderr) == (wanted == "yes"), done.stderr
        assert "Traceback" not in done.stderr
    assert state_hashes(runs[0]) == state_hashes(runs[1])
    facts = json.loads((runs[1] / "run.json").read_text(encoding="utf-8"))
    assert facts["fixed"]["step_kind"] == "plain"
    facts["fixed"]["step_kind"] = "compiled"  # as where it began with a compiler
    (runs[1] / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    (runs[1] / "result.json").unlink()
    done = nextword("pretrain", "--out", runs[1], "--resume", **environment)
    assert done.returncode == 0 and "since torch.compile fails here" in done.stderr, done.stderr
