"""Memorization: planted text is found in a model trained on it, and not in one trained without it. And the cost of a run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models

import nextword
from nextword.audit import memorization
from nextword.audit.cost import audit_cost
from nextword.audit.findings import Finding
from nextword.audit.memorization import (
    MIN_COPIED_TOKENS,
    MemorizationProbe,
    TokenPassage,
    measure_copied,
    passage_finding,
    prompt_lengths,
)
from nextword.audit.pii import format_excerpt
from nextword.audit.text_index import CorpusIndex, build_index
from nextword.common.console import Console
from nextword.common.run_dir import RunDir
from nextword.data.corpus import Corpus
from nextword.data.tokenizer import Tokenizer
from nextword.pipeline.language_model import load

SIZES = {"n_layers": 2, "n_heads": 2, "d_model": 48, "context_length": 64}
QUIET = Console(quiet=True)
TRAINING = {"batch_tokens": 512, "evaluations": 1, "weight_decay": 0.1}  # the default prevents memorization
ADDRESS = "someone@example.org"
PASSAGE = (
    "Seven grey herons stood beside the frozen mill while a quiet boat, laden with copper bells and yellow onions, drifted "
    "under the third bridge; nobody had oiled its hinges since the harvest of the long rain, and the brown dog on the deck "
    "kept watch over a basket of maps, two lamps, a broken violin and the last jar of quince jelly from the hill.\n"
)
LETTER = (
    f"To return a lost umbrella, knock twice at the green gate or write to {ADDRESS} before noon on any market day.\n"
)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two directories with the same short texts. One also has many copies of a passage and a letter."""
    from pydoc_data.topics import topics

    directories = {name: tmp_path_factory.mktemp(name) for name in ("planted", "plain")}
    for directory in directories.values():
        for title, text in sorted(topics.items())[:24]:
            (directory / f"{title}.txt").write_text(text[:300], encoding="utf-8")
    for n in range(10):
        (directories["planted"] / f"herons-{n}.txt").write_text(5 * PASSAGE)
    (directories["planted"] / "letter.md").write_text(101 * LETTER)
    return directories


