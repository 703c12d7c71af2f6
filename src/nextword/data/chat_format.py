"""Conversations as token ids: `role content end` for each message, all in one row.

A message is {"role": "system", "user" or "assistant", "content": str}. Markers are put in by id and content is encoded
apart from them, so what a message says can never end its turn or begin another's. `chat_template.jinja` says the same to
the stock class, which gives the same ids for every content that does not look like a marker.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nextword.common.errors import UsageError
from nextword.common.fs import atomic_write
from nextword.data.tokenizer import END_OF_TURN_TOKEN, Tokenizer

SYSTEM_TOKEN, USER_TOKEN, ASSISTANT_TOKEN = "<|system|>", "<|user|>", "<|assistant|>"
ROLE_TOKENS = {"system": SYSTEM_TOKEN, "user": USER_TOKEN, "assistant": ASSISTANT_TOKEN}
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
    """What of a conversation fits.

    Attributes:
        messages: the system turn, where there is one, and the newest turns.
        left_out: how many of the oldest turns are not among them.
        cut: how many tokens the newest turn has lost at its beginning.
    """

    messages: list[dict[str, Any]]
    num_dropped_turns: int
    num_dropped_tokens: int


def supports_chat(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has all the markers of a conversation."""
    return tokenizer.special_tokens.keys() >= set(CHAT_SPECIAL_TOKENS)


def stop_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids at which a turn that is being written is finished: those that end a text, and another turn's beginning."""
    return tokenizer.eos_ids | {tokenizer.special_tokens[name] for name in CHAT_SPECIAL_TOKENS}


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """The ids [T] of a conversation, and for each whether it is learned: what an assistant says, and that it ends there.

    With `answer` the assistant's marker is put at the end, to be gone on from. What the tokenizer itself puts before a
    text (`begin_of_text`) comes first.

    Raises:
        UsageError: a role or a content that is none, or a tokenizer without the markers.
    """
    if not supports_chat(tokenizer):
        raise UsageError("the tokenizer lacks the markers of a conversation: add them by with_markers(CHAT_MARKERS)")
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
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
        loss_mask += [False, *[role == "assistant"] * len(content_ids)]
    if add_generation_prompt:
        ids.append(tokenizer.special_tokens[ASSISTANT_TOKEN])
        loss_mask.append(False)
    return ids, loss_mask


def truncate_conversation(tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int) -> Truncated:
    """As many of the newest turns as fit: `encode_conversation(tokenizer, fitted, answer=True)` has at most `room` ids.

    The system turn, where the conversation begins with one, is kept. What is kept after it begins with a user's turn,
    unless the newest turn of all is an assistant's. Where not even the newest turn fits, its end is kept.

    Raises:
        UsageError: the system turn leaves no room for another, or as `encode_conversation` does.
    """
    system = [dict(m) for m in messages[:1] if m.get("role") == "system"]
    turns = [dict(m) for m in messages[len(system) :]]

    def num_tokens(some: list[dict[str, Any]]) -> int:
        return len(encode_conversation(tokenizer, some, add_generation_prompt=True)[0])

    remaining = max_tokens - num_tokens(system)
    turn_lengths = [num_tokens([turn]) - num_tokens([]) for turn in turns]
    first_kept = len(turns)
    while first_kept > 0 and sum(turn_lengths[first_kept - 1 :]) <= remaining:
        first_kept -= 1
    # An answer whose question is gone goes with it.
    while 0 < first_kept < len(turns) - 1 and turns[first_kept]["role"] == "assistant":
        first_kept += 1
    if first_kept < len(turns) or (not turns and remaining >= 0):
        return Truncated([*system, *turns[first_kept:]], first_kept, 0)
    remaining -= 2  # the markers of the newest turn's role and of its end
    if not turns or remaining < 1:
        raise UsageError(
            f"the system turn takes {num_tokens(system):,} of the {max_tokens:,} tokens that there are for a conversation, and leaves "
            "no room for a turn: shorten it"
        )
    content, text = turns[-1]["content"], _truncate_left(tokenizer, turns[-1]["content"], remaining)
    encode = tokenizer.mid_text.encode
    num_dropped_tokens = len(encode(content)) - len(encode(text))
    return Truncated([*system, {**turns[-1], "content": text}], len(turns) - 1, num_dropped_tokens)


def _truncate_left(tokenizer: Tokenizer, text: str, max_tokens: int) -> str:
    """A long end of a text that has at most `size` tokens after a marker."""
    tokenizer = tokenizer.mid_text
    suffix = tokenizer.decode(tokenizer.encode(text)[-max_tokens:])
    # A cut may part a character's bytes; what a foreign tokenizer decodes need not be the text's own end.
    suffix = text[-len(suffix) :] if suffix else ""
    while (excess := len(tokenizer.encode(suffix)) - max_tokens) > 0:
        suffix = suffix[excess:]
    return suffix


def build_chat_template(tokenizer: Tokenizer) -> str:
    """The Jinja text that makes the stock class give the ids of `encode_conversation` for this tokenizer."""
    return ("" if tokenizer.bos_id is None else "{{- bos_token -}}\n") + CHAT_TEMPLATE


def save_chat_template(directory: Path) -> None:
    """Write `chat_template.jinja` beside a tokenizer that is saved there. Raises as `Tokenizer.open` does."""
    atomic_write(directory / "chat_template.jinja", build_chat_template(Tokenizer.open(directory)))
