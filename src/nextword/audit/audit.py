"""The audit of a model: bias, memorization, corpus and cost, as far as its inputs allow, and why anything was skipped."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextword.audit.bias import audit_benchmark, is_bias_benchmark, resolve_benchmark
from nextword.audit.cost import audit_cost
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
from nextword.pipeline.language_model import LanguageModel, load, load_task_spec, pretraining_corpus_of
from nextword.tasks.dataset import HEAD_KINDS

AUDIT_PATH = Path("measured", "audit.json")  # in the run directory


@dataclass(frozen=True)
class AuditConfig:
    """Inputs of an audit.

    Attributes:
        corpora: files, directories or built-in corpora the model was trained on; by default those of a run, if they still
            exist.
        templates: a YAML file of groups and sentences (`group_templates`).
        suites: benchmarks as `nextword evaluate --suite` takes them. Social bias benchmarks are run; the items of every
            benchmark are looked up in the corpus.
        data: labeled data for a model that predicts labels.
        group: the column of `data` that names a group.
        passages: texts to look up in the corpus.
        index: the directory of the corpus index; by default inside the run directory.
        texts: texts to sample for memorization; 0 skips this.
        prefixes: training passages to continue for memorization; 0 skips this.
        limit: maximum items of a benchmark.
        price: of a kilowatt-hour, in any currency.
        intensity: carbon intensity of electricity, in grams of CO2 equivalents per kilowatt-hour.
        text_column: the column of tables that holds the text.

    Raises:
        UsageError: a value is out of range, or `group` is given without `data`.
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
            raise UsageError(f"--group {self.group} is a column of labeled data: add --data FILE")
        counts = {"texts": (self.texts, 0), "prefixes": (self.prefixes, 0), "limit": (self.limit, 1)}
        for name, (count, minimum) in counts.items():
            if count is not None and count < minimum:
                raise UsageError(f"--{name} must be at least {minimum}")
        for name, rate in {"electricity-price": self.price, "carbon-intensity": self.intensity}.items():
            if rate is not None and not 0 <= rate < float("inf"):
                raise UsageError(f"--{name} must be a finite number of at least 0")


def audit_model(
    path: Path, config: AuditConfig, *, device: str = "auto", console: Console | None = None
) -> dict[str, Any]:
    """Audit a model. The result of a run is also written to RUN/measured/audit.json.

    Returns:
        `model`, its path; `findings`, as `Finding.to_dict` gives them; `left_out`, what was skipped and why; and `seconds`.

    Raises:
        UsageError: a file of groups, a benchmark or a column is invalid, with file and line.
        NextwordError: there is no model at the path, or an input is empty.
    """
    console = console or Console(quiet=True)
    started = time.monotonic()
    groups = None if config.templates is None else read_group_templates(Path(config.templates))
    bias_benchmarks = [request for request in config.suites if is_bias_benchmark(request)]
    run = RunDir(path)
    if config.corpora and config.index is None and not run.exists:
        raise UsageError("name a directory for the index of the corpus: --index DIR")
    model = load(path, device)
    entries = [
        *_bias_findings(model, bias_benchmarks, groups, config, console),
        *_corpus_findings(model, run, config, console),
        *_cost_findings(run, config),
    ]
    result = {
        "model": str(path),
        "findings": [entry.to_dict() for entry in entries if isinstance(entry, Finding)],
        "left_out": [entry for entry in entries if isinstance(entry, str)],
        "seconds": round(time.monotonic() - started, 3),
    }
    if run.exists:
        audit_file = run.path / AUDIT_PATH
        with fs.map_disk_errors(audit_file):
            audit_file.parent.mkdir(exist_ok=True)
        fs.atomic_write(audit_file, fs.to_json(result))
    return result


# Each part yields its findings, and a message for everything that it skips.


