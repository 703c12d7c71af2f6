"""Baselines that need no model: what a trained model has to beat.

Each takes training data and test inputs and returns predictions. A word is one of `text_units.tokens` in lower case and NFC: a
word with its inner apostrophes ("don't"), a grapheme of a script without spaces, or a single sign.

Naive Bayes and TF-IDF are scikit-learn's, imported inside the functions because importing it takes seconds.
"""

import importlib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np

from nextword.common.errors import UsageError
from nextword.common.text_units import nfc, sentences, tokens, uses_spaces

SCORING_BATCH_SIZE = 64  # texts whose similarities to all training sources are computed at once
TIE_DECIMALS = 9  # cosine similarities that agree to this many digits are ties: rounding errors must not decide
MAX_GRAPHEMES = 4  # of an n-gram of a script without spaces, about as long as a word and its neighbor

T = TypeVar("T", bound=Hashable)
TextInput = str | Sequence[str]  # one text, or several, such as premise and hypothesis
FeatureExtractor = Callable[..., list[str]]


def majority(train_labels: Sequence[T], num_predictions: int) -> list[T]:
    """The most frequent training label (the first of equally frequent ones), once for each prediction.

    Raises:
        UsageError: There are no training labels.
    """
    _check_same_length("label", train_labels)
    return [Counter(train_labels).most_common(1)[0][0]] * num_predictions


def ngram_features(*texts: str) -> list[str]:
    """Words and word bigrams ("the", "film", "the film"); up to four graphemes of a text without spaces.

    For several texts, each feature has the number of its text ("1:film", "2:the film"), and each word that all texts contain
    is one more feature ("=film").
    """
    tokens_per_text = [_tokenize(text) for text in texts]
    max_length = 2 if uses_spaces("".join(texts)) else MAX_GRAPHEMES
    features_per_text = [
        [" ".join(row[i : i + n]) for n in range(1, max_length + 1) for i in range(len(row) - n + 1)]
        for row in tokens_per_text
    ]
    if len(texts) == 1:
        return features_per_text[0]
    shared = set(tokens_per_text[0]).intersection(*tokens_per_text[1:])
    return [
        *(f"{i}:{feature}" for i, features in enumerate(features_per_text, 1) for feature in features),
        *(f"={word}" for word in dict.fromkeys(tokens_per_text[0]) if word in shared and word[0].isalnum()),
    ]


def pair_features(premise: str, hypothesis: str) -> list[str]:
    """The words of the hypothesis, marked by whether the premise contains them ("=film") or not ("-film").

    The premise's own words are left out, because data sets ask several questions about one premise, each with its own label
    (compare the hypothesis-only baseline of Gururangan et al. 2018).
    """
    premise_tokens = set(_tokenize(premise))
    return [f"{'=' if word in premise_tokens else '-'}{word}" for word in _tokenize(hypothesis)]


def naive_bayes(
    train_texts: Sequence[TextInput],
    train_labels: Sequence[str],
    test_texts: Sequence[TextInput],
    feature_extractor: FeatureExtractor = ngram_features,
) -> list[str]:
    """The most probable label of each test text: multinomial naive Bayes on feature counts with add-one smoothing.

    Ties go to the first label in sorted order. Features unseen in training are ignored. Sources: McCallum and Nigam (1998),
    section 2; bigrams after Wang and Manning (2012).

    Args:
        train_texts: Strings, or sequences of strings for examples of several texts.
        train_labels: One label for each text.
        test_texts: The texts to label.
        feature_extractor: The features of a text, or of the texts of an example: `ngram_features` or `pair_features`.

    Raises:
        UsageError: There are no training texts, or the lengths differ.
    """
    _check_same_length("text", train_texts, train_labels)
    if not test_texts:
        return []
    vectorizer, counts = _fit_vectorizer("CountVectorizer", train_texts, feature_extractor)
    return _naive_bayes_classifier().fit(counts, train_labels).predict(vectorizer.transform(test_texts)).tolist()


def naive_bayes_multilabel(
    train_texts: Sequence[TextInput], train_labels: Sequence[Collection[str]], test_texts: Sequence[TextInput]
) -> list[tuple[str, ...]]:
    """One binary naive Bayes classifier for each label. Returns the labels of each test text in sorted order.

    Raises:
        UsageError: There are no texts, or the lengths differ.
    """
    _check_same_length("text", train_texts, train_labels)
    if not test_texts:
        return []
    vectorizer, train_counts = _fit_vectorizer("CountVectorizer", train_texts, ngram_features)
    binarizer = importlib.import_module("sklearn.preprocessing").MultiLabelBinarizer()
    has_label = binarizer.fit_transform(train_labels)
    if not has_label.shape[1]:
        return [()] * len(test_texts)
    classifier = importlib.import_module("sklearn.multioutput").MultiOutputClassifier(_naive_bayes_classifier())
    predictions = classifier.fit(train_counts, has_label).predict(vectorizer.transform(test_texts))
    return binarizer.inverse_transform(predictions)


