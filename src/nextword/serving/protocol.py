"""Request bodies of the OpenAI-compatible API, their limits, and error responses.

A known field with a wrong type or value is rejected by name, and so is a field of another server that would change the
response (`UNSUPPORTED_FIELDS`). Other unknown fields are ignored, because clients send many that a server does not know.
"""

import asyncio
import codecs
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Annotated, Any, Literal, cast, get_type_hints

from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from nextword.common import numbers
from nextword.common.errors import UsageError
from nextword.common.numbers import Range
from nextword.data.chat_format import ROLE_NAMES, content_text
from nextword.inference.sampling import Sampling

MAX_BODY_BYTES = 4 * 2**20  # of one request
MAX_TOTAL_BODY_BYTES = 16 * 2**20  # of all requests in progress; as Python objects they take up to 24 times as much
THREAD_BODY_BYTES = 2**16  # from this size on a body is parsed in a thread
MAX_TEXT_CHARS = 2**20  # of one text
MAX_COMPLETION_TOKENS = 2**15  # of one sequence
MAX_REQUEST_TOKENS = 2**17  # of all sequences of a request
MAX_CHOICES = 128  # n and best_of
MAX_PROMPTS = 1024  # of one request
MAX_MESSAGES = 1024
MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS = 4, 500
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
ANY_OBJECT = {"type": "object"}  # the JSON schema of `json_object`
MIN_TOP_P = 1e-12  # top_p = 0 means greedy decoding in OpenAI's API


def encode_json(value: object) -> bytes:
    """JSON in UTF-8. Lone surrogates, which UTF-8 cannot encode, stay escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


class UTF8JSONResponse(JSONResponse):
    """A JSON response that any Python string can be part of."""

    def render(self, content: object) -> bytes:
        """Encode the content with `encode_json`."""
        return encode_json(content)


class APIError(Exception):
    """An error response in OpenAI's format.

    Args:
        status: HTTP status code.
        message: What is wrong and what to do.
        param: Request field that caused the error.
        code: Machine-readable error code.
        headers: Additional response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> UTF8JSONResponse:
        """The HTTP response."""
        return UTF8JSONResponse(self.body, self.status, self.headers)


class ClientDisconnected(Exception):
    """The client closed the connection."""


def invalid_field(param: str, message: str, code: str | None = None) -> APIError:
    """The error (400) of a request field with an invalid value."""
    return APIError(400, f"{param}: {message}", param=param, code=code)


# ---------------------------------------------------------------- request bodies

TextInput = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS)]
TokenId = Annotated[int, Range(0, 2**31 - 1)]
# Validation stops at the first error: a list of a million wrong numbers would give a million errors.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_REQUEST_TOKENS)]
TextInputs = Annotated[list[TextInput], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
TokenIdsList = Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_STRING_CHARS)]
StopStrings = Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)]
ChoiceCount = Annotated[int, Range(1, MAX_CHOICES)]
LogprobCount = Annotated[int, Range(0, MAX_LOGPROBS)]
TokenLimit = Annotated[int, Range(0, MAX_COMPLETION_TOKENS)]
CountOrMinusOne = Annotated[int, Range(-1, 10**15)]  # -1 is the value of a parameter that is off
Prompts = Annotated[TextInput | TokenIds | TextInputs | TokenIdsList, Field(union_mode="left_to_right")]
SAMPLING_FIELDS = {"temperature", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed"}
# Fields of OpenAI's API, vLLM and llama.cpp that change a response and that this server does not have, unless they are empty,
# false or zero, or have one of the values that ask for nothing.
UNSUPPORTED_NAMES = """
    tools functions function_call tool_calls audio web_search_options documents prefix chat_template chat_template_kwargs
    guided_json guided_regex guided_choice guided_grammar structured_outputs grammar json_schema continue_final_message
    stop_token_ids bad_words allowed_token_ids logits_processors ignore_eos min_tokens include_stop_str_in_output
    echo suffix top_logprobs prompt_logprobs prompt_embeds truncate_prompt_tokens max_completion_tokens
    use_beam_search mirostat dry_multiplier xtc_probability dynatemp_range
"""
NOTHING: tuple[object, ...] = (None, False, 0, "", [], {})
UNSUPPORTED_FIELDS: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(UNSUPPORTED_NAMES.split(), NOTHING),
    **dict.fromkeys(("best_of", "length_penalty", "repeat_penalty", "typical_p", "tfs_z"), (*NOTHING, 1)),
    **dict.fromkeys(("skip_special_tokens", "add_generation_prompt"), (None, True)),
    "tool_choice": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "truncation": (None, "disabled"),
    "n_predict": (None, -1),
}


