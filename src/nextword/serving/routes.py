"""Routes of the OpenAI-compatible API. Limits are in `protocol`, response bodies in `responses` and `streaming`."""

import base64
import struct
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse
from starlette.responses import Response

from nextword.serving import openapi
from nextword.serving.engine_worker import GenerationRequest
from nextword.serving.protocol import (
    MAX_REQUEST_TOKENS,
    APIError,
    BaseCompletionRequest,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
    UTF8JSONResponse,
)
from nextword.serving.responses import ChatCompletionFormatter, CompletionFormatter, make_usage
from nextword.serving.service import Service
from nextword.serving.streaming import ResponseWriter, cancel_on_disconnect

router = APIRouter(default_response_class=UTF8JSONResponse, responses=openapi.ERROR_RESPONSES)
DEFAULT_MAX_TOKENS = 16  # default of max_tokens in /v1/completions, as in OpenAI's API
CHAT_TEMPLATE_HEADER = "X-Nextword-Chat-Template"


async def get_service(request: Request) -> Service:
    return request.app.state.service


ServiceDep = Annotated[Service, Depends(get_service)]


def validate_request(body: BaseCompletionRequest, n: int, best_of: int, num_sequences: int, max_tokens: int) -> None:
    """Check settings that depend on each other.

    Raises:
        APIError: Two settings exclude each other, or the request asks for too many tokens.
    """
    if num_sequences * max_tokens > MAX_REQUEST_TOKENS:
        message = f"{num_sequences} sequences of {max_tokens:,} tokens exceed {MAX_REQUEST_TOKENS:,} tokens per request"
        raise APIError(400, message, param="max_tokens")
    if best_of < n:
        raise APIError(400, f"best_of: must be at least n ({n}), not {best_of}", param="best_of")
    if body.stream and best_of > n:
        raise APIError(400, "best_of: not supported together with stream", param="best_of")
    if body.stream_options is not None and not body.stream:
        raise APIError(400, "stream_options: requires stream", param="stream_options")


