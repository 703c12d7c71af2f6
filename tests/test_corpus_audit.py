"""The audit of a corpus: duplicates, PII, scripts, languages, repeated lines and contamination, found and located exactly."""

import io
import json
import os
import random
import sys
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextword.audit import corpus
from nextword.audit.corpus import audit_corpus, contamination, find_overlap, jaccard_similarity, minhash_bands
from nextword.audit.findings import Finding
from nextword.audit.pii import PII_KINDS, find_pii, is_iban_checksum_valid, is_luhn_valid, mask_pii
from nextword.audit.text_index import CorpusIndex, build_index
from nextword.common.console import Console
from nextword.tasks.benchmark_spec import find_benchmark

QUIET = Console(quiet=True)
WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]


def prose(seed: int, length: int = 400) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(length)) + "\n"


def index_of(folder: Path, texts: Mapping[str, str | bytes]) -> CorpusIndex:
    (folder / "in").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / "in" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return build_index([folder / "in"], folder / "index", console=QUIET)


def audit(folder: Path, texts: Mapping[str, str | bytes]) -> dict[str, Finding]:
    return {finding.name: finding for finding in audit_corpus(index_of(folder, texts), (), QUIET)}


# ---------------------------------------------------------------- PII

PII = {
    "email addresses": ["someone@example.org", "first.last+tag@mail.example.co.uk"],
    "phone numbers": ["+49 30 1234567", "+1 (212) 555-0100", "(212) 555-0142", "212-555-0199", "+442079460000"],
    "credit card numbers": ["4111 1111 1111 1111", "5555-5555-5555-4444", "378282246310005", "3782 822463 10005"],
    "IBANs": ["DE89 3704 0044 0532 0130 00", "GB29NWBK60161331926819", "NO93 8601 1117 947"],
    "IP addresses": ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "2606:4700::1111"],
    "API keys and tokens": [
        "-----BEGIN RSA PRIVATE KEY-----",
        "AKIA" + "Q3X7" * 4,
        "ghp_" + "a1B2" * 9,
        "hf_" + "aB3d" * 9,
        "sk-" + "aB3d" * 10,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3In0.dozjgNryP4J3jVmN",
    ],
}
NO_PII = """\
in 1812-1813, and 1990-12-31 at 12:30:45
chapters 1.2.3.4 and 10.1
4111 1111 1111 1112
192.168.0.17
127.0.0.1
ISBN 978-3-16-148410-0
9783161484100
DE89 3704 0044 0532 0130 01
pages 123-456
a @ b . c
user@localhost
1,234,567,890
3.14159265358979
0000 0000 0000 0000
Gen. 1:1-2:3
std::vector::size
sk-learning-to-rank-with-many-small-steps
9223372036854775807
version 12.34.5
+35236450.6
the year 2001 2002 2003 2004"""


@pytest.mark.parametrize("kind", PII_KINDS)
def test_pii_is_found_and_masked(kind):
    for value in PII[kind]:
        text = f"Look: {value}, and so on."
        assert [(found, text[start:end]) for found, start, end in find_pii(text)] == [(kind, value)], value
        mask = mask_pii(kind, value)
        assert value not in mask and mask[0] == value[0] and "…" in mask


@pytest.mark.parametrize("text", NO_PII.splitlines())
def test_similar_text_is_not_pii(text):
    assert list(find_pii(text)) == [] and list(find_pii(f"x {text}. X")) == []


@given(st.from_regex(r"[0-9]{14}", fullmatch=True), st.integers(0, 14), st.integers(1, 9))
def test_one_wrong_digit_breaks_the_checksum_of_a_card(digits, position, change):
    card = next(f"4{digits}{last}" for last in range(10) if is_luhn_valid(f"4{digits}{last}"))
    wrong = card[:position] + str((int(card[position]) + change) % 10) + card[position + 1 :]
    assert is_luhn_valid(card) and not is_luhn_valid(wrong)


