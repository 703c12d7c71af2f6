"""Built-in datasets: the documentation of the running Python, and those of the Hub, in small files of the same form."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import huggingface_hub
import pytest

from nextword.common.errors import NextwordError, UsageError
from nextword.data import builtin_datasets
from nextword.data.builtin_datasets import BUILTIN_DATASETS, builtin_sources
from nextword.data.issues import IssueLog


def read_texts(name):
    """The texts of each source file of a dataset, and the issues."""
    issues = IssueLog()
    texts = {s.name: ["".join(d.chunks) for d in s.read(issues)] for s in builtin_sources(name, issues)}
    return texts, issues


def test_python_docs_are_documents_of_modules_and_topics(monkeypatch):
    texts, _ = read_texts("python-docs")
    assert 1_500_000 < sum(len(text) for documents in texts.values() for text in documents) < 6_000_000
    [decoder] = texts["python-docs/json/decoder.py"]
    assert decoder.startswith("# json.decoder\n\nImplementation of JSONDecoder\n\n## ")
    assert "\n## JSONDecoder.decode(s, _w=WHITESPACE.match)\n\nReturn the Python representation of ``s``" in decoder
    assert "# json\n" in texts["python-docs/json/__init__.py"][0]
    assert len(texts["python-docs/pydoc_data/topics.py"]) > 50
    assert not any("/test/" in name or "/tests/" in name or "site-packages" in name for name in texts)
    monkeypatch.setattr(builtin_datasets.ast, "parse", None)  # the second reading uses the cache
    assert read_texts("python-docs")[0] == texts


def test_python_docs_does_not_import_the_modules(tmp_path):
    """As `antigravity`, which opens a browser, and `this`, which prints."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("antigravity.py", "this.py", "pydoc_data/topics.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(library / name, tmp_path / name)
    program = (
        "import sys, sysconfig; from nextword.data.builtin_datasets import builtin_sources\n"
        f"sysconfig.get_path = lambda name: {str(tmp_path)!r}\n"
        "from nextword.data.issues import IssueLog\n"
        "assert len([list(d.chunks) for s in builtin_sources('python-docs', IssueLog()) for d in s.read(IssueLog())]) > 50\n"
        "assert not {'antigravity', 'this', 'pydoc_data.topics', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_source_with_a_syntax_error_is_recorded(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text(
        '"""Good."""\nif True:\n    class A:\n        def f(self, x=1):\n            "Say \\d."\n'
    )
    (tmp_path / "bad.py").write_text("def (:\n")
    (tmp_path / "bytes.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "undocumented.py").write_text("x = 1\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_good.py").write_text('"""A test."""')
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    texts, issues = read_texts("python-docs")
    assert {name: documents for name, documents in texts.items() if documents} == {
        "python-docs/good.py": ["# good\n\nGood.\n\n## A.f(x=1)\n\nSay \\d.\n"]
    }
    assert (issues.issues[0].path, issues.issues[0].line) == (str(tmp_path / "bad.py"), 1) and issues.total == 2


# ---------------------------------------------------------------- the Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in the place of the Hub; the arguments of each download."""
    downloads = []

    def snapshot_download(repository, **arguments):
        downloads.append({"repository": repository, **arguments})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return downloads


def write_parquet(path, rows):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": rows}), path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("tinystories", "data/train-00000-of-00004-2d5a1467fff1081b.parquet"),
        ("fineweb-edu", "sample/10BT/000_00000.parquet"),
    ],
)
def test_a_hub_dataset_is_its_training_files(name, file, tmp_path, hub):
    rows = ["One day, a girl.", "Once upon a time."]
    write_parquet(tmp_path / file, rows)
    write_parquet(tmp_path / "data/validation-00000.parquet", ["not this"])
    texts, issues = read_texts(name)
    assert texts == {f"{name}/{file}": rows} and issues.total == 0
    assert hub[0]["repository"] in BUILTIN_DATASETS[name]


def test_wikitext_rows_are_joined_to_articles(tmp_path, hub):
    rows = ["", " = Valkyria = \n", "", " It is a game . \n", " = = Plot = = \n", "\n", " It goes on . \n"]
    write_parquet(tmp_path / "wikitext-103-raw-v1/train-00000.parquet", [*rows, " = Robert = \n", " An actor . \n"])
    texts, issues = read_texts("wikitext")
    [articles] = texts.values()
    assert articles == [
        " = Valkyria = \n\n It is a game . \n = = Plot = = \n\n It goes on . \n",
        " = Robert = \n An actor . \n",
    ]
    assert issues.total == 0


def test_only_the_training_files_are_downloaded(hub, monkeypatch):
    with pytest.raises(NextwordError, match="holds no files"):
        builtin_sources("wikitext", IssueLog())
    assert hub == [
        {
            "repository": "Salesforce/wikitext",
            "repo_type": "dataset",
            "allow_patterns": ["wikitext-103-raw-v1/train-*.parquet"],
        }
    ]

    def offline(*args, **arguments):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(NextwordError, match="could not be downloaded: no route"):
        builtin_sources("tinystories", IssueLog())


def test_an_unknown_name_is_refused():
    with pytest.raises(UsageError, match="python-docs"):
        builtin_sources("moby-dick", IssueLog())
