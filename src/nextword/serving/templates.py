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

from nextword.errors import CorruptFile, UsageError
from nextword.serving import renderer
from nextword.serving.protocol import Refusal
from nextword.text.chat import can_chat, encode_conversation, template, turn_ends
from nextword.text.tokenizer import Tokenizer

LONGEST_TEMPLATE = 2**18  # characters
GRACE = 0.5  # seconds more than the renderer gives itself, for starting it and reading it

Conversation = Sequence[Mapping[str, str]]


class Chat(Protocol):
    """How a model is talked with.

    Attributes:
        name: said with every answer: "nextword", "model" or "plain".
        stops: texts at which an answer ends.
        ends: the ids at which one ends.
        template: the Jinja text, where there is one.
    """

    name: str
    stops: tuple[str, ...]
    ends: frozenset[int]
    template: str | None

    async def encode(self, conversation: Conversation) -> list[int]:
        """The ids of a conversation, up to where the answer begins. Raises `Refusal` for one that cannot be said so."""
        ...

    async def close(self) -> None: ...


def chat_of(directory: Path, tokenizer: Tokenizer) -> Chat:
    """How the model in a directory is talked with. Raises `CorruptFile` for a template that is none."""
    given = given_template(directory, tokenizer)
    if can_chat(tokenizer) and given in (None, template(tokenizer)):
        return OwnChat(tokenizer)
    return PlainChat(tokenizer) if given is None else TemplateChat(tokenizer, given)


def given_template(directory: Path, tokenizer: Tokenizer) -> str | None:
    """`chat_template.jinja`, or what tokenizer_config.json has; of several the one called default."""
    file = directory / "chat_template.jinja"
    given = file.read_text(encoding="utf-8") if file.is_file() else tokenizer.config.get("chat_template")
    if isinstance(given, list):
        named = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        given = named.get("default")
    if given is not None and not (isinstance(given, str) and len(given) <= LONGEST_TEMPLATE):
        raise CorruptFile(f"{directory}: its chat template is no text of at most {LONGEST_TEMPLATE:,} characters")
    return given


class OwnChat:
    """The form that nextword teaches: markers by id, contents encoded apart from them."""

    name: str = "nextword"
    stops: tuple[str, ...] = ()
    template: str | None

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ends, self.template = tokenizer, turn_ends(tokenizer), template(tokenizer)

    async def encode(self, conversation: Conversation) -> list[int]:
        try:
            return encode_conversation(self.tokenizer, conversation, answer=True)[0]
        except UsageError as error:
            raise Refusal(400, f"messages: {error}", param="messages") from error

    async def close(self) -> None:
        pass


class PlainChat:
    """A dialogue in plain words, for a model that has learned none. What a message says can look like another's turn here:
    there are no markers that could prevent it."""

    name: str = "plain"
    stops: tuple[str, ...] = ("\nUser:",)
    template: str | None = None

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ends = tokenizer, tokenizer.ends

    async def encode(self, conversation: Conversation) -> list[int]:
        names = {"user": "User: ", "assistant": "Assistant: ", "system": "", "tool": "Tool: "}
        turns = [names[message["role"]] + message["content"] for message in conversation]
        ids = self.tokenizer.encode("\n".join([*turns, "Assistant:"]))
        return ids if self.tokenizer.begin_of_text is None else [self.tokenizer.begin_of_text, *ids]

    async def close(self) -> None:
        pass


class TemplateChat:
    """The template that came with a model, rendered in a process of its own (see `renderer`)."""

    name: str = "model"
    stops: tuple[str, ...] = ()
    template: str | None

    def __init__(self, tokenizer: Tokenizer, template: str):
        self.tokenizer, self.template, self.ends = tokenizer, template, tokenizer.ends
        roles = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {role: tokenizer.config.get(role) for role in roles}
        contents = {role: t.get("content") if isinstance(t, dict) else t for role, t in tokens.items()}
        self.tokens = {role: content for role, content in contents.items() if content is not None}
        self.process: asyncio.subprocess.Process | None = None
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
            inside = content.strip()
            key = f"{nonce}{number:06}"
            contents[key] = inside
            # White space around it is left for the template to trim; an empty content it may want to see as such.
            begin = content.index(inside)
            shown = content[:begin] + key + content[begin + len(inside) :] if inside else content
            messages.append({**message, "content": shown})
        text = await self.render(messages)
        ids = self._ids(text, nonce, contents)
        if not ids:
            raise Refusal(400, "messages: the model's template makes nothing of this conversation", param="messages")
        return ids

    def _ids(self, text: str, nonce: str, contents: dict[str, str]) -> list[int]:
        for token in self.tokenizer.backend.get_added_tokens_decoder().values():  # some swallow the space beside them
            if token.special and (token.lstrip or token.rstrip):
                name, before, after = re.escape(token.content), r"\s*" * token.lstrip, r"\s*" * token.rstrip
                text = re.sub(before + name + after, lambda match: match[0].strip(), text)
        markers = self.tokenizer.markers
        names = sorted(markers, key=len, reverse=True)
        ids: list[int] = []
        for i, part in enumerate(re.split("(" + "|".join(map(re.escape, names)) + ")", text)):
            if i % 2:
                ids.append(markers[part])
                continue
            said = re.sub(f"{nonce}[0-9]{{6}}", lambda match: contents[match[0]], part)
            if nonce[:12] in said or nonce[-12:] in said:
                raise Refusal(500, "the model's chat template takes messages apart, which cannot be done safely")
            ids += (self.tokenizer.after_marker if i else self.tokenizer).encode(said) if said else []
        return ids

    async def render(self, messages: list[dict[str, str]]) -> str:
        """What the template makes of a conversation.

        Raises:
            Refusal: the template refuses it, or takes too much time or memory.
        """
        values = {"messages": messages, "add_generation_prompt": True, "tools": None, "documents": None, **self.tokens}
        line = json.dumps({"template": self.template, "values": values, "seconds": renderer.SECONDS}).encode() + b"\n"
        async with self.lock:
            process = await self._started()
            assert process.stdin is not None and process.stdout is not None
            try:
                async with asyncio.timeout(renderer.SECONDS + GRACE):
                    process.stdin.write(line)
                    await process.stdin.drain()
                    answer = await process.stdout.readline()
            except (TimeoutError, ConnectionError):
                answer = b""
            if not answer.endswith(b"\n"):
                await self.close()
                raise Refusal(500, "the model's chat template takes too much time or memory, and was stopped")
        said = json.loads(answer)
        if "error" in said:
            raise Refusal(400, f"the model's chat template refuses this conversation: {said['error'][:500]}")
        return said["text"]

    async def _started(self) -> asyncio.subprocess.Process:
        if self.process is None or self.process.returncode is not None:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", renderer.__file__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL, limit=8 * renderer.LONGEST, start_new_session=True,
                env={name: value for name, value in os.environ.items() if not name.startswith("NEXTWORD_")},
            )  # fmt: skip
        return self.process

    async def close(self) -> None:
        """End the process."""
        if self.process is not None:
            if self.process.returncode is None:
                self.process.kill()
            await self.process.wait()
            self.process = None
