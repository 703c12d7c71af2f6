"""Small real text, and real processes."""

import atexit
import contextlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Tests run side by side, one a core; more threads than cores would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

import needs
from processes import PATIENCE, kill_all

# The same examples at every run; `pytest --hypothesis-profile=explore` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)  # a busy machine is no failure
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile("repeatable")

TINY_MODEL = {"n-layers": 2, "n-heads": 2, "d-model": 32, "context-length": 32}
TINY_MODEL_ARGS = [*(f"--model.{name}={size}" for name, size in TINY_MODEL.items()), "--training.batch-tokens=256"]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 short texts: the language reference inside every Python."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("texts")
    for name, text in sorted(topics.items())[:40]:
        (folder / f"{name}.txt").write_text(text[:4000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def shards(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nextword.data.prepare import prepare

    out = tmp_path_factory.mktemp("prepared") / "shards"
    prepare([texts], out, vocab_size=400)
    return out


@pytest.fixture(scope="session")
def files_296681d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the version 296681d has written: texts, shards, and run directories of several kinds."""
    directory = tmp_path_factory.mktemp("296681d")
    with tarfile.open(Path(__file__).with_name("fixtures") / "run_296681d.tar.xz") as archive:
        archive.extractall(directory, filter="data")
    return directory / "fixture"


@pytest.fixture(scope="session")
def base(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a tiny pre-trained model, for fine-tuning to begin with."""
    import nextword

    out = tmp_path_factory.mktemp("base") / "run"
    sizes = {"n_layers": 2, "n_heads": 2, "d_model": 32, "context_length": 64}
    nextword.pretrain(shards, out, steps=30, model=sizes, training={"batch_tokens": 512, "evaluations": 1})
    return out


def nextword_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "nextword", *map(str, arguments)]


CLIRunner = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def nextword() -> CLIRunner:
    """Run a command line in this process, which is much faster than a process that has to import torch."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        from nextword.commands import cli

        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = cli.run([str(argument) for argument in arguments])
        return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())

    return run


@pytest.fixture
def nextword_process() -> CLIRunner:
    """Run a command line in a process of its own."""

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            nextword_command(*arguments),
            capture_output=True,
            encoding="utf-8",
            timeout=PATIENCE,
            env={**os.environ, **environment},
        )

    return run


@pytest.fixture
def without_native_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which nothing can be compiled."""

    from nextword.common import native_build

    monkeypatch.setenv(native_build.NATIVE_ENV_VAR, "0")
    native_build.load_native_library.cache_clear()
    yield
    monkeypatch.undo()
    native_build.load_native_library.cache_clear()


# ---------------------------------------------------------------- processes end with their test


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    kill_all()


atexit.register(kill_all)  # where pytest itself is interrupted


# ---------------------------------------------------------------- charts

_draw_svg: dict[str, Any] = {}


def choose_charts(item: pytest.Item) -> None:
    """Draw placeholders in tests without the marker `charts`: charts take far longer than the short runs that they show."""
    charts: Any = sys.modules.get("nextword.reporting.charts")
    if charts is not None:  # from the second report on
        real = _draw_svg.setdefault("real", charts.draw_svg)
        charts.draw_svg = real if item.get_closest_marker("charts") else _placeholder_svg


def _placeholder_svg(*_: object) -> Any:
    from markupsafe import Markup

    return Markup('<svg viewBox="0 0 1 1" aria-hidden="true"></svg>')


# ---------------------------------------------------------------- what is not tested


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-needs", action="store_true", help="fail, instead of skipping, where something is not installed"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.needs("Chromium"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    choose_charts(item)
    for marker in item.iter_markers("needs"):
        if name := needs.missing(marker.args):
            reason = f"needs {name}: make test-all"
            if item.config.getoption("--all-needs"):
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()) if report.longrepr]
    if line := needs.not_tested(reasons):
        terminalreporter.write_line(line)
