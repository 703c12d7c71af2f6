"""The texts that one request asks for, from the engine's queue to the client: whole, or as a stream of events (SSE)."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nextword.serving.engine_worker import ClientDisconnected, GenerationRequest, RequestHandle
from nextword.serving.protocol import APIError, BaseCompletionRequest, UTF8JSONResponse, encode_json, error_response
from nextword.serving.responses import ChoiceState, CompletionFormatter, LogprobEntry, make_usage

SEND_TIMEOUT = 60.0  # seconds that a client may take to read what the connection has room for


@contextlib.asynccontextmanager
async def cancel_on_disconnect(receive: Receive, handle: RequestHandle) -> AsyncIterator[None]:
    """End a request's work as soon as its client leaves, and in any case at the end of the block.

    FastAPI does not: a handler that does not stream runs on for nobody.
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
    """The texts of one request.

    Args:
        choices: how many of each prompt's texts are told, the likeliest by the mean of their tokens' log-probabilities.
        prompts: how many prompts there are; each has as many texts as every other.
        more: what is said in every object besides.
    """

    def __init__(
        self, handle: RequestHandle, requests: Sequence[GenerationRequest], formatter: CompletionFormatter, model: str, *, num_prompts: int, num_choices: int,
        extra_fields: dict[str, Any],
    ):  # fmt: skip
        self.handle, self.requests, self.formatter, self.num_choices, self.extra_fields = (
            handle,
            list(requests),
            formatter,
            num_choices,
            extra_fields,
        )
        self.common_fields = formatter.common_fields(model)
        self.choice_states = [ChoiceState(formatter.token_text, formatter.stop_token_ids) for _ in requests]
        self.samples_per_prompt = len(self.requests) // num_prompts
        self.prompt_tokens = sum(len(ask.prompt) for ask in self.requests[:: self.samples_per_prompt])

    @property
    def usage(self) -> dict[str, int]:
        return make_usage(self.prompt_tokens, sum(text.num_tokens for text in self.choice_states))

    async def iter_deltas(self) -> AsyncIterator[tuple[int, str, list[LogprobEntry]]]:
        """What can be shown, as it comes: the number of the text, and what is new of it. Raises as `Ticket` and `Text` do."""
        self.handle.submit(self.requests)
        async for number, event in self.handle:
            text = self.choice_states[number]
            prompt_entries = (
                []
                if event.prompt_logprobs is None
                else text.add_prompt(self.requests[number].prompt, event.prompt_logprobs)
            )
            delta, entries = text.process_event(event)
            yield number, delta, prompt_entries + entries

    async def complete_response(self) -> dict[str, Any]:
        """All of it, in one object."""
        deltas: list[list[str]] = [[] for _ in self.requests]
        entries: list[list[LogprobEntry]] = [[] for _ in self.requests]
        async for number, new, more in self.iter_deltas():
            deltas[number].append(new)
            entries[number] += more
        selected = []
        for first in range(0, len(self.requests), self.samples_per_prompt):
            numbers = range(first, first + self.samples_per_prompt)
            if self.samples_per_prompt > self.num_choices:
                numbers = sorted(numbers, key=lambda number: -self.choice_states[number].mean_logprob)[
                    : self.num_choices
                ]
            selected += numbers
        choices = [
            self.formatter.format_choice(
                index, number, "".join(deltas[number]), entries[number], self.choice_states[number].finish_reason
            )
            for index, number in enumerate(selected)
        ]
        return {**self.common_fields, "choices": choices, "usage": self.usage, **self.extra_fields}

    async def iter_chunks(self, include_usage: bool) -> AsyncGenerator[dict[str, Any]]:
        """The objects of a stream. Where usage is asked for, each has the field, and the last one its value."""
        common_fields = {**self.common_fields, "object": self.formatter.chunk_object_type}
        usage: dict[str, Any] = {"usage": None} if include_usage else {}

        def make_chunk(choice: dict[str, Any]) -> dict[str, Any]:
            return {**common_fields, "choices": [choice], **usage, **self.extra_fields}

        started: set[int] = set()
        async for number, new, entries in self.iter_deltas():
            if number not in started and (first := self.formatter.format_first_chunk(number)):
                yield make_chunk(first)
            started.add(number)
            reason = self.choice_states[number].finish_reason
            if self.formatter.separate_finish_chunk and reason and (new or entries):
                yield make_chunk(self.formatter.format_chunk(number, new, entries))
                new, entries = "", []
            if new or entries or reason:
                yield make_chunk(self.formatter.format_chunk(number, new, entries, reason))
        if include_usage:
            yield {**common_fields, "choices": [], "usage": self.usage, **self.extra_fields}

    async def respond(self, request: BaseCompletionRequest, receive: Receive, headers: dict[str, str]) -> Response:
        """The answer, whole or as a stream. Raises as `parts` does, a stream only when it is sent."""
        if request.stream:
            return EventStreamResponse(self, request.include_usage, headers)
        async with cancel_on_disconnect(receive, self.handle):
            return UTF8JSONResponse(await self.complete_response(), headers=headers)


class EventStreamResponse(Response):
    """Server-sent events. What goes wrong before the first has a status of its own; later it is the last event.

    A client that reads slowly holds up nobody: the engine goes on, and what it writes waits in the ticket's queue.
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
            except APIError as refusal:
                await error_response(refusal)(scope, receive, send)
                return
            except ClientDisconnected:
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await send_body(format_sse(first))
                async for chunk in chunks:
                    await send_body(format_sse(chunk))
                await send_body(b"data: [DONE]\n\n", more=False)
            except APIError as refusal:
                await send_body(format_sse(refusal.body), more=False)
            except (ClientDisconnected, TimeoutError):
                # Nobody reads. An answer that is not ended makes uvicorn close the connection, where it is still there.
                return


def format_sse(value: dict[str, Any]) -> bytes:
    return b"data: " + encode_json(value) + b"\n\n"
