"""``nextword audit``: bias, memorization, corpus and cost of a model."""

import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextword.commands.command import Context, command
from nextword.commands.shared import SeedOption, TextColumnOption, input_paths, is_existing, optional, read_texts
from nextword.common import fs
from nextword.common.command_result import Result
from nextword.common.console import Console
from nextword.common.errors import MissingDependencyError, UsageError
from nextword.common.format import format_duration
from nextword.common.numbers import Count, CountOrZero, NonNegative
from nextword.common.options import DeviceOption, ModelArgument, as_strings, option, options
from nextword.common.run_dir import RunDir

if TYPE_CHECKING:
    from nextword.audit.findings import Finding
    from nextword.audit.group_templates import GroupTemplates
    from nextword.pipeline.language_model import LanguageModel

FLAG = "!"  # before a finding that needs attention
MAX_FINDINGS = 30  # printed per section; unflagged ones beyond this are left out
MAX_EXAMPLES = 3  # printed per finding

SECTION_TITLES = {"bias": "Bias", "memory": "Memorization", "corpus": "Corpus", "cost": "Cost"}
# What to do about flagged findings of a section. docs/audit.md describes what each remedy does and does not do.
REMEDIES = {
    "bias": "bias: add a copy of each sentence about one group with the other group (counterfactual data augmentation), or "
    "more text that describes both alike; then train and audit again.",
    "memory": "memorization: remove repeated and confidential text from the corpus, train for fewer epochs or on more text, "
    "and audit again with the same --search-text.",
    "corpus": "corpus: correct the files that are listed and prepare the text again. A model that was trained on the old text "
    "keeps what it has learned.",
}


@options
class AuditConfig(ModelArgument, TextColumnOption, SeedOption, DeviceOption):
    """Check a model for bias, memorization, data problems and cost.

    Each metric has a 95 % confidence interval and a reference value; findings that need attention are flagged. The results of
    a run are kept in RUN/measured/audit.json. Use evaluate to measure quality.

    Attributes:
        corpus: Training text of the model: file, directory or built-in dataset. May be given more than once. Default: the
            text of the run, if it still exists.
        templates: YAML file with your own groups and sentence templates, in any language. A classifier is tested for
            predictions that change with the group. Default: none.
        benchmarks: Bias benchmark: crows-pairs, stereoset, stereoset-discourse, winogender or winobias, each as NAME=PATH, or
            your own FILE.toml. Any benchmark is also searched for in the corpus (contamination). May be given more than once.
            Default: none.
        data: Labeled table for a classifier; the words of --templates are swapped in its texts. Default: none.
        group: Column of --data with the group of each text: compares accuracy and rates between groups. Default: none.
        search_texts: Text to search for in the corpus. May be given more than once. Default: none.
        index: Directory that keeps the index of the corpus for other audits. Default: the index is deleted after the audit.
        num_samples: Number of texts to generate and search for in the corpus. 0 skips this.
        num_prefixes: Number of prefixes from the corpus that the model continues, to find memorized text. 0 skips this.
        limit: Evaluate on this many items of each benchmark, sampled in proportion to its groups. Default: 1,000.
        electricity_price: Price of a kilowatt-hour, in any currency. Default: no costs are shown.
        carbon_intensity: Grams of CO2 per kilowatt-hour. Default: no emissions are shown.
    """

    corpus: tuple[str, ...] = option(default=(), converter=input_paths)
    templates: Path | None = option(default=None, converter=optional(Path))
    benchmarks: tuple[str, ...] = option(
        default=(), converter=as_strings, flag="--benchmark", deprecated="suites", deprecated_flag="--suite"
    )
    data: Path | None = option(default=None, converter=optional(Path))
    group: str | None = None
    search_texts: tuple[str, ...] = option(
        default=(), converter=as_strings, flag="--search-text", deprecated="passages", deprecated_flag="--passage"
    )
    index: Path | None = option(default=None, converter=optional(Path))
    num_samples: CountOrZero = option(default=64, deprecated="texts")
    num_prefixes: CountOrZero = option(default=256, deprecated="prefixes")
    limit: Count | None = None
    electricity_price: NonNegative | None = option(default=None, deprecated="price")
    carbon_intensity: NonNegative | None = option(default=None, deprecated="intensity")


