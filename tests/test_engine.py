"""The engine: batched equals single, whole characters, stop strings, the sliding window, finish reasons, reused prefixes,
log-probabilities, penalties and constraints.
"""

import codecs
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from nextword.common.errors import NextwordError, UsageError
from nextword.data.tokenizer import Tokenizer, begins_text, incomplete_character, train_bpe, train_char
from nextword.inference.detokenizer import StreamingDetokenizer
from nextword.inference.engine import Engine, Event
from nextword.inference.kv_cache import KeyValueCache
from nextword.inference.model_runner import ModelRunner, NativeRunner, TokenChunk, TorchRunner
from nextword.inference.sampling import Sampling, sample
from nextword.model.config import PRESETS, build_config
from nextword.model.gpt import GPT

CONTEXT = 16
TEXT = "The house on the hill. Wër, ñu ngi dem ca àll ba. 日本語の文 🙂🙂 is text too, isn't it?\n"
GREEDY = Sampling(temperature=0, max_tokens=40)
BOLD = Sampling(temperature=1.5, max_tokens=40, seed=7)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT] * 3, 300)


def tiny(tokenizer: Tokenizer, preset: str = "modern", **overrides: int) -> GPT:
    """A model with random weights, large enough for a peaked distribution."""
    torch.manual_seed(0)
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32, "context_length": CONTEXT, **overrides}
    vocab_size = sizes.pop("vocab_size", tokenizer.vocab_size)
    model = GPT(build_config(preset, vocab_size=vocab_size, **sizes))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not name.startswith("position"):
                parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    return tiny(tokenizer)


@torch.inference_mode()
def by_hand(model: GPT, tokenizer: Tokenizer, ids: list[int], sampling: Sampling, index: int) -> list[int]:
    """The definition, without a cache: sample from the window, and slide it when it is full."""
    from nextword.inference.engine import _make_generator

    generator = _make_generator(sampling.seed or 0, index)
    start, ids, drawn = max(0, len(ids) - CONTEXT), list(ids), []
    first = start
    while len(drawn) < sampling.max_tokens:
        if len(ids) - start > CONTEXT:
            start = len(ids) - CONTEXT // 2
        logits = model.unembed(model(torch.tensor([ids[start:]]))[0, -1])[: tokenizer.vocab_size]
        token = sample(logits, sampling, ids[first:], drawn, generator)
        if not tokenizer.continues_text(incomplete := incomplete_character(tokenizer.decode_bytes(ids)), token):
            mask = [tokenizer.continues_text(incomplete, id) for id in range(tokenizer.vocab_size)]
            token = sample(logits, sampling, ids[first:], drawn, generator, torch.tensor(mask))
        if token == tokenizer.eos_id:
            break
        ids.append(token)
        drawn.append(token)
    return drawn


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "sampling",
    [GREEDY, BOLD, Sampling(temperature=0.9, top_k=20, top_p=0.95, repetition_penalty=1.2, max_tokens=40, seed=3)],
)
def test_generate_equals_the_definition_for_every_preset(tokenizer: Tokenizer, preset: str, sampling: Sampling) -> None:
    model = tiny(tokenizer, preset)
    prompts = ["The ho", "日本", "a", "The house on the hill, the house on the hill, and so on and on"]
    completions = Engine(model, tokenizer, max_batch=3, seed=0).generate(prompts, sampling)
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = tokenizer.encode(prompt)
        assert completion.prompt == prompt
        assert completion.tokens == by_hand(model, tokenizer, ids, sampling, index if sampling.seed else 0)
        assert completion.text == whole_text(tokenizer.decode_bytes(completion.tokens))
        assert completion.truncated == max(0, len(ids) - CONTEXT)
        assert completion.finish_reason == ("length" if len(completion.tokens) == 40 else "stop")


def whole_text(data: bytes) -> str:
    """The text of some bytes, without an incomplete character at the end."""
    return codecs.getincrementaldecoder("utf-8")(errors="replace").decode(data)


