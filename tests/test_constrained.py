"""Constrained decoding: generated text matches its JSON schema, with every kind of tokenizer and at a bounded cost."""

import json
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from nextword.common.errors import NextwordError, UsageError
from nextword.data.tokenizer import BYTE_CHARS, Tokenizer, train_bpe, train_char
from nextword.inference.constrained import ConstraintCompiler, JSONConstraint
from nextword.inference.engine import Engine
from nextword.inference.sampling import Sampling
from test_engine import TEXT, tiny

pytest.importorskip("llguidance", reason="needs llguidance: pip install nextword[json]")
LETTERS = '{}[]":,.-+0123456789eEtruefalsn abcdñ🙂\\/'
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "ñ": {"type": "string", "maxLength": 5},
        "b": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["ñ", "b"],
    "additionalProperties": False,
}


def sentencepiece() -> Tokenizer:
    """A tokenizer as Llama's: spaces are ▁, and unknown characters are spelt in bytes."""
    names = [
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁{",
        *(c for c in LETTERS if c.isascii()),
    ]
    names = list(dict.fromkeys(names))
    backend = tokenizers.Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, {"eos_token": "</s>", "bos_token": "<s>"})


KINDS = {"bpe": train_bpe([TEXT, LETTERS] * 3, 330), "char": train_char([TEXT, LETTERS]), "foreign": sentencepiece()}
GRAMMARS = {kind: ConstraintCompiler(tokenizer, tokenizer.eos_ids) for kind, tokenizer in KINDS.items()}


def written(kind: str, held: JSONConstraint, seed: int, max_tokens: int = 400) -> tuple[str, str]:
    """The constrained text of a model with random weights, and its finish reason."""
    tokenizer = KINDS[kind]
    engine = Engine(tiny(tokenizer, context_length=64), tokenizer)
    number = engine.add_request("x", Sampling(temperature=2.0, seed=seed, max_tokens=max_tokens), constraint=held)
    events = []
    while engine.has_unfinished_requests:
        events += engine.step()
    assert all(event.request_id == number for event in events)
    assert events[-1].error is None, events[-1].error
    return "".join(event.text for event in events), events[-1].finish_reason or ""


@pytest.mark.parametrize("kind", KINDS)
def test_constrained_text_matches_the_schema(kind: str) -> None:
    first = GRAMMARS[kind].compile_json_schema(SCHEMA)
    texts = set()
    for seed in range(8):
        text, reason = written(kind, first.copy(), seed)
        assert reason == "stop", text
        value = json.loads(text)
        assert set(value) == {"ñ", "b"} and len(value["ñ"]) <= 5 and len(value["b"]) <= 3
        assert all(type(number) is int for number in value["b"])
        texts.add(text)
    assert len(texts) == 8  # constrained, but otherwise random


values = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | st.text('abñ🙂"\\', max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
    max_leaves=5,
)


@settings(deadline=None, max_examples=60)
@given(value=values, kind=st.sampled_from(["bpe", "foreign"]))
def test_exactly_the_valid_values_can_be_generated(value: Any, kind: str) -> None:
    tokenizer, held = KINDS[kind], GRAMMARS[kind].compile_json_schema({"const": value})
    for token in tokenizer.encode(json.dumps(value, ensure_ascii=False, separators=(",", ":"))):
        allowed = held.allowed_mask()
        assert allowed.shape == (tokenizer.vocab_size,) and allowed[token]
        assert not any(allowed[id] for id in tokenizer.special_tokens.values() if id not in tokenizer.eos_ids)
        held.accept_token(token)
    assert all(held.allowed_mask()[id] for id in tokenizer.eos_ids)
    other = GRAMMARS[kind].compile_json_schema({"const": value})
    text, _ = written(kind, other, seed=1)
    assert json.loads(text) == value


def test_whitespace_is_limited() -> None:
    tokenizer, held = KINDS["bpe"], GRAMMARS["bpe"].compile_json_schema({"type": "array", "minItems": 1})
    for token in tokenizer.encode("[ "):
        held.accept_token(token)
    spaces = [
        id for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id) and not tokenizer.token_bytes(id).strip()
    ]
    assert spaces and not held.allowed_mask()[torch.tensor(spaces)].any()


