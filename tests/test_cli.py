"""The command line: fast help, clear errors, exit codes, and results alone on standard output."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import TINY_MODEL_ARGS, CLIRunner
from nextword.data.tokenizer import train_char
from processes import PATIENCE
from served import make_model_dir

SMALL = [*TINY_MODEL_ARGS, "--vocab-size=400"]
TINY_RUN = {
    "steps": 40,
    "vocab_size": 400,
    "training": {"batch_tokens": 256},
    "model": {"n_layers": 1, "n_heads": 2, "d_model": 32, "context_length": 32},
}


@pytest.fixture(scope="module")
def run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import nextword

    out = tmp_path_factory.mktemp("cli") / "run"
    nextword.pretrain(texts, out, **TINY_RUN)
    return out


def test_without_arguments_the_help_is_printed(nextword: CLIRunner):
    assert nextword().stdout == nextword("--help").stdout


HEAVY = set("torch numpy scipy sklearn matplotlib tokenizers huggingface_hub jinja2 yaml fastapi transformers".split())


@pytest.mark.parametrize("command", ["", "pretrain", "serve"])
def test_help_imports_little(command):
    """The time depends on the machine, see docs/benchmarks.md; the number of imported modules does not."""
    arguments = [sys.executable, "-X", "importtime", "-m", "nextword", *filter(None, [command]), "--help"]
    done = subprocess.run(arguments, capture_output=True, encoding="utf-8", timeout=PATIENCE)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "Exit codes" in done.stdout
    assert all(line.startswith("import time:") for line in done.stderr.splitlines())
    assert 100 < len(imported) < 500
    assert not imported & HEAVY


def test_pretrain_from_text_to_json(nextword_process: CLIRunner, texts, tmp_path):
    done = nextword_process("pretrain", texts, "--out", tmp_path / "run", "--steps", "25", "--json", *SMALL)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # one object and nothing else
    assert {"run", "model", "steps", "seconds", "loss", "bits_per_byte"} <= set(result)
    assert result["steps"] == 25
    assert "training" in done.stderr
    assert "validation loss" in done.stderr


def test_quiet_is_quiet_and_the_suggested_prompt_begins_with_a_word(nextword: CLIRunner, tmp_path):
    words = [f"{a}{b}{a}{b}" for a in ("बिल्", "शिक्", "पुरान") for b in ("लीघर", "षकने", "ापेड़")]
    text = tmp_path / "text.txt"  # a single document, whose end is held out
    text.write_text("".join(f"{words[i * i % 9]} {words[i % 9]} " for i in range(901)), encoding="utf-8")
    done = nextword("pretrain", text, "--out", tmp_path / "run", "--steps", "5", "--quiet", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "5 steps in" in done.stdout
    assert json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))["prompt"].split()[0] in words


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


def test_text_that_the_tokenizer_cannot_represent_is_reported_once(nextword: CLIRunner, tmp_path):
    model = make_model_dir(tmp_path / "model", train_char(["abc de\n."]))
    done = nextword("generate", model, "ab é", "cüd 🙂", "abc", "--max-tokens", "1", "--json")
    assert done.returncode == 0 and done.stderr.count("cannot represent") == 1, done.stderr
    assert "3 of 12 characters of the prompts" in done.stderr
    assert "represent" not in nextword("generate", model, "abc", "--max-tokens", "1").stderr
    (tmp_path / "own.toml").write_text('kind = "minimal pairs"\nfiles = ["rows.csv"]\ngood = "a"\nbad = "b"\n')
    (tmp_path / "rows.csv").write_text("a,b\nab,bé\nab,ac\nüa,b\n", encoding="utf-8")
    done = nextword("evaluate", model, "--benchmark", tmp_path / "own.toml")
    assert done.returncode == 0 and done.stderr.count("cannot represent part of 2 of 3 items") == 1, done.stderr


def test_several_samples_and_prompts_from_files(nextword: CLIRunner, run, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The\nA list\n", encoding="utf-8")
    settings = ("--max-tokens", "8", "--temperature", "1.5", "--seed", "1", "--json")
    done = nextword("generate", run, "--file", prompts, "-n", "2", *settings)
    completions = json.loads(done.stdout)["completions"]
    assert [c["prompt"] for c in completions] == ["The", "The", "A list", "A list"]
    assert completions[0]["text"] != completions[1]["text"]
    monkeypatch.setattr("sys.stdin", io.StringIO("The"))
    assert json.loads(nextword("generate", run, "-", *settings).stdout)["completions"][0] == completions[0]


def test_options_from_a_file(nextword: CLIRunner, run, texts, tmp_path):
    """A YAML file, and the run.json of a run. The command line takes precedence."""
    options = tmp_path / "run.yaml"
    options.write_text(
        f"corpora: {texts}\nout: {tmp_path / 'a'}\nsteps: 30\nvocab-size: 400\n"
        "model: {n_layers: 1, n_heads: 2, d_model: 32, context_length: 32}\ntraining: {batch_tokens: 256, lr: 0.001}\n",
        encoding="utf-8-sig",
    )
    done = nextword("pretrain", "--config", options, "--steps", "5", "--quiet")
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "a" / "run.json").read_text())["request"]
    assert (first["steps"], first["training"]) == (5, {"batch_tokens": 256, "lr": 0.001})
    done = nextword("pretrain", "--config", tmp_path / "a" / "run.json", "--out", tmp_path / "b", "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "b" / "run.json").read_text())["request"] == first
    options.write_text("colour: blue\n", encoding="utf-16")  # with a byte order mark, as Windows PowerShell writes it
    done = nextword("generate", run, "--config", options)
    assert done.returncode == 2 and "unknown options colour" in done.stderr


def test_former_options_work_with_a_warning(nextword: CLIRunner, run):
    done = nextword("evaluate", run, "--whole", "--json")
    assert "--whole is deprecated: use --no-limit" in done.stderr
    assert json.loads(done.stdout)["loss"] > 0
    done = nextword("report", run, "--device", "cpu")
    assert (done.returncode, "--device has no effect" in done.stderr) == (0, True)


def test_info(nextword: CLIRunner):
    result = json.loads(nextword("info", "--json").stdout)
    assert {"version", "python", "torch", "devices", "kernels", "extras", "cache"} <= set(result)
    assert "nextword " in nextword("info").stdout


def test_evaluate_on_the_validation_set_and_on_files(nextword: CLIRunner, run, texts):
    own = json.loads(nextword("evaluate", run, "--json").stdout)
    assert own["loss"] == pytest.approx(json.loads((run / "result.json").read_text())["loss"], abs=1e-6)
    assert {"loss", "perplexity", "bits_per_byte", "tokens", "bytes", "stride", "interval", "scored_on"} == set(own)
    whole = json.loads(nextword("evaluate", run / "model", texts, "--json").stdout)
    assert whole["bytes"] == sum(len(p.read_bytes()) for p in texts.iterdir())


def test_report_and_verify(nextword: CLIRunner, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "report.html").unlink()
    done = nextword("report", copy)
    assert done.stdout.strip() == str(copy / "report.html")
    assert (copy / "report.html").is_file()
    assert "model, intact" in nextword("verify", copy).stdout
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
        (
            ["pretrain", "{texts}", "--out", "{tmp}/r", "--budget", "soon"],
            2,
            "'soon' is not a duration: write for example 90s",
        ),
        (["pretrain", "{texts}", "--out", "{tmp}/r", "--steps", "9", "--budget", "1m"], 2, "exclude each other"),
        (["pretrain", "{texts}", "--out", "{tmp}/r", "--steps", "0"], 2, "--steps must be a whole number from 1"),
        (["pretrain", "{texts}", "--out", "{tmp}/r", "--training.lr", "x"], 2, "--training.lr"),
        (
            ["pretrain", "{texts}", "--out", "{tmp}/r", "--training.lr", "-1"],
            2,
            "--training.lr must be a number from 0 (excluded)",
        ),
        (["pretrain", "{texts}", "--out", "{tmp}/r", "--steps", "5", "--model.d-model", "33"], 2, "must be a multiple"),
        (["pretrain", "{texts}", "--out", "{tmp}/r", "--device", "warp"], 2, "--device warp"),
        (["pretrain", "{texts}", "--out", "{tmp}/r", "--tokenizer", "{tmp}/none.json"], 1, "none.json"),
        (["generate", "{tmp}/nowhere", "x"], 1, "not a model directory or a run directory"),
        (["generate", "{run}", "x", "--temperature", "-1"], 2, "--temperature must be"),
        (["generate", "{run}", "x", "--top-p", "7"], 2, "--top-p must be"),
        (["evaluate", "{run}", "{tmp}/nowhere"], 2, "nowhere"),
        (["evaluate", "{run}/model"], 2, "text"),
        (["report", "{tmp}"], 1, "not a run"),
        (["verify", "{tmp}"], 1, "nothing to check"),
        (["prepare", "{texts}"], 2, "--out"),
    ],
)
def test_errors_name_the_cause_and_the_remedy(nextword: CLIRunner, run, texts, tmp_path, arguments, code, message):
    filled = [a.format(tmp=tmp_path, texts=texts, run=run) for a in arguments]
    done = nextword(*filled)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_durations_and_counts():
    from nextword.common.errors import UsageError
    from nextword.common.numbers import parse_count, parse_duration

    durations = {"90": 90, "90s": 90, "30m": 1800, "2h": 7200, "1h30m": 5400, "1.5h": 5400, 45: 45, "2d": 172_800}
    assert {text: parse_duration(text) for text in durations} == durations
    counts = {"2000": 2000, "100k": 100_000, "1.5M": 1_500_000, "2B": 2 * 10**9, "1,000": 1000, 7: 7}
    assert {text: parse_count(text) for text in counts} == counts
    with pytest.raises(UsageError, match="not a whole number"):
        parse_count("1.5")
    for wrong in ("", "m", "5 parsecs", "1h-3m"):
        with pytest.raises(UsageError):
            parse_duration(wrong)
        with pytest.raises(UsageError):
            parse_count(wrong)


def test_every_recipe_builds_a_model_with_every_preset():
    from nextword.model.config import PRESETS, build_config
    from nextword.training.config import RECIPES, Recipe, get_recipe

    for name in RECIPES:
        for preset in PRESETS:
            recipe = get_recipe(name, preset)
            build_config(recipe.preset, recipe.size or "tiny", vocab_size=300, **recipe.model)
            assert Recipe.from_dict(recipe.to_dict()) == recipe
