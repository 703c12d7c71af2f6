"""From files to what a fine-tuning learns from: examples read, held out, and the form that they take as tokens."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nextword.common.errors import NextwordError, UsageError
from nextword.data.dataset import derive_seed, permute
from nextword.data.issues import IssueLog
from nextword.data.tokenizer import Tokenizer
from nextword.tasks.dataset import TaskSpec, max_answer_tokens
from nextword.tasks.examples import Example, filter_known_labels, label_names, read_examples, train_validation_split
from nextword.tasks.schema import INPUT_ROLES, TARGET_ROLES

REQUIRED_ROLES = {
    role for groups in (INPUT_ROLES, TARGET_ROLES) for task in groups.values() for group in task for role in group
}
IMBALANCE_THRESHOLD = 3.0  # labels are balanced where the commonest is so many times as common as the rarest


@dataclass(frozen=True)
class DataRequest:
    """What a person asks to be learned: files, the task and columns where they are said, and how many of the examples.

    `validation` holds files of held-out examples; a tenth of `data` is held out where there are none. `limit` examples
    are drawn by `seed`; a smaller limit draws a part of what a larger one does.
    """

    data: list[str]
    task: str | None = None
    columns: dict[str, str] | None = None
    validation: list[str] | None = None
    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class TaskData:
    """Labelled examples, those to learn from (of all that are `available`) and those held out, and how they become tokens."""

    task_spec: TaskSpec
    train: list[Example]
    validation: list[Example]
    num_available: int


def load_task_data(
    request: DataRequest, tokenizer: Tokenizer, base_task_spec: TaskSpec | None, context_length: int, problems: IssueLog
) -> TaskData:
    """Read the examples that a request names; the same request gives the same data.

    Args:
        tokenizer: the model's, still without the task's markers.
        before: what the model was fine-tuned for already, where it was.

    Raises:
        UsageError: columns that fit no task, or nothing to learn from.
    """
    train_set = read_examples(request.data, request.task, problems, request.columns)
    if train_set.task == "continue":
        raise UsageError("more text of one's own domain is learned by --task continue from files and folders of text")
    train = train_set.items
    if request.validation:
        # A column that not every table of a kind has may be missing here.
        columns = {role: name for role, name in train_set.columns.items() if role in REQUIRED_ROLES}
        validation_set = read_examples(request.validation, train_set.task, problems, columns)
        target_roles = [{"label", "labels", "score"} & set(one.columns) for one in (train_set, validation_set)]
        if target_roles[0] != target_roles[1]:
            raise UsageError(
                f"{request.validation[0]}: reads as {min(target_roles[1], default='nothing')} where {request.data[0]} has "
                f"{min(target_roles[0], default='nothing')}: name its column by --column"
            )
        validation = validation_set.items
    else:
        train, validation = train_validation_split(train_set)
    if not train:
        first = "\n".join(problems.summary_lines())
        raise NextwordError(f"{', '.join(request.data)}: no example to learn from\n{first}".rstrip())
    # From all examples, so that a part of them is asked for the same labels.
    task_spec = infer_task_spec(
        train_set.task, train, tokenizer, base_task_spec, context_length, tuple(train_set.columns.items())
    )
    num_available = len(train)
    if request.limit is not None and request.limit < len(train):
        order = permute(np.arange(len(train)), len(train), derive_seed(request.seed, 6))
        train = [train[i] for i in sorted(order[: request.limit].tolist())]
    if task_spec.labels:
        validation = filter_known_labels(validation, task_spec.labels, problems)
    return TaskData(task_spec, train, validation, num_available)


def infer_task_spec(
    task: str, train: Sequence[Example], tokenizer: Tokenizer, base_task_spec: TaskSpec | None, context_length: int,
    columns: tuple[tuple[str, str], ...],
) -> TaskSpec:  # fmt: skip
    """How this task's examples become tokens. Raises `UsageError` where there is nothing to tell apart."""
    fields = train[0].fields
    if task in ("classify", "entail", "similarity") and "score" not in fields:
        names = tuple(label_names(train))
        is_multilabel = "labels" in fields
        if len(names) < (1 if is_multilabel else 2):
            raise UsageError(f"all {len(train):,} examples have the label {names[0]!r}: there is nothing to tell apart")
        return TaskSpec(task, "labels" if is_multilabel else "label", names, columns=columns)
    if task in ("similarity", "choose"):
        return TaskSpec(task, "score" if task == "similarity" else "choice", columns=columns)
    target_fields = {"rewrite": ["completion"], "chat": [], "prefer": ["chosen", "rejected"]}[task]
    answers = [example.fields[name] for example in train for name in target_fields]
    if task == "chat":
        answers = [m["content"] for e in train for m in e.fields["messages"] if m["role"] == "assistant"]
    # A preference speaks as its model does: in conversations, unless the model was made to rewrite.
    chat = task == "chat" or (task == "prefer" and (base_task_spec is None or base_task_spec.task != "rewrite"))
    max_tokens = max_answer_tokens(tokenizer, answers, context_length)
    return TaskSpec(
        task, "preference" if task == "prefer" else "answer", answer_tokens=max_tokens, chat=chat, columns=columns
    )


def compute_sample_weights(
    task_spec: TaskSpec, train: Sequence[Example], balance: str
) -> tuple[np.ndarray | None, dict[str, int]]:
    """How much each example counts [E], so that rare labels are learned too, and how often each label occurs.

    The weight of a label is the square root of n / (labels · its count), scaled to the mean 1: half way, on the logarithmic
    scale, between none and as if all labels were equally frequent. None where nothing is balanced.
    """
    if task_spec.kind != "label":
        return None, {}
    counts = Counter(example.fields["label"] for example in train)
    label_counts = {name: counts[name] for name in task_spec.labels}
    if balance == "no" or (balance == "auto" and max(counts.values()) < IMBALANCE_THRESHOLD * min(counts.values())):
        return None, label_counts
    weights = np.array([math.sqrt(len(train) / (len(counts) * counts[e.fields["label"]])) for e in train])
    return (weights / weights.mean()).astype(np.float32), label_counts


def example_from_texts(task: str, texts: Sequence[str]) -> Example:
    """An example without gold from its texts, as they are given on a command line. Raises `UsageError` for too few or many."""
    names = {
        "classify": ("text",), "entail": ("premise", "hypothesis"), "similarity": ("sentence1", "sentence2"),
        "choose": ("question", "choices"), "rewrite": ("prompt",), "chat": ("message",), "prefer": ("message",),
    }[task]  # fmt: skip
    if task == "choose" and len(texts) >= 3:
        return Example("", 0, {"question": texts[0], "choices": tuple(texts[1:])})
    if task == "choose" or len(texts) != len(names):
        wanted = "a question and two choices or more" if task == "choose" else " and ".join(names)
        raise UsageError(f"{task} takes {wanted}: {len(texts)} texts were given")
    if names == ("message",):
        return Example("", 0, {"messages": ({"role": "user", "content": texts[0]},)})
    return Example("", 0, dict(zip(names, texts, strict=True)))
