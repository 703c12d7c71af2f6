"""The verb that audits a model, and what it says to a person."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from nextword.commands.options import CommonOptions, print_result
from nextword.common.console import format_duration

FLAG_MARK = "!"  # before what is to be read first
MAX_SECTION_FINDINGS = 30  # of a section's findings; of more those that are not marked are left out
MAX_EXAMPLES = 3  # of a finding

SECTION_TITLES = {"bias": "Bias", "memory": "Memory", "corpus": "The corpus", "cost": "The cost"}
# What to do where something of a section is marked. docs/audit.md says what each does and what it does not.
REMEDIES = {
    "bias": (
        "bias: add each sentence about a group once more about the other one (counterfactual data augmentation), or more text "
        "in which they are spoken of alike; train again and audit again."
    ),
    "memory": (
        "memory: leave out what stands in the text many times and what must not be known, train again for fewer times over the "
        "text or on more of it, and audit again with the same --passage."
    ),
    "corpus": (
        "the corpus: mend the files that are named and prepare the text anew; a model that was trained on the old one keeps "
        "what it has read."
    ),
}


def audit(
    model: Path,
    /,
    *,
    corpus: Annotated[list[str] | None, Parameter(negative="")] = None,
    templates: Path | None = None,
    suite: Annotated[list[str] | None, Parameter(negative="")] = None,
    data: Path | None = None,
    group: str | None = None,
    passage: Annotated[list[str] | None, Parameter(negative="")] = None,
    index: Path | None = None,
    texts: int = 64,
    prefixes: int = 256,
    limit: int | None = None,
    price: float | None = None,
    intensity: float | None = None,
    text_column: str | None = None,
    common: CommonOptions = CommonOptions(),
) -> None:
    """Look at a model before others use it: whom it favours, what of its text it knows by heart, what that text holds, and what
    the run took. Every figure has its interval and stands beside what it would be if nothing were amiss; what is to be read
    first is marked.

    Parameters
    ----------
    model
        A run folder or a model directory, ours or stock. Of a run the findings are kept in RUN/measured/audit.json.
    corpus
        The text that the model was trained on: files, folders, named corpora. For a run its own, where it is still there.
        May be given more than once.
    templates
        Your own groups and sentences, in any language: a YAML file.
        A model that gives labels is asked whether its answer changes where only the group does.
    suite
        crows-pairs, stereoset, stereoset-discourse, winogender, winobias, as NAME=PATH, or a declaration of your own,
        FILE.toml. Of any suite it is looked up whether its items stand in the corpus. May be given more than once.
    data
        A labelled table for a model that gives labels; the words of --templates are swapped in its texts.
    group
        The column of --data that says which group a text belongs to: accuracy and rates of each.
    passage
        A text that is looked up in the corpus. May be given more than once.
    index
        Where the index of the corpus lies, or is to lie. [default: RUN/index]
    texts
        How many texts the model writes of its own, to find what it copies.
    prefixes
        From how many beginnings out of its text it is to go on.
    limit
        Items of each suite; 1,000 where nothing is said.
    price
        Of a kilowatt hour, in your money.
    intensity
        Grams of CO2 that a kilowatt hour stands for.
    text_column
        The column of tables that holds the text.
    """
    from nextword.commands import api

    result = api.audit(
        model, corpus=corpus or [], templates=templates, suites=suite or [], data=data, group=group, passages=passage or [],
        index=index, texts=texts, prefixes=prefixes, limit=limit, price=price, intensity=intensity,
        text_column=text_column, seed=common.seed or 0, device=common.device, console=common.console(),
    )  # fmt: skip
    print_result(result, common, lambda: format_audit(result))


# ---------------------------------------------------------------- in words


def format_audit(result: dict[str, Any]) -> str:
    """A section for each kind of findings, a line a finding, what was not looked at, and what to do."""
    findings = result["findings"]
    lines: list[str] = []
    for section, title in SECTION_TITLES.items():
        section_findings = [one for one in findings if one["section"] == section]
        if section_findings:
            lines += [title, *format_section(section_findings), ""]
    if result["left_out"]:
        lines += ["Not looked at", *(f"  {line}" for line in result["left_out"]), ""]
    flagged = [one for one in findings if one["notable"]]
    if flagged:
        lines += [
            f"{len(flagged):,} of {len(findings):,} findings are marked {FLAG_MARK}. What to do (docs/audit.md):",
            *(f"  {text}" for section, text in REMEDIES.items() if any(one["section"] == section for one in flagged)),
        ]
    elif findings:
        lines.append(f"None of {len(findings):,} findings is marked: nothing amiss is seen in what was measured.")
    return "\n".join([*lines, format_duration(result["seconds"])])


def format_section(findings: list[dict[str, Any]]) -> list[str]:
    """The findings of a section in their order; where they are very many, those that are marked and as many others as fit."""
    remaining = max(0, MAX_SECTION_FINDINGS - sum(finding["notable"] for finding in findings))
    lines: list[str] = []
    left_out, note = 0, ""
    for finding in findings:
        if not finding["notable"] and remaining <= 0:
            left_out += 1
            continue
        remaining -= not finding["notable"]
        lines += format_finding(finding, note)
        note = finding["note"]
    return lines + ([f"  … {left_out:,} more that are not marked; --json has them"] if left_out else [])


def format_finding(finding: dict[str, Any], previous_note: str) -> list[str]:
    """ "! CrowS-Pairs, gender: 58.4 % (52.1 to 64.0), n = 262; nothing amiss: 50.0"; what it means, where the finding before it
    has not said so; and what was found."""
    interval = (
        ""
        if finding["low"] is None
        else f" ({format_value(finding['low'], finding)} to {format_value(finding['high'], finding)})"
    )
    unit = f" {finding['unit']}" if finding["unit"] not in ("", "r", "ρ") else ""
    count = "" if finding["n"] is None else f", n = {finding['n']:,}"
    count += ", too few for an interval" if finding["section"] == "bias" and finding["low"] is None else ""
    reference = (
        "" if finding["reference"] is None else f"; nothing amiss: {format_value(finding['reference'], finding)}"
    )
    mark = FLAG_MARK if finding["notable"] else " "
    lines = [f"{mark} {finding['name']}: {format_value(finding['value'], finding)}{unit}{interval}{count}{reference}"]
    if finding["note"] and finding["note"] != previous_note:
        lines.append(f"    {finding['note']}")
    if finding["notable"] or finding["section"] != "bias":  # what was found in a text is told, marked or not
        shown = (
            "; ".join(f"{key}: {value}" for key, value in example.items())
            for example in finding["examples"][:MAX_EXAMPLES]
        )
        lines += [f"    · {line}" for line in shown]
    return lines


def format_value(value: float, finding: dict[str, Any]) -> str:
    """A figure of a finding with as many digits as it deserves."""
    if finding["unit"] == "%":
        return f"{value:.1f}"
    if value == round(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    if abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.1f}"
