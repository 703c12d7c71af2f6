"""``nextword predict``: the answers of a fine-tuned model."""

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextword.commands.command import Context, argument, command, option, options
from nextword.commands.shared import DeviceOption, ModelArgument, format_metric, optional
from nextword.common.command_result import Result
from nextword.common.errors import NextwordError


def table_or_texts(data: str | Path | Sequence[str | Path]) -> tuple[str | Path, ...]:
    """A table as one path, or the texts of one example as strings."""
    return (Path(data),) if isinstance(data, (str, Path)) else tuple(data)


@options
class PredictConfig(ModelArgument, DeviceOption):
    """Label, score, choose or rewrite with a fine-tuned model.

    Prints one JSON object per line. If the table has the correct answers, they are scored as well. Use generate to continue a
    text and chat to talk with a model.

    Attributes:
        data: A table of examples (.csv .tsv .jsonl .json .parquet), or the texts of one example: a text; a premise and a
            hypothesis; a question and its choices.
        out: File for the answers. Default: standard output.
    """

    data: tuple[str | Path, ...] = argument(converter=table_or_texts)
    out: Path | None = option(default=None, converter=optional(Path))


@dataclass(frozen=True)
class PredictResult(Result):
    """The answers of a model, and their scores.

    Attributes:
        predictions: For each example its label, labels, score or text, and probabilities.
        scores: The task's metrics with their confidence intervals, if the correct answers are known.
        out: File of the answers.
    """

    predictions: list[dict[str, Any]]
    scores: dict[str, Any]
    out: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as ``--json`` prints it, with the file in place of the answers if there is one."""
        values = super().to_dict()
        return {"predictions": values.pop("out", values["predictions"]), "scores": values["scores"]}

    def __iter__(self) -> Iterator[Any]:
        message = "unpacking a PredictResult is deprecated: use its attributes predictions and scores"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return iter((self.predictions, self.scores))


def format_answers(result: PredictResult) -> str:
    """How many answers the file has, and the scores. Without a file they have been printed."""
    if result.out is None:
        return ""
    return "\n".join([f"{len(result.predictions):,} answers: {result.out}", *format_scores(result)])


def format_scores(result: PredictResult) -> list[str]:
    """The metrics of the answers."""
    return [format_metric(name, score.to_dict()) for name, score in result.scores.items()]


@command(PredictConfig, example="nextword predict runs/reviews 'A wonderful film.'", to_text=format_answers)
def predict(config: PredictConfig, context: Context) -> PredictResult:
    """Answer one example or a table. The command line prints a line per answer, and the scores on standard error."""
    from nextword.common.fs import atomic_write
    from nextword.data.issues import IssueLog
    from nextword.pipeline.language_model import load
    from nextword.pipeline.predictor import compute_labeled_metrics
    from nextword.tasks.examples import read_examples

    loaded, console, (data, *others) = load(config.model, config.device), context.console, config.data
    is_table = isinstance(data, Path) or (context.output and not others and Path(data).is_file())
    if not is_table:
        answers, scores = [loaded.predict(*map(str, config.data))], {}
    else:
        predictor, issues = loaded.predictor, IssueLog()
        spec = predictor.task_spec
        examples = read_examples([Path(data)], spec.task, issues, dict(spec.columns), require_targets=False).items
        if not examples:
            raise NextwordError("\n".join([f"{data}: no example to answer", *issues.summary_lines()]))
        answers = predictor.predict(examples, issues, lambda done, total: console.progress("predicting", done, total))
        for line in issues.summary_lines():
            console.warn(line)
        scores = compute_labeled_metrics(spec, examples, answers)
    lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    result = PredictResult(answers, scores, config.out and str(config.out))
    if config.out is not None:
        atomic_write(config.out, lines)
    elif context.output == "text":
        print(lines, end="")
        print(*format_scores(result), sep="\n", end="\n" if scores else "", file=sys.stderr)
    return result
