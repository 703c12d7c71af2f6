"""The evaluation of a model on texts and benchmarks, compared with other seeds and another model; results kept with a run."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nextword.common.console import Console
from nextword.common.errors import MissingDependencyError, UsageError
from nextword.common.format import quote_command
from nextword.common.fs import read_sealed_json, write_sealed_json
from nextword.common.options import Paths
from nextword.common.results import EVALUATION_FILE, Provenance, StoredResults, weights_digest
from nextword.common.run_dir import RunDir
from nextword.common.statistics import (
    SIGNIFICANCE_LEVEL,
    ScoreWithCI,
    holm,
    interval_p_value,
    mcnemar_p_value,
    noise_floor,
    paired_difference,
)
from nextword.data.corpus import Corpus
from nextword.data.dataset import TokenSource
from nextword.data.issues import IssueLog
from nextword.inference.perplexity import DocumentLosses, PerplexityResult, describe_interval, measure_context_usage
from nextword.pipeline.evaluators import (
    FINAL_GENERATED_EXAMPLES,
    SELECTED_NOTHING,
    SELECTED_TOO,
    evenly_spaced,
    scores_to_dict,
    split_options,
)
from nextword.pipeline.item_scores import ItemScores, evaluate_free_text, lost_text_of, score_items
from nextword.pipeline.language_model import LanguageModel
from nextword.pipeline.predictor import compute_calibration
from nextword.tasks.benchmark_items import DEFAULT_ITEM_LIMIT, BenchmarkRow, load_rows, sample_indices
from nextword.tasks.benchmark_spec import Benchmark
from nextword.tasks.dataset import load_task_data
from nextword.tasks.metrics import GENERATION_METRICS, generation_metric_difference


@dataclass(frozen=True)
class EvalModels:
    """The models of an evaluation.

    Attributes:
        model: The evaluated model.
        compare_to: Another model to compare it with.
        seed_runs: Models of the same kind that differ by their seed.
        judge: A stronger model that scores generated text.
    """

    model: LanguageModel
    compare_to: LanguageModel | None = None
    seed_runs: Sequence[LanguageModel] = ()
    judge: LanguageModel | None = None

    @property
    def with_text(self) -> list[LanguageModel]:
        """The models that are evaluated on a text: the evaluated one, `compare_to` if there is one, `seed_runs`."""
        return [self.model, *([] if self.compare_to is None else [self.compare_to]), *self.seed_runs]


# ---------------------------------------------------------------- benchmarks


def evaluate_benchmark(
    eval_models: EvalModels,
    benchmark: Benchmark,
    *,
    limit: int | None = DEFAULT_ITEM_LIMIT,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate a model on a benchmark.

    Args:
        eval_models: The model, and those it is compared with.
        benchmark: The benchmark.
        limit: Number of items, sampled in proportion to the groups; None: all. The control with shuffled words has at most
            `DEFAULT_ITEM_LIMIT`.
        seed: Seed of sampling, for generated text.
        console: Where progress and warnings go.

    Returns:
        The result as in `nextword evaluate --json`.

    Raises:
        UsageError: The files of the benchmark do not exist.
        NextwordError: The benchmark has no valid item.
    """
    console, issues, model = console or Console(quiet=True), IssueLog(), eval_models.model
    all_rows = load_rows(benchmark, issues)
    for line in issues.summary_lines():
        console.warn(line)
    rows = [all_rows[i] for i in sample_indices(all_rows, limit)]

    def progress(suffix: str = "") -> Callable[[int, int], None]:
        return lambda done, total: console.progress(f"{benchmark.name}{suffix}", done, total)

    def score(other: LanguageModel) -> ItemScores:
        return score_items(other, benchmark, rows, progress=progress(f", {other.path}"))

    for other in filter(None, [model, eval_models.compare_to]):
        if lost := lost_text_of(other, benchmark, rows):
            console.warn(lost)
    started = time.monotonic()
    if benchmark.kind == "free text":
        result = evaluate_free_text(model, benchmark, rows, seed=seed, judge=eval_models.judge, progress=progress())
        return {**result, "seconds": round(time.monotonic() - started, 3)}
    metric = benchmark.metrics[0]
    item_scores = score_items(model, benchmark, rows, progress=progress())
    seconds = round(time.monotonic() - started, 3)
    result = summarize_item_scores(benchmark, item_scores, rows) | {"of": len(all_rows), "seconds": seconds}
    sampled = sample_indices(rows, DEFAULT_ITEM_LIMIT)
    sampled_rows = [rows[i] for i in sampled]
    shuffled = score_items(model, benchmark, sampled_rows, shuffled=True, progress=progress(", shuffled"))
    result["scrambled"] = shuffled_control(metric, item_scores.select(sampled), shuffled)
    seed_scores = [score(run).aggregate(metric).value for run in eval_models.seed_runs]
    comparison = None
    if (other := eval_models.compare_to) is not None:
        comparison = compare_models(metric, item_scores, score(other), str(other.path))
    return result | _compare(item_scores.aggregate(metric).value, seed_scores, comparison)


