"""The report and the model card: whole from a whole run, bearable from half a one, and safe whatever the corpus holds."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nextword.errors import CorruptFile, NextwordError
from nextword.evaluation.figures import smoothed, thinned
from nextword.evaluation.report import write_card, write_report

FACTS: dict[str, Any] = {
    "command": 'nextword pretrain "my texts" --out runs/a',
    "created": "2026-01-02T03:04:05+00:00",
    "preset": "modern",
    "size": "mini",
    "model": {"vocab_size": 4096, "context_length": 256, "n_layers": 4, "norm_eps": 1e-6, "tied": True},
    "parameters": 4_066_048,
    "training": {"optimizer": "muon", "lr": 0.003, "betas": [0.9, 0.95]},
    "data": {
        "train": {"documents": 1894, "tokens": 512_331, "bytes": 1_934_113},
        "validation": {"documents": 98, "tokens": 27_311, "bytes": 101_993},
        "documents": 1992,
        "duplicates": 14,
        "problems": 0,
        "tokenizer": {"kind": "bpe", "vocab_size": 4096},
    },
    "versions": {"torch": "2.13.0"},
    "machine": {"cores": 2},
}
RESULT = {
    "steps": 300,
    "seconds": 259.0,
    "loss": 3.1712,
    "bits_per_byte": 1.2251,
    "best_step": 200,
    "by_position": [5, 4, 3.5],
}


def records() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"step": 1, "message": "torch.compile is off"}]
    for step in range(1, 301):
        loss = 3 + 5 * math.exp(-step / 60)
        line = {"step": step, "loss": loss, "lr": 0.001, "tokens": 4096 * step, "seconds": 0.2 * step, "skipped": False}
        lines.append({**line, "tokens_per_second": 20_000.0 + step, "gradient_norm": 0.5})
        if step % 100 == 0:
            lines.append({"step": step, "validation": {"loss": loss + 0.1, "bits_per_byte": 0.39 * (loss + 0.1)}})
        if step % 20 == 0:
            lines.append({"step": step, "sample": {"prompt": "The", "text": f" function returns {step} 日本語"}})
    return lines


def make(folder: Path, facts: Any = FACTS, lines: Any = None, result: Any = RESULT) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    if lines is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """The tags, attributes and visible text of a page; refuses one whose tags do not close in order."""

    VOID = ("meta", "br")

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def test_a_finished_run_is_a_whole_page(tmp_path: Path) -> None:
    path = write_report(make(tmp_path / "my-run", lines=records()))
    page = Page(path)
    assert path == tmp_path / "my-run" / "report.html"
    for said in ("my-run", "finished", "3.171", "1.225", "4.07 M", "1.23 M", "4 min 19 s", "perplexity 23.84"):
        assert said in page.text, said
    for said in (
        "How it learned",
        "What it wrote",
        "function returns 300 日本語",
        "The facts",
        "train tokens",
        "512,331",
    ):
        assert said in page.text, said
    assert 'nextword pretrain "my texts" --out runs/a' in page.text
    assert "torch.compile is off" in page.text
    assert page.tags.count("svg") == 6  # the loss wide and narrow, four small ones
    assert len(page.source) < 400_000


def test_the_page_stands_alone_and_is_accessible(tmp_path: Path) -> None:
    page = Page(write_report(make(tmp_path / "run", lines=records())))
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<img", page.source)
    assert all(value is None or value.startswith("#") for name, value in page.attributes if name in ("href", "src"))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert all(value[1:] in ids for name, value in page.attributes if name == "href" and value)
    assert ("lang", "en") in page.attributes
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert page.tags.count("figure") == len(labels) == 5
    assert any("lowest validation loss is 3.134, at step 300" in (label or "") for label in labels)
    assert page.tags.count("caption") + 1 == page.tags.count("table")
    assert "prefers-color-scheme: dark" in page.source
    assert "#0102" not in page.source  # the stand-in colours


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = make(tmp_path / "run", lines=records())
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


HOSTILE = "<script>alert('x')</script> \"&quot; </blockquote></main> $title ${x} ]]> ``` | \x00 \ud800 \u202e"


def test_what_a_corpus_says_is_text(tmp_path: Path) -> None:
    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {f"{key}<b a=\"'>": poison(item) for key, item in value.items()}
        return HOSTILE

    facts = {key: poison(value) for key, value in FACTS.items()}
    lines = [*records(), {"step": HOSTILE, "sample": {"prompt": HOSTILE, "text": HOSTILE}}, {"message": HOSTILE}]
    lines += [
        {"step": HOSTILE, "loss": HOSTILE},
        {"step": 5, "validation": {"loss": HOSTILE}},
        {"step": 301, "loss": math.nan},
    ]
    run = make(tmp_path / "run <b> $x", facts, lines, {"loss": HOSTILE, "by_position": [HOSTILE, 1]})
    page = Page(write_report(run))
    assert "script" not in page.tags
    assert "alert('x')" in page.text
    assert "<b a=\"'>" in page.text
    assert {name for name, _ in page.attributes if name.startswith("on")} == set()
    card = write_card(run).read_text(encoding="utf-8")
    front, body = card.split("---\n", 2)[1:]
    assert "script" not in front
    outside = re.sub(r"^(````*)text\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside
    assert "````text" in body  # a fence that the sample cannot close


@pytest.mark.parametrize(
    "lines", [None, [], [{"step": 1, "loss": 5.0}], [{"loss": 5.0}], [{"step": 1, "sample": {}}], [{}]]
)
@pytest.mark.parametrize("facts", [{}, {"model": None, "data": [], "parameters": "many"}, FACTS])
@pytest.mark.parametrize("result", [None, {}, {"seconds": None, "by_position": []}, {"loss": 2000.0}])
def test_half_a_run_is_shown_as_far_as_it_goes(tmp_path: Path, facts: Any, lines: Any, result: Any) -> None:
    run = make(tmp_path / "run", facts, lines, result)
    assert "run" in Page(write_report(run)).text
    assert write_card(run).read_text(encoding="utf-8").startswith("---\n")


def test_a_running_run_says_so(tmp_path: Path) -> None:
    page = Page(write_report(make(tmp_path / "run", lines=records(), result=None)))
    assert "not finished: at step 300" in page.text
    assert "3.134" in page.text  # the best validation loss so far


def test_a_broken_run_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(NextwordError, match="not a run folder"):
        write_report(tmp_path)
    run = make(tmp_path / "run", lines=[{"step": 1}, [2]])
    with pytest.raises(CorruptFile, match=r"metrics.jsonl line 2"):
        write_report(run)
    (run / "result.json").write_text("[]")
    with pytest.raises(CorruptFile, match=r"result.json"):
        write_card(run)
    (run / "run.json").write_text("{")
    with pytest.raises(CorruptFile, match=r"run.json line 1"):
        write_report(run)


def test_the_card_says_what_was_measured(tmp_path: Path) -> None:
    run = make(tmp_path / "my_run", lines=records())
    card = write_card(run)
    text = card.read_text(encoding="utf-8")
    assert card == run / "README.md"
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- nextword\n---\n")
    for said in ("# my\\_run", "a modern mini model", "| parameters | 4,066,048 |", "3.1712", "23.84", "1.2251"):
        assert said in text, said
    assert "1,894 documents, 512,331 tokens, 1,934,113 bytes" in text
    assert "The function returns 300 日本語" in text
    assert "not finished" not in text
    (run / "result.json").unlink()
    assert "has not finished" in write_card(run).read_text(encoding="utf-8")


def test_curves_keep_their_shape() -> None:
    flat = [(float(x), 2.0) for x in range(1, 2001)]
    assert all(abs(y - 2) < 1e-12 for _, y in smoothed(flat))
    assert len(thinned(flat, 600)) <= 601
    assert thinned(flat, 600)[-1] == flat[-1]
    steep = [(float(x), float(x)) for x in range(100)]
    assert smoothed(steep)[0] == (0.0, 0.0)
    assert smoothed([]) == []
    assert list(thinned([])) == []
