"""What a model makes of a suite's items: how each is marked, by likelihood or by what the model writes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from nextword.inference.engine import Completion, Engine, Prompt
from nextword.inference.loglikelihood import ContinuationScore, LoglikelihoodScorer
from nextword.inference.sampling import Sampling
from nextword.pipeline.language_model import Model
from nextword.tasks import metrics
from nextword.tasks.benchmark_items import BenchmarkRow, LoglikelihoodItem, generation_item, loglikelihood_item
from nextword.tasks.benchmark_spec import Benchmark
from nextword.tasks.metrics import Score
from nextword.tasks.text_diversity import distinct_n, repeated_ngram_fraction, split_words

GENERATION_BATCH_SIZE = 32  # texts that are written side by side
DEFAULT_NUM_TEXTS = 64  # of the model's own, where no prompts are given
GENERATION_METRICS = ("chrf", "bleu", "rouge1", "rouge2", "rougeL")  # scores from 0 to 100; all others go from 0 to 1

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class ItemScores:
    """A model's items, marked.

    Attributes:
        values: a number an item [n], by the name of the score that they are averaged to.
        chance: what guessing would score by the first of them; None where nothing can be guessed.
        guesses: the same for each item [n], where items differ.
        ties: items of which several answers were exactly equally likely; each counts its share.
        texts, references: what was written, and what should be.
    """

    item_values: dict[str, np.ndarray]
    chance: float | None = None
    item_chance: np.ndarray | None = None
    ties: int = 0
    predictions: list[str] = field(default_factory=list)
    references: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def num_items(self) -> int:
        return len(self.predictions) or len(next(iter(self.item_values.values())))

    def select(self, indices: Sequence[int] | np.ndarray) -> "ItemScores":
        """Those of some of the items."""
        chosen = np.asarray(indices, dtype=np.int64)
        values = {name: value[chosen] for name, value in self.item_values.items()}
        selected = replace(self, values=values)
        if self.item_chance is not None:
            item_chance = self.item_chance[chosen]
            selected = replace(selected, guesses=item_chance, chance=float(item_chance.mean()))
        if self.predictions:
            texts, references = [self.predictions[i] for i in indices], [self.references[i] for i in indices]
            selected = replace(selected, texts=texts, references=references)
        return selected

    def aggregate(self, metric: str) -> Score:
        """A score of all items, with its interval."""
        if metric in GENERATION_METRICS:
            return metrics.generation_metrics(self.references, self.predictions, [metric])[metric]
        if metric == "perplexity":
            nats = np.stack([self.item_values["nats"], np.ones(self.num_items)], axis=1)
            return metrics.bootstrap_ratio(nats, lambda sums: np.exp(np.minimum(sums[:, 0] / sums[:, 1], 700)))
        if metric == "icat":
            both = [self.item_values["stereotyped"], self.item_values["meaningful"], np.ones(self.num_items)]
            return metrics.bootstrap_ratio(np.stack(both, axis=1), _icat)
        return metrics.proportion(self.item_values[metric].tolist())

    def secondary_metrics(self, benchmark: Benchmark) -> list[str]:
        """The scores there are beside the one that counts."""
        more = {"cloze": ["perplexity"], "stereotypes": ["meaningful", "icat"]}
        return [*benchmark.metrics[1:], *more.get(benchmark.kind, [])]


def score_items(
    model: Model,
    benchmark: Benchmark,
    items: Sequence[BenchmarkRow],
    *,
    shuffled: bool = False,
    progress: ProgressCallback | None = None,
) -> ItemScores:
    """Put a suite's items to a model.

    Args:
        scrambled: with the words in another order; see `question_of`.
    """
    if benchmark.kind == "writing":
        return _score_generations(model, benchmark, items, shuffled, progress)
    questions = [loglikelihood_item(benchmark, item, shuffled) for item in items]
    continuation_scores = LoglikelihoodScorer(
        model.dequantized, model.tokenizer, check_greedy=benchmark.kind == "cloze"
    ).score_pairs([question.requests for question in questions], progress)
    if benchmark.kind == "cloze":
        values = {"acc": np.array([float(one.is_greedy) for [one] in continuation_scores])}
        values["nats"] = np.array([-one.logprob for [one] in continuation_scores])
        item_chance = np.array([float(model.gpt.config.vocab_size) ** -one.num_tokens for [one] in continuation_scores])
        return ItemScores(values, float(item_chance.mean()), item_chance)
    if benchmark.kind == "stereotypes":
        each = [
            [one.logprob / one.num_tokens for one in likely] for likely in continuation_scores
        ]  # as StereoSet's authors compare GPT-2's
        stereotyped = np.array([win_score(one, other) for one, other, _ in each])
        meaningful = np.array([(win_score(a, none) + win_score(b, none)) / 2 for a, b, none in each])
        return ItemScores({"stereotyped": stereotyped, "meaningful": meaningful}, chance=0.5)
    values = {name: np.array([_item_accuracy(name, q, likely) for q, likely in zip(questions, continuation_scores, strict=True)])
              for name in benchmark.metrics}  # fmt: skip
    ties = sum(_is_max([one.logprob for one in likely]).sum() > 1 for likely in continuation_scores)
    item_chance = np.array([1 / len(question.requests) for question in questions])
    return ItemScores(values, float(item_chance.mean()), item_chance, ties=int(ties))


def win_score(score: float, other_score: float) -> float:
    """1 where one is larger, 0 where the other is, and half where they are equal."""
    return (1 + (score > other_score) - (score < other_score)) / 2


def _item_accuracy(metric: str, question: LoglikelihoodItem, continuation_scores: Sequence[ContinuationScore]) -> float:
    """1 where the right answer is the likeliest, by lm-eval's rules: of all its tokens ("acc"), per character ("acc_norm"),
    per byte ("acc_bytes"). Answers that are exactly equally likely share it; lm-eval gives it to the first."""
    sizes = {"acc_norm": [len(answer) for answer in question.choices]}
    sizes["acc_bytes"] = [len(answer.encode("utf-8", "replace")) for answer in question.choices]
    best = _is_max(
        [
            one.logprob / size
            for one, size in zip(continuation_scores, sizes.get(metric, [1] * len(continuation_scores)), strict=True)
        ]
    )
    return float(best[question.gold_index]) / float(best.sum())


def _is_max(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values) == max(values)


def _icat(sums: np.ndarray) -> np.ndarray:
    """lms · min(ss, 1 − ss) / 0.5 from the sums [R, 3] of stereotyped, meaningful and 1 (Nadeem et al. 2021, section 6)."""
    stereotyped, meaningful = sums[:, 0] / sums[:, 2], sums[:, 1] / sums[:, 2]
    return meaningful * np.minimum(stereotyped, 1 - stereotyped) / 0.5


# ---------------------------------------------------------------- what is written


def _score_generations(
    model: Model, benchmark: Benchmark, items: Sequence[BenchmarkRow], shuffled: bool, progress: ProgressCallback | None
) -> ItemScores:
    """Answers in words, always the likeliest token. Chance is what they score as answers to the next item."""
    generation_items = [generation_item(benchmark, item, shuffled) for item in items]
    sampling = Sampling(temperature=0.0, max_tokens=benchmark.max_tokens, stop=benchmark.stop)
    texts = generate_texts(model, [one.prompt for one in generation_items], sampling, progress)
    item_scores = _exact_match_scores(benchmark, texts, [one.references for one in generation_items])
    if len(items) < 2:
        return item_scores
    mismatched_scores = _exact_match_scores(
        benchmark, texts, [generation_items[i - 1].references for i in range(len(generation_items))]
    )
    return ItemScores(
        item_scores.item_values,
        chance=mismatched_scores.aggregate(benchmark.metrics[0]).value,
        predictions=texts,
        references=item_scores.references,
    )


def _exact_match_scores(benchmark: Benchmark, texts: list[str], references: list[tuple[str, ...]]) -> ItemScores:
    exact = [
        float(any(text.strip() == one.strip() for one in several))
        for text, several in zip(texts, references, strict=True)
    ]
    return ItemScores({"exact_match": np.array(exact)}, predictions=texts, references=references)


def generate_texts(
    model: Model, prompts: Sequence[str], sampling: Sampling, progress: ProgressCallback | None = None
) -> list[str]:
    """What a model goes on with after each prompt; of a long one the end is read, so that there is room for the text."""
    return [one.text for one in generate_completions(model, prompts, sampling, progress)]


def generate_completions(
    model: Model, prompts: Sequence[Prompt], sampling: Sampling, progress: ProgressCallback | None = None
) -> list[Completion]:
    """The same as completions, of prompts that are texts or tokens."""
    max_prompt_tokens = max(1, model.gpt.config.context_length - sampling.max_tokens)
    begin = [] if model.tokenizer.bos_id is None else [model.tokenizer.bos_id]
    encoded_prompts = [
        model.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts
    ]
    ids = [[*begin, *one][-max_prompt_tokens:] for one in encoded_prompts]
    engine = Engine(
        model.gpt, model.tokenizer, max_batch=GENERATION_BATCH_SIZE, seed=sampling.seed or 0, runner=model.runner
    )
    completions: list[Completion] = []
    for start in range(0, len(ids), GENERATION_BATCH_SIZE):
        # Other draws for each group of texts than for the one before.
        batch_sampling = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + start)
        completions += engine.generate(ids[start : start + GENERATION_BATCH_SIZE], batch_sampling)
        if progress is not None:
            progress(len(completions), len(ids))
    return completions


def evaluate_free_text(
    model: Model, benchmark: Benchmark, items: Sequence[BenchmarkRow], *, seed: int, judge: Model | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, object]:  # fmt: skip
    """How much a model's own texts repeat themselves, beside what people wrote where the items have it.

    Args:
        items: what it goes on from; nothing, that is a new document, where there are none.
        judge: a stronger model, under which the texts' bits per byte are told.
    """
    generation_items = [generation_item(benchmark, item) for item in items]
    prompts = [one.prompt for one in generation_items] or [""] * DEFAULT_NUM_TEXTS
    sampling = Sampling(max_tokens=benchmark.max_tokens, seed=seed)
    texts = generate_texts(model, prompts, sampling, progress)
    generated_words = [split_words(text) for text in texts]
    result: dict[str, object] = {
        **_repetition_scores(generated_words), "chance": None, "above_chance": None, "temperature": sampling.temperature,
        "max_tokens": benchmark.max_tokens, "examples": texts[:3],
    }  # fmt: skip
    human_and_generated = [
        (split_words(one.references[0]), text)
        for one, text in zip(generation_items, generated_words, strict=False)
        if one.references
    ]
    if (
        human_and_generated
    ):  # as many words of the one as of the other, since shares of distinct n-grams fall with the amount
        result["people"] = _repetition_scores([theirs[: len(text)] for theirs, text in human_and_generated])
        result["beside_people"] = _repetition_scores([text[: len(theirs)] for theirs, text in human_and_generated])
    if judge is not None and any(texts):
        result["judge"] = {"model": str(judge.path), **_bits_per_byte(judge, prompts, texts).to_dict()}
    return result


def _repetition_scores(texts: Sequence[Sequence[str]]) -> dict[str, object]:
    score = metrics.bootstrap_mean([repeated_ngram_fraction(text, 4) for text in texts])
    return {
        "metric": "repeated_4grams", "score": score.value, "low": score.low, "high": score.high, "n": score.n,
        "others": {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)},
    }  # fmt: skip


def _bits_per_byte(judge: Model, prompts: Sequence[str], texts: Sequence[str]) -> Score:
    """Bits per byte of texts, each after its prompt, under a model: of all of them together."""
    prompts_and_texts = [(prompt, text) for prompt, text in zip(prompts, texts, strict=True) if text]
    found = LoglikelihoodScorer(judge.dequantized, judge.tokenizer).score_pairs([[one] for one in prompts_and_texts])
    counts = np.array([[-one.logprob / math.log(2), len(text.encode("utf-8", "replace"))]
                       for [one], (_, text) in zip(found, prompts_and_texts, strict=True)])  # fmt: skip
    return metrics.bootstrap_ratio(counts, lambda sums: sums[:, 0] / sums[:, 1])
