"""The API of a server process: the `openai` client, the requests of lm-eval, and every form of response."""

import asyncio
import base64
import builtins
import itertools
import json
import re
import shutil
import struct
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI

import nextword
from conftest import CLIRunner
from nextword.commands import cli
from nextword.common.errors import MissingDependencyError
from nextword.common.fs import MANIFEST
from nextword.data.tokenizer import BYTE_CHARS, EOS_TOKEN, normalized, train_bpe
from nextword.inference.engine import Engine
from nextword.inference.sampling import Sampling
from nextword.pipeline.language_model import LanguageModel, load
from served import ServerProcess, make_model_dir, running_server

FREE = {"temperature": 1.5, "seed": 5}


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[ServerProcess]:
    with ServerProcess(base, "--max-batch", "4", "--model-name", "small") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def loaded(base: Path) -> LanguageModel:
    return load(base)


@pytest.fixture(scope="module")
def characters(loaded: LanguageModel) -> dict[str, float]:
    """A bias by which whole characters alone are written, and no markers."""
    tokenizer = loaded.tokenizer
    parts = [tokenizer.decode_bytes([id]).decode(errors="replace") for id in range(tokenizer.vocab_size)]
    markers = {tokenizer.eos_id, tokenizer.pad_id}
    return {str(id): -100 for id, part in enumerate(parts) if id in markers or "\ufffd" in part}