@given(st.from_regex(r"[0-9A-Z]{11,30}", fullmatch=True), st.integers(0, 10), st.integers(1, 9))
def test_one_wrong_digit_breaks_the_checksum_of_an_iban(account, position, change):
    check = 98 - int("".join(str(int(character, 36)) for character in account + "DE00")) % 97
    iban = f"DE{check:02}{account}"
    digit = account[position]
    wrong_digit = str((int(digit) + change) % 10) if digit.isdigit() else digit
    wrong = iban[: 4 + position] + wrong_digit + iban[5 + position :]
    assert is_iban_checksum_valid(iban) and (is_iban_checksum_valid(wrong) == (wrong == iban))


@given(st.text(max_size=200))
def test_matches_in_any_text_do_not_overlap(text):
    matches = list(find_pii(text))
    assert all(match.start < match.end for match in matches)
    assert all(first.end <= second.start for first, second in pairwise(matches))


def test_pii_is_counted_by_document_and_never_printed(tmp_path):
    texts = {f"{i}.txt": prose(i) for i in range(4)}
    texts["1.txt"] += "Write to someone@example.org or another@example.org.\n"
    texts["2.txt"] += "Write to someone@example.org, or pay to GB29NWBK60161331926819.\n"
    findings = audit(tmp_path, texts)
    emails = findings["email addresses"]
    assert emails.value == 3 and emails.notable and emails.note.startswith("in 2 documents")
    assert findings["IBANs"].examples == ({"document": "2.txt", "masked": "GB… (22 characters)"},)
    assert findings["phone numbers"].value == 0 and not findings["phone numbers"].notable
    assert "@example.org" not in json.dumps([finding.to_dict() for finding in findings.values()])


# ---------------------------------------------------------------- duplicates


def test_exact_and_near_duplicates(tmp_path):
    texts = {f"{i:02}.txt": prose(i) for i in range(12)}
    words = texts["03.txt"].split()
    texts["copy.txt"] = texts["05.txt"]
    texts["near.txt"] = " ".join([*words[:200], "another", *words[200:]])
    texts["far.txt"] = " ".join([*words[:200], *prose(99).split()[:200]])
    findings = audit(tmp_path, texts)
    exact, near = findings["exact duplicates"], findings["near duplicates"]
    assert exact.value == pytest.approx(100 / 15)
    assert exact.examples == ({"document": "copy.txt", "duplicate of": "05.txt"},)
    assert near.value == pytest.approx(100 / 15) and near.notable
    assert near.examples[0]["document"] == "near.txt" and near.examples[0]["near duplicate of"] == "03.txt"


@pytest.mark.parametrize("changed", [0, 4, 8, 30])
def test_similarity_is_the_jaccard_similarity_of_shingles(tmp_path, changed):
    words = prose(1, 300).split()
    other = [f"new{i}" if i % 10 == 0 and i < 10 * changed else word for i, word in enumerate(words)]
    index = index_of(tmp_path, {"a.txt": " ".join(words), "b.txt": " ".join([*other, "end"])})
    a, b = ({tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (words, [*other, "end"]))
    similarity = len(a & b) / len(a | b)
    assert jaccard_similarity(index, 0, 1) == pytest.approx(similarity)
    findings = {finding.name: finding for finding in audit_corpus(index, (), QUIET)}
    assert (findings["near duplicates"].value > 0) == (similarity >= 0.8)


def test_near_duplicates_do_not_depend_on_chunks():
    """A long document is read in chunks; the shingles across their boundaries count as well."""
    words = prose(2, 3000).split()
    whole = minhash_bands([" ".join(words)])
    assert np.array_equal(whole, minhash_bands(" ".join(words[start : start + 7]) for start in range(0, 3000, 7)))
    assert not np.array_equal(whole, minhash_bands([" ".join(words[:1500])]))


def test_bands_are_kept_on_disk(tmp_path, monkeypatch):
    sizes = []

    class BandFile(io.FileIO):
        def __exit__(self, *_):
            sizes.append(os.fstat(self.fileno()).st_size)
            super().__exit__(*_)

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: BandFile(tmp_path / "bands", "w+"))
    index = index_of(tmp_path, {f"{i:02}.txt": prose(i % 9) + str(i) for i in range(10)})
    finding = corpus.near_duplicates(index, QUIET)
    assert [example["document"] for example in finding.examples] == ["09.txt"]
    assert sizes == [160 * len(index)]