@router.post("/v1/completions", responses=openapi.COMPLETION_RESPONSE)
async def completions(body: CompletionRequest, request: Request, service: ServiceDep) -> Response:
    """Complete one or more prompts, given as text or token ids. Beyond the context length the window slides."""
    service.check_model(body.model)
    prompts, n = body.prompts(), body.n or 1
    samples_per_prompt = n if body.best_of is None else body.best_of
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    validate_request(body, n, samples_per_prompt, len(prompts) * samples_per_prompt, max_tokens)
    if body.suffix:
        raise APIError(400, "suffix: this model does not support fill-in-the-middle", param="suffix")
    with service.worker.admit(len(prompts) * samples_per_prompt) as handle:
        # best_of ranks sequences by the log-probabilities of their tokens.
        logprobs = 0 if body.logprobs is None and samples_per_prompt > n else body.logprobs
        sampling = body.to_sampling(
            service.model.tokenizer.vocab_size,
            stop=body.stop_strings,
            logprobs=logprobs,
            max_tokens=max_tokens,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        truncate_to = body.truncate_prompt_tokens
        ids = [await service.encode_prompt(prompt, truncate_to=truncate_to) for prompt in prompts]
        constraints = await service.compile_constraints(body.response_schema(), len(ids) * samples_per_prompt)
        generation_requests = [
            GenerationRequest(
                ids[i // samples_per_prompt],
                sampling,
                None if body.seed is None else i % samples_per_prompt,
                constraint,
            )
            for i, constraint in enumerate(constraints)
        ]
        echoed_prompts = []
        if body.echo:
            decode = service.model.tokenizer.decode
            prompt_texts = [
                p if isinstance(p, str) and truncate_to is None else decode(i)
                for p, i in zip(prompts, ids, strict=True)
            ]
            echoed_prompts = [prompt_texts[i // samples_per_prompt] for i in range(len(constraints))]
        formatter = CompletionFormatter(
            service.token_text, service.chat_encoder.stop_token_ids, body.logprobs, echoed_prompts
        )
        writer = ResponseWriter(
            handle, generation_requests, formatter, service.name, num_prompts=len(ids), num_choices=n
        )
        return await writer.respond(body, request.receive, {})


@router.post("/v1/chat/completions", responses=openapi.CHAT_COMPLETION_RESPONSE)
async def chat(body: ChatRequest, request: Request, service: ServiceDep) -> Response:
    """Generate the assistant's next message of a conversation.

    A model that was not fine-tuned for chat gets a plain dialogue as its prompt; the field `nextword.chat_template` and a
    header report which template was used. The response never exceeds the context length.
    """
    service.check_model(body.model)
    n = body.n or 1
    requested_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    requested_tokens = (
        service.context_length if requested_tokens is None else min(requested_tokens, service.context_length)
    )
    validate_request(body, n, n, n, requested_tokens)
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "top_logprobs: requires logprobs", param="top_logprobs")
    with service.worker.admit(n) as handle:
        ids = service.check_context(await service.chat_encoder.encode(body.to_messages()), "messages")
        available_tokens = max(1, service.context_length - len(ids))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        sampling = body.to_sampling(
            service.model.tokenizer.vocab_size,
            stop=(*body.stop_strings, *service.chat_encoder.stop_strings),
            logprobs=logprobs,
            max_tokens=min(available_tokens, requested_tokens),
        )
        constraints = await service.compile_constraints(body.response_schema(), n)
        generation_requests = [
            GenerationRequest(ids, sampling, None if body.seed is None else i, constraints[i]) for i in range(n)
        ]
        formatter = ChatCompletionFormatter(service.token_text, service.chat_encoder.stop_token_ids, logprobs)
        extra_fields = {"nextword": {"chat_template": service.chat_encoder.name}}
        writer = ResponseWriter(
            handle, generation_requests, formatter, service.name, num_choices=n, extra_fields=extra_fields
        )
        return await writer.respond(body, request.receive, {CHAT_TEMPLATE_HEADER: service.chat_encoder.name})


@router.get("/v1/models", responses=openapi.MODEL_LIST_RESPONSE)
async def models(service: ServiceDep) -> Response:
    """List the served model and its capabilities."""
    service.ensure_ready()
    return UTF8JSONResponse({"object": "list", "data": [service.model_info()]})


@router.get("/v1/models/{name:path}", responses=openapi.MODEL_RESPONSE)
async def model(name: str, service: ServiceDep) -> Response:
    """Retrieve a model by name."""
    service.check_model(name)
    return UTF8JSONResponse(service.model_info())


@router.post("/v1/embeddings", responses=openapi.EMBEDDINGS_RESPONSE)
async def embeddings(body: EmbeddingRequest, request: Request, service: ServiceDep) -> Response:
    """Embed texts: the mean of the final hidden states over the tokens, L2-normalised."""
    service.check_model(body.model)
    embedding_dim = service.model.gpt.config.d_model
    if body.dimensions not in (None, embedding_dim):
        raise APIError(400, f"dimensions: this model's embeddings have {embedding_dim} dimensions", param="dimensions")
    if "" in body.inputs():
        raise APIError(400, "input: must not be empty", param="input")
    data: list[dict[str, Any]] = []
    tokens = 0
    handle = service.worker.admit(1)
    async with cancel_on_disconnect(request.receive, handle):
        for index, prompt in enumerate(body.inputs()):
            ids = await service.encode_prompt(prompt, "input")
            handle.raise_if_failed()
            vector = await service.embed(ids)
            tokens += len(ids)
            packed = base64.b64encode(struct.pack(f"<{embedding_dim}f", *vector)).decode()
            encoded = packed if body.encoding_format == "base64" else vector
            data.append({"object": "embedding", "index": index, "embedding": encoded})
    service.metrics.prompt_tokens.inc(tokens)
    extra_fields = {"pooling": "mean of the final hidden states", "normalised": True}
    return UTF8JSONResponse(
        {
            "object": "list",
            "data": data,
            "model": service.name,
            "usage": make_usage(tokens, 0),
            "nextword": extra_fields,
        }
    )


@router.post("/v1/classify", responses=openapi.CLASSIFY_RESPONSE)
async def classify(body: ClassifyRequest, request: Request, service: ServiceDep) -> Response:
    """Predictions of a fine-tuned model: `label`, `labels` or `score`, and `probabilities` for each text."""
    service.check_model(body.model)
    data = []
    handle = service.worker.admit(1)
    async with cancel_on_disconnect(request.receive, handle):
        for index, texts in enumerate(body.examples()):
            handle.raise_if_failed()
            data.append({"index": index, **await service.classify(texts, index)})
    return UTF8JSONResponse({"object": "list", "data": data, "model": service.name})


@router.post("/tokenize", responses=openapi.TOKENIZE_RESPONSE)
async def tokenize(body: TokenizeRequest, service: ServiceDep) -> Response:
    """Tokenize a text or a conversation.

    Special tokens inside a text are encoded as text. A prompt that is exactly one special token returns its id: lm-eval
    looks up the end-of-text token this way.
    """
    service.ensure_ready()
    tokenizer = service.model.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise APIError(400, "exactly one of prompt and messages is required", param="prompt")
    if body.messages is not None:
        ids = await service.chat_encoder.encode([message.to_dict(i) for i, message in enumerate(body.messages)])
    elif body.prompt in tokenizer.special_tokens:
        ids = [tokenizer.special_tokens[body.prompt]]
    else:
        ids = await service.encode_text(body.prompt or "")
        if tokenizer.bos_id is not None and body.add_special_tokens is not False:
            ids = [tokenizer.bos_id, *ids]
    strings = [service.token_text.decode(id) for id in ids] if body.return_token_strs else None
    return UTF8JSONResponse(
        {"count": len(ids), "max_model_len": service.context_length, "tokens": ids, "token_strs": strings}
    )


@router.post("/detokenize", responses=openapi.DETOKENIZE_RESPONSE)
async def detokenize(body: DetokenizeRequest, service: ServiceDep) -> Response:
    """Decode token ids to text, without special tokens."""
    service.ensure_ready()
    tokenizer = service.model.tokenizer
    if body.tokens and (largest := max(body.tokens)) >= tokenizer.vocab_size:
        raise APIError(
            400,
            f"tokens: {largest} is not a token id; the vocabulary has {tokenizer.vocab_size} tokens",
            param="tokens",
        )
    return UTF8JSONResponse({"prompt": tokenizer.decode(body.tokens)})


@router.get("/tokenizer_info", responses=openapi.TOKENIZER_INFO_RESPONSE)
async def tokenizer_info(service: ServiceDep) -> Response:
    """Tokenizer configuration and special tokens in vLLM's format, as lm-eval's remote tokenizer reads them."""
    service.ensure_ready()
    tokenizer = service.model.tokenizer
    names = {id: name for name, id in tokenizer.special_tokens.items()}
    begin, pad = tokenizer.bos_id, tokenizer.pad_id
    return UTF8JSONResponse(
        {
            **{k: v for k, v in tokenizer.config.items() if k not in ("auto_map", "added_tokens_decoder")},
            "eos_token": names[tokenizer.eos_id],
            "bos_token": None if begin is None else names.get(begin),
            "pad_token": None if pad is None else names.get(pad),
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
    return PlainTextResponse(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
