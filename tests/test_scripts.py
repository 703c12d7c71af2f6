"""Text in sixteen scripts: words, sentences, names, personal data, groups, contamination, metrics, baselines and labels.

Each row has two sentences of one text with its number of words, or None where a script has no spaces (graphemes are counted
there), a pair of words for two groups, and the language that py3langid may name.
"""

import json
import sys
import unicodedata
from types import SimpleNamespace

import pytest

from nextword.audit.corpus import UNKNOWN_LANGUAGE, contamination, language_findings
from nextword.audit.group_templates import read_group_templates
from nextword.audit.pii import find_pii, format_excerpt
from nextword.common.text_units import graphemes, script_of, sentences, text_width, tokens, uses_spaces, words
from nextword.data.issues import IssueLog
from nextword.tasks.baselines import lead_sentence, naive_bayes
from nextword.tasks.examples import read_examples
from nextword.tasks.linear import LinearClassifier
from nextword.tasks.metrics import bleu_tokenizer, generation_metrics
from test_corpus_audit import QUIET, declared_benchmark, index_of

ROWS = {
    # script: first sentence, second sentence, words of the first, words of two groups, ISO 639 code
    "Latin": ("The man didn't see the old house.", "She came later.", 7, ("man", "woman"), "en"),
    "Latin with marks": ("Bà cụ thấy người đàn ông cũ.", "Ông đến sau.", 7, ("đàn ông", "phụ nữ"), "vi"),
    "Cyrillic": ("Старый мужчина не видел дома.", "Она пришла позже.", 5, ("мужчина", "женщина"), "ru"),
    "Greek": ("Ο άντρας είδε το παλιό σπίτι;", "Ήρθε αργότερα.", 6, ("άντρας", "γυναίκα"), "el"),
    "Hebrew": ("הגבר ראה את הבית הישן.", "היא באה אחר כך.", 5, ("גבר", "אישה"), "he"),
    "Arabic": ("هل رأى الرجل البيت القديم؟", "جاءت بعد ذلك.", 5, ("رجل", "فتاة"), "ar"),
    "Devanagari": ("लड़का पुराना घर देखता है।", "वह बाद में आई।", 5, ("लड़का", "लड़की"), "hi"),
    "Gujarati": ("છોકરો જૂનું ઘર જુએ છે.", "તે પછી આવી.", 5, ("છોકરો", "છોકરી"), "gu"),
    "Tamil": ("ஆண் பழைய வீட்டைப் பார்த்தான்.", "அவள் பிறகு வந்தாள்.", 4, ("ஆண்", "பெண்"), "ta"),
    "Thai": ("ผู้ชายเห็นบ้านเก่าในหมู่บ้านเล็ก", "เธอมาทีหลัง", None, ("ผู้ชาย", "ผู้หญิง"), "th"),
    "Myanmar": ("ယောက်ျားသည် အိမ်ဟောင်းကို မြင်သည်။", "သူမ နောက်မှ လာသည်။", None, ("ယောက်ျား", "မိန်းမ"), ""),
    "Khmer": ("បុរសឃើញផ្ទះចាស់នៅក្នុងភូមិតូច។", "នាងមកក្រោយ។", None, ("បុរស", "ស្ត្រី"), "km"),
    "Han": ("男人看见了村里的旧房子。", "她后来才来。", None, ("男人", "女人"), "zh"),
    "Hiragana": ("おとこのひとがふるい家をみた。", "かのじょはあとできた。", None, ("おとこ", "おんな"), "ja"),
    "Hangul": ("남자는 오래된 집을 보았다.", "그녀는 나중에 왔다.", 4, ("남자", "여자"), "ko"),
    "Ethiopic": ("ወንድ አሮጌውን ቤት አየ።", "እሷ በኋላ መጣች።", 4, ("ወንድ", "ሴት"), "am"),
    "Cherokee": ("ᎠᏍᎦᏯ ᎤᏪᏘ ᎦᎵᏦᏕ ᎤᎪᎲᎩ.", "ᎠᎨᏴ ᎣᏂ ᎤᎷᏨᎩ.", 4, ("ᎠᏍᎦᏯ", "ᎠᎨᏴ"), ""),
}
SCRIPTS = pytest.mark.parametrize("row", ROWS)
VALUES = ("someone@example.org", "+49 30 1234 5678", "4111 1111 1111 1111", "AKIA" + "A1" * 8, "8.8.46.135")


