"""The generation engine: continuous batching of many requests.

    engine = Engine(model, tokenizer)
    for text in engine.stream("Once upon a time", Sampling(temperature=0.7)):
        print(text, end="", flush=True)

Each step runs the new tokens of every request, a prompt or one token, through the model. A finished request gives its slot
to the next one in the queue at once (Yu et al. 2022, section 3.1).
"""

import hashlib
import secrets
from collections import defaultdict, deque
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from nextword.common.errors import NextwordError, UsageError
from nextword.data.tokenizer import Tokenizer, incomplete_character
from nextword.inference.detokenizer import StreamingDetokenizer
from nextword.inference.kv_cache import KeyValueCache, common_prefix_length
from nextword.inference.model_runner import ModelRunner, TokenChunk, build_runner
from nextword.inference.sampling import Sampling, TokenLogprob, sample, top_logprobs
from nextword.model.gpt import GPT

FinishReason = Literal["stop", "length", "error"]
Prompt = str | Sequence[int]
MIN_PREFIX_WAIT = 16  # a request waits for another's prefill if that saves at least this many tokens


class Constraint(Protocol):
    """The state of constrained decoding of one request."""

    def allowed_mask(self) -> Tensor:
        """Which tokens may follow, boolean [V]."""
        ...

    def accept_token(self, token: int) -> None:
        """Advance by a token."""
        ...


