"""Reading documents: every format; every invalid input is recorded, and none is fatal."""

import csv
import gzip
import io
import json
import os
import random
import sys
import tracemalloc
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextword.common.errors import MissingDependencyError, NextwordError, UsageError
from nextword.data import decoding, readers
from nextword.data.decoding import rechunk
from nextword.data.issues import IssueLog
from nextword.data.readers import find_files, read_documents
from nextword.data.tokenizer import train_bpe

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

# Incompressible. It is part of test names, so it must be the same in every process.
RANDOM = random.Random(0).randbytes(500).hex().encode()


def read(path, content=None, column=None):
    """(line, text) of each document of a file, and the issues."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    issues = IssueLog()
    texts = [(d.line, "".join(d.chunks)) for d in read_documents(path, issues, column)]
    return texts, issues


def test_every_format_and_compression(tmp_path):
    rows = [("The first, with a comma", 1), ('A "quoted"\nsecond', 2), ("Le troisième", 3)]
    table = io.StringIO()
    csv.writer(table).writerows([("text", "n"), *rows])
    lines = "".join(json.dumps({"n": n, "text": text}) + "\n" for text, n in rows)
    plain = {
        "a.txt": ("One\nfile.\n", [(None, "One\nfile.\n")]),
        "a.MD": ("# One\n", [(None, "# One\n")]),
        "a.jsonl": (lines, [(i + 1, text) for i, (text, _) in enumerate(rows)]),
        "a.ndjson": (lines, [(i + 1, text) for i, (text, _) in enumerate(rows)]),
        "a.csv": (table.getvalue(), [(2, rows[0][0]), (3, rows[1][0]), (5, rows[2][0])]),
        "a.tsv": ('n\ttext\n1\t"Go," he said. "Now"\n2\tb\n', [(2, '"Go," he said. "Now"'), (3, "b")]),
    }
    for name, (content, expected) in plain.items():
        data = content.encode()
        for suffix, compressed in {
            "": data,
            ".gz": gzip.compress(data[:5]) + gzip.compress(data[5:]),
            ".zst": zstandard.compress(data[:5]) + zstandard.compress(data[5:]),
        }.items():
            texts, issues = read(tmp_path / (name + suffix), compressed)
            assert (texts, issues.total) == (expected, 0), name + suffix
    for column in (pa.array([r[0] for r in rows]), pa.array([r[0] for r in rows]).dictionary_encode()):
        pq.write_table(pa.table({"n": [1, 2, 3], "text": column}), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet")[0] == [(i + 1, text) for i, (text, _) in enumerate(rows)]


@pytest.mark.parametrize(
    ("name", "content", "kept", "line", "what", "count"),
    [
        (
            "a.txt",
            b"good\nb\xffd \xfe\nok and well \xc3\xa9",
            ["good\nb\ufffdd \ufffd\nok and well é"],
            2,
            "not valid UTF-8",
            2,
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": \nnull\n{"text": "b"}', ["a", "b"], 2, "not valid JSON", 1),
        ("a.jsonl", b'[1]\n{"text": "a"}\n"b"\n', ["a"], 1, "not a JSON object", 2),
        ("a.jsonl", b'\n{"text": "a"}\n{"story": "b"}\n{"y": 1, "z": 2}\n', ["a", "b"], 4, "found y, z", 1),
        ("a.jsonl", b'{"text": 5}\n{"text": null}\n{"text": "a"}', ["a"], 1, "text is a int", 2),
        ("a.jsonl", b'{"text": " "}\n{"text": "a"}\n{"text": ""}', ["a"], 1, "the text is empty", 2),
        ("a.jsonl", b'{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}', ["a\ufffdb", "😀"], 1, "surrogate", 1),
        ("a.jsonl", b"[" * 100_000 + b'\n{"text": "a"}', ["a"], 1, "not valid JSON", 1),
        ("a.jsonl", b'{"n": ' + b"1" * 5000 + b'}\n{"text": "a"}', ["a"], 1, "not valid JSON", 1),
        ("a.csv", b"n,text\n1,a\n2\n3,c\n", ["a", "c"], 3, "too few columns", 1),
        ("a.csv", b"text,n\na,1\nb, and more,2\n", ["a", "b"], 3, "too many columns", 1),
        ("a.csv", b"x,y\n1,2\n", [], 1, "found x, y", 1),
        ("a.csv", b'text\n"never closed\nb\n\nc\n', ["b", "c"], 2, "never closed", 1),
        ("a.csv", b"text\n", [], None, "no text", 1),
        ("a.csv", b"", [], None, "no text", 1),
        ("a.txt", b"", [], None, "no text", 1),
        ("a.txt", b" \n\t \n", [], None, "no text", 1),
        ("a.txt.gz", gzip.compress(b"", mtime=0), [], None, "no text", 1),
        ("a.txt", b"MZ\x00\x01\x02 binary", [], None, "a tenth", 1),
        ("a.txt", "Привет, мир".encode("utf-16-le"), [], None, "a tenth", 1),
        ("a.txt", b"one\ntwo\0 and three", ["one\ntwo\ufffd and three"], 2, "NUL; replaced", 1),
        ("a.txt", b"x" * 99_999 + b"\n\0\0", None, 2, "NUL; replaced", 2),
        ("a.txt", "one\0 and more".encode("utf-16"), ["one\ufffd and more"], 1, "NUL; replaced", 1),
        ("a.csv", b"text\nthis is a\nthis is b\0\n", ["this is a", "this is b\ufffd"], 3, "NUL; replaced", 1),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\\u0000"}', ["a", "b\ufffd"], 2, "NUL; replaced", 1),
        ("a.csv", bytes(range(128, 256)) * 9, [], None, "a tenth", 1),
        ("a.txt.gz", gzip.compress(RANDOM, mtime=0)[:300], None, None, "stream is broken", 1),
        ("a.txt.gz", b"no gzip at all", [], None, "stream is broken", 1),
        ("a.txt.zst", zstandard.compress(RANDOM)[:300], None, None, "ends early", 1),
        ("a.txt.zst", b"no zstd at all", [], None, "stream is broken", 1),
        ("a.parquet", b"PAR1 not parquet PAR1", [], None, "not a parquet file", 1),
        ("a.parquet", b"", [], None, "not a parquet file", 1),
        ("a.parquet.gz", b"", [], None, "unpack", 1),
    ],
)
def test_bad_input_is_recorded_and_the_rest_is_read(name, content, kept, line, what, count, tmp_path):
    texts, issues = read(tmp_path / name, content)
    if kept is not None:
        assert [text for _, text in texts] == kept
    issue = next(issue for issue in issues.issues if what in str(issue))
    assert (issue.path, issue.line, issue.count) == (str(tmp_path / name), line, count)
    assert f"{tmp_path / name}{'' if line is None else f' line {line}'}: " in str(issue)
    with pytest.raises(NextwordError, match=r"--strict"):
        for document in read_documents(tmp_path / name, IssueLog(strict=True)):
            list(document.chunks)


def test_parquet_rows_without_valid_text(tmp_path):
    path = tmp_path / "a.parquet"
    invalid = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"text": pa.concat_arrays([pa.array(["a", None, " "]), invalid])}), path)
    texts, issues = read(path)
    assert texts == [(1, "a"), (4, "a\ufffd")]
    assert [(issue.line, issue.what.split(":")[0].split(";")[0]) for issue in issues.issues] == [
        (2, "the text is not a string"),
        (3, "the text is empty"),
        (4, "not valid UTF-8, or NUL"),
    ]
    pq.write_table(pa.table({"text": [1, 2]}), path)
    assert read(path)[1].total == 2
    pq.write_table(pa.table({"title": ["a"]}), path)
    assert "found title" in read(path)[1].summary_lines()[0] and read(path, column="title")[0] == [(1, "a")]
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert "no rows" in read(path)[1].summary_lines()[0]


def test_the_text_column_can_be_named(tmp_path):
    texts, issues = read(tmp_path / "a.jsonl", '{"text": "a", "fr": "b"}\n{"text": "c"}', column="fr")
    assert texts == [(1, "b")] and "looked for fr; found text" in issues.summary_lines()[0]
    assert read(tmp_path / "a.tsv", "en\tfr\nyes\toui\n", column="fr")[0] == [(2, "oui")]


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_byte_order_marks_and_line_ends(codec, tmp_path):
    text = "début\r\nmiddle\rend 😀" + "x" * 300_000
    bom = "\ufeff" if codec == "utf-16-be" else ""
    expected = text.replace("\r\n", "\n").replace("\r", "\n")
    assert read(tmp_path / "a.txt", (bom + text).encode(codec))[0] == [(None, expected)]
    rows = '\ufeff{"text": "é"}\r\n{"text": "ö"}'.encode("utf-16-be")
    assert read(tmp_path / "a.jsonl", rows)[0] == [(1, "é"), (2, "ö")]


def test_a_broken_stream_keeps_the_text_before_the_break(tmp_path):
    text = os.urandom(400_000).hex()
    for name, compressed in {
        "a.txt.gz": gzip.compress(text.encode()),
        "a.txt.zst": zstandard.compress(text.encode()),
    }.items():
        texts, issues = read(tmp_path / name, compressed[: len(compressed) // 2])
        assert issues.total == 1 and text.startswith(texts[0][1]) and len(texts[0][1]) > 100_000


def test_a_long_line_is_skipped_in_tables_and_kept_in_text_files(tmp_path, monkeypatch):
    for module in (decoding, readers):
        monkeypatch.setattr(module, "MAX_LINE_CHARS", 300_000)
    long = "word " * 200_000
    texts, issues = read(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{{"text": "{long}"}}\n{{"text": "b"}}\n')
    assert [t for _, t in texts] == ["a", "b"] and issues.issues[0].line == 2
    texts, issues = read(tmp_path / "b.csv", f"text\na\n{long}\nb\n{long}")
    assert [t for _, t in texts] == ["a", "b"] and (issues.issues[0].line, issues.total) == (3, 2)
    texts, issues = read(tmp_path / "c.txt", f"a\n{long}\nb")
    assert texts[0][1] == f"a\n{long}\nb" and issues.total == 0 and issues.issues[0].line == 2


def test_memory_use_does_not_depend_on_the_size(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"no newline and no end " * 2_000_000, 1))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(b"a" * 60_000_000))
    for file, size in ((path, 44_000_000), (tmp_path / "b.txt.zst", 60_000_000)):
        tracemalloc.start()
        total = sum(len(chunk) for d in read_documents(file, IssueLog()) for chunk in d.chunks)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert total == size and peak < 25_000_000


def test_a_quote_that_is_never_closed_loses_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_CHARS", 1000)
    rows = "".join(f"row {i} of many\n" for i in range(500))
    texts, issues = read(tmp_path / "a.csv", f'text\n"open\n{rows}')
    assert [t for _, t in texts] == rows.splitlines() and issues.issues[0].line == 2


def test_chunks_are_normalized_as_the_whole_text():
    """Of scripts without spaces: letters with marks, syllables of two and three parts, and vowel signs of two parts."""
    for text in ("がぎぐ", "한글과", "ộềữ", "কোকৌ"):
        decomposed = unicodedata.normalize("NFD", text * 40)
        for limit in range(6, 14):
            chunks = [unicodedata.normalize("NFC", chunk) for chunk in rechunk([decomposed], limit)]
            assert "".join(chunks) == unicodedata.normalize("NFC", decomposed)


@settings(max_examples=200)
@given(st.text(st.sampled_from("ab \n\t.é中")), st.integers(1, 9), st.integers(1, 9))
def test_rechunking_does_not_depend_on_the_chunks(text, limit, size):
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    rechunked = list(rechunk(chunks, limit))
    assert "".join(rechunked) == text and all(0 < len(chunk) <= limit for chunk in rechunked)
    assert rechunked == list(rechunk([text], limit))


def test_chunks_have_the_tokens_of_the_whole_text():
    text = "It's a line of words.\nAnother, indented:\n\n    with code()  \n\tand tabs 123\n" * 30
    tokenizer = train_bpe([text], 400)
    for limit in (97, 211, 1000):
        chunks = rechunk([text], limit)
        assert [id for chunk in chunks for id in tokenizer.encode(chunk)] == tokenizer.encode(text)


def test_files_are_found_in_order_and_others_are_recorded(tmp_path):
    for name in ("b.txt", "a/z.md", "a/.hidden", "a/p.png", "q.png", "old.zip", "c.txt.xz", ".git/x.txt", "Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "made").mkdir()
    (tmp_path / "made/nextword.json").write_text("{}")
    (tmp_path / "made/issues.jsonl").write_text("{}")
    issues = IssueLog()
    assert [s.name for s in find_files([tmp_path], issues)] == ["a/z.md", "b.txt"]
    assert issues.total == 2  # the archives; the others are not issues
    assert issues.counts_by_kind["left out: files with the suffix .png"] == 2
    assert issues.counts_by_kind["left out: files or folders that are hidden"] == 2
    assert issues.counts_by_kind["left out: files without a suffix"] == 1
    assert issues.counts_by_kind["left out: a run, a model or another directory made by nextword"] == 1
    assert "unpack it first" in "".join(issues.summary_lines())
    with pytest.raises(UsageError, match="no such"):
        find_files([tmp_path / "nowhere"], issues)
    assert find_files([tmp_path / "q.png"], issues) == [] and "not a supported format" in issues.summary_lines()[-1]


@pytest.mark.parametrize(
    ("files", "is_left_out"),
    [
        (["run.json", "metrics.jsonl"], True),
        (["run.json", "lock"], True),
        (["run.json", "checkpoints/step-1/weights.safetensors"], True),
        (["model/config.json", "model/model.safetensors"], True),
        (["model/config.json", "model/pytorch_model-00001-of-00002.bin"], True),
        (["model/config.json", "model/tokenizer.json", "model/vocab.txt"], True),
        (["x/train-00000.npy", "x/nextword.json"], True),
        (["run.json"], False),
        (["config.json"], False),
        (["tokenizer.json"], False),
        (["weights.bin"], False),
    ],
)
def test_runs_models_and_shards_within_a_corpus_are_left_out(files, is_left_out, tmp_path):
    for name in files:
        for path in (tmp_path / "texts/old" / name, (tmp_path / "texts/old" / name).with_name("README.md")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
    (tmp_path / "texts/mine.txt").write_text("mine")
    issues = IssueLog()
    names = [
        source.name for source in find_files([tmp_path / "texts"], issues) if source.path.suffix in (".md", ".txt")
    ]
    assert names == (["mine.txt"] if is_left_out else ["mine.txt", "old/README.md"])
    assert (
        sum("left out: a run, a model" in kind for kind in issues.counts_by_kind) == is_left_out and issues.total == 0
    )


def test_links(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.txt").write_text("x")
    try:
        (tmp_path / "a/loop").symlink_to(tmp_path, target_is_directory=True)
    except OSError:
        pytest.skip("only an administrator can make links on this system")
    (tmp_path / "b").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    (tmp_path / "y.txt").symlink_to(tmp_path / "a/x.txt")
    issues = IssueLog()
    assert [s.name for s in find_files([tmp_path], issues)] == ["a/x.txt", "y.txt"]
    assert issues.total == 4
    assert sum("was read already" in line for line in issues.summary_lines()) == 2


def test_an_unreadable_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("secret")
    path.chmod(0)
    try:
        if os.access(path, os.R_OK):
            pytest.skip("this user can read every file, as root can")
        texts, issues = read(path)
        assert not texts and "cannot be read" in issues.summary_lines()[0]
    finally:
        path.chmod(0o600)


def test_a_missing_file_and_a_folder_with_the_name_of_a_file(tmp_path):
    (tmp_path / "x.txt").mkdir()
    for path in (tmp_path / "gone.txt", tmp_path / "x.txt", tmp_path / "gone.parquet", tmp_path / "gone.csv.zst"):
        texts, issues = read(path)
        assert not texts and issues.total == 1, path


def test_issues_are_counted_and_the_first_are_shown():
    issues = IssueLog()
    for i in range(3000):
        issues.add(f"file {i % 1500}", i, "bad", "why")
    assert (issues.total, issues.counts_by_kind["bad"], len(issues.issues)) == (3000, 3000, 1000)
    assert str(issues.issues[0]) == "file 0 line 0: bad: why (2 in all)"
    assert len(issues.summary_lines()) == 21 and "980 more" in issues.summary_lines()[-1]


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")])
def test_a_missing_package_is_named(name, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'nextword\["):
        read(tmp_path / name, b"x")


SUFFIXES = [
    ".txt",
    ".md",
    ".txt.gz",
    ".md.zst",
    ".jsonl",
    ".csv.gz",
    ".tsv.zst",
    ".parquet",
]  # test_readers.py has more tables
FRAGMENTS = st.sampled_from(
    [
        b"text",
        b",",
        b"\t",
        b'"',
        b"\n",
        b"\r",
        b'{"text": "',
        b'"}',
        b"\\ud800",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"PAR1",
    ]
)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_input_is_fatal(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "good.parquet")
    good = (tmp_path / "good.parquet").read_bytes()

    @settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(
        st.one_of(st.binary(max_size=200), st.lists(FRAGMENTS, max_size=30).map(b"".join)),
        st.booleans(),
        st.integers(0, len(good)),
    )
    def check(data, compressed, position):
        if suffix == ".parquet" and compressed:
            data = good[:position] + data[:3] + good[position + 3 :]
        elif compressed and suffix.endswith(".gz"):
            data = gzip.compress(data)
        elif compressed and suffix.endswith(".zst"):
            data = zstandard.compress(data)
        texts, issues = read(path, data)
        assert texts or issues.total
        for _, text in texts:
            text.encode()
        try:
            for document in read_documents(path, IssueLog(strict=True)):
                list(document.chunks)
        except NextwordError:
            assert issues.total
        else:
            assert not issues.total

    check()


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.csv.gz", "a.jsonl.zst"])
def test_a_file_that_expands_beyond_measure_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "MIN_EXPANDED_BYTES", 2**20)
    compress = gzip.compress if name.endswith("gz") else zstandard.compress
    line = b'{"text": "abc"}\n' if "jsonl" in name else b"text\n"
    (tmp_path / name).write_bytes(compress(line * 2**18))
    with pytest.raises(NextwordError, match="200 times its size"):
        for document in read_documents(tmp_path / name, IssueLog()):
            list(document.chunks)
    (tmp_path / name).write_bytes(compress(line * 2**15))  # as repetitive, and small
    assert sum(sum(map(len, document.chunks)) for document in read_documents(tmp_path / name, IssueLog())) > 2**16
