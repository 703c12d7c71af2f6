"""A prepared corpus holds every token, splits steadily, is made once, and tells of everything it left out."""

import gzip
import json
import os

import numpy as np
import pytest
from nextword.errors import CorruptFileError, NextwordError, UsageError
from nextword.files import read_jsonl
from nextword.text import corpus as corpus_module
from nextword.text import shards
from nextword.text.corpus import Corpus, prepare
from nextword.text.tokenizer import Tokenizer

from needs import DATA


def article(i, length=40):
    return f"Article {i}.\n" + " ".join(f"word{(i * 31 + j * j) % 97}" for j in range(length)) + "\nIts end.\n"


def write(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder


def documents(corpus, split):
    """The texts of a split, told apart by the end-of-text token."""
    row = corpus.tokens(split)
    ids = row.read(0, len(row))
    ends = np.flatnonzero(ids == corpus.tokenizer.eos_id)
    assert len(ids) == 0 or ends[-1] == len(ids) - 1
    return [corpus.tokenizer.decode(part) for part in np.split(ids, ends + 1)[:-1]]


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "texts", {f"{i:03}.txt": article(i) for i in range(60)})


def test_no_token_is_lost_and_documents_are_told_apart(folder, tmp_path):
    corpus = prepare([folder], tmp_path / "out")
    train, validation = documents(corpus, "train"), documents(corpus, "validation")
    assert sorted(train + validation) == sorted(article(i) for i in range(60))
    assert train == [t for t in map(article, range(60)) if t in set(train)]  # in the order of the files
    assert 1 <= len(validation) < 20
    for part, texts in ((corpus.train, train), (corpus.validation, validation)):
        split = "train" if part is corpus.train else "validation"
        assert part.documents == len(texts)
        assert part.num_characters == part.bytes == sum(map(len, texts))
        assert part.tokens == len(corpus.tokens(split))
    assert (corpus.documents, corpus.duplicates, corpus.problems["total"]) == (60, 0, 0)
    assert np.load(tmp_path / "out/train-00000.npy", allow_pickle=False).dtype == np.uint16


