"""End-to-end scenarios of the chat page, in Chromium with a fake server.

In every scenario, the browser's console stays empty, no request goes to another origin, and the page's strict policy is
never broken.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from browsing import CSP_VIOLATION_SCRIPT, DESKTOP_VIEWPORT, DISPLAY_VARIANTS, PHONE_VIEWPORT, SCREENSHOT_DIR
from browsing import browser as browser
from nextword.common.fs import MANIFEST
from page_server import CONTENT_SECURITY_POLICY, EMOJI, HTML, PAGE_DIR, RTL, STORY, PageServer
from processes import wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Locator, Page, ViewportSize, expect
else:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Chromium: playwright is not installed")
    expect, Browser = playwright.expect, playwright.Browser

NARROW: "ViewportSize" = {"width": 900, "height": 800}
TOLD = b"".join(STORY).decode()


@pytest.fixture
def server() -> Iterator[PageServer]:
    server = PageServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class Journey:
    """A page that is open, and what it did beside what can be seen."""

    def __init__(self, context: "BrowserContext", server: PageServer):
        self.server, self.script, self.prefix_offset = server, server.script, context
        self.told: list[str] = []
        self.elsewhere: list[str] = []
        self.troubles = False  # whether requests fail in this journey by intent, which the browser tells on its console
        context.add_init_script(CSP_VIOLATION_SCRIPT)
        self.page: Page = context.new_page()
        self.page.set_default_timeout(120_000)
        self.page.on("console", lambda message: self.told.append(message.text))
        self.page.on("pageerror", lambda error: self.told.append(f"error: {error}"))
        context.on("request", lambda request: self.elsewhere.append(request.url))
        self.page.goto(server.url)

    def close(self) -> None:
        assert self.page.evaluate("violations") == []
        told = [text for text in self.told if not (self.troubles and text.startswith("Failed to load resource"))]
        assert told == []
        assert [url for url in self.elsewhere if not url.startswith((self.server.url, "blob:null", "data:"))] == []
        self.prefix_offset.close()

    # What people look for, by the names that assistive technology gives it

    def at(self, selector: str) -> "Locator":
        return self.page.locator(selector)

    def button(self, name: str) -> "Locator":
        return self.page.get_by_role("button", name=name, exact=True)

    def field(self, name: str) -> "Locator":
        return self.page.get_by_label(name, exact=True)

    @property
    def answers(self) -> "Locator":
        return self.at(".exchange .model")

    def say(self, text: str, done: bool = True) -> None:
        self.field("Your message").fill(text)
        self.page.keyboard.press("Enter")
        if done:
            self.done()
            expect(self.at(".exchange").last.locator(".asked")).to_have_text(text)

    def done(self) -> None:
        """Wait for what is being written. (`expect` looks ever more seldom; this looks with every frame.)"""
        self.page.wait_for_selector("#send:visible, #continue:visible")

    def asked(self) -> dict[str, Any]:
        """The last request for an answer."""
        return self.script.requests[-1][1]

    def focused(self) -> str:
        return self.page.evaluate("document.activeElement.id || document.activeElement.className")

    def no_sideways(self) -> None:
        wide, there = self.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= there


Open = Callable[..., Journey]


@pytest.fixture
def open_page(browser: "Browser", server: PageServer) -> Iterator[Open]:
    journeys: list[Journey] = []

    def open_page(viewport: "ViewportSize" = NARROW, chat: bool = True, **context: Any) -> Journey:
        server.script.chat = chat
        journeys.append(Journey(browser.new_context(viewport=viewport, **context), server))
        return journeys[-1]

    yield open_page
    for journey in journeys:
        journey.close()


# ---------------------------------------------------------------- conversation


def test_a_conversation_is_streamed_and_continues(open_page: Open) -> None:
    j = open_page()
    expect(j.at("#model")).to_contain_text("lighthouse-mini reads 256 tokens · fp32")
    assert j.focused() == "draft"
    j.page.evaluate("""() => {
        const said = document.querySelector("#say"), all = { childList: true, characterData: true, subtree: true };
        window.heard = [];
        new MutationObserver(() => window.heard.push(said.textContent)).observe(said, all);
    }""")
    j.script.may_write.clear()
    j.say("Tell me\nof the sea", done=False)
    expect(j.button("Stop")).to_be_visible()
    j.script.may_write.set()
    expect(j.answers).to_have_text(TOLD)
    expect(j.at("#say")).to_have_text(f"Model: {TOLD}")
    # What is being written is not read out, token by token.
    assert set(j.page.evaluate("window.heard")) - {""} == {f"Model: {TOLD}"}
    expect(j.at(".exchange .note")).to_contain_text(f"{len(STORY)} tokens")
    expect(j.at("#count")).to_have_text(f"{9 + len(STORY)} of 256 tokens")
    body = j.asked()
    settings = {"temperature": 0.8, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "max_tokens": 200}
    assert body == settings | {
        "model": "lighthouse-mini",
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 5,
        "truncation": "auto",
        "messages": [{"role": "user", "content": "Tell me\nof the sea"}],
    }
    j.say("And then?")
    assert [message["role"] for message in j.asked()["messages"]] == ["user", "assistant", "user"]
    assert j.asked()["messages"][1]["content"] == TOLD
    j.field("Your message").fill("one two")
    expect(j.at("#count")).to_have_text(f"{len(TOLD.split()) * 2 + 9} of 256 tokens")
    j.page.keyboard.press("Shift+Enter")
    assert j.field("Your message").input_value() == "one two\n"


def test_settings_are_sent_and_wrong_ones_are_shown(open_page: Open) -> None:
    j = open_page(viewport=DESKTOP_VIEWPORT)
    j.field("System message").fill("Be brief.")
    j.field("Temperature").fill("0")
    expect(j.at("output[for=temperature]")).to_have_text("0")
    j.page.get_by_label("Top-k").fill("40")
    j.page.get_by_label("Seed").fill("7")
    j.say("lines")
    assert j.asked()["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: j.asked()[name] for name in ("temperature", "top_k", "seed")} == {
        "temperature": 0,
        "top_k": 40,
        "seed": 7,
    }
    assert j.answers.inner_text() == "one\n\n  two\n\tthree"
    j.page.get_by_label("Max tokens").fill("0")
    j.field("Your message").fill("wrong")
    j.button("Settings").click()  # closed, and opened again by what is wrong in it
    j.button("Send").click()
    assert len(j.script.requests) == 1
    assert j.focused() == "max_tokens"
    assert j.field("Your message").input_value() == "wrong"
    j.button("Reset to defaults").click()
    j.field("Your message").press("Enter")
    j.done()
    expect(j.answers).to_have_count(2)
    assert j.asked()["temperature"] == 0.8
    assert j.asked()["messages"][0]["role"] == "system"


def test_stop(open_page: Open) -> None:
    j = open_page()
    j.say("slow", done=False)
    expect(j.answers).to_contain_text("tick2")
    j.page.keyboard.press("Escape")
    expect(j.at(".exchange .note")).to_contain_text("stopped")
    j.done()
    expect(j.at("#say")).to_contain_text("Stopped.")
    first = j.answers.inner_text()
    assert "tick150" not in first
    wait_until(lambda: j.script.client_disconnects == 1)  # the server has seen it
    j.say("slow again", done=False)
    expect(j.answers.last).to_contain_text("tick1")
    j.button("Stop").click()
    j.done()
    assert j.focused() == "draft"
    assert j.asked()["messages"][1]["content"] == first  # what was written of an answer stays in the conversation


def test_regenerate_and_undo(open_page: Open) -> None:
    j = open_page()
    j.say("unsure")
    j.say("rtl")
    asked = j.asked()
    j.button("Regenerate this answer").last.click()
    j.done()
    assert j.asked() == asked
    assert j.answers.count() == 2
    j.button("Regenerate this answer").first.click()
    expect(j.answers).to_have_count(1)
    j.done()
    j.button("Undo").click()
    assert [text for text in j.answers.all_inner_texts() if text == RTL] == [RTL]
    j.button("New").click()
    expect(j.page.get_by_role("heading", name="Start a conversation")).to_be_visible()
    assert j.focused() == "draft"
    j.button("Undo").click()
    expect(j.answers).to_have_count(2)


def test_edit_continues_from_the_message(open_page: Open) -> None:
    j = open_page()
    j.say("first")
    j.say("second")
    j.field("Your message").press("ArrowUp")
    assert j.page.evaluate("document.activeElement.value") == "second"
    j.page.keyboard.press("Escape")
    expect(j.at(".edit")).to_have_count(0)
    assert j.focused() == "draft"
    j.button("Edit this message").first.click()
    j.field("The edited message").fill("zeroth")
    j.page.keyboard.press("Enter")
    j.done()
    expect(j.at(".asked")).to_have_text(["zeroth"])
    assert [message["content"] for message in j.asked()["messages"]] == ["zeroth"]
    enter = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true})"
    composing = f"document.activeElement.dispatchEvent({enter})"
    j.button("Edit this message").click()
    j.page.evaluate(composing)  # Enter belongs to the input method, where there is one
    expect(j.at(".edit")).to_be_visible()
    j.page.keyboard.press("Escape")
    j.field("Your message").fill("not yet")
    j.page.evaluate(composing)
    assert j.field("Your message").input_value() == "not yet"
    j.say("third")
    assert [message["content"] for message in j.asked()["messages"]] == ["zeroth", TOLD, "third"]


# ---------------------------------------------------------------- tokens


def test_a_token_shows_its_probability_and_alternatives(open_page: Open) -> None:
    j = open_page()
    j.say("unsure")
    tokens, box = j.answers.locator(".token"), j.at("#inspector")
    assert tokens.count() == 19
    tokens.nth(2).hover()  # " of", 31 %
    expect(box).to_be_visible()
    expect(box.locator(".title")).to_have_text("␣of 31.0 %")
    assert box.locator("li").all_inner_texts() == [
        "␣the\n34.5 %",
        "␣of\n31.0 %",
        "␣a\n17.3 %",
        "␣an\n8.6 %",
        "↵\n4.3 %",
    ]
    expect(box.locator("li.taken")).to_have_count(1)
    expect(box).to_contain_text("4.3 % for all other tokens")
    box.hover()  # the box can be pointed at itself
    j.page.wait_for_timeout(250)
    expect(box).to_be_visible()
    j.at("h1").hover()
    expect(box).to_be_hidden()
    tokens.nth(5).click()  # 2 %: not among the likeliest
    j.at("h1").hover()
    j.page.wait_for_timeout(250)
    expect(box.locator("li")).to_have_count(6)
    expect(box.locator("li.taken")).to_have_text("␣Ulaanbaatar2.0 %")
    j.page.keyboard.press("Escape")
    expect(box).to_be_hidden()
    # By keyboard: the answer is one stop of the Tab key, and the arrows go through its tokens.
    j.button("Copy this message").focus()
    j.page.keyboard.press("Tab")
    expect(box.locator(".title")).to_contain_text("The")
    j.page.keyboard.press("ArrowRight")
    expect(box.locator(".title")).to_have_text("␣capital 62.0 %")
    expect(j.at("#say")).to_contain_text("␣capital, 62.0 %; others: ␣the 19.0 %, ␣a 9.5 %")
    j.page.keyboard.press("End")
    expect(box.locator(".title")).to_contain_text("␣.")
    j.page.keyboard.press("Tab")
    expect(box).to_be_hidden()


def test_underline_thickness_shows_probability(open_page: Open) -> None:
    j = open_page(viewport=DESKTOP_VIEWPORT)
    j.say("unsure")
    style = "e => [getComputedStyle(e).textDecorationLine, parseFloat(getComputedStyle(e).textDecorationThickness)]"
    by_chance = [4, 1, 2, 3, 5]  # 97, 62, 31, 12 and 2 %
    found = [j.answers.locator(".token").nth(i).evaluate(style) for i in by_chance]
    assert [line for line, _ in found] == ["underline"] * 5
    thickness = [width for _, width in found]
    assert thickness == sorted(set(thickness))
    j.page.get_by_label("Underline tokens by probability").uncheck()
    assert j.answers.locator(".token").first.evaluate(style)[0] == "none"
    j.answers.locator(".token").first.hover()  # they can be asked all the same
    expect(j.at("#inspector")).to_be_visible()


def test_a_resting_pointer_opens_nothing(open_page: Open) -> None:
    """A text that is written under it, or scrolled, opens no boxes."""
    j = open_page()
    j.say("unsure")
    place = j.answers.locator(".token").nth(5).bounding_box()
    assert place is not None
    j.button("New").click()
    x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    j.page.mouse.move(x, y)
    j.say("unsure")
    j.page.wait_for_timeout(250)
    assert j.page.evaluate(f"document.elementFromPoint({x}, {y}).className").startswith("token")
    expect(j.at("#inspector")).to_be_hidden()
    j.page.mouse.move(x + 60, y)
    expect(j.at("#inspector")).to_be_visible()


def test_characters_of_many_tokens(open_page: Open) -> None:
    j = open_page()
    j.say("emoji")
    assert j.answers.inner_text() == EMOJI
    flag = j.answers.locator(".token", has_text="🇲")
    flag.hover()
    expect(j.at("#inspector")).to_contain_text("9F 87")
    assert j.at("#inspector .title").count() >= 2  # one for each of its tokens
    j.say("rtl")
    assert j.answers.last.inner_text() == RTL
    assert j.answers.last.evaluate("e => getComputedStyle(e).direction") == "rtl"
    assert j.answers.first.evaluate("e => getComputedStyle(e).direction") == "ltr"
    j.button("Completion").click()
    j.field("Text to continue").fill("emoji ")
    j.button("Continue").click()
    j.done()
    assert j.at("#reading").inner_text() == f"emoji {EMOJI}"
    assert j.at("#reading .token").count() > 10  # this form of the API spells bytes in the name


def test_html_from_the_model_stays_text(open_page: Open) -> None:
    j = open_page()
    j.troubles = True  # the second message is refused
    j.say("html")
    shown = HTML.replace("\x00", "␀").replace("\x1b", "␛")
    assert j.answers.inner_text() == shown
    j.field("Your message").fill("<img src=x onerror=alert(1)> refuse")
    j.page.keyboard.press("Enter")
    expect(j.at(".asked").last).to_have_text("<img src=x onerror=alert(1)> refuse")
    j.answers.locator(".token").nth(1).click()
    assert j.at("main img, main script, .exchange b, title b").count() == 0
    assert j.page.title() == "lighthouse-mini · nextword"


# ---------------------------------------------------------------- completion


def test_completion_in_place(open_page: Open) -> None:
    j = open_page(chat=False)
    expect(j.button("Completion")).to_have_attribute("aria-pressed", "true")
    expect(j.at("#hint")).to_contain_text("not fine-tuned for chat")
    text, reading = j.field("Text to continue"), j.at("#reading")
    j.button("Continue").click()
    expect(j.at("#notice")).to_contain_text("Write the beginning of a text first")
    assert j.focused() == "text"
    text.fill("The lighthouse stood alone. ")
    expect(j.at("#count")).to_have_text("4 of 256 tokens")
    text.fill("word " * 300)
    expect(j.at("#count")).to_have_text("300 tokens, the model reads the last 256")
    text.fill("The lighthouse stood alone. ")
    j.page.keyboard.press("Control+Enter")
    expect(j.at("#text-note")).to_contain_text(f"{len(STORY)} tokens")
    assert reading.inner_text() == f"The lighthouse stood alone. {TOLD}"
    expect(reading.locator(".token").last).to_have_attribute("data-mark", "<|end|>")
    asked = {"prompt": "The lighthouse stood alone. ", "logprobs": 5, "stream": True, "truncate_prompt_tokens": -1}
    assert j.asked() | asked == j.asked()
    assert j.focused() == "reading"
    j.page.keyboard.press("ArrowRight")
    expect(j.at("#inspector .title")).to_contain_text("Once")
    j.page.keyboard.press("Control+Enter")  # and on
    expect(j.at("#reading > span")).to_have_count(3)
    j.done()
    assert j.asked()["prompt"] == f"The lighthouse stood alone. {TOLD}"
    j.button("Try again").click()
    j.done()
    assert j.asked()["prompt"] == f"The lighthouse stood alone. {TOLD}"
    j.button("Edit the text").click()
    assert text.input_value() == f"The lighthouse stood alone. {TOLD}{TOLD}"
    # What was left as it was keeps its tokens; the rest is now one's own.
    text.fill(f"The lighthouse stood alone. {TOLD[:20]} and slow")
    j.button("Continue").click()
    expect(reading).to_contain_text("tick1")
    j.page.keyboard.press("Escape")
    expect(j.at("#text-note")).to_contain_text("stopped")
    assert reading.locator(":scope > span").nth(1).locator(".token").count() == 4  # "Once there was a small" is cut
    j.button("Conversation").click()
    expect(j.at("#hint")).to_contain_text("expect it to continue your text")
    j.say("hello")
    expect(j.answers).to_have_text(TOLD)
    j.button("Completion").click()
    expect(reading).to_contain_text("tick1")


# ---------------------------------------------------------------- keyboard, phone, themes, assistive technology


def test_keyboard_operation(open_page: Open) -> None:
    j = open_page(viewport=NARROW)
    press, focused = j.page.keyboard.press, j.focused

    def tab_to(name: str, back: bool = False) -> None:
        for _ in range(40):
            if name in focused():
                visible = j.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert visible != "none", f"{name}: the focus cannot be seen"
                return
            press("Shift+Tab" if back else "Tab")
        raise AssertionError(f"{name} cannot be reached")

    expect(j.at("#model")).to_contain_text("lighthouse")
    tab_to("skip", back=True)
    press("Enter")
    assert focused() == "draft"
    j.page.keyboard.type("unsure")
    press("Enter")
    expect(j.at("#say")).to_contain_text("Model: ")
    tab_to("text model", back=True)
    press("ArrowRight")
    expect(j.at("#inspector")).to_be_visible()
    press("Escape")
    expect(j.at("#inspector")).to_be_hidden()
    press("Tab")
    press("Tab")
    assert j.page.evaluate("document.activeElement.ariaLabel") == "Regenerate this answer"
    press("Enter")
    j.done()
    assert len(j.script.requests) == 2
    assert focused() == "text model"  # the Stop button is gone, the focus is not
    tab_to("open-settings", back=True)
    press("Enter")
    expect(j.page.get_by_role("dialog", name="Settings")).to_be_visible()
    tab_to("temperature")
    press("ArrowRight")
    expect(j.at("output[for=temperature]")).to_have_text("0.85")
    tab_to("save")
    with j.page.expect_download() as download:
        press("Enter")
    assert "unsure" in download.value.path().read_text()
    press("Escape")
    expect(j.at("#settings")).to_be_hidden()
    assert focused() == "open-settings"
    tab_to("mode-completion", back=True)
    press("Space")
    tab_to("text")
    j.page.keyboard.type("It began")
    press("Control+Enter")
    expect(j.at("#text-note")).to_contain_text("tokens")
    tab_to("text-edit")
    press("Enter")
    assert focused() == "text"
    tab_to("theme", back=True)
    press("Enter")
    assert j.page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_on_a_phone(open_page: Open) -> None:
    j = open_page(viewport=PHONE_VIEWPORT, has_touch=True, is_mobile=True, device_scale_factor=2)
    j.no_sideways()
    j.field("Your message").fill("long")
    j.button("Send").tap()
    expect(j.at(".exchange .note")).to_contain_text("cut off at the limit (max tokens)")
    j.no_sideways()
    token = j.answers.locator(".token").nth(180)
    token.tap()
    box = j.at("#inspector").bounding_box()
    assert box is not None
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] >= 0 and box["y"] + box["height"] <= 844
    token.tap()
    expect(j.at("#inspector")).to_be_hidden()
    j.say("w" * 300)
    j.no_sideways()
    # All that can be pressed is in sight or can be scrolled to, and as large as a fingertip needs.
    for name in ("New", "Settings", "Dark or light", "Send", "Conversation", "Completion"):
        place = j.button(name).bounding_box()
        assert place is not None and place["height"] >= 30 and place["x"] >= 0 and place["x"] + place["width"] <= 390, (
            name
        )
    j.button("Settings").tap()
    j.no_sideways()
    for name in ("Seed", "Underline tokens by probability"):
        j.page.get_by_label(name).scroll_into_view_if_needed()
        expect(j.page.get_by_label(name)).to_be_in_viewport()
    expect(j.button("Save")).to_be_enabled()
    j.button("Close").tap()
    j.button("Completion").tap()
    j.field("Text to continue").fill("Once ")
    j.button("Continue").tap()
    j.done()
    j.no_sideways()


@pytest.mark.parametrize("viewport", [DESKTOP_VIEWPORT, PHONE_VIEWPORT], ids=["wide", "phone"])
def test_closing_the_settings_keeps_the_focus(open_page: Open, viewport: Any) -> None:
    """The browser tells of it a moment later: back to the button, but not from a field that one has gone on to by then."""
    j = open_page(viewport=viewport)
    close = """(next) => new Promise((done) => {
      const settings = document.getElementById("settings");
      settings.addEventListener("close", () => requestAnimationFrame(() => done(document.activeElement.id)), {once: true});
      settings.close();
      if (next) document.getElementById(next).focus();
    })"""
    for following, focused in (("draft", "draft"), (None, "open-settings")):
        if not j.at("#settings").is_visible():
            j.button("Settings").click()
        j.field("Seed").focus()
        assert j.page.evaluate(close, following) == focused


def states(j: Journey) -> Iterator[str]:
    """What the page looks like in the course of a visit."""
    expect(j.at("#model")).to_contain_text("lighthouse")
    yield "welcome"
    j.field("Your message").fill("unsure")
    j.page.keyboard.press("Enter")
    expect(j.at("#say")).to_contain_text("Model: ")
    j.say("slow refuse")
    j.answers.locator(".token").nth(9).click()
    yield "chat"
    j.page.keyboard.press("Escape")
    j.button("Edit this message").first.click()
    yield "edit"
    j.page.keyboard.press("Escape")
    if not j.at("#settings").is_visible():
        j.button("Settings").click()
        yield "settings"
        j.button("Close").click()
    j.script.key = "secret"
    j.field("Your message").fill("hello")
    j.page.keyboard.press("Enter")
    expect(j.field("Key")).to_be_visible()
    yield "key"
    j.script.key = None
    j.button("Not now").click()
    j.button("Completion").click()
    j.field("Text to continue").fill("Once upon a time, far from here, ")
    yield "writing"
    j.button("Continue").click()
    j.done()
    yield "completion"
    j.script.is_offline = True
    j.button("Continue").click()
    expect(j.page.get_by_role("alert")).to_be_visible()
    yield "away"
    j.script.is_offline = False
    expect(j.page.get_by_role("alert")).to_be_hidden()


@pytest.mark.parametrize("look", list(DISPLAY_VARIANTS) if SCREENSHOT_DIR else ["light-wide", "dark-phone"])
def test_assistive_technology_can_use_it(open_page: Open, look: str) -> None:
    """No finding of axe-core's rules (WCAG 2.2 A and AA and best practices), in any state, light and dark."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs Chromium: no axe-playwright-python"
    )
    theme, viewport = DISPLAY_VARIANTS[look]
    j = open_page(viewport=viewport, color_scheme=theme, reduced_motion="reduce")
    j.troubles = True
    for state in states(j):
        if SCREENSHOT_DIR:
            j.page.screenshot(path=f"{SCREENSHOT_DIR}/{look}-{state}.png")
        found = axe.Axe().run(j.page).response["violations"]
        assert [(finding["id"], [node["html"] for node in finding["nodes"]]) for finding in found] == [], state


