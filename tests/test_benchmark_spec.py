"""Benchmarks: specifications, published formats, invalid rows, samples and shuffled words."""

import json
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.common.text_units import split_words
from nextword.data.issues import IssueLog
from nextword.tasks import benchmark_items
from nextword.tasks.benchmark_items import (
    BenchmarkRow,
    generation_item,
    load_rows,
    loglikelihood_item,
    sample_indices,
    shuffle_words,
)
from nextword.tasks.benchmark_spec import BENCHMARK_KINDS, find_benchmark, load_benchmarks

BLIMP = [
    {
        "sentence_good": "Who should Derek hug?",
        "sentence_bad": "Who should hug Derek?",
        "UID": "islands",
        "pairID": "0",
    },
    {"sentence_good": "Cats sleep.", "sentence_bad": "Cats sleeps.", "UID": "agreement", "pairID": "1"},
]
HELLASWAG = {
    "ind": 4,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "split": "val",
    "label": "3",
    "endings": ["is using wrap.", "is ripping [title] tiles  off.", "is [step] holding a cube.", "starts pulling."],
}
ICE = [{"text": "ice", "label": "A"}, {"text": "fire", "label": "B"}]
FIRE = [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}]
ARC = [
    {"id": "M_1", "question": {"stem": "What is hot?", "choices": ICE}, "answerKey": "B"},
    {"id": "M_2", "question": {"stem": "What is cold?", "choices": FIRE}, "answerKey": "1"},
]
STEREOSET = {
    "version": "1.0",
    "data": {
        "intersentence": [
            {
                "id": "b",
                "target": "Ethiopia",
                "bias_type": "race",
                "context": "Many people live there.",
                "sentences": [
                    {"sentence": "They are thin.", "id": "1", "labels": [], "gold_label": "stereotype"},
                    {"sentence": "They are fat.", "id": "2", "labels": [], "gold_label": "anti-stereotype"},
                    {"sentence": "Cats have claws.", "id": "3", "labels": [], "gold_label": "unrelated"},
                ],
            }
        ],
        "intrasentence": [
            {
                "id": "a",
                "target": "chess player",
                "bias_type": "profession",
                "context": "The chess player was BLANK.",
                "sentences": [
                    {"sentence": "The chess player was fox.", "id": "1", "gold_label": "unrelated"},
                    {"sentence": "The chess player was hispanic.", "id": "2", "gold_label": "anti-stereotype"},
                    {"sentence": "The chess player was asian.", "id": "3", "gold_label": "stereotype"},
                ],
            }
        ],
    },
}
CROWS = (
    ",sent_more,sent_less,stereo_antistereo,bias_type,annotations\n"
    '0,"He couldn\'t, they said.","She couldn\'t, they said.",stereo,gender,"[[\'gender\']]"\n'
)


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(request: str, issues: IssueLog | None = None):
    benchmark = find_benchmark(request)
    issues = issues or IssueLog(strict=True)
    return benchmark, load_rows(benchmark, issues)


# ---------------------------------------------------------------- published formats


def test_blimp_is_a_folder_an_archive_or_a_file(tmp_path):
    folder = tmp_path / "blimp"
    folder.mkdir()
    for row in BLIMP:
        jsonl(folder / f"{row['UID']}.jsonl", [row])
    (folder / "README.md").write_text("not a table")
    with tarfile.open(tmp_path / "blimp.tar.xz", "w:xz") as archive:
        archive.add(folder, "blimp")
    for path in (folder, tmp_path / "blimp.tar.xz", jsonl(tmp_path / "all.jsonl", BLIMP[::-1])):
        benchmark, rows = load(f"blimp={path}")
        assert [item.group for item in rows] == ["agreement", "islands"]
        item = loglikelihood_item(benchmark, rows[1])
        assert item.requests == (("", " Who should Derek hug?"), ("", " Who should hug Derek?"))  # as in lm-eval
        assert (item.choices, item.gold_index) == (("Who should Derek hug?", "Who should hug Derek?"), 0)
    assert rows[0].path.endswith("all.jsonl") and [item.line for item in rows] == [1, 2]
    assert load(f"blimp={tmp_path / 'blimp.tar.xz'}")[1][0].path == str(tmp_path / "blimp.tar.xz/blimp/agreement.jsonl")


