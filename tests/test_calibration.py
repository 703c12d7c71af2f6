"""Every interval and decision of the program has a row in `benchmarks/calibration.py`; the coverage of a few of them."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks import calibration
from benchmarks.calibration import CALLERS, ROWS, Case, Decision

from nextword.common import statistics

SOURCE = Path(statistics.__file__).parents[1]
# Functions of `nextword.common.statistics` that return an interval, or a number from which a decision follows.
INTERVALS = {
    node.name
    for node in ast.parse(Path(statistics.__file__).read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef)
    and not node.name.startswith("_")
    and (
        ast.unparse(node.returns or ast.Constant(None)) == "ScoreWithCI" or node.name in calibration.DECISION_FUNCTIONS
    )
}
# Whatever else makes an interval: quantiles, and the functions of scipy and numpy that return one.
OTHER = {
    "quantile",
    "percentile",
    "bootstrap",
    "confidence_interval",
    "proportion_ci",
    "permutation_test",
    "standard_t",
}


def interval_callers() -> set[str]:
    """`module.function` of all functions in src that call one of `INTERVALS` or `OTHER`, or build an interval themselves."""
    found: set[str] = set()
    for path in sorted(SOURCE.rglob("*.py")):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        if module == "common.statistics":
            continue
        text = path.read_text(encoding="utf-8")
        if not any(word in text for word in ("common.statistics", "import statistics", *OTHER)):
            continue
        tree = ast.parse(text)
        imported = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "nextword.common.statistics"
            for alias in node.names
        } & INTERVALS
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                name = call.func.id if isinstance(call.func, ast.Name) else ""
                attribute = call.func.attr if isinstance(call.func, ast.Attribute) else ""
                owner = (
                    ast.unparse(call.func.value)
                    if isinstance(call.func, ast.Attribute) and attribute in INTERVALS
                    else ""
                )
                builds = name == "ScoreWithCI" and (
                    len(call.args) > 1 or any(keyword.arg in ("low", "high", None) for keyword in call.keywords)
                )
                if (
                    name in imported | OTHER
                    or attribute in OTHER
                    or builds
                    or (owner == "statistics" and attribute in INTERVALS)
                ):
                    found.add(f"{module}.{function.name}")
    return found


def test_no_interval_is_without_a_row():
    names = {row.name for row in ROWS}
    assert len(names) == len(ROWS)
    found = interval_callers()
    assert found == set(CALLERS), "give each function that makes an interval its rows in benchmarks/calibration.py"
    assert {row for rows in CALLERS.values() for row in rows} <= names
    assert {function for row in ROWS for function in row.functions} == INTERVALS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_can_be_simulated(row):
    """Of each row one case, with few draws: an interval that is given is one, and seldom misses."""
    case = next(iter(row.cases()))
    rng = np.random.default_rng(0)
    for _ in range(3):
        if isinstance(case, Decision):
            assert case.decide(case.sample(rng)) in (True, False)
        else:
            score = case.interval(case.sample(rng))
            assert score.low is None or score.high is None or score.low <= score.value <= score.high


@pytest.mark.parametrize("name", ["accuracy and other proportions", "means of examples", "ratios over documents"])
def test_coverage(name):
    """The fast part of `make calibration`."""
    [row] = [row for row in ROWS if row.name == name]
    for case in row.cases():
        if isinstance(case, Case):
            result = calibration.simulate(row, replace(case, standard=None), 100)
            assert result.given == 0 or result.rate >= 0.84, result  # 0.93 less 3.5 standard errors


def test_a_method_with_too_little_coverage_is_reported():
    result = calibration.Result("x", 0.85, 1000)
    assert result.fails and not calibration.Result("x", 0.95, 1000).fails
    assert (
        calibration.Result("x", 0.12, 1000, true=False).fails
        and not calibration.Result("x", 0.12, 1000, true=True).fails
    )
