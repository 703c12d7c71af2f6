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

SCORING_BATCH_SIZE = 256  # texts that Naive Bayes scores at once
TIE_TOLERANCE = 1e-9  # cosines nearer than this are equal: rounding must not choose
# Words before a full stop that does not end a sentence; a single letter is one too, which covers "e.g." and "U.S.".
ABBREVIATIONS = {"al", "cf", "dr", "eq", "eqs", "fig", "figs", "mr", "mrs", "ms", "prof", "resp", "sec", "st", "vs"}
_SENTENCE_END = re.compile(r"""(?<![.?!])(?P<sign>[.?!]++)["'”’»)\]]*+\s++(?=(?P<next>["'“‘«(\[]*+\w))""")

T = TypeVar("T", bound=Hashable)
TextInput = str | Sequence[str]  # one text, or several that belong together, such as premise and hypothesis
FeatureExtractor = Callable[..., list[str]]


def majority(train_labels: Sequence[T], num_predictions: int) -> list[T]:
    """The most frequent training label, n times; of equally frequent ones the first met. Labels may be tuples.

    Raises:
        UsageError: no training labels.
    """
    _check_same_length("label", train_labels)
    return [Counter(train_labels).most_common(1)[0][0]] * num_predictions


def ngram_features(*texts: str) -> list[str]:
    """The features of an example: words and pairs of neighbouring words ("the", "film", "the film").

    With several texts each feature is marked with its side ("1:film", "2:the film"), and a word that all of them hold
    is a feature of its own ("=film").
    """
    tokens_per_text = [_tokenize(text) for text in texts]
    if len(tokens_per_text) == 1:
        return [*tokens_per_text[0], *_bigrams(tokens_per_text[0])]
    prefixed_features = [
        f"{i}:{word}" for i, side in enumerate(tokens_per_text, 1) for word in (*side, *_bigrams(side))
    ]
    rest = [set(side) for side in tokens_per_text[1:]]
    shared = [
        word for word in dict.fromkeys(tokens_per_text[0]) if word[0].isalnum() and all(word in side for side in rest)
    ]
    return [*prefixed_features, *(f"={word}" for word in shared)]


def pair_features(premise: str, hypothesis: str) -> list[str]:
    """The features of a pair whose second text is judged by the first: the words of the second, told apart by whether
    the first holds them ("=film") or not ("-film").

    The premise's own words are left out on purpose. Data sets ask several things of one premise, with a label each, so
    that they say less about the label than which labels were already given (compare the hypothesis-only baseline of
    Gururangan et al. 2018).
    """
    premise_tokens = set(_tokenize(premise))
    return [f"{'=' if word in premise_tokens else '-'}{word}" for word in _tokenize(hypothesis)]


class NaiveBayes:
    """Multinomial Naive Bayes over features, which are `words` where nothing else is given, with add-one smoothing:

        argmax_y  log P(y) + Σ_f n_f log (N_yf + 1) / (N_y + V)

    n_f: how often the text holds feature f; N_yf: how often the training texts of label y do; N_y = Σ_f N_yf; V: the
    number of features. Features that training never saw are left out; equal labels go to the first in order.
    Source: McCallum and Nigam (1998), section 2, "Multinomial model"; word pairs after Wang and Manning (2012).
    """

    def __init__(
        self, texts: Sequence[TextInput], labels: Sequence[str], feature_extractor: FeatureExtractor = ngram_features
    ):
        """`texts`: strings, or tuples of strings for pairs of texts; `labels`: one a text; `features`: what a text, or
        the texts of a tuple, give: `words`, or `compared` for premise and hypothesis.

        Raises:
            UsageError: no texts, or not as many labels as texts.
        """
        _check_same_length("text", texts, labels)
        self.labels = sorted(set(labels))
        self._vocabulary: dict[str, int] = {}
        self._feature_extractor = feature_extractor
        rows, ids = _encode_features(texts, self._vocabulary, feature_extractor, update_vocabulary=True)
        label_to_id = {label: i for i, label in enumerate(self.labels)}
        targets = np.array([label_to_id[label] for label in labels])
        self._log_counts = _SparseLogCounts(rows, ids, targets, len(self.labels), len(self._vocabulary))

    def predict(self, texts: Sequence[TextInput]) -> list[str]:
        """The label of each text."""
        return [
            self.labels[best]
            for start in range(0, len(texts), SCORING_BATCH_SIZE)
            for best in self._log_joint(texts[start : start + SCORING_BATCH_SIZE]).argmax(1)
        ]

    def _log_joint(self, texts: Sequence[TextInput]) -> np.ndarray:
        return self._log_counts.log_joint(
            *_encode_features(texts, self._vocabulary, self._feature_extractor), len(texts)
        )