def check_biases(value: Any) -> Any:
    """Raises `ValueError` for too many biases, before pydantic reports an error for each."""
    if isinstance(value, Sized) and len(value) > MAX_LOGIT_BIASES:
        raise ValueError(f"at most {MAX_LOGIT_BIASES} tokens")
    return value


def list_prompts(prompts: Prompts) -> Sequence[str | list[int]]:
    """The prompts of a field that takes one or several, each a text or token ids."""
    is_single = isinstance(prompts, str) or isinstance(prompts[0], int)
    return cast("Sequence[str | list[int]]", [prompts] if is_single else prompts)


class RequestModel(BaseModel):
    """Base of request bodies. Types are strict: "5" is not a number and 1 is not true."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, populate_by_name=True)

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported_fields(cls, values: Any) -> Any:
        """Raises `PydanticCustomError` for a field that would change the response if this server had it."""
        for name in UNSUPPORTED_FIELDS.keys() - cls.model_fields.keys() if isinstance(values, dict) else ():
            if name in values and values[name] not in UNSUPPORTED_FIELDS[name]:
                raise PydanticCustomError("unsupported_field", "not supported by this server", {"field": name})
        return cast("dict[str, object] | object", values)


class StreamOptions(RequestModel):
    """Options of a streamed response."""

    include_usage: bool | None = None


class JSONSchema(RequestModel):
    """The JSON schema of a structured response."""

    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class ResponseFormat(RequestModel):
    """The form of the generated text. Clients of other servers put the schema beside the type."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class BaseCompletionRequest(RequestModel):
    """Fields shared by completion and chat completion requests."""

    temperature: numbers.Temperature | None = None
    top_p: numbers.Share | None = None
    top_k: CountOrMinusOne | None = None
    min_p: numbers.Share | None = None
    repetition_penalty: numbers.RepetitionPenalty | None = None
    presence_penalty: numbers.Penalty | None = None
    frequency_penalty: numbers.Penalty | None = None
    logit_bias: Annotated[dict[str, numbers.Penalty], BeforeValidator(check_biases)] | None = None
    max_tokens: TokenLimit | None = None
    n: ChoiceCount | None = None
    stop: StopString | StopStrings | None = None
    seed: numbers.Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    def response_schema(self) -> dict[str, Any] | None:
        """The JSON schema of a structured response, or None. Raises `APIError` if its type and its schema do not match."""
        response_format = self.response_format
        if response_format is None:
            return None
        nested = response_format.json_schema
        schemas = [schema for schema in (response_format.schema_, nested and nested.schema_) if schema is not None]
        if response_format.type == "text" and schemas:
            raise invalid_field("response_format", 'type "text" has no schema: use "json_schema"')
        if response_format.type == "json_schema" and not schemas:
            param = "response_format.json_schema.schema"
            raise APIError(400, "response_format: json_schema needs a schema", param=param)
        if len(schemas) == 2 and schemas[0] != schemas[1]:
            raise invalid_field("response_format", "schema and json_schema.schema differ: send one of them")
        return schemas[0] if schemas else None if response_format.type == "text" else ANY_OBJECT

    def to_sampling(
        self, vocab_size: int, defaults: Sampling, extra_stop: Sequence[str] = (), **overrides: Any
    ) -> Sampling:
        """Sampling parameters for the engine.

        Args:
            vocab_size: Number of token ids.
            defaults: Those of the model, for parameters that the request does not have.
            extra_stop: Stop strings besides those of the request.
            overrides: Parameters that differ between routes.

        Raises:
            APIError: A token id or another value is out of range.
        """
        biases = self.logit_bias or {}
        for token in biases:
            if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < vocab_size):
                raise invalid_field("logit_bias", f"{token[:20]!r} is not a token id (0 to {vocab_size - 1})")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        try:
            return replace(
                defaults,
                **self.model_dump(include=SAMPLING_FIELDS, exclude_none=True),
                top_k=defaults.top_k if self.top_k is None else max(self.top_k, 0),
                top_p=defaults.top_p if self.top_p is None else max(self.top_p, MIN_TOP_P),
                logit_bias={int(token): bias for token, bias in biases.items()} or None,
                stop=(*stop, *extra_stop),
                **overrides,
            )
        except UsageError as error:
            raise APIError(400, str(error)) from error


