"""Runs from beginning to end: real processes, really killed, and what is left of them."""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nextword.errors import CorruptFileError, NextwordError, RunLockedError, UsageError
from nextword.files import read_jsonl
from nextword.job import FINISHING_SECONDS, Job
from nextword.runs import open_run
from nextword.training.objectives import next_word

import nextword as package
from conftest import TINY_MODEL_ARGS, CLIRunner, nextword_command
from nextword.training import checkpoint
from processes import PATIENCE, happens, kill, start_process

SETTINGS: dict[str, Any] = {
    "model": {"n_layers": 2, "n_heads": 2, "d_model": 32, "context_length": 32, "dropout": 0.1},
    "training": {"batch_tokens": 256, "evaluations": 4},
}


def state_hashes(run: Path) -> dict[str, str]:
    """SHA-256 of the last weights, the optimizer, and the loss of every step."""
    last = checkpoint.list_checkpoints(run)[-1]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in last.glob("*.safetensors")}
    hashes["model"] = hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
    lines = read_jsonl(run / "metrics.jsonl")
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    looks = [(line["step"], line["validation"]["loss"]) for line in lines if "validation" in line]
    hashes["losses"] = hashlib.sha256(json.dumps([losses, looks]).encode()).hexdigest()
    return hashes


def steps_of(run: Path) -> int:
    return sum("loss" in line for line in read_jsonl(run / "metrics.jsonl")) if run.exists() else 0


# ---------------------------------------------------------------- one run, looked at from all sides


@pytest.fixture(scope="module")
def finished(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "save_every": 25}}
    result = package.pretrain(texts, run, steps=80, vocab_size=400, **settings)
    assert result["steps"] == 80
    return run


def test_a_run_folder_holds_what_the_design_says(finished):
    for name in ("run.json", "metrics.jsonl", "result.json", "report.html", "README.md", "model/model.safetensors"):
        assert (finished / name).is_file(), name
    assert (finished / "checkpoints" / "latest").read_text() == "step-00000080\n"
    assert [path.name for path in checkpoint.list_checkpoints(finished)] == ["step-00000075", "step-00000080"]
    lines = read_jsonl(finished / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 81))
    assert [line["step"] for line in lines if "validation" in line] == [20, 40, 60, 80]
    assert any("sample" in line for line in lines)
    assert not list(finished.rglob("*.partial"))


def test_the_model_learned(finished):
    lines = [line for line in read_jsonl(finished / "metrics.jsonl") if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(6.0, abs=0.3)
    assert lines[-1]["loss"] < 4.6


def test_the_result_is_the_loss_of_the_kept_weights_on_all_of_the_held_out_text(finished):
    """Computed once more, with the stock class, window by window."""
    import transformers

    from nextword.data.corpus import Corpus

    result = json.loads((finished / "result.json").read_text())
    corpus = Corpus.open(finished / "data")
    held_out = corpus.tokens("validation")
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "model")
    total = 0.0
    row = torch.from_numpy(held_out.read(0, len(held_out)))
    for start in range(0, len(row) - 1, 32):
        window = row[start : start + 33]
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0].double()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert result["loss"] == pytest.approx(total / (len(row) - 1), abs=1e-5)
    assert result["bits_per_byte"] == pytest.approx(total / 0.6931471805599453 / corpus.validation.bytes, abs=1e-5)
    assert package.evaluate(finished)["loss"] == pytest.approx(result["loss"], abs=1e-6)


def test_transformers_opens_the_model_and_agrees(finished):
    """Point by point: logits, ids, text."""
    import transformers

    ours = package.load(finished)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "model")
    text = "The following example shows 12 uses of « import », naïvely:\n    x = 3\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == ours.tokenizer.encode(text)
    assert tokenizer.decode(ids) == text == ours.tokenizer.decode(ids)
    tokens = torch.tensor([ids[:32]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, ours.gpt.unembed(ours.gpt(tokens)), atol=1e-4, rtol=1e-4)
    prompt = "The following"
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=15, do_sample=False)
    greedy = ours.generate(prompt, temperature=0, max_tokens=15)[0]
    assert tokenizer.decode(out[0][inputs["input_ids"].shape[1] :]) == greedy.text


def test_resuming_what_is_finished_is_content_at_once(finished, texts, monkeypatch):
    """And draws its report where a kill came before it; from whatever folder it is asked."""
    before = (finished / "result.json").read_bytes()
    (finished / "report.html").unlink()
    monkeypatch.chdir(texts)
    result = package.pretrain("../" + texts.name, finished, resume=True)
    assert result["steps"] == 80
    assert (finished / "result.json").read_bytes() == before
    assert (finished / "report.html").is_file()