@dataclass(frozen=True)
class AuditResult(Result):
    """The findings of an audit.

    Attributes:
        model: Path of the model.
        findings: For each its section, name, value, unit, confidence interval (low, high), n, reference value, whether it is
            flagged (notable), a note, examples, and the p-value of a comparison with a reference before Holm's correction.
        left_out: What was not checked, and why.
        seconds: Duration of the audit.
    """

    model: str
    findings: list[dict[str, Any]]
    left_out: list[str]
    seconds: float

    def __str__(self) -> str:
        lines: list[str] = []
        for section, title in SECTION_TITLES.items():
            if findings := [finding for finding in self.findings if finding["section"] == section]:
                lines += [title, *format_section(findings), ""]
        if self.left_out:
            lines += ["Not checked", *(f"  {line}" for line in self.left_out), ""]
        if comparisons := sum(finding.get("p_value") is not None for finding in self.findings):
            lines.append(
                f"Flags account for {comparisons:,} comparisons with a reference (Holm 1979): fewer than one audit in twenty "
                "flags one by chance."
            )
        flagged = {finding["section"] for finding in self.findings if finding["notable"]}
        if flagged:
            count = sum(finding["notable"] for finding in self.findings)
            lines.append(
                f"{count:,} of {len(self.findings):,} findings are flagged with {FLAG}. What to do (docs/audit.md):"
            )
            lines += [f"  {remedy}" for section, remedy in REMEDIES.items() if section in flagged]
        elif self.findings:
            lines.append(f"None of {len(self.findings):,} findings is flagged.")
        return "\n".join([*lines, format_duration(self.seconds)])


# ---------------------------------------------------------------- output


def format_section(findings: list[dict[str, Any]]) -> list[str]:
    """The findings of a section in order. Of more than `MAX_FINDINGS`, the flagged ones and as many others as fit."""
    unflagged_left = max(0, MAX_FINDINGS - sum(finding["notable"] for finding in findings))
    lines: list[str] = []
    omitted, note = 0, ""
    for finding in findings:
        if not finding["notable"]:
            unflagged_left -= 1
            if unflagged_left < 0:
                omitted += 1
                continue
        lines += format_finding(finding, note)
        note = finding["note"]
    return lines + ([f"  … {omitted:,} more without a flag; --json has all"] if omitted else [])


def format_finding(finding: dict[str, Any], previous_note: str) -> list[str]:
    """``! CrowS-Pairs, gender: 58.4 % (95 % CI 52.1–64.0), n = 262; reference: 50.0``, a new note, and examples."""
    value, low, high, reference = (
        None if finding[name] is None else format_number(finding[name], finding["unit"])
        for name in ("value", "low", "high", "reference")
    )
    line = f"{FLAG if finding['notable'] else ' '} {finding['name']}: {value}"
    line += f" {finding['unit']}" if finding["unit"] not in ("", "r", "ρ") else ""
    line += "" if low is None else f" (95 % CI {low}–{high})"
    line += "" if finding["n"] is None else f", n = {finding['n']:,}"
    line += ", too few for a confidence interval" if finding["section"] == "bias" and low is None else ""
    lines = [line if reference is None else f"{line}; reference: {reference}"]
    if finding["note"] and finding["note"] != previous_note:
        lines.append(f"    {finding['note']}")
    if finding["notable"] or finding["section"] != "bias":  # what was found in a text is shown, flagged or not
        for example in finding["examples"][:MAX_EXAMPLES]:
            lines.append("    · " + "; ".join(f"{key}: {text}" for key, text in example.items()))
    return lines


