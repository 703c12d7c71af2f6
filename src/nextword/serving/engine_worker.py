"""The engine in a thread of its own: commands in, events out.

The thread never waits for a client. It hands each step's events to the event loop, which puts them into a queue for each
request; a client that reads slowly finds them there. All of `Worker` but its thread belongs to the event loop.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeVar

from nextword.common.errors import NextwordError
from nextword.inference.engine import Constraint, Engine, Event
from nextword.inference.sampling import Sampling
from nextword.serving.metrics import Metrics
from nextword.serving.protocol import APIError

# The loop takes this many turns over a client's leaving: its socket is read, the connection is closed, the request hears of it.
LOOP_TURNS = 3
LOOP_TURNS_TIMEOUT = 0.25  # seconds that the thread waits for those turns
MAX_UNREAD_EVENTS = 2**17  # events, of all clients together
logger = logging.getLogger("nextword.serving")
Result = TypeVar("Result")


class ClientDisconnected(Exception):
    """The client has left: nobody waits for the answer."""


@dataclass(frozen=True)
class GenerationRequest:
    """One text that is asked for, as `Engine.add` takes it."""

    prompt: list[int]
    sampling: Sampling
    index: int | None = None
    constraint: Constraint | None = None


class RequestHandle:
    """A request, from when it is let in until it leaves. Iterating gives its texts' events, each with the number of its text,
    until all have ended.

    Attributes:
        places: how many texts it may still write. A text that is written gives its place to another, read or not.
        unfinished: how many of its texts have not been read to their end.

    Raises:
        Left: the client has left.
        Refusal: the server stops, the engine has failed, or the client reads too slowly.
    """

    def __init__(self, worker: "EngineWorker", num_sequences: int):
        self.worker, self.num_sequences = worker, num_sequences
        self.events: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()
        self.num_unfinished = 0
        self.is_active = True
        self.error: Exception | None = None
        self.start_time = time.monotonic()
        self.last_token_times: dict[int, float] = {}

    def __enter__(self) -> "RequestHandle":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What goes wrong before there is an answer gives the places back; an answer does so itself, at its end."""
        if kind is not None:
            self.release()

    def submit(self, requests: list[GenerationRequest]) -> None:
        """Put the texts into the engine's queue. Raises as iterating does."""
        self.raise_if_failed()
        self.num_unfinished = len(requests)
        self.worker.submit(self, requests)

    def abort(self, error: Exception) -> None:
        """Give up: whoever waits for the next event gets the error instead."""
        self.error = self.error or error
        self.events.put_nowait(error)
        self.release()

    def raise_if_failed(self) -> None:
        """Raise the error that has ended this, if one has."""
        if self.error is not None:
            raise self.error

    def release(self) -> None:
        """Stop what is unfinished and give its places to others. May be said more than once."""
        if self.is_active:
            self.is_active = False
            self.worker.release(self)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while self.num_unfinished:
            item = await self.events.get()
            if isinstance(item, Exception):
                raise item
            if item[1].finished:
                self.num_unfinished -= 1
            yield item


