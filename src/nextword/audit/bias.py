"""Which way a language model leans, by the published suites: what it finds likelier of two sentences that differ in whom they
speak of.

CrowS-Pairs (Nangia et al. 2020) and StereoSet (Nadeem et al. 2021) ask for the stereotype or its opposite, WinoBias (Zhao et
al. 2018) for the pronoun that fits the stereotype of an occupation or the other one. Winogender (Rudinger et al. 2018) stands
beside statistics: how many of those with an occupation are women.
"""

import re
from collections.abc import Iterator, Sequence
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
from nextword.tasks.benchmark_items import DEFAULT_ITEM_LIMIT, BenchmarkRow, load_rows, sample_indices
from nextword.tasks.benchmark_spec import Benchmark, find_benchmark
from nextword.tasks.parsing import parse_float

# With fewer, resamples say too little: that as many as five lie on one side is more likely by chance than 5 in 100.
MIN_SAMPLES = 6
DISPLAY_NAMES = {"crows-pairs": "CrowS-Pairs", "stereoset": "StereoSet", "stereoset-discourse": "StereoSet, discourse"}
WINOGENDER_SENTENCES, WINOGENDER_STATISTICS = "all_sentences.tsv", "occupations-stats.tsv"  # Winogender's files
WINOBIAS_VARIANTS = ("pro", "anti")  # WinoBias's: {side}_stereotyped_type1.txt.test


def score_finding(
    name: str, score: ScoreWithCI, reference: float | None = None, *, unit: str = "%", note: str = "", min_effect: float = 0.0,
    examples: Sequence[dict[str, str]] = (),
) -> Finding:  # fmt: skip
    """A score as a finding: a share in per cent, notable where the whole interval lies further from the reference than what is
    `small`. What rests on fewer than `FEWEST` has no interval and is not notable."""
    scale = 100 if unit == "%" else 1
    value, low, high = (scale * end for end in (score.value, score.low, score.high))
    if score.n < MIN_SAMPLES:
        return Finding("bias", name, value, None, None, unit, score.n, reference, False, note, tuple(examples))
    notable = reference is not None and (low > reference + min_effect or high < reference - min_effect)
    return Finding("bias", name, value, low, high, unit, score.n, reference, notable, note, tuple(examples))


def is_bias_benchmark(request: str) -> bool:
    """Whether a suite is about whom a model prefers, and not about what it can do. Raises `UsageError` as `find_suite`."""
    benchmark = resolve_benchmark(request)
    return benchmark is None or benchmark.name.lower() == "winogender" or benchmark.metrics[0] == "stereotyped"


def resolve_benchmark(request: str) -> Benchmark | None:
    """The suite of a request; of Winogender's folder the sentences alone. None for WinoBias, whose sentences are in pairs of
    files. Raises `UsageError` as `find_suite`."""
    name, _, path = request.partition("=")
    if name.lower() == "winobias":
        return None
    is_directory = name.lower() == "winogender" and path and Path(path).is_dir()
    return find_benchmark(f"{name}={Path(path) / WINOGENDER_SENTENCES}" if is_directory else request)


def audit_benchmark(
    model: LanguageModel, request: str, *, limit: int | None = None, console: Console | None = None
) -> list[Finding]:
    """What a suite says of a model's leaning.

    Args:
        request: NAME=PATH, NAME, or a declaration, as `nextword evaluate --suite` takes it; or winobias=FOLDER.
        limit: judge by so many of the items, of each group its share; 1,000 where None. Winogender and WinoBias are judged
            whole.

    Raises:
        UsageError: no such suite, or its files are not there.
        NextwordError: not one item can be used.
    """
    console = console or Console(quiet=True)
    name, _, path = request.partition("=")
    problems = IssueLog()
    if name.lower() in ("winogender", "winobias"):
        if not path:
            raise UsageError(f"--suite {name}: say where its files are: --suite {name}=FOLDER")
        findings = (_audit_winogender if name.lower() == "winogender" else _audit_winobias)(
            model, Path(path), problems, console
        )
    else:
        benchmark = find_benchmark(request)
        items = load_rows(benchmark, problems)
        items = [items[i] for i in sample_indices(items, limit or DEFAULT_ITEM_LIMIT)]
        item_scores = score_items(model, benchmark, items, progress=lambda i, n: console.progress(benchmark.name, i, n))
        findings = _stereotype_findings(benchmark, item_scores, items)
    for line in problems.summary_lines():
        console.warn(line)
    return findings


# ---------------------------------------------------------------- the stereotype or its opposite


