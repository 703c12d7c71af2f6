"""An audit from beginning to end: which of its parts can be carried out, their findings, and a line about each that cannot."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextword.audit.bias import audit_benchmark, is_bias_benchmark, resolve_benchmark
from nextword.audit.fairness import (
    audit_group_rates,
    audit_swap_flips,
    audit_template_flips,
    read_labeled_examples,
    supports_templates,
)
from nextword.audit.findings import Finding
from nextword.audit.group_gaps import audit_group_gaps
from nextword.audit.group_templates import GroupTemplates, read_group_templates
from nextword.common import fs
from nextword.common.console import Console
from nextword.common.errors import UsageError
from nextword.common.run_dir import RunDir
from nextword.data.builtin_datasets import BUILTIN_DATASETS
from nextword.data.corpus import Corpus
from nextword.pipeline.base_model import load_task_spec, pretraining_corpus_of
from nextword.pipeline.language_model import LanguageModel, load
from nextword.pipeline.predictor import Predictor
from nextword.tasks.templates import HEAD_KINDS

AUDIT_PATH = Path("measured", "audit.json")  # in the run folder


@dataclass(frozen=True)
class AuditConfig:
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


def audit_model(
    path: Path, config: AuditConfig, *, device: str = "auto", console: Console | None = None
) -> dict[str, Any]:
    """Everything that was asked, as `nextword audit --json` prints it: {"model", "findings", "left_out", "seconds"}. Of a run
    it is kept as RUN/measured/audit.json too.

    Raises:
        UsageError: a file of groups, a suite or a column that is wrong, by file and line.
        NextwordError: there is no model at the path, or nothing in what is to be read.
    """
    from nextword.reporting.report import refresh_unmodified  # what draws takes half a second to import

    console = console or Console(quiet=True)
    started = time.monotonic()
    groups = None if config.templates is None else read_group_templates(Path(config.templates))
    bias_suites = [request for request in config.suites if is_bias_benchmark(request)]
    run = RunDir(path)
    if config.corpora and config.index is None and not run.exists:
        raise UsageError("say where the index of the corpus is to lie, or lies: --index DIR")
    model = load(path, device)
    entries: list[Finding | str] = []
    for section in (
        _bias_findings(model, bias_suites, groups, config, console),
        _corpus_findings(model, run, config, console),
        _cost_findings(run, config),
    ):
        entries += section
    result = {
        "model": str(path), "findings": [one.to_dict() for one in entries if isinstance(one, Finding)],
        "left_out": [one for one in entries if isinstance(one, str)], "seconds": round(time.monotonic() - started, 3),
    }  # fmt: skip
    if run.exists:
        audit_file = run.path / AUDIT_PATH
        with fs.map_disk_errors(audit_file):
            audit_file.parent.mkdir(exist_ok=True)
        fs.atomic_write(audit_file, fs.to_json(result))
        refresh_unmodified(run.path, console.info)
    return result


# Each part gives findings, and a line for what cannot be told and why.


def _bias_findings(
    model: LanguageModel, bias_suites: Sequence[str], groups: GroupTemplates | None, config: AuditConfig, console: Console
) -> Iterator[Finding | str]:
    if not bias_suites and groups is None and config.data is None:
        yield (
            "bias: not measured. Name suites (--suite crows-pairs=FILE), your own groups (--templates FILE), or labelled data "
            "(--data FILE --group COLUMN)"
        )
    if not has_task_head(model):
        for request in bias_suites:
            yield from audit_benchmark(model, request, limit=config.limit, console=console)
        if groups is not None:
            yield from audit_group_gaps(model, groups, console)
        if config.data is not None:
            yield f"{config.data}: not looked at, for this model gives no labels; fine-tune it first, or audit one that is"
        return
    if bias_suites:
        yield f"bias by {', '.join(bias_suites)}: not measured, for this model gives labels; audit the one that it began with"
    yield from _classifier_findings(model.predictor, groups, config, console)


def has_task_head(model: LanguageModel) -> bool:
    """Whether a model was fine-tuned to answer by a head, and not in words."""
    task_spec = load_task_spec(model.path)
    return task_spec is not None and task_spec.kind in HEAD_KINDS


def _classifier_findings(
    predictor: Predictor, groups: GroupTemplates | None, config: AuditConfig, console: Console
) -> Iterator[Finding | str]:  # fmt: skip
    """What is asked of a model that gives labels."""
    task_spec = predictor.task_spec
    if groups is not None and supports_templates(task_spec):
        yield from audit_template_flips(predictor, groups, console)
    elif groups is not None and config.data is None:
        yield f"{groups.path}: not put to a model that was fine-tuned to {task_spec.task}; its groups can be swapped in --data FILE"
    if config.data is None:
        if groups is None:
            return
        yield "rates of groups: not measured. Name labelled data and the column that says the group: --data FILE --group COLUMN"
        return
    examples = read_labeled_examples(predictor, config.data, console)
    if groups is not None:
        swap_findings = audit_swap_flips(predictor, groups, examples, console)
        yield from swap_findings
        if not swap_findings:
            yield f"{config.data}: no text in it has a word of the groups in {groups.path}, so none could be swapped"
    if config.group is not None:
        yield from audit_group_rates(predictor, examples, config.group, console)


def _corpus_findings(model: LanguageModel, run: RunDir, config: AuditConfig, console: Console) -> Iterator[Finding | str]:
    """What the model knows of its text by heart, and what the text holds."""
    corpora, text_column = (config.corpora, config.text_column) if config.corpora else training_text_sources(run)
    if not corpora:
        yield "memory and the corpus: not looked at. Say which text the model was trained on: --corpus PATH"
        return
    from nextword.audit.corpus import audit_corpus
    from nextword.audit.memorization import audit_memory
    from nextword.audit.text_index import build_index

    training_shards = pretraining_corpus_of(run.path) if run.exists else None
    index = build_index(
        corpora, Path(config.index or run.path / "index"), training_corpus=None if training_shards is None else Corpus.open(training_shards),
        text_column=text_column, console=console,
    )  # fmt: skip
    num_samples, num_prefixes = config.texts, config.prefixes
    if has_task_head(model):
        yield "memory: not measured, for this model gives labels and writes nothing; audit the one that it began with"
        num_samples = num_prefixes = 0
    yield from audit_memory(
        model,
        index,
        passages=config.passages,
        num_samples=num_samples,
        num_prefixes=num_prefixes,
        seed=config.seed,
        console=console,
    )
    suites = [suite for request in config.suites if (suite := resolve_benchmark(request)) is not None]
    yield from audit_corpus(corpora, benchmarks=suites, index=index, console=console)


def training_text_sources(run: RunDir) -> tuple[tuple[str, ...], str | None]:
    """The files and folders that a run was trained on, and the column of tables that was read. No files where one of them is
    gone, or is prepared shards, which hold no text."""
    request = run.metadata().get("request") if run.exists else None
    request = request if isinstance(request, dict) else {}
    corpora = request.get("corpora")
    if not isinstance(corpora, list) or not all(isinstance(one, str) and _is_readable_corpus(one) for one in corpora):
        return (), None
    text_column = request.get("text_column")
    return tuple(corpora), text_column if isinstance(text_column, str) else None


def _is_readable_corpus(corpus: str) -> bool:
    return corpus in BUILTIN_DATASETS or (Path(corpus).exists() and not (Path(corpus) / fs.MANIFEST).is_file())


def _cost_findings(run: RunDir, config: AuditConfig) -> Iterator[Finding | str]:
    if not run.is_complete:
        yield "cost: not known, for this is no finished run, which would say what it took"
        return
    from nextword.audit.cost import audit_cost

    yield from audit_cost(run.path, price_per_kwh=config.price, carbon_intensity=config.intensity)
