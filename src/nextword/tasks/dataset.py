"""Labelled examples as rows of tokens: each task's template, what is learned in it, and the batch of a step.

The templates are GPT-1's (Radford et al. 2018, section 3.3 and figure 1): a start token, texts parted by a delimiter, and
an extract token, at which a head reads. Where the answer is a text, it follows the delimiter and is learned as such.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from nextword.data.chat_format import CHAT_SPECIAL_TOKENS, encode_conversation
from nextword.data.dataset import IGNORE_INDEX, Batch, Labels, derive_seed, permute
from nextword.data.issues import IssueLog
from nextword.data.tokenizer import DELIMITER_TOKEN, END_OF_TURN_TOKEN, EXTRACT_TOKEN, START_TOKEN, Tokenizer
from nextword.tasks.examples import Example
from nextword.tasks.schema import TARGET_ROLES

# What is minimised and how an answer is read: a label, several labels, a score, a choice, an answer in words, a preference.
TaskKind = Literal["label", "labels", "score", "choice", "answer", "preference"]
HEAD_KINDS: tuple[TaskKind, ...] = ("label", "labels", "score", "choice")
MAX_ROWS_PER_EXAMPLE = 64  # that an example may have at most, so that (example, row) has a number of its own
BATCHES_PER_BUCKET = 32  # batches that are sorted by length together


@dataclass(frozen=True)
class TaskSpec:
    """How a task's examples become tokens; kept with the model, so that predictions read them as training did.

    Attributes:
        labels: the labels' names in the order of the head's outputs.
        answer_tokens: the room that is kept for an answer in words.
        chat: of a preference: whether prompts are conversations, or texts as in rewriting.
        columns: role → the column that it was read from.
    """

    task: str
    kind: TaskKind
    labels: tuple[str, ...] = ()
    answer_tokens: int = 0
    chat: bool = False
    columns: tuple[tuple[str, str], ...] = ()

    @property
    def n_labels(self) -> int:
        """Outputs of the head; 0 where there is none."""
        return {"label": len(self.labels), "labels": len(self.labels), "score": 1, "choice": 1}.get(self.kind, 0)

    @property
    def problem_type(self) -> str | None:
        """The stock class's word for the kind of head."""
        return {
            "label": "single_label_classification", "labels": "multi_label_classification",
            "score": "regression", "choice": "regression",
        }.get(self.kind)  # fmt: skip

    def with_special_tokens(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with this task's markers, and its template for the stock class."""
        if self.chat:
            return tokenizer.with_special_tokens(CHAT_SPECIAL_TOKENS)
        if self.kind in HEAD_KINDS:
            pair = [START_TOKEN, "A", DELIMITER_TOKEN, "B", EXTRACT_TOKEN]
            return tokenizer.with_special_tokens(
                [START_TOKEN, DELIMITER_TOKEN, EXTRACT_TOKEN], single=[START_TOKEN, "A", EXTRACT_TOKEN], pair=pair
            )
        return tokenizer.with_special_tokens([START_TOKEN, DELIMITER_TOKEN], single=[START_TOKEN, "A", DELIMITER_TOKEN])

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.task, "kind": self.kind, "labels": list(self.labels), "answer_tokens": self.answer_tokens,
            "chat": self.chat, "columns": dict(self.columns),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Form":
        """Raises `TypeError`, `ValueError` or `AttributeError` for what `to_dict` does not give."""
        columns = tuple(values.get("columns", {}).items())
        task_spec = cls(**{**values, "labels": tuple(map(str, values.get("labels", ()))), "columns": columns})
        if (
            task_spec.kind not in get_args(TaskKind)
            or task_spec.task not in TARGET_ROLES
            or int(task_spec.answer_tokens) < 0
        ):
            raise ValueError(f"task {task_spec.task!r} of the kind {task_spec.kind!r}")
        return task_spec


class TokenSequence(NamedTuple):
    """One sequence: its ids [T], and which of them are learned as the next word."""

    ids: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class EncodedExample:
    """An example as sequences (one; two orders of a pair; one a choice; the chosen and the rejected), and its gold: an id,
    a number, or [n_labels] of zeros and ones."""

    sequences: tuple[TokenSequence, ...]
    target: Any = 0

    @property
    def max_length(self) -> int:
        return max(len(text.ids) for text in self.sequences)


class ExampleEncoder:
    """Turns a task's examples into tokens, under one tokenizer (with the task's markers) and context length."""

    def __init__(self, task_spec: TaskSpec, tokenizer: Tokenizer, context_length: int):
        self.task_spec, self.tokenizer, self.context_length = task_spec, tokenizer, context_length
        names = (
            CHAT_SPECIAL_TOKENS
            if task_spec.chat
            else (START_TOKEN, DELIMITER_TOKEN, EXTRACT_TOKEN)
            if task_spec.kind in HEAD_KINDS
            else (START_TOKEN, DELIMITER_TOKEN)
        )
        self.special_token_ids = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
        self.label_to_id = {label: id for id, label in enumerate(task_spec.labels)}

    def encode(self, example: Example, problems: IssueLog, with_target: bool = True) -> EncodedExample | None:
        """An example with its gold; None where nothing of it can be learned. What had to be cut goes to `problems`."""
        fields, kind = example.fields, self.task_spec.kind
        if kind == "choice" and len(fields["choices"]) > MAX_ROWS_PER_EXAMPLE:
            problems.add(example.path, example.line, f"more than {MAX_ROWS_PER_EXAMPLE} choices; left out")
            return None
        encoded = (
            self._encode_with_answers(example) if kind in ("answer", "preference") else self._encode_for_head(fields)
        )
        if any(cut for _, cut in encoded):
            what = f"longer than the context of {self.context_length:,} tokens; the part beyond it is cut"
            problems.add(example.path, example.line, what)
        texts = tuple(text for text, _ in encoded)
        if kind in ("answer", "preference"):
            if not all(text.loss_mask.any() for text in texts):
                problems.add(example.path, example.line, "no room for the answer within the context; left out")
                return None
            return EncodedExample(texts)
        return EncodedExample(texts, self._target(fields) if with_target else 0)

    def _target(self, fields: dict[str, Any]) -> Any:
        if self.task_spec.kind == "label":
            return self.label_to_id[fields["label"]]
        if self.task_spec.kind == "labels":
            return np.isin(
                np.arange(len(self.task_spec.labels)), [self.label_to_id[label] for label in fields["labels"]]
            )
        return fields["score"] if self.task_spec.kind == "score" else fields["answer"]

    def _encode_for_head(self, fields: dict[str, Any]) -> list[tuple[TokenSequence, bool]]:
        task = self.task_spec.task
        if task == "classify":
            return [self._with_special_tokens(fields["text"])]
        if task == "entail":
            return [self._with_special_tokens(fields["premise"], fields["hypothesis"])]
        if task == "similarity":
            one, two = fields["sentence1"], fields["sentence2"]
            return [self._with_special_tokens(one, two), self._with_special_tokens(two, one)]
        return [self._with_special_tokens(fields["question"], choice) for choice in fields["choices"]]

    def _with_special_tokens(self, *texts: str) -> tuple[TokenSequence, bool]:
        """start text extract, or start text delimiter text extract; what is too long is cut as the stock tokenizer does."""
        parts = [self.tokenizer.encode(text) for text in texts]
        max_text_tokens = self.context_length - len(parts) - 1
        lengths = truncate_longest_first([len(part) for part in parts], max_text_tokens)
        ids, loss_mask = [self.special_token_ids[START_TOKEN]], [False]
        for i, (part, length) in enumerate(zip(parts, lengths, strict=True)):
            ids += [*part[:length], self.special_token_ids[DELIMITER_TOKEN if i + 1 < len(parts) else EXTRACT_TOKEN]]
            loss_mask += [True] * length + [False]
        return TokenSequence(np.array(ids), np.array(loss_mask)), sum(lengths) < sum(map(len, parts))

    def _encode_with_answers(self, example: Example) -> list[tuple[TokenSequence, bool]]:
        fields = example.fields
        if self.task_spec.task == "chat":
            ids, loss_mask = encode_conversation(self.tokenizer, fields["messages"])
            text = TokenSequence(np.array(ids[: self.context_length]), np.array(loss_mask[: self.context_length]))
            return [(text, len(ids) > self.context_length)]
        prompt, cut = self._encode_prompt(example)
        answers = [fields["completion"]] if self.task_spec.task == "rewrite" else [fields["chosen"], fields["rejected"]]
        return [self._append_answer(prompt, answer, cut) for answer in answers]

    def _append_answer(self, prompt: list[int], answer: str, prompt_truncated: bool) -> tuple[TokenSequence, bool]:
        end = self.special_token_ids[END_OF_TURN_TOKEN] if self.task_spec.chat else self.tokenizer.eos_id
        answer_ids = [*self.tokenizer.encode(answer), end]
        max_answer_length = self.context_length - len(prompt)
        ids = [*prompt, *answer_ids[:max_answer_length]]
        loss_mask = np.arange(len(ids)) >= len(prompt)
        return TokenSequence(np.array(ids), loss_mask), prompt_truncated or len(answer_ids) > max_answer_length

    def encode_prompt(self, example: Example) -> list[int]:
        """The ids that an answer in words follows, the room for it left free."""
        return self._encode_prompt(example)[0]

    def _encode_prompt(self, example: Example) -> tuple[list[int], bool]:
        """The prompt, and whether it had to be cut: a conversation at its beginning, a text at its end."""
        max_prompt_length = self.context_length - max(1, self.task_spec.answer_tokens)
        fields = example.fields
        if self.task_spec.chat:
            messages = fields["messages"]
            prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            ids = encode_conversation(self.tokenizer, prompt, add_generation_prompt=True)[0]
            return ids[max(0, len(ids) - max_prompt_length) :], len(ids) > max_prompt_length
        prompt = fields["prompt"] if "prompt" in fields else fields["messages"][-1]["content"]
        ids = self.tokenizer.encode(prompt)
        return [
            self.special_token_ids[START_TOKEN],
            *ids[: max(0, max_prompt_length - 2)],
            self.special_token_ids[DELIMITER_TOKEN],
        ], len(ids) > max_prompt_length - 2


def truncate_longest_first(lengths: Sequence[int], max_length: int) -> list[int]:
    """How much of each of one or two texts is kept in `room` tokens: the longer one loses first, as the stock tokenizer's
    "longest first" has it."""
    if sum(lengths) <= max_length:
        return list(lengths)
    if len(lengths) == 1:
        return [max_length]
    short, long = sorted(lengths)
    long = max(short, max_length - short) if short <= max_length else short
    if short + long > max_length:
        short, long = max_length // 2, max_length // 2 + max_length % 2
    return [short, long] if lengths[0] <= lengths[1] else [long, short]


def max_answer_tokens(tokenizer: Tokenizer, answers: Sequence[str], context_length: int) -> int:
    """Tokens to keep free for an answer: the longest one of training, its end included, but at most half of the context."""
    longest = max((len(ids) for ids in tokenizer.encode_batch(list(answers))), default=0)
    return min(context_length // 2, longest + 1)


# ---------------------------------------------------------------- the batch of a step


class TaskDataset:
    """Encoded examples in batches: a pure function of (seed, step), each example once an epoch.

    Within every 32 batches examples of about one length come together, so that little is padded; the batches are then
    shuffled again. With `packed` several texts share a row of that many tokens, kept apart by their segments.

    Args:
        weights: how much each example counts [E]; 1 where not given.
        reference: log-probabilities of each example's texts under a frozen model [E, 2].
    """

    def __init__(
        self, examples: Sequence[EncodedExample], batch_size: int, seed: int, *, pad_token_id: int, kind: TaskKind,
        sample_weights: np.ndarray | None = None, reference_logprobs: np.ndarray | None = None, pack_length: int | None = None,
    ):  # fmt: skip
        self.examples, self.batch_size, self.seed, self.pad_token_id, self.kind = (
            list(examples),
            batch_size,
            seed,
            pad_token_id,
            kind,
        )
        self.sample_weights = (
            np.ones(len(self.examples), dtype=np.float32) if sample_weights is None else sample_weights
        )
        self.reference_logprobs = reference_logprobs
        self.example_groups = (
            [[i] for i in range(len(self.examples))] if pack_length is None else self._pack(pack_length)
        )
        self.is_packed = pack_length is not None
        self.group_lengths = np.array([sum(self.examples[i].max_length for i in unit) for unit in self.example_groups])
        self.steps_per_epoch = -(-len(self.example_groups) // batch_size)
        self._cached_epoch, self._cached_batches = -1, [np.zeros(0, dtype=np.int64)]

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return int(self.group_lengths.max())

    def _pack(self, pack_length: int) -> list[list[int]]:
        """Texts into rows: each, in shuffled order, into the first row that has room for it."""
        rows: list[list[int]] = []
        free_tokens: list[int] = []
        order = permute(np.arange(len(self.examples)), len(self.examples), derive_seed(self.seed, 4))
        for i in order.tolist():
            length = self.examples[i].length
            row = next((r for r in range(max(0, len(rows) - 64), len(rows)) if free_tokens[r] >= length), None)
            if row is None:
                rows.append([i])
                free_tokens.append(pack_length - length)
            else:
                rows[row].append(i)
                free_tokens[row] -= length
        return rows

    def epoch_batches(self, epoch: int) -> list[np.ndarray]:
        """The units of each batch of an epoch."""
        if epoch != self._cached_epoch:
            n, chunk = len(self.example_groups), BATCHES_PER_BUCKET * self.batch_size
            order = permute(np.arange(n), n, derive_seed(self.seed, 1, epoch))
            batches = []
            for start in range(0, n, chunk):
                bucket = order[start : start + chunk]
                bucket = bucket[np.argsort(self.group_lengths[bucket], kind="stable")]
                batches += [bucket[i : i + self.batch_size] for i in range(0, len(bucket), self.batch_size)]
            batch_order = permute(np.arange(len(batches)), len(batches), derive_seed(self.seed, 5, epoch))
            self._cached_epoch, self._cached_batches = epoch, [batches[i] for i in batch_order.tolist()]
        return self._cached_batches

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of step `step` (from 0) that machine `rank` of `world` works on."""
        epoch, batch_index = divmod(step, self.steps_per_epoch)
        groups = self.epoch_batches(epoch)[batch_index][rank::world]
        return self.collate(
            [self.example_groups[u] for u in groups],
            first_row_id=epoch * len(self.example_groups) * MAX_ROWS_PER_EXAMPLE,
        )

    def examples_in_batch(self, step: int) -> list[int]:
        """Which examples step `step` (from 0) learns from, in order."""
        epoch, batch_index = divmod(step, self.steps_per_epoch)
        return [i for unit in self.epoch_batches(epoch)[batch_index].tolist() for i in self.example_groups[unit]]

    def collate(self, groups: Sequence[Sequence[int]], first_row_id: int = 0) -> Batch:
        """Rows of whole examples, filled up with the pad token; `first` is the number of the epoch's first row."""
        if self.is_packed:
            rows = [[self.examples[i].sequences[0] for i in unit] for unit in groups]
            row_ids = [first_row_id + unit[0] * MAX_ROWS_PER_EXAMPLE for unit in groups]
        else:
            rows = [[text] for unit in groups for text in self.examples[unit[0]].sequences]
            row_ids = [
                first_row_id + unit[0] * MAX_ROWS_PER_EXAMPLE + j
                for unit in groups
                for j in range(len(self.examples[unit[0]].sequences))
            ]
        length = max(sum(len(text.ids) for text in row) for row in rows)
        tokens = np.full((len(rows), length), self.pad_token_id, dtype=np.int64)
        targets = np.full((len(rows), length), IGNORE_INDEX, dtype=np.int64)
        segments = np.full((len(rows), length), -1, dtype=np.int64)
        last_positions = np.zeros(len(rows), dtype=np.int64)
        for r, row in enumerate(rows):
            start = 0
            for s, (ids, learned) in enumerate(row):
                end = start + len(ids)
                tokens[r, start:end], segments[r, start:end] = ids, s
                targets[r, start : end - 1] = np.where(learned[1:], ids[1:], IGNORE_INDEX)
                start = end
            last_positions[r] = start - 1
        num_target_tokens = int((targets != IGNORE_INDEX).sum())
        n_tokens = sum(len(text.ids) for row in rows for text in row)
        batch = Batch(tokens, targets, row_ids, {"next_word": num_target_tokens}, n_tokens)
        if self.is_packed:
            return replace(batch, segments=segments)
        labels = self._labels([unit[0] for unit in groups], last_positions)
        return replace(
            batch, labels=labels, loss_denominators={"task": float(labels.weights.sum()), "next_word": num_target_tokens}
        )

    def _labels(self, examples: Sequence[int], last_positions: np.ndarray) -> Labels:
        sequences_per_example = [len(self.examples[i].sequences) for i in examples]
        targets = np.array([self.examples[i].target for i in examples])
        return Labels(
            pool_positions=last_positions,
            example_ids=np.repeat(np.arange(len(examples)), sequences_per_example),
            targets=targets.astype(np.int64 if self.kind in ("label", "choice") else np.float32),
            weights=self.sample_weights[list(examples)],
            reference_logprobs=None
            if self.reference_logprobs is None
            else self.reference_logprobs[list(examples)].reshape(-1),
        )
