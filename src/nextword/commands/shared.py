"""Option groups and value converters that several commands use."""

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from nextword.commands.command import STDIN
from nextword.common import numbers
from nextword.common.command_result import Result
from nextword.common.console import read_standard_input
from nextword.common.errors import UsageError
from nextword.common.fs import map_disk_errors
from nextword.common.options import DeviceOption, Paths, as_strings, option, options
from nextword.data.issues import replace_surrogates
from nextword.model.config import ModelConfig
from nextword.training.config import (
    RUN_LENGTH_FIELDS,
    FinetuneHyperparameters,
    Recipe,
    TrainingConfig,
    get_recipe,
    setting_name,
    with_overrides,
)

if TYPE_CHECKING:
    from nextword.data.corpus import Corpus

T = TypeVar("T")
U = TypeVar("U")
PATH = re.compile(
    r"(~|\.{0,2}/|[A-Za-z]:\\).*"  # from a root, a home or a current directory
    r"|.*\.(csv|tsv|jsonl?|ndjson|parquet|txt|md)(\.\w+)?|\S*[/\\]\S*|\S+\.[A-Za-z]\w{0,8}",
    re.IGNORECASE,
)


# ---------------------------------------------------------------- converters


def as_paths(values: Paths | None) -> tuple[Path, ...]:
    """One path or several."""
    return tuple(map(Path, as_strings(values)))


def optional(convert: Callable[[T], U]) -> Callable[[T | None], U | None]:
    """A converter that leaves None as it is."""
    return lambda value: None if value is None else convert(value)


def run_path(path: str | Path | None) -> Path:
    """The path of a run directory. Raises `UsageError` if it is missing, or a name that safetensors cannot write."""
    if path is None or not str(path):
        raise UsageError("the run directory is missing: --out RUN")
    if replace_surrogates(str(path)) != str(path):
        raise UsageError(f"--out {path}: not UTF-8, as the names of weight files have to be. Choose another --out")
    return Path(path)


def absolute_path(path: str | Path | None) -> str | None:
    """A path that a resume from another directory finds, or None."""
    return str(Path(path).resolve()) if path is not None and str(path) else None


def input_paths(values: Paths | None) -> tuple[str, ...]:
    """Inputs by absolute path, so that a resume works from another directory. Names of built-in datasets stay as they are.

    Raises:
        UsageError: An input does not exist.
    """
    from nextword.data.builtin_datasets import BUILTIN_DATASETS

    names = as_strings(values)
    if missing := [name for name in names if name not in BUILTIN_DATASETS and not Path(name).exists()]:
        raise UsageError(
            f"{missing[0]}: no such file or directory, and no built-in dataset ({', '.join(BUILTIN_DATASETS)})"
        )
    return tuple(name if name in BUILTIN_DATASETS else str(Path(name).resolve()) for name in names)


def require_inputs(inputs: tuple[str, ...]) -> None:
    """Raise `UsageError` if there is no input."""
    if not inputs:
        raise UsageError(
            "the text is missing: give a file, a directory, shards or a built-in dataset such as python-docs"
        )


FIELD_NAMES = {setting_name(f): f.name for f in fields(TrainingConfig)}


