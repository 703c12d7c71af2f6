"""Request bodies of the OpenAI-compatible API, their limits, and error responses.

Unknown fields are ignored, because clients send many that a server does not know. A known field with a wrong type or value
is rejected by name.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.responses import JSONResponse

from nextword.common.errors import UsageError
from nextword.inference.sampling import Sampling

MAX_BODY_BYTES = 4 * 2**20  # of one request
MAX_TOTAL_BODY_BYTES = 32 * 2**20  # of all requests in progress
MAX_TEXT_CHARS = 2**20  # of one text
MAX_COMPLETION_TOKENS = 2**15  # of one sequence
MAX_REQUEST_TOKENS = 2**17  # of all sequences of a request
MAX_CHOICES = 128  # n and best_of
MAX_PROMPTS = 1024  # of one request
MAX_MESSAGES = 1024
MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS = 4, 500
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_SCHEMA_CHARS = 2**16
MIN_TOP_P = 1e-12  # top_p = 0 means greedy decoding in OpenAI's API


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
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def error_type(self) -> str:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.error_type, "param": self.param, "code": self.code}
        return {"error": error}


def encode_json(value: Any) -> bytes:
    """JSON in UTF-8. Lone surrogates, which UTF-8 cannot encode, stay escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


class UTF8JSONResponse(JSONResponse):
    def render(self, content: Any) -> bytes:
        return encode_json(content)


def error_response(error: APIError) -> UTF8JSONResponse:
    return UTF8JSONResponse(error.body, error.status, error.headers)


# ---------------------------------------------------------------- request bodies

TextInput = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# Validation stops at the first error: a list of a million wrong numbers would give a million errors.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
TextInputs = Annotated[list[TextInput], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
TokenIdsList = Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_STRING_CHARS)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
LogitBias = Annotated[float, Field(ge=-100, le=100)]
ChoiceCount = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
TokenLimit = Annotated[int, Field(ge=0, le=MAX_COMPLETION_TOKENS)]


class RequestModel(BaseModel):
    """Base of request bodies. Types are strict: "5" is not a number and 1 is not true."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, populate_by_name=True)

    model: str | None = None


class StreamOptions(RequestModel):
    include_usage: bool | None = None


class JSONSchema(RequestModel):
    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class ResponseFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class BaseCompletionRequest(RequestModel):
    """Fields shared by completion and chat completion requests."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None  # smaller values make logits infinite
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, LogitBias] | None = None
    max_tokens: TokenLimit | None = None
    n: ChoiceCount | None = None
    stop: StopString | StopStrings | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def response_schema(self) -> dict[str, Any] | None:
        """The JSON schema of a structured response, or None. Raises `APIError` if `json_schema` has no schema."""
        response_format = self.response_format
        if response_format is None or response_format.type == "text":
            return None
        if response_format.type == "json_object":
            return {"type": "object"}
        if response_format.json_schema is None or response_format.json_schema.schema_ is None:
            raise APIError(
                400, "response_format: json_schema needs a schema", param="response_format.json_schema.schema"
            )
        return response_format.json_schema.schema_

    def parse_logit_bias(self, vocab_size: int) -> dict[int, float] | None:
        """Logit biases by token id. Raises `APIError` for an invalid id, or for too many."""
        if len(self.logit_bias or {}) > MAX_LOGIT_BIASES:
            raise APIError(400, f"logit_bias: at most {MAX_LOGIT_BIASES} tokens", param="logit_bias")
        for token in self.logit_bias or {}:
            if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < vocab_size):
                message = f"logit_bias: {token[:20]!r} is not a token id (0 to {vocab_size - 1})"
                raise APIError(400, message, param="logit_bias")
        return {int(token): value for token, value in (self.logit_bias or {}).items()} or None

    def to_sampling(self, vocab_size: int, **overrides: Any) -> Sampling:
        """Sampling parameters for the engine, with OpenAI's defaults. `overrides` are those that differ between routes."""
        try:
            return Sampling(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=self.top_k if self.top_k is not None and self.top_k > 0 else None,
                top_p=None if self.top_p is None else max(self.top_p, MIN_TOP_P),
                min_p=self.min_p,
                repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
                seed=self.seed,
                logit_bias=self.parse_logit_bias(vocab_size),
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                **overrides,
            )
        except UsageError as error:
            raise APIError(400, str(error)) from error


class CompletionRequest(BaseCompletionRequest):
    prompt: TextInput | TokenIds | TextInputs | TokenIdsList = ""
    best_of: ChoiceCount | None = None
    # As in vLLM: keep this many of the last tokens of a longer prompt, -1 as many as fit. None rejects a longer prompt.
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    echo: bool | None = None
    logprobs: LogprobCount | None = None
    suffix: str | None = None

    def prompts(self) -> Sequence[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt  # pyright: ignore[reportReturnType]


class Part(RequestModel):
    type: Literal["text"]
    text: TextInput


class Message(RequestModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: TextInput | Annotated[list[Part], Field(max_length=MAX_MESSAGES)] | None = None

    def to_dict(self, index: int) -> dict[str, str]:
        """Role and text. The developer role becomes system; an assistant message may have no content."""
        content = self.content
        if content is None and self.role != "assistant":
            raise APIError(400, "messages: content is required", param=f"messages[{index}].content")
        text = content if isinstance(content, str) else "\n".join(part.text for part in content or ())
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(BaseCompletionRequest):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None
    max_completion_tokens: TokenLimit | None = None

    def to_messages(self) -> list[dict[str, str]]:
        return [message.to_dict(number) for number, message in enumerate(self.messages)]


class EmbeddingRequest(RequestModel):
    input: TextInput | TokenIds | TextInputs | TokenIdsList
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None

    def inputs(self) -> Sequence[str | list[int]]:
        if isinstance(self.input, str):
            return [self.input]
        return [self.input] if isinstance(self.input[0], int) else self.input  # pyright: ignore[reportReturnType]


class ClassifyRequest(RequestModel):
    """One text, several texts, or several examples with several texts each (premise and hypothesis; question and choices)."""

    input: (
        TextInput
        | TextInputs
        | Annotated[list[TextInputs], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    )

    def examples(self) -> list[list[str]]:
        texts = [self.input] if isinstance(self.input, str) else self.input
        return [[text] if isinstance(text, str) else text for text in texts]


class TokenizeRequest(RequestModel):
    prompt: TextInput | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestModel):
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


# ---------------------------------------------------------------- validation errors


def field_path(location: Sequence[Any]) -> str:
    """Path of a field, such as messages[0].content, from pydantic's error location."""
    name = ""
    for part in location[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int"):  # not a type of a union
            name += f".{part}" if name else part
        else:
            break
    return name


def validation_api_error(errors: Sequence[Any]) -> APIError:
    """One API error from pydantic's errors: the first one, with all alternatives if the field is a union."""
    first_error = errors[0]
    param = field_path(first_error["loc"]) or None
    if first_error["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {first_error.get('ctx', {}).get('error', 'it cannot be read')}")
    if not param:
        return APIError(400, "the body must be a JSON object with Content-Type: application/json")
    messages = dict.fromkeys(error["msg"] for error in errors if (field_path(error["loc"]) or None) == param)
    return APIError(400, f"{param}: {'; or: '.join(messages)}", param=param)


def finite_logprob(logprob: float) -> float:
    """A log-probability that JSON can represent; -inf becomes -9999, as in OpenAI's API."""
    if math.isnan(logprob):
        raise APIError(500, "the logits are not finite: the weights may be damaged, check them with nextword verify")
    return max(logprob, -9999.0)
