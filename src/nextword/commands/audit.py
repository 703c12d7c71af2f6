"""``nextword audit``: bias, memorization, corpus and cost of a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextword.commands.command import Context, command, option, options
from nextword.commands.shared import (
    DeviceOption,
    ModelArgument,
    SeedOption,
    TextColumnOption,
    as_strings,
    input_paths,
    optional,
)
from nextword.common.command_result import Result
from nextword.common.format import format_duration

FLAG = "!"  # before a finding that needs attention
MAX_FINDINGS = 30  # printed per section; unflagged ones beyond this are left out
MAX_EXAMPLES = 3  # printed per finding

SECTION_TITLES = {"bias": "Bias", "memory": "Memorization", "corpus": "Corpus", "cost": "Cost"}
# What to do about flagged findings of a section. docs/audit.md describes what each remedy does and does not do.
REMEDIES = {
    "bias": "bias: add a copy of each sentence about one group with the other group (counterfactual data augmentation), or "
    "more text that describes both alike; then train and audit again.",
    "memory": "memorization: remove repeated and confidential text from the corpus, train for fewer epochs or on more text, "
    "and audit again with the same --passage.",
    "corpus": "corpus: correct the files that are listed and prepare the text again. A model that was trained on the old text "
    "keeps what it has learned.",
}


@options
class AuditConfig(ModelArgument, TextColumnOption, SeedOption, DeviceOption):
    """Check a model for bias, memorization, data problems and cost.

    Each figure has a 95 % confidence interval and a reference value; findings that need attention are flagged. The results of
    a run are kept in RUN/measured/audit.json. Use evaluate for quality; audit looks for harm.

    Attributes:
        corpus: Training text of the model: file, directory or built-in dataset. May be given more than once. Default: the
            text of the run, if it still exists.
        templates: YAML file with your own groups and sentence templates, in any language. A classifier is tested for
            predictions that change with the group. Default: none.
        suites: Bias benchmark: crows-pairs, stereoset, stereoset-discourse, winogender or winobias, each as NAME=PATH, or
            your own FILE.toml. Any benchmark is also searched for in the corpus (contamination). May be given more than once.
            Default: none.
        data: Labeled table for a classifier; the words of --templates are swapped in its texts. Default: none.
        group: Column of --data with the group of each text: compares accuracy and rates between groups. Default: none.
        passages: Text to search for in the corpus. May be given more than once. Default: none.
        index: Directory of the index of the corpus. Default: RUN/index.
        texts: Number of texts to generate and search for in the corpus. 0 skips this.
        prefixes: Number of prefixes from the corpus that the model continues, to find memorized text. 0 skips this.
        limit: Evaluate on this many items of each benchmark, sampled in proportion to its groups. Default: 1,000.
        electricity_price: Price of a kilowatt-hour, in any currency. Default: no costs are shown.
        carbon_intensity: Grams of CO2 per kilowatt-hour. Default: no emissions are shown.
    """

    corpus: tuple[str, ...] = option(default=(), converter=input_paths)
    templates: Path | None = option(default=None, converter=optional(Path))
    suites: tuple[str, ...] = option(default=(), converter=as_strings, flag="--suite")
    data: Path | None = option(default=None, converter=optional(Path))
    group: str | None = None
    passages: tuple[str, ...] = option(default=(), converter=as_strings, flag="--passage")
    index: Path | None = option(default=None, converter=optional(Path))
    texts: int = 64
    prefixes: int = 256
    limit: int | None = None
    electricity_price: float | None = option(default=None, deprecated="price")
    carbon_intensity: float | None = option(default=None, deprecated="intensity")


@dataclass(frozen=True)
class AuditResult(Result):
    """The findings of an audit.

    Attributes:
        model: Path of the model.
        findings: For each its section, name, value, unit, confidence interval (low, high), n, reference value, whether it is
            flagged (notable), a note and examples.
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
    if unit == "%":
        return f"{value:.1f}"
    if value == round(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    if abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.1f}"


# ---------------------------------------------------------------- command


@command(AuditConfig, example="nextword audit runs/mine --suite crows-pairs=crows_pairs.csv")
def audit(config: AuditConfig, context: Context) -> AuditResult:
    from nextword.audit import audit as auditing
    from nextword.common.run_dir import RunDir
    from nextword.reporting.report import refresh_unmodified

    names = ("templates", "suites", "data", "group", "passages", "index", "texts", "prefixes", "limit", "text_column")
    checks = auditing.AuditConfig(
        corpora=config.corpus,
        price=config.electricity_price,
        intensity=config.carbon_intensity,
        seed=config.seed or 0,
        **{name: getattr(config, name) for name in names},
    )
    result = auditing.audit_model(config.model, checks, device=config.device, console=context.console)
    if RunDir(config.model).exists:
        refresh_unmodified(config.model, context.console.info)
    return AuditResult(**result)