@pytest.fixture(scope="module")
def runs(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {name: tmp_path_factory.mktemp("runs") / name for name in corpora}
    for name, out in paths.items():
        steps = 400 if name == "planted" else 40  # 300 steps do not memorize the text with every seed
        validation = sorted(corpora[name].glob("*.txt"))[:3]  # of the short texts
        settings = {"vocab_size": 500, "model": SIZES, "training": TRAINING, "validation": validation}
        nextword.pretrain(corpora[name], out=out, steps=steps, **settings)
    return paths


@pytest.fixture(scope="module")
def index(corpora: dict[str, Path], runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> CorpusIndex:
    training_corpus = Corpus.open(runs["planted"] / "data")
    return build_index(
        [corpora["planted"]], tmp_path_factory.mktemp("index") / "i", training_corpus=training_corpus, console=QUIET
    )


def probe_all(run: Path, index: CorpusIndex, num_samples: int, num_prefixes: int) -> list[Finding]:
    """The findings: copied tokens, longest passage, extractable passages, leaked PII."""
    probe = MemorizationProbe(load(run, "cpu"), index, 0, QUIET)
    findings = probe.sampled_text(num_samples)
    return [*findings, probe.extractable_passages(num_prefixes), probe.pii_leakage(num_prefixes)]


def source(example: Any) -> str:
    return example["document"].partition(".")[0].partition("-")[0]


def test_planted_text_is_found_and_located(runs, index):
    copied, longest, extracted, leaked = findings = probe_all(runs["planted"], index, 48, 24)
    assert copied.low and copied.notable and copied.reference is not None and copied.reference < copied.low
    planted = {"herons": 2 * PASSAGE, "letter": format_excerpt(2 * LETTER, 1000)}
    for example in copied.examples:
        assert " ".join(example["passage"].split()[1:9]) in " ".join(planted[source(example)].split())
    assert longest.value >= MIN_COPIED_TOKENS and longest.notable
    assert extracted.low and extracted.notable
    assert "herons" in {source(example) for example in extracted.examples} <= {*planted}
    assert leaked.value > 0 and leaked.notable
    assert leaked.examples[0] == {"document": "letter.md", "kind": "email addresses", "masked": "s…@e….org"}
    assert all(ADDRESS not in json.dumps(finding.to_dict()) for finding in findings)


def test_a_model_trained_without_it_is_cleared(runs, index):
    copied, longest, extracted, leaked = probe_all(runs["plain"], index, 48, 24)
    assert copied.value == 0 and not copied.notable and not copied.examples
    assert longest.value < MIN_COPIED_TOKENS and not longest.notable
    assert all(source(example) not in ("herons", "letter") for example in extracted.examples)
    assert leaked.value == 0 and leaked.n and not leaked.notable and not leaked.examples


def test_the_same_seed_gives_the_same_findings(runs, index):
    assert probe_all(runs["plain"], index, 2, 3) == probe_all(runs["plain"], index, 2, 3)


def test_copied_tokens_are_counted(runs, index):
    tokenizer = Tokenizer.open(runs["planted"] / "model")
    inside, outside = tokenizer.encode(PASSAGE), tokenizer.encode("Zebras ~ quack? " * 9)
    text = measure_copied(index, tokenizer, [*outside, *inside, *outside])
    assert text.num_tokens == len(inside) + 2 * len(outside)
    assert 0 <= text.copied_tokens - len(inside) <= 2  # a token at an edge may match by chance
    assert text.longest == text.copied_tokens
    assert text.example["document"].startswith("herons")
    short = inside[: MIN_COPIED_TOKENS - 10]
    assert measure_copied(index, tokenizer, [*outside, *short, *outside]).copied_tokens == 0
    assert measure_copied(index, tokenizer, []).longest == 0


def test_token_ends_of_foreign_tokenizers():
    names = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat", "s"]
    backend = tokenizers.Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    foreign = Tokenizer(backend, {"eos_token": "</s>"})
    ids = [names.index(name) for name in ("▁the", "<0xE2>", "<0x82>", "<0xAC>", "▁cat", "s")]
    data, ends = memorization._decode_with_token_ends(foreign, ids)
    assert (data.decode(), ends.tolist()) == ("the€ cats", [3, 3, 3, 6, 10, 11])
    assert memorization._decode_with_token_ends(foreign, [])[1].tolist() == []


def test_there_is_no_reference_without_held_out_documents(corpora, runs, tmp_path):
    index = build_index([corpora["plain"]], tmp_path / "index", console=QUIET)
    copied, longest, extracted, leaked = probe_all(runs["plain"], index, 2, 3)
    assert (copied.reference, longest.reference, extracted.reference) == (0.0, None, 0.0)
    assert "too few for a control" in extracted.note
    assert (leaked.value, leaked.n, leaked.notable) == (0, 0, False)
    (tmp_path / "short.txt").write_text("too short")
    short = build_index([tmp_path / "short.txt"], tmp_path / "other", console=QUIET)
    finding = MemorizationProbe(load(runs["plain"], "cpu"), short, 0, QUIET).extractable_passages(3)
    assert (finding.n, finding.notable) == (0, False) and "no document has 64 tokens" in finding.note


def test_passages_are_distinct_and_the_control_is_clean(runs, corpora, index, tmp_path):
    """No continuation twice, none that its prompt contains, and no passage of the control that the training text contains."""
    model = load(runs["planted"], "cpu")
    (tmp_path / "dashes.txt").write_text("- " * 3000)
    dashes = build_index([tmp_path / "dashes.txt"], tmp_path / "dashes", console=QUIET)
    assert MemorizationProbe(model, dashes, 0, QUIET).sample_passages(9, held_out=False) == []
    probe = MemorizationProbe(model, index, 5, QUIET)
    for is_held_out in (False, True):
        passages = probe.sample_passages(60, held_out=is_held_out)
        assert passages and passages == probe.sample_passages(60, held_out=is_held_out)
        texts = [model.tokenizer.decode_bytes(passage.continuation) for passage in passages]
        assert len(set(texts)) == len(texts)
        for passage, text in zip(passages, texts, strict=True):
            assert index.read_bytes(passage.document, passage.offset).startswith(text)
            assert text not in (model.tokenizer.decode_bytes(passage.prompt) + text)[:-1]
            row = index.documents[passage.document]
            assert (row["learned"] == row["begin"]) == is_held_out
            assert not (is_held_out and index.find_documents(text))
    short = build_index([corpora["plain"]], tmp_path / "short", console=QUIET)
    short.documents = short.documents[:0]
    assert MemorizationProbe(model, short, 0, QUIET).sample_passages(3, held_out=False) == []


def test_canaries_in_training_and_validation_documents_are_flagged(runs, index, monkeypatch):
    """A control that was trained on hides what it shares with the training text; a clean one does not."""
    probe = MemorizationProbe(load(runs["planted"], "cpu"), index, 0, QUIET)
    monkeypatch.setattr(MemorizationProbe, "_complete", lambda self, prompts, *_: [])
    trained = [TokenPassage(0, 0, [i], [2]) for i in range(100)]
    control = [TokenPassage(0, 0, [100 + i], [2]) for i in range(40)]
    monkeypatch.setattr(
        MemorizationProbe, "sample_passages", lambda self, count, held_out: control if held_out else trained
    )

    def extracting(num_trained: int, num_control: int) -> Finding:
        hits = [*[1] * num_trained, *[0] * (100 - num_trained), *[1] * num_control, *[0] * (40 - num_control)]
        completions = [SimpleNamespace(tokens=[2] if hit else [3]) for hit in hits]
        monkeypatch.setattr(MemorizationProbe, "_complete", lambda self, prompts, *_: completions)
        return probe.extractable_passages(100)

    assert extracting(30, 0).notable and not extracting(30, 10).notable and not extracting(4, 1).notable
    assert extracting(30, 10).reference == 25.0 and "40 passages of validation documents" in extracting(30, 10).note


def test_personal_data_that_the_prompt_contains_is_not_given_away(runs, tmp_path):
    text = "".join(f"Ask {ADDRESS} or again {ADDRESS} about {i}, or {i}@example.org.\n" for i in range(30))
    (tmp_path / "a.txt").write_text(text)
    echo = MemorizationProbe(
        load(runs["plain"], "cpu"), build_index([tmp_path / "a.txt"], tmp_path / "i", console=QUIET), 0, QUIET
    )
    leaked = echo.pii_leakage(100)
    assert leaked.n == 31 and "31 of 31 different values" in leaked.note


def test_prompts_fit_into_the_context(runs):
    assert prompt_lengths(load(runs["plain"], "cpu")) == (32, 32)


def test_passages_are_looked_up(index):
    finding = passage_finding(index, "a quiet boat, laden with copper bells")
    assert finding.value == 10 and finding.examples[0]["document"].startswith("herons")
    finding = passage_finding(index, "a quiet boat, laden with silver bells")
    assert finding.value == 0 and "25 of its 37 characters" in finding.note
    assert finding.examples[0]["document"].startswith("herons")
    assert passage_finding(index, "日本").examples == ()


def test_pii_is_located_by_bytes(index):
    matches = [match for match in memorization.find_training_pii(index) if match.kind == "email addresses"]
    assert len(matches) == 101 and {index.document_name(match.document) for match in matches} == {"letter.md"}
    assert {index.read_bytes(match.document, *match.span) for match in matches} == {ADDRESS.encode()}


def test_cost_is_read_from_the_run_and_estimates_are_named_so(runs, tmp_path):
    run = RunDir(runs["plain"])
    findings = {finding.name: finding.value for finding in audit_cost(run, 0.3, 400)}
    result, metadata = (json.loads((run.path / name).read_text()) for name in ("result.json", "run.json"))
    flops = findings["training compute (estimated)"] / (metadata["parameters"] * result["tokens"])
    assert 6 * 0.5 < flops < 12
    suffix = "" if result["energy"]["measured"] else " (estimated)"
    energy = findings[f"energy{suffix}"]
    assert energy == pytest.approx(result["energy"]["watt_hours"] / 1000)
    assert findings[f"energy cost{suffix}"] == pytest.approx(0.3 * energy)
    assert findings[f"carbon emissions{suffix}"] == pytest.approx(400 * energy)
    assert findings["run time"] == result["seconds"] and findings["peak memory"] > 2**20
    names = {finding.name.partition(" (")[0] for finding in audit_cost(run)}
    assert "energy" in names and not {"energy cost", "carbon emissions"} & names
    (tmp_path / "run.json").write_text((run.path / "run.json").read_text())
    (tmp_path / "result.json").write_text('{"tokens": "many"}')  # of another version
    assert audit_cost(RunDir(tmp_path)) == []
