"""The routes of the API. Each says what it takes and gives; how texts are written is in `writing`, limits in `protocol`."""

import base64
import struct
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse
from starlette.responses import Response

from nextword.serving import openapi
from nextword.serving.engine_worker import Ask
from nextword.serving.protocol import (
    JSON,
    MAX_TOKENS_IN_ALL,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Generation,
    Refusal,
    TokenizeRequest,
)
from nextword.serving.responses import ChatForm, Form, usage_of
from nextword.serving.service import Service
from nextword.serving.streaming import Writing, watching

router = APIRouter(default_response_class=JSON, responses=openapi.ERRORS)
COMPLETION_TOKENS = 16  # what max_tokens is where it is not said, as in OpenAI's API
TEMPLATE_HEADER = "X-Nextword-Chat-Template"


async def service_of(request: Request) -> Service:
    return request.app.state.service


Served = Annotated[Service, Depends(service_of)]


def checked(asked: Generation, n: int, best_of: int, texts: int, max_tokens: int) -> None:
    """Raises `Refusal` for settings that exclude each other, or ask for too much together."""
    if texts * max_tokens > MAX_TOKENS_IN_ALL:
        message = f"{texts} texts of {max_tokens:,} tokens are more than the {MAX_TOKENS_IN_ALL:,} of one request"
        raise Refusal(400, message, param="max_tokens")
    if best_of < n:
        raise Refusal(400, f"best_of: {best_of} texts cannot give the best {n}", param="best_of")
    if asked.stream and best_of > n:
        raise Refusal(400, "best_of: a stream cannot take back what it has shown; leave out stream", param="best_of")
    if asked.stream_options is not None and not asked.stream:
        raise Refusal(400, "stream_options: only with stream", param="stream_options")


