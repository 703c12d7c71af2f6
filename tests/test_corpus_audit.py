"""What is in a corpus: copies, personal data, scripts, lines and evaluation items, found where they are and only there."""

import json
import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextword.audit import corpus, near_duplicates
from nextword.audit.corpus import RepeatedLines, audit_corpus, contamination, find_overlap
from nextword.audit.findings import Finding
from nextword.audit.pii import PII_KINDS, find_pii, is_iban_checksum_valid, is_luhn_valid, mask_pii
from nextword.audit.text_index import CorpusIndex, build_index
from nextword.common.console import Console
from nextword.tasks.benchmark_spec import find_benchmark

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]


def prose(seed: int, length: int = 400) -> str:
    draws = random.Random(seed)
    return " ".join(draws.choice(WORDS) for _ in range(length)) + "\n"


def write(folder: Path, texts: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def indexed(folder: Path, texts: dict[str, str]) -> CorpusIndex:
    return build_index([write(folder / "in", texts)], folder / "index")


def named(findings: list[Finding]) -> dict[str, Finding]:
    return {one.name: one for one in findings}


# ---------------------------------------------------------------- personal data

FOUND = {
    "mail addresses": ["someone@example.org", "first.last+tag@mail.example.co.uk"],
    "phone numbers": ["+49 30 1234567", "+1 (212) 555-0100", "(212) 555-0142", "212-555-0199", "+442079460000"],
    "card numbers": ["4111 1111 1111 1111", "5555-5555-5555-4444", "378282246310005", "3782 822463 10005"],
    "IBANs": ["DE89 3704 0044 0532 0130 00", "GB29NWBK60161331926819", "NO93 8601 1117 947"],
    "IP addresses": ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "2606:4700::1111"],
    "keys and tokens": [
        "-----BEGIN RSA PRIVATE KEY-----", "AKIA" + "Q3X7" * 4, "ghp_" + "a1B2" * 9, "hf_" + "aB3d" * 9,
        "sk-" + "aB3d" * 10, "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3In0.dozjgNryP4J3jVmN",
    ],
}  # fmt: skip
NOT = [
    "in 1812-1813, and 1990-12-31 at 12:30:45", "chapters 1.2.3.4 and 10.1", "4111 1111 1111 1112", "192.168.0.17",
    "127.0.0.1", "ISBN 978-3-16-148410-0", "9783161484100", "DE89 3704 0044 0532 0130 01", "pages 123-456", "a @ b . c",
    "user@localhost", "1,234,567,890", "3.14159265358979", "0000 0000 0000 0000", "Gen. 1:1-2:3", "std::vector::size",
    "sk-learning-to-rank-with-many-small-steps", "9223372036854775807", "version 12.34.5", "+35236450.6",
    "the year 2001 2002 2003 2004",
]  # fmt: skip


@pytest.mark.parametrize("kind", PII_KINDS)
def test_what_has_its_form_is_found_and_never_shown_whole(kind):
    for datum in FOUND[kind]:
        text = f"Look: {datum}, and so on; é{datum[:0]}."
        assert [(k, text[a:b]) for k, a, b in find_pii(text)] == [(kind, datum)], datum
        mask = mask_pii(kind, datum)
        assert datum not in mask and mask[0] == datum[0] and len(set(mask) & set("…")) == 1


@pytest.mark.parametrize("text", NOT)
def test_what_only_looks_like_it_is_not(text):
    assert list(find_pii(text)) == [] and list(find_pii(f"x {text}. X")) == []


def digit_after(digits: str) -> str:
    return next(digits + str(last) for last in range(10) if is_luhn_valid(digits + str(last)))


@given(st.from_regex(r"[0-9]{14}", fullmatch=True), st.integers(0, 14), st.integers(1, 9))
def test_one_wrong_digit_breaks_the_check_sum_of_a_card(digits, place, change):
    card = digit_after("4" + digits)
    wrong = card[:place] + str((int(card[place]) + change) % 10) + card[place + 1 :]
    assert is_luhn_valid(card) and not is_luhn_valid(wrong)


@given(st.from_regex(r"[0-9A-Z]{11,30}", fullmatch=True), st.integers(0, 10), st.integers(1, 9))
def test_one_wrong_character_breaks_the_check_sum_of_an_iban(account, place, change):
    check = 98 - int("".join(str(int(one, 36)) for one in account + "DE00")) % 97
    iban = f"DE{check:02}{account}"
    other = "0123456789"[(int(account[place], 36) + change) % 10] if account[place].isdigit() else account[place]
    wrong = iban[: 4 + place] + other + iban[5 + place :]
    assert is_iban_checksum_valid(iban) and (is_iban_checksum_valid(wrong) == (wrong == iban))


