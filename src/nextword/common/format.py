"""Numbers and tokens as people read them: `2.1 GB`, `16 min`, `1.23 M`, `↵`."""

import re
import shlex
import unicodedata

DOTTED_CIRCLE = "\u25cc"
# Control characters, and those of the direction of text. Joiners are part of words.
INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def quote_command(*arguments: object) -> str:
    """A command line of nextword for a shell: each argument is one word, and none is taken for an option."""
    words = list(map(str, arguments))
    if any(word.startswith("-") and not word.startswith("--out=") for word in words):
        words.insert(2, "--")
    return shlex.join(words)


def format_duration(seconds: float) -> str:
    """A duration in words: `4.2 s`, `4 min 19 s`, `16 min`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 59.95:
        return f"{seconds:z.1f} s"
    rounded = round(seconds)
    minutes, hours, days = rounded // 60, rounded // 3600, rounded // 86400
    if days:
        return _join(days, "d", hours % 24, "h")
    if hours:
        return _join(hours, "h", minutes % 60, "min")
    return _join(minutes, "min", rounded % 60 if minutes < 10 else 0, "s")


def _join(large: int, large_unit: str, small: int, small_unit: str) -> str:
    return f"{large} {large_unit}" + (f" {small} {small_unit}" if small else "")


def format_clock(seconds: float) -> str:
    """A duration as a clock shows it: `0:42`, `3:05`, `2:00:05`."""
    rounded = round(seconds)
    hours, minutes = rounded // 3600, rounded // 60 % 60
    return f"{hours}:{minutes:02}:{rounded % 60:02}" if hours else f"{minutes}:{rounded % 60:02}"


def format_bytes(num_bytes: float) -> str:
    """A number of bytes in decimal units: `812 B`, `14 kB`, `2.1 GB`, `1,400 TB`."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= size:
            value = num_bytes / size
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:,.0f} {unit}"
    return f"{num_bytes:,.0f} B"


def format_count(value: float) -> str:
    """A large number with three digits: `1.23 M` for 1,234,567, `7 B` for seven billion, `812` for 812."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def show_whitespace(text: str) -> str:
    """A token inside a sentence: line breaks and tabs as arrows, a token of spaces as ␣, control characters as U+FFFD, and a
    combining mark without a letter on a dotted circle.
    """
    visible = INVISIBLE.sub("\ufffd", text.replace("\n", "↵").replace("\t", "⇥"))
    if unicodedata.category(visible.strip(" ")[:1] or " ").startswith("M"):
        visible = visible.replace(visible.strip(" "), DOTTED_CIRCLE + visible.strip(" "))
    return visible.strip(" ") or "␣" * len(visible)