def test_hellaswag_is_cleaned_as_by_lm_eval(tmp_path):
    benchmark, rows = load(f"hellaswag={jsonl(tmp_path / 'h.jsonl', [HELLASWAG])}")
    item = loglikelihood_item(benchmark, rows[0])
    contexts, endings = zip(*item.requests, strict=True)
    assert set(contexts) == {"Roof shingle removal: A man is sitting on a roof. He"}
    assert endings == (" is using wrap.", " is ripping. tiles off.", " is holding a cube.", " starts pulling.")
    assert item.gold_index == 3
    joined = {"context": "A man sits. he", "endings": ["a", "b"], "label": 0}
    empty = HELLASWAG | {"ctx_b": ""}
    benchmark, rows = load(f"hellaswag={jsonl(tmp_path / 'j.jsonl', [joined, empty])}")
    assert [loglikelihood_item(benchmark, item).requests[0][0] for item in rows] == [
        "A man sits. he",
        "Roof shingle removal: A man is sitting on a roof.",
    ]


def test_arc_in_three_formats(tmp_path):
    hub = {"question": "What is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
    plain = {"question": "What is hot?", "choices": ["ice", "fire"], "answer": 1}
    for rows in (ARC, [hub], [plain]):
        benchmark, rows = load(f"arc={jsonl(tmp_path / 'arc.jsonl', rows)}")
        item = loglikelihood_item(benchmark, rows[0])
        assert item.requests == (
            ("Question: What is hot?\nAnswer:", " ice"),
            ("Question: What is hot?\nAnswer:", " fire"),
        )
        assert item.gold_index == 1
    benchmark, rows = load(f"arc-challenge={jsonl(tmp_path / 'arc.jsonl', ARC)}")
    assert loglikelihood_item(benchmark, rows[1]).gold_index == 0


def test_lambada_predicts_the_last_word(tmp_path):
    (tmp_path / "l.txt").write_text("she gave him a smile\n\nhe said : no\n", encoding="utf-8")
    jsonl(tmp_path / "l.jsonl", [{"text": "she gave him a smile"}, {"text": "he said : no"}])
    for name in ("l.txt", "l.jsonl"):
        benchmark, rows = load(f"lambada={tmp_path / name}")
        requests = [loglikelihood_item(benchmark, item).requests for item in rows]
        assert requests == [(("she gave him a", " smile"),), (("he said :", " no"),)]


def test_free_text_prompts_in_a_folder(tmp_path):
    long = " ".join(f"word{i}" for i in range(40))
    (tmp_path / "a.md").write_text(f"# A title\n\n{long}\n", encoding="utf-8")
    jsonl(tmp_path / "b.jsonl", [{"prompt": "Once upon"}])
    benchmark, rows = load(f"free={tmp_path}")
    items = [generation_item(benchmark, item) for item in rows]
    assert [one.prompt.split()[-1] for one in items] == ["title", "word15", "upon"]
    assert items[1].references == (long[len(items[1].prompt) :],)


def test_stereoset_and_crows_pairs(tmp_path):
    (tmp_path / "dev.json").write_text(json.dumps(STEREOSET))
    benchmark, rows = load(f"stereoset={tmp_path / 'dev.json'}")
    assert rows[0].group == "profession"
    assert loglikelihood_item(benchmark, rows[0]).choices == tuple(
        f"The chess player was {word}." for word in ("asian", "hispanic", "fox")
    )
    benchmark, rows = load(f"stereoset-discourse={tmp_path / 'dev.json'}")
    assert loglikelihood_item(benchmark, rows[0]).requests[0] == ("Many people live there.", " They are thin.")
    columns = {"sentence": ["a b", "c d", "e f"], "gold_label": [2, 0, 1]}  # as on the Hub
    benchmark, rows = load(f"stereoset={jsonl(tmp_path / 's.jsonl', [{'bias_type': 'race', 'sentences': columns}])}")
    assert loglikelihood_item(benchmark, rows[0]).choices == ("e f", "c d", "a b")
    (tmp_path / "crows.csv").write_text(CROWS)
    benchmark, rows = load(f"crows-pairs={tmp_path / 'crows.csv'}")
    assert loglikelihood_item(benchmark, rows[0]).requests == (
        ("", "He couldn't, they said."),
        ("", "She couldn't, they said."),
    )
    assert (rows[0].group, benchmark.metrics) == ("gender", ("stereotyped",))


WINOGENDER = (
    "sentid\tsentence\n"
    "nurse.patient.1.female.txt\tThe nurse notified the patient that her shift would be ending.\n"
    "nurse.someone.0.neutral.txt\tThe nurse notified someone that their shift would be ending.\n"
)


def test_winogender(tmp_path):
    (tmp_path / "all.tsv").write_text(WINOGENDER)
    benchmark, rows = load(f"winogender={tmp_path / 'all.tsv'}")
    requests = [loglikelihood_item(benchmark, item) for item in rows]
    sentence = "The nurse notified the patient that her shift would be ending."
    assert requests[0].requests == tuple((f"{sentence} ‘Her’ refers to the", f" {one}") for one in ("nurse", "patient"))
    assert [one.gold_index for one in requests] == [1, 0]
    assert [item.group for item in rows] == ["female", "neutral"]
    hub = {
        "sentid": "nurse.patient.1.female.txt",
        "sentence": sentence,
        "pronoun": "her",
        "occupation": "nurse",
        "participant": "patient",
        "gender": "female",
        "target": "patient",
        "label": 1,
    }
    benchmark, rows = load(f"winogender={jsonl(tmp_path / 'hub.jsonl', [hub])}")
    assert loglikelihood_item(benchmark, rows[0]) == requests[0]


def test_a_benchmark_without_a_path_is_downloaded(tmp_path, monkeypatch):
    path, requests = jsonl(tmp_path / "x.jsonl", BLIMP), []
    monkeypatch.setattr(
        benchmark_items, "download_hub_files", lambda *what: requests.append(what) or (tmp_path, [path])
    )
    assert len(load("blimp")[1]) == 2
    assert requests == [("blimp", "nyu-mll/blimp", "*/train-*.parquet")]
    with pytest.raises(UsageError, match="crows-pairs: give the path of its files: --benchmark crows-pairs=PATH"):
        load("crows-pairs")


# ---------------------------------------------------------------- specifications

MINE = """
# Agreement in another language
[agreement]
kind = "minimal pairs"
files = ["pairs*.jsonl"]
good = "haki"
bad = "batili"
delimiter = ""

[questions]
kind = "multiple choice"
files = ["quiz.csv"]
prompt = "{swali}\\nJibu:"
choices = ["A", "B", "C"]
answer = "jibu"

[summaries]
kind = "writing"
files = ["s.jsonl"]
prompt = "{text}\\nTL;DR:"
reference = "summary"
metrics = ["chrf", "exact_match"]
max_tokens = 9
stop = "\\n"
"""


def test_a_custom_benchmark(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(MINE, encoding="utf-8")
    jsonl(tmp_path / "pairs1.jsonl", [{"haki": "Paka analala", "batili": "Paka wanalala"}])
    jsonl(tmp_path / "pairs2.jsonl", [{"haki": "Mtu anakula", "batili": "Mtu wanakula"}])
    (tmp_path / "quiz.csv").write_text("swali,A,B,C,jibu\nMoto?,barafu,moto,maji,B\nBaridi?,barafu,moto,,A\n")
    jsonl(tmp_path / "s.jsonl", [{"text": "Long.", "summary": ["Short", "Brief"]}])
    benchmark, rows = load(f"agreement={file}")
    assert [loglikelihood_item(benchmark, item).requests[1] for item in rows] == [
        ("", "Paka wanalala"),
        ("", "Mtu wanakula"),
    ]
    benchmark, rows = load(f"questions={file}")
    assert [(len(q.requests), q.gold_index) for q in (loglikelihood_item(benchmark, item) for item in rows)] == [
        (3, 1),
        (2, 0),
    ]
    assert loglikelihood_item(benchmark, rows[0]).requests[1] == ("Moto?\nJibu:", " moto")
    benchmark, rows = load(f"summaries={file}")
    assert generation_item(benchmark, rows[0]) == ("Long.\nTL;DR:", ("Short", "Brief"))
    assert (benchmark.metrics, benchmark.max_tokens, benchmark.stop) == (("chrf", "exact_match"), 9, ("\n",))
    with pytest.raises(UsageError, match="specifies agreement, questions, summaries; select one"):
        find_benchmark(str(file))
    alone = tmp_path / "alone.toml"
    alone.write_text('kind = "cloze"\nfiles = ["s.jsonl"]\nprompt = "{text}"\nanswer = "title"\n')
    assert find_benchmark(str(alone)).name == "alone"
    assert find_benchmark(f"other={alone}").name == "other"


def test_a_benchmark_that_extends_another(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[mine]\nlike = 'blimp'\nfiles = 'p.jsonl'\nwithin = {UID = '(?P<kind>\\w)'}\ngroup = 'kind'\n")
    jsonl(tmp_path / "p.jsonl", BLIMP)
    benchmark, rows = load(str(file))
    assert (benchmark.name, benchmark.kind, [item.group for item in rows]) == ("mine", "minimal pairs", ["i", "a"])
    assert find_benchmark("ARC_Easy").hub_dataset == find_benchmark("arc").hub_dataset


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nkind = 3", "a.toml line 2: [a] kind must be one of minimal pairs"),
        ("[a]\ngood = 'x'", "line 1: [a] kind must be one of"),
        (
            "[b]\nkind = 'cloze'\ntext = 't'\n[a]\nkind = 'minimal pairs'\ngood = 'x'\n",
            "line 4: [a] minimal pairs requires the key bad",
        ),
        (
            "[a]\nkind = 'minimal pairs'\ngood = 'x'\nbad = 'y'\ncolour = 'z'",
            "line 5: [a] minimal pairs has no key 'colour'",
        ),
        ("[a]\nkind = 'minimal pairs'\ngood = 'x'\nbad = ['y']", "line 4: [a] bad must be a string"),
        (
            "[a]\nkind = 'minimal pairs'\nfiles = [1]\ngood = 'x'\nbad = 'y'",
            "line 3: [a] files must be a string or a list",
        ),
        ("[a]\nkind = 'cloze'", "line 1: [a] cloze requires text (whose last word is predicted), or prompt and answer"),
        ("[a]\nkind = 'cloze'\nprompt = 'x'", "requires text (whose last word"),
        ("kind = 'free text'\nmax_tokens = 0", "line 2: [a] max_tokens must be an integer of at least 1"),
        (
            "[a]\nkind = 'completion'\nprompt = '{x'\nchoices = 'c'\nanswer = 'a'",
            "line 3: [a] the prompt '{x' is not a valid",
        ),
        (
            "[a]\nkind = 'completion'\nmetric = 'f1'\nprompt = '{x}'\nchoices = 'c'\nanswer = 'a'",
            "line 3: [a] metric must be one of",
        ),
        ("[a]\nkind = 'writing'\nprompt = '{x}'\nreference = 'y'\nmetrics = ['f2']", "line 5: [a] unknown metric 'f2'"),
        ("[a]\nkind = 'cloze'\ntext = 't'\nclean = 'soap'", "line 4: [a] clean must be one of wikihow"),
        ("[a]\nlike = 'blymp'", "line 2: [a] like must be one of blimp, hellaswag"),
        ("[a]\nlike = 'blimp'\ncolour = 'z'", "line 3: [a] minimal pairs has no key 'colour'"),
        ("[a]\nkind = 'cloze'\ntext = 't'\nwithin = 'x'", "line 4: [a] within must map columns to regular"),
        ("[a]\nkind = 'cloze'\ntext = 't'\nwithin.x = '('", "line 4: [a] within has an invalid regular expression"),
        (
            "[a]\nkind = 'cloze'\ntext = 't'\nwithin.x = 'y'",
            "line 4: [a] the pattern of x in within has no named group",
        ),
        ("[a\nkind = 'cloze'", "a.toml: not valid TOML: Expected ']'"),
        ("b = 3\na = 4", "line 1: [a] kind must be one of"),
    ],
)
def test_an_invalid_specification_is_reported_with_file_and_line(tmp_path, text, message):
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_benchmarks(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("blymp", "unknown benchmark 'blymp': choose from blimp, hellaswag, arc"),
        ("mine=x.jsonl", "specify it in a file and pass mine=FILE.toml"),
        ("blimp=nowhere.jsonl", "nowhere.jsonl: no such file or folder"),
        ("nowhere.toml", "nowhere.toml: No such file"),
    ],
)
def test_an_unknown_benchmark(request_, message):
    with pytest.raises(UsageError, match=message):
        find_benchmark(request_)


