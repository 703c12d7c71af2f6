"""Which column of a table means what: the names that people use, and what task they speak of."""

import re
from collections.abc import Iterable, Mapping

from nextword.common.errors import UsageError

# Each task's roles, and the names that a column of that role goes by, the most usual first. Case does not count.
_LABEL = (
    "label", "class", "category", "target", "intent", "sentiment", "topic", "emotion", "gold_label", "label_text",
)  # fmt: skip
_TEXT = (
    "text", "sentence", "review", "content", "document", "body", "comment", "tweet", "utterance", "article", "story",
)  # fmt: skip
ROLES: dict[str, dict[str, tuple[str, ...]]] = {
    "classify": {
        "text": (*_TEXT, "question", "query"),
        "label": _LABEL,
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
    "continue": {"text": _TEXT},
}
# Two columns that are known by each other.
PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
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
_PAIRED = {"similarity": ("sentence1", "sentence2"), "rewrite": ("prompt", "completion")}
# Roles of which a table has one side or the other: the side that is found first, or named by hand, shuts the other out.
_EITHER: dict[str, tuple[set[str], set[str]]] = {
    "classify": ({"label"}, {"labels"}),
    "similarity": ({"score"}, {"label"}),
    "chat": ({"messages"}, {"instruction", "input", "output"}),
}
# What a row must have to be read, and what is learned from it: of each group one role.
GIVEN: dict[str, tuple[tuple[str, ...], ...]] = {
    "classify": (("text",),),
    "entail": (("premise",), ("hypothesis",)),
    "similarity": (("sentence1",), ("sentence2",)),
    "choose": (("question",), ("choices", "choice1"), ("choices", "choice2")),
    "rewrite": (("prompt",),),
    "chat": (("messages", "instruction"),),
    "prefer": (("prompt", "chosen"),),
    "continue": (("text",),),
}
GOLD: dict[str, tuple[tuple[str, ...], ...]] = {
    "classify": (("label", "labels"),),
    "entail": (("label",),),
    "similarity": (("score", "label"),),
    "choose": (("answer",),),
    "rewrite": (("completion",),),
    "chat": (("messages", "output"),),
    "prefer": (("chosen",), ("rejected",)),
    "continue": (),
}
_LOOKS_FOR = {
    "chat": "messages or conversations; or instruction, output and perhaps input",
    "prefer": "chosen and rejected, and a prompt or an instruction",
    "entail": "premise, hypothesis and label",
    "similarity": "sentence1 and sentence2 (or text1, text2), and a score or a label",
    "choose": "question, choices (or A, B, C, …; choice1, choice2, …; option_a, …) and answer",
    "rewrite": "two texts: " + ", ".join("/".join(pair) for pair in PAIRS["rewrite"]),
    "classify": f"a text ({', '.join(_TEXT[:6])}, …) and a label ({', '.join(_LABEL[:6])}, …; labels for several)",
    "continue": "a text alone",
}
_CHOICE = re.compile(r"(choice|option|ending|answer|sol)[_ ]?([a-z]|[0-9]{1,2})")
CHOICE_ROLE = re.compile(r"choice[1-9][0-9]?")


def guess_task(columns: Iterable[str]) -> str:
    """The task that a table's columns speak of, the most telling names first.

    Raises `UsageError` with the columns and what each task looks for, where no task fits.
    """
    names = list(columns)

    def has(task: str, *roles: str) -> bool:
        return all(_find(names, ROLES[task][role]) is not None for role in roles)

    signs = (
        ("chat", has("chat", "messages")),
        ("prefer", has("prefer", "chosen", "rejected")),
        ("chat", _find(names, ("instruction",)) is not None and has("chat", "output")),
        ("entail", has("entail", "premise", "hypothesis")),
        ("similarity", _pair(names, "similarity") is not None),
        ("choose", has("choose", "question") and (has("choose", "choices") or bool(choice_columns(names)))),
        ("rewrite", _pair(names, "rewrite") is not None),
        ("classify", has("classify", "text") and (has("classify", "label") or has("classify", "labels"))),
        ("continue", has("continue", "text")),
    )
    for task, fits in signs:
        if fits:
            return task
    looks = "".join(f"\n  {task}: {what}" for task, what in _LOOKS_FOR.items())
    raise UsageError(
        f"no task fits the columns {listed(names)}. Name the task, and its columns by hand. Each looks for:{looks}"
    )


def find_columns(
    task: str, names: Iterable[str], by_hand: Mapping[str, str] | None = None, gold: bool = True
) -> dict[str, str]:
    """The column of each role of a task that the names found have: {role: column}.

    `by_hand` names some; the usual names are looked for in the others. Choices in columns of their own are the roles
    choice1, choice2, … Without `gold` the columns that are learned from may be absent, and those of input, system
    and a third choice or a later one, though named by hand. Raises `UsageError` for an
    unknown task, a role that the task does not have, a column that is not there, and a role without a column.
    """
    names = list(names)
    if task not in ROLES:
        raise UsageError(f"{task}: no such task; there are {', '.join(ROLES)}")
    found: dict[str, str] = {}
    spared = {role for group in GOLD[task] for role in group} | {"input", "system"}
    for role, column in (by_hand or {}).items():
        if role not in ROLES[task] and not (task == "choose" and CHOICE_ROLE.fullmatch(role)):
            more = ", or choice1, choice2, …" if task == "choose" else ""
            raise UsageError(f"{task} has no {role}; it has {', '.join(ROLES[task])}{more}")
        if column in names:
            found[role] = column
        elif gold or (role not in spared and (role in ("choice1", "choice2") or not CHOICE_ROLE.fullmatch(role))):
            raise UsageError(f"there is no column {column} for {role}; found {listed(names)}")
    for side, other in [_EITHER[task], _EITHER[task][::-1]] if task in _EITHER else []:
        if side & found.keys() and other & found.keys():
            raise UsageError(f"{task} takes {', '.join(sorted(side))} or {', '.join(sorted(other))}, not both")
    _look(task, names, found)
    for group in GIVEN[task] + (GOLD[task] if gold else ()):
        if not any(role in found for role in group):
            raise UsageError(
                f"{task} needs a column for {' or '.join(group)}; found {listed(names)}. "
                f"It looks for {_LOOKS_FOR[task]}. Name the column by hand: {group[0]}=COLUMN"
            )
    return found


def _look(task: str, names: list[str], found: dict[str, str]) -> None:
    """Fill in the roles that the usual names have."""
    pair = None if task not in _PAIRED or any(role in found for role in _PAIRED[task]) else _pair(names, task)
    if pair:
        found.update(zip(_PAIRED[task], pair, strict=True))
    sides = _EITHER.get(task, (set(), set()))
    for role, aliases in ROLES[task].items():
        if task in _PAIRED and role in _PAIRED[task]:
            aliases = dict.fromkeys(pair[_PAIRED[task].index(role)] for pair in PAIRS[task])
        shut = any(role in side and other & found.keys() for side, other in (sides, sides[::-1]))
        if role == "choices" and any(CHOICE_ROLE.fullmatch(name) for name in found):
            shut = True
        if role in found or shut:
            continue
        if (column := _find(names, aliases, set(found.values()))) is not None:
            found[role] = column
        elif role == "choices":
            found.update({f"choice{place}": name for place, name in enumerate(choice_columns(names), 1)})


def choice_columns(names: Iterable[str]) -> list[str]:
    """The columns that hold a choice each, in order: A, B, …, or choice1 …, option_a …, ending0 …; [] for none."""
    series: dict[tuple[str, int], dict[int, str]] = {}  # (what they are called, the first that may be) → place → name
    for name in names:
        plain = name.strip()
        match = _CHOICE.fullmatch(plain.lower())
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


def listed(names: Iterable[str]) -> str:
    """The first names, as a message shows them."""
    names = list(names)
    shown = ", ".join(name.encode("utf-8", "replace").decode() for name in names[:12])
    return (shown + (", …" if len(names) > 12 else "")) or "none"


def _find(names: list[str], aliases: Iterable[str], taken: Iterable[str] = ()) -> str | None:
    """The first name that is one of the aliases, those in their order."""
    free = {name.strip().lower(): name for name in reversed(names) if name not in taken}
    return next((free[alias] for alias in aliases if alias in free), None)


def _pair(names: list[str], task: str) -> tuple[str, str] | None:
    for one, other in PAIRS[task]:
        first, second = _find(names, (one,)), _find(names, (other,))
        if first is not None and second is not None:
            return first, second
    return None
