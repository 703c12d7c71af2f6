"""Conversations as token ids: `role content end` for each message, all in one row.

A message is {"role": "system", "user" or "assistant", "content": str}. Markers are put in by id and content is encoded
apart from them, so what a message says can never end its turn or begin another's. `chat_template.jinja` says the same to
the stock class, which gives the same ids for every content that does not look like a marker.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nextword.common.errors import UsageError
from nextword.common.fs import write_durably
from nextword.data.tokenizer import END_OF_TURN, Tokenizer

SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
CHAT_MARKERS = (SYSTEM, USER, ASSISTANT, END_OF_TURN)

Message = Mapping[str, Any]

TEMPLATE = """\
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


class Fitted(NamedTuple):
    """What of a conversation fits.

    Attributes:
        messages: the system turn, where there is one, and the newest turns.
        left_out: how many of the oldest turns are not among them.
        cut: how many tokens the newest turn has lost at its beginning.
    """

    messages: list[dict[str, Any]]
    left_out: int
    cut: int


def can_chat(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has all the markers of a conversation."""
    return tokenizer.markers.keys() >= set(CHAT_MARKERS)


def turn_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids at which a turn that is being written is finished: those that end a text, and another turn's beginning."""
    return tokenizer.ends | {tokenizer.markers[name] for name in CHAT_MARKERS}


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], *, answer: bool = False
) -> tuple[list[int], list[bool]]:
    """The ids [T] of a conversation, and for each whether it is learned: what an assistant says, and that it ends there.

    With `answer` the assistant's marker is put at the end, to be gone on from. What the tokenizer itself puts before a
    text (`begin_of_text`) comes first.

    Raises:
        UsageError: a role or a content that is none, or a tokenizer without the markers.
    """
    if not can_chat(tokenizer):
        raise UsageError("the tokenizer lacks the markers of a conversation: add them by with_markers(CHAT_MARKERS)")
    ids = [] if tokenizer.begin_of_text is None else [tokenizer.begin_of_text]
    learned = [False] * len(ids)
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
            raise UsageError(
                f"message {number}: a message has a role (system, user or assistant) and a content, which is a text; "
                f"this one has the role {role!r} and a content of type {type(content).__name__}"
            )
        said = [*tokenizer.after_marker.encode(content), tokenizer.markers[END_OF_TURN]]
        ids += [tokenizer.markers[ROLES[role]], *said]
        learned += [False, *[role == "assistant"] * len(said)]
    if answer:
        ids.append(tokenizer.markers[ASSISTANT])
        learned.append(False)
    return ids, learned


def fit(tokenizer: Tokenizer, messages: Sequence[Message], room: int) -> Fitted:
    """As many of the newest turns as fit: `encode_conversation(tokenizer, fitted, answer=True)` has at most `room` ids.

    The system turn, where the conversation begins with one, is kept. What is kept after it begins with a user's turn,
    unless the newest turn of all is an assistant's. Where not even the newest turn fits, its end is kept.

    Raises:
        UsageError: the system turn leaves no room for another, or as `encode_conversation` does.
    """
    system = [dict(m) for m in messages[:1] if m.get("role") == "system"]
    turns = [dict(m) for m in messages[len(system) :]]

    def size(some: list[dict[str, Any]]) -> int:
        return len(encode_conversation(tokenizer, some, answer=True)[0])

    left = room - size(system)
    sizes = [size([turn]) - size([]) for turn in turns]
    first = len(turns)
    while first > 0 and sum(sizes[first - 1 :]) <= left:
        first -= 1
    # An answer whose question is gone goes with it.
    while 0 < first < len(turns) - 1 and turns[first]["role"] == "assistant":
        first += 1
    if first < len(turns) or (not turns and left >= 0):
        return Fitted([*system, *turns[first:]], first, 0)
    left -= 2  # the markers of the newest turn's role and of its end
    if not turns or left < 1:
        raise UsageError(
            f"the system turn takes {size(system):,} of the {room:,} tokens that there are for a conversation, and leaves "
            "no room for a turn: shorten it"
        )
    content, text = turns[-1]["content"], _end_of(tokenizer, turns[-1]["content"], left)
    encode = tokenizer.after_marker.encode
    cut = len(encode(content)) - len(encode(text))
    return Fitted([*system, {**turns[-1], "content": text}], len(turns) - 1, cut)


def _end_of(tokenizer: Tokenizer, text: str, size: int) -> str:
    """A long end of a text that has at most `size` tokens after a marker."""
    tokenizer = tokenizer.after_marker
    end = tokenizer.decode(tokenizer.encode(text)[-size:])
    # A cut may part a character's bytes; what a foreign tokenizer decodes need not be the text's own end.
    end = text[-len(end) :] if end else ""
    while (over := len(tokenizer.encode(end)) - size) > 0:
        end = end[over:]
    return end


def template(tokenizer: Tokenizer) -> str:
    """The Jinja text that makes the stock class give the ids of `encode_conversation` for this tokenizer."""
    return ("" if tokenizer.begin_of_text is None else "{{- bos_token -}}\n") + TEMPLATE


def save_template(directory: Path) -> None:
    """Write `chat_template.jinja` beside a tokenizer that is saved there. Raises as `Tokenizer.open` does."""
    write_durably(directory / "chat_template.jinja", template(Tokenizer.open(directory)))
