"""What a person asked for, in the form in which the rooms take it: paths, lengths, recipes, a corpus ready to be read."""

from pathlib import Path
from typing import Any

from nextword.common import fs
from nextword.common.console import Console
from nextword.common.errors import UsageError
from nextword.common.run_dir import RunFolder
from nextword.data import corpus as corpora_module
from nextword.data.builtin_datasets import NAMED
from nextword.data.corpus import Corpus
from nextword.pipeline.language_model import Paths, as_list
from nextword.training import config
from nextword.training.config import change, count, number, recipe_named, seconds


def lengths(
    budget: str | float | None, steps: int | None, tokens: str | int | None, flops: str | float | None
) -> dict[str, Any]:
    """How long a run is to be, as people write it, in numbers. Raises `UsageError` for what is none."""
    return {
        "steps": steps, "budget": None if budget is None else seconds(budget),
        "tokens": None if tokens is None else count(tokens), "flops": None if flops is None else number(flops),
    }  # fmt: skip


def chosen_recipe(request: dict[str, Any]) -> config.Recipe:
    """The recipe that a request names, with the settings that it changes."""
    names = ("model", "training", "size", "tokenizer", "vocab_size", *config.LENGTHS)
    return change(recipe_named(request["recipe"], request["preset"]), **{name: request[name] for name in names})


def said(settings: dict[str, Any] | None) -> dict[str, Any]:
    """The settings that were given."""
    return {name: value for name, value in (settings or {}).items() if value is not None}


def whole_paths(corpora: Paths, begun: bool) -> list[str]:
    """Corpora by their full paths, so that a resume may come from another folder; names stay names.

    Raises:
        UsageError: none is given for a run that is not begun yet, or one is not there.
    """
    given = as_list(corpora)
    if not given and not begun:
        raise UsageError("say what to learn from: a file, a folder, shards, or a named corpus such as python-docs")
    if missing := [path for path in given if str(path) not in NAMED and not Path(path).exists()]:
        raise UsageError(f"{missing[0]}: no such file or folder, and no named corpus ({', '.join(NAMED)})")
    return [str(path) if str(path) in NAMED else str(Path(path).resolve()) for path in given]


def tables(paths: Paths, begun: bool) -> list[str]:
    """Files or folders by their full paths. Raises `UsageError` where one is missing, or none is given to begin with."""
    given = as_list(paths)
    if not given and not begun:
        raise UsageError("say what to learn from: a table of examples (CSV, TSV, JSONL, JSON, Parquet)")
    return whole_paths(given, begun=True)


def gather(
    corpora: list[str], run: RunFolder, tokenizer: str, vocab_size: int | None, text_column: str | None, strict: bool,
    console: Console,
) -> Corpus:  # fmt: skip
    """Prepared shards where they are given, else the text made into shards inside the run folder."""
    prepared = [path for path in corpora if (Path(path) / fs.MANIFEST).is_file()]
    if prepared:
        if len(corpora) > 1:
            raise UsageError(f"{prepared[0]}: prepared shards stand alone; prepare the other texts together with them")
        return Corpus.open(Path(prepared[0]))
    return corpora_module.prepare(
        corpora, run.data, tokenizer=tokenizer, vocab_size=vocab_size, text_column=text_column, strict=strict,
        progress=console.progress, say=console.say,
    )  # fmt: skip


def describe(corpus: Corpus) -> str:
    train, held_out = corpus.train, corpus.validation
    return (
        f"{corpus.documents:,} documents ({corpus.duplicates:,} duplicates left out) · {train.tokens:,} tokens to learn from, "
        f"{held_out.tokens:,} held out · vocabulary {corpus.tokenizer.vocab_size:,}"
    )