@dataclass(frozen=True)
class Event:
    """A token of a request, or the error that ended it.

    Attributes:
        request_id: The request.
        text: Text that can be shown: whole characters, and nothing that may become part of a stop string.
        token: The token id; None with an error, and for a request of 0 tokens.
        finish_reason: "stop" (an end-of-text token or a stop string), "length" (`max_tokens`) or "error"; None while the
            request runs.
        error: Error message, with the finish reason "error".
        is_usage_error: Whether the request is the cause of the error, and not the model.
        token_logprob: Log-probabilities, if `Sampling.logprobs` is set.
        prompt_logprobs: Log-probabilities of the prompt's tokens (None for the first one), with the first event, if
            `Sampling.prompt_logprobs` is set.
    """

    request_id: int
    text: str
    token: int | None
    finish_reason: FinishReason | None = None
    error: str | None = None
    token_logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    is_usage_error: bool = False

    @property
    def finished(self) -> bool:
        """Whether this is the last event of its request."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class Completion:
    """A finished completion.

    Attributes:
        prompt: The prompt.
        text: The generated text, up to a stop string and without it.
        finish_reason: "stop" or "length", see `Event`.
        tokens: The generated token ids, with those of a stop string and without the end-of-text token.
        truncated: Number of tokens cut off the beginning of the prompt, because it was longer than the context.
        sampling: How its tokens were sampled.
    """

    prompt: Prompt
    text: str
    finish_reason: FinishReason
    tokens: list[int]
    truncated: int = 0
    sampling: Sampling = field(default_factory=Sampling)


@dataclass
class _Request:
    request_id: int
    tokens: list[int]  # the prompt, truncated to the context, then the generated tokens
    sampling: Sampling
    generator: torch.Generator
    detokenizer: StreamingDetokenizer
    constraint: Constraint | None
    truncated: int
    read_offset: int  # number of tokens that have been turned into text
    incomplete: bytes  # of the last character, with a byte-level vocabulary
    prefix_offset: int = 0  # the text of the next token depends on those from here to `read_offset`
    slot: int = -1
    window_start: int = 0  # index of the token at the slot's first position
    num_cached_tokens: int = 0
    generated: list[int] = field(default_factory=list[int])
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list[TokenLogprob | None])

    @property
    def uncached_tokens(self) -> list[int]:
        return self.tokens[self.window_start + self.num_cached_tokens :]

    @property
    def cached_tokens(self) -> list[int]:
        return self.tokens[self.window_start : self.window_start + self.num_cached_tokens]


class Engine:
    """Generates text with a model, for many requests at once.

    Each request is sampled with its own random generator, independently of other requests. With a byte-level vocabulary only
    tokens that continue UTF-8 text are drawn (with a constraint, those that it allows). With the compiled runner the
    logits do not either. With PyTorch their last bits do, unless the runner is batch-invariant: a row of a matrix product
    differs with the number of rows. A common prefix of prompts is computed once. When a text outgrows the context, its newer
    half becomes the beginning of a new window (a sliding window).

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        max_batch: Maximum number of running requests; others wait in a queue.
        seed: Seed of requests without one. Default: random.
        eos_ids: Token ids that end a text. Default: the tokenizer's.
        runner: Runs the model. Default: the fastest one, with the weights as they are.
        step_tokens: Maximum number of prompt tokens in a step (at least one chunk is run). Longer prompts are split into
            chunks of this length, so that they do not delay other requests.

    Raises:
        UsageError: An argument is out of range, or the tokenizer has more tokens than the model.
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
        check_tokenizer(model, tokenizer)
        self.model = model
        self.runner = runner or build_runner(model)
        self.tokenizer = tokenizer
        self.eos_ids = tokenizer.eos_ids if eos_ids is None else frozenset(eos_ids)
        self.is_byte_level = tokenizer.kind == "bpe"
        self.seed = secrets.randbits(63) if seed is None else seed
        self.step_tokens = step_tokens
        self.cache = KeyValueCache(model.config)
        self.free_slots = list(range(max_batch))  # the least recently used first
        self.freed_slots: dict[int, list[int]] = {slot: [] for slot in self.free_slots}  # tokens they still hold
        self.waiting: deque[_Request] = deque()
        self.running: list[_Request] = []
        self.num_added = 0

    # ---------------------------------------------------------------- requests

    def add_request(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        sample_index: int | None = None,
        constraint: Constraint | None = None,
    ) -> int:
        """Add a request to the queue.

        A text starts with the tokenizer's beginning-of-text token, if it adds one (Llama's does). An empty prompt is the
        end-of-text token, which separates documents in training. A prompt longer than the context loses its beginning.

        Args:
            prompt: A text, or token ids, which are used as they are.
            sampling: Sampling parameters.
            sample_index: Distinguishes requests with the same seed. Default: 0 with a seed in `sampling`, otherwise the
                number of the request.
            constraint: Constrained decoding.

        Returns:
            The request id that events have.

        Raises:
            UsageError: A token id is out of range.
        """
        tokenizer = self.tokenizer
        ids = [*tokenizer.bos_ids, *tokenizer.encode(prompt)] if isinstance(prompt, str) else list(prompt)
        ids = ids or [self.tokenizer.eos_id]
        if not all(0 <= token < self.tokenizer.vocab_size for token in ids):
            raise UsageError(f"a prompt's token ids must be between 0 and {self.tokenizer.vocab_size - 1}")
        window_ids = ids[-self.model.config.context_length :]
        request_id, sampling = self.num_added, sampling or Sampling()
        if sample_index is None:
            sample_index = request_id if sampling.seed is None else 0
        self.num_added += 1
        request = _Request(
            request_id=request_id,
            tokens=window_ids,
            sampling=sampling,
            generator=_make_generator(self.seed if sampling.seed is None else sampling.seed, sample_index),
            detokenizer=StreamingDetokenizer(sampling.stop),
            constraint=constraint,
            truncated=len(ids) - len(window_ids),
            read_offset=len(window_ids),
            # A constraint begins a text of its own.
            incomplete=self.tokenizer.incomplete_end(window_ids) if constraint is None else b"",
        )
        request.detokenizer.decoder.setstate((request.incomplete, 0))
        self.waiting.append(request)
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request without further events, and free its slot. A finished request is ignored."""
        self.waiting = deque(request for request in self.waiting if request.request_id != request_id)
        for request in [request for request in self.running if request.request_id == request_id]:
            self._release_slot(request)

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request runs or waits."""
        return bool(self.running or self.waiting)

    # ---------------------------------------------------------------- step

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Run the model once and sample a token for every request whose prompt has been processed.

        An error of one request, such as logits that are not finite, ends it with an event; the others continue. After an
        exception of the model (out of memory) no request has changed: the step can be repeated.

        Returns:
            An event for each of those requests, in order of arrival.
        """
        self._admit_requests()
        scheduled = self._schedule_chunks()
        chunk_logits = self.runner.forward(self.cache, [chunk for _, chunk in scheduled])
        events = [
            self._process_chunk(request, chunk, logits)
            for (request, chunk), logits in zip(scheduled, chunk_logits, strict=True)
        ]
        return [event for event in events if event is not None]

    def _admit_requests(self) -> None:
        """Give free slots to waiting requests, in order, each the slot with the longest prefix of its prompt."""
        deferred: list[_Request] = []
        while self.waiting and self.free_slots:
            request = self.waiting.popleft()
            prompt = request.tokens
            prefilling = [other for other in self.running if len(other.uncached_tokens) > 1]
            pending_prefix = max((common_prefix_length(prompt, other.tokens) for other in prefilling), default=0)
            slot_tokens = {**self.freed_slots, **{other.slot: other.cached_tokens for other in self.running}}
            shared_prefix = {slot: common_prefix_length(prompt, cached) for slot, cached in slot_tokens.items()}
            source = max(shared_prefix, key=lambda slot: (shared_prefix[slot], slot in self.freed_slots))
            if pending_prefix >= shared_prefix[source] + MIN_PREFIX_WAIT:
                deferred.append(request)
                continue
            length = 0 if request.sampling.prompt_logprobs is not None else min(shared_prefix[source], len(prompt) - 1)
            if not self.runner.reuses_any_prefix:
                length -= length % self.step_tokens
            slot = source if source in self.freed_slots and length else self.free_slots[0]
            if length and source != slot:
                self.cache.copy_prefix(source, slot, length)
            self.free_slots.remove(slot)
            del self.freed_slots[slot]
            request.slot, request.num_cached_tokens = slot, length
            self.running.append(request)
        self.waiting.extendleft(reversed(deferred))

    def _schedule_chunks(self) -> list[tuple[_Request, TokenChunk]]:
        """The chunks of this step: the new token of each decoding request, and chunks of prompts within `step_tokens`."""
        scheduled: list[tuple[_Request, TokenChunk]] = []
        budget, context_length = self.step_tokens, self.model.config.context_length
        for request in self.running:
            if len(request.tokens) - request.window_start > context_length:  # slide the window
                request.window_start = len(request.tokens) - max(1, context_length // 2)
                request.num_cached_tokens = 0
            tokens = request.uncached_tokens
            if len(tokens) > 1:
                # Split at multiples of `step_tokens`, whatever else is run.
                tokens = tokens[: self.step_tokens - request.num_cached_tokens % self.step_tokens]
                if len(tokens) > budget and budget < self.step_tokens:
                    continue
                budget -= len(tokens)
            all_logits = request.sampling.prompt_logprobs is not None and not request.generated
            scheduled.append((request, TokenChunk(request.slot, request.num_cached_tokens, tokens, all_logits)))
        return scheduled

    def _process_chunk(self, request: _Request, chunk: TokenChunk, logits: Tensor) -> Event | None:
        """Update a request with the logits [1 or len(tokens), V] of its chunk; no event while its prompt is incomplete."""
        if chunk.all_logits:
            next_tokens = request.tokens[request.window_start + chunk.start + 1 :]
            count = request.sampling.prompt_logprobs or 0
            rows = zip(logits, next_tokens, strict=False)
            vocab_size = self.tokenizer.vocab_size
            request.prompt_logprobs += [top_logprobs(row, token, count, vocab_size) for row, token in rows]
        request.num_cached_tokens += len(chunk.tokens)
        return None if request.uncached_tokens else self._sample_next_token(request, logits[-1])

    def _sample_next_token(self, request: _Request, logits: Tensor) -> Event:
        sampling, constraint = request.sampling, request.constraint
        with_prompt = sampling.prompt_logprobs is not None and not request.generated
        prompt_logprobs = [None, *request.prompt_logprobs] if with_prompt else None
        if sampling.max_tokens == 0:
            self._release_slot(request)
            return Event(request.request_id, "", None, "length", prompt_logprobs=prompt_logprobs)
        try:
            allowed_mask = None if constraint is None else constraint.allowed_mask()
            drawn_from = logits[: self.tokenizer.vocab_size]  # padding of the embedding is never sampled
            arguments = drawn_from, sampling, request.tokens, request.generated, request.generator
            token = sample(*arguments, allowed_mask)
            if allowed_mask is None and self.is_byte_level:
                if not self.tokenizer.continues_text(request.incomplete, token):
                    # Draw again among the tokens that continue the text: their distribution is the conditional one.
                    token = sample(*arguments, torch.as_tensor(self.tokenizer.continuations(request.incomplete)))
                token_bytes = self.tokenizer.token_bytes(token) if self.tokenizer.is_broken[token] else b""
                request.incomplete = incomplete_character(request.incomplete + token_bytes)
        except NextwordError as error:
            self._release_slot(request, keep_cache=False)
            is_usage_error = isinstance(error, UsageError)
            return Event(request.request_id, "", None, "error", str(error), is_usage_error=is_usage_error)
        count = sampling.logprobs
        token_logprob = None if count is None else top_logprobs(logits, token, count, self.tokenizer.vocab_size)
        if constraint is not None:
            constraint.accept_token(token)
        is_eos = token in self.eos_ids
        if not is_eos:
            request.tokens.append(token)
            request.generated.append(token)
        is_last = is_eos or len(request.generated) == sampling.max_tokens
        text = request.detokenizer.push(self._pending_bytes(request, is_last), is_last)
        finish_reason = "stop" if is_eos or request.detokenizer.stopped else "length" if is_last else None
        if finish_reason:
            self._release_slot(request)
        return Event(request.request_id, text, token, finish_reason, None, token_logprob, prompt_logprobs)

    def _pending_bytes(self, request: _Request, is_last: bool) -> bytes:
        """The bytes of the tokens that are not yet text; those of a foreign tokenizer only as whole characters."""
        if self.tokenizer.kind != "foreign":
            data = self.tokenizer.decode_bytes(request.tokens[request.read_offset :])
        else:  # the text of a token may depend on earlier ones (SentencePiece drops the space of the first word)
            prefix_text = self.tokenizer.decode(request.tokens[request.prefix_offset : request.read_offset])
            text = self.tokenizer.decode(request.tokens[request.prefix_offset :])
            if text.endswith("\ufffd") and not is_last:
                return b""
            # A character that begins in the prefix is U+FFFD there.
            data = text[common_prefix_length(prefix_text, text) :].rstrip("\ufffd").encode()
            if self.tokenizer.decode(request.tokens[request.read_offset :]):  # special tokens alone are no context
                request.prefix_offset = request.read_offset
        request.read_offset = len(request.tokens)
        return data

    def _release_slot(self, request: _Request, keep_cache: bool = True) -> None:
        """Free a slot. Its cache is kept for prompts with a common prefix, unless it may hold numbers that are not finite."""
        self.running.remove(request)
        if not keep_cache:
            self.cache.clear_slot(request.slot)
        self.freed_slots[request.slot] = request.cached_tokens if keep_cache else []
        self.free_slots.append(request.slot)

    # ---------------------------------------------------------------- whole completions

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | None = None) -> list[Completion]:
        """Complete all prompts.

        Args:
            prompts: The prompts. The sampling of each depends only on the seed and its index.
            sampling: Sampling parameters.

        Returns:
            The completions in the order of the prompts.

        Raises:
            NextwordError: The model's logits are not finite.
            UsageError: The engine has other unfinished requests.
        """
        if isinstance(prompts, str):
            raise UsageError("prompts must be a list of prompts, not one string")
        texts: defaultdict[int, str] = defaultdict(str)
        finished: dict[int, tuple[_Request, FinishReason]] = {}
        for request, event in self._iter_events(prompts, sampling or Sampling()):
            texts[event.request_id] += event.text
            if event.finish_reason:
                finished[event.request_id] = request, event.finish_reason
        return [
            Completion(prompt, texts[request_id], reason, request.generated, request.truncated, request.sampling)
            for prompt, (request_id, (request, reason)) in zip(prompts, sorted(finished.items()), strict=True)
        ]

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None
    ) -> Generator[str, None, Literal["stop", "length"]]:
        """Complete one prompt. Errors as in `generate`.

        Yields:
            Pieces of the text.

        Returns:
            The finish reason, as the value of `yield from`.
        """
        finish_reason: FinishReason | None = None
        for _, event in self._iter_events([prompt], sampling or Sampling()):
            finish_reason = event.finish_reason
            if event.text:
                yield event.text
        return "length" if finish_reason == "length" else "stop"

    def _iter_events(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[_Request, Event]]:
        """Add requests to an idle engine and run them; they are cancelled when the iterator is abandoned."""
        if self.has_unfinished_requests:
            raise UsageError("the engine has unfinished requests: use `add_request` and `step` to add another one")
        has_seed, first_id = sampling.seed is not None, self.num_added
        try:
            for i, prompt in enumerate(prompts):
                self.add_request(prompt, sampling, sample_index=i if has_seed else None)
            requests = {request.request_id: request for request in self.waiting}
            while self.has_unfinished_requests:
                for event in self.step():
                    if event.error:
                        raise NextwordError(event.error)
                    yield requests[event.request_id], event
        finally:
            for request_id in range(first_id, first_id + len(prompts)):
                self.cancel(request_id)


def check_tokenizer(model: GPT, tokenizer: Tokenizer) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        UsageError: The model has fewer embeddings than the tokenizer has tokens.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}: "
            "this is not the tokenizer that the model was trained with"
        )


def _make_generator(seed: int, index: int) -> torch.Generator:
    """A generator for each (seed, index); hashed, so that neighboring numbers are unrelated."""
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
