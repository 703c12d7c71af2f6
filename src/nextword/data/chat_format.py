"""The chat format: `role content end` for each message, in one row of token ids.

A message is `{"role": "system", "user" or "assistant", "content": str}`. Special tokens are inserted by id and content
is encoded apart from them, so that the content of a message can never end its turn or begin another one.
`chat_template.jinja` is the same format for the transformers class. Both give the same ids for every content that does not
look like a special token.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nextword.common.errors import UsageError
from nextword.common.fs import atomic_write, is_json_object
from nextword.data.tokenizer import END_OF_TURN_TOKEN, Tokenizer

SYSTEM_TOKEN, USER_TOKEN, ASSISTANT_TOKEN = "<|system|>", "<|user|>", "<|assistant|>"
ROLE_TOKENS = {"system": SYSTEM_TOKEN, "user": USER_TOKEN, "assistant": ASSISTANT_TOKEN}
# The names that data sets and requests give to the roles.
ROLE_NAMES = {
    **{role: role for role in ROLE_TOKENS},
    "developer": "system",
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "model"), "assistant"),
}
TEXT_PARTS = ("text", "input_text", "output_text")  # types of the parts of a message
CHAT_SPECIAL_TOKENS = (SYSTEM_TOKEN, USER_TOKEN, ASSISTANT_TOKEN, END_OF_TURN_TOKEN)

Message = Mapping[str, Any]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('a role is system, user or assistant, not ' + message['role'] | string) -}}
{%- elif message['content'] is not string -%}
{{- raise_exception('the content of a message is a text') -}}
{%- endif -%}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


class Truncated(NamedTuple):
    """A conversation that fits into the context.

    Attributes:
        messages: the system message, if there is one, and the newest messages.
        num_dropped_turns: the number of oldest messages that were dropped.
        num_dropped_tokens: the number of tokens that were cut from the beginning of the newest message.
    """

    messages: list[dict[str, Any]]
    num_dropped_turns: int
    num_dropped_tokens: int


def supports_chat(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has all special tokens of the chat format."""
    return tokenizer.special_tokens.keys() >= set(CHAT_SPECIAL_TOKENS)


def stop_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids at which the generation of a turn stops: those that end a text, and those that begin another turn."""
    return tokenizer.eos_ids | {tokenizer.special_tokens[name] for name in CHAT_SPECIAL_TOKENS}


def content_text(parts: Sequence[Any]) -> str | None:
    """The text of a message whose content is a list of parts: strings, or objects with a text. None if one is not text."""
    texts: list[Any] = [
        part.get("text") if is_json_object(part) and part.get("type", "text") in TEXT_PARTS else part for part in parts
    ]
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else None


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Encode a conversation. The tokenizer's `bos_id`, if it has one, comes first.

    Args:
        tokenizer: a tokenizer that supports chat.
        messages: the messages.
        add_generation_prompt: append the assistant's role token, after which the model answers.

    Returns:
        The ids [T]; and the loss mask [T], which is True for the content of the assistant's messages and the end of
        their turn, unless their `weight` is 0.

    Raises:
        UsageError: a role or a content is invalid, or the tokenizer has no chat tokens.
    """
    if not supports_chat(tokenizer):
        raise UsageError(
            "the tokenizer lacks the special tokens of a conversation: "
            "add them by with_special_tokens(CHAT_SPECIAL_TOKENS)"
        )
    ids = list(tokenizer.bos_ids)
    loss_mask = [False] * len(ids)
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLE_TOKENS or not isinstance(content, str):
            raise UsageError(
                f"message {number}: a message has a role (system, user or assistant) and a content, which is a text; "
                f"this one has the role {role!r} and a content of type {type(content).__name__}"
            )
        content_ids = [*tokenizer.mid_text.encode(content), tokenizer.special_tokens[END_OF_TURN_TOKEN]]
        ids += [tokenizer.special_tokens[ROLE_TOKENS[role]], *content_ids]
        loss_mask += [False, *[role == "assistant" and message.get("weight") != 0] * len(content_ids)]
    if add_generation_prompt:
        ids.append(tokenizer.special_tokens[ASSISTANT_TOKEN])
        loss_mask.append(False)
    return ids, loss_mask


