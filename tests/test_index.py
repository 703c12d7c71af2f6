"""The index of a corpus: exact against a search by hand, whatever repeats itself, and in bounded memory."""

import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextword.audit import suffix_array
from nextword.audit import text_index as index_module
from nextword.audit.text_index import CorpusIndex, build_index, trim_partial_character
from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.data.corpus import Corpus
from nextword.data.prepare import prepare

# Small alphabets and repetitions, so that everything stands in several places; characters of one to four bytes.
WORDS = st.text(alphabet="ab é語🙂\n", min_size=1, max_size=6)
REPEATED = st.builds(lambda word, count: word * count, WORDS, st.sampled_from([1, 1, 2, 3, 40]))
TEXTS = st.lists(REPEATED, max_size=6).map("".join)


def build(folder, texts):
    """The index of documents, a row each; those that hold nothing but spaces are none."""
    folder.mkdir(exist_ok=True)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return build_index([folder / "texts.jsonl"], folder / "index")


def by_hand(texts, query, least):
    """Begin and end, in bytes, of each passage of a query that stands in a text and in no longer one that does."""
    found, end, furthest = [], 0, -1
    for start in range(len(query)):
        end = max(end, start)
        while end < len(query) and any(query[start : end + 1] in text for text in texts):
            end += 1
        span = len(query[:start].encode()), len(query[:end].encode())
        if end > furthest and span[1] - span[0] >= least:
            found.append(span)
        furthest = max(furthest, end)
    return found


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(TEXTS, min_size=1, max_size=6), st.data(), st.sampled_from([2**20, 64]), st.sampled_from([256, 2]),
    st.sampled_from([1, 5]),
)  # fmt: skip
def test_matches_are_those_of_a_search_by_hand(tmp_path, monkeypatch, texts, data, limit, many, least):
    monkeypatch.setattr(suffix_array, "LIMIT", limit)  # regions that are parted on disk
    monkeypatch.setattr(suffix_array, "MANY", many)  # runs
    texts = ["a", *texts]
    index = build(tmp_path, texts)
    kept = [text for text in texts if text.strip()]
    parts = data.draw(st.lists(st.one_of(REPEATED, st.sampled_from(texts)), max_size=5))
    query = "".join(part[data.draw(st.integers(0, 3)) :] for part in parts)
    matches = index.find_matches(query, least)
    assert [(match.start, match.end) for match in matches] == by_hand(kept, query, least)
    for match in matches:
        there = index.read_bytes(match.document, match.offset, match.end - match.start)
        assert there == query.encode()[match.start : match.end]
    passage = query[:40]
    wanted = [i for i, text in enumerate(kept) if passage and passage in text]
    assert index.find_documents(passage) == wanted


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_bytes_that_are_no_text_are_looked_up_too(tmp_path, data):
    index = build(tmp_path, ["abc é語🙂 and so on", "ÿþ and so forth"])
    for match in index.find_matches(data, 1):
        assert index.read_bytes(match.document, match.offset, match.end - match.start) == data[match.start : match.end]


def test_long_runs_of_spaces_cost_nothing(tmp_path):
    texts = [" " * 50_000 + "x", "\n".join(" " * 70 + str(i * 7) for i in range(500)), "-" * 100]
    index = build(tmp_path, texts)
    for query in (" " * 700, " " * 90 + "x", " " * 70 + "777\n" + " " * 66 + "5", "-" * 130, " " * 500 + "xy"):
        assert [(m.start, m.end) for m in index.find_matches(query, 8)] == by_hand(texts, query, 8)


def test_the_table_is_in_order_whatever_fits_in_memory(tmp_path, monkeypatch):
    texts = [(f"the {i % 7} words of a text, " * 40)[i:] for i in range(12)]
    index = build(tmp_path / "a", texts)
    monkeypatch.setattr(suffix_array, "LIMIT", 100)
    monkeypatch.setattr(suffix_array, "CHUNK", 64)
    parted = build(tmp_path / "b", texts)
    assert np.array_equal(index.suffix_array.positions, parted.suffix_array.positions)
    text = index.text.bytes.tobytes()
    keys = [text[at : at + suffix_array.SORT_DEPTH] for at in index.suffix_array.positions.tolist()]
    assert keys == sorted(keys) and len(keys) == sum(map(len, texts))


