"""Explanation pages, reports and comparisons in a real Chromium: accessible, usable by keyboard, self-contained."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import nextword
from browsing import DISPLAY_VARIANTS, SCREENSHOT_DIR, OpenedPage
from browsing import browser as browser
from nextword import load
from nextword.data.tokenizer import Tokenizer, train_bpe
from nextword.interpretability.explain import explain
from nextword.pipeline.language_model import LanguageModel
from nextword.reporting.explain_page import write_explanation_page
from nextword.tasks.dataset import TaskSpec
from test_interpretability import HOSTILE, TEXT, random_model, saved
from test_report import training_records, write_evaluated_run, write_run

pytestmark = pytest.mark.charts

if TYPE_CHECKING:
    from playwright.sync_api import Browser, expect
else:
    expect = pytest.importorskip("playwright.sync_api", reason="needs Chromium: playwright is not installed").expect

VARIANTS = list(DISPLAY_VARIANTS) if SCREENSHOT_DIR else ["light-wide", "dark-phone"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([f"{TEXT} and she said that the nurse was a doctor. " * 4] * 20, 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return saved(random_model("modern", tokenizer.vocab_size), tokenizer, tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def page(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_explanation_page(explain(model, [TEXT]), tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture
def opened(browser: "Browser") -> Iterator[list[OpenedPage]]:
    pages: list[OpenedPage] = []
    yield pages
    for opened_page in pages:
        opened_page.context.close()


@pytest.mark.parametrize("look", VARIANTS)
def test_explanation_page_is_accessible(browser: "Browser", opened: list[OpenedPage], page: Path, look: str) -> None:
    opened.append(OpenedPage(browser, page, look))
    [opened_page] = opened
    expect(opened_page.page.locator("#selected")).to_contain_text("doctor")
    opened_page.page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    expect(opened_page.page.locator("#weights tbody tr")).to_have_count(
        int(opened_page.page.locator("#strip .token").count())
    )
    opened_page.check_invariants(f"explained-{look}")


def test_keys_select_token_layer_and_head(
    browser: "Browser", opened: list[OpenedPage], page: Path, model: LanguageModel
) -> None:
    explanation = explain(model, [TEXT])
    opened.append(OpenedPage(browser, page, "light-wide"))
    [opened_page] = opened
    keys, strip = opened_page.page.keyboard, opened_page.page.locator("#strip")
    last = len(explanation["tokens"]) - 1

    def selected() -> str:
        return opened_page.page.locator("#selected").inner_text()

    opened_page.page.locator("#strip [tabindex='0']").focus()
    assert selected().startswith(f"Token {last + 1} of {last + 1}")
    keys.press("ArrowLeft")
    assert selected().startswith(f"Token {last} of")
    expect(strip.locator("[aria-current]")).to_have_count(1)
    keys.press("Home")
    expect(opened_page.page.locator("#previous-token")).to_be_disabled()
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    assert selected().startswith("Token 3 of")
    assert opened_page.page.evaluate("document.activeElement.parentElement.id") == "strip"
    token = explanation["tokens"][3]
    expect(opened_page.page.locator("#actual")).to_contain_text(f"{token['surprisal']:.1f} bits")
    best = explanation["tokens"][2]["next"][0]
    expect(opened_page.page.locator("#candidates tbody tr").first).to_contain_text(f"{100 * best['probability']:.1f} %")

    opened_page.page.locator("#layer").select_option("0")
    opened_page.page.locator("#head").select_option("0")
    opened_page.page.locator("#lines").focus()
    keys.press("ArrowDown")
    keys.press("Shift+ArrowDown")
    keys.press("Shift+ArrowDown")
    assert [opened_page.page.locator(name).input_value() for name in ("#layer", "#head")] == ["1", "2"]
    weights = explanation["attention"][1][2][2]
    opened_page.page.locator("#weights-box").evaluate("(box) => { box.open = true; }")
    shown = [
        float(text.rstrip(" %").lstrip("<> ")) for text in opened_page.page.locator("#weights td").all_inner_texts()
    ]
    assert shown == pytest.approx([100 * weight for weight in weights], abs=0.06)
    assert opened_page.page.locator("#attention-lines path").count() == sum(weight >= 0.004 for weight in weights)
    expect(opened_page.page.locator("#attention-summary")).to_contain_text("Layer 2, head 3: ")
    keys.press("End")
    expect(opened_page.page.locator("#actual")).to_contain_text("The text ends here")
    opened_page.page.locator("#layers tbody td").nth(0).click()
    assert selected().startswith("Token 1 of")
    opened_page.page.locator("#heads-box summary").click()
    box = opened_page.page.locator("#heads").bounding_box()
    assert box is not None
    opened_page.page.mouse.click(box["x"] + 5, box["y"] + 5)
    expect(opened_page.page.locator("#attention-summary")).to_contain_text("Layer 1, head 1: ")


@pytest.mark.parametrize("look", ["dark-phone"])
def test_text_never_becomes_markup(
    browser: "Browser", opened: list[OpenedPage], model: LanguageModel, tmp_path: Path, look: str
) -> None:
    explanation = explain(model, [HOSTILE[-60:]])
    opened.append(OpenedPage(browser, write_explanation_page(explanation, tmp_path / "page.html"), look))
    opened[0].check_invariants("hostile")
    opened.append(
        OpenedPage(
            browser, write_explanation_page(explain(model, ["שלום </script><b>" * 2]), tmp_path / "rtl.html"), look
        )
    )
    opened_page = opened[1]
    assert opened_page.page.locator("#strip").get_attribute("dir") == "rtl"
    opened_page.page.locator("#strip [tabindex='0']").focus()
    opened_page.page.keyboard.press("ArrowRight")  # which is back, in a text that runs to the left
    expect(opened_page.page.locator("#selected")).to_contain_text(re.compile(r"Token (\d+) of (?!\1)\d+"))
    assert opened_page.page.title() != "owned"
    assert opened_page.page.locator("#strip b, h1 b").count() == 0
    opened_page.check_invariants("rtl")


def test_explanation_of_a_classifier(
    browser: "Browser", opened: list[OpenedPage], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    form = TaskSpec("classify", "label", ("bad", "good", "<b>so so</b>"))
    model = saved(random_model("tutorial", tokenizer.vocab_size), tokenizer, tmp_path / "m", form)
    explanation = explain(model, ["the nurse was tired"])
    opened.append(OpenedPage(browser, write_explanation_page(explanation, tmp_path / "page.html"), "light-phone"))
    [opened_page] = opened
    expect(opened_page.page.locator("#answer")).to_contain_text(f"Prediction: {explanation['answer']['label']}")
    expect(opened_page.page.locator("#outputs tbody tr")).to_have_count(3)
    expect(opened_page.page.locator("#outputs")).to_contain_text("<b>so so</b>")
    expect(opened_page.page.locator("#next")).to_be_hidden()
    opened_page.check_invariants("task")


@pytest.mark.parametrize("look", VARIANTS)
def test_reports_and_comparisons_are_accessible(
    browser: "Browser", opened: list[OpenedPage], tmp_path: Path, look: str
) -> None:
    runs = [write_evaluated_run(tmp_path / "one"), write_run(tmp_path / "two", records=training_records())]
    opened.append(OpenedPage(browser, nextword.report(runs[0]), look))
    opened.append(OpenedPage(browser, nextword.report(runs, tmp_path / "compared.html"), look))
    for name, opened_page in zip(("report", "compared"), opened, strict=True):
        opened_page.page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        opened_page.check_invariants(f"{name}-{look}")
    compared = opened[1].page
    compared.get_by_role("radio", name="by tokens").check()
    expect(compared.locator(".by-tokens")).to_be_visible()
    expect(compared.locator(".by-step")).to_be_hidden()


def test_page_data_equals_the_explanation(page: Path, model: LanguageModel) -> None:
    """What a program would read from the page is what `--json` says, as far as a page holds it."""
    (found,) = re.findall(
        r'<script type="application/json" id="data">([^<]*)</script>', page.read_text(encoding="utf-8")
    )
    data, explanation = json.loads(found), explain(load(model.path), [TEXT])
    assert data["attribution"]["parts"] == pytest.approx(explanation["leaning"]["parts"])
    assert [token["surprisal"] for token in data["tokens"]] == [token["surprisal"] for token in explanation["tokens"]]
