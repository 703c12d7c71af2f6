"""Tries out an untrusted tokenizer.json, in a process of its own (`common.limited_process`).

The `tokenizers` library can panic, and a regular expression or a normalizer can take any time or memory. Nothing is imported
from nextword.
"""

from collections import Counter

import tokenizers

MAX_TOKENS_PER_CHAR = 256


def answer(text: str) -> str | None:
    """Encode all printable ASCII characters, then runs of each and every character of the Basic Multilingual Plane.

    Args:
        text: The content of the file.

    Returns:
        Why the tokenizer cannot be used, or None.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        printable = [chr(code) for code in range(32, 127)]
        runs = [64 * character for character in printable]
        for characters in (printable, [*runs, *map(chr, [*range(0xD800), *range(0xE000, 0x10000)])]):
            encoding = tokenizer.encode(" ".join(characters))
            if (most := max(Counter(encoding.offsets).values(), default=0)) > MAX_TOKENS_PER_CHAR:
                return f"one character becomes {most:,} tokens"
            tokenizer.decode(encoding.ids)
    except BaseException as error:  # a panic of the library is no `Exception`
        return str(error)[:300] or type(error).__name__
    return None
