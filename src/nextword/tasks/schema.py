"""Which column of a table means what: the names that people use, and what task they speak of."""

import re
from collections.abc import Iterable, Mapping

from nextword.common.errors import UsageError

# Each task's roles, and the names that a column of that role goes by, the most usual first. Case does not count.
_LABEL_ALIASES = (
    "label", "class", "category", "target", "intent", "sentiment", "topic", "emotion", "gold_label", "label_text",
)  # fmt: skip
_TEXT_ALIASES = (
    "text", "sentence", "review", "content", "document", "body", "comment", "tweet", "utterance", "article", "story",
)  # fmt: skip
COLUMN_ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "classify": {
        "text": (*_TEXT_ALIASES, "question", "query"),
        "label": _LABEL_ALIASES,
        "labels": ("labels", "tags", "categories", "topics", "emotions"),
    },
    "entail": {
        "premise": ("premise",),
        "hypothesis": ("hypothesis",),
        "label": ("label", "gold_label", "class", "target", "labels"),
    },
    "similarity": {
        "sentence1": (),
        "sentence2": (),
        "score": ("score", "similarity", "similarity_score", "relatedness_score", "relatedness", "rating"),
        "label": ("label", "is_duplicate", "gold_label", "class", "target", "labels"),
    },
    "choose": {
        "question": ("question", "query", "context", "ctx", "question_stem", "stem", "goal", "sentence", "prompt"),
        "choices": ("choices", "options", "endings", "candidates"),
        "answer": ("answer", "answerkey", "answer_key", "label", "correct_answer", "answer_idx", "target", "gold"),
    },
    "rewrite": {"prompt": (), "completion": ()},
    "chat": {
        "messages": ("messages", "conversations", "conversation"),
        "instruction": ("instruction", "prompt", "question", "query"),
        "input": ("input", "context"),
        "output": ("output", "response", "completion", "answer"),
        "system": ("system", "system_prompt"),
    },
    "prefer": {
        "prompt": ("prompt", "instruction", "question", "query", "messages"),
        "input": ("input", "context"),
        "chosen": ("chosen",),
        "rejected": ("rejected",),
        "system": ("system", "system_prompt"),
    },
    "continue": {"text": _TEXT_ALIASES},
}
# Two columns that are known by each other.
COLUMN_PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "similarity": (
        ("sentence1", "sentence2"), ("text1", "text2"), ("sentence_1", "sentence_2"), ("text_1", "text_2"),
        ("question1", "question2"), ("sentence_a", "sentence_b"), ("text_a", "text_b"),
    ),
    "rewrite": (
        ("prompt", "completion"), ("source", "target"), ("src", "tgt"), ("input", "output"), ("text", "summary"),
        ("document", "summary"), ("article", "highlights"), ("article", "summary"), ("prompt", "response"),
        ("question", "answer"),
    ),
}  # fmt: skip
_PAIRED_ROLES = {"similarity": ("sentence1", "sentence2"), "rewrite": ("prompt", "completion")}
# Roles of which a table has one side or the other: the side that is found first, or named by hand, shuts the other out.
_EXCLUSIVE_ROLES: dict[str, tuple[set[str], set[str]]] = {
    "classify": ({"label"}, {"labels"}),
    "similarity": ({"score"}, {"label"}),
    "chat": ({"messages"}, {"instruction", "input", "output"}),
}
# What a row must have to be read, and what is learned from it: of each group one role.
INPUT_ROLES: dict[str, tuple[tuple[str, ...], ...]] = {
    "classify": (("text",),),
    "entail": (("premise",), ("hypothesis",)),
    "similarity": (("sentence1",), ("sentence2",)),
    "choose": (("question",), ("choices", "choice1"), ("choices", "choice2")),
    "rewrite": (("prompt",),),
    "chat": (("messages", "instruction"),),
    "prefer": (("prompt", "chosen"),),
    "continue": (("text",),),
}
TARGET_ROLES: dict[str, tuple[tuple[str, ...], ...]] = {
    "classify": (("label", "labels"),),
    "entail": (("label",),),
    "similarity": (("score", "label"),),
    "choose": (("answer",),),
    "rewrite": (("completion",),),
    "chat": (("messages", "output"),),
    "prefer": (("chosen",), ("rejected",)),
    "continue": (),
}
_EXPECTED_COLUMNS = {
    "chat": "messages or conversations; or instruction, output and perhaps input",
    "prefer": "chosen and rejected, and a prompt or an instruction",
    "entail": "premise, hypothesis and label",
    "similarity": "sentence1 and sentence2 (or text1, text2), and a score or a label",
    "choose": "question, choices (or A, B, C, …; choice1, choice2, …; option_a, …) and answer",
    "rewrite": "two texts: " + ", ".join("/".join(pair) for pair in COLUMN_PAIRS["rewrite"]),
    "classify": f"a text ({', '.join(_TEXT_ALIASES[:6])}, …) and a label ({', '.join(_LABEL_ALIASES[:6])}, …; labels for several)",
    "continue": "a text alone",
}
_CHOICE_COLUMN = re.compile(r"(choice|option|ending|answer|sol)[_ ]?([a-z]|[0-9]{1,2})")
CHOICE_ROLE_PATTERN = re.compile(r"choice[1-9][0-9]?")