def naive_bayes_multilabel(
    train_texts: Sequence[TextInput], train_labels: Sequence[Collection[str]], test_texts: Sequence[TextInput]
) -> list[tuple[str, ...]]:
    """Several labels at once: one yes-or-no Naive Bayes for each label that occurs. Labels of each input, in order.

    Raises:
        UsageError: no texts, or not as many sets of labels as texts.
    """
    _check_same_length("text", train_texts, train_labels)
    vocabulary: dict[str, int] = {}
    rows, ids = _encode_features(train_texts, vocabulary, update_vocabulary=True)
    names = sorted({label for several in train_labels for label in several})
    models = [
        _SparseLogCounts(rows, ids, np.array([int(name in several) for several in train_labels]), 2, len(vocabulary))
        for name in names
    ]
    predictions: list[tuple[str, ...]] = []
    for start in range(0, len(test_texts), SCORING_BATCH_SIZE):
        block = test_texts[start : start + SCORING_BATCH_SIZE]
        rows, ids = _encode_features(block, vocabulary)
        decisions = [model.log_joint(rows, ids, len(block)).argmax(1) for model in models]
        predictions += [
            tuple(name for name, one in zip(names, decisions, strict=True) if one[i]) for i in range(len(block))
        ]
    return predictions


def tfidf_similarity(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """How alike two sentences are: the cosine of their tf-idf words, 0 to 1. An empty sentence is like nothing: 0.

    idf(w) = ln((1 + n) / (1 + df_w)) + 1, over the 2 × len(pairs) sentences given.
    """
    if not pairs:
        return []
    vocabulary: dict[str, int] = {}
    rows, ids = _flatten_features(
        [_tokenize(text) for pair in pairs for text in pair], vocabulary, update_vocabulary=True
    )
    rows, ids, weights, _ = _tf_idf(rows, ids, 2 * len(pairs), len(vocabulary))
    keys = (rows // 2) * max(1, len(vocabulary)) + ids
    left = rows % 2 == 0
    shared, first, second = np.intersect1d(keys[left], keys[~left], assume_unique=True, return_indices=True)
    cosines = np.bincount(
        shared // max(1, len(vocabulary)), weights[left][first] * weights[~left][second], minlength=len(pairs)
    )
    return [min(1.0, float(x)) for x in cosines]


def most_similar_choice(questions: Sequence[str], choices: Sequence[Sequence[str]]) -> list[int]:
    """For each question the choice (from 0) that shares most with it: the greatest cosine of their tf-idf words.

    idf(w) = ln((1 + n) / (1 + df_w)) over the n questions and choices given; a word counts once a text. Ties go to the
    longest choice (in characters), then to the first.

    Raises:
        UsageError: not as many lists of choices as questions, or a question without choices.
    """
    if not questions:
        return []
    _check_same_length("question", questions, choices)
    question_words = [set(_tokenize(question)) for question in questions]
    choice_words = [[set(_tokenize(choice)) for choice in several] for several in choices]
    document_frequency = Counter(word for one in (*question_words, *itertools.chain(*choice_words)) for word in one)
    n = len(question_words) + sum(map(len, choice_words))
    squared_idf = {word: math.log((1 + n) / (1 + found)) ** 2 for word, found in document_frequency.items()}
    answers = []
    for i, (question, several) in enumerate(zip(question_words, choice_words, strict=True)):
        if not several:
            raise UsageError(f"question {i + 1} has no choices: give two or more")
        ranked = [
            (_scaled_cosine(question, one, squared_idf), len(text))
            for one, text in zip(several, choices[i], strict=True)
        ]
        answers.append(ranked.index(max(ranked)))
    return answers


def copy_source(sources: Sequence[str]) -> list[str]:
    """Each source as it is."""
    return list(sources)


def lead_sentences(texts: Sequence[str], count: int = 1) -> list[str]:
    """The first `count` sentences of each text, without the white space around them.

    A sentence ends at a full stop, question mark or exclamation mark, closing quotes and brackets after it included,
    that is followed by white space and a capital letter. A full stop after a single letter ("J.", "e.g.", "U.S.") or
    one of `ABBREVIATIONS` ends none.

    Raises:
        UsageError: a count below one.
    """
    if count < 1:
        raise UsageError(f"{count} sentences cannot be taken: ask for one or more")
    return [_first_sentences(text.strip(), count) for text in texts]


def nearest_neighbor_targets(
    train_sources: Sequence[str], train_targets: Sequence[str], sources: Sequence[str]
) -> list[str]:
    """For each source the target of the training source that is nearest to it: the greatest cosine of tf-idf `words`.

    idf(f) = ln((1 + n) / (1 + df_f)) + 1 over the training sources. Ties go to the first training source, which is
    also what a source gets that shares nothing with any of them.

    Raises:
        UsageError: no training sources, or not as many targets as sources.
    """
    _check_same_length("training source", train_sources, train_targets)
    n, vocabulary = len(train_sources), dict[str, int]()
    rows, ids = _encode_features(train_sources, vocabulary, update_vocabulary=True)
    rows, ids, weights, idf = _tf_idf(rows, ids, n, len(vocabulary))
    starts = np.searchsorted(ids, np.arange(len(vocabulary) + 1))  # the inverted index: feature → its training sources
    predictions = []
    for source in sources:
        feature_ids, counts = np.unique(_encode_features([source], vocabulary)[1], return_counts=True)
        entries, lengths = _sparse_entries(starts, feature_ids)
        cosines = np.bincount(
            rows[entries], weights[entries] * np.repeat(counts * idf[feature_ids], lengths), minlength=n
        )
        scale = max(float(cosines.max()), 1e-300)  # the source's own length is left out: it changes no order
        predictions.append(train_targets[int(np.argmax(cosines >= scale * (1 - TIE_TOLERANCE)))])
    return predictions


class _SparseLogCounts:
    """Log counts of features by label, as a sparse table: log(N_yf + 1) is zero where feature and label never met."""

    def __init__(
        self, rows: np.ndarray, feature_ids: np.ndarray, targets: np.ndarray, num_labels: int, num_features: int
    ):
        """`rows`, `ids`: [tokens], the text and the feature of each; `targets`: [texts], the label of each."""
        keys, counts = np.unique(feature_ids * num_labels + targets[rows], return_counts=True)
        self.num_labels = num_labels
        self.label_ids = keys % num_labels
        self.log_counts = np.log1p(counts)
        self.feature_offsets = np.searchsorted(keys // num_labels, np.arange(num_features + 1))
        with np.errstate(divide="ignore"):  # a yes-or-no question that all answer alike: −∞ for the other answer
            self.log_prior = np.log(np.bincount(targets, minlength=num_labels) / len(targets))
        totals = np.bincount(targets[rows], minlength=num_labels)
        self.log_normalizer = np.log(np.maximum(totals + num_features, 1))

    def log_joint(self, rows: np.ndarray, feature_ids: np.ndarray, num_texts: int) -> np.ndarray:
        """[n, labels]: the log joint probability of each text and label."""
        entries, lengths = _sparse_entries(self.feature_offsets, feature_ids)
        cells = np.repeat(rows, lengths) * self.num_labels + self.label_ids[entries]
        sums = np.bincount(cells, self.log_counts[entries], minlength=num_texts * self.num_labels).reshape(
            num_texts, self.num_labels
        )
        return self.log_prior + sums - np.bincount(rows, minlength=num_texts)[:, None] * self.log_normalizer


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    """What a word is. `\\w` alone would cut Indic and Arabic words at their combining marks."""
    marks = "".join(c for c in map(chr, range(0x300, 0x2100)) if unicodedata.category(c).startswith("M"))
    return re.compile(rf"[\w{marks}]+(?:['’][\w{marks}]+)*|[^\w\s{marks}]")


def _tokenize(text: str) -> list[str]:
    return _word_pattern().findall(text.lower())


def _bigrams(tokens: Sequence[str]) -> list[str]:
    return [f"{a} {b}" for a, b in itertools.pairwise(tokens)]


def _encode_features(
    texts: Iterable[TextInput],
    vocabulary: dict[str, int],
    feature_extractor: FeatureExtractor = ngram_features,
    *,
    update_vocabulary: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    return _flatten_features(
        (feature_extractor(text) if isinstance(text, str) else feature_extractor(*text) for text in texts),
        vocabulary,
        update_vocabulary=update_vocabulary,
    )


def _flatten_features(
    documents: Iterable[Sequence[str]], vocabulary: dict[str, int], *, update_vocabulary: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """[tokens] and [tokens]: the document and the id of each feature. What the index lacks is added or left out."""
    rows: list[int] = []
    ids: list[int] = []
    for row, features in enumerate(documents):
        if update_vocabulary:
            feature_ids = [vocabulary.setdefault(feature, len(vocabulary)) for feature in features]
        else:
            feature_ids = [vocabulary[feature] for feature in features if feature in vocabulary]
        ids += feature_ids
        rows += [row] * len(feature_ids)
    return np.array(rows, dtype=np.int64), np.array(ids, dtype=np.int64)


def _tf_idf(
    rows: np.ndarray, feature_ids: np.ndarray, num_documents: int, num_features: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows, ids and weights of the entries of an [n, features] table whose rows have length one, sorted by feature and
    then row; and the idf, [features]."""
    keys, counts = np.unique(feature_ids * num_documents + rows, return_counts=True)
    rows, feature_ids = keys % num_documents, keys // num_documents
    idf = np.log((1 + num_documents) / (1 + np.bincount(feature_ids, minlength=num_features))) + 1
    weights = counts * idf[feature_ids]
    lengths = np.sqrt(np.bincount(rows, weights**2, minlength=num_documents))
    return rows, feature_ids, weights / lengths[rows], idf


def _sparse_entries(offsets: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the entries of each id lie in a table that is sorted by id, one after the other; and how many each has."""
    lengths = offsets[ids + 1] - offsets[ids]
    before = np.cumsum(lengths) - lengths
    return np.repeat(offsets[ids] - before, lengths) + np.arange(int(lengths.sum())), lengths


def _scaled_cosine(question: set[str], choice: set[str], squared_idf: dict[str, float]) -> float:
    """Their cosine, times the question's length, which is the same for all its choices."""
    length = math.sqrt(math.fsum(squared_idf[word] for word in choice))  # fsum: the same in whatever order a set comes
    return math.fsum(squared_idf[word] for word in question & choice) / length if length else 0.0


def _first_sentences(text: str, count: int) -> str:
    for end in _SENTENCE_END.finditer(text):
        if not end["next"][-1].isupper():
            continue
        before = re.search(r"\w+$", text[max(0, end.start() - 8) : end.start()])  # no abbreviation is longer
        if end["sign"] == "." and before and (_is_single_letter(before[0]) or before[0].lower() in ABBREVIATIONS):
            continue
        count -= 1
        if count == 0:
            return text[: end.end()].rstrip()
    return text


def _is_single_letter(word: str) -> bool:
    return len(word) == 1 and word.isalpha()


def _check_same_length(item_name: str, first: Sequence[object], *others: Sequence[object]) -> None:
    if not first:
        raise UsageError(f"there is no {item_name} to learn from: give one or more")
    for other in others:
        if len(other) != len(first):
            raise UsageError(
                f"{len(first)} {item_name}s and {len(other)} answers to them: give one answer for each {item_name}"
            )