def tfidf_similarity(train_pairs: Sequence[tuple[str, str]], test_pairs: Sequence[tuple[str, str]]) -> list[float]:
    """The cosine similarity of the TF-IDF words of each test pair of sentences, 0 to 1; 0 for an empty sentence.

    Raises:
        UsageError: There are no training pairs.
    """
    _check_same_length("pair", train_pairs)
    if not test_pairs:
        return []
    texts = list(itertools.chain(*test_pairs))
    table = _tfidf_table(list(itertools.chain(*train_pairs)), texts)
    return np.minimum(_row_products(table[::2], table[1::2]), 1.0).tolist()


def most_similar_choice(
    train_texts: Sequence[str], questions: Sequence[str], choices: Sequence[Sequence[str]]
) -> list[int]:
    """The index of the choice with the greatest TF-IDF cosine similarity to each question.

    A word counts once for each text, and idf(w) = ln((1 + n) / (1 + df_w)) over the n training texts. Ties go to the longest
    choice (in characters), then to the first.

    Args:
        train_texts: The questions and choices of the training examples.
        questions: The questions to answer.
        choices: The choices of each question.

    Raises:
        UsageError: There are no training texts, the lengths differ, or a question has no choices.
    """
    if not questions:
        return []
    _check_same_length("text", train_texts)
    _check_same_length("question", questions, choices)
    if empty := [i for i, options in enumerate(choices, 1) if not options]:
        raise UsageError(f"question {empty[0]} has no choices: give at least two")
    texts = [*questions, *itertools.chain(*choices)]
    table = _tfidf_table(train_texts, texts, binary=True, idf_offset=1)
    owners = np.repeat(np.arange(len(questions)), [len(options) for options in choices])
    cosines = iter(_row_products(table[owners], table[len(questions) :]).round(TIE_DECIMALS).tolist())
    ranks = [[(next(cosines), len(text)) for text in options] for options in choices]
    return [row.index(max(row)) for row in ranks]


def lead_sentence(text: str) -> str:
    """The first of a text's `sentences`, stripped. In Thai and Lao, which mark none, it is the whole text."""
    return next(sentences(text), "")


def nearest_neighbor_targets(
    train_sources: Sequence[str], train_targets: Sequence[str], sources: Sequence[str]
) -> list[str]:
    """The target of the training source with the greatest TF-IDF cosine similarity to each source.

    Ties go to the first training source, which is also the result for a source that shares no feature with any.

    Raises:
        UsageError: There are no training sources, or the lengths differ.
    """
    _check_same_length("training source", train_sources, train_targets)
    vectorizer, train_table = _fit_vectorizer("TfidfVectorizer", train_sources, ngram_features)
    table = vectorizer.transform(sources) if sources else train_table[:0]
    nearest = [
        (table[start : start + SCORING_BATCH_SIZE] @ train_table.T).toarray().round(TIE_DECIMALS).argmax(1)
        for start in range(0, len(sources), SCORING_BATCH_SIZE)
    ]
    return [train_targets[int(i)] for rows in nearest for i in rows]


def _fit_vectorizer(
    class_name: str, texts: Sequence[TextInput], feature_extractor: FeatureExtractor, **settings: Any
) -> tuple[Any, Any]:
    """A fitted vectorizer of scikit-learn and its sparse table [texts, features]."""
    sklearn_text = importlib.import_module("sklearn.feature_extraction.text")

    def analyze(text: TextInput) -> list[str]:
        return feature_extractor(text) if isinstance(text, str) else feature_extractor(*text)

    vocabulary = None if any(map(analyze, texts)) else [""]  # scikit-learn refuses an empty vocabulary
    vectorizer = getattr(sklearn_text, class_name)(analyzer=analyze, vocabulary=vocabulary, **settings)
    return vectorizer, vectorizer.fit_transform(texts)


def _tfidf_table(train_texts: Sequence[str], texts: Sequence[str], binary: bool = False, idf_offset: float = 0) -> Any:
    """The normalized TF-IDF rows of some texts, with the document frequencies of the training texts alone.

    A word that no training text has counts as one with document frequency 0: ln(1 + n), and 1 − `idf_offset` more.
    """
    _, counts = _fit_vectorizer("CountVectorizer", [*train_texts, *texts], _tokenize, binary=binary)
    transformer = importlib.import_module("sklearn.feature_extraction.text").TfidfTransformer()
    transformer.fit(counts[: len(train_texts)])
    transformer.idf_ = transformer.idf_ - idf_offset  # scikit-learn adds 1 to each idf
    return transformer.transform(counts[len(train_texts) :])


def _naive_bayes_classifier() -> Any:
    return importlib.import_module("sklearn.naive_bayes").MultinomialNB()


def _row_products(a: Any, b: Any) -> np.ndarray:
    """The inner product of each row of two sparse tables of one shape."""
    return np.asarray(a.multiply(b).sum(1)).ravel()


def _tokenize(text: str) -> list[str]:
    return tokens(nfc(text.lower()))


def _check_same_length(item_name: str, first: Sequence[object], *others: Sequence[object]) -> None:
    if not first:
        raise UsageError(f"there is no {item_name} to learn from: give at least one")
    if unequal := [len(other) for other in others if len(other) != len(first)]:
        counts = f"{len(first)} {item_name}s but {unequal[0]} answers"
        raise UsageError(f"{counts}: give one answer for each {item_name}")