def test_batched_equals_single(model: GPT, tokenizer: Tokenizer) -> None:
    prompts = ["The", "house", "hill is", "ñu ngi", ""]
    together = Engine(model, tokenizer).generate(prompts, BOLD)
    queued = Engine(model, tokenizer, max_batch=1).generate(prompts, BOLD)
    assert [c.tokens for c in together] == [c.tokens for c in queued]
    assert Engine(model, tokenizer).generate(["The"], BOLD)[0] == together[0]
    assert len({tuple(c.tokens) for c in Engine(model, tokenizer).generate(["The"] * 4, BOLD)}) == 4


def test_a_seed_makes_sampling_reproducible(model: GPT, tokenizer: Tokenizer) -> None:
    free = Sampling(temperature=1.5)
    engine = Engine(model, tokenizer, seed=1)
    one, two = engine.generate(["The"], free), engine.generate(["The"], free)
    assert one != two
    assert Engine(model, tokenizer, seed=1).generate(["The"], free) == one
    assert Engine(model, tokenizer).generate(["The"], free) != Engine(model, tokenizer).generate(["The"], free)
    assert engine.generate(["The"], BOLD) == Engine(model, tokenizer, seed=2).generate(["The"], BOLD)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), stops=st.lists(st.sampled_from(["e", " t", "is", "\n", "本", "the"]), max_size=3))
def test_streamed_text_equals_the_completion(seed: int, stops: list[str]) -> None:
    tokenizer = train_bpe([TEXT] * 3, 300)
    model = tiny(tokenizer)
    sampling = Sampling(temperature=2.0, seed=seed, stop=tuple(stops), max_tokens=30)
    whole = Engine(model, tokenizer).generate(["The"], sampling)[0]
    assert "".join(Engine(model, tokenizer).stream("The", sampling)) == whole.text
    free = Engine(model, tokenizer).generate(["The"], Sampling(temperature=2.0, seed=seed, max_tokens=30))[0]
    assert whole.text == cut(free.text, stops)
    assert not any(stop in whole.text for stop in stops)


# ---------------------------------------------------------------- text out of bytes


def cut(text: str, stops: list[str]) -> str:
    """The definition: read letter by letter to the first stop string that is complete, the longest if several."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


letters = st.text(alphabet="abé🙂\n", max_size=30)


@settings(max_examples=500)
@given(
    data=letters.map(str.encode) | st.binary(max_size=30),
    stops=st.lists(st.text(alphabet="abé🙂\n\ufffd", min_size=1, max_size=5), max_size=4),
    sizes=st.lists(st.integers(1, 7), min_size=1),
)
def test_detokenization_does_not_depend_on_chunks(data: bytes, stops: list[str], sizes: list[int]) -> None:
    stream, pieces, at = StreamingDetokenizer(tuple(stops)), [], 0
    whole = whole_text(data)
    full = cut(whole, stops)
    for size in itertools.cycle(sizes):
        pieces.append(stream.push(data[at : at + size]))
        at += size
        assert full.startswith("".join(pieces))  # nothing is ever shown that has to be taken back
        if at >= len(data):
            break
    pieces.append(stream.push(b"", is_final=True))
    assert "".join(pieces) == full
    assert stream.stopped == (full != whole)


def test_the_detokenizer_holds_back_as_little_as_possible() -> None:
    stream = StreamingDetokenizer(("\n\nUser:", "END"))
    assert stream.push(b"one\n") == "one"
    assert stream.push(b"two\n\nUse") == "\ntwo"
    assert stream.push(b"ful EN") == "\n\nUseful "
    assert stream.push("D’é".encode()[:2]) == ""
    assert stream.stopped
    characters = StreamingDetokenizer()
    assert [characters.push(bytes([byte])) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert characters.push(b"\xff\xe4") == "\ufffd"
    assert characters.push(b"", is_final=True) == ""  # the text ends before a character that is incomplete


def test_character_level_models_generate(tokenizer: Tokenizer) -> None:
    characters = train_char([TEXT])
    completion = Engine(tiny(characters), characters).generate(["The h"], GREEDY)[0]
    assert len(completion.text) == len(completion.tokens)


def sentencepiece() -> Tokenizer:
    """A tokenizer as Llama's: spaces are ▁, the first is left out, and unknown characters are spelt in bytes."""
    names = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat", "s", "▁"]
    backend = tokenizers.Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, {"eos_token": "</s>", "bos_token": "<s>"})