@SCRIPTS
def test_words_and_sentences(row):
    first, second, count, *_ = ROWS[row]
    assert script_of(first) == row.removesuffix(" with marks")
    found = words(first)
    assert uses_spaces(first) == (count is not None)
    assert len(found) == (count or len([g for g in graphemes(first) if g[0].isalpha()]))
    for form in ("NFC", "NFD"):
        text = unicodedata.normalize(form, first)
        assert len(words(text)) == len(found)
        assert "".join(tokens(text)) == "".join(text.split())
        separator = "" if row in ("Han", "Hiragana") else " "
        both = separator.join((text, second))
        if row == "Thai":  # has no sign for the end of a sentence
            assert list(sentences(both)) == [both]
        else:
            assert list(sentences(both)) == [text, second] and lead_sentence(both) == text


def test_word_and_sentence_boundaries():
    assert words('ˉmaˊ l’homme צה"ל क्‍ष col·lega x˥˩') == ["ˉmaˊ", "l’homme", 'צה"ל', "क्‍ष", "col·lega", "x˥˩"]
    assert words("用Python写ไทย3") == ["用", "Python", "写", "ไ", "ท", "ย", "3"]
    assert tokens("👍🏽, ok") == ["👍🏽", ",", "ok"]
    for text in (
        "እንዴት ነህ፧ ደህና።",
        "Բարեւ։ Լավ։",
        "ནང་། ཕྱི།",
        "ნახე. ეს.",
        "「行く？」 はい。",
        "Sí. ¿Qué?",
        "ہاں۔ نہیں۔",
        "हाँ॥ ना॥",
    ):
        assert len(list(sentences(text))) == 2, text
    assert len(list(sentences("डॉ. राम आए। वह गए।"))) == 2
    assert [script_of(text) for text in ("ᐃᓄᒃᑎᑐᑦ", "ܣܘܪܝܝܐ", "123", "ꓡꓲ")] == [
        "Canadian Aboriginal",
        "Syriac",
        "",
        "Lisu",
    ]
    assert [text_width(text) for text in ("abc", "漢字", "ดี", "e\u0301")] == [3, 4, 1, 1]


@SCRIPTS
@pytest.mark.parametrize("zero", [None, "٠", "०", "０"])
def test_personal_data_that_touches_letters(row, zero):
    letter = next(character for character in ROWS[row][0] if character.isalpha())
    touches = row not in ("Latin", "Latin with marks")
    for value in VALUES:
        written = value
        if zero and not value.startswith("AKIA"):
            written = "".join(chr(ord(zero) + int(c)) if c.isdigit() else c for c in value)
        text = f"{letter}{written}{letter}" if touches else f"{letter} {written} {letter}"
        assert [text[start:end] for _, start, end in find_pii(text)] == [written], text
        assert written not in format_excerpt(text)


@SCRIPTS
def test_words_of_groups_are_exchanged(tmp_path, row):
    first, _, _, (a, b), _ = ROWS[row]
    path = tmp_path / "groups.yaml"
    path.write_text(
        f"groups:\n  a: {{person: {a}}}\n  b: {{person: {b}}}\ntemplates: ['{{person}}']\n", encoding="utf-8"
    )
    swap = read_group_templates(path).make_swapper("a", "b")
    for form in ("NFC", "NFD"):
        text, expected = (unicodedata.normalize(form, t) for t in (first, first.replace(a, b)))
        assert swap(text) == expected != text and swap(expected) == text


def test_case_and_parts_of_words(tmp_path):
    def swapped(a, b, text):
        path = tmp_path / "groups.yaml"
        path.write_text(f"groups:\n  a: {{w: {a}}}\n  b: {{w: {b}}}\ntemplates: ['{{w}}']\n", encoding="utf-8")
        return read_group_templates(path).make_swapper("a", "b")(text)

    assert swapped("kız", "iyi", "KIZ Kız kız kızlar İYİ") == "İYİ İyi iyi kızlar KIZ"
    assert swapped("άντρας", "κυρία", "ΑΝΤΡΑΣ Άντρας ΚΥΡΙΑ") == "ΚΥΡΙΑ Κυρία ΑΝΤΡΑΣ"
    assert swapped("राम", "सीता", "रामायण रामा राम") == "रामायण रामा सीता"
    assert swapped("man", "woman", "human man用man Man") == "human woman用woman Woman"
    assert swapped("رجل", "فتاة", "والرجل بالرجل رجلان") == "والفتاة بالفتاة رجلان"
    assert swapped("גבר", "אישה", "והגבר לגבר גברים") == "והאישה לאישה גברים"


