"""One row of labelled data to its canonical fields; whatever is wrong with it is a `Flaw`."""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from nextword.data.issues import replace_surrogates
from nextword.data.readers import map_strings
from nextword.tasks.schema import CHOICE_ROLE_PATTERN

# The fields of a task that are texts, and given.
TEXT_FIELDS = {
    "classify": ("text",),
    "entail": ("premise", "hypothesis"),
    "similarity": ("sentence1", "sentence2"),
    "rewrite": ("prompt",),
}
_CHAT_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


class RowError(Exception):
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


def parse_inputs(task: str, values: dict[str, Any]) -> dict[str, Any]:
    """The fields that are known before the answer is. Of a conversation, all turns that were written down as such."""
    if task == "choose":
        return {"question": _require_text(values.get("question"), "question"), "choices": _parse_choices(values)[0]}
    if task == "chat":
        return {"messages": _parse_conversation(values)}
    if task == "prefer":
        return {"messages": _parse_preference(values)[0]}
    return {role: _require_text(values.get(role), role) for role in TEXT_FIELDS[task]}


def parse_targets(
    task: str, values: dict[str, Any], inputs: dict[str, Any], answer_format: "Reading | None"
) -> dict[str, Any]:
    """The fields that are learned from. Those of a conversation replace what is given."""
    if task == "choose":
        assert answer_format is not None  # read_examples finds one for every data set of this task
        return {"answer": _parse_answer(values, answer_format)}
    if task == "rewrite":
        return {"completion": _require_text(values.get("completion"), "completion")}
    if task == "chat":
        return {"messages": _with_final_answer(values, inputs["messages"])}
    if task == "prefer":
        _, chosen, rejected = _parse_preference(values)
        answers = {
            "chosen": _require_text(chosen, "chosen answer"),
            "rejected": _require_text(rejected, "rejected answer"),
        }
        if chosen == rejected:
            raise RowError("the chosen answer and the rejected one are the same")
        return answers
    if "score" in values:
        return {"score": _parse_score(values["score"])}
    if "labels" in values:
        return {"labels": _parse_labels(values["labels"])}
    return {"label": _parse_label(values.get("label"))}


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _require_text(value: Any, name: str) -> str:
    if _is_blank(value):
        raise RowError(f"the {name} is empty")
    if not isinstance(value, str):
        raise RowError(f"the {name} is not a string", f"it is a {type(value).__name__}")
    return value


def _decode_json_cell(value: Any) -> Any:
    """A list or an object that a cell of CSV holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return map_strings(json.loads(value), replace_surrogates)
        except (ValueError, RecursionError):
            return value
    return value


def _parse_int(value: Any) -> int | None:
    """A whole number, also where it is written as 1.0 or as digits."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", value) else None
    return value if isinstance(value, int) else None


