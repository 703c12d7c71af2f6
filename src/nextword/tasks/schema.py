"""The columns of labeled data and the task that they belong to, and rows as the canonical fields of their task.

A row that is not valid raises `RowError`.
"""

import ast
import json
import math
import re
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

from nextword.common.errors import UsageError
from nextword.common.fs import is_json_array, is_json_object
from nextword.common.text_units import nfc
from nextword.data.chat_format import ROLE_NAMES, content_text
from nextword.data.issues import RowError, join_names, replace_surrogates
from nextword.data.readers import TEXT_COLUMNS, find_column, map_strings


@dataclass(frozen=True)
class TaskSchema:
    """The columns of a task, as declared in `schema.toml`.

    Attributes:
        expects: Description of the columns for messages.
        columns: The usual column names of each role, most usual first.
        inputs: Roles needed to read a row: one of each group.
        targets: Roles needed to learn from a row: one of each group.
        exclusive: Two groups of roles of which a table has one.
        paired: Two roles whose columns are recognized together: by the first names of both, the second ones, ….
    """

    expects: str
    columns: dict[str, list[str]]
    inputs: list[list[str]]
    targets: list[list[str]]
    exclusive: tuple[list[str], ...] = ()
    paired: tuple[str, ...] = ()

    def required(self, require_targets: bool) -> list[list[str]]:
        """Groups of roles of which a row needs one each."""
        return [*self.inputs, *(self.targets if require_targets else [])]


_SCHEMA = Path(__file__).with_name("schema.toml").read_text(encoding="utf-8")
TASKS = {task: TaskSchema(**table) for task, table in tomllib.loads(_SCHEMA).items()}
for _task in ("classify", "continue"):
    TASKS[_task].columns["text"][:0] = TEXT_COLUMNS
CHOICE_ROLE_PATTERN = re.compile(r"choice[1-9][0-9]?")
# A prefix, and a letter or a number; or a capital letter alone.
_CHOICE_COLUMN = re.compile(
    r"(?P<prefix>(?i:choice|option|ending|answer|sol))[_ ]?(?P<index>[a-zA-Z]|[0-9]{1,2})|[A-Z]"
)
# The input fields of a task that are single texts.
TEXT_FIELDS = {
    task: tuple(role for [role] in TASKS[task].inputs) for task in ("classify", "entail", "similarity", "rewrite")
}
ANSWER_FORMATS = ("names of the choices", "indices from 0", "indices from 1", "letters", "texts of the choices")
# The beginning of a turn of a conversation in one text, after a blank line or (in a text without one) after a line.
_TURNS = [re.compile(rf"(?:\A\s*|{gap})({'|'.join(map(str.capitalize, ROLE_NAMES))}):") for gap in (r"\n\s*\n", r"\n")]
# Labels that say whether a text follows from another, which has a direction.
_ENTAILMENT = re.compile(r"(not|non)?[_ -]?entail(ment|s|ed)?|contradict(ion|s|ory)?", re.IGNORECASE)
MAX_CLASSES = 100  # a column with more values is not taken for a label, if its name does not say so
_MISSING_LABELS = ("-1", "-", "--", "?", "na", "n/a", "<na>", "#n/a", "nan", "null", "missing")
_VECTOR = re.compile(r"[01](?:\.0*)?(?:[\s,;|]+[01](?:\.0*)?)+")  # of zeros and ones
_TRUTH_VALUES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_INTEGER = re.compile(r"\+?(-?[0-9]+)(?:\.0*)?")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]*,[0-9]+(?:[eE][+-]?[0-9]+)?")
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2}(?:,[0-9]{3})+")
_CONTAINERS: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": list, "set": sorted, "dict": dict}
# A string, a bracket or separator, or a word, of a list or object as Python or NumPy prints it.
_LITERAL_TOKEN = re.compile(
    r"""(?:"(?:[^"\\]|\\.)*+"|'(?:[^'\\]|\\.)*+')|[\[\](){},:]|[^\s\[\](){},:"']+|["']""", re.DOTALL
)

Message = dict[str, Any]  # {"role": …, "content": …}, and "weight": 0 if the message is not learned


# ---------------------------------------------------------------- columns


