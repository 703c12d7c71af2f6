"""What some tests need beyond `make setup`. A test says so by `@pytest.mark.needs("Ray")`, or skips itself with a reason that
begins with "needs data:". One line at the end of a run tells what was not tested.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

DATA = Path(os.environ.get("NEXTWORD_DATA", Path(__file__).parents[2] / "shared" / "data"))


def chromium() -> str | None:
    """The Chromium for the tests of pages: the system's, or Playwright's own."""
    if find_spec("playwright") is None:
        return None
    if path := next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None):
        return path
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        path = play.chromium.executable_path
    return path if Path(path).exists() else None


def package(name: str) -> Callable[[], bool]:
    return lambda: find_spec(name) is not None


NEEDS: dict[str, Callable[[], object]] = {
    "Chromium": chromium,
    "lm-eval": package("lm_eval"),
    "Ray": package("ray"),
    "llama.cpp": package("llama_cpp"),
    "more time": lambda: os.environ.get("NEXTWORD_SLOW_TESTS") == "1",
}
_found: dict[str, bool] = {}


def missing(names: Iterable[str]) -> str | None:
    """The first of these that is not here."""
    for name in names:
        if name not in _found:
            _found[name] = bool(NEEDS[name]())
        if not _found[name]:
            return name
    return None


def not_tested(reasons: Iterable[str]) -> str | None:
    """One line about the tests that were skipped, by their reasons, and which command adds them."""
    found = Counter(
        reason.removeprefix("Skipped: ").removeprefix("needs ").partition(":")[0] if "needs " in reason[:15] else ""
        for reason in reasons
    )
    parts = []
    if optional := [f"{found[name]} with {name}" for name in NEEDS if found[name]]:
        parts.append(f"{', '.join(optional)} (make test-all)")
    if found["data"]:
        parts.append(f"{found['data']} on real data (NEXTWORD_DATA=FOLDER make test)")
    if others := sum(found.values()) - sum(found[name] for name in (*NEEDS, "data")):
        parts.append(f"{others} that this system cannot run (pytest -rs tells why)")
    return f"not tested: {'; '.join(parts)}" if parts else None