@torch.inference_mode()
def logprobs_of(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """log P of each next token [T, V], by the model itself."""
    hidden = model.gpt(torch.tensor([ids]))
    return model.gpt.unembed(hidden)[0, :, : model.tokenizer.vocab_size].double().log_softmax(-1)


# ---------------------------------------------------------------- completions


def test_a_completion_equals_generate(client: OpenAI, loaded: LanguageModel) -> None:
    expected = loaded.generate("The", temperature=1.5, seed=5, max_tokens=20)[0]
    made = client.completions.create(model="small", prompt="The", max_tokens=20, **FREE)
    assert made.choices[0].text == expected.text
    assert made.choices[0].finish_reason == expected.finish_reason
    assert (made.model, made.object) == ("small", "text_completion")
    assert made.usage is not None
    ended = expected.finish_reason == "stop"
    assert made.usage.completion_tokens == len(expected.tokens) + ended
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
    default = client.completions.create(model="small", prompt="The", logit_bias={"0": -100})
    assert default.usage is not None and default.usage.completion_tokens == 16


def test_a_stream_equals_the_completion(client: OpenAI) -> None:
    settings: dict[str, Any] = {"model": "small", "prompt": "The", "max_tokens": 30, "logprobs": 2, **FREE}
    whole = client.completions.create(**settings)
    pieces = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == whole.choices[0].text
    assert pieces[-1].usage == whole.usage and not pieces[-1].choices
    assert all(piece.usage is None for piece in pieces[:-1])
    assert len({piece.id for piece in pieces}) == 1
    assert [c.finish_reason for p in pieces for c in p.choices if c.finish_reason] == [whole.choices[0].finish_reason]
    told = [c.logprobs for p in pieces for c in p.choices if c.logprobs]
    expected = whole.choices[0].logprobs
    assert expected is not None
    assert [token for one in told for token in one.tokens or []] == expected.tokens
    assert [offset for one in told for offset in one.text_offset or []] == expected.text_offset
    without = list(client.completions.create(model="small", prompt="The", max_tokens=2, stream=True))
    assert all(piece.usage is None for piece in without)


def test_the_asynchronous_client(server: ServerProcess) -> None:
    async def talk() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(seed: int) -> str:
                stream = await client.completions.create(
                    model="small", prompt="The", max_tokens=20, temperature=1.0, seed=seed, stream=True
                )
                return "".join([choice.text async for piece in stream for choice in piece.choices])

            return await asyncio.gather(*(one(seed) for seed in (1, 2, 3, 1, 2, 3)))

    texts = asyncio.run(talk())
    assert texts[:3] == texts[3:] and len(set(texts)) == 3


def test_several_texts_of_a_prompt_and_several_prompts(server: ServerProcess) -> None:
    several = server.complete("The", n=3, max_tokens=8, **FREE)
    texts = [choice["text"] for choice in several["choices"]]
    assert len(set(texts)) == 3 and [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    assert server.complete("The", max_tokens=8, **FREE)["choices"][0]["text"] == texts[0]
    both = server.complete(["A list", "The"], n=2, max_tokens=8, **FREE)
    assert [choice["text"] for choice in both["choices"]][2:] == texts[:2]
    assert both["usage"]["prompt_tokens"] == sum(
        server.complete(p, max_tokens=0)["usage"]["prompt_tokens"] for p in ("A list", "The")
    )
    streamed = server.post("/v1/completions", {"prompt": "The", "n": 3, "max_tokens": 8, "stream": True, **FREE})
    parts = [choice for event in streamed.sse_events for choice in event["choices"]]
    assert ["".join(part["text"] for part in parts if part["index"] == i) for i in range(3)] == texts


def test_best_of_returns_the_highest_mean_logprob(server: ServerProcess) -> None:
    settings = {"max_tokens": 8, "seed": 3, "temperature": 2.0}
    every = server.complete("The", n=6, logprobs=0, **settings)["choices"]

    def mean(choice: dict[str, Any]) -> float:
        found = choice["logprobs"]["token_logprobs"]
        return sum(found) / len(found)

    best = server.complete("The", n=2, best_of=6, **settings)["choices"]
    expected = sorted(every, key=mean, reverse=True)[:2]
    assert [choice["text"] for choice in best] == [choice["text"] for choice in expected]
    assert [choice["logprobs"] for choice in best] == [None, None]


def test_stop_strings_end_a_text_before_them(server: ServerProcess, characters: dict[str, float]) -> None:
    settings = {"max_tokens": 40, "logit_bias": characters, **FREE}
    free = server.complete("The", **settings)["choices"][0]["text"]
    stop = free[len(free) // 2 :][:2]
    for given in (stop, ["no such text", stop]):
        choice = server.complete("The", stop=given, logprobs=0, **settings)["choices"][0]
        assert choice["text"] == free[: free.index(stop)]
        assert choice["finish_reason"] == "stop"
        assert "".join(choice["logprobs"]["tokens"]).startswith(choice["text"])  # and none after it
        assert all(offset < max(1, len(choice["text"])) for offset in choice["logprobs"]["text_offset"])


def test_characters_are_never_cut(server: ServerProcess) -> None:
    """A byte-level model at a high temperature writes many bytes that are no characters; what is one comes whole."""
    bias = {str(id): 5 for id in range(130, 258)}
    body = {"prompt": "é🙂", "max_tokens": 200, "temperature": 2, "seed": 1, "logit_bias": bias, "stream": True}
    answer = server.post("/v1/completions", body)
    streamed = [choice["text"] for event in answer.sse_events for choice in event["choices"]]
    whole = server.complete(**{**body, "stream": False})["choices"][0]["text"]
    assert "".join(streamed) == whole
    assert any(ord(character) > 127 and character != "\ufffd" for character in whole)
    for piece in streamed:
        piece.encode()  # no half surrogate


def test_penalties_and_biases_take_effect(server: ServerProcess) -> None:
    ids = server.post("/tokenize", {"prompt": "The"}).json["tokens"]
    always = server.complete("The", max_tokens=5, temperature=0, logit_bias={str(ids[0]): 100}, logprobs=0)
    assert always["choices"][0]["logprobs"]["tokens"] == ["The"] * 5
    settings = {"max_tokens": 5, "temperature": 0, "logprobs": 0, "logit_bias": {str(ids[0]): 0.0}}
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repetition_penalty": 50.0}):
        told = server.complete("The the the", **settings, **penalty)["choices"][0]["logprobs"]["tokens"]
        free = server.complete("The the the", **settings)["choices"][0]["logprobs"]["tokens"]
        assert told[0] == free[0] or "repetition_penalty" in penalty
    likeliest = server.complete("The", max_tokens=5, temperature=0)["choices"][0]["text"]
    for narrow in ({"top_k": 1}, {"top_p": 0}, {"min_p": 1}):
        assert server.complete("The", max_tokens=5, temperature=1.0, **narrow)["choices"][0]["text"] == likeliest
    assert server.complete("The", max_tokens=5, temperature=0, top_k=-1, top_p=1, min_p=0)["choices"][0]["text"] == (
        likeliest
    )


# ---------------------------------------------------------------- log-probabilities


def test_logprobs_are_the_models_own(
    server: ServerProcess, loaded: LanguageModel, characters: dict[str, float]
) -> None:
    ids = loaded.tokenizer.encode("The list of")
    made = server.complete(ids, max_tokens=6, logprobs=3, logit_bias=characters, **FREE)["choices"][0]["logprobs"]
    text = "".join(made["tokens"])
    drawn = loaded.tokenizer.convert_tokens_to_ids(
        [token.replace(" ", "Ġ").replace("\n", "Ċ") for token in made["tokens"]]
    )
    expected = logprobs_of(loaded, [*ids, *drawn])[len(ids) - 1 : -1]
    for i, token in enumerate(drawn):
        assert made["token_logprobs"][i] == pytest.approx(float(expected[i, token]), abs=1e-4)
        top = expected[i].topk(3).values.tolist()
        assert sorted(made["top_logprobs"][i].values(), reverse=True)[:3] == pytest.approx(top, abs=1e-4)
        assert made["top_logprobs"][i][made["tokens"][i]] == made["token_logprobs"][i]
    assert made["text_offset"] == [len("".join(made["tokens"][:i])) for i in range(6)]
    assert text == server.complete(ids, max_tokens=6, logit_bias=characters, **FREE)["choices"][0]["text"]


def test_echo_returns_the_prompt_with_logprobs(server: ServerProcess, loaded: LanguageModel) -> None:
    prompt = "The list of é🙂"
    ids = loaded.tokenizer.encode(prompt)
    for max_tokens in (0, 3):
        choice = server.complete(prompt, echo=True, logprobs=2, max_tokens=max_tokens, **FREE)["choices"][0]
        told = choice["logprobs"]
        assert choice["text"].startswith(prompt) and (max_tokens or choice["text"] == prompt)
        assert choice["finish_reason"] == "length"
        assert len(told["tokens"]) == len(ids) + max_tokens == len(told["top_logprobs"]) == len(told["text_offset"])
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        expected = logprobs_of(loaded, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        assert told["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-4)
        assert told["tokens"][-1 - max_tokens].startswith("bytes:") or "🙂" in told["tokens"][-1 - max_tokens]
    body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 3, "stream": True, **FREE}
    streamed = [choice for event in server.post("/v1/completions", body).sse_events for choice in event["choices"]]
    assert "".join(part["text"] for part in streamed) == choice["text"]
    assert [token for part in streamed for token in part["logprobs"]["tokens"]] == told["tokens"]
    assert server.complete(prompt, echo=True, max_tokens=0)["choices"][0]["logprobs"] is None


def test_requests_of_lm_eval(server: ServerProcess, loaded: LanguageModel) -> None:
    """Its requests and its reading of the answers, as in lm_eval/models/openai_completions.py (0.4.13)."""
    contexts, continuations = ["The value of", "A list"], [" the object", " is"]
    both = [
        loaded.tokenizer.encode(a) + loaded.tokenizer.encode(b) for a, b in zip(contexts, continuations, strict=True)
    ]
    lengths = [len(loaded.tokenizer.encode(a)) for a in contexts]
    settings = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = server.post("/v1/completions", {"model": "small", "prompt": both, **settings}).json
    for choice, ids, length in zip(answer["choices"], both, lengths, strict=True):
        assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1
        told = choice["logprobs"]["token_logprobs"][length:-1]
        greedy = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][length:-1]] == told
        table = logprobs_of(loaded, ids)[length - 1 : -1]
        expected = table.gather(1, torch.tensor(ids[length:])[:, None])
        assert sum(told) == pytest.approx(float(expected.sum()), abs=1e-4)
        assert greedy == bool((table.argmax(1) == torch.tensor(ids[length:])).all())


def test_lm_evals_remote_tokenizer(server: ServerProcess, loaded: LanguageModel) -> None:
    """What its RemoteTokenizer asks for, and in what form (lm_eval/utils.py)."""
    info = server.get("/tokenizer_info").json
    assert info["eos_token"] == EOS_TOKEN and "bos_token" in info and "pad_token" in info and "chat_template" in info
    asked = server.post("/tokenize", {"prompt": info["eos_token"], "add_special_tokens": False}).json
    assert asked["tokens"][0] == loaded.tokenizer.eos_id
    text = "The 🙂 list <|endoftext|> of\n"
    said = server.post("/tokenize", {"prompt": text, "add_special_tokens": False, "return_token_strs": True}).json
    assert said["tokens"] == loaded.tokenizer.encode(text) and said["count"] == len(said["tokens"])
    assert said["max_model_len"] == 64 and len(said["token_strs"]) == said["count"]
    assert loaded.tokenizer.eos_id not in said["tokens"]  # a marker inside a text is text
    assert server.post("/detokenize", {"tokens": said["tokens"]}).json == {"prompt": text}
    assert server.post("/detokenize", {"tokens": [10**6]}).error["param"] == "tokens"
    assert server.post("/tokenize", {}).status == 400


# ---------------------------------------------------------------- conversations


def test_a_model_without_chat_format_responds_with_a_note(client: OpenAI, server: ServerProcess) -> None:
    messages: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    settings: Any = {"model": "small", "messages": messages, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    raw = client.chat.completions.with_raw_response.create(**settings, n=2, seed=4)
    assert raw.headers["x-nextword-chat-template"] == "plain"
    made = raw.parse()
    assert made.model_dump()["nextword"] == {"chat_template": "plain"}
    assert [choice.index for choice in made.choices] == [0, 1]
    choice = made.choices[0]
    assert choice.message.role == "assistant" and choice.logprobs is not None and choice.logprobs.content
    said = b"".join(bytes(one.bytes or []) for one in choice.logprobs.content)
    assert said.decode(errors="replace").startswith(choice.message.content or "")
    assert all(len(one.top_logprobs) == 3 for one in choice.logprobs.content)
    prompt = "Be kind.\nUser: Hi\nAssistant:"
    plain = server.complete(prompt, max_tokens=12, seed=4, stop="\nUser:")["choices"][0]
    assert plain["text"] == choice.message.content
    usage = {"include_usage": True}
    parts = list(client.chat.completions.create(**settings, seed=4, stream=True, stream_options=usage))
    assert parts[0].choices[0].delta.role == "assistant" and parts[0].object == "chat.completion.chunk"
    assert "".join(c.delta.content or "" for part in parts for c in part.choices) == choice.message.content
    told = [one for part in parts for c in part.choices if c.logprobs for one in c.logprobs.content or []]
    assert [(one.token, one.bytes) for one in told] == [(one.token, one.bytes) for one in choice.logprobs.content]
    for one, other in zip(told, choice.logprobs.content, strict=True):  # in other company: equal within rounding
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        tops = [top.logprob for top in other.top_logprobs]
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(tops, abs=1e-4)
    assert parts[-2].choices[0].finish_reason == choice.finish_reason and parts[-1].usage is not None


def test_the_default_max_tokens_fills_the_context(client: OpenAI) -> None:
    made = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "Hi"}], logit_bias={"0": -100}, stop=None
    )
    assert made.usage is not None
    assert made.usage.total_tokens == 64 or made.choices[0].finish_reason == "stop"
    parts: Any = [{"type": "text", "text": "The"}, {"type": "text", "text": "list"}]
    with_parts = client.chat.completions.create(
        model="small",
        messages=[{"role": "developer", "content": "x"}, {"role": "user", "content": parts}],
        max_completion_tokens=3,
        temperature=0,
    )
    joined = client.chat.completions.create(
        model="small",
        messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "The\nlist"}],
        max_tokens=3,
        temperature=0,
    )
    assert with_parts.choices[0].message.content == joined.choices[0].message.content


