"""Rows of labelled data as the canonical fields of their task. A row that is not valid raises `RowError`."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from nextword.data.issues import replace_surrogates
from nextword.data.readers import map_strings
from nextword.tasks.schema import CHOICE_ROLE_PATTERN

# The input fields of a task that are single texts.
TEXT_FIELDS = {
    "classify": ("text",),
    "entail": ("premise", "hypothesis"),
    "similarity": ("sentence1", "sentence2"),
    "rewrite": ("prompt",),
}
_CHAT_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

Message = dict[str, str]  # {"role": …, "content": …}


class RowError(Exception):
    """Why a row cannot be used.

    Attributes:
        kind: The kind of error, the same text for all rows with this error.
        detail: The value that this row has.
    """

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


@dataclass
class Row:
    """A row of a table: where it was read, and the raw value of each role."""

    path: Path
    line: int
    values: dict[str, Any]


def parse_inputs(task: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The input fields of a row. A conversation keeps all messages, the target included.

    Raises:
        RowError: An input is missing or not valid.
    """
    if task == "choose":
        return {"question": _require_text(values.get("question"), "question"), "choices": _parse_choices(values)[0]}
    if task == "chat":
        return {"messages": _parse_conversation(values)}
    if task == "prefer":
        return {"messages": _parse_preference(values)[0]}
    return {role: _require_text(values.get(role), role) for role in TEXT_FIELDS[task]}


def parse_targets(
    task: str, values: Mapping[str, Any], inputs: Mapping[str, Any], answer_format: "AnswerFormat | None"
) -> dict[str, Any]:
    """The target fields of a row. The messages of a conversation replace those of `inputs`.

    Raises:
        RowError: A target is missing or not valid.
    """
    if task == "choose":
        assert answer_format is not None  # read_examples infers one for each data set of this task
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
            raise RowError("the chosen and the rejected answer are identical")
        return answers
    if "score" in values:
        return {"score": _parse_score(values["score"])}
    if "labels" in values:
        return {"labels": _parse_labels(values["labels"])}
    return {"label": _parse_label(values.get("label"))}


def parse_float(value: Any) -> float | None:
    """A finite number, which may be written as text; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*", value):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer with hundreds of digits
        return None
    return number if math.isfinite(number) else None


def _parse_int(value: Any) -> int | None:
    """An integer, which may be written as 1.0 or as text; else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", value) else None
    return value if isinstance(value, int) else None


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _require_text(value: Any, name: str) -> str:
    if _is_blank(value):
        raise RowError(f"the {name} is empty")
    if not isinstance(value, str):
        raise RowError(f"the {name} is not a string", f"its type is {type(value).__name__}")
    return value


