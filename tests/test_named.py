"""Named corpora: the documentation of the running Python, and the Hub's, in small files of the same form."""

import subprocess
import sys

import pytest

from nextword.common.errors import NextwordError, UsageError
from nextword.data import builtin_datasets
from nextword.data.builtin_datasets import BUILTIN_DATASETS, builtin_sources
from nextword.data.documents import IssueLog


def texts_of(sources, problems):
    return {s.name: ["".join(d.chunks) for d in s.read(problems)] for s in sources}


def test_python_docs_reads_like_documentation(monkeypatch):
    problems = IssueLog()
    texts = texts_of(builtin_sources("python-docs", problems), problems)
    size = sum(len(t) for ts in texts.values() for t in ts)
    assert 1_500_000 < size < 6_000_000
    [decoder] = texts["python-docs/json/decoder.py"]
    assert decoder.startswith("# json.decoder\n\nImplementation of JSONDecoder\n\n## ")
    assert "\n## JSONDecoder.decode(s, _w=WHITESPACE.match)\n\nReturn the Python representation of ``s``" in decoder
    assert "# json\n" in texts["python-docs/json/__init__.py"][0]
    assert len(texts["python-docs/pydoc_data/topics.py"]) > 50
    assert not any("/test/" in name or "/tests/" in name or "site-packages" in name for name in texts)
    monkeypatch.setattr(
        builtin_datasets, "_parse", None
    )  # a second reading is of what was kept; this would fail if it parsed
    assert texts_of(builtin_sources("python-docs", problems), problems) == texts


def test_python_docs_imports_nothing_of_what_it_reads():
    program = (
        "import sys; from nextword.data.builtin_datasets import named_sources; from nextword.data.documents import Problems\n"
        "[list(d.pieces) for s in named_sources('python-docs', Problems()) for d in s.read(Problems())]\n"
        "assert not {'antigravity', 'turtle', 'idlelib', 'this', 'pydoc_data.topics', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_source_that_does_not_parse_is_reported(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text(
        '"""Good."""\nif True:\n    class A:\n        def f(self, x=1):\n            "Say \\d."\n'
    )
    (tmp_path / "bad.py").write_text("def (:\n")
    (tmp_path / "bytes.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "silent.py").write_text("x = 1\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_good.py").write_text('"""A test."""')
    monkeypatch.setattr(builtin_datasets.sysconfig, "get_path", lambda name: str(tmp_path))
    problems = IssueLog()
    texts = texts_of(builtin_sources("python-docs", problems), problems)
    assert {name: t for name, t in texts.items() if t} == {
        "python-docs/good.py": ["# good\n\nGood.\n\n## A.f(x=1)\n\nSay \\d.\n"]
    }
    assert [(p.path.rsplit("bad", 1)[-1], p.line) for p in problems.issues][:1] == [(".py", 1)] and problems.total == 2


def write_parquet(path, rows):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.positions({"text": rows}), path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("tinystories", "data/train-00000-of-00004-2d5a1467fff1081b.parquet"),
        ("fineweb-edu", "sample/10BT/000_00000.parquet"),
    ],
)
def test_a_hub_corpus_is_its_parquet_files(name, file, tmp_path, monkeypatch):
    write_parquet(tmp_path / file, ["One day, a girl.", "Once upon a time."])
    write_parquet(tmp_path / "data/validation-00000.parquet", ["not this"])
    asked = []
    monkeypatch.setattr(builtin_datasets, "_download", lambda *what: asked.append(what) or tmp_path)
    problems = IssueLog()
    assert texts_of(builtin_sources(name, problems), problems) == {
        f"{name}/{file}": ["One day, a girl.", "Once upon a time."]
    }
    assert asked[0][0] in BUILTIN_DATASETS[name] and problems.total == 0


def test_rows_of_wikitext_become_articles(tmp_path, monkeypatch):
    rows = ["", " = Valkyria = \n", "", " It is a game . \n", " = = Plot = = \n", "\n", " It goes on . \n"]
    write_parquet(tmp_path / "wikitext-103-raw-v1/train-00000.parquet", [*rows, " = Robert = \n", " An actor . \n"])
    monkeypatch.setattr(builtin_datasets, "_download", lambda *what: tmp_path)
    problems = IssueLog()
    [articles] = texts_of(builtin_sources("wikitext", problems), problems).values()
    assert articles == [
        " = Valkyria = \n\n It is a game . \n = = Plot = = \n\n It goes on . \n",
        " = Robert = \n An actor . \n",
    ]
    assert problems.total == 0


def test_the_download_asks_for_the_files_of_one_part(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **how: asked.update(repo=repo, **how) or str(tmp_path))
    with pytest.raises(NextwordError, match="holds no files"):
        builtin_sources("wikitext", IssueLog())
    assert asked == {
        "repo": "Salesforce/wikitext",
        "repo_type": "dataset",
        "allow_patterns": ["wikitext-103-raw-v1/train-*.parquet"],
    }

    def offline(*args, **how):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(NextwordError, match="could not be downloaded: no route"):
        builtin_sources("tinystories", IssueLog())


def test_an_unknown_name_is_refused():
    with pytest.raises(UsageError, match="python-docs"):
        builtin_sources("moby-dick", IssueLog())
