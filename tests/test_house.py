"""The house keeps its plan: arrows run down, the core is light, the public names are the promised ones."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nextword

SOURCE = Path(nextword.__file__).parent
GROUND = {"errors", "files", "compiled"}  # the ground floor, under everything
# Each room and what it may import. cli → api → … → {tasks, training, inference} → {text, model}.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "compiled": set(),
    "model": GROUND,
    "text": GROUND,
    "training": GROUND | {"model", "text"},
    "inference": GROUND | {"model", "text"},
    "evaluation": GROUND | {"model", "text", "tasks", "training"},
    "tasks": GROUND | {"text"},
    "recipes": {"errors", "model"},
    "console": set(),
    "energy": set(),
    "holding": GROUND,
    "runs": GROUND | {"holding", "model", "text"},
    "course": GROUND | {"training", "console", "runs"},
    "machinery": GROUND | {"model", "training", "recipes", "console", "runs"},
    "mirror": GROUND | {"console", "runs"},
    "job": GROUND | {"training", "evaluation", "console", "energy", "runs", "course", "machinery", "mirror"},
    "lifecycle": GROUND | {"training", "console", "runs", "job", "mirror"},
    "planning": GROUND | {"model", "text", "training", "recipes", "console", "energy", "runs", "job"},
    "base": GROUND | {"model", "text", "tasks", "evaluation"},
    "prediction": GROUND | {"model", "text", "tasks", "training", "inference", "evaluation"},
    "pretraining": GROUND
    | {"model", "text", "training", "inference", "evaluation", "recipes", "console", "runs", "job", "planning"},
    "continuing": {"model", "text", "training", "recipes", "console", "runs", "base", "planning", "pretraining"},
    "finetuning": GROUND
    | {"model", "text", "tasks", "training", "recipes", "console", "runs", "job", "base", "prediction"},
    "transferring": GROUND | {"tasks", "evaluation", "console", "runs", "lifecycle", "prediction"},
    "chatting": GROUND | {"model", "text", "inference"},
    "judging": GROUND | {"model", "text", "tasks", "training", "inference", "evaluation", "console", "runs", "loading"},
    "auditing": GROUND
    | {"model", "text", "tasks", "training", "inference", "evaluation", "console", "energy", "runs", "base", "loading"}
    | {"prediction", "judging"},
    "explaining": GROUND
    | {"model", "text", "tasks", "inference", "evaluation", "console", "runs", "loading", "prediction"},
    "loading": GROUND | {"model", "text", "tasks", "inference", "evaluation", "console", "runs", "base", "prediction"},
    "exporting": GROUND | {"model", "text", "inference", "base"},
    "serving": GROUND
    | {"model", "text", "tasks", "inference", "evaluation", "console", "runs", "base", "loading", "prediction"},
    "asked": GROUND | {"text", "recipes", "console", "runs", "loading"},
    "api": GROUND
    | {"text", "tasks", "inference", "evaluation", "recipes", "console", "runs", "base", "loading", "prediction"}
    | {
        "job",
        "lifecycle",
        "planning",
        "pretraining",
        "continuing",
        "finetuning",
        "transferring",
        "exporting",
        "judging",
        "auditing",
        "explaining",
        "serving",
        "asked",
        "spreading",
    },
    "spreading": GROUND | {"text", "console"},
    "demonstrating": {"text", "recipes", "console", "loading", "api"},
    "verbs": GROUND | {"holding", "console", "model", "recipes", "api", "demonstrating", "inference", "chatting"},
    "cli": {"errors", "verbs"},
    "__main__": {"cli"},
}
FILES = sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The rooms of ours that a file imports, and the other packages by their first name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are written out in full"
            names = [
                f"{node.module}.{alias.name}" if node.module == "nextword" else node.module for alias in node.names
            ]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            found.add(f"nextword.{parts[1]}" if parts[0] == "nextword" and len(parts) > 1 else parts[0])
    return found


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", [p for p in FILES if p != SOURCE / "__init__.py"], ids=lambda p: str(p.relative_to(SOURCE))
)
def test_arrows_run_down(path):
    used = {name.removeprefix("nextword.") for name in imports(path) if name.startswith("nextword.")}
    used -= {"__version__", "STARTED", room(path)}
    assert used <= ALLOWED[room(path)], f"{room(path)} must not know {used - ALLOWED[room(path)]}"


def test_the_model_can_be_lifted_out():
    """gpt.py and config.py: torch, the standard library and each other."""
    for name in ("gpt", "config"):
        ours = {x for x in imports(SOURCE / "model" / f"{name}.py") if x.startswith("nextword")}
        assert ours <= {"nextword.model"}


def test_text_never_sees_a_model():
    for path in (SOURCE / "text").glob("*.py"):
        assert "torch" not in imports(path), path


def test_optional_packages_are_not_needed_to_import():
    optional = {
        "pyarrow",
        "zstandard",
        "sacrebleu",
        "rouge_score",
        "sklearn",
        "scipy",
        "peft",
        "datasets",
        "huggingface_hub",
        "tensorboard",
        "transformers",
        "llguidance",
        "fastapi",
        "uvicorn",
        "starlette",
        "pydantic",
        "jinja2",
        "lm_eval",
        "py3langid",
        "yaml",
        "ray",
    }
    for path in FILES:
        if room(path) == "serving":  # the room as a whole is optional: nothing imports it before a server is begun
            continue
        top = {
            a.name.split(".")[0]
            for n in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(n, ast.Import)
            for a in n.names
        }
        top |= {
            n.module.split(".")[0]
            for n in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(n, ast.ImportFrom) and n.module
        }
        assert not top & optional, path


def test_nothing_unpickles():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for word in ("import pickle", "torch.load(", "allow_pickle=True", "eval(", "exec(", "trust_remote_code"):
            for fine in (".eval()", "ast.literal_eval(", "create_subprocess_exec(", "llama.eval("):
                text = text.replace(fine, "")
            assert word not in text, f"{path}: {word}"


def test_files_and_functions_stay_readable():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 500, f"{path} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and room(path) != "verbs":
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno <= 62, f"{path}:{node.lineno} {node.name}"


def test_public_names():
    assert set(nextword.__all__) == {
        "Completion", "Corpus", "GPT", "Likelihood", "Model", "ModelConfig", "NextwordError", "Sampling", "Tokenizer",
        "__version__", "audit", "build_config", "demo", "evaluate", "explain", "export", "finetune", "generate", "load", "plan",
        "predict", "prepare", "pretrain", "report", "serve", "transfer", "verify",
    }  # fmt: skip
    assert set(nextword.__all__) == {"__version__", *nextword.PUBLIC}
    for name in nextword.__all__:
        value = getattr(nextword, name)
        assert name == "__version__" or value.__doc__, f"{name} has no docstring"
    assert (SOURCE / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = nextword.colour  # type: ignore[attr-defined]


def test_importing_nextword_is_light():
    heavy = {"torch", "numpy", "matplotlib", "tokenizers"}
    code = f"import sys, nextword, nextword.commands.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


def test_a_model_opens_without_what_only_training_and_drawing_need(base):
    """Each of these takes a good part of the time to the first word."""
    script = (
        "import sys; from nextword.commands.cli import run; run(['generate', sys.argv[1], 'The', '--max-tokens', '1']); "
        "print([name for name in ('torch._dynamo', 'matplotlib', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(base)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
