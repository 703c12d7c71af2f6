"""What the documents say is so: quoted code is in the source, tests and links exist, commands parse, examples run."""

import ast
import doctest
import importlib.util
import inspect
import re
import shlex
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch

import nextword
from nextword.commands.cli import build_app
from nextword.model.config import PRESETS, build_config
from nextword.model.gpt import GPT
from nextword.tasks.benchmark_spec import load_benchmarks

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *map(str, sorted(ROOT.glob("docs/*.md"))))
]
TUTORIAL = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SOURCE = re.compile(r"^\[`(src/\S+\.py)`\]\(\.\./\1\)\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: Path, *languages: str) -> list[str]:
    return [code for language, code in BLOCK.findall(document.read_text(encoding="utf-8")) if language in languages]


def prose(document: Path) -> str:
    """A document without its blocks of code and its comments."""
    return re.sub(r"<!--.*?-->", "", BLOCK.sub("", document.read_text(encoding="utf-8")), flags=re.DOTALL)


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.name)
def document(request: pytest.FixtureRequest) -> Path:
    return request.param


def load_script(name: str) -> ModuleType:
    """A Python file of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date():
    script = load_script("generate_reference")
    assert script.REFERENCE.read_text(encoding="utf-8") == script.reference(), "run: python docs/generate_reference.py"


# ---------------------------------------------------------------- code


def test_quoted_code_is_in_the_source():
    quotes = SOURCE.findall(TUTORIAL.read_text(encoding="utf-8"))
    assert len(quotes) == len(blocks(TUTORIAL, "python")) > 20, "every block of Python names the file that it is from"
    for name, code in quotes:
        wanted = code.splitlines()
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        found = ("\n".join(lines[i : i + len(wanted)]) for i in range(len(lines)))
        assert any(textwrap.dedent(part).splitlines() == wanted for part in found), f"not in {name}:\n{code}"


def test_examples_print_what_they_say():
    examples = blocks(TUTORIAL, "pycon")
    assert len(examples) >= 6
    flags = doctest.NORMALIZE_WHITESPACE
    test = doctest.DocTestParser().get_doctest("\n".join(examples), {}, "tutorial", str(TUTORIAL), 0)
    failures: list[str] = []
    assert doctest.DocTestRunner(optionflags=flags).run(test, out=failures.append).failed == 0, "".join(failures)


def test_python_in_the_readme_is_ours():
    """Every call of a public name takes the arguments that it is given."""
    calls = 0
    for code in blocks(ROOT / "README.md", "python"):
        for node in ast.walk(ast.parse(code)):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
            ):
                assert node.func.value.id in ("nextword", "model"), ast.unparse(node)
                owner = nextword if node.func.value.id == "nextword" else nextword.LanguageModel
                function = getattr(owner, node.func.attr)
                self = [] if owner is nextword else [None]
                inspect.signature(function).bind(*self, *node.args, **{str(k.arg): k.value for k in node.keywords})
                calls += 1
    assert calls >= 3


def test_declared_suites_are_read(tmp_path: Path):
    found = blocks(ROOT / "docs" / "evaluation.md", "toml")
    for code in found:
        (tmp_path / "suite.toml").write_text(code, encoding="utf-8")
        assert load_benchmarks(tmp_path / "suite.toml")
    assert found


def test_named_tests_exist(document: Path):
    for file, name in set(re.findall(r"(tests/test_\w+\.py)::(\w+)", document.read_text(encoding="utf-8"))):
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), f"{file}::{name}"


def test_tutorial_names_a_test_for_every_equation():
    """After each displayed equation a test is named before the next section begins."""
    sections = re.split(r"^## ", TUTORIAL.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    without = [s.splitlines()[0] for s in sections if s.count("$$") and "::test_" not in s]
    assert without == ["1. The task"], "the chain rule has no code of its own"


# ---------------------------------------------------------------- commands


def commands(document: Path) -> list[str]:
    """The command lines of ours in blocks for a shell, continued lines joined, and those in the running text."""
    shell = "".join(blocks(document, "bash", "sh")).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`(nextword [a-z-][^`]*)`", prose(document))
    return [
        line for line in [*shell, *inline] if line.startswith("nextword ") and "…" not in line and "VERB" not in line
    ]


def test_commands_parse(document: Path):
    """By the real command line: verb, options and their values; nothing is run."""
    lines = commands(document)
    assert lines or document.name not in ("README.md", "tutorial.md")
    app = build_app(0.0)
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        words = words if len(words) > 1 else [*words, "--help"]  # a verb that is only named
        app.parse_args(words, exit_on_error=False, print_error=False)


def test_make_targets_exist(document: Path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = document.read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


# ---------------------------------------------------------------- links and paths


def anchors(document: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_pictures_are_there(document: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{document.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{document.name}: {target}"


def test_no_path_of_a_machine(document: Path):
    found = re.findall(
        r"(?<![\w.])/(?:work|root|home|tmp|Users|mnt|var|private)\b\S*|\b[A-Z]:\\\S*", document.read_text("utf-8")
    )
    assert not found


def test_pictures_are_small_and_described():
    pictures = [path for path in (ROOT / "docs" / "images").iterdir() if path.name != "report.png"]
    assert sum(path.stat().st_size for path in pictures) < 600_000
    for description in re.findall(r"!\[([^\]]*)\]", TUTORIAL.read_text(encoding="utf-8")):
        assert len(description) > 30


# ---------------------------------------------------------------- the pictures


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    return load_script("draw_tutorial")


@pytest.mark.parametrize("preset", PRESETS)
def test_attention_weights_are_the_models_own(drawing: ModuleType, preset: str):
    """The weights that are drawn, applied to the model's values, give the model's attention (checked in the script)."""
    torch.manual_seed(0)
    model = GPT(build_config(preset, "tiny", vocab_size=50, n_layers=2, d_model=32, context_length=16))
    with torch.no_grad():  # every number counts: biases and norms drawn as well
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    layers = drawing.attention_weights(model, torch.randint(0, 50, (1, 11)))
    assert [layer.layer for layer in layers] == [0, 1]
    for layer in layers:
        assert layer.weights.shape == (4, 11, 11)
        assert torch.equal(layer.weights, layer.weights.tril())
        torch.testing.assert_close(layer.weights.sum(-1), torch.ones(4, 11, dtype=torch.float64))
    attention = model.blocks[0].attention
    activations = drawing.capture(attention, lambda: model(torch.randint(0, 50, (1, 11))))
    drawing.checked_weights(attention, activations)
    with pytest.raises(AssertionError):  # other queries, other weights: the comparison detects it
        drawing.checked_weights(attention, {**activations, "query": activations["query"].roll(1, dims=1)})


def test_every_picture_of_the_tutorial_is_drawn(drawing: ModuleType, shards: Path, tmp_path: Path):
    sizes = {"n_layers": 2, "n_heads": 2, "d_model": 32, "context_length": 32}
    nextword.pretrain(shards, tmp_path / "run", steps=12, model=sizes, training={"batch_tokens": 256, "evaluations": 2})
    drawing.main(tmp_path / "run", tmp_path / "images")
    drawn = {path.name for path in (tmp_path / "images").iterdir()}
    assert drawn == set(re.findall(r"\]\(images/([^)]+)\)", TUTORIAL.read_text(encoding="utf-8")))
