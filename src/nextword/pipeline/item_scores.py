"""The scores of a model on the items of a benchmark, by log-likelihood or by generated text."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np

from nextword.common.statistics import ScoreWithCI, mean, proportion, ratio_of_sums, statistic_of_sums
from nextword.common.text_units import split_words
from nextword.inference.engine import Completion, Engine, Prompt
from nextword.inference.loglikelihood import ContinuationScore, LoglikelihoodScorer, ProgressCallback
from nextword.inference.sampling import Sampling
from nextword.pipeline.language_model import LanguageModel
from nextword.pipeline.predictor import GENERATION_BATCH_SIZE, generate_in_batches
from nextword.tasks.benchmark_items import (
    BenchmarkRow,
    GenerationItem,
    LoglikelihoodItem,
    generation_item,
    loglikelihood_item,
)
from nextword.tasks.benchmark_spec import Benchmark
from nextword.tasks.metrics import (
    GENERATION_METRICS,
    distinct_n,
    generation_metrics,
    repeated_ngram_fraction,
)

DEFAULT_NUM_TEXTS = 64  # texts generated without prompts
# The length that the log-likelihood of a choice is divided by, by metric.
_CHOICE_LENGTHS: dict[str, Callable[[str], int]] = {
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode("utf-8", "replace")),
}


@dataclass(frozen=True)
class ItemScores:
    """The scores of a model on each item of a benchmark.

    Attributes:
        item_values: Values [n] whose mean is a metric, by metric name.
        chance: The primary metric of random guessing; None if there is no such baseline.
        item_chance: The same for each item [n], if items differ.
        ties: Number of items with several equally likely best answers, which share the credit.
        predictions: Generated texts.
        references: References of the generated texts.
    """

    item_values: dict[str, np.ndarray]
    chance: float | None = None
    item_chance: np.ndarray | None = None
    ties: int = 0
    predictions: list[str] = field(default_factory=list[str])
    references: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])

    def select(self, indices: Sequence[int]) -> "ItemScores":
        """The scores of some of the items."""
        selected = np.asarray(indices, dtype=np.int64)
        item_chance = None if self.item_chance is None else self.item_chance[selected]
        return replace(
            self,
            item_values={name: values[selected] for name, values in self.item_values.items()},
            item_chance=item_chance,
            chance=self.chance if item_chance is None else float(item_chance.mean()),
            predictions=[self.predictions[i] for i in indices] if self.predictions else [],
            references=[self.references[i] for i in indices] if self.references else [],
        )

    def aggregate(self, metric: str) -> ScoreWithCI:
        """A metric over all items, with its confidence interval."""
        if metric in GENERATION_METRICS:
            return generation_metrics(self.references, self.predictions, [metric])[metric]
        if metric == "perplexity":
            return mean(self.item_values["nats"]).transform(lambda nats: math.exp(min(nats, 700)))
        if metric == "icat":
            values = self.item_values["stereotyped"], self.item_values["meaningful"]
            return statistic_of_sums(np.stack([*values, np.ones_like(values[0])], axis=1), _icat)
        return proportion(self.item_values[metric].tolist())

    def secondary_metrics(self, benchmark: Benchmark) -> list[str]:
        """The metrics besides the primary one."""
        extra = {"cloze": ["perplexity"], "stereotypes": ["meaningful", "icat"]}
        return [*benchmark.metrics[1:], *extra.get(benchmark.kind, [])]


def score_items(
    model: LanguageModel,
    benchmark: Benchmark,
    rows: Sequence[BenchmarkRow],
    *,
    shuffled: bool = False,
    progress: ProgressCallback | None = None,
) -> ItemScores:
    """Score a model on the rows of a benchmark.

    Args:
        model: The model.
        benchmark: The benchmark; not of the kind "free text" (see `evaluate_free_text`).
        rows: Rows of the benchmark.
        shuffled: Shuffle the words; see `loglikelihood_item`.
        progress: Called with the number of scored requests and of all requests.
    """
    if benchmark.kind == "writing":
        return _score_generations(model, benchmark, rows, shuffled, progress)
    items = [loglikelihood_item(benchmark, row, shuffled) for row in rows]
    scorer = LoglikelihoodScorer(model.dequantized, model.tokenizer, check_greedy=benchmark.kind == "cloze")
    scores = scorer.score_pairs([item.requests for item in items], progress)
    if benchmark.kind == "cloze":
        greedy = np.array([float(score.is_greedy) for [score] in scores])
        values = {"acc": greedy, "nats": np.array([-score.logprob for [score] in scores])}
        item_chance = np.array([float(model.gpt.config.vocab_size) ** -score.num_tokens for [score] in scores])
        return ItemScores(values, float(item_chance.mean()), item_chance)
    if benchmark.kind == "stereotypes":
        # Log-likelihood per token, as the authors of StereoSet compare GPT-2's.
        means = [[score.logprob / score.num_tokens for score in item_scores] for item_scores in scores]
        stereotyped = np.array([win_score(stereotype, anti) for stereotype, anti, _ in means])
        meaningful = np.array([(win_score(a, unrelated) + win_score(b, unrelated)) / 2 for a, b, unrelated in means])
        return ItemScores({"stereotyped": stereotyped, "meaningful": meaningful}, chance=0.5)
    values = {
        name: np.array([_item_accuracy(name, *pair) for pair in zip(items, scores, strict=True)])
        for name in benchmark.metrics
    }
    ties = sum(int(_is_max([score.logprob for score in item_scores]).sum() > 1) for item_scores in scores)
    item_chance = np.array([1 / len(item.requests) for item in items])
    return ItemScores(values, float(item_chance.mean()), item_chance, ties)


def lost_text_of(model: LanguageModel, benchmark: Benchmark, rows: Sequence[BenchmarkRow]) -> str:
    """What the tokenizer of a model cannot represent in the items of a benchmark, for the user; "" if nothing."""
    if benchmark.kind in ("writing", "free text"):
        texts = [[item.prompt] for item in (generation_item(benchmark, row) for row in rows)]
    else:
        items = [loglikelihood_item(benchmark, row) for row in rows]
        texts = [["".join(request) for request in item.requests] for item in items]
    return describe_lost_text(model, benchmark.name, texts)


def describe_lost_text(model: LanguageModel, name: str, texts: Sequence[Sequence[str]]) -> str:
    """What the tokenizer of a model cannot represent in the texts of each item, for the user; "" if nothing."""
    lost = ["".join(model.tokenizer.lost_text(of_item)) for of_item in texts]
    if not any(lost):
        message = model.tokenizer.form_message(list(chain.from_iterable(texts)))
        return message and f"{name}: {message}"
    return (
        f"{name}: the tokenizer cannot represent part of {sum(map(bool, lost)):,} of {len(lost):,} items, "
        f"which are scored without it, such as {''.join(lost)[:8]!r}"
    )


def win_score(score: float, other_score: float) -> float:
    """1 if the score is greater than the other, 0 if it is less, 0.5 for a tie."""
    return (1 + (score > other_score) - (score < other_score)) / 2


def _item_accuracy(metric: str, item: LoglikelihoodItem, scores: Sequence[ContinuationScore]) -> float:
    """1 if the correct choice has the greatest log-likelihood.

    "acc" compares totals, "acc_norm" values per character, "acc_bytes" values per byte, as lm-eval does. Ties share the credit;
    lm-eval gives it to the first choice.
    """
    length = _CHOICE_LENGTHS.get(metric, lambda _: 1)
    is_best = _is_max([score.logprob / length(choice) for score, choice in zip(scores, item.choices, strict=True)])
    return float(is_best[item.gold_index]) / float(is_best.sum())


def _is_max(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values) == max(values)


def _icat(sums: np.ndarray) -> np.ndarray:
    """lms · min(ss, 1 − ss) / 0.5 from the sums [R, 3] of stereotyped, meaningful and 1 (Nadeem et al. 2021, section 6)."""
    stereotyped, meaningful = sums[:, 0] / sums[:, 2], sums[:, 1] / sums[:, 2]
    return meaningful * np.minimum(stereotyped, 1 - stereotyped) / 0.5


# ---------------------------------------------------------------- generated text


def _score_generations(
    model: LanguageModel,
    benchmark: Benchmark,
    rows: Sequence[BenchmarkRow],
    shuffled: bool,
    progress: ProgressCallback | None,
) -> ItemScores:
    """Scores of greedy answers. Chance is their score as answers to the next item."""
    items = [generation_item(benchmark, row, shuffled) for row in rows]
    sampling = Sampling(temperature=0.0, max_tokens=benchmark.max_tokens, stop=benchmark.stop)
    completions = generate_completions(model, [item.prompt for item in items], sampling, progress)
    predictions = [completion.text for completion in completions]
    scores = _exact_match_scores(predictions, items)
    if len(items) < 2:
        return scores
    mismatched = _exact_match_scores(predictions, [items[-1], *items[:-1]])
    return replace(scores, chance=mismatched.aggregate(benchmark.metrics[0]).value)


def _exact_match_scores(predictions: list[str], items: Sequence[GenerationItem]) -> ItemScores:
    references = [item.references for item in items]
    exact = [float(text.strip() in map(str.strip, entry)) for text, entry in zip(predictions, references, strict=True)]
    return ItemScores({"exact_match": np.array(exact)}, predictions=predictions, references=references)


def generate_completions(
    model: LanguageModel, prompts: Sequence[Prompt], sampling: Sampling, progress: ProgressCallback | None = None
) -> list[Completion]:
    """The completions of prompts that are texts or token ids. Long prompts are truncated at the start."""
    max_prompt_tokens = max(1, model.gpt.config.context_length - sampling.max_tokens)
    token_ids = [model.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    token_ids = [[*model.tokenizer.bos_ids, *ids][-max_prompt_tokens:] for ids in token_ids]
    seed = sampling.seed or 0
    engine = Engine(model.gpt, model.tokenizer, max_batch=GENERATION_BATCH_SIZE, seed=seed, runner=model.runner)
    return generate_in_batches(engine, token_ids, sampling, progress)


def evaluate_free_text(
    model: LanguageModel,
    benchmark: Benchmark,
    rows: Sequence[BenchmarkRow],
    *,
    seed: int,
    judge: LanguageModel | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """How repetitive the generated text of a model is, compared with human text if the rows have it.

    Args:
        model: The model.
        benchmark: A benchmark of the kind "free text".
        rows: Rows with prompts or texts; if there are none, the model generates new documents.
        seed: Seed of sampling.
        judge: A stronger model; adds the bits per byte of the generated text under it.
        progress: Called with the number of generated texts and of all texts.

    Returns:
        The result as in `nextword evaluate --json`.
    """
    items = [generation_item(benchmark, row) for row in rows] or [GenerationItem("", ())] * DEFAULT_NUM_TEXTS
    prompts = [item.prompt for item in items]
    sampling = Sampling(max_tokens=benchmark.max_tokens, seed=seed)
    texts = [completion.text for completion in generate_completions(model, prompts, sampling, progress)]
    generated_words = list(map(split_words, texts))
    result: dict[str, Any] = {
        **_repetition_scores(generated_words),
        "chance": None,
        "above_chance": None,
        "temperature": sampling.temperature,
        "max_tokens": benchmark.max_tokens,
        "examples": texts[:3],
    }
    pairs = zip(items, generated_words, strict=True)
    human_and_generated = [(split_words(item.references[0]), words) for item, words in pairs if item.references]
    if human_and_generated:  # texts of equal length, because the ratio of distinct n-grams falls with the length
        result["people"] = _repetition_scores([human[: len(words)] for human, words in human_and_generated])
        result["beside_people"] = _repetition_scores([words[: len(human)] for human, words in human_and_generated])
    if judge is not None and any(texts):
        result["judge"] = {"model": str(judge.path), **_bits_per_byte(judge, prompts, texts).to_dict()}
    return result


def _repetition_scores(texts: Sequence[Sequence[str]]) -> dict[str, Any]:
    score = proportion([repeated_ngram_fraction(words, 4) for words in texts]).to_dict()
    distinct = {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)}
    return {"metric": "repeated_4grams", "score": score.pop("value"), **score, "others": distinct}


def _bits_per_byte(judge: LanguageModel, prompts: Sequence[str], texts: Sequence[str]) -> ScoreWithCI:
    """Bits per byte of all texts together, each after its prompt, under a model."""
    pairs = [(prompt, text) for prompt, text in zip(prompts, texts, strict=True) if text]
    scores = LoglikelihoodScorer(judge.dequantized, judge.tokenizer).score_pairs([[pair] for pair in pairs])
    bits = [-score.logprob / math.log(2) for [score] in scores]
    lost = judge.tokenizer.lost_text([text for _, text in pairs])
    num_bytes = [
        len(text.encode("utf-8", "replace")) - len(part.encode()) for (_, text), part in zip(pairs, lost, strict=True)
    ]
    return ratio_of_sums(bits, num_bytes)