@pytest.mark.parametrize("shown", ["▁cat s", "▁the <0xE2> <0x82> <0xAC> ▁cat", "<0xC3> <0xA9> ▁ <0xF0> <0x9F>"])
def test_a_foreign_tokenizer_keeps_spaces_and_characters(monkeypatch: pytest.MonkeyPatch, shown: str) -> None:
    tokenizer = sentencepiece()
    assert tokenizer.kind == "foreign"
    vocabulary = tokenizer.backend.get_vocab()
    prompt, *answer = [vocabulary[token] for token in ["▁the", *shown.split()]]
    feed = iter(answer)
    monkeypatch.setattr("nextword.inference.engine.sample", lambda *_: next(feed))
    pieces = list(Engine(tiny(tokenizer), tokenizer).stream([prompt], Sampling(max_tokens=len(answer))))
    assert "the" + "".join(pieces) == tokenizer.decode([prompt, *answer]).rstrip("\ufffd")


METASPACE = decoders.Metaspace(prepend_scheme="first")
WORD_PIECES = decoders.WordPiece()


@pytest.mark.parametrize("decoder", [None, METASPACE, WORD_PIECES], ids=["bytes", "metaspace", "word pieces"])
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_streamed_text_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch, decoder: Any, data: st.DataObject) -> None:
    tokenizer = sentencepiece()
    if decoder is not None:
        tokenizer.backend.decoder = decoder
    names = ["<s>", "▁the", "▁cat", "s", "▁"]
    if decoder is None:  # whole characters, and bytes that are none (which spoil a run of bytes that they stand in)
        names += ["<0xC3> <0xA9>", "<0xE2> <s> <0x82> <s> <0xAC>", "s <0xFF> s"]
    vocabulary = tokenizer.backend.get_vocab()
    drawn = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=8))
    prompt = [vocabulary[name] for name in data.draw(st.sampled_from([["<s>"], ["▁the"], ["<s>", "s", "<s>"]]))]
    answer = [vocabulary[name] for name in " ".join(drawn).split()]
    feed = iter(answer)
    monkeypatch.setattr("nextword.inference.engine.sample", lambda *_: next(feed))
    pieces = list(Engine(tiny(tokenizer), tokenizer).stream(prompt, Sampling(max_tokens=len(answer))))
    assert tokenizer.decode(prompt) + "".join(pieces) == tokenizer.decode([*prompt, *answer])


# ---------------------------------------------------------------- beginning and end of a text


def run(engine: Engine) -> list[Event]:
    events = []
    while engine.has_unfinished_requests:
        events += engine.step()
    return events


def test_an_empty_prompt_is_the_end_of_text_token(model: GPT, tokenizer: Tokenizer) -> None:
    empty, explicit = Engine(model, tokenizer).generate(["", [tokenizer.eos_id]], GREEDY)
    assert empty.tokens == explicit.tokens


def test_a_prompt_starts_with_the_beginning_of_text_token(model: GPT, tokenizer: Tokenizer) -> None:
    llama = train_bpe([TEXT] * 3, 300)
    llama.bos_id = llama.eos_id
    expected = Engine(model, tokenizer).generate([[tokenizer.eos_id, *tokenizer.encode("The")]], GREEDY)[0]
    assert Engine(model, llama).generate(["The"], GREEDY)[0].tokens == expected.tokens


def test_the_end_of_text_token_ends_a_completion(
    monkeypatch: pytest.MonkeyPatch, model: GPT, tokenizer: Tokenizer
) -> None:
    feed = iter([*tokenizer.encode("a th"), tokenizer.eos_id])
    monkeypatch.setattr("nextword.inference.engine.sample", lambda *_: next(feed))
    engine = Engine(model, tokenizer)
    engine.add_request("The", Sampling(stop=("the",)))
    events = run(engine)
    assert events[-1].finish_reason == "stop"
    assert events[-1].token == tokenizer.eos_id
    assert "".join(event.text for event in events) == "a th"  # held-back text is released at the end