def infer_task(columns: Iterable[str]) -> str:
    """The task that a table's columns speak of, the most telling names first.

    Raises `UsageError` with the columns and what each task looks for, where no task fits.
    """
    names = list(columns)

    def has(task: str, *roles: str) -> bool:
        return all(_find_column(names, COLUMN_ALIASES[task][role]) is not None for role in roles)

    candidates = (
        ("chat", has("chat", "messages")),
        ("prefer", has("prefer", "chosen", "rejected")),
        ("chat", _find_column(names, ("instruction",)) is not None and has("chat", "output")),
        ("entail", has("entail", "premise", "hypothesis")),
        ("similarity", _find_column_pair(names, "similarity") is not None),
        ("choose", has("choose", "question") and (has("choose", "choices") or bool(choice_columns(names)))),
        ("rewrite", _find_column_pair(names, "rewrite") is not None),
        ("classify", has("classify", "text") and (has("classify", "label") or has("classify", "labels"))),
        ("continue", has("continue", "text")),
    )
    for task, fits in candidates:
        if fits:
            return task
    expected_columns = "".join(f"\n  {task}: {what}" for task, what in _EXPECTED_COLUMNS.items())
    raise UsageError(
        f"no task fits the columns {join_names(names)}. Name the task, and its columns by hand. Each looks for:{expected_columns}"
    )


def resolve_columns(
    task: str, column_names: Iterable[str], overrides: Mapping[str, str] | None = None, require_targets: bool = True
) -> dict[str, str]:
    """The column of each role of a task that the names found have: {role: column}.

    `by_hand` names some; the usual names are looked for in the others. Choices in columns of their own are the roles
    choice1, choice2, … Without `gold` the columns that are learned from may be absent, and those of input, system
    and a third choice or a later one, though named by hand. Raises `UsageError` for an
    unknown task, a role that the task does not have, a column that is not there, and a role without a column.
    """
    column_names = list(column_names)
    if task not in COLUMN_ALIASES:
        raise UsageError(f"{task}: no such task; there are {', '.join(COLUMN_ALIASES)}")
    mapping: dict[str, str] = {}
    optional_roles = {role for group in TARGET_ROLES[task] for role in group} | {"input", "system"}
    for role, column in (overrides or {}).items():
        if role not in COLUMN_ALIASES[task] and not (task == "choose" and CHOICE_ROLE_PATTERN.fullmatch(role)):
            more = ", or choice1, choice2, …" if task == "choose" else ""
            raise UsageError(f"{task} has no {role}; it has {', '.join(COLUMN_ALIASES[task])}{more}")
        if column in column_names:
            mapping[role] = column
        elif require_targets or (
            role not in optional_roles and (role in ("choice1", "choice2") or not CHOICE_ROLE_PATTERN.fullmatch(role))
        ):
            raise UsageError(f"there is no column {column} for {role}; found {join_names(column_names)}")
    for side, other in [_EXCLUSIVE_ROLES[task], _EXCLUSIVE_ROLES[task][::-1]] if task in _EXCLUSIVE_ROLES else []:
        if side & mapping.keys() and other & mapping.keys():
            raise UsageError(f"{task} takes {', '.join(sorted(side))} or {', '.join(sorted(other))}, not both")
    _fill_default_columns(task, column_names, mapping)
    for group in INPUT_ROLES[task] + (TARGET_ROLES[task] if require_targets else ()):
        if not any(role in mapping for role in group):
            raise UsageError(
                f"{task} needs a column for {' or '.join(group)}; found {join_names(column_names)}. "
                f"It looks for {_EXPECTED_COLUMNS[task]}. Name the column by hand: {group[0]}=COLUMN"
            )
    return mapping