def test_a_passage_is_named_by_its_file_and_its_line(tmp_path):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_text("Nothing of note is written here.\r\n")
    (tmp_path / "in/deeper/b.csv").write_text('id,text\n1,"one row,\nin two lines"\n2,the passage that was planted\n')
    index = build_index([tmp_path / "in"], tmp_path / "index")
    [match] = index.find_matches("Somebody wrote the passage that was planted, and more.")
    assert (index.document_name(match.document), match.start, match.offset) == ("deeper/b.csv line 4", 15, 0)
    assert [index.document_name(one) for one in index.find_documents("written here.\n")] == ["a.txt"]
    assert index.longest_passage_tokens("of note is seen") == (0, 11, 0, 8)
    assert (
        index.find_documents("") == [] and index.find_matches("") == [] and index.longest_passage_tokens("日本") is None
    )


def test_an_index_is_used_again_until_the_text_changes_or_it_is_damaged(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    index = build(folder, ["one text", "another text"])
    monkeypatch.setattr(index_module, "_build", None)  # would fail if it were called
    os.utime(folder / "texts.jsonl", ns=(1, 1))
    assert build_index([folder / "texts.jsonl"], folder / "index").find_documents("another") == [1]
    monkeypatch.undo()
    data = bytearray((folder / "index/suffixes.bin").read_bytes())
    data[4] ^= 1
    (folder / "index/suffixes.bin").write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"suffixes\.bin"):
        CorpusIndex.open(folder / "index")
    assert build_index([folder / "texts.jsonl"], folder / "index").find_documents("another") == [1]
    (folder / "texts.jsonl").write_text('{"text": "a third text"}\n')
    assert build_index([folder / "texts.jsonl"], folder / "index").find_documents("another") == []
    assert index.num_text_bytes == len("one textanother text")


def test_places_that_are_not_ours_are_left_alone(tmp_path, shards):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("mine")
    for place in (tmp_path / "full", tmp_path / "a.txt", shards):
        with pytest.raises(UsageError, match="not an index"):
            build_index([tmp_path / "a.txt"], place)
    with pytest.raises(NextwordError, match="not an index"):
        CorpusIndex.open(shards)
    with pytest.raises(UsageError, match="no such file"):
        build_index([tmp_path / "gone"], tmp_path / "index")
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(NextwordError, match="no text was found"):
        build_index([tmp_path / "empty.txt"], tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_what_was_held_out_from_training_is_not_searched(texts, shards, tmp_path):
    corpus = Corpus.open(shards)
    index = build_index([texts], tmp_path / "index", training_corpus=corpus)
    row = corpus.tokens("validation")
    ids = row.read(0, len(row))
    ends = np.flatnonzero(ids == corpus.tokenizer.eos_id) + 1
    unseen = {corpus.tokenizer.decode(part) for part in np.split(ids, ends)[:-1]}
    held_out = [i for i, one in enumerate(index.documents) if one["learned"] < one["end"]]
    assert index.validation_level and unseen == {index.read_bytes(one).decode() for one in held_out}
    assert all(index.documents[one]["learned"] == index.documents[one]["begin"] for one in held_out)
    passages = {index.read_bytes(one).decode()[:3000][-400:]: one for one in range(len(index))}
    for passage, document in passages.items():
        assert (document in index.find_documents(passage)) == (document not in held_out)
    everything = build_index([texts], tmp_path / "other")
    assert not everything.validation_level and all(everything.find_documents(passage) for passage in passages)


def test_of_few_documents_the_last_tenth_is_not_searched(tmp_path):
    (tmp_path / "in").mkdir()
    words = [f"word{i * i % 977}" for i in range(3000)]
    (tmp_path / "in/a.txt").write_text("é" * 11 + " ".join(words))
    corpus = prepare([tmp_path / "in"], tmp_path / "shards", vocab_size=300)
    index = build_index([tmp_path / "in"], tmp_path / "index", training_corpus=corpus)
    row = corpus.tokens("train")
    learned = corpus.tokenizer.decode(row.read(0, len(row) - 1)).encode()
    [document] = index.documents
    assert index.read_bytes(0)[: int(document["learned"])] == learned
    assert len(index.suffix_array) == len(learned.decode())


def test_another_text_than_the_run_was_trained_on_is_searched_whole(shards, tmp_path):
    (tmp_path / "a.txt").write_text("some other text")
    index = build_index([tmp_path / "a.txt"], tmp_path / "index", training_corpus=Corpus.open(shards))
    assert not index.validation_level and index.find_documents("other") == [0]


def test_documents_are_read_in_pieces_that_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "PIECE", 16)
    text = "é語🙂" * 20 + " some words\nand lines " + "x" * 40
    index = build(tmp_path, [text])
    pieces = list(index.iter_chunks(0))
    assert "".join(piece for _, piece in pieces) == text and len(pieces) > 5
    assert all(text.encode()[at:].startswith(piece.encode()) for at, piece in pieces)
    assert [trim_partial_character("aé".encode()[:n]) for n in range(4)] == [b"", b"a", b"a", "aé".encode()]
