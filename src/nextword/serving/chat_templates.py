"""Conversations to prompt tokens, with the chat template of the model.

A model that nextword fine-tuned for chat uses nextword's own format (`data/chat_format.py`). Any other model uses the Jinja
template in its directory, and a model without one gets a plain dialogue. With the first two, no message content can become a
special token.
"""

import asyncio
import json
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from nextword.common.errors import CorruptFileError, UsageError
from nextword.data.chat_format import build_chat_template, encode_conversation, stop_token_ids, supports_chat
from nextword.data.tokenizer import Tokenizer
from nextword.serving import template_worker
from nextword.serving.protocol import APIError

MAX_TEMPLATE_CHARS = 2**18
RENDER_GRACE = 0.5  # seconds on top of RENDER_TIMEOUT, for starting the process and reading its output

Conversation = Sequence[Mapping[str, str]]


class ChatEncoder(Protocol):
    """Encodes conversations for one model.

    Attributes:
        name: "nextword", "model" or "plain"; reported in every response.
        stop_strings: Strings that end a message.
        stop_token_ids: Token ids that end a message.
        template: Jinja template, if there is one.
    """

    name: str
    stop_strings: tuple[str, ...]
    stop_token_ids: frozenset[int]
    template: str | None

    async def encode(self, conversation: Conversation) -> list[int]:
        """Token ids of a conversation up to the generation prompt. Raises `APIError` if the template rejects it."""
        ...

    async def close(self) -> None: ...


def make_chat_encoder(directory: Path, tokenizer: Tokenizer) -> ChatEncoder:
    """The chat encoder of a model directory. Raises `CorruptFileError` for an invalid template."""
    chat_template = load_chat_template(directory, tokenizer)
    if supports_chat(tokenizer) and chat_template in (None, build_chat_template(tokenizer)):
        return NativeChatEncoder(tokenizer)
    return PlainChatEncoder(tokenizer) if chat_template is None else JinjaChatEncoder(tokenizer, chat_template)


def load_chat_template(directory: Path, tokenizer: Tokenizer) -> str | None:
    """Content of `chat_template.jinja`, or of `chat_template` in tokenizer_config.json (the one named "default")."""
    file = directory / "chat_template.jinja"
    chat_template = file.read_text(encoding="utf-8") if file.is_file() else tokenizer.config.get("chat_template")
    if isinstance(chat_template, list):
        templates_by_name = {
            entry.get("name"): entry.get("template") for entry in chat_template if isinstance(entry, dict)
        }
        chat_template = templates_by_name.get("default")
    if chat_template is not None and not (isinstance(chat_template, str) and len(chat_template) <= MAX_TEMPLATE_CHARS):
        raise CorruptFileError(
            f"{directory}: the chat template is not a string of at most {MAX_TEMPLATE_CHARS:,} characters"
        )
    return chat_template


class NativeChatEncoder:
    """nextword's own chat format: special tokens by id, message contents encoded separately."""

    name: str = "nextword"
    stop_strings: tuple[str, ...] = ()
    template: str | None

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.stop_token_ids = tokenizer, stop_token_ids(tokenizer)
        self.template = build_chat_template(tokenizer)

    async def encode(self, conversation: Conversation) -> list[int]:
        try:
            return encode_conversation(self.tokenizer, conversation, add_generation_prompt=True)[0]
        except UsageError as error:
            raise APIError(400, f"messages: {error}", param="messages") from error

    async def close(self) -> None:
        pass


class PlainChatEncoder:
    """A plain-text dialogue for models without a chat template. A message can imitate another turn here, because there are
    no special tokens to separate them."""

    name: str = "plain"
    stop_strings: tuple[str, ...] = ("\nUser:",)
    template: str | None = None

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.stop_token_ids = tokenizer, tokenizer.eos_ids

    async def encode(self, conversation: Conversation) -> list[int]:
        names = {"user": "User: ", "assistant": "Assistant: ", "system": "", "tool": "Tool: "}
        turns = [names[message["role"]] + message["content"] for message in conversation]
        ids = self.tokenizer.encode("\n".join([*turns, "Assistant:"]))
        return ids if self.tokenizer.bos_id is None else [self.tokenizer.bos_id, *ids]

    async def close(self) -> None:
        pass