def test_padding_of_the_embedding_is_never_sampled(tokenizer: Tokenizer) -> None:
    model = tiny(tokenizer, "tutorial", vocab_size=tokenizer.vocab_size + 200)
    completion = Engine(model, tokenizer).generate(["The"], Sampling(temperature=100.0, max_tokens=200, seed=0))[0]
    assert max(completion.tokens) < tokenizer.vocab_size


def test_requests_beyond_max_batch_wait_in_order(model: GPT, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, max_batch=2)
    sizes = [5, 1, 4, 2, 3]
    ids = [engine.add_request("The", Sampling(max_tokens=size, temperature=3.0, seed=0)) for size in sizes]
    events, most = [], 0
    while engine.has_unfinished_requests:
        new = engine.step()
        most = max(most, len(new))
        events += new
    assert most == 2
    first = [next(i for i, event in enumerate(events) if event.request_id == id) for id in ids]
    assert first == sorted(first)
    assert all(sum(event.request_id == id for event in events) <= size for id, size in zip(ids, sizes, strict=True))
    assert sum(event.finished for event in events) == len(ids)
    assert sorted(engine.free_slots) == [0, 1]


def test_cancelling_frees_the_slot_without_changing_other_requests(model: GPT, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, max_batch=2)
    running, other, waiting, later = (engine.add_request(p, BOLD) for p in ("The", "house", "hill", "ñu"))
    events = engine.step()
    engine.cancel(running)
    engine.cancel(waiting)
    engine.cancel(running)  # cancelling twice is harmless
    events += run(engine)
    assert {event.request_id for event in events[2:]} == {other, later}
    for id, prompt in ((other, "house"), (later, "ñu")):
        alone = Engine(model, tokenizer).generate([prompt], BOLD)[0]
        assert "".join(event.text for event in events if event.request_id == id) == alone.text


def test_an_abandoned_stream_frees_its_slot(model: GPT, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    stream = engine.stream("The", BOLD)
    next(stream)
    with pytest.raises(UsageError, match="unfinished requests"):
        engine.generate(["The"], BOLD)
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not engine.has_unfinished_requests
    assert engine.generate(["The"], BOLD) == Engine(model, tokenizer).generate(["The"], BOLD)


def test_a_step_can_be_repeated_after_running_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, model: GPT, tokenizer: Tokenizer
) -> None:
    expected = Engine(model, tokenizer).generate(["The", "house on"], BOLD)
    engine = Engine(model, tokenizer)
    ids = [engine.add_request("The", BOLD, sample_index=0), engine.add_request("house on", BOLD, sample_index=1)]
    events, calls, forward = [], itertools.count(1), engine.runner.forward

    def failing(cache: KeyValueCache, chunks: Sequence[TokenChunk]) -> list[torch.Tensor]:
        rows = forward(cache, chunks)
        if next(calls) % 3 == 0:  # after the cache was written to
            raise torch.OutOfMemoryError("no memory")
        return rows

    monkeypatch.setattr(engine.runner, "forward", failing)
    while engine.has_unfinished_requests:
        try:
            events += engine.step()
        except torch.OutOfMemoryError:
            continue
    assert ["".join(e.text for e in events if e.request_id == id) for id in ids] == [c.text for c in expected]


def test_nonfinite_logits_end_one_request_with_an_error(tokenizer: Tokenizer) -> None:
    model = tiny(tokenizer, "tutorial")
    bad = tokenizer.encode("h")[0]
    with torch.no_grad():
        model.token_embedding.weight[bad] = torch.nan
    engine = Engine(model, tokenizer, max_batch=2)
    ids = [engine.add_request(p, Sampling(temperature=0, max_tokens=3)) for p in ("h", "T", "e")]
    events = run(engine)
    assert events[0].request_id == ids[0]
    assert events[0].finish_reason == "error"
    assert "not finite" in (events[0].error or "")
    assert {event.request_id for event in events if event.finish_reason == "length"} <= {*ids[1:]}
    with pytest.raises(NextwordError, match="not finite"):
        engine.generate(["h"])
    assert not engine.has_unfinished_requests