TOML = st.recursive(
    st.one_of(st.text(max_size=9), st.integers(-3, 3), st.booleans()),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)
SAID = ["kind", "like", "within", "files", "hub", "metric", "clean", "group", "delimiter", "x"]
KEYS = sorted({*SAID, *(key for needed, allowed, _ in BENCHMARK_KINDS.values() for key in needed + allowed)})


@given(table=st.dictionaries(st.sampled_from(KEYS), TOML, max_size=7), kind=st.sampled_from([None, *BENCHMARK_KINDS]))
def test_any_specification_is_accepted_or_rejected_with_a_message(tmp_path_factory, table, kind):
    file = tmp_path_factory.getbasetemp() / "any.toml"
    table |= {} if kind is None else {"kind": kind}
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()), encoding="utf-8")
    try:
        [benchmark] = load_benchmarks(file).values()
    except UsageError as error:
        assert str(error).startswith(f"{file}")
    else:
        assert benchmark.kind == table["kind"] and benchmark.metrics


@given(st.binary(max_size=300))
def test_any_bytes_are_a_specification_or_rejected(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "bytes.toml"
    file.write_bytes(data)
    try:
        load_benchmarks(file)
    except UsageError as error:
        assert str(file) in str(error)


# ---------------------------------------------------------------- rows that are wrong


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("blimp", {"sentence_good": "a b"}, "line 2: no column sentence_bad: columns: sentence_good, UID"),
        ("blimp", {"sentence_good": "a b", "sentence_bad": True}, "line 2: the bad is not a text: its type is bool"),
        ("blimp", {"sentence_good": " ", "sentence_bad": "x", "UID": "u"}, "line 2: the good is empty"),
        ("arc", ARC[0] | {"answerKey": "Z"}, "line 2: the answer is none of the choices: it is 'Z'"),
        ("arc", {"question": "Q", "choices": ["one"], "answer": 0}, "line 2: fewer than two choices"),
        ("arc", {"question": "Q", "choices": ["a", "b"]}, "line 2: no column answerKey or answer"),
        ("hellaswag", {"endings": ["a", "b"], "label": 0}, "line 2: no column activity_label"),
        ("hellaswag", {"ctx": "x", "endings": ["[a]", "b"], "label": 0}, "line 2: a choice is empty"),
        ("lambada", {"text": "word"}, "line 2: the text has fewer than two words"),
        (
            "stereoset",
            {"sentences": [{"sentence": "x", "gold_label": "stereotype"}], "bias_type": "r"},
            "line 2: there is not one sentence for each gold_label",
        ),
        (
            "stereoset",
            {"sentences": {"sentence": 3, "gold_label": [[]]}, "bias_type": "r"},
            "line 2: there is not one sentence",
        ),
    ],
)
def test_an_invalid_row_is_reported_with_file_and_line(tmp_path, name, row, message):
    right = {
        "blimp": BLIMP[0],
        "arc": ARC[0],
        "hellaswag": HELLASWAG,
        "lambada": {"text": "a b"},
        "stereoset": {"bias_type": "r", "sentences": {"sentence": ["a b", "c d", "e f"], "gold_label": [2, 0, 1]}},
    }[name]
    if name == "blimp" and "UID" not in row:
        row = {**row, "UID": "u"}
    path = jsonl(tmp_path / "rows.jsonl", [right, row, right])
    issues = IssueLog()
    assert len(load(f"{name}={path}", issues)[1]) == 2
    assert f"{path} {message}" in issues.summary_lines()[0]
    with pytest.raises(NextwordError, match=r"no valid item in .*\n.*rows\.jsonl"):
        load(f"{name}={jsonl(path, [row])}", IssueLog())


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 5), st.floats(), st.text(max_size=12)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["text", "label", "stem", "choices", "sentence", "gold_label"]), inner, max_size=4
        ),
    ),
    max_leaves=8,
)
COLUMNS = (
    "sentence_good sentence_bad UID question choices answer answerKey context endings label ctx_a ctx_b "
    "activity_label text sentences bias_type prompt"
).split()