def test_an_existing_run_is_not_begun_again(finished, texts, tmp_path):
    with pytest.raises(UsageError, match="holds a run already"):
        package.pretrain(texts, finished, steps=5)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"not empty \(notes.txt"):
        package.pretrain(texts, tmp_path, steps=5)
    with pytest.raises(UsageError, match="a file is in the way"):
        package.pretrain(texts, tmp_path / "notes.txt", steps=5)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_resume_with_other_settings_says_what_differs(finished):
    with pytest.raises(UsageError, match=r"steps: 80 → 90") as error:
        package.pretrain(out=finished, resume=True, steps=90, training={"evaluations": 4, "lr": 0.5})
    assert "training.lr: None → 0.5" in str(error.value)
    assert "evaluations" not in str(error.value)
    with pytest.raises(UsageError) as error:
        package.pretrain(out=finished, resume=True, training={"lr": 0.5})
    assert "batch_tokens" not in str(error.value), "what is not said is as it was"


def test_verify_says_what_is_whole(finished):
    whole = package.verify_tree(finished)
    assert sorted(whole.values()) == ["checkpoint", "checkpoint", "model", "shards"]


# ---------------------------------------------------------------- resumed = uninterrupted


def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(finished, texts, tmp_path):
    """Step back to step 75 by damaging step 80, and to nothing by damaging both: refused then, every file named."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    expected = state_hashes(run)
    (run / "result.json").unlink()
    weights = run / "checkpoints" / "step-00000080" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(bytes(data))
    package.pretrain(out=run, resume=True)
    assert state_hashes(run) == expected

    (run / "result.json").unlink()
    for path in checkpoint.list_checkpoints(run):
        (path / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(CorruptFileError, match=r"(?s)step-00000080/optimizer.*step-00000075/optimizer"):
        package.pretrain(out=run, resume=True)


SAVED = 7  # steps between saves


def start(run: Path, shards: Path, *more: str) -> subprocess.Popen[str]:
    arguments = nextword_command(
        "pretrain", shards, "--out", run, "--resume", "--training.save-every", str(SAVED), "--model.dropout", "0.1",
        *[a for a in TINY_MODEL_ARGS if a not in ("--vocab-size", "400")], *more,
    )  # fmt: skip
    return start_process(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def kill_and_resume(run: Path, shards: Path, kills: int, steps: int, seed: int) -> tuple[int, int, int]:
    """SIGKILL so many times, every second one inside a save; how many were killed, how many of these in a save, and the most
    steps that one of them cost."""
    rng = random.Random(seed)
    killed = inside = lost = 0
    for n in range(kills):
        process = start(run, shards, "--steps", str(steps))
        goal = steps_of(run) + rng.randrange(8, max(9, steps // kills))
        arrived = happens(lambda goal=goal: steps_of(run) >= goal, process)
        if arrived and n % 2:
            arrived = happens(lambda: any((run / "checkpoints").glob(".*.partial")), process)
            inside += arrived
        if arrived:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate()
        saved = checkpoint.list_checkpoints(run)
        lost = max(lost, steps_of(run) - (int(saved[-1].name.removeprefix("step-")) if saved else 0))
    process = start(run, shards, "--steps", str(steps))
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return killed, inside, lost


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_and_resumed_equals_uninterrupted(shards, tmp_path):
    kills, steps = int(os.environ.get("NEXTWORD_KILLS", "3")), int(os.environ.get("NEXTWORD_KILL_STEPS", "90"))
    whole = tmp_path / "whole"
    process = start(whole, shards, "--steps", str(steps))
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    killed, inside, lost = kill_and_resume(
        tmp_path / "killed", shards, kills, steps, seed=int(os.environ.get("NEXTWORD_SEED", "0"))
    )
    print(f"\n{killed} kills, {inside} of them inside a save; {lost} steps lost at the most, of saves every {SAVED}")
    assert killed >= kills - 1
    assert inside >= 1
    assert lost <= 2 * SAVED, "what was being saved, and what came beside it before the next"
    assert state_hashes(tmp_path / "killed") == state_hashes(whole)


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers these signals otherwise")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(shards, tmp_path, number, code):
    run = tmp_path / "run"
    process = start(run, shards, "--steps", "100000")
    assert happens(lambda: steps_of(run) >= 10, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err
    assert "--resume" in err
    assert "Traceback" not in err
    assert out == ""
    last = checkpoint.list_checkpoints(run)[-1]
    assert int(last.name.removeprefix("step-")) == steps_of(run)
    assert not (run / "holder.json").exists()


def test_two_processes_on_one_run(shards, tmp_path, nextword: CLIRunner):
    run = tmp_path / "run"
    process = start(run, shards, "--steps", "100000")
    assert happens(lambda: steps_of(run) >= 1, process)
    second = nextword("pretrain", shards, "--out", run, "--resume")
    assert second.returncode == RunLockedError.exit_code
    assert f"process {process.pid} on" in second.stderr
    for verb in ("pretrain", "finetune"):
        arguments = ["-X", "importtime", "-m", "nextword", verb, "--out", str(run), "--resume"]
        told = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        assert told.returncode == RunLockedError.exit_code and "nextword.cli" in told.stderr, told.stderr
        assert "torch" not in told.stderr, "it leaves before anything heavy is imported"
    kill(process)
    with open_run(run, resume=True):  # a killed holder leaves no lock behind
        pass


class FakeClock:
    """A clock that goes on only when the test says so."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def test_a_budget_is_kept_and_its_decisions_replay(shards, tmp_path, monkeypatch):
    """On a machine whose steps become three times slower half-way; then the same run again from its log alone, bit for bit."""
    run, again, clock, taken = tmp_path / "run", tmp_path / "again", FakeClock(), itertools.count()

    def timed(model: Any, inputs: Any) -> Any:
        clock.time += 0.05 if next(taken) < 150 else 0.15
        return next_word(model, inputs)

    monkeypatch.setattr(Job, "now", clock)
    monkeypatch.setattr("nextword.pretraining.next_word", timed)
    result = package.pretrain(shards, run, budget="20s", started=1000.0 - 1.5, **SETTINGS)
    assert result["seconds"] == pytest.approx(clock.time - 1000 + 1.5, abs=1e-3)
    assert result["seconds"] == pytest.approx(20 - FINISHING_SECONDS, abs=0.3), "what remains is for the report"
    assert len(read_jsonl(run / "decisions.jsonl")) > 3
    monkeypatch.setattr("nextword.pretraining.next_word", next_word)

    again.mkdir()
    facts = json.loads((run / "run.json").read_text())
    shutil.copy(run / "run.json", again)
    shutil.copy(run / "decisions.jsonl", again)
    assert facts["shards"] == str(shards.resolve())
    monkeypatch.setattr("nextword.training.step_budget.Clock.decide", lambda *_: None)  # the log alone
    package.pretrain(out=again, resume=True)
    assert state_hashes(again) == state_hashes(run)


