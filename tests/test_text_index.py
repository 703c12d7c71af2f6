"""The corpus index: equal to a brute-force search on repetitive texts, in bounded memory, reused, and safe with other files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextword.audit import suffix_array, text_index
from nextword.audit.text_index import CorpusIndex, build_index
from nextword.common.console import Console
from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.data.corpus import Corpus
from nextword.data.prepare import prepare

QUIET = Console(quiet=True)
# Small alphabets and repetition, so that most passages have several occurrences; characters of one to four bytes.
WORDS = st.text(alphabet="ab é語🙂\n", min_size=1, max_size=6)
REPEATED = st.builds(lambda word, count: word * count, WORDS, st.sampled_from([1, 1, 2, 3, 40]))
TEXTS = st.lists(REPEATED, max_size=6).map("".join)
REUSED_FOLDER = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def build(folder: Path, texts: list[str]) -> CorpusIndex:
    """Index documents that are rows of a file. Texts of whitespace only are no documents."""
    folder.mkdir(exist_ok=True)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return build_index([folder / "texts.jsonl"], folder / "index", console=QUIET)


def brute_force(texts: list[str], query: str, min_bytes: int) -> list[tuple[int, int]]:
    """The start and end byte of every maximal match."""
    spans, end, furthest = [], 0, -1
    for start in range(len(query)):
        end = max(end, start)
        while end < len(query) and any(query[start : end + 1] in text for text in texts):
            end += 1
        span = len(query[:start].encode()), len(query[:end].encode())
        if end > furthest and span[1] - span[0] >= min_bytes:
            spans.append(span)
        furthest = max(furthest, end)
    return spans


def spans(index: CorpusIndex, query: str, min_bytes: int) -> list[tuple[int, int]]:
    return [(match.start, match.end) for match in index.find_matches(query, min_bytes)]


@REUSED_FOLDER
@given(
    st.lists(TEXTS, min_size=1, max_size=6),
    st.data(),
    st.sampled_from([2**20, 64]),
    st.sampled_from([256, 2]),
    st.sampled_from([1, 5]),
)
def test_matches_equal_brute_force(tmp_path, monkeypatch, texts, data, in_memory, periodic, min_bytes):
    monkeypatch.setattr(suffix_array, "MAX_SUFFIXES_IN_MEMORY", in_memory)  # small: regions are partitioned on disk
    monkeypatch.setattr(suffix_array, "MIN_PERIODIC_CANDIDATES", periodic)
    texts = ["a", *texts]
    index = build(tmp_path, texts)
    documents = [text for text in texts if text.strip()]
    parts = data.draw(st.lists(st.one_of(REPEATED, st.sampled_from(texts)), max_size=5))
    query = "".join(part[data.draw(st.integers(0, 3)) :] for part in parts)
    assert spans(index, query, min_bytes) == brute_force(documents, query, min_bytes)
    for match in index.find_matches(query, min_bytes):
        found = index.read_bytes(match.document, match.offset, match.end - match.start)
        assert found == query.encode()[match.start : match.end]
    passage = query[:40]
    assert index.find_documents(passage) == [i for i, text in enumerate(documents) if passage and passage in text]


@REUSED_FOLDER
@given(st.binary(max_size=60))
def test_invalid_utf8_queries(tmp_path, data):
    index = build(tmp_path, ["abc é語🙂 and so on", "ÿþ and so forth"])
    for match in index.find_matches(data, 1):
        assert index.read_bytes(match.document, match.offset, match.end - match.start) == data[match.start : match.end]


def test_long_periodic_runs(tmp_path):
    texts = [" " * 50_000 + "x", "\n".join(" " * 70 + str(i * 7) for i in range(500)), "-" * 100]
    index = build(tmp_path, texts)
    for query in (" " * 700, " " * 90 + "x", " " * 70 + "777\n" + " " * 66 + "5", "-" * 130, " " * 500 + "xy"):
        assert spans(index, query, 8) == brute_force(texts, query, 8)


def test_sorting_on_disk_equals_sorting_in_memory(tmp_path, monkeypatch):
    texts = [(f"the {i % 7} words of a text, " * 40)[i:] for i in range(12)]
    index = build(tmp_path / "a", texts)
    monkeypatch.setattr(suffix_array, "MAX_SUFFIXES_IN_MEMORY", 100)
    monkeypatch.setattr(suffix_array, "COPY_CHUNK", 64)
    on_disk = build(tmp_path / "b", texts)
    positions = index.suffix_array.positions
    assert np.array_equal(positions, on_disk.suffix_array.positions)
    text = index.text.bytes.tobytes()
    keys = [text[at : at + suffix_array.SORT_DEPTH] for at in positions.tolist()]
    assert keys == sorted(keys) and len(keys) == sum(map(len, texts))


def test_documents_are_named_by_file_and_line(tmp_path):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_text("Nothing of note is written here.\r\n")
    (tmp_path / "in/deeper/b.csv").write_text('id,text\n1,"one row,\nin two lines"\n2,the passage that was planted\n')
    index = build_index([tmp_path / "in"], tmp_path / "index", console=QUIET)
    [match] = index.find_matches("Somebody wrote the passage that was planted, and more.")
    assert (index.document_name(match.document), match.start, match.offset) == ("deeper/b.csv line 4", 15, 0)
    assert [index.document_name(document) for document in index.find_documents("written here.\n")] == ["a.txt"]
    assert index.longest_match("of note is seen") == (0, 11, 0, 8)
    assert index.find_documents("") == [] and index.find_matches("") == [] and index.longest_match("日本") is None


def test_an_index_is_reused_until_the_text_changes_or_it_is_damaged(tmp_path):
    texts, suffixes = tmp_path / "in/texts.jsonl", tmp_path / "in/index/suffixes.bin"
    index = build(tmp_path / "in", ["one text", "another text"])
    built_at = suffixes.stat().st_mtime_ns
    os.utime(texts, ns=(1, 1))
    assert build_index([texts], index.path, console=QUIET).find_documents("another") == [1]
    assert suffixes.stat().st_mtime_ns == built_at
    data = bytearray(suffixes.read_bytes())
    data[4] ^= 1
    suffixes.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"suffixes\.bin"):
        CorpusIndex.open(index.path)
    assert build_index([texts], index.path, console=QUIET).find_documents("another") == [1]
    texts.write_text('{"text": "a third text"}\n')
    assert build_index([texts], index.path, console=QUIET).find_documents("another") == []
    assert index.num_text_bytes == len("one textanother text")


def test_other_files_are_never_replaced(tmp_path, shards):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("mine")
    for out in (tmp_path / "full", tmp_path / "a.txt", shards):
        with pytest.raises(UsageError, match="not an index"):
            build_index([tmp_path / "a.txt"], out, console=QUIET)
    with pytest.raises(NextwordError, match="not a corpus index"):
        CorpusIndex.open(shards)
    with pytest.raises(UsageError, match="no such file"):
        build_index([tmp_path / "gone"], tmp_path / "index", console=QUIET)
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(NextwordError, match="no text was found"):
        build_index([tmp_path / "empty.txt"], tmp_path / "index", console=QUIET)
    assert not (tmp_path / "index").exists()


def test_held_out_documents_are_not_searched(texts, shards, tmp_path):
    corpus = Corpus.open(shards)
    index = build_index([texts], tmp_path / "index", training_corpus=corpus, console=QUIET)
    row = corpus.tokens("validation")
    ids = row.read(0, len(row))
    ends = np.flatnonzero(ids == corpus.tokenizer.eos_id) + 1
    validation_texts = {corpus.tokenizer.decode(part) for part in np.split(ids, ends)[:-1]}
    held_out = np.flatnonzero(index.documents["learned"] < index.documents["end"]).tolist()
    assert index.has_held_out and validation_texts == {index.read_bytes(i).decode() for i in held_out}
    assert all(index.documents[i]["learned"] == index.documents[i]["begin"] for i in held_out)
    passages = {index.read_bytes(i).decode()[:3000][-400:]: i for i in range(len(index))}
    for passage, document in passages.items():
        assert (document in index.find_documents(passage)) == (document not in held_out)
    everything = build_index([texts], tmp_path / "other", console=QUIET)
    assert not everything.has_held_out and all(everything.find_documents(passage) for passage in passages)


def test_the_last_tenth_of_few_documents_is_not_searched(tmp_path):
    (tmp_path / "in").mkdir()
    words = [f"word{i * i % 977}" for i in range(3000)]
    (tmp_path / "in/a.txt").write_text("é" * 11 + " ".join(words))
    corpus = prepare([tmp_path / "in"], tmp_path / "shards", vocab_size=300)
    index = build_index([tmp_path / "in"], tmp_path / "index", training_corpus=corpus, console=QUIET)
    row = corpus.tokens("train")
    training_text = corpus.tokenizer.decode(row.read(0, len(row) - 1)).encode()
    [document] = index.documents
    assert index.read_bytes(0)[: int(document["learned"])] == training_text
    assert len(index.suffix_array) == len(training_text.decode())


def test_a_corpus_other_than_the_training_text_is_searched_whole(shards, tmp_path):
    (tmp_path / "a.txt").write_text("some other text")
    index = build_index([tmp_path / "a.txt"], tmp_path / "index", training_corpus=Corpus.open(shards), console=QUIET)
    assert not index.has_held_out and index.find_documents("other") == [0]


def test_chunks_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(text_index, "CHUNK_BYTES", 16)
    text = "é語🙂" * 20 + " some words\nand lines " + "x" * 40
    chunks = list(build(tmp_path, [text]).iter_chunks(0))
    assert "".join(chunk for _, chunk in chunks) == text and len(chunks) > 5
    assert all(text.encode()[offset:].startswith(chunk.encode()) for offset, chunk in chunks)