@given(
    name=st.sampled_from(["blimp", "arc", "hellaswag", "lambada", "stereoset", "free"]),
    rows=st.lists(st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=6), min_size=1, max_size=3),
)
def test_any_row_is_an_item_or_an_issue(tmp_path_factory, name, rows):
    path = jsonl(tmp_path_factory.getbasetemp() / "any.jsonl", rows)
    issues = IssueLog()
    try:
        benchmark, rows = load(f"{name}={path}", issues)
    except NextwordError as error:
        assert "no valid item" in str(error)
        return
    assert len(rows) + issues.total >= len(rows)
    for row in rows:
        if name == "free":
            assert generation_item(benchmark, row).prompt.strip()
            continue
        for shuffled in (False, True):
            item = loglikelihood_item(benchmark, row, shuffled)
            assert 0 <= item.gold_index < len(item.requests) == len(item.choices)
            assert all(answer for answer in item.choices)


@given(st.binary(max_size=200))
def test_any_bytes_are_rows_or_a_clear_error(tmp_path_factory, data):
    for suffix in (".jsonl", ".csv", ".json", ".tar.xz", ".tar", ".txt"):
        path = tmp_path_factory.getbasetemp() / f"any{suffix}"
        path.write_bytes(data)
        for name in ("lambada", "stereoset"):
            try:
                load(f"{name}={path}", IssueLog())
            except NextwordError as error:
                assert path.name in str(error)


