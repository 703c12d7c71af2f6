"""A real Chromium for the tests of pages: the browser, and what every page has to hold."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from needs import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright
else:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Chromium: playwright is not installed")
    expect, sync_playwright, Browser = playwright.expect, playwright.sync_playwright, playwright.Browser

WIDE: "ViewportSize" = {"width": 1280, "height": 800}
PHONE: "ViewportSize" = {"width": 390, "height": 844}
LOOKS: "dict[str, tuple[str, ViewportSize]]" = {
    "light-wide": ("light", WIDE),
    "dark-phone": ("dark", PHONE),
    "light-phone": ("light", PHONE),
    "dark-wide": ("dark", WIDE),
}
SHOTS = os.environ.get("NEXTWORD_PAGE_SHOTS")  # a folder, where pictures of every state are wanted
WATCH = "window.broken = []; addEventListener('securitypolicyviolation', (e) => broken.push(e.violatedDirective));"


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    path = chromium()
    with sync_playwright() as play:
        expect.set_options(timeout=120_000)
        sandbox = os.name != "posix" or os.geteuid() != 0  # Chromium has none for root
        browser = play.chromium.launch(executable_path=path, chromium_sandbox=sandbox, args=["--disable-gpu"])
        yield browser
        browser.close()


class Opened:
    """A file that is open as a page, and whatever it did beside what can be seen."""

    def __init__(self, browser: "Browser", file: Path, look: str):
        theme, viewport = LOOKS[look]
        self.context = browser.new_context(viewport=viewport, color_scheme=theme, reduced_motion="reduce")  # type: ignore[arg-type]
        self.context.add_init_script(WATCH)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(120_000)
        self.told: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.told.append(message.text))
        self.page.on("pageerror", lambda error: self.told.append(f"error: {error}"))
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.address = file.resolve().as_uri()
        self.page.goto(self.address)

    def holds(self, name: str) -> None:
        """What is true of every page of ours: no finding of axe-core's rules, nothing wider than the window, nothing asked of
        anybody, no word on the console, and a policy that nothing has broken."""
        axe = pytest.importorskip(
            "axe_playwright_python.sync_playwright", reason="needs Chromium: no axe-playwright-python"
        )
        if SHOTS:
            self.page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)
        found = axe.Axe().run(self.page).response["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
        wide, there = self.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= there
        assert self.told == []
        assert self.asked == [self.address]
        assert self.page.evaluate("window.broken") == []
