"""The inference engine in a thread of its own: commands in, events out.

The thread never waits for a client. It posts the events of each step to the event loop, which queues them per request.
Except for the thread's own methods, `EngineWorker` is used in the event loop only.
"""

import asyncio
import concurrent.futures
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics

from nextword.common.errors import NextwordError
from nextword.inference.engine import Constraint, Engine, Event
from nextword.inference.sampling import Sampling
from nextword.serving.protocol import APIError

# Event loop iterations from a client's disconnect to its request: read the socket, close the connection, cancel the request.
LOOP_TURNS = 3
LOOP_TURNS_TIMEOUT = 0.25  # seconds that the engine thread waits for those iterations
MAX_UNREAD_EVENTS = 2**17  # of all clients
# Log-probabilities of one request and of all that are not finished. Each takes some 300 bytes.
MAX_REQUEST_LOGPROBS, MAX_LOGPROBS = 2**18, 2**20
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # seconds
disable_created_metrics()
logger = logging.getLogger("nextword.serving")
Result = TypeVar("Result")


class Metrics:
    """Prometheus counters and latency histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, documentation: str, *label_names: str) -> Counter:
            return Counter(f"nextword_{name}", documentation, label_names, registry=self.registry)

        def histogram(name: str, documentation: str) -> Histogram:
            name = f"nextword_{name}_seconds"
            return Histogram(name, documentation, buckets=LATENCY_BUCKETS, registry=self.registry)

        self.requests = counter("requests", "HTTP responses by route and status code.", "route", "status")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self.generated_tokens = counter("generated_tokens", "Generated tokens.")
        self.client_disconnects = counter("clients_left", "Requests whose client disconnected before the end.")
        self.time_to_first_token = histogram("time_to_first_token", "Time from admission to the first token.")
        self.inter_token_latency = histogram("time_between_tokens", "Time between two tokens of a sequence.")
        self.request_seconds = histogram("request", "Time from the request headers to the end of the response.")


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate: the arguments of `Engine.add_request`."""

    prompt: list[int]
    sampling: Sampling
    sample_index: int | None
    constraint: Constraint | None

    @property
    def num_logprobs(self) -> int:
        """Maximum number of log-probabilities: of each token, and of the most likely ones in its place."""
        sampling = self.sampling
        generated = 0 if sampling.logprobs is None else sampling.max_tokens * (1 + sampling.logprobs)
        return generated + (
            0 if sampling.prompt_logprobs is None else len(self.prompt) * (1 + sampling.prompt_logprobs)
        )


