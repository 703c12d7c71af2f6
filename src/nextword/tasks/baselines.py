"""Baselines that need no model: what a trained one has to beat.

Each takes training data and test inputs and gives predictions. They share one notion of a word: a run of letters, digits
and combining marks in lower case, apostrophes inside kept ("don't"), or a single sign.
"""

import functools
import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from nextword.common.errors import UsageError

BLOCK = 256  # texts that Naive Bayes scores at once
TIE = 1e-9  # cosines nearer than this are equal: rounding must not choose
# Words before a full stop that does not end a sentence; a single letter is one too, which covers "e.g." and "U.S.".
ABBREVIATIONS = {"al", "cf", "dr", "eq", "eqs", "fig", "figs", "mr", "mrs", "ms", "prof", "resp", "sec", "st", "vs"}
_END = re.compile(r"""(?<![.?!])(?P<sign>[.?!]++)["'”’»)\]]*+\s++(?=(?P<next>["'“‘«(\[]*+\w))""")

T = TypeVar("T", bound=Hashable)
Text = str | Sequence[str]  # one text, or several that belong together, such as premise and hypothesis
Features = Callable[..., list[str]]


def majority(train_labels: Sequence[T], n: int) -> list[T]:
    """The most frequent training label, n times; of equally frequent ones the first met. Labels may be tuples.

    Raises:
        UsageError: no training labels.
    """
    _same_length("label", train_labels)
    return [Counter(train_labels).most_common(1)[0][0]] * n


def words(*texts: str) -> list[str]:
    """The features of an example: words and pairs of neighbouring words ("the", "film", "the film").

    With several texts each feature is marked with its side ("1:film", "2:the film"), and a word that all of them hold
    is a feature of its own ("=film").
    """
    sides = [_tokens(text) for text in texts]
    if len(sides) == 1:
        return [*sides[0], *_pairs(sides[0])]
    marked = [f"{i}:{word}" for i, side in enumerate(sides, 1) for word in (*side, *_pairs(side))]
    rest = [set(side) for side in sides[1:]]
    shared = [word for word in dict.fromkeys(sides[0]) if word[0].isalnum() and all(word in side for side in rest)]
    return [*marked, *(f"={word}" for word in shared)]


def compared(premise: str, hypothesis: str) -> list[str]:
    """The features of a pair whose second text is judged by the first: the words of the second, told apart by whether
    the first holds them ("=film") or not ("-film").

    The premise's own words are left out on purpose. Data sets ask several things of one premise, with a label each, so
    that they say less about the label than which labels were already given (compare the hypothesis-only baseline of
    Gururangan et al. 2018).
    """
    held = set(_tokens(premise))
    return [f"{'=' if word in held else '-'}{word}" for word in _tokens(hypothesis)]


class NaiveBayes:
    """Multinomial Naive Bayes over features, which are `words` where nothing else is given, with add-one smoothing:

        argmax_y  log P(y) + Σ_f n_f log (N_yf + 1) / (N_y + V)

    n_f: how often the text holds feature f; N_yf: how often the training texts of label y do; N_y = Σ_f N_yf; V: the
    number of features. Features that training never saw are left out; equal labels go to the first in order.
    Source: McCallum and Nigam (1998), section 2, "Multinomial model"; word pairs after Wang and Manning (2012).
    """

    def __init__(self, texts: Sequence[Text], labels: Sequence[str], features: Features = words):
        """`texts`: strings, or tuples of strings for pairs of texts; `labels`: one a text; `features`: what a text, or
        the texts of a tuple, give: `words`, or `compared` for premise and hypothesis.

        Raises:
            UsageError: no texts, or not as many labels as texts.
        """
        _same_length("text", texts, labels)
        self.labels = sorted(set(labels))
        self._index: dict[str, int] = {}
        self._features = features
        rows, ids = _encode(texts, self._index, features, grow=True)
        place = {label: i for i, label in enumerate(self.labels)}
        targets = np.array([place[label] for label in labels])
        self._counts = _Counts(rows, ids, targets, len(self.labels), len(self._index))

    def predict(self, texts: Sequence[Text]) -> list[str]:
        """The label of each text."""
        return [
            self.labels[best]
            for start in range(0, len(texts), BLOCK)
            for best in self._scores(texts[start : start + BLOCK]).argmax(1)
        ]

    def _scores(self, texts: Sequence[Text]) -> np.ndarray:
        return self._counts.scores(*_encode(texts, self._index, self._features), len(texts))


