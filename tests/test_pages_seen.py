"""The pages that are written as files (an explanation, a report, runs compared), as people meet them in a real Chromium."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browsing import DISPLAY_VARIANTS, SCREENSHOT_DIR, OpenedPage
from browsing import browser as browser
from nextword import load
from nextword.commands import api
from nextword.data.tokenizer import Tokenizer, train_bpe
from nextword.interpretability.explain import explain
from nextword.pipeline.language_model import Model
from nextword.reporting.explain_page import write_explanation_page
from nextword.tasks.dataset import TaskSpec
from test_explaining import HOSTILE, TEXT, random_model, saved
from test_report import make, measured, records

if TYPE_CHECKING:
    from playwright.sync_api import Browser, expect
else:
    expect = pytest.importorskip("playwright.sync_api", reason="needs Chromium: playwright is not installed").expect

SEEN = list(DISPLAY_VARIANTS) if SCREENSHOT_DIR else ["light-wide", "dark-phone"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([f"{TEXT} and she said that the nurse was a doctor. " * 4] * 20, 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return saved(random_model("modern", tokenizer.vocab_size), tokenizer, tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def page(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_explanation_page(explain(model, [TEXT]), tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture
def opened(browser: "Browser") -> Iterator[list[OpenedPage]]:
    pages: list[OpenedPage] = []
    yield pages
    for one in pages:
        one.prefix_offset.close()


@pytest.mark.parametrize("look", SEEN)
def test_an_explanation_can_be_used_by_everybody(
    browser: "Browser", opened: list[OpenedPage], page: Path, look: str
) -> None:
    opened.append(OpenedPage(browser, page, look))
    [one] = opened
    expect(one.page.locator("#chosen")).to_contain_text("doctor")
    one.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    expect(one.page.locator("#weights tbody tr")).to_have_count(int(one.page.locator("#strip .token").count()))
    one.check_invariants(f"explained-{look}")


def test_the_keys_go_through_tokens_layers_and_heads(
    browser: "Browser", opened: list[OpenedPage], page: Path, model: Model
) -> None:
    told = explain(model, [TEXT])
    opened.append(OpenedPage(browser, page, "light-wide"))
    [one] = opened
    keys, strip = one.page.keyboard, one.page.locator("#strip")
    last = len(told["tokens"]) - 1

    def chosen() -> str:
        return one.page.locator("#chosen").inner_text()

    one.page.locator("#strip [tabindex='0']").focus()
    assert chosen().startswith(f"Token {last + 1} of {last + 1}")
    keys.press("ArrowLeft")
    assert chosen().startswith(f"Token {last} of")
    expect(strip.locator("[aria-current]")).to_have_count(1)
    keys.press("Home")
    expect(one.page.locator("#back")).to_be_disabled()
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    assert chosen().startswith("Token 3 of")
    assert one.page.evaluate("document.activeElement.parentElement.id") == "strip"
    token = told["tokens"][3]
    expect(one.page.locator("#really")).to_contain_text(f"{token['surprisal']:.1f} bits")
    best = told["tokens"][2]["next"][0]
    expect(one.page.locator("#chances tbody tr").first).to_contain_text(f"{100 * best['probability']:.1f} %")

    one.page.locator("#layer").select_option("0")
    one.page.locator("#head").select_option("0")
    one.page.locator("#lines").focus()
    keys.press("ArrowDown")
    keys.press("Shift+ArrowDown")
    keys.press("Shift+ArrowDown")
    assert [one.page.locator(name).input_value() for name in ("#layer", "#head")] == ["1", "2"]
    weights = told["attention"][1][2][2]
    one.page.locator("#weights-box").evaluate("(box) => { box.open = true; }")
    shown = [float(text.rstrip(" %").lstrip("<> ")) for text in one.page.locator("#weights td").all_inner_texts()]
    assert shown == pytest.approx([100 * weight for weight in weights], abs=0.06)
    assert one.page.locator("#rays path").count() == sum(weight >= 0.004 for weight in weights)
    expect(one.page.locator("#looks")).to_contain_text("Layer 2, head 3: ")
    keys.press("End")
    expect(one.page.locator("#really")).to_contain_text("Here the text ends")
    one.page.locator("#layers tbody td").nth(0).click()
    assert chosen().startswith("Token 1 of")
    one.page.locator("#heads-box summary").click()
    box = one.page.locator("#heads").bounding_box()
    assert box is not None
    one.page.mouse.click(box["x"] + 5, box["y"] + 5)
    expect(one.page.locator("#looks")).to_contain_text("Layer 1, head 1: ")


@pytest.mark.parametrize("look", ["dark-phone"])
def test_hostile_text_stays_text(
    browser: "Browser", opened: list[OpenedPage], model: Model, tmp_path: Path, look: str
) -> None:
    told = explain(model, [HOSTILE[-60:]])
    opened.append(OpenedPage(browser, write_explanation_page(told, tmp_path / "page.html"), look))
    opened[0].check_invariants("hostile")
    opened.append(
        OpenedPage(
            browser, write_explanation_page(explain(model, ["שלום </script><b>" * 2]), tmp_path / "rtl.html"), look
        )
    )
    one = opened[1]
    assert one.page.locator("#strip").get_attribute("dir") == "rtl"
    one.page.locator("#strip [tabindex='0']").focus()
    one.page.keyboard.press("ArrowRight")  # which is back, in a text that runs to the left
    expect(one.page.locator("#chosen")).to_contain_text(re.compile(r"Token (\d+) of (?!\1)\d+"))
    assert one.page.title() != "owned"
    assert one.page.locator("#strip b, h1 b").count() == 0
    one.check_invariants("rtl")


def test_a_task_is_explained_by_its_labels(
    browser: "Browser", opened: list[OpenedPage], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    form = TaskSpec("classify", "label", ("bad", "good", "<b>so so</b>"))
    model = saved(random_model("tutorial", tokenizer.vocab_size), tokenizer, tmp_path / "m", form)
    told = explain(model, ["the nurse was tired"])
    opened.append(OpenedPage(browser, write_explanation_page(told, tmp_path / "page.html"), "light-phone"))
    [one] = opened
    expect(one.page.locator("#answer")).to_contain_text(f"The answer is {told['answer']['label']}")
    expect(one.page.locator("#outputs tbody tr")).to_have_count(3)
    expect(one.page.locator("#outputs")).to_contain_text("<b>so so</b>")
    expect(one.page.locator("#next")).to_be_hidden()
    one.check_invariants("task")


@pytest.mark.parametrize("look", SEEN)
def test_a_report_and_a_comparison_can_be_used_by_everybody(
    browser: "Browser", opened: list[OpenedPage], tmp_path: Path, look: str
) -> None:
    runs = [measured(tmp_path / "one"), make(tmp_path / "two", lines=records())]
    opened.append(OpenedPage(browser, api.report(runs[0]), look))
    opened.append(OpenedPage(browser, api.report(runs, tmp_path / "compared.html"), look))
    for name, one in zip(("report", "compared"), opened, strict=True):
        one.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        one.check_invariants(f"{name}-{look}")
    compared = opened[1].page
    compared.get_by_role("radio", name="by tokens").check()
    expect(compared.locator(".by-tokens")).to_be_visible()
    expect(compared.locator(".by-step")).to_be_hidden()


def test_the_numbers_of_a_page_are_the_explanations(page: Path, model: Model) -> None:
    """What a program would read from the page is what `--json` says, as far as a page holds it."""
    (found,) = re.findall(
        r'<script type="application/json" id="data">([^<]*)</script>', page.read_text(encoding="utf-8")
    )
    data, told = json.loads(found), explain(load(model.path), [TEXT])
    assert data["leaning"]["parts"] == pytest.approx(told["leaning"]["parts"])
    assert [one["surprisal"] for one in data["tokens"]] == [one["surprisal"] for one in told["tokens"]]