def overrides(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings that have a value, by the names of their fields."""
    return {FIELD_NAMES.get(name, name): value for name, value in (settings or {}).items() if value is not None}


def is_existing(path: str | Path) -> bool:
    """Whether a file or directory of this name exists. No name is too long or otherwise impossible."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def can_be_path(text: str) -> bool:
    """Whether a text can be meant as a path: it exists, looks like one, or has no space and a separator or a suffix."""
    return bool(text) and (is_existing(text) or PATH.fullmatch(text) is not None)


def read_texts(arguments: Iterable[str]) -> list[str]:
    """Texts of the command line, where a hyphen stands for standard input without its last newline."""
    return [read_standard_input().removesuffix("\n") if text == STDIN else text for text in arguments]


def check_is_text(argument: str, of_file: str = "") -> None:
    """Check that an argument of the command line is meant as a text.

    Args:
        argument: The argument.
        of_file: How the command reads texts from a file, as a sentence. Default: it does not.

    Raises:
        UsageError: It exists, or can be meant as a path.
    """
    if can_be_path(argument):
        found = "a file or folder, where a text is needed" if is_existing(argument) else "no such file or folder"
        hints = [f"If it is a text: --text={shlex.quote(argument)}", *filter(None, [of_file])]
        raise UsageError(f"{argument}: {found}. {'. '.join(hints)}")


def check_output_file(out: Path, *inputs: str | Path) -> None:
    """Check before the work that a file can be written, and that it is none of the inputs under any of its names.

    Args:
        out: The file.
        inputs: Files, and directories of models and runs, of which every file is an input except what other commands wrote.

    Raises:
        UsageError: The file is an input, or a directory.
        NextwordError: The file cannot be written.
    """
    if is_existing(out):
        if out.is_dir():
            raise UsageError(f"--out {out}: is a directory, where the name of a file is needed")
        for path in map(Path, inputs):
            files = [file for file in path.rglob("*") if is_run_file(file, path)] if path.is_dir() else [path]
            if any(file.is_file() and file.samefile(out) for file in files):
                raise UsageError(f"--out {out}: would overwrite the input {path}. Choose another --out")
    with map_disk_errors(out):
        with suppress(FileNotFoundError):
            out.lstat()
        if not out.exists() or out.is_file():
            TemporaryFile(dir=out.parent).close()


def is_run_file(file: Path, directory: Path) -> bool:
    """Whether a file of a directory of examples, a model or a run is needed, and no result that a command wrote beside them."""
    is_results = (directory / "run.json").is_file() or (directory / "config.json").is_file()
    needed = file.suffix in (".json", ".safetensors") or file.name in (
        "metrics.jsonl",
        "decisions.jsonl",
        "detours.jsonl",
    )
    return file.parent != directory or needed or not is_results


def mapping(pattern: str, expected: str) -> Callable[[Mapping[str, str] | Sequence[str] | None], dict[str, str]]:
    """A converter of mappings that are given as such or as strings such as ``text=review``.

    Args:
        pattern: A regular expression of a string, whose groups are the key and the value.
        expected: The beginning of the message for any other string, which names the option, and its end.
    """

    def convert(values: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
        if values is None or isinstance(values, Mapping):
            return dict(values or {})
        texts = [values] if isinstance(values, str) else values
        matches = [re.fullmatch(pattern, text, re.DOTALL) for text in texts]
        if None in matches:
            raise UsageError(expected.format(texts[matches.index(None)]))
        return {match[1]: match[2] for match in matches if match}

    return convert


column_names = mapping(r"([^=]+)=(.+)", "--column {!r}: write a role and a column, for example --column text=review")
label_names = mapping(
    r"(.+)=([^=]*)", "--map-label {!r}: write a label and its new name, for example --map-label=Pos=pos"
)


# ---------------------------------------------------------------- option groups


@options
class SeedOption:
    """The seed of a deterministic command.

    Attributes:
        seed: Random seed. Default: 0.
    """

    seed: numbers.Seed | None = None


@options
class TextColumnOption:
    """How tables of text are read.

    Attributes:
        text_column: Column of a table that holds the text. Default: the first of text, content, document, body, article, story,
            sentence, review, comment, tweet and utterance.
    """

    text_column: str | None = None


HELD_OUT_OPTIONS = ("validation", "test", "validation_fraction")


def held_out_options(request: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `HeldOutOptions` in run.json, where runs of an earlier version lack some."""
    return {name: request[name] for name in HELD_OUT_OPTIONS if request.get(name)}


@options
class HeldOutOptions:
    """What is held out from training.

    Attributes:
        validation: Files or directories of the validation set, which selects the weights. May be given more than once. Default:
            a part of the data.
        test: Files or directories of the test set, which selects nothing and is evaluated at the end. May be given more than
            once. Default: a part of the data if there is enough (5 MB of text, 2,000 examples), unless --validation is given.
        validation_fraction: Fraction of the data in the validation set. A default test set is as large, but at most 5 % of a
            text. Default: 0.1 (of a text from 10 MB on 0.05, from 100 MB on 0.01; of less than 1,000 examples 0.2).
    """

    validation: tuple[str, ...] = option(default=(), converter=input_paths)
    test: tuple[str, ...] = option(default=(), converter=input_paths)
    validation_fraction: numbers.HeldOutShare | None = None


@options
class RecipeOptions(TextColumnOption, HeldOutOptions):
    """What to pre-train, and for how long.

    Attributes:
        recipe: default (Muon, modern architecture), plain (AdamW with a cosine schedule, for gpt2), post-norm (plain with a
            long warmup, for gpt1 and tutorial) or reference-char (a GPT-2 of 0.8 million parameters on characters, 2,000
            steps). Default: by preset: default for modern, plain for gpt2,
            post-norm for gpt1 and tutorial.
        preset: Architecture: tutorial (Vaswani et al. 2017), gpt1 (post-norm), gpt2 (pre-norm) or modern (RoPE, RMSNorm,
            SwiGLU, grouped-query attention). Default: modern.
        size: micro, tiny, mini, small, midi, base, 125m, 350m, 760m, 1.3b, 2.7b, 6.7b, 13b or 175b. Default: chosen from the
            amount of text and the length of the run.
        tokenizer: bpe (byte-level BPE trained on this text), char (one token per character) or the path of a tokenizer.json.
            Default: bpe.
        vocab_size: Vocabulary size of a new BPE tokenizer. Default: chosen from the amount of text and its characters.
        normalize: none or nfc: Unicode normalization of the text by a new tokenizer. Default: none.
        budget: Length of the run as wall-clock time, for example 90s, 30m or 2h, preparation included. Default: 10m.
        steps: Length of the run in optimizer steps. Default: set by --budget.
        tokens: Length of the run in training tokens, for example 5M. Default: set by --budget.
        flops: Length of the run in floating-point operations, for example 1e15. Default: set by --budget.
        members: Train this many models that differ by their seed, and distill their averaged predictions into one. For text
            that is read many times. Default: 1.
        strict: Stop at the first problem in the text, or at a corrupt newest checkpoint, instead of reporting it and
            continuing.
        model: Settings of the architecture. Defaults: those of --preset and --size.
        training: Settings of the training. The defaults below are those of the recipe "default".
    """

    recipe: str | None = None
    preset: str | None = None
    size: str | None = None
    tokenizer: str | None = None
    vocab_size: numbers.Size | None = None
    normalize: Literal["none", "nfc"] | None = None
    budget: numbers.Duration | None = option(default=None, converter=numbers.text_or_number, metavar="DURATION")
    steps: numbers.Count | None = None
    tokens: numbers.TokenCount | None = option(default=None, converter=numbers.text_or_number, metavar="COUNT")
    flops: numbers.Flops | None = option(default=None, converter=numbers.text_or_number, metavar="NUMBER")
    members: numbers.SmallCount | None = None
    strict: bool = option(default=False, stored=False)
    model: dict[str, Any] = option(
        default=None, converter=overrides, settings=ModelConfig, exclude=("vocab_size", "n_labels")
    )
    training: dict[str, Any] = option(default=None, converter=overrides, settings=TrainingConfig())

    def resolved_recipe(self) -> Recipe:
        """The named recipe with the settings that are given. Raises `UsageError` for one that is out of its range."""
        names = ("model", "training", "size", "tokenizer", "vocab_size", "members", *RUN_LENGTH_FIELDS)
        return with_overrides(get_recipe(self.recipe, self.preset), **{name: getattr(self, name) for name in names})


@options
class RunOptions(DeviceOption):
    """How a training run is carried out.

    Attributes:
        resume: Continue an interrupted run from its last checkpoint. A run that does not exist is started.
        tensorboard: Also write TensorBoard event files to RUN/tensorboard.
        mirror: Second location (s3://bucket/run, gs://bucket/run or a directory) to which checkpoints are uploaded during the
            run. With --resume, a missing run directory is restored from there. Default: none.
        seed: Random seed of the initial weights, the data order and dropout. Default: 0.
    """

    resume: bool = option(default=False, stored=False)
    tensorboard: bool = option(default=False, stored=False)
    mirror: str | None = option(default=None, stored=False)
    seed: numbers.Seed | None = None


@options
class TaskOptions(HeldOutOptions):
    """What the labeled examples are, and what is trained on them.

    Attributes:
        task: classify (one label or several), entail (premise and hypothesis), similarity (two sentences: a score or a
            label), choose (multiple choice), rewrite (text to text), chat (conversations, instructions), prefer (chosen and
            rejected answers) or continue (more text, as in pre-training). Default: inferred from the columns, and printed.
        columns: Column of the table for a role, for example --column prompt=english --column completion=french. Default:
            common names, such as text and label (the documentation of fine-tuning lists them).
        label_map: New name of a label, to merge spellings of one, for example --map-label=Pos=pos. Without a new name the rows
            of a label are left out: --map-label=-1= (missing labels). May be given more than once. Default: none.
        lora: Train a LoRA adapter (RUN/adapter) instead of all weights. RUN/model is the merged model.
    """

    task: str | None = None
    columns: dict[str, str] = option(default=None, converter=column_names, flag="--column", metavar="ROLE=COLUMN")
    label_map: dict[str, str] = option(default=None, converter=label_names, flag="--map-label", metavar="LABEL=NAME")
    lora: bool = False


@options
class FinetuneOptions(TaskOptions):
    """How long and with which settings a model is fine-tuned.

    Attributes:
        budget: Length of the run as wall-clock time, for example 90s, 30m or 2h. Default: set by --epochs.
        steps: Length of the run in optimizer steps. Default: set by --epochs.
        strict: Stop at the first problem in the data, or at a corrupt newest checkpoint, instead of reporting it and
            continuing.
        metric: Metric that selects the best weights: accuracy, macro_f1, mcc or f1:LABEL (classify, entail), micro_f1,
            macro_f1 or exact_match (several labels), pearson or spearman (similarity), accuracy (choose), chrf, bleu, rouge1,
            rouge2, rougeL, exact_match or final_number (rewrite), bits_per_byte (chat), preferred (prefer), or loss.
            Default: the first of its task; macro_f1 for imbalanced labels.
        training: Settings of the training.
        tuning: Settings of fine-tuning.
    """

    budget: numbers.Duration | None = option(default=None, converter=numbers.text_or_number, metavar="DURATION")
    steps: numbers.Count | None = None
    strict: bool = option(default=False, stored=False)
    metric: str | None = None
    training: dict[str, Any] = option(default=None, converter=overrides, settings=TrainingConfig)
    tuning: dict[str, Any] = option(default=None, converter=overrides, settings=FinetuneHyperparameters())


# ---------------------------------------------------------------- corpora


def format_corpus(corpus: "Corpus") -> str:
    """The sizes of a corpus, and what it holds out from training."""
    lines = [
        f"{corpus.documents:,} documents ({corpus.duplicates:,} duplicates removed) · "
        f"{corpus.train.tokens:,} training tokens · vocabulary {corpus.tokenizer.vocab_size:,}",
        *corpus.describe_held_out(),
        *corpus.text_notes(),
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class RunResult(Result):
    """The result of a training run, as RUN/result.json has it. Values of the validation set are None without one.

    Attributes:
        run: Run directory.
        model: Model directory.
        steps: Optimizer steps.
        tokens: Training tokens.
        best_step: Step of the weights that were kept.
        seconds: Duration of the run.
        memory_bytes: Peak memory.
        energy: watt_hours, mean watts and whether they are measured.
        parameters: Number of parameters.
        loss: Validation loss, in nats per token.
        bits_per_byte: Validation loss in bits per byte of text.
        perplexity: exp(loss).
        loss_margin: Half the width of the 95 % confidence interval of `loss` on the whole validation set, in nats per token.
            None if all of it was evaluated.
        validation_tokens: Evaluated tokens of the validation set.
        test_loss, test_bits_per_byte, test_loss_margin, test_tokens: The same of the test set, which selected nothing; None
            without one.
        interval, test_interval: 95 % confidence intervals of the bits per byte of both sets: low, high, number of documents
            (n), and what they speak of (basis).
        by_position: Validation loss by position in the window.
        prompt: First words of the validation set.
        members: Bits per byte and seed of each member of the ensemble that was distilled, and their standard deviation.
        task: Task of a fine-tuning run.
        before: Scores of the model before fine-tuning.
        forgetting: Bits per byte on the pre-training text before and after fine-tuning.
    """

    run: str
    model: str
    steps: int
    tokens: int
    best_step: int
    seconds: float
    memory_bytes: int
    energy: dict[str, Any]
    parameters: int
    loss: float | None = None
    bits_per_byte: float | None = None
    perplexity: float | None = None
    loss_margin: float | None = None
    validation_tokens: int | None = None
    test_loss: float | None = None
    test_bits_per_byte: float | None = None
    test_loss_margin: float | None = None
    test_tokens: int | None = None
    interval: dict[str, Any] | None = None
    test_interval: dict[str, Any] | None = None
    by_position: list[float] | None = None
    prompt: str | None = None
    members: dict[str, Any] | None = None
    task: str | None = None
    before: dict[str, Any] | None = None
    forgetting: dict[str, Any] | None = None


def format_score(score: dict[str, Any]) -> str:
    """``0.898 (95 % CI 0.870–0.922, n = 500)``, without the interval where there are too few examples for one."""
    digits = 1 if score["value"] > 1 else 3
    interval = f"95 % CI {score['low']:.{digits}f}–{score['high']:.{digits}f}, " if score["low"] is not None else ""
    return f"{score['value']:.{digits}f} ({interval}n = {score['n']:,})"


def format_calibration(calibration: dict[str, Any]) -> str:
    """The calibration of a classifier's probabilities."""
    return (
        f"expected calibration error {calibration['error']:.3f}: mean confidence {calibration['confidence']:.3f}, "
        f"accuracy {calibration['accuracy']:.3f}"
    )


def format_metric(name: str, score: dict[str, Any]) -> str:
    """The name of a metric and its score."""
    from nextword.tasks.metrics import missing_interval_reason

    text = f"{name.replace('_', ' ')} {format_score(score)}"
    return (
        text if score["low"] is not None else f"{text[:-1]}; no interval: {missing_interval_reason(name, score['n'])})"
    )
