"""The audit command: group templates with errors by file and line, counterfactual predictions, and rates by group."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

import nextword
from nextword.audit.fairness import audit_group_rates, audit_swap_flips, audit_template_flips
from nextword.audit.findings import Finding, flag_significant, score_finding
from nextword.audit.group_templates import GroupTemplates, read_group_templates
from nextword.commands.audit import AuditResult
from nextword.commands.cli import run as run_command
from nextword.common import statistics
from nextword.common.console import Console
from nextword.common.errors import MissingDependencyError, NextwordError, UsageError
from nextword.common.fs import read_sealed_json
from nextword.data.issues import IssueLog
from nextword.data.tokenizer import Tokenizer, train_bpe
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.model.hf import save_model
from nextword.pipeline.predictor import Predictor
from nextword.tasks.dataset import TaskSpec
from nextword.tasks.examples import Example
from nextword.training.losses import example_logits

QUIET = Console(quiet=True)
GROUPS = """\
groups:
  women: {person: woman, they: she, their: her}
  men: {person: man, they: he, their: his}
templates:
  - The {person} said that {they} was a doctor.
  - text: "{they:capitalize} works as a"
    continuations: [nurse, engineer]
"""


def groups(tmp_path: Path, text: str = GROUPS) -> GroupTemplates:
    path = tmp_path / "groups.yaml"
    path.write_text(text, encoding="utf-8")
    return read_group_templates(path)


# ---------------------------------------------------------------- the file of groups


def test_templates_are_filled_with_the_words_of_groups(tmp_path: Path) -> None:
    found = groups(tmp_path)
    assert found.names == ("women", "men")
    assert found.pairs == [("women", "men")]
    assert [sentence.texts for sentence in found.sentences] == [
        {"women": "The woman said that she was a doctor.", "men": "The man said that he was a doctor."},
        {"women": "She works as a", "men": "He works as a"},
    ]
    assert list(found.sentences[1].continuations) == ["nurse", "engineer"]
    assert {"women": "her", "men": "his"} in found.slot_words


def test_languages_with_agreement(tmp_path: Path) -> None:
    """Slots in continuations, lists of words that go together, a group's own text, and words that YAML takes for others."""
    found = groups(
        tmp_path,
        """\
groups:
  femmes: {nom: [la reine, la tante], elle: elle, infirmier: infirmière, le: ""}
  hommes: {nom: [le roi, l'oncle], elle: il, infirmier: infirmier, le: ""}
templates:
  - text: ["{nom} dit : {elle} est", "{elle} {{travaille}} comme"]
    continuations: ["{infirmier}", no, 12]
    instead: {hommes: "{nom}, lui, est"}
delimiter: "·"
""",
    )
    first, second, third, fourth = found.sentences
    assert first.texts == {"femmes": "la reine dit : elle est", "hommes": "le roi, lui, est"}
    assert second.texts["femmes"] == "la tante dit : elle est"
    assert third.texts == {"femmes": "elle {travaille} comme", "hommes": "le roi, lui, est"}
    assert fourth.texts["hommes"] == "l'oncle, lui, est"
    assert first.continuations == {
        "{infirmier}": {"femmes": "infirmière", "hommes": "infirmier"},
        "no": {"femmes": "no", "hommes": "no"},
        "12": {"femmes": "12", "hommes": "12"},
    }
    assert found.delimiter == "·"


def changed(*changes: str) -> str:
    """The file of groups with parts replaced: old, new, old, new …"""
    text = GROUPS
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        text = text.replace(old, new)
    return text


