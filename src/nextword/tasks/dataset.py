"""Labelled examples as rows of tokens: each task's template, what is learned in it, and the batch of a step.

The templates are GPT-1's (Radford et al. 2018, section 3.3 and figure 1): a start token, texts parted by a delimiter, and
an extract token, at which a head reads. Where the answer is a text, it follows the delimiter and is learned as such.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from nextword.data.chat_format import CHAT_MARKERS, encode_conversation
from nextword.data.dataset import IGNORE, Batch, Labels, permute, seed_for
from nextword.data.documents import Problems
from nextword.data.tokenizer import DELIMITER, END_OF_TURN, EXTRACT, START, Tokenizer
from nextword.tasks.examples import Example
from nextword.tasks.schema import GOLD

# What is minimised and how an answer is read: a label, several labels, a score, a choice, an answer in words, a preference.
Kind = Literal["label", "labels", "score", "choice", "answer", "preference"]
HEADS: tuple[Kind, ...] = ("label", "labels", "score", "choice")
ROWS = 64  # that an example may have at most, so that (example, row) has a number of its own
BUCKET = 32  # batches that are sorted by length together


@dataclass(frozen=True)
class Form:
    """How a task's examples become tokens; kept with the model, so that predictions read them as training did.

    Attributes:
        labels: the labels' names in the order of the head's outputs.
        answer_tokens: the room that is kept for an answer in words.
        chat: of a preference: whether prompts are conversations, or texts as in rewriting.
        columns: role → the column that it was read from.
    """

    task: str
    kind: Kind
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

    def with_markers(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with this task's markers, and its template for the stock class."""
        if self.chat:
            return tokenizer.with_markers(CHAT_MARKERS)
        if self.kind in HEADS:
            pair = [START, "A", DELIMITER, "B", EXTRACT]
            return tokenizer.with_markers([START, DELIMITER, EXTRACT], single=[START, "A", EXTRACT], pair=pair)
        return tokenizer.with_markers([START, DELIMITER], single=[START, "A", DELIMITER])

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.task, "kind": self.kind, "labels": list(self.labels), "answer_tokens": self.answer_tokens,
            "chat": self.chat, "columns": dict(self.columns),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Form":
        """Raises `TypeError`, `ValueError` or `AttributeError` for what `to_dict` does not give."""
        columns = tuple(values.get("columns", {}).items())
        form = cls(**{**values, "labels": tuple(map(str, values.get("labels", ()))), "columns": columns})
        if form.kind not in get_args(Kind) or form.task not in GOLD or int(form.answer_tokens) < 0:
            raise ValueError(f"task {form.task!r} of the kind {form.kind!r}")
        return form


class Text(NamedTuple):
    """One sequence: its ids [T], and which of them are learned as the next word."""

    ids: np.ndarray
    learned: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """An example as sequences (one; two orders of a pair; one a choice; the chosen and the rejected), and its gold: an id,
    a number, or [n_labels] of zeros and ones."""

    texts: tuple[Text, ...]
    gold: Any = 0

    @property
    def length(self) -> int:
        return max(len(text.ids) for text in self.texts)


