"""Routes of the OpenAI-compatible API. Limits are in `protocol`, response bodies and streaming in `responses`."""

import asyncio
import base64
import struct
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse
from prometheus_client import generate_latest
from starlette.responses import Response

from nextword.inference.sampling import Sampling
from nextword.serving import openapi, protocol
from nextword.serving.chat_templates import encode_newest_turns
from nextword.serving.engine_worker import GenerationRequest
from nextword.serving.protocol import (
    APIError,
    JSONRoute,
    UTF8JSONResponse,
    invalid_field,
    list_prompts,
    to_conversation,
)
from nextword.serving.responses import ChatCompletionWriter, CompletionWriter, cancel_on_disconnect, make_usage
from nextword.serving.service import Service

router = APIRouter(route_class=JSONRoute, default_response_class=UTF8JSONResponse, responses=openapi.ERROR_RESPONSES)
DEFAULT_MAX_TOKENS = 16  # default of max_tokens in /v1/completions, as in OpenAI's API


async def get_service(request: Request) -> Service:
    """The served model, of which there is one per application."""
    return request.app.state.service


ServiceDep = Annotated[Service, Depends(get_service)]


def validate_request(
    body: protocol.BaseCompletionRequest, n: int, best_of: int, num_sequences: int, max_tokens: int
) -> None:
    """Check settings that depend on each other.

    Raises:
        APIError: Two settings exclude each other, or the request asks for too many tokens.
    """
    if num_sequences * max_tokens > (limit := protocol.MAX_REQUEST_TOKENS):
        message = f"{num_sequences} sequences of {max_tokens:,} tokens exceed {limit:,} tokens per request"
        raise APIError(400, message, param="max_tokens")
    if best_of < n:
        raise invalid_field("best_of", f"must be at least n ({n}), not {best_of}")
    if body.stream and best_of > n:
        raise invalid_field("best_of", "not supported together with stream")
    if body.stream_options is not None and not body.stream:
        raise invalid_field("stream_options", "requires stream")


async def build_requests(
    service: Service,
    body: protocol.BaseCompletionRequest,
    prompts: list[list[int]],
    samples_per_prompt: int,
    sampling: Sampling,
) -> list[GenerationRequest]:
    """The sequences of a request, grouped by prompt. Raises `APIError` if its JSON schema cannot be compiled."""
    constraints = await service.compile_constraints(body.response_schema(), len(prompts) * samples_per_prompt)
    return [
        GenerationRequest(prompt, sampling, None if body.seed is None else i, constraints.pop())
        for prompt in prompts
        for i in range(samples_per_prompt)
    ]