def test_early_stop_keeps_the_best(texts, tmp_path):
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "evaluations": 20, "patience": 2, "lr": 0.05}}
    settings["model"] = {**SETTINGS["model"], "dropout": 0.0}
    result = package.pretrain(texts, tmp_path / "run", steps=2000, vocab_size=400, **settings)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    looks = {line["step"]: line["validation"]["loss"] for line in lines if "validation" in line}
    assert result["best_step"] == min(looks, key=lambda step: looks[step])
    if result["steps"] < 2000:
        assert any("stopped early" in line.get("message", "") for line in lines)
        assert result["steps"] - result["best_step"] == 200


def test_divergence_ends_with_its_own_code_and_saves_nothing_bad(shards, tmp_path, nextword: CLIRunner, monkeypatch):
    """A learning rate of 1e30 makes the weights too large for any finite loss."""
    done = nextword(
        "pretrain", shards, "--out", tmp_path / "run", "--steps", "60", "--training.lr", "1e30", "--training.warmup", "0",
        "--training.optimizer", "adamw", "--preset", "gpt2", *[a for a in TINY_MODEL_ARGS if a not in ("--vocab-size", "400")],
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "not a finite number in 5 steps in a row" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_preset_trains(texts, tmp_path):
    """Every preset trains, from text to stock directory, with the recipe that suits it."""
    for preset in ("tutorial", "gpt1", "gpt2", "modern"):
        result = package.pretrain(
            texts, tmp_path / preset, preset=preset, steps=120, tokenizer="char",
            model={k: v for k, v in SETTINGS["model"].items() if k != "dropout"}, training=SETTINGS["training"],
        )  # fmt: skip
        assert result["loss"] < 3.9, preset
        assert package.generate(tmp_path / preset, "The", max_tokens=5)[0].text


def test_without_anything_to_learn_from(tmp_path):
    with pytest.raises(UsageError, match="say what to learn from"):
        package.pretrain(out=tmp_path / "run")
    with pytest.raises(UsageError, match="nothere: no such file or folder, and no named corpus"):
        package.pretrain("nothere", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(NextwordError, match="no text was found"):
        package.pretrain(tmp_path / "empty", tmp_path / "run")
