"""From the engine's events to OpenAI's objects: texts, log-probabilities, chunks of a stream."""

import codecs
import secrets
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from nextword.data.tokenizer import Tokenizer
from nextword.inference.engine import Event
from nextword.inference.sampling import Choice
from nextword.serving.protocol import Refusal, finite


class Words:
    """Single tokens as text."""

    def __init__(self, tokenizer: Tokenizer):
        self.names = {id: name for name, id in tokenizer.markers.items()}
        self.bytes = lru_cache(2**16)(tokenizer.spelling)

    def text(self, id: int) -> str:
        """A token by itself. One that is no whole characters is spelt in bytes, so that two never look alike."""
        data = self.bytes(id)
        try:
            return data.decode() if data else self.names.get(id, "")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Entry(NamedTuple):
    """A token of a text, how likely it was (None for the first of a prompt), and how many characters stand before it."""

    token: int
    choice: Choice | None
    offset: int


class Text:
    """One text as it comes.

    Log-probabilities are told with the text they belong to: those of a token that may become part of a stop string wait
    as its characters do.
    """

    def __init__(self, words: Words, ends: frozenset[int] = frozenset(), offset: int = 0):
        self.words, self.ends = words, ends
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.offset = self.shown = offset  # characters of the tokens so far, and of what can be shown of them
        self.pending: list[Entry] = []
        self.tokens = 0
        self.logprobs: list[float] = []
        self.finish_reason: Literal["stop", "length"] | None = None

    def push(self, event: Event) -> tuple[str, list[Entry]]:
        """What can be shown now.

        Raises:
            Refusal: the text has ended with an error.
        """
        if event.finish_reason == "error":
            raise Refusal(500, event.error or "the engine failed")
        if event.token is not None:
            self.tokens += 1
            self.add(event.token, event.choice)
            if event.choice is not None:
                self.logprobs.append(event.choice.logprob)
        self.shown += len(event.text)
        self.finish_reason = event.finish_reason
        ended = event.finished and (event.token is None or event.token in self.ends or event.finish_reason == "length")
        ready = [entry for entry in self.pending if ended or entry.offset < self.shown]
        self.pending = [] if event.finished else self.pending[len(ready) :]
        return event.text, ready

    def add(self, token: int, choice: Choice | None) -> None:
        self.pending.append(Entry(token, choice, self.offset))
        self.offset += len(self.decoder.decode(self.words.bytes(token)))

    def prompt(self, tokens: Sequence[int], choices: Sequence[Choice | None]) -> list[Entry]:
        """The entries of a prompt, which the text then follows."""
        for token, choice in zip(tokens, choices, strict=True):
            self.add(token, choice)
        self.offset += len(self.decoder.decode(b"", final=True))
        self.decoder.reset()
        entries, self.pending, self.shown = self.pending, [], self.offset
        return entries

    @property
    def mean_logprob(self) -> float:
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else 0.0


# ---------------------------------------------------------------- log-probabilities


def completion_logprobs(words: Words, entries: Sequence[Entry], count: int) -> dict[str, Any]:
    """The form of /v1/completions. Each token that was drawn is among its alternatives."""
    top: list[dict[str, float] | None] = []
    for entry in entries:
        if entry.choice is None or count == 0:
            top.append(None if entry.choice is None else {})
            continue
        found: dict[str, float] = {}
        for id, logprob in (*entry.choice.top[:count], (entry.token, entry.choice.logprob)):
            found.setdefault(words.text(id), finite(logprob))
        top.append(found)
    return {
        "tokens": [words.text(entry.token) for entry in entries],
        "token_logprobs": [None if entry.choice is None else finite(entry.choice.logprob) for entry in entries],
        "top_logprobs": top,
        "text_offset": [entry.offset for entry in entries],
    }


def chat_logprobs(words: Words, entries: Sequence[Entry], ends: frozenset[int]) -> dict[str, Any]:
    """The form of /v1/chat/completions. The token that ends an answer is not part of it."""

    def one(id: int, logprob: float) -> dict[str, Any]:
        return {"token": words.text(id), "logprob": finite(logprob), "bytes": list(words.bytes(id))}

    content = [
        {**one(entry.token, entry.choice.logprob), "top_logprobs": [one(id, value) for id, value in entry.choice.top]}
        for entry in entries
        if entry.choice is not None and entry.token not in ends
    ]
    return {"content": content, "refusal": None}


# ---------------------------------------------------------------- objects


class Form:
    """How /v1/completions tells a text: whole, or in chunks.

    Args:
        logprobs: how many likelier tokens are told; None tells no log-probability at all.
        echoes: the prompt that each text is to begin with, where it is asked for.
    """

    kind, prefix, chunk = "text_completion", "cmpl", "text_completion"
    ends_apart = False  # whether the reason why a streamed text has ended comes after its last part

    def __init__(self, words: Words, ends: frozenset[int], logprobs: int | None, echoes: Sequence[str] = ()):
        self.words, self.ends, self.logprobs, self.echoes = words, ends, logprobs, echoes

    def heading(self, model: str) -> dict[str, Any]:
        """What every object of one answer begins with."""
        return {
            "id": f"{self.prefix}-{secrets.token_hex(12)}", "object": self.kind, "created": int(time.time()), "model": model,
            "system_fingerprint": None,
        }  # fmt: skip

    def whole(self, index: int, number: int, text: str, entries: Sequence[Entry], reason: str | None) -> dict[str, Any]:
        """The choice `index` of an answer, which is the text `number` of those that were asked for."""
        text = (self.echoes[number] if self.echoes else "") + text
        return {"index": index, "text": text, "logprobs": self._logprobs(entries), "finish_reason": reason}

    def first(self, index: int) -> dict[str, Any] | None:
        """What a stream says of a choice before anything else."""
        return self.part(index, self.echoes[index], []) if self.echoes else None

    def part(self, index: int, text: str, entries: Sequence[Entry], reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(entries), "finish_reason": reason}

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any] | None:
        return None if self.logprobs is None else completion_logprobs(self.words, entries, self.logprobs)


class ChatForm(Form):
    """How /v1/chat/completions does."""

    kind, prefix, chunk = "chat.completion", "chatcmpl", "chat.completion.chunk"
    ends_apart = True

    def whole(self, index: int, number: int, text: str, entries: Sequence[Entry], reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(entries), "finish_reason": reason}

    def first(self, index: int) -> dict[str, Any] | None:
        return self._part(index, {"role": "assistant", "content": ""}, [], None)

    def part(self, index: int, text: str, entries: Sequence[Entry], reason: str | None = None) -> dict[str, Any]:
        return self._part(index, {"content": text} if text or entries else {}, entries, reason)

    def _part(self, index: int, delta: dict[str, str], entries: Sequence[Entry], reason: str | None) -> dict[str, Any]:
        logprobs = self._logprobs(entries) if entries else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any] | None:
        return None if self.logprobs is None else chat_logprobs(self.words, entries, self.ends)


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }  # fmt: skip