class EngineWorker:
    """Runs an engine.

    Args:
        open: makes the engine, in the thread that will run it.
        queue: how many texts may wait beside those that run.
    """

    def __init__(self, make_engine: Callable[[], Engine], max_queued: int, metrics: Metrics):
        self.make_engine, self.max_queued, self.metrics = make_engine, max_queued, metrics
        self.state: Literal["loading", "ready", "draining", "stopped"] = "loading"
        self.error: BaseException | None = None  # why it stopped
        self.handles: set[RequestHandle] = set()
        self.avg_sequence_seconds = 1.0  # how long a text takes, of late
        self.loaded = asyncio.Event()
        self.drained = asyncio.Event()  # all have left, after it was said that the server is to stop
        self.stopped = asyncio.Event()
        # ---- the thread's own
        self.engine: Engine | None = None
        self.commands: SimpleQueue[Callable[[Engine], None] | None] = SimpleQueue()
        self.jobs: deque[Callable[[], None]] = deque()
        self.sequence_owners: dict[
            int, tuple[RequestHandle, int]
        ] = {}  # by the engine's number: whose text it is, and its place there
        self.loop_caught_up = threading.Event()
        self.loop_caught_up.set()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---------------------------------------------------------------- for the event loop

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    @property
    def num_slots(self) -> int:
        return 0 if self.engine is None else len(self.engine.free_slots) + len(self.engine.running)

    @property
    def num_running(self) -> int:
        return 0 if self.engine is None else len(self.engine.running)

    @property
    def num_waiting(self) -> int:
        return 0 if self.engine is None else len(self.engine.waiting)

    @property
    def num_active(self) -> int:
        """Texts that run or wait."""
        return sum(ticket.num_sequences for ticket in self.handles)

    @property
    def num_unread_events(self) -> int:
        """Events that wait for their clients to read them."""
        return sum(ticket.events.qsize() for ticket in self.handles)

    def admit(self, num_sequences: int) -> RequestHandle:
        """A place for a request of so many texts.

        Raises:
            Refusal: there is none, now or ever.
        """
        if self.state != "ready":
            reasons = {"loading": "the model is still being loaded", "draining": "the server is about to stop"}
            raise APIError(
                503, reasons.get(self.state, "the server has stopped"), code=self.state, headers=retry_after_header(1)
            )
        capacity = self.num_slots + self.max_queued
        if num_sequences > capacity:
            raise APIError(
                400, f"{num_sequences} texts are more than the {capacity} that this server holds at once: ask for fewer"
            )
        if self.num_active + num_sequences > capacity:
            seconds = (
                self.avg_sequence_seconds * (self.num_active + num_sequences - self.max_queued) / max(1, self.num_slots)
            )
            message = f"the queue is full ({self.num_active} texts run or wait): try again later"
            raise APIError(429, message, code="queue_full", headers=retry_after_header(seconds))
        handle = RequestHandle(self, num_sequences)
        self.handles.add(handle)
        return handle

    def submit(self, handle: RequestHandle, requests: list[GenerationRequest]) -> None:
        self.metrics.prompt_tokens.inc(sum(len(ask.prompt) for ask in requests))

        def command(engine: Engine) -> None:
            for number, ask in enumerate(requests):
                try:
                    id = engine.add_request(ask.prompt, ask.sampling, sample_index=ask.index, constraint=ask.constraint)
                except NextwordError as error:
                    self._post_events([(handle, number, Event(-1, "", None, "error", str(error)))])
                else:
                    self.sequence_owners[id] = (handle, number)

        self.commands.put(command)

    def release(self, handle: RequestHandle) -> None:
        self.handles.discard(handle)

        def command(engine: Engine) -> None:
            for id in [id for id, (other, _) in self.sequence_owners.items() if other is handle]:
                engine.cancel(id)
                del self.sequence_owners[id]

        self.commands.put(command)
        if self.state == "draining" and not self.handles:
            self.drained.set()

    async def run_in_engine_thread(self, function: Callable[[], Result]) -> Result:
        """What a function gives that is run in the engine's thread, between two steps."""
        future: asyncio.Future[Result] = self.loop.create_future()

        def job() -> None:
            try:
                self.loop.call_soon_threadsafe(_resolve_future, future, function(), None)
            except Exception as error:
                self.loop.call_soon_threadsafe(_resolve_future, future, None, error)

        self.commands.put(lambda engine: self.jobs.append(job))
        return await future

    async def drain(self, timeout: float) -> None:
        """Let nobody in any more, and wait until all have left; those who have not after `grace` seconds are sent away."""
        if self.state in ("draining", "stopped"):
            return
        self.state = "draining"
        if self.handles:
            try:
                await asyncio.wait_for(self.drained.wait(), timeout)
            except TimeoutError:
                for ticket in list(self.handles):
                    ticket.abort(APIError(503, "the server has stopped", code="stopped"))

    async def stop(self) -> None:
        """End the thread, after the step that it is at."""
        self.state = "stopped"
        self.commands.put(None)
        await asyncio.to_thread(self.thread.join, 10)

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        """Make the engine and run it. Whatever ends this for good is kept as `error`."""
        error: BaseException | None = None
        try:
            self.engine = self.make_engine()
            self.loop.call_soon_threadsafe(self._on_loaded)
            while self._process_commands(self.engine):
                if self.jobs:
                    self.jobs.popleft()()
                if self.engine.has_unfinished_requests:
                    self._post_events(self._step(self.engine))
        except BaseException as caught:
            error = caught
        if not self.loop.is_closed():  # a model that takes long to load may come when all is over
            self.loop.call_soon_threadsafe(self._on_stopped, error)

    def _process_commands(self, engine: Engine) -> bool:
        """Carry out what has come in, and wait for something where there is nothing else to do; False when it is to end."""
        wait = not (engine.has_unfinished_requests or self.jobs)
        while True:
            try:
                command = self.commands.get(block=wait)
            except Empty:
                return True
            if command is None:
                return False
            command(engine)
            wait = False

    def _step(self, engine: Engine) -> list[tuple[RequestHandle, int, Event]]:
        """What a step has brought. An exception in it ends every text that it may have touched, and those alone."""
        try:
            events = engine.step()
        except Exception as error:
            logger.exception("the engine failed at a step")
            message = f"the engine failed while it wrote this text ({type(error).__name__}); the server goes on"
            untouched = {request.request_id for request in engine.waiting}
            events = [Event(id, "", None, "error", message) for id in self.sequence_owners if id not in untouched]
            for event in events:
                engine.cancel(event.request_id)
        addressed_events = [
            (*self.sequence_owners[event.request_id], event)
            for event in events
            if event.request_id in self.sequence_owners
        ]
        for event in events:
            if event.finished:
                self.sequence_owners.pop(event.request_id, None)
        return addressed_events

    def _post_events(self, events: list[tuple[RequestHandle, int, Event]]) -> None:
        """Hand events over, when the loop has had its turns since the last ones.

        So a loop that is kept busy by a quick model still hears of a client that has left, within two tokens.
        """
        self.loop_caught_up.wait(LOOP_TURNS_TIMEOUT)
        self.loop_caught_up.clear()
        self.loop.call_soon_threadsafe(self._deliver_events, events)

    # ---------------------------------------------------------------- from the thread, in the loop

    def _on_loaded(self) -> None:
        if self.state == "loading":
            self.state = "ready"
        self.loaded.set()

    def _on_stopped(self, error: BaseException | None) -> None:
        self.error = error
        self.state = "stopped"
        self.loaded.set()
        for ticket in list(self.handles):
            ticket.abort(APIError(503, "the server has stopped", code="stopped"))
        self.drained.set()
        self.stopped.set()

    def _deliver_events(self, events: list[tuple[RequestHandle, int, Event]]) -> None:
        now = time.monotonic()
        for ticket, number, event in events:
            if event.token is not None:
                self.metrics.generated_tokens.inc()
                if number in ticket.last_token_times:
                    self.metrics.inter_token_latency.observe(now - ticket.last_token_times[number])
                else:
                    self.metrics.time_to_first_token.observe(now - ticket.start_time)
                ticket.last_token_times[number] = now
            if event.finished:
                self.avg_sequence_seconds += 0.2 * (now - ticket.start_time - self.avg_sequence_seconds)
                ticket.num_sequences -= 1
            if ticket.is_active:
                ticket.events.put_nowait((number, event))
        while self.num_unread_events > MAX_UNREAD_EVENTS:
            slowest = max(self.handles, key=lambda ticket: ticket.events.qsize())
            slowest.events = asyncio.Queue()
            slowest.abort(
                APIError(503, "this answer was read too slowly, and others need the memory", code="read_too_slowly")
            )
        self._count_loop_turn(LOOP_TURNS)

    def _count_loop_turn(self, remaining: int) -> None:
        if remaining:
            self.loop.call_soon(self._count_loop_turn, remaining - 1)
        else:
            self.loop_caught_up.set()


def retry_after_header(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(min(60, max(1, math.ceil(seconds))))}


def _resolve_future(future: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    """Give a future its result, unless nobody waits for it any more."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, (APIError, NextwordError)):
        future.set_exception(error if isinstance(error, APIError) else APIError(400, str(error)))
    else:
        logger.error("a call failed", exc_info=error)
        future.set_exception(APIError(500, f"the server failed at this request ({type(error).__name__})"))