def test_themes(open_page: Open) -> None:
    def paper() -> str:
        return j.page.evaluate("getComputedStyle(document.body).backgroundColor")

    j = open_page(color_scheme="dark", reduced_motion="reduce")
    dark = paper()
    j.button("Dark or light").click()
    light = paper()
    assert light != dark
    j.page.reload()
    assert paper() == light  # the choice is remembered
    j.button("Dark or light").click()
    assert paper() == dark
    j.say("slow", done=False)
    expect(j.at(".writing")).to_be_visible()
    assert j.page.evaluate("document.getAnimations().length") == 0


# ---------------------------------------------------------------- trouble


def test_the_server_disconnects_and_reconnects(open_page: Open) -> None:
    j = open_page()
    j.troubles = True
    j.say("slow", done=False)
    expect(j.answers).to_contain_text("tick1")
    j.script.is_offline = True
    expect(j.page.get_by_role("alert")).to_contain_text("cannot be reached")
    expect(j.at(".exchange .note")).to_contain_text("was lost")
    j.field("Your message").fill("written meanwhile")
    j.page.keyboard.press("Enter")
    j.page.wait_for_timeout(300)
    assert j.field("Your message").input_value() == "written meanwhile"
    assert len(j.script.requests) == 1
    j.script.is_offline = False
    expect(j.page.get_by_role("alert")).to_be_hidden()  # by itself
    expect(j.at("#notice")).to_contain_text("Reconnected")
    expect(j.answers).to_contain_text("tick1")  # as far as it had come
    j.button("Retry the request").click()
    expect(j.answers).to_contain_text("tick1")
    j.page.keyboard.press("Escape")
    j.say("written later")
    j.script.is_offline = True
    j.page.clock.install()
    j.page.clock.pause_at("2100-01-01")  # from here on the page does not look by itself
    j.page.evaluate("dispatchEvent(new Event('online'))")  # a look that needs no message
    expect(j.page.get_by_role("alert")).to_be_visible()
    j.script.is_offline = False
    j.button("Try now").click()
    expect(j.page.get_by_role("alert")).to_be_hidden()


