"""What the routes answer, as /openapi.json describes it (OpenAPI 3.1, JSON Schema). A test holds answers to it."""

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
NOTHING: Schema = {"type": "null"}
JSON_TYPE = "application/json"


def either(*schemas: Schema) -> Schema:
    return {"anyOf": [*schemas]}


def some(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def by_name(schema: Schema) -> Schema:
    return {"type": "object", "additionalProperties": schema}


def thing(**fields: Schema) -> Schema:
    """An object that has all of these fields, and may have others."""
    return {"type": "object", "properties": fields, "required": [*fields]}


def always(value: str) -> Schema:
    return {"const": value}


def answered(
    schema: Schema, description: str = "The answer.", status: int = 200, stream: bool = False
) -> dict[Any, Any]:
    """What `responses` of a route says."""
    content: dict[str, Any] = {JSON_TYPE: {"schema": schema}}
    if stream:
        content["text/event-stream"] = {"itemSchema": thing(data=TEXT)}
    return {status: {"description": description, "content": content}}


MAYBE_TEXT = either(TEXT, NOTHING)
ERROR = thing(error=thing(message=TEXT, type=TEXT, param=MAYBE_TEXT, code=MAYBE_TEXT))
ERRORS: dict[Any, Any] = {
    "default": {"description": "An error, in OpenAI's form.", "content": {JSON_TYPE: {"schema": ERROR}}}
}
USAGE = thing(prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE)
FINISHED = {"enum": ["stop", "length"]}


def texts(kind: str, **choice: Schema) -> Schema:
    return thing(
        id=TEXT, object=always(kind), created=WHOLE, model=TEXT, system_fingerprint=NOTHING, usage=USAGE,
        choices=some(thing(index=WHOLE, finish_reason=FINISHED, **choice)),
    )  # fmt: skip


COMPLETION = answered(
    texts(
        "text_completion", text=TEXT,
        logprobs=either(
            NOTHING,
            thing(tokens=some(TEXT), token_logprobs=some(either(NUMBER, NOTHING)),
                  top_logprobs=some(either(by_name(NUMBER), NOTHING)), text_offset=some(WHOLE)),
        ),
    ),
    "The texts; with `stream`, events whose data are such objects in parts.", stream=True,
)  # fmt: skip
LIKELY = {"token": TEXT, "logprob": NUMBER, "bytes": some(WHOLE)}
CHAT = answered(
    texts(
        "chat.completion", message=thing(role=always("assistant"), content=TEXT, refusal=NOTHING),
        logprobs=either(
            NOTHING, thing(content=some(thing(**LIKELY, top_logprobs=some(thing(**LIKELY)))), refusal=NOTHING)
        ),
    ),
    "The answers; with `stream`, events whose data are such objects in parts.", stream=True,
)  # fmt: skip
MODEL_FACTS = thing(
    id=TEXT, object=always("model"), created=WHOLE, owned_by=TEXT, max_model_len=WHOLE, nextword=thing()
)
MODEL = answered(MODEL_FACTS)
MODELS = answered(thing(object=always("list"), data=some(MODEL_FACTS)))
EMBEDDINGS = answered(
    thing(
        object=always("list"), model=TEXT, usage=USAGE,
        data=some(thing(object=always("embedding"), index=WHOLE, embedding=either(some(NUMBER), TEXT))),
    )
)  # fmt: skip
CLASSES = answered(thing(object=always("list"), model=TEXT, data=some(thing(index=WHOLE))))
TOKENS = answered(
    thing(count=WHOLE, max_model_len=WHOLE, tokens=some(WHOLE), token_strs=either(some(TEXT), NOTHING))
)  # fmt: skip
PROMPT = answered(thing(prompt=TEXT))
TOKENIZER = answered(
    thing(eos_token=TEXT, bos_token=MAYBE_TEXT, pad_token=MAYBE_TEXT, chat_template=MAYBE_TEXT, model_max_length=WHOLE)
)
STATE = thing(status=TEXT, model=TEXT)
HEALTH = {**answered(STATE), **answered(STATE, "No requests are let in: it is loading, or about to stop.", 503)}
METRICS: dict[Any, Any] = {
    200: {"description": "Numbers in Prometheus's form.", "content": {"text/plain": {"schema": TEXT}}}
}
