"""The template of each task: how an example becomes token sequences, and which of their tokens are learned.

The templates are those of GPT-1 (Radford et al. 2018, section 3.3 and figure 1): a start token, texts separated by a delimiter,
and an extract token, whose hidden state a classification head reads. A generated answer follows the delimiter.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from nextword.data.chat_format import CHAT_SPECIAL_TOKENS, encode_conversation
from nextword.data.issues import IssueLog
from nextword.data.tokenizer import DELIMITER_TOKEN, END_OF_TURN_TOKEN, EXTRACT_TOKEN, START_TOKEN, Tokenizer
from nextword.tasks.examples import Example, input_texts
from nextword.tasks.schema import TASKS

# What is predicted: a label, several labels, a score, a choice, a generated answer, or a preference between two answers.
TaskKind = Literal["label", "labels", "score", "choice", "answer", "preference"]
# The kinds predicted by a classification head, and the `problem_type` of their Hugging Face configuration.
_PROBLEM_TYPES: dict[TaskKind, str] = {
    "label": "single_label_classification",
    "labels": "multi_label_classification",
    "score": "regression",
    "choice": "regression",
}
HEAD_KINDS = tuple(_PROBLEM_TYPES)
# The field of an example that holds the target; the answer of a conversation is its last message.
TARGET_FIELDS: dict[TaskKind, str] = {
    "label": "label",
    "labels": "labels",
    "score": "score",
    "choice": "answer",
    "answer": "completion",
    "preference": "chosen",
}
MAX_SEQUENCES_PER_EXAMPLE = 64  # so that (example, sequence) has an id of its own


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
    """

    task: str
    kind: TaskKind
    labels: tuple[str, ...] = ()
    answer_tokens: int = 0
    chat: bool = False
    columns: tuple[tuple[str, str], ...] = ()

    @property
    def n_labels(self) -> int:
        """Number of outputs of the head; 0 without a head."""
        return len(self.labels) if self.kind in ("label", "labels") else int(self.kind in HEAD_KINDS)

    @property
    def problem_type(self) -> str | None:
        """The `problem_type` of the Hugging Face configuration; None without a head."""
        return _PROBLEM_TYPES.get(self.kind)

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
        spec = cls(**(values | {"labels": labels, "columns": columns}))
        if spec.kind not in get_args(TaskKind) or spec.task not in TASKS or int(spec.answer_tokens) < 0:
            raise ValueError(f"task {spec.task!r} of kind {spec.kind!r}")
        return spec


class TokenSequence(NamedTuple):
    """Token ids [T], and a mask [T] of the tokens that are learned by language modelling."""

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


