"""An audit from beginning to end: which of its parts can be carried out, their findings, and a line about each that cannot."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextword.audit.bias import audit_suite, leans, suite_of
from nextword.audit.fairness import audit_flips, audit_rates, audit_swaps, read_labelled, takes_templates
from nextword.audit.findings import Finding
from nextword.audit.group_gaps import audit_gaps
from nextword.audit.group_templates import Groups, read_groups
from nextword.common import fs
from nextword.common.console import Console
from nextword.common.errors import UsageError
from nextword.common.run_dir import RunFolder
from nextword.data.builtin_datasets import NAMED
from nextword.data.corpus import Corpus
from nextword.pipeline.base_model import form_of, old_text_of
from nextword.pipeline.language_model import Model, load
from nextword.pipeline.predictor import Predictor
from nextword.tasks.dataset import HEADS

KEPT = Path("measured", "audit.json")  # in the run folder


@dataclass(frozen=True)
class Asked:
    """What a person wants to know of a model.

    Attributes:
        corpora, text_column: the text that it was trained on, and the column of tables that holds it; where none is named, a
            run's own, if it is still there.
        templates: a file of groups and sentences (`groups.read_groups`).
        suites: as `nextword evaluate --suite` takes them. Those about bias are put to the model; of each it is looked up
            whether its items stand in the corpus.
        data, group: a labelled table, and the column of it that names a group.
        passages: texts that are looked up in the corpus.
        index: where the index of the corpus lies or is to lie; inside the run folder where not said.
        texts, prefixes: how many texts the model writes, and how many beginnings it goes on from, to see what it knows by
            heart; 0 leaves that out.
        limit: items of a suite.
        price, intensity: of a kilowatt hour, in money and in grams of CO2.
    """

    corpora: tuple[str, ...] = ()
    templates: str | Path | None = None
    suites: Sequence[str] = ()
    data: str | Path | None = None
    group: str | None = None
    passages: Sequence[str] = ()
    index: str | Path | None = None
    texts: int = 64
    prefixes: int = 256
    limit: int | None = None
    price: float | None = None
    intensity: float | None = None
    text_column: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group is not None and self.data is None:
            raise UsageError(f"--group {self.group} is a column of labelled data: say which, --data FILE")
        for name, least in (("texts", 0), ("prefixes", 0), ("limit", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UsageError(f"--{name} must be at least {least}")
        for name in ("price", "intensity"):
            if (value := getattr(self, name)) is not None and not 0 <= value < float("inf"):
                raise UsageError(f"--{name} must be a number of 0 or more")


def audit_model(path: Path, asked: Asked, *, device: str = "auto", console: Console | None = None) -> dict[str, Any]:
    """Everything that was asked, as `nextword audit --json` prints it: {"model", "findings", "left_out", "seconds"}. Of a run
    it is kept as RUN/measured/audit.json too.

    Raises:
        UsageError: a file of groups, a suite or a column that is wrong, by file and line.
        NextwordError: there is no model at the path, or nothing in what is to be read.
    """
    from nextword.reporting.report import refresh  # what draws takes half a second to import

    console = console or Console(quiet=True)
    started = time.monotonic()
    groups = None if asked.templates is None else read_groups(Path(asked.templates))
    leaning = [request for request in asked.suites if leans(request)]
    run = RunFolder(path)
    if asked.corpora and asked.index is None and not run.begun:
        raise UsageError("say where the index of the corpus is to lie, or lies: --index DIR")
    model = load(path, device)
    told: list[Finding | str] = []
    for part in (_bias(model, leaning, groups, asked, console), _corpus(model, run, asked, console), _cost(run, asked)):
        told += part
    result = {
        "model": str(path), "findings": [one.to_dict() for one in told if isinstance(one, Finding)],
        "left_out": [one for one in told if isinstance(one, str)], "seconds": round(time.monotonic() - started, 3),
    }  # fmt: skip
    if run.begun:
        kept = run.path / KEPT
        with fs.writing(kept):
            kept.parent.mkdir(exist_ok=True)
        fs.write_durably(kept, fs.to_json(result))
        refresh(run.path, console.say)
    return result


# Each part gives findings, and a line for what cannot be told and why.


def _bias(
    model: Model, suites: Sequence[str], groups: Groups | None, asked: Asked, console: Console
) -> Iterator[Finding | str]:
    if not suites and groups is None and asked.data is None:
        yield (
            "bias: not measured. Name suites (--suite crows-pairs=FILE), your own groups (--templates FILE), or labelled data "
            "(--data FILE --group COLUMN)"
        )
    if not gives_labels(model):
        for request in suites:
            yield from audit_suite(model, request, limit=asked.limit, console=console)
        if groups is not None:
            yield from audit_gaps(model, groups, console)
        if asked.data is not None:
            yield f"{asked.data}: not looked at, for this model gives no labels; fine-tune it first, or audit one that is"
        return
    if suites:
        yield f"bias by {', '.join(suites)}: not measured, for this model gives labels; audit the one that it began with"
    yield from _labels(model.predictor, groups, asked, console)


def gives_labels(model: Model) -> bool:
    """Whether a model was fine-tuned to answer by a head, and not in words."""
    form = form_of(model.path)
    return form is not None and form.kind in HEADS


def _labels(
    predictor: Predictor, groups: Groups | None, asked: Asked, console: Console
) -> Iterator[Finding | str]:  # fmt: skip
    """What is asked of a model that gives labels."""
    form = predictor.form
    if groups is not None and takes_templates(form):
        yield from audit_flips(predictor, groups, console)
    elif groups is not None and asked.data is None:
        yield f"{groups.path}: not put to a model that was fine-tuned to {form.task}; its groups can be swapped in --data FILE"
    if asked.data is None:
        if groups is None:
            return
        yield "rates of groups: not measured. Name labelled data and the column that says the group: --data FILE --group COLUMN"
        return
    examples = read_labelled(predictor, asked.data, console)
    if groups is not None:
        found = audit_swaps(predictor, groups, examples, console)
        yield from found
        if not found:
            yield f"{asked.data}: no text in it has a word of the groups in {groups.path}, so none could be swapped"
    if asked.group is not None:
        yield from audit_rates(predictor, examples, asked.group, console)


def _corpus(model: Model, run: RunFolder, asked: Asked, console: Console) -> Iterator[Finding | str]:
    """What the model knows of its text by heart, and what the text holds."""
    corpora, column = (asked.corpora, asked.text_column) if asked.corpora else own_text(run)
    if not corpora:
        yield "memory and the corpus: not looked at. Say which text the model was trained on: --corpus PATH"
        return
    from nextword.audit.corpus import audit_corpus
    from nextword.audit.memorization import audit_memory
    from nextword.audit.text_index import build_index

    shards = old_text_of(run.path) if run.begun else None
    index = build_index(
        corpora, Path(asked.index or run.path / "index"), prepared=None if shards is None else Corpus.open(shards),
        text_column=column, console=console,
    )  # fmt: skip
    texts, prefixes = asked.texts, asked.prefixes
    if gives_labels(model):
        yield "memory: not measured, for this model gives labels and writes nothing; audit the one that it began with"
        texts = prefixes = 0
    yield from audit_memory(
        model, index, passages=asked.passages, texts=texts, prefixes=prefixes, seed=asked.seed, console=console
    )
    suites = [suite for request in asked.suites if (suite := suite_of(request)) is not None]
    yield from audit_corpus(corpora, suites=suites, index=index, console=console)


def own_text(run: RunFolder) -> tuple[tuple[str, ...], str | None]:
    """The files and folders that a run was trained on, and the column of tables that was read. No files where one of them is
    gone, or is prepared shards, which hold no text."""
    request = run.facts().get("request") if run.begun else None
    request = request if isinstance(request, dict) else {}
    corpora = request.get("corpora")
    if not isinstance(corpora, list) or not all(isinstance(one, str) and _holds_text(one) for one in corpora):
        return (), None
    column = request.get("text_column")
    return tuple(corpora), column if isinstance(column, str) else None


def _holds_text(corpus: str) -> bool:
    return corpus in NAMED or (Path(corpus).exists() and not (Path(corpus) / fs.MANIFEST).is_file())


def _cost(run: RunFolder, asked: Asked) -> Iterator[Finding | str]:
    if not run.finished:
        yield "cost: not known, for this is no finished run, which would say what it took"
        return
    from nextword.audit.cost import audit_cost

    yield from audit_cost(run.path, price=asked.price, intensity=asked.intensity)
