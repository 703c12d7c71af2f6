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
from nextword.serving.protocol import Refusal

# The loop takes this many turns over a client's leaving: its socket is read, the connection is closed, the request hears of it.
TURNS = 3
PATIENCE = 0.25  # seconds that the thread waits for those turns
MAX_UNREAD = 2**17  # events, of all clients together
logger = logging.getLogger("nextword.serving")
Result = TypeVar("Result")


class Left(Exception):
    """The client has left: nobody waits for the answer."""


@dataclass(frozen=True)
class Ask:
    """One text that is asked for, as `Engine.add` takes it."""

    prompt: list[int]
    sampling: Sampling
    index: int | None = None
    constraint: Constraint | None = None


class Ticket:
    """A request, from when it is let in until it leaves. Iterating gives its texts' events, each with the number of its text,
    until all have ended.

    Attributes:
        places: how many texts it may still write. A text that is written gives its place to another, read or not.
        unfinished: how many of its texts have not been read to their end.

    Raises:
        Left: the client has left.
        Refusal: the server stops, the engine has failed, or the client reads too slowly.
    """

    def __init__(self, worker: "Worker", places: int):
        self.worker, self.places = worker, places
        self.events: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()
        self.unfinished = 0
        self.held = True
        self.error: Exception | None = None
        self.began = time.monotonic()
        self.last: dict[int, float] = {}

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What goes wrong before there is an answer gives the places back; an answer does so itself, at its end."""
        if kind is not None:
            self.leave()

    def begin(self, asks: list[Ask]) -> None:
        """Put the texts into the engine's queue. Raises as iterating does."""
        self.check()
        self.unfinished = len(asks)
        self.worker.add(self, asks)

    def end(self, error: Exception) -> None:
        """Give up: whoever waits for the next event gets the error instead."""
        self.error = self.error or error
        self.events.put_nowait(error)
        self.leave()

    def check(self) -> None:
        """Raise the error that has ended this, if one has."""
        if self.error is not None:
            raise self.error

    def leave(self) -> None:
        """Stop what is unfinished and give its places to others. May be said more than once."""
        if self.held:
            self.held = False
            self.worker.release(self)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while self.unfinished:
            item = await self.events.get()
            if isinstance(item, Exception):
                raise item
            if item[1].finished:
                self.unfinished -= 1
            yield item