def naive_bayes_several(
    texts: Sequence[Text], labels: Sequence[Collection[str]], inputs: Sequence[Text]
) -> list[tuple[str, ...]]:
    """Several labels at once: one yes-or-no Naive Bayes for each label that occurs. Labels of each input, in order.

    Raises:
        UsageError: no texts, or not as many sets of labels as texts.
    """
    _same_length("text", texts, labels)
    index: dict[str, int] = {}
    rows, ids = _encode(texts, index, grow=True)
    names = sorted({label for several in labels for label in several})
    models = [
        _Counts(rows, ids, np.array([int(name in several) for several in labels]), 2, len(index)) for name in names
    ]
    found: list[tuple[str, ...]] = []
    for start in range(0, len(inputs), BLOCK):
        block = inputs[start : start + BLOCK]
        rows, ids = _encode(block, index)
        yes = [model.scores(rows, ids, len(block)).argmax(1) for model in models]
        found += [tuple(name for name, one in zip(names, yes, strict=True) if one[i]) for i in range(len(block))]
    return found


def overlap(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """How alike two sentences are: the cosine of their tf-idf words, 0 to 1. An empty sentence is like nothing: 0.

    idf(w) = ln((1 + n) / (1 + df_w)) + 1, over the 2 × len(pairs) sentences given.
    """
    if not pairs:
        return []
    index: dict[str, int] = {}
    rows, ids = _flat([_tokens(text) for pair in pairs for text in pair], index, grow=True)
    rows, ids, weights, _ = _tf_idf(rows, ids, 2 * len(pairs), len(index))
    keys = (rows // 2) * max(1, len(index)) + ids
    left = rows % 2 == 0
    shared, first, second = np.intersect1d(keys[left], keys[~left], assume_unique=True, return_indices=True)
    cosines = np.bincount(
        shared // max(1, len(index)), weights[left][first] * weights[~left][second], minlength=len(pairs)
    )
    return [min(1.0, float(x)) for x in cosines]


def overlap_choice(questions: Sequence[str], choices: Sequence[Sequence[str]]) -> list[int]:
    """For each question the choice (from 0) that shares most with it: the greatest cosine of their tf-idf words.

    idf(w) = ln((1 + n) / (1 + df_w)) over the n questions and choices given; a word counts once a text. Ties go to the
    longest choice (in characters), then to the first.

    Raises:
        UsageError: not as many lists of choices as questions, or a question without choices.
    """
    if not questions:
        return []
    _same_length("question", questions, choices)
    asked = [set(_tokens(question)) for question in questions]
    offered = [[set(_tokens(choice)) for choice in several] for several in choices]
    frequency = Counter(word for one in (*asked, *itertools.chain(*offered)) for word in one)
    n = len(asked) + sum(map(len, offered))
    weight = {word: math.log((1 + n) / (1 + found)) ** 2 for word, found in frequency.items()}
    answers = []
    for i, (question, several) in enumerate(zip(asked, offered, strict=True)):
        if not several:
            raise UsageError(f"question {i + 1} has no choices: give two or more")
        ranked = [(_share(question, one, weight), len(text)) for one, text in zip(several, choices[i], strict=True)]
        answers.append(ranked.index(max(ranked)))
    return answers


def copying(sources: Sequence[str]) -> list[str]:
    """Each source as it is."""
    return list(sources)


def first_sentence(texts: Sequence[str], count: int = 1) -> list[str]:
    """The first `count` sentences of each text, without the white space around them.

    A sentence ends at a full stop, question mark or exclamation mark, closing quotes and brackets after it included,
    that is followed by white space and a capital letter. A full stop after a single letter ("J.", "e.g.", "U.S.") or
    one of `ABBREVIATIONS` ends none.

    Raises:
        UsageError: a count below one.
    """
    if count < 1:
        raise UsageError(f"{count} sentences cannot be taken: ask for one or more")
    return [_first(text.strip(), count) for text in texts]


def nearest(train_sources: Sequence[str], train_targets: Sequence[str], sources: Sequence[str]) -> list[str]:
    """For each source the target of the training source that is nearest to it: the greatest cosine of tf-idf `words`.

    idf(f) = ln((1 + n) / (1 + df_f)) + 1 over the training sources. Ties go to the first training source, which is
    also what a source gets that shares nothing with any of them.

    Raises:
        UsageError: no training sources, or not as many targets as sources.
    """
    _same_length("training source", train_sources, train_targets)
    n, index = len(train_sources), dict[str, int]()
    rows, ids = _encode(train_sources, index, grow=True)
    rows, ids, weights, idf = _tf_idf(rows, ids, n, len(index))
    starts = np.searchsorted(ids, np.arange(len(index) + 1))  # the inverted index: feature → its training sources
    found = []
    for source in sources:
        seen, counts = np.unique(_encode([source], index)[1], return_counts=True)
        entries, lengths = _entries(starts, seen)
        cosines = np.bincount(rows[entries], weights[entries] * np.repeat(counts * idf[seen], lengths), minlength=n)
        scale = max(float(cosines.max()), 1e-300)  # the source's own length is left out: it changes no order
        found.append(train_targets[int(np.argmax(cosines >= scale * (1 - TIE)))])
    return found


class _Counts:
    """Log counts of features by label, as a sparse table: log(N_yf + 1) is zero where feature and label never met."""

    def __init__(self, rows: np.ndarray, ids: np.ndarray, targets: np.ndarray, n_labels: int, n_features: int):
        """`rows`, `ids`: [tokens], the text and the feature of each; `targets`: [texts], the label of each."""
        keys, counts = np.unique(ids * n_labels + targets[rows], return_counts=True)
        self.n_labels = n_labels
        self.of_label = keys % n_labels
        self.values = np.log1p(counts)
        self.starts = np.searchsorted(keys // n_labels, np.arange(n_features + 1))
        with np.errstate(divide="ignore"):  # a yes-or-no question that all answer alike: −∞ for the other answer
            self.prior = np.log(np.bincount(targets, minlength=n_labels) / len(targets))
        totals = np.bincount(targets[rows], minlength=n_labels)
        self.normal = np.log(np.maximum(totals + n_features, 1))

    def scores(self, rows: np.ndarray, ids: np.ndarray, n: int) -> np.ndarray:
        """[n, labels]: the log joint probability of each text and label."""
        entries, lengths = _entries(self.starts, ids)
        cells = np.repeat(rows, lengths) * self.n_labels + self.of_label[entries]
        sums = np.bincount(cells, self.values[entries], minlength=n * self.n_labels).reshape(n, self.n_labels)
        return self.prior + sums - np.bincount(rows, minlength=n)[:, None] * self.normal


@functools.cache
def _word() -> re.Pattern[str]:
    """What a word is. `\\w` alone would cut Indic and Arabic words at their combining marks."""
    marks = "".join(c for c in map(chr, range(0x300, 0x2100)) if unicodedata.category(c).startswith("M"))
    return re.compile(rf"[\w{marks}]+(?:['’][\w{marks}]+)*|[^\w\s{marks}]")


def _tokens(text: str) -> list[str]:
    return _word().findall(text.lower())


def _pairs(tokens: Sequence[str]) -> list[str]:
    return [f"{a} {b}" for a, b in itertools.pairwise(tokens)]


def _encode(
    texts: Iterable[Text], index: dict[str, int], features: Features = words, *, grow: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    return _flat((features(text) if isinstance(text, str) else features(*text) for text in texts), index, grow=grow)


def _flat(
    documents: Iterable[Sequence[str]], index: dict[str, int], *, grow: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """[tokens] and [tokens]: the document and the id of each feature. What the index lacks is added or left out."""
    rows: list[int] = []
    ids: list[int] = []
    for row, features in enumerate(documents):
        if grow:
            found = [index.setdefault(feature, len(index)) for feature in features]
        else:
            found = [index[feature] for feature in features if feature in index]
        ids += found
        rows += [row] * len(found)
    return np.array(rows, dtype=np.int64), np.array(ids, dtype=np.int64)


def _tf_idf(
    rows: np.ndarray, ids: np.ndarray, n: int, n_features: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows, ids and weights of the entries of an [n, features] table whose rows have length one, sorted by feature and
    then row; and the idf, [features]."""
    keys, counts = np.unique(ids * n + rows, return_counts=True)
    rows, ids = keys % n, keys // n
    idf = np.log((1 + n) / (1 + np.bincount(ids, minlength=n_features))) + 1
    weights = counts * idf[ids]
    lengths = np.sqrt(np.bincount(rows, weights**2, minlength=n))
    return rows, ids, weights / lengths[rows], idf


def _entries(starts: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the entries of each id lie in a table that is sorted by id, one after the other; and how many each has."""
    lengths = starts[ids + 1] - starts[ids]
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts[ids] - before, lengths) + np.arange(int(lengths.sum())), lengths


def _share(question: set[str], choice: set[str], weight: dict[str, float]) -> float:
    """Their cosine, times the question's length, which is the same for all its choices."""
    length = math.sqrt(math.fsum(weight[word] for word in choice))  # fsum: the same in whatever order a set comes
    return math.fsum(weight[word] for word in question & choice) / length if length else 0.0


def _first(text: str, count: int) -> str:
    for end in _END.finditer(text):
        if not end["next"][-1].isupper():
            continue
        before = re.search(r"\w+$", text[max(0, end.start() - 8) : end.start()])  # no abbreviation is longer
        if end["sign"] == "." and before and (_single(before[0]) or before[0].lower() in ABBREVIATIONS):
            continue
        count -= 1
        if count == 0:
            return text[: end.end()].rstrip()
    return text


def _single(word: str) -> bool:
    return len(word) == 1 and word.isalpha()


def _same_length(what: str, first: Sequence[object], *others: Sequence[object]) -> None:
    if not first:
        raise UsageError(f"there is no {what} to learn from: give one or more")
    for other in others:
        if len(other) != len(first):
            raise UsageError(f"{len(first)} {what}s and {len(other)} answers to them: give one answer for each {what}")