@SCRIPTS
def test_planted_contamination_is_found(tmp_path, row):
    first, second, *_ = ROWS[row]
    item = unicodedata.normalize("NFC", f"{first} {second} {first}")
    copies = [item.upper(), unicodedata.normalize("NFD", item), item.replace(" ", "\n"), item[: len(item) * 55 // 65]]
    benchmark = declared_benchmark(tmp_path / "b", [{"question": item, "choices": ["x", "y"], "answer": 0}])
    for i, copy in enumerate(copies):
        assert contamination(index_of(tmp_path / str(i), {"a.txt": f"{second[::-1]} {copy}"}), benchmark, QUIET).notable
    assert not contamination(index_of(tmp_path / "no", {"a.txt": second[::-1]}), benchmark, QUIET).notable


@SCRIPTS
def test_metrics_of_answers(row):
    references = list(ROWS[row][:2]) * 10
    near = [text.replace(text.split()[-1] if uses_spaces(text) else text[-2], "") for text in references]
    for form in ("NFC", "NFD"):
        perfect = generation_metrics(references, [unicodedata.normalize(form, text) for text in references])
        assert all(score.value == pytest.approx(100) for score in perfect.values())
        assert next(iter(perfect)) == "chrf"
    assert all(20 < score.value < 100 for score in generation_metrics(references, near).values())
    wrong = generation_metrics(references, [text[::-1] for text in references], ["chrf", "bleu", "rouge2"])
    assert all(score.value < 60 for score in wrong.values())
    expected = {"Han": "zh", "Hiragana": "char", "Thai": "char", "Khmer": "char", "Myanmar": "char"}
    assert bleu_tokenizer(ROWS[row][0]) == expected.get(row, "13a")


@SCRIPTS
def test_baselines_learn_from_words_in_any_form(row):
    first, second, _, (a, b), _ = ROWS[row]
    texts = [
        f"{first}{i}{word}{second}" if not uses_spaces(first) else f"{second} {i} {word}"
        for i in range(10)
        for word in (a, b)
    ]
    targets = ["a", "b"] * 10
    test = [unicodedata.normalize("NFD", text) for text in texts[:2]]
    assert naive_bayes(texts, targets, test) == ["a", "b"]
    classifier = LinearClassifier.fit(texts, targets, ["a", "b"])
    assert classifier is not None and classifier.predict(test) == ["a", "b"]


@SCRIPTS
def test_a_language_is_named_where_the_script_agrees(tmp_path, monkeypatch, row):
    first, _, _, _, language = ROWS[row]
    for named in ("en", "ko", "am", language or "th"):
        monkeypatch.setitem(sys.modules, "py3langid", SimpleNamespace(classify=lambda text, named=named: (named, 0.0)))
        [finding] = language_findings(index_of(tmp_path / named, {"a.txt": f"{first} " * 10}), QUIET)
        agrees = named == language or (named == "en" and row.startswith("Latin"))
        assert finding.name == f"documents in language {named if agrees else UNKNOWN_LANGUAGE}"


def test_short_passages_are_no_copies(tmp_path):
    """24 bytes are 8 Thai letters."""
    thai, chinese = "".join(ROWS["Thai"][:2]), "".join(ROWS["Han"][:2])
    index = index_of(tmp_path, {"a.txt": f"{thai} {chinese}"})
    assert index.find_matches(thai) and index.find_matches(chinese)
    assert not index.find_matches(thai[:12]) and not index.find_matches(chinese[:9])
    assert index.find_matches(thai[:12], min_bytes=24)


def test_labels_in_two_forms_are_one(tmp_path):
    rows = [
        {"text": f"text {i}", "label": unicodedata.normalize(form, "café")} for i, form in enumerate(("NFC", "NFD"))
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "x", "label": "tea"}]))
    read = read_examples(tmp_path / "a.jsonl", "classify", IssueLog())
    assert {example.fields["label"] for example in read.items} == {"café", "tea"}