class Worker:
    """Runs an engine.

    Args:
        open: makes the engine, in the thread that will run it.
        queue: how many texts may wait beside those that run.
    """

    def __init__(self, open: Callable[[], Engine], queue: int, metrics: Metrics):
        self.open, self.queue, self.metrics = open, queue, metrics
        self.state: Literal["loading", "ready", "draining", "stopped"] = "loading"
        self.error: BaseException | None = None  # why it stopped
        self.tickets: set[Ticket] = set()
        self.text_seconds = 1.0  # how long a text takes, of late
        self.loaded = asyncio.Event()
        self.finished = asyncio.Event()  # all have left, after it was said that the server is to stop
        self.ended = asyncio.Event()
        # ---- the thread's own
        self.engine: Engine | None = None
        self.commands: SimpleQueue[Callable[[Engine], None] | None] = SimpleQueue()
        self.jobs: deque[Callable[[], None]] = deque()
        self.asked: dict[int, tuple[Ticket, int]] = {}  # by the engine's number: whose text it is, and its place there
        self.caught_up = threading.Event()
        self.caught_up.set()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---------------------------------------------------------------- for the event loop

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    @property
    def slots(self) -> int:
        return 0 if self.engine is None else len(self.engine.free) + len(self.engine.running)

    @property
    def running(self) -> int:
        return 0 if self.engine is None else len(self.engine.running)

    @property
    def waiting(self) -> int:
        return 0 if self.engine is None else len(self.engine.waiting)

    @property
    def held(self) -> int:
        """Texts that run or wait."""
        return sum(ticket.places for ticket in self.tickets)

    @property
    def unread(self) -> int:
        """Events that wait for their clients to read them."""
        return sum(ticket.events.qsize() for ticket in self.tickets)

    def enter(self, size: int) -> Ticket:
        """A place for a request of so many texts.

        Raises:
            Refusal: there is none, now or ever.
        """
        if self.state != "ready":
            why = {"loading": "the model is still being loaded", "draining": "the server is about to stop"}
            raise Refusal(503, why.get(self.state, "the server has stopped"), code=self.state, headers=retry_after(1))
        room = self.slots + self.queue
        if size > room:
            raise Refusal(400, f"{size} texts are more than the {room} that this server holds at once: ask for fewer")
        if self.held + size > room:
            seconds = self.text_seconds * (self.held + size - self.queue) / max(1, self.slots)
            message = f"the queue is full ({self.held} texts run or wait): try again later"
            raise Refusal(429, message, code="queue_full", headers=retry_after(seconds))
        ticket = Ticket(self, size)
        self.tickets.add(ticket)
        return ticket

    def add(self, ticket: Ticket, asks: list[Ask]) -> None:
        self.metrics.prompt_tokens.add(sum(len(ask.prompt) for ask in asks))

        def command(engine: Engine) -> None:
            for number, ask in enumerate(asks):
                try:
                    id = engine.add(ask.prompt, ask.sampling, index=ask.index, constraint=ask.constraint)
                except NextwordError as error:
                    self._post([(ticket, number, Event(-1, "", None, "error", str(error)))])
                else:
                    self.asked[id] = (ticket, number)

        self.commands.put(command)

    def release(self, ticket: Ticket) -> None:
        self.tickets.discard(ticket)

        def command(engine: Engine) -> None:
            for id in [id for id, (other, _) in self.asked.items() if other is ticket]:
                engine.cancel(id)
                del self.asked[id]

        self.commands.put(command)
        if self.state == "draining" and not self.tickets:
            self.finished.set()

    async def call(self, function: Callable[[], Result]) -> Result:
        """What a function gives that is run in the engine's thread, between two steps."""
        future: asyncio.Future[Result] = self.loop.create_future()

        def job() -> None:
            try:
                self.loop.call_soon_threadsafe(_settle, future, function(), None)
            except Exception as error:
                self.loop.call_soon_threadsafe(_settle, future, None, error)

        self.commands.put(lambda engine: self.jobs.append(job))
        return await future

    async def drain(self, grace: float) -> None:
        """Let nobody in any more, and wait until all have left; those who have not after `grace` seconds are sent away."""
        if self.state in ("draining", "stopped"):
            return
        self.state = "draining"
        if self.tickets:
            try:
                await asyncio.wait_for(self.finished.wait(), grace)
            except TimeoutError:
                for ticket in list(self.tickets):
                    ticket.end(Refusal(503, "the server has stopped", code="stopped"))

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
            self.engine = self.open()
            self.loop.call_soon_threadsafe(self._opened)
            while self._commands(self.engine):
                if self.jobs:
                    self.jobs.popleft()()
                if self.engine.busy:
                    self._post(self._step(self.engine))
        except BaseException as caught:
            error = caught
        if not self.loop.is_closed():  # a model that takes long to load may come when all is over
            self.loop.call_soon_threadsafe(self._ended, error)

    def _commands(self, engine: Engine) -> bool:
        """Carry out what has come in, and wait for something where there is nothing else to do; False when it is to end."""
        wait = not (engine.busy or self.jobs)
        while True:
            try:
                command = self.commands.get(block=wait)
            except Empty:
                return True
            if command is None:
                return False
            command(engine)
            wait = False

    def _step(self, engine: Engine) -> list[tuple[Ticket, int, Event]]:
        """What a step has brought. An exception in it ends every text that it may have touched, and those alone."""
        try:
            events = engine.step()
        except Exception as error:
            logger.exception("the engine failed at a step")
            said = f"the engine failed while it wrote this text ({type(error).__name__}); the server goes on"
            untouched = {request.id for request in engine.waiting}
            events = [Event(id, "", None, "error", said) for id in self.asked if id not in untouched]
            for event in events:
                engine.cancel(event.id)
        told = [(*self.asked[event.id], event) for event in events if event.id in self.asked]
        for event in events:
            if event.finished:
                self.asked.pop(event.id, None)
        return told

    def _post(self, told: list[tuple[Ticket, int, Event]]) -> None:
        """Hand events over, when the loop has had its turns since the last ones.

        So a loop that is kept busy by a quick model still hears of a client that has left, within two tokens.
        """
        self.caught_up.wait(PATIENCE)
        self.caught_up.clear()
        self.loop.call_soon_threadsafe(self._deliver, told)

    # ---------------------------------------------------------------- from the thread, in the loop

    def _opened(self) -> None:
        if self.state == "loading":
            self.state = "ready"
        self.loaded.set()

    def _ended(self, error: BaseException | None) -> None:
        self.error = error
        self.state = "stopped"
        self.loaded.set()
        for ticket in list(self.tickets):
            ticket.end(Refusal(503, "the server has stopped", code="stopped"))
        self.finished.set()
        self.ended.set()

    def _deliver(self, told: list[tuple[Ticket, int, Event]]) -> None:
        now = time.monotonic()
        for ticket, number, event in told:
            if event.token is not None:
                self.metrics.generated_tokens.add()
                if number in ticket.last:
                    self.metrics.between_tokens.see(now - ticket.last[number])
                else:
                    self.metrics.first_token.see(now - ticket.began)
                ticket.last[number] = now
            if event.finished:
                self.text_seconds += 0.2 * (now - ticket.began - self.text_seconds)
                ticket.places -= 1
            if ticket.held:
                ticket.events.put_nowait((number, event))
        while self.unread > MAX_UNREAD:
            slowest = max(self.tickets, key=lambda ticket: ticket.events.qsize())
            slowest.events = asyncio.Queue()
            slowest.end(
                Refusal(503, "this answer was read too slowly, and others need the memory", code="read_too_slowly")
            )
        self._turn(TURNS)

    def _turn(self, left: int) -> None:
        if left:
            self.loop.call_soon(self._turn, left - 1)
        else:
            self.caught_up.set()


def retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(min(60, max(1, math.ceil(seconds))))}


def _settle(future: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    """Give a future its result, unless nobody waits for it any more."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, (Refusal, NextwordError)):
        future.set_exception(error if isinstance(error, Refusal) else Refusal(400, str(error)))
    else:
        logger.error("a call failed", exc_info=error)
        future.set_exception(Refusal(500, f"the server failed at this request ({type(error).__name__})"))