def _fill_default_columns(task: str, column_names: list[str], mapping: dict[str, str]) -> None:
    """Fill in the roles that the usual names have."""
    pair = (
        None
        if task not in _PAIRED_ROLES or any(role in mapping for role in _PAIRED_ROLES[task])
        else _find_column_pair(column_names, task)
    )
    if pair:
        mapping.update(zip(_PAIRED_ROLES[task], pair, strict=True))
    sides = _EXCLUSIVE_ROLES.get(task, (set(), set()))
    for role, aliases in COLUMN_ALIASES[task].items():
        if task in _PAIRED_ROLES and role in _PAIRED_ROLES[task]:
            aliases = dict.fromkeys(pair[_PAIRED_ROLES[task].index(role)] for pair in COLUMN_PAIRS[task])
        is_excluded = any(role in side and other & mapping.keys() for side, other in (sides, sides[::-1]))
        if role == "choices" and any(CHOICE_ROLE_PATTERN.fullmatch(name) for name in mapping):
            is_excluded = True
        if role in mapping or is_excluded:
            continue
        if (column := _find_column(column_names, aliases, set(mapping.values()))) is not None:
            mapping[role] = column
        elif role == "choices":
            mapping.update({f"choice{place}": name for place, name in enumerate(choice_columns(column_names), 1)})


def choice_columns(column_names: Iterable[str]) -> list[str]:
    """The columns that hold a choice each, in order: A, B, …, or choice1 …, option_a …, ending0 …; [] for none."""
    series: dict[tuple[str, int], dict[int, str]] = {}  # (what they are called, the first that may be) → place → name
    for name in column_names:
        plain = name.strip()
        match = _CHOICE_COLUMN.fullmatch(plain.lower())
        if len(plain) == 1 and "A" <= plain <= "Z":
            series.setdefault(("", ord("A")), {})[ord(plain)] = name
        elif match and match[2].isdigit():
            series.setdefault((match[1], 1), {})[int(match[2])] = name
        elif match:
            series.setdefault((match[1], ord("a")), {})[ord(match[2])] = name
    for (_, first), places in series.items():
        least = min(places)
        starts = least == first or (first == 1 and least == 0)  # people count from 0 and from 1
        if starts and len(places) > 1 and max(places) - least == len(places) - 1:
            return [places[place] for place in sorted(places)]
    return []


def join_names(names: Iterable[str]) -> str:
    """The first names, as a message shows them."""
    names = list(names)
    shown = ", ".join(name.encode("utf-8", "replace").decode() for name in names[:12])
    return (shown + (", …" if len(names) > 12 else "")) or "none"


def _find_column(column_names: list[str], aliases: Iterable[str], exclude: Iterable[str] = ()) -> str | None:
    """The first name that is one of the aliases, those in their order."""
    free = {name.strip().lower(): name for name in reversed(column_names) if name not in exclude}
    return next((free[alias] for alias in aliases if alias in free), None)


def _find_column_pair(column_names: list[str], task: str) -> tuple[str, str] | None:
    for one, other in COLUMN_PAIRS[task]:
        first, second = _find_column(column_names, (one,)), _find_column(column_names, (other,))
        if first is not None and second is not None:
            return first, second
    return None