# ---------------------------------------------------------------- JSON

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


def test_constrained_text_always_matches_its_schema(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
    settings: Any = {"n": 6, "temperature": 2, "seed": 1, "max_tokens": 200, "stop": None, "response_format": form}
    made = client.chat.completions.create(model="small", messages=[{"role": "user", "content": "A pet?"}], **settings)
    finished = 0
    for choice in made.choices:
        if choice.finish_reason == "stop":
            finished += 1
            value = json.loads(choice.message.content or "")
            assert set(value) == {"name", "age", "kind", "tags"} and len(value["name"]) <= 6
            assert 0 <= value["age"] <= 150 and value["kind"] in ("cat", "dog") and len(value["tags"]) <= 2
    assert len({choice.message.content for choice in made.choices}) == 6


def test_a_completion_can_be_constrained_to_json(server: ServerProcess) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    for seed in range(12):
        made = server.complete("x", response_format=form, max_tokens=300, temperature=2, seed=seed)["choices"][0]
        assert made["finish_reason"] == "stop"
        assert set(json.loads(made["text"])) == set(SCHEMA["properties"])
    free = server.complete("x", response_format={"type": "json_object"}, max_tokens=300, temperature=0)["choices"][0]
    assert free["text"].startswith("{")
    same = server.complete("x", response_format={"type": "text"}, max_tokens=5, temperature=0)
    assert same["choices"][0]["text"] == server.complete("x", max_tokens=5, temperature=0)["choices"][0]["text"]


PET = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema", "json_schema": {"schema": PET}},
        {"type": "json_schema", "schema": PET},
        {"type": "json_object", "schema": PET},
        {"type": "json_object", "json_schema": {"schema": PET}},
        {"type": "json_object", "schema": PET, "json_schema": {"schema": PET}},
    ],
)
def test_a_schema_is_accepted_in_every_place(server: ServerProcess, form: Any) -> None:
    made = server.complete("x", response_format=form, max_tokens=60)["choices"][0]
    assert json.loads(made["text"]) == {"a": 1}


