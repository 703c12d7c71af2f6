"""The audit of a corpus: duplicates, PII, scripts, languages, repeated lines and contamination, found and located exactly."""

import io
import json
import os
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stdnum import luhn

from nextword.audit import corpus
from nextword.audit.corpus import audit_corpus, contamination, item_passages, jaccard_similarity, minhash_bands
from nextword.audit.findings import Finding
from nextword.audit.pii import PII_KINDS, find_pii, format_excerpt, mask_pii
from nextword.audit.text_index import CorpusIndex, build_index
from nextword.common.console import Console
from nextword.common.statistics import proportion
from nextword.data.issues import IssueLog
from nextword.tasks.benchmark_items import load_rows
from nextword.tasks.benchmark_spec import Benchmark, find_benchmark

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
    "email addresses": [
        "someone@example.org",
        "first.last+tag@mail.example.co.uk",
        "12345@163.com",
        "josé@example.com.au",
        "иван@пример.рф",
        "Ｓｏｍｅｏｎｅ＠example.org",
    ],
    "phone numbers": """\
+49 30 1234567|+1 (212) 555-0100|(212) 555-0142|212-555-0199|+442079460000|1-800-555-0199|212.555.0142|+49 171 123 45 67
+44 7700 900 123|+33 6 12 34 56 78|0049 30 1234567|(030) 1234567|8 (495) 123-45-67|+49 (0)30/1234567|+81 3-1234-5678
+٤٩ ٣٠ ١٢٣٤٥٦٧|+९१ ९८७६५ ४३२१०|+49\u00a030\u00a01234567|+7\u202f(495)\u202f123‑45‑67|+49\u200b30\u200b1234567""".replace(
        "\n", "|"
    ).split("|"),
    "credit card numbers": [
        "4111 1111 1111 1111",
        "5555-5555-5555-4444",
        "378282246310005",
        "3782 822463 10005",
        "4111\u00a01111\u00a01111\u00a01111",
        "５５５５ ５５５５ ５５５５ ４４４４",
        "6200 0000 0000 0005",
        "3530 1113 3330 0000",
    ],
    "IBANs": [
        "DE89 3704 0044 0532 0130 00",
        "GB29NWBK60161331926819",
        "NO93 8601 1117 947",
        "de89-3704-0044-0532-0130-00",
    ],
    "IP addresses": ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "2606:4700::1111"],
    "API keys and tokens": [
        "-----BEGIN RSA PRIVATE KEY-----",
        "-----BEGIN RSA PRIVATE KEY-----\n" + "aB3d" * 40 + "\n-----END RSA PRIVATE KEY-----",
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
pages 123-456, 789-1011
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
the year 2001 2002 2003 2004
icon@2x.jpg
react@17.0.2.js
git@github.com:group/project.git
+32 33 34 35 36
+36 37 38 39 40
+12 345 678 901
+1 2 3 4 5 6 7 8 9 10
+44 100 200 300 400
x + 12 34 56 78
512 640 2048 4096
(1999) 2000 2001"""


def found(text: str) -> list[tuple[str, str]]:
    return [(kind, text[start:end]) for kind, start, end in find_pii(text)]


@pytest.mark.parametrize("kind", PII_KINDS)
def test_pii_is_found_and_masked(kind):
    for value in PII[kind]:
        for text in (f"Look: {value}, and so on.", f"({value})", f"看{value}看" if value.isascii() else value):
            assert found(text) == [(kind, value)], text
        mask = mask_pii(kind, value)
        assert value not in mask and mask[0] == value[0] and "…" in mask


@pytest.mark.parametrize("text", NO_PII.splitlines())
def test_similar_text_is_not_pii(text):
    assert found(text) == [] and found(f"x {text}. X") == []


def written(digits: str, groups: Sequence[int], separator: str, zero: str = "0") -> str:
    """Digits in groups, as digits of the script whose zero is given."""
    ends = [sum(groups[:i]) for i in range(len(groups) + 1)]
    parts = [digits[start:end] for start, end in pairwise(ends)]
    return separator.join("".join(chr(ord(zero) + int(digit)) for digit in part) for part in parts)


def test_planted_pii_in_seven_forms_and_four_scripts():
    """Recall and precision of cards and phone numbers with random digits, in text that the patterns were not written on."""
    rng = random.Random(0)
    sentences = {
        "latin": "Call {} before noon",
        "cyrillic": "Пишите{}сегодня",
        "han": "请联系{}谢谢",
        "arabic": "اتصل بالرقم {}، شكرا",
    }
    forms = [(" ", "0"), ("-", "0"), ("\u00a0", "0"), ("\u2011", "0"), ("", "0"), (" ", "٠"), ("\u202f", "０")]
    planted = hits = spurious = 0
    for sentence in sentences.values():
        for separator, zero in forms:
            for _ in range(12):
                body = "4" + "".join(rng.choices("0123456789", k=14))
                card = body + luhn.calc_check_digit(body)
                subscriber = f"49{rng.choice(['30', '89', '40'])}{rng.randrange(2_000_000, 8_999_999)}"
                phone = "+" + written(subscriber, (2, 2, 3, 4), separator, zero)
                for value in (written(card, (4, 4, 4, 4), separator, zero), phone):
                    text = sentence.format(value)
                    planted += 1
                    matches = [match for _, match in found(text)]
                    hits += value in matches
                    spurious += len(matches) - (value in matches)
    lists = [" ".join(str(rng.randrange(10 ** rng.randint(1, 4))) for _ in range(12)) for _ in range(planted)]
    false = sum(bool(found(f"{text}{values}{text}")) for values in lists for text in ("", "得"))
    for score in (
        proportion([i < hits for i in range(planted)]),
        proportion([i < hits for i in range(hits + spurious)]),
    ):
        assert score.low is not None and score.low >= 0.95
    assert false <= 0.005 * 2 * planted


@pytest.mark.parametrize("separator", [" ", "\u00a0", ", ", "\n"])
def test_numbers_of_one_line_are_all_found(separator):
    cards = ["2024", *["4111 1111 1111 1111", "5555 5555 5555 4444", "378282246310005", "6011 1111 1111 1117"] * 25]
    mixed = ["4111111111111111", "+1 212 555 0142", "DE89 3704 0044 0532 0130 00"] * 33
    phones = [
        [f"{prefix}{i}" for i in range(100, 200)]
        for prefix in ("212-555-0", "1-800-555-0", "+49 30 12345", "+442079460")
    ]
    for values, count in ((cards, 100), (mixed, 99), *((row, 100) for row in phones)):
        assert len(found(separator.join(values))) == count, values


def test_excerpts_mask_pii_that_they_cut():
    text = "write to someone@example.org or 4111 1111 1111 1111 today"
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            excerpt = format_excerpt(text[start:end], before=text[:start], after=text[end:])
            assert not any(part in excerpt for part in ("meone", "xample", "4111", "1111"))


@given(st.text(max_size=200))
def test_matches_in_any_text_do_not_overlap(text):
    matches = list(find_pii(text))
    assert all(match.start < match.end for match in matches)
    assert all(first.end <= second.start for first, second in pairwise(matches))


def test_pii_is_counted_by_document_and_never_printed(tmp_path):
    texts = {f"{i}.txt": prose(i) for i in range(4)}
    texts["mail-of-boss@example.org.txt"] = "Call 212-555-0142.\n"
    texts["1.txt"] += "Write to someone@example.org or another@example.org.\n"
    texts["2.txt"] += "Write to someone@example.org, or pay to GB29NWBK60161331926819.\n"
    findings = audit(tmp_path, texts)
    emails = findings["email addresses"]
    assert emails.value == 3 and emails.notable and emails.note.startswith("in 2 documents")
    assert findings["IBANs"].examples == ({"document": "2.txt", "masked": "GB… (22 characters)"},)
    assert findings["phone numbers"].examples == ({"document": "m…@e….org.txt", "masked": "21… (12 characters)"},)
    assert findings["credit card numbers"].value == 0 and not findings["credit card numbers"].notable
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
    assert finding.low is not None and finding.low > 0
    assert finding.value == 100 / 8 and finding.notable and finding.n == 8
    assert [example["document"] for example in finding.examples] == ["a.txt"]
    assert finding.examples[0]["item"].endswith("line 3")
    clean = index_of(tmp_path / "clean", {"a.txt": prose(700)})
    assert not contamination(clean, benchmark, QUIET).notable


def declared_benchmark(folder: Path, rows: Sequence[Mapping[str, object]]) -> Benchmark:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.toml").write_text(
        '[own]\nkind = "multiple choice"\nfiles = ["rows.jsonl"]\nprompt = "Question: {question}\\nAnswer:"\n'
        'choices = "choices"\nanswer = "answer"\n'
    )
    return find_benchmark(str(folder / "own.toml"))


WRITTEN = [  # how an item may be written in a corpus
    lambda question, answer: f"{question} {answer}",
    lambda question, answer: question,
    lambda question, answer: question.upper(),
    lambda question, answer: question.replace(" ", "  "),
    lambda question, answer: question.replace(" ", "\n"),
    lambda question, answer: question.title().replace(" ", ", "),
    lambda question, answer: "“" + question.replace(" ", "\u00a0") + "”",
    lambda question, answer: " ".join(question.split()[: max(8, len(question.split()) // 2 + 2)]),
]


def test_contaminated_items_are_found_in_parts_and_in_another_case(tmp_path):
    """Recall at least 0.95, and no item of a clean benchmark."""
    rng = random.Random(7)
    rows = [
        {
            "question": prose(1000 + i, rng.randint(8, 30)).strip() + "?",
            "choices": [prose(i, 3), prose(i + 5, 3)],
            "answer": i % 2,
        }
        for i in range(160)
    ]
    texts = {
        f"{i}.txt": prose(5000 + i, 40)
        + WRITTEN[i % len(WRITTEN)](row["question"], row["choices"][row["answer"]])
        + " "
        + prose(i)
        for i, row in enumerate(rows)
    }
    index = index_of(tmp_path, texts)
    finding = contamination(index, declared_benchmark(tmp_path / "planted", rows), QUIET)
    assert finding.low is not None and finding.low >= 95 and finding.note.startswith("at least")
    clean = [row | {"question": prose(9000 + i, 12)} for i, row in enumerate(rows)]
    assert contamination(index, declared_benchmark(tmp_path / "clean", clean), QUIET).value == 0


def test_short_items_match_whole_words_only(tmp_path):
    index = index_of(
        tmp_path,
        {"a.txt": "she thought that the catalog was long. " + prose(1), "b.txt": "这是一个关于鱼的问题，答案是水。"},
    )
    rows = [
        {"question": question, "choices": ["a cat", "a dog"], "answer": 1}
        for question in ("the cat", "at the", "关于鱼的问题答案")
    ]
    whole = [{"question": "x", "choices": ["x", "y"], "answer": 0, "text": "thought that the cat"}]
    assert contamination(index, declared_benchmark(tmp_path / "short", rows + whole), QUIET).value == 0
    benchmark = declared_benchmark(tmp_path / "one", rows[2:])
    [row] = load_rows(benchmark, IssueLog())
    passages = [" ".join(words) for words in item_passages(benchmark, row)]
    assert passages and all("关 于 鱼" in passage for passage in passages)


@pytest.mark.parametrize(("count", "is_found"), [(12, False), (13, True)])
def test_thirteen_consecutive_words_are_contamination(tmp_path, count, is_found):
    words = prose(3, 60).split()
    index = index_of(tmp_path, {"a.txt": f"{prose(4)} {' '.join(words[20 : 20 + count])} {prose(5)}"})
    row = {"question": " ".join(words), "choices": ["a", "b"], "answer": 0}
    finding = contamination(index, declared_benchmark(tmp_path / "b", [row]), QUIET)
    assert finding.notable == is_found
    assert [example["passage"] for example in finding.examples] == [" ".join(words[20:33])] * is_found


def test_templates_are_no_contamination_and_passages_are_masked(tmp_path):
    template = "decide which of these two words is the better answer to this question"
    rows = [{"question": f"{template} {prose(i, 9)}", "choices": ["a", "b"], "answer": 0} for i in range(8)]
    rows[3]["question"] = "please call the office of the mayor at 212-555-0142 before noon today"
    index = index_of(tmp_path, {"a.txt": f"They {template} yesterday. {str(rows[3]['question']).upper()}."})
    finding = contamination(index, declared_benchmark(tmp_path / "b", rows), QUIET)
    assert finding.value == 100 / 8
    assert "…" in finding.examples[0]["passage"] and "0142" not in finding.examples[0]["passage"]


def test_held_out_text_does_not_contaminate(tmp_path):
    index = index_of(tmp_path, {"a.txt": prose(1), "b.txt": prose(2)})
    index.documents = index.documents.copy()
    index.documents["learned"][1] = index.documents["begin"][1]
    row = {"question": prose(2), "choices": ["a", "b"], "answer": 0}
    assert contamination(index, declared_benchmark(tmp_path / "b", [row]), QUIET).value == 0
    assert contamination(index, declared_benchmark(tmp_path / "c", [row | {"question": prose(1)}]), QUIET).value == 100
