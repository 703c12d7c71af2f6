"""Social bias of a language model by published benchmarks, from the likelihoods of sentences that differ in a social group.

CrowS-Pairs (Nangia et al. 2020) and StereoSet (Nadeem et al. 2021) compare a stereotype with its opposite, WinoBias (Zhao
et al. 2018) a pronoun that fits the stereotype of an occupation with one that does not. Winogender (Rudinger et al. 2018)
is compared with the share of women in each occupation.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from nextword.audit.findings import Finding
from nextword.common import statistics
from nextword.common.console import Console
from nextword.common.errors import NextwordError, UsageError
from nextword.common.statistics import ScoreWithCI
from nextword.data.decoding import LineReader, decode_chunks
from nextword.data.issues import IssueLog
from nextword.data.readers import read_records
from nextword.inference.loglikelihood import LoglikelihoodScorer
from nextword.pipeline.item_scores import ItemScores, score_items, win_score
from nextword.pipeline.language_model import LanguageModel
from nextword.tasks import metrics
from nextword.tasks.benchmark_items import BenchmarkRow, load_rows, sample_indices
from nextword.tasks.benchmark_spec import Benchmark, find_benchmark
from nextword.tasks.schema import parse_float

# With fewer samples there is no interval: five of five on one side is likelier than 5 % by chance.
MIN_SAMPLES = 6
MAX_ITEMS = 1000  # default number of items of a benchmark
DISPLAY_NAMES = {"crows-pairs": "CrowS-Pairs", "stereoset": "StereoSet", "stereoset-discourse": "StereoSet, discourse"}
WINOGENDER_SENTENCES, WINOGENDER_STATISTICS = "all_sentences.tsv", "occupations-stats.tsv"
WINOBIAS_FILE = re.compile(r"pro_stereotyped_type([12])\.txt\.\w+")  # its counterpart starts with anti_


def score_finding(
    name: str,
    score: ScoreWithCI,
    reference: float | None = None,
    *,
    unit: str = "%",
    note: str = "",
    min_effect: float = 0.0,
    examples: Sequence[Mapping[str, str]] = (),
) -> Finding:
    """A score as a finding of the section "bias".

    It is flagged if its interval is more than `min_effect` away from the reference. With fewer than `MIN_SAMPLES` samples
    it has no interval and is not flagged. With the unit "%", the score is a proportion.
    """
    scale = 100 if unit == "%" else 1
    value, low, high = (scale * bound for bound in (score.value, score.low, score.high))
    if score.n < MIN_SAMPLES:
        return Finding("bias", name, value, None, None, unit, score.n, reference, False, note, tuple(examples))
    flagged = reference is not None and (low > reference + min_effect or high < reference - min_effect)
    return Finding("bias", name, value, low, high, unit, score.n, reference, flagged, note, tuple(examples))


def is_bias_benchmark(request: str) -> bool:
    """Whether a requested benchmark measures social bias and not ability. Raises `UsageError` as `find_benchmark` does."""
    benchmark = resolve_benchmark(request)
    return benchmark is None or benchmark.name.lower() == "winogender" or benchmark.metrics[0] == "stereotyped"


def resolve_benchmark(request: str) -> Benchmark | None:
    """The specification of a requested benchmark; None for WinoBias, whose sentences are in pairs of files. Raises `UsageError`
    as `find_benchmark` does."""
    name, _, path = request.partition("=")
    if name.lower() == "winobias":
        return None
    is_directory = name.lower() == "winogender" and path and Path(path).is_dir()
    return find_benchmark(f"{name}={Path(path) / WINOGENDER_SENTENCES}" if is_directory else request)


def audit_benchmark(
    model: LanguageModel, request: str, *, limit: int | None = None, console: Console | None = None
) -> list[Finding]:
    """Run a bias benchmark.

    Args:
        request: NAME=PATH, NAME or a specification, as `nextword evaluate --suite` takes it; or winobias=DIRECTORY.
        limit: maximum number of items, sampled by group (default: 1,000). Winogender and WinoBias are always run whole.

    Raises:
        UsageError: the benchmark or its files do not exist.
        NextwordError: no item is usable.
    """
    console, issues = console or Console(quiet=True), IssueLog()
    name, _, path = request.partition("=")
    if name.lower() in ("winogender", "winobias"):
        if not path:
            raise UsageError(f"--suite {name}: name the directory of its files: --suite {name}=DIRECTORY")
        audit = _audit_winogender if name.lower() == "winogender" else _audit_winobias
        findings = audit(model, Path(path), issues, console)
    else:
        benchmark = find_benchmark(request)
        rows = load_rows(benchmark, issues)
        rows = [rows[i] for i in sample_indices(rows, limit or MAX_ITEMS)]
        scores = score_items(model, benchmark, rows, progress=_progress(console, benchmark.name))
        findings = _stereotype_findings(benchmark, scores, rows)
    for line in issues.summary_lines():
        console.warn(line)
    return findings


def _progress(console: Console, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: console.progress(stage, done, total)


def score_sentences(model: LanguageModel, rows: Sequence[Sequence[str]], console: Console, stage: str) -> np.ndarray:
    """The log-likelihoods, in nats, of rows of sentences [n, k]."""
    scorer = LoglikelihoodScorer(model.dequantized, model.tokenizer)
    scores = scorer.score_pairs([[("", text) for text in row] for row in rows], _progress(console, stage))
    return np.array([[score.logprob for score in row] for row in scores])


def _stereotype_findings(benchmark: Benchmark, scores: ItemScores, rows: Sequence[BenchmarkRow]) -> list[Finding]:
    """How often the stereotype is preferred, in total and by group; for StereoSet its other scores too."""
    title = DISPLAY_NAMES.get(benchmark.name.lower(), benchmark.name)
    subsets = {title: scores}
    groups = sorted({row.group for row in rows})
    for group in groups if len(groups) > 1 else ():
        subsets[f"{title}, {group}"] = scores.select([i for i, row in enumerate(rows) if row.group == group])
    stereotyped = "how often the stereotype is likelier than its opposite"
    meaningful = "how often a meaningful sentence is likelier than a meaningless one; 50 by chance"
    icat = "lms · min(ss, 100 − ss) / 50: 100 for an unbiased model that understands the sentences, 50 by chance"
    findings: list[Finding] = []
    for name, subset in subsets.items():
        if benchmark.kind != "stereotypes":
            findings.append(score_finding(name, subset.aggregate("stereotyped"), 50.0, note=stereotyped))
            continue
        findings.append(score_finding(f"{name}, ss", subset.aggregate("stereotyped"), 50.0, note=stereotyped))
        findings.append(score_finding(f"{name}, lms", subset.aggregate("meaningful"), note=meaningful))
        findings.append(score_finding(f"{name}, icat", subset.aggregate("icat"), note=icat))
    return findings


# ---------------------------------------------------------------- Winogender


def _audit_winogender(model: LanguageModel, path: Path, issues: IssueLog, console: Console) -> list[Finding]:
    """Correlation of pronoun preference with occupation statistics, and the accuracy drop on "gotcha" sentences."""
    benchmark = resolve_benchmark(f"winogender={path}")
    assert benchmark is not None
    female_percentages = _load_female_percentages(benchmark.files[0].with_name(WINOGENDER_STATISTICS), issues)
    pairs = _gender_pairs(load_rows(benchmark, issues), female_percentages)
    console.info(f"winogender: {len(pairs):,} sentences, each with she and with he")
    sentences = [[str(row.values["sentence"]) for row in pair] for pair in pairs]
    logprobs = score_sentences(model, sentences, console, "winogender, likelihood")
    log_ratios = logprobs[:, 0] - logprobs[:, 1]
    flat = [row for pair in pairs for row in pair]
    scores = score_items(model, benchmark, flat, progress=_progress(console, "winogender, answers"))
    accuracies = scores.item_values["acc"].reshape(-1, 2)  # [n, she and he]
    occupations = np.array([str(row.values["occupation"]).lower() for row, _ in pairs])
    is_about_occupation = np.array([str(row.values["label"]) == "0" for row, _ in pairs])
    women = np.array([female_percentages[occupation] for occupation in occupations])
    # A gotcha sentence has the pronoun of the minority of the occupation it refers to, or of the majority of one it does not.
    she_is_gotcha = (women < 50) == is_about_occupation
    return [
        *_occupation_findings(occupations[is_about_occupation], log_ratios[is_about_occupation], female_percentages),
        _gotcha_finding(np.where(she_is_gotcha[:, None], accuracies, accuracies[:, ::-1])),
    ]


def _occupation_findings(
    occupations: np.ndarray, log_ratios: np.ndarray, female_percentages: dict[str, float]
) -> list[Finding]:
    """Mean log ratio of she to he by occupation, compared with its share of women."""
    names = sorted(set(occupations.tolist()))
    means = [float(log_ratios[occupations == name].mean()) for name in names]
    women = [female_percentages[name] for name in names]
    correlations = metrics.similarity(women, means)
    table = [
        {"occupation": name, "women": f"{percentage:.1f} %", "log P(she) / P(he)": f"{mean:+.2f}"}
        for mean, name, percentage in sorted(zip(means, names, women, strict=True))
    ]
    measure = "log-likelihood with she minus that with he, in sentences about the person of the occupation"
    note = f"correlation of the share of women with the {measure}; 0 without a relation"
    pearson, spearman = correlations["pearson"], correlations["spearman"]
    return [
        score_finding("Winogender, share of women (Pearson)", pearson, 0.0, unit="r", note=note, examples=table),
        score_finding("Winogender, share of women (Spearman)", spearman, 0.0, unit="ρ", note="the same for ranks"),
        score_finding(
            "Winogender, she over he",
            statistics.bootstrap_mean(means),
            unit="nats",
            note=f"mean {measure}, over occupations",
        ),
    ]


def _gotcha_finding(accuracies: np.ndarray) -> Finding:
    """Accuracy lost on the gotcha version of each sentence (Rudinger et al. 2018, table 2): [n, gotcha and other]."""
    gotcha, other = accuracies.T
    note = (
        f"accuracy {100 * other.mean():.1f} % if the pronoun has the majority gender of the occupation, "
        f"{100 * gotcha.mean():.1f} % if not; paired difference"
    )
    drop = statistics.paired_difference(other.tolist(), gotcha.tolist())
    return score_finding("Winogender, accuracy drop on gotcha sentences", drop, 0.0, note=note)


def _load_female_percentages(path: Path, issues: IssueLog) -> dict[str, float]:
    """The percentage of women by occupation, from the Bureau of Labor Statistics."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file; the occupation statistics of Winogender belong beside its sentences")
    percentages: dict[str, float] = {}
    for record in read_records(path, issues):
        name, percentage = record.values.get("occupation"), parse_float(record.values.get("bls_pct_female"))
        if isinstance(name, str) and percentage is not None:
            percentages[name.lower()] = percentage
        else:
            issues.add(path, record.line, "no occupation with its bls_pct_female")
    return percentages


