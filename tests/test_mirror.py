"""A run that is copied beyond its machine, through fsspec: a folder as the place, and storage that fails as storage does."""

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
from nextword.errors import NextwordError, UsageError

import nextword as package
from nextword import mirror
from processes import PATIENCE, start_process, wait_until
from test_pretraining import SETTINGS, state_hashes, steps_of

STEPS = 60
EVERY = {**SETTINGS, "training": {**SETTINGS["training"], "save_every": 10}, "steps": STEPS, "vocab_size": 400}


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """A copy of every save that finds the one before done."""
    monkeypatch.setattr(remote_sync, "SECONDS", 0.0)
    monkeypatch.setattr(remote_sync, "REST", 0.0)


@pytest.fixture(scope="module")
def plain(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "plain"
    package.pretrain(texts, run, **EVERY)
    return run


def pretrain(texts: Path, run: Path, place: Path | str, **settings: Any) -> dict[str, Any]:
    return package.pretrain(texts, run, mirror=str(place), **{**EVERY, **settings})


def commits(place: Path) -> list[dict[str, Any]]:
    return [json.loads(json.loads(path.read_text())["commit"]) for path in sorted((place / "commits").iterdir())]


# ---------------------------------------------------------------- there and back


@pytest.mark.skipif(os.name == "nt", reason="this system has no SIGTERM to catch")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_whose_machine_is_gone_goes_on_from_the_place(texts, plain, tmp_path, number):
    """A real process, stopped or killed; its folder is thrown away, the text's shards with it."""
    run, best_position = tmp_path / "run", tmp_path / "place"
    code = "import sys, json; from nextword import mirror, pretrain; mirror.SECONDS = mirror.REST = 0; "
    code += "pretrain(sys.argv[1], sys.argv[2], mirror=sys.argv[3], **json.loads(sys.argv[4]))"
    arguments = [str(texts), str(run), str(place), json.dumps(EVERY)]
    process = start_process([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE)
    wait_until(lambda: (place / "commits").is_dir() and steps_of(run) >= 25, process)
    process.send_signal(number)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and steps_of(run) < STEPS
    if number == signal.SIGTERM:
        assert commits(place)[-1]["checkpoint"] == f"step-{steps_of(run):08d}", "where it was stopped"
    shutil.rmtree(run)
    assert pretrain(texts, run, place, resume=True)["steps"] == STEPS
    assert state_hashes(run) == state_hashes(plain)


def test_a_finished_run_is_brought_whole(texts, plain, tmp_path):
    pretrain(texts, tmp_path / "run", tmp_path / "place")
    again = pretrain(texts, tmp_path / "elsewhere", tmp_path / "place", resume=True)
    assert again["steps"] == STEPS
    assert state_hashes(tmp_path / "elsewhere") == state_hashes(plain)
    assert (tmp_path / "elsewhere" / "report.html").read_bytes() == (tmp_path / "run" / "report.html").read_bytes()
    assert package.verify_tree(tmp_path / "elsewhere")
    assert not list(tmp_path.glob(".*.partial")) and not (tmp_path / "run" / ".mirror").exists()


def test_what_no_commit_names_is_removed(texts, tmp_path):
    place = tmp_path / "place"
    pretrain(texts, tmp_path / "run", place)
    kept = commits(place)
    assert len(kept) <= remote_sync.KEPT
    steps = {commit["checkpoint"] for commit in kept}
    assert {path.name for path in (place / "checkpoints").iterdir() if any(path.iterdir())} == steps
    assert {path.name for path in (place / "logs").iterdir() if any(path.iterdir())} == steps
    models = {f"models/{path.name}" for path in (place / "models").iterdir() if any(path.iterdir())}
    assert models == {commit["folders"]["model"] for commit in kept}


# ---------------------------------------------------------------- what is refused


def test_a_place_with_another_run_or_none_of_ours_to_go_on_with(texts, tmp_path):
    pretrain(texts, tmp_path / "run", tmp_path / "place")
    with pytest.raises(UsageError, match="holds a run already"):
        pretrain(texts, tmp_path / "new", tmp_path / "place")
    package.pretrain(texts, tmp_path / "other", **{**EVERY, "steps": 10})
    with pytest.raises(UsageError, match="holds another run"):
        pretrain(texts, tmp_path / "other", tmp_path / "place", resume=True, steps=10)
    with pytest.raises(UsageError, match="in the run folder itself"):
        pretrain(texts, tmp_path / "new", tmp_path / "new" / "place")
    with pytest.raises(UsageError, match="nowhere"):
        pretrain(texts, tmp_path / "new", "nowhere://bucket/run")
    assert not (tmp_path / "new").exists()


def test_a_place_that_is_further_is_not_written_over(texts, tmp_path):
    run, best_position = tmp_path / "run", tmp_path / "place"
    pretrain(texts, run, place)
    (run / "result.json").unlink()
    for path in (run / "checkpoints").glob("step-*"):
        path.rename(path.with_name("step-00000001"))
        break
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}", ignore_errors=True)
    with pytest.raises(UsageError, match=f"is further .step-{STEPS:08d}"):
        pretrain(texts, run, place, resume=True)


def test_damage_there_is_found_and_the_commit_before_is_taken(texts, plain, tmp_path, capfd):
    place = tmp_path / "place"
    pretrain(texts, tmp_path / "run", place)
    before, last = commits(place)
    weights = place / "checkpoints" / last["checkpoint"] / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    run = tmp_path / "again"
    pretrain(texts, run, place, resume=True)
    assert f"{last['checkpoint']}.json is damaged and passed over" in capfd.readouterr().err
    assert state_hashes(run) == state_hashes(plain)
    for path in place.glob("checkpoints/*/optimizer.safetensors"):
        path.unlink()
    with pytest.raises(NextwordError, match=r"every copy is damaged:[\s\S]*optimizer.safetensors: missing"):
        pretrain(texts, tmp_path / "third", place, resume=True)
    assert not (tmp_path / "third").exists()
    newest = sorted((place / "commits").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-20])
    assert remote_sync.Mirror(str(place), package.api.Console(quiet=True))._list_commits()[0][1] == before, (
        "cut short: never made"
    )


