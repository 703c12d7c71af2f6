"""The edges of the process: encodings, full and closed streams, inputs that an output would overwrite, commands to try."""

import io
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nextword as package
from conftest import CLIRunner, nextword_command
from nextword.commands import cli
from nextword.commands.shared import can_be_path, check_output_file
from nextword.common import console, fs
from nextword.common.errors import NextwordError, UsageError, is_out_of_memory
from nextword.common.format import quote_command
from processes import PATIENCE


@pytest.fixture(scope="module")
def classifier(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import nextword

    folder = tmp_path_factory.mktemp("classifier")
    rows = "".join(f"a lovely day {i},good\nan awful day {i},bad\n" for i in range(12))
    (folder / "table.csv").write_text("text,label\n" + rows)
    nextword.finetune(base, folder / "table.csv", folder / "run", steps=2)
    return folder


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a shell command in which $NW is nextword."""
    command, variables = command.replace("$NW", shlex.join(nextword_command())), {**os.environ, **environment}
    return subprocess.run(["bash", "-c", command], capture_output=True, timeout=PATIENCE, env=variables)


def test_characters_that_the_encoding_lacks(shards, tmp_path):
    """Text is replaced, and JSON escaped, so that nothing of it is lost."""
    shutil.copytree(shards, tmp_path / "The moon 月 é")
    text = shell(f"cd {tmp_path}; $NW verify 'The moon 月 é'", PYTHONIOENCODING="cp1252")
    assert (text.returncode, text.stdout[:12]) == (0, b"The moon ? \xe9"), text.stderr
    answer = shell(f"cd {tmp_path}; $NW verify 'The moon 月 é' --json", PYTHONIOENCODING="ascii:strict")
    assert json.loads(answer.stdout.decode("ascii"))["whole"] == {"The moon 月 é": "shards"}


def test_arguments_that_are_not_utf8(texts, tmp_path):
    """A prompt and the name of a folder in Latin-1. The run can be resumed, reported and verified."""
    folder = os.fsencode(tmp_path) + b"/texte\xe9"
    os.mkdir(folder)  # noqa: PTH102  (a name in bytes)
    for path in texts.iterdir():
        (Path(os.fsdecode(folder)) / path.name).write_bytes(path.read_bytes())
    tiny = "--vocab-size 300 --model.n-layers 1 --model.n-heads 1 --model.d-model 8 --model.context-length 16 --quiet"
    run = os.fsdecode(folder) + "/run"
    quoted = shlex.quote(os.fsdecode(folder))
    with pytest.raises(UsageError, match="not UTF-8, as the names of weight files have to be"):
        package.pretrain(os.fsdecode(folder), "r\udce9sultat", steps=1)
    command = f"cd {quoted}; $NW pretrain {quoted} --steps 1 {tiny} --out run"
    done = shell(command, PYTHONIOENCODING="utf-8:strict")
    assert done.returncode == 0, done.stderr
    request = json.loads((Path(run) / "run.json").read_text(encoding="utf-8"))["request"]
    assert Path(request["corpora"][0]).is_dir()
    prompt = f"cd {shlex.quote(run)}; $NW generate . $'caf\\xe9' --max-tokens 1"
    done = shell(prompt, PYTHONIOENCODING="utf-8:strict")
    assert done.returncode == 0, done.stderr
    assert package.report(run).is_file()
    assert package.verify(run).whole[run] == "run"


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("$NW --help >/dev/full", 4, "standard output: No space left on device"),
        ("$NW verify {base} >/dev/full", 4, "standard output: No space left on device"),
        ("$NW verify {base} --json >&-", 1, "standard output is closed"),
        ("$NW generate {base} - --max-tokens 2 <&-", 1, "standard input is closed"),
        ("$NW chat {base} <&-", 1, "standard input or output is closed"),
        ("$NW prepare {texts} --out {tmp}/shards --vocab-size 300 2>/dev/full", 0, ""),
        ("$NW prepare {texts} --out {tmp}/shards --vocab-size 300 2>&-", 0, ""),
    ],
)
def test_streams_that_are_full_or_closed(base, texts, tmp_path, command, code, message):
    done = shell(command.format(base=base, texts=texts, tmp=tmp_path))
    assert done.returncode == code, done.stderr
    assert message in done.stderr.decode() and b"Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1 + 3 * (not code)
    assert code or b"40 documents" in done.stdout


def test_messages_never_end_a_run(monkeypatch):
    """Whether standard error is full or its reader has left."""
    read, write = os.pipe()
    os.close(read)
    for target in (os.open("/dev/full", os.O_WRONLY), write):
        with os.fdopen(target, "w", buffering=1) as stream:
            monkeypatch.setattr("sys.stderr", stream)
            with console.Console() as output:
                output.info("a message")
                output.warn("a warning")
                output.progress("training", 1, 2)
            monkeypatch.undo()
            os.dup2(os.open(os.devnull, os.O_WRONLY), target)


def test_a_reader_that_leaves_ends_every_command_in_silence(base, classifier, texts, tmp_path, monkeypatch, capsys):
    """As `| head` does. The exit code is that of a process that SIGPIPE has ended; what a run has written stays."""
    monkeypatch.chdir(tmp_path)
    run, table, few = classifier / "run", classifier / "table.csv", ["--max-tokens", "3", "--quiet"]
    for arguments in (
        ["--help"],
        ["generate", "--help"],
        ["--version"],
        ["info"],
        ["info", "--json"],
        ["verify", base],
        ["generate", base, "The", *few],
        ["generate", base, "The", "-n", "3", *few],
        ["generate", base, "The", "--json", *few],
        ["predict", run, table, "--quiet"],
        ["predict", run, "a day", "--json", "--quiet"],
        ["evaluate", base, "--json", "--quiet"],
        ["explain", base, "The", "--json", "--quiet"],
        ["report", base, "--quiet"],
        ["prepare", texts, "--out", "shards", "--vocab-size", "300", "--quiet"],
    ):
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "w") as stream:
            monkeypatch.setattr("sys.stdout", stream)
            code = cli.run([str(argument) for argument in arguments])
            monkeypatch.undo()
            monkeypatch.chdir(tmp_path)
        assert (code, capsys.readouterr().err) == (141, ""), arguments
    assert (tmp_path / "shards" / "nextword.json").is_file() and (tmp_path / "explanation.html").is_file()
    done = shell(f"set -o pipefail; $NW generate {base} The --max-tokens 20 -n 100 | head -1")
    assert (done.returncode, done.stderr) in ((0, b""), (141, b"")) and done.stdout


def test_memory_that_is_not_there():
    import torch

    for allocate in (lambda: torch.empty(2**60), lambda: bytearray(2**62)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


# ---------------------------------------------------------------- texts and paths


@pytest.mark.parametrize(
    "text",
    [
        "reviws.csv",
        "./reviews",
        "../x",
        "/nowhere/at all",
        "~/x",
        "data/reviews",
        "reviews.xlsx",
        "my reviews.csv",
        "a\\b",
        "REVIEWS.CSV",
        "x.jsonl.gz",
        "folder/",
        "C:\\my texts",
    ],
)
def test_what_can_be_a_path(text):
    assert can_be_path(text)


@pytest.mark.parametrize(
    "text",
    [
        "Great",
        "A wonderful film.",
        "It was 3.5 of 5 stars",
        "and / or, he said",
        "long " * 100,
        "x" * 5000,
        "a\0b",
        "",
        "Wait...",
        "Really?",
        "line\nline",
        "3.5",
    ],
)
def test_what_can_only_be_a_text(text):
    assert not can_be_path(text)


def test_predict_takes_a_table_or_a_text(nextword: CLIRunner, classifier, tmp_path):
    run = classifier / "run"
    long = "It was a lovely day and the cat saw the garden again. " * 8
    answers = [
        nextword("predict", run, long),
        nextword("predict", run, "--text", long),
        nextword("predict", run, "--text", "reviews.csv"),
        nextword("predict", run, f"--text={classifier}"),
    ]
    for done in answers:
        assert done.returncode == 0 and set(json.loads(done.stdout)) == {"label", "probabilities"}, done.stderr
    assert answers[0].stdout == answers[1].stdout
    table = nextword("predict", run, classifier / "table.csv")
    assert len(table.stdout.splitlines()) == 24
    assert nextword("predict", run, "--file", classifier / "table.csv").stdout == table.stdout
    for arguments, message in (
        ([tmp_path / "reviws.csv"], "no such file or folder. If it is a text: --text="),
        (["and/or"], "no such file or folder. If it is a text: --text=and/or"),
        (["--file", tmp_path / "x"], "x: no such file or folder"),
        ([], "give either a table"),
        (["a text", "--file", classifier / "table.csv"], "give either a table"),
    ):
        done = nextword("predict", run, *arguments)
        assert (done.returncode, done.stdout) == (2, "") and message in done.stderr, done.stderr


def test_a_misspelt_file_is_no_prompt_and_no_text_to_explain(nextword: CLIRunner, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("\ufeffThe\x0c\u2028\r\n\nA list\n".encode())
    few = ("--max-tokens", "2", "--seed", "1", "--json")
    for path, found in (
        ("promts.txt", "no such file"),
        ("data/x", "no such file"),
        ("prompts.txt", "a file or folder"),
    ):
        for command in (["generate", base, "The", path, *few], ["generate", base, path], ["explain", base, path]):
            done = nextword(*command)
            assert (done.returncode, done.stdout) == (2, "") and f"{path}: {found}" in done.stderr, done.stderr
            assert f"--text={path}" in done.stderr and ("--file=" in done.stderr) == (command[0] == "generate")
    done = nextword("generate", base, "--text", "prompts.txt", "--file", prompts, *few)
    assert [c["prompt"] for c in json.loads(done.stdout)["completions"]] == [
        "prompts.txt",
        "The\x0c\u2028",
        "",
        "A list",
    ]
    assert package.generate(base, "prompts.txt", max_tokens=2)[0].prompt == "prompts.txt"  # a call names no files
    assert nextword("explain", base, "--text", "prompts.txt", "--out", "page.html").returncode == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("From a pipe.\n"))
    assert json.loads(nextword("explain", base, "-", "--json").stdout)["texts"] == ["From a pipe."]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for file, message in (("latin.txt", "utf-8"), ("none.txt", "No such file"), (".", "Is a directory")):
        done = nextword("generate", base, "--file", file)
        assert done.returncode == 2 and f"--file {file}: " in done.stderr and message in done.stderr, done.stderr
    for command in (["explain", base], ["explain", base, "a", "--text", "b"]):
        assert "either as arguments or by --text" in nextword(*command).stderr


def test_a_hyphen_is_standard_input_for_texts_only(nextword: CLIRunner, base, classifier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["generate", "-", "x"],
        ["finetune", "-", "-"],
        ["predict", classifier / "run", "x", "--out", "-"],
        ["verify", "-"],
        ["report", base, base, "--out", "-"],
        ["export", base, "--out", "-"],
        ["prepare", "-", "--out", "s"],
        ["chat", "-"],
    ):
        done = nextword(*arguments)
        assert done.returncode in (1, 2) and " -" in done.stderr and "\0" not in done.stderr, (arguments, done.stderr)
    done = nextword("generate", base, "a-b", "--stop", "-", "--max-tokens", "1", "--json")
    assert done.returncode == 0, done.stderr
    explained = nextword("explain", base, "a", "--word", "-", "--json", "--out", "page.html")
    assert explained.returncode == 0 and "stdin" not in explained.stdout + explained.stderr, explained.stderr
    assert not list(tmp_path.glob("*-*"))


def test_messages_name_standard_input(nextword: CLIRunner, classifier, monkeypatch):
    for text, code, message in (
        ("text,label\ngood,yes\n,no\n", 0, "standard input line 3: "),
        ("text,label\n,no\n", 1, "standard input: no example to answer"),
        ("", 1, "standard input"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        done = nextword("predict", classifier / "run", "-")
        assert done.returncode == code and message in done.stderr, (text, done.stderr)
        assert "standard-input" not in done.stdout + done.stderr


def test_no_output_overwrites_an_input(nextword: CLIRunner, classifier, base, monkeypatch):
    monkeypatch.chdir(classifier)
    table, run = classifier / "table.csv", classifier / "run"
    (classifier / "link.csv").symlink_to(table)
    (classifier / "hard.csv").hardlink_to(table)
    weights = run / "model" / "model.safetensors"
    before = [path.read_bytes() for path in (table, weights)]
    for out in (
        "table.csv",
        "./run/../table.csv",
        table,
        "link.csv",
        "hard.csv",
        weights,
        run / "run.json",
        run / "metrics.jsonl",
    ):
        done = nextword("predict", run, table, "--out", out)
        assert done.returncode == 2 and "would overwrite the input" in done.stderr, (out, done.stderr)
    for command in (["export", run], ["explain", run, "a"], ["report", run, base]):
        done = nextword(*command, "--out", weights)
        assert done.returncode == 2 and "would overwrite the input" in done.stderr, (command, done.stderr)
    assert [path.read_bytes() for path in (table, weights)] == before
    for _ in range(2):  # an earlier result may be replaced, also beside the run
        assert nextword("predict", run, table, "--out", run / "answers.jsonl").returncode == 0
    for out, code, message in (
        ("x" * 300, 1, "File name too long"),
        ("nowhere/x", 1, "No such file"),
        (run, 2, "is a directory"),
        ("/dev/null", 0, ""),
    ):
        done = nextword("predict", run, table, "--out", out)
        assert done.returncode == code and message in done.stderr, (out, done.stderr)
    assert Path("/dev/null").is_char_device()
    check_output_file(classifier / ("x" * 255), table)  # nothing is created
    assert not (classifier / ("x" * 255)).exists()


def test_a_folder_of_tables_is_an_input_too(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n")
    with pytest.raises(UsageError, match="would overwrite"):
        check_output_file(tmp_path / "a.csv", tmp_path)
    with pytest.raises(NextwordError):
        check_output_file(tmp_path / "none" / "a.csv", tmp_path)


# ---------------------------------------------------------------- commands and calls


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8), min_size=1, max_size=4))
def test_a_command_to_try_has_the_arguments_as_they_are(arguments):
    words = shlex.split(quote_command("nextword", "generate", *arguments))
    if "--" in words and words != ["nextword", "generate", *arguments]:
        words.remove("--")
    assert words == ["nextword", "generate", *arguments]


def test_a_command_to_try_works_with_a_leading_hyphen(nextword: CLIRunner, base):
    command = quote_command("nextword", "generate", str(base), "- a list")
    done = nextword(*shlex.split(command)[1:])
    assert done.returncode == 0 and "- a list" in done.stdout, done.stderr


def test_run_json_has_the_call_as_it_was(classifier, base, nextword: CLIRunner, texts, monkeypatch, tmp_path):
    command = json.loads((classifier / "run" / "run.json").read_text())["command"]
    assert command.startswith("nextword.finetune(PosixPath(") and command.endswith("steps=2)")
    arguments = ["pretrain", str(texts), "--out", str(tmp_path / "my run"), "--steps", "1", "--vocab-size", "300"]
    arguments += ["--model.n-layers=1", "--model.n-heads=1", "--model.d-model=8", "--model.context-length=16"]
    monkeypatch.setattr("sys.argv", ["/usr/bin/nextword", *arguments])
    assert nextword(*arguments).returncode == 0
    command = json.loads((tmp_path / "my run" / "run.json").read_text())["command"]
    assert shlex.split(command) == ["nextword", *arguments]


@given(st.text())
def test_json_files_hold_any_path(text):
    assert json.loads(fs.to_json({text: text}).encode()) == {text: text}
