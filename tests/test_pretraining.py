"""Pre-training runs from start to end: run directories, resumes after real kills, signals, time budgets and early stopping."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nextword as package
import nextword.planning.planner  # imported before its loss is replaced
from conftest import TINY_MODEL_ARGS, CLIRunner, nextword_command
from nextword.commands.command import Context
from nextword.commands.pretrain import PretrainConfig, format_run
from nextword.common.errors import CorruptFileError, NextwordError, RunLockedError, UsageError
from nextword.common.fs import read_jsonl
from nextword.common.run_dir import RunInterruptedError, run_lock
from nextword.data.corpus import Corpus
from nextword.inference import perplexity
from nextword.inference.perplexity import compute_token_nll
from nextword.pipeline.evaluators import LanguageModelEvaluator
from nextword.training import checkpoint
from nextword.training.launch import RunContext
from nextword.training.losses import causal_lm_loss
from nextword.training.step_budget import TimeBudgetController
from nextword.training.trainer import FINALIZE_SECONDS
from processes import PATIENCE, happens, start_process
from runs import InterruptingConsole, state_hashes, steps_of

SETTINGS: dict[str, Any] = {
    "model": {"n_layers": 2, "n_heads": 2, "d_model": 32, "context_length": 32, "dropout": 0.1},
    "training": {"batch_tokens": 256, "evaluations": 4},
}


# ---------------------------------------------------------------- a complete run


@pytest.fixture(scope="module")
def complete_run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "save_every": 25}}
    result = package.pretrain(texts, run, steps=80, vocab_size=400, **settings)
    assert result.steps == 80
    return run


def test_the_files_of_a_run_directory(complete_run):
    for name in ("run.json", "metrics.jsonl", "result.json", "report.html", "README.md", "model/model.safetensors"):
        assert (complete_run / name).is_file(), name
    assert (complete_run / "checkpoints" / "latest").read_text() == "step-00000080\n"
    assert [path.name for path in checkpoint.list_checkpoints(complete_run)] == ["step-00000075", "step-00000080"]
    lines = read_jsonl(complete_run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 81))
    assert [line["step"] for line in lines if "validation" in line] == [20, 40, 60, 80]
    assert any("sample" in line for line in lines)
    assert not list(complete_run.rglob("*.partial"))


def test_the_model_learned(complete_run):
    lines = [line for line in read_jsonl(complete_run / "metrics.jsonl") if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(6.0, abs=0.3)
    assert lines[-1]["loss"] < 4.6


def test_the_result_is_the_loss_of_the_best_weights_on_the_whole_validation_set(complete_run):
    """Computed again with transformers, window by window."""
    import transformers

    from nextword.data.corpus import Corpus

    result = json.loads((complete_run / "result.json").read_text())
    corpus = Corpus.open(complete_run / "data")
    validation = corpus.tokens("validation")
    model = transformers.AutoModelForCausalLM.from_pretrained(complete_run / "model")
    total = 0.0
    row = torch.from_numpy(validation.read(0, len(validation)))
    for start in range(0, len(row) - 1, 32):
        window = row[start : start + 33]
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0].double()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert result["loss"] == pytest.approx(total / (len(row) - 1), abs=1e-5)
    assert result["bits_per_byte"] == pytest.approx(total / 0.6931471805599453 / corpus.validation.bytes, abs=1e-5)
    assert package.evaluate(complete_run).loss == pytest.approx(result["loss"], abs=1e-6)


def test_transformers_opens_the_model_and_agrees(complete_run):
    """Logits, token ids and generated text are equal."""
    import transformers

    ours = package.load(complete_run)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(complete_run / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(complete_run / "model")
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


def test_resuming_what_is_finished_is_content_at_once(complete_run, texts, monkeypatch):
    """From any working directory. A missing report is written."""
    before = (complete_run / "result.json").read_bytes()
    (complete_run / "report.html").unlink()
    monkeypatch.chdir(texts)
    result = package.pretrain("../" + texts.name, complete_run, resume=True)
    assert result.steps == 80
    assert (complete_run / "result.json").read_bytes() == before
    assert (complete_run / "report.html").is_file()


def test_a_run_does_not_overwrite_a_run_or_other_files(complete_run, texts, tmp_path):
    with pytest.raises(UsageError, match="already holds a run"):
        package.pretrain(texts, complete_run, steps=5)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"not empty \(notes.txt"):
        package.pretrain(texts, tmp_path, steps=5)
    with pytest.raises(UsageError, match="is not a directory"):
        package.pretrain(texts, tmp_path / "notes.txt", steps=5)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_resume_with_other_options_lists_the_differences(complete_run):
    with pytest.raises(UsageError, match=r"steps: 80 → 90") as error:
        package.pretrain(out=complete_run, resume=True, steps=90, training={"evaluations": 4, "lr": 0.5})
    assert "training.lr: None → 0.5" in str(error.value)
    assert "evaluations" not in str(error.value)
    with pytest.raises(UsageError) as error:
        package.pretrain(out=complete_run, resume=True, training={"lr": 0.5})
    assert "batch_tokens" not in str(error.value), "options that are not given are not compared"


def test_verify_lists_valid_directories(complete_run):
    whole = package.verify(complete_run).whole
    assert sorted(whole.values()) == ["checkpoint", "checkpoint", "model", "run", "shards"]


# ---------------------------------------------------------------- a resumed run equals an uninterrupted one


def test_a_corrupt_checkpoint_is_skipped(complete_run, texts, tmp_path):
    """The run resumes from the one before and ends the same. If all are corrupt, every file is reported."""
    run = tmp_path / "run"
    shutil.copytree(complete_run, run)
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
    settings = ["--training.save-every", str(SAVED), "--model.dropout", "0.1", *TINY_MODEL_ARGS]
    arguments = nextword_command("pretrain", shards, "--out", run, "--resume", *settings, *more)
    return start_process(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def kill_and_resume(run: Path, shards: Path, kills: int, steps: int, seed: int) -> tuple[int, int, int]:
    """Send SIGKILL several times, every second time while a checkpoint is written.

    Returns:
        The number of killed processes, of those killed while a checkpoint was written, and the most steps that one lost.
    """
    rng = random.Random(seed)
    killed = inside = lost = 0
    for n in range(kills):
        process = start(run, shards, "--steps", str(steps))
        goal = steps_of(run) + rng.randrange(8, max(9, steps // (kills + 1)))
        arrived = happens(lambda goal=goal: steps_of(run) >= goal, process)
        if arrived and n % 2 == 0:
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
    kills, steps = int(os.environ.get("NEXTWORD_KILLS", "1")), int(os.environ.get("NEXTWORD_KILL_STEPS", "60"))
    whole = tmp_path / "whole"
    settings = {"batch_tokens": SETTINGS["training"]["batch_tokens"], "save_every": SAVED}
    package.pretrain(shards, whole, steps=steps, model=SETTINGS["model"], training=settings)
    killed, inside, lost = kill_and_resume(
        tmp_path / "killed", shards, kills, steps, seed=int(os.environ.get("NEXTWORD_SEED", "0"))
    )
    print(
        f"\n{killed} kills, {inside} of them while a checkpoint was written; at most {lost} steps lost, saved every {SAVED}"
    )
    assert killed >= max(1, kills - 1)
    assert inside >= 1
    assert lost <= 2 * SAVED, "the steps since the checkpoint being written, and during it"
    assert state_hashes(tmp_path / "killed") == state_hashes(whole)


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers these signals otherwise")
def test_a_signal_saves_a_checkpoint_and_explains_how_to_continue(shards, tmp_path):
    """SIGTERM ends a process, SIGINT a call from Python."""
    run = tmp_path / "run"
    process = start(run, shards, "--steps", "100000")
    assert happens(lambda: steps_of(run) >= 10, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, err
    assert "--resume" in err
    assert "Traceback" not in err
    assert out == ""

    step = steps_of(run) + 3
    with pytest.raises(RunInterruptedError, match="--resume") as error:
        package.pretrain(out=run, resume=True, console=InterruptingConsole(step, signal.SIGINT))
    assert error.value.exit_code == 130
    assert steps_of(run) == step
    last = checkpoint.list_checkpoints(run)[-1]
    assert int(last.name.removeprefix("step-")) == steps_of(run)
    assert not (run / "holder.json").exists()


def test_a_second_process_on_a_run_is_refused(tmp_path):
    """Before anything heavy is imported."""
    (tmp_path / "run.json").write_text("{}")
    with run_lock(tmp_path):
        for name in ("pretrain", "finetune"):
            command = [sys.executable, "-X", "importtime", "-m", "nextword", name, "--out", str(tmp_path), "--resume"]
            refused = subprocess.run(command, capture_output=True, text=True)
            assert refused.returncode == RunLockedError.exit_code, refused.stderr
            assert f"process {os.getpid()} on" in refused.stderr
            assert "nextword.commands.cli" in refused.stderr and "torch" not in refused.stderr


class FakeClock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def test_a_time_budget_is_kept_and_its_decisions_are_replayed(shards, tmp_path, monkeypatch):
    """Steps become three times slower half-way. The same run from its log of decisions alone is equal bit for bit."""
    run, replayed, clock, calls = tmp_path / "run", tmp_path / "replayed", FakeClock(), itertools.count()

    def timed(model: Any, batch: Any, kernels: bool) -> Any:
        clock.time += 0.1 if next(calls) < 75 else 0.3
        return causal_lm_loss(model, batch, kernels)

    with monkeypatch.context() as patch:
        patch.setattr(RunContext, "now", clock)
        patch.setattr("nextword.training.losses.causal_lm_loss", timed)
        config = PretrainConfig((str(shards),), out=run, budget="20s", **SETTINGS)
        result = package.pretrain.run(config, Context(started=1000.0 - 1.5))
    assert result.seconds == pytest.approx(clock.time - 1000 + 1.5, abs=1e-3)
    assert result.seconds == pytest.approx(20 - FINALIZE_SECONDS, abs=0.3), "the rest is for the report"
    assert len(read_jsonl(run / "decisions.jsonl")) > 3
    messages = [record["message"] for record in read_jsonl(run / "metrics.jsonl") if "message" in record]
    assert any(
        re.match(r"speed: [\d,]+ tokens/s instead of [\d,]+\..* Now expected: [\d.]+ bits/byte", m) for m in messages
    )

    replayed.mkdir()
    for name in ("run.json", "decisions.jsonl"):
        shutil.copy(run / name, replayed)
    assert json.loads((run / "run.json").read_text())["shards"] == str(shards.resolve())
    monkeypatch.setattr(TimeBudgetController, "update", lambda *_: None)  # the log alone
    package.pretrain(out=replayed, resume=True)
    assert state_hashes(replayed) == state_hashes(run)


def test_the_budget_has_time_for_the_last_validation_and_the_whole_final_evaluation(shards, tmp_path, monkeypatch):
    clock = FakeClock()

    def slow_loss(*arguments: Any, **keywords: Any) -> Any:
        clock.time += 0.2
        return causal_lm_loss(*arguments, **keywords)

    def slow_nll(*arguments: Any) -> Any:
        clock.time += 0.3
        return compute_token_nll(*arguments)

    monkeypatch.setattr(RunContext, "now", clock)
    monkeypatch.setattr("nextword.training.losses.causal_lm_loss", slow_loss)
    monkeypatch.setattr(perplexity, "compute_token_nll", slow_nll)
    config = PretrainConfig((str(shards),), out=tmp_path / "run", budget="40s", **SETTINGS)
    result = package.pretrain.run(config, Context(started=1000.0))
    assert result.validation_tokens == len(Corpus.open(shards).tokens("validation")) - 1
    assert result.loss_margin is None and result.seconds <= 40 - FINALIZE_SECONDS + 0.3, "a batch may end after it"


def test_the_final_evaluation_is_within_the_budget(shards, tmp_path, monkeypatch, capsys):
    """Few steps fit into the budget. The machine is slow in the final evaluation, which then reads a sample."""
    clock, evaluate_best = FakeClock(), LanguageModelEvaluator.evaluate_best

    def slow_loss(*arguments: Any, **keywords: Any) -> Any:
        clock.time += 0.5
        return causal_lm_loss(*arguments, **keywords)

    def slow_nll(*arguments: Any) -> Any:
        clock.time += 0.5
        return compute_token_nll(*arguments)

    def evaluate_slowly(evaluator: LanguageModelEvaluator) -> Any:
        monkeypatch.setattr(perplexity, "compute_token_nll", slow_nll)
        return evaluate_best(evaluator)

    monkeypatch.setattr(RunContext, "now", clock)
    monkeypatch.setattr("nextword.training.losses.causal_lm_loss", slow_loss)
    monkeypatch.setattr(LanguageModelEvaluator, "evaluate_best", evaluate_slowly)
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 64)
    config = PretrainConfig((str(shards),), out=tmp_path / "run", budget="20s", **SETTINGS)
    result = package.pretrain.run(config, Context(started=1000.0))
    assert result.seconds <= 20
    assert result.validation_tokens is not None and result.loss_margin is not None
    assert 0 < result.validation_tokens < len(Corpus.open(shards).tokens("validation")) - 1
    assert result.loss_margin > 0
    err = capsys.readouterr().err
    assert f"only {result.steps} training steps fit into the budget" in err
    assert "± " in format_run(result) and "nextword evaluate reads all" in format_run(result)


@pytest.mark.needs("more time")
def test_early_stopping_keeps_the_best_weights(texts, tmp_path):
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "evaluations": 20, "patience": 2, "lr": 0.05}}
    settings["model"] = {**SETTINGS["model"], "dropout": 0.0}
    result = package.pretrain(texts, tmp_path / "run", steps=2000, vocab_size=400, **settings)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    validations = {line["step"]: line["validation"]["loss"] for line in lines if "validation" in line}
    assert result.best_step == min(validations, key=lambda step: validations[step])
    if result.steps < 2000:
        assert any("early stopping" in line.get("message", "") for line in lines)
        assert result.steps - result.best_step == 200


def test_divergence_has_its_own_exit_code(shards, tmp_path, nextword: CLIRunner, monkeypatch):
    def infinite_loss(*arguments: Any, **keywords: Any) -> Any:
        terms = causal_lm_loss(*arguments, **keywords)
        return {name: term._replace(total=term.total * torch.inf) for name, term in terms.items()}

    monkeypatch.setattr("nextword.training.losses.causal_lm_loss", infinite_loss)
    done = nextword("pretrain", shards, "--out", tmp_path / "run", "--steps", "60", *TINY_MODEL_ARGS)
    assert done.returncode == 5, done.stderr
    assert "not a finite number in 5 steps in a row" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_preset_trains(texts, tmp_path):
    """Each with its own recipe: from log 97 = 4.6, as many characters as the text has."""
    package.prepare([texts], tmp_path / "shards", tokenizer="char")
    model = {k: v for k, v in SETTINGS["model"].items() if k != "dropout"}
    settings: dict[str, Any] = {"steps": 60, "model": model, "training": SETTINGS["training"]}
    for preset in ("tutorial", "gpt1", "gpt2", "modern"):
        result = package.pretrain(tmp_path / "shards", tmp_path / preset, preset=preset, **settings)
        assert result.loss is not None and result.loss < 4.2, preset
        assert package.generate(tmp_path / preset, "The", max_tokens=5)[0].text


def test_missing_text_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="the text is missing"):
        package.pretrain(out=tmp_path / "run")
    with pytest.raises(UsageError, match="nothere: no such file or directory, and no built-in dataset"):
        package.pretrain("nothere", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(NextwordError, match="no text was found"):
        package.pretrain(tmp_path / "empty", tmp_path / "run")