def _decode_json_cell(value: Any) -> Any:
    """The list or object that a CSV cell holds as JSON; any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return map_strings(json.loads(value), replace_surrogates)
        except (ValueError, RecursionError):
            return value
    return value


def _value_preview(value: Any) -> str:
    if isinstance(value, list | dict):  # which may be nested too deeply for repr
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


# ---------------------------------------------------------------- labels and scores


def is_multilabel_column(values: Iterable[Any]) -> bool:
    """Whether a label column holds lists of labels."""
    return any(isinstance(_decode_json_cell(value), list) for value in values)


def is_score_column(values: Iterable[Any]) -> bool:
    """Whether most values of a label column are numbers, and not all of them integers."""
    present = [value for value in values if not _is_blank(value)]
    numbers = [number for value in present if (number := parse_float(value)) is not None]
    return 2 * len(numbers) > len(present) and not all(number.is_integer() for number in numbers)


def _parse_label(value: Any) -> str:
    if _is_blank(value) or (isinstance(value, float) and math.isnan(value)):
        raise RowError("the label is empty")
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(value if isinstance(value, bool) else int(value))
    raise RowError("the label is neither a string nor an integer", f"it is {_value_preview(value)}")


def _parse_labels(value: Any) -> tuple[str, ...]:
    value = _decode_json_cell(value)
    if isinstance(value, str):
        value = [part for part in re.split("[;|]", value) if part.strip()]
    elif not isinstance(value, list):
        value = [value]
    return tuple(dict.fromkeys(map(_parse_label, value)))


def _parse_score(value: Any) -> float:
    score = parse_float(value)
    if score is None:
        raise RowError("the score is not a finite number", f"it is {_value_preview(value)}")
    return score


# ---------------------------------------------------------------- multiple choice


def _parse_choices(values: Mapping[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """The choices, and the names that some data sets give them (A, B, C, D or 1, 2, 3, 4 in ARC)."""
    names: list[str] = []
    if "choices" in values:
        choices = _decode_json_cell(values["choices"])
        if isinstance(choices, list) and choices and all(isinstance(choice, dict) for choice in choices):
            choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
        if isinstance(choices, dict):
            labels = choices.get("label")
            names = [str(name) for name in labels if isinstance(name, str | int)] if isinstance(labels, list) else []
            choices = choices.get("text")
        if not isinstance(choices, list):
            raise RowError("the choices are not a list", f"they are {_value_preview(choices)}")
    else:
        roles = sorted(filter(CHOICE_ROLE_PATTERN.fullmatch, values), key=lambda role: int(role[len("choice") :]))
        choices = [values[role] for role in roles]
        while choices and _is_blank(choices[-1]):  # a question may have fewer choices than the table has columns
            choices.pop()
    if len(choices) < 2:
        raise RowError("fewer than two choices", f"the number of choices is {len(choices)}")
    texts = [str(choice) if isinstance(choice, int | float) else choice for choice in choices]
    return tuple(_require_text(text, "choice") for text in texts), names if len(names) == len(texts) else []


# An answer format maps an answer, the choices and their names to the index of the answer, or None if there is none.
AnswerFormat = Callable[[Any, Sequence[str], Sequence[str]], int | None]


def _by_name(answer: Any, choices: Sequence[str], names: Sequence[str]) -> int | None:
    name = str(answer).strip() if isinstance(answer, str | int) else None
    return names.index(name) if name in names else None


def _by_index(answer: Any, choices: Sequence[str], names: Sequence[str]) -> int | None:
    index = _parse_int(answer)
    return index if index is not None and 0 <= index < len(choices) else None


def _by_letter(answer: Any, choices: Sequence[str], names: Sequence[str]) -> int | None:
    letter = answer.strip().upper() if isinstance(answer, str) else ""
    index = ord(letter) - ord("A") if len(letter) == 1 else -1
    return index if 0 <= index < len(choices) else None


def _by_text(answer: Any, choices: Sequence[str], names: Sequence[str]) -> int | None:
    texts = [choice.strip() for choice in choices]
    text = str(answer).strip() if isinstance(answer, str | int | float) else None
    return texts.index(text) if text in texts else None


_ANSWER_FORMATS: dict[AnswerFormat, str] = {
    _by_name: "names of the choices",
    _by_index: "indices from 0",
    _by_letter: "letters",
    _by_text: "texts of the choices",
}


def infer_answer_format(rows: Iterable[Row]) -> AnswerFormat:
    """The format under which most rows of a data set have a valid answer.

    One row is ambiguous: with the choices 3, 2, 1 and 0, the answer 2 is the second (by text) or the third (by index).
    """
    counts = dict.fromkeys(_ANSWER_FORMATS, 0)
    for row in rows:
        try:
            choices, names = _parse_choices(row.values)
        except RowError:  # reported when the row is parsed
            continue
        for answer_format in counts:
            counts[answer_format] += answer_format(row.values.get("answer"), choices, names) is not None
    return max(counts, key=lambda answer_format: counts[answer_format])


def _parse_answer(values: Mapping[str, Any], answer_format: AnswerFormat) -> int:
    choices, names = _parse_choices(values)
    answer = values.get("answer")
    if _is_blank(answer):
        raise RowError("the answer is empty")
    index = answer_format(answer, choices, names)
    if index is None:
        out_of_range = _parse_int(answer) is not None and answer_format is _by_index
        raise RowError(
            f"the answer is {'out of range' if out_of_range else 'none of the choices'}",
            f"it is {_value_preview(answer)}, and there are {len(choices)} choices; "
            f"answers are read as {_ANSWER_FORMATS[answer_format]}",
        )
    return index


# ---------------------------------------------------------------- conversations


def _parse_messages(value: Any) -> list[Message]:
    """Messages with canonical roles, in any order."""
    value = _decode_json_cell(value)
    if not isinstance(value, list):
        raise RowError("the conversation is not a list of messages", f"it is {_value_preview(value)}")
    messages: list[Message] = []
    for message in value:
        if not isinstance(message, dict):
            raise RowError("a message is not an object with role and content", f"it is {_value_preview(message)}")
        name = message.get("role") if message.get("role") is not None else message.get("from")
        role = _CHAT_ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise RowError("a message has an unknown role", f"{_value_preview(name)}; known: {', '.join(_CHAT_ROLES)}")
        content = message.get("content") if message.get("content") is not None else message.get("value")
        messages.append({"role": role, "content": _require_text(content, "content of a message")})
    return messages


def _messages_or_text(value: Any) -> Any:
    """A list of messages, decoded; any other value unchanged, such as the text "[1, 2]"."""
    decoded = _decode_json_cell(value)
    return decoded if isinstance(decoded, list) and all(isinstance(message, dict) for message in decoded) else value


def _validate_turn_order(messages: list[Message]) -> tuple[Message, ...]:
    if any(message["role"] == "system" for message in messages[1:]):
        raise RowError("a system message is not the first message")
    for previous, message in pairwise(messages):
        if previous["role"] == message["role"]:
            raise RowError("two consecutive messages have the same role", f"the role is {message['role']}")
    if not any(message["role"] == "user" for message in messages):
        raise RowError("the conversation has no user message")
    return tuple(messages)


def _prepend_system_message(values: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages after the content of the `system` column, if there is one."""
    if _is_blank(values.get("system")) or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": _require_text(values["system"], "system message")}, *messages]