def max_prompt_tokens(context_length: int, max_tokens: int) -> int:
    """How long a conversation may be, so that an answer of `max_tokens` fits, or one of half the context if that is less."""
    return context_length - min(max_tokens, context_length // 2)


def drop_oldest_turns(messages: Sequence[Message]) -> list[list[dict[str, Any]]]:
    """The conversation, and what is left of it when more and more of its oldest turns are dropped: the longest first.

    The system message and the newest message are always kept. What follows the system message begins with a user's
    message, unless nothing was dropped or the newest message of all is the assistant's.
    """
    system = [dict(m) for m in messages[:1] if m.get("role") == "system"]
    turns = [dict(m) for m in messages[len(system) :]]
    starts = [i for i in range(1, len(turns)) if turns[i].get("role") != "assistant" or i == len(turns) - 1]
    return [[*system, *turns[i:]] for i in (0, *starts)]


def truncate_conversation(tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int) -> Truncated:
    """The system message and as many of the newest messages as fit.

    Turns are dropped as in `drop_oldest_turns`. If not even the newest message fits, its end is kept.

    Args:
        tokenizer: a tokenizer that supports chat.
        messages: the conversation.
        max_tokens: the maximum length of `encode_conversation(..., add_generation_prompt=True)`.

    Raises:
        UsageError: the system message leaves no room for another one, or as `encode_conversation`.
    """
    system = [dict(m) for m in messages[:1] if m.get("role") == "system"]
    turns = [dict(m) for m in messages[len(system) :]]

    def num_tokens(some_messages: list[dict[str, Any]]) -> int:
        return len(encode_conversation(tokenizer, some_messages, add_generation_prompt=True)[0])

    options = drop_oldest_turns(messages)
    index = bisect_left(options, True, key=lambda kept: num_tokens(kept) <= max_tokens)
    if index < len(options):
        return Truncated(options[index], len(messages) - len(options[index]), 0)
    remaining = max_tokens - num_tokens(system)
    remaining -= 2  # the role token and the end-of-turn token of the newest message
    if not turns or remaining < 1:
        raise UsageError(
            f"the system message takes {num_tokens(system):,} of the {max_tokens:,} tokens of a conversation, and leaves "
            "no room for another message: shorten it"
        )
    content = turns[-1]["content"]
    text = _truncate_left(tokenizer.mid_text, content, remaining)
    num_dropped = len(tokenizer.mid_text.encode(content)) - len(tokenizer.mid_text.encode(text))
    return Truncated([*system, {**turns[-1], "content": text}], len(turns) - 1, num_dropped)


def _truncate_left(tokenizer: Tokenizer, text: str, max_tokens: int) -> str:
    """A long suffix of a text that has at most `max_tokens` tokens."""
    suffix = tokenizer.decode(tokenizer.encode(text)[-max_tokens:])
    # A cut may split the bytes of a character, and a foreign tokenizer need not decode to the text's own suffix.
    suffix = text[-len(suffix) :] if suffix else ""
    while (excess := len(tokenizer.encode(suffix)) - max_tokens) > 0:
        suffix = suffix[excess:]
    return suffix


def build_chat_template(tokenizer: Tokenizer) -> str:
    """The Jinja template with which the transformers class gives the ids of `encode_conversation` for this tokenizer."""
    return ("" if tokenizer.bos_id is None else "{{- bos_token -}}\n") + CHAT_TEMPLATE


def save_chat_template(directory: Path) -> None:
    """Write `chat_template.jinja` beside a saved tokenizer. Raises as `Tokenizer.open` does."""
    atomic_write(directory / "chat_template.jinja", build_chat_template(Tokenizer.open(directory)))