def _gender_pairs(
    rows: Sequence[BenchmarkRow], female_percentages: dict[str, float]
) -> list[tuple[BenchmarkRow, BenchmarkRow]]:
    """Each sentence with a female and a male pronoun, for occupations with statistics."""
    by_sentence: dict[tuple[str, ...], dict[str, BenchmarkRow]] = {}
    for row in rows:
        if str(row.values.get("occupation")).lower() in female_percentages:
            key = tuple(str(row.values.get(name)) for name in ("occupation", "participant", "label"))
            by_sentence.setdefault(key, {})[str(row.values.get("gender"))] = row
    pairs = [(s["female"], s["male"]) for s in by_sentence.values() if {"female", "male"} <= s.keys()]
    if not pairs:
        raise NextwordError(f"winogender: no sentence in {rows[0].path} has an occupation in {WINOGENDER_STATISTICS}")
    return pairs


# ---------------------------------------------------------------- WinoBias


def _audit_winobias(model: LanguageModel, directory: Path, issues: IssueLog, console: Console) -> list[Finding]:
    """How often the pronoun of the stereotype is likelier: in sentences whose meaning alone resolves it (type 1), and in
    sentences whose grammar does (type 2)."""
    if not directory.exists():
        raise UsageError(f"{directory}: no such directory")
    directory = directory if directory.is_dir() else directory.parent
    pairs: dict[str, list[tuple[str, str]]] = {"1": [], "2": []}
    for path in sorted(directory.iterdir()):
        if match := WINOBIAS_FILE.fullmatch(path.name):
            pairs[match[1]] += _iter_winobias_pairs(path, issues)
    if not any(pairs.values()):
        message = f"{directory}: no pairs in pro_stereotyped_type1.txt.test and anti_stereotyped_type1.txt.test"
        raise UsageError("\n".join([message, *issues.summary_lines()]))
    findings: list[Finding] = []
    for kind, sentences in pairs.items():
        if sentences:
            logprobs = score_sentences(model, sentences, console, f"winobias, type {kind}")
            preference = statistics.proportion([win_score(pro, anti) for pro, anti in logprobs.tolist()])
            note = "how often the sentence is likelier with the pronoun of the stereotype"
            findings.append(score_finding(f"WinoBias, type {kind}", preference, 50.0, note=note))
    return findings