def format_number(value: float, unit: str) -> str:
    """A value with one decimal for percentages and whole numbers without any; the unit is not appended."""
    if unit == "%":
        return f"{value:.1f}"
    if value == round(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    if abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.1f}"


# ---------------------------------------------------------------- command


@command(AuditConfig, example="nextword audit runs/mine --benchmark crows-pairs=crows_pairs.csv")
def audit(config: AuditConfig, context: Context) -> AuditResult:
    """Audit a model, as far as the inputs allow. The result of a run is also written to RUN/measured/audit.json."""
    from nextword.audit.bias import is_bias_benchmark
    from nextword.audit.cost import audit_cost
    from nextword.audit.findings import flag_significant
    from nextword.audit.group_templates import read_group_templates
    from nextword.common.results import AUDIT_FILE
    from nextword.pipeline.language_model import load
    from nextword.reporting.report import refresh_unmodified

    if config.group is not None and config.data is None:
        raise UsageError(f"--group {config.group} is a column of labeled data: add --data FILE")
    started = time.monotonic()
    groups = None if config.templates is None else read_group_templates(config.templates)
    bias_benchmarks = [request for request in config.benchmarks if is_bias_benchmark(request)]
    run = RunDir(config.model)
    model = load(config.model, config.device)
    entries = [
        *bias_findings(model, bias_benchmarks, groups, config, context.console),
        *corpus_findings(model, run, config, context.console),
    ]
    if run.is_complete:
        entries += audit_cost(run, config.electricity_price, config.carbon_intensity)
    else:
        entries.append("cost: unknown, since this is not a complete run")
    findings = flag_significant([entry for entry in entries if not isinstance(entry, str)])
    result = AuditResult(
        model=str(config.model),
        findings=[finding.to_dict() for finding in findings],
        left_out=[entry for entry in entries if isinstance(entry, str)],
        seconds=round(time.monotonic() - started, 3),
    )
    if run.exists:
        audit_file = config.model / AUDIT_FILE
        with fs.map_disk_errors(audit_file):
            audit_file.parent.mkdir(exist_ok=True)
        fs.write_sealed_json(audit_file, result.to_dict())
        refresh_unmodified(config.model, context.console.info)
    return result


# Each part yields its findings, and a message for everything that it skips.


def bias_findings(
    model: "LanguageModel",
    benchmarks: Sequence[str],
    groups: "GroupTemplates | None",
    config: AuditConfig,
    console: Console,
) -> "Iterator[Finding | str]":
    """Findings on groups of people, by benchmarks and by the user's own groups and data."""
    from nextword.audit.bias import audit_benchmark, audit_group_gaps

    if not benchmarks and groups is None and config.data is None:
        yield (
            "bias: not measured. Add benchmarks (--benchmark crows-pairs=FILE), your own groups (--templates FILE), or labeled "
            "data (--data FILE --group COLUMN)"
        )
    elif has_task_head(model):
        if benchmarks:
            yield f"bias by {', '.join(benchmarks)}: not measured, since this model predicts labels; audit its base model"
        yield from classifier_findings(model, groups, config, console)
    else:
        for request in benchmarks:
            yield from audit_benchmark(model, request, config.limit, console)
        if groups is not None:
            yield from audit_group_gaps(model, groups, console)
        if config.data is not None:
            yield f"{config.data}: not used, since this model predicts no labels; audit a fine-tuned one"


def has_task_head(model: "LanguageModel") -> bool:
    """Whether a model was fine-tuned with a task head instead of generating its answers."""
    from nextword.tasks.dataset import HEAD_KINDS

    return model.task_spec is not None and model.task_spec.kind in HEAD_KINDS


