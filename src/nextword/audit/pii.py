"""Personally identifiable information (PII) and secrets in text, recognized by form and, where there is one, checksum.

Phone numbers are checked by `phonenumbers` (Google's libphonenumber), IBANs and cards by `python-stdnum`. Letters of other
scripts may touch a value; digits, spaces and hyphens of any script count as those of ASCII. Reports contain the kind, the
place and a mask of a match, never its value.
"""

import ipaddress
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from mimetypes import MimeTypes
from typing import NamedTuple

from nextword.common.errors import import_optional

PII_KINDS = ("email addresses", "phone numbers", "credit card numbers", "IBANs", "IP addresses", "API keys and tokens")
EMAIL, PHONE, CREDIT_CARD, IBAN, IP_ADDRESS, API_KEY = PII_KINDS
MAX_EXCERPT_CHARS = 200

_LATIN = r"A-Za-z0-9\u00C0-\u024F\u1E00-\u1EFF"
_EMAIL = re.compile(
    rf"(?<![{_LATIN}_.+-])[{_LATIN}_][{_LATIN}_.+-]{{0,63}}@(?:[{_LATIN}-]{{1,63}}\.)+[A-Za-z]{{2,24}}(?![{_LATIN}_@-]|:[^\s])"
)
_UNICODE_EMAIL = re.compile(r"(?<![\w.+-])\w[\w.+-]{0,63}@(?:[\w-]{1,63}\.)+[^\W\d_]{2,24}(?![\w@-])")
# A number of at least seven digits, perhaps in groups. It is searched for first, since it skips most of a text.
_NUMBER = re.compile(r"[+(]?[0-9][0-9 ()./-]{5,}[0-9]")
_AFTER_NUMBER = r"(?!(?!x[0-9]|ext)\w|-[0-9])"
# With a country code; of North America; with an area code in parentheses.
_PHONE = re.compile(
    rf"""(?:
      (?<![\w+]) (?:\+|(?<![.-])00) [1-9] (?:[ ()./-]{{0,3}}[0-9]){{6,15}}
    | (?<![\w+-])(?<![0-9]\.) (?:1[ .-])? (?:\([0-9]{{3}}\)[ ]? | [0-9]{{3}}([.-])) [0-9]{{3}} (?(1)\1|[ .-]) [0-9]{{4}}
    | (?<![\w+-])(?<![0-9][. ]) (?:1[ ])? [2-9][0-9]{{2}}[ ][0-9]{{3}}[ ][0-9]{{4}} (?![ ][0-9])
    | (?<![\w+-]) (?:\(0[0-9]{{1,4}}\) | [78][ ]?\([0-9]{{3}}\)) (?:[ /-]?[0-9]{{2,8}}){{1,4}}
    ){_AFTER_NUMBER}""",
    re.ASCII | re.VERBOSE,
)
_DECIMAL = re.compile(r"\+[0-9]+\.[0-9]+")
_CREDIT_CARD = re.compile(
    r"(?<![\w.-])(?:(?:[0-9]{4}[ -]){3}[0-9]{4}|[0-9]{4}[ -][0-9]{6}[ -][0-9]{4,5}|[0-9]{14,19})(?![\w]|[.-][0-9])",
    re.ASCII,
)
_CARD_ISSUER = re.compile(
    r"4(?:.{15}|.{18})|(?:5[1-5]|2[2-7]).{14}|3[47].{13}|3(?:0[0-5]|[68].).{11}|6(?:011|[245]..).{12}|35.{14}"
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?:[ -]?[A-Za-z0-9]){11,30}(?![A-Za-z0-9])")
_IPV4 = re.compile(r"(?<![\w.-])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w-]|\.[0-9])", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){3,7}(?![\w:.])", re.ASCII)
_IPV6_PART = re.compile(r":[0-9A-Fa-f]{0,4}:")  # a fast test
# Prefixes that issuers give their keys, each a fast test for its pattern.
_API_KEYS = {  # searched with ASCII's \b
    "PRIVATE KEY-----": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----(?:[0-9A-Za-z+/=\s]{64,}(?:-----END [A-Z ]+-----)?)?",
    "AKIA": r"\bAKIA[0-9A-Z]{16}\b",
    "ASIA": r"\bASIA[0-9A-Z]{16}\b",
    "AIza": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "gh": r"\bgh[opsur]_[0-9A-Za-z]{36,}\b",
    "github_pat_": r"\bgithub_pat_[0-9A-Za-z_]{50,}\b",
    "glpat-": r"\bglpat-[0-9A-Za-z_-]{20,}\b",
    "hf_": r"\bhf_[0-9A-Za-z]{30,}\b",
    "npm_": r"\bnpm_[0-9A-Za-z]{36}\b",
    "xox": r"\bxox[abeoprs]-[0-9A-Za-z-]{20,}\b",
    "sk_live_": r"\b[rs]k_live_[0-9A-Za-z]{20,}\b",
    "sk-": r"\bsk-(?=[0-9A-Za-z_-]*[0-9])(?=[0-9A-Za-z_-]*[A-Z])[0-9A-Za-z_-]{32,}\b",
    "eyJ": r"\beyJ[0-9A-Za-z_-]{10,}\.eyJ[0-9A-Za-z_-]{10,}\.[0-9A-Za-z_-]{10,}",
}


