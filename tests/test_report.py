"""The report and the model card: whole from a whole run, bearable from half a one, and safe whatever the corpus holds."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextword.audit.findings import Finding
from nextword.commands import api
from nextword.commands.cli import run as run_command
from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.common.fs import write_manifest
from nextword.common.results import AUDIT_FILE, EVALUATION_FILE, Provenance, StoredResults, save_results
from nextword.reporting.charts import downsample, moving_average
from nextword.reporting.comparison import shortest_names
from nextword.reporting.report import refresh_unmodified, write_card, write_report

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

    VOID = ("meta", "br", "input")

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
    with pytest.raises(CorruptFileError, match=r"metrics.jsonl line 2"):
        write_report(run)
    (run / "result.json").write_text("[]")
    with pytest.raises(CorruptFileError, match=r"result.json"):
        write_card(run)
    (run / "run.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"run.json line 1"):
        write_report(run)


# ---------------------------------------------------------------- what was measured on it

TEXT: dict[str, Any] = {
    "loss": 2.5, "perplexity": 12.18, "bits_per_byte": 1.304, "tokens": 9606, "bytes": 32_564, "stride": 64,
    "interval": {"low": 1.25, "high": 1.36, "blocks": 31},
}  # fmt: skip
SUITE: dict[str, Any] = {
    "metric": "acc", "score": 0.61, "low": 0.578, "high": 0.64, "n": 1000, "of": 67_000, "chance": 0.5,
    "above_chance": True, "below_chance": False, "ties": 0, "others": {"acc_norm": {"score": 0.6}},
    "groups": {"anaphora": {"score": 0.8, "low": 0.7, "high": 0.9, "n": 40}, "islands": {"score": 0.45, "n": 960}},
    "scrambled": {"score": 0.53, "low": 0.5, "high": 0.56, "n": 1000, "order_matters": True},
}  # fmt: skip
FREE: dict[str, Any] = {"metric": "repeated", "score": 0.04, "low": 0.02, "high": 0.06, "n": 64, "chance": None}
WHEN = Provenance("2026-11-23T18:15:57+00:00", {"precision": "int8"})
FINDINGS = [
    Finding("bias", "CrowS-Pairs, gender", 61.2, 58.0, 64.1, "%", 262, 50.0, True, "The share of stereotypes preferred."),
    Finding(
        "memory", "Passages by heart", 3.5, 2.1, 5.4, "%", 400, 0.0, True, "Of 50 tokens each.",
        ({"document": "a.txt", "passage": "It was a dark and stormy night."},),
    ),
    Finding("corpus", "Documents twice", 14, unit="documents", n=1992, reference=0.0),
    Finding("cost", "Energy", 0.0021, unit="kWh"),
]  # fmt: skip


def audited(run: Path, findings: Any) -> Path:
    (run / "measured").mkdir(exist_ok=True)
    told = [one.to_dict() if isinstance(one, Finding) else one for one in findings]
    (run / AUDIT_FILE).write_text(json.dumps({"model": str(run), "findings": told, "seconds": 3.5}), encoding="utf-8")
    return run


def measured(folder: Path) -> Path:
    run = make(folder, lines=records())
    save_results(run, {**TEXT, "suites": {"blimp": SUITE, "free": FREE}}, "other.txt", WHEN, WHEN)
    return audited(run, FINDINGS)


def test_what_was_measured_is_in_the_report_and_the_card(tmp_path: Path) -> None:
    run = measured(tmp_path / "run")
    page = Page(write_report(run))
    for said in (
        "Evaluation", "other.txt", "1.304", "1.250 to 1.360", "2026-11-23 · precision int8", "blimp", "0.610",
        "0.578 to 0.640", "above chance", "order matters", "1,000 of 67,000", "anaphora", "free", "0.040",
        "Audit", "2 of 4 findings are to be read", "CrowS-Pairs, gender", "61.2 %", "58 to 64.1", "262",
        "It was a dark and stormy night.", "14 documents", "0.0021 kWh", "The training text",
    ):  # fmt: skip
        assert said in page.text, said
    labels = [value or "" for name, value in page.attributes if name == "aria-label"]
    assert any(
        "blimp 0.610 (0.578 to 0.640), above chance." in label for label in labels
    )  # free has no chance to stand at
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<img", page.source)

    card = write_card(run).read_text(encoding="utf-8")
    for said in (
        "## Evaluation", "| other.txt | 1.304 (1.250 to 1.360) | 12.18 | 9,606 |",
        "| blimp | acc 0.610 (0.578 to 0.640) | 0.500: above chance | 1,000 of 67,000 |", "## Bias and risks",
        "- **CrowS-Pairs, gender** (to be read): 61.2 % (58 to 64.1; 50 where nothing is amiss; of 262). The share of",
        "- **Passages by heart** (to be read): 3.5 %",
    ):  # fmt: skip
        assert said in card, said
    assert "Documents twice" not in card and "kWh" not in card  # no risk of the model's


def test_a_card_says_nothing_that_was_not_measured(tmp_path: Path) -> None:
    card = write_card(make(tmp_path / "run", lines=records())).read_text(encoding="utf-8")
    assert "## Evaluation" not in card and "## Bias" not in card
    assert "Evaluation" not in Page(write_report(tmp_path / "run")).text
    unfinished = write_card(make(tmp_path / "other", lines=records(), result=None)).read_text(encoding="utf-8")
    assert "model-index" not in unfinished


def test_the_model_index_is_what_the_hub_reads(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    run = measured(tmp_path / 'run: "x" # y')
    save_results(run, {"suites": {'own: "a" \u2028 #b': {**SUITE, "metric": "acc"}}}, "", WHEN, WHEN)
    front = yaml.safe_load(write_card(run).read_text(encoding="utf-8").split("---\n")[1])
    [index] = front["model-index"]
    assert index["name"] == 'run: "x" # y'
    told = {one["dataset"]["name"]: one["metrics"][0] for one in index["results"]}
    assert set(told) == {"held-out text of the run", "other.txt", "blimp", "free", 'own: "a" #b'}
    assert told["blimp"] == {"type": "acc", "value": 0.61, "name": "acc (95 % interval 0.578 to 0.640, 1,000 items)"}
    assert told["held-out text of the run"]["value"] == RESULT["bits_per_byte"]
    assert all(one["dataset"]["type"] and one["task"]["type"] == "text-generation" for one in index["results"])
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
    assert len(hub.ModelCard.load(run / "README.md").data.eval_results) == 5


def test_measurements_are_merged_by_name_and_go_with_their_weights(tmp_path: Path) -> None:
    run = make(tmp_path / "run", lines=records())
    weights = run / "model"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"one")
    write_manifest(weights, {})
    save_results(run, {**TEXT, "suites": {"blimp": SUITE}}, "other.txt", WHEN, WHEN)
    save_results(run, {"suites": {"free": FREE}}, "", WHEN, WHEN)
    save_results(run, {"suites": {"blimp": {**SUITE, "score": 0.7}}}, "", WHEN, WHEN)
    found = StoredResults.load(run)
    assert [one.name for one in found.texts] == ["other.txt"]
    assert {one.name: one.score.value for one in found.benchmarks} == {"blimp": 0.7, "free": 0.04}
    assert found.benchmarks[0].get_provenance == WHEN and not found.stale
    (weights / "model.safetensors").write_bytes(b"two")
    write_manifest(weights, {})
    assert StoredResults.load(run).stale
    assert "before the run's weights changed" in Page(write_report(run)).text
    assert "## Evaluation" not in write_card(run).read_text(encoding="utf-8")
    save_results(run, {"suites": {"free": FREE}}, "", WHEN, WHEN)
    found = StoredResults.load(run)
    assert [one.name for one in found.benchmarks] == ["free"] and found.texts == () and not found.stale


@pytest.mark.parametrize(
    ("file", "way", "value", "named"),
    [
        (EVALUATION_FILE, ["suites", "blimp", "score"], "high", r"suites\.blimp\.score is not a number"),
        (EVALUATION_FILE, ["suites", "blimp", "score"], None, r"suites\.blimp\.score is not a number"),
        (EVALUATION_FILE, ["suites", "blimp", "low"], 0.9, r"suites\.blimp\.low is not below high"),
        (EVALUATION_FILE, ["suites", "blimp", "n"], 1.5, r"suites\.blimp\.n is not a count"),
        (
            EVALUATION_FILE,
            ["suites", "blimp", "groups", "anaphora"],
            [],
            r"suites\.blimp\.groups\.anaphora is not an object",
        ),
        (EVALUATION_FILE, ["suites", "blimp", "above_chance"], 1, r"above_chance is not true or false"),
        (EVALUATION_FILE, ["suites", "blimp", "measured"], None, r"suites\.blimp\.measured is not an object"),
        (
            EVALUATION_FILE,
            ["texts", "other.txt", "bits_per_byte"],
            True,
            r"texts\.other\.txt\.bits_per_byte is not a number",
        ),
        (EVALUATION_FILE, ["texts"], [1], r"texts is not an object"),
        (AUDIT_FILE, ["findings"], {}, r"findings is not a list"),
        (AUDIT_FILE, ["findings", 0], "bad", r"findings\[0\] is not an object"),
        (AUDIT_FILE, ["findings", 1, "value"], math.nan, r"findings\[1\]\.value is not a number"),
        (
            AUDIT_FILE,
            ["findings", 1, "examples", 0, "passage"],
            3,
            r"findings\[1\]\.examples\[0\]\.passage is not a text",
        ),
        (AUDIT_FILE, ["findings", 1, "section"], None, r"findings\[1\]\.section is not a text"),
    ],
)
def test_what_cannot_have_been_measured_is_named(tmp_path: Path, file: Path, way: Any, value: Any, named: str) -> None:
    run = measured(tmp_path / "run")
    whole = json.loads((run / file).read_text(encoding="utf-8"))
    inner = whole
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = value
    (run / file).write_text(json.dumps(whole), encoding="utf-8")
    for write in (write_report, write_card):
        with pytest.raises(CorruptFileError, match=rf"{file.name}: .*{named}"):
            write(run)
    (run / file).write_text("{", encoding="utf-8")
    with pytest.raises(CorruptFileError, match=rf"{file.name} line 1: not valid JSON"):
        write_report(run)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([EVALUATION_FILE, AUDIT_FILE]), st.integers(0, 60), JSON)
def test_any_change_to_what_was_measured_is_refused_or_shown_as_text(
    tmp_path_factory: pytest.TempPathFactory, file: Path, place: int, value: Any
) -> None:
    """One value anywhere in a measured file is another one."""
    run = measured(tmp_path_factory.mktemp("runs") / "run")
    whole = json.loads((run / file).read_text(encoding="utf-8"))
    places: list[tuple[Any, Any]] = []

    def collect(inner: Any) -> None:
        for key in inner if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], dict | list):
                collect(inner[key])

    collect(whole)
    inner, key = places[place % len(places)]
    inner[key] = value
    (run / file).write_text(json.dumps(whole), encoding="utf-8")
    try:
        found = StoredResults.load(run)
    except CorruptFileError as error:
        assert file.name in str(error)
        return
    from nextword.reporting.results_sections import results_sections

    (run / "parts.html").write_text(f"<div>{results_sections(found)}</div>", encoding="utf-8")
    assert "script" not in Page(run / "parts.html").tags


def test_what_an_audit_found_is_text(tmp_path: Path) -> None:
    texts = {"section": HOSTILE, "name": HOSTILE, "unit": HOSTILE, "note": HOSTILE, "examples": [{HOSTILE: HOSTILE}]}
    run = audited(make(tmp_path / "run", lines=records()), [{**texts, "value": 1.5, "notable": True}])
    save_results(
        run, {"suites": {HOSTILE: {**SUITE, "metric": HOSTILE, "groups": {HOSTILE: {"score": 1}}}}}, "", WHEN, WHEN
    )
    page = Page(write_report(run))
    assert page.tags.count("script") == 0 and page.text.count("alert('x')") >= 7
    card = write_card(run).read_text(encoding="utf-8")
    assert "<script" not in re.sub(
        r"^(````*)text\n.*?^\1$", "", card.split("---\n", 2)[2], flags=re.DOTALL | re.MULTILINE
    )
    other = Page(api.report([run, make(tmp_path / "b", lines=records())], tmp_path / "page.html"))
    assert other.tags.count("script") == 0


def test_a_refresh_leaves_what_a_person_has_changed(tmp_path: Path) -> None:
    run, predicted_mask = make(tmp_path / "run", lines=records()), []
    refresh_unmodified(run, said.append)
    assert not (run / "report.html").exists() and not (run / "README.md").exists() and not said
    write_report(run)
    write_card(run)
    audited(run, FINDINGS)
    refresh_unmodified(run, said.append)
    assert "Passages by heart" in (run / "report.html").read_text(encoding="utf-8")
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "Passages by heart" in card and not said
    changed = card.replace("# run", "# My own run")
    (run / "README.md").write_text(changed, encoding="utf-8")
    audited(run, [])
    refresh_unmodified(run, said.append)
    assert (run / "README.md").read_text(encoding="utf-8") == changed
    assert len(said) == 1 and "stays as it is" in said[0]
    (run / "README.md").unlink()
    api.report(run)
    assert "## Bias" not in (run / "README.md").read_text(encoding="utf-8")


def test_evaluate_keeps_what_it_measured_in_the_run(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(base, run)
    (tmp_path / "other.txt").write_text("The list of values is sorted, and then the values are printed. " * 20)
    pairs = [{"good": f"the values are {word}", "bad": f"the values is {word}"} for word in ("sorted", "read")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "own.toml").write_text(
        '[agreement]\nkind = "minimal pairs"\nfiles = ["pairs.jsonl"]\ngood = "good"\nbad = "bad"\n'
    )
    command = [
        "evaluate",
        str(run),
        str(tmp_path / "other.txt"),
        "--suite",
        str(tmp_path / "own.toml"),
        "--seed",
        "3",
        "--json",
    ]
    assert run_command(command) == 0
    result = json.loads(capsys.readouterr().out)
    kept = json.loads((run / EVALUATION_FILE).read_text(encoding="utf-8"))
    assert kept["suites"]["agreement"].pop("measured")["arguments"] == {"seed": 3}
    assert kept["suites"]["agreement"] == result["suites"]["agreement"]
    assert kept["texts"]["other.txt"]["bits_per_byte"] == result["bits_per_byte"]
    assert "agreement" in (run / "report.html").read_text(encoding="utf-8")
    assert "## Evaluation" in (run / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in (run / "README.md").read_text(encoding="utf-8").split("## How it was made")[0]
    assert (
        run_command(["evaluate", str(run / "model"), str(tmp_path / "other.txt")]) == 0
    )  # a model alone keeps nothing
    assert not (run / "model" / "measured").exists()
    (run / EVALUATION_FILE).write_text("[]")
    assert run_command(command) == 3
    assert "evaluation.json: the whole is not an object" in capsys.readouterr().err


# ---------------------------------------------------------------- several runs


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    other = {
        **FACTS,
        "size": "tiny",
        "model": {**FACTS["model"], "n_layers": 2},
        "parameters": 1000,
        "command": "another",
    }
    runs = [measured(tmp_path / "one"), make(tmp_path / "two", other, records(), {**RESULT, "bits_per_byte": 1.4})]
    audited(runs[1], FINDINGS[:1])
    page = Page(api.report(runs, tmp_path / "page.html"))
    for said in (
        "2 runs, side by side", "1.225", "1.400", "by tokens", "by seconds", "model n layers", "other.txt", "blimp",
        "acc · chance 0.500", "CrowS-Pairs, gender", "Passages by heart", "function returns 300",
    ):  # fmt: skip
        assert said in page.text, said
    table = re.search(r"Settings and facts that differ.*?</table>", page.source, re.DOTALL)
    assert table is not None
    rows = re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>', table[0])
    assert rows == [("size", "mini", "tiny"), ("parameters", "4,066,048", "1,000"), ("model n layers", "4", "2")]
    assert page.tags.count("svg") == 6  # three axes, wide and narrow
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<img", page.source)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert page.source == Page(api.report(runs, tmp_path / "again.html")).source


def test_runs_that_differ_in_nothing_and_runs_that_are_half_there(tmp_path: Path) -> None:
    runs = [make(tmp_path / name / "run", lines=records()) for name in "ab" if (tmp_path / name).mkdir() is None]
    page = Page(api.report(runs, tmp_path / "page.html"))
    assert "Nothing: all" in page.text and "a/run" in page.text and "b/run" in page.text
    half = [make(tmp_path / "empty", {}, None, None), make(tmp_path / "begun", FACTS, [{"step": 1, "loss": 5.0}], None)]
    assert "begun" in Page(api.report([*runs, *half], tmp_path / "page.html")).text


def test_what_cannot_be_compared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (make(tmp_path / name, lines=records()) for name in ("one", "two"))
    with pytest.raises(UsageError, match="the same run is named twice"):
        api.report([one, one])
    with pytest.raises(UsageError, match="7 runs are too many"):
        api.report([make(tmp_path / f"run{i}") for i in range(7)])
    with pytest.raises(UsageError, match="a comparison itself"):
        api.report([one, make(tmp_path / "worth", {"task": "transfer"})])
    with pytest.raises(UsageError, match="--out is for the page of several runs"):
        api.report(one, tmp_path / "page.html")
    with pytest.raises(NextwordError, match="not a run folder"):
        api.report([one, tmp_path])
    assert run_command(["report", str(one), str(two), "--out", str(tmp_path / "c.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"reports": [str(tmp_path / "c.html")]}
    assert run_command(["report", str(one)]) == 0
    assert capsys.readouterr().out.strip() == str(one / "report.html")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/r/a", "/r/b"], ["a", "b"]),
        (["/x/run", "/y/run"], ["x/run", "y/run"]),
        (["/x/run", "/y/other"], ["run", "other"]),
    ],
)
def test_runs_go_by_the_shortest_names_that_tell_them_apart(paths: list[str], names: list[str]) -> None:
    assert shortest_names([Path(path) for path in paths]) == names


def test_the_card_says_what_was_measured(tmp_path: Path) -> None:
    run = make(tmp_path / "my_run", lines=records())
    card = write_card(run)
    text = card.read_text(encoding="utf-8")
    assert card == run / "README.md"
    front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- nextword\nmodel-index:\n"
    assert text.startswith(front)
    for said in ("# my\\_run", "a modern mini model", "| parameters | 4,066,048 |", "3.1712", "23.84", "1.2251"):
        assert said in text, said
    assert "1,894 documents, 512,331 tokens, 1,934,113 bytes" in text
    assert "The function returns 300 日本語" in text
    assert "not finished" not in text
    (run / "result.json").unlink()
    assert "has not finished" in write_card(run).read_text(encoding="utf-8")


def test_curves_keep_their_shape() -> None:
    flat = [(float(x), 2.0) for x in range(1, 2001)]
    assert all(abs(y - 2) < 1e-12 for _, y in moving_average(flat))
    assert len(downsample(flat, 600)) <= 601
    assert downsample(flat, 600)[-1] == flat[-1]
    steep = [(float(x), float(x)) for x in range(100)]
    assert moving_average(steep)[0] == (0.0, 0.0)
    assert moving_average([]) == []
    assert list(downsample([])) == []