@router.post("/v1/completions", responses=openapi.COMPLETION_RESPONSE)
async def completions(body: protocol.CompletionRequest, request: Request, service: ServiceDep) -> Response:
    """Complete one or more prompts, given as text or token ids. Beyond the context length the window slides."""
    service.check_model(body.model)
    prompts, n = list_prompts(body.prompt), body.n or 1
    samples_per_prompt = n if body.best_of is None else body.best_of
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    validate_request(body, n, samples_per_prompt, len(prompts) * samples_per_prompt, max_tokens)
    if body.suffix:
        raise invalid_field("suffix", "this model does not support fill-in-the-middle")
    with service.worker.admit(len(prompts) * samples_per_prompt) as handle:
        tokenizer, truncate_to = service.model.tokenizer, body.truncate_prompt_tokens
        sampling = body.to_sampling(
            tokenizer.vocab_size,
            service.model.sampling_defaults,
            # best_of ranks sequences by the log-probabilities of their tokens.
            logprobs=0 if body.logprobs is None and samples_per_prompt > n else body.logprobs,
            max_tokens=max_tokens,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        ids = [await service.encode_prompt(prompt, truncate_to=truncate_to) for prompt in prompts]
        writer = CompletionWriter(
            service,
            handle,
            await build_requests(service, body, ids, samples_per_prompt, sampling),
            body.logprobs,
            num_prompts=len(ids),
            num_choices=n,
            echoed_prompts=[
                tokenizer.normalize(prompt)
                if isinstance(prompt, str) and truncate_to is None
                else tokenizer.decode(prompt_ids)
                for prompt, prompt_ids in zip(prompts, ids, strict=True)
                for _ in range(samples_per_prompt)
                if body.echo
            ],
        )
        return await writer.respond(body, request.receive)


@router.post("/v1/chat/completions", responses=openapi.CHAT_COMPLETION_RESPONSE)
async def chat(body: protocol.ChatRequest, request: Request, service: ServiceDep) -> Response:
    """Generate the assistant's next message of a conversation.

    A model that was not fine-tuned for chat gets a plain dialogue as its prompt; the field `nextword.chat_template` and a
    header report which template was used. The response never exceeds the context length.
    """
    service.check_model(body.model)
    n, context_length = body.n or 1, service.context_length
    limits = (body.max_completion_tokens, body.max_tokens, context_length)
    max_tokens = min(context_length, next(limit for limit in limits if limit is not None))
    validate_request(body, n, n, n, max_tokens)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid_field("top_logprobs", "requires logprobs")
    with service.worker.admit(n) as handle:
        conversation, dropped = to_conversation(body.messages), 0
        if body.truncation == "auto":
            ids, dropped = await encode_newest_turns(service.chat_encoder, conversation, context_length, max_tokens)
        else:
            service.check_conversation(conversation)
            ids = await service.chat_encoder.encode(conversation)
        service.check_context(len(ids), "messages")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        sampling = body.to_sampling(
            service.model.tokenizer.vocab_size,
            service.model.sampling_defaults,
            service.chat_encoder.stop_strings,
            logprobs=logprobs,
            max_tokens=min(max_tokens, max(1, context_length - len(ids))),
        )
        requests = await build_requests(service, body, [ids], n, sampling)
        writer = ChatCompletionWriter(service, handle, requests, logprobs, dropped)
        return await writer.respond(body, request.receive)


@router.get("/v1/models", responses=openapi.MODEL_LIST_RESPONSE)
async def models(service: ServiceDep) -> Response:
    """List the served model and its capabilities."""
    service.check_model()
    return UTF8JSONResponse({"object": "list", "data": [service.model_info()]})


@router.get("/v1/models/{name:path}", responses=openapi.MODEL_RESPONSE)
async def model(name: str, service: ServiceDep) -> Response:
    """Retrieve a model by name."""
    if not name:  # /v1/models/
        return await models(service)
    service.check_model(name)
    return UTF8JSONResponse(service.model_info())


@router.post("/v1/embeddings", responses=openapi.EMBEDDINGS_RESPONSE)
async def embeddings(body: protocol.EmbeddingRequest, request: Request, service: ServiceDep) -> Response:
    """Embed texts: the mean of the final hidden states over the tokens, L2-normalized."""
    service.check_model(body.model)
    embedding_dim, inputs = service.model.gpt.config.d_model, list_prompts(body.input)
    if body.dimensions not in (None, embedding_dim):
        raise invalid_field("dimensions", f"this model's embeddings have {embedding_dim} dimensions")
    if "" in inputs:
        raise invalid_field("input", "must not be empty")
    data: list[dict[str, Any]] = []
    tokens = 0
    handle = service.worker.admit(1)
    async with cancel_on_disconnect(request.receive, handle):
        for index, prompt in enumerate(inputs):
            ids = await service.encode_prompt(prompt, "input")
            handle.raise_if_failed()
            vector = await service.embed(ids)
            tokens += len(ids)
            packed = base64.b64encode(struct.pack(f"<{embedding_dim}f", *vector)).decode()
            encoded = packed if body.encoding_format == "base64" else vector
            data.append({"object": "embedding", "index": index, "embedding": encoded})
    service.metrics.prompt_tokens.inc(tokens)
    content = {"object": "list", "data": data, "model": service.name, "usage": make_usage(tokens, 0)}
    extra_fields = {"pooling": "mean of the final hidden states", "normalised": True}
    return UTF8JSONResponse({**content, "nextword": extra_fields})


@router.post("/v1/classify", responses=openapi.CLASSIFY_RESPONSE)
async def classify(body: protocol.ClassifyRequest, request: Request, service: ServiceDep) -> Response:
    """Predictions of a fine-tuned model: `label`, `labels` or `score`, and `probabilities` for each text."""
    service.check_model(body.model)
    data: list[dict[str, Any]] = []
    handle = service.worker.admit(1)
    async with cancel_on_disconnect(request.receive, handle):
        for index, texts in enumerate([body.input] if isinstance(body.input, str) else body.input):
            handle.raise_if_failed()
            prediction = await service.classify([texts] if isinstance(texts, str) else texts, index)
            data.append({"index": index, **prediction})
    return UTF8JSONResponse({"object": "list", "data": data, "model": service.name})


@router.post("/tokenize", responses=openapi.TOKENIZE_RESPONSE)
async def tokenize(body: protocol.TokenizeRequest, request: Request, service: ServiceDep) -> Response:
    """Tokenize a text or a conversation.

    Special tokens inside a text are encoded as text. A prompt that is exactly one special token returns its id: lm-eval
    looks up the end-of-text token this way.
    """
    service.check_model()
    tokenizer = service.model.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise APIError(400, "exactly one of prompt and messages is required", param="prompt")
    async with cancel_on_disconnect(request.receive, service.worker.admit(1)):
        if body.messages is not None:
            ids = await service.chat_encoder.encode(to_conversation(body.messages))
        elif body.prompt in tokenizer.special_tokens:
            ids = [tokenizer.special_tokens[body.prompt]]
        else:
            begin = () if body.add_special_tokens is False else tokenizer.bos_ids
            ids = [*begin, *await service.encode_text(body.prompt or "")]

        def build() -> Response:
            strings = [service.decode_token(id) for id in ids] if body.return_token_strs else None
            content = {"count": len(ids), "max_model_len": service.context_length, "tokens": ids, "token_strs": strings}
            return UTF8JSONResponse(content)

        return await asyncio.to_thread(build)


@router.post("/detokenize", responses=openapi.DETOKENIZE_RESPONSE)
async def detokenize(body: protocol.DetokenizeRequest, request: Request, service: ServiceDep) -> Response:
    """Decode token ids to text, without special tokens."""
    service.check_model()
    ids = service.check_token_ids(body.tokens, "tokens")
    async with cancel_on_disconnect(request.receive, service.worker.admit(1)):
        return UTF8JSONResponse({"prompt": await asyncio.to_thread(service.model.tokenizer.decode, ids)})


@router.get("/tokenizer_info", responses=openapi.TOKENIZER_INFO_RESPONSE)
async def tokenizer_info(service: ServiceDep) -> Response:
    """Tokenizer configuration and special tokens in vLLM's format, as lm-eval's remote tokenizer reads them."""
    service.check_model()
    tokenizer, names = service.model.tokenizer, service.special_token_names
    return UTF8JSONResponse(
        {
            **{k: v for k, v in tokenizer.config.items() if k not in ("auto_map", "added_tokens_decoder")},
            "eos_token": names[tokenizer.eos_id],
            "bos_token": None if tokenizer.bos_id is None else names.get(tokenizer.bos_id),
            "pad_token": None if tokenizer.pad_id is None else names.get(tokenizer.pad_id),
            "chat_template": service.chat_encoder.template,
            "model_max_length": service.context_length,
            "vocab_size": tokenizer.vocab_size,
        }
    )


@router.get("/health", responses=openapi.HEALTH_RESPONSE)
async def health(service: ServiceDep) -> Response:
    """200 while requests are accepted, 503 otherwise."""
    state = service.worker.state
    return UTF8JSONResponse({"status": state, "model": service.name}, 200 if state == "ready" else 503)


@router.get("/metrics", response_class=PlainTextResponse, responses=openapi.METRICS_RESPONSE)
async def metrics(service: ServiceDep) -> Response:
    """Metrics in Prometheus' text format."""
    content = generate_latest(service.metrics.registry)
    return PlainTextResponse(content, media_type="text/plain; version=0.0.4; charset=utf-8")