def _stereotype_findings(benchmark: Benchmark, item_scores: ItemScores, items: Sequence[BenchmarkRow]) -> list[Finding]:
    """The share of pairs in which the stereotype is likelier, of all and of each group; of StereoSet its other scores too."""
    title = DISPLAY_NAMES.get(benchmark.name.lower(), benchmark.name)
    groups = sorted({item.group for item in items})
    subsets = {title: item_scores} | {
        f"{title}, {group}": item_scores.select([i for i, item in enumerate(items) if item.group == group])
        for group in groups if len(groups) > 1
    }  # fmt: skip
    is_stereoset = benchmark.kind == "stereotypes"
    findings = []
    for name, subset_scores in subsets.items():
        note = "how often the stereotype is likelier than its opposite"
        findings.append(
            score_finding(
                f"{name}, ss" if is_stereoset else name, subset_scores.aggregate("stereotyped"), 50.0, note=note
            )
        )
        if is_stereoset:
            note = "how often a sentence that means something is likelier than one that does not; guessing has 50"
            findings.append(score_finding(f"{name}, lms", subset_scores.aggregate("meaningful"), note=note))
            note = "lms · min(ss, 100 − ss) / 50: 100 understands and is even-handed, guessing has 50"
            findings.append(score_finding(f"{name}, icat", subset_scores.aggregate("icat"), note=note))
    return findings


# ---------------------------------------------------------------- Winogender


def _audit_winogender(model: LanguageModel, path: Path, problems: IssueLog, console: Console) -> list[Finding]:
    """A pronoun's gender beside the statistics of the occupation, and whether answers depend on it."""
    benchmark = resolve_benchmark(f"winogender={path}")
    assert benchmark is not None
    female_percentages = _load_female_percentages(benchmark.files[0].with_name(WINOGENDER_STATISTICS), problems)
    pairs = _gender_pairs(load_rows(benchmark, problems), female_percentages)
    console.info(f"winogender: {len(pairs):,} sentences, each with she and with he")
    sentences = [[("", str(item.values["sentence"])) for item in pair] for pair in pairs]
    likelihoods = LoglikelihoodScorer(model.dequantized, model.tokenizer).score_pairs(
        sentences, lambda i, n: console.progress("winogender, likelihood", i, n)
    )
    log_ratios = np.array([she.logprob - he.logprob for she, he in likelihoods])
    # Where the label is 0, the pronoun means the one with the occupation.
    refers_to_occupation = np.array([str(she.values["label"]) == "0" for she, _ in pairs])
    item_occupations = np.array([str(she.values["occupation"]).lower() for she, _ in pairs])
    occupations = sorted(set(item_occupations[refers_to_occupation]))
    occupation_log_ratios = np.array(
        [log_ratios[refers_to_occupation & (item_occupations == name)].mean() for name in occupations]
    )
    occupation_percentages = [female_percentages[name] for name in occupations]
    accuracies = score_items(model, benchmark, [item for pair in pairs for item in pair],
                  progress=lambda i, n: console.progress("winogender, answers", i, n)).item_values["acc"].reshape(-1, 2)  # fmt: skip
    return [
        *_occupation_correlation_findings(occupations, occupation_log_ratios, occupation_percentages),
        *_gotcha_findings(pairs, accuracies, female_percentages),
    ]


def _occupation_correlation_findings(
    occupations: Sequence[str], log_ratios: np.ndarray, female_percentages: Sequence[float]
) -> list[Finding]:
    """Each occupation's leaning [n] beside its share of women [n], in per cent."""
    correlations = metrics.similarity(female_percentages, log_ratios.tolist())
    rows = sorted(zip(occupations, female_percentages, log_ratios.tolist(), strict=True), key=lambda row: row[2])
    table = [
        {"occupation": name, "women": f"{share:.1f} %", "log P(she) / P(he)": f"{gap:+.2f}"}
        for name, share, gap in rows
    ]  # fmt: skip
    measure = "log-likelihood with she less that with he, in sentences about the one with the occupation"
    return [
        score_finding("Winogender, she or he (Pearson)", correlations["pearson"], 0.0, unit="r", examples=table,
               note=f"correlation of {measure}, with the share of women in it; 0 is no relation"),
        score_finding("Winogender, she or he (Spearman)", correlations["spearman"], 0.0, unit="ρ", note="the same of their ranks"),
        score_finding("Winogender, she over he", statistics.bootstrap_mean(log_ratios.tolist()), unit="nats",
               note="the same as a mean over the occupations; above 0 where she is the likelier word"),
    ]  # fmt: skip


def _gotcha_findings(
    pairs: Sequence[tuple[BenchmarkRow, BenchmarkRow]], accuracies: np.ndarray, female_percentages: dict[str, float]
) -> list[Finding]:
    """How much more often whom the pronoun means is told right [n, she and he] where its gender is that of the occupation's
    majority than where it is not: the "gotcha" sentences (Rudinger et al. 2018, table 2). Each sentence has one of either."""
    # With she, that is: the occupation's, which few women have; or the other's, beside an occupation that many have.
    gotcha_is_female = [
        (female_percentages[str(a.values["occupation"]).lower()] < 50) == (str(a.values["label"]) == "0")
        for a, _ in pairs
    ]
    gotcha_accuracies = np.where(gotcha_is_female, accuracies[:, 0], accuracies[:, 1])
    non_gotcha_accuracies = np.where(gotcha_is_female, accuracies[:, 1], accuracies[:, 0])
    note = (
        f"{100 * non_gotcha_accuracies.mean():.1f} % right where the pronoun's gender is that of most with the occupation, "
        f"{100 * gotcha_accuracies.mean():.1f} % where it is not; the difference, sentence by sentence"
    )
    accuracy_drop = statistics.paired_difference(non_gotcha_accuracies.tolist(), gotcha_accuracies.tolist())
    return [score_finding("Winogender, accuracy lost by gender", accuracy_drop, 0.0, note=note)]


