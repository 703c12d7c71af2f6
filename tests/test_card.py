"""The code examples of model cards: they run in the run directory and give the answers of `nextword predict`."""

import json
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest

import nextword as package
from nextword.common.results import short_path_name
from nextword.data.chat_format import encode_conversation
from nextword.reporting.report import strip_directories

WORDS = ["light", "salt", "asleep", "awake", "plants", "station", "water", "verb", "cat", "green", "seven", "train"]


def pick(i: int, n: int = 3) -> str:
    return " ".join(WORDS[(i * 5 + j * 7 + i * j) % len(WORDS)] for j in range(n))


EXAMPLES: dict[str, Any] = {
    "classify": lambda i: {"text": pick(i), "label": ["good", "bad"][i % 2]},
    "several": lambda i: {"text": pick(i), "labels": [["a"], ["a", "b"], ["c"]][i % 3]},
    "entail": lambda i: {"premise": pick(i), "hypothesis": pick(i + 1, 2), "label": ["no", "yes", "maybe"][i % 3]},
    "similarity": lambda i: {"sentence1": pick(i), "sentence2": pick(i + 2), "score": i % 5 / 2},
    "choose": lambda i: {"question": pick(i), "choices": [pick(i, 1), pick(i + 3, 1)], "answer": i % 2},
    "rewrite": lambda i: {"prompt": pick(i), "completion": pick(i, 2)},
    "chat": lambda i: {
        "messages": [{"role": "user", "content": pick(i)}, {"role": "assistant", "content": pick(i, 2)}]
    },
    "prefer": lambda i: {"prompt": pick(i), "chosen": pick(i, 2), "rejected": pick(i + 1, 2)},
}