def test_a_server_that_is_still_loading(open_page: Open, server: PageServer) -> None:
    server.script.loading = True
    j = open_page()
    j.troubles = True
    expect(j.page.get_by_role("alert")).to_contain_text("still loading the model")
    server.script.loading = False
    expect(j.at("#model")).to_contain_text("lighthouse-mini")
    expect(j.page.get_by_role("alert")).to_be_hidden()


def test_busy_server_and_error_messages(open_page: Open) -> None:
    j = open_page()
    j.troubles = True
    j.say("busy", done=False)
    expect(j.at(".exchange .note")).to_contain_text("Eight others are being answered. Trying again")
    expect(j.answers).to_have_text(TOLD)
    assert len(j.script.requests) == 3
    j.say("refuse")
    expect(j.at(".exchange .note").last).to_have_text("The conversation has 300 tokens, and this model reads 256.")
    j.say("fail")
    expect(j.at(".exchange .note").last).to_have_text("The model's numbers are not finite any more.")
    expect(j.answers.last).to_contain_text("tick3")
    j.say("nothing")
    expect(j.at(".exchange .note").last).to_contain_text("empty answer")
    assert "refuse" not in json.dumps(j.asked())  # what was not answered is no part of the conversation
    j.script.busy = 9
    j.say("busy", done=False)
    expect(j.at(".exchange .note").last).to_contain_text("Trying again")
    j.page.keyboard.press("Escape")
    j.done()
    expect(j.at(".exchange .note").last).to_have_text("stopped")
    j.say("break")
    expect(j.at(".exchange .note").last).to_contain_text("was lost")


