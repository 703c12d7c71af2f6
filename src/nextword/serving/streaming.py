"""The texts that one request asks for, from the engine's queue to the client: whole, or as a stream of events (SSE)."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nextword.serving.engine_worker import Ask, Left, Ticket
from nextword.serving.protocol import JSON, Generation, Refusal, refused, to_bytes
from nextword.serving.responses import Entry, Form, Text, usage_of

STALL = 60.0  # seconds that a client may take to read what the connection has room for


@contextlib.asynccontextmanager
async def watching(receive: Receive, ticket: Ticket) -> AsyncIterator[None]:
    """End a request's work as soon as its client leaves, and in any case at the end of the block.

    FastAPI does not: a handler that does not stream runs on for nobody.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if ticket.unfinished:
            ticket.worker.metrics.left.add()
        ticket.end(Left())

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        ticket.leave()


class Writing:
    """The texts of one request.

    Args:
        choices: how many of each prompt's texts are told, the likeliest by the mean of their tokens' log-probabilities.
        prompts: how many prompts there are; each has as many texts as every other.
        more: what is said in every object besides.
    """

    def __init__(
        self, ticket: Ticket, asks: Sequence[Ask], form: Form, model: str, *, prompts: int, choices: int,
        more: dict[str, Any],
    ):  # fmt: skip
        self.ticket, self.asks, self.form, self.choices, self.more = ticket, list(asks), form, choices, more
        self.heading = form.heading(model)
        self.texts = [Text(form.words, form.ends) for _ in asks]
        self.each = len(self.asks) // prompts
        self.prompt_tokens = sum(len(ask.prompt) for ask in self.asks[:: self.each])

    @property
    def usage(self) -> dict[str, int]:
        return usage_of(self.prompt_tokens, sum(text.tokens for text in self.texts))

    async def parts(self) -> AsyncIterator[tuple[int, str, list[Entry]]]:
        """What can be shown, as it comes: the number of the text, and what is new of it. Raises as `Ticket` and `Text` do."""
        self.ticket.begin(self.asks)
        async for number, event in self.ticket:
            text = self.texts[number]
            before = [] if event.prompt is None else text.prompt(self.asks[number].prompt, event.prompt)
            new, entries = text.push(event)
            yield number, new, before + entries

    async def whole(self) -> dict[str, Any]:
        """All of it, in one object."""
        said: list[list[str]] = [[] for _ in self.asks]
        entries: list[list[Entry]] = [[] for _ in self.asks]
        async for number, new, more in self.parts():
            said[number].append(new)
            entries[number] += more
        told = []
        for first in range(0, len(self.asks), self.each):
            numbers = range(first, first + self.each)
            if self.each > self.choices:
                numbers = sorted(numbers, key=lambda number: -self.texts[number].mean_logprob)[: self.choices]
            told += numbers
        choices = [
            self.form.whole(index, number, "".join(said[number]), entries[number], self.texts[number].finish_reason)
            for index, number in enumerate(told)
        ]
        return {**self.heading, "choices": choices, "usage": self.usage, **self.more}

    async def chunks(self, with_usage: bool) -> AsyncGenerator[dict[str, Any]]:
        """The objects of a stream. Where usage is asked for, each has the field, and the last one its value."""
        heading = {**self.heading, "object": self.form.chunk}
        usage: dict[str, Any] = {"usage": None} if with_usage else {}

        def one(choice: dict[str, Any]) -> dict[str, Any]:
            return {**heading, "choices": [choice], **usage, **self.more}

        begun: set[int] = set()
        async for number, new, entries in self.parts():
            if number not in begun and (first := self.form.first(number)):
                yield one(first)
            begun.add(number)
            reason = self.texts[number].finish_reason
            if self.form.ends_apart and reason and (new or entries):
                yield one(self.form.part(number, new, entries))
                new, entries = "", []
            if new or entries or reason:
                yield one(self.form.part(number, new, entries, reason))
        if with_usage:
            yield {**heading, "choices": [], "usage": self.usage, **self.more}

    async def respond(self, asked: Generation, receive: Receive, headers: dict[str, str]) -> Response:
        """The answer, whole or as a stream. Raises as `parts` does, a stream only when it is sent."""
        if asked.stream:
            return Stream(self, asked.include_usage, headers)
        async with watching(receive, self.ticket):
            return JSON(await self.whole(), headers=headers)


class Stream(Response):
    """Server-sent events. What goes wrong before the first has a status of its own; later it is the last event.

    A client that reads slowly holds up nobody: the engine goes on, and what it writes waits in the ticket's queue.
    """

    media_type = "text/event-stream"

    def __init__(self, writing: Writing, with_usage: bool, headers: dict[str, str]):
        super().__init__(headers={**headers, "Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.writing, self.with_usage = writing, with_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def put(body: bytes, more: bool = True) -> None:
            async with asyncio.timeout(STALL):
                await send({"type": "http.response.body", "body": body, "more_body": more})

        async with (
            watching(receive, self.writing.ticket),
            contextlib.aclosing(self.writing.chunks(self.with_usage)) as chunks,
        ):
            try:
                first = await anext(chunks)
            except Refusal as refusal:
                await refused(refusal)(scope, receive, send)
                return
            except Left:
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await put(event(first))
                async for chunk in chunks:
                    await put(event(chunk))
                await put(b"data: [DONE]\n\n", more=False)
            except Refusal as refusal:
                await put(event(refusal.body), more=False)
            except (Left, TimeoutError):
                # Nobody reads. An answer that is not ended makes uvicorn close the connection, where it is still there.
                return


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + to_bytes(value) + b"\n\n"
