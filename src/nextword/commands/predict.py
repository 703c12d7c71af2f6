"""``nextword predict``: the answers of a fine-tuned model."""

import shlex
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nextword.commands.command import STDIN, Context, command
from nextword.commands.shared import can_be_path, check_output_file, column_names, format_metric, is_existing, optional
from nextword.common.command_result import Result
from nextword.common.console import Console, StandardError, read_standard_input, to_json_line, write_result
from nextword.common.errors import NextwordError, UsageError
from nextword.common.options import DeviceOption, ModelArgument, argument, as_strings, option, options
from nextword.data.issues import IssueLog

if TYPE_CHECKING:
    from nextword.common.statistics import ScoreWithCI
    from nextword.pipeline.predictor import Predictor


def path_or_texts(data: str | Path | Sequence[str | Path]) -> tuple[str | Path, ...]:
    """A path or a text, or the texts of one example."""
    return (data,) if isinstance(data, (str, Path)) else tuple(data)


def kept_columns(names: str | Sequence[str]) -> tuple[str, ...]:
    """The names of columns, given as text or one by one."""
    given = tuple(names.split(",") if isinstance(names, str) else names)
    if given == ("none",):
        return ()
    return ("*",) if given == ("all",) else given


@options
class PredictConfig(ModelArgument, DeviceOption):
    """Label, score, choose or rewrite with a fine-tuned model.

    Prints one JSON object per row, in the order of the rows, with the columns of the row and its answer. A row that could not
    be read has its line and the reason instead. If the table has the correct answers, they are scored as well. Use generate to
    continue a text and chat to talk with a model.

    Attributes:
        data: A table of examples (.csv .tsv .jsonl .json .parquet); a file with a text on each line, or a folder of texts;
            - for such a table or lines from standard input; or the texts of one example: a text; a premise and a hypothesis; a
            question and its choices. One text that could be the name of a file is not taken: use --text.
        text: A text of one example, whatever it looks like; - reads it from standard input. May be given more than once.
            Default: none.
        file: A table of examples. Default: none.
        out: File for the answers: a table by its suffix (.csv .tsv .json .jsonl), else JSON Lines. Default: standard output.
        columns: Column of the table for a role, for example --column text=tweet. Default: those of the training data, or
            common names.
        keep_columns: Columns of the table that the answers have as well: all, none, or their names, separated by commas. Those
            with the name of a part of the answer get the prefix input_. Default: all.
        ensemble: Combine the probabilities with those of the linear TF-IDF classifier that finetune fitted on the same
            examples. Only for a classification of texts with one label each.
        windows: Read a text that is longer than the context in windows of equal length, and average their scores, instead of
            cutting it. Only for the classification of texts.
    """

    data: tuple[str | Path, ...] = argument(default=(), converter=path_or_texts)
    text: tuple[str, ...] = option(default=(), converter=as_strings)
    file: Path | None = option(default=None, converter=optional(Path))
    out: Path | None = option(default=None, converter=optional(Path))
    columns: dict[str, str] = option(default=None, converter=column_names, flag="--column", metavar="ROLE=COLUMN")
    keep_columns: tuple[str, ...] = option(default="all", converter=kept_columns, metavar="all|none|NAMES")
    ensemble: bool = False
    windows: bool = False

    def resolve(self) -> tuple[Path | None, list[str]]:
        """The table, or None and the texts. Raises `UsageError` if neither or both are given, or a table does not exist."""
        if sum(map(bool, (self.data, self.text, self.file))) != 1:
            raise UsageError("give either a table (--file TABLE) or the texts of one example (--text TEXT), not both")
        texts = [read_standard_input() if text == STDIN and self.text else str(text) for text in self.text or self.data]
        if self.text or len(texts) > 1:
            return None, texts
        path = self.file or Path(self.data[0])
        if str(path) == STDIN:
            return path, []
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
        predictions: For each row its columns, its label, labels, score or text, and probabilities; or line and error of a row
            that could not be read.
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
    from nextword.data.table_writer import check_table_suffix, format_table
    from nextword.pipeline.language_model import load
    from nextword.tasks.examples import example_from_texts

    data, texts = config.resolve()
    if config.out is not None:
        check_table_suffix(config.out)
        check_output_file(config.out, config.model, *([data] if data is not None and str(data) != STDIN else []))
    loaded, console = load(config.model, config.device), context.console
    predictor = loaded.build_predictor(config.ensemble, config.windows)
    if data is None:
        issues = IssueLog()
        answers, scores = predictor.predict([example_from_texts(predictor.task_spec.task, texts)], issues), {}
        for issue in issues.issues:
            console.warn(issue.what)
    elif str(data) == STDIN:
        with TemporaryDirectory() as folder:
            data = Path(folder, "standard-input")
            data.write_text(read_standard_input(), encoding="utf-8", errors="surrogateescape")
            try:
                answers, scores = predict_table(predictor, data, config, console, "standard input")
            except NextwordError as error:
                error.args = tuple(str(arg).replace(str(data), "standard input") for arg in error.args)
                raise
    else:
        answers, scores = predict_table(predictor, data, config, console, str(data))
    result = PredictResult(answers, scores, config.out and str(config.out))
    if config.out is not None:
        atomic_write(config.out, format_table(answers, config.out))
    elif context.output == "text":
        write_result("".join(map(to_json_line, answers)))
        for line in format_scores(result):
            StandardError().write(f"{line}\n")
    return result


