"""A real Chromium for the tests of pages, and the invariants of every page."""

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

DESKTOP_VIEWPORT: "ViewportSize" = {"width": 1280, "height": 800}
PHONE_VIEWPORT: "ViewportSize" = {"width": 390, "height": 844}
DISPLAY_VARIANTS: "dict[str, tuple[str, ViewportSize]]" = {
    "light-wide": ("light", DESKTOP_VIEWPORT),
    "dark-phone": ("dark", PHONE_VIEWPORT),
    "light-phone": ("light", PHONE_VIEWPORT),
    "dark-wide": ("dark", DESKTOP_VIEWPORT),
}
SCREENSHOT_DIR = os.environ.get("NEXTWORD_PAGE_SHOTS")  # a folder, where pictures of every state are wanted
CSP_VIOLATION_SCRIPT = (
    "window.violations = []; addEventListener('securitypolicyviolation', (e) => violations.push(e.violatedDirective));"
)


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    path = chromium()
    with sync_playwright() as play:
        expect.set_options(timeout=120_000)
        sandbox = os.name != "posix" or os.geteuid() != 0  # Chromium has none for root
        browser = play.chromium.launch(executable_path=path, chromium_sandbox=sandbox, args=["--disable-gpu"])
        yield browser
        browser.close()


class OpenedPage:
    """A file opened in the browser, with its console messages and network requests."""

    def __init__(self, browser: "Browser", file: Path, variant: str):
        theme, viewport = DISPLAY_VARIANTS[variant]
        self.context = browser.new_context(viewport=viewport, color_scheme=theme, reduced_motion="reduce")  # type: ignore[arg-type]
        self.context.add_init_script(CSP_VIOLATION_SCRIPT)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(120_000)
        self.console_messages: list[str] = []
        self.requested_urls: list[str] = []
        self.page.on("console", lambda message: self.console_messages.append(message.text))
        self.page.on("pageerror", lambda error: self.console_messages.append(f"error: {error}"))
        self.context.on("request", lambda request: self.requested_urls.append(request.url))
        self.url = file.resolve().as_uri()
        self.page.goto(self.url)

    def check_invariants(self, name: str) -> None:
        """No axe-core violation, no horizontal scrolling, no console message, no request, no violated security policy."""
        axe = pytest.importorskip(
            "axe_playwright_python.sync_playwright", reason="needs Chromium: no axe-playwright-python"
        )
        if SCREENSHOT_DIR:
            self.page.screenshot(path=f"{SCREENSHOT_DIR}/{name}.png", full_page=True)
        violations = axe.Axe().run(self.page).response["violations"]
        assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in violations] == []
        scroll_width, window_width = self.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert scroll_width <= window_width
        assert self.console_messages == []
        assert self.requested_urls == [self.url]
        assert self.page.evaluate("window.violations") == []
