"""Opens and tries out an untrusted tokenizer.json in a separate process, run as a script.

The `tokenizers` library can panic, and a regular expression or a normalizer can take any time or memory: operating system
limits end this process instead. It reads the file's content from standard input, imports nothing from nextword, and exits with
0 if the tokenizer can be used, else with a message or by a signal.
"""

import os
import signal
import sys
from collections import Counter

MAX_SECONDS = 20  # of processor time; the largest vocabularies take a fifth
MAX_WALL_SECONDS = 120  # for a process that waits for itself
MAX_MEMORY_BYTES = 2**32  # address space
MAX_TOKENS_PER_CHAR = 256


def main() -> None:
    """Encode all printable ASCII characters, then runs of each and every character of the Basic Multilingual Plane."""
    os.environ["RUST_BACKTRACE"] = "0"  # it needs memory, for which a process without any waits
    if sys.platform != "win32":
        import resource

        signal.alarm(MAX_WALL_SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(sys.stdin.buffer.read().decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    printable = [chr(code) for code in range(32, 127)]
    runs = [64 * character for character in printable]
    for characters in (printable, [*runs, *map(chr, [*range(0xD800), *range(0xE000, 0x10000)])]):
        encoding = tokenizer.encode(" ".join(characters))
        if (most := max(Counter(encoding.offsets).values(), default=0)) > MAX_TOKENS_PER_CHAR:
            sys.exit(f"one character becomes {most:,} tokens")
        tokenizer.decode(encoding.ids)


if __name__ == "__main__":
    main()
