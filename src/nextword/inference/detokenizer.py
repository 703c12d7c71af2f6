"""Bytes of tokens to text that can be shown: whole characters, and nothing of what may become a stop string."""

import codecs


class TextStream:
    """Bytes in, text out, each piece as soon as nothing that follows can change it."""

    def __init__(self, stop: tuple[str, ...] = ()):
        self.stop = stop
        self.stopped = False
        self.held = ""  # the beginning of what may become a stop string
        # Holds back the first bytes of a character; bytes that can never become one turn into U+FFFD.
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes, last: bool = False) -> str:
        """The text that is now certain. With `last` all that is left; after a stop string none."""
        if self.stopped:
            return ""
        text = self.held + self.decoder.decode(data, final=last)
        # The stop string that is complete first counts, the longest of those; so token borders make no difference.
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stop if stop in text]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)[1]]
        keep = 0 if last else max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with, `stop` itself left out."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
