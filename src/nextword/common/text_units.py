"""Units of text in any script: graphemes, words, sentences, the script, and the width.

Boundaries are those of Unicode Standard Annex 29, with two additions. Tone letters are part of a word. Where a script has no
spaces between words (Thai, Lao, Khmer, Burmese, Chinese, Japanese), a word is a grapheme, the character that a reader sees;
runs of them take the place of words.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import regex

# Words before a full stop that does not end a sentence. Single letters are handled separately ("e.g.", "U.S.").
ABBREVIATIONS = {
    "al",
    "cf",
    "dr",
    "eq",
    "eqs",
    "fig",
    "figs",
    "mr",
    "mrs",
    "ms",
    "prof",
    "resp",
    "sec",
    "st",
    "vs",
    "डॉ",
}
MAX_ABBREVIATION_CHARS = 8
SCRIPTS = (
    "Latin Greek Cyrillic Armenian Hebrew Arabic Syriac Thaana Devanagari Bengali Gurmukhi Gujarati Oriya Tamil Telugu Kannada "
    "Malayalam Sinhala Thai Lao Tibetan Myanmar Georgian Hangul Ethiopic Cherokee Canadian_Aboriginal Ogham Runic Khmer "
    "Mongolian Hiragana Katakana Bopomofo Han Yi Gothic Tagalog Hanunoo Buhid Tagbanwa Limbu Tai_Le Osmanya Buginese Coptic "
    "New_Tai_Lue Glagolitic Tifinagh Syloti_Nagri Balinese Nko Sundanese Lepcha Ol_Chiki Vai Saurashtra Kayah_Li Rejang Cham "
    "Tai_Tham Tai_Viet Samaritan Lisu Bamum Javanese Meetei_Mayek Batak Mandaic Chakma Miao Bassa_Vah Mende_Kikakui Mro "
    "Pahawh_Hmong Warang_Citi Adlam Osage Newa Hanifi_Rohingya Wancho Nyiakeng_Puachue_Hmong Deseret Shavian Sora_Sompeng Ahom"
)
GRAPHEME = r"\X\p{M}*+"  # UAX 29 separates some Burmese vowel signs from their letter
UNSPACED = r"[\p{Line_Break=SA}\p{Han}\p{Hiragana}\p{Katakana}\u30FC]"  # SA: Thai, Lao, Khmer, Burmese, Tai Tham, …
WORD_CHARACTER = (
    rf"[[\w\u02C2-\u02DF\u02E5-\u02FF\uA700-\uA721\uA789\uA78A]--{UNSPACED}]"  # \w contains marks and joiners
)
_RUN = rf"(?:[A-Za-z0-9_]|{WORD_CHARACTER})++"  # the first part is a fast path
_WORD = (
    rf"""{_RUN}(?:['’·‧׳״]{_RUN}|(?<=\p{{Hebrew}})"(?=\p{{Hebrew}}){_RUN})*+|(?![\x00-\x7F])(?={UNSPACED}){GRAPHEME}"""
)
_WORDS = regex.compile(_WORD, regex.V1)
_TOKENS = regex.compile(rf"{_WORD}|(?![\s\x1C-\x1F]){GRAPHEME}", regex.V1)
_LETTERS = regex.compile(r"\p{L}")
_UNSPACED_LETTERS = regex.compile(rf"[\p{{L}}&&{UNSPACED}]", regex.V1)
# A sign of Latin script needs a space and a capital after it, or a letter of a script without capitals. Burmese ၊ is a comma.
_TERMINATOR = r"[[\p{Sentence_Break=STerm}\p{Sentence_Break=ATerm}།༎]--[၊]]"
_SENTENCE_END = regex.compile(
    rf"""(?<!{_TERMINATOR})(?:
      (?P<sign>[.?!]++|(?<=\p{{Greek}})[;\u037E])["'\p{{Pe}}\p{{Pf}}]*+\s++(?=["'\p{{Ps}}\p{{Pi}}¿¡]*+[\p{{Lu}}\p{{Lt}}\p{{Lo}}\p{{Georgian}}])
    | (?![.?!]++(?!{_TERMINATOR})){_TERMINATOR}++["'\p{{Pe}}\p{{Pf}}]*+\s*+(?=\S)
    )""",
    regex.V1 | regex.VERBOSE,
)
_ENDS_SENTENCE = regex.compile(rf"\w{_TERMINATOR}$", regex.V1)
_INITIAL = regex.compile(r"[\p{Lu}\p{Ll}\p{Lt}]\p{M}*+")
_LAST_WORD = regex.compile(r"\w*$")


def nfc(text: str) -> str:
    """The form in which texts are compared: characters that look alike and are canonically equivalent are equal."""
    return unicodedata.normalize("NFC", text)


def graphemes(text: str) -> list[str]:
    """The characters that a reader sees: letters with their combining marks (UAX 29, extended grapheme clusters)."""
    return regex.findall(GRAPHEME, text)


def words(text: str) -> list[str]:
    """The words of a text, without punctuation; graphemes where a script has no spaces.

    Combining marks, joiners, tone letters and inner apostrophes belong to a word.
    """
    return _WORDS.findall(text)


def tokens(text: str) -> list[str]:
    """The words of a text, and each other sign that is no white space."""
    return _TOKENS.findall(text)


def uses_spaces(text: str) -> bool:
    """Whether at least half of the letters of a text belong to scripts with spaces between words."""
    return 2 * len(_UNSPACED_LETTERS.findall(text)) <= len(_LETTERS.findall(text))


def split_words(text: str) -> list[str]:
    """What stands between white space, with its punctuation; the graphemes of a text in a script without spaces."""
    return text.split() if uses_spaces(text) else [unit for unit in graphemes(text) if not unit.isspace()]


def ends_sentence(text: str) -> bool:
    """Whether a text ends with a sentence terminal of any script behind a word."""
    return _ENDS_SENTENCE.search(text) is not None


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, stripped.

    A sentence ends at a sentence terminal of any script (`Sentence_Break` of UAX 29; also Greek ";" and Tibetan shad), with
    closing quotes and brackets. After ".", "?", "!" and Greek ";" there must be white space and a capital letter, or a letter
    of a script without capitals. A full stop after a single letter ("J.", "e.g.") or one of `ABBREVIATIONS` ends none. Thai
    and Lao have no such sign: a text without any is one sentence.
    """
    text, start = text.strip(), 0
    for end in _SENTENCE_END.finditer(text):
        before = text[max(0, end.start() - MAX_ABBREVIATION_CHARS) : end.start()]
        word: str = _LAST_WORD.findall(before)[0]
        if end["sign"] != "." or not (_INITIAL.fullmatch(word) or word.lower() in ABBREVIATIONS):
            yield text[start : end.end()].rstrip()
            start = end.end()
    if start < len(text):
        yield text[start:]


def script_of(text: str) -> str:
    """The script of most letters of a text (Unicode's `Script`), such as "Canadian Aboriginal"; "" without letters."""
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if character.isalpha():
            counts[_character_script(character)] += count
    return counts.most_common(1)[0][0] if counts else ""


@cache
def _character_script(character: str) -> str:
    match = _script_pattern().match(character)
    return match.lastgroup.replace("_", " ") if match else "other"


@cache
def _script_pattern() -> Any:
    return regex.compile("|".join(rf"(?P<{name}>\p{{Script={name}}})" for name in SCRIPTS.split()))


def text_width(text: str) -> int:
    """The width of a text in columns: 2 for Chinese, Japanese and Korean characters (UAX 11), 0 for combining marks.

    A measure of how much a text says that does not depend on the script as much as bytes or characters.
    """
    if text.isascii():
        return len(text)
    return sum(map(_character_width, text))


@cache
def _character_width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1
