"""The call paths in CONTRIBUTING.md: each function exists, and calls the function of the next line."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

import nextword

ROOT = Path(nextword.__file__).parent
TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = TEXT.partition("## Four call paths\n")[2].partition("\n## ")[0]
STEP = re.compile(r"^\d+\. `([\w/]+\.py)`: `([\w.]+)`(?: calls `(\w+)`(?:, [\w ,]+ `([\w.]+)`)?)?$", re.MULTILINE)
PATHS = {
    title: STEP.findall(text) for title, text in re.findall(r"\*\*(.+?)\*\*\n\n(.*?)(?=\n\n|\Z)", SECTION, re.DOTALL)
}


def find_function(file: str, qualified_name: str) -> ast.AST:
    """The definition of a function or method. Fails if there is none."""
    node: ast.AST = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for name in qualified_name.split("."):
        definitions = [
            n for n in ast.walk(node) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        ]
        members = [definition for definition in definitions if definition.name == name]
        assert members, f"{file} has no {qualified_name}"
        node = members[0]
    return node


def called_names(function: ast.AST) -> set[str]:
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}


def test_the_four_paths_end_in_the_model() -> None:
    assert [path[-1] for path in PATHS.values()] == [("model/gpt.py", "GPT.forward", "", "")] * 4
    assert sum(map(len, PATHS.values())) == len(re.findall(r"^\d+\. ", SECTION, re.MULTILINE))  # no line is malformed


@pytest.mark.parametrize("title", PATHS)
def test_each_function_calls_the_next(title: str) -> None:
    for (file, name, callee, target), (next_file, next_name, *_) in pairwise(PATHS[title]):
        assert callee in called_names(find_function(file, name)), f"{name} does not call {callee}"
        find_function(next_file, next_name)
        if target:  # called through an attribute, such as a module, a callback or a queue
            assert next_name == target, f"after {name}"
        else:
            assert next_name.rpartition(".")[2] == callee, f"after {name}"


def test_the_native_runner_calls_the_compiled_function() -> None:
    assert "call_native" in called_names(find_function("inference/model_runner.py", "NativeRunner.forward"))
    assert "void nextword_forward(" in (ROOT / "inference" / "native_runner.cpp").read_text(encoding="utf-8")
