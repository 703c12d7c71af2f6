"""A prepared corpus: complete, deduplicated, split by hash, reproducible, and reused while nothing has changed."""

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import sqlite3
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models
from tokenizers.processors import TemplateProcessing

from needs import DATA
from nextword.common.console import Console
from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.common.fs import read_jsonl, verify_tree
from nextword.data import corpus as corpus_module
from nextword.data import prepare as prepare_module
from nextword.data import scan as scan_module
from nextword.data.corpus import SPLITS, Corpus
from nextword.data.prepare import prepare
from nextword.data.scan import DocumentTable, HeldOutDocuments, choose_held_out
from nextword.data.tokenizer import Tokenizer
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.pipeline.evaluators import save_model_dir
from nextword.pipeline.language_model import LanguageModel, load


def article(i, length=40):
    return f"Article {i}.\n" + " ".join(f"word{(i * 31 + j * j) % 97}" for j in range(length)) + "\nIts end.\n"


def write(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder


def document_texts(corpus, split):
    """The texts of a split, separated at the end-of-text token."""
    tokens = corpus.tokens(split)
    ids = tokens.read(0, len(tokens))
    ends = np.flatnonzero(ids == corpus.tokenizer.eos_id)
    assert len(ids) == 0 or ends[-1] == len(ids) - 1
    return [corpus.tokenizer.decode(document) for document in np.split(ids, ends + 1)[:-1]]


def cut_documents(corpus):
    return corpus.manifest["held_out"]["cut"]


def all_texts(corpus):
    return document_texts(corpus, "train") + document_texts(corpus, "validation")


@pytest.fixture(scope="module")
def articles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents, which no test changes."""
    return write(tmp_path_factory.mktemp("articles") / "texts", {f"{i:03}.txt": article(i) for i in range(60)})


@pytest.fixture(scope="module")
def prepared(articles) -> Corpus:
    """The corpus of `articles`, which no test changes."""
    return prepare([articles], articles.with_name("prepared"))


@pytest.fixture
def folder(articles, tmp_path):
    """A copy of `articles` for a test that changes it."""
    return Path(shutil.copytree(articles, tmp_path / "texts"))


@pytest.fixture
def out(prepared, tmp_path):
    """A copy of `prepared`, for a test that prepares `folder` once more."""
    return Path(shutil.copytree(prepared.path, tmp_path / "out"))


# ---------------------------------------------------------------- content


def test_every_document_is_in_one_split_and_complete(prepared):
    train, validation = document_texts(prepared, "train"), document_texts(prepared, "validation")
    assert sorted(train + validation) == sorted(article(i) for i in range(60))
    assert train == [text for text in map(article, range(60)) if text in set(train)]  # in the order of the files
    assert 1 <= len(validation) < 20
    for split, stats, texts in (("train", prepared.train, train), ("validation", prepared.validation, validation)):
        assert stats.documents == len(texts)
        assert stats.characters == stats.bytes == sum(map(len, texts))
        assert stats.tokens == len(prepared.tokens(split))
    assert (prepared.documents, prepared.duplicates, prepared.problems["total"]) == (60, 0, 0)
    assert np.load(prepared.path / "train-00000.npy", allow_pickle=False).dtype == np.uint16


def test_the_same_text_gives_the_same_files(articles, prepared, tmp_path):
    again = prepare([articles], tmp_path / "again")
    files = sorted(path.name for path in again.path.iterdir())
    assert files == [
        "nextword.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "train-00000.npy",
        "train-documents.bin",
        "validation-00000.npy",
    ]
    assert all((again.path / name).read_bytes() == (prepared.path / name).read_bytes() for name in files)
    assert again.fingerprint == prepared.fingerprint


def test_duplicates_are_dropped_and_counted(folder, tmp_path):
    write(folder, {"copy.txt": article(3), "windows.md": article(4).replace("\n", "\r\n")})
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": article(i)}) + "\n" for i in (5, 5, 1000)))
    corpus = prepare([folder, folder / "000.txt"], tmp_path / "out", tokenizer="char")
    assert (corpus.documents, corpus.duplicates) == (61, 5)
    assert len(all_texts(corpus)) == 61


def test_formats_and_names_can_be_mixed(tmp_path):
    inside = write(
        tmp_path / "in", {"a.txt": article(1), "b.md": article(2), "c.csv": "n,text\n1,row one\n2,row two\n"}
    )
    (inside / "d.jsonl.gz").write_bytes(gzip.compress(b'{"story": "row three"}\n'))
    write(inside / "deeper", {"e.tsv": "text\trest\nrow four\t1\n"})
    other = write(tmp_path / "other", {"f.txt": article(6)})
    corpus = prepare([inside, other / "f.txt"], tmp_path / "out", tokenizer="char")
    names = ["a.txt", "b.md", "c.csv", "d.jsonl.gz", "deeper/e.tsv", "f.txt"]
    assert [source["name"] for source in corpus.manifest["sources"]] == names
    assert corpus.documents == 7


def test_python_docs_and_a_folder_can_be_mixed(articles, tmp_path, monkeypatch):
    library = write(tmp_path / "lib", {"one.py": '"""The one module."""', "two.py": "x = 1"})
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    corpus = prepare([articles, "python-docs"], tmp_path / "out", tokenizer="char")
    assert corpus.documents == 61
    assert "# one\n\nThe one module.\n" in all_texts(corpus)


@pytest.mark.parametrize("tokenizer", ["bpe", "char"])
def test_text_that_looks_like_a_special_token_stays_text(tokenizer, tmp_path):
    texts = {f"{i}.txt": f"{article(i)}<|endoftext|><|pad|><|unk|>" for i in range(25)}
    corpus = prepare([write(tmp_path / "in", texts)], tmp_path / "out", tokenizer=tokenizer)
    assert sorted(all_texts(corpus)) == sorted(texts.values())
    tokens = corpus.tokens("train")
    assert int((tokens.read(0, len(tokens)) == 0).sum()) == corpus.train.documents


def test_real_small_languages(tmp_path):
    if not DATA.is_dir():
        pytest.skip(f"needs data: {DATA} is not there; set NEXTWORD_DATA")
    corpus = prepare([DATA / "tinyshakespeare"], tmp_path / "shakespeare", tokenizer="char")
    assert (corpus.train.characters, corpus.validation.characters) == (1_003_854, 111_540)
    assert corpus.tokenizer.vocab_size == 65 + 3 and corpus.validation.unknown == 0
    for language in ("wolof", "swahili"):
        corpus = prepare([DATA / "small_languages" / language], tmp_path / language)
        assert (
            corpus.documents == corpus.train.documents + corpus.validation.documents - len(cut_documents(corpus)) > 20
        )
        assert 0.08 < corpus.validation.bytes / (corpus.train.bytes + corpus.validation.bytes) < 0.12


# ---------------------------------------------------------------- the validation split


def hold_out(sizes, validation=None, test=None):
    """The choice among documents of some bytes, and the part of each."""
    keys = [hashlib.blake2b(str(i).encode(), digest_size=16).digest() for i in range(len(sizes))]
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        table = DocumentTable(connection)
        assert all(table.add(key, size) for key, size in zip(keys, sizes, strict=True))
        held_out = choose_held_out(table, len(sizes), sum(sizes), validation, test)
    return held_out, [held_out.part_of(key.hex()) for key in keys]


def shares(sizes, held_out, parts):
    """The share of the text in the validation and in the test set."""
    total, cut = sum(sizes), sum(size for size, part in zip(sizes, parts, strict=True) if part == "cut")
    whole = [sum(size for size, part in zip(sizes, parts, strict=True) if part == split) for split in SPLITS[1:]]
    return [(size + cut * fraction) / total for size, fraction in zip(whole, held_out.fractions, strict=True)]


@settings(max_examples=150)
@given(
    st.lists(st.one_of(st.integers(1, 30), st.integers(1, 3000), st.integers(1, 10**6)), min_size=1, max_size=60),
    st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.5]),
    st.sampled_from([0.0, 0.01, 0.05]),
)
def test_the_held_out_share_is_what_is_asked_whatever_the_lengths_of_the_documents(sizes, validation, test):
    held_out, parts = hold_out(sizes, validation, test)
    validation_share, test_share = shares(sizes, held_out, parts)
    assert 0.8 * validation - 1e-9 <= validation_share <= 1.2 * validation + 1e-9
    assert 0.5 * test - 1e-9 <= test_share <= 1.5 * test + 1e-9
    if len(sizes) < 20:
        assert set(parts) == {"cut"}


@pytest.mark.parametrize(
    ("size", "expected"), [(4e6, (0.1, 0.0)), (6e6, (0.1, 0.05)), (2e7, (0.05, 0.05)), (2e8, (0.01, 0.01))]
)
def test_the_default_shares_depend_on_the_amount_of_text(size, expected):
    sizes = [int(size / 2000)] * 2000
    held_out, parts = hold_out(sizes)
    assert held_out.fractions == expected and "cut" not in parts
    assert shares(sizes, held_out, parts) == pytest.approx(expected, rel=0.06)
    assert hold_out(sizes, validation=0.02)[0].fractions == (0.02, 0.02 if size >= 5e6 else 0.0)


def test_more_text_moves_few_documents_between_the_sets():
    sizes = [500 + 37 * i % 991 for i in range(1000)]
    before, after = hold_out(sizes)[1], hold_out([*sizes, *sizes[:100]])[1]
    moved = sum(a != b for a, b in zip(before, after, strict=False))
    assert moved <= 8 and before.count("validation") > 80  # a tenth more text


def test_a_long_document_is_cut_and_the_others_are_held_out_whole():
    sizes = [1000] * 100 + [100_000]
    held_out, parts = hold_out(sizes)
    assert parts[-1] == "cut" and set(parts[:-1]) == {"train", "validation"}
    assert held_out.cut_points(1001) == (0, 900, 1001, 1001)


def test_corpora_of_the_first_version_keep_their_split():
    keys = [hashlib.blake2b(str(i).encode(), digest_size=16).hexdigest() for i in range(3000)]
    sizes = [10**6, 10**7, 10**8]
    splits = [HeldOutDocuments.of_version_1(sorted(keys), size) for size in sizes]
    counts = [sum(split.part_of(key) == "validation" for key in keys) for split in splits]
    assert [round(count / 30) for count in counts] == pytest.approx([10, 5, 1], abs=1.5)
    assert HeldOutDocuments.of_version_1(sorted(keys)[:19], 100).part_of(keys[0]) in ("cut", "train")
    few = HeldOutDocuments.of_version_1(["f" * 32, *["f" * 31 + str(i) for i in range(9)]] * 3, 10)
    assert few.part_of("f" * 32) == "validation"  # at least one document


def test_own_validation_and_test_sets(folder, tmp_path):
    own = write(tmp_path / "own", {"v.txt": article(500), "t.txt": article(501), "again.txt": article(3)})
    messages = []
    options = {"validation": [own / "v.txt", own / "again.txt"], "log": messages.append}
    corpus = prepare([folder], tmp_path / "out", test=[own / "t.txt"], **options)
    assert document_texts(corpus, "validation") == [article(500), article(3)]
    assert document_texts(corpus, "test") == [article(501)]
    assert sorted(document_texts(corpus, "train")) == sorted(article(i) for i in range(60) if i != 3)
    assert any("1 documents that are in the validation or test set, too" in message for message in messages)
    assert [line.partition(",")[0] for line in corpus.describe_held_out()] == [
        "validation set: 2 documents (v.txt",
        "test set: 1 documents (t.txt)",
    ]
    assert set(corpus.manifest["held_out"]["fractions"]) == {0.0}
    messages.clear()
    prepare([folder], tmp_path / "out", test=[own / "t.txt"], **options)
    assert "unchanged" in messages[-1]
    prepare([folder], tmp_path / "out", validation=[own / "v.txt"], log=messages.append)
    assert any("other settings" in message for message in messages)
    only_test = prepare([folder], tmp_path / "only-test", test=[own / "t.txt"])
    assert 3 <= only_test.validation.documents <= 9 and only_test.test.documents == 1
    (own / "empty.txt").write_text(" ")
    with pytest.raises(NextwordError, match="no text in what --validation names"):
        prepare([folder], tmp_path / "other", validation=[own / "empty.txt"])
    with pytest.raises(UsageError, match="exclude each other"):
        prepare([folder], tmp_path / "other", validation=[own / "v.txt"], validation_fraction=0.1)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_end_of_each_of_a_few_documents_is_the_validation_and_the_test_set(tmp_path, monkeypatch, num_shards):
    monkeypatch.setattr(scan_module, "TEST_BYTES", 1000)
    texts = {"a.txt": "é" * 7 + article(1, 3000), "b.txt": article(2), "c.txt": "xyz", "long.txt": article(3, 30_000)}
    folder = write(tmp_path / "in", texts)
    corpus = prepare([folder], tmp_path / "out", shard=f"1/{num_shards}", validation_fraction=0.2)
    ends = [[len(text) * number // 100 for number in (0, 75, 95, 100)] for text in texts.values()]
    for i, split in enumerate(SPLITS):
        expected = [text[end[i] : end[i + 1]] for text, end in zip(texts.values(), ends, strict=True)]
        assert document_texts(corpus, split) == [text for text in expected if text]
    assert corpus.describe_held_out()[1].startswith("test set: the end of 4 documents, 5.")


@pytest.mark.parametrize("tokenizer", ["bpe", "char"])
def test_a_few_documents_are_cut_at_nine_tenths_of_their_characters(tokenizer, tmp_path):
    texts = {"a.txt": "é" * 7 + article(1, 3000), "b.txt": article(2), "c.txt": "xyz"}
    texts["long.txt"] = article(3, 30_000)  # several chunks
    corpus = prepare([write(tmp_path / "in", texts)], tmp_path / "out", tokenizer=tokenizer)
    train = [text[: len(text) * 9 // 10] for text in texts.values()]
    assert document_texts(corpus, "train") == train
    if tokenizer == "bpe":
        assert document_texts(corpus, "validation") == [text[len(text) * 9 // 10 :] for text in texts.values()]
    assert corpus.train.characters == sum(map(len, train))
    assert corpus.train.bytes == sum(len(text.encode()) for text in train)


def test_the_tokenizer_is_trained_on_the_training_split_only(folder, tmp_path):
    write(folder, {f"{i}.txt": article(i) + chr(0x4E00 + i) for i in range(60)})
    corpus = prepare([folder], tmp_path / "out", tokenizer="char")
    assert corpus.validation.unknown > 0 and corpus.train.unknown == 0


# ---------------------------------------------------------------- shards


def test_reading_across_shards(articles, prepared, tmp_path, monkeypatch):
    whole = prepared.tokens("train")
    monkeypatch.setattr(corpus_module, "SHARD_TOKENS", 1000)
    monkeypatch.setattr(corpus_module, "ENCODE_BATCH_CHARS", 3000)
    sharded = prepare([articles], tmp_path / "out", tokenizer=prepared.path).tokens("train")
    assert len(list((tmp_path / "out").glob("train-*.npy"))) == -(-len(whole) // 1000)
    assert len(sharded) == len(whole)
    expected, end = whole.read(0, len(whole)), len(whole)
    for start, count in [(0, end), (999, 2), (1000, 1000), (500, 2500), (end - 1, 1), (end, 0), (0, 0)]:
        tokens = sharded.read(start, count)
        assert tokens.dtype == np.int64 and np.array_equal(tokens, expected[start : start + count])
    for start, count in [(-1, 2), (0, end + 1), (5, -1)]:
        with pytest.raises(IndexError):
            sharded.read(start, count)


def test_large_vocabularies_are_written_as_uint32(articles, tmp_path, monkeypatch):
    class LargeTokenizer(Tokenizer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.vocab_size = 70_001

        def encode_batch(self, texts):
            return [np.full(3, 70_000, np.uint32) for _ in texts]

    monkeypatch.setattr(prepare_module, "Tokenizer", LargeTokenizer)
    tokens = prepare([articles], tmp_path / "out").tokens("train")
    assert tokens.read(0, 4).tolist() == [70_000, 70_000, 70_000, 0]


def test_shards_of_version_296681d_open_and_keep_their_split(files_296681d):
    corpus = Corpus.open(files_296681d / "shards")
    texts = [path.read_text() for path in sorted((files_296681d / "texts").rglob("*.txt"))]
    keys = {hashlib.blake2b(text.encode(), digest_size=16).hexdigest(): text for text in texts}
    held_out = HeldOutDocuments.of_version_1(sorted(keys), sum(len(text.encode()) for text in keys.values()))
    validation = {text for key, text in keys.items() if held_out.part_of(key) == "validation"}
    assert len(keys) == corpus.documents and set(document_texts(corpus, "validation")) == validation
    assert corpus.test.documents == 0 and len(corpus.describe_held_out()) == 1
    assert verify_tree(corpus.path) == {str(corpus.path): "shards"}


# ---------------------------------------------------------------- reuse


def test_an_unchanged_corpus_is_reused(folder, out, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "PreparationJob", None)  # a new preparation would fail
    messages = []
    assert prepare([folder], out, log=messages.append).fingerprint == prepared.fingerprint
    assert "the existing shards are used" in messages[0]
    for path in folder.iterdir():  # other modification times, the same text
        os.utime(path, ns=(1, 1))
    assert prepare([folder], out).fingerprint == prepared.fingerprint
    assert prepare([folder.rename(tmp_path / "moved")], out).fingerprint == prepared.fingerprint


@pytest.mark.parametrize("change", ["text", "file", "settings", "damage"])
def test_a_changed_corpus_is_prepared_again(change, folder, out, prepared):
    if change == "text":
        (folder / "007.txt").write_text(article(8).replace("8", "9"))
    elif change == "file":
        (folder / "007.txt").rename(folder / "7.txt")
    elif change == "damage":
        shard = out / "train-00000.npy"
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        with pytest.raises(CorruptFileError, match="train-00000"):
            Corpus.open(out)
    messages = []
    corpus = prepare([folder], out, tokenizer="char" if change == "settings" else "bpe", log=messages.append)
    assert "prepared again" in messages[0]
    assert (corpus.fingerprint == prepared.fingerprint) == (change == "damage")
    assert not [path.name for path in out.parent.glob(".out.*") if path.name != ".out.lock"]


def test_an_existing_tokenizer_is_used(articles, prepared, tmp_path):
    corpus = prepare([articles / "001.txt"], tmp_path / "out", tokenizer=prepared.path)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (prepared.path / "tokenizer.json").read_bytes()
    assert corpus.tokenizer.vocab_size == prepared.tokenizer.vocab_size
    with pytest.raises(UsageError, match="vocab-size"):
        prepare([articles], tmp_path / "other", tokenizer="char", vocab_size=500)


# ---------------------------------------------------------------- issues and errors


def accented(form):
    """Documents in a Unicode normalization form."""
    texts = {f"{i:02}.txt": f"Ïl fāut étudier à l'école, n° {i} {'dé ' * i}\n" for i in range(30)}
    return {name: unicodedata.normalize(form, text) for name, text in texts.items()}


def test_text_can_be_normalized(tmp_path):
    both = write(
        tmp_path / "in", {f"{form}-{name}": text for form in ("NFC", "NFD") for name, text in accented(form).items()}
    )
    corpus = prepare([both], tmp_path / "out", normalize="nfc")
    assert (corpus.documents, corpus.duplicates) == (30, 30)
    assert sorted(all_texts(corpus)) == sorted(accented("NFC").values())
    assert corpus.train.bytes + corpus.validation.bytes == sum(len(text.encode()) for text in accented("NFC").values())
    assert corpus.text_notes() == []
    model = tiny_model(corpus.tokenizer, tmp_path / "model")
    sizes = [model.read_tokens(write(tmp_path / form, accented(form)), None, Console()) for form in ("NFC", "NFD")]
    assert np.array_equal(sizes[0][0].tokens, sizes[1][0].tokens) and sizes[0][1] == sizes[1][1]
    again = prepare([both], tmp_path / "again", tokenizer=corpus.path)  # its tokenizer normalizes, too
    assert (again.documents, again.duplicates) == (30, 30)
    plain = prepare([both], tmp_path / "plain")
    assert (plain.documents, plain.duplicates) == (60, 0)
    with pytest.raises(UsageError, match="normalize is for a new tokenizer"):
        prepare([both], tmp_path / "other", tokenizer=plain.path, normalize="nfc")


@pytest.mark.parametrize(("form", "other"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_text_in_another_normalization_form_is_reported(form, other, tmp_path, capsys):
    corpus = prepare([write(tmp_path / "in", accented(form))], tmp_path / "out")
    notes = " ".join(corpus.text_notes())
    assert ("30 lines are not in the Unicode normalization form NFC but in NFD" in notes) == (form == "NFD")
    model = tiny_model(corpus.tokenizer, tmp_path / "model")
    model.read_tokens(write(tmp_path / form, accented(form)), None, Console())
    assert "normalization" not in capsys.readouterr().err
    model.read_tokens(write(tmp_path / other, accented(other)), None, Console())
    assert f"not that of the training text ({form})" in capsys.readouterr().err
    assert form in model.tokenizer.form_message(["plain", accented(other)["00.txt"]])
    mixed = prepare([tmp_path / "NFC", tmp_path / "NFD"], tmp_path / "mixed")
    assert "30 lines are not in the Unicode normalization form NFC:" in " ".join(mixed.text_notes())
    assert mixed.tokenizer.form_message([*accented("NFC").values(), *accented("NFD").values()]) == ""


def test_the_share_of_tokens_that_are_parts_of_characters_is_reported(tmp_path):
    folder = write(
        tmp_path / "in", {f"{i:02}.txt": "".join(chr(0x4E00 + 37 * i + j) for j in range(40)) for i in range(30)}
    )
    corpus = prepare([folder], tmp_path / "out")
    assert corpus.validation.broken > 0.9 * corpus.validation.tokens
    assert any("of the tokens of the validation set are parts of characters" in note for note in corpus.text_notes())


def test_issues_are_logged_and_stored(folder, out, tmp_path):
    (folder / "bad.txt").write_bytes(b"plenty of good text here \xff and there")
    (folder / "binary.md").write_bytes(b"\0\1\2")
    (folder / "rows.jsonl").write_text('{"text": "fine"}\n{"text": \n[]\n')
    (folder / "picture.png").write_bytes(b"")
    messages = []
    corpus = prepare([folder], out, log=messages.append)
    assert corpus.documents == 62 and corpus.problems["total"] == 4
    stored = read_jsonl(out / "problems.jsonl")
    assert [(Path(issue["path"]).name, issue["line"], issue["count"]) for issue in stored] == [
        ("texts", None, 1),
        ("bad.txt", 1, 1),
        ("binary.md", None, 1),
        ("rows.jsonl", 2, 1),
        ("rows.jsonl", 3, 1),
    ]
    assert any("binary.md: not text" in line for line in messages) and any(".png" in line for line in messages)
    with pytest.raises(NextwordError, match=r"bad\.txt line 1: not valid UTF-8"):
        prepare([folder], out, strict=True)  # although the shards exist
    assert Corpus.open(out).fingerprint == corpus.fingerprint


def test_a_corpus_without_text_names_what_was_there(tmp_path):
    write(tmp_path / "in", {"empty.txt": "", "a.png": "x", "b.zip": "y"})
    with pytest.raises(NextwordError, match=r"(?s)no text was found.*empty\.txt.*\.jsonl"):
        prepare([tmp_path / "in"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "lock" not in path.name] == ["in"]
    with pytest.raises(NextwordError, match="too little"):
        prepare([write(tmp_path / "one", {"a.txt": "x"})], tmp_path / "out")


def test_a_file_that_changes_while_it_is_read_is_named(folder, tmp_path):
    def edit(stage, done, total):
        if stage == "tokenizer":
            (folder / "059.txt").write_text("another text")

    with pytest.raises(NextwordError, match=r"059\.txt: changed while"):
        prepare([folder], tmp_path / "out", progress=edit)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.parts-*"))


def test_other_directories_are_not_replaced(articles, tmp_path):
    with pytest.raises(UsageError, match="not a prepared corpus"):
        prepare([articles], articles)
    (tmp_path / "made").mkdir()
    (tmp_path / "made/nextword.json").write_text('{"kind": "run", "files": {}}')
    with pytest.raises(UsageError, match="something else"):
        prepare([articles], tmp_path / "made")
    with pytest.raises(NextwordError, match="not a prepared corpus"):
        Corpus.open(tmp_path / "made")
    (tmp_path / "made/nextword.json").write_text('{"kind": "corpus", "version": 1, "files": {}}')
    with pytest.raises(NextwordError):
        Corpus.open(tmp_path / "made")
    (tmp_path / "empty").mkdir()
    assert prepare([articles], tmp_path / "empty").documents == 60


def test_shards_inside_the_folder_of_texts_are_not_read_as_text(folder):
    write(folder, {"bad.jsonl": "{"})  # so that there is a problems.jsonl
    first = prepare([folder], folder / "shards", tokenizer="char")
    second = prepare([folder], folder / "shards", tokenizer="char")
    assert second.fingerprint == first.fingerprint and second.documents == 60


def test_progress_reaches_the_end_of_each_stage(articles, tmp_path):
    updates = []
    prepare([articles], tmp_path / "out", progress=lambda *update: updates.append(update))
    total = sum(path.stat().st_size for path in articles.iterdir())
    complete = [update for update in updates if update[1] == total]
    assert complete == [(stage, total, total) for stage in ("reading", "tokenizer", "encoding")]
    assert all(done <= total for _, done, total in updates)


# ---------------------------------------------------------------- what a tokenizer cannot represent, and begin tokens


def latin_tokenizer(folder, begin: str | None = None) -> Path:
    """A tokenizer of lower-case Latin letters, which drops every other character but the space."""
    vocabulary = {token: id for id, token in enumerate(["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz "])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>"])
    if begin:
        id = vocabulary[begin]
        backend.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, id)])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", **({"bos_token": begin} if begin else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("num_documents", [4, 40])
def test_bytes_that_the_tokenizer_cannot_represent_are_counted_and_never_claimed(num_documents, tmp_path, capsys):
    texts = {f"{i}.txt": f"{'ж' * i}\n" + "abc " * 9 + "é" for i in range(num_documents)}
    folder, tokenizer = write(tmp_path / "in", texts), latin_tokenizer(tmp_path / "tokenizer")
    corpus = prepare([folder], tmp_path / "out", tokenizer=tokenizer)
    lost = sum(2 * i + 1 + 2 for i in range(num_documents))
    sizes = [(split.bytes, split.unknown, split.seen_bytes) for split in (corpus.train, corpus.validation)]
    assert [sum(column) for column in zip(*sizes, strict=True)] == [lost + 36 * num_documents, lost, 36 * num_documents]
    assert f"{lost:,} of {lost + 36 * num_documents:,} bytes" in corpus.lost_text
    model = tiny_model(corpus.tokenizer, tmp_path / "model")
    tokens, num_bytes = model.read_tokens(folder, None, Console())
    assert num_bytes == 36 * num_documents == len(tokens) - num_documents - 1
    assert f"{lost:,} of" in capsys.readouterr().err
    with pytest.raises(NextwordError, match="are lost"):
        prepare([folder], tmp_path / "strict", tokenizer=tokenizer, strict=True)


def test_a_text_of_which_nothing_can_be_represented_is_refused(tmp_path):
    folder = write(tmp_path / "in", {f"{i}.txt": "Ж" * (50 + i) for i in range(30)})
    tokenizer = latin_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(NextwordError, match=r"\(100\.0%\) are lost"):
        prepare([folder], tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(NextwordError, match=r"\(100\.0%\) are lost"):
        tiny_model(Tokenizer.open(tokenizer), tmp_path / "model").read_tokens(folder, None, Console())


def tiny_model(tokenizer: Tokenizer, folder: Path) -> LanguageModel:
    model = GPT(
        build_config("gpt2", vocab_size=tokenizer.vocab_size, n_layers=1, n_heads=2, d_model=8, context_length=16)
    )
    folder.mkdir()
    save_model_dir(folder, model, tokenizer, {})
    return load(folder, "cpu")


@pytest.mark.parametrize("begin", [None, "<s>", "</s>"])
def test_every_document_begins_with_the_begin_token(begin, tmp_path):
    """In training, in evaluation and in generation. One that is the end-of-text token too is not repeated."""
    texts = [f"{'ab' * i} c" for i in range(1, 31)]
    folder = write(tmp_path / "in", {f"{i:02}.txt": text for i, text in enumerate(texts)})
    tokenizer = latin_tokenizer(tmp_path / "tokenizer", begin)
    corpus = prepare([folder], tmp_path / "out", tokenizer=tokenizer)
    eos, bos = corpus.tokenizer.eos_id, corpus.tokenizer.bos_id
    assert (bos is None) == (begin is None)
    first = [0] if begin == "<s>" else []
    tokens, num_bytes = tiny_model(corpus.tokenizer, tmp_path / "model").read_tokens(folder, None, Console())
    expected = [id for text in texts for id in [*first, *corpus.tokenizer.encode(text), eos]]
    assert tokens.tokens.tolist() == ([] if begin == "<s>" else [eos]) + expected
    assert num_bytes == sum(map(len, texts))
    assert sorted(all_texts(corpus)) == sorted(texts)
    for split in ("train", "validation"):
        ids = corpus.tokens(split).read(0, len(corpus.tokens(split)))
        starts = np.concatenate([ids[:1], ids[1:][ids[:-1] == eos]])
        assert ((starts == 0) == (begin == "<s>")).all() and (ids == 0).sum() == (len(starts) if first else 0)
    parts = [prepare([folder], tmp_path / "parts", tokenizer=tokenizer, shard="1/3")]
    assert parts[0].fingerprint == corpus.fingerprint


def test_a_corpus_that_has_moved_is_not_called_corrupt(tmp_path):
    with pytest.raises(NextwordError, match=r"not there .*--resume") as caught:
        Corpus.open(tmp_path / "moved")
    assert not isinstance(caught.value, CorruptFileError)
    (tmp_path / "moved").mkdir()
    with pytest.raises(CorruptFileError, match="never finished"):
        Corpus.open(tmp_path / "moved")
