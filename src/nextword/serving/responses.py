"""Responses of generation requests, from engine events: one JSON object, or a stream of server-sent events (SSE)."""

import asyncio
import codecs
import contextlib
import math
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nextword.inference.engine import Event
from nextword.inference.sampling import TokenLogprob
from nextword.serving.engine_worker import GenerationRequest, RequestHandle
from nextword.serving.protocol import APIError, BaseCompletionRequest, ClientDisconnected, UTF8JSONResponse, encode_json
from nextword.serving.service import Service

CHAT_TEMPLATE_HEADER = "X-Nextword-Chat-Template"


class LogprobEntry(NamedTuple):
    """A token, its log-probability (None for the first of a prompt), and its offset in the text in characters."""

    token_id: int
    token_logprob: TokenLogprob | None
    text_offset: int


@dataclass(frozen=True)
class Delta:
    """What an event adds to a sequence.

    Attributes:
        index: Number of the sequence or choice.
        text: New text.
        entries: Its log-probabilities.
        finish_reason: Why the sequence ended; None if it goes on.
        is_first: Whether this is the beginning of the sequence: the echoed prompt, without log-probabilities.
    """

    index: int
    text: str
    entries: list[LogprobEntry]
    finish_reason: str | None = None
    is_first: bool = False


class SequenceState:
    """State of one generated sequence.

    Log-probabilities are emitted together with their text: those of a token that may become part of a stop string are held
    back with its characters.
    """

    def __init__(self, service: Service, request: GenerationRequest):
        self.token_bytes, self.stop_token_ids = service.token_bytes, service.chat_encoder.stop_token_ids
        self.prompt = request.prompt
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        incomplete = b"" if request.constraint else service.model.tokenizer.incomplete_end(request.prompt)
        self.prompt_end = incomplete, 0  # the state of the decoder after the prompt
        self.decoder.setstate(self.prompt_end)
        self.offset = self.emitted_offset = 0  # characters generated, and emitted
        self.pending: list[LogprobEntry] = []
        self.num_tokens, self.total_logprob = 0, 0.0

    def process_event(self, event: Event) -> tuple[str, list[LogprobEntry]]:
        """Process one engine event.

        Returns:
            The new text and the log-probabilities that belong to it, and to the prompt before the first text.

        Raises:
            APIError: The sequence ended with an error.
        """
        if event.finish_reason == "error":
            raise APIError(400 if event.is_usage_error else 500, event.error or "the engine failed")
        entries: list[LogprobEntry] = []
        if event.prompt_logprobs is not None:
            self.decoder.reset()
            for token_id, token_logprob in zip(self.prompt, event.prompt_logprobs, strict=True):
                self._append_token(token_id, token_logprob)
            self.offset += len(self.decoder.decode(b"", final=True))
            self.decoder.setstate(self.prompt_end)
            entries, self.pending, self.emitted_offset = self.pending, [], self.offset
        if event.token is not None:
            self.num_tokens += 1
            self._append_token(event.token, event.token_logprob)
            self.total_logprob += 0.0 if event.token_logprob is None else event.token_logprob.logprob
        self.emitted_offset += len(event.text)
        ended = event.finished and (
            event.token is None or event.token in self.stop_token_ids or event.finish_reason == "length"
        )
        ready = [entry for entry in self.pending if ended or entry.text_offset < self.emitted_offset]
        self.pending = [] if event.finished else self.pending[len(ready) :]
        return event.text, entries + ready

    def _append_token(self, token_id: int, token_logprob: TokenLogprob | None) -> None:
        self.pending.append(LogprobEntry(token_id, token_logprob, self.offset))
        self.offset += len(self.decoder.decode(self.token_bytes(token_id)))

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of the generated tokens."""
        return self.total_logprob / max(1, self.num_tokens)


class CompletionWriter:
    """Generates the sequences of one request and writes its response in the format of /v1/completions.

    Args:
        service: The served model.
        handle: The admitted request.
        requests: Its sequences, grouped by prompt.
        num_logprobs: Number of alternatives per token. None omits log-probabilities.
        num_prompts: Number of prompts; each has the same number of sequences.
        num_choices: Choices returned per prompt: those with the highest mean log-probability per token.
        echoed_prompts: Prompt that each sequence starts with, for `echo`.
    """

    object_type, chunk_object_type, id_prefix = "text_completion", "text_completion", "cmpl"

    def __init__(
        self,
        service: Service,
        handle: RequestHandle,
        requests: list[GenerationRequest],
        num_logprobs: int | None,
        *,
        num_prompts: int = 1,
        num_choices: int,
        echoed_prompts: Sequence[str] = (),
    ):
        self.service, self.handle, self.requests = service, handle, requests
        self.num_logprobs, self.num_choices, self.echoed_prompts = num_logprobs, num_choices, echoed_prompts
        self.samples_per_prompt = len(requests) // num_prompts
        self.sequences = [SequenceState(service, request) for request in requests]
        self.headers: dict[str, str] = {}
        self.extra_fields: dict[str, Any] = {}  # of every object
        self.common_fields: dict[str, Any] = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "object": self.object_type,
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": None,
        }

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of tokens, each prompt counted once."""
        prompt_tokens = sum(len(request.prompt) for request in self.requests[:: self.samples_per_prompt])
        return make_usage(prompt_tokens, sum(sequence.num_tokens for sequence in self.sequences))

    async def iter_deltas(self) -> AsyncGenerator[Delta]:
        """Yield what events add to each sequence. Raises like `RequestHandle` and `SequenceState`."""
        self.handle.submit(self.requests)
        started: set[int] = set()
        async for index, event in self.handle:
            text, entries = self.sequences[index].process_event(event)
            if index not in started:
                started.add(index)
                yield Delta(index, self.echoed_prompts[index] if self.echoed_prompts else "", [], is_first=True)
            yield Delta(index, text, entries, event.finish_reason)

    async def complete_response(self) -> UTF8JSONResponse:
        """The response, once all sequences have finished."""
        texts: list[list[str]] = [[] for _ in self.requests]
        entries: list[list[LogprobEntry]] = [[] for _ in self.requests]
        finish_reasons: list[str | None] = [None] * len(self.requests)
        async for delta in self.iter_deltas():
            texts[delta.index].append(delta.text)
            entries[delta.index] += delta.entries
            finish_reasons[delta.index] = delta.finish_reason
        selected: list[int] = []
        for first in range(0, len(self.requests), self.samples_per_prompt):
            indices = range(first, first + self.samples_per_prompt)
            if self.samples_per_prompt > self.num_choices:
                indices = sorted(indices, key=lambda i: -self.sequences[i].mean_logprob)[: self.num_choices]
            selected += indices

        def build() -> UTF8JSONResponse:
            choices = [
                self.format_choice(Delta(index, "".join(texts[i]), entries[i], finish_reasons[i]))
                for index, i in enumerate(selected)
            ]
            content = {**self.common_fields, "choices": choices, "usage": self.usage, **self.extra_fields}
            return UTF8JSONResponse(content, headers=self.headers)

        # Log-probabilities may be many.
        return build() if self.num_logprobs is None else await asyncio.to_thread(build)

    async def iter_chunks(self, include_usage: bool) -> AsyncGenerator[dict[str, Any]]:
        """Yield the chunks of a stream. With `include_usage` the last one has the usage, the others null."""
        common_fields = {**self.common_fields, "object": self.chunk_object_type}
        usage = {"usage": None} if include_usage else {}
        async for delta in self.iter_deltas():
            for choice in self.iter_chunk_choices(delta):
                yield {**common_fields, "choices": [choice], **usage, **self.extra_fields}
        if include_usage:
            yield {**common_fields, "choices": [], "usage": self.usage, **self.extra_fields}

    async def respond(self, request: BaseCompletionRequest, receive: Receive) -> Response:
        """The response, complete or streamed. Raises like `iter_deltas`; a stream only while it is sent."""
        if request.stream:
            include_usage = request.stream_options is not None and request.stream_options.include_usage
            return EventStreamResponse(self, bool(include_usage))
        async with cancel_on_disconnect(receive, self.handle):
            return await self.complete_response()

    # ---------------------------------------------------------------- format

    def format_choice(self, delta: Delta) -> dict[str, Any]:
        """One choice of the response, with its whole text."""
        return self._choice(delta, {"text": delta.text})

    def iter_chunk_choices(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """Yield the choice in each chunk of a stream."""
        if delta.text or delta.entries or delta.finish_reason or (delta.is_first and self.echoed_prompts):
            yield self.format_choice(delta)

    def format_logprobs(self, entries: Sequence[LogprobEntry]) -> dict[str, Any]:
        """Log-probabilities of tokens. The sampled token is always among the alternatives."""
        decode = self.service.decode_token
        top: list[dict[str, float] | None] = []
        for token_id, token_logprob, _ in entries:
            alternatives: dict[str, float] = {}
            if token_logprob is not None and self.num_logprobs:
                likeliest = token_logprob.top_logprobs[: self.num_logprobs]
                for id, logprob in (*likeliest, (token_id, token_logprob.logprob)):
                    alternatives.setdefault(decode(id), finite_logprob(logprob))
            top.append(None if token_logprob is None else alternatives)
        return {
            "tokens": [decode(entry.token_id) for entry in entries],
            "token_logprobs": [
                entry.token_logprob and finite_logprob(entry.token_logprob.logprob) for entry in entries
            ],
            "top_logprobs": top,
            "text_offset": [entry.text_offset for entry in entries],
        }

    def _choice(self, delta: Delta, content: dict[str, Any], with_logprobs: bool = True) -> dict[str, Any]:
        logprobs = self.format_logprobs(delta.entries) if with_logprobs and self.num_logprobs is not None else None
        return {"index": delta.index, **content, "logprobs": logprobs, "finish_reason": delta.finish_reason}


class ChatCompletionWriter(CompletionWriter):
    """Writes a response in the format of /v1/chat/completions, and which chat template was used."""

    object_type, chunk_object_type, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(
        self,
        service: Service,
        handle: RequestHandle,
        requests: list[GenerationRequest],
        num_logprobs: int | None,
        num_dropped_messages: int = 0,
    ):
        super().__init__(service, handle, requests, num_logprobs, num_choices=len(requests))
        self.headers = {CHAT_TEMPLATE_HEADER: service.chat_encoder.name}
        dropped = {"dropped_messages": num_dropped_messages} if num_dropped_messages else {}
        self.extra_fields = {"nextword": {"chat_template": service.chat_encoder.name, **dropped}}

    def format_choice(self, delta: Delta) -> dict[str, Any]:
        """One choice of the response, with the assistant's message."""
        return self._choice(delta, {"message": {"role": "assistant", "content": delta.text, "refusal": None}})

    def iter_chunk_choices(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """Yield the choice in each chunk: the role first, then text, and the finish reason in a chunk of its own."""
        if delta.is_first:
            yield self._choice(delta, {"delta": {"role": "assistant", "content": ""}}, with_logprobs=False)
        if delta.text or delta.entries:
            text = replace(delta, finish_reason=None)
            yield self._choice(text, {"delta": {"content": delta.text}}, with_logprobs=bool(delta.entries))
        if delta.finish_reason:
            yield self._choice(delta, {"delta": {}}, with_logprobs=False)

    def format_logprobs(self, entries: Sequence[LogprobEntry]) -> dict[str, Any]:
        """Log-probabilities of tokens, without the token that ends the message."""

        def format_token(id: int, logprob: float) -> dict[str, Any]:
            token, data = self.service.decode_token(id), self.service.token_bytes(id)
            return {"token": token, "logprob": finite_logprob(logprob), "bytes": list(data)}

        content = [
            {
                **format_token(token_id, token_logprob.logprob),
                "top_logprobs": [format_token(id, value) for id, value in token_logprob.top_logprobs],
            }
            for token_id, token_logprob, _ in entries
            if token_logprob is not None and token_id not in self.service.chat_encoder.stop_token_ids
        ]
        return {"content": content, "refusal": None}


class EventStreamResponse(Response):
    """Server-sent events. An error before the first event has its own status code; a later one is the last event.

    A slow client does not block the engine: events wait in the queue of the request.
    """

    media_type = "text/event-stream"

    def __init__(self, writer: CompletionWriter, include_usage: bool):
        super().__init__(headers={**writer.headers, "Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.writer, self.include_usage = writer, include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""

        async def send_event(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": more})

        async with (
            cancel_on_disconnect(receive, self.writer.handle),
            contextlib.aclosing(self.writer.iter_chunks(self.include_usage)) as chunks,
        ):
            try:
                first = await anext(chunks)
            except APIError as error:
                await error.response()(scope, receive, send)
                return
            except ClientDisconnected:
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await send_event(encode_json(first))
                async for chunk in chunks:
                    await send_event(encode_json(chunk))
                await send_event(b"[DONE]", more=False)
            except APIError as error:
                await send_event(encode_json(error.body), more=False)
            except ClientDisconnected:
                return


@contextlib.asynccontextmanager
async def cancel_on_disconnect(receive: Receive, handle: RequestHandle) -> AsyncGenerator[None]:
    """Cancel a request when its client disconnects, and release it at the end of the block.

    FastAPI does not cancel a handler that does not stream.
    """

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if handle.num_unfinished:
            handle.worker.metrics.client_disconnects.inc()
        handle.abort(ClientDisconnected())

    task = asyncio.create_task(wait_for_disconnect())
    try:
        yield
    finally:
        task.cancel()
        handle.release()


def make_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Numbers of tokens in the format of all routes."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def finite_logprob(logprob: float) -> float:
    """A log-probability that JSON can represent; -inf becomes -9999, as in OpenAI's API."""
    if math.isnan(logprob):
        raise APIError(500, "the logits are not finite: the weights may be damaged, check them with nextword verify")
    return max(logprob, -9999.0)
