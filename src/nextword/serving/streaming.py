"""Responses of generation requests: one JSON object, or a stream of server-sent events (SSE)."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nextword.serving.engine_worker import ClientDisconnected, GenerationRequest, RequestHandle
from nextword.serving.protocol import APIError, BaseCompletionRequest, UTF8JSONResponse, encode_json, error_response
from nextword.serving.responses import ChoiceState, CompletionFormatter, LogprobEntry, make_usage

SEND_TIMEOUT = 60.0  # seconds that a client may take to read a full send buffer


@contextlib.asynccontextmanager
async def cancel_on_disconnect(receive: Receive, handle: RequestHandle) -> AsyncIterator[None]:
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


class ResponseWriter:
    """Generates the sequences of one request and writes its response.

    Args:
        handle: The admitted request.
        requests: Its sequences, grouped by prompt.
        formatter: Format of choices and chunks.
        model: Model name in the response.
        num_prompts: Number of prompts; each has the same number of sequences.
        num_choices: Choices returned per prompt: those with the highest mean log-probability per token.
        extra_fields: Additional fields of every object.
    """

    def __init__(
        self,
        handle: RequestHandle,
        requests: Sequence[GenerationRequest],
        formatter: CompletionFormatter,
        model: str,
        *,
        num_prompts: int = 1,
        num_choices: int,
        extra_fields: dict[str, Any] | None = None,
    ):
        self.handle, self.requests, self.formatter = handle, list(requests), formatter
        self.num_choices, self.extra_fields = num_choices, extra_fields or {}
        self.common_fields = formatter.common_fields(model)
        self.choice_states = [ChoiceState(formatter.token_text, formatter.stop_token_ids) for _ in requests]
        self.samples_per_prompt = len(self.requests) // num_prompts
        self.prompt_tokens = sum(len(request.prompt) for request in self.requests[:: self.samples_per_prompt])

    @property
    def usage(self) -> dict[str, int]:
        return make_usage(self.prompt_tokens, sum(state.num_tokens for state in self.choice_states))

    async def iter_deltas(self) -> AsyncIterator[tuple[int, str, list[LogprobEntry]]]:
        """Yield (sequence index, new text, its log-probabilities). Raises like `RequestHandle` and `ChoiceState`."""
        self.handle.submit(self.requests)
        async for index, event in self.handle:
            state = self.choice_states[index]
            prompt_entries: list[LogprobEntry] = []
            if event.prompt_logprobs is not None:
                prompt_entries = state.add_prompt(self.requests[index].prompt, event.prompt_logprobs)
            delta, entries = state.process_event(event)
            yield index, delta, prompt_entries + entries

    async def complete_response(self) -> dict[str, Any]:
        """The response object, once all sequences have finished."""
        deltas: list[list[str]] = [[] for _ in self.requests]
        entries: list[list[LogprobEntry]] = [[] for _ in self.requests]
        async for i, delta, new_entries in self.iter_deltas():
            deltas[i].append(delta)
            entries[i] += new_entries
        selected: list[int] = []
        for first in range(0, len(self.requests), self.samples_per_prompt):
            indices = range(first, first + self.samples_per_prompt)
            if self.samples_per_prompt > self.num_choices:
                indices = sorted(indices, key=lambda i: -self.choice_states[i].mean_logprob)[: self.num_choices]
            selected += indices
        choices = [
            self.formatter.format_choice(index, i, "".join(deltas[i]), entries[i], self.choice_states[i].finish_reason)
            for index, i in enumerate(selected)
        ]
        return {**self.common_fields, "choices": choices, "usage": self.usage, **self.extra_fields}

    async def iter_chunks(self, include_usage: bool) -> AsyncGenerator[dict[str, Any]]:
        """Yield the chunks of a stream. With `include_usage` the last one has the usage, the others null."""
        common_fields = {**self.common_fields, "object": self.formatter.chunk_object_type}
        usage: dict[str, Any] = {"usage": None} if include_usage else {}

        def make_chunk(choice: dict[str, Any]) -> dict[str, Any]:
            return {**common_fields, "choices": [choice], **usage, **self.extra_fields}

        started: set[int] = set()
        async for index, delta, entries in self.iter_deltas():
            if index not in started and (first := self.formatter.format_first_chunk(index)):
                yield make_chunk(first)
            started.add(index)
            finish_reason = self.choice_states[index].finish_reason
            if self.formatter.separate_finish_chunk and finish_reason and (delta or entries):
                yield make_chunk(self.formatter.format_chunk(index, delta, entries))
                delta, entries = "", []
            if delta or entries or finish_reason:
                yield make_chunk(self.formatter.format_chunk(index, delta, entries, finish_reason))
        if include_usage:
            yield {**common_fields, "choices": [], "usage": self.usage, **self.extra_fields}

    async def respond(self, request: BaseCompletionRequest, receive: Receive, headers: dict[str, str]) -> Response:
        """The response, complete or streamed. Raises like `iter_deltas`; a stream only while it is sent."""
        if request.stream:
            return EventStreamResponse(self, request.include_usage, headers)
        async with cancel_on_disconnect(receive, self.handle):
            return UTF8JSONResponse(await self.complete_response(), headers=headers)


class EventStreamResponse(Response):
    """Server-sent events. An error before the first event has its own status code; a later one is the last event.

    A slow client does not block the engine: events wait in the queue of the request.
    """

    media_type = "text/event-stream"

    def __init__(self, writer: ResponseWriter, include_usage: bool, headers: dict[str, str]):
        super().__init__(headers={**headers, "Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.writer, self.include_usage = writer, include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_body(body: bytes, more: bool = True) -> None:
            async with asyncio.timeout(SEND_TIMEOUT):
                await send({"type": "http.response.body", "body": body, "more_body": more})

        async with (
            cancel_on_disconnect(receive, self.writer.handle),
            contextlib.aclosing(self.writer.iter_chunks(self.include_usage)) as chunks,
        ):
            try:
                first = await anext(chunks)
            except APIError as error:
                await error_response(error)(scope, receive, send)
                return
            except ClientDisconnected:
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await send_body(format_sse(first))
                async for chunk in chunks:
                    await send_body(format_sse(chunk))
                await send_body(b"data: [DONE]\n\n", more=False)
            except APIError as error:
                await send_body(format_sse(error.body), more=False)
            except (ClientDisconnected, TimeoutError):
                # uvicorn closes the connection of an unfinished response.
                return


def format_sse(value: dict[str, Any]) -> bytes:
    return b"data: " + encode_json(value) + b"\n\n"
