"""Several processes prepare one corpus: the files of a single process, in any order, and after a kill."""

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

import nextword as package
from conftest import nextword_command
from nextword.common.errors import MissingDependencyError, NextwordError, UsageError
from nextword.common.fs import MANIFEST, sha256_file
from nextword.data import corpus as corpus_module
from nextword.data import tokenizer as tokenizer_module
from nextword.data.corpus import Corpus
from nextword.data.prepare import parse_shard, partition_by_size, prepare
from processes import PATIENCE, start_process, wait_until
from test_corpus import article, write

STAGES = ("reading", "sample", "encoding")


def hashes(out: Path) -> dict[str, str]:
    """The SHA-256 of every file of a corpus, its manifest included."""
    return {path.relative_to(out).as_posix(): sha256_file(path) for path in sorted(out.rglob("*"))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of several formats and sizes, with duplicates, flaws, and files without text."""
    folder = write(tmp_path / "texts", {f"{i:02}.txt": article(i, 20 + 17 * i) for i in range(30)})
    rows = [f'{{"text": "row {i}: {article(i).strip()[:60]}"}}'.replace("\n", " ") for i in range(40)]
    write(folder, {"05-copy.md": article(5, 20 + 17 * 5), "a.jsonl": "\n".join([*rows, "{", *rows[:9]]) + "\n"})
    write(folder, {"b.csv": "n,text\n1,one row\n2,another row\n", "empty.txt": "", "note.png": "", ".hidden": ""})
    (folder / "broken.txt").write_bytes(b"plenty of good text \xff here \xfe and there")
    return folder


# ---------------------------------------------------------------- the same files


@pytest.mark.parametrize("num_shards, tokenizer", [(2, "char"), (3, "bpe"), (45, "bpe")])
def test_the_corpus_does_not_depend_on_the_number_of_shards(num_shards, tokenizer, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "SHARD_TOKENS", 1500)  # several files, whose ends are not those of the shards
    monkeypatch.setattr(corpus_module, "COPY_CHUNK_TOKENS", 400)
    messages: list[str] = []
    prepare([folder], tmp_path / "single", tokenizer=tokenizer)
    shard = f"{num_shards}/{num_shards}"
    corpus = prepare([folder], tmp_path / "out", shard=shard, tokenizer=tokenizer, log=messages.append)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "single")
    assert corpus.duplicates >= 10 and corpus.problems["total"] >= 3
    assert len(list((tmp_path / "out").glob("train-*.npy"))) > 3
    built = [line for line in messages if line.endswith(f" of {num_shards}") and "-" in line]
    assert len(built) == 3 * num_shards and len(set(built)) == 3 * num_shards
    assert not [path.name for path in tmp_path.iterdir() if ".parts" in path.name or ".partial" in path.name]


def test_a_few_documents_are_cut_at_the_same_position(tmp_path):
    texts = {f"{i}.txt": article(i, 4000 + 6000 * i) for i in range(4)}  # up to three chunks each
    folder = write(tmp_path / "in", {**texts, "copy.txt": texts["1.txt"], "x.txt": "é"})
    for tokenizer in ("bpe", "char"):
        prepare([folder], tmp_path / f"single-{tokenizer}", tokenizer=tokenizer)
        prepare([folder], tmp_path / tokenizer, shard="1/3", tokenizer=tokenizer)
        assert hashes(tmp_path / tokenizer) == hashes(tmp_path / f"single-{tokenizer}")


@pytest.mark.parametrize("max_chars, max_word_bytes", [(9000, 2**22), (9000, 300), (2**26, 400)])
def test_the_tokenizer_is_trained_on_the_same_sample(max_chars, max_word_bytes, folder, tmp_path, monkeypatch):
    """The corpus is larger than the sample; a shard of it may be smaller."""
    monkeypatch.setattr(tokenizer_module, "MAX_SAMPLE_CHARS", max_chars)
    monkeypatch.setattr(tokenizer_module, "MAX_SAMPLE_WORD_BYTES", max_word_bytes)
    prepare([folder], tmp_path / "single", vocab_size=500)
    for num_shards in (2, 7):
        prepare([folder], tmp_path / str(num_shards), shard=f"2/{num_shards}", vocab_size=500)
        assert hashes(tmp_path / str(num_shards)) == hashes(tmp_path / "single")


@settings(max_examples=60)
@given(
    st.lists(st.text("abcde ", min_size=1, max_size=12), max_size=40),
    st.integers(1, 6),
    st.integers(5, 120),
    st.integers(1, 40),
)
def test_the_sample_of_the_shards_is_the_sample_of_the_whole(texts, num_shards, max_chars, max_word_bytes):
    hash_sample, limit = tokenizer_module.hash_sample, tokenizer_module.HASH_RANGE
    keyed = [(tokenizer_module.sample_key(index), text) for index, text in enumerate(texts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "MAX_SAMPLE_CHARS", max_chars)
        patch.setattr(tokenizer_module, "MAX_SAMPLE_WORD_BYTES", max_word_bytes)
        whole = hash_sample(keyed)
        size = -(-len(texts) // num_shards) or 1
        samples = [hash_sample(keyed[i : i + size]) for i in range(0, len(texts), size)]
        limit = min((shard_limit for _, shard_limit in samples), default=limit)
        assert hash_sample([item for sample, _ in samples for item in sample], limit) == whole


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 12))
def test_files_are_partitioned_by_size(sizes, num_parts):
    bounds = partition_by_size(sizes, num_parts)
    assert len(bounds) == num_parts + 1 and bounds == sorted(bounds) and (bounds[0], bounds[-1]) == (0, len(sizes))
    weights = [size + 1 for size in sizes]
    loads = [sum(weights[i:j]) for i, j in itertools.pairwise(bounds)]
    assert all(load <= sum(weights) / num_parts + max(weights, default=0) + 1e-9 for load in loads)


def test_an_existing_tokenizer_needs_no_sample(folder, tmp_path):
    prepare([folder], tmp_path / "first", vocab_size=300)
    messages: list[str] = []
    for name, shard in (("single", None), ("out", "1/3")):
        prepare([folder], tmp_path / name, shard=shard, tokenizer=tmp_path / "first", log=messages.append)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "single")
    assert not any(line.startswith(("sample", "tokenizer")) for line in messages)


def test_artifacts_in_the_folder_of_texts_are_not_read_as_text(folder):
    prepare([folder], folder / "shards")
    single = hashes(folder / "shards")
    for path in sorted((folder / "shards").iterdir()):
        path.unlink()
    (folder / "shards").rmdir()
    prepare([folder], folder / "shards", shard="2/2")
    assert hashes(folder / "shards") == single


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A megabyte and a half in twenty files, so that a process can be stopped at its work."""
    return write(tmp_path_factory.mktemp("large") / "texts", {f"{i}.md": article(i, 11_000) for i in range(20)})


@pytest.fixture(scope="module")
def expected(large: Path) -> dict[str, str]:
    """The files that a single process makes of `large`."""
    prepare([large], large.with_name("single"), vocab_size=600)
    return hashes(large.with_name("single"))


def start(texts: Path, out: Path, shard: str) -> "subprocess.Popen[str]":
    arguments = nextword_command("prepare", texts, "--out", out, "--vocab-size", "600", "--shard", shard)
    return start_process(arguments, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def output_of(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    return output


def stop_at(process: "subprocess.Popen[str]", folder: Path, stage: str) -> "subprocess.Popen[str]":
    """Stop the process while it builds its first artifact of a stage. It keeps the lock."""
    wait_until(lambda: bool(list(folder.glob(f".out.parts-*/.{stage}-*.partial"))), process)
    os.kill(process.pid, signal.SIGSTOP)
    return process


def built_artifacts(output: str) -> Counter[str]:
    """The artifacts of shards that a process has built, by its output."""
    return Counter(line.split(" of ")[0] for line in output.splitlines() if line.split("-")[0] in STAGES)


def test_processes_divide_the_work(large, expected, tmp_path):
    first = stop_at(start(large, tmp_path / "out", "2/5"), tmp_path, "reading")
    others = [start(large, tmp_path / "out", shard) for shard in ("2/5", "4/5")]  # one of them with the same shard
    wait_until(lambda: len(list(tmp_path.glob(".out.parts-*/reading-*"))) == 4, others[0])
    assert not list(tmp_path.glob(".out.parts-*/scan")), "the others wait for the stopped process"
    os.kill(first.pid, signal.SIGCONT)
    built = [built_artifacts(output_of(process)) for process in (first, *others)]
    assert hashes(tmp_path / "out") == expected
    assert sum(built, Counter[str]()) == Counter(f"{stage}-{i:05d}" for stage in STAGES for i in range(1, 6))
    assert built[0]["reading-00002"] == 1 and sum((built[1] + built[2]).values()) >= 4
    late = output_of(start(large, tmp_path / "out", "5/5"))
    assert "the existing shards are used" in late and not built_artifacts(late)


@pytest.mark.parametrize("stage", STAGES if "NEXTWORD_KILLS" in os.environ else ["encoding"])
def test_the_artifact_of_a_killed_process_is_built_by_another(stage, large, expected, tmp_path):
    first = stop_at(start(large, tmp_path / "out", "2/3"), tmp_path, stage)
    second = start(large, tmp_path / "out", "1/3")
    wait_until(lambda: len(list(tmp_path.glob(f".out.parts-*/{stage}-*"))) == 2, second)
    assert second.poll() is None and not (tmp_path / "out").exists()
    os.kill(first.pid, signal.SIGKILL)
    before = built_artifacts(first.communicate()[0])
    after = built_artifacts(output_of(second))
    assert hashes(tmp_path / "out") == expected
    assert sum(before.values()) + sum(after.values()) == 9 + 1, "only the artifact of the kill is built twice"
    assert not list(tmp_path.glob(".out.parts-*"))


def interrupt_at_encoding(stage: str, done: int, total: int) -> None:
    if stage == "encoding":
        raise KeyboardInterrupt


def test_complete_artifacts_are_kept_and_damaged_ones_are_built_again(folder, tmp_path):
    prepare([folder], tmp_path / "single")
    with pytest.raises(KeyboardInterrupt):
        prepare([folder], tmp_path / "out", shard="1/3", progress=interrupt_at_encoding)
    [work_dir] = tmp_path.glob(".out.parts-*")
    (work_dir / "sample-00002/texts.jsonl").write_text("")
    (work_dir / "tokenizer" / MANIFEST).unlink()
    messages: list[str] = []
    prepare([folder], tmp_path / "out", shard="1/3", log=messages.append)
    assert "shard 1 of 3: reading is complete already" in messages
    assert any("sample-00002 is damaged" in line for line in messages)
    assert not any(line.startswith(("reading-", "scan", "sample-00001", "sample-00003")) for line in messages)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "single")


def test_artifacts_of_another_text_are_not_used(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prepare([folder], tmp_path / "out", shard="1/3", progress=interrupt_at_encoding)
    write(folder, {"07.txt": article(1007)})
    prepare([folder], tmp_path / "single")
    prepare([folder], tmp_path / "out", shard="1/3")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "single")
    assert not list(tmp_path.glob(".out.parts-*")), "the old artifacts are removed as well"
    write(folder, {"08.txt": article(1008)})
    messages: list[str] = []
    changed = prepare([folder], tmp_path / "out", shard="2/2", log=messages.append)
    assert "prepared again" in messages[0]
    assert changed.fingerprint != Corpus.open(tmp_path / "single").fingerprint


def test_a_single_process_can_overtake_several(folder, tmp_path):
    """It completes the corpus; the others notice it and use the result."""
    overtaken: list[str] = []

    def overtake(stage: str, done: int, total: int) -> None:
        if stage == "encoding" and not overtaken:
            overtaken.append(stage)
            prepare([folder], tmp_path / "out")

    corpus = prepare([folder], tmp_path / "out", shard="1/2", progress=overtake)
    assert overtaken and corpus.fingerprint == Corpus.open(tmp_path / "out").fingerprint
    assert not list(tmp_path.glob(".out.p*"))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/5", "", "1/10001", "٣/٤ "])
def test_an_invalid_shard_is_refused(shard, folder, tmp_path):
    with pytest.raises(UsageError, match="as in 3/64"):
        prepare([folder], tmp_path / "out", shard=shard)
    assert not list(tmp_path.glob(".out*"))


def test_the_command_explains_an_invalid_shard(folder, tmp_path, nextword):
    done = nextword("prepare", folder, "--out", tmp_path / "out", "--shard", "65/64")
    assert done.returncode == 2 and "--shard 65/64" in done.stderr


def test_errors_are_those_of_a_single_process(folder, tmp_path):
    assert parse_shard("3/64") == (3, 64)
    with pytest.raises(NextwordError, match=r"(?s)no text was found.*empty\.txt.*\.jsonl"):
        prepare([write(tmp_path / "none", {"empty.txt": ""})], tmp_path / "out", shard="1/2")
    with pytest.raises(NextwordError, match="too little"):
        prepare([write(tmp_path / "one", {"a.txt": "x"})], tmp_path / "out", shard="2/2")
    with pytest.raises(UsageError, match="258"):
        prepare([folder], tmp_path / "out", shard="1/2", vocab_size=100)
    with pytest.raises(NextwordError, match="not valid"):
        prepare([folder], tmp_path / "out", shard="1/2", strict=True)
    with pytest.raises(UsageError, match="not a prepared corpus"):
        prepare([folder], folder, shard="1/2")
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_while_it_is_read_is_named(folder, tmp_path):
    def edit(stage: str, done: int, total: int) -> None:
        if stage == "tokenizer":
            (folder / "29.txt").write_text("another text")

    with pytest.raises(NextwordError, match=r"29\.txt: changed while"):
        prepare([folder], tmp_path / "out", shard="1/2", progress=edit)
    assert prepare([folder], tmp_path / "out", shard="1/2").documents > 20


# ---------------------------------------------------------------- Ray


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of three of this machine's CPUs."""
    import ray  # pyright: ignore[reportMissingImports] -- an extra without type information

    ray.init(num_cpus=3, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.mark.needs("Ray")
def test_a_ray_cluster_makes_the_files_of_a_single_process(cluster, folder, tmp_path):
    prepare([folder], tmp_path / "single")
    corpus = package.prepare(folder, tmp_path / "out", engine="ray")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "single")
    assert corpus.duplicates >= 10
    assert not [path.name for path in tmp_path.iterdir() if ".parts" in path.name or ".partial" in path.name]


@pytest.mark.needs("Ray")
def test_an_error_in_a_ray_task_keeps_its_message_and_exit_code(cluster, folder, tmp_path):
    with pytest.raises(NextwordError, match=r"a\.jsonl line 41|broken\.txt") as on_ray:
        package.prepare(folder, tmp_path / "out", engine="ray", strict=True)
    with pytest.raises(NextwordError) as single:
        prepare([folder], tmp_path / "single", strict=True)
    assert on_ray.value.exit_code == single.value.exit_code


def test_ray_excludes_a_shard_and_names_its_extra(folder, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="exclude each other"):
        package.prepare(folder, tmp_path / "out", engine="ray", shard="1/2")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"nextword\[ray\]"):
        package.prepare(folder, tmp_path / "out", engine="ray")
