"""Personally identifiable information (PII) and secrets in text, recognized by pattern and, where there is one, checksum.

Reports contain the kind, the place and a mask of a match, never its value.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

PII_KINDS = ("email addresses", "phone numbers", "credit card numbers", "IBANs", "IP addresses", "API keys and tokens")
EMAIL, PHONE, CREDIT_CARD, IBAN, IP_ADDRESS, API_KEY = PII_KINDS
MAX_EXCERPT_CHARS = 200

_EMAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w@-])")
# A number of at least seven digits, perhaps in groups. It is searched for first, since it skips most of a text.
_NUMBER = re.compile(r"[+(]?[0-9][0-9 ().-]{5,30}[0-9]")
_PHONE = re.compile(
    r"(?<![\w+.-])(?:\+[0-9]{1,3}[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?[0-9](?:[ .-]?[0-9]){5,12}"
    r"|\([0-9]{3}\) ?[0-9]{3}[ -][0-9]{4}|[0-9]{3}-[0-9]{3}-[0-9]{4})(?![\w-])"
)
_DECIMAL = re.compile(r"\+[0-9]+\.[0-9]+")
_CREDIT_CARD = re.compile(
    r"(?<![\w.-])(?:(?:[0-9]{4}[ -]){3}[0-9]{4}|[0-9]{4}[ -][0-9]{6}[ -][0-9]{5}|[0-9]{13,19})(?![\w-]|\.[0-9])"
)
_CARD_ISSUER = re.compile(r"4(?:.{12}|.{15}|.{18})|(?:5[1-5]|2[2-7]).{14}|3[47].{13}|6(?:011|4[4-9].|5..).{12}")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_IBAN_COUNTRIES = (
    "AD AE AL AT AZ BA BE BG BH BI BR BY CH CR CY CZ DE DJ DK DO EE EG ES FI FK FO FR GB GE GI GL GR GT HN HR HU IE IL IQ "
    "IS IT JO KW KZ LB LC LI LT LU LV LY MC MD ME MK MN MR MT MU NI NL NO OM PK PL PS PT QA RO RS RU SA SC SD SE SI SK SM "
    "SO ST SV TL TN TR UA VA VG XK YE"
)
_IPV4 = re.compile(r"(?<![\w.-])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w-]|\.[0-9])")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){3,7}(?![\w:.])")
# Prefixes that issuers give their keys, each a fast test for its pattern.
_API_KEYS = {
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


Check = Callable[[str], bool]


class PIIMatch(NamedTuple):
    """A match of one of `PII_KINDS`: characters start … end − 1 of a text."""

    kind: str
    start: int
    end: int


def find_pii(text: str) -> Iterator[PIIMatch]:
    """All matches in a text in order. Of overlapping matches, the first and then the longest is kept."""
    matches: list[PIIMatch] = []

    def search(
        kind: str, pattern: re.Pattern[str], is_valid: Check = bool, span: tuple[int, int] = (0, len(text))
    ) -> None:
        found = pattern.finditer(text, *span)
        matches.extend(PIIMatch(kind, *match.span()) for match in found if is_valid(match[0]))

    if "@" in text:
        search(EMAIL, _EMAIL)
    for marker, pattern in _API_KEYS.items():
        if marker in text:
            search(API_KEY, re.compile(pattern))
    matches += _find_ibans(text)
    if ":" in text:
        search(IP_ADDRESS, _IPV6, _is_public_ip_address)
    for number in _NUMBER.finditer(text):
        span = number.start(), number.end() + 3  # the lookaheads read up to three characters
        search(CREDIT_CARD, _CREDIT_CARD, _is_credit_card, span)
        search(IP_ADDRESS, _IPV4, _is_public_ip_address, span)
        search(PHONE, _PHONE, lambda match: not _DECIMAL.fullmatch(match), span)
    previous_end = 0
    for match in sorted(matches, key=lambda match: (match.start, -match.end)):
        if match.start >= previous_end:
            yield match
            previous_end = match.end


def mask_pii(kind: str, value: str) -> str:
    """Enough of a value for its owner to recognize it: its first characters and its form."""
    if kind == EMAIL:
        name, _, domain = value.partition("@")
        return f"{name[0]}…@{domain[0]}….{domain.rpartition('.')[2]}"
    return f"{value[:2]}… ({len(value)} characters)"


def format_excerpt(text: str, length: int = MAX_EXCERPT_CHARS) -> str:
    """A passage on one line, truncated, with its PII masked."""
    for kind, start, end in reversed(list(find_pii(text))):
        text = text[:start] + mask_pii(kind, text[start:end]) + text[end:]
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def is_luhn_valid(digits: str) -> bool:
    """The checksum of card numbers (ISO/IEC 7812-1, annex B): every second digit from the right counts double."""
    numbers = [int(digit) for digit in reversed(digits)]
    return (sum(numbers[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in numbers[1::2])) % 10 == 0


def is_iban_checksum_valid(iban: str) -> bool:
    """The checksum of an IBAN without spaces (ISO 7064): rotated by four characters, letters as 10 to 35, modulo 97."""
    return int("".join(str(int(character, 36)) for character in iban[4:] + iban[:4])) % 97 == 1


def _is_credit_card(text: str) -> bool:
    digits = re.sub(r"[ -]", "", text)
    return bool(_CARD_ISSUER.fullmatch(digits)) and len(set(digits)) > 1 and is_luhn_valid(digits)


def _find_ibans(text: str) -> Iterator[PIIMatch]:
    for match in _IBAN.finditer(text):
        candidate = match[0]
        while len(candidate) >= 15:
            iban = candidate.replace(" ", "")
            if iban[:2] in _IBAN_COUNTRIES and 15 <= len(iban) <= 34 and is_iban_checksum_valid(iban):
                yield PIIMatch(IBAN, match.start(), match.start() + len(candidate))
                break
            candidate = candidate.rpartition(" ")[0]  # a word in capitals may follow the IBAN


def _is_public_ip_address(text: str) -> bool:
    """Whether a text is a globally reachable address. In IPv4, two parts must have two digits: 1.2.3.4 is rather a section."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and (address.version == 6 or sum(len(part) > 1 for part in text.split(".")) > 1)