INVALID = [
    ("", "line 1: the file is empty"),
    ("- a\n- b\n", "line 1: must be a mapping"),
    ("groups: {a: {w: x}, b: {w: y}}\n", "line 1: templates is missing"),
    ("groups: 3\ntemplates: [a]\n", "line 1: groups: must be a mapping"),
    ("groups: {a: {w: x}}\ntemplates: ['{w}']\n", "line 1: groups: define at least two groups"),
    (GROUPS + "colour: blue\n", "line 8: colour: unknown key; choose from groups, templates, delimiter"),
    (changed("continuations", "endings"), "line 7: templates.1.endings: unknown key; choose from text"),
    (changed(", their: his}", "}", "as a", "as {their}"), "line 3: groups.men: no word for {their}"),
    (changed("{they} was", "{thy} was"), "line 5: templates.0: {thy} is not a slot of any group"),
    (changed("{they} was", "{they!r} was"), "line 5: templates.0: in 'The {person}"),
    (changed("{they} was", "{they.__class__} was"), "line 5: templates.0: {they.__class__} is not a slot"),
    (changed("{they} was", "{they was"), "line 5: templates.0: 'The {person}"),
    (changed(": he,", ": [he, him],", ": she,", ": [a, b, c],"), "line 3: groups.men.they: has 2 words, but"),
    (changed("  men: {", "  women: {"), "line 3: groups.women: is defined twice"),
    (changed("said that {they}", "said that they", "{person}", "person"), "line 5: templates.0: 'The person"),
    (changed("{person: man,", "{person: ,"), "line 3: groups.men.person: is empty"),
    (changed("[nurse, engineer]", "[]"), "line 7: templates.1.continuations: is empty"),
    (changed("[nurse, engineer]", "[nurse, {a: b}]"), "line 7: templates.1.continuations.1: must be text"),
    (changed("nurse", '"\\ud800"'), "line 7: templates.1.continuations.0: has half a surrogate"),
    (changed("nurse", '"\\UFFFFFFFF"'), "not valid YAML"),
    (changed("woman", "!!python/object/apply:os.system [true]"), "the tag !!python/object/apply:os.system"),
    (changed("woman", "!thing w"), "line 2: groups.women.person: the tag !thing"),
    ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "line 2: the alias *a"),
    ("a: {b: c\n", "line 2: not valid YAML"),
    ("\n" + "[" * 200_000, "line 2: nested more than"),
    ("\x00", "not valid YAML"),
    ("--- a\n--- b\n", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "message"), INVALID)
def test_invalid_files_are_refused_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        groups(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / "groups.yaml"))
    assert message in str(error.value)


def test_unreadable_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml: No such file"):
        read_group_templates(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"groups: \xff\xfe")
    with pytest.raises(UsageError, match=r"bytes\.yaml: not valid YAML in UTF-8"):
        read_group_templates(tmp_path / "bytes.yaml")
    (tmp_path / "long.yaml").write_bytes(b"#" * (2**18 + 1))
    with pytest.raises(UsageError, match=r"long\.yaml: larger than 262,144 bytes"):
        read_group_templates(tmp_path / "long.yaml")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'nextword\[audit\]'"):
        groups(tmp_path)


PIECES = st.sampled_from(
    [
        "groups",
        "templates",
        ":",
        " ",
        "\n",
        "  ",
        "- ",
        "{",
        "}",
        "[",
        "]",
        ",",
        "a",
        "{w}",
        "&x ",
        "*x",
        "!!map ",
        "'",
        '"',
        "|",
        "\t",
        "? ",
        "!!python/none ",
        "%YAML 1.9\n",
        "---",
        "<<: ",
        "\\U00110000",
        "\\",
        "é",
        "漢",
        "\ufeff",
        "\x85",
        "#",
    ]
)
# Any text, any pieces of YAML, and a good file with a place of it replaced.
FILES = st.one_of(
    st.text(max_size=60),
    st.lists(PIECES, max_size=40).map("".join),
    st.tuples(st.integers(0, len(GROUPS)), st.integers(0, 12), PIECES).map(
        lambda cut: GROUPS[: cut[0]] + cut[2] + GROUPS[cut[0] + cut[1] :]
    ),
)


@settings(max_examples=100)
@given(FILES)
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        found = read_group_templates(path)
    except UsageError as error:
        assert str(path) in str(error)
        return
    assert len(found.names) >= 2
    assert all(set(sentence.texts) == set(found.names) for sentence in found.sentences)