def test_the_api_key_dialog(open_page: Open, server: PageServer) -> None:
    server.script.key = "right"
    j = open_page()
    j.troubles = True
    j.field("Key").fill("wrong")
    j.page.keyboard.press("Enter")
    expect(j.at("#key-about")).to_have_text("The server rejected the key.")
    j.button("Not now").click()
    expect(j.page.get_by_role("alert")).to_contain_text("requires an API key")
    j.button("Try now").click()
    j.field("Key").fill("right")
    j.button("Use this key").click()
    expect(j.at("#model")).to_contain_text("lighthouse-mini")
    j.say("hello")
    expect(j.answers).to_have_text(TOLD)
    kept = "JSON.stringify([{...localStorage}, {...sessionStorage}])"
    assert "right" not in j.page.evaluate(kept)
    j.page.reload()  # it was kept in memory alone
    j.field("Key").fill("right")
    j.field("Remember it until this tab is closed").check()
    j.page.keyboard.press("Enter")
    expect(j.at("#model")).to_contain_text("lighthouse-mini")
    j.page.reload()
    expect(j.at("#model")).to_contain_text("lighthouse-mini")
    assert "right" not in j.page.evaluate("JSON.stringify({...localStorage})")


# ---------------------------------------------------------------- files


def test_saved_conversations_are_training_data_and_can_be_loaded(open_page: Open, tmp_path: Path) -> None:
    from nextword.data.issues import IssueLog
    from nextword.tasks.examples import read_examples

    j = open_page(viewport=DESKTOP_VIEWPORT)
    j.button("Save").click()
    expect(j.at("#notice")).to_contain_text("nothing to save")
    j.field("System message").fill("Be kind.")
    j.say("emoji")
    j.say("lines")
    with j.page.expect_download() as download:
        j.button("Save").click()
    file = tmp_path / "saved.jsonl"
    download.value.save_as(file)
    assert download.value.suggested_filename.startswith("conversation-")
    problems = IssueLog()
    (example,) = read_examples([str(file)], "chat", problems).items
    assert problems.summary_lines() == []
    assert [(m["role"], m["content"]) for m in example.fields["messages"]] == [
        ("system", "Be kind."),
        ("user", "emoji"),
        ("assistant", EMOJI),
        ("user", "lines"),
        ("assistant", "one\n\n  two\n\tthree"),
    ]

    file.write_text(
        '{"messages": [{"role": "assistant", "content": "other"}]}\n' + file.read_text(encoding="utf-8"), "utf-8"
    )
    fresh = open_page()
    fresh.at("#file").set_input_files(file)
    expect(fresh.at("#notice")).to_contain_text("the last of 2 conversations")
    assert fresh.answers.all_inner_texts() == [EMOJI, "one\n\n  two\n\tthree"]
    fresh.say("on")
    assert len(fresh.asked()["messages"]) == 6
    assert fresh.asked()["messages"][0] == {"role": "system", "content": "Be kind."}
    for wrong, why in (
        ("nonsense", "Line 1 is not JSON"),
        ("{}", "no line such as"),
        ('{"messages": [{"role": "user"}]}', "Message 1 has no text"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "has the role tool"),
    ):
        file.write_text(wrong)
        fresh.at("#file").set_input_files(file)
        expect(fresh.at("#notice")).to_contain_text(why)
        expect(fresh.answers).to_have_count(3)


