"""Text from a model: many requests at once, each as if it were alone.

    engine = Engine(model, tokenizer)
    for piece in engine.stream("Once upon a time", Sampling(temperature=0.7)):
        print(piece, end="", flush=True)

A step reads what each text has new, a prompt or one token, in one pass where it can. A text that is finished gives
its slot to the next one in the queue at once (continuous batching: Yu et al. 2022, section 3.1).
"""

import hashlib
import secrets
from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from nextword.common.errors import NextwordError, UsageError
from nextword.data.tokenizer import Tokenizer
from nextword.inference.detokenizer import TextStream
from nextword.inference.kv_cache import KeyValueCache
from nextword.inference.model_runner import Piece, Reader, reader_of
from nextword.inference.sampling import Choice, Sampling, draw, likeliest
from nextword.model.gpt import GPT

FinishReason = Literal["stop", "length", "error"]
Prompt = str | Sequence[int]
WORTH = 16  # tokens of a common beginning that are worth waiting for


class Constraint(Protocol):
    """What a text may go on with, token by token: a grammar in progress. Each request has one of its own."""

    def allowed(self) -> Tensor:
        """Boolean [V]: which tokens may follow."""
        ...

    def accept(self, token: int) -> None: ...


@dataclass(frozen=True)
class Event:
    """One token of one request, or the error that ended it.

    Attributes:
        text: what can be shown now: whole characters, and nothing that may turn out to be part of a stop string.
        token: the id that was drawn; None with an error, and where no token was asked for.
        finish_reason: "stop" (a token that ends a text, or a stop string), "length" (`max_tokens`), "error"; None while
            it goes on.
        error: what went wrong and what to do, with the finish reason "error".
        choice: how likely the token was, and which were likelier; where `Sampling.logprobs` asks.
        prompt: the same for each token of the prompt that was read (None for the first), with the first event, where
            `Sampling.prompt_logprobs` asks.
    """

    id: int
    text: str
    token: int | None
    finish_reason: FinishReason | None = None
    error: str | None = None
    choice: Choice | None = None
    prompt: list[Choice | None] | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class Completion:
    """A finished text.

    Attributes:
        text: what follows the prompt, up to a stop string and without it.
        tokens: the ids that were drawn; those of a stop string are among them, the one that ended the text is not.
        truncated: how many tokens of the prompt's beginning were left out, because it was longer than the context.
    """

    prompt: Prompt
    text: str
    finish_reason: FinishReason
    tokens: list[int]
    truncated: int = 0


@dataclass
class _Request:
    id: int
    tokens: list[int]  # the prompt as far as it fits, then what was drawn
    sampling: Sampling
    generator: torch.Generator
    stream: TextStream
    constraint: Constraint | None
    truncated: int
    shown: int  # how many of the tokens have become text; before it, from `context` on, those that the next depends on
    context: int = 0
    slot: int = -1
    begin: int = 0  # which of the tokens stands at the slot's first position
    read: int = 0  # how many positions of the slot are filled
    drawn: list[int] = field(default_factory=list)
    prompt: list[Choice | None] = field(default_factory=list)

    @property
    def unread(self) -> list[int]:
        """The tokens at its end that are not in the cache yet."""
        return self.tokens[self.begin + self.read :]

    @property
    def held(self) -> list[int]:
        """The tokens whose keys and values are in its slot."""
        return self.tokens[self.begin : self.begin + self.read]


