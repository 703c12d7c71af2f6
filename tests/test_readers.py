"""Readers of tables: the same rows and line numbers from every format; every invalid row is recorded."""

import csv
import gzip
import io
import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextword.common.errors import NextwordError
from nextword.data import readers
from nextword.data.issues import IssueLog
from nextword.data.readers import MissingColumnError, read_records

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

FUZZING = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def read(path, content=None, select_columns=None):
    """(line, values) of each row, and the issues."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    issues = IssueLog()
    return [(r.line, r.values) for r in read_records(path, issues, select_columns)], issues


def test_every_format_gives_the_same_rows(tmp_path):
    rows = [{"text": 'a "quoted",\nsecond', "n": "1"}, {"text": "Le troisième", "n": "2"}]
    table = io.StringIO()
    csv.writer(table).writerows([["text", "n"], *(row.values() for row in rows)])
    contents = {
        "a.csv": (table.getvalue(), [2, 4]),
        "a.jsonl": ("\n".join(map(json.dumps, rows)), [1, 2]),
        "a.ndjson": ("\n\n".join(map(json.dumps, rows)), [1, 3]),
        "a.json": (json.dumps(rows, indent=1), [2, 6]),
    }
    for name, (content, lines) in contents.items():
        data = content.encode()
        for suffix, compressed in {"": data, ".gz": gzip.compress(data), ".zst": zstandard.compress(data)}.items():
            found, issues = read(tmp_path / (name + suffix), compressed)
            assert found == list(zip(lines, rows, strict=True)) and issues.total == 0, name + suffix
    found, issues = read(tmp_path / "a.tsv", 'text\tn\n"open\t1\n')
    assert (found, issues.total) == ([(2, {"text": '"open', "n": "1"})], 0)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == [(1, rows[0]), (2, rows[1])]


# A cell with a tab and a line break may look like two rows of a table without quotes.
TEXT = st.text(st.sampled_from('a"\n\t,;é| '), max_size=5).filter(lambda text: not {"\t", "\n"} <= set(text))
CELLS = st.lists(st.tuples(TEXT, st.sampled_from(["x", "y, z", "1;2"])), min_size=1, max_size=5)
WRITERS = {
    "a.csv": [{"delimiter": d, "quoting": q} for d in ",;|\t" for q in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)],
    "a.tsv": [{"delimiter": "\t", "quoting": q} for q in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)],
}


@pytest.mark.parametrize("name", WRITERS)
def test_tables_of_any_writer(name, tmp_path):
    @settings(FUZZING, max_examples=150)
    @given(CELLS, st.sampled_from(WRITERS[name]), st.sampled_from(["\n", "\r\n"]))
    def check(rows, options, line_end):
        table = io.StringIO()
        csv.writer(table, lineterminator=line_end, **options).writerows([["text", "label"], *rows])
        found, issues = read(tmp_path / name, table.getvalue())
        assert [tuple(row.values()) for _, row in found] == rows and issues.total == 0

    check()


def test_quotes_in_a_table_without_quoting_are_characters(tmp_path):
    texts = ['"Oui" dit-il', '"', 'say ""', '"Hello."', '5" pipe', '"open']

    @FUZZING
    @given(st.lists(st.sampled_from(texts), min_size=1, max_size=4))
    def check(cells):
        found, issues = read(tmp_path / "a.tsv", "text\tn\n" + "".join(f"{cell}\t1\n" for cell in cells))
        assert [row["text"] for _, row in found] == cells and issues.total == 0

    check()
    # Evidence for both readings: the quotes are kept, which is reported.
    found, issues = read(tmp_path / "a.tsv", 'text\tn\n"a ""b"""\t1\n5" pipe\t2\n')
    assert [row["text"] for _, row in found] == [
        '"a ""b"""',
        '5" pipe',
    ] and "read as characters" in issues.summary_lines()[0]


def test_the_separator_is_decided_by_the_rows(tmp_path):
    for content, expected in (
        ("id,text (a; b; c)\n1,x\n2,y\n", [["1", "x"], ["2", "y"]]),
        ("id;text, raw, short\n1;x\n2;y, z\n", [["1", "x"], ["2", "y, z"]]),
        ("sep=;\nid;text\n1;x\n", [["1", "x"]]),
        ("sep=,\nid,text\n1,x\n", [["1", "x"]]),
        ("\n\nid;text\n1;x\n2\n", [["1", "x"]]),
        ("text\na;b\nc\n", [["a;b"], ["c"]]),
        ("", []),
    ):
        found, issues = read(tmp_path / "a.csv", content)
        assert [list(row.values()) for _, row in found] == expected
        assert ("separator" in "".join(issues.summary_lines())) == content.strip().startswith("id;")