# ---------------------------------------------------------------- storage that fails


class Failing(LocalFileSystem):
    """A folder that cannot be reached for its first so many writes."""

    protocol = "failing"
    left = 0

    def put_file(self, *arguments: Any, **options: Any) -> None:
        if Failing.freed_slots > 0:
            Failing.freed_slots -= 1
            raise ConnectionError("no way there")
        super().put_file(*arguments, **options)


fsspec.register_implementation("failing", Failing, clobber=True)


def test_a_place_that_cannot_be_reached_costs_a_word_and_no_step(texts, plain, tmp_path, capfd):
    Failing.freed_slots = 3
    pretrain(texts, tmp_path / "run", f"failing://{tmp_path}/place")
    assert "no way there" in capfd.readouterr().err
    assert state_hashes(tmp_path / "run") == state_hashes(plain)
    assert commits(tmp_path / "place")[-1]["checkpoint"] == f"step-{STEPS:08d}", "it was there again"


def test_a_place_that_never_had_the_end_is_said_at_the_end(texts, plain, tmp_path):
    Failing.freed_slots = 10**6
    with pytest.raises(
        NextwordError, match=r"finished and whole, and failing://.* has no copy of its end.*no way there"
    ):
        pretrain(texts, tmp_path / "run", f"failing://{tmp_path}/place")
    assert state_hashes(tmp_path / "run") == state_hashes(plain)
    Failing.freed_slots = 0
    pretrain(texts, tmp_path / "run", f"failing://{tmp_path}/place", resume=True)
    assert commits(tmp_path / "place")[-1]["checkpoint"] == f"step-{STEPS:08d}"
