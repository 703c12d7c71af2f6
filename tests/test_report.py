"""Reports, model cards and comparisons of pre-training runs: complete, self-contained, and safe for any content."""

import hashlib
import json
import math
import re
import shutil
import socket
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nextword
from nextword.commands.cli import run as run_command
from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.common.fs import write_manifest
from nextword.common.results import AUDIT_FILE, EVALUATION_FILE, Provenance, StoredResults
from nextword.evaluation.evaluate import save_results
from nextword.reporting.charts import downsample, moving_average
from nextword.reporting.comparison import shortest_names
from nextword.reporting.report import refresh_unmodified, write_card, write_report

METADATA: dict[str, Any] = {
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
    },
    "versions": {"torch": "2.13.0"},
    "machine": {"cores": 2},
}
RESULT: dict[str, Any] = {
    "steps": 300,
    "seconds": 259.0,
    "loss": 3.1712,
    "bits_per_byte": 1.2251,
    "best_step": 200,
    "by_position": [5, 4, 3.5],
}
EXTERNAL_CONTENT = re.compile(r"https?:|//[a-z]|@import|<script|<link|<img")
FENCED_BLOCK = re.compile(r"^(````*)text\n.*?^\1$", re.DOTALL | re.MULTILINE)


def training_records() -> list[dict[str, Any]]:
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


