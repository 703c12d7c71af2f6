"""Incremental detokenization: the bytes of tokens to text that is safe to show."""

import codecs


class StreamingDetokenizer:
    """Turns bytes into text as soon as it is final: whole characters, and nothing that may become a stop string.

    Args:
        stop_strings: The text ends before the first of them.
    """

    def __init__(self, stop_strings: tuple[str, ...] = ()):
        self.stop_strings = stop_strings
        self.stopped = False
        self.pending_text = ""  # may be the beginning of a stop string
        # Holds back incomplete characters; invalid bytes become U+FFFD.
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes, is_final: bool = False) -> str:
        """Add bytes.

        Args:
            data: The bytes.
            is_final: No bytes follow; everything is shown but the beginning of a character that is incomplete.

        Returns:
            The text that is now certain; nothing after a stop string.
        """
        if self.stopped:
            return ""
        text = self.pending_text + self.decoder.decode(data)
        # The stop string that is completed first counts, and of those the longest; tokenization makes no difference.
        matches = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stop_strings if stop in text]
        if matches:
            self.stopped, self.pending_text = True, ""
            return text[: min(matches)[1]]
        keep = 0 if is_final else max((_partial_stop_length(text, stop) for stop in self.stop_strings), default=0)
        self.pending_text = text[len(text) - keep :]
        return text[: len(text) - keep]


def _partial_stop_length(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