def fitting_tasks(columns: Iterable[str]) -> list[str]:
    """The tasks that the columns of a table may belong to by their names, the most distinctive ones first."""
    names = list(columns)

    def has(task: str, *roles: str) -> bool:
        return all(find_column(names, TASKS[task].columns[role]) is not None for role in roles)

    candidates = [
        ("chat", has("chat", "messages")),
        ("prefer", has("prefer", "chosen", "rejected")),
        ("chat", find_column(names, ("instruction",)) is not None and has("chat", "output")),
        ("entail", all(find_column(names, (name,)) is not None for name in ("premise", "hypothesis"))),
        ("similarity", _find_column_pair(names, "similarity") is not None),
        ("choose", has("choose", "question") and (has("choose", "choices") or bool(choice_columns(names)))),
        ("chat", has("chat", "instruction", "input", "output") and find_column(names, ("input",)) is None),
        ("rewrite", _find_column_pair(names, "rewrite") is not None),
        ("classify", has("classify", "text") and (has("classify", "label") or has("classify", "labels"))),
        ("continue", has("continue", "text")),
    ]
    return list(dict.fromkeys(task for task, fits in candidates if fits))


class SuggestionError(UsageError):
    """A `UsageError` with the options of a command that would work.

    Attributes:
        options: The options, such as ["--task", "classify"].
    """

    def __init__(self, message: str, options: Sequence[str] = ()):
        super().__init__(message)
        self.options = list(options)


def infer_columns(
    names: Sequence[str], rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
) -> tuple[str, dict[str, str], str]:
    """The task of a table, the columns of roles that their names do not tell, and the reason.

    Args:
        names: The columns.
        rows: The values of the first rows.
        columns: Columns chosen by the user, {role: column}.

    Raises:
        SuggestionError: Neither the names nor the values tell the task.
    """
    free = [name for name in names if name not in columns.values()]
    fitting = fitting_tasks([*columns, *free])
    values = _column_values(names, rows)
    label = columns.get("label") or find_column(free, TASKS["similarity"].columns["label"])
    if label and fitting[:1] != ["entail"] and any(_ENTAILMENT.fullmatch(value) for value in set(values[label])):
        pair = [columns.get(f"sentence{i}") for i in (1, 2)]
        pair = pair if all(pair) else _find_column_pair(free, "entail")
        if pair:
            found = {"premise": str(pair[0]), "hypothesis": str(pair[1]), "label": label}
            return "entail", found, f"the values of {label} say entailment, which has a direction"
    text_columns = sorted(filter(partial(_is_text_column, values), free), key=lambda name: -_mean_length(values[name]))
    is_generated = fitting[:1] in (["rewrite"], ["chat"])
    mapped = resolve_columns(fitting[0], names, columns) if is_generated else {}
    answers = [row.get(mapped.get("completion", mapped.get("output", ""))) for row in rows]
    has_texts = not is_generated or any(not isinstance(answer, bool | int | float | None) for answer in answers)
    if fitting and fitting[0] != "continue" and (has_texts or "messages" in mapped or not rows):
        return fitting[0], {}, "the names of the columns" + _describe_others(fitting[1:])
    fitting = fitting if has_texts else []
    text = columns.get("text") or find_column(free, TASKS["classify"].columns["text"]) or next(iter(text_columns), None)
    bits = [name for name in free if values[name] and set(values[name]) <= {"0", "1", "True", "False", "0.0", "1.0"}]
    if text and len(bits) > 1 and len(rows) > 1 and "label" not in columns:
        return "classify", {"text": text, "labels": ",".join(bits)}, f"{len(bits)} columns have zeros and ones only"
    candidates = [name for name in free if name != text and _is_label_column(values[name], len(rows))]
    named = [name for name in candidates if name.lower().endswith(tuple(TASKS["classify"].columns["label"]))]
    candidates = named if len(named) == 1 else candidates
    if not has_texts and len(text_columns) > 1:
        message = f"the answers are no texts, and there are several columns of texts: {_describe_columns(names, rows)}"
        raise SuggestionError(message, suggest_columns("entail", names, rows, columns))
    if text and len(candidates) == 1 and (fitting or len(text_columns) <= 1 or not set(columns) - {"text"}):
        label = candidates[0]
        reason = f"{label} has {len(set(values[label]))} different values and {text} the longest texts"
        return "classify", {"text": text, "label": label}, reason
    if fitting:
        reason = "there is a text and no label; if a column is the label: --task classify --column label=COLUMN"
        return fitting[0], {}, reason
    numbered = " (the table has no header, and its columns have numbers)" if names[0] == "1" else ""
    expected = "".join(f"\n  {task}: {schema.expects}" for task, schema in TASKS.items())
    raise SuggestionError(
        f"no task fits the columns {join_names(names)}{numbered}. They have, for example:{_describe_columns(names, rows)}\n"
        f"Name the task and its columns. Each task expects:{expected}",
        suggest_columns(None, names, rows, columns),
    )