def test_the_same_text_gives_the_same_bytes(folder, tmp_path):
    for name in "ab":
        prepare([folder], tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == [
        "nextword.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "train-00000.npy",
        "train-documents.bin",
        "validation-00000.npy",
    ]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert Corpus.open(tmp_path / "a").fingerprint == Corpus.open(tmp_path / "b").fingerprint


def test_a_second_run_uses_the_shards(folder, tmp_path, monkeypatch):
    first = prepare([folder], tmp_path / "out")
    monkeypatch.setattr(corpus_module, "_prepare", None)  # would fail if it were called
    said = []
    assert prepare([folder], tmp_path / "out", say=said.append).fingerprint == first.fingerprint
    assert "used as they are" in said[0]
    for path in folder.iterdir():  # other times, the same text
        os.utime(path, ns=(1, 1))
    assert prepare([folder], tmp_path / "out").fingerprint == first.fingerprint
    moved = folder.rename(tmp_path / "moved")
    assert prepare([moved], tmp_path / "out").fingerprint == first.fingerprint


@pytest.mark.parametrize("change", ["text", "file", "settings", "damage"])
def test_any_difference_prepares_anew(change, folder, tmp_path):
    first = prepare([folder], tmp_path / "out")
    said: list[str] = []
    tokenizer = "char" if change == "settings" else "bpe"
    if change == "text":
        (folder / "007.txt").write_text(article(8).replace("8", "9"))
    elif change == "file":
        (folder / "007.txt").rename(folder / "7.txt")
    elif change == "damage":
        shard = tmp_path / "out/train-00000.npy"
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        with pytest.raises(CorruptFileError, match="train-00000"):
            Corpus.open(tmp_path / "out")
    second = prepare([folder], tmp_path / "out", tokenizer=tokenizer, say=said.append)
    assert "anew" in said[0]
    if change == "damage":
        assert second.fingerprint == first.fingerprint
    else:
        assert second.fingerprint != first.fingerprint
    assert not (tmp_path / ".out.partial").exists() and not (tmp_path / ".out.old").exists()


def test_adding_files_keeps_the_split_of_the_others(folder, tmp_path):
    before = prepare([folder], tmp_path / "a")
    write(folder, {f"0{i}-more.txt": article(i) for i in range(100, 160)})
    after = prepare([folder], tmp_path / "b")
    old = {article(i) for i in range(60)}
    assert set(documents(after, "validation")) & old == set(documents(before, "validation"))


def test_a_growing_corpus_moves_documents_to_training_only(tmp_path):
    survey = corpus_module.Survey()
    for i in range(3000):
        survey.add(corpus_module.hashlib.blake2b(str(i).encode(), digest_size=16).digest(), True, 1, 1)
    held_out = []
    for size in (10**6, 10**7, 10**8):
        survey.size = size
        held_out.append({i for i in range(3000) if survey.split_of(i) == "validation"})
    assert held_out[0] > held_out[1] > held_out[2]
    assert [round(len(h) / 30) for h in held_out] == pytest.approx([10, 5, 1], abs=1.5)


def test_one_document_at_least_is_held_out(tmp_path):
    survey = corpus_module.Survey()
    for i in range(30):
        survey.add(bytes([200 + i]) * 16, True, 1, 1)
    assert [i for i in range(30) if survey.split_of(i) == "validation"] == [0]


@pytest.mark.parametrize("tokenizer", ["bpe", "char"])
def test_few_documents_are_cut_at_nine_tenths_of_their_characters(tokenizer, tmp_path):
    texts = {"a.txt": "é" * 7 + article(1, 3000), "b.txt": article(2), "c.txt": "xyz"}
    texts["long.txt"] = article(3, 30_000)  # several pieces long
    corpus = prepare([write(tmp_path / "in", texts)], tmp_path / "out", tokenizer=tokenizer)
    cuts = [(t[: len(t) * 9 // 10], t[len(t) * 9 // 10 :]) for t in texts.values()]
    assert documents(corpus, "train") == [c[0] for c in cuts]
    if tokenizer == "bpe":
        assert documents(corpus, "validation") == [c[1] for c in cuts]
    assert corpus.train.num_characters == sum(len(c[0]) for c in cuts)
    assert corpus.train.bytes == sum(len(c[0].encode()) for c in cuts)


def test_duplicates_are_dropped_and_counted(folder, tmp_path):
    write(folder, {"copy.txt": article(3), "windows.md": article(4).replace("\n", "\r\n")})
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": article(i)}) + "\n" for i in (5, 5, 1000)))
    corpus = prepare([folder, folder / "000.txt"], tmp_path / "out")
    assert (corpus.documents, corpus.duplicates) == (61, 5)
    assert len(documents(corpus, "train")) + len(documents(corpus, "validation")) == 61


def test_formats_and_names_mix(tmp_path):
    inside = write(
        tmp_path / "in", {"a.txt": article(1), "b.md": article(2), "c.csv": "n,text\n1,row one\n2,row two\n"}
    )
    (inside / "d.jsonl.gz").write_bytes(gzip.compress(b'{"story": "row three"}\n'))
    write(inside / "deeper", {"e.tsv": "text\trest\nrow four\t1\n"})
    other = write(tmp_path / "other", {"f.txt": article(6)})
    corpus = prepare([inside, other / "f.txt"], tmp_path / "out", tokenizer="char")
    assert [s["name"] for s in corpus.metadata["sources"]] == [
        "a.txt",
        "b.md",
        "c.csv",
        "d.jsonl.gz",
        "deeper/e.tsv",
        "f.txt",
    ]
    assert corpus.documents == 7


def test_python_docs_and_a_folder_mix(folder, tmp_path, monkeypatch):
    library = write(tmp_path / "lib", {"one.py": '"""The one module."""', "two.py": "x = 1"})
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    corpus = prepare([folder, "python-docs"], tmp_path / "out")
    assert corpus.documents == 61
    assert "# one\n\nThe one module.\n" in documents(corpus, "train") + documents(corpus, "validation")


def test_text_that_looks_like_a_marker_stays_text(tmp_path):
    texts = {f"{i}.txt": f"{article(i)}<|endoftext|><|pad|><|unk|>" for i in range(25)}
    write(tmp_path / "in", texts)
    for tokenizer in ("bpe", "char"):
        corpus = prepare([tmp_path / "in"], tmp_path / tokenizer, tokenizer=tokenizer)
        assert sorted(documents(corpus, "train") + documents(corpus, "validation")) == sorted(texts.values())
        row = corpus.tokens("train")
        assert int((row.read(0, len(row)) == 0).sum()) == corpus.train.documents


def test_reading_across_shards(folder, tmp_path, monkeypatch):
    whole = prepare([folder], tmp_path / "a").tokens("train")
    monkeypatch.setattr(shards, "SHARD_TOKENS", 1000)
    monkeypatch.setattr(corpus_module, "BATCH", 3000)
    split = prepare([folder], tmp_path / "b").tokens("train")
    assert len(list((tmp_path / "b").glob("train-*.npy"))) == -(-len(whole) // 1000)
    assert len(split) == len(whole)
    everything = whole.read(0, len(whole))
    for start, count in [
        (0, len(whole)),
        (999, 2),
        (1000, 1000),
        (500, 2500),
        (len(whole) - 1, 1),
        (len(whole), 0),
        (0, 0),
    ]:
        part = split.read(start, count)
        assert part.dtype == np.int64 and np.array_equal(part, everything[start : start + count])
    for start, count in [(-1, 2), (0, len(whole) + 1), (5, -1)]:
        with pytest.raises(IndexError):
            split.read(start, count)


def test_large_vocabularies_are_written_in_four_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: [np.full(3, 70_000, np.uint32) for _ in texts])
    ready = prepare([folder], tmp_path / "a").tokenizer
    monkeypatch.setattr(corpus_module, "train_bpe", lambda *args: (setattr(ready, "vocab_size", 70_001), ready)[1])
    row = prepare([folder], tmp_path / "b").tokens("train")
    assert row.read(0, 4).tolist() == [70_000, 70_000, 70_000, 0]


def test_an_existing_tokenizer_is_used(folder, tmp_path):
    first = prepare([folder], tmp_path / "a", vocab_size=270)
    assert first.tokenizer.vocab_size == 270
    second = prepare([folder / "001.txt"], tmp_path / "b", tokenizer=tmp_path / "a")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    assert second.tokenizer.vocab_size == 270
    with pytest.raises(UsageError, match="vocab-size"):
        prepare([folder], tmp_path / "c", tokenizer="char", vocab_size=500)


def test_the_tokenizer_never_sees_the_validation_part(folder, tmp_path):
    write(folder, {f"{i}.txt": article(i) + chr(0x4E00 + i) for i in range(60)})
    corpus = prepare([folder], tmp_path / "out", tokenizer="char")
    assert corpus.validation.unk_id > 0 and corpus.train.unk_id == 0


def test_problems_are_told_and_kept(folder, tmp_path):
    (folder / "bad.txt").write_bytes(b"plenty of good text here \xff and there")
    (folder / "binary.md").write_bytes(b"\0\1\2")
    (folder / "rows.jsonl").write_text('{"text": "fine"}\n{"text": \n[]\n')
    (folder / "picture.png").write_bytes(b"")
    said = []
    corpus = prepare([folder], tmp_path / "out", say=said.append)
    assert corpus.documents == 62 and corpus.problems["total"] == 4
    kept = read_jsonl(tmp_path / "out/problems.jsonl")
    assert [(p["path"].rsplit(os.sep, 1)[-1].rsplit("/", 1)[-1], p["line"], p["count"]) for p in kept] == [
        ("texts", None, 1),
        ("bad.txt", 1, 1),
        ("binary.md", None, 1),
        ("rows.jsonl", 2, 1),
        ("rows.jsonl", 3, 1),
    ]
    assert any("binary.md: not text" in line for line in said) and any(".png" in line for line in said)
    with pytest.raises(NextwordError, match=r"bad\.txt line 1: not valid UTF-8"):
        prepare([folder], tmp_path / "out", strict=True)  # shards that are there do not excuse it
    assert Corpus.open(tmp_path / "out").fingerprint == corpus.fingerprint


def test_nothing_usable_says_what_was_there_and_what_to_do(tmp_path):
    write(tmp_path / "in", {"empty.txt": "", "a.png": "x", "b.zip": "y"})
    with pytest.raises(NextwordError, match=r"(?s)no text was found.*empty\.txt.*\.jsonl"):
        prepare([tmp_path / "in"], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if "lock" not in p.name] == ["in"]
    with pytest.raises(NextwordError, match="too little"):
        prepare([write(tmp_path / "one", {"a.txt": "x"})], tmp_path / "out")


def test_a_file_that_changes_meanwhile_is_named(folder, tmp_path):
    def meddle(stage, done, total):
        if stage == "tokenizer":
            (folder / "059.txt").write_text("another text")

    with pytest.raises(NextwordError, match=r"059\.txt: changed while"):
        prepare([folder], tmp_path / "out", progress=meddle)
    assert not (tmp_path / "out").exists()


def test_places_that_are_not_ours_are_left_alone(folder, tmp_path):
    with pytest.raises(UsageError, match="not a prepared corpus"):
        prepare([folder], folder)
    (tmp_path / "made").mkdir()
    (tmp_path / "made/nextword.json").write_text('{"kind": "run", "files": {}}')
    with pytest.raises(UsageError, match="something else"):
        prepare([folder], tmp_path / "made")
    with pytest.raises(NextwordError, match="not a prepared corpus"):
        Corpus.open(tmp_path / "made")
    (tmp_path / "made/nextword.json").write_text('{"kind": "corpus", "version": 1, "files": {}}')
    with pytest.raises(NextwordError):
        Corpus.open(tmp_path / "made")
    (tmp_path / "empty").mkdir()
    assert prepare([folder], tmp_path / "empty").documents == 60


def test_shards_inside_the_corpus_folder_are_not_read_as_text(folder, tmp_path):
    write(folder, {"bad.jsonl": "{"})  # so that there is a problems.jsonl
    first = prepare([folder], folder / "shards")
    second = prepare([folder], folder / "shards")
    assert second.fingerprint == first.fingerprint and second.documents == 60


def test_progress_runs_to_the_end_of_each_stage(folder, tmp_path):
    told = []
    prepare([folder], tmp_path / "out", progress=lambda *step: told.append(step))
    total = sum(p.stat().st_size for p in folder.iterdir())
    assert [step for step in told if step[1] == total] == [
        (s, total, total) for s in ("reading", "tokenizer", "encoding")
    ]
    assert all(done <= of for _, done, of in told)


def test_real_small_languages(tmp_path):
    if not DATA.is_dir():
        pytest.skip(f"needs data: {DATA} is not there; set NEXTWORD_DATA")
    corpus = prepare([DATA / "tinyshakespeare"], tmp_path / "shakespeare", tokenizer="char")
    assert (corpus.train.num_characters, corpus.validation.num_characters) == (1_003_854, 111_540)
    assert corpus.tokenizer.vocab_size == 65 + 3 and corpus.validation.unk_id == 0
    corpus = prepare([DATA / "small_languages/wolof"], tmp_path / "wolof")
    assert corpus.documents == corpus.train.documents + corpus.validation.documents > 20
