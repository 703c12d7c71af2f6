"""Many processes prepare one corpus: the bytes of one alone, whoever does what, in any order, and through a kill."""

import itertools
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nextword.errors import MissingDependencyError, NextwordError, UsageError
from nextword.files import MANIFEST, sha256_file
from nextword.text import corpus as corpus_module
from nextword.text import shards as shards_module
from nextword.text import tokenizer as tokenizer_module
from nextword.text.corpus import Corpus
from nextword.text.together import parse_shard, partition_by_size, prepare

import nextword as package
from conftest import nextword_command
from processes import PATIENCE, start_process, wait_until
from test_corpus import article, write


def hashes(out: Path) -> dict[str, str]:
    """Every file of a prepared corpus, the manifest with its facts included."""
    return {path.relative_to(out).as_posix(): sha256_file(path) for path in sorted(out.rglob("*"))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of several formats and sizes, with duplicates across them, flaws, and two that hold nothing."""
    folder = write(tmp_path / "texts", {f"{i:02}.txt": article(i, 20 + 17 * i) for i in range(30)})
    rows = [f'{{"text": "row {i}: {article(i).strip()[:60]}"}}'.replace("\n", " ") for i in range(40)]
    write(folder, {"05-copy.md": article(5, 20 + 17 * 5), "a.jsonl": "\n".join([*rows, "{", *rows[:9]]) + "\n"})
    write(folder, {"b.csv": "n,text\n1,one row\n2,another row\n", "empty.txt": "", "note.png": "", ".hidden": ""})
    (folder / "broken.txt").write_bytes(b"plenty of good text \xff here \xfe and there")
    return folder


# ---------------------------------------------------------------- the same bytes


@pytest.mark.parametrize(
    "parts, tokenizer", [(1, "bpe"), (2, "char"), (3, "bpe"), (5, "bpe"), (5, "char"), (45, "bpe")]
)
def test_the_parts_together_are_the_bytes_of_one_process(parts, tokenizer, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "SHARD_TOKENS", 1500)  # several files, not cut where the parts are
    monkeypatch.setattr(shards_module, "COPIED", 400)
    said: list[str] = []
    corpus_module.prepare([folder], tmp_path / "alone", tokenizer=tokenizer)
    together = prepare([folder], tmp_path / "out", f"{parts}/{parts}", tokenizer=tokenizer, say=said.append)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")
    assert together.duplicates >= 10 and together.problems["total"] >= 3
    assert len(list((tmp_path / "out").glob("train-*.npy"))) > 3
    done = [line for line in said if line.endswith(f" of {parts}") and "-" in line]
    assert len(done) == 3 * parts and len(set(done)) == 3 * parts
    assert {path.name for path in tmp_path.iterdir() if ".parts" in path.name or ".partial" in path.name} == set()


@pytest.mark.parametrize("parts", [2, 3])
def test_few_documents_are_cut_at_the_same_place(parts, tmp_path):
    texts = {f"{i}.txt": article(i, 4000 + 6000 * i) for i in range(4)}  # up to three pieces each
    folder = write(tmp_path / "in", {**texts, "copy.txt": texts["1.txt"], "x.txt": "é"})
    for tokenizer in ("bpe", "char"):
        corpus_module.prepare([folder], tmp_path / f"alone-{tokenizer}", tokenizer=tokenizer)
        prepare([folder], tmp_path / tokenizer, f"1/{parts}", tokenizer=tokenizer)
        assert hashes(tmp_path / tokenizer) == hashes(tmp_path / f"alone-{tokenizer}")


@pytest.mark.parametrize("sample, words", [(2**26, 2**22), (9000, 2**22), (9000, 300), (2**26, 400)])
def test_the_tokenizer_is_drawn_from_the_same_sample(sample, words, folder, tmp_path, monkeypatch):
    """Where the text is larger than a tokenizer is trained on, and one part of it alone may not be."""
    monkeypatch.setattr(tokenizer_module, "SAMPLE", sample)
    monkeypatch.setattr(tokenizer_module, "SAMPLE_WORDS", words)
    corpus_module.prepare([folder], tmp_path / "alone", vocab_size=500)
    for parts in (2, 7):
        prepare([folder], tmp_path / str(parts), f"2/{parts}", vocab_size=500)
        assert hashes(tmp_path / str(parts)) == hashes(tmp_path / "alone")


@settings(max_examples=60)
@given(
    st.lists(st.text("abcde ", min_size=1, max_size=12), max_size=40), st.integers(1, 6), st.integers(5, 120),
    st.integers(1, 40),
)  # fmt: skip
def test_what_is_drawn_of_the_parts_is_what_is_drawn_of_the_whole(texts, parts, sample, words):
    numbered = [(tokenizer_module.number_of(place), text) for place, text in enumerate(texts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "SAMPLE", sample)
        patch.setattr(tokenizer_module, "SAMPLE_WORDS", words)
        whole = tokenizer_module.generated(numbered, tokenizer_module.DRAWS)
        each = -(-len(texts) // parts) or 1
        some = [
            tokenizer_module.generated(numbered[i : i + each], tokenizer_module.DRAWS)
            for i in range(0, len(texts), each)
        ]
        limit = min((limit for _, limit in some), default=tokenizer_module.DRAWS)
        assert tokenizer_module.generated([one for kept, _ in some for one in kept], limit) == whole


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 12))
def test_files_are_cut_into_parts_of_about_the_same_size(sizes, parts):
    bounds = partition_by_size(sizes, parts)
    assert len(bounds) == parts + 1 and bounds == sorted(bounds) and (bounds[0], bounds[-1]) == (0, len(sizes))
    weights = [size + 1 for size in sizes]
    loads = [sum(weights[i:j]) for i, j in itertools.pairwise(bounds)]
    assert all(load <= sum(weights) / parts + max(weights, default=0) + 1e-9 for load in loads)


def test_an_existing_tokenizer_needs_no_sample(folder, tmp_path):
    corpus_module.prepare([folder], tmp_path / "first", vocab_size=300)
    said: list[str] = []
    for name, shard in (("alone", None), ("out", "1/3")):
        prepare([folder], tmp_path / name, shard, tokenizer=tmp_path / "first", say=said.append)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")
    assert not any(line.startswith(("sample", "tokenizer")) for line in said)


def test_shards_inside_the_folder_of_texts(folder, tmp_path):
    """What is made beside them is neither read nor counted as somebody's hidden file."""
    corpus_module.prepare([folder], folder / "shards")
    alone = hashes(folder / "shards")
    prepare([folder], folder / "shards", "1/2", strict=False)
    assert hashes(folder / "shards") == alone
    for path in sorted((folder / "shards").iterdir()):
        path.unlink()
    (folder / "shards").rmdir()
    prepare([folder], folder / "shards", "2/2")
    assert hashes(folder / "shards") == alone


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A megabyte and a half in twenty files, so that a process can be met at its work."""
    return write(tmp_path_factory.mktemp("large") / "texts", {f"{i}.md": article(i, 11_000) for i in range(20)})


@pytest.fixture(scope="module")
def alone(large: Path) -> dict[str, str]:
    corpus_module.prepare([large], large.with_name("alone"), vocab_size=600)
    return hashes(large.with_name("alone"))


def start(texts: Path, out: Path, shard: str) -> "subprocess.Popen[str]":
    return start_process(
        nextword_command("prepare", texts, "--out", out, "--vocab-size", "600", "--shard", shard), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(process: "subprocess.Popen[str]") -> str:
    told, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, told
    return told


def stopped_at(process: "subprocess.Popen[str]", folder: Path, stage: str) -> "subprocess.Popen[str]":
    """The process, stopped in the middle of its first piece of a stage, whose lock it goes on holding."""
    wait_until(lambda: bool(list(folder.glob(f".out.parts-*/.{stage}-*.partial"))), process)
    os.kill(process.pid, signal.SIGSTOP)
    return process


def pieces(told: str) -> Counter[str]:
    """What a process says that it made."""
    return Counter(
        line.split(" of ")[0] for line in told.splitlines() if line.split("-")[0] in ("reading", "sample", "encoding")
    )


def test_processes_side_by_side_each_do_what_nobody_else_does(large, alone, tmp_path):
    first = stopped_at(start(large, tmp_path / "out", "2/5"), tmp_path, "reading")
    others = [start(large, tmp_path / "out", shard) for shard in ("2/5", "4/5")]  # one of them on the same part
    wait_until(lambda: len(list(tmp_path.glob(".out.parts-*/reading-*"))) == 4, others[0])
    assert not list(tmp_path.glob(".out.parts-*/survey")), "the part that is stopped is waited for"
    os.kill(first.pid, signal.SIGCONT)
    made = [pieces(ended(process)) for process in (first, *others)]
    assert hashes(tmp_path / "out") == alone
    every = sum(made, Counter[str]())
    assert every == Counter(f"{stage}-{i:05d}" for stage in ("reading", "sample", "encoding") for i in range(1, 6))
    assert made[0]["reading-00002"] == 1 and sum((made[1] + made[2]).values()) >= 4
    late = ended(start(large, tmp_path / "out", "5/5"))
    assert "used as they are" in late and not pieces(late)


@pytest.mark.parametrize("stage", ["reading", "sample", "encoding"] if "NEXTWORD_KILLS" in os.environ else ["encoding"])
def test_a_killed_part_is_done_again_by_another(stage, large, alone, tmp_path):
    first = stopped_at(start(large, tmp_path / "out", "2/3"), tmp_path, stage)
    second = start(large, tmp_path / "out", "1/3")
    wait_until(lambda: len(list(tmp_path.glob(f".out.parts-*/{stage}-*"))) == 2, second)
    assert second.poll() is None and not (tmp_path / "out").exists()
    os.kill(first.pid, signal.SIGKILL)
    before = pieces(first.communicate()[0])
    after = pieces(ended(second))
    assert hashes(tmp_path / "out") == alone
    assert sum(before.values()) + sum(after.values()) == 9 + 1, "the piece that it was killed at, and no other, twice"
    assert not list(tmp_path.glob(".out.parts-*"))


def test_what_is_there_is_kept_and_what_is_damaged_is_not(folder, tmp_path):
    """Stopped before the encoding, with a file of the readings damaged since."""
    corpus_module.prepare([folder], tmp_path / "alone")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "encoding":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([folder], tmp_path / "out", "1/3", progress=stop)
    [parts] = tmp_path.glob(".out.parts-*")
    (parts / "sample-00002/texts.jsonl").write_text("")
    (parts / "tokenizer" / MANIFEST).unlink()
    said: list[str] = []
    prepare([folder], tmp_path / "out", "1/3", say=said.append)
    assert "part 1 of 3: reading is done already" in said
    assert any("sample-00002 is damaged" in line for line in said)
    assert not any(line.startswith(("reading-", "survey", "sample-00001", "sample-00003")) for line in said)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")


def test_other_text_is_other_work(folder, tmp_path):
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "encoding":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([folder], tmp_path / "out", "1/3", progress=stop)
    write(folder, {"07.txt": article(1007)})
    corpus_module.prepare([folder], tmp_path / "alone")
    prepare([folder], tmp_path / "out", "1/3")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")
    assert not list(tmp_path.glob(".out.parts-*")), "the old work is cleared away as well"
    write(folder, {"08.txt": article(1008)})
    said: list[str] = []
    changed = prepare([folder], tmp_path / "out", "2/2", say=said.append)
    assert "prepared anew" in said[0]
    assert changed.fingerprint != Corpus.open(tmp_path / "alone").fingerprint


def test_one_process_alone_ends_the_work_of_several(folder, tmp_path):
    """A plain preparation takes the place of a half-done one, whose processes then find theirs done."""
    told: list[str] = []

    def overtake(stage: str, done: int, total: int) -> None:
        if stage == "encoding" and not told:
            told.append(stage)
            corpus_module.prepare([folder], tmp_path / "out")

    corpus = prepare([folder], tmp_path / "out", "1/2", progress=overtake)
    assert told and corpus.fingerprint == Corpus.open(tmp_path / "out").fingerprint
    assert not list(tmp_path.glob(".out.p*"))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/5", "", "1/10001", "٣/٤ "])
def test_a_shard_that_cannot_be_is_refused(shard, folder, tmp_path):
    with pytest.raises(UsageError, match="as in 3/64"):
        prepare([folder], tmp_path / "out", shard)
    assert not list(tmp_path.glob(".out*"))


def test_the_command_says_what_a_shard_is(folder, tmp_path, nextword):
    done = nextword("prepare", folder, "--out", tmp_path / "out", "--shard", "65/64")
    assert done.returncode == 2 and "--shard 65/64" in done.stderr


def test_refusals_are_those_of_one_process(folder, tmp_path):
    assert parse_shard("3/64") == (3, 64)
    with pytest.raises(NextwordError, match=r"(?s)no text was found.*empty\.txt.*\.jsonl"):
        prepare([write(tmp_path / "none", {"empty.txt": ""})], tmp_path / "out", "1/2")
    with pytest.raises(NextwordError, match="too little"):
        prepare([write(tmp_path / "one", {"a.txt": "x"})], tmp_path / "out", "2/2")
    with pytest.raises(UsageError, match="258"):
        prepare([folder], tmp_path / "out", "1/2", vocab_size=100)
    with pytest.raises(NextwordError, match="not valid"):
        prepare([folder], tmp_path / "out", "1/2", strict=True)
    with pytest.raises(UsageError, match="not a prepared corpus"):
        prepare([folder], folder, "1/2")
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_meanwhile_is_named(folder, tmp_path):
    def meddle(stage: str, done: int, total: int) -> None:
        if stage == "tokenizer":
            (folder / "29.txt").write_text("another text")

    with pytest.raises(NextwordError, match=r"29\.txt: changed while"):
        prepare([folder], tmp_path / "out", "1/2", progress=meddle)
    assert prepare([folder], tmp_path / "out", "1/2").documents > 20


# ---------------------------------------------------------------- on a Ray cluster


@pytest.fixture(scope="module")
def cluster():
    """A real one, of this machine's processors."""
    import ray  # pyright: ignore[reportMissingImports]

    ray.init(num_cpus=3, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.mark.needs("Ray")
def test_a_ray_cluster_makes_the_bytes_of_one_process(cluster, folder, tmp_path):
    corpus_module.prepare([folder], tmp_path / "alone")
    corpus = package.prepare(folder, tmp_path / "out", engine="ray")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")
    assert corpus.duplicates >= 10
    assert {path.name for path in tmp_path.iterdir() if ".parts" in path.name or ".partial" in path.name} == set()


@pytest.mark.needs("Ray")
def test_what_a_part_ends_with_is_said_with_its_exit_code(cluster, folder, tmp_path):
    with pytest.raises(NextwordError, match=r"a\.jsonl line 41|broken\.txt") as caught:
        package.prepare(folder, tmp_path / "out", engine="ray", strict=True)
    with pytest.raises(NextwordError) as alone:
        corpus_module.prepare([folder], tmp_path / "alone", strict=True)
    assert caught.value.exit_code == alone.value.exit_code


def test_an_engine_is_asked_for_rightly_or_said_to_be_missing(folder, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="exclude each other"):
        package.prepare(folder, tmp_path / "out", engine="ray", shard="1/2")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"nextword\[ray\]"):
        package.prepare(folder, tmp_path / "out", engine="ray")