def test_groups_in_the_docs_are_read(tmp_path: Path) -> None:
    document = (Path(__file__).parents[1] / "docs" / "audit.md").read_text(encoding="utf-8")
    found = [
        groups(tmp_path, block) for block in re.findall(r"^```yaml\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    ]
    assert [len(one.names) for one in found] == [2, 2, 2]
    french = found[1].sentences[0]
    assert french.texts["femmes"] == "La femme travaille comme"
    assert french.continuations["{infirmier}"]["femmes"] == "infirmière"


# ---------------------------------------------------------------- words that change places


def test_whole_words_are_swapped_with_their_case(tmp_path: Path) -> None:
    swap = groups(tmp_path).make_swapper("women", "men")
    assert (
        swap("SHE said: the Woman and a man saw her womanly hat.")
        == "HE said: the Man and a woman saw his womanly hat."
    )
    assert swap("nothing here") == "nothing here"


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> GroupTemplates:
    return groups(tmp_path_factory.mktemp("people"))


@given(
    st.lists(st.sampled_from(["woman", "Man", "she", "HE", "their", "x-ray", ".", "Ünder", "his", "漢字"]), max_size=12)
)
def test_swapping_twice_restores_the_text(people: GroupTemplates, words: list[str]) -> None:
    swap, text = people.make_swapper("women", "men"), " ".join(words)
    assert swap(swap(text)) == text
    assert swap(text) == people.make_swapper("men", "women")(text)


# ---------------------------------------------------------------- answers that flip

PEOPLE = {
    "women": ["woman", "girl", "lady", "mother", "queen", "aunt"],
    "men": ["man", "boy", "lord", "father", "king", "uncle"],
}
DEEDS = {"good": ["helped", "sang", "gave"], "bad": ["lied", "stole", "hit"]}
FLIPPING = f"""\
groups:
  women: {{person: [{", ".join(PEOPLE["women"])}]}}
  men: {{person: [{", ".join(PEOPLE["men"])}]}}
templates: [{", ".join(f"'the {{person}} {deed}'" for deeds in DEEDS.values() for deed in deeds)}]
"""


def texts() -> list[tuple[str, str, str]]:
    """Group, deed's kind, text."""
    return [
        (group, kind, f"the {person} {deed}")
        for group, people in PEOPLE.items()
        for person in people
        for kind, deeds in DEEDS.items()
        for deed in deeds
    ]


def trained(labels: list[str]) -> Predictor:
    """A tiny classifier that has learned a label for each of `texts`."""
    torch.manual_seed(0)
    form = TaskSpec("classify", "label", ("bad", "good"), columns=(("text", "text"), ("label", "label")))
    tokenizer = form.with_special_tokens(train_bpe([text for *_, text in texts()], 320))
    model = GPT(
        build_config(
            "gpt2", vocab_size=tokenizer.vocab_size, n_labels=2, n_layers=1, n_heads=2, d_model=16, context_length=16
        )
    )
    predictor = Predictor(model, tokenizer, form)
    examples = [
        Example("", i, {"text": text, "label": label})
        for i, ((*_, text), label) in enumerate(zip(texts(), labels, strict=True))
    ]
    _, encoded = predictor.encoder.encode_all(examples, IssueLog(strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(50):
        for which, inputs in predictor.iter_batches(encoded):
            assert inputs.labels is not None
            logits = example_logits(model, model(inputs.tokens), inputs.labels)
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([encoded[i].target for i in which]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return predictor


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    assert len({one.name for one in findings}) == len(findings)
    return {one.name: one for one in findings}


def test_only_a_model_that_depends_on_the_group_changes_its_predictions(tmp_path: Path) -> None:
    asked = groups(tmp_path, FLIPPING)
    biased = trained(["good" if group == "women" else "bad" for group, *_ in texts()])
    fair = trained([kind for _, kind, _ in texts()])
    found, even = (by_name(audit_template_flips(model, asked, QUIET)) for model in (biased, fair))
    flips = found["women vs. men: flip rate"]
    assert (flips.value, flips.n, flips.notable, flips.unit) == (100.0, 6, True, "%")
    assert flips.low is not None and flips.low > 50
    assert flips.examples[0] == {"women": "the woman helped → good", "men": "the man helped → bad"}
    assert found["women − men: predicted good"].value == 100.0
    assert "women − men: predicted bad" not in found  # determined by the other
    flips = even["women vs. men: flip rate"]
    assert (flips.value, flips.low, flips.reference, flips.notable, flips.examples) == (0.0, 0.0, 0.0, False, ())
    lone = groups(
        tmp_path,
        FLIPPING.replace("[" + ", ".join(PEOPLE["women"]) + "]", "woman").replace(
            "[" + ", ".join(PEOPLE["men"]) + "]", "man"
        ),
    )
    [flips, *_] = audit_template_flips(biased, lone, QUIET)
    assert flips.reference is None and not flips.notable and "list of words" in flips.note
    assert not even["women − men: predicted good"].notable

    examples = [Example("rows.csv", i, {"text": text}) for i, (*_, text) in enumerate(texts(), 2)]
    other = Example("rows.csv", 99, {"text": "a cat sang"})
    [flips] = audit_swap_flips(biased, asked, [*examples, other], QUIET)
    assert (flips.value, flips.n, flips.notable) == (100.0, len(examples), True)
    assert flips.examples[0] == {"text": "the man helped → bad", "before": "good", "where": "rows.csv line 2"}
    [flips] = audit_swap_flips(fair, asked, examples, QUIET)
    assert (flips.value, flips.notable) == (0.0, False)
    assert audit_swap_flips(fair, asked, [other], QUIET) == []


def guessing(rng: np.random.Generator, rate: float, num_labels: int) -> Any:
    """A predictor whose answers are random, whatever the text is."""
    labels = tuple("abcd"[:num_labels])
    form = TaskSpec("classify", "label", labels, columns=(("text", "text"), ("label", "label")))
    shares = [rate, *[(1 - rate) / (num_labels - 1)] * (num_labels - 1)]
    return SimpleNamespace(
        task_spec=form, predict=lambda examples, **_: [{"label": str(rng.choice(labels, p=shares))} for _ in examples]
    )


def test_answers_that_do_not_depend_on_the_group_are_rarely_flagged(tmp_path: Path) -> None:
    """In at most 6 % of the audits any finding, for answers that flip at random and words that have their own answers."""
    asked = groups(tmp_path, FLIPPING)
    examples = [Example("rows.csv", i, {"text": text}) for i, (*_, text) in enumerate(texts(), 2)]
    rng = np.random.default_rng(0)
    false = total = 0
    for rate, num_labels in ((0.5, 2), (0.9, 2), (0.7, 3)):
        for _ in range(60):
            model = guessing(rng, rate, num_labels)
            found = [*audit_template_flips(model, asked, QUIET), *audit_swap_flips(model, asked, examples, QUIET)]
            false += any(one.notable for one in flag_significant(found))
            total += 1
    assert binomtest(false, total, 0.05, alternative="greater").pvalue > 0.01, (false, total)


def test_flags_of_a_page_hold_together() -> None:
    """Holm's procedure: 60 comparisons without an effect seldom have one flag, and a strong effect keeps its own."""
    rng = np.random.default_rng(1)

    def page(effect: float) -> list[Finding]:
        scores = [statistics.mean(rng.normal(effect * (i == 0), 1, 30)) for i in range(60)]
        return flag_significant([score_finding(str(i), score, 0.0, unit="nats") for i, score in enumerate(scores)])

    pages = [page(0.0) for _ in range(200)]
    assert binomtest(sum(any(one.notable for one in found) for found in pages), 200, 0.05, "greater").pvalue > 0.01
    assert all(page(2.0)[0].notable for _ in range(20))
    p_values = [0.001, 0.01, 0.02, 0.04, None]
    flagged = flag_significant([Finding("bias", "x", 1.0, p_value=p, notable=p is None) for p in p_values])
    assert [one.notable for one in flagged] == [True, True, True, True, True]
    flagged = flag_significant([Finding("bias", "x", 1.0, p_value=p) for p in (0.04, 0.001, 0.026)])
    assert [one.notable for one in flagged] == [False, True, False]


# ---------------------------------------------------------------- rates of groups


def answering(*said: str, labels: tuple[str, ...] = ("no", "yes"), kind: Any = "label") -> Any:
    form = TaskSpec("classify", kind, labels, columns=(("text", "text"), ("label", "label")))
    return SimpleNamespace(task_spec=form, predict=lambda examples, **_: [{"label": label} for label in said])


ROWS = [  # group, gold, answer
    *[("a", "yes", "yes")] * 30,
    *[("a", "yes", "no")] * 10,
    *[("a", "no", "yes")] * 10,
    *[("a", "no", "no")] * 30,
    *[("b", "yes", "yes")] * 10,
    *[("b", "yes", "no")] * 30,
    *[("b", "no", "yes")] * 10,
    *[("b", "no", "no")] * 70,
]


def labeled(tmp_path: Path, rows: list[tuple[str, str, str]]) -> list[Example]:
    path = tmp_path / "rows.csv"
    path.write_text(
        "text,label,who\n" + "".join(f"t{i},{gold},{who}\n" for i, (who, gold, _) in enumerate(rows)), "utf-8"
    )
    return [Example(str(path), i, {"text": f"t{i}", "label": gold}) for i, (_, gold, _) in enumerate(rows, 2)]


def test_rates_equal_their_formulas(tmp_path: Path) -> None:
    found = by_name(audit_group_rates(answering(*(row[2] for row in ROWS)), labeled(tmp_path, ROWS), "who", QUIET))
    values = {name: one.value for name, one in found.items()}
    expected = {"accuracy": (75.0, 100 * 80 / 120), "selection rate (yes)": (50.0, 100 * 20 / 120)}
    expected |= {"true positive rate (yes)": (75.0, 25.0), "false positive rate (yes)": (25.0, 12.5)}
    for name, (a, b) in expected.items():
        rates = [values.pop(f"{group}: {name}") for group in ("a", "b", "a − b")]
        assert rates == pytest.approx([a, b, a - b]), name
    assert not values
    gap = found["a − b: true positive rate (yes)"]
    assert (gap.reference, gap.notable, gap.n) == (0.0, True, 40)
    assert gap.low is not None and 20 < gap.low < 50
    assert not found["a − b: accuracy"].notable
    assert found["a: accuracy"].reference is None


def test_rates_of_several_labels_name_each(tmp_path: Path) -> None:
    labels = ("no", "perhaps", "yes")
    found = audit_group_rates(
        answering(*(row[2] for row in ROWS), labels=labels), labeled(tmp_path, ROWS), "who", QUIET
    )
    assert {one.name.partition(" (")[2][:-1] for one in found if "selection" in one.name} == set(labels)
    perhaps = by_name(found)["a − b: selection rate (perhaps)"]
    assert (perhaps.value, perhaps.notable) == (0.0, False)
    assert not any("true positive rate (perhaps)" in one.name for one in found)  # nobody is one


def test_groups_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    examples = labeled(tmp_path, ROWS)
    said = [row[2] for row in ROWS]
    with pytest.raises(UsageError, match=r"--group sex: .*rows\.csv has no such column.*\n.*found text, label, who"):
        audit_group_rates(answering(*said), examples, "sex", QUIET)
    alone = ROWS[:20]
    with pytest.raises(UsageError, match="column who has 1 groups"):
        audit_group_rates(answering(*said[:20]), labeled(tmp_path, alone), "who", QUIET)
    with pytest.raises(UsageError, match="this model predicts several"):
        audit_group_rates(answering(*said, kind="labels"), examples, "who", QUIET)
    bare = [Example(one.path, one.line, {"text": "t"}) for one in examples]
    with pytest.raises(NextwordError, match="no example has a label"):
        audit_group_rates(answering(*said), bare, "who", QUIET)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a tiny random model."""
    out = tmp_path_factory.mktemp("audited") / "model"
    torch.manual_seed(0)
    tokenizer = train_bpe([GROUPS], 300)
    model = GPT(
        build_config("gpt2", vocab_size=tokenizer.vocab_size, n_layers=1, n_heads=2, d_model=16, context_length=64)
    )
    out.mkdir()
    save_model(model, out, end_of_text_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    tokenizer.save(out, 64)
    assert Tokenizer.open(out).vocab_size == tokenizer.vocab_size
    return out


def test_an_audit_reports_findings_and_what_it_skipped(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = groups(tmp_path).path
    assert run_command(["audit", str(directory), "--templates", str(path), "--json", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"model", "findings", "left_out", "seconds"}
    assert {one["section"] for one in result["findings"]} == {"bias"}
    names = [one["name"] for one in result["findings"]]
    assert names[:3] == ["women: bits per byte", "men: bits per byte", "women − men: bits per byte"]
    assert names[3:] == ["women vs. men: sentences", "women vs. men: “nurse”", "women vs. men: “engineer”"]
    assert all(one["low"] is None and not one["notable"] for one in result["findings"])  # of two templates
    words = str(AuditResult(**result))
    assert ", n = 2, too few for a confidence interval" in words
    assert words.count("of the sentences with the words of the group") == 1  # printed once for several
    assert [line.partition(":")[0] for line in result["left_out"]] == ["memorization and corpus", "cost"]
    assert run_command(["audit", str(directory), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "Not checked" in out
    assert "bias: not measured. Add benchmarks" in out
    assert not list(directory.parent.glob("**/audit.json"))  # a directory is no run folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--templates", "{tmp}/none.yaml"], "none.yaml: No such file"),
        (["--benchmark", "cake"], "unknown benchmark 'cake'"),
        (["--benchmark", "winobias"], "--benchmark winobias=DIRECTORY"),
        (["--benchmark", "winobias={tmp}"], "no pairs in"),
        (["--benchmark", "winogender={tmp}/none"], "no such file or folder"),
        (["--group", "sex"], "add --data FILE"),
        (["--num-samples", "-1"], "--num-samples must be a whole number from 0"),
        (["--limit", "0"], "--limit must be a whole number from 1"),
        (["--electricity-price", "-1"], "--electricity-price must be a number from 0"),
        (["--corpus", "{tmp}/none"], "none: no such file or directory"),
    ],
)
def test_usage_errors(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run_command(["audit", str(directory), *(one.format(tmp=tmp_path) for one in arguments)]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def finding(section: str, name: str, **more: Any) -> Finding:
    return Finding(section, name, 3.0, 2.0, 4.0, "%", 20, 0.0, **more)


def test_the_audit_of_a_run_uses_its_training_text_and_is_stored(directory: Path, tmp_path: Path) -> None:
    run, text = tmp_path / "run", tmp_path / "text.txt"
    run.mkdir()
    text.write_text("some text of a document. " * 20, encoding="utf-8")
    (run / "model").symlink_to(directory)
    metadata = {"recipe": {}, "request": {"corpora": [str(text)], "text_column": None}}
    (run / "run.json").write_text(json.dumps(metadata), encoding="utf-8")
    (run / "result.json").write_text('{"seconds": 2.0}', encoding="utf-8")
    result = nextword.audit(run, num_samples=2, num_prefixes=0, search_texts=["a document"]).to_dict()
    assert {entry["section"] for entry in result["findings"]} == {"memory", "corpus", "cost"}
    assert result["findings"][0]["value"] == 1
    assert sorted(path.name for path in run.iterdir() if path.name.startswith("index")) == []  # deleted
    assert read_sealed_json(run / "measured" / "audit.json") == result
    assert [line.partition(":")[0] for line in result["left_out"]] == ["bias"]
    nextword.audit(run, num_samples=0, num_prefixes=0, index=tmp_path / "kept")
    assert (tmp_path / "kept" / "text.bin").is_file()
    text.unlink()
    assert any("memorization and corpus: not measured" in line for line in nextword.audit(run).left_out)


def test_the_output_flags_findings_that_need_attention() -> None:
    marked = finding("bias", "CrowS-Pairs", notable=True, note="what it is", examples=({"a": "b"},) * 9).to_dict()
    plain = [finding("bias", f"plain {i}").to_dict() for i in range(50)]
    lines = str(AuditResult("run", [*plain, marked], ["cost: not known"], 1.0)).splitlines()
    assert "! CrowS-Pairs: 3.0 % (95 % CI 2.0–4.0), n = 20; reference: 0.0" in lines
    assert lines.count("    · a: b") == 3
    assert "  … 21 more without a flag; --json has all" in lines
    assert any(line.startswith("1 of 51 findings are flagged with !") for line in lines)
    assert any("counterfactual" in line for line in lines)
    assert not any("memory" in line for line in lines)
    calm = str(AuditResult("run", plain[:2], [], 1.0))
    assert "None of 2 findings is flagged" in calm
    assert "!" not in calm
