"""Files written by version 0.1.0 (commit 296681d) open, verify, evaluate and resume.

tests/fixtures/README.md has the commands that wrote them.
"""

import json
import math
import tarfile
from pathlib import Path

import pytest

import nextword
from conftest import CLIRunner
from nextword.common.console import Console
from nextword.data.dataset import InMemoryTokens

ARCHIVE = Path(__file__).with_name("fixtures") / "run_296681d.tar.xz"
RUNS = ("pretrain", "gpt2", "tutorial", "classifier", "lora", "chat")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The directory with the files of 296681d, with paths in run.json adapted to where it lies."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    directory = tmp_path / "fixture"
    for file in directory.glob("*/run.json"):
        file.write_text(file.read_text(encoding="utf-8").replace("FIXTURE", str(directory)), encoding="utf-8")
    return directory


def test_runs_and_shards_verify(old: Path, nextword: CLIRunner) -> None:
    done = nextword("verify", *(old / name for name in (*RUNS, "stopped", "shards")), "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["whole"]) >= len(RUNS) + 2


def test_a_model_evaluates_and_generates_as_before(old: Path) -> None:
    expected = json.loads((old / "evaluate.json").read_text())
    model = nextword.load(old / "pretrain")
    tokens, num_bytes = model.read_tokens(old / "texts", None, Console())
    without_start = InMemoryTokens(tokens.tokens[1:])  # version 0.1 did not predict the first token of a text
    result = model.evaluate_tokens(without_start, num_bytes, Console(quiet=True))
    assert (result.tokens, result.bytes) == (expected["tokens"], expected["bytes"])
    assert result.loss == pytest.approx(expected["loss"], rel=1e-5)
    completion = json.loads((old / "generate.json").read_text())["completions"][0]
    generated = nextword.generate(old / "pretrain", completion["prompt"], temperature=0, max_tokens=12)
    assert generated[0].text == completion["text"]


@pytest.mark.parametrize("preset", ["gpt2", "tutorial"])
def test_models_of_other_presets_open(old: Path, preset: str) -> None:
    assert math.isfinite(nextword.load(old / preset).evaluate(old / "texts").loss)


def test_a_classifier_predicts_as_before(old: Path, nextword: CLIRunner) -> None:
    expected = json.loads((old / "predict.jsonl").read_text())
    done = nextword("predict", old / "classifier", old / "labels.csv", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [p["label"] for p in result["predictions"]] == [p["label"] for p in expected["predictions"]]
    assert [p["probabilities"]["animal"] for p in result["predictions"]] == pytest.approx(
        [p["probabilities"]["animal"] for p in expected["predictions"]], abs=1e-4
    )
    assert result["scores"]["accuracy"]["value"] == expected["scores"]["accuracy"]["value"]


def test_a_stopped_run_resumes_to_the_same_result(old: Path, nextword: CLIRunner) -> None:
    """The loss is that of the uninterrupted run of 296681d. Bit equality holds on the same processor only."""
    run = old / "stopped"
    request = json.loads((run / "run.json").read_text())["request"]
    sizes = [f"--model.{name.replace('_', '-')}={value}" for name, value in request["model"].items()]
    training = [f"--training.{name.replace('_', '-')}={value}" for name, value in request["training"].items()]
    arguments = ["pretrain", old / "shards", "--out", run, *sizes, *training, "--steps", 150, "--seed", 1, "--resume"]
    done = nextword(*map(str, arguments))
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "result.json").read_text())["loss"] == pytest.approx(3.578726346706199, rel=1e-3)
    steps = [record["step"] for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
    assert sorted(set(steps)) == list(range(1, 151))


def test_a_stopped_run_resumes_from_its_directory_alone(old: Path, nextword: CLIRunner) -> None:
    done = nextword("pretrain", "--out", old / "stopped", "--resume")
    assert done.returncode == 0, done.stderr


def test_a_finished_run_is_reported_and_fine_tuned_further(old: Path, nextword: CLIRunner) -> None:
    assert nextword("report", old / "classifier").returncode == 0
    assert (old / "classifier" / "report.html").is_file()
    done = nextword("finetune", old / "pretrain", old / "labels.csv", "--out", old / "new", "--steps", 2)
    assert done.returncode == 0, done.stderr