# ---------------------------------------------------------------- scripts, languages, lines


def test_scripts_need_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    messages: list[str] = []
    monkeypatch.setattr(Console, "info", lambda self, text, style=None: messages.append(text))
    texts = {"a.txt": "Слово за слово, and a word", "b.txt": "a plain text", "c.txt": "言葉と文字", "d.txt": "12 + 3\n"}
    findings = audit(tmp_path, texts)
    for script in ("Cyrillic", "Latin", "Han", "none (no letters)"):
        assert findings[f"documents in script {script}"].value == 25
    assert any("pip install 'nextword[languages]'" in message for message in messages)
    assert not any("in language" in name for name in findings)


def test_languages(tmp_path, monkeypatch):
    langid = SimpleNamespace(classify=lambda text: ("sw" if "neno" in text else "en", -1.0))
    monkeypatch.setitem(sys.modules, "py3langid", langid)
    texts = {"a.txt": "neno moja " * 10, "b.txt": "one word " * 10, "c.txt": "two words " * 10, "d.txt": "short"}
    findings = audit(tmp_path, texts)
    for language, share in (("en", 50), ("sw", 25), ("none (too short)", 25)):
        assert findings[f"documents in language {language}"].value == share


@pytest.mark.parametrize("slots", [2**22, 1])
def test_repeated_lines_are_counted_exactly(tmp_path, monkeypatch, slots):
    monkeypatch.setattr(corpus, "NUM_HASH_SLOTS", slots)  # with one slot all lines collide
    line = "All rights of this edition are reserved.\n"
    texts = {
        f"{i}.txt": prose(i, 50) + (line * 3 if i < 6 else "") + "A line of one document alone: " + prose(i)
        for i in range(9)
    }
    finding = audit(tmp_path, texts)["repeated lines"]
    assert finding.value == pytest.approx(100 * 18 * len(line) / sum(map(len, texts.values())))
    assert finding.examples == ({"line": line.strip(), "documents": "6", "document": "0.txt"},)
    assert "1 distinct" in finding.note


def test_file_issues(tmp_path):
    findings = audit(tmp_path, {"a.txt": prose(1), "c.bin": "x", "d.txt": b"good words here \xff"})
    assert findings["file issues"].value == 2


# ---------------------------------------------------------------- contamination


def test_contaminated_items_are_named(tmp_path):
    pairs = [{"right": prose(i, 14).strip() + ".", "wrong": prose(i + 50, 14).strip() + "."} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "suite.toml").write_text(
        '[agreement]\nkind = "minimal pairs"\nfiles = ["pairs.jsonl"]\ngood = "right"\nbad = "wrong"\n'
    )
    benchmark = find_benchmark(str(tmp_path / "suite.toml"))
    texts = {"a.txt": prose(100) + pairs[2]["right"] + prose(101), "b.txt": prose(102) + pairs[5]["wrong"]}
    finding = contamination(index_of(tmp_path, texts), benchmark, QUIET)
    assert finding.value == 100 / 8 and finding.notable and finding.n == 8
    assert [example["document"] for example in finding.examples] == ["a.txt"]
    assert finding.examples[0]["item"].endswith("line 3")
    clean = index_of(tmp_path / "clean", {"a.txt": prose(700)})
    assert not contamination(clean, benchmark, QUIET).notable


def test_thirteen_consecutive_whole_words_are_an_overlap(tmp_path):
    words = prose(3, 40).split()
    index = index_of(tmp_path, {"a.txt": prose(4) + " ".join(words) + prose(5)})
    for count, is_overlap in ((12, False), (13, True)):
        first, last = words[9], words[10 + count]
        for before, after in (("X ", " Y"), (f"{first}X ", " Y"), ("X ", f" {last}Z"), ("", " Y"), ("X ", "")):
            text = before + " ".join(words[10 : 10 + count]) + after
            assert (find_overlap(index, text) is not None) == is_overlap, text
    assert find_overlap(index, " ".join(words[5:12])) is not None  # a short text that is contained whole
    assert find_overlap(index, "") is None
