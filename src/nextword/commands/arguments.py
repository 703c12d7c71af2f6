"""What a person asked for, in the form in which the rooms take it: paths, lengths, recipes, a corpus ready to be read."""

from pathlib import Path
from typing import Any

from nextword.common import fs
from nextword.common.console import Console
from nextword.common.errors import UsageError
from nextword.common.run_dir import RunDir
from nextword.data import corpus as corpora_module
from nextword.data.builtin_datasets import BUILTIN_DATASETS
from nextword.data.corpus import Corpus
from nextword.pipeline.language_model import Paths, as_list
from nextword.training import config
from nextword.training.config import get_recipe, parse_count, parse_duration, parse_float, with_overrides


def parse_run_length(
    budget: str | float | None, steps: int | None, tokens: str | int | None, flops: str | float | None
) -> dict[str, Any]:
    """How long a run is to be, as people write it, in numbers. Raises `UsageError` for what is none."""
    return {
        "steps": steps, "budget": None if budget is None else parse_duration(budget),
        "tokens": None if tokens is None else parse_count(tokens), "flops": None if flops is None else parse_float(flops),
    }  # fmt: skip


def resolve_recipe(request: dict[str, Any]) -> config.Recipe:
    """The recipe that a request names, with the settings that it changes."""
    names = ("model", "training", "size", "tokenizer", "vocab_size", *config.RUN_LENGTH_FIELDS)
    return with_overrides(get_recipe(request["recipe"], request["preset"]), **{name: request[name] for name in names})


def drop_none(settings: dict[str, Any] | None) -> dict[str, Any]:
    """The settings that were given."""
    return {name: value for name, value in (settings or {}).items() if value is not None}


def resolve_corpus_paths(corpora: Paths, run_exists: bool) -> list[str]:
    """Corpora by their full paths, so that a resume may come from another folder; names stay names.

    Raises:
        UsageError: none is given for a run that is not begun yet, or one is not there.
    """
    corpus_paths = as_list(corpora)
    if not corpus_paths and not run_exists:
        raise UsageError("say what to learn from: a file, a folder, shards, or a named corpus such as python-docs")
    if missing := [path for path in corpus_paths if str(path) not in BUILTIN_DATASETS and not Path(path).exists()]:
        raise UsageError(f"{missing[0]}: no such file or folder, and no named corpus ({', '.join(BUILTIN_DATASETS)})")
    return [str(path) if str(path) in BUILTIN_DATASETS else str(Path(path).resolve()) for path in corpus_paths]


def resolve_data_paths(paths: Paths, run_exists: bool) -> list[str]:
    """Files or folders by their full paths. Raises `UsageError` where one is missing, or none is given to begin with."""
    data_paths = as_list(paths)
    if not data_paths and not run_exists:
        raise UsageError("say what to learn from: a table of examples (CSV, TSV, JSONL, JSON, Parquet)")
    return resolve_corpus_paths(data_paths, run_exists=True)


def open_or_prepare_corpus(
    corpora: list[str], run_dir: RunDir, tokenizer: str, vocab_size: int | None, text_column: str | None, strict: bool,
    console: Console,
) -> Corpus:  # fmt: skip
    """Prepared shards where they are given, else the text made into shards inside the run folder."""
    prepared = [path for path in corpora if (Path(path) / fs.MANIFEST).is_file()]
    if prepared:
        if len(corpora) > 1:
            raise UsageError(f"{prepared[0]}: prepared shards stand alone; prepare the other texts together with them")
        return Corpus.open(Path(prepared[0]))
    return corpora_module.prepare(
        corpora, run_dir.data_dir, tokenizer=tokenizer, vocab_size=vocab_size, text_column=text_column, strict=strict,
        progress=console.progress, log=console.info,
    )  # fmt: skip


def format_corpus_summary(corpus: Corpus) -> str:
    train, held_out = corpus.train, corpus.validation
    return (
        f"{corpus.documents:,} documents ({corpus.duplicates:,} duplicates left out) · {train.tokens:,} tokens to learn from, "
        f"{held_out.tokens:,} held out · vocabulary {corpus.tokenizer.vocab_size:,}"
    )