Check = Callable[[str], object]


class PIIMatch(NamedTuple):
    """A match of one of `PII_KINDS`: characters start … end − 1 of a text."""

    kind: str
    start: int
    end: int


def find_pii(text: str) -> Iterator[PIIMatch]:
    """All matches in a text in order. Of overlapping matches, the first and then the longest is kept.

    Raises:
        MissingDependencyError: phonenumbers or python-stdnum is not installed.
    """
    is_iban, is_luhn, is_phone = load_checks()
    plain, offsets = _to_ascii_forms(text)
    matches: list[PIIMatch] = []

    def search(kind: str, pattern: re.Pattern[str], is_valid: Check, start: int = 0, end: int = sys.maxsize) -> None:
        while match := pattern.search(plain, start, end):
            value, start = match[0], match.start() + 1
            while value and not is_valid(value):  # what follows may look like a part of it
                value = value[: max(0, *map(value.rfind, ".@" if kind == EMAIL else " -"))]
            if value:
                start = match.start() + len(value)
                matches.append(PIIMatch(kind, match.start(), start))

    if "@" in plain:
        search(EMAIL, _EMAIL, _is_email)
        if not plain.isascii() and plain.count("@") > len(matches):
            search(EMAIL, _UNICODE_EMAIL, lambda value: not value.isascii() and not _EMAIL.search(value))
    for marker, pattern in _API_KEYS.items():
        if marker in plain:
            search(API_KEY, re.compile(pattern, re.ASCII), bool)
    search(IBAN, _IBAN, is_iban)
    if _IPV6_PART.search(plain):
        search(IP_ADDRESS, _IPV6, _is_public_ip_address)
    for number in _NUMBER.finditer(plain):
        span = number.start(), number.end() + 4  # the lookaheads read up to four characters
        search(CREDIT_CARD, _CREDIT_CARD, is_luhn, *span)
        search(IP_ADDRESS, _IPV4, _is_public_ip_address, *span)
        search(PHONE, _PHONE, is_phone, *span)
    previous_end = 0
    for kind, start, end in sorted(matches, key=lambda match: (match.start, -match.end)):
        if start >= previous_end:
            yield (
                PIIMatch(kind, start, end) if offsets is None else PIIMatch(kind, offsets[start], offsets[end - 1] + 1)
            )
            previous_end = end


def mask_pii(kind: str, value: str) -> str:
    """Enough of a value for its owner to recognize it: its first characters and its form."""
    if kind == EMAIL:
        name, _, domain = value.replace("＠", "@").partition("@")
        return f"{name[0]}…@{domain[:1]}….{domain.rpartition('.')[2]}"
    return f"{value[:2]}… ({len(value)} characters)"


def format_excerpt(text: str, length: int = MAX_EXCERPT_CHARS, before: str = "", after: str = "") -> str:
    """A passage on one line, truncated, with its PII masked. PII may begin before the passage and end after it."""
    start, end, text = len(before), len(before) + len(text), before + text + after
    for kind, first, last in reversed(list(find_pii(text))):
        if first < end and last > start:
            masked = mask_pii(kind, text[first:last])
            text = text[:first] + masked + text[last:]
            start, end = min(start, first), max(end, last) + len(masked) - (last - first)
    line = " ".join(text[start:end].split())
    return line if len(line) <= length else line[: length - 1] + "…"