def test_copy_and_reload(open_page: Open) -> None:
    j = open_page(permissions=["clipboard-read", "clipboard-write"])
    j.say("html")
    j.say("lines")
    j.button("Copy this answer").last.click()
    expect(j.at("#say")).to_have_text("Copied.")
    assert j.page.evaluate("navigator.clipboard.readText()") == "one\n\n  two\n\tthree"
    j.field("Your message").fill("half a thought")
    j.page.get_by_role("button", name="Completion").click()
    j.field("Text to continue").fill("half a tale")
    j.page.reload()
    assert j.field("Text to continue").input_value() == "half a tale"
    j.page.get_by_role("button", name="Conversation").click()
    assert j.field("Your message").input_value() == "half a thought"
    expect(j.answers.first).to_have_text(HTML.replace("\x00", "␀").replace("\x1b", "␛"))
    j.button("New").click()
    j.button("Undo").click()
    expect(j.answers).to_have_count(2)
    j.button("Completion").click()
    assert j.field("Text to continue").input_value() == "half a tale"


def test_with_a_real_model(browser: "Browser", base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same journeys in short, against the real server; whose policy is the one that the stand-in has."""
    pytest.importorskip("fastapi", reason="the real server needs fastapi")
    from nextword.serving import security
    from served import running_server

    assert dict(security.SECURITY_HEADERS)[b"content-security-policy"].decode() == CONTENT_SECURITY_POLICY
    model = shutil.copytree(base / "model", tmp_path / "model", ignore=shutil.ignore_patterns(MANIFEST))
    generation_config = {
        **json.loads((model / "generation_config.json").read_text()),
        "top_k": 250,
        "temperature": 1.234,
    }
    (model / "generation_config.json").write_text(json.dumps(generation_config))
    with running_server(model, api_key="a secret", name="small") as server:

        def disconnects() -> float:
            return server.metric("nextword_clients_left_total", Authorization="Bearer a secret")

        stand_in: Any = SimpleNamespace(script=None, url=f"{server.url}/")
        j = Journey(browser.new_context(viewport=DESKTOP_VIEWPORT), stand_in)
        j.troubles = True  # it is refused until it has the key
        j.field("Key").fill("a secret")
        j.page.keyboard.press("Enter")
        expect(j.at("#model")).to_contain_text("small")
        expect(j.at("#hint")).to_contain_text("not fine-tuned for chat")
        assert [j.at(f"#{name}").input_value() for name in ("temperature", "top_p", "top_k")] == ["1.234", "1", ""]
        expect(j.at("#top_k")).to_have_attribute("placeholder", "250")
        j.field("Text to continue").fill("The list of values " * 40)  # more than its context
        expect(j.at("#count")).to_contain_text("the model reads the last 64")
        j.page.keyboard.press("Control+Enter")
        tokens = j.at("#reading .token")
        expect(tokens.nth(5)).to_be_visible()
        j.page.wait_for_selector("#continue:visible")
        tokens.nth(1).hover()
        expect(j.at("#inspector .title").first).to_contain_text("%")  # one for each token of a character
        assert j.at("#inspector li").count() >= 5
        j.button("Conversation").click()
        # A model hardly taught may end an answer before its first token; not often, where every token is as likely.
        j.button("Settings").click()
        slide = "(range, value) => { range.value = value; range.dispatchEvent(new Event('input', {bubbles: true})) }"
        j.page.locator("#temperature").evaluate(slide, "2")
        j.page.keyboard.press("Escape")
        j.say("Hello")
        assert j.answers.last.locator(".token").count() > 0
        forward = server.engine.runner.forward
        assert disconnects() == 0
        monkeypatch.setattr(server.engine.runner, "forward", lambda *args: time.sleep(0.1) or forward(*args))
        j.button("New").click()
        j.say("And?", done=False)
        expect(j.answers.last.locator(".token").first).to_be_visible()
        j.page.keyboard.press("Escape")
        j.done()
        wait_until(lambda: disconnects() == 1 and not server.engine.has_unfinished_requests)
        j.close()


def test_the_page_is_small_and_self_contained() -> None:
    """Nothing inline, nothing from elsewhere, and no way by which a model's text could become HTML."""
    html = (PAGE_DIR / "index.html").read_text(encoding="utf-8")
    assert "style=" not in html and "http" not in html and " on" + "click" not in html
    scripts = "".join(path.read_text(encoding="utf-8") for path in PAGE_DIR.glob("*.js"))
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "document.write", "://"):
        assert forbidden not in scripts
    assert sum(path.stat().st_size for path in PAGE_DIR.iterdir()) < 100_000