def parse_float(value: Any) -> float | None:
    """A finite number, also where it is written in digits."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*", value):
        return None
    try:
        parsed = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return parsed if math.isfinite(parsed) else None


# --- labels and scores


def _parse_label(value: Any) -> str:
    if _is_blank(value) or (isinstance(value, float) and math.isnan(value)):
        raise RowError("the label is empty")
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(value if isinstance(value, bool) else int(value))
    raise RowError("the label is no text and no whole number", f"it is {_value_preview(value)}")


def _parse_labels(value: Any) -> tuple[str, ...]:
    value = _decode_json_cell(value)
    if isinstance(value, str):
        value = [part for part in re.split("[;|]", value) if part.strip()]
    elif not isinstance(value, list):
        value = [value]
    return tuple(dict.fromkeys(_parse_label(label) for label in value))


def is_multilabel_column(values: Iterable[Any]) -> bool:
    """Whether a column called `label` holds lists of them."""
    return any(isinstance(_decode_json_cell(value), list) for value in values)


def is_score_column(values: Iterable[Any]) -> bool:
    """Whether a label column holds numbers, most of it, and not whole ones alone."""
    present = [value for value in values if not _is_blank(value)]
    numbers = [found for value in present if (found := parse_float(value)) is not None]
    return 2 * len(numbers) > len(present) and not all(found.is_integer() for found in numbers)


def _parse_score(value: Any) -> float:
    found = parse_float(value)
    if found is None:
        raise RowError("the score is no finite number", f"it is {_value_preview(value)}")
    return found


def _value_preview(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, list | dict):  # their repr may be deeper than what Python writes
        return f"a {type(value).__name__}"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "…"


# --- multiple choice


def _parse_choices(values: dict[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """The choices, and the names that some data sets give them (ARC: A, B, C, D, or 1, 2, 3, 4)."""
    names: list[str] = []
    if "choices" in values:
        raw_choices = _decode_json_cell(values["choices"])
        if isinstance(raw_choices, list) and raw_choices and all(isinstance(item, dict) for item in raw_choices):
            raw_choices = {key: [item.get(key) for item in raw_choices] for key in ("text", "label")}
        if isinstance(raw_choices, dict):
            labels = raw_choices.get("label")
            names = [str(name) for name in labels if isinstance(name, str | int)] if isinstance(labels, list) else []
            raw_choices = raw_choices.get("text")
        if not isinstance(raw_choices, list):
            raise RowError("the choices are not a list", f"they are {_value_preview(raw_choices)}")
    else:
        raw_choices = [
            values[role]
            for role in sorted(filter(CHOICE_ROLE_PATTERN.fullmatch, values), key=lambda role: int(role[6:]))
        ]
        while raw_choices and _is_blank(raw_choices[-1]):  # questions may have fewer choices than there are columns
            raw_choices.pop()
    if len(raw_choices) < 2:
        raise RowError("fewer than two choices", f"there are {len(raw_choices)}")
    texts = [str(item) if isinstance(item, int | float) else item for item in raw_choices]
    return tuple(_require_text(text, "choice") for text in texts), names if len(names) == len(texts) else []


def _by_name(answer: Any, choices: Sequence[str], names: Sequence[str]) -> int | None:
    name = str(answer).strip() if isinstance(answer, str | int) else None
    return names.index(name) if name in names else None


def _by_index(answer: Any, choices: Sequence[str], names: Sequence[str]) -> int | None:
    number = _parse_int(answer)
    return number if number is not None and 0 <= number < len(choices) else None


def _by_letter(answer: Any, choices: Sequence[str], names: Sequence[str]) -> int | None:
    letter = answer.strip().upper() if isinstance(answer, str) else ""
    place = ord(letter) - ord("A") if len(letter) == 1 else -1
    return place if 0 <= place < len(choices) else None


def _by_text(answer: Any, choices: Sequence[str], names: Sequence[str]) -> int | None:
    texts = [choice.strip() for choice in choices]
    text = str(answer).strip() if isinstance(answer, str | int | float) else None
    return texts.index(text) if text in texts else None


AnswerFormat = Callable[[Any, Sequence[str], Sequence[str]], int | None]
_ANSWER_FORMATS: dict[AnswerFormat, str] = {
    _by_name: "the choices' own names",
    _by_index: "numbers from 0",
    _by_letter: "letters",
    _by_text: "the choices' own texts",
}


def infer_answer_format(rows: Iterable[Row]) -> AnswerFormat:
    """What the answers of a data set are: the reading under which most rows have one.

    One row cannot tell: of the choices 3, 2, 1 and 0, the answer 2 may be the second or the third.
    """
    counts = dict.fromkeys(_ANSWER_FORMATS, 0)
    for row in rows:
        try:
            choices, names = _parse_choices(row.values)
        except RowError:  # said when the row is read
            continue
        for reading in counts:
            counts[reading] += reading(row.values.get("answer"), choices, names) is not None
    return max(counts, key=lambda reading: counts[reading])


def _parse_answer(values: dict[str, Any], answer_format: AnswerFormat) -> int:
    choices, names = _parse_choices(values)
    answer = values.get("answer")
    if _is_blank(answer):
        raise RowError("the answer is empty")
    choice_index = answer_format(answer, choices, names)
    if choice_index is None:
        kind = (
            "is out of range"
            if _parse_int(answer) is not None and answer_format is _by_index
            else "is none of the choices"
        )
        detail = f"{_value_preview(answer)}, where there are {len(choices)} choices; answers are read as {_ANSWER_FORMATS[answer_format]}"
        raise RowError(f"the answer {kind}", detail)
    return choice_index


# --- conversations


def _parse_messages(value: Any) -> list[dict[str, str]]:
    """Messages, each with its role and content, in the canonical words. The order is not checked."""
    value = _decode_json_cell(value)
    if not isinstance(value, list):
        raise RowError("a conversation that is no list of messages", f"it is {_value_preview(value)}")
    messages = []
    for turn in value:
        if not isinstance(turn, dict):
            raise RowError("a message that is no object with a role and a content", f"it is {_value_preview(turn)}")
        name = turn.get("role") if turn.get("role") is not None else turn.get("from")
        role = _CHAT_ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise RowError("a turn of an unknown role", f"{_value_preview(name)}; there are {', '.join(_CHAT_ROLES)}")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        messages.append({"role": role, "content": _require_text(content, "content of a turn")})
    return messages


def _messages_or_text(value: Any) -> Any:
    """What may be messages or a text: a text that happens to be JSON, such as [1, 2], is a text."""
    found = _decode_json_cell(value)
    return found if isinstance(found, list) and all(isinstance(turn, dict) for turn in found) else value


def _validate_turn_order(turns: list[dict[str, str]]) -> tuple[dict[str, str], ...]:
    """The turns, in an order that a conversation has."""
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise RowError("a system turn that is not the first")
    for before, after in pairwise(turns):
        if before["role"] == after["role"]:
            raise RowError("two turns of one role in a row", f"two of the {after['role']}")
    if not any(turn["role"] == "user" for turn in turns):
        raise RowError("a conversation without a turn of the user")
    return tuple(turns)


def _prepend_system_message(values: dict[str, Any], turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns, after the system's where it is in a column of its own."""
    if _is_blank(values.get("system")) or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": _require_text(values["system"], "system turn")}, *turns]


