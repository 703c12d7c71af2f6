"""``nextword predict``: the answers of a fine-tuned model."""

import shlex
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextword.commands.command import STDIN, Context, command
from nextword.commands.shared import can_be_path, check_output_file, format_metric, is_existing, optional
from nextword.common.command_result import Result
from nextword.common.console import StandardError, read_standard_input, to_json_line, write_result
from nextword.common.errors import NextwordError, UsageError
from nextword.common.options import DeviceOption, ModelArgument, argument, as_strings, option, options


def path_or_texts(data: str | Path | Sequence[str | Path]) -> tuple[str | Path, ...]:
    """A path or a text, or the texts of one example."""
    return (data,) if isinstance(data, (str, Path)) else tuple(data)


@options
class PredictConfig(ModelArgument, DeviceOption):
    """Label, score, choose or rewrite with a fine-tuned model.

    Prints one JSON object per line. If the table has the correct answers, they are scored as well. Use generate to continue a
    text and chat to talk with a model.

    Attributes:
        data: A table of examples (.csv .tsv .jsonl .json .parquet), or the texts of one example: a text; a premise and a
            hypothesis; a question and its choices. One text that could be the name of a file is not taken: use --text.
        text: A text of one example, whatever it looks like; - reads it from standard input. May be given more than once.
            Default: none.
        file: A table of examples. Default: none.
        out: File for the answers. Default: standard output.
        ensemble: Combine the probabilities with those of the linear TF-IDF classifier that finetune fitted on the same
            examples. Only for a classification of texts with one label each.
    """

    data: tuple[str | Path, ...] = argument(default=(), converter=path_or_texts)
    text: tuple[str, ...] = option(default=(), converter=as_strings)
    file: Path | None = option(default=None, converter=optional(Path))
    out: Path | None = option(default=None, converter=optional(Path))
    ensemble: bool = False

    def resolve(self) -> tuple[Path | None, list[str]]:
        """The table, or None and the texts. Raises `UsageError` if neither or both are given, or a table does not exist."""
        if sum(map(bool, (self.data, self.text, self.file))) != 1:
            raise UsageError("give either a table (--file TABLE) or the texts of one example (--text TEXT), not both")
        texts = [read_standard_input() if text == STDIN else str(text) for text in self.text or self.data]
        if self.text or len(texts) > 1 or (self.data == (STDIN,)):
            return None, texts
        path = self.file or Path(self.data[0])
        if self.file or isinstance(self.data[0], Path) or can_be_path(texts[0]):
            if is_existing(path):
                return path, []
            hint = "" if self.file else f". If it is a text: --text={shlex.quote(texts[0])}"
            raise UsageError(f"{path}: no such file or folder{hint}")
        return None, texts


@dataclass(frozen=True)
class PredictResult(Result):
    """The answers of a model, and their scores.

    Attributes:
        predictions: For each row its label, labels, score or text, and probabilities; or line and error of a row that could
            not be read.
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
    from nextword.tasks.examples import example_from_texts, read_examples

    data, texts = config.resolve()
    if config.out is not None:
        check_output_file(config.out, config.model, *filter(None, [data]))
    loaded, console = load(config.model, config.device), context.console
    predictor = loaded.ensemble_predictor() if config.ensemble else loaded.predictor
    if data is None:
        answers, scores = predictor.predict([example_from_texts(predictor.task_spec.task, texts)]), {}
    else:
        issues = IssueLog()
        spec = predictor.task_spec
        examples = read_examples([data], None, issues, require_targets=False, like=spec.format).items
        if not examples:
            raise NextwordError("\n".join([f"{data}: no example to answer", *issues.summary_lines()]))
        answers = predictor.predict(examples, issues, lambda done, total: console.progress("predicting", done, total))
        for line in issues.summary_lines():
            console.warn(line)
        scores = compute_labeled_metrics(spec, examples, answers)
        rows = [((example.path, example.line), answer) for example, answer in zip(examples, answers, strict=True)]
        rows += [((path, line), {"line": line, "error": reason}) for path, line, reason in issues.lost_rows]
        answers = [answer for _, answer in sorted(rows, key=lambda row: row[0])]
    lines = "".join(map(to_json_line, answers))
    result = PredictResult(answers, scores, config.out and str(config.out))
    if config.out is not None:
        atomic_write(config.out, lines)
    elif context.output == "text":
        write_result(lines)
        for line in format_scores(result):
            StandardError().write(f"{line}\n")
    return result
