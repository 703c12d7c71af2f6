"""Every verb as a short story. What the command line does, a program does here by the same names."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextword import files
from nextword.console import Console
from nextword.errors import CorruptFile, NextwordError, UsageError
from nextword.evaluation.likelihood import Likelihood, likelihood
from nextword.evaluation.report import write_card, write_report
from nextword.inference.engine import Completion, Engine
from nextword.inference.sampling import Sampling
from nextword.model.stock import load_model
from nextword.pretraining import Pretraining, choose_device
from nextword.recipes import change, count, recipe_named, seconds
from nextword.runs import RunFolder, command_line, differences, open_run
from nextword.text import corpus as corpora_module
from nextword.text.batches import TokenRow
from nextword.text.corpus import Corpus
from nextword.text.documents import Problems
from nextword.text.named import NAMED
from nextword.text.tokenizer import Tokenizer

Paths = str | Path | Sequence[str | Path]


def as_list(paths: Paths) -> list[str | Path]:
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


# ---------------------------------------------------------------- a model in hand


class Model:
    """A model with its tokenizer, ready to be used. Made by `load`."""

    def __init__(self, path: Path, device: torch.device):
        self.path = path
        self.gpt = load_model(path, device).eval()
        self.tokenizer = Tokenizer.open(path)

    def generate(
        self, prompts: str | Sequence[str], sampling: Sampling | None = None, **settings: Any
    ) -> list[Completion]:
        """Continue one prompt or several together; `settings` are `Sampling`'s fields. In the order of the prompts."""
        sampling = sampling or Sampling(**settings)
        return Engine(self.gpt, self.tokenizer).generate(
            [prompts] if isinstance(prompts, str) else list(prompts), sampling
        )

    def stream(self, prompt: str, sampling: Sampling | None = None, **settings: Any) -> Iterator[str]:
        """The continuation of one prompt, as it is made."""
        return Engine(self.gpt, self.tokenizer).stream(prompt, sampling or Sampling(**settings))

    def evaluate(self, texts: Paths, text_column: str | None = None, console: Console | None = None) -> Likelihood:
        """The loss on files, folders or named corpora, as one row of documents."""
        console = console or Console(quiet=True)
        problems = Problems()
        row: list[np.ndarray] = []
        n_bytes = 0
        for source in corpora_module.find_sources(as_list(texts), problems, text_column):
            for document in source.read(problems):
                for piece in document.pieces:
                    row.append(np.asarray(self.tokenizer.encode(piece), dtype=np.int64))
                    n_bytes += len(piece.encode())
                row.append(np.asarray([self.tokenizer.end_of_text], dtype=np.int64))
        for line in problems.lines():
            console.warn(line)
        if not row:
            raise NextwordError(f"no text was found in {', '.join(map(str, as_list(texts)))}")
        return likelihood(
            self.gpt, TokenRow(np.concatenate(row)), n_bytes, progress=lambda i, n: console.progress("evaluating", i, n)
        )


def model_path(path: str | Path) -> Path:
    """The model directory that a path means: itself, or the one in a run folder."""
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "run.json").is_file():
        raise NextwordError(
            f"{path}: this run has no model yet; go on with it by: nextword pretrain --out {path} --resume"
        )
    raise NextwordError(f"{path}: neither a model directory nor a run folder (no config.json in it)")


def load(path: str | Path, device: str = "auto") -> Model:
    """Open a run folder's model, or any model directory of a supported family, ours or stock."""
    return Model(model_path(path), choose_device(device))


# ---------------------------------------------------------------- verbs


def prepare(
    corpora: Paths,
    out: str | Path,
    *,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    text_column: str | None = None,
    strict: bool = False,
    console: Console | None = None,
) -> Corpus:
    """Turn text into shards of tokens that any number of runs can share."""
    with console or Console(quiet=True) as console:
        return corpora_module.prepare(
            as_list(corpora), Path(out), tokenizer=tokenizer, vocab_size=vocab_size, text_column=text_column,
            strict=strict, progress=console.progress, say=console.say,
        )  # fmt: skip


