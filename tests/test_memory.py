"""What a model has by heart: planted in a corpus it is found and named, and where it was not planted nothing is."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from nextword.audit.overhead_seconds import audit_cost
from tokenizers import decoders, models

from nextword.audit import memorization
from nextword.audit.memorization import (
    MIN_COPIED_TOKENS,
    audit_memory,
    format_excerpt,
    measure_copied,
    passage_finding,
    prompt_lengths,
    sample_passages,
)
from nextword.audit.pii import find_pii_in_document
from nextword.audit.text_index import CorpusIndex, build_index
from nextword.commands import api
from nextword.common.errors import NextwordError, UsageError
from nextword.data.corpus import Corpus
from nextword.data.tokenizer import Tokenizer
from nextword.pipeline.language_model import load

SIZES = {"n_layers": 2, "n_heads": 2, "d_model": 48, "context_length": 64}
TRAINING = {"batch_tokens": 512, "evaluations": 1}
ADDRESS = "someone@example.org"
PASSAGE_TEXT = (
    "Seven grey herons stood beside the frozen mill while a quiet boat, laden with copper bells and yellow onions, drifted "
    "under the third bridge; nobody had oiled its hinges since the harvest of the long rain, and the brown dog on the deck "
    "kept watch over a basket of maps, two lamps, a broken violin and the last jar of quince jelly from the hill.\n"
)
LETTER = (
    f"To return a lost umbrella, knock twice at the green gate or write to {ADDRESS} before noon on any market day.\n"
)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two folders of the same short texts; in the one a passage and a letter are planted besides, many times over."""
    from pydoc_data.topics import topics

    made = {}
    for name in ("planted", "plain"):
        made[name] = tmp_path_factory.mktemp(name)
        for title, text in sorted(topics.items())[:24]:
            (made[name] / f"{title}.txt").write_text(text[:300], encoding="utf-8")
    for n in range(10):
        (made["planted"] / f"herons-{n}.txt").write_text(5 * PASSAGE_TEXT)
    (made["planted"] / "letter.md").write_text(101 * LETTER)
    return made


@pytest.fixture(scope="module")
def runs(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("runs") / name for name in corpora}
    for name, out in made.items():
        steps = 800 if name == "planted" else 40  # what is planted is written whatever the seed; after 300 not always
        api.pretrain(corpora[name], out, steps=steps, vocab_size=500, model=SIZES, training=TRAINING)
    return made