@given(st.text(max_size=200))
def test_any_text_can_be_looked_through(text):
    found = list(find_pii(text))
    assert all(a < b for _, a, b in found) and all(x[2] <= y[1] for x, y in pairwise(found))


def test_counts_say_how_often_and_where(tmp_path):
    texts = {f"{i}.txt": prose(i) for i in range(4)}
    texts["1.txt"] += "Write to someone@example.org or another@example.org.\n"
    texts["2.txt"] += "Write to someone@example.org, or pay to GB29NWBK60161331926819.\n"
    found = named(audit_corpus([], index=indexed(tmp_path, texts)))
    assert found["mail addresses"].value == 3 and found["mail addresses"].notable
    assert found["mail addresses"].note.startswith("in 2 documents")
    assert found["IBANs"].examples == ({"document": "2.txt", "masked": "GB… (22 characters)"},)
    assert found["phone numbers"].value == 0 and not found["phone numbers"].notable
    assert "@example.org" not in json.dumps([one.to_dict() for one in found.values()])


# ---------------------------------------------------------------- copies


def test_copies_are_found_and_named(tmp_path):
    texts = {f"{i:02}.txt": prose(i) for i in range(12)}
    words = texts["03.txt"].split()
    texts["copy.txt"] = texts["05.txt"]
    texts["near.txt"] = " ".join([*words[:200], "another", *words[200:]])
    texts["far.txt"] = " ".join([*words[:200], *prose(99).split()[:200]])
    found = named(audit_corpus([], index=indexed(tmp_path, texts)))
    exact, near = found["documents that are exact copies"], found["documents that are nearly copies"]
    assert exact.value == pytest.approx(100 / 15) and exact.examples == ({"document": "copy.txt", "copy of": "05.txt"},)
    assert near.value == pytest.approx(100 / 15) and near.notable
    assert near.examples[0]["document"] == "near.txt" and near.examples[0]["copy of"] == "03.txt"


@pytest.mark.parametrize("changed", [0, 4, 8, 30])
def test_resemblance_is_that_of_sets_of_runs(tmp_path, changed):
    words = prose(1, 300).split()
    other = [f"new{i}" if i % 10 == 0 and i < 10 * changed else word for i, word in enumerate(words)]
    index = indexed(tmp_path, {"a.txt": " ".join(words), "b.txt": " ".join(other) + " end"})
    a, b = ({tuple(one[i : i + 5]) for i in range(len(one) - 4)} for one in (words, [*other, "end"]))
    share = len(a & b) / len(a | b)
    assert near_duplicates.jaccard_similarity(index, 0, 1) == pytest.approx(share)
    assert (named(audit_corpus([], index=index))["documents that are nearly copies"].value > 0) == (share >= 0.8)


def test_pieces_change_no_signature(tmp_path, monkeypatch):
    index = indexed(tmp_path, {"a.txt": prose(1), "b.txt": prose(2, 5000)})
    whole = [near_duplicates._document_shingles(index, i) for i in (0, 1)]
    pieces = [[text for _, text in index.iter_chunks(i)] for i in (0, 1)]
    cut = [[text[i : i + 50] for text in several for i in range(0, len(text), 50)] for several in pieces]
    monkeypatch.setattr(CorpusIndex, "pieces", lambda self, i: enumerate("".join(part) for part in (cut[i],)))
    assert all((near_duplicates._document_shingles(index, i) == whole[i]).all() for i in (0, 1))
    reader = near_duplicates.NearDuplicates(index, tmp_path)
    signatures = []
    for several in (pieces[1], [" ".join(pieces[1][0].split()[i : i + 7]) for i in range(0, 5000, 7)]):
        for text in several:
            reader.visit_chunk(1, 0, text)
        signatures.append(reader._signature.copy())
        reader.end_document(1)
    assert (signatures[0] == signatures[1]).all() and signatures[0].max() < 2**32


# ---------------------------------------------------------------- scripts, languages, lines


