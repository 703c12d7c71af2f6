"""Bytes of tokens to text that can be shown: whole characters, and nothing of what may become a stop string."""

import codecs


class StreamingDetokenizer:
    """Bytes in, text out, each piece as soon as nothing that follows can change it."""

    def __init__(self, stop_strings: tuple[str, ...] = ()):
        self.stop_strings = stop_strings
        self.stopped = False
        self.pending_text = ""  # the beginning of what may become a stop string
        # Holds back the first bytes of a character; bytes that can never become one turn into U+FFFD.
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes, is_final: bool = False) -> str:
        """The text that is now certain. With `last` all that is left; after a stop string none."""
        if self.stopped:
            return ""
        text = self.pending_text + self.decoder.decode(data, final=is_final)
        # The stop string that is complete first counts, the longest of those; so token borders make no difference.
        stop_matches = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stop_strings if stop in text]
        if stop_matches:
            self.stopped, self.pending_text = True, ""
            return text[: min(stop_matches)[1]]
        pending_length = (
            0 if is_final else max((_partial_stop_length(text, stop) for stop in self.stop_strings), default=0)
        )
        self.pending_text = text[len(text) - pending_length :]
        return text[: len(text) - pending_length]


def _partial_stop_length(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with, `stop` itself left out."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