class Encoder:
    """Turns a task's examples into tokens, under one tokenizer (with the task's markers) and context length."""

    def __init__(self, form: Form, tokenizer: Tokenizer, context_length: int):
        self.form, self.tokenizer, self.context_length = form, tokenizer, context_length
        names = CHAT_MARKERS if form.chat else (START, DELIMITER, EXTRACT) if form.kind in HEADS else (START, DELIMITER)
        self.markers = dict(zip(names, tokenizer.ids_of(names), strict=True))
        self.label_ids = {label: id for id, label in enumerate(form.labels)}

    def encode(self, example: Example, problems: Problems, gold: bool = True) -> Encoded | None:
        """An example with its gold; None where nothing of it can be learned. What had to be cut goes to `problems`."""
        fields, kind = example.fields, self.form.kind
        if kind == "choice" and len(fields["choices"]) > ROWS:
            problems.add(example.path, example.line, f"more than {ROWS} choices; left out")
            return None
        whole = self._answer_texts(example) if kind in ("answer", "preference") else self._head_texts(fields)
        if any(cut for _, cut in whole):
            what = f"longer than the context of {self.context_length:,} tokens; the part beyond it is cut"
            problems.add(example.path, example.line, what)
        texts = tuple(text for text, _ in whole)
        if kind in ("answer", "preference"):
            if not all(text.learned.any() for text in texts):
                problems.add(example.path, example.line, "no room for the answer within the context; left out")
                return None
            return Encoded(texts)
        return Encoded(texts, self._gold(fields) if gold else 0)

    def _gold(self, fields: dict[str, Any]) -> Any:
        if self.form.kind == "label":
            return self.label_ids[fields["label"]]
        if self.form.kind == "labels":
            return np.isin(np.arange(len(self.form.labels)), [self.label_ids[label] for label in fields["labels"]])
        return fields["score"] if self.form.kind == "score" else fields["answer"]

    def _head_texts(self, fields: dict[str, Any]) -> list[tuple[Text, bool]]:
        task = self.form.task
        if task == "classify":
            return [self._marked(fields["text"])]
        if task == "entail":
            return [self._marked(fields["premise"], fields["hypothesis"])]
        if task == "similarity":
            one, two = fields["sentence1"], fields["sentence2"]
            return [self._marked(one, two), self._marked(two, one)]
        return [self._marked(fields["question"], choice) for choice in fields["choices"]]

    def _marked(self, *texts: str) -> tuple[Text, bool]:
        """start text extract, or start text delimiter text extract; what is too long is cut as the stock tokenizer does."""
        parts = [self.tokenizer.encode(text) for text in texts]
        room = self.context_length - len(parts) - 1
        lengths = fit([len(part) for part in parts], room)
        ids, learned = [self.markers[START]], [False]
        for i, (part, length) in enumerate(zip(parts, lengths, strict=True)):
            ids += [*part[:length], self.markers[DELIMITER if i + 1 < len(parts) else EXTRACT]]
            learned += [True] * length + [False]
        return Text(np.array(ids), np.array(learned)), sum(lengths) < sum(map(len, parts))

    def _answer_texts(self, example: Example) -> list[tuple[Text, bool]]:
        fields = example.fields
        if self.form.task == "chat":
            ids, learned = encode_conversation(self.tokenizer, fields["messages"])
            text = Text(np.array(ids[: self.context_length]), np.array(learned[: self.context_length]))
            return [(text, len(ids) > self.context_length)]
        prompt, cut = self._prompt(example)
        answers = [fields["completion"]] if self.form.task == "rewrite" else [fields["chosen"], fields["rejected"]]
        return [self._answered(prompt, answer, cut) for answer in answers]

    def _answered(self, prompt: list[int], answer: str, cut: bool) -> tuple[Text, bool]:
        end = self.markers[END_OF_TURN] if self.form.chat else self.tokenizer.end_of_text
        said = [*self.tokenizer.encode(answer), end]
        room = self.context_length - len(prompt)
        ids = [*prompt, *said[:room]]
        learned = np.arange(len(ids)) >= len(prompt)
        return Text(np.array(ids), learned), cut or len(said) > room

    def prompt(self, example: Example) -> list[int]:
        """The ids that an answer in words follows, the room for it left free."""
        return self._prompt(example)[0]

    def _prompt(self, example: Example) -> tuple[list[int], bool]:
        """The prompt, and whether it had to be cut: a conversation at its beginning, a text at its end."""
        room = self.context_length - max(1, self.form.answer_tokens)
        fields = example.fields
        if self.form.chat:
            messages = fields["messages"]
            asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            ids = encode_conversation(self.tokenizer, asked, answer=True)[0]
            return ids[max(0, len(ids) - room) :], len(ids) > room
        asked = fields["prompt"] if "prompt" in fields else fields["messages"][-1]["content"]
        ids = self.tokenizer.encode(asked)
        return [self.markers[START], *ids[: max(0, room - 2)], self.markers[DELIMITER]], len(ids) > room - 2


def fit(lengths: Sequence[int], room: int) -> list[int]:
    """How much of each of one or two texts is kept in `room` tokens: the longer one loses first, as the stock tokenizer's
    "longest first" has it."""
    if sum(lengths) <= room:
        return list(lengths)
    if len(lengths) == 1:
        return [room]
    short, long = sorted(lengths)
    long = max(short, room - short) if short <= room else short
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return [short, long] if lengths[0] <= lengths[1] else [long, short]


