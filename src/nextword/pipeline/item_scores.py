"""What a model makes of a suite's items: how each is marked, by likelihood or by what the model writes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from nextword.inference.engine import Completion, Engine, Prompt
from nextword.inference.loglikelihood import Likely, Scorer
from nextword.inference.sampling import Sampling
from nextword.pipeline.language_model import Model
from nextword.tasks import metrics
from nextword.tasks.benchmark_items import Item, Question, question_of, wanted_of
from nextword.tasks.benchmark_spec import Suite
from nextword.tasks.metrics import Score
from nextword.tasks.text_diversity import distinct, repeated, words

AT_ONCE = 32  # texts that are written side by side
TEXTS = 64  # of the model's own, where no prompts are given
WRITTEN = ("chrf", "bleu", "rouge1", "rouge2", "rougeL")  # scores from 0 to 100; all others go from 0 to 1

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Marks:
    """A model's items, marked.

    Attributes:
        values: a number an item [n], by the name of the score that they are averaged to.
        chance: what guessing would score by the first of them; None where nothing can be guessed.
        guesses: the same for each item [n], where items differ.
        ties: items of which several answers were exactly equally likely; each counts its share.
        texts, references: what was written, and what should be.
    """

    values: dict[str, np.ndarray]
    chance: float | None = None
    guesses: np.ndarray | None = None
    ties: int = 0
    texts: list[str] = field(default_factory=list)
    references: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def n(self) -> int:
        return len(self.texts) or len(next(iter(self.values.values())))

    def part(self, places: Sequence[int] | np.ndarray) -> "Marks":
        """Those of some of the items."""
        chosen = np.asarray(places, dtype=np.int64)
        values = {name: value[chosen] for name, value in self.values.items()}
        found = replace(self, values=values)
        if self.guesses is not None:
            guesses = self.guesses[chosen]
            found = replace(found, guesses=guesses, chance=float(guesses.mean()))
        if self.texts:
            texts, references = [self.texts[i] for i in places], [self.references[i] for i in places]
            found = replace(found, texts=texts, references=references)
        return found

    def score(self, name: str) -> Score:
        """A score of all items, with its interval."""
        if name in WRITTEN:
            return metrics.writing(self.references, self.texts, [name])[name]
        if name == "perplexity":
            nats = np.stack([self.values["nats"], np.ones(self.n)], axis=1)
            return metrics.of_sums(nats, lambda sums: np.exp(np.minimum(sums[:, 0] / sums[:, 1], 700)))
        if name == "icat":
            both = [self.values["stereotyped"], self.values["meaningful"], np.ones(self.n)]
            return metrics.of_sums(np.stack(both, axis=1), _icat)
        return metrics.share(self.values[name].tolist())

    def others(self, suite: Suite) -> list[str]:
        """The scores there are beside the one that counts."""
        more = {"cloze": ["perplexity"], "stereotypes": ["meaningful", "icat"]}
        return [*suite.metrics[1:], *more.get(suite.kind, [])]


def marks(
    model: Model, suite: Suite, items: Sequence[Item], *, scrambled: bool = False, progress: Progress | None = None
) -> Marks:
    """Put a suite's items to a model.

    Args:
        scrambled: with the words in another order; see `question_of`.
    """
    if suite.kind == "writing":
        return _written(model, suite, items, scrambled, progress)
    questions = [question_of(suite, item, scrambled) for item in items]
    found = Scorer(model.weights, model.tokenizer, greedy=suite.kind == "cloze").ask(
        [question.asked for question in questions], progress
    )
    if suite.kind == "cloze":
        values = {"acc": np.array([float(one.greedy) for [one] in found])}
        values["nats"] = np.array([-one.nats for [one] in found])
        guesses = np.array([float(model.gpt.config.vocab_size) ** -one.tokens for [one] in found])
        return Marks(values, float(guesses.mean()), guesses)
    if suite.kind == "stereotypes":
        each = [[one.nats / one.tokens for one in likely] for likely in found]  # as StereoSet's authors compare GPT-2's
        stereotyped = np.array([ahead(one, other) for one, other, _ in each])
        meaningful = np.array([(ahead(a, none) + ahead(b, none)) / 2 for a, b, none in each])
        return Marks({"stereotyped": stereotyped, "meaningful": meaningful}, chance=0.5)
    values = {name: np.array([_right(name, q, likely) for q, likely in zip(questions, found, strict=True)])
              for name in suite.metrics}  # fmt: skip
    ties = sum(_best([one.nats for one in likely]).sum() > 1 for likely in found)
    guesses = np.array([1 / len(question.asked) for question in questions])
    return Marks(values, float(guesses.mean()), guesses, ties=int(ties))


def ahead(one: float, other: float) -> float:
    """1 where one is larger, 0 where the other is, and half where they are equal."""
    return (1 + (one > other) - (one < other)) / 2


def _right(name: str, question: Question, likely: Sequence[Likely]) -> float:
    """1 where the right answer is the likeliest, by lm-eval's rules: of all its tokens ("acc"), per character ("acc_norm"),
    per byte ("acc_bytes"). Answers that are exactly equally likely share it; lm-eval gives it to the first."""
    sizes = {"acc_norm": [len(answer) for answer in question.answers]}
    sizes["acc_bytes"] = [len(answer.encode("utf-8", "replace")) for answer in question.answers]
    best = _best([one.nats / size for one, size in zip(likely, sizes.get(name, [1] * len(likely)), strict=True)])
    return float(best[question.gold]) / float(best.sum())


def _best(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values) == max(values)


def _icat(sums: np.ndarray) -> np.ndarray:
    """lms · min(ss, 1 − ss) / 0.5 from the sums [R, 3] of stereotyped, meaningful and 1 (Nadeem et al. 2021, section 6)."""
    stereotyped, meaningful = sums[:, 0] / sums[:, 2], sums[:, 1] / sums[:, 2]
    return meaningful * np.minimum(stereotyped, 1 - stereotyped) / 0.5


# ---------------------------------------------------------------- what is written


def _written(model: Model, suite: Suite, items: Sequence[Item], scrambled: bool, progress: Progress | None) -> Marks:
    """Answers in words, always the likeliest token. Chance is what they score as answers to the next item."""
    wanted = [wanted_of(suite, item, scrambled) for item in items]
    sampling = Sampling(temperature=0.0, max_tokens=suite.max_tokens, stop=suite.stop)
    texts = write(model, [one.prompt for one in wanted], sampling, progress)
    found = _answers(suite, texts, [one.references for one in wanted])
    if len(items) < 2:
        return found
    other = _answers(suite, texts, [wanted[i - 1].references for i in range(len(wanted))])
    return Marks(found.values, chance=other.score(suite.metrics[0]).value, texts=texts, references=found.references)


def _answers(suite: Suite, texts: list[str], references: list[tuple[str, ...]]) -> Marks:
    exact = [
        float(any(text.strip() == one.strip() for one in several))
        for text, several in zip(texts, references, strict=True)
    ]
    return Marks({"exact_match": np.array(exact)}, texts=texts, references=references)


def write(model: Model, prompts: Sequence[str], sampling: Sampling, progress: Progress | None = None) -> list[str]:
    """What a model goes on with after each prompt; of a long one the end is read, so that there is room for the text."""
    return [one.text for one in complete(model, prompts, sampling, progress)]


def complete(
    model: Model, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
) -> list[Completion]:
    """The same as completions, of prompts that are texts or tokens."""
    room = max(1, model.gpt.config.context_length - sampling.max_tokens)
    begin = [] if model.tokenizer.begin_of_text is None else [model.tokenizer.begin_of_text]
    given = [model.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    ids = [[*begin, *one][-room:] for one in given]
    engine = Engine(model.gpt, model.tokenizer, max_batch=AT_ONCE, seed=sampling.seed or 0, reader=model.reader)
    found: list[Completion] = []
    for start in range(0, len(ids), AT_ONCE):
        # Other draws for each group of texts than for the one before.
        own = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + start)
        found += engine.generate(ids[start : start + AT_ONCE], own)
        if progress is not None:
            progress(len(found), len(ids))
    return found


def free_text(
    model: Model, suite: Suite, items: Sequence[Item], *, seed: int, judge: Model | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:  # fmt: skip
    """How much a model's own texts repeat themselves, beside what people wrote where the items have it.

    Args:
        items: what it goes on from; nothing, that is a new document, where there are none.
        judge: a stronger model, under which the texts' bits per byte are told.
    """
    wanted = [wanted_of(suite, item) for item in items]
    prompts = [one.prompt for one in wanted] or [""] * TEXTS
    sampling = Sampling(max_tokens=suite.max_tokens, seed=seed)
    texts = write(model, prompts, sampling, progress)
    own = [words(text) for text in texts]
    result: dict[str, object] = {
        **_repetition(own), "chance": None, "above_chance": None, "temperature": sampling.temperature,
        "max_tokens": suite.max_tokens, "examples": texts[:3],
    }  # fmt: skip
    both = [(words(one.references[0]), text) for one, text in zip(wanted, own, strict=False) if one.references]
    if both:  # as many words of the one as of the other, since shares of distinct n-grams fall with the amount
        result["people"] = _repetition([theirs[: len(text)] for theirs, text in both])
        result["beside_people"] = _repetition([text[: len(theirs)] for theirs, text in both])
    if judge is not None and any(texts):
        result["judge"] = {"model": str(judge.path), **_bits(judge, prompts, texts).to_dict()}
    return result


def _repetition(texts: Sequence[Sequence[str]]) -> dict[str, object]:
    score = metrics.average([repeated(text, 4) for text in texts])
    return {
        "metric": "repeated_4grams", "score": score.value, "low": score.low, "high": score.high, "n": score.n,
        "others": {f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
    }  # fmt: skip


def _bits(judge: Model, prompts: Sequence[str], texts: Sequence[str]) -> Score:
    """Bits per byte of texts, each after its prompt, under a model: of all of them together."""
    both = [(prompt, text) for prompt, text in zip(prompts, texts, strict=True) if text]
    found = Scorer(judge.weights, judge.tokenizer).ask([[one] for one in both])
    counts = np.array([[-one.nats / math.log(2), len(text.encode("utf-8", "replace"))]
                       for [one], (_, text) in zip(found, both, strict=True)])  # fmt: skip
    return metrics.of_sums(counts, lambda sums: sums[:, 0] / sums[:, 1])