def test_invalid_arguments_are_rejected(model: GPT, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    with pytest.raises(UsageError, match="one string"):
        engine.generate("The")
    with pytest.raises(UsageError, match="token ids must be"):
        engine.generate(["fine", [tokenizer.vocab_size]])
    assert not engine.has_unfinished_requests
    with pytest.raises(UsageError, match="not the tokenizer"):
        Engine(tiny(tokenizer, vocab_size=100), tokenizer)
    with pytest.raises(UsageError, match="max_batch"):
        Engine(model, tokenizer, max_batch=0)


def test_a_context_of_one_token(tokenizer: Tokenizer) -> None:
    completion = Engine(tiny(tokenizer, context_length=1), tokenizer).generate(["The house"], Sampling(max_tokens=5))[0]
    assert len(completion.tokens) <= 5
    assert completion.truncated > 0


# ---------------------------------------------------------------- reused prefixes and chunked prompts

LONG = "The house on the hill, the house on the hill. 日本語の文 🙂🙂 is text too, isn't it? The house on the hill."


def runner_for(kind: str, model: GPT) -> ModelRunner:
    if kind == "native":
        if reason := NativeRunner.unavailable_reason(model):
            pytest.skip(f"no compiled code: {reason}")
        return NativeRunner(model)
    return TorchRunner(model, batch_invariant=kind == "batch-invariant")


class CountingRunner:
    """A runner that counts the tokens it has run."""

    def __init__(self, runner: ModelRunner):
        self.runner, self.tokens, self.reuses_any_prefix = runner, 0, runner.reuses_any_prefix

    def forward(self, cache: KeyValueCache, chunks: Sequence[TokenChunk]) -> list[torch.Tensor]:
        self.tokens += sum(len(chunk.tokens) for chunk in chunks)
        return self.runner.forward(cache, chunks)


def events_of(engine: Engine, prompt: str | list[int], sampling: Sampling) -> list[Event]:
    """The events of one request, without its id."""
    engine.add_request(prompt, sampling)
    return [replace(event, request_id=0) for event in run(engine)]


def assert_equal_events(kind: str, one: list[Event], other: list[Event]) -> None:
    """Token for token the same; where a runner promises it, log-probabilities bit for bit too."""
    if kind in ("native", "batch-invariant"):
        assert one == other
        return
    assert [(e.token, e.text, e.finish_reason) for e in one] == [(e.token, e.text, e.finish_reason) for e in other]
    for a, b in zip(one, other, strict=True):
        assert (a.token_logprob is None) == (b.token_logprob is None)
        if a.token_logprob and b.token_logprob:
            assert a.token_logprob.logprob == pytest.approx(b.token_logprob.logprob, abs=1e-4)


@pytest.mark.parametrize("kind", ["native", "torch", "batch-invariant"])
def test_a_cached_prefix_is_reused_without_changing_results(tokenizer: Tokenizer, kind: str) -> None:
    model = tiny(tokenizer, context_length=128)
    every = Sampling(temperature=1.0, seed=3, max_tokens=12, logprobs=tokenizer.vocab_size)
    ids = tokenizer.encode(LONG)
    prompts = [ids, ids, ids[:50], [*ids[:40], *tokenizer.encode("x y")], ids[5:], ids[:1]]
    runner = CountingRunner(runner_for(kind, model))
    engine = Engine(model, tokenizer, max_batch=2, runner=runner, step_tokens=16)
    for number, prompt in enumerate(prompts):
        fresh = Engine(model, tokenizer, runner=runner_for(kind, model), step_tokens=16)
        before = runner.tokens
        found = events_of(engine, prompt, every)
        assert_equal_events(kind, found, events_of(fresh, prompt, every))
        read = runner.tokens - before - len(found) + 1
        if number in (1, 2, 3):  # it begins as one before it does
            assert read <= (len(prompt) - 16 if kind == "batch-invariant" else max(1, len(prompt) - 40))
    assert len(engine.free_slots) == 2


@pytest.mark.parametrize("kind", ["native", "torch", "batch-invariant"])
def test_a_chunked_prompt_equals_a_whole_prompt(tokenizer: Tokenizer, kind: str) -> None:
    model = tiny(tokenizer, context_length=128)
    every = Sampling(temperature=0, max_tokens=6, logprobs=tokenizer.vocab_size, prompt_logprobs=3)
    whole = events_of(Engine(model, tokenizer, runner=runner_for(kind, model), step_tokens=1000), LONG, every)
    for step_tokens in (1, 7, 16):
        engine = Engine(model, tokenizer, runner=runner_for(kind, model), step_tokens=step_tokens)
        # Cut elsewhere, PyTorch's operations round differently, also where each piece is read apart.
        found = events_of(engine, LONG, every)
        assert_equal_events("native" if kind == "native" else "torch", found, whole)
        likely = [
            [0.0 if c is None else c.logprob for c in events[0].prompt_logprobs or []] for events in (found, whole)
        ]
        assert likely[0] == pytest.approx(likely[1], abs=1e-4)


def test_a_long_prompt_does_not_delay_decoding(tokenizer: Tokenizer) -> None:
    model = tiny(tokenizer, context_length=128)
    engine = Engine(model, tokenizer, step_tokens=8)
    writing = engine.add_request("The", Sampling(max_tokens=30, logit_bias={tokenizer.eos_id: -100}))
    engine.step()
    engine.add_request(LONG, Sampling(max_tokens=1))
    steps = 0
    while engine.step()[0].request_id == writing and len(engine.running) == 2:
        steps += 1
    assert steps >= len(tokenizer.encode(LONG)) // 8


@pytest.mark.parametrize("kind", ["native", "torch", "batch-invariant"])
def test_requests_with_a_common_prefix_wait_for_its_prefill(tokenizer: Tokenizer, kind: str) -> None:
    model = tiny(tokenizer, context_length=128)
    ids = tokenizer.encode(LONG)[:48]
    prompts = [[*ids, *tokenizer.encode(end)] for end in ("a", "bc", "def")]
    sampling = Sampling(temperature=1.0, max_tokens=6, seed=2, logprobs=5)
    runner = CountingRunner(runner_for(kind, model))
    engine = Engine(model, tokenizer, runner=runner, step_tokens=8)
    numbers = [engine.add_request(prompt, sampling) for prompt in prompts]
    other = engine.add_request("x", sampling)  # one that begins otherwise does not wait
    first = engine.step()
    assert [request.request_id for request in engine.waiting] == numbers[1:]
    assert [event.request_id for event in first] == [other]
    events = first + run(engine)
    for number, prompt in zip(numbers, prompts, strict=True):
        alone = events_of(Engine(model, tokenizer, runner=runner_for(kind, model), step_tokens=8), prompt, sampling)
        assert_equal_events(
            kind, [replace(event, request_id=0) for event in events if event.request_id == number], alone
        )
    drawn = sum(event.token is not None for event in events) - 4
    assert runner.tokens - drawn < len(prompts[0]) + 3 * (16 + 8)  # and not three times the whole


# ---------------------------------------------------------------- log-probabilities, penalties, constraints


@torch.inference_mode()
def table(model: GPT, tokenizer: Tokenizer, ids: list[int], logits: bool = False) -> torch.Tensor:
    """log P of each next token [T, V], or the logits."""
    found = model.unembed(model(torch.tensor([ids])))[0].double()
    return (found if logits else found.log_softmax(-1))[:, : tokenizer.vocab_size]


@pytest.mark.parametrize("padding", [0, 1, 100])
def test_logprobs_equal_the_model_distribution(tokenizer: Tokenizer, padding: int) -> None:
    """Whatever penalties, biases and filters did before the token was drawn, and with a padded embedding."""
    model = tiny(tokenizer, context_length=64, vocab_size=tokenizer.vocab_size + padding)
    ids = tokenizer.encode("The house")
    bias = {tokenizer.eos_id: -100.0, 50: 3.0}
    sampling = Sampling(
        temperature=0.7, top_k=20, top_p=0.9, seed=1, max_tokens=8, logprobs=4, prompt_logprobs=2, logit_bias=bias
    )
    events = events_of(Engine(model, tokenizer), ids, sampling)
    drawn = [event.token for event in events]
    expected = table(model, tokenizer, [*ids, *(token or 0 for token in drawn)])
    for i, event in enumerate(events):
        row = expected[len(ids) - 1 + i]
        assert (
            event.token_logprob is not None
            and event.token_logprob.token == event.token
            and len(event.token_logprob.top_logprobs) == 4
        )
        assert event.token_logprob.logprob == pytest.approx(float(row[event.token_logprob.token]), abs=1e-4)
        assert [p for _, p in event.token_logprob.top_logprobs] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
        assert (event.prompt_logprobs is None) == (i > 0)
    prompt = events[0].prompt_logprobs
    assert prompt is not None and prompt[0] is None and len(prompt) == len(ids)
    for i, choice in enumerate(prompt[1:]):
        assert choice is not None and choice.token == ids[i + 1] and len(choice.top_logprobs) == 2
        assert choice.logprob == pytest.approx(float(expected[i, choice.token]), abs=1e-4)
    assert all(event.token_logprob is None for event in events_of(Engine(model, tokenizer), ids, GREEDY))


def test_zero_max_tokens_returns_prompt_logprobs(tokenizer: Tokenizer) -> None:
    model = tiny(tokenizer, context_length=64)
    engine = Engine(model, tokenizer)
    ids = tokenizer.encode("The house")
    [event] = events_of(engine, ids, Sampling(max_tokens=0, prompt_logprobs=0))
    assert (event.token, event.text, event.finish_reason) == (None, "", "length")
    assert (
        event.prompt_logprobs is not None
        and len(event.prompt_logprobs) == len(ids)
        and not engine.has_unfinished_requests
    )
    expected = table(model, tokenizer, ids)
    assert [c.logprob for c in event.prompt_logprobs if c] == pytest.approx(
        [float(expected[i, token]) for i, token in enumerate(ids[1:])], abs=1e-4
    )
    assert events_of(engine, "x", Sampling(max_tokens=0))[0].prompt_logprobs is None
    # With prompt_logprobs the whole prompt is computed, even if a prefix is cached.
    assert events_of(engine, ids, Sampling(max_tokens=0, prompt_logprobs=0))[0].prompt_logprobs == event.prompt_logprobs


@settings(deadline=None, max_examples=25)
@given(
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    repetition=st.floats(0.5, 3),
    bias=st.dictionaries(st.integers(1, 299), st.floats(-100, 100), max_size=3),
)
def test_penalties_and_biases_equal_their_definition(
    presence: float, frequency: float, repetition: float, bias: dict[int, float]
) -> None:
    tokenizer = train_bpe([TEXT] * 3, 300)
    model, ids = tiny(tokenizer, context_length=64), tokenizer.encode("The hill is")
    bias = {id: value for id, value in bias.items() if id < tokenizer.vocab_size}
    sampling = Sampling(
        temperature=0,
        max_tokens=10,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=bias or None,
    )
    text, drawn = list(ids), []
    for event in events_of(Engine(model, tokenizer), ids, sampling):
        logits = table(model, tokenizer, text, logits=True)[-1].tolist()
        for id, value in bias.items():
            logits[id] += value
        for id in set(text):
            logits[id] = logits[id] / repetition if logits[id] > 0 else logits[id] * repetition
        for id in set(drawn):
            logits[id] -= presence + frequency * drawn.count(id)
        incomplete = incomplete_character(tokenizer.decode_bytes(text))
        logits = [
            x if tokenizer.continues_text(incomplete, id) else -math.inf
            for id, x in enumerate(logits[: tokenizer.vocab_size])
        ]
        second, first = sorted(logits)[-2:]
        if first - second < 1e-3:  # too close to call, between two ways to compute
            return
        drawn.append(logits.index(first))
        text.append(drawn[-1])
        assert event.token == drawn[-1]


@settings(deadline=None, max_examples=60)
@given(
    prompt=st.sampled_from(["", "日本", "é", "a"]) | st.binary(max_size=6),
    temperature=st.sampled_from([0.0, 0.8, 2.0]),
    max_tokens=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_generated_bytes_are_text_whatever_the_model_prefers(
    prompt: str | bytes, temperature: float, max_tokens: int, seed: int
) -> None:
    """A model with random weights, which has no idea of UTF-8. A prompt may end inside a character."""
    tokenizer = train_bpe([TEXT] * 3, 300)
    ids = tokenizer.encode(prompt)
    (completion,) = Engine(tiny(tokenizer), tokenizer).generate(
        [ids], Sampling(temperature=temperature, max_tokens=max_tokens, seed=seed)
    )
    incomplete = incomplete_character(tokenizer.decode_bytes(ids))
    data = incomplete + tokenizer.decode_bytes(completion.tokens)
    assert completion.text == codecs.getincrementaldecoder("utf-8")().decode(data)
    assert completion.finish_reason != "stop" or completion.text == data.decode()  # no end inside a character


@pytest.mark.parametrize("data", [b"\xed\xa0", b"\xe0\x80", b"\xf4\x90", b"\xf8", b"\xc0", b"a\x80", b"\xed\xbf\x80"])
def test_what_no_text_begins_with(data: bytes) -> None:
    assert not begins_text(data) and incomplete_character(data) == b""


class Alternating:
    """Even and odd ids in turn, and after six of them the end."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.accepted = tokenizer, []

    def allowed_mask(self) -> torch.Tensor:
        if len(self.accepted) == 6:
            return torch.arange(self.tokenizer.vocab_size) == self.tokenizer.eos_id
        return torch.arange(self.tokenizer.vocab_size) % 2 == len(self.accepted) % 2

    def accept_token(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize(
    "sampling", [GREEDY, BOLD, Sampling(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1, max_tokens=40, seed=1)]
)
def test_constraints_are_obeyed(model: GPT, tokenizer: Tokenizer, sampling: Sampling) -> None:
    engine = Engine(model, tokenizer)
    constraints = [Alternating(tokenizer), Alternating(tokenizer)]
    numbers = [
        engine.add_request(prompt, sampling, constraint=c) for prompt, c in zip(("The", "x"), constraints, strict=True)
    ]
    free = engine.add_request("The", sampling)
    events = run(engine)
    for number, constraint in zip(numbers, constraints, strict=True):
        drawn = [event.token for event in events if event.request_id == number]
        assert drawn == constraint.accepted
        until = drawn.index(tokenizer.eos_id) if tokenizer.eos_id in drawn else 6
        assert [(token or 0) % 2 for token in drawn[:until]] == [i % 2 for i in range(until)]
        assert events[[event.request_id for event in events].index(number)].finish_reason is None
        assert drawn[-1] == tokenizer.eos_id
    alone = Engine(model, tokenizer).generate(["The"], sampling)[0]
    assert (
        "".join(event.text for event in events if event.request_id == free) == alone.text
    )  # a neighbour's is not its own


def test_a_failing_constraint_ends_only_its_request(model: GPT, tokenizer: Tokenizer) -> None:
    class Broken(Alternating):
        def allowed_mask(self) -> torch.Tensor:
            if self.accepted:
                raise NextwordError("the schema has no continuation")
            return super().allowed_mask()

    engine = Engine(model, tokenizer)
    broken, free = (engine.add_request("The", BOLD, constraint=Broken(tokenizer)), engine.add_request("The", BOLD))
    events = run(engine)
    [last] = [event for event in events if event.request_id == broken and event.finished]
    assert (last.finish_reason, last.error) == ("error", "the schema has no continuation")
    alone = Engine(model, tokenizer).generate(["The"], BOLD)[0]
    assert "".join(event.text for event in events if event.request_id == free) == alone.text
