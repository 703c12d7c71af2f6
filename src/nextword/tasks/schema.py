"""The columns of labelled data: their usual names, and the task that they belong to."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from nextword.common.errors import UsageError


@dataclass(frozen=True)
class TaskSchema:
    """The columns of a task, as declared in `schema.toml`.

    Attributes:
        expects: Description of the columns for messages.
        columns: The usual column names of each role, most usual first.
        inputs: Roles needed to read a row: one of each group.
        targets: Roles needed to learn from a row: one of each group.
        exclusive: Two groups of roles of which a table has one.
        paired: Two roles whose columns are recognised together: by the first names of both, the second ones, ….
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
REQUIRED_ROLES = {role for schema in TASKS.values() for group in schema.required(True) for role in group}
CHOICE_ROLE_PATTERN = re.compile(r"choice[1-9][0-9]?")
# A prefix, and a letter or a number; or a capital letter alone.
_CHOICE_COLUMN = re.compile(
    r"(?P<prefix>(?i:choice|option|ending|answer|sol))[_ ]?(?P<index>[a-zA-Z]|[0-9]{1,2})|[A-Z]"
)


def infer_task(columns: Iterable[str]) -> str:
    """The task that the columns of a table belong to; the most distinctive column names decide.

    Raises:
        UsageError: No task fits. The message lists the columns that each task expects.
    """
    names = list(columns)

    def has(task: str, *roles: str) -> bool:
        return all(_find_column(names, TASKS[task].columns[role]) is not None for role in roles)

    candidates = [
        ("chat", has("chat", "messages")),
        ("prefer", has("prefer", "chosen", "rejected")),
        ("chat", _find_column(names, ("instruction",)) is not None and has("chat", "output")),
        ("entail", has("entail", "premise", "hypothesis")),
        ("similarity", _find_column_pair(names, "similarity") is not None),
        ("choose", has("choose", "question") and (has("choose", "choices") or bool(choice_columns(names)))),
        ("rewrite", _find_column_pair(names, "rewrite") is not None),
        ("classify", has("classify", "text") and (has("classify", "label") or has("classify", "labels"))),
        ("continue", has("continue", "text")),
    ]
    if fitting := [task for task, fits in candidates if fits]:
        return fitting[0]
    expected = "".join(f"\n  {task}: {schema.expects}" for task, schema in TASKS.items())
    raise UsageError(
        f"no task fits the columns {join_names(names)}. Name the task and its columns. Each task expects:{expected}"
    )


def resolve_columns(
    task: str, column_names: Iterable[str], overrides: Mapping[str, str] | None = None, require_targets: bool = True
) -> dict[str, str]:
    """The column of each role of a task: {role: column}.

    Choices in columns of their own get the roles choice1, choice2, …

    Args:
        task: Name of the task.
        column_names: The columns of the table.
        overrides: Columns chosen by the user, {role: column}. Other roles are found by their usual column names.
        require_targets: If false, target columns may be missing, and so may the columns of `input`, `system` and choices after
            the second, even if `overrides` names them.

    Raises:
        UsageError: The task, a role or a column does not exist, or a required role has no column.
    """
    names = list(column_names)
    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    schema = TASKS[task]
    optional_roles = {role for group in schema.targets for role in group} | {"input", "system"}
    mapping: dict[str, str] = {}
    for role, column in (overrides or {}).items():
        is_choice = CHOICE_ROLE_PATTERN.fullmatch(role) is not None
        if role not in schema.columns and not (task == "choose" and is_choice):
            more = ", or choice1, choice2, …" if task == "choose" else ""
            raise UsageError(f"{task} has no role {role}; its roles are {', '.join(schema.columns)}{more}")
        if column in names:
            mapping[role] = column
        elif require_targets or not (role in optional_roles or (is_choice and role not in ("choice1", "choice2"))):
            raise UsageError(f"there is no column {column} for {role}; columns: {join_names(names)}")
    if schema.exclusive and all(mapping.keys() & group for group in schema.exclusive):
        first, second = (", ".join(sorted(group)) for group in schema.exclusive)
        raise UsageError(f"{task} takes {first} or {second}, not both")
    _fill_default_columns(task, names, mapping)
    for group in schema.required(require_targets):
        if not any(role in mapping for role in group):
            raise UsageError(
                f"{task} needs a column for {' or '.join(group)}; columns: {join_names(names)}. "
                f"It expects {schema.expects}. Name the column: {group[0]}=COLUMN"
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
        if (column := _find_column(column_names, aliases, exclude=mapping.values())) is not None:
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


def join_names(names: Iterable[str]) -> str:
    """The first twelve names, for a message."""
    names = list(names)
    shown = ", ".join(name.encode("utf-8", "replace").decode() for name in names[:12])
    return (shown + (", …" if len(names) > 12 else "")) or "none"


def _find_column(column_names: list[str], aliases: Iterable[str], exclude: Iterable[str] = ()) -> str | None:
    """The column with the first alias that occurs."""
    excluded = set(exclude)
    available = {name.strip().lower(): name for name in reversed(column_names) if name not in excluded}
    return next((available[alias] for alias in aliases if alias in available), None)


def _find_column_pair(column_names: list[str], task: str) -> tuple[str, str] | None:
    for aliases in zip(*(TASKS[task].columns[role] for role in TASKS[task].paired), strict=True):
        first, second = (_find_column(column_names, (alias,)) for alias in aliases)
        if first is not None and second is not None:
            return first, second
    return None