@router.post("/v1/completions", responses=openapi.COMPLETION)
async def completions(asked: CompletionRequest, request: Request, service: Served) -> Response:
    """Text that goes on from a prompt, a list of them, or token ids. It may run past the context length: the window slides."""
    service.named(asked.model)
    prompts, n = asked.prompts(), asked.n or 1
    each = n if asked.best_of is None else asked.best_of
    max_tokens = COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
    checked(asked, n, each, len(prompts) * each, max_tokens)
    if asked.suffix:
        raise Refusal(400, "suffix: this model cannot write what stands before a text", param="suffix")
    with service.worker.enter(len(prompts) * each) as ticket:
        # The log-probability of what is drawn decides which texts are the best.
        logprobs = 0 if asked.logprobs is None and each > n else asked.logprobs
        sampling = asked.sampling(
            service.model.tokenizer.vocab_size, stop=asked.stops, logprobs=logprobs, max_tokens=max_tokens,
            prompt_logprobs=asked.logprobs if asked.echo else None,
        )  # fmt: skip
        keep = asked.truncate_prompt_tokens
        ids = [await service.prompt_ids(prompt, keep=keep) for prompt in prompts]
        held = await service.constraints(asked.schema_of_answer(), len(ids) * each)
        index = [None if asked.seed is None else i % each for i in range(len(held))]
        asks = [Ask(ids[i // each], sampling, index[i], held[i]) for i in range(len(held))]
        echoes = []
        if asked.echo:
            decode = service.model.tokenizer.decode
            said = [p if isinstance(p, str) and keep is None else decode(i) for p, i in zip(prompts, ids, strict=True)]
            echoes = [said[i // each] for i in range(len(held))]
        form = Form(service.words, service.chat.ends, asked.logprobs, echoes)
        writing = Writing(ticket, asks, form, service.name, prompts=len(ids), choices=n, more={})
        return await writing.respond(asked, request.receive, {})


@router.post("/v1/chat/completions", responses=openapi.CHAT)
async def chat(asked: ChatRequest, request: Request, service: Served) -> Response:
    """An assistant's answer to a conversation. A model that has learned none is shown a plain dialogue, and the field
    `nextword.chat_template` and a header say so. No answer slides out of the context: it is as long as there is room."""
    service.named(asked.model)
    n = asked.n or 1
    wanted = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
    wanted = service.context_length if wanted is None else min(wanted, service.context_length)
    checked(asked, n, n, n, wanted)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Refusal(400, "top_logprobs: only with logprobs", param="top_logprobs")
    with service.worker.enter(n) as ticket:
        ids = service.fitting(await service.chat.encode(asked.conversation()), "messages")
        room = max(1, service.context_length - len(ids))
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        sampling = asked.sampling(
            service.model.tokenizer.vocab_size, stop=(*asked.stops, *service.chat.stops), logprobs=logprobs,
            max_tokens=min(room, wanted),
        )  # fmt: skip
        held = await service.constraints(asked.schema_of_answer(), n)
        asks = [Ask(ids, sampling, None if asked.seed is None else i, held[i]) for i in range(n)]
        form = ChatForm(service.words, service.chat.ends, logprobs)
        more = {"nextword": {"chat_template": service.chat.name}}
        writing = Writing(ticket, asks, form, service.name, prompts=1, choices=n, more=more)
        return await writing.respond(asked, request.receive, {TEMPLATE_HEADER: service.chat.name})


@router.get("/v1/models", responses=openapi.MODELS)
async def models(service: Served) -> Response:
    """The one model that is served, and what it can."""
    service.ready()
    return JSON({"object": "list", "data": [service.facts()]})


@router.get("/v1/models/{name:path}", responses=openapi.MODEL)
async def model(name: str, service: Served) -> Response:
    """The same, by its name."""
    service.named(name)
    return JSON(service.facts())


@router.post("/v1/embeddings", responses=openapi.EMBEDDINGS)
async def embeddings(asked: EmbeddingRequest, request: Request, service: Served) -> Response:
    """A vector for each text: the mean of the model's final hidden states over its tokens, scaled to length 1."""
    service.named(asked.model)
    width = service.model.gpt.config.d_model
    if asked.dimensions not in (None, width):
        raise Refusal(400, f"dimensions: this model's vectors have {width}, no fewer and no more", param="dimensions")
    if "" in asked.inputs():
        raise Refusal(400, "input: an empty text has no vector", param="input")
    data: list[dict[str, Any]] = []
    tokens = 0
    ticket = service.worker.enter(1)
    async with watching(request.receive, ticket):
        for index, prompt in enumerate(asked.inputs()):
            ids = await service.prompt_ids(prompt, "input")
            ticket.check()
            vector = await service.embed(ids)
            tokens += len(ids)
            packed = base64.b64encode(struct.pack(f"<{width}f", *vector)).decode()
            told = packed if asked.encoding_format == "base64" else vector
            data.append({"object": "embedding", "index": index, "embedding": told})
    service.metrics.prompt_tokens.add(tokens)
    more = {"pooling": "mean of the final hidden states", "normalised": True}
    return JSON({"object": "list", "data": data, "model": service.name, "usage": usage_of(tokens, 0), "nextword": more})


@router.post("/v1/classify", responses=openapi.CLASSES)
async def classify(asked: ClassifyRequest, request: Request, service: Served) -> Response:
    """What a fine-tuned model says of each text: `label`, `labels` or `score`, and `probabilities`."""
    service.named(asked.model)
    data = []
    ticket = service.worker.enter(1)
    async with watching(request.receive, ticket):
        for index, texts in enumerate(asked.examples()):
            ticket.check()
            data.append({"index": index, **await service.classify(texts, index)})
    return JSON({"object": "list", "data": data, "model": service.name})


@router.post("/tokenize", responses=openapi.TOKENS)
async def tokenize(asked: TokenizeRequest, service: Served) -> Response:
    """The ids of a text, or of a conversation. Markers in a text are text; a prompt that is nothing but a marker is asked for
    its id (so lm-eval learns which one ends a text)."""
    service.ready()
    tokenizer = service.model.tokenizer
    if (asked.prompt is None) == (asked.messages is None):
        raise Refusal(400, "say either prompt or messages", param="prompt")
    if asked.messages is not None:
        ids = await service.chat.encode([message.to_dict(i) for i, message in enumerate(asked.messages)])
    elif asked.prompt in tokenizer.markers:
        ids = [tokenizer.markers[asked.prompt]]
    else:
        ids = await service.text_ids(asked.prompt or "")
        if tokenizer.begin_of_text is not None and asked.add_special_tokens is not False:
            ids = [tokenizer.begin_of_text, *ids]
    strings = [service.words.text(id) for id in ids] if asked.return_token_strs else None
    return JSON({"count": len(ids), "max_model_len": service.context_length, "tokens": ids, "token_strs": strings})


@router.post("/detokenize", responses=openapi.PROMPT)
async def detokenize(asked: DetokenizeRequest, service: Served) -> Response:
    """The text of ids, special tokens left out."""
    service.ready()
    tokenizer = service.model.tokenizer
    if asked.tokens and (largest := max(asked.tokens)) >= tokenizer.vocab_size:
        raise Refusal(400, f"tokens: {largest} is no token id; there are {tokenizer.vocab_size}", param="tokens")
    return JSON({"prompt": tokenizer.decode(asked.tokens)})


@router.get("/tokenizer_info", responses=openapi.TOKENIZER)
async def tokenizer_info(service: Served) -> Response:
    """What lm-eval's remote tokenizer asks for, as vLLM gives it: the tokenizer's configuration and its special tokens."""
    service.ready()
    tokenizer = service.model.tokenizer
    names = {id: name for name, id in tokenizer.markers.items()}
    begin, pad = tokenizer.begin_of_text, tokenizer.pad
    return JSON(
        {
            **{k: v for k, v in tokenizer.config.items() if k not in ("auto_map", "added_tokens_decoder")},
            "eos_token": names[tokenizer.end_of_text],
            "bos_token": None if begin is None else names.get(begin),
            "pad_token": None if pad is None else names.get(pad),
            "chat_template": service.chat.template,
            "model_max_length": service.context_length,
            "vocab_size": tokenizer.vocab_size,
        }
    )


@router.get("/health", responses=openapi.HEALTH)
async def health(service: Served) -> Response:
    """200 while requests are let in, else 503."""
    state = service.worker.state
    return JSON({"status": state, "model": service.name}, 200 if state == "ready" else 503)


@router.get("/metrics", response_class=PlainTextResponse, responses=openapi.METRICS)
async def metrics(service: Served) -> Response:
    """Counters for Prometheus."""
    return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
