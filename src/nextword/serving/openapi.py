"""Response schemas for /openapi.json (OpenAPI 3.1, JSON Schema). A test validates real responses against them."""

from typing import Any

Schema = dict[str, Any]
Responses = dict[int | str, dict[str, Any]]  # the `responses` argument of a route
STRING, INTEGER, NUMBER, NULL = ({"type": name} for name in ("string", "integer", "number", "null"))
JSON_MEDIA_TYPE = "application/json"


def nullable(schema: Schema) -> Schema:
    """The schema of a value that may be null."""
    return {"anyOf": [schema, NULL]}


def array_of(schema: Schema) -> Schema:
    """The schema of an array."""
    return {"type": "array", "items": schema}


def object_of(**fields: Schema) -> Schema:
    """The schema of an object with these required fields, and possibly others."""
    return {"type": "object", "properties": fields, "required": [*fields]}


def list_of(item: Schema, **fields: Schema) -> Schema:
    """The schema of a list in OpenAI's format."""
    return object_of(object={"const": "list"}, data=array_of(item), **fields)


def response(schema: Schema, description: str = "Success.", **other_content: Schema) -> dict[str, Any]:
    """A JSON response, and its content of other media types."""
    return {"description": description, "content": {JSON_MEDIA_TYPE: {"schema": schema}, **other_content}}


def completion_response(noun: str, object_type: str, logprobs: Schema, **choice_fields: Schema) -> Responses:
    """The response with generated text."""
    finish_reason = {"enum": ["stop", "length"]}
    choice = object_of(index=INTEGER, finish_reason=finish_reason, **choice_fields, logprobs=nullable(logprobs))
    schema = object_of(
        id=STRING,
        object={"const": object_type},
        created=INTEGER,
        model=STRING,
        system_fingerprint=NULL,
        usage=USAGE,
        choices=array_of(choice),
    )
    description = f"The {noun}; with `stream`, server-sent events with chunks of them."
    return {200: response(schema, description, **{"text/event-stream": {"itemSchema": object_of(data=STRING)}})}


ERROR = object_of(message=STRING, type=STRING, param=nullable(STRING), code=nullable(STRING))
ERROR_RESPONSES: Responses = {"default": response(object_of(error=ERROR), "An error in OpenAI's format.")}
USAGE = object_of(prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER)
COMPLETION_LOGPROBS = object_of(
    tokens=array_of(STRING),
    token_logprobs=array_of(nullable(NUMBER)),
    top_logprobs=array_of(nullable({"type": "object", "additionalProperties": NUMBER})),
    text_offset=array_of(INTEGER),
)
COMPLETION_RESPONSE = completion_response("completions", "text_completion", COMPLETION_LOGPROBS, text=STRING)
TOKEN_LOGPROB = {"token": STRING, "logprob": NUMBER, "bytes": array_of(INTEGER)}
CHAT_LOGPROBS = object_of(**TOKEN_LOGPROB, top_logprobs=array_of(object_of(**TOKEN_LOGPROB)))
CHAT_COMPLETION_RESPONSE = completion_response(
    "messages",
    "chat.completion",
    object_of(content=array_of(CHAT_LOGPROBS), refusal=NULL),
    message=object_of(role={"const": "assistant"}, content=STRING, refusal=NULL),
)
MODEL = object_of(
    id=STRING, object={"const": "model"}, created=INTEGER, owned_by=STRING, max_model_len=INTEGER, nextword=object_of()
)
MODEL_RESPONSE: Responses = {200: response(MODEL)}
MODEL_LIST_RESPONSE: Responses = {200: response(list_of(MODEL))}
VECTOR = {"anyOf": [array_of(NUMBER), STRING]}
EMBEDDING = object_of(object={"const": "embedding"}, index=INTEGER, embedding=VECTOR)
EMBEDDINGS_RESPONSE: Responses = {200: response(list_of(EMBEDDING, model=STRING, usage=USAGE))}
CLASSIFY_RESPONSE: Responses = {200: response(list_of(object_of(index=INTEGER), model=STRING))}
TOKENS = {"tokens": array_of(INTEGER), "token_strs": nullable(array_of(STRING))}
TOKENIZE_RESPONSE: Responses = {200: response(object_of(count=INTEGER, max_model_len=INTEGER, **TOKENS))}
DETOKENIZE_RESPONSE: Responses = {200: response(object_of(prompt=STRING))}
TOKENIZER_INFO = {name: nullable(STRING) for name in ("bos_token", "pad_token", "chat_template")}
TOKENIZER_INFO_RESPONSE: Responses = {
    200: response(object_of(eos_token=STRING, model_max_length=INTEGER, **TOKENIZER_INFO))
}
HEALTH = object_of(status=STRING, model=STRING)
HEALTH_RESPONSE: Responses = {
    200: response(HEALTH),
    503: response(HEALTH, "No requests are accepted: the model is loading, or the server is stopping."),
}
METRICS_RESPONSE: Responses = {
    200: {"description": "Metrics in Prometheus' text format.", "content": {"text/plain": {"schema": STRING}}}
}
