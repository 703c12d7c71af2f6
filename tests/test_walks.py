"""The walks through the code in CONTRIBUTING.md: each function exists and calls the next one."""

import ast
import re
from pathlib import Path

import pytest

import nextword

ROOT = Path(nextword.__file__).parent
TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^\d+\. `([\w/]+\.py)`: `(\w+)`(?: calls `(\w+)`)?$", TEXT, re.MULTILINE)


def called_names(function: ast.AST) -> set[str]:
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}


def test_there_are_four_walks_that_end_in_the_model() -> None:
    assert [step for step in STEPS if not step[2]] == [("model/gpt.py", "forward", "")] * 4


@pytest.mark.parametrize(("file", "name", "callee"), sorted(set(STEPS)))
def test_each_function_calls_the_next(file: str, name: str, callee: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
    ]
    assert functions, f"{file} has no function {name}"
    assert not callee or any(callee in called_names(function) for function in functions)