@pytest.fixture(scope="module", autouse=True)
def quiet_transformers() -> None:
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def base(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "small base"
    model = {"n_layers": 2, "n_heads": 2, "d_model": 32, "context_length": 64}
    package.pretrain(texts, run, steps=3, vocab_size=400, model=model, training={"batch_tokens": 256, "evaluations": 1})
    return run


def finetuned_run(base: Path, folder: Path, kind: str, *, lora: bool = False) -> Path:
    data = folder / f"{kind}.jsonl"
    data.write_text("".join(json.dumps(EXAMPLES[kind](i)) + "\n" for i in range(40)), encoding="utf-8")
    run = folder / "my run"
    training = {"evaluations": 1, "lr": 0.01}
    package.finetune(base, data, run, steps=4, lora=lora, training=training, tuning={"dropout": 0.0})
    return run


def code_blocks(run: Path, language: str) -> list[str]:
    card = (run / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)\n```$", card, re.DOTALL | re.MULTILINE)


def run_code(code: str, run: Path, monkeypatch: pytest.MonkeyPatch, **known: Any) -> dict[str, Any]:
    """Execute the code of a card in the run directory; the variables that it defines."""
    monkeypatch.chdir(run)
    names = dict(known)
    with warnings.catch_warnings():
        # PEFT asks transformers for a property that transformers has given another name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        exec(code, names)
    return names


HEADS = ("classify", "several", "entail", "similarity", "choose")


@pytest.mark.parametrize("kind", HEADS)
def test_transformers_code_gives_the_answer_of_predict(base, tmp_path, monkeypatch, capsys, kind) -> None:
    run = finetuned_run(base, tmp_path, kind)
    capsys.readouterr()
    [code] = code_blocks(run, "python")
    run_code(code, run, monkeypatch)
    printed = capsys.readouterr().out.strip()
    command = shlex.split(code_blocks(run, "bash")[0].splitlines()[0])
    assert command[:3] == ["nextword", "predict", "."]
    prediction = package.load(run).predict(*command[3:])
    if kind == "similarity":
        assert float(printed) == pytest.approx(prediction["score"], abs=1e-4)
    else:
        assert printed == str(prediction["labels"] if kind == "several" else prediction["label"])


def test_generation_code_gives_the_text_of_predict(base, tmp_path, monkeypatch, capsys) -> None:
    run = finetuned_run(base, tmp_path, "rewrite")
    capsys.readouterr()
    run_code(code_blocks(run, "python")[0], run, monkeypatch)
    command = shlex.split(code_blocks(run, "bash")[0].splitlines()[0])
    assert capsys.readouterr().out.strip() == package.load(run).predict(*command[3:])["text"]


def test_chat_code_gives_the_answer_of_predict(base, tmp_path, monkeypatch, capsys) -> None:
    run = finetuned_run(base, tmp_path, "chat")
    capsys.readouterr()
    names = run_code(code_blocks(run, "python")[0], run, monkeypatch)
    model = package.load(run)
    assert (
        names["inputs"]["input_ids"][0].tolist()
        == encode_conversation(model.tokenizer, names["messages"], add_generation_prompt=True)[0]
    )
    assert capsys.readouterr().out.strip() == model.predict(names["messages"][0]["content"])["text"]
    assert code_blocks(run, "bash") == ["nextword chat ."]


def test_card_of_preference_tuning(base, tmp_path, monkeypatch, capsys) -> None:
    run = finetuned_run(base, tmp_path, "prefer")
    capsys.readouterr()
    run_code(code_blocks(run, "python")[0], run, monkeypatch)
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "| preference accuracy |" in card and "base model" in card
    assert "orgetting: from" in card


@pytest.mark.parametrize("kind", ["classify", "choose", "chat"])
def test_adapter_on_the_base_model_equals_the_merged_model(base, tmp_path, monkeypatch, kind) -> None:
    import torch

    run = finetuned_run(base, tmp_path, kind, lora=True)
    stock, adapted = (run_code(code, run, monkeypatch) for code in code_blocks(run, "python"))
    with torch.no_grad():
        inputs = stock["inputs"]
        first_row = inputs["input_ids"][:1]
        expected, actual = (names["model"].eval()(first_row).logits for names in (stock, adapted))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    card = (run / "README.md").read_text(encoding="utf-8")
    assert 'base model "small base"' in card
    assert "LoRA, rank 8" in card


def test_card_of_continued_pretraining(base, texts, tmp_path, monkeypatch, capsys) -> None:
    run = tmp_path / "continued"
    package.finetune(base, texts, run, task="continue", steps=2, training={"batch_tokens": 256, "evaluations": 1})
    capsys.readouterr()
    run_code(code_blocks(run, "python")[0], run, monkeypatch)
    assert capsys.readouterr().out
    card = (run / "README.md").read_text(encoding="utf-8")
    assert 'starting from the model "small base"' in card
    assert "The base model has" in card
    assert code_blocks(run, "bash") == ['nextword generate . "Once upon a time"']


def test_card_of_a_fine_tuning(base, tmp_path) -> None:
    run = finetuned_run(base, tmp_path, "classify")
    card = (run / "README.md").read_text(encoding="utf-8")
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    front, body = card.split("---\n", 2)[1:]
    assert "pipeline_tag: text-classification" in front
    examples = json.loads((run / "run.json").read_text())["data"]["train"]["examples"]
    assert "# my run" in body and 'starting from the model "small base"' in body
    assert "one of 2 labels (bad, good)" in body and "bag of words" in body
    assert "| columns | text, label |" in body and f"| training data | {examples} examples |" in body
    score = result["scores"][result["metric"]]
    assert f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})" in body
    assert str(tmp_path) not in card and str(base) not in card and "perplexity" not in card
    assert 'class="dots"' in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("nextword finetune /a/b/base data.csv --out runs/x", "nextword finetune base data.csv --out runs/x"),
        ("nextword finetune base/model /data/x.csv --column a=b", "nextword finetune base/model x.csv --column a=b"),
        ("nextword finetune ~/base --validation=/x/y.csv", "nextword finetune base --validation=y.csv"),
        (r"nextword finetune C:\models\base D:\x.csv", "nextword finetune base x.csv"),
        ("nextword finetune base data.csv", "nextword finetune base data.csv"),
    ],
    ids=["absolute", "relative", "option", "windows", "plain"],
)
def test_commands_are_shown_without_directories(command: str, shown: str) -> None:
    assert strip_directories(command) == shown


@pytest.mark.parametrize(
    ("path", "name"),
    [("/a/b", "b"), ("/a/run/model", "run"), ("model", "model"), ("a\\b\\", "b"), ("/", "/"), ("", "")],
    ids=["folder", "run", "bare", "windows", "root", "empty"],
)
def test_short_names_of_paths(path: str, name: str) -> None:
    assert short_path_name(path) == name