def suggest_columns(
    task: str | None,
    names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    require_targets: bool = True,
) -> list[str]:
    """The options of a command that names a column for each role that a task needs, by the values of the columns.

    Without a task it is classification if a column may be a label, and else text to text.
    """
    values = _column_values(names, rows)
    free = [name for name in names if name not in columns.values()]
    texts = [name for name in free if _is_text_column(values, name)]
    labels = sorted(
        (name for name in free if name not in texts and _is_label_column(values[name], len(rows))),
        key=lambda name: len(set(values[name])),
    )
    scores = [name for name in free if name not in texts and is_score_column(values[name])]
    guess = "classify" if labels and texts else "similarity" if scores and len(texts) > 1 else "rewrite"
    options = [] if task and not require_targets else ["--task", task or guess]
    task = task or guess
    if task in ("classify", "chat") or not require_targets:
        texts.sort(key=lambda name: -_mean_length(values[name]))
    pools = {"label": labels, "labels": labels, "score": scores or labels, "answer": labels}
    for role, name in columns.items():
        options += ["--column", f"{role}={name}"]
    for group in TASKS[task].required(require_targets):
        if not columns.keys() & set(group):
            pool = pools.get(group[0], texts)
            options += ["--column", f"{group[0]}={pool.pop(0) if pool else 'COLUMN'}"]
    return options