def pretrain(
    corpora: Paths = (),
    out: str | Path = "",
    *,
    recipe: str | None = None,
    preset: str | None = None,
    size: str | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    budget: str | float | None = None,
    steps: int | None = None,
    tokens: str | int | None = None,
    resume: bool = False,
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    text_column: str | None = None,
    strict: bool = False,
    seed: int | None = None,
    device: str = "auto",
    tensorboard: bool = False,
    console: Console | None = None,
    started: float | None = None,
) -> dict[str, Any]:
    """Train a GPT on text, from nothing to a stock model directory with a report; the result as a dictionary.

    `corpora` are files, folders, named corpora, or shards that `prepare` made. With `resume` a run goes on exactly where it
    stood, begins where there is none yet, and is content where it is finished; settings given then must be the run's own.
    """
    started = time.time() if started is None else started
    if not str(out):
        raise UsageError("say where the run folder is to be: --out RUN")
    request = {
        "corpora": whole_paths(corpora, begun=RunFolder(Path(out)).begun), "recipe": recipe, "preset": preset, "size": size,
        "tokenizer": tokenizer, "vocab_size": vocab_size, "text_column": text_column, "seed": seed, "steps": steps,
        "budget": None if budget is None else seconds(budget), "tokens": None if tokens is None else count(tokens),
        "model": {k: v for k, v in (model or {}).items() if v is not None},
        "training": {k: v for k, v in (training or {}).items() if v is not None},
    }  # fmt: skip
    chosen = change(
        recipe_named(recipe, preset), model=model, training=training, size=size, tokenizer=tokenizer,
        vocab_size=vocab_size, steps=steps, budget=request["budget"], tokens=request["tokens"],
    )  # fmt: skip
    where = choose_device(device)
    with console or Console(quiet=True) as console, open_run(Path(out), resume=resume) as run:
        if run.begun:
            refuse_changes(run, request)
            if run.finished:
                console.say(f"{run.path}: this run is finished")
                draw(run.path)  # a kill may have come between the result and its report
                return files.read_json(run.result)
            shards = run.path / run.facts()["shards"]
            corpus = Corpus.open(shards)
            job = Pretraining(run, corpus, chosen, console, where, started)
            job.go_on()
        else:
            corpus = gather(request["corpora"], run, chosen.tokenizer, chosen.vocab_size, text_column, strict, console)
            console.say(describe(corpus))
            job = Pretraining(run, corpus, chosen, console, where, started)
            job.begin(0 if seed is None else seed, command_line(), request)
        job.train(tensorboard=tensorboard)
        console.close()
        return job.finish()


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


def draw(run: Path) -> None:
    """The report and the card of a finished run, where they are not there."""
    if not (run / "README.md").is_file():
        write_card(run)
    if not (run / "report.html").is_file():
        write_report(run)


def gather(
    corpora: list[str], run: RunFolder, tokenizer: str, vocab_size: int | None, text_column: str | None, strict: bool,
    console: Console,
) -> Corpus:  # fmt: skip
    """Prepared shards where they are given, else the text made into shards inside the run folder."""
    prepared = [path for path in corpora if (Path(path) / files.MANIFEST).is_file()]
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


def refuse_changes(run: RunFolder, request: dict[str, Any]) -> None:
    """A resume takes everything from the run; what is said anew must be the same. Raises `UsageError` with what differs."""
    before = run.facts()["request"]
    said = {name: value for name, value in request.items() if value not in (None, [], {})}
    changed = differences({name: before.get(name) for name in said}, said)
    if changed:
        raise UsageError(
            f"{run.path}: this run was begun with other settings, and a resume does not change them:\n  "
            + "\n  ".join(changed)
            + "\nLeave them out to go on, or begin a new run with another --out"
        )


def generate(
    model: str | Path, prompts: str | Sequence[str], *, device: str = "auto", **settings: Any
) -> list[Completion]:
    """Continue prompts with the model at a path."""
    return load(model, device).generate(prompts, **settings)


def evaluate(
    model: str | Path,
    texts: Paths = (),
    *,
    text_column: str | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> Likelihood:
    """How well a model predicts texts; without texts, the whole validation part of its own run."""
    console = console or Console(quiet=True)
    with console:
        loaded = load(model, device)
        if as_list(texts):
            return loaded.evaluate(texts, text_column, console)
        run = RunFolder(Path(model))
        if not run.begun:
            raise UsageError(f"{model}: say on which text: nextword evaluate {model} TEXT…")
        corpus = Corpus.open(run.path / run.facts()["shards"])
        held_out = corpus.tokens("validation")
        return likelihood(
            loaded.gpt, held_out, corpus.validation.bytes, progress=lambda i, n: console.progress("evaluating", i, n)
        )


def report(run: str | Path) -> Path:
    """Write RUN/report.html anew from what the run folder holds."""
    return write_report(Path(run))


def verify(path: str | Path) -> dict[str, str]:
    """Check every file of a run, a model or shards against its SHA-256; each directory that is whole, and what it is.

    Raises:
        CorruptFile: with every damaged file by name.
    """
    path = Path(path)
    if not path.is_dir():
        raise NextwordError(f"{path}: no such directory")
    sealed = sorted(manifest.parent for manifest in path.rglob(files.MANIFEST) if ".partial" not in str(manifest))
    if not sealed:
        raise CorruptFile(f"{path}: no {files.MANIFEST} in it, so there is nothing to check it against")
    problems = [line for directory in sealed for line in files.damage(directory)]
    if problems:
        raise CorruptFile("\n".join(problems))
    kinds = {"state": "checkpoint", "model": "model", "settings": "shards"}
    return {
        str(directory): next(
            (kind for key, kind in kinds.items() if key in files.read_manifest(directory)), "directory"
        )
        for directory in sealed
    }


def demo(
    out: str | Path = "nextword-demo", *, console: Console | None = None, started: float | None = None, **settings: Any
) -> dict[str, Any]:
    """The whole life of a small GPT on the documentation inside your own Python: prepared, trained, sampled, reported."""
    with console or Console(quiet=True) as console:
        console.say("This trains a GPT on the documentation inside your Python, in about four minutes.\n", style="bold")
        result = pretrain("python-docs", out, recipe="demo", resume=True, console=console, started=started, **settings)
        loaded = load(out)
        prompts = ["Return a new", "The following example", "Raises ValueError if"]
        completions = loaded.generate(prompts, max_tokens=60, temperature=0.6, top_p=0.9, seed=1)
        return {**result, "completions": [asdict(c) for c in completions]}