def answer_room(tokenizer: Tokenizer, answers: Sequence[str], context_length: int) -> int:
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
        self, examples: Sequence[Encoded], per_batch: int, seed: int, *, pad: int, kind: Kind,
        weights: np.ndarray | None = None, reference: np.ndarray | None = None, packed: int | None = None,
    ):  # fmt: skip
        self.examples, self.per_batch, self.seed, self.pad, self.kind = list(examples), per_batch, seed, pad, kind
        self.weights = np.ones(len(self.examples), dtype=np.float32) if weights is None else weights
        self.reference = reference
        self.units = [[i] for i in range(len(self.examples))] if packed is None else self._pack(packed)
        self.packed = packed is not None
        self.lengths = np.array([sum(self.examples[i].length for i in unit) for unit in self.units])
        self.steps_per_epoch = -(-len(self.units) // per_batch)
        self._epoch, self._order = -1, [np.zeros(0, dtype=np.int64)]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())

    def _pack(self, room: int) -> list[list[int]]:
        """Texts into rows: each, in shuffled order, into the first row that has room for it."""
        rows: list[list[int]] = []
        free: list[int] = []
        order = permute(np.arange(len(self.examples)), len(self.examples), seed_for(self.seed, 4))
        for i in order.tolist():
            length = self.examples[i].length
            row = next((r for r in range(max(0, len(rows) - 64), len(rows)) if free[r] >= length), None)
            if row is None:
                rows.append([i])
                free.append(room - length)
            else:
                rows[row].append(i)
                free[row] -= length
        return rows

    def order(self, epoch: int) -> list[np.ndarray]:
        """The units of each batch of an epoch."""
        if epoch != self._epoch:
            n, chunk = len(self.units), BUCKET * self.per_batch
            order = permute(np.arange(n), n, seed_for(self.seed, 1, epoch))
            batches = []
            for start in range(0, n, chunk):
                part = order[start : start + chunk]
                part = part[np.argsort(self.lengths[part], kind="stable")]
                batches += [part[i : i + self.per_batch] for i in range(0, len(part), self.per_batch)]
            places = permute(np.arange(len(batches)), len(batches), seed_for(self.seed, 5, epoch))
            self._epoch, self._order = epoch, [batches[i] for i in places.tolist()]
        return self._order

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of step `step` (from 0) that machine `rank` of `world` works on."""
        epoch, place = divmod(step, self.steps_per_epoch)
        units = self.order(epoch)[place][rank::world]
        return self.assemble([self.units[u] for u in units], first=epoch * len(self.units) * ROWS)

    def examples_of(self, step: int) -> list[int]:
        """Which examples step `step` (from 0) learns from, in order."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return [i for unit in self.order(epoch)[place].tolist() for i in self.units[unit]]

    def assemble(self, units: Sequence[Sequence[int]], first: int = 0) -> Batch:
        """Rows of whole examples, filled up with the pad token; `first` is the number of the epoch's first row."""
        if self.packed:
            rows = [[self.examples[i].texts[0] for i in unit] for unit in units]
            numbers = [first + unit[0] * ROWS for unit in units]
        else:
            rows = [[text] for unit in units for text in self.examples[unit[0]].texts]
            numbers = [first + unit[0] * ROWS + j for unit in units for j in range(len(self.examples[unit[0]].texts))]
        length = max(sum(len(text.ids) for text in row) for row in rows)
        tokens = np.full((len(rows), length), self.pad, dtype=np.int64)
        targets = np.full((len(rows), length), IGNORE, dtype=np.int64)
        segments = np.full((len(rows), length), -1, dtype=np.int64)
        ends = np.zeros(len(rows), dtype=np.int64)
        for r, row in enumerate(rows):
            start = 0
            for s, (ids, learned) in enumerate(row):
                end = start + len(ids)
                tokens[r, start:end], segments[r, start:end] = ids, s
                targets[r, start : end - 1] = np.where(learned[1:], ids[1:], IGNORE)
                start = end
            ends[r] = start - 1
        learned_tokens = int((targets != IGNORE).sum())
        n_tokens = sum(len(text.ids) for row in rows for text in row)
        batch = Batch(tokens, targets, numbers, {"next_word": learned_tokens}, n_tokens)
        if self.packed:
            return replace(batch, segments=segments)
        labels = self._labels([unit[0] for unit in units], ends)
        return replace(batch, labels=labels, counts={"task": float(labels.weight.sum()), "next_word": learned_tokens})

    def _labels(self, examples: Sequence[int], ends: np.ndarray) -> Labels:
        several = [len(self.examples[i].texts) for i in examples]
        gold = np.array([self.examples[i].gold for i in examples])
        return Labels(
            ends=ends,
            example=np.repeat(np.arange(len(examples)), several),
            gold=gold.astype(np.int64 if self.kind in ("label", "choice") else np.float32),
            weight=self.weights[list(examples)],
            reference=None if self.reference is None else self.reference[list(examples)].reshape(-1),
        )
