"""One row of labelled data to its canonical fields; whatever is wrong with it is a `Flaw`."""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from nextword.data.decoding import without_surrogates
from nextword.data.readers import each_text
from nextword.tasks.schema import CHOICE_ROLE

# The fields of a task that are texts, and given.
TEXTS = {
    "classify": ("text",),
    "entail": ("premise", "hypothesis"),
    "similarity": ("sentence1", "sentence2"),
    "rewrite": ("prompt",),
}
_SPEAKERS = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


class Flaw(Exception):
    """Why a row cannot be used: the kind of flaw, the same for every row that has it, and what is so in this one."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


@dataclass
class Row:
    """What a table has for each role of the task, as it was read."""

    path: Path
    line: int
    values: dict[str, Any]


def what_is_given(task: str, values: dict[str, Any]) -> dict[str, Any]:
    """The fields that are known before the answer is. Of a conversation, all turns that were written down as such."""
    if task == "choose":
        return {"question": _text(values.get("question"), "question"), "choices": _choices(values)[0]}
    if task == "chat":
        return {"messages": _conversation(values)}
    if task == "prefer":
        return {"messages": _preference(values)[0]}
    return {role: _text(values.get(role), role) for role in TEXTS[task]}


def gold_of(task: str, values: dict[str, Any], given: dict[str, Any], reading: "Reading | None") -> dict[str, Any]:
    """The fields that are learned from. Those of a conversation replace what is given."""
    if task == "choose":
        assert reading is not None  # read_examples finds one for every data set of this task
        return {"answer": _answer(values, reading)}
    if task == "rewrite":
        return {"completion": _text(values.get("completion"), "completion")}
    if task == "chat":
        return {"messages": _answered(values, given["messages"])}
    if task == "prefer":
        _, chosen, rejected = _preference(values)
        answers = {"chosen": _text(chosen, "chosen answer"), "rejected": _text(rejected, "rejected answer")}
        if chosen == rejected:
            raise Flaw("the chosen answer and the rejected one are the same")
        return answers
    if "score" in values:
        return {"score": _score(values["score"])}
    if "labels" in values:
        return {"labels": _labels(values["labels"])}
    return {"label": _label(values.get("label"))}


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _text(value: Any, name: str) -> str:
    if _is_blank(value):
        raise Flaw(f"the {name} is empty")
    if not isinstance(value, str):
        raise Flaw(f"the {name} is not a string", f"it is a {type(value).__name__}")
    return value


def _unfolded(value: Any) -> Any:
    """A list or an object that a cell of CSV holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return each_text(json.loads(value), without_surrogates)
        except (ValueError, RecursionError):
            return value
    return value


def _whole(value: Any) -> int | None:
    """A whole number, also where it is written as 1.0 or as digits."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", value) else None
    return value if isinstance(value, int) else None


def number(value: Any) -> float | None:
    """A finite number, also where it is written in digits."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*", value):
        return None
    try:
        found = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return found if math.isfinite(found) else None


# --- labels and scores


def _label(value: Any) -> str:
    if _is_blank(value) or (isinstance(value, float) and math.isnan(value)):
        raise Flaw("the label is empty")
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(value if isinstance(value, bool) else int(value))
    raise Flaw("the label is no text and no whole number", f"it is {_shown(value)}")


def _labels(value: Any) -> tuple[str, ...]:
    value = _unfolded(value)
    if isinstance(value, str):
        value = [part for part in re.split("[;|]", value) if part.strip()]
    elif not isinstance(value, list):
        value = [value]
    return tuple(dict.fromkeys(_label(label) for label in value))


def labels_are_several(values: Iterable[Any]) -> bool:
    """Whether a column called `label` holds lists of them."""
    return any(isinstance(_unfolded(value), list) for value in values)


def labels_are_scores(values: Iterable[Any]) -> bool:
    """Whether a label column holds numbers, most of it, and not whole ones alone."""
    there = [value for value in values if not _is_blank(value)]
    numbers = [found for value in there if (found := number(value)) is not None]
    return 2 * len(numbers) > len(there) and not all(found.is_integer() for found in numbers)