class RequestHandle:
    """An admitted request. Iterating yields (sequence index, event) until all of its sequences have finished.

    Attributes:
        num_sequences: Sequences that still hold a slot or a place in the queue. A finished one gives it up, read or not.
        num_unfinished: Sequences whose events have not been read to the end.

    Raises:
        ClientDisconnected: The client closed the connection.
        APIError: The server stops, the engine failed, or the client reads too slowly.
    """

    def __init__(self, worker: "EngineWorker", num_sequences: int):
        self.worker, self.num_sequences = worker, num_sequences
        self.events: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()
        self.num_unfinished = self.num_logprobs = 0
        self.is_active = True
        self.error: Exception | None = None
        self.start_time = time.monotonic()
        self.last_token_times: dict[int, float] = {}

    def __enter__(self) -> "RequestHandle":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Release the slots on an exception. A response releases them itself when it ends."""
        if kind is not None:
            self.release()

    def submit(self, requests: list[GenerationRequest]) -> None:
        """Queue the sequences. Raises like iteration, and `APIError` for too many log-probabilities."""
        self.raise_if_failed()
        count = sum(request.num_logprobs for request in requests)
        if count > MAX_REQUEST_LOGPROBS:
            limit = f"{MAX_REQUEST_LOGPROBS:,} per request"
            message = f"{count:,} log-probabilities exceed {limit}: reduce max_tokens, or the number of alternatives"
            raise APIError(400, message, param="logprobs")
        if count and count + sum(handle.num_logprobs for handle in self.worker.handles) > MAX_LOGPROBS:
            message = "too many requests with log-probabilities: try again later"
            raise APIError(429, message, code="queue_full", headers={"Retry-After": "1"})
        self.num_logprobs = count
        self.num_unfinished = len(requests)
        self.worker.metrics.prompt_tokens.inc(sum(len(request.prompt) for request in requests))

        def command(engine: Engine) -> None:
            for index, request in enumerate(requests):
                id = engine.add_request(
                    request.prompt, request.sampling, sample_index=request.sample_index, constraint=request.constraint
                )
                self.worker.sequence_owners[id] = (self, index)

        self.worker.commands.put(command)

    def abort(self, error: Exception) -> None:
        """Cancel the request: the iteration raises `error`."""
        self.error = self.error or error
        self.events.put_nowait(error)
        self.release()

    def raise_if_failed(self) -> None:
        """Raise the error that ended this request, if any."""
        if self.error is not None:
            raise self.error

    def release(self) -> None:
        """Cancel unfinished sequences and free their slots. Idempotent."""
        if not self.is_active:
            return
        self.is_active = False
        owners = self.worker.sequence_owners

        def command(engine: Engine) -> None:
            for id in [id for id, (owner, _) in owners.items() if owner is self]:
                engine.cancel(id)
                del owners[id]

        self.worker.commands.put(command)
        self.worker.handles.discard(self)
        if self.worker.state == "draining" and not self.worker.handles:
            self.worker.drained.set()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while self.num_unfinished:
            item = await self.events.get()
            if isinstance(item, Exception):
                raise item
            if item[1].finished:
                self.num_unfinished -= 1
            yield item


class EngineWorker:
    """Runs an engine in a thread of its own.

    Args:
        make_engine: Builds the engine, in that thread.
        max_queued: Maximum number of waiting sequences.
        metrics: Metrics to update.
    """

    def __init__(self, make_engine: Callable[[], Engine], max_queued: int, metrics: Metrics):
        self.make_engine, self.max_queued, self.metrics = make_engine, max_queued, metrics
        self.state: Literal["loading", "ready", "draining", "stopped"] = "loading"
        self.error: BaseException | None = None  # that stopped the engine
        self.handles: set[RequestHandle] = set()
        self.avg_sequence_seconds = 1.0  # exponential moving average
        self.loaded = asyncio.Event()
        self.drained = asyncio.Event()  # no request is left while the server stops
        self.stopped = asyncio.Event()
        # ---- used by the engine thread only
        self.engine: Engine | None = None
        self.commands: SimpleQueue[Callable[[Engine], None] | None] = SimpleQueue()
        self.jobs: deque[Callable[[], None]] = deque()
        # Request and sequence index by the engine's request id.
        self.sequence_owners: dict[int, tuple[RequestHandle, int]] = {}
        self.loop_caught_up = threading.Event()
        self.loop_caught_up.set()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---------------------------------------------------------------- called in the event loop

    def start(self) -> None:
        """Start the thread, from the event loop."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    @property
    def num_running(self) -> int:
        """Running sequences."""
        return 0 if self.engine is None else len(self.engine.running)

    @property
    def num_slots(self) -> int:
        """Maximum number of running sequences."""
        return 0 if self.engine is None else len(self.engine.free_slots) + len(self.engine.running)

    @property
    def num_waiting(self) -> int:
        """Queued sequences."""
        return 0 if self.engine is None else len(self.engine.waiting)

    @property
    def num_active(self) -> int:
        """Admitted sequences that are not finished."""
        return sum(handle.num_sequences for handle in self.handles)

    @property
    def num_unread_events(self) -> int:
        """Events that clients have not read yet."""
        return sum(handle.events.qsize() for handle in self.handles)

    def admit(self, num_sequences: int) -> RequestHandle:
        """Admit a request with `num_sequences` sequences.

        Raises:
            APIError: The queue is full, the server is not ready, or the request exceeds its capacity.
        """
        if self.state != "ready":
            reasons = {"loading": "the model is loading", "draining": "the server is stopping"}
            reason = reasons.get(self.state, "the server has stopped")
            raise APIError(503, reason, code=self.state, headers={"Retry-After": "1"})
        capacity = self.num_slots + self.max_queued
        if num_sequences > capacity:
            raise APIError(400, f"{num_sequences} sequences exceed the capacity of {capacity}: request fewer")
        if self.num_active + num_sequences > capacity:
            num_rounds = (self.num_active + num_sequences - self.max_queued) / max(1, self.num_slots)
            seconds = min(60, max(1, math.ceil(self.avg_sequence_seconds * num_rounds)))
            message = f"the queue is full ({self.num_active} sequences): try again later"
            raise APIError(429, message, code="queue_full", headers={"Retry-After": str(seconds)})
        handle = RequestHandle(self, num_sequences)
        self.handles.add(handle)
        return handle

    async def run_in_engine_thread(self, function: Callable[[], Result]) -> Result:
        """Result of a function that runs in the engine thread, between two steps.

        Raises:
            APIError: The function failed.
        """
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()

        def job() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

        self.commands.put(lambda engine: self.jobs.append(job))
        try:
            return await asyncio.wrap_future(future)
        except APIError:
            raise
        except NextwordError as error:
            raise APIError(400, str(error)) from error
        except Exception as error:
            logger.exception("call in the engine thread failed")
            raise APIError(500, f"internal server error ({type(error).__name__})") from error

    async def drain(self, timeout: float) -> None:
        """Reject new requests and wait for the running ones; abort those that are left after `timeout` seconds."""
        if self.state in ("draining", "stopped"):
            return
        self.state = "draining"
        if self.handles:
            try:
                await asyncio.wait_for(self.drained.wait(), timeout)
            except TimeoutError:
                self._abort_all()

    def _abort_all(self) -> None:
        for handle in list(self.handles):
            handle.abort(APIError(503, "the server has stopped", code="stopped"))

    async def stop(self) -> None:
        """Stop the engine thread after its current step."""
        self.state = "stopped"
        self.commands.put(None)
        await asyncio.to_thread(self.thread.join, 10)

    # ---------------------------------------------------------------- engine thread

    def _run(self) -> None:
        """Build the engine and run it. An exception that ends the loop is stored in `error`."""
        error: BaseException | None = None
        try:
            self.engine = self.make_engine()
            self.loop.call_soon_threadsafe(self._on_loaded)
            while self._process_commands(self.engine):
                if self.jobs:
                    self.jobs.popleft()()
                if self.engine.has_unfinished_requests:
                    self._post_events(self._step(self.engine))
        except BaseException as exception:
            error = exception
        if not self.loop.is_closed():  # loading may outlast the server
            self.loop.call_soon_threadsafe(self._on_stopped, error)

    def _process_commands(self, engine: Engine) -> bool:
        """Run queued commands, waiting for one if the engine is idle. False at shutdown."""
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
        """Run one engine step. An exception ends every sequence that the step may have affected, and no other."""
        try:
            events = engine.step()
        except Exception as error:
            logger.exception("engine step failed")
            message = f"generation failed ({type(error).__name__}); the server keeps running"
            untouched = {request.request_id for request in engine.waiting}
            events = [Event(id, "", None, "error", message) for id in self.sequence_owners if id not in untouched]
            for event in events:
                engine.cancel(event.request_id)
        owners = self.sequence_owners
        addressed_events = [(*owners[event.request_id], event) for event in events if event.request_id in owners]
        for event in events:
            if event.finished:
                owners.pop(event.request_id, None)
        return addressed_events

    def _post_events(self, events: list[tuple[RequestHandle, int, Event]]) -> None:
        """Post events to the event loop, after it has processed the previous ones.

        This way a fast model cannot starve the event loop: a disconnect is noticed within two tokens.
        """
        self.loop_caught_up.wait(LOOP_TURNS_TIMEOUT)
        self.loop_caught_up.clear()
        self.loop.call_soon_threadsafe(self._deliver_events, events)

    # ---------------------------------------------------------------- event loop, called from the engine thread

    def _on_loaded(self) -> None:
        if self.state == "loading":
            self.state = "ready"
        self.loaded.set()

    def _on_stopped(self, error: BaseException | None) -> None:
        self.error = error
        self.state = "stopped"
        self.loaded.set()
        self._abort_all()
        self.drained.set()
        self.stopped.set()

    def _deliver_events(self, events: list[tuple[RequestHandle, int, Event]]) -> None:
        now = time.monotonic()
        for handle, number, event in events:
            if event.token is not None:
                self.metrics.generated_tokens.inc()
                if number in handle.last_token_times:
                    self.metrics.inter_token_latency.observe(now - handle.last_token_times[number])
                else:
                    self.metrics.time_to_first_token.observe(now - handle.start_time)
                handle.last_token_times[number] = now
            if event.finished:
                self.avg_sequence_seconds += 0.2 * (now - handle.start_time - self.avg_sequence_seconds)
                handle.num_sequences -= 1
            if handle.is_active:
                handle.events.put_nowait((number, event))
        while self.num_unread_events > MAX_UNREAD_EVENTS:
            slowest = max(self.handles, key=lambda handle: handle.events.qsize())
            slowest.events = asyncio.Queue()
            message = "the client reads too slowly: the memory for its events is exhausted"
            slowest.abort(APIError(503, message, code="read_too_slowly"))
        self._count_loop_turn(LOOP_TURNS)

    def _count_loop_turn(self, remaining: int) -> None:
        if remaining:
            self.loop.call_soon(self._count_loop_turn, remaining - 1)
        else:
            self.loop_caught_up.set()
