"""Engine events to OpenAI's response objects: text, log-probabilities and chunks of a stream."""

import codecs
import secrets
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from nextword.data.tokenizer import Tokenizer
from nextword.inference.engine import Event
from nextword.inference.sampling import TokenLogprob
from nextword.serving.protocol import APIError, finite_logprob


class TokenText:
    """Decodes single tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.special_token_names = {id: name for name, id in tokenizer.special_tokens.items()}
        self.token_bytes = lru_cache(2**16)(tokenizer.token_bytes)

    def decode(self, token_id: int) -> str:
        """Text of one token. Incomplete UTF-8 is shown as bytes, which keeps the tokens distinct."""
        data = self.token_bytes(token_id)
        try:
            return data.decode() if data else self.special_token_names.get(token_id, "")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class LogprobEntry(NamedTuple):
    """A token, its log-probability (None for the first of a prompt), and its offset in the text in characters."""

    token_id: int
    token_logprob: TokenLogprob | None
    text_offset: int


class ChoiceState:
    """State of one generated sequence.

    Log-probabilities are emitted together with their text: those of a token that may become part of a stop string are held
    back with its characters.
    """

    def __init__(self, token_text: TokenText, stop_token_ids: frozenset[int] = frozenset(), offset: int = 0):
        self.token_text, self.stop_token_ids = token_text, stop_token_ids
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.offset = self.emitted_offset = offset  # characters generated, and emitted
        self.pending: list[LogprobEntry] = []
        self.num_tokens = 0
        self.logprobs: list[float] = []
        self.finish_reason: Literal["stop", "length"] | None = None

    def process_event(self, event: Event) -> tuple[str, list[LogprobEntry]]:
        """Process one engine event.

        Returns:
            The new text and the log-probabilities that belong to it.

        Raises:
            APIError: The sequence ended with an error.
        """
        if event.finish_reason == "error":
            raise APIError(500, event.error or "the engine failed")
        if event.token is not None:
            self.num_tokens += 1
            self.append_token(event.token, event.token_logprob)
            if event.token_logprob is not None:
                self.logprobs.append(event.token_logprob.logprob)
        self.emitted_offset += len(event.text)
        self.finish_reason = event.finish_reason
        ended = event.finished and (
            event.token is None or event.token in self.stop_token_ids or event.finish_reason == "length"
        )
        ready = [entry for entry in self.pending if ended or entry.text_offset < self.emitted_offset]
        self.pending = [] if event.finished else self.pending[len(ready) :]
        return event.text, ready

    def append_token(self, token_id: int, token_logprob: TokenLogprob | None) -> None:
        self.pending.append(LogprobEntry(token_id, token_logprob, self.offset))
        self.offset += len(self.decoder.decode(self.token_text.token_bytes(token_id)))

    def add_prompt(self, token_ids: Sequence[int], token_logprobs: Sequence[TokenLogprob | None]) -> list[LogprobEntry]:
        """Log-probabilities of the prompt, for `echo`."""
        for token_id, token_logprob in zip(token_ids, token_logprobs, strict=True):
            self.append_token(token_id, token_logprob)
        self.offset += len(self.decoder.decode(b"", final=True))
        self.decoder.reset()
        entries, self.pending, self.emitted_offset = self.pending, [], self.offset
        return entries

    @property
    def mean_logprob(self) -> float:
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else 0.0


# ---------------------------------------------------------------- log-probabilities


def format_completion_logprobs(
    token_text: TokenText, entries: Sequence[LogprobEntry], num_logprobs: int
) -> dict[str, Any]:
    """Log-probabilities in the format of /v1/completions. The sampled token is always among the alternatives."""
    top: list[dict[str, float] | None] = []
    for entry in entries:
        if entry.token_logprob is None or num_logprobs == 0:
            top.append(None if entry.token_logprob is None else {})
            continue
        alternatives: dict[str, float] = {}
        for id, logprob in (
            *entry.token_logprob.top_logprobs[:num_logprobs],
            (entry.token_id, entry.token_logprob.logprob),
        ):
            alternatives.setdefault(token_text.decode(id), finite_logprob(logprob))
        top.append(alternatives)
    return {
        "tokens": [token_text.decode(entry.token_id) for entry in entries],
        "token_logprobs": [
            None if entry.token_logprob is None else finite_logprob(entry.token_logprob.logprob) for entry in entries
        ],
        "top_logprobs": top,
        "text_offset": [entry.text_offset for entry in entries],
    }


def format_chat_logprobs(
    token_text: TokenText, entries: Sequence[LogprobEntry], stop_token_ids: frozenset[int]
) -> dict[str, Any]:
    """Log-probabilities in the format of /v1/chat/completions, without the token that ends the message."""

    def format_token(id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text.decode(id),
            "logprob": finite_logprob(logprob),
            "bytes": list(token_text.token_bytes(id)),
        }

    content = [
        {
            **format_token(entry.token_id, entry.token_logprob.logprob),
            "top_logprobs": [format_token(id, value) for id, value in entry.token_logprob.top_logprobs],
        }
        for entry in entries
        if entry.token_logprob is not None and entry.token_id not in stop_token_ids
    ]
    return {"content": content, "refusal": None}


# ---------------------------------------------------------------- response objects


class CompletionFormatter:
    """Choices and chunks of /v1/completions.

    Args:
        token_text: Decoder of single tokens.
        stop_token_ids: Token ids that end a sequence.
        num_logprobs: Number of alternatives per token. None omits log-probabilities.
        echoed_prompts: Prompt that each sequence starts with, for `echo`.
    """

    object_type, id_prefix, chunk_object_type = "text_completion", "cmpl", "text_completion"
    separate_finish_chunk = False  # whether finish_reason comes in a chunk of its own

    def __init__(
        self,
        token_text: TokenText,
        stop_token_ids: frozenset[int],
        num_logprobs: int | None,
        echoed_prompts: Sequence[str] = (),
    ):
        self.token_text, self.stop_token_ids = token_text, stop_token_ids
        self.num_logprobs, self.echoed_prompts = num_logprobs, echoed_prompts

    def common_fields(self, model: str) -> dict[str, Any]:
        """Fields of every object of one response."""
        return {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "object": self.object_type,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }

    def format_choice(
        self, index: int, sequence_index: int, text: str, entries: Sequence[LogprobEntry], finish_reason: str | None
    ) -> dict[str, Any]:
        """Choice number `index` of the response, generated as sequence `sequence_index` of the request."""
        text = (self.echoed_prompts[sequence_index] if self.echoed_prompts else "") + text
        return {
            "index": index,
            "text": text,
            "logprobs": self._format_logprobs(entries),
            "finish_reason": finish_reason,
        }

    def format_first_chunk(self, index: int) -> dict[str, Any] | None:
        """First chunk of a choice, if there is one."""
        return self.format_chunk(index, self.echoed_prompts[index], []) if self.echoed_prompts else None

    def format_chunk(
        self, index: int, text: str, entries: Sequence[LogprobEntry], finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._format_logprobs(entries),
            "finish_reason": finish_reason,
        }

    def _format_logprobs(self, entries: Sequence[LogprobEntry]) -> dict[str, Any] | None:
        return (
            None
            if self.num_logprobs is None
            else format_completion_logprobs(self.token_text, entries, self.num_logprobs)
        )


class ChatCompletionFormatter(CompletionFormatter):
    """Choices and chunks of /v1/chat/completions."""

    object_type, id_prefix, chunk_object_type = "chat.completion", "chatcmpl", "chat.completion.chunk"
    separate_finish_chunk = True

    def format_choice(
        self, index: int, sequence_index: int, text: str, entries: Sequence[LogprobEntry], finish_reason: str | None
    ) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._format_logprobs(entries),
            "finish_reason": finish_reason,
        }

    def format_first_chunk(self, index: int) -> dict[str, Any] | None:
        return self._format_delta(index, {"role": "assistant", "content": ""}, [], None)

    def format_chunk(
        self, index: int, text: str, entries: Sequence[LogprobEntry], finish_reason: str | None = None
    ) -> dict[str, Any]:
        return self._format_delta(index, {"content": text} if text or entries else {}, entries, finish_reason)

    def _format_delta(
        self, index: int, delta: dict[str, str], entries: Sequence[LogprobEntry], finish_reason: str | None
    ) -> dict[str, Any]:
        logprobs = self._format_logprobs(entries) if entries else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _format_logprobs(self, entries: Sequence[LogprobEntry]) -> dict[str, Any] | None:
        return (
            None if self.num_logprobs is None else format_chat_logprobs(self.token_text, entries, self.stop_token_ids)
        )


def make_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
