"""The program as a person meets it: help at once, clear errors, results on standard output alone."""

import json
import os
import shutil
from pathlib import Path

import pytest

from conftest import TINY_MODEL_ARGS, CLIRunner

VERBS = ["demo", "plan", "prepare", "pretrain", "generate", "evaluate", "audit", "export", "report", "verify"]


@pytest.fixture(scope="module")
def run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import nextword

    out = tmp_path_factory.mktemp("cli") / "run"
    nextword.pretrain(
        texts, out, steps=40, vocab_size=400, training={"batch_tokens": 256},
        model={"n_layers": 1, "n_heads": 2, "d_model": 32, "context_length": 32},
    )  # fmt: skip
    return out


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_worth_reading_and_there_at_once(nextword: CLIRunner, verb):
    arguments = [verb, "--help"] if verb else ["--help"]
    before = os.times()
    done = nextword(*arguments)
    after = os.times()
    # Time on the processor, which a neighbour does not lengthen; in wall time see docs/benchmarks.md.
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 0.9
    assert done.returncode == 0
    for word in VERBS if not verb else ["--json", "--seed", "--quiet", "--device", "Exit codes"]:
        assert word in done.stdout
    assert "│ " in done.stdout
    assert done.stderr == ""


def test_pretrain_from_text_to_json(nextword: CLIRunner, texts, tmp_path):
    done = nextword("pretrain", texts, "--out", tmp_path / "run", "--steps", "25", "--json", *TINY_MODEL_ARGS)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # one object and nothing else
    assert {"run", "model", "steps", "seconds", "loss", "bits_per_byte"} <= set(result)
    assert result["steps"] == 25
    assert "training" in done.stderr
    assert "validation loss" in done.stderr


def test_quiet_is_quiet(nextword: CLIRunner, texts, tmp_path):
    done = nextword("pretrain", texts, "--out", tmp_path / "run", "--steps", "5", "--quiet", *TINY_MODEL_ARGS)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "5 steps in" in done.stdout


def test_generate(nextword: CLIRunner, run):
    done = nextword("generate", run, "The", "A list", "--max-tokens", "12", "--seed", "3", "--json")
    assert done.returncode == 0, done.stderr
    completions = json.loads(done.stdout)["completions"]
    assert [c["prompt"] for c in completions] == ["The", "A list"]
    assert all(set(c) == {"prompt", "text", "finish_reason"} for c in completions)
    again = nextword("generate", run, "The", "A list", "--max-tokens", "12", "--seed", "3", "--json")
    assert again.stdout == done.stdout
    streamed = nextword("generate", run, "The", "--max-tokens", "12", "--seed", "3")
    assert streamed.stdout == "The" + completions[0]["text"] + "\n"


def test_evaluate_says_the_runs_own_loss_and_that_of_files(nextword: CLIRunner, run, texts):
    own = json.loads(nextword("evaluate", run, "--json").stdout)
    assert own["loss"] == pytest.approx(json.loads((run / "result.json").read_text())["loss"], abs=1e-6)
    assert {"loss", "perplexity", "bits_per_byte", "tokens", "bytes", "stride", "interval"} == set(own)
    whole = json.loads(nextword("evaluate", run / "model", texts, "--json").stdout)
    assert whole["bytes"] == sum(len(p.read_bytes()) for p in texts.iterdir())


def test_report_and_verify(nextword: CLIRunner, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "report.html").unlink()
    done = nextword("report", copy)
    assert done.stdout.strip() == str(copy / "report.html")
    assert (copy / "report.html").is_file()
    assert "model, whole" in nextword("verify", copy).stdout
    weights = copy / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    for arguments in (("verify", copy), ("generate", copy, "x")):
        done = nextword(*arguments)
        assert done.returncode == 3
        assert "model.safetensors: the content does not match" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["colour"], 2, "colour"),
        (["pretrain"], 2, "--out"),
        (["pretrain", "x", "--out", "{tmp}/r"], 2, "x"),
        (["pretrain", "{texts}", "--out", "{tmp}/r", "--preset", "huge"], 2, "unknown preset 'huge'"),
        (
            ["pretrain", "{texts}", "--out", "{tmp}/r", "--recipe", "cake"],
            2,
            "unknown recipe 'cake': choose one of default",
        ),
        (["pretrain", "{texts}", "--out", "{tmp}/r", "--budget", "soon"], 2, "'soon' is no time: write 90s"),
        (["pretrain", "{texts}", "--out", "{tmp}/r", "--steps", "9", "--budget", "1m"], 2, "exclude each other"),
        (["pretrain", "{texts}", "--out", "{tmp}/r", "--steps", "0"], 2, "--steps must be more than 0"),
        (["pretrain", "{texts}", "--out", "{tmp}/r", "--training.lr", "x"], 2, "--training.lr"),
        (["pretrain", "{texts}", "--out", "{tmp}/r", "--training.lr", "-1"], 2, "--training.lr cannot be -1.0"),
        (["pretrain", "{texts}", "--out", "{tmp}/r", "--steps", "5", "--model.d-model", "33"], 2, "must be a multiple"),
        (["pretrain", "{texts}", "--out", "{tmp}/r", "--device", "warp"], 2, "--device warp"),
        (["pretrain", "{texts}", "--out", "{tmp}/r", "--tokenizer", "{tmp}/none.json"], 1, "none.json"),
        (["generate", "{tmp}/nowhere", "x"], 1, "neither a model directory nor a run folder"),
        (["generate", "{run}", "x", "--temperature", "-1"], 2, "temperature must be"),
        (["generate", "{run}", "x", "--top-p", "7"], 2, "top_p must be"),
        (["evaluate", "{run}", "{tmp}/nowhere"], 2, "nowhere"),
        (["evaluate", "{run}/model"], 2, "say on which text"),
        (["report", "{tmp}"], 1, "not a run folder"),
        (["verify", "{tmp}"], 3, "nothing to check"),
        (["prepare", "{texts}"], 2, "--out"),
    ],
)
def test_errors_say_what_and_what_to_do(nextword: CLIRunner, run, texts, tmp_path, arguments, code, message):
    filled = [a.format(tmp=tmp_path, texts=texts, run=run) for a in arguments]
    done = nextword(*filled)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_times_and_counts_as_people_write_them():
    from nextword.common.errors import UsageError
    from nextword.training.config import parse_count, parse_duration

    assert [parse_duration(t) for t in ("90", "90s", "30m", "2h", "1h30m", "1.5h", 45, "2d")] == [
        90, 90, 1800, 7200, 5400, 5400, 45, 172800,
    ]  # fmt: skip
    assert [parse_count(t) for t in ("2000", "100k", "1.5M", "2B", "1,000", 7)] == [
        2000,
        100_000,
        1_500_000,
        2 * 10**9,
        1000,
        7,
    ]
    with pytest.raises(UsageError, match="no whole number"):
        parse_count("1.5")
    for wrong in ("", "m", "5 parsecs", "1h-3m"):
        with pytest.raises(UsageError):
            parse_duration(wrong)
        with pytest.raises(UsageError):
            parse_count(wrong)


def test_recipes_build(texts):
    """Every named recipe makes a model, at every preset."""
    from nextword.model.config import PRESETS, build_config
    from nextword.training.config import RECIPES, Recipe, get_recipe

    for name in RECIPES:
        for preset in PRESETS:
            recipe = get_recipe(name, preset)
            build_config(recipe.preset, recipe.size or "tiny", vocab_size=300, **recipe.model)
            assert Recipe.from_dict(recipe.to_dict()) == recipe
