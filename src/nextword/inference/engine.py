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
from nextword.inference.detokenizer import StreamingDetokenizer
from nextword.inference.kv_cache import KeyValueCache
from nextword.inference.model_runner import ModelRunner, TokenChunk, build_runner
from nextword.inference.sampling import Sampling, TokenLogprob, sample, top_logprobs
from nextword.model.gpt import GPT

FinishReason = Literal["stop", "length", "error"]
Prompt = str | Sequence[int]
MIN_PREFIX_WAIT = 16  # tokens of a common beginning that are worth waiting for


class Constraint(Protocol):
    """What a text may go on with, token by token: a grammar in progress. Each request has one of its own."""

    def allowed_mask(self) -> Tensor:
        """Boolean [V]: which tokens may follow."""
        ...

    def accept_token(self, token: int) -> None: ...


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

    request_id: int
    text: str
    token: int | None
    finish_reason: FinishReason | None = None
    error: str | None = None
    token_logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None

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
    request_id: int
    tokens: list[int]  # the prompt as far as it fits, then what was drawn
    sampling: Sampling
    generator: torch.Generator
    detokenizer: StreamingDetokenizer
    constraint: Constraint | None
    truncated: int
    read_offset: (
        int  # how many of the tokens have become text; before it, from `context` on, those that the next depends on
    )
    prefix_offset: int = 0
    slot: int = -1
    window_start: int = 0  # which of the tokens stands at the slot's first position
    num_cached_tokens: int = 0  # how many positions of the slot are filled
    generated: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    @property
    def uncached_tokens(self) -> list[int]:
        """The tokens at its end that are not in the cache yet."""
        return self.tokens[self.window_start + self.num_cached_tokens :]

    @property
    def cached_tokens(self) -> list[int]:
        """The tokens whose keys and values are in its slot."""
        return self.tokens[self.window_start : self.window_start + self.num_cached_tokens]


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
        eos_ids: Collection[int] | None = None,
        runner: ModelRunner | None = None,
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
        self.runner = runner or build_runner(model)
        self.tokenizer = tokenizer
        self.eos_ids = tokenizer.eos_ids if eos_ids is None else frozenset(eos_ids)
        self.seed = secrets.randbits(63) if seed is None else seed
        self.step_tokens = step_tokens
        self.cache = KeyValueCache(model.config)
        self.free_slots = list(range(max_batch))  # the one that was left first stands first
        self.freed_slots: dict[int, list[int]] = {slot: [] for slot in self.free_slots}  # what free slots still hold
        self.waiting: deque[_Request] = deque()
        self.running: list[_Request] = []
        self.num_added = 0

    # ---------------------------------------------------------------- one request

    def add_request(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        sample_index: int | None = None,
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
        self.waiting.append(self._make_request(prompt, sampling or Sampling(), sample_index, constraint))
        return self.waiting[-1].request_id

    def _make_request(
        self, prompt: Prompt, sampling: Sampling, sample_index: int | None, constraint: Constraint | None = None
    ) -> _Request:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if isinstance(prompt, str) and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id, *ids]
        ids = ids or [self.tokenizer.eos_id]
        if not all(0 <= token < self.tokenizer.vocab_size for token in ids):
            raise UsageError(f"a prompt's token ids must be between 0 and {self.tokenizer.vocab_size - 1}")
        window_ids = ids[-self.model.config.context_length :]
        if sample_index is None:
            sample_index = self.num_added if sampling.seed is None else 0
        generator = _make_generator(self.seed if sampling.seed is None else sampling.seed, sample_index)
        self.num_added += 1
        return _Request(
            request_id=self.num_added - 1,
            tokens=window_ids,
            sampling=sampling,
            generator=generator,
            detokenizer=StreamingDetokenizer(sampling.stop),
            constraint=constraint,
            truncated=len(ids) - len(window_ids),
            read_offset=len(window_ids),
        )

    def cancel(self, request_id: int) -> None:
        """End a request without further events and free its slot. One that has ended already is left alone."""
        self.waiting = deque(request for request in self.waiting if request.request_id != request_id)
        for request in [request for request in self.running if request.request_id == request_id]:
            self._release_slot(request)

    @property
    def has_unfinished_requests(self) -> bool:
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
        self._admit_requests()
        scheduled = self._schedule_chunks()
        chunk_logits = self.runner.forward(self.cache, [piece for _, piece in scheduled])
        events = [
            self._process_chunk(request, piece, logits)
            for (request, piece), logits in zip(scheduled, chunk_logits, strict=True)
        ]
        return [event for event in events if event is not None]

    def _admit_requests(self) -> None:
        """Give free slots to those who wait, in order, each the slot that holds the most of its prompt's beginning."""
        deferred: list[_Request] = []
        while self.waiting and self.free_slots:
            request = self.waiting.popleft()
            prompt = request.tokens
            prefilling = [other for other in self.running if len(other.uncached_tokens) > 1]
            pending_prefix = max((common_prefix_length(prompt, other.tokens) for other in prefilling), default=0)
            slot_tokens = {**self.freed_slots, **{other.slot: other.cached_tokens for other in self.running}}
            shared_prefix = {slot: common_prefix_length(prompt, held) for slot, held in slot_tokens.items()}
            source = max(shared_prefix, key=lambda slot: (shared_prefix[slot], slot in self.freed_slots))
            if pending_prefix >= shared_prefix[source] + MIN_PREFIX_WAIT:  # another is about to read the same beginning
                deferred.append(request)
                continue
            length = 0 if request.sampling.prompt_logprobs is not None else min(shared_prefix[source], len(prompt) - 1)
            length = self.runner.reusable_prefix(length, self.step_tokens)
            slot = source if source in self.freed_slots and length else self.free_slots[0]
            if length and source != slot:
                self.cache.copy_prefix(source, slot, length)
            self.free_slots.remove(slot)
            del self.freed_slots[slot]
            request.slot, request.num_cached_tokens = slot, length
            self.running.append(request)
        self.waiting.extendleft(reversed(deferred))

    def _schedule_chunks(self) -> list[tuple[_Request, TokenChunk]]:
        """What is read in this step: the one new token of each text, and of prompts as many pieces as fit."""
        chunks, token_budget = [], self.step_tokens
        for request in self.running:
            if (
                len(request.tokens) - request.window_start > self.model.config.context_length
            ):  # a new window: the newer half
                request.window_start, request.num_cached_tokens = (
                    len(request.tokens) - max(1, self.model.config.context_length // 2),
                    0,
                )
            unread = request.uncached_tokens
            if len(unread) > 1:
                # Cut at the same places whatever else is read.
                unread = unread[: self.step_tokens - request.num_cached_tokens % self.step_tokens]
                if len(unread) > token_budget and token_budget < self.step_tokens:
                    continue
                token_budget -= len(unread)
            all_logits = request.sampling.prompt_logprobs is not None and not request.generated
            chunks.append((request, TokenChunk(request.slot, request.num_cached_tokens, unread, all_logits)))
        return chunks

    def _process_chunk(self, request: _Request, chunk: TokenChunk, logits: Tensor) -> Event | None:
        """Go on with what was read; no event where the prompt goes on. logits [1 or len(tokens), V]"""
        # Ids that only the embedding has (padding) and not the tokenizer are cut off, so that they are never drawn.
        logits = logits[:, : self.tokenizer.vocab_size]
        if chunk.all_logits:
            next_tokens = request.tokens[request.window_start + chunk.start + 1 :]
            count = request.sampling.prompt_logprobs or 0
            request.prompt_logprobs += [
                top_logprobs(row, token, count) for row, token in zip(logits, next_tokens, strict=False)
            ]
        request.num_cached_tokens += len(chunk.tokens)
        return self._sample_next_token(request, logits[-1]) if not request.uncached_tokens else None

    def _sample_next_token(self, request: _Request, logits: Tensor) -> Event:
        sampling = request.sampling
        prompt_logprobs = (
            [None, *request.prompt_logprobs] if sampling.prompt_logprobs is not None and not request.generated else None
        )
        if sampling.max_tokens == 0:
            self._release_slot(request)
            return Event(request.request_id, "", None, "length", prompt_logprobs=prompt_logprobs)
        try:
            allowed_mask = None if request.constraint is None else request.constraint.allowed_mask()
            token = sample(logits, sampling, request.tokens, request.generated, request.generator, allowed_mask)
        except NextwordError as error:
            self._release_slot(request, keep_cache=False)
            return Event(request.request_id, "", None, "error", str(error))
        token_logprob = None if sampling.logprobs is None else top_logprobs(logits, token, sampling.logprobs)
        if request.constraint is not None:
            request.constraint.accept_token(token)
        is_eos = token in self.eos_ids
        if not is_eos:
            request.tokens.append(token)
            request.generated.append(token)
        is_last = is_eos or len(request.generated) == sampling.max_tokens
        text = request.detokenizer.push(self._pending_bytes(request, is_last), is_last)
        finish_reason = "stop" if is_eos or request.detokenizer.stopped else "length" if is_last else None
        if finish_reason:
            self._release_slot(request)
        return Event(
            request.request_id, text, token, finish_reason, token_logprob=token_logprob, prompt_logprobs=prompt_logprobs
        )

    def _pending_bytes(self, request: _Request, is_last: bool) -> bytes:
        """The bytes of the tokens that are no text yet; of a foreign tokenizer's, only when they are characters."""
        new = request.tokens[request.read_offset :]
        if self.tokenizer.kind != "foreign":
            data = self.tokenizer.decode_bytes(new)
        else:  # its text of a token may depend on the tokens before (SentencePiece drops the space of a first word)
            prefix_text = self.tokenizer.decode(request.tokens[request.prefix_offset : request.read_offset])
            text = self.tokenizer.decode(request.tokens[request.prefix_offset :])
            if text.endswith("\ufffd") and not is_last:
                return b""
            data = text[len(prefix_text) :].encode()
            request.prefix_offset = request.read_offset
        request.read_offset = len(request.tokens)
        return data

    def _release_slot(self, request: _Request, keep_cache: bool = True) -> None:
        """Free a request's slot, and keep what it holds for a prompt that begins alike; not what may be no numbers."""
        self.running.remove(request)
        if not keep_cache:
            self.cache.clear_slot(request.slot)
        self.freed_slots[request.slot] = request.cached_tokens if keep_cache else []
        self.free_slots.append(request.slot)

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
        self._require_idle()
        sampling = sampling or Sampling()
        has_seed = sampling.seed is not None
        requests = [self._make_request(prompt, sampling, i if has_seed else None) for i, prompt in enumerate(prompts)]
        self.waiting.extend(requests)
        texts = {request.request_id: "" for request in requests}
        finish_reasons: dict[int, FinishReason] = {}
        for event in self._iter_events(list(texts)):
            texts[event.request_id] += event.text
            if event.finish_reason:
                finish_reasons[event.request_id] = event.finish_reason
        return [
            Completion(
                prompt,
                texts[request.request_id],
                finish_reasons[request.request_id],
                request.generated,
                request.truncated,
            )
            for prompt, request in zip(prompts, requests, strict=True)
        ]

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None
    ) -> Generator[str, None, Literal["stop", "length"]]:
        """Continue one prompt; the pieces together are its completion's text, and the generator's own value (what
        `yield from` gives) is why it ended. Raises as `generate` does."""
        self._require_idle()
        finish_reason: FinishReason | None = None
        for event in self._iter_events([self.add_request(prompt, sampling)]):
            finish_reason = event.finish_reason
            if event.text:
                yield event.text
        return "length" if finish_reason == "length" else "stop"

    def _iter_events(self, request_ids: list[int]) -> Iterator[Event]:
        try:
            while self.has_unfinished_requests:
                for event in self.step():
                    if event.error:
                        raise NextwordError(event.error)
                    yield event
        finally:  # also when the caller stops listening
            for id in request_ids:
                self.cancel(id)

    def _require_idle(self) -> None:
        if self.has_unfinished_requests:
            raise UsageError("other requests are under way in this engine: add this one with `add` and call `step`")


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def _make_generator(seed: int, index: int) -> torch.Generator:
    """A generator for each (seed, index); hashed, so that neighbouring numbers have nothing in common."""
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