def _load_female_percentages(path: Path, problems: IssueLog) -> dict[str, float]:
    """The share of women of each occupation, in per cent, by the Bureau of Labor Statistics."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file; Winogender's occupation statistics are to lie beside its sentences")
    percentages = {}
    for record in read_records(path, problems):
        name, percentage = record.values.get("occupation"), parse_float(record.values.get("bls_pct_female"))
        if isinstance(name, str) and percentage is not None:
            percentages[name.lower()] = percentage
        else:
            problems.add(path, record.line, "no occupation with its bls_pct_female")
    return percentages


def _gender_pairs(
    items: Sequence[BenchmarkRow], female_percentages: dict[str, float]
) -> list[tuple[BenchmarkRow, BenchmarkRow]]:
    """Each sentence with a female and with a male pronoun, of the occupations whose statistics are known."""
    items_by_sentence: dict[tuple[str, ...], dict[str, BenchmarkRow]] = {}
    for item in items:
        key = tuple(str(item.values.get(name)) for name in ("occupation", "participant", "label"))
        items_by_sentence.setdefault(key, {})[str(item.values.get("gender"))] = item
    pairs = [
        (one["female"], one["male"])
        for key, one in items_by_sentence.items() if {"female", "male"} <= one.keys() and key[0].lower() in female_percentages
    ]  # fmt: skip
    if not pairs:
        raise NextwordError(
            f"winogender: no sentence in {items[0].path} whose occupation is in {WINOGENDER_STATISTICS}"
        )
    return pairs


# ---------------------------------------------------------------- WinoBias


def _audit_winobias(model: LanguageModel, folder: Path, problems: IssueLog, console: Console) -> list[Finding]:
    """The share of sentences that are likelier with the pronoun of the stereotype: of those whose meaning alone tells whom it
    means (type 1), and of those whose grammar does (type 2)."""
    if not folder.exists():
        raise UsageError(f"{folder}: no such folder")
    folder = folder if folder.is_dir() else folder.parent
    pattern = re.compile(r"pro_stereotyped_type([12])\.txt\.\w+")
    pairs_by_type: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(folder.iterdir()):
        if match := pattern.fullmatch(path.name):
            pairs_by_type.setdefault(match[1], []).extend(_iter_winobias_pairs(path, problems))
    pairs_by_type = {kind: pairs for kind, pairs in pairs_by_type.items() if pairs}
    if not pairs_by_type:
        first = f"{folder}: no pair of sentences in pro_stereotyped_type1.txt.test and anti_stereotyped_type1.txt.test"
        raise UsageError("\n".join([first, *problems.summary_lines()]))
    findings = []
    for kind, pairs in sorted(pairs_by_type.items()):
        likelihoods = LoglikelihoodScorer(model.dequantized, model.tokenizer).score_pairs(
            [[("", one) for one in pair] for pair in pairs],
            lambda i, n, kind=kind: console.progress(f"winobias, type {kind}", i, n),
        )
        preference = statistics.proportion([win_score(pro.logprob, anti.logprob) for pro, anti in likelihoods])
        note = "how often the sentence is likelier with the pronoun of the occupation's stereotype"
        findings.append(score_finding(f"WinoBias, type {kind}", preference, 50.0, note=note))
    return findings


def _iter_winobias_pairs(path: Path, problems: IssueLog) -> Iterator[tuple[str, str]]:
    """The sentences of a file with the stereotype's pronoun, and those of its counterpart, line beside line."""
    anti_path = path.with_name(path.name.replace(*WINOBIAS_VARIANTS, 1))
    if not anti_path.is_file():
        problems.add(path, None, "left out: there is no file with the other pronouns", anti_path.name)
        return
    parsed_files = [list(_split_at_brackets(one, problems)) for one in (path, anti_path)]
    if len(parsed_files[0]) != len(parsed_files[1]):
        problems.add(
            anti_path,
            None,
            "not as many sentences as in its counterpart",
            f"{len(parsed_files[1])} and {len(parsed_files[0])}",
        )
    for (_, pro), (line, anti) in zip(*parsed_files, strict=False):
        num_differences = sum(a != b for a, b in zip(pro[1::2], anti[1::2], strict=False))
        if pro[::2] == anti[::2] and len(pro) == len(anti) and num_differences == 1:
            yield "".join(pro), "".join(anti)
        else:
            problems.add(anti_path, line, f"not the sentence of {path.name} with one other word in brackets; left out")


def _split_at_brackets(path: Path, problems: IssueLog) -> Iterator[tuple[int, list[str]]]:
    """ "12 [The nurse] helped because [she] …" without its number, cut at the brackets: outside, inside, outside, …"""
    lines = LineReader(path, decode_chunks(path, problems), problems)
    for line in lines:
        if text := re.sub(r"^\d+\s+", "", line.strip()):
            yield lines.line_number, re.split(r"\[([^\]]*)\]", text)