class CompletionRequest(BaseCompletionRequest):
    """Body of /v1/completions."""

    prompt: Prompts = ""
    best_of: ChoiceCount | None = None
    # As in vLLM: keep this many of the last tokens of a longer prompt, -1 as many as fit. None rejects a longer prompt.
    truncate_prompt_tokens: CountOrMinusOne | None = None
    echo: bool | None = None
    logprobs: LogprobCount | None = None
    suffix: str | None = None


class Part(TypedDict):  # there may be so many that objects would take seconds
    """Part of a message. Only text is supported."""

    type: Literal["text"]
    text: TextInput


class Message(RequestModel):
    """Message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: TextInput | Annotated[list[Part], Field(fail_fast=True, max_length=MAX_MESSAGES)] | None = None


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


def to_conversation(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Role and text of each message. The developer role becomes system; an assistant message may have no content.

    Raises:
        APIError: Another message has no content.
    """
    conversation: list[dict[str, str]] = []
    for index, message in enumerate(messages):
        content = message.content
        if content is None and message.role != "assistant":
            raise APIError(400, "messages: content is required", param=f"messages[{index}].content")
        text = content if isinstance(content, str) else content_text(content or ()) or ""
        conversation.append({"role": ROLE_NAMES.get(message.role, message.role), "content": text})
    return conversation


class ChatRequest(BaseCompletionRequest):
    """Body of /v1/chat/completions."""

    messages: Messages
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None
    max_completion_tokens: TokenLimit | None = None
    # As in OpenAI's Responses API: auto drops the oldest turns of a conversation that is too long, disabled refuses it.
    truncation: Literal["auto", "disabled"] | None = None


class EmbeddingRequest(RequestModel):
    """Body of /v1/embeddings."""

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: numbers.Size | None = None


class ClassifyRequest(RequestModel):
    """One text, several texts, or several examples with several texts each (premise and hypothesis; question and choices)."""

    input: (
        TextInput
        | TextInputs
        | Annotated[list[TextInputs], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    )


class TokenizeRequest(RequestModel):
    """Body of /tokenize."""

    prompt: TextInput | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestModel):
    """Body of /detokenize."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_REQUEST_TOKENS)]


# ---------------------------------------------------------------- validation errors


class JSONRequest(Request):
    """A request whose body is parsed and validated in one go.

    `json.loads` would take seconds for the objects of a large body that no field wants, and nobody else is served meanwhile.
    """

    async def json(self) -> Any:
        """The body as the model of its route. Raises `APIError` if it is none."""
        body = (await self.body()).removeprefix(codecs.BOM_UTF8)
        validate = get_type_hints(self.scope["route"].endpoint)["body"].model_validate_json
        try:
            return validate(body) if len(body) < THREAD_BODY_BYTES else await asyncio.to_thread(validate, body)
        except ValidationError as error:
            raise validation_api_error(error.errors(include_url=False, include_input=False)) from error


class JSONRoute(APIRoute):
    """A route with a `JSONRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of a request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JSONRequest(request.scope, request.receive))

        return handle


def field_path(location: Sequence[int | str]) -> str:
    """Path of a field, such as messages[0].content, from pydantic's error location."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int"):  # not a type of a union
            path += f".{part}"
        else:
            break
    return path.removeprefix(".")


def validation_api_error(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """One API error from pydantic's errors: the first one, with all alternatives if the field is a union."""
    first_error = errors[0]
    location = (*first_error["loc"], *filter(None, [first_error.get("ctx", {}).get("field")]))
    param = field_path(location)
    if first_error["type"] == "json_invalid":
        return APIError(
            400, f"the body is not JSON in UTF-8: {first_error.get('ctx', {}).get('error', 'it cannot be read')}"
        )
    if not param:
        return APIError(400, "the body must be a JSON object with Content-Type: application/json")
    messages = dict.fromkeys(error["msg"] for error in errors if field_path(error["loc"]) == param)
    return invalid_field(param, "; or: ".join(messages))
