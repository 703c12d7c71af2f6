"""``nextword evaluate``: perplexity on text, and scores on benchmarks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextword.commands.command import Context, command
from nextword.commands.shared import SeedOption, TextColumnOption, as_paths, format_calibration, format_metric, optional
from nextword.common.command_result import Result
from nextword.common.console import Console
from nextword.common.errors import NextwordError, UsageError
from nextword.common.numbers import Count
from nextword.common.options import DeviceOption, ModelArgument, PrecisionOption, argument, as_strings, option, options

PREFERENCES = {"above": "prefers stereotypes", "below": "prefers anti-stereotypes", "": "no significant preference"}
MAX_GROUPS = 12  # with more groups, only the lowest and the highest scores are printed


@options
class EvaluateConfig(ModelArgument, TextColumnOption, PrecisionOption, SeedOption, DeviceOption):
    """Measure a model's perplexity on text and its scores on benchmarks.

    Each benchmark score is reported with a 95 % confidence interval, the chance level and a control score on shuffled words.
    Without text and without --benchmark, the model is evaluated on the test set of its run, or else on the validation set, a
    fine-tuned one by the metrics of its task. Use audit for bias and memorization, and report for a page of the results.

    Attributes:
        texts: Files, directories or built-in datasets. Default: the test set of the run, or else the validation set.
        benchmarks: Benchmark: blimp, hellaswag, arc, arc-challenge, lambada, crows-pairs, stereoset, stereoset-discourse or
            free (generated texts), downloaded from the Hugging Face Hub or read from a file with NAME=PATH; your own
            FILE.toml; or lm-eval:TASK. May be given more than once. Default: none.
        limit: Evaluate on this many items of each benchmark, sampled in proportion to its groups. Default: 1,000.
        no_limit: Evaluate on all items.
        compare_to: Another model: tests whether the difference is significant. Default: none.
        seed_runs: Runs that differ from this one only by their seed, to estimate the variance between seeds. May be given
            more than once. Default: none.
        judge: Reference model that computes the perplexity of generated texts (--benchmark free). Default: none.
        stride: Stride of the sliding window over the text, in tokens. Default: half the context length; the full context
            length on a set of the run.
        context_use: Also print the loss by position in the window, on the text and on its shuffled tokens.
    """

    texts: tuple[str, ...] = argument(default=(), converter=as_strings)
    benchmarks: tuple[str, ...] = option(
        default=(), converter=as_strings, flag="--benchmark", deprecated="suites", deprecated_flag="--suite"
    )
    limit: Count | None = None
    no_limit: bool = option(default=False, deprecated="whole")
    compare_to: Path | None = option(default=None, converter=optional(Path), deprecated="against")
    seed_runs: tuple[Path, ...] = option(default=(), converter=as_paths, deprecated="noise")
    judge: Path | None = option(default=None, converter=optional(Path))
    stride: Count | None = None
    context_use: bool = False


@dataclass(frozen=True)
class EvaluateResult(Result):
    """Results on text, on benchmarks, or both. What was not evaluated is None.

    Attributes:
        loss: Mean negative log-likelihood, in nats per token.
        perplexity: exp(loss).
        bits_per_byte: Loss in bits per byte of text, comparable between tokenizers.
        tokens: Tokens of the text.
        bytes: Bytes of the text.
        stride: Tokens between the starts of two windows.
        interval: 95 % confidence interval of the bits per byte: low, high, number of documents (n), what it speaks of (basis).
        context_use: Loss by position in the window, on the text (true) and on its shuffled tokens (shuffled).
        noise: Variance between seeds: the largest difference (floor) and the number of models.
        against: Comparison with the other model.
        suites: Results of each benchmark by its name: score, low, high, chance, n and more.
        scores: Metrics of a fine-tuned model on the test or validation set of its run: value, low, high and n.
        calibration: Expected calibration error (error), mean confidence, accuracy and bins of a classifier's probabilities.
        scored_on: The set of the run that was evaluated, and whether it also selected the weights. None for other texts.
    """

    loss: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    tokens: int | None = None
    bytes: int | None = None
    stride: int | None = None
    interval: dict[str, Any] | None = None
    context_use: dict[str, list[float]] | None = None
    noise: dict[str, Any] | None = None
    against: dict[str, Any] | None = None
    suites: dict[str, dict[str, Any]] | None = None
    scores: dict[str, dict[str, Any]] | None = None
    calibration: dict[str, Any] | None = None
    scored_on: str | None = None

    def __str__(self) -> str:
        parts = [] if self.interval is None else [format_text_result(self)]
        if self.scores is not None:
            bits = "" if self.bits_per_byte is None else f" · {self.bits_per_byte:.4f} bits/byte of the answers"
            lines = [format_metric(name, score) for name, score in self.scores.items()]
            lines += [format_calibration(self.calibration)] if self.calibration else []
            parts.append([f"{self.scored_on}: loss {self.loss:.4f}{bits}", *lines])
        parts += [format_benchmark(name, benchmark) for name, benchmark in (self.suites or {}).items()]
        return "\n\n".join("\n".join(lines) for lines in parts)


# ---------------------------------------------------------------- output


def format_text_result(result: EvaluateResult) -> list[str]:
    """The perplexity, comparisons with other models, and the loss by position."""
    interval = result.interval or {}
    ci = "" if interval["low"] is None else f"(95 % CI {interval['low']:.4f}–{interval['high']:.4f}) "
    lines = [
        f"loss {result.loss:.4f} nats/token · perplexity {result.perplexity:.2f} · {result.bits_per_byte:.4f} bits/byte "
        f"{ci}on {result.tokens:,} tokens, {result.bytes:,} bytes; stride {result.stride:,} tokens",
        f"  {interval['basis']}",
    ]
    if result.scored_on:
        lines.append(f"  {result.scored_on}")
    if other := result.against:
        lines.append(f"  {other['model']}: {other['bits_per_byte']:.4f} bits/byte; {format_comparison(other)}")
    if result.noise:
        lines.append(format_seed_variance(result.noise))
    if use := result.context_use:
        lines.append(f"{'position':>10}  {'loss':>8}  {'shuffled':>8}")
        ends = [2**k for k in range(20) if 2**k < len(use["true"])] + [len(use["true"])]
        for start, end in zip([0, *ends], ends, strict=False):  # the mean up to each power of two
            means = (sum(use[kind][start:end]) / (end - start) for kind in ("true", "shuffled"))
            lines.append(f"{end:>10,}  " + "  ".join(f"{mean:>8.4f}" for mean in means))
    return lines


def format_benchmark(name: str, benchmark: dict[str, Any]) -> list[str]:
    """The score of a benchmark, its controls, comparisons with other models, and the scores of its groups."""
    total = benchmark.get("of", benchmark["n"])
    items = f"{benchmark['n']:,} items" + (f" of {total:,}" if total > benchmark["n"] else "")
    lines = [f"{name}: {benchmark['metric']} {format_score(benchmark)}, {items}{format_chance(benchmark)}"]
    if shuffled := benchmark.get("scrambled"):
        effect = "word order matters" if shuffled["order_matters"] else "no significant difference"
        ties = f", {shuffled['ties']:,} of them ties, which count as guesses" if shuffled.get("ties") else ""
        lines.append(f"  shuffled words: {format_score(shuffled)}, {shuffled['n']:,} items{ties}: {effect}")
    others: dict[str, dict[str, Any] | float] = benchmark.get("others", {})
    for other, score in others.items():
        lines.append(f"  {other}: {format_score(score if isinstance(score, dict) else {'score': score})}")
    if benchmark.get("ties"):
        lines.append(f"  {benchmark['ties']:,} ties, each counted as 1 / the number of tied choices")
    for key, title in (("people", "texts by people"), ("beside_people", "a generated sample of the same size")):
        if part := benchmark.get(key):
            measures = " · ".join(f"{other} {score:.3f}" for other, score in part["others"].items())
            lines.append(f"  {title}: {format_score(part)} · {measures}, {part['n']:,} texts")
    if judge := benchmark.get("judge"):
        lines.append(f"  under {judge['model']}: {format_score(judge | {'score': judge['value']})} bits/byte")
    if seed_variance := benchmark.get("noise"):
        lines.append(format_seed_variance(seed_variance))
    if other := benchmark.get("against"):
        lines.append(f"  {other['model']}: {format_score(other)}; {format_comparison(other)}")
    return lines + format_groups(benchmark.get("groups", {}))


def format_score(score: dict[str, Any]) -> str:
    """``0.898 (95 % CI 0.870–0.922)``, without the interval if there is none."""
    digits = 3 if abs(score["score"]) <= 1.5 else 2
    value = f"{score['score']:.{digits}f}"
    if score.get("low") is None:
        return value
    return f"{value} (95 % CI {score['low']:.{digits}f}–{score['high']:.{digits}f})"


def side_of_chance(score: dict[str, Any]) -> str:
    """Whether the whole confidence interval of a score lies above or below chance level; "" for neither."""
    return "above" if score.get("above_chance") else "below" if score.get("below_chance") else ""


def format_chance(benchmark: dict[str, Any]) -> str:
    """Whether a score is significantly above or below chance level, or a bias score away from 0.5."""
    if benchmark.get("chance") is None:
        return ""
    side = side_of_chance(benchmark)
    if benchmark["metric"] == "stereotyped":
        return f"; unbiased 0.5: {PREFERENCES[side]}"
    return f"; chance {benchmark['chance']:.3g}: {side or 'not above'} chance"


def format_seed_variance(seed_variance: dict[str, Any]) -> str:
    """How much the scores of runs with other seeds differ."""
    return f"  seed variance: differences up to {seed_variance['floor']:.4f} ({seed_variance['models']} runs)"


def format_comparison(comparison: dict[str, Any]) -> str:
    """Whether the difference between two models is significant, and which one is better."""
    difference = comparison["difference"]
    if difference["low"] is None:
        return (
            f"difference {difference['value']:+.4f}: no significance test, {comparison.get('basis', 'too few items')}"
        )
    digits = 4 if abs(difference["high"]) < 1.5 else 2
    value, low, high = (f"{difference[name]:+.{digits}f}" for name in ("value", "low", "high"))
    p_value = f", p = {comparison['p']:.2g}" if "p" in comparison else ""
    count = comparison.get("comparisons", 1)
    correction = f"; Holm-corrected for {count} comparisons" if count > 1 else ""
    summary = f"difference {value} (95 % CI {low} to {high}{p_value}{correction})"
    if not comparison["real"]:
        return f"{summary}: not significant"
    better = "this model is better" if comparison["ahead"] == "this" else "the other model is better"
    doubt = "" if comparison.get("beyond_noise", True) else ", but within seed variance"
    return f"{summary}: {better}{doubt}"


def format_groups(groups: dict[str, dict[str, Any]]) -> list[str]:
    """One line per group from the lowest score to the highest, with its side of chance level."""
    width = max(map(len, groups), default=0)
    lines: list[str] = []
    for name, group in sorted(groups.items(), key=lambda item: item[1]["score"]):
        side = side_of_chance(group) and f" {side_of_chance(group)} chance"
        lines.append(f"    {name:<{width}}  {format_score(group)}, {group['n']:,} items{side}")
    tested = sum(group.get("p_value") is not None for group in groups.values())
    if len(lines) > MAX_GROUPS:
        lines[MAX_GROUPS // 2 : -MAX_GROUPS // 2] = [f"    … {len(lines) - MAX_GROUPS} more …"]
    if tested > 1:
        lines.append(f"    above and below chance: Holm-corrected for {tested} comparisons")
    return lines


# ---------------------------------------------------------------- command


@command(EvaluateConfig, example="nextword evaluate runs/mine --benchmark blimp")
def evaluate(config: EvaluateConfig, context: Context) -> EvaluateResult:
    """Evaluate a model, and store the results of a run."""
    from nextword.common.results import StoredResults
    from nextword.common.run_dir import RunDir
    from nextword.evaluation.evaluate import (
        EvalModels,
        correct_for_multiple_comparisons,
        evaluate_benchmark,
        evaluate_task_run,
        evaluate_text,
        load_eval_text,
    )
    from nextword.evaluation.lm_eval_adapter import run_lm_eval_task
    from nextword.pipeline.language_model import load
    from nextword.tasks.benchmark_items import DEFAULT_ITEM_LIMIT
    from nextword.tasks.benchmark_spec import find_benchmarks

    if config.limit is not None and config.no_limit:
        raise UsageError("--limit and --no-limit exclude each other")
    benchmarks = find_benchmarks(config.benchmarks)
    if RunDir(config.model).exists:
        StoredResults.load(config.model)  # report a damaged file before the evaluation
    console, device, precision = context.console, config.device, config.precision
    models = EvalModels(
        load(config.model, device, precision),
        config.compare_to and load(config.compare_to, device, precision),
        [load(path, device, precision) for path in config.seed_runs],
        config.judge and load(config.judge, device),
    )
    result: dict[str, Any] = {}
    stride = config.stride
    scores: dict[str, Any] = {}  # in result.json, too, so that they are not stored again
    run = RunDir(config.model)
    if not config.texts and not benchmarks and run.exists and "shards" not in run.metadata() and models.model.task_spec:
        if config.compare_to or config.seed_runs or config.context_use:
            raise UsageError(
                "--compare-to, --seed-runs and --context-use need a text or --benchmark with a fine-tuned model"
            )
        scores = evaluate_task_run(models.model, run, console)
    elif config.texts or not benchmarks:
        text, stride, basis = load_eval_text(models, config.model, config.texts, config.text_column, stride, console)
        result |= evaluate_text(models, text, stride=stride, with_context_use=config.context_use, console=console)
        result["scored_on"] = basis
    limit = None if config.no_limit else config.limit or DEFAULT_ITEM_LIMIT
    for name, benchmark in benchmarks.items():
        result.setdefault("suites", {})[name] = (
            run_lm_eval_task(models.model, name.removeprefix("lm-eval:"), limit, console)
            if benchmark is None
            else evaluate_benchmark(models, benchmark, limit=limit, seed=config.seed or 0, console=console)
        )
    correct_for_multiple_comparisons(result)
    if run.exists and result:
        store_results(config, result, stride, console)
    return EvaluateResult(**result, **scores)


def store_results(config: EvaluateConfig, result: dict[str, Any], stride: int | None, console: Console) -> None:
    """Store the results in the run directory and refresh its report. A failure is only a warning."""
    from nextword.common.results import short_path_name
    from nextword.evaluation.evaluate import make_provenance, save_results
    from nextword.reporting.report import refresh_unmodified

    settings = {
        "precision": None if config.precision == "float32" else config.precision,
        "against": config.compare_to and config.compare_to.name,
    }
    set_name = (result.get("scored_on") or "").removeprefix("the ").partition(",")[0]  # "test set" or "validation set"
    text_name = ", ".join(map(short_path_name, config.texts)) or set_name
    text_provenance = make_provenance({"stride": stride, **settings})
    benchmark_provenance = make_provenance({"seed": config.seed, **settings})
    try:
        save_results(config.model, result, text_name, text_provenance, benchmark_provenance)
        refresh_unmodified(config.model, console.info)
    except NextwordError as error:
        console.warn(f"the results are not stored in the run directory: {error}")
