"""Conversations to prompt tokens, with the chat template of the model.

A model that nextword fine-tuned for chat uses nextword's own format (`data/chat_format.py`). Any other model uses the Jinja
template in its directory, and a model without one gets a plain dialogue. With the first two, no message content can become a
special token.
"""

import asyncio
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from nextword.common.errors import CorruptFileError, UsageError
from nextword.common.fs import is_json_object, read_text
from nextword.data.chat_format import (
    build_chat_template,
    check_newest_message,
    drop_oldest_turns,
    encode_conversation,
    max_prompt_tokens,
    stop_token_ids,
    supports_chat,
)
from nextword.data.tokenizer import Tokenizer
from nextword.serving.limited_process import LimitedProcess
from nextword.serving.protocol import APIError, invalid_field

MAX_TEMPLATE_CHARS = 2**18

Conversation = Sequence[Mapping[str, str]]


class ChatEncoder(ABC):
    """Encodes conversations for one model.

    Attributes:
        name: "nextword", "model" or "plain"; reported in every response.
        stop_strings: Strings that end a message.
        stop_token_ids: Token ids that end a message.
        template: Jinja template, if there is one.
    """

    name: str
    stop_strings: tuple[str, ...] = ()

    def __init__(self, tokenizer: Tokenizer, template: str | None = None):
        self.tokenizer, self.template, self.stop_token_ids = tokenizer, template, tokenizer.eos_ids

    @abstractmethod
    async def encode(self, conversation: Conversation) -> list[int]:
        """Token ids of a conversation up to the generation prompt. Raises `APIError` if the template rejects it."""

    async def close(self) -> None:  # noqa: B027  # only one of the encoders has any
        """Release the encoder's resources."""


def make_chat_encoder(directory: Path, tokenizer: Tokenizer) -> ChatEncoder:
    """The chat encoder of a model directory.

    The template is `chat_template.jinja`, or `chat_template` in tokenizer_config.json (the one named "default").

    Raises:
        CorruptFileError: The template is invalid.
    """
    file = directory / "chat_template.jinja"
    template: object = (
        read_text(file, 4 * MAX_TEMPLATE_CHARS) if file.is_file() else tokenizer.config.get("chat_template")
    )
    if isinstance(template, list):
        entries = [entry for entry in cast("list[object]", template) if is_json_object(entry)]
        template = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    if template is not None and (not isinstance(template, str) or len(template) > MAX_TEMPLATE_CHARS):
        message = f"the chat template is not a string of at most {MAX_TEMPLATE_CHARS:,} characters"
        raise CorruptFileError(f"{directory}: {message}")
    if supports_chat(tokenizer) and template in (None, build_chat_template(tokenizer)):
        return NativeChatEncoder(tokenizer)
    return PlainChatEncoder(tokenizer) if template is None else JinjaChatEncoder(tokenizer, template)


async def encode_newest_turns(
    encoder: ChatEncoder, conversation: Conversation, context_length: int, max_tokens: int
) -> tuple[list[int], int]:
    """As `nextword.data.chat_format.encode_newest_turns`, with any chat template.

    The steps grow from the newest turn on, so that the cost depends on what is kept, and hardly on what is dropped.

    Raises:
        APIError: The newest message is too long, or cannot be encoded.
    """
    options, limit = drop_oldest_turns(conversation), max_prompt_tokens(context_length, max_tokens)
    index, step = len(options) - 1, 1
    ids = await encoder.encode(options[index])
    while step and index:
        more = await encoder.encode(options[max(0, index - step)])
        if len(more) <= limit:
            ids, index, step = more, max(0, index - step), 2 * step
        else:
            step //= 2
    try:
        check_newest_message(len(ids), context_length)
    except UsageError as error:
        raise APIError(400, str(error), param="messages", code="context_length_exceeded") from error
    return ids, len(conversation) - len(options[index])


class NativeChatEncoder(ChatEncoder):
    """nextword's own chat format: special tokens by id, message contents encoded separately."""

    name = "nextword"

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer, build_chat_template(tokenizer))
        self.stop_token_ids = stop_token_ids(tokenizer)

    async def encode(self, conversation: Conversation) -> list[int]:
        """Token ids of a conversation. Raises `APIError` for a role that the format does not have."""
        try:
            return await asyncio.to_thread(
                lambda: encode_conversation(self.tokenizer, conversation, add_generation_prompt=True)[0]
            )
        except UsageError as error:
            raise invalid_field("messages", str(error)) from error