SPACE = st.text(st.sampled_from(" \n\t"), max_size=3)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(st.sampled_from('a"\\[]{},:é\n'), max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
ROWS = st.lists(st.tuples(SPACE, st.dictionaries(st.sampled_from("abc"), VALUE), st.booleans(), SPACE), max_size=5)


@pytest.mark.parametrize("around", ["list", "object"])
def test_the_line_of_an_object_in_a_json_file(around, tmp_path):
    @FUZZING
    @given(SPACE, ROWS)
    def check(head, rows):
        text = head + ('{"version": [1, "[{}]"], "data":\n[' if around == "object" else "[")
        expected = []
        for i, (before, row, indented, after) in enumerate(rows):
            text += ("," if i else "") + before
            expected.append((text.count("\n") + 1, row))
            text += json.dumps(row, indent=1 if indented else None, ensure_ascii=indented) + after
        text += '], "more": {"a": [{"b": 1}]}}' if around == "object" else "]\n"
        found, issues = read(tmp_path / "a.json", text)
        assert found == expected and issues.total == (around == "object" and not rows)

    check()


def test_the_json_scanner_accepts_what_json_accepts(tmp_path):
    fragments = st.sampled_from([*list('[]{},: \n1"'), '"a"', '{"a": 1}', "null", '"\\ud83d\\ude00"'])

    @settings(FUZZING, max_examples=300)
    @given(st.lists(fragments, max_size=12).map("".join))
    def check(text):
        found, issues = read(tmp_path / "a.json", text)
        try:
            value = json.loads(text)
        except ValueError:
            assert issues.total or not text.strip()
            return
        if isinstance(value, list):
            assert [row for _, row in found] == [item for item in value if isinstance(item, dict)]
            assert issues.total == sum(not isinstance(item, dict) for item in value)
        elif not isinstance(value, dict):
            assert not found and issues.total

    check()


A, B = {"a": 1}, {"b": 2}


@pytest.mark.parametrize(
    ("content", "kept", "line", "what"),
    [
        ('[\n{"a": 1},\n{"b":\n2]', [A], 3, "not valid JSON; the rest of the file is left out"),
        ('[{"a": 1}\n{"b": 2}]', [A], 2, "expected ']' or ','"),
        ('[{"a": 1},\n]', [A], 2, "not valid JSON"),
        ('[{"a": 1},\n5,\n{"b": 2}]', [A, B], 2, "not a JSON object: it is a int"),
        ('[{"a": 1}]\n\n]', [A], 3, "after the end"),
        ('{"data": [{"a": 1},\n{"b" 2}]}', [A], 2, "not valid JSON"),
        ('{"x": [{"a": 1}], "y": [{"b": 2}]}', [], 1, "more than one list of objects; make a file of each: x, y"),
        ('{"x": [1], "y": 2}', [], 1, "neither a list of objects, nor an object with one"),
        ('{"x": [{"a": 1}]}\n{"x": [{"a": 1}]}', [], 2, "name the file .jsonl"),
        ("{x: 1}", [], 1, "not valid JSON"),
        ("7", [], 1, "neither"),
        ("[" * 100_000, [], 1, "not valid JSON"),
        ('[{"a": 1}, {"b": ' + "1" * 5000 + "}]", [A], 1, "not valid JSON"),
        (b'[{"a": 1}\0\0]', [], None, "a tenth"),
    ],
    ids=range(14),
)
def test_malformed_json_files(content, kept, line, what, tmp_path):
    found, issues = read(tmp_path / "a.json", content)
    assert [row for _, row in found] == kept
    assert [(issue.line, issue.path) for issue in issues.issues] == [(line, str(tmp_path / "a.json"))]
    assert what in str(issues.issues[0])


def test_a_json_file_that_is_too_long_is_read_up_to_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_JSON_CHARS", 40)
    found, issues = read(tmp_path / "a.json", json.dumps([{"a": i} for i in range(50)]))
    assert [row["a"] for _, row in found] == [0, 1, 2, 3] and "Make a .jsonl" in issues.summary_lines()[0]


def test_line_ends_and_surrogates_in_json(tmp_path):
    row = r'{"a": "1\r\n2\r3", "b": [{"c": "x\ud800"}], "d": "\ud83d\ude00"}'
    for name, content in {"a.jsonl": row, "a.json": f"[{row}]"}.items():
        found, issues = read(tmp_path / name, content)
        assert found == [(1, {"a": "1\n2\n3", "b": [{"c": "x\ufffd"}], "d": "😀"})]
        assert [issue.what for issue in issues.issues] == ["half a surrogate pair, or NUL; replaced by U+FFFD"]
        assert (
            read(tmp_path / name, select_columns=lambda names: ["d"])[1].total == 0
        )  # only columns that are read are repaired


def test_nested_columns_of_parquet(tmp_path):
    rows = [
        {
            "m": [{"role": "user", "n": 1}, {"role": None, "n": 2}],
            "c": {"text": ["a", "é\r\n"], "ok": True},
            "l": ["x"],
        },
        {"m": [], "c": None, "l": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found, issues = read(tmp_path / "a.parquet")
    rows[0]["c"]["text"][1] = "é\n"
    assert [row for _, row in found] == rows and issues.total == 0
    invalid = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 1, 3], pa.int32()).buffers()[1], pa.py_buffer(b"ab\xff")]
    )
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), invalid)
    pq.write_table(pa.table({"l": lists}), tmp_path / "b.parquet")
    found, issues = read(tmp_path / "b.parquet")
    assert found == [(1, {"l": ["a"]}), (2, {"l": ["b\ufffd"]})]
    assert [(issue.line, issue.what) for issue in issues.issues] == [(2, "not valid UTF-8, or NUL; replaced by U+FFFD")]


