"""A conversation as the tokens that a model is to go on from, in the way that the model has learned.

Three ways: a model that nextword made to converse has its own (`text/chat.py`); any other is asked in the words of the
template that came with it; and a model without one is shown a plain dialogue. In the first two nothing that a message says
can become a marker.
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

MAX_TEMPLATE_CHARS = 2**18  # characters
RENDER_GRACE = 0.5  # seconds more than the renderer gives itself, for starting it and reading it

Conversation = Sequence[Mapping[str, str]]


class ChatEncoder(Protocol):
    """How a model is talked with.

    Attributes:
        name: said with every answer: "nextword", "model" or "plain".
        stops: texts at which an answer ends.
        ends: the ids at which one ends.
        template: the Jinja text, where there is one.
    """

    name: str
    stop_strings: tuple[str, ...]
    stop_token_ids: frozenset[int]
    template: str | None

    async def encode(self, conversation: Conversation) -> list[int]:
        """The ids of a conversation, up to where the answer begins. Raises `Refusal` for one that cannot be said so."""
        ...

    async def close(self) -> None: ...


def make_chat_encoder(directory: Path, tokenizer: Tokenizer) -> ChatEncoder:
    """How the model in a directory is talked with. Raises `CorruptFile` for a template that is none."""
    chat_template = load_chat_template(directory, tokenizer)
    if supports_chat(tokenizer) and chat_template in (None, build_chat_template(tokenizer)):
        return NativeChatEncoder(tokenizer)
    return PlainChatEncoder(tokenizer) if chat_template is None else JinjaChatEncoder(tokenizer, chat_template)


def load_chat_template(directory: Path, tokenizer: Tokenizer) -> str | None:
    """`chat_template.jinja`, or what tokenizer_config.json has; of several the one called default."""
    file = directory / "chat_template.jinja"
    chat_template = file.read_text(encoding="utf-8") if file.is_file() else tokenizer.config.get("chat_template")
    if isinstance(chat_template, list):
        templates_by_name = {one.get("name"): one.get("template") for one in chat_template if isinstance(one, dict)}
        chat_template = templates_by_name.get("default")
    if chat_template is not None and not (isinstance(chat_template, str) and len(chat_template) <= MAX_TEMPLATE_CHARS):
        raise CorruptFileError(
            f"{directory}: its chat template is no text of at most {MAX_TEMPLATE_CHARS:,} characters"
        )
    return chat_template


class NativeChatEncoder:
    """The form that nextword teaches: markers by id, contents encoded apart from them."""

    name: str = "nextword"
    stop_strings: tuple[str, ...] = ()
    template: str | None

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.stop_token_ids, self.template = (
            tokenizer,
            stop_token_ids(tokenizer),
            build_chat_template(tokenizer),
        )

    async def encode(self, conversation: Conversation) -> list[int]:
        try:
            return encode_conversation(self.tokenizer, conversation, add_generation_prompt=True)[0]
        except UsageError as error:
            raise APIError(400, f"messages: {error}", param="messages") from error

    async def close(self) -> None:
        pass


class PlainChatEncoder:
    """A dialogue in plain words, for a model that has learned none. What a message says can look like another's turn here:
    there are no markers that could prevent it."""

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
    """The template that came with a model, rendered in a process of its own (see `renderer`)."""

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
        """Content and markers are told apart like this: the template is given a placeholder in the place of each content, a
        number that nobody can guess. What it makes of them is cut at the special tokens that are in it, which are therefore
        the template's own; only then the contents take their places, and each piece between two special tokens is encoded
        as text, in which nothing becomes a special token.
        """
        nonce = f"{secrets.randbits(128):039}"  # digits, which no filter for upper or lower case changes
        contents: dict[str, str] = {}
        messages = []
        for number, message in enumerate(conversation):
            content = message["content"]
            stripped = content.strip()
            key = f"{nonce}{number:06}"
            contents[key] = stripped
            # White space around it is left for the template to trim; an empty content it may want to see as such.
            begin = content.index(stripped)
            placeholder_content = content[:begin] + key + content[begin + len(stripped) :] if stripped else content
            messages.append({**message, "content": placeholder_content})
        text = await self.render(messages)
        ids = self._encode_rendered(text, nonce, contents)
        if not ids:
            raise APIError(400, "messages: the model's template makes nothing of this conversation", param="messages")
        return ids

    def _encode_rendered(self, text: str, nonce: str, contents: dict[str, str]) -> list[int]:
        for token in self.tokenizer.backend.get_added_tokens_decoder().values():  # some swallow the space beside them
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
                raise APIError(500, "the model's chat template takes messages apart, which cannot be done safely")
            ids += (self.tokenizer.mid_text if i else self.tokenizer).encode(segment) if segment else []
        return ids

    async def render(self, messages: list[dict[str, str]]) -> str:
        """What the template makes of a conversation.

        Raises:
            Refusal: the template refuses it, or takes too much time or memory.
        """
        values = {
            "messages": messages,
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
            **self.special_tokens,
        }
        line = (
            json.dumps(
                {"template": self.template, "values": values, "seconds": template_worker.RENDER_TIMEOUT}
            ).encode()
            + b"\n"
        )
        async with self.lock:
            process = await self._ensure_process()
            assert process.stdin is not None and process.stdout is not None
            try:
                async with asyncio.timeout(template_worker.RENDER_TIMEOUT + RENDER_GRACE):
                    process.stdin.write(line)
                    await process.stdin.drain()
                    answer = await process.stdout.readline()
            except (TimeoutError, ConnectionError):
                answer = b""
            if not answer.endswith(b"\n"):
                await self.close()
                raise APIError(500, "the model's chat template takes too much time or memory, and was stopped")
        response = json.loads(answer)
        if "error" in response:
            raise APIError(400, f"the model's chat template refuses this conversation: {response['error'][:500]}")
        return response["text"]

    async def _ensure_process(self) -> asyncio.subprocess.Process:
        if self.renderer_process is None or self.renderer_process.returncode is not None:
            self.renderer_process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", template_worker.__file__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL, limit=8 * template_worker.MAX_OUTPUT_CHARS, start_new_session=True,
                env={name: value for name, value in os.environ.items() if not name.startswith("NEXTWORD_")},
            )  # fmt: skip
        return self.renderer_process

    async def close(self) -> None:
        """End the process."""
        if self.renderer_process is not None:
            if self.renderer_process.returncode is None:
                self.renderer_process.kill()
            await self.renderer_process.wait()
            self.renderer_process = None