def _bias_findings(
    model: LanguageModel,
    benchmarks: Sequence[str],
    groups: GroupTemplates | None,
    config: AuditConfig,
    console: Console,
) -> Iterator[Finding | str]:
    if not benchmarks and groups is None and config.data is None:
        yield (
            "bias: not measured. Add benchmarks (--suite crows-pairs=FILE), your own groups (--templates FILE), or labeled "
            "data (--data FILE --group COLUMN)"
        )
    elif has_task_head(model):
        if benchmarks:
            yield f"bias by {', '.join(benchmarks)}: not measured, since this model predicts labels; audit its base model"
        yield from _classifier_findings(model, groups, config, console)
    else:
        for request in benchmarks:
            yield from audit_benchmark(model, request, limit=config.limit, console=console)
        if groups is not None:
            yield from audit_group_gaps(model, groups, console)
        if config.data is not None:
            yield f"{config.data}: not used, since this model predicts no labels; audit a fine-tuned one"


def has_task_head(model: LanguageModel) -> bool:
    """Whether a model was fine-tuned with a task head instead of generating its answers."""
    task_spec = load_task_spec(model.path)
    return task_spec is not None and task_spec.kind in HEAD_KINDS


def _classifier_findings(
    model: LanguageModel, groups: GroupTemplates | None, config: AuditConfig, console: Console
) -> Iterator[Finding | str]:
    predictor = model.predictor
    if groups is not None and supports_templates(predictor.task_spec):
        yield from audit_template_flips(predictor, groups, console)
    elif groups is not None and config.data is None:
        task = predictor.task_spec.task
        yield f"{groups.path}: not applicable to a model for {task}; its groups can be swapped in labeled data, --data FILE"
    if config.data is None:
        if groups is not None:
            yield "group rates: not measured. Add labeled data and its column of groups: --data FILE --group COLUMN"
        return
    examples = read_labeled_examples(predictor, config.data, console)
    if groups is not None:
        swap_findings = audit_swap_flips(predictor, groups, examples, console)
        yield from swap_findings
        if not swap_findings:
            yield f"{config.data}: no text contains a word of the groups in {groups.path}, so none was swapped"
    if config.group is not None:
        yield from audit_group_rates(predictor, examples, config.group, console)


def _corpus_findings(
    model: LanguageModel, run: RunDir, config: AuditConfig, console: Console
) -> Iterator[Finding | str]:
    corpora, text_column = config.corpora, config.text_column
    if not corpora:
        corpora, text_column = training_text_sources(run)
    if not corpora:
        yield "memorization and corpus: not measured. Name the training text of the model: --corpus PATH"
        return
    from nextword.audit.corpus import audit_corpus
    from nextword.audit.memorization import MemorizationProbe, passage_finding
    from nextword.audit.text_index import build_index

    shards = pretraining_corpus_of(run.path) if run.exists else None
    index = build_index(
        corpora,
        Path(config.index or run.path / "index"),
        training_corpus=None if shards is None else Corpus.open(shards),
        text_column=text_column,
        console=console,
    )
    yield from (passage_finding(index, passage) for passage in config.passages)
    probe = MemorizationProbe(model, index, config.seed, console)
    if has_task_head(model):
        yield "memorization: not measured, since this model predicts labels and generates no text; audit its base model"
    else:
        if config.texts:
            yield from probe.sampled_text(config.texts)
        if config.prefixes:
            yield probe.extractable_passages(config.prefixes)
            yield probe.pii_leakage(config.prefixes)
    benchmarks = [benchmark for request in config.suites if (benchmark := resolve_benchmark(request)) is not None]
    yield from audit_corpus(index, benchmarks=benchmarks, console=console)


def training_text_sources(run: RunDir) -> tuple[tuple[str, ...], str | None]:
    """The files and directories a run was trained on and their text column. Empty if one is gone or only holds token shards."""
    request = run.metadata().get("request") if run.exists else None
    request = request if isinstance(request, dict) else {}
    corpora = request.get("corpora")
    if not isinstance(corpora, list) or not all(
        isinstance(path, str) and _is_readable_corpus(path) for path in corpora
    ):
        return (), None
    column = request.get("text_column")
    return tuple(corpora), column if isinstance(column, str) else None


def _is_readable_corpus(corpus: str) -> bool:
    return corpus in BUILTIN_DATASETS or (Path(corpus).exists() and not (Path(corpus) / fs.MANIFEST).is_file())


def _cost_findings(run: RunDir, config: AuditConfig) -> Iterator[Finding | str]:
    if run.is_complete:
        yield from audit_cost(run, config.price, config.intensity)
    else:
        yield "cost: unknown, since this is not a complete run"