class JinjaChatEncoder:
    """The model's own Jinja template, rendered in a separate process (see `template_worker`)."""

    name: str = "model"
    stop_strings: tuple[str, ...] = ()
    template: str | None

    def __init__(self, tokenizer: Tokenizer, template: str):
        self.tokenizer, self.template, self.stop_token_ids = tokenizer, template, tokenizer.eos_ids
        roles = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {role: tokenizer.config.get(role) for role in roles}
        contents = {role: t.get("content") if isinstance(t, dict) else t for role, t in tokens.items()}
        self.special_tokens = {role: content for role, content in contents.items() if content is not None}
        self.renderer_process: asyncio.subprocess.Process | None = None
        self.lock = asyncio.Lock()

    async def encode(self, conversation: Conversation) -> list[int]:
        """Encode a conversation so that no message content becomes a special token.

        The template renders random placeholders instead of the contents. The output is split at special tokens, which can
        only come from the template. The contents then replace the placeholders, and each segment is encoded as plain text.
        """
        nonce = f"{secrets.randbits(128):039}"  # digits are not changed by upper or lower filters
        contents: dict[str, str] = {}
        messages = []
        for number, message in enumerate(conversation):
            content = message["content"]
            stripped = content.strip()
            key = f"{nonce}{number:06}"
            contents[key] = stripped
            # The template may trim white space around a content, and may test whether it is empty.
            begin = content.index(stripped)
            placeholder_content = content[:begin] + key + content[begin + len(stripped) :] if stripped else content
            messages.append({**message, "content": placeholder_content})
        text = await self.render(messages)
        ids = self._encode_rendered(text, nonce, contents)
        if not ids:
            raise APIError(
                400,
                "messages: the model's chat template renders this conversation to an empty prompt",
                param="messages",
            )
        return ids

    def _encode_rendered(self, text: str, nonce: str, contents: dict[str, str]) -> list[int]:
        for token in self.tokenizer.backend.get_added_tokens_decoder().values():  # some strip adjacent white space
            if token.special and (token.lstrip or token.rstrip):
                name, before, after = re.escape(token.content), r"\s*" * token.lstrip, r"\s*" * token.rstrip
                text = re.sub(before + name + after, lambda match: match[0].strip(), text)
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
        return ids

    async def render(self, messages: list[dict[str, str]]) -> str:
        """Render the template.

        Raises:
            APIError: The template rejects the conversation, or exceeds the time or memory limit.
        """
        values = {
            "messages": messages,
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
            **self.special_tokens,
        }
        request = {"template": self.template, "values": values, "seconds": template_worker.RENDER_TIMEOUT}
        async with self.lock:
            process = await self._ensure_process()
            assert process.stdin is not None and process.stdout is not None
            try:
                async with asyncio.timeout(template_worker.RENDER_TIMEOUT + RENDER_GRACE):
                    process.stdin.write(json.dumps(request).encode() + b"\n")
                    await process.stdin.drain()
                    answer = await process.stdout.readline()
            except (TimeoutError, ConnectionError):
                answer = b""
            if not answer.endswith(b"\n"):
                await self.close()
                raise APIError(500, "the model's chat template exceeded the time or memory limit")
        response = json.loads(answer)
        if "error" in response:
            raise APIError(400, f"the model's chat template rejects this conversation: {response['error'][:500]}")
        return response["text"]

    async def _ensure_process(self) -> asyncio.subprocess.Process:
        if self.renderer_process is None or self.renderer_process.returncode is not None:
            self.renderer_process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", template_worker.__file__),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                limit=8 * template_worker.MAX_OUTPUT_CHARS,
                start_new_session=True,
                env={name: value for name, value in os.environ.items() if not name.startswith("NEXTWORD_")},
            )
        return self.renderer_process

    async def close(self) -> None:
        """Terminate the process."""
        if self.renderer_process is not None:
            if self.renderer_process.returncode is None:
                self.renderer_process.kill()
            await self.renderer_process.wait()
            self.renderer_process = None