class Engine:
    """Continues texts with a model.

    A request's draws come from a generator of its own, so they do not depend on its neighbours. Nor do its logits where
    compiled code reads (see `reading`); with PyTorch's operations their last bits do, since a matrix product's rows differ
    with the number of rows, unless they are read `apart`. What a prompt begins with is not computed again where a slot holds
    it. A text that outgrows the context length goes on with a sliding window: when the window is full, its newer half is
    read anew as the beginning of the next one.

    Args:
        max_batch: how many texts run at once; more wait in a queue.
        seed: what requests without a seed of their own take; None draws one.
        ends: the token ids that end a text; None takes the tokenizer's.
        reader: what reads with this model; None takes the quickest there is, with the weights as they are.
        step_tokens: a longer prompt is read in pieces of so many tokens, and no more of prompts in one step (but for one
            piece), so that it does not hold up the others.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 8,
        seed: int | None = None,
        ends: Collection[int] | None = None,
        reader: Reader | None = None,
        step_tokens: int = 256,
    ):
        if max_batch < 1 or step_tokens < 1:
            raise UsageError(f"max_batch and step_tokens must be at least 1, not {max_batch} and {step_tokens}")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UsageError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}: "
                "this is not the tokenizer that the model was trained with"
            )
        self.model = model
        self.reader = reader or reader_of(model)
        self.tokenizer = tokenizer
        self.ends = tokenizer.ends if ends is None else frozenset(ends)
        self.seed = secrets.randbits(63) if seed is None else seed
        self.step_tokens = step_tokens
        self.cache = KeyValueCache(model.config)
        self.free = list(range(max_batch))  # the one that was left first stands first
        self.left: dict[int, list[int]] = {slot: [] for slot in self.free}  # what free slots still hold
        self.waiting: deque[_Request] = deque()
        self.running: list[_Request] = []
        self.added = 0

    # ---------------------------------------------------------------- one request

    def add(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        index: int | None = None,
        constraint: Constraint | None = None,
    ) -> int:
        """Queue a text to be continued; the id that its events carry.

        Text that the tokenizer itself would begin with a token (Llama's does) begins with it; any other is taken as it
        stands, as training's windows begin anywhere in a document. An empty prompt begins a new document, after the
        end-of-text token that told documents apart in training. Of a prompt longer than the context the end is kept.

        Args:
            prompt: a text, or token ids that are taken as they are.
            index: tells requests of one seed apart; by default 0 with a seed of its own, else the request's number.
            constraint: what the text is held to.

        Raises:
            UsageError: a token id that the tokenizer does not have.
        """
        self.waiting.append(self._request(prompt, sampling or Sampling(), index, constraint))
        return self.waiting[-1].id

    def _request(
        self, prompt: Prompt, sampling: Sampling, index: int | None, constraint: Constraint | None = None
    ) -> _Request:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if isinstance(prompt, str) and self.tokenizer.begin_of_text is not None:
            ids = [self.tokenizer.begin_of_text, *ids]
        ids = ids or [self.tokenizer.end_of_text]
        if not all(0 <= token < self.tokenizer.vocab_size for token in ids):
            raise UsageError(f"a prompt's token ids must be between 0 and {self.tokenizer.vocab_size - 1}")
        window = ids[-self.model.config.context_length :]
        if index is None:
            index = self.added if sampling.seed is None else 0
        generator = _generator(self.seed if sampling.seed is None else sampling.seed, index)
        self.added += 1
        return _Request(
            id=self.added - 1,
            tokens=window,
            sampling=sampling,
            generator=generator,
            stream=TextStream(sampling.stop),
            constraint=constraint,
            truncated=len(ids) - len(window),
            shown=len(window),
        )

    def cancel(self, id: int) -> None:
        """End a request without further events and free its slot. One that has ended already is left alone."""
        self.waiting = deque(request for request in self.waiting if request.id != id)
        for request in [request for request in self.running if request.id == id]:
            self._leave(request)

    @property
    def busy(self) -> bool:
        """Whether any request runs or waits, so that a step has something to do."""
        return bool(self.running or self.waiting)

    # ---------------------------------------------------------------- one step of all

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Admit what waits, read what is new, and draw one token for every request whose prompt is read; an event for
        each, in order of arrival.

        An error of one request (logits that are not finite) ends it with an event and leaves the others running.
        After an exception of the model (out of memory) nothing has been drawn yet: the step can be repeated.
        """
        self._admit()
        chosen = self._pieces()
        rows = self.reader.read(self.cache, [piece for _, piece in chosen])
        events = [self._take(request, piece, logits) for (request, piece), logits in zip(chosen, rows, strict=True)]
        return [event for event in events if event is not None]

    def _admit(self) -> None:
        """Give free slots to those who wait, in order, each the slot that holds the most of its prompt's beginning."""
        later: list[_Request] = []
        while self.waiting and self.free:
            request = self.waiting.popleft()
            prompt = request.tokens
            reading = [other for other in self.running if len(other.unread) > 1]
            soon = max((common(prompt, other.tokens) for other in reading), default=0)
            slots = {**self.left, **{other.slot: other.held for other in self.running}}
            shared = {slot: common(prompt, held) for slot, held in slots.items()}
            source = max(shared, key=lambda slot: (shared[slot], slot in self.left))
            if soon >= shared[source] + WORTH:  # another is about to read the same beginning
                later.append(request)
                continue
            length = 0 if request.sampling.prompt_logprobs is not None else min(shared[source], len(prompt) - 1)
            length = self.reader.whole(length, self.step_tokens)
            slot = source if source in self.left and length else self.free[0]
            if length and source != slot:
                self.cache.copy(source, slot, length)
            self.free.remove(slot)
            del self.left[slot]
            request.slot, request.read = slot, length
            self.running.append(request)
        self.waiting.extendleft(reversed(later))

    def _pieces(self) -> list[tuple[_Request, Piece]]:
        """What is read in this step: the one new token of each text, and of prompts as many pieces as fit."""
        pieces, room = [], self.step_tokens
        for request in self.running:
            if len(request.tokens) - request.begin > self.model.config.context_length:  # a new window: the newer half
                request.begin, request.read = len(request.tokens) - max(1, self.model.config.context_length // 2), 0
            unread = request.unread
            if len(unread) > 1:
                # Cut at the same places whatever else is read.
                unread = unread[: self.step_tokens - request.read % self.step_tokens]
                if len(unread) > room and room < self.step_tokens:
                    continue
                room -= len(unread)
            every = request.sampling.prompt_logprobs is not None and not request.drawn
            pieces.append((request, Piece(request.slot, request.read, unread, every)))
        return pieces

    def _take(self, request: _Request, piece: Piece, logits: Tensor) -> Event | None:
        """Go on with what was read; no event where the prompt goes on. logits [1 or len(tokens), V]"""
        # Ids that only the embedding has (padding) and not the tokenizer are cut off, so that they are never drawn.
        logits = logits[:, : self.tokenizer.vocab_size]
        if piece.every:
            following = request.tokens[request.begin + piece.start + 1 :]
            count = request.sampling.prompt_logprobs or 0
            request.prompt += [likeliest(row, token, count) for row, token in zip(logits, following, strict=False)]
        request.read += len(piece.tokens)
        return self._advance(request, logits[-1]) if not request.unread else None

    def _advance(self, request: _Request, logits: Tensor) -> Event:
        sampling = request.sampling
        prompt = [None, *request.prompt] if sampling.prompt_logprobs is not None and not request.drawn else None
        if sampling.max_tokens == 0:
            self._leave(request)
            return Event(request.id, "", None, "length", prompt=prompt)
        try:
            allowed = None if request.constraint is None else request.constraint.allowed()
            token = draw(logits, sampling, request.tokens, request.drawn, request.generator, allowed)
        except NextwordError as error:
            self._leave(request, whole=False)
            return Event(request.id, "", None, "error", str(error))
        choice = None if sampling.logprobs is None else likeliest(logits, token, sampling.logprobs)
        if request.constraint is not None:
            request.constraint.accept(token)
        ended = token in self.ends
        if not ended:
            request.tokens.append(token)
            request.drawn.append(token)
        last = ended or len(request.drawn) == sampling.max_tokens
        text = request.stream.push(self._new_bytes(request, last), last)
        reason = "stop" if ended or request.stream.stopped else "length" if last else None
        if reason:
            self._leave(request)
        return Event(request.id, text, token, reason, choice=choice, prompt=prompt)

    def _new_bytes(self, request: _Request, last: bool) -> bytes:
        """The bytes of the tokens that are no text yet; of a foreign tokenizer's, only when they are characters."""
        new = request.tokens[request.shown :]
        if self.tokenizer.kind != "foreign":
            data = self.tokenizer.decode_bytes(new)
        else:  # its text of a token may depend on the tokens before (SentencePiece drops the space of a first word)
            before = self.tokenizer.decode(request.tokens[request.context : request.shown])
            text = self.tokenizer.decode(request.tokens[request.context :])
            if text.endswith("\ufffd") and not last:
                return b""
            data = text[len(before) :].encode()
            request.context = request.shown
        request.shown = len(request.tokens)
        return data

    def _leave(self, request: _Request, whole: bool = True) -> None:
        """Free a request's slot, and keep what it holds for a prompt that begins alike; not what may be no numbers."""
        self.running.remove(request)
        if not whole:
            self.cache.release(request.slot)
        self.left[request.slot] = request.held if whole else []
        self.free.append(request.slot)

    # ---------------------------------------------------------------- for those who want the whole

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | None = None) -> list[Completion]:
        """Continue all the prompts; the completions in their order.

        The draws of each are those of (seed, its place in `prompts`), whatever the other prompts are.

        Raises:
            NextwordError: the model's logits are not finite numbers.
            UsageError: requests of somebody else are under way.
        """
        if isinstance(prompts, str):
            raise UsageError("prompts must be a list of prompts, not one string")
        self._refuse_company()
        sampling = sampling or Sampling()
        own = sampling.seed is not None
        requests = [self._request(prompt, sampling, i if own else None) for i, prompt in enumerate(prompts)]
        self.waiting.extend(requests)
        texts = {request.id: "" for request in requests}
        ended: dict[int, FinishReason] = {}
        for event in self._events(list(texts)):
            texts[event.id] += event.text
            if event.finish_reason:
                ended[event.id] = event.finish_reason
        return [
            Completion(prompt, texts[request.id], ended[request.id], request.drawn, request.truncated)
            for prompt, request in zip(prompts, requests, strict=True)
        ]

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None
    ) -> Generator[str, None, Literal["stop", "length"]]:
        """Continue one prompt; the pieces together are its completion's text, and the generator's own value (what
        `yield from` gives) is why it ended. Raises as `generate` does."""
        self._refuse_company()
        reason: FinishReason | None = None
        for event in self._events([self.add(prompt, sampling)]):
            reason = event.finish_reason
            if event.text:
                yield event.text
        return "length" if reason == "length" else "stop"

    def _events(self, ids: list[int]) -> Iterator[Event]:
        try:
            while self.busy:
                for event in self.step():
                    if event.error:
                        raise NextwordError(event.error)
                    yield event
        finally:  # also when the caller stops listening
            for id in ids:
                self.cancel(id)

    def _refuse_company(self) -> None:
        if self.busy:
            raise UsageError("other requests are under way in this engine: add this one with `add` and call `step`")


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)


def _generator(seed: int, index: int) -> torch.Generator:
    """A generator for each (seed, index); hashed, so that neighbouring numbers have nothing in common."""
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