def _describe_columns(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """What the columns hold, for a message."""
    firsts = {name: list(dict.fromkeys(values))[:3] for name, values in _column_values(names[:12], rows).items()}
    shown = {name: [v if len(v) <= 30 else v[:29] + "…" for v in values] for name, values in firsts.items()}
    return "".join(f"\n  {name}: {', '.join(map(repr, values))}" for name, values in shown.items())


def _column_values(names: Iterable[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The values of each column that are not blank, as texts."""
    return {name: [str(row[name]).strip() for row in rows if not _is_blank(row.get(name))] for name in names}


def _mean_length(values: Sequence[str]) -> float:
    return sum(map(len, values)) / max(1, len(values))


def _is_text_column(values: Mapping[str, Sequence[str]], name: str) -> bool:
    """Whether a column has different texts of several words."""
    column = values[name]
    return min(sum(" " in value for value in column), len(set(column))) > len(column) / 2


def _is_label_column(column: Sequence[str], num_rows: int) -> bool:
    """Whether a column has a few values in all rows, each of them short."""
    distinct = set(column)
    is_short = all(len(value) <= 40 for value in distinct) and not is_score_column(distinct)
    return len(column) > 0.9 * num_rows and 1 < len(distinct) <= min(MAX_CLASSES, num_rows / 2) and is_short


def _describe_others(tasks: Sequence[str]) -> str:
    others = [task for task in tasks if task != "continue"]
    return f", which would also fit {' or '.join(f'--task {task}' for task in others)}" if others else ""


def resolve_columns(
    task: str, column_names: Iterable[str], overrides: Mapping[str, str] | None = None, require_targets: bool = True
) -> dict[str, str]:
    """The column of each role of a task: {role: column}.

    Choices in columns of their own get the roles choice1, choice2, …

    Args:
        task: Name of the task.
        column_names: The columns of the table.
        overrides: Columns chosen by the user, {role: column}. Other roles are found by their usual column names.
        require_targets: If false, target columns may be missing.

    Raises:
        UsageError: The task, a role or a column does not exist, or a required role has no column.
    """
    names = list(column_names)
    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    schema = TASKS[task]
    mapping: dict[str, str] = {}
    for role, column in (overrides or {}).items():
        if role not in schema.columns and not (task == "choose" and CHOICE_ROLE_PATTERN.fullmatch(role)):
            more = ", or choice1, choice2, …" if task == "choose" else ""
            raise UsageError(f"{task} has no role {role}; its roles are {', '.join(schema.columns)}{more}")
        if column not in names and column.isdigit() and 0 < int(column) <= len(names):
            column = names[int(column) - 1]  # by its number
        is_known = column in names or (role == "labels" and set(column.split(",")) <= set(names))
        if not is_known:
            raise UsageError(f"there is no column {column} for {role}; columns: {join_names(names)}")
        mapping[role] = column
    if schema.exclusive and all(mapping.keys() & group for group in schema.exclusive):
        first, second = (", ".join(sorted(group)) for group in schema.exclusive)
        raise UsageError(f"{task} takes {first} or {second}, not both")
    _fill_default_columns(task, names, mapping)
    for group in schema.required(require_targets):
        if not any(role in mapping for role in group):
            raise SuggestionError(
                f"{task} needs a column for {' or '.join(group)}; columns: {join_names(names)}. "
                f"It expects {schema.expects}. Name the column: --column {group[0]}=COLUMN"
            )
    return mapping


def _fill_default_columns(task: str, column_names: list[str], mapping: dict[str, str]) -> None:
    """Add the roles whose columns have a usual name."""
    schema = TASKS[task]
    if not mapping.keys() & schema.paired and (pair := _find_column_pair(column_names, task)):
        mapping.update(zip(schema.paired, pair, strict=True))
    for role, aliases in schema.columns.items():
        is_excluded = any(
            role in group and mapping.keys() & other for group, other in permutations(schema.exclusive, 2)
        )
        if role == "choices" and any(CHOICE_ROLE_PATTERN.fullmatch(name) for name in mapping):
            is_excluded = True
        if role in mapping or is_excluded:
            continue
        if (column := find_column(column_names, aliases, exclude=mapping.values())) is not None:
            mapping[role] = column
        elif role == "choices":
            mapping.update({f"choice{i}": name for i, name in enumerate(choice_columns(column_names), 1)})


def choice_columns(column_names: Iterable[str]) -> list[str]:
    """The columns that hold one choice each, in order: A, B, …, choice1, …, option_a, … or ending0, …; may be empty."""
    series: dict[tuple[str, bool], dict[int, str]] = {}  # (prefix, whether it is numbered) → number → column
    for name in column_names:
        if match := _CHOICE_COLUMN.fullmatch(name.strip()):
            prefix, index = (match["prefix"] or "").lower(), (match["index"] or match[0]).lower()
            number = int(index) if index.isdigit() else ord(index) - ord("a") + 1
            series.setdefault((prefix, index.isdigit()), {})[number] = name
    for columns in series.values():
        lowest = min(columns)
        if lowest in (0, 1) and len(columns) > 1 and max(columns) - lowest == len(columns) - 1:
            return [columns[number] for number in sorted(columns)]
    return []


def _find_column_pair(column_names: list[str], task: str) -> tuple[str, str] | None:
    for aliases in zip(*(TASKS[task].columns[role] for role in TASKS[task].paired), strict=True):
        first, second = (find_column(column_names, (alias,)) for alias in aliases)
        if first is not None and second is not None:
            return first, second
    return None


# ---------------------------------------------------------------- rows


def parse_inputs(task: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The input fields of a row. A conversation keeps all messages, the target included.

    Args:
        task: Name of the task.
        values: The raw value of each role.

    Raises:
        RowError: An input is missing or not valid.
    """
    if task == "choose":
        return {"question": _require_text(values.get("question"), "question"), "choices": _parse_choices(values)[0]}
    if task == "chat":
        has_messages = "messages" in values
        messages = _parse_messages(values["messages"]) if has_messages else [_user_message(values, "instruction")]
        return {"messages": _parse_conversation(values, messages)}
    if task == "prefer":
        return {"messages": _parse_preference(values)[0]}
    return {role: _require_text(values.get(role), role) for role in TEXT_FIELDS[task]}


def parse_targets(
    task: str, values: Mapping[str, Any], inputs: Mapping[str, Any], answer_format: str
) -> dict[str, Any]:
    """The target fields of a row. The messages of a conversation replace those of `inputs`.

    Args:
        task: Name of the task.
        values: The raw value of each role.
        inputs: The input fields.
        answer_format: One of `ANSWER_FORMATS`, for the task `choose`.

    Raises:
        RowError: A target is missing or not valid.
    """
    if task == "choose":
        return {"answer": _parse_answer(values, answer_format)}
    if task == "rewrite":
        return {"completion": _require_text(_first_text(values.get("completion")), "completion")}
    if task == "chat":
        messages = inputs["messages"]
        if "messages" not in values:
            messages += ({"role": "assistant", "content": _require_text(_first_text(values.get("output")), "output")},)
        if messages[-1]["role"] != "assistant":
            raise RowError("the conversation does not end with an assistant message")
        if not any(message["role"] == "assistant" and message.get("weight", 1) for message in messages):
            raise RowError("the weight of all assistant messages is 0")
        return {"messages": messages}
    if task == "prefer":
        _, *answers = _parse_preference(values)
        chosen, rejected = (
            _require_text(answer, f"{side} answer")
            for answer, side in zip(answers, ("chosen", "rejected"), strict=True)
        )
        if chosen == rejected:
            raise RowError("the chosen and the rejected answer are identical")
        return {"chosen": chosen, "rejected": rejected}
    if "labels" in values:
        labels = values["labels"] if is_json_array(values["labels"]) else [values["labels"]]
        if fractions := [label for label in labels if isinstance(label, float) and label % 1 > 0]:
            raise RowError("the labels are fractions", f"the first is {fractions[0]}")
        return {"labels": tuple(dict.fromkeys(map(_parse_label, labels)))}
    if "score" not in values:
        return {"label": _parse_label(values.get("label"))}
    score = parse_float(values["score"])
    if score is None:
        raise RowError("the score is not a finite number", f"it is {_preview(values['score'])}")
    return {"score": score}


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
    match = _INTEGER.fullmatch(str(value).strip()) if isinstance(value, str | int | float) else None
    return int(match[1]) if match and len(match[1]) < 10 else None


def parse_truth(value: Any) -> bool | None:
    """A truth value, which may be written as 0 or 1 or as text; else None."""
    return _TRUTH_VALUES.get(str(value).strip().lower()) if isinstance(value, str | int | float) else None


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _is_missing(value: Any) -> bool:
    """Whether a label is missing: blank, or not a finite number."""
    return _is_blank(value) or (isinstance(value, float) and not math.isfinite(value))


def _first_text(value: Any) -> Any:
    """The first of several answers, as data sets of questions have them; any other value unchanged."""
    return value[0] if is_json_array(value) and value and all(isinstance(item, str) for item in value) else value


def _require_text(value: Any, name: str) -> str:
    if _is_blank(value):
        raise RowError(f"the {name} is empty")
    if not isinstance(value, str):
        raise RowError(f"the {name} is not a string", f"its type is {type(value).__name__}")
    return value


def _decode_cell(value: Any) -> Any:
    """The list or object that a cell holds as JSON, or as Python or NumPy prints it; any other value unchanged."""
    if not isinstance(value, str) or not re.match(r"\s*(array|tensor)?[\[{(]", value):
        return value
    with suppress(ValueError, RecursionError):
        return map_strings(json.loads(value), replace_surrogates)
    tokens: list[str] = []
    for token in _LITERAL_TOKEN.findall(value):
        if token.startswith("dtype="):
            tokens.pop()  # its comma
        elif token not in ("array", "tensor"):
            # NumPy has no commas between the elements.
            follows = bool(tokens) and tokens[-1] not in "[({,:" and token not in "])},:"
            tokens += [",", token] if follows else [token]
    with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError), warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of an unknown escape in a string
        decoded = ast.literal_eval("".join(tokens))
        if to_json := _CONTAINERS.get(type(decoded).__name__):
            return map_strings(to_json(decoded), replace_surrogates)
    return value


def _preview(value: Any) -> str:
    if is_json_array(value) or is_json_object(value):  # which may be nested too deeply for repr
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


# ---------------------------------------------------------------- labels


def interpret_labels(values: Sequence[Any], role: str, may_change: bool) -> tuple[str, list[Any], str]:
    """Whether the rows of a column have one label or several, decided by all values of the column.

    Several labels are lists; or vectors of zeros and ones, whose places are the labels; or, in a column with the role `labels`,
    texts separated by ";" or "|", or by "," if the parts are no more than the texts.

    Args:
        values: The values of the column.
        role: The role of the column by its name: "label" or "labels".
        may_change: Whether a column with the role "labels" that has one label in each row gets the role "label".

    Returns:
        The role, the values (lists if the role is "labels"), and what was decided, for a message; "" if it is as usual.

    Raises:
        UsageError: Vectors of zeros and ones have different lengths.
    """
    cells = [_decode_cell(value) for value in values]
    has_lists, texts = any(map(is_json_array, cells)), {cell.strip() for cell in cells if isinstance(cell, str)} - {""}
    separator = "[;|]" if role == "labels" else ""
    if texts and all(map(_VECTOR.fullmatch, texts)):
        has_lists, separator = True, r"[\s,;|]+"
    elif separator and not any(re.search(separator, text) for text in texts):
        parts = {part.strip() for text in texts for part in text.split(",")}
        separator = "," if len(parts) <= len(texts) else separator
    if separator:
        cells = [
            [part.strip() for part in re.split(separator, cell) if part.strip()] if isinstance(cell, str) else cell
            for cell in cells
        ]
    lists = [cell if is_json_array(cell) else [cell] for cell in cells if not _is_missing(cell) and cell != []]
    bits = [[parse_truth(label) for label in labels] for labels in lists]
    lengths = [length for length, _ in Counter(map(len, lists)).most_common()]
    note = ""
    if has_lists and all(None not in row for row in bits) and max(lengths, default=0) > 1 + (len(lengths) > 1):
        if len(lengths) > 1:
            raise UsageError(
                f"the labels are vectors of {lengths[0]} zeros and ones, but some have {lengths[1]}: correct them"
            )
        places = ([place for place, bit in enumerate(row) if bit] for row in bits)
        cells = [cell if _is_missing(cell) or cell == [] else next(places) for cell in cells]
        note, has_lists = "vectors of zeros and ones: the labels are their places, from 0", False
    values = [next(iter(cell), None) if is_json_array(cell) else cell for cell in cells]
    # An empty list has no label, but an empty cell among integers is a missing label.
    is_complete = None not in values or not (
        note or any(_parse_int(value) is None for value in values if value is not None)
    )
    is_single = all(len(cell) < 2 for cell in cells if is_json_array(cell)) and any(
        value is not None for value in values
    )
    if (may_change or role == "label") and not has_lists and is_single and is_complete and (role == "labels" or note):
        return "label", values, "each row has one label, so one label is predicted and not several"
    return "labels" if any(map(is_json_array, cells)) else role, cells, note


def ask_about_labels(counts: Mapping[str, int], label_map: Mapping[str, str]) -> None:
    """Check that no label may be a mark for a missing one, or another spelling of another one.

    Args:
        counts: The number of examples of each label.
        label_map: The labels that were decided about.

    Raises:
        SuggestionError: The labels leave a question open. All questions are in one message.
    """
    questions, answers = list[str](), list[str]()
    groups: dict[str, list[str]] = {}
    for name in sorted(counts, key=lambda name: -counts[name]):
        groups.setdefault(re.sub(r"[\s_-]+", " ", name.strip("\"'. ").casefold()) or name, []).append(name)
    names = [spellings[0] for spellings in groups.values()]
    numbers = [name for name in names if parse_float(name) is not None]
    is_signed = set(numbers) == set(names) and set(names) <= {"-1", "1"}
    for name in counts:
        if name.lower() in _MISSING_LABELS and not is_signed and name not in label_map:
            questions.append(f"is {name} ({counts[name]:,}) a missing label? Leave these rows out: --map-label={name}=")
            answers += [f"--map-label={name}="]
    for spellings in groups.values():
        if others := [name for name in spellings[1:] if name not in label_map]:
            shown = ", ".join(f"{name} ({counts[name]:,})" for name in spellings)
            questions.append(f"are {shown} one label? Merge them: --map-label={others[0]}={spellings[0]}")
            answers += [f"--map-label={name}={spellings[0]}" for name in others]
    words = [name for name in names if name not in numbers and name.lower() not in _MISSING_LABELS]
    if 0 < len(numbers) <= 20 and 0 < len(words) <= 20 and not label_map.keys() & {*numbers, *words}:
        shown = ", ".join(f"{name} ({counts[name]:,})" for name in [*numbers, *words])
        questions.append(
            f"some labels are numbers and others words: {shown}. Which belong together? --map-label=NUMBER=WORD"
        )
        answers += [f"--map-label={name}={name}" for name in numbers]
    if questions:
        raise SuggestionError(
            "\n  ".join(
                ["the labels leave a question open (to keep a label as it is: --map-label=LABEL=LABEL)", *questions]
            ),
            answers,
        )


def convert_decimal_commas(values: Sequence[Any]) -> tuple[list[Any], str]:
    """The scores of a column with decimal points, if all of it is written with decimal commas ("3,5"); else unchanged.

    Returns:
        The values, and what was decided, for a message; "" if there are no decimal commas.
    """
    texts = [value.strip() for value in values if isinstance(value, str)]
    commas = [text for text in texts if "," in text]
    # Groups of three digits are thousands ("1,250"), unless the first is a zero, or another value has other groups.
    is_decimal = all(map(_DECIMAL_COMMA.fullmatch, commas)) and not all(map(_THOUSANDS.fullmatch, commas))
    if not is_decimal or any("." in text for text in texts):
        return list(values), ""
    note = f"commas are decimal points: {commas[0]} is {commas[0].replace(',', '.')}"
    return [value.replace(",", ".") if isinstance(value, str) else value for value in values], note


def is_score_column(values: Iterable[Any]) -> bool:
    """Whether most values of a label column are numbers, and not all of them integers."""
    present = [value for value in values if not _is_blank(value)]
    numbers = [number for value in present if (number := parse_float(value)) is not None]
    return 2 * len(numbers) > len(present) and not all(number.is_integer() for number in numbers)


def _parse_label(value: Any) -> str:
    if _is_missing(value):
        raise RowError("the label is empty")
    if isinstance(value, str | int | float):
        text = nfc(str(value).strip())
        integer = _INTEGER.fullmatch(text)
        return integer[1] if integer else text
    raise RowError("the label is neither a string nor a number", f"it is {_preview(value)}")


# ---------------------------------------------------------------- multiple choice


def _parse_choices(values: Mapping[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """The choices, and the names that some data sets give them (A, B, C, D or 1, 2, 3, 4 in ARC)."""
    names: list[str] = []
    if "choices" in values:
        choices = _decode_cell(values["choices"])
        if is_json_array(choices) and choices and all(map(is_json_object, choices)):
            choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
        if is_json_object(choices):
            labels = choices.get("label")
            names = [str(name) for name in labels if isinstance(name, str | int)] if is_json_array(labels) else []
            choices = choices.get("text")
        if not is_json_array(choices):
            raise RowError("the choices are not a list", f"they are {_preview(choices)}")
    else:
        roles = sorted(filter(CHOICE_ROLE_PATTERN.fullmatch, values), key=lambda role: int(role[len("choice") :]))
        choices = [values[role] for role in roles]
        while choices and _is_blank(choices[-1]):  # a question may have fewer choices than the table has columns
            choices.pop()
    if len(choices) < 2:
        raise RowError("fewer than two choices", f"the number of choices is {len(choices)}")
    texts = [str(choice) if isinstance(choice, int | float) else choice for choice in choices]
    return tuple(_require_text(text, "choice") for text in texts), names if len(names) == len(texts) else []


def _answer_indices(values: Mapping[str, Any]) -> dict[str, int | None]:
    """The index of the answer of a row as each of `ANSWER_FORMATS` reads it, None if it is none of the choices."""
    choices, names = _parse_choices(values)
    answer = values.get("answer")
    text = str(answer).strip() if isinstance(answer, str | int | float) else ""
    named = _CHOICE_COLUMN.fullmatch(text)  # such as option2 or answerB
    index = (named["index"] or text) if named else text.strip("().[]: ")
    number = _parse_int(index)
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    keys: list[tuple[Any, Sequence[Any]]] = [  # what is looked up, and that of each choice
        (text, names),
        (number, range(len(choices))),
        (number, range(1, len(choices) + 1)),
        (index.upper(), letters),
        (text, [choice.strip() for choice in choices]),
    ]
    indices = [known.index(key) if key in known else None for key, known in keys]
    return dict(zip(ANSWER_FORMATS, indices, strict=True))


def infer_answer_format(rows: Iterable[Mapping[str, Any]], default: str = "") -> tuple[str, str]:
    """The one of `ANSWER_FORMATS` under which most rows of a data set have a valid answer.

    One row is ambiguous: with the choices 3, 2, 1 and 0, the answer 2 is the second (by text) or the third (by index).

    Args:
        rows: The values of each role of the rows.
        default: The format that is preferred if several fit equally many rows, such as that of the training data.

    Returns:
        The format; and what else fits the answers as well, for a message, or "".

    Raises:
        UsageError: Some answers are indices from 0 only, and others indices from 1 only.
    """
    patterns: Counter[tuple[int | None, ...]] = Counter()  # the index under each format → number of rows
    for values in rows:
        with suppress(RowError):  # reported when the row is parsed
            patterns[tuple(_answer_indices(values).values())] += 1
    counts = [sum(n for pattern, n in patterns.items() if pattern[i] is not None) for i in range(len(ANSWER_FORMATS))]
    best = max(range(len(counts)), key=lambda i: (counts[i], ANSWER_FORMATS[i] == default))
    both = sum(n for pattern, n in patterns.items() if pattern[1] is not None and pattern[2] is not None)
    only_from_0, only_from_1 = counts[1] - both, counts[2] - both
    if best in (1, 2) and min(only_from_0, only_from_1) > max(1, sum(counts[1:3]) // 20):
        raise UsageError(
            f"the answers contradict each other: {only_from_0:,} rows have the answer 0, an index from 0, and {only_from_1:,} "
            "have the number of their choices, an index from 1. Correct them, or split the data by its source"
        )
    others = [
        name
        for i, name in enumerate(ANSWER_FORMATS)
        if counts[i] == counts[best] > 0 and any(pattern[i] != pattern[best] for pattern in patterns)
    ]
    return ANSWER_FORMATS[best], "" if ANSWER_FORMATS[best] == default else " or ".join(others)


def _parse_answer(values: Mapping[str, Any], answer_format: str) -> int:
    choices, answer = _parse_choices(values)[0], values.get("answer")
    if _is_blank(answer):
        raise RowError("the answer is empty")
    index = _answer_indices(values)[answer_format]
    if index is None:
        out_of_range = answer_format.startswith("indices") and _parse_int(answer) is not None
        raise RowError(
            f"the answer is {'out of range' if out_of_range else 'none of the choices'}",
            f"it is {_preview(answer)}, and there are {len(choices)} choices; answers are read as {answer_format}",
        )
    return index


# ---------------------------------------------------------------- conversations


def _parse_messages(value: Any) -> list[Message]:
    """Messages with canonical roles, in any order."""
    value = _split_turns(_decode_cell(value))
    if not is_json_array(value):
        raise RowError("the conversation is not a list of messages", f"it is {_preview(value)}")
    messages: list[Message] = []
    for message in value:
        if not is_json_object(message):
            raise RowError("a message is not an object with role and content", f"it is {_preview(message)}")
        name = message.get("from") if message.get("role") is None else message["role"]
        if not isinstance(name, str) or name not in ROLE_NAMES:
            raise RowError("a message has an unknown role", f"{_preview(name)}; known: {', '.join(ROLE_NAMES)}")
        content = message.get("value") if message.get("content") is None else message["content"]
        if message.get("tool_calls") or message.get("function_call"):
            raise RowError("a message calls a tool, which the chat format does not have")
        if is_json_array(content) and (content := content_text(content)) is None:
            raise RowError("a message has a part that is not text")
        parsed: Message = {"role": ROLE_NAMES[name], "content": _require_text(content, "content of a message")}
        if (weight := message.get("weight")) not in (None, 0, 1):
            raise RowError("the weight of a message is neither 0 nor 1", f"it is {_preview(weight)}")
        messages.append({**parsed, "weight": 0} if weight == 0 else parsed)
    return messages


def _split_turns(value: Any) -> Any:
    """The messages of a conversation in one text, "Human: … Assistant: …"; any other value unchanged."""
    for pattern in _TURNS if isinstance(value, str) else ():
        before, *parts = pattern.split(value)
        if not before and len(parts) > 2:
            turns = [
                {"role": role.lower(), "content": text.strip()}
                for role, text in zip(parts[::2], parts[1::2], strict=True)
            ]
            return turns if turns[-1]["content"] else turns[:-1]  # a prompt may end with "Assistant:"
    return value


def _parse_conversation(values: Mapping[str, Any], messages: list[Message]) -> tuple[Message, ...]:
    """The messages after the content of the `system` column, if there is one, with their order checked."""
    if not _is_blank(values.get("system")) and not (messages and messages[0]["role"] == "system"):
        messages = [{"role": "system", "content": _require_text(values["system"], "system message")}, *messages]
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise RowError("a system message is not the first message")
    if repeated := [role for role, following in pairwise(roles) if role == following]:
        raise RowError("two consecutive messages have the same role", f"the role is {repeated[0]}")
    if "user" not in roles:
        raise RowError("the conversation has no user message")
    return tuple(messages)


def _user_message(values: Mapping[str, Any], role: str) -> Message:
    """An instruction and its optional input as one user message."""
    parts = [_require_text(values.get(role), role)]
    if not _is_blank(values.get("input")):
        parts.append(_require_text(values["input"], "input"))
    return {"role": "user", "content": "\n\n".join(parts)}


def _parse_preference(values: Mapping[str, Any]) -> tuple[tuple[Message, ...], Any, Any]:
    """The prompt as messages, the chosen and the rejected answer.

    Chosen and rejected may be conversations that differ in their last message; the messages they share are the prompt.
    """

    def messages_or_text(value: Any) -> Any:
        """A list of messages, decoded; any other value unchanged, such as the text "[1, 2]"."""
        decoded = _split_turns(_decode_cell(value))
        return decoded if is_json_array(decoded) and all(map(is_json_object, decoded)) else value

    prompt, *answers = (messages_or_text(values.get(role)) for role in ("prompt", "chosen", "rejected"))
    messages: list[Message] = []
    if not all(map(is_json_array, answers)):
        answers = [values.get(role) for role in ("chosen", "rejected")]
    else:
        chosen, rejected = map(_parse_messages, answers)
        messages = chosen[:-1]
        last_roles = [message["role"] for message in (*chosen[-1:], *rejected[-1:])]
        if messages != rejected[:-1] or last_roles != ["assistant", "assistant"]:
            raise RowError("chosen and rejected differ in more than the last assistant message")
        answers = [chosen[-1]["content"], rejected[-1]["content"]]
    if not messages and not _is_blank(prompt):
        messages = _parse_messages(prompt) if is_json_array(prompt) else [_user_message(values, "prompt")]
    if not messages:
        expected = (
            ""
            if "prompt" in values
            else "give a column prompt, or conversations (Human: … Assistant: …) that share one"
        )
        raise RowError("the prompt is empty" if "prompt" in values else "there is no prompt", expected)
    conversation = _parse_conversation(values, messages)
    if conversation[-1]["role"] != "user":
        raise RowError("the prompt does not end with a user message")
    return conversation, answers[0], answers[1]
