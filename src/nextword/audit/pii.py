"""Personal data and secrets in a text: addresses, numbers and keys by their form and, where they have one, their check sum.

What is told of one is where it stands and a mask, never the datum itself.
"""

import ipaddress
import re
from collections.abc import Iterator
from typing import NamedTuple

from nextword.audit.text_index import CorpusIndex

EMAIL, PHONE, CREDIT_CARD, IBAN, IP_ADDRESS, API_KEY = PII_KINDS = (
    "mail addresses", "phone numbers", "card numbers", "IBANs", "IP addresses", "keys and tokens"
)  # fmt: skip

_EMAIL_PATTERN = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w@-])")
# Where a number of seven digits or more stands, perhaps in groups: most of a text is passed over by this one alone.
_NUMBER_PATTERN = re.compile(r"[+(]?[0-9][0-9 ().-]{5,30}[0-9]")
_PHONE_PATTERN = re.compile(
    r"(?<![\w+.-])(?:\+[0-9]{1,3}[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?[0-9](?:[ .-]?[0-9]){5,12}"
    r"|\([0-9]{3}\) ?[0-9]{3}[ -][0-9]{4}|[0-9]{3}-[0-9]{3}-[0-9]{4})(?![\w-])"
)
_DECIMAL_PATTERN = re.compile(r"\+[0-9]+\.[0-9]+")
_CREDIT_CARD_PATTERN = re.compile(
    r"(?<![\w.-])(?:(?:[0-9]{4}[ -]){3}[0-9]{4}|[0-9]{4}[ -][0-9]{6}[ -][0-9]{5}|[0-9]{13,19})(?![\w-]|\.[0-9])"
)
_CARD_ISSUER_PATTERN = re.compile(r"4(?:.{12}|.{15}|.{18})|(?:5[1-5]|2[2-7]).{14}|3[47].{13}|6(?:011|4[4-9].|5..).{12}")
_IBAN_PATTERN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_IBAN_COUNTRIES = (
    "AD AE AL AT AZ BA BE BG BH BI BR BY CH CR CY CZ DE DJ DK DO EE EG ES FI FK FO FR GB GE GI GL GR GT HN HR HU IE IL IQ "
    "IS IT JO KW KZ LB LC LI LT LU LV LY MC MD ME MK MN MR MT MU NI NL NO OM PK PL PS PT QA RO RS RU SA SC SD SE SI SK SM "
    "SO ST SV TL TN TR UA VA VG XK YE"
)
_IPV4_PATTERN = re.compile(r"(?<![\w.-])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w-]|\.[0-9])")
_IPV6_PATTERN = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){3,7}(?![\w:.])")
# What those who give out keys begin them with, so that they are found when they are lost.
_API_KEY_REGEXES = {
    "PRIVATE KEY-----": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
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
_API_KEY_PATTERNS = {mark: re.compile(pattern) for mark, pattern in _API_KEY_REGEXES.items()}


class PIIMatch(NamedTuple):
    """One of `KINDS` in a document, from its byte `start` to before `end`."""

    kind: str
    document: int
    start: int
    end: int


def find_pii_in_document(index: CorpusIndex, document: int) -> Iterator[PIIMatch]:
    """What a document of a corpus has."""
    for offset, text in index.iter_chunks(document):
        for kind, start, end in find_pii(text):
            begin = offset + len(text[:start].encode())
            yield PIIMatch(kind, document, begin, begin + len(text[start:end].encode()))


def find_pii(text: str) -> Iterator[tuple[str, int, int]]:
    """Kind, begin and end of what stands in a text; none of them overlap."""
    spans: list[tuple[int, int, str]] = []
    if "@" in text:
        spans += [(*match.span(), EMAIL) for match in _EMAIL_PATTERN.finditer(text)]
    for mark, pattern in _API_KEY_PATTERNS.items():
        if mark in text:
            spans += [(*match.span(), API_KEY) for match in pattern.finditer(text)]
    spans += _find_ibans(text)
    if ":" in text:
        spans += [
            (*match.span(), IP_ADDRESS) for match in _IPV6_PATTERN.finditer(text) if _is_public_ip_address(match[0])
        ]
    for number in _NUMBER_PATTERN.finditer(text):
        begin, end = number.start(), number.end() + 3  # what follows decides whether it is a number of its own
        spans += [
            (*match.span(), CREDIT_CARD)
            for match in _CREDIT_CARD_PATTERN.finditer(text, begin, end)
            if _is_credit_card(match[0])
        ]
        spans += [
            (*match.span(), IP_ADDRESS)
            for match in _IPV4_PATTERN.finditer(text, begin, end)
            if _is_public_ip_address(match[0])
        ]
        spans += [
            (*match.span(), PHONE)
            for match in _PHONE_PATTERN.finditer(text, begin, end)
            if not _DECIMAL_PATTERN.fullmatch(match[0])
        ]
    previous_end = 0
    for begin, end, kind in sorted(spans, key=lambda one: (one[0], -one[1])):
        if begin >= previous_end:
            yield kind, begin, end
            previous_end = end


def mask_pii(kind: str, value: str) -> str:
    """As much of a datum as lets its owner know it again: its first characters and its form."""
    if kind == EMAIL:
        name, _, domain = value.partition("@")
        return f"{name[0]}…@{domain[0]}….{domain.rpartition('.')[2]}"
    return f"{value[:2]}… ({len(value)} characters)"


def is_luhn_valid(digits: str) -> bool:
    """The check sum of card numbers (ISO/IEC 7812-1, annex B): every second digit from the right counts double."""
    numbers = [int(digit) for digit in reversed(digits)]
    return (sum(numbers[::2]) + sum(sum(divmod(2 * one, 10)) for one in numbers[1::2])) % 10 == 0


def is_iban_checksum_valid(iban: str) -> bool:
    """The check sum of an IBAN without spaces (ISO 7064): the first four characters put last, letters as 10 to 35."""
    return int("".join(str(int(one, 36)) for one in iban[4:] + iban[:4])) % 97 == 1


def _is_credit_card(text: str) -> bool:
    digits = re.sub(r"[ -]", "", text)
    return bool(_CARD_ISSUER_PATTERN.fullmatch(digits)) and len(set(digits)) > 1 and is_luhn_valid(digits)


def _find_ibans(text: str) -> Iterator[tuple[int, int, str]]:
    for match in _IBAN_PATTERN.finditer(text):
        candidate = match[0]
        while len(candidate) >= 15:
            iban = candidate.replace(" ", "")
            if iban[:2] in _IBAN_COUNTRIES and 15 <= len(iban) <= 34 and is_iban_checksum_valid(iban):
                yield match.start(), match.start() + len(candidate), IBAN
                break
            candidate = candidate.rpartition(" ")[0]  # a word in capitals that follows it


def _is_public_ip_address(text: str) -> bool:
    """Whether it is an address that anybody can reach. A number such as 1.2.3.4 is rather a section's: two of the four must
    have two digits."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and (address.version == 6 or sum(len(part) > 1 for part in text.split(".")) > 1)