def test_only_the_selected_columns_are_read(tmp_path):
    pq.write_table(pa.table({"a": [1, 2], "b": ["x", "y"], "c": [b"", b""]}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("a,b,c\n1,x\n2,y\n")
    (tmp_path / "a.jsonl").write_text('{"a": 1, "b": "x"}\n{"b": "y", "a": 2}\n')
    (tmp_path / "a.json").write_text('[{"a": 1, "b": "x"}, {"b": "y"}]')
    requests = []
    for name in ("a.parquet", "a.csv", "a.jsonl", "a.json"):
        seen: list[list[str]] = []
        found, issues = read(
            tmp_path / name, select_columns=lambda names, seen=seen: seen.append(names) or ["b", "a"][:1]
        )
        assert [row for _, row in found] == [{"b": "x"}, {"b": "y"}] and issues.total == 0, name
        requests.append(seen)
    assert requests == [[["a", "b", "c"]], [["a", "b", "c"]], [["a", "b"], ["b", "a"]], [["a", "b"], ["b"]]]


def test_a_missing_column_is_recorded_with_its_line(tmp_path):
    def select_b(names):
        if "b" not in names:
            raise MissingColumnError("no column b", "found " + " ".join(names))
        return ["b"]

    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("\na\n1\n2\n")
    (tmp_path / "a.jsonl").write_text('{"b": 1}\n{"a": 1}\n{"b": 2}')
    (tmp_path / "a.json").write_text('[{"b": 1},\n{"a": 1},\n{"b": 2}]')
    for name, line, kept in (("a.parquet", None, 0), ("a.csv", 2, 0), ("a.jsonl", 2, 2), ("a.json", 2, 2)):
        found, issues = read(tmp_path / name, select_columns=select_b)
        assert len(found) == kept
        assert [(issue.line, issue.what) for issue in issues.issues] == [(line, "no column b: found a")]


def test_rows_with_too_few_or_too_many_columns(tmp_path):
    content = "text,label,more\na,1\nb\nc, and d,2,x\ne,f,1,2\n"
    found, issues = read(tmp_path / "a.csv", content, lambda names: ["text", "label"])
    assert found == [(2, {"text": "a", "label": "1"})]
    assert [(issue.line, issue.what.split(";")[0], issue.count) for issue in issues.issues] == [
        (3, "a row with too few columns", 1),
        (4, "a row with too many columns", 2),
    ]
    found, issues = read(tmp_path / "a.csv", content, lambda names: ["text"])
    assert [row["text"] for _, row in found] == ["a", "b", "c", "e"] and "kept" in issues.summary_lines()[0]
    found, issues = read(tmp_path / "a.csv", "a,b,a\n1,2,3\n")
    assert found == [(2, {"a": "1", "b": "2"})] and "two columns of one name; the first is read: a" in str(
        issues.issues[0]
    )


def test_files_that_are_not_tables(tmp_path):
    for name in ("a.txt", "a", "a.parquet.gz", "a.xlsx"):
        found, issues = read(tmp_path / name, "text")
        assert not found and issues.total == 1
    found, issues = read(tmp_path / "gone.json")
    assert not found and "cannot be read" in issues.summary_lines()[0]


def test_memory_use_does_not_depend_on_the_size(tmp_path):
    text = "word " * 200
    with (tmp_path / "a.jsonl").open("w") as jsonl, (tmp_path / "a.csv").open("w") as table:
        table.write("text,n\n")
        for i in range(8_000):
            jsonl.write(f'{{"text": "{text}", "n": {i}}}\n')
            table.write(f"{text},{i}\n")
    pq.write_table(
        pa.table({"text": [text + str(i) for i in range(8_000)]}), tmp_path / "a.parquet", row_group_size=500
    )
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        tracemalloc.start()
        count = sum(1 for _ in read_records(tmp_path / name, IssueLog()))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 8_000 and peak < 4_000_000, name  # of 8,000,000 characters


def test_a_row_larger_than_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_JSON_VALUES", 1000)
    values = "[" + "[],{}," * 400 + '"[,{"]'
    found, issues = read(tmp_path / "a.jsonl", f'{{"a": {values}}}\n{{"a": "{"[,{" * 900}"}}\n')
    assert [line for line, _ in found] == [2]  # the second row is one text
    assert "line 1: more than 1,000 values in one row; left out" in issues.summary_lines()[0]
    monkeypatch.setattr("nextword.data.decoding.MAX_ROW_CHARS", 100_000)
    long_row = "".join(f'"{i}\n' + "x" * 9000 + '",' for i in range(20))
    found, issues = read(tmp_path / "a.csv", f"text\n{long_row}\ngood\n")
    assert found[-1][1] == {"text": "good"}
    assert "line 2: a row that is too long; left out: it has more than 100,000" in str(issues.summary_lines())


def test_a_row_of_very_many_lines_and_very_many_lost_rows_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CSV_SAMPLE_CHARS", 100)
    monkeypatch.setattr("nextword.data.decoding.MAX_ROW_LINES", 1000)
    table = "text,label\n" + '"' + "a\n" * 500 + '",x\n' + '"' + "a\n" * 3000 + '",x\ngood,y\n'
    found, issues = read(tmp_path / "a.csv", table)
    assert [values["text"] for _, values in found][:: len(found) - 1] == ["a\n" * 500, "good"]
    assert "line 503: a row that is too long; left out: it has more than 1,000 lines" in str(issues.summary_lines())
    monkeypatch.setattr("nextword.data.issues.MAX_LOST_ROWS", 1000)
    with pytest.raises(NextwordError, match=r"a.csv, line 2503: .*\. More than 1,000 rows cannot be read"):
        read(tmp_path / "a.csv", table)


def test_a_parquet_file_that_expands_is_refused_or_read_in_small_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("nextword.data.decoding.MIN_EXPANDED_BYTES", 2**25)
    monkeypatch.setattr(readers, "PARQUET_BATCH_BYTES", 2**23)
    path, rows = tmp_path / "a.parquet", ["x" * 2_000_000] * 100
    pq.write_table(
        pa.table({"text": pa.array(rows[:1] * 9).dictionary_encode(), "n": [1] * 9}), path, compression="zstd"
    )
    assert len(read(path)[0]) == 9
    pq.write_table(pa.table({"text": rows[:40], "n": range(40)}), path, compression="zstd", use_dictionary=False)
    with pytest.raises(NextwordError, match=r"a\.parquet: expands to more than 200 times its size"):
        read(path)
    assert len(read(path, select_columns=lambda names: ["n"])[0]) == 40
    pq.write_table(pa.table({"text": pa.array(rows).dictionary_encode()}), path, compression="zstd")
    tracemalloc.start()
    assert sum(len(record.values["text"]) for record in read_records(path, IssueLog())) == 200_000_000
    assert tracemalloc.get_traced_memory()[1] < 60_000_000
    tracemalloc.stop()


FRAGMENTS = st.sampled_from(
    [b"text", b",", b"\t", b'"', b"\n", b"\r", b'{"text": ', b'"a"', b"}", b"[", b"]", b":", b"\\ud800", b"\xff", b"1"]
)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".json.gz", ".json.zst", ".parquet"])
def test_no_input_is_fatal(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    pq.write_table(pa.table({"text": ["a", "b"], "l": [["c"], None]}), tmp_path / "good.parquet")
    good = (tmp_path / "good.parquet").read_bytes()

    @FUZZING
    @given(
        st.binary(max_size=200) | st.lists(FRAGMENTS, max_size=30).map(b"".join),
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
        found, issues = read(path, data)
        json.dumps([row for _, row in found], ensure_ascii=False, default=str).encode()
        try:
            list(read_records(path, IssueLog(strict=True)))
        except NextwordError:
            assert issues.total
        else:
            assert not issues.total

    check()