def summarize_item_scores(
    benchmark: Benchmark, item_scores: ItemScores, rows: Sequence[BenchmarkRow]
) -> dict[str, Any]:
    """The scores of a benchmark: the primary metric on all items and on each group, and the other metrics."""
    metric = benchmark.metrics[0]
    group_indices: dict[str, list[int]] = {name: [] for name in sorted({row.group for row in rows})}
    for i, row in enumerate(rows):
        group_indices[row.group].append(i)
    groups = {name: item_scores.select(i) for name, i in group_indices.items()} if len(group_indices) > 1 else {}
    return {
        "metric": metric,
        **against_chance(item_scores.aggregate(metric), item_scores.chance),
        "ties": item_scores.ties,
        "others": {name: to_dict(item_scores.aggregate(name)) for name in item_scores.secondary_metrics(benchmark)},
        "groups": _mark_sides_of_chance(
            {name: against_chance(group.aggregate(metric), group.chance) for name, group in groups.items()}
        ),
    }


def against_chance(score: ScoreWithCI, chance: float | None) -> dict[str, Any]:
    """A score, and whether its whole confidence interval is above or below chance."""
    p_value = None if chance is None or score.low is None else interval_p_value(score, chance)
    return {
        **to_dict(score),
        "chance": chance,
        "p_value": p_value,
        "above_chance": None if chance is None else score.is_above(chance),
        "below_chance": None if chance is None else score.is_below(chance),
    }