@cache
def _ascii_forms() -> tuple[dict[str, str], re.Pattern[str]]:
    """The ASCII form of digits, spaces, hyphens and full-width characters, and any of them. Format characters have none."""
    forms = {"−": "-"}
    for character in map(chr, range(0x80, 0x10000)):
        category = unicodedata.category(character)
        if category == "Nd":
            forms[character] = str(unicodedata.decimal(character))
        elif category in ("Zs", "Pd", "Cf"):
            forms[character] = {"Zs": " ", "Pd": "-", "Cf": ""}[category]
        elif "！" <= character <= "～":
            forms[character] = unicodedata.normalize("NFKC", character)
    return forms, re.compile(f"[{re.escape(''.join(forms))}]")


def _to_ascii_forms(text: str) -> tuple[str, list[int] | None]:
    """A text with `_ascii_forms`, and the index of each character in the original unless they are the same."""
    if text.isascii():
        return text, None
    forms, pattern = _ascii_forms()
    plain = pattern.sub(lambda match: forms[match[0]], text)
    return plain, None if len(plain) == len(text) else [i for i, c in enumerate(text) if forms.get(c) != ""]


# ---------------------------------------------------------------- checks


@cache
def load_checks() -> tuple[Check, Check, Check]:
    """The checks of whether a text is an IBAN, a card number, and a phone number. Raises as `find_pii`."""
    iban, luhn = (import_optional(f"stdnum.{name}", "finding personal data", "audit") for name in ("iban", "luhn"))
    phonenumbers = import_optional("phonenumbers", "finding personal data", "audit")

    def is_card(text: str) -> bool:
        digits = re.sub(r"[ -]", "", text)
        return bool(_CARD_ISSUER.fullmatch(digits)) and len(set(digits)) > 1 and luhn.is_valid(digits)

    def is_phone(text: str) -> bool:
        digits, is_international = re.sub(r"[^0-9]", "", text), text.startswith(("+", "00"))
        if text.startswith("(0"):
            return 8 <= len(digits) <= 12
        if not is_international and not {"(", "-"}.isdisjoint(text):
            return len(digits) in (10, 11)
        try:
            number = phonenumbers.parse("+" + text.lstrip("+0") if is_international else text, "US")
        except phonenumbers.NumberParseException:
            return False
        is_valid = bool(phonenumbers.is_valid_number(number))
        if not is_international:
            return is_valid
        first, *others = re.findall(r"[0-9]+", text.lstrip("+0"))
        first = first[len(str(number.country_code)) :]
        groups = [group for group in (first, *others) if group not in ("", "0")]
        if len(first) == 1 or _DECIMAL.fullmatch(text):
            return False
        # Most groups of a list of numbers after a plus are short. The groups of a number in its usual form may be, too.
        if 2 * sum(len(group) >= 3 for group in groups) < len(groups):
            usual = phonenumbers.PhoneNumberMatcher(text, None, phonenumbers.Leniency.STRICT_GROUPING)
            return any(match.raw_string == text for match in usual)
        is_possible = phonenumbers.is_possible_number_with_reason(number) == phonenumbers.ValidationResult.IS_POSSIBLE
        is_distinct = max(map(len, groups)) >= 4 and len(digits) >= 10 and text[0] == "+"
        return is_valid or (is_possible and is_distinct)

    return lambda text: iban.is_valid(text, check_country=False), is_card, is_phone


def _is_email(text: str) -> bool:
    """Whether a text is an address and not the name of a file, such as icon@2x.jpg. Some suffixes of files are countries."""
    suffix = text.rpartition(".")[2]
    is_file = MimeTypes().guess_type(f"_.{suffix}")[0] is not None
    return bool(_EMAIL.fullmatch(text)) and not (
        is_file and suffix.upper() not in import_module("phonenumbers").SUPPORTED_REGIONS
    )


def _is_public_ip_address(text: str) -> bool:
    """Whether a text is a globally reachable address. In IPv4, two parts must have two digits: 1.2.3.4 is rather a section."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and (address.version == 6 or sum(len(part) > 1 for part in text.split(".")) > 1)
