"""The chat format: `role content end` for each message, in one row of token ids.

A message is `{"role": "system", "user" or "assistant", "content": str}`. Special tokens are inserted by id and content
is encoded apart from them, so that the content of a message can never end its turn or begin another one.
`chat_template.jinja` is the same format for the transformers class. Both give the same ids for every content that does not
look like a special token.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def check_newest_message(num_tokens: int, context_length: int) -> None:
    """Check that the newest message, which is never cut, leaves room for an answer.

    Args:
        num_tokens: the number of tokens of the system message and the newest message.
        context_length: the context length of the model.

    Raises:
        UsageError: there is no room.
    """
    if num_tokens >= context_length:
        raise UsageError(
            f"the message is too long: with its role and the system message, if there is one, it has {num_tokens:,} tokens, "
            f"and the model's context of {context_length:,} tokens leaves no room for an answer. Shorten it"
        )


def encode_newest_turns(
    tokenizer: Tokenizer, messages: Sequence[Message], context_length: int, max_tokens: int
) -> tuple[list[int], int]:
    """Encode the system message and as many of the newest messages as leave room for an answer.

    Turns are dropped as in `drop_oldest_turns`. The newest message is never cut; if it is long, it leaves less room.

    Args:
        tokenizer: a tokenizer that supports chat.
        messages: the conversation.
        context_length: the context length of the model.
        max_tokens: the maximum length of the answer.

    Returns:
        The ids [T] with the generation prompt, less than `context_length`, and the number of oldest messages that were dropped.

    Raises:
        UsageError: the newest message is too long, or as `encode_conversation`.
    """
    options, limit = drop_oldest_turns(messages), max_prompt_tokens(context_length, max_tokens)

    def encode(kept: list[dict[str, Any]]) -> list[int]:
        return encode_conversation(tokenizer, kept, add_generation_prompt=True)[0]

    kept = options[bisect_left(options[:-1], True, key=lambda kept: len(encode(kept)) <= limit)]
    ids = encode(kept)
    check_newest_message(len(ids), context_length)
    return ids, len(messages) - len(kept)


def build_chat_template(tokenizer: Tokenizer) -> str:
    """The Jinja template with which the transformers class gives the ids of `encode_conversation` for this tokenizer."""
    return ("" if tokenizer.bos_id is None else "{{- bos_token -}}\n") + CHAT_TEMPLATE


def save_chat_template(directory: Path) -> None:
    """Write `chat_template.jinja` beside a saved tokenizer. Raises as `Tokenizer.open` does."""
    atomic_write(directory / "chat_template.jinja", build_chat_template(Tokenizer.open(directory)))