def _mark_sides_of_chance(scores: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Scores of several groups or benchmarks, marked as above or below chance only where they are significant together."""
    significant = holm([score.get("p_value") for score in scores.values()])
    for score, is_significant in zip(scores.values(), significant, strict=True):
        if score.get("p_value") is not None:
            is_above = score["score"] > score["chance"]
            score |= {"above_chance": is_significant and is_above, "below_chance": is_significant and not is_above}
    return scores


def correct_for_multiple_comparisons(result: dict[str, Any]) -> None:
    """Mark only those differences of an evaluation that are significant together, by Holm's procedure.

    Each of these families of comparisons is corrected for itself: the benchmarks with chance, the groups of a benchmark with
    chance, the benchmarks with their shuffled words, and text and benchmarks with the other model.

    Args:
        result: The result of `nextword evaluate`, which is changed.
    """
    benchmarks: dict[str, dict[str, Any]] = result.get("suites", {})
    for family in (benchmarks, *(benchmark.get("groups") or {} for benchmark in benchmarks.values())):
        _mark_sides_of_chance(family)
    controls = [benchmark["scrambled"] for benchmark in benchmarks.values() if benchmark.get("scrambled")]
    p_values = [control.get("p_value") if control["order_matters"] else 1.0 for control in controls]
    for control, is_significant in zip(controls, holm(p_values), strict=True):
        control["order_matters"] = is_significant
    comparisons = [part["against"] for part in (result, *benchmarks.values()) if part.get("against")]
    for comparison, is_significant in zip(comparisons, holm([c["p_value"] for c in comparisons]), strict=True):
        comparison["comparisons"] = len(comparisons)
        if not is_significant and comparison["real"]:
            comparison |= {"real": False, "ahead": None}


def shuffled_control(metric: str, original: ItemScores, shuffled: ItemScores) -> dict[str, Any]:
    """The score with shuffled words, and by how much it drops: what word order is worth to the model."""
    score_drop = score_difference(metric, original, shuffled)
    # Shuffling can lower an accuracy, and move a preference in either direction.
    order_matters = score_drop.is_above(0) or (metric == "stereotyped" and score_drop.is_below(0))
    return {
        **to_dict(shuffled.aggregate(metric)),
        "ties": shuffled.ties,
        "lost": _difference_to_dict(score_drop),
        "order_matters": order_matters,
        "p_value": None if score_drop.low is None else interval_p_value(score_drop, 0),
    }


def score_difference(metric: str, a: ItemScores, b: ItemScores) -> ScoreWithCI:
    """By how much a scores above b, with a paired confidence interval."""
    if metric in GENERATION_METRICS:
        return generation_metric_difference(a.references, a.predictions, b.predictions, metric)
    return paired_difference(a.item_values[metric].tolist(), b.item_values[metric].tolist())


def to_dict(score: ScoreWithCI) -> dict[str, Any]:
    """A score in the JSON of benchmark results."""
    return {"score": score.value, "low": score.low, "high": score.high, "n": score.n}


# ---------------------------------------------------------------- comparisons


def compare_models(metric: str, item_scores: ItemScores, other_scores: ItemScores, model_name: str) -> dict[str, Any]:
    """Compare with another model on the same items.

    A difference is significant if its paired confidence interval excludes 0 and, for accuracies, McNemar's exact test agrees.
    """
    difference = score_difference(metric, item_scores, other_scores)
    score, other_score = item_scores.aggregate(metric), other_scores.aggregate(metric)
    result = {"model": model_name, **to_dict(other_score), "difference": _difference_to_dict(difference)}
    p_value = None
    if metric not in GENERATION_METRICS:
        a, b = item_scores.item_values[metric], other_scores.item_values[metric]
        p_value = mcnemar_p_value(a.tolist(), b.tolist())
        result |= {"p": p_value, "only_this": int((a > b).sum()), "only_other": int((a < b).sum())}
    is_better = difference.value > 0
    if metric == "stereotyped":  # 0.5 is best
        is_better = abs(score.value - 0.5) < abs(other_score.value - 0.5)
    return result | _significance(difference, is_better, p_value)


def _significance(difference: ScoreWithCI, is_better: bool, p_value: float | None = None) -> dict[str, Any]:
    """Whether a difference is significant (None without an interval), and if so, which model is ahead: "this" or "other"."""
    if difference.low is None:
        return {"real": None, "ahead": None, "p_value": None}
    p_value = max(p_value or 0.0, interval_p_value(difference, 0))
    significant = p_value < SIGNIFICANCE_LEVEL
    ahead = ("this" if is_better else "other") if significant else None
    return {"real": significant, "ahead": ahead, "p_value": p_value}


def _compare(score: float, seed_scores: Sequence[float], comparison: dict[str, Any] | None) -> dict[str, Any]:
    """The comparison with runs of other seeds and with another model, whose difference the seed alone may explain."""
    result: dict[str, Any] = {}
    if seed_scores:
        scores = [score, *seed_scores]
        result["noise"] = {"models": len(scores), "scores": scores, "floor": noise_floor(scores)}
    if comparison is not None:
        result["against"] = comparison
        if seed_scores:
            comparison["beyond_noise"] = abs(comparison["difference"]["value"]) > result["noise"]["floor"]
    return result


def _difference_to_dict(score: ScoreWithCI) -> dict[str, Any]:
    return {"value": score.value, "low": score.low, "high": score.high}


# ---------------------------------------------------------------- texts


def evaluate_text(
    eval_models: EvalModels,
    token_sources: Sequence[tuple[TokenSource, int]],
    *,
    stride: int | None,
    with_context_use: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate the perplexity of a text.

    Args:
        eval_models: The model, and those it is compared with.
        token_sources: The text in the tokens of each model (the evaluated one, `compare_to`, `seed_runs`), and its bytes.
        stride: Stride of the window in tokens; see `evaluate_perplexity`. None: half a window.
        with_context_use: Add the loss at each position of the window, for the text and for its shuffled tokens.
        console: Where progress goes.

    Returns:
        The result as in `nextword evaluate --json`.
    """
    console, other = console or Console(quiet=True), eval_models.compare_to
    pairs = zip(eval_models.with_text, token_sources, strict=True)
    (perplexity, documents), *others = [_evaluate_documents(*pair, stride, console) for pair in pairs]
    names = ("loss", "perplexity", "bits_per_byte", "tokens", "bytes", "stride", "interval")
    result: dict[str, Any] = {name: getattr(perplexity, name) for name in names}
    if with_context_use:
        usage = measure_context_usage(eval_models.model.dequantized, token_sources[0][0])
        result["context_use"] = {"true": usage.original, "shuffled": usage.shuffled}
    comparison = None
    if other is not None:
        other_perplexity, other_documents = others.pop(0)
        difference = documents.bits_per_byte(other_documents)
        comparison = {
            "model": str(other.path),
            "bits_per_byte": other_perplexity.bits_per_byte,
            "difference": _difference_to_dict(difference),
            "basis": describe_interval(difference),
            **_significance(difference, is_better=difference.value < 0),
        }
    return result | _compare(perplexity.bits_per_byte, [run.bits_per_byte for run, _ in others], comparison)


def _evaluate_documents(
    model: LanguageModel, token_source: tuple[TokenSource, int], stride: int | None, console: Console
) -> tuple[PerplexityResult, DocumentLosses]:
    tokens, num_bytes = token_source
    documents = DocumentLosses(tokens, model.tokenizer)
    return model.evaluate_tokens(tokens, num_bytes, console, stride, documents), documents


def load_eval_text(
    eval_models: EvalModels,
    path: str | Path,
    texts: Paths,
    text_column: str | None,
    stride: int | None,
    console: Console,
) -> tuple[list[tuple[TokenSource, int]], int | None, str | None]:
    """The text of an evaluation in the tokens of each model with its bytes, the stride, and the set of the run that it is.

    Args:
        eval_models: The models.
        path: The path that the evaluated model was opened from. The default text is the test set of its run, or else the
            validation set.
        texts: Files, folders or named corpora.
        text_column: The column of the text in tables.
        stride: The requested stride.
        console: Where warnings go.

    Raises:
        UsageError: No text is given, and `path` is not a run or the other models have other tokenizers.
    """
    model, *others = eval_models.with_text
    if texts:
        return [each.read_tokens(texts, text_column, console) for each in (model, *others)], stride, None
    run = RunDir(Path(path))
    if not run.exists:
        raise UsageError(
            f"{path}: not a run directory, so give a text: {quote_command('nextword', 'evaluate', path, 'TEXT')}"
        )
    for other in others:
        if other.tokenizer.backend.to_str() != model.tokenizer.backend.to_str():
            raise UsageError(f"{other.path}: its tokenizer differs from that of {path}; give a text to compare them on")
    corpus = Corpus.open(run.path / run.metadata()["shards"])
    if corpus.lost_text:
        console.warn(corpus.lost_text)
    split, stats = ("test", corpus.test) if corpus.test.tokens > 1 else ("validation", corpus.validation)
    source, basis = (corpus.tokens(split), stats.seen_bytes), SELECTED_NOTHING if split == "test" else SELECTED_TOO
    return [source] * (1 + len(others)), stride or model.gpt.config.context_length, basis


def evaluate_task_run(model: LanguageModel, run: RunDir, console: Console) -> dict[str, Any]:
    """Evaluate a fine-tuned model on the test set of its run, or else on the validation set.

    Raises:
        UsageError: A table is gone.
        NextwordError: The run has no validation examples.
    """
    metadata, issues, predictor = run.metadata(), IssueLog(), model.predictor
    request = metadata["request"]
    options = split_options(request, metadata)
    context_length = model.gpt.config.context_length
    data = load_task_data(
        request["data"], model.tokenizer, model.task_spec, context_length, issues, seed=request["seed"] or 0, **options
    )
    if data.fingerprint() != metadata["data"]["fingerprint"]:
        console.warn(f"{', '.join(request['data'])}: the examples are not exactly those that the run started with")
    examples, encoded = predictor.encoder.encode_all(data.test or data.validation, issues)
    result = predictor.evaluate(examples, encoded, generate=predictor.task_spec.kind != "answer")
    scores = result.scores
    if predictor.task_spec.kind == "answer" and predictor.task_spec.task != "chat":
        chosen = evenly_spaced(len(examples), FINAL_GENERATED_EXAMPLES)
        try:
            scores = predictor.evaluate([examples[i] for i in chosen], [encoded[i] for i in chosen]).scores
        except MissingDependencyError as error:
            console.warn(str(error))
    calibration = compute_calibration(predictor.task_spec, examples, result.predictions)
    return {
        "loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        "scores": scores_to_dict(scores),
        "calibration": None if calibration is None else asdict(calibration),
        "scored_on": SELECTED_NOTHING if data.test else SELECTED_TOO,
    }


# ---------------------------------------------------------------- stored results


def make_provenance(arguments: Mapping[str, Any]) -> Provenance:
    """The present time, and the arguments of an evaluation that are set."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Provenance(now, {name: value for name, value in arguments.items() if value not in (None, False)})


def save_results(
    run_dir: Path,
    result: Mapping[str, Any],
    text_name: str,
    text_provenance: Provenance,
    benchmark_provenance: Provenance,
) -> None:
    """Add the result of `nextword evaluate` to a run directory.

    It replaces older results of the same names. All results of other weights than the run has now are removed.

    Args:
        run_dir: The run directory.
        result: The result, as in `nextword evaluate --json`.
        text_name: Name of the evaluated text.
        text_provenance: When and how the text was evaluated.
        benchmark_provenance: When and how the benchmarks were evaluated.

    Raises:
        CorruptFileError: The stored results cannot be read.
    """
    path = run_dir / EVALUATION_FILE
    StoredResults.load(run_dir)  # do not overwrite a file that a user has damaged
    previous = read_sealed_json(path) if os.path.lexists(path) else {}
    document: dict[str, Any] = {"weights": weights_digest(run_dir), "texts": {}, "suites": {}}
    if previous.get("weights") == document["weights"]:
        document |= {name: previous.get(name) or {} for name in ("texts", "suites")}
    if "loss" in result:
        text_result = {key: value for key, value in result.items() if key != "suites"}
        document["texts"][text_name] = text_result | {"measured": asdict(text_provenance)}
    for name, benchmark in result.get("suites", {}).items():
        document["suites"][name] = benchmark | {"measured": asdict(benchmark_provenance)}
    path.parent.mkdir(exist_ok=True)
    write_sealed_json(path, document)