def predict_table(
    predictor: "Predictor", data: Path, config: PredictConfig, console: Console, name: str
) -> tuple[list[dict[str, Any]], dict[str, "ScoreWithCI"]]:
    """The rows of a table with their answers, and the scores of the answers. Warnings call the table `name`.

    Raises:
        NextwordError: No row could be read.
    """
    from nextword.data.table_writer import to_plain_value
    from nextword.pipeline.predictor import compute_labeled_metrics, unknown_labels
    from nextword.tasks.examples import read_examples
    from nextword.tasks.schema import SuggestionError

    issues, spec = IssueLog(), predictor.task_spec
    try:
        examples = read_examples(
            [data],
            None,
            issues,
            config.columns,
            require_targets=False,
            like=spec.format,
            keep_columns=config.keep_columns,
        )
    except SuggestionError as error:
        path = "-" if str(config.file or config.data[0]) == STDIN else str(data)
        words = ["nextword", "predict", str(config.model), path, *error.options]
        words += ["--out", str(config.out)] if config.out else []
        raise UsageError(f"{error}\nFor example: {shlex.join(words)}") from error
    if not examples.items:
        raise NextwordError("\n".join([f"{data}: no example to answer", *issues.summary_lines()]))
    answers = predictor.predict(examples.items, issues, lambda done, total: console.progress("predicting", done, total))
    for line in issues.summary_lines():
        console.warn(line.replace(str(data), name))
    scores = compute_labeled_metrics(spec, examples.items, answers)
    if unknown := unknown_labels(spec, examples.items):
        names = ", ".join(f"{name} ({count:,})" for name, count in unknown.most_common(12))
        console.warn(f"{name}: correct answers that the model does not know, and cannot get right: {names}")
    if scores and (num_unread := len(examples.rows) - len(examples.items)):
        console.warn(
            f"{name}: {num_unread:,} of {len(examples.rows):,} rows have no answer, and are not part of the scores"
        )
    answer_of = {id(example): answer for example, answer in zip(examples.items, answers, strict=True)}
    has_files = len({row.path for row in examples.rows}) > 1
    names = {name: name for row in examples.rows for name in row.values}
    reserved = {"line", "error", *(["file"] if has_files else []), *(name for answer in answers for name in answer)}
    for name in names.keys() & reserved:
        names[name] = next(new for n in range(1, 99) if (new := "input_" * n + name) not in names.keys() | reserved)
    rows: list[dict[str, Any]] = []
    for row in examples.rows:
        values = {names[name]: to_plain_value(value) for name, value in row.values.items()}
        file = {"file": row.path} if has_files else {}
        answer = {"line": row.line, "error": row.error} if row.example is None else answer_of[id(row.example)]
        rows.append(values | file | answer)
    return rows, scores
