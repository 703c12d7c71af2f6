"""Response schemas for /openapi.json (OpenAPI 3.1, JSON Schema). A test validates real responses against them."""

from typing import Any

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
NULL: Schema = {"type": "null"}
JSON_MEDIA_TYPE = "application/json"


def any_of(*schemas: Schema) -> Schema:
    return {"anyOf": [*schemas]}


def array_of(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def map_of(schema: Schema) -> Schema:
    return {"type": "object", "additionalProperties": schema}


def object_of(**fields: Schema) -> Schema:
    """An object with these required fields, and possibly others."""
    return {"type": "object", "properties": fields, "required": [*fields]}


def const(value: str) -> Schema:
    return {"const": value}


def response(schema: Schema, description: str = "Success.", status: int = 200, stream: bool = False) -> dict[Any, Any]:
    """The `responses` argument of a route."""
    content: dict[str, Any] = {JSON_MEDIA_TYPE: {"schema": schema}}
    if stream:
        content["text/event-stream"] = {"itemSchema": object_of(data=STRING)}
    return {status: {"description": description, "content": content}}


NULLABLE_STRING = any_of(STRING, NULL)
ERROR_SCHEMA = object_of(error=object_of(message=STRING, type=STRING, param=NULLABLE_STRING, code=NULLABLE_STRING))
ERROR_RESPONSES: dict[Any, Any] = {
    "default": {"description": "An error in OpenAI's format.", "content": {JSON_MEDIA_TYPE: {"schema": ERROR_SCHEMA}}}
}
USAGE_SCHEMA = object_of(prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER)
FINISH_REASON = {"enum": ["stop", "length"]}


def completion_schema(object_type: str, **choice_fields: Schema) -> Schema:
    return object_of(
        id=STRING,
        object=const(object_type),
        created=INTEGER,
        model=STRING,
        system_fingerprint=NULL,
        usage=USAGE_SCHEMA,
        choices=array_of(object_of(index=INTEGER, finish_reason=FINISH_REASON, **choice_fields)),
    )


COMPLETION_RESPONSE = response(
    completion_schema(
        "text_completion",
        text=STRING,
        logprobs=any_of(
            NULL,
            object_of(
                tokens=array_of(STRING),
                token_logprobs=array_of(any_of(NUMBER, NULL)),
                top_logprobs=array_of(any_of(map_of(NUMBER), NULL)),
                text_offset=array_of(INTEGER),
            ),
        ),
    ),
    "The completions; with `stream`, server-sent events with chunks of them.",
    stream=True,
)
TOKEN_LOGPROB_FIELDS = {"token": STRING, "logprob": NUMBER, "bytes": array_of(INTEGER)}
CHAT_COMPLETION_RESPONSE = response(
    completion_schema(
        "chat.completion",
        message=object_of(role=const("assistant"), content=STRING, refusal=NULL),
        logprobs=any_of(
            NULL,
            object_of(
                content=array_of(
                    object_of(**TOKEN_LOGPROB_FIELDS, top_logprobs=array_of(object_of(**TOKEN_LOGPROB_FIELDS)))
                ),
                refusal=NULL,
            ),
        ),
    ),
    "The messages; with `stream`, server-sent events with chunks of them.",
    stream=True,
)
MODEL_SCHEMA = object_of(
    id=STRING, object=const("model"), created=INTEGER, owned_by=STRING, max_model_len=INTEGER, nextword=object_of()
)
MODEL_RESPONSE = response(MODEL_SCHEMA)
MODEL_LIST_RESPONSE = response(object_of(object=const("list"), data=array_of(MODEL_SCHEMA)))
EMBEDDINGS_RESPONSE = response(
    object_of(
        object=const("list"),
        model=STRING,
        usage=USAGE_SCHEMA,
        data=array_of(object_of(object=const("embedding"), index=INTEGER, embedding=any_of(array_of(NUMBER), STRING))),
    )
)
CLASSIFY_RESPONSE = response(object_of(object=const("list"), model=STRING, data=array_of(object_of(index=INTEGER))))
TOKENIZE_RESPONSE = response(
    object_of(count=INTEGER, max_model_len=INTEGER, tokens=array_of(INTEGER), token_strs=any_of(array_of(STRING), NULL))
)
DETOKENIZE_RESPONSE = response(object_of(prompt=STRING))
TOKENIZER_INFO_RESPONSE = response(
    object_of(
        eos_token=STRING,
        bos_token=NULLABLE_STRING,
        pad_token=NULLABLE_STRING,
        chat_template=NULLABLE_STRING,
        model_max_length=INTEGER,
    )
)
HEALTH_SCHEMA = object_of(status=STRING, model=STRING)
HEALTH_RESPONSE = {
    **response(HEALTH_SCHEMA),
    **response(HEALTH_SCHEMA, "No requests are accepted: the model is loading, or the server is stopping.", 503),
}
METRICS_RESPONSE: dict[Any, Any] = {
    200: {"description": "Metrics in Prometheus' text format.", "content": {"text/plain": {"schema": STRING}}}
}