class ExampleEncoder:
    """Encodes the examples of a task.

    Args:
        task_spec: The task.
        tokenizer: A tokenizer with the special tokens of the task.
        context_length: The maximum length of a sequence, in tokens.
    """

    def __init__(self, task_spec: TaskSpec, tokenizer: Tokenizer, context_length: int):
        self.task_spec, self.tokenizer, self.context_length = task_spec, tokenizer, context_length
        names = task_spec.special_tokens
        self.special_token_ids = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
        self.label_to_id = {label: id for id, label in enumerate(task_spec.labels)}

    def encode(self, example: Example, issues: IssueLog, with_target: bool = True) -> EncodedExample | None:
        """Encode an example; None if nothing of it can be learned. Truncation and omission are reported."""
        fields, kind = example.fields, self.task_spec.kind
        if kind == "choice" and len(fields["choices"]) > MAX_SEQUENCES_PER_EXAMPLE:
            issues.add(example.path, example.line, f"more than {MAX_SEQUENCES_PER_EXAMPLE} choices; left out")
            return None
        generated = kind in ("answer", "preference")
        encoded = self._encode_with_answers(example) if generated else self._encode_for_head(example)
        if any(truncated for _, truncated in encoded):
            what = f"longer than the context of {self.context_length:,} tokens; truncated"
            issues.add(example.path, example.line, what)
        sequences = tuple(sequence for sequence, _ in encoded)
        if not generated:
            return EncodedExample(sequences, self._target(fields) if with_target else 0)
        if not all(sequence.loss_mask.any() for sequence in sequences):
            issues.add(example.path, example.line, "no room for the answer within the context; left out")
            return None
        return EncodedExample(sequences)

    def encode_all(
        self, examples: Sequence[Example], issues: IssueLog, with_targets: bool = True
    ) -> tuple[list[Example], list[EncodedExample]]:
        """The examples that can be encoded, and their encodings."""
        pairs = [(example, self.encode(example, issues, with_targets)) for example in examples]
        encodable = [example for example, encoded in pairs if encoded is not None]
        return encodable, [encoded for _, encoded in pairs if encoded is not None]

    def encode_prompt(self, example: Example) -> list[int]:
        """The token ids that a generated answer follows, with room for the answer in the context."""
        return self._encode_prompt(example)[0]

    def _target(self, fields: dict[str, Any]) -> Any:
        target = fields[TARGET_FIELDS[self.task_spec.kind]]
        if self.task_spec.kind == "label":
            return self.label_to_id[target]
        return np.array([name in target for name in self.label_to_id]) if self.task_spec.kind == "labels" else target

    def _encode_for_head(self, example: Example) -> list[tuple[TokenSequence, bool]]:
        """One text or a pair, a pair of sentences in both orders, or a question with each of its choices."""
        first, *others = input_texts(self.task_spec.task, example)
        sequences = [(first, other) for other in others] or [(first,)]
        if self.task_spec.task == "similarity":
            sequences.append((others[0], first))
        return [self._with_special_tokens(*texts) for texts in sequences]

    def _with_special_tokens(self, *texts: str) -> tuple[TokenSequence, bool]:
        """`start text extract` or `start text delimiter text extract`, truncated as the Hugging Face tokenizer does."""
        parts = [self.tokenizer.encode(text) for text in texts]
        lengths = truncate_longest_first([len(part) for part in parts], self.context_length - len(parts) - 1)
        ids, loss_mask = [self.special_token_ids[START_TOKEN]], [False]
        for i, (part, length) in enumerate(zip(parts, lengths, strict=True)):
            separator = DELIMITER_TOKEN if i + 1 < len(parts) else EXTRACT_TOKEN
            ids += [*part[:length], self.special_token_ids[separator]]
            loss_mask += [True] * length + [False]
        return TokenSequence(np.array(ids), np.array(loss_mask)), sum(lengths) < sum(map(len, parts))

    def _encode_with_answers(self, example: Example) -> list[tuple[TokenSequence, bool]]:
        fields = example.fields
        if self.task_spec.task == "chat":
            ids, loss_mask = encode_conversation(self.tokenizer, fields["messages"])
            sequence = TokenSequence(np.array(ids[: self.context_length]), np.array(loss_mask[: self.context_length]))
            return [(sequence, len(ids) > self.context_length)]
        prompt, truncated = self._encode_prompt(example)
        is_rewrite = self.task_spec.task == "rewrite"
        answers = [fields["completion"]] if is_rewrite else [fields["chosen"], fields["rejected"]]
        return [self._append_answer(prompt, answer, truncated) for answer in answers]

    def _append_answer(self, prompt: list[int], answer: str, prompt_truncated: bool) -> tuple[TokenSequence, bool]:
        end = self.special_token_ids[END_OF_TURN_TOKEN] if self.task_spec.chat else self.tokenizer.eos_id
        answer_ids = [*self.tokenizer.encode(answer), end]
        max_answer_length = self.context_length - len(prompt)
        ids = np.array([*prompt, *answer_ids[:max_answer_length]])
        truncated = prompt_truncated or len(answer_ids) > max_answer_length
        return TokenSequence(ids, np.arange(len(ids)) >= len(prompt)), truncated

    def _encode_prompt(self, example: Example) -> tuple[list[int], bool]:
        """The prompt, and whether it was truncated: a conversation at its beginning, a text at its end."""
        max_prompt_length = self.context_length - max(1, self.task_spec.answer_tokens)
        fields = example.fields
        if self.task_spec.chat:
            messages = fields["messages"]
            prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            ids, _ = encode_conversation(self.tokenizer, prompt, add_generation_prompt=True)
            return ids[max(0, len(ids) - max_prompt_length) :], len(ids) > max_prompt_length
        ids = self.tokenizer.encode(fields["prompt"] if "prompt" in fields else fields["messages"][-1]["content"])
        start, delimiter = self.special_token_ids[START_TOKEN], self.special_token_ids[DELIMITER_TOKEN]
        return [start, *ids[: max(0, max_prompt_length - 2)], delimiter], len(ids) > max_prompt_length - 2


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