def _score(value: Any) -> float:
    found = number(value)
    if found is None:
        raise Flaw("the score is no finite number", f"it is {_shown(value)}")
    return found


def _shown(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, list | dict):  # their repr may be deeper than what Python writes
        return f"a {type(value).__name__}"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "…"


# --- multiple choice


def _choices(values: dict[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """The choices, and the names that some data sets give them (ARC: A, B, C, D, or 1, 2, 3, 4)."""
    names: list[str] = []
    if "choices" in values:
        found = _unfolded(values["choices"])
        if isinstance(found, list) and found and all(isinstance(item, dict) for item in found):
            found = {key: [item.get(key) for item in found] for key in ("text", "label")}
        if isinstance(found, dict):
            labels = found.get("label")
            names = [str(name) for name in labels if isinstance(name, str | int)] if isinstance(labels, list) else []
            found = found.get("text")
        if not isinstance(found, list):
            raise Flaw("the choices are not a list", f"they are {_shown(found)}")
    else:
        found = [values[role] for role in sorted(filter(CHOICE_ROLE.fullmatch, values), key=lambda role: int(role[6:]))]
        while found and _is_blank(found[-1]):  # questions may have fewer choices than there are columns
            found.pop()
    if len(found) < 2:
        raise Flaw("fewer than two choices", f"there are {len(found)}")
    texts = [str(item) if isinstance(item, int | float) else item for item in found]
    return tuple(_text(text, "choice") for text in texts), names if len(names) == len(texts) else []


def _by_name(answer: Any, choices: Sequence[str], names: Sequence[str]) -> int | None:
    name = str(answer).strip() if isinstance(answer, str | int) else None
    return names.index(name) if name in names else None


def _by_index(answer: Any, choices: Sequence[str], names: Sequence[str]) -> int | None:
    number = _whole(answer)
    return number if number is not None and 0 <= number < len(choices) else None


def _by_letter(answer: Any, choices: Sequence[str], names: Sequence[str]) -> int | None:
    letter = answer.strip().upper() if isinstance(answer, str) else ""
    place = ord(letter) - ord("A") if len(letter) == 1 else -1
    return place if 0 <= place < len(choices) else None


def _by_text(answer: Any, choices: Sequence[str], names: Sequence[str]) -> int | None:
    texts = [choice.strip() for choice in choices]
    text = str(answer).strip() if isinstance(answer, str | int | float) else None
    return texts.index(text) if text in texts else None


Reading = Callable[[Any, Sequence[str], Sequence[str]], int | None]
_READINGS: dict[Reading, str] = {
    _by_name: "the choices' own names",
    _by_index: "numbers from 0",
    _by_letter: "letters",
    _by_text: "the choices' own texts",
}


def reading_of(rows: Iterable[Row]) -> Reading:
    """What the answers of a data set are: the reading under which most rows have one.

    One row cannot tell: of the choices 3, 2, 1 and 0, the answer 2 may be the second or the third.
    """
    counts = dict.fromkeys(_READINGS, 0)
    for row in rows:
        try:
            choices, names = _choices(row.values)
        except Flaw:  # said when the row is read
            continue
        for reading in counts:
            counts[reading] += reading(row.values.get("answer"), choices, names) is not None
    return max(counts, key=lambda reading: counts[reading])


def _answer(values: dict[str, Any], reading: Reading) -> int:
    choices, names = _choices(values)
    answer = values.get("answer")
    if _is_blank(answer):
        raise Flaw("the answer is empty")
    place = reading(answer, choices, names)
    if place is None:
        kind = "is out of range" if _whole(answer) is not None and reading is _by_index else "is none of the choices"
        detail = f"{_shown(answer)}, where there are {len(choices)} choices; answers are read as {_READINGS[reading]}"
        raise Flaw(f"the answer {kind}", detail)
    return place


# --- conversations


def _turns(value: Any) -> list[dict[str, str]]:
    """Messages, each with its role and content, in the canonical words. The order is not checked."""
    value = _unfolded(value)
    if not isinstance(value, list):
        raise Flaw("a conversation that is no list of messages", f"it is {_shown(value)}")
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            raise Flaw("a message that is no object with a role and a content", f"it is {_shown(turn)}")
        name = turn.get("role") if turn.get("role") is not None else turn.get("from")
        role = _SPEAKERS.get(name) if isinstance(name, str) else None
        if role is None:
            raise Flaw("a turn of an unknown role", f"{_shown(name)}; there are {', '.join(_SPEAKERS)}")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        turns.append({"role": role, "content": _text(content, "content of a turn")})
    return turns


def _messages(value: Any) -> Any:
    """What may be messages or a text: a text that happens to be JSON, such as [1, 2], is a text."""
    found = _unfolded(value)
    return found if isinstance(found, list) and all(isinstance(turn, dict) for turn in found) else value


def _checked(turns: list[dict[str, str]]) -> tuple[dict[str, str], ...]:
    """The turns, in an order that a conversation has."""
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise Flaw("a system turn that is not the first")
    for before, after in pairwise(turns):
        if before["role"] == after["role"]:
            raise Flaw("two turns of one role in a row", f"two of the {after['role']}")
    if not any(turn["role"] == "user" for turn in turns):
        raise Flaw("a conversation without a turn of the user")
    return tuple(turns)


def _with_system(values: dict[str, Any], turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns, after the system's where it is in a column of its own."""
    if _is_blank(values.get("system")) or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": _text(values["system"], "system turn")}, *turns]


def _asked(values: dict[str, Any], role: str) -> dict[str, str]:
    """An instruction and, where there is one, its input as one turn of the user."""
    parts = [_text(values.get(role), role)]
    if not _is_blank(values.get("input")):
        parts.append(_text(values["input"], "input"))
    return {"role": "user", "content": "\n\n".join(parts)}


def _conversation(values: dict[str, Any]) -> tuple[dict[str, str], ...]:
    turns = _turns(values["messages"]) if "messages" in values else [_asked(values, "instruction")]
    return _checked(_with_system(values, turns))


def _answered(values: dict[str, Any], messages: tuple[dict[str, str], ...]) -> tuple[dict[str, str], ...]:
    """The conversation with its last answer, which is the gold."""
    if "messages" not in values:
        return (*messages, {"role": "assistant", "content": _text(values.get("output"), "output")})
    if messages[-1]["role"] != "assistant":
        raise Flaw("an unclosed conversation: it does not end with the assistant")
    return messages


def _preference(values: dict[str, Any]) -> tuple[tuple[dict[str, str], ...], Any, Any]:
    """The prompt as messages, and the two answers, each as it stands where it is no conversation.

    Chosen and rejected may be conversations that part at their last turn; what they share is the prompt.
    """
    prompt = _messages(values.get("prompt"))
    answers = [_messages(values.get(side)) for side in ("chosen", "rejected")]
    turns: list[dict[str, str]] = []
    if all(isinstance(answer, list) for answer in answers):
        both = [_turns(answer) for answer in answers]
        shared = 0
        while shared < min(map(len, both)) - 1 and both[0][shared] == both[1][shared]:
            shared += 1
        turns = both[0][:shared]
        if any(len(side) != shared + 1 or side[-1]["role"] != "assistant" for side in both):
            raise Flaw("chosen and rejected are not one conversation up to the assistant's last turn")
        answers = [side[-1]["content"] for side in both]
    if not turns and isinstance(prompt, list):
        turns = _turns(prompt)
    elif not turns and not _is_blank(prompt):
        turns = [_asked(values, "prompt")]
    if not turns:
        raise Flaw("the prompt is empty")
    messages = _checked(_with_system(values, turns))
    if messages[-1]["role"] != "user":
        raise Flaw("a prompt that does not end with the user")
    return messages, answers[0], answers[1]