def _instruction_message(values: dict[str, Any], role: str) -> dict[str, str]:
    """An instruction and, where there is one, its input as one turn of the user."""
    parts = [_require_text(values.get(role), role)]
    if not _is_blank(values.get("input")):
        parts.append(_require_text(values["input"], "input"))
    return {"role": "user", "content": "\n\n".join(parts)}


def _parse_conversation(values: dict[str, Any]) -> tuple[dict[str, str], ...]:
    turns = (
        _parse_messages(values["messages"]) if "messages" in values else [_instruction_message(values, "instruction")]
    )
    return _validate_turn_order(_prepend_system_message(values, turns))


def _with_final_answer(values: dict[str, Any], messages: tuple[dict[str, str], ...]) -> tuple[dict[str, str], ...]:
    """The conversation with its last answer, which is the gold."""
    if "messages" not in values:
        return (*messages, {"role": "assistant", "content": _require_text(values.get("output"), "output")})
    if messages[-1]["role"] != "assistant":
        raise RowError("an unclosed conversation: it does not end with the assistant")
    return messages


def _parse_preference(values: dict[str, Any]) -> tuple[tuple[dict[str, str], ...], Any, Any]:
    """The prompt as messages, and the two answers, each as it stands where it is no conversation.

    Chosen and rejected may be conversations that part at their last turn; what they share is the prompt.
    """
    prompt = _messages_or_text(values.get("prompt"))
    answers = [_messages_or_text(values.get(side)) for side in ("chosen", "rejected")]
    turns: list[dict[str, str]] = []
    if all(isinstance(answer, list) for answer in answers):
        conversations = [_parse_messages(answer) for answer in answers]
        shared_turns = 0
        while (
            shared_turns < min(map(len, conversations)) - 1
            and conversations[0][shared_turns] == conversations[1][shared_turns]
        ):
            shared_turns += 1
        turns = conversations[0][:shared_turns]
        if any(len(side) != shared_turns + 1 or side[-1]["role"] != "assistant" for side in conversations):
            raise RowError("chosen and rejected are not one conversation up to the assistant's last turn")
        answers = [side[-1]["content"] for side in conversations]
    if not turns and isinstance(prompt, list):
        turns = _parse_messages(prompt)
    elif not turns and not _is_blank(prompt):
        turns = [_instruction_message(values, "prompt")]
    if not turns:
        raise RowError("the prompt is empty")
    messages = _validate_turn_order(_prepend_system_message(values, turns))
    if messages[-1]["role"] != "user":
        raise RowError("a prompt that does not end with the user")
    return messages, answers[0], answers[1]
