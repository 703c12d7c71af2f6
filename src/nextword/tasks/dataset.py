"""Tasks: how their examples become token sequences, and the batches of each training step.

The templates are those of GPT-1 (Radford et al. 2018, section 3.3 and figure 1): a start token, texts separated by a delimiter,
and an extract token, whose hidden state a classification head reads. A generated answer follows the delimiter.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from nextword.common.errors import NextwordError, UsageError
from nextword.common.text_units import nfc
from nextword.data.chat_format import CHAT_SPECIAL_TOKENS, encode_conversation
from nextword.data.dataset import IGNORE_INDEX, Batch, Labels, derive_seed, permute
from nextword.data.issues import IssueLog
from nextword.data.tokenizer import DELIMITER_TOKEN, END_OF_TURN_TOKEN, EXTRACT_TOKEN, START_TOKEN, Tokenizer
from nextword.tasks.examples import (
    Example,
    ExampleSet,
    filter_known_labels,
    input_texts,
    label_names,
    read_examples,
    split_examples,
)
from nextword.tasks.metrics import TEXT_METRICS
from nextword.tasks.schema import ANSWER_FORMATS, TASKS

# What is predicted: a label, several labels, a score, a choice, a generated answer, or a preference between two answers.
TaskKind = Literal["label", "labels", "score", "choice", "answer", "preference"]


class KindInfo(NamedTuple):
    """What belongs to a kind of task.

    Attributes:
        target_field: The field of an example that holds the target; the answer of a conversation is its last message.
        prediction_field: The field of a prediction that is compared with it.
        metrics: The metrics. The first one selects the best checkpoint, unless labels are imbalanced.
        problem_type: The `problem_type` of the Hugging Face configuration; None without a classification head.
    """

    target_field: str
    prediction_field: str
    metrics: tuple[str, ...]
    problem_type: str | None = None

    @property
    def metric(self) -> str:
        """The default selection metric."""
        return self.metrics[0]


TASK_KINDS: dict[TaskKind, KindInfo] = {
    "label": KindInfo("label", "label", ("accuracy", "macro_f1", "matthews"), "single_label_classification"),
    "labels": KindInfo("labels", "labels", ("micro_f1", "macro_f1", "exact_match"), "multi_label_classification"),
    "score": KindInfo("score", "score", ("pearson", "spearman"), "regression"),
    "choice": KindInfo("answer", "label", ("accuracy",), "regression"),
    "answer": KindInfo("completion", "text", TEXT_METRICS),
    "preference": KindInfo("chosen", "score", ("preferred",)),
}
HEAD_KINDS = tuple(kind for kind, info in TASK_KINDS.items() if info.problem_type)  # predicted by a classification head
PROBABILITY_KINDS = ("label", "labels", "choice")  # the head gives probabilities
MAX_SEQUENCES_PER_EXAMPLE = 64  # so that (example, sequence) has an id of its own
FEW_EXAMPLES = 1000  # of which a larger share is held out
MIN_EXAMPLES_FOR_TEST = 2000
SPLIT_VERSION = 3  # of `load_task_data`
IMBALANCE_THRESHOLD = 3.0  # labels are weighted if the most frequent one is this many times as frequent as the rarest
BATCHES_PER_BUCKET = 32  # batches whose examples are sorted by length together


@dataclass(frozen=True)
class TaskSpec:
    """How the examples of a task become tokens. Stored with the model, so that prediction encodes as training did.

    Attributes:
        task: Name of the task.
        kind: What is predicted.
        labels: Names of the labels in the order of the outputs of the head.
        answer_tokens: Tokens of the context that are reserved for a generated answer.
        chat: Whether prompts are conversations (chat, and preferences of a chat model).
        columns: The column that each role was read from.
        answer_format: How the answers of multiple choice are read.
        keeps_prompt_end: A prompt that is too long keeps its end, where a question usually stands. Models of earlier versions
            have the beginning of a text, and of a conversation that is learned.
    """

    task: str
    kind: TaskKind
    labels: tuple[str, ...] = ()
    answer_tokens: int = 0
    chat: bool = False
    columns: tuple[tuple[str, str], ...] = ()
    answer_format: str = ""
    keeps_prompt_end: bool = False

    @property
    def format(self) -> ExampleSet:
        """How examples are read, for `read_examples`."""
        return ExampleSet(self.task, dict(self.columns), [], self.answer_format, self.labels)

    @property
    def n_labels(self) -> int:
        """Number of outputs of the head; 0 without a head."""
        return len(self.labels) if self.kind in ("label", "labels") else int(self.kind in HEAD_KINDS)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs of the head; empty without a head."""
        return self.labels or ("score",) * self.n_labels

    @property
    def problem_type(self) -> str | None:
        """The `problem_type` of the Hugging Face configuration; None without a head."""
        return TASK_KINDS[self.kind].problem_type

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens of the template."""
        if self.chat:
            return tuple(CHAT_SPECIAL_TOKENS)
        return (START_TOKEN, DELIMITER_TOKEN, *([EXTRACT_TOKEN] if self.kind in HEAD_KINDS else []))

    def with_special_tokens(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with the special tokens of this task, and its template in the Hugging Face files."""
        if self.chat:
            return tokenizer.with_special_tokens(list(self.special_tokens))
        templates: dict[str, list[str]] = {"single": [START_TOKEN, "A", DELIMITER_TOKEN]}
        if self.kind in HEAD_KINDS:
            templates["single"] = [START_TOKEN, "A", EXTRACT_TOKEN]
            templates["pair"] = [START_TOKEN, "A", DELIMITER_TOKEN, "B", EXTRACT_TOKEN]
        return tokenizer.with_special_tokens(list(self.special_tokens), **templates)

    def to_dict(self) -> dict[str, Any]:
        """The specification as JSON can hold it."""
        return {**asdict(self), "labels": list(self.labels), "columns": dict(self.columns)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TaskSpec":
        """The specification that `to_dict` returned.

        Raises:
            TypeError, ValueError, AttributeError: The values are not those of a specification.
        """
        labels, columns = tuple(map(str, values.get("labels", ()))), tuple(values.get("columns", {}).items())
        fields: dict[str, Any] = {**values, "labels": labels, "columns": columns}
        spec = cls(**fields)
        has_format = spec.answer_format in ("", *ANSWER_FORMATS)
        if spec.kind not in TASK_KINDS or spec.task not in TASKS or int(spec.answer_tokens) < 0 or not has_format:
            raise ValueError(f"task {spec.task!r} of kind {spec.kind!r}")
        return spec


class TokenSequence(NamedTuple):
    """Token ids [T], and a mask [T] of the tokens that are learned by language modeling."""

    ids: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class EncodedExample:
    """An example as token sequences, and its target.

    Attributes:
        sequences: One; two for the two orders of a pair, or for the chosen and the rejected answer; or one for each choice.
        target: A label id, a choice index, a score, or a mask [n_labels].
    """

    sequences: tuple[TokenSequence, ...]
    target: Any = 0

    @property
    def max_length(self) -> int:
        """Length of the longest sequence, in tokens."""
        return max(len(sequence.ids) for sequence in self.sequences)


ANSWER_FIELDS = ("completion", "chosen", "rejected")


class ExampleEncoder:
    """Encodes the examples of a task.

    Args:
        task_spec: The task.
        tokenizer: A tokenizer with the special tokens of the task.
        context_length: The maximum length of a sequence, in tokens.

    Attributes:
        cut_counts: How many examples lost each part, such as the end of the text.
    """

    def __init__(self, task_spec: TaskSpec, tokenizer: Tokenizer, context_length: int):
        self.task_spec, self.tokenizer, self.context_length = task_spec, tokenizer, context_length
        names = task_spec.special_tokens
        self.special_token_ids = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
        self.label_to_id = {label: id for id, label in enumerate(task_spec.labels)}
        self.cut_counts: Counter[str] = Counter()

    def encode(self, example: Example, issues: IssueLog, with_target: bool = True) -> EncodedExample | None:
        """Encode an example; None if nothing of it can be learned. Truncation and omission are reported."""
        fields, kind = example.fields, self.task_spec.kind
        if kind == "choice" and len(fields["choices"]) > MAX_SEQUENCES_PER_EXAMPLE:
            issues.add(example.path, example.line, f"more than {MAX_SEQUENCES_PER_EXAMPLE} choices; left out")
            return None
        generated = kind in ("answer", "preference")
        texts = [*input_texts(self.task_spec.task, example), *(fields.get(name, "") for name in ANSWER_FIELDS)]
        texts += [message["content"] for message in fields.get("messages", ())[-1:]]
        if lost := "".join(self.tokenizer.lost_text(texts)):
            what = "the tokenizer cannot represent part of the text, which is lost"
            issues.add(example.path, example.line, what, f"such as {lost[:8]!r}")
        if message := self.tokenizer.form_message(texts):
            issues.add(example.path, example.line, message)
        encoded = self._encode_sequences(example)
        self._report_cut(example, (part for _, parts in encoded for part in parts), issues)
        sequences = tuple(sequence for sequence, _ in encoded)
        if not generated:
            return EncodedExample(sequences, self._target(fields) if with_target else 0)
        if not all(sequence.loss_mask.any() for sequence in sequences):
            issues.add(example.path, example.line, "no room for the answer within the context; left out")
            return None
        return EncodedExample(sequences)

    def encode_all(self, examples: Sequence[Example], issues: IssueLog) -> tuple[list[Example], list[EncodedExample]]:
        """The examples that can be encoded, and their encodings. It is reported if most of them lose a part."""
        self.cut_counts.clear()
        pairs = [(example, encoded) for example in examples if (encoded := self.encode(example, issues)) is not None]
        if cut := {part: count for part, count in self.cut_counts.items() if 2 * count > len(examples)}:
            parts = ", ".join(f"{part} in {count:,} of {len(examples):,}" for part, count in cut.items())
            hint = "or predict with --windows" if self.task_spec.task == "classify" else "or shorten the texts"
            what = f"most examples do not fit into the context of {self.context_length:,} tokens"
            detail = (
                f"cut off is {parts}. What is cut off cannot be learned, nor what depends on it: start from a model with a "
                f"longer context (pretrain --model.context-length), {hint}"
            )
            issues.info(examples[0].path, None, what, detail)
        return [example for example, _ in pairs], [encoded for _, encoded in pairs]

    def encode_prompt(self, example: Example, issues: IssueLog | None = None) -> list[int]:
        """The token ids that a generated answer follows, with room for the answer in the context."""
        ids, cut = self._encode_prompt(example)
        self._report_cut(example, cut, issues or IssueLog())
        return ids

    def _report_cut(self, example: Example, parts: Iterable[str], issues: IssueLog) -> None:
        for part in dict.fromkeys(parts):
            what = f"longer than the context of {self.context_length:,} tokens; {part} is cut off"
            issues.add(example.path, example.line, what)
            self.cut_counts[part] += 1

    def _target(self, fields: dict[str, Any]) -> Any:
        target = fields[TASK_KINDS[self.task_spec.kind].target_field]
        if self.task_spec.kind == "label":
            return self.label_to_id[target]
        return np.array([name in target for name in self.label_to_id]) if self.task_spec.kind == "labels" else target

    def _encode_sequences(self, example: Example) -> list[tuple[TokenSequence, list[str]]]:
        """The sequences of an example, and the parts that were cut off from each.

        With a head: one text or a pair, a pair of sentences in both orders, or a question with each of its choices. Otherwise
        a conversation, or the prompt with each answer.
        """
        task, fields = self.task_spec.task, example.fields
        if self.task_spec.kind in HEAD_KINDS:
            first, *others = input_texts(task, example)
            sequences: list[tuple[str, ...]] = [(first, other) for other in others] or [(first,)]
            if task == "similarity":
                sequences.append((others[0], first))
            return [self._with_special_tokens(*texts) for texts in sequences]
        if task == "chat":
            return [self._encode_chat(fields["messages"])]
        prompt, cut = self._encode_prompt(example)
        answers = [fields["completion"]] if task == "rewrite" else [fields["chosen"], fields["rejected"]]
        return [self._append_answer(prompt, answer, cut) for answer in answers]

    def _encode_chat(self, messages: Sequence[dict[str, Any]]) -> tuple[TokenSequence, list[str]]:
        """A conversation: of one that is too long the last answer, and the end of what comes before it."""
        ids, loss_mask = encode_conversation(self.tokenizer, messages)
        prompt_length, cut = len(ids), list[str]()
        if len(ids) > self.context_length and self.task_spec.keeps_prompt_end:
            prompt = encode_conversation(self.tokenizer, messages[:-1], add_generation_prompt=True)[0]
            num_left_out = max(0, len(prompt) - self.context_length + max(1, self.task_spec.answer_tokens))
            cut += ["the beginning of the conversation"] if num_left_out else []
            ids, loss_mask, prompt_length = ids[num_left_out:], loss_mask[num_left_out:], len(prompt) - num_left_out
        if len(ids) > self.context_length:
            cut += ["the end of the answer" if prompt_length < len(ids) else "the end of the conversation"]
        return TokenSequence(np.array(ids[: self.context_length]), np.array(loss_mask[: self.context_length])), cut

    def _with_special_tokens(self, *texts: str) -> tuple[TokenSequence, list[str]]:
        """`start text extract` or `start text delimiter text extract`, truncated as the Hugging Face tokenizer does."""
        parts = [self.tokenizer.encode(text) for text in texts]
        lengths = truncate_longest_first([len(part) for part in parts], self.context_length - len(parts) - 1)
        ids, loss_mask = [self.special_token_ids[START_TOKEN]], [False]
        for i, (part, length) in enumerate(zip(parts, lengths, strict=True)):
            separator = DELIMITER_TOKEN if i + 1 < len(parts) else EXTRACT_TOKEN
            ids += [*part[:length], self.special_token_ids[separator]]
            loss_mask += [True] * length + [False]
        cut = [i for i, (part, length) in enumerate(zip(parts, lengths, strict=True)) if length < len(part)]
        names = (
            ["the end of the text"] if len(parts) == 1 else ["the end of the first text", "the end of the second text"]
        )
        return TokenSequence(np.array(ids), np.array(loss_mask)), [names[i] for i in cut]

    def encode_windows(self, example: Example) -> list[EncodedExample]:
        """The whole of a text to classify, in as few windows of equal length as fit into the context."""
        ids = self.tokenizer.encode(input_texts(self.task_spec.task, example)[0])
        num_windows = max(1, math.ceil(len(ids) / (self.context_length - 2)))
        start, extract = (self.special_token_ids[name] for name in (START_TOKEN, EXTRACT_TOKEN))
        windows: list[EncodedExample] = []
        for part in np.array_split(np.array(ids, dtype=np.int64), num_windows):
            loss_mask = np.array([False, *[True] * len(part), False])
            windows.append(EncodedExample((TokenSequence(np.array([start, *part, extract]), loss_mask),)))
        return windows

    def _append_answer(self, prompt: list[int], answer: str, cut: list[str]) -> tuple[TokenSequence, list[str]]:
        end = self.special_token_ids[END_OF_TURN_TOKEN] if self.task_spec.chat else self.tokenizer.eos_id
        answer_ids = [*self.tokenizer.encode(answer), end]
        max_answer_length = self.context_length - len(prompt)
        ids = np.array([*prompt, *answer_ids[:max_answer_length]])
        cut = [*cut, "the end of the answer"] if len(answer_ids) > max_answer_length else cut
        return TokenSequence(ids, np.arange(len(ids)) >= len(prompt)), cut

    def _encode_prompt(self, example: Example) -> tuple[list[int], list[str]]:
        """The prompt, and the parts that were cut off."""
        max_prompt_length = self.context_length - max(1, self.task_spec.answer_tokens)
        fields = example.fields
        if self.task_spec.chat:
            messages = fields["messages"]
            prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            ids, _ = encode_conversation(self.tokenizer, prompt, add_generation_prompt=True)
            is_cut = len(ids) > max_prompt_length
            return ids[max(0, len(ids) - max_prompt_length) :], ["the beginning of the conversation"] if is_cut else []
        ids = self.tokenizer.encode(fields["prompt"] if "prompt" in fields else fields["messages"][-1]["content"])
        start, delimiter = self.special_token_ids[START_TOKEN], self.special_token_ids[DELIMITER_TOKEN]
        room = max(0, max_prompt_length - 2)
        if len(ids) <= room:
            return [start, *ids, delimiter], []
        if self.task_spec.keeps_prompt_end:
            return [start, *ids[len(ids) - room :], delimiter], ["the beginning of the prompt"]
        return [start, *ids[:room], delimiter], ["the end of the prompt"]


def truncate_longest_first(lengths: Sequence[int], max_length: int) -> list[int]:
    """The truncated lengths of one or two texts: the longer text is truncated first.

    This is the strategy `longest_first` of the Hugging Face tokenizers.
    """
    if sum(lengths) <= max_length:
        return list(lengths)
    if len(lengths) == 1:
        return [max_length]
    short = min(*lengths, max_length // 2)
    return [short, max_length - short] if lengths[0] <= lengths[1] else [max_length - short, short]


def max_answer_tokens(tokenizer: Tokenizer, answers: Sequence[str], context_length: int) -> int:
    """Tokens to reserve for an answer: the longest training answer with its end token, but at most half of the context."""
    longest = max((len(ids) for ids in tokenizer.encode_batch(list(answers))), default=0)
    return min(context_length // 2, longest + 1)


# ---------------------------------------------------------------- examples of a run


@dataclass(frozen=True)
class TaskData:
    """The examples of a task, read and encoded.

    Attributes:
        task_spec: The task.
        tokenizer: The tokenizer with the special tokens of the task.
        train: The training examples.
        validation: The validation examples.
        test: The test examples; empty without a test set.
        encoded_train: The training examples as tokens.
        encoded_validation: The validation examples as tokens.
        encoded_test: The test examples as tokens.
        num_available: Number of training examples before `limit`.
        reason: Why this is the task, if it was inferred.
    """

    task_spec: TaskSpec
    tokenizer: Tokenizer
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    encoded_train: list[EncodedExample]
    encoded_validation: list[EncodedExample]
    encoded_test: list[EncodedExample]
    num_available: int
    reason: str = ""

    def fingerprint(self) -> str:
        """A hash of all tokens and targets, in order."""
        digest = hashlib.sha256()
        for example in [*self.encoded_train, *self.encoded_validation, *self.encoded_test]:
            for sequence in example.sequences:
                digest.update(sequence.ids.astype("<i8").tobytes() + sequence.loss_mask.tobytes() + b"\0")
            digest.update(repr(np.asarray(example.target).tolist()).encode())
        return digest.hexdigest()


def load_task_data(
    paths: list[str],
    tokenizer: Tokenizer,
    base_task_spec: TaskSpec | None,
    context_length: int,
    issues: IssueLog,
    *,
    task: str | None = None,
    columns: dict[str, str] | None = None,
    validation: list[str] | None = None,
    test: list[str] | None = None,
    validation_fraction: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    label_map: dict[str, str] | None = None,
    split_version: int = SPLIT_VERSION,
) -> TaskData:
    """Load and encode labeled examples. The same arguments give the same data.

    Args:
        paths: Files and folders of labeled examples.
        tokenizer: The tokenizer of the base model, without the special tokens of the task.
        base_task_spec: The task that the base model was fine-tuned for, if any.
        context_length: The context length of the model, in tokens.
        issues: Log for examples that are left out.
        task: Name of the task; None: inferred from the columns.
        columns: Columns chosen by the user, {role: column}.
        validation: Files of the validation set. Default: a part of the examples.
        test: Files of the test set. Default: if there are `MIN_EXAMPLES_FOR_TEST` and no `validation` is given, a part of the
            examples as large as the validation set; else none.
        validation_fraction: The share of the validation set. Default: 10 %, of fewer than `FEW_EXAMPLES` 20 %.
        limit: Number of training examples to draw; a smaller limit draws a subset of a larger one.
        seed: Seed of the draw.
        label_map: See `read_examples`.
        split_version: 1 and 2 for runs of earlier versions: see `split_examples`. From 3 on, columns, files and folders may say
            which examples are for validation and test, and inputs with two labels, or in two sets, are left out.

    Raises:
        UsageError: The columns fit no task, or there is nothing to learn.
        NextwordError: There are no training examples, or no validation examples.
    """
    is_current = split_version >= SPLIT_VERSION
    label_map = (label_map or {}) if is_current else None
    examples = read_examples(paths, task, issues, columns, label_map=label_map)
    if examples.task == "continue":
        raise UsageError(
            "the data is text without labels: train on it with --task continue and files or folders of text"
        )
    if validation_fraction is not None and validation:
        raise UsageError("--validation-fraction and --validation exclude each other: the second names the whole set")
    fraction = validation_fraction or (0.2 if len(examples) < FEW_EXAMPLES and split_version > 1 else 0.1)
    named = {name: [e for e in examples if e.split == name] for name in ("validation", "test")} if is_current else {}
    if any(named.values()):
        counts = f"{len(named['validation']):,} examples for validation and {len(named['test']):,} for test"
        issues.info(paths[0], None, "the data says which examples are held out", counts)
        examples.items = [example for example in examples if example.split in ("", "train")]
    has_validation, has_test = bool(validation or named.get("validation")), bool(test or named.get("test"))
    has_test_part = not (has_validation or has_test) and len(examples) >= MIN_EXAMPLES_FOR_TEST and split_version > 1
    shares = (0.0 if has_validation else fraction), (fraction if has_test_part else 0.0)
    train, held_out, test_set = split_examples(examples, *shares, version=split_version)
    held_out, test_set = named.get("validation") or held_out, named.get("test") or test_set
    if not train:
        details = "\n".join(issues.summary_lines())
        raise NextwordError(f"{', '.join(paths)}: there are no training examples\n{details}".rstrip())
    # Inferred from all examples, so that a subset has the same labels.
    task_spec = infer_task_spec(examples, train, tokenizer, base_task_spec, context_length, is_current)
    if validation:
        held_out = _read_held_out_set(validation, examples, task_spec, paths[0], issues, label_map)
    if test:
        test_set = _read_held_out_set(test, examples, task_spec, paths[0], issues, label_map)
    if task_spec.labels:
        held_out, test_set = (filter_known_labels(part, task_spec.labels, issues) for part in (held_out, test_set))
    if is_current:
        train, held_out = remove_leaks(task_spec, train, held_out, test_set, issues)
    num_available = len(train)
    if limit is not None and limit < len(train):
        order = permute(np.arange(len(train)), len(train), derive_seed(seed, 6))
        drawn: list[int] = sorted(order.tolist()[:limit])
        train = [train[i] for i in drawn]
    tokenizer = task_spec.with_special_tokens(tokenizer)
    encoder = ExampleEncoder(task_spec, tokenizer, context_length)
    train, encoded_train = encoder.encode_all(train, issues)
    held_out, encoded_held_out = encoder.encode_all(held_out, issues)
    test_set, encoded_test = encoder.encode_all(test_set, issues)
    if test and not test_set:
        raise NextwordError(f"{', '.join(test)}: no test example is left")
    if not held_out:
        details = "\n".join(issues.summary_lines())
        where = (
            f"{', '.join(validation)}: no"
            if validation
            else f"{', '.join(paths)}: no example with another input, and no"
        )
        raise NextwordError(
            f"{where} validation example is left; name a table of them with --validation\n{details}".rstrip()
        )
    encoded = encoded_train, encoded_held_out, encoded_test
    return TaskData(task_spec, tokenizer, train, held_out, test_set, *encoded, num_available, examples.reason)


def remove_leaks(
    task_spec: TaskSpec,
    train: Sequence[Example],
    validation: Sequence[Example],
    test: Sequence[Example],
    issues: IssueLog,
) -> tuple[list[Example], list[Example]]:
    """The training and validation examples whose inputs are in no set that is scored after them.

    An input of the test set is left out of the other two, and one of the validation set of the training set. Training examples
    of one input with different labels are left out, too, unless there are no others. All are counted.

    Raises:
        NextwordError: No training example is left.
    """

    def inputs(examples: Sequence[Example]) -> list[tuple[str, ...]]:
        texts = [tuple(nfc(" ".join(text.split())) for text in input_texts(task_spec.task, e)) for e in examples]
        return [tuple(sorted(pair)) for pair in texts] if task_spec.task == "similarity" else texts

    def without(examples: Sequence[Example], excluded: Collection[tuple[str, ...]], kind: str) -> list[Example]:
        is_excluded = [key in excluded for key in inputs(examples)]
        lost = [example for example, excluded in zip(examples, is_excluded, strict=True) if excluded]
        if lost:
            detail = f"{len(lost):,} of {len(examples):,}"
            issues.add(lost[0].path, lost[0].line, f"{kind}; left out", detail, count=len(lost))
        return [example for example, excluded in zip(examples, is_excluded, strict=True) if not excluded]

    in_test, in_validation = set(inputs(test)), set(inputs(validation))
    validation = without(validation, in_test, "the same text is also in the test set")
    left = without(train, in_test, "a training example whose text is also in the test set")
    left = without(left, in_validation, "a training example whose text is also in the validation set")
    if train and not left:
        raise NextwordError(f"all {len(train):,} training examples are also in the validation or the test set")
    if task_spec.kind not in ("label", "labels", "choice"):
        return left, list(validation)
    targets: dict[tuple[str, ...], set[Any]] = {}
    for example, key in zip(left, inputs(left), strict=True):
        targets.setdefault(key, set()).add(example.fields[TASK_KINDS[task_spec.kind].target_field])
    ambiguous = {key for key, values in targets.items() if len(values) > 1}
    if len(ambiguous) < len(targets):
        left = without(left, ambiguous, "a training example whose text also has another label")
    return left, list(validation)


def _read_held_out_set(
    paths: list[str],
    train_set: ExampleSet,
    task_spec: TaskSpec,
    train_path: str,
    issues: IssueLog,
    label_map: dict[str, str] | None,
) -> list[Example]:
    """The examples of the files of a validation or test set, read like the training set."""
    validation_set = read_examples(paths, None, issues, like=task_spec.format, label_map=label_map)
    targets = [{"label", "labels", "score"} & set(examples.columns) for examples in (train_set, validation_set)]
    if targets[0] != targets[1]:
        raise UsageError(
            f"{paths[0]}: the target is {min(targets[1], default='missing')}, but in {train_path} it is "
            f"{min(targets[0], default='missing')}: name its column with --column"
        )
    return validation_set.items


def infer_task_spec(
    examples: ExampleSet,
    train: Sequence[Example],
    tokenizer: Tokenizer,
    base_task_spec: TaskSpec | None,
    context_length: int,
    keeps_prompt_end: bool = True,
) -> TaskSpec:
    """The specification of a task from its training examples.

    Raises:
        UsageError: All examples have the same label.
    """
    task, columns = examples.task, tuple(examples.columns.items())
    fields = train[0].fields
    kinds: list[TaskKind] = [kind for kind, info in TASK_KINDS.items() if info.target_field in fields]
    kind = kinds[0] if kinds else "answer"  # of a chat
    if kind in ("label", "labels"):
        names = tuple(label_names(train))
        if len(names) < (2 if kind == "label" else 1):
            label = f"the label {names[0]!r}" if names else "no label"
            raise UsageError(f"all {len(train):,} examples have {label}: there is nothing to learn")
        return TaskSpec(task, kind, names, columns=columns)
    if kind in HEAD_KINDS:
        return TaskSpec(task, kind, columns=columns, answer_format=examples.answer_format)
    if task == "chat":
        messages = [message for example in train for message in example.fields["messages"]]
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
    else:
        target_fields = fields.keys() & {"completion", "chosen", "rejected"}
        answers = [example.fields[name] for example in train for name in target_fields]
    # Preferences have the prompt format of the base model: conversations, unless it was fine-tuned to rewrite.
    chat = task == "chat" or (task == "prefer" and (base_task_spec is None or base_task_spec.task != "rewrite"))
    answer_tokens = max_answer_tokens(tokenizer, answers, context_length)
    return TaskSpec(
        task, kind, answer_tokens=answer_tokens, chat=chat, columns=columns, keeps_prompt_end=keeps_prompt_end
    )


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
        order: list[int] = permute(
            np.arange(len(self.examples)), len(self.examples), derive_seed(self.seed, 4)
        ).tolist()
        for i in order:
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
            key = derive_seed(self.seed, 5, epoch)
            batch_order: list[int] = permute(np.arange(len(batches)), len(batches), key).tolist()
            self._cached_epoch, self._cached_batches = epoch, [batches[i] for i in batch_order]
        return self._cached_batches[batch_index]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The rows of a training step (from 0) that process `rank` of `world_size` works on."""
        first_row_id = step // self.steps_per_epoch * len(self._groups) * MAX_SEQUENCES_PER_EXAMPLE
        groups: list[int] = self._batch_groups(step)[rank::world_size].tolist()
        return self.collate([self._groups[i] for i in groups], first_row_id)

    def examples_in_batch(self, step: int) -> list[int]:
        """The indices of the examples of a training step (from 0), in order."""
        groups: list[int] = self._batch_groups(step).tolist()
        return [example for i in groups for example in self._groups[i]]

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