@pytest.mark.parametrize(
    "form",
    [
        {"type": "text", "schema": PET},
        {"type": "text", "json_schema": {"schema": PET}},
        {"type": "json_object", "schema": PET, "json_schema": {"schema": {}}},
        {"type": "json_object", "schema": "x"},
    ],
)
def test_contradicting_schemas_are_rejected(server: ServerProcess, form: Any) -> None:
    answer = server.post("/v1/completions", {"prompt": "x", "response_format": form})
    assert answer.status == 400 and answer.error["param"].startswith("response_format")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objekt"},
        {"$ref": "http://elsewhere.example/x.json"},
        {"enum": ["x" * 70_000]},
        {"type": "string", "pattern": "(" * 5000},
        {"type": "integer", "multipleOf": 999_999_937},
        {"oneOf": [{"const": 1}, {"const": 2}]},
        {"not": {}},
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(4000)}},
        {"allOf": [{"pattern": str(i)} for i in range(100)]},
        {"type": "string", "minLength": 2, "maxLength": 1},
    ],
)
def test_an_unsupported_schema_is_rejected(server: ServerProcess, schema: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    answer = server.post("/v1/completions", {"prompt": "x", "response_format": form, "max_tokens": 300})
    assert answer.status == 400 and answer.error["param"] == "response_format"
    assert len(answer.error["message"]) < 600


def test_a_deeply_nested_schema_is_rejected(server: ServerProcess) -> None:
    nested = b'{"items":' * 900 + b"{}" + b"}" * 900
    head = b'{"prompt":"x","response_format":{"type":"json_schema","json_schema":{"schema":'
    assert server.post("/v1/completions", head + nested + b"}}}").status == 400
    deeper = b'{"items":' * 90_000 + b"{}" + b"}" * 90_000
    assert server.post("/v1/completions", head + deeper + b"}}}").status == 400
    assert server.get("/health").status == 200


# ---------------------------------------------------------------- other routes


def test_embeddings_are_normalized_means(client: OpenAI, server: ServerProcess, loaded: LanguageModel) -> None:
    texts = ["The list", "A value of é🙂"]
    made = client.embeddings.create(model="small", input=texts)  # this client asks for base64
    for text, one in zip(texts, made.data, strict=True):
        with torch.inference_mode():
            hidden = loaded.gpt(torch.tensor([loaded.tokenizer.encode(text)]))[0].mean(0)
        torch.testing.assert_close(torch.tensor(one.embedding), hidden / hidden.norm(), atol=1e-5, rtol=1e-4)
        assert torch.tensor(one.embedding).norm() == pytest.approx(1, abs=1e-5)
    plain = server.post("/v1/embeddings", {"input": loaded.tokenizer.encode(texts[0]), "encoding_format": "float"}).json
    packed = server.post("/v1/embeddings", {"input": texts[0], "encoding_format": "base64"}).json["data"][0]
    numbers = struct.unpack("<32f", base64.b64decode(packed["embedding"]))
    assert list(numbers) == pytest.approx(plain["data"][0]["embedding"], abs=1e-6)
    assert "mean" in plain["nextword"]["pooling"] and plain["usage"]["prompt_tokens"] > 0
    assert server.post("/v1/embeddings", {"input": "x", "dimensions": 32}).status == 200
    for wrong in ({"input": ""}, {"input": []}, {"input": "x", "dimensions": 5}, {"input": ["x" * 5000]}, {}):
        assert server.post("/v1/embeddings", wrong).status == 400, wrong


def test_the_list_of_models(client: OpenAI, server: ServerProcess) -> None:
    [model] = client.models.list().data
    assert model.id == "small" and client.models.retrieve("small").id == "small"
    facts = model.model_dump()["nextword"]
    assert {name: facts[name] for name in ("chat", "task", "context_length", "precision")} == {
        "chat": False,
        "task": None,
        "context_length": 64,
        "precision": "float32",
    }
    with pytest.raises(openai.NotFoundError, match="model 'other' does not exist"):
        client.completions.create(model="other", prompt="x")
    assert server.post("/v1/classify", {"input": "x"}).status == 400  # fine-tuned for no task


def test_metrics_are_prometheus(server: ServerProcess) -> None:
    prometheus = pytest.importorskip("prometheus_client.parser")
    before = server.metric("nextword_generated_tokens_total")
    server.complete("The", max_tokens=7, logit_bias={"0": -100})
    families = {f.name: f for f in prometheus.text_string_to_metric_families(server.get("/metrics").body.decode())}
    assert server.metric("nextword_generated_tokens_total") == before + 7
    assert families["nextword_slots"].samples[0].value == 4
    buckets = families["nextword_time_between_tokens_seconds"].samples
    counts = [sample.value for sample in buckets if sample.name.endswith("_bucket")]
    assert counts == sorted(counts) and counts[-1] > 0
    labels = [sample.labels for sample in families["nextword_requests"].samples]
    assert {"route": "/v1/completions", "status": "200"} in labels


# ---------------------------------------------------------------- what is refused

WRONG: list[tuple[str, dict[str, Any], str | None]] = [
    ("/v1/completions", {"prompt": 5}, "prompt"),
    ("/v1/completions", {"prompt": [1.5]}, "prompt"),
    ("/v1/completions", {"prompt": []}, "prompt"),
    ("/v1/completions", {"prompt": [[]]}, "prompt"),
    ("/v1/completions", {"prompt": [-1]}, "prompt"),
    ("/v1/completions", {"prompt": [10**6]}, "prompt"),
    ("/v1/completions", {"prompt": ["x"] * 2000}, "prompt"),
    ("/v1/completions", {"temperature": "1"}, "temperature"),
    ("/v1/completions", {"temperature": True}, "temperature"),
    ("/v1/completions", {"temperature": -1}, "temperature"),
    ("/v1/completions", {"frequency_penalty": 10**7}, "frequency_penalty"),
    ("/v1/completions", {"max_tokens": -1}, "max_tokens"),
    ("/v1/completions", {"max_tokens": 10**9}, "max_tokens"),
    ("/v1/completions", {"max_tokens": 1.5}, "max_tokens"),
    ("/v1/completions", {"n": 0}, "n"),
    ("/v1/completions", {"n": 10**6}, "n"),
    ("/v1/completions", {"n": 100}, None),  # more than this server holds
    ("/v1/completions", {"n": 50, "max_tokens": 30000}, "max_tokens"),
    ("/v1/completions", {"n": 3, "best_of": 2}, "best_of"),
    ("/v1/completions", {"best_of": 3, "stream": True}, "best_of"),
    ("/v1/completions", {"logprobs": 21}, "logprobs"),
    ("/v1/completions", {"logprobs": True}, "logprobs"),
    ("/v1/completions", {"stop": ["a"] * 5}, "stop"),
    ("/v1/completions", {"stop": ""}, "stop"),
    ("/v1/completions", {"stop": "x" * 501}, "stop"),
    ("/v1/completions", {"logit_bias": {"x": 1}}, "logit_bias"),
    ("/v1/completions", {"logit_bias": {"99999": 1}}, "logit_bias"),
    ("/v1/completions", {"logit_bias": {"5": 10**7}}, "logit_bias"),
    ("/v1/completions", {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ("/v1/completions", {"seed": 2**70}, "seed"),
    ("/v1/completions", {"top_p": 1.1}, "top_p"),
    ("/v1/completions", {"repetition_penalty": 1e-300}, "repetition_penalty"),
    ("/v1/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("/v1/completions", {"suffix": "x"}, "suffix"),
    ("/v1/completions", {"response_format": {"type": "xml"}}, "response_format.type"),
    ("/v1/completions", {"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ("/v1/chat/completions", {}, "messages"),
    ("/v1/chat/completions", {"messages": []}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("/v1/chat/completions", {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
    ),
]


@pytest.mark.parametrize(("path", "body", "param"), WRONG, ids=lambda value: str(value)[:40])
def test_invalid_parameters_are_rejected_by_name(
    server: ServerProcess, path: str, body: dict[str, Any], param: str | None
) -> None:
    answer = server.post(path, body)
    assert answer.status == 400, answer.body
    assert answer.error["param"] == param and answer.error["type"] == "invalid_request_error"
    assert len(answer.error["message"]) < 600


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b'"x"', b'{"temperature": NaN}', b'{"seed": 1e400}'])
def test_an_invalid_body_is_rejected(server: ServerProcess, body: bytes) -> None:
    assert server.post("/v1/completions", body).status == 400


def test_unknown_fields_and_nulls_are_ignored(server: ServerProcess) -> None:
    names = "temperature top_p n stop logprobs max_tokens stream seed logit_bias user best_of".split()
    body = {"prompt": "The", **dict.fromkeys(names), "user": "me", "metadata": {"a": [1]}, "store": True, "tools": []}
    answer = server.post("/v1/completions", body)
    assert answer.status == 200, answer.body


def test_a_prompt_longer_than_the_context_is_rejected(client: OpenAI, server: ServerProcess) -> None:
    fits, over = server.post("/v1/completions", {"prompt": [5] * 64}), [5] * 65
    assert fits.status == 200
    for prompt in (over, "word " * 100, "x" * 500_000):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="small", prompt=prompt)
        assert refused.value.code == "context_length_exceeded" and "64 tokens" in str(refused.value)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="small", messages=[{"role": "user", "content": "word " * 100}])
    assert refused.value.code == "context_length_exceeded"


def test_truncate_prompt_tokens_keeps_the_end(server: ServerProcess, loaded: LanguageModel) -> None:
    long = "The list of values is long, " * 30
    ids = loaded.tokenizer.encode(long)
    for keep, prompt in ((-1, long), (-1, ids), (10**9, long), (5, long), (0, long)):
        kept = ids[len(ids) - min(64, keep if keep >= 0 else 64) :] or [loaded.tokenizer.eos_id]
        told = server.complete(prompt, truncate_prompt_tokens=keep, max_tokens=3, echo=True, logprobs=0, **FREE)
        expected = server.complete(kept, max_tokens=3, echo=True, logprobs=0, **FREE)
        assert told["choices"] == expected["choices"] and told["usage"]["prompt_tokens"] == len(kept)
    short = server.complete("The list", truncate_prompt_tokens=-1, max_tokens=3, **FREE)
    assert short["choices"] == server.complete("The list", max_tokens=3, **FREE)["choices"]
    assert server.post("/v1/completions", {"prompt": "x", "truncate_prompt_tokens": -2}).status == 400


def test_unsupported_fields_are_refused_by_name_and_unknown_ones_are_ignored(server: ServerProcess) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    call = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    chat = {"messages": messages, "max_tokens": 1}
    refused = (
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"grammar": "root ::= 'a'"}, "grammar"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"messages": [*messages, {"role": "assistant", "tool_calls": call}]}, "messages[1].tool_calls"),
    )
    for fields, param in refused:
        answer = server.post("/v1/chat/completions", {**chat, **fields})
        assert answer.status == 400 and answer.error["param"] == param, (fields, answer.body)
    for fields in ({"max_completion_tokens": 5}, {"truncation": "auto"}, {"top_logprobs": 2}, {"guided_regex": "a"}):
        answer = server.post("/v1/completions", {"prompt": "x", **fields})
        assert answer.status == 400 and answer.error["param"] == next(iter(fields))
    assert server.post("/tokenize", {"messages": messages, "chat_template": "x"}).error["param"] == "chat_template"
    without_effect = {"tools": [], "tool_choice": "auto", "functions": None, "modalities": ["text"], "min_tokens": 0}
    ignored = {"user": "me", "store": True, "metadata": {"a": "b"}, "reasoning_effort": "low"}
    assert server.post("/v1/chat/completions", {**chat, **without_effect, **ignored}).status == 200


def test_the_defaults_are_those_of_the_commands(server: ServerProcess) -> None:
    """For page, API, `generate` and `chat`."""
    page, defaults = server.get("/").body.decode(), Sampling()
    values = dict(re.findall(r'name="(\w+)"[^>]*? value="([\d.]+)"', page))
    assert (float(values["temperature"]), int(values["max_tokens"])) == (defaults.temperature, defaults.max_tokens)
    assert (float(values["top_p"]), float(values["min_p"])) == (1, 0)
    assert float(values["repetition_penalty"]) == defaults.repetition_penalty
    expected = server.complete("The", seed=1, temperature=defaults.temperature)
    assert server.complete("The", seed=1)["choices"] == expected["choices"]


def test_a_model_has_its_own_defaults(base: Path, tmp_path: Path, nextword: CLIRunner) -> None:
    """For the same again. What a request or an option gives counts more."""
    model = shutil.copytree(base / "model", tmp_path / "model", ignore=shutil.ignore_patterns(MANIFEST))
    content = {**json.loads((model / "generation_config.json").read_text()), "do_sample": False, "max_new_tokens": 9}
    (model / "generation_config.json").write_text(json.dumps(content))
    greedy = load(base).generate("The", temperature=0, max_tokens=9)[0].text
    sampled = load(base).generate("The", temperature=1.5, max_tokens=9, seed=1)[0].text
    assert load(model).generate("The")[0].text == greedy != sampled
    assert nextword("generate", model, "The").stdout == f"The{greedy}\n"
    used = json.loads(nextword("generate", model, "The", "--top-k", "3", "--json").stdout)["sampling"]
    assert (used["temperature"], used["max_tokens"], used["top_k"], used["min_p"]) == (0, 9, 3, None)
    assert nextword("generate", model, "The", "--temperature", "1.5", "--seed", "1").stdout == f"The{sampled}\n"
    with running_server(model) as server:
        shown = server.get("/v1/models").json["data"][0]["nextword"]["sampling"]
        assert (shown["temperature"], shown["max_tokens"], shown["top_k"]) == (0, 9, None)
        assert server.complete("The", max_tokens=9)["choices"][0]["text"] == greedy
        given = {"max_tokens": 9, "temperature": 1.5, "seed": 1}
        assert server.complete("The", **given)["choices"][0]["text"] == sampled


def test_offsets_are_those_of_the_text_that_the_model_reads(tmp_path: Path) -> None:
    """Of a prompt in NFD for a tokenizer that normalizes to NFC, and of a character that begins in the prompt."""
    tokenizer = normalized(train_bpe(["The café is déjà là. "] * 9, 300), to_nfc=True)
    ids = [tokenizer.convert_tokens_to_ids([BYTE_CHARS[byte]])[0] for byte in (*"€".encode(), ord("x"))]
    biases = {str(id): bias for id, bias in zip(ids[1:], (90, 80, 70), strict=True)}
    body = {"max_tokens": 3, "logprobs": 0, "logit_bias": biases, "frequency_penalty": 20, "temperature": 0}
    with running_server(make_model_dir(tmp_path / "model", tokenizer)) as server:
        for prompt, echo, text, offsets in (
            (unicodedata.normalize("NFD", "é"), False, "xxx", [0, 1, 2]),
            (unicodedata.normalize("NFD", "é"), True, "éxxx", [0, 1, 2, 3]),
            (ids[:1], False, "€x", [0, 0, 1]),
            (ids[:1], True, "\ufffd€x", [0, 1, 1, 2]),
        ):
            request = {"prompt": prompt, "echo": echo, **body}
            [choice] = server.complete(**request)["choices"]
            assert (choice["text"], choice["logprobs"]["text_offset"]) == (text, offsets)
            events = server.post("/v1/completions", {**request, "stream": True}).sse_events
            parts = [part["logprobs"]["text_offset"] for event in events for part in event["choices"]]
            assert list(itertools.chain(*parts)) == offsets


def test_lone_surrogates_are_rejected(server: ServerProcess) -> None:
    assert "hex escape" in server.post("/v1/completions", b'{"prompt": "a\\ud800b"}').error["message"]
    form = (
        b'{"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {"const": "\\ud800"}}}}'
    )
    assert server.post("/v1/completions", form).status == 400


def test_unknown_paths_and_methods(server: ServerProcess) -> None:
    assert (server.get("/nothing").status, server.get("/nothing").error["type"]) == (404, "invalid_request_error")
    assert server.get("/v1/completions").status == 405
    assert server.get("/docs").status == 404  # FastAPI's page would load scripts from elsewhere
    assert "/v1/completions" in server.get("/openapi.json").json["paths"]


# ---------------------------------------------------------------- the command


def test_precisions_and_the_seed_of_the_server(base: Path) -> None:
    with running_server(base, precision="int8", seed=3) as one:
        assert one.get("/v1/models").json["data"][0]["nextword"]["precision"] == "int8"
        first = one.complete("The", max_tokens=20, temperature=1.5)["choices"][0]["text"]
    expected = load(base, precision="int8")
    engine = Engine(expected.gpt, expected.tokenizer, seed=3, runner=expected.runner)
    assert engine.generate(["The"], Sampling(temperature=1.5, max_tokens=20))[0].text == first


def test_the_server_exits_if_the_model_cannot_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["serve", str(tmp_path / "nowhere"), "--port", "0"]) == 1
    assert "not a model directory or a run directory" in capsys.readouterr().err
    made = make_model_dir(tmp_path / "model", train_bpe(["The house"] * 3, 300))
    (made / "model.safetensors").write_bytes(b"broken")
    assert cli.run(["serve", str(made), "--port", "0"]) in (1, 3)
    assert "model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "lets other machines connect"),
        (["--port", "99999"], "--port must be"),
        (["--api-key", " x"], "API key is ASCII"),
        (["--max-batch", "0"], "--max-batch"),
        (["--queue", "-1"], "--queue"),
    ],
)
def test_usage_errors_are_reported_before_listening(
    base: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert cli.run(["serve", str(base), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(("fastapi", "nextword.serving.app")):
            raise ModuleNotFoundError(f"No module named {name!r}", name="fastapi")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'nextword\[serve\]'"):
        nextword.serve(base)


def test_without_llguidance_only_schemas_are_rejected(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with running_server(base) as one:
        answer = one.post("/v1/completions", {"prompt": "x", "response_format": {"type": "json_object"}})
        assert answer.status == 400 and "nextword[json]" in answer.error["message"]
        one.complete("x", max_tokens=2)