def _instruction_message(values: Mapping[str, Any], role: str) -> Message:
    """An instruction and its optional input as one user message."""
    parts = [_require_text(values.get(role), role)]
    if not _is_blank(values.get("input")):
        parts.append(_require_text(values["input"], "input"))
    return {"role": "user", "content": "\n\n".join(parts)}


def _parse_conversation(values: Mapping[str, Any]) -> tuple[Message, ...]:
    has_messages = "messages" in values
    messages = _parse_messages(values["messages"]) if has_messages else [_instruction_message(values, "instruction")]
    return _validate_turn_order(_prepend_system_message(values, messages))


def _with_final_answer(values: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation with its last answer, which is the target."""
    if "messages" not in values:
        return (*messages, {"role": "assistant", "content": _require_text(values.get("output"), "output")})
    if messages[-1]["role"] != "assistant":
        raise RowError("the conversation does not end with an assistant message")
    return messages


def _parse_preference(values: Mapping[str, Any]) -> tuple[tuple[Message, ...], Any, Any]:
    """The prompt as messages, the chosen and the rejected answer.

    Chosen and rejected may be conversations that differ in their last message; the messages they share are the prompt.
    """
    prompt = _messages_or_text(values.get("prompt"))
    answers = [_messages_or_text(values.get(side)) for side in ("chosen", "rejected")]
    messages: list[Message] = []
    if all(isinstance(answer, list) for answer in answers):
        chosen, rejected = map(_parse_messages, answers)
        num_shared = 0
        while num_shared < min(len(chosen), len(rejected)) - 1 and chosen[num_shared] == rejected[num_shared]:
            num_shared += 1
        messages = chosen[:num_shared]
        if any(len(side) != num_shared + 1 or side[-1]["role"] != "assistant" for side in (chosen, rejected)):
            raise RowError("chosen and rejected differ in more than the last assistant message")
        answers = [chosen[-1]["content"], rejected[-1]["content"]]
    if not messages and isinstance(prompt, list):
        messages = _parse_messages(prompt)
    elif not messages and not _is_blank(prompt):
        messages = [_instruction_message(values, "prompt")]
    if not messages:
        raise RowError("the prompt is empty")
    ordered = _validate_turn_order(_prepend_system_message(values, messages))
    if ordered[-1]["role"] != "user":
        raise RowError("the prompt does not end with a user message")
    return ordered, answers[0], answers[1]
