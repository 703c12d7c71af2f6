"""The package keeps its layers, its core stays light, and its public names are the promised ones."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nextword
from package_structure import imported_modules, package_imports, package_of

ROOT = Path(nextword.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LAYERS = [
    ["common"],
    ["model", "data"],
    ["training", "inference", "tasks"],
    ["pipeline"],
    ["evaluation", "audit", "reporting", "serving", "planning", "interpretability", "export"],
    ["commands"],
]
OPTIONAL_PACKAGES = set(
    (
        "datasets fastapi gguf huggingface_hub llama_cpp llguidance lm_eval onnx onnxruntime peft py3langid pyarrow "
        "pydantic ray rouge_score sacrebleu starlette tensorboard transformers uvicorn yaml zstandard"
    ).split()
)


def test_packages_import_only_from_lower_layers():
    layer = {package: number for number, packages in enumerate(LAYERS, 1) for package in packages}
    imports = package_imports(ROOT)
    assert sorted(imports) == sorted(layer), "every package belongs to one layer"
    wrong = [
        f"{package} (layer {layer[package]}) imports {target} (layer {layer[target]})"
        for package, targets in sorted(imports.items())
        for target in sorted(targets)
        if layer[target] >= layer[package]
    ]
    assert not wrong, "\n".join(wrong)


def test_three_files_at_the_top():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "_version.py"}


def test_reporting_and_serving_are_leaves():
    for package, targets in package_imports(ROOT).items():
        assert package == "commands" or not targets & {"reporting", "serving"}, package


def test_the_model_needs_only_torch():
    """model/gpt.py and model/config.py import each other, model/ops.py, the number types, torch and the standard library."""
    for name in ("gpt", "config"):
        ours = {module for module in imported_modules(ROOT / "model" / f"{name}.py") if module.startswith("nextword")}
        allowed = ("nextword.model.", "nextword.common.numbers", "nextword.common.errors")
        assert all(module.startswith(allowed) for module in ours), ours
    assert {module for module in imported_modules(ROOT / "common" / "numbers.py") if "nextword" in module} == {
        "nextword.common.errors.UsageError"
    }


def test_data_does_not_import_torch():
    for path in (ROOT / "data").glob("*.py"):
        assert not {module for module in imported_modules(path) if module.split(".")[0] == "torch"}, path


def test_optional_packages_are_not_imported_at_the_top():
    for path in FILES:
        if package_of(path, ROOT) == "serving":  # optional as a whole: nothing imports it before a server is started
            continue
        statements = ast.parse(path.read_text(encoding="utf-8")).body
        names = {alias.name for node in statements if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in statements if isinstance(node, ast.ImportFrom) and node.module}
        assert not {name.split(".")[0] for name in names} & OPTIONAL_PACKAGES, path


def test_nothing_unpickles_or_runs_code():
    dangerous = re.compile(r"import pickle|torch\.load\(|allow_pickle=True|(?<![\w.])(?:eval|exec)\(|trust_remote_code")
    for path in FILES:
        assert not dangerous.findall(path.read_text(encoding="utf-8")), path


def test_public_names():
    for name in nextword.__all__:
        value = getattr(nextword, name)
        assert name == "__version__" or value.__doc__, f"{name} has no docstring"
    assert (ROOT / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = nextword.colour  # type: ignore[attr-defined]  # the point of the test


@pytest.mark.parametrize(("old", "new"), [("Model", "LanguageModel"), ("Likelihood", "PerplexityResult")])
def test_renamed_classes_keep_their_old_name_for_one_release(old, new):
    with pytest.warns(DeprecationWarning, match=f"use nextword.{new}"):
        assert getattr(nextword, old) is getattr(nextword, new)


def test_judging_is_a_deprecated_alias():
    from nextword import judging

    sys.modules.pop("lm_eval", None)
    with pytest.warns(DeprecationWarning, match="use nextword.LMEval"):
        try:
            assert judging.LMEval is nextword.LMEval
        except nextword.NextwordError as error:
            assert "pip install 'nextword[lm-eval]'" in str(error)


def test_generating_does_not_import_what_training_and_plotting_need(base):
    """Each of these takes a good part of the time to the first token."""
    script = (
        "import sys; from nextword.commands.cli import run; run(['generate', sys.argv[1], 'The', '--max-tokens', '1']); "
        "print([name for name in ('torch._dynamo', 'matplotlib', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(base)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