class PlainChatEncoder(ChatEncoder):
    """A plain-text dialogue for models without a chat template. A message can imitate another turn here, because there are
    no special tokens to separate them."""

    name = "plain"
    stop_strings = ("\nUser:",)

    async def encode(self, conversation: Conversation) -> list[int]:
        """Token ids of the dialogue."""
        names = {"user": "User: ", "assistant": "Assistant: ", "system": "", "tool": "Tool: "}
        turns = [names[message["role"]] + message["content"] for message in conversation]
        ids = await asyncio.to_thread(self.tokenizer.encode, "\n".join([*turns, "Assistant:"]))
        return [*self.tokenizer.bos_ids, *ids]


class JinjaChatEncoder(ChatEncoder):
    """The model's own Jinja template, rendered in a separate process (see `limited_worker`)."""

    name = "model"

    def __init__(self, tokenizer: Tokenizer, template: str):
        super().__init__(tokenizer, template)
        self.special_tokens: dict[str, Any] = {}
        for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token: object = tokenizer.config.get(role)
            content = token.get("content") if is_json_object(token) else token
            if content is not None:
                self.special_tokens[role] = content
        self.renderer = LimitedProcess()

    async def encode(self, conversation: Conversation) -> list[int]:
        """Encode a conversation so that no message content becomes a special token.

        The template renders random placeholders instead of the contents. The output is split at special tokens, which can
        only come from the template. The contents then replace the placeholders, and each segment is encoded as plain text.
        """
        nonce = f"{secrets.randbits(128):039}"  # digits are not changed by upper or lower filters
        contents: dict[str, str] = {}
        messages: list[dict[str, str]] = []
        for number, message in enumerate(conversation):
            content = message["content"]
            key, stripped = f"{nonce}{number:06}", content.strip()
            contents[key] = stripped
            # The template may trim white space around a content, and may test whether it is empty.
            messages.append({**message, "content": content.replace(stripped, key, 1) if stripped else content})
        text = await self.render(messages)
        return await asyncio.to_thread(self.encode_rendered, text, nonce, contents)

    def encode_rendered(self, text: str, nonce: str, contents: Mapping[str, str]) -> list[int]:
        """Encode a rendered template.

        Args:
            text: The template with placeholders.
            nonce: The beginning of each placeholder.
            contents: Content by placeholder.

        Raises:
            APIError: The template splits a placeholder, or the text is empty.
        """
        for token in self.tokenizer.backend.get_added_tokens_decoder().values():  # some strip adjacent white space
            if token.special and (token.lstrip or token.rstrip):
                parts = text.split(token.content)
                for i in range(len(parts) - 1):
                    parts[i] = parts[i].rstrip() if token.lstrip else parts[i]
                    parts[i + 1] = parts[i + 1].lstrip() if token.rstrip else parts[i + 1]
                text = token.content.join(parts)
        markers = self.tokenizer.special_tokens
        names = sorted(markers, key=len, reverse=True)
        ids: list[int] = []
        for i, part in enumerate(re.split("(" + "|".join(map(re.escape, names)) + ")", text)):
            if i % 2:
                ids.append(markers[part])
                continue
            segment = re.sub(f"{nonce}[0-9]{{6}}", lambda match: contents[match[0]], part)
            if nonce[:12] in segment or nonce[-12:] in segment:
                raise APIError(500, "the model's chat template splits message contents, which is not supported")
            ids += (self.tokenizer.mid_text if i else self.tokenizer).encode(segment) if segment else []
        if not ids:
            raise invalid_field("messages", "the model's chat template renders this conversation to an empty prompt")
        return ids

    async def render(self, messages: list[dict[str, str]]) -> str:
        """Render the template.

        Raises:
            APIError: The template rejects the conversation, or exceeds the time or memory limit.
        """
        values = {"messages": messages, "add_generation_prompt": True, "tools": None, "documents": None}
        values |= self.special_tokens
        response = await self.renderer.call(template=self.template, values=values)
        if response is None:
            raise APIError(500, "the model's chat template exceeded the time or memory limit")
        if "error" in response:
            raise APIError(400, f"the model's chat template rejects this conversation: {response['error'][:500]}")
        return response["text"]

    async def close(self) -> None:
        """Terminate the process."""
        await self.renderer.close()
