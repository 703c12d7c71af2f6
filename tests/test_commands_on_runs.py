"""Every command, without options, on every kind of run and model that the others make: a result, or a line with the reason."""

import io
import json
import shutil
from pathlib import Path

import pytest

import nextword as nw
from conftest import CLIRunner

TABLES = {
    "classify": "text,label\n" + "".join(f"good day {i},good\nbad day {i},bad\n" for i in range(10)),
    "labels": "text,labels\n" + "".join(f"good day {i},a;b\nbad day {i},b\n" for i in range(10)),
    "entail": "premise,hypothesis,label\n" + "".join(f"it rains {i},it is wet,{i % 2}\n" for i in range(20)),
    "similarity": "sentence1,sentence2,score\n" + "".join(f"it rains {i},it pours,{i / 4}\n" for i in range(20)),
    "choose": "question,choices,answer\n" + "".join(f'where {i},"[""here"",""there""]",{i % 2}\n' for i in range(20)),
    "rewrite": "prompt,completion\n" + "".join(f"say {i},word {i}\n" for i in range(20)),
    "prefer": "prompt,chosen,rejected\n" + "".join(f"say {i},yes {i},no {i}\n" for i in range(20)),
}
OTHERS = ["chat", "lora", "study", "checkpoint", "model", "foreign", "shards", "empty"]
RUNS = ["pretrained", "unfinished", "continued", *TABLES, *OTHERS]
# Runs with a model of a task, which its validation set scores.
SCORED = [*TABLES, "chat", "lora"]
LANGUAGE_MODELS = ["pretrained", "continued", "checkpoint", "model", "foreign"]


@pytest.fixture(scope="module")
def runs(base: Path, shards: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "empty").mkdir()
    shutil.copytree(base, folder / "pretrained")
    shutil.copytree(base, folder / "unfinished")
    for name in ("model", "result.json", "report.html", "README.md"):
        path = folder / "unfinished" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.copytree(base / "model", folder / "model")
    shutil.copytree(base / "model", folder / "foreign")
    (folder / "foreign" / "nextword.json").unlink()
    shutil.copytree(shards, folder / "shards")
    nw.finetune(base, texts, folder / "continued", task="continue", steps=1)
    for name, table in TABLES.items():
        (folder / f"{name}.csv").write_text(table)
        nw.finetune(base, folder / f"{name}.csv", folder / name, steps=1)
    nw.finetune(base, folder / "classify.csv", folder / "lora", steps=1, lora=True)
    line = '{"messages": [{"role": "user", "content": "say %d"}, {"role": "assistant", "content": "word %d"}]}\n'
    (folder / "chat.jsonl").write_text("".join(line % (i, i) for i in range(20)))
    nw.finetune(base, folder / "chat.jsonl", folder / "chat", steps=1)
    nw.transfer(base, folder / "classify.csv", folder / "study", counts=[8], num_seeds=1, steps=1)
    return folder


def path_of(runs: Path, kind: str) -> Path:
    return next((runs / "pretrained" / "checkpoints").glob("*step*"), runs) if kind == "checkpoint" else runs / kind


# The arguments after the run, and the runs from which the command makes a result.
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "generate": (["--max-tokens", "2"], [*LANGUAGE_MODELS, "rewrite", "chat", "prefer"]),
    "chat": ([], ["chat", "prefer"]),
    "evaluate": ([], ["pretrained", "continued", *SCORED]),
    "export": ([], ["pretrained", "continued", "model", "foreign", "chat"]),
    "report": ([], ["pretrained", "unfinished", "continued", *SCORED, "study"]),
    "verify": ([], ["pretrained", *SCORED, "model", "shards"]),
    "predict": (["a text"], SCORED),
    "explain": (["a text"], LANGUAGE_MODELS),
    "audit": (["--texts", "2", "--prefixes", "2"], LANGUAGE_MODELS),
    "transfer": (["{runs}/classify.csv", "--steps", "1", "--quiet", "--counts", "8", "--num-seeds", "1"], []),
    "finetune": (["{runs}/classify.csv", "--steps", "1", "--quiet"], ["pretrained", "continued", "model", "foreign"]),
}
NUM_TEXTS = {"entail": 2, "similarity": 2, "choose": 3}
# Commands that train take seconds, and open all runs of a task alike.
TRAINED = {
    "transfer": ("pretrained", "study", "empty"),
    "finetune": [kind for kind in RUNS if kind == "classify" or kind not in TABLES],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_without_options_there_is_a_result_or_a_reason(nextword: CLIRunner, runs, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    arguments, kinds_with_a_result = COMMANDS[command]
    for kind in TRAINED.get(command, RUNS):
        given = [argument.format(runs=runs) for argument in arguments]
        given += ["--out", str(tmp_path / kind)] if command in TRAINED else []
        given *= NUM_TEXTS.get(kind, 1) if command == "predict" else 1
        done = nextword(command, path_of(runs, kind), *given)
        assert done.returncode in (0, 1, 2, 3), (kind, done.stderr)
        assert done.returncode == 0 or "\nnextword: " in "\n" + done.stderr, (kind, done.stderr)
        assert done.returncode == 0 or kind not in kinds_with_a_result, (kind, done.stderr)


def test_evaluate_repeats_the_scores_of_a_fine_tuning(runs, nextword: CLIRunner):
    """On the same validation examples, with the same metrics."""
    for kind in SCORED:
        stored = json.loads((runs / kind / "result.json").read_text())
        result = nw.evaluate(runs / kind)
        assert result.loss == pytest.approx(stored["loss"], abs=1e-6), kind
        if stored["bits_per_byte"]:
            assert result.bits_per_byte == pytest.approx(stored["bits_per_byte"], abs=1e-6)
        assert (result.scores or {}).keys() == stored["scores"].keys(), kind
        for name, score in stored["scores"].items():
            assert (result.scores or {})[name]["value"] == pytest.approx(score["value"], abs=1e-6), (kind, name)
        done = nextword("evaluate", runs / kind)
        assert done.stdout.startswith("the validation set, which also selected the weights: loss"), done.stderr
        assert "not exactly" not in done.stderr, done.stderr