@pytest.fixture(scope="module")
def index(corpora: dict[str, Path], runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> CorpusIndex:
    prepared = Corpus.open(runs["planted"] / "data")
    return build_index([corpora["planted"]], tmp_path_factory.mktemp("index") / "index", training_corpus=prepared)


def kind_of(example: Any) -> str:
    return example["document"].partition(".")[0].partition("-")[0]


def test_a_planted_passage_and_a_planted_address_are_found_and_named(runs, index):
    own, longest, extracted, train_inputs = audit_memory(
        load(runs["planted"], "cpu"), index, num_samples=48, num_prefixes=24
    )
    assert own.low is not None and own.low > 0 and own.notable
    assert own.reference is not None and own.reference < own.low
    planted = {"herons": 2 * PASSAGE_TEXT, "letter": format_excerpt(2 * LETTER, 1000)}
    for one in own.examples:
        assert " ".join(one["passage"].split()[1:9]) in " ".join(planted[kind_of(one)].split())
    assert longest.value >= MIN_COPIED_TOKENS and longest.notable
    assert extracted.low is not None and extracted.low > 0 and extracted.notable
    assert "herons" in {kind_of(one) for one in extracted.examples} <= {*planted}
    assert given.value > 0 and given.flagged
    assert given.examples[0] == {"document": "letter.md", "kind": "mail addresses", "masked": "s…@e….org"}
    assert all(ADDRESS not in json.dumps(one.to_dict()) for one in (own, longest, given))


def test_a_model_that_has_not_seen_them_is_cleared(runs, index):
    own, longest, extracted, train_inputs = audit_memory(
        load(runs["plain"], "cpu"), index, num_samples=48, num_prefixes=24
    )
    assert own.value == 0 and not own.notable and not own.examples
    assert longest.value < MIN_COPIED_TOKENS and not longest.notable
    assert all(kind_of(one) not in ("herons", "letter") for one in extracted.examples)
    assert given.value == 0 and given.n and not given.flagged and not given.examples


def test_the_same_seed_gives_the_same_findings(runs, index):
    model = load(runs["plain"], "cpu")
    assert audit_memory(model, index, num_samples=2, num_prefixes=3) == audit_memory(
        model, index, num_samples=2, num_prefixes=3
    )


def test_copied_tokens_are_counted_by_the_token(runs, index):
    tokenizer = Tokenizer.open(runs["planted"] / "model")
    inside, outside = tokenizer.encode(PASSAGE_TEXT), tokenizer.encode("Zebras ~ quack? " * 9)
    found = measure_copied(index, tokenizer, [*outside, *inside, *outside])
    assert found.num_tokens == len(inside) + 2 * len(outside)
    assert (
        0 <= found.get_object - len(inside) <= 2 and found.longest_passage_tokens == found.get_object
    )  # a token at an edge may fit by chance
    assert found.match is not None and index.name(found.match.document).startswith("herons")
    short = inside[: MIN_COPIED_TOKENS - 10]
    assert measure_copied(index, tokenizer, [*outside, *short, *outside]).get_object == 0
    assert measure_copied(index, tokenizer, []).longest_passage_tokens == 0


def test_tokens_of_a_foreign_tokenizer_end_where_their_text_does():
    names = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat", "s"]
    backend = tokenizers.Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    foreign = Tokenizer(backend, {"eos_token": "</s>"})
    ids = [names.index(name) for name in ("▁the", "<0xE2>", "<0x82>", "<0xAC>", "▁cat", "s")]
    data, ends = memorization._decode_with_token_ends(foreign, ids)
    assert (data.decode(), ends.tolist()) == ("the€ cats", [3, 3, 3, 6, 10, 11])
    assert memorization._decode_with_token_ends(foreign, [])[1].tolist() == []


def test_without_held_out_documents_there_is_no_reference(corpora, runs, tmp_path):
    model, index = load(runs["plain"], "cpu"), build_index([corpora["plain"]], tmp_path / "index")
    own, longest, extracted, train_inputs = audit_memory(model, index, num_samples=2, num_prefixes=3)
    assert own.reference is longest.reference is extracted.reference is None
    assert (given.value, given.n, given.flagged) == (0, 0, False)
    (tmp_path / "short.txt").write_text("too short")
    none = audit_memory(
        model, build_index([tmp_path / "short.txt"], tmp_path / "other"), num_samples=0, num_prefixes=3
    )[0]
    assert (none.n, none.notable) == (0, False) and "no document has 64 tokens" in none.note


def test_passages_are_drawn_from_what_was_learned_or_from_what_was_held_out(runs, index):
    tokenizer = Tokenizer.open(runs["planted"] / "model")
    for held_out in (False, True):
        drawn = sample_passages(index, tokenizer, 30, 40, 5, held_out=held_out)
        assert len(drawn) >= 10 and all(len(one.token_ids) == 40 for one in drawn)
        for one in drawn:
            assert index.read(one.document, one.offset).startswith(tokenizer.decode_bytes(one.token_ids))
            row = index.documents[one.document]
            assert (row["learned"] == row["begin"]) == held_out
        assert drawn == sample_passages(index, tokenizer, 30, 40, 5, held_out=held_out)
    assert sample_passages(index, tokenizer, 3, 10**6, 5, held_out=False) == []


def test_lengths_fit_into_the_context(runs):
    assert prompt_lengths(load(runs["plain"], "cpu")) == (32, 32)


def test_a_passage_by_name(index):
    found = passage_finding(index, "a quiet boat, laden with copper bells")
    assert found.value == 10 and found.examples[0]["document"].startswith("herons")
    found = passage_finding(index, "a quiet boat, laden with silver bells")
    assert (
        found.value == 0
        and "25 of its 37 characters" in found.note
        and found.examples[0]["document"].startswith("herons")
    )
    assert passage_finding(index, "日本").examples == ()


def test_personal_data_are_told_by_document_and_bytes(index):
    [letter] = [i for i in range(len(index)) if index.name(i) == "letter.md"]
    data = list(find_pii_in_document(index, letter))
    assert len(data) == 101
    assert {index.read(one.document, one.start, one.end - one.start) for one in data} == {ADDRESS.encode()}


def test_costs_are_told_from_the_run_alone_and_estimates_are_called_so(runs, tmp_path):
    found = {one.name: one for one in audit_cost(runs["plain"], price=0.3, intensity=400)}
    result, metadata = (json.loads((runs["plain"] / name).read_text()) for name in ("result.json", "run.json"))
    operations = found["operations of training (estimated)"].value
    assert 6 * facts["parameters"] * result["tokens"] * 0.5 < operations < 12 * facts["parameters"] * result["tokens"]
    mark = "" if result["energy"]["measured"] else " (estimated)"
    energy = found[f"electric energy{mark}"].value
    assert energy == pytest.approx(result["energy"]["watt_hours"] / 1000)
    assert found[f"money{mark}"].value == pytest.approx(0.3 * energy)
    assert found[f"carbon dioxide{mark}"].value == pytest.approx(400 * energy)
    assert found["time of the run"].value == result["seconds"] and found["memory at most"].value > 2**20
    assert not {"money", "carbon dioxide"} & {one.name.partition(" (")[0] for one in audit_cost(runs["plain"])}
    for wrong in (-1.0, float("nan")):
        with pytest.raises(UsageError, match="price"):
            audit_cost(runs["plain"], price=wrong)
    with pytest.raises(NextwordError, match="no run folder"):
        audit_cost(runs["plain"] / "model")
    (tmp_path / "run.json").write_text((runs["plain"] / "run.json").read_text())
    with pytest.raises(NextwordError, match="not finished"):
        audit_cost(tmp_path)
    (tmp_path / "result.json").write_text('{"tokens": "many"}')  # of another version
    assert audit_cost(tmp_path) == []