NASTY: dict[str, Any] = {
    "no type": {"type": "objekt"},
    "elsewhere": {"$ref": "http://elsewhere.example/x.json"},
    "file": {"$ref": "file:///etc/passwd"},
    "parentheses": {"type": "string", "pattern": "(" * 5000 + ")" * 5000},
    "nested": {"pattern": "((((((a{50}){50}){50}){50}){50}){50})", "type": "string"},
    "product": {"allOf": [{"type": "integer", "multipleOf": p} for p in (999983, 999979, 999961)]},
    "choices": {"anyOf": [{"type": "object", "properties": {f"p{i}": {"enum": list(range(i))}}} for i in range(150)]},
    "properties": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
    "loop": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "blow up": {
        "$defs": {**{f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(30)}, "a30": True},
        "$ref": "#/$defs/a0",
    },
    "length": {"type": "string", "minLength": 10**6, "maxLength": 10**6},
    "itself": {"$ref": "#"},
    "itself again": {"allOf": [{"$ref": "#"}]},
    "many patterns": {"allOf": [{"pattern": f"a{i}"} for i in range(100)]},
    "look back": {"type": "string", "pattern": "^(a|b)*a(a|b){500}$"},
}


@pytest.mark.parametrize("name", NASTY)
def test_the_cost_of_hostile_schemas_is_bounded(name: str) -> None:
    """It is refused, or its text ends with an error, or it is written; in any case it ends. Without
    bounds these would take minutes and more."""
    try:
        held = GRAMMARS["bpe"].compile_json_schema(NASTY[name])
    except UsageError as error:
        assert len(str(error)) < 500
        return
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        try:
            allowed = held.allowed_mask()
        except NextwordError:
            break
        token = int(allowed.float().multinomial(1, generator=generator))
        if token in KINDS["bpe"].eos_ids:
            break
        held.accept_token(token)


def test_an_invalid_token_raises_an_error() -> None:
    held = GRAMMARS["bpe"].compile_json_schema({"type": "object"})
    held.accept_token(KINDS["bpe"].encode("]")[0])
    with pytest.raises(NextwordError, match="constrained decoding failed"):
        held.allowed_mask()


def test_a_vocabulary_without_a_valid_token_raises_an_error() -> None:
    for vocabulary, begun in (("no braces here", ""), ("{ no end", "{"), ('{"a": t', '{"a":t')):
        tokenizer = train_char([vocabulary])
        compiler = ConstraintCompiler(tokenizer, tokenizer.eos_ids)
        with pytest.raises(UsageError, match="constrained decoding failed"):
            held = compiler.compile_json_schema({"type": "object", "maxProperties": 1})
            for token in tokenizer.encode(begun):
                held.accept_token(token)
            for _ in range(100):
                held.accept_token(int(held.allowed_mask().float().argmax()))


@pytest.mark.parametrize("kind", KINDS)
def test_token_bytes_are_what_tokens_add_to_a_text(kind: str) -> None:
    tokenizer = KINDS[kind]
    text = 'x {"a": [1, 2]} ñ🙂 b'
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(id) for id in ids).decode() == text
    assert all(tokenizer.token_bytes(id) == b"" for id in tokenizer.special_tokens.values())


@pytest.mark.parametrize("kind", ["bpe", "foreign"])
def test_a_character_that_begins_in_the_prompt(kind: str) -> None:
    """Free text completes it; constrained text begins anew."""
    tokenizer = KINDS[kind]
    names = [BYTE_CHARS[byte] if kind == "bpe" else f"<0x{byte:02X}>" for byte in "€".encode()]
    first, second, third, letter = tokenizer.convert_tokens_to_ids([*names, "a"])
    sampling = Sampling(
        temperature=0, max_tokens=3, logit_bias={second: 90, third: 80, letter: 70}, frequency_penalty=50
    )
    engine = Engine(tiny(tokenizer, context_length=64), tokenizer)
    assert engine.generate([[letter, first]], sampling)[0].text == "€a"
    engine.add_request([letter, first], Sampling(), constraint=GRAMMARS[kind].compile_json_schema({"const": "a"}))
    events = []
    while engine.has_unfinished_requests:
        events += engine.step()
    assert "".join(event.text for event in events) == '"a"'