def test_scripts_are_told_without_any_package(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "import_module", _missing)
    said = []
    monkeypatch.setattr(Console, "say", lambda self, text, style=None: said.append(text))
    texts = {"a.txt": "Слово за слово, and a word", "b.txt": "a plain text", "c.txt": "言葉と文字", "d.txt": "12 + 3\n"}
    found = named(audit_corpus([], index=indexed(tmp_path, texts)))
    assert all(found[f"documents in the script {name}"].value == 25 for name in ("Cyrillic", "Latin", "Han"))
    assert found["documents in the script none (no letters)"].value == 25
    assert any("pip install 'nextword[languages]'" in line for line in said)
    assert not any("in the language" in name for name in found)


def _missing(name: str) -> None:
    raise ImportError(name)


def test_languages_are_told_where_the_package_is(tmp_path, monkeypatch):
    guess = SimpleNamespace(classify=lambda text: ("sw" if "neno" in text else "en", -1.0))
    monkeypatch.setattr(corpus, "import_module", lambda name: guess)
    texts = {"a.txt": "neno moja " * 10, "b.txt": "one word " * 10, "c.txt": "two words " * 10, "d.txt": "short"}
    found = named(audit_corpus([], index=indexed(tmp_path, texts)))
    shares = {name: one.value for name, one in found.items() if "in the language" in name}
    assert shares == {
        "documents in the language en": 50,
        "documents in the language sw": 25,
        "documents in the language none (too short to tell)": 25,
    }


@pytest.mark.parametrize("slots", [2**22, 1])
def test_lines_of_many_documents_are_counted_exactly(tmp_path, monkeypatch, slots):
    monkeypatch.setattr(RepeatedLines, "SLOTS", slots)  # with one slot every line is followed
    line = "All rights of this edition are reserved.\n"
    texts = {
        f"{i}.txt": prose(i, 50) + (line * 3 if i < 6 else "") + "A line of one document alone: " + prose(i)
        for i in range(9)
    }
    index = indexed(tmp_path, texts)
    found = named(audit_corpus([], index=index))["text in lines that come again and again"]
    assert found.value == pytest.approx(100 * 18 * len(line) / sum(map(len, texts.values())))
    assert (
        found.examples == ({"line": line.strip(), "documents": "6", "document": "0.txt"},)
        and "1 different" in found.note
    )


def test_without_an_index_one_is_made_for_the_while(tmp_path):
    folder = write(tmp_path / "in", {"a.txt": prose(1), "b.txt": prose(1), "c.bin": "x"})
    (folder / "d.txt").write_bytes(b"good words here \xff")
    found = named(audit_corpus([folder]))
    assert found["documents that are exact copies"].value == pytest.approx(100 / 3)
    assert found["flaws of its files"].value == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


# ---------------------------------------------------------------- evaluation suites


def test_items_that_stand_in_the_corpus_are_named(tmp_path):
    pairs = [{"right": prose(i, 14).strip() + ".", "wrong": prose(i + 50, 14).strip() + "."} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in pairs))
    (tmp_path / "suite.toml").write_text(
        '[agreement]\nkind = "minimal pairs"\nfiles = ["pairs.jsonl"]\ngood = "right"\nbad = "wrong"\n'
    )
    suite = find_benchmark(str(tmp_path / "suite.toml"))
    texts = {"a.txt": prose(100) + pairs[2]["right"] + prose(101), "b.txt": prose(102) + pairs[5]["wrong"]}
    index = indexed(tmp_path, texts)
    found = contamination(index, suite, Console(quiet=True))
    assert found.value == 100 / 8 and found.notable and found.n == 8
    assert [one["document"] for one in found.examples] == ["a.txt"] and found.examples[0]["item"].endswith("line 3")
    assert not contamination(indexed(tmp_path / "other", {"a.txt": prose(700)}), suite, Console(quiet=True)).notable


def test_a_run_of_thirteen_whole_words_counts(tmp_path):
    words = prose(3, 40).split()
    index = indexed(tmp_path, {"a.txt": prose(4) + " ".join(words) + prose(5)})
    for count, expected in ((12, False), (13, True)):
        for before, after in (
            ("X ", " Y"),
            (f"{words[9]}X ", " Y"),
            ("X ", f" {words[10 + count]}Z"),
            ("", " Y"),
            ("X ", ""),
        ):
            text = before + " ".join(words[10 : 10 + count]) + after
            assert (find_overlap(index, text) is not None) == expected, text
    assert find_overlap(index, " ".join(words[5:12])) is not None  # the whole of a short one
    assert find_overlap(index, "") is None