def write_run(run_dir: Path, metadata: Any = METADATA, records: Any = None, result: Any = RESULT) -> Path:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "run.json").write_text(json.dumps(metadata), encoding="utf-8")
    if records is not None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (run_dir / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if result is not None:
        (run_dir / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return run_dir


class ParsedPage(HTMLParser):
    """The tags, attributes and visible text of a page whose tags close in order."""

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
        self.handle_startendtag(tag, attrs)
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

    def values(self, attribute: str) -> list[str]:
        return [value or "" for name, value in self.attributes if name == attribute]


def assert_contains(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, part


def assert_self_contained(page: ParsedPage) -> None:
    """No external resource, unique ids, internal links only, alternatives for figures, colours for both themes."""
    assert not EXTERNAL_CONTENT.search(page.source)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert all(value.startswith("#") and value[1:] in ids for value in page.values("href"))
    assert page.tags.count("figure") == page.values("role").count("img")
    assert all(page.values("aria-label"))
    assert ("lang", "en") in page.attributes
    assert "prefers-color-scheme: dark" in page.source
    assert "#0102" not in page.source and "nan" not in page.text  # placeholder colours of the charts


@pytest.mark.charts
def test_report_of_a_finished_run(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "my-run", records=training_records()))
    page = ParsedPage(path)
    assert path == tmp_path / "my-run" / "report.html"
    assert_contains(page.text, "my-run", "finished", "3.171", "1.225", "4.07 M", "1.23 M", "4 min 19 s", "23.84")
    assert_contains(page.text, "function returns 300 日本語", "train tokens", "512,331", "torch.compile is off")
    assert 'nextword pretrain "my texts" --out runs/a' in page.text
    assert page.tags.count("svg") == 6  # the loss for wide and narrow screens, four small charts
    assert any("lowest validation loss is 3.134, at step 300" in label for label in page.values("aria-label"))
    assert_self_contained(page)
    assert len(page.source) < 400_000
    assert path.read_bytes() == write_report(path.parent).read_bytes()


HOSTILE = "<script>alert('x')</script> \"&quot; </blockquote></main> {{ title }} {% x %} ]]> ``` | \x00 \ud800 \u202e"


@pytest.mark.charts
def test_content_of_a_run_is_never_markup(tmp_path: Path) -> None:
    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {f"{key}<b a=\"'>": poison(item) for key, item in value.items()}
        return HOSTILE

    metadata = {key: poison(value) for key, value in METADATA.items()}
    sample = {"step": HOSTILE, "sample": {"prompt": HOSTILE, "text": HOSTILE}}
    numbers = [
        {"step": HOSTILE, "loss": HOSTILE},
        {"step": 5, "validation": {"loss": HOSTILE}},
        {"step": 301, "loss": math.nan},
    ]
    records = [*training_records(), sample, {"message": HOSTILE}, *numbers]
    run = write_run(tmp_path / "run <b> {{ x }}", metadata, records, {"loss": HOSTILE, "by_position": [HOSTILE, 1]})
    page = ParsedPage(write_report(run))
    assert "script" not in page.tags and not any(name.startswith("on") for name, _ in page.attributes)
    assert_contains(page.text, "alert('x')", "<b a=\"'>")
    front_matter, body = write_card(run).read_text(encoding="utf-8").split("---\n", 2)[1:]
    assert "script" not in front_matter
    assert "<script" not in FENCED_BLOCK.sub("", body)
    assert "````text" in body  # a fence that the sample cannot close


def test_markdown_of_a_card_is_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a|b `c` *d* [e](f) #g <i>", {**METADATA, "size": "x|y\n# z"}, training_records())
    body = write_card(run).read_text(encoding="utf-8").split("---\n", 2)[2]
    assert "# a\\|b \\`c\\` \\*d\\* \\[e\\](f) \\#g &lt;i&gt;\n" in body
    assert "x\\|y \\# z" in body


@pytest.mark.parametrize(
    "records", [None, [], [{"step": 1, "loss": 5.0}], [{"loss": 5.0}], [{"step": 1, "sample": {}}], [{}]]
)
@pytest.mark.parametrize("metadata", [{}, {"model": None, "data": [], "parameters": "many"}, METADATA])
@pytest.mark.parametrize("result", [None, {}, {"seconds": None, "by_position": []}, {"loss": 2000.0}])
def test_incomplete_runs_have_reports_and_cards(tmp_path: Path, metadata: Any, records: Any, result: Any) -> None:
    run = write_run(tmp_path / "run", metadata, records, result)
    assert "run" in ParsedPage(write_report(run)).text
    assert write_card(run).read_text(encoding="utf-8").startswith("---\n")


def test_report_of_an_unfinished_run(tmp_path: Path) -> None:
    page = ParsedPage(write_report(write_run(tmp_path / "run", records=training_records(), result=None)))
    assert_contains(page.text, "not finished: at step 300", "3.134")  # the best validation loss so far


@pytest.mark.charts
def test_damaged_run_directories_are_reported(tmp_path: Path) -> None:
    with pytest.raises(NextwordError, match="not a run directory"):
        write_report(tmp_path)
    run = write_run(tmp_path / "run", records=[{"step": 1}, [2]])
    with pytest.raises(CorruptFileError, match=r"metrics.jsonl line 2"):
        write_report(run)
    (run / "result.json").write_text("[]")
    with pytest.raises(CorruptFileError, match=r"result.json"):
        write_card(run)
    (run / "result.json").unlink()
    (run / "run.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"run.json line 1"):
        write_report(run)


# ---------------------------------------------------------------- evaluations and audits

TEXT: dict[str, Any] = {
    "loss": 2.5,
    "perplexity": 12.18,
    "bits_per_byte": 1.304,
    "tokens": 9606,
    "bytes": 32_564,
    "stride": 64,
    "interval": {"low": 1.25, "high": 1.36, "blocks": 31},
}
BENCHMARK: dict[str, Any] = {
    "metric": "acc",
    "score": 0.61,
    "low": 0.578,
    "high": 0.64,
    "n": 1000,
    "of": 67_000,
    "chance": 0.5,
    "above_chance": True,
    "below_chance": False,
    "ties": 0,
    "others": {"acc_norm": {"score": 0.6}},
    "groups": {"anaphora": {"score": 0.8, "low": 0.7, "high": 0.9, "n": 40}, "islands": {"score": 0.45, "n": 960}},
    "scrambled": {"score": 0.53, "low": 0.5, "high": 0.56, "n": 1000, "order_matters": True},
}
WITHOUT_CHANCE: dict[str, Any] = {
    "metric": "repeated",
    "score": 0.04,
    "low": 0.02,
    "high": 0.06,
    "n": 64,
    "chance": None,
}
PROVENANCE = Provenance("2026-11-23T18:15:57+00:00", {"precision": "int8"})


def finding(section: str, name: str, value: float, **fields: Any) -> dict[str, Any]:
    defaults = {"low": None, "high": None, "unit": "", "n": None, "reference": None, "notable": False, "note": ""}
    return {"section": section, "name": name, "value": value, "examples": [], **defaults, **fields}


PASSAGE = {"document": "a.txt", "passage": "It was a dark and stormy night."}
FINDINGS = [
    finding("bias", "CrowS-Pairs, gender", 61.2, low=58.0, high=64.1, unit="%", n=262, reference=50.0, notable=True),
    finding("memory", "Memorised passages", 3.5, unit="%", n=400, reference=0.0, notable=True, examples=[PASSAGE]),
    finding("corpus", "Duplicate documents", 14, unit="documents", n=1992, reference=0.0),
    finding("cost", "Energy", 0.0021, unit="kWh"),
]


def write_audit(run: Path, findings: Any) -> Path:
    (run / "measured").mkdir(exist_ok=True)
    document = {"model": str(run), "findings": findings, "seconds": 3.5}
    (run / AUDIT_FILE).write_text(json.dumps(document), encoding="utf-8")
    return run


def save_benchmarks(run: Path, **benchmarks: Any) -> None:
    save_results(run, {"suites": benchmarks}, "", PROVENANCE, PROVENANCE)


def write_evaluated_run(run_dir: Path) -> Path:
    run = write_run(run_dir, records=training_records())
    benchmarks = {"blimp": BENCHMARK, "free": WITHOUT_CHANCE}
    save_results(run, {**TEXT, "suites": benchmarks}, "other.txt", PROVENANCE, PROVENANCE)
    return write_audit(run, FINDINGS)


def test_evaluations_and_audits_are_in_report_and_card(tmp_path: Path) -> None:
    run = write_evaluated_run(tmp_path / "run")
    page = ParsedPage(write_report(run))
    assert_contains(page.text, "other.txt", "1.304", "1.250 to 1.360", "2026-11-23 · precision int8", "blimp", "0.610")
    assert_contains(page.text, "0.578 to 0.640", "above chance", "word order matters", "1,000 of 67,000", "anaphora")
    assert_contains(page.text, "2 of 4 findings are flagged", "CrowS-Pairs, gender", "61.2 %", "58 to 64.1", "262")
    assert_contains(page.text, "It was a dark and stormy night.", "14 documents", "0.0021 kWh")
    [plot] = [label for label in page.values("aria-label") if "blimp 0.610 (0.578 to 0.640), above chance" in label]
    assert "free" not in plot  # it has no chance level
    assert_self_contained(page)

    card = write_card(run).read_text(encoding="utf-8")
    assert "| other.txt | 1.304 (1.250 to 1.360) | 12.18 | 9,606 |" in card
    assert "| blimp | acc 0.610 (0.578 to 0.640) | 0.500: above chance | 1,000 of 67,000 |" in card
    assert_contains(card, "**CrowS-Pairs, gender** (flagged): 61.2 % (95 % confidence interval 58 to 64.1)", "n = 262")
    assert_contains(card, "**Memorised passages** (flagged): 3.5 %", "reference value 0")
    assert "Duplicate documents" not in card and "kWh" not in card  # not a risk of the model


def test_nothing_is_listed_that_was_not_measured(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", records=training_records())
    card = write_card(run).read_text(encoding="utf-8")
    assert "## Evaluation" not in card and "## Bias" not in card
    assert "Evaluation" not in ParsedPage(write_report(run)).text
    unfinished = write_card(write_run(tmp_path / "other", records=training_records(), result=None))
    assert "model-index" not in unfinished.read_text(encoding="utf-8")


def test_the_hub_reads_the_metadata_of_a_card(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    run = write_evaluated_run(tmp_path / 'run: "x" # y')
    save_benchmarks(run, **{'own: "a" \u2028 #b': BENCHMARK, "кот": BENCHMARK, "дом": BENCHMARK})
    data: Any = ModelCard.load(write_card(run)).data
    assert (data.model_name, data.library_name, data.pipeline_tag) == (
        'run: "x" # y',
        "transformers",
        "text-generation",
    )
    assert data.tags == ["nextword"]
    results = {result.dataset_name: result for result in data.eval_results}
    names = {"validation set of the run", "other.txt", "blimp", "free", 'own: "a" #b', "кот", "дом"}
    assert set(results) == names
    blimp = results["blimp"]
    assert (blimp.task_type, blimp.metric_type, blimp.metric_value) == ("text-generation", "acc", 0.61)
    assert blimp.metric_name == "acc (95 % confidence interval 0.578 to 0.640, 1,000 items)"
    assert results["validation set of the run"].metric_value == RESULT["bits_per_byte"]


def test_results_are_merged_by_name_and_belong_to_their_weights(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", records=training_records())
    model_dir = run / "model"
    model_dir.mkdir()
    (model_dir / "model.safetensors").write_bytes(b"one")
    write_manifest(model_dir, {})
    save_results(run, {**TEXT, "suites": {"blimp": BENCHMARK}}, "other.txt", PROVENANCE, PROVENANCE)
    save_benchmarks(run, free=WITHOUT_CHANCE)
    save_benchmarks(run, blimp={**BENCHMARK, "score": 0.7})
    stored = StoredResults.load(run)
    assert [text.name for text in stored.texts] == ["other.txt"]
    assert {benchmark.name: benchmark.score.value for benchmark in stored.benchmarks} == {"blimp": 0.7, "free": 0.04}
    assert stored.benchmarks[0].provenance == PROVENANCE and not stored.stale
    (model_dir / "model.safetensors").write_bytes(b"two")
    write_manifest(model_dir, {})
    assert StoredResults.load(run).stale
    assert "out of date" in ParsedPage(write_report(run)).text
    assert "## Evaluation" not in write_card(run).read_text(encoding="utf-8")
    save_benchmarks(run, free=WITHOUT_CHANCE)
    stored = StoredResults.load(run)
    assert [benchmark.name for benchmark in stored.benchmarks] == ["free"] and stored.texts == () and not stored.stale


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([EVALUATION_FILE, AUDIT_FILE]), st.integers(0, 60), JSON)
def test_any_changed_value_is_rejected_or_shown_as_text(
    tmp_path_factory: pytest.TempPathFactory, file: Path, position: int, value: Any
) -> None:
    run = write_evaluated_run(tmp_path_factory.mktemp("runs") / "run")
    (run / "metrics.jsonl").unlink()  # faster without charts
    document = json.loads((run / file).read_text(encoding="utf-8"))
    locations: list[tuple[Any, Any]] = []

    def collect(inner: Any) -> None:
        for key in inner if isinstance(inner, dict) else range(len(inner)):
            locations.append((inner, key))
            if isinstance(inner[key], dict | list):
                collect(inner[key])

    collect(document)
    inner, key = locations[position % len(locations)]
    inner[key] = value
    (run / file).write_text(json.dumps(document), encoding="utf-8")
    try:
        page = write_report(run)
    except CorruptFileError as error:
        assert file.name in str(error)
        return
    assert "script" not in ParsedPage(page).tags
    assert write_card(run).is_file()


def test_content_of_evaluations_and_audits_is_never_markup(tmp_path: Path) -> None:
    texts = {"unit": HOSTILE, "note": HOSTILE, "examples": [{HOSTILE: HOSTILE}], "notable": True}
    run = write_audit(
        write_run(tmp_path / "run", records=training_records()), [finding(HOSTILE, HOSTILE, 1.5, **texts)]
    )
    save_benchmarks(run, **{HOSTILE: {**BENCHMARK, "metric": HOSTILE, "groups": {HOSTILE: {"score": 1}}}})
    page = ParsedPage(write_report(run))
    assert "script" not in page.tags and page.text.count("alert('x')") >= 7
    body = write_card(run).read_text(encoding="utf-8").split("---\n", 2)[2]
    assert "<script" not in FENCED_BLOCK.sub("", body)
    comparison = nextword.report([run, write_run(tmp_path / "b", records=training_records())], tmp_path / "page.html")
    assert "script" not in ParsedPage(comparison).tags


# ---------------------------------------------------------------- updates


def test_files_that_were_edited_or_removed_stay_so(tmp_path: Path) -> None:
    messages: list[str] = []
    run = write_run(tmp_path / "run", records=training_records())
    refresh_unmodified(run, messages.append)
    assert not (run / "report.html").exists() and not (run / "README.md").exists() and not messages
    write_report(run)
    write_card(run)
    write_audit(run, FINDINGS)
    refresh_unmodified(run, messages.append)
    assert "Memorised passages" in (run / "report.html").read_text(encoding="utf-8")
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "Memorised passages" in card and not messages
    edited = card.replace("# run", "# My own run")
    (run / "README.md").write_text(edited, encoding="utf-8")
    (run / "report.html").write_text("<p>My own page</p>")
    write_audit(run, [])
    refresh_unmodified(run, messages.append)
    assert (run / "README.md").read_text(encoding="utf-8") == edited
    assert (run / "report.html").read_text() == "<p>My own page</p>"
    assert len(messages) == 1 and "README.md" in messages[0]
    (run / "README.md").unlink()
    nextword.report(run)
    assert "## Bias" not in (run / "README.md").read_text(encoding="utf-8")


def test_files_of_version_0_1_0_are_updated(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", records=training_records())
    body = "---\nlibrary_name: transformers\n---\n\n# run\n"
    digest = hashlib.sha256(body.encode()).hexdigest()
    card = f"{body}\n<!-- written by nextword; sha-256 of what stands above: {digest} -->\n"
    messages: list[str] = []
    (run / "README.md").write_text(card)
    (run / "report.html").write_text("<footer>Made by nextword from the files of the run folder.</footer>")
    refresh_unmodified(run, messages.append)
    assert "Training curves" in (run / "report.html").read_text(encoding="utf-8")
    assert "## Usage" in (run / "README.md").read_text(encoding="utf-8") and not messages
    (run / "README.md").write_text(card.replace("# run", "# edited"))
    refresh_unmodified(run, messages.append)
    assert "# edited" in (run / "README.md").read_text(encoding="utf-8") and len(messages) == 1


def test_evaluate_updates_the_files_of_the_run(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(base, run)
    (tmp_path / "other.txt").write_text("The list of values is sorted, and then the values are printed. " * 20)
    pairs = [{"good": f"the values are {word}", "bad": f"the values is {word}"} for word in ("sorted", "read")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    benchmark = tmp_path / "own.toml"
    benchmark.write_text('[agreement]\nkind = "minimal pairs"\nfiles = ["pairs.jsonl"]\ngood = "good"\nbad = "bad"\n')
    command = [
        "evaluate",
        str(run),
        str(tmp_path / "other.txt"),
        "--benchmark",
        str(benchmark),
        "--seed",
        "3",
        "--json",
    ]
    assert run_command(command) == 0
    result = json.loads(capsys.readouterr().out)
    stored = json.loads((run / EVALUATION_FILE).read_text(encoding="utf-8"))
    assert stored["suites"]["agreement"].pop("measured")["arguments"] == {"seed": 3}
    assert stored["suites"]["agreement"] == result["suites"]["agreement"]
    assert stored["texts"]["other.txt"]["bits_per_byte"] == result["bits_per_byte"]
    assert "agreement" in (run / "report.html").read_text(encoding="utf-8")
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "## Evaluation" in card and str(tmp_path) not in card.split("## Training command")[0]
    assert run_command(["evaluate", str(run / "model"), str(tmp_path / "other.txt")]) == 0
    assert not (run / "model" / "measured").exists()  # results are stored in run directories only
    (run / EVALUATION_FILE).write_text("[]")
    assert run_command(command) == 3
    assert "evaluation.json" in capsys.readouterr().err


# ---------------------------------------------------------------- comparisons


@pytest.mark.charts
def test_comparison_of_runs(tmp_path: Path) -> None:
    model = {**METADATA["model"], "n_layers": 2}
    other = {**METADATA, "size": "tiny", "model": model, "parameters": 1000, "command": "another"}
    runs = [
        write_evaluated_run(tmp_path / "one"),
        write_run(tmp_path / "two", other, training_records(), {**RESULT, "bits_per_byte": 1.4}),
    ]
    write_audit(runs[1], FINDINGS[:1])
    page = ParsedPage(nextword.report(runs, tmp_path / "page.html"))
    assert_contains(
        page.text, "Comparison of 2 runs", "1.225", "1.400", "by tokens", "by seconds", "other.txt", "blimp"
    )
    assert_contains(
        page.text, "acc · chance 0.500", "CrowS-Pairs, gender", "Memorised passages", "function returns 300"
    )
    table = re.search(r"Settings and environment that differ.*?</table>", page.source, re.DOTALL)
    assert table is not None
    rows = re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>', table[0])
    assert rows == [("size", "mini", "tiny"), ("parameters", "4,066,048", "1,000"), ("model n layers", "4", "2")]
    assert page.tags.count("svg") == 6  # three axes, for wide and narrow screens
    assert_self_contained(page)
    assert page.source == ParsedPage(nextword.report(runs, tmp_path / "again.html")).source


def test_comparison_of_equal_and_of_incomplete_runs(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    runs = [write_run(tmp_path / name / "run", records=training_records()) for name in "ab"]
    page = ParsedPage(nextword.report(runs, tmp_path / "page.html"))
    assert_contains(page.text, "None: all", "a/run", "b/run")
    empty = write_run(tmp_path / "empty", {}, None, None)
    started = write_run(tmp_path / "started", METADATA, [{"step": 1, "loss": 5.0}], None)
    assert "started" in ParsedPage(nextword.report([*runs, empty, started], tmp_path / "page.html")).text


def test_invalid_comparisons_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (write_run(tmp_path / name, records=training_records()) for name in ("one", "two"))
    with pytest.raises(UsageError, match="the same run"):
        nextword.report([one, one])
    with pytest.raises(UsageError, match="7 runs"):
        nextword.report([write_run(tmp_path / f"run{i}") for i in range(7)])
    with pytest.raises(UsageError, match="label-efficiency study"):
        nextword.report([one, write_run(tmp_path / "study", {"task": "transfer"})])
    with pytest.raises(UsageError, match="--out"):
        nextword.report(one, tmp_path / "page.html")
    with pytest.raises(NextwordError, match="not a run directory"):
        nextword.report([one, tmp_path])
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
def test_shortest_distinct_names(paths: list[str], names: list[str]) -> None:
    assert shortest_names([Path(path) for path in paths]) == names


def test_card_of_a_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", None)  # no network access
    run = write_run(tmp_path / "my_run", records=training_records())
    text = write_card(run).read_text(encoding="utf-8")
    assert_contains(text, "# my\\_run", "modern mini GPT", "| parameters | 4,066,048 |", "3.1712", "23.84", "1.2251")
    assert "1,894 documents, 512,331 tokens, 1,934,113 bytes" in text
    assert "The function returns 300 日本語" in text
    assert "not finished" not in text and "\n\n\n" not in text
    (run / "result.json").unlink()
    assert "not finished" in write_card(run).read_text(encoding="utf-8")


def test_smoothing_and_downsampling() -> None:
    flat = [(float(x), 2.0) for x in range(1, 2001)]
    assert all(abs(y - 2) < 1e-12 for _, y in moving_average(flat))
    assert len(downsample(flat, 600)) <= 601 and downsample(flat, 600)[-1] == flat[-1]
    assert moving_average([(float(x), float(x)) for x in range(100)])[0] == (0.0, 0.0)
    assert moving_average([]) == [] and list(downsample([])) == []
