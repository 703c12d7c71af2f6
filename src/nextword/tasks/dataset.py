"""Fine-tuning data: labelled examples loaded from files, and the batches of each training step."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nextword.common.errors import NextwordError, UsageError
from nextword.data.dataset import IGNORE_INDEX, Batch, Labels, derive_seed, permute
from nextword.data.issues import IssueLog
from nextword.data.tokenizer import Tokenizer
from nextword.tasks.examples import (
    Example,
    ExampleSet,
    filter_known_labels,
    label_names,
    read_examples,
    train_validation_split,
)
from nextword.tasks.schema import REQUIRED_ROLES
from nextword.tasks.templates import (
    HEAD_KINDS,
    MAX_SEQUENCES_PER_EXAMPLE,
    TARGET_FIELDS,
    EncodedExample,
    TaskKind,
    TaskSpec,
    TokenSequence,
    max_answer_tokens,
)

IMBALANCE_THRESHOLD = 3.0  # labels are weighted if the most frequent one is this many times as frequent as the rarest
BATCHES_PER_BUCKET = 32  # batches whose examples are sorted by length together


@dataclass(frozen=True)
class DataRequest:
    """The data of a fine-tuning run as requested by the user.

    Attributes:
        data: Files and folders of labelled examples.
        task: Name of the task; None: inferred from the columns.
        columns: Columns chosen by the user, {role: column}.
        validation: Files of the validation set; None: a tenth of `data`.
        limit: Number of training examples to draw; a smaller limit draws a subset of a larger one.
        seed: Seed of the draw.
    """

    data: list[str]
    task: str | None = None
    columns: dict[str, str] | None = None
    validation: list[str] | None = None
    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class TaskData:
    """The task, its training and validation set, and the number of training examples before `limit`."""

    task_spec: TaskSpec
    train: list[Example]
    validation: list[Example]
    num_available: int


def load_task_data(
    request: DataRequest,
    tokenizer: Tokenizer,
    base_task_spec: TaskSpec | None,
    context_length: int,
    issues: IssueLog,
) -> TaskData:
    """Load the examples of a request. The same request gives the same data.

    Args:
        request: Files, task, columns, and how many examples to draw.
        tokenizer: The tokenizer of the base model, without the special tokens of the task.
        base_task_spec: The task that the base model was fine-tuned for, if any.
        context_length: The context length of the model, in tokens.
        issues: Log for examples that are left out.

    Raises:
        UsageError: The columns fit no task, or there is nothing to learn.
        NextwordError: There are no training examples.
    """
    examples = read_examples(request.data, request.task, issues, request.columns)
    if examples.task == "continue":
        raise UsageError(
            "the data is text without labels: train on it with --task continue and files or folders of text"
        )
    if request.validation:
        train, validation = examples.items, _read_validation_set(request.validation, examples, request.data[0], issues)
    else:
        train, validation = train_validation_split(examples)
    if not train:
        details = "\n".join(issues.summary_lines())
        raise NextwordError(f"{', '.join(request.data)}: there are no training examples\n{details}".rstrip())
    # Inferred from all examples, so that a subset has the same labels.
    columns = tuple(examples.columns.items())
    task_spec = infer_task_spec(examples.task, train, tokenizer, base_task_spec, context_length, columns)
    num_available = len(train)
    if request.limit is not None and request.limit < len(train):
        drawn = permute(np.arange(len(train)), len(train), derive_seed(request.seed, 6))[: request.limit]
        train = [train[i] for i in np.sort(drawn)]
    if task_spec.labels:
        validation = filter_known_labels(validation, task_spec.labels, issues)
    return TaskData(task_spec, train, validation, num_available)


def _read_validation_set(paths: list[str], train_set: ExampleSet, train_path: str, issues: IssueLog) -> list[Example]:
    """The examples of the validation files, read with the columns of the training set."""
    # Optional columns may be missing.
    columns = {role: name for role, name in train_set.columns.items() if role in REQUIRED_ROLES}
    validation_set = read_examples(paths, train_set.task, issues, columns)
    targets = [{"label", "labels", "score"} & set(examples.columns) for examples in (train_set, validation_set)]
    if targets[0] != targets[1]:
        raise UsageError(
            f"{paths[0]}: the target is {min(targets[1], default='missing')}, but in {train_path} it is "
            f"{min(targets[0], default='missing')}: name its column with --column"
        )
    return validation_set.items


def infer_task_spec(
    task: str,
    train: Sequence[Example],
    tokenizer: Tokenizer,
    base_task_spec: TaskSpec | None,
    context_length: int,
    columns: tuple[tuple[str, str], ...],
) -> TaskSpec:
    """The specification of a task from its training examples.

    Raises:
        UsageError: All examples have the same label.
    """
    fields = train[0].fields
    kind: TaskKind = next((kind for kind, name in TARGET_FIELDS.items() if name in fields), "answer")  # of a chat
    if kind in ("label", "labels"):
        names = tuple(label_names(train))
        if len(names) < (2 if kind == "label" else 1):
            label = f"the label {names[0]!r}" if names else "no label"
            raise UsageError(f"all {len(train):,} examples have {label}: there is nothing to learn")
        return TaskSpec(task, kind, names, columns=columns)
    if kind in HEAD_KINDS:
        return TaskSpec(task, kind, columns=columns)
    if task == "chat":
        messages = [message for example in train for message in example.fields["messages"]]
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
    else:
        target_fields = fields.keys() & {"completion", "chosen", "rejected"}
        answers = [example.fields[name] for example in train for name in target_fields]
    # Preferences have the prompt format of the base model: conversations, unless it was fine-tuned to rewrite.
    chat = task == "chat" or (task == "prefer" and (base_task_spec is None or base_task_spec.task != "rewrite"))
    answer_tokens = max_answer_tokens(tokenizer, answers, context_length)
    return TaskSpec(task, kind, answer_tokens=answer_tokens, chat=chat, columns=columns)


def compute_sample_weights(
    task_spec: TaskSpec, train: Sequence[Example], balance: str
) -> tuple[np.ndarray | None, dict[str, int]]:
    """Weights that give rare labels more influence, and the count of each label.

    The weight of a label is √(n / (labels · count)), scaled to a mean of 1: halfway, on the logarithmic scale, between equal
    weights of examples and equal weights of labels.

    Args:
        task_spec: The task.
        train: The training examples.
        balance: "yes", "no", or "auto": only if the label counts differ by `IMBALANCE_THRESHOLD`.

    Returns:
        The weights [E], or None for equal weights, and {label: count}.
    """
    if task_spec.kind != "label":
        return None, {}
    counts = Counter(example.fields["label"] for example in train)
    label_counts = {name: counts[name] for name in task_spec.labels}
    is_balanced = max(counts.values()) < IMBALANCE_THRESHOLD * min(counts.values())
    if balance == "no" or (balance == "auto" and is_balanced):
        return None, label_counts
    weights = np.array([math.sqrt(len(train) / (len(counts) * counts[e.fields["label"]])) for e in train])
    return (weights / weights.mean()).astype(np.float32), label_counts


class TaskDataset:
    """Encoded examples in batches, a pure function of (seed, step). Every epoch contains each example once.

    Examples of similar length are batched together within each bucket of 32 batches, to reduce padding; the batches are then
    shuffled.

    Args:
        examples: The encoded examples.
        batch_size: Rows of a batch: examples, or packed rows.
        seed: Seed of the order.
        pad_token_id: Token id of padding.
        kind: What is predicted.
        sample_weights: Weight of each example [E]; by default 1.
        reference_logprobs: Log-probabilities of the sequences of each example under a frozen reference model [E, 2].
        pack_length: Pack several sequences into rows of at most this many tokens, separated by segment ids.
    """

    def __init__(
        self,
        examples: Sequence[EncodedExample],
        batch_size: int,
        seed: int,
        *,
        pad_token_id: int,
        kind: TaskKind,
        sample_weights: np.ndarray | None = None,
        reference_logprobs: np.ndarray | None = None,
        pack_length: int | None = None,
    ):
        self.examples, self.batch_size, self.seed = list(examples), batch_size, seed
        self.pad_token_id, self.kind = pad_token_id, kind
        self.sample_weights = np.ones(len(examples), dtype=np.float32) if sample_weights is None else sample_weights
        self.reference_logprobs = reference_logprobs
        self.is_packed = pack_length is not None
        self._groups = [[i] for i in range(len(examples))] if pack_length is None else self._pack(pack_length)
        self._group_lengths = np.array([sum(examples[i].max_length for i in group) for group in self._groups])
        self.steps_per_epoch = -(-len(self._groups) // batch_size)
        self._cached_epoch, self._cached_batches = -1, list[np.ndarray]()

    @property
    def max_length(self) -> int:
        """Length of the longest row, in tokens."""
        return int(self._group_lengths.max())

    def _pack(self, pack_length: int) -> list[list[int]]:
        """First-fit packing in shuffled order, into the last 64 rows."""
        rows: list[list[int]] = []
        free_tokens: list[int] = []
        order = permute(np.arange(len(self.examples)), len(self.examples), derive_seed(self.seed, 4))
        for i in order.tolist():
            length = self.examples[i].max_length
            row = next((r for r in range(max(0, len(rows) - 64), len(rows)) if free_tokens[r] >= length), None)
            if row is None:
                rows.append([i])
                free_tokens.append(pack_length - length)
            else:
                rows[row].append(i)
                free_tokens[row] -= length
        return rows

    def _batch_groups(self, step: int) -> np.ndarray:
        """The indices of the groups (single examples, or the examples of packed rows) in the batch of a step."""
        epoch, batch_index = divmod(step, self.steps_per_epoch)
        if epoch != self._cached_epoch:
            n, bucket_size = len(self._groups), BATCHES_PER_BUCKET * self.batch_size
            order = permute(np.arange(n), n, derive_seed(self.seed, 1, epoch))
            batches: list[np.ndarray] = []
            for start in range(0, n, bucket_size):
                bucket = order[start : start + bucket_size]
                bucket = bucket[np.argsort(self._group_lengths[bucket], kind="stable")]
                batches += [bucket[i : i + self.batch_size] for i in range(0, len(bucket), self.batch_size)]
            batch_order = permute(np.arange(len(batches)), len(batches), derive_seed(self.seed, 5, epoch))
            self._cached_epoch, self._cached_batches = epoch, [batches[i] for i in batch_order]
        return self._cached_batches[batch_index]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The rows of a training step (from 0) that process `rank` of `world_size` works on."""
        first_row_id = step // self.steps_per_epoch * len(self._groups) * MAX_SEQUENCES_PER_EXAMPLE
        return self.collate([self._groups[i] for i in self._batch_groups(step)[rank::world_size]], first_row_id)

    def examples_in_batch(self, step: int) -> list[int]:
        """The indices of the examples of a training step (from 0), in order."""
        return [example for i in self._batch_groups(step) for example in self._groups[i]]

    def collate(self, groups: Sequence[Sequence[int]], first_row_id: int = 0) -> Batch:
        """A padded batch of groups of examples. Row ids count from `first_row_id`."""
        rows: list[tuple[TokenSequence, ...]] = []
        row_ids: list[int] = []
        for group in groups:  # a row for each sequence of an example; or one for the sequences of packed examples
            rows += zip(*(self.examples[i].sequences for i in group), strict=True)
            first_id = first_row_id + group[0] * MAX_SEQUENCES_PER_EXAMPLE
            row_ids += range(first_id, first_id + len(rows) - len(row_ids))
        shape = len(rows), max(sum(len(sequence.ids) for sequence in row) for row in rows)
        tokens = np.full(shape, self.pad_token_id, dtype=np.int64)
        targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        segment_ids = np.full(shape, -1, dtype=np.int64)
        last_positions = np.zeros(len(rows), dtype=np.int64)
        for r, row in enumerate(rows):
            start = 0
            for segment, (ids, loss_mask) in enumerate(row):
                end = start + len(ids)
                tokens[r, start:end], segment_ids[r, start:end] = ids, segment
                targets[r, start : end - 1] = np.where(loss_mask[1:], ids[1:], IGNORE_INDEX)
                start = end
            last_positions[r] = start - 1
        denominators: dict[str, float] = {"next_word": int((targets != IGNORE_INDEX).sum())}
        batch = Batch(tokens, targets, row_ids, denominators, int(last_positions.sum()) + len(rows))
        if self.is_packed:
            return replace(batch, segment_ids=segment_ids)
        examples = [group[0] for group in groups]
        reference = self.reference_logprobs
        labels = Labels(
            pool_positions=last_positions,
            example_ids=np.repeat(np.arange(len(examples)), [len(self.examples[i].sequences) for i in examples]),
            targets=np.array(
                [self.examples[i].target for i in examples],
                dtype=np.int64 if self.kind in ("label", "choice") else np.float32,
            ),
            weights=self.sample_weights[examples],
            reference_logprobs=None if reference is None else reference[examples].reshape(-1),
        )
        return replace(batch, labels=labels, loss_denominators={"task": float(labels.weights.sum()), **denominators})