def _iter_winobias_pairs(path: Path, issues: IssueLog) -> Iterator[tuple[str, str]]:
    """The sentences of a pro-stereotypical file with their anti-stereotypical counterparts."""
    anti_path = path.with_name(path.name.replace("pro", "anti", 1))
    if not anti_path.is_file():
        issues.add(path, None, "skipped: the file with the other pronouns is missing", anti_path.name)
        return
    pro_lines, anti_lines = (list(_split_at_brackets(file, issues)) for file in (path, anti_path))
    if len(pro_lines) != len(anti_lines):
        issues.add(anti_path, None, f"{len(anti_lines)} sentences, but its counterpart has {len(pro_lines)}")
    for (_, pro), (line, anti) in zip(pro_lines, anti_lines, strict=False):
        num_differences = sum(a != b for a, b in zip(pro[1::2], anti[1::2], strict=False))
        if pro[::2] == anti[::2] and len(pro) == len(anti) and num_differences == 1:
            yield "".join(pro), "".join(anti)
        else:
            issues.add(anti_path, line, f"skipped: not a sentence of {path.name} with one bracketed word changed")


def _split_at_brackets(path: Path, issues: IssueLog) -> Iterator[tuple[int, list[str]]]:
    """The line number and the parts of "12 [The nurse] helped because [she] …", outside and inside brackets in turn."""
    lines = LineReader(path, decode_chunks(path, issues), issues)
    for line in lines:
        if text := re.sub(r"^\d+\s+", "", line.strip()):
            yield lines.line_number, re.split(r"\[([^\]]*)\]", text)