def test_corrupt_and_unsafe_archives(tmp_path, monkeypatch):
    jsonl(tmp_path / "b.jsonl", BLIMP * 2000)
    with tarfile.open(tmp_path / "b.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "b.jsonl", "b.jsonl")
    whole = (tmp_path / "b.tar.xz").read_bytes()
    assert len(load(f"blimp={tmp_path / 'b.tar.xz'}")[1]) == 4000
    (tmp_path / "b.tar.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFileError, match=r"b\.tar\.xz: cannot read the archive"):
        load(f"blimp={tmp_path / 'b.tar.xz'}")
    with tarfile.open(tmp_path / "out.tar", "w") as archive:
        archive.add(tmp_path / "b.jsonl", "../b.jsonl")
    with pytest.raises(CorruptFileError, match=r"\.\./b\.jsonl is outside the archive"):
        load(f"blimp={tmp_path / 'out.tar'}")
    monkeypatch.setattr("nextword.data.decoding.MIN_EXPANDED_BYTES", 2**20)
    with tarfile.open(tmp_path / "bomb.tar.xz", "w:xz") as archive:
        member = tarfile.TarInfo("b.jsonl")
        member.pax_headers = {"comment": "x" * 2**22}  # `tarfile` holds it in memory whole
        archive.addfile(member)
    with pytest.raises(NextwordError, match=r"bomb\.tar\.xz: expands to more than 200 times its size"):
        load(f"blimp={tmp_path / 'bomb.tar.xz'}")
    jsonl(tmp_path / "b.jsonl", BLIMP)
    for suffix, mode in ((".tar", "w"), (".tgz", "w:gz"), (".tar.gz", "w:gz"), (".tar.bz2", "w:bz2"), (".txz", "w:xz")):
        with tarfile.open(tmp_path / f"b{suffix}", mode) as archive:
            archive.add(tmp_path / "b.jsonl", "b.jsonl")
        assert len(load(f"blimp={tmp_path / f'b{suffix}'}")[1]) == 2


# ---------------------------------------------------------------- samples and shuffling


def rows_of(groups: str) -> list[BenchmarkRow]:
    return [BenchmarkRow("x", i, {}, group) for i, group in enumerate(groups)]


@given(groups=st.text("abc", min_size=1, max_size=80), limit=st.integers(1, 90))
def test_a_sample_is_stratified_and_deterministic(groups, limit):
    rows = rows_of(groups)
    places = sample_indices(rows, limit)
    assert places == sample_indices(rows, limit) == sorted(set(places))
    assert len(places) == min(limit, len(rows))
    for group in set(groups):
        share = len(places) * groups.count(group) / len(groups)
        assert abs(sum(groups[i] == group for i in places) - share) < 2
    assert sample_indices(rows, None) == list(range(len(rows)))


def test_a_sample_is_not_a_prefix():
    places = sample_indices(rows_of("a" * 1000), 100)
    assert 300 < sum(places) / 100 < 700
    assert len({b - a for a, b in pairwise(places)}) > 5  # and not evenly spaced


@given(st.text(max_size=60))
def test_shuffled_text_has_the_same_words(text):
    [shuffled] = shuffle_words([text], "1")
    assert sorted(split_words(shuffled)) == sorted(split_words(text)) or sorted("".join(shuffled.split())) == sorted(
        "".join(text.split())
    )
    assert [shuffled] == shuffle_words([text], "1")


@given(st.lists(st.sampled_from(["a", "b", "the", "cat"]), min_size=1, max_size=4), st.integers(1, 100))
def test_no_text_keeps_its_order(words, line):
    """Of two words, a hash alone leaves half of the texts as they are."""
    texts = [" ".join(words) + ".", " ".join([*words[:-1], "sees"]) + "."]
    for text, shuffled in zip(texts, shuffle_words(texts, str(line)), strict=True):
        assert (shuffled != text) == (len(set(text[:-1].split())) > 1)
    swapped = ["left right", "right left"]  # one order for both
    assert len(set(shuffle_words(swapped, str(line)))) == 1


def test_the_shared_words_of_a_pair_keep_one_order():
    texts = [f"the cats that the dog saw {verb} very well today" for verb in ("sleep", "sleeps")]
    good, bad = shuffle_words(texts, "5")
    assert good.replace("sleep", "").split() == bad.replace("sleeps", "").split()
    assert shuffle_words(["a b c d e f g"], "1") != shuffle_words(["a b c d e f g"], "2")
    chinese = "白日依山尽黄河入海流欲穷千里目更上一层楼"
    assert shuffle_words([chinese], "1") != [chinese]


def test_the_context_is_shuffled_but_not_the_choices(tmp_path):
    row = {"question": "a b c d e f", "choices": ["x y z", "w"], "answer": 1}
    benchmark, rows = load(f"arc={jsonl(tmp_path / 'a.jsonl', [row])}")
    true, shuffled = loglikelihood_item(benchmark, rows[0]), loglikelihood_item(benchmark, rows[0], shuffled=True)
    assert shuffled.choices == true.choices and shuffled.gold_index == true.gold_index
    assert shuffled.requests[0][0].startswith("Question: ") and shuffled.requests[0][0].endswith("\nAnswer:")
    assert shuffled.requests[0][0] != true.requests[0][0]
    benchmark, rows = load(f"blimp={jsonl(tmp_path / 'b.jsonl', BLIMP)}")
    shuffled = loglikelihood_item(benchmark, rows[0], shuffled=True)
    assert shuffled.requests[0] == shuffled.requests[1]  # the same split_words in the same order