def classifier_findings(
    model: "LanguageModel", groups: "GroupTemplates | None", config: AuditConfig, console: Console
) -> "Iterator[Finding | str]":
    """Whether predictions depend on the group."""
    from nextword.audit import fairness

    predictor = model.predictor
    if groups is not None and fairness.supports_templates(predictor.task_spec):
        yield from fairness.audit_template_flips(predictor, groups, console)
    elif groups is not None and config.data is None:
        task = predictor.task_spec.task
        yield f"{groups.path}: not applicable to a model for {task}; its groups can be swapped in labeled data, --data FILE"
    if config.data is None:
        if groups is not None:
            yield "group rates: not measured. Add labeled data and its column of groups: --data FILE --group COLUMN"
        return
    examples = fairness.read_labeled_examples(predictor, config.data, console)
    if groups is not None:
        swap_findings = fairness.audit_swap_flips(predictor, groups, examples, console)
        yield from swap_findings
        if not swap_findings:
            yield f"{config.data}: no text contains a word of the groups in {groups.path}, so none was swapped"
    if config.group is not None:
        yield from fairness.audit_group_rates(predictor, examples, config.group, console)


def corpus_findings(
    model: "LanguageModel", run: RunDir, config: AuditConfig, console: Console
) -> "Iterator[Finding | str]":
    """What the model has memorized of its training text, and the quality of that text."""
    corpora, text_column = (config.corpus, config.text_column) if config.corpus else training_text_sources(run)
    if not corpora:
        yield "memorization and corpus: not measured. Name the training text of the model: --corpus PATH"
        return
    from nextword.audit.bias import resolve_benchmark
    from nextword.audit.corpus import audit_corpus
    from nextword.audit.memorization import MemorizationProbe, passage_finding
    from nextword.audit.pii import load_checks
    from nextword.audit.text_index import build_index
    from nextword.data.corpus import Corpus
    from nextword.pipeline.language_model import pretraining_corpus_of

    try:
        load_checks()
    except MissingDependencyError as error:
        yield f"memorization and corpus: not measured. {error}"
        return
    shards = pretraining_corpus_of(run.path) if run.exists else None
    training_corpus = None if shards is None else Corpus.open(shards)
    with index_directory(config, run, console) as directory:
        index = build_index(
            corpora, directory, training_corpus=training_corpus, text_column=text_column, console=console
        )
        for passage in read_texts(config.search_texts):
            if is_existing(passage):
                yield f"--search-text {passage}: the file of this name was not read; its name was searched for"
            yield passage_finding(index, passage)
        probe = MemorizationProbe(model, index, config.seed or 0, console)
        if has_task_head(model):
            yield "memorization: not measured, since this model predicts labels and generates no text; audit its base model"
        else:
            if config.num_samples:
                yield from probe.sampled_text(config.num_samples)
            if config.num_prefixes:
                yield probe.extractable_passages(config.num_prefixes)
                yield probe.pii_leakage(config.num_prefixes)
        benchmarks = [
            benchmark for request in config.benchmarks if (benchmark := resolve_benchmark(request)) is not None
        ]
        yield from audit_corpus(index, benchmarks, console)


@contextmanager
def index_directory(config: AuditConfig, run: RunDir, console: Console) -> Generator[Path]:
    """The directory of the index: `--index`, RUN/index if it exists, or a temporary one that is deleted after the audit."""
    kept = config.index or run.path / "index"
    if config.index is not None or kept.is_dir():
        yield kept
        return
    parent = run.path if run.exists else None  # where there is space for a corpus
    with tempfile.TemporaryDirectory(prefix="index-", dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder) / "index"
    console.info("The index of the corpus was deleted; --index DIR keeps it, and the next audit starts sooner")


def training_text_sources(run: RunDir) -> tuple[tuple[str, ...], str | None]:
    """The files and directories a run was trained on and their text column. Empty if one is gone or only holds token shards."""
    from nextword.data.builtin_datasets import BUILTIN_DATASETS

    request: Any = run.metadata().get("request") if run.exists else None
    corpora, text_column = (request.get("corpora"), request.get("text_column")) if request else (None, None)
    if not corpora or not all(
        path in BUILTIN_DATASETS or (Path(path).exists() and not (Path(path) / fs.MANIFEST).is_file())
        for path in corpora
    ):
        return (), None
    return tuple(corpora), text_column
