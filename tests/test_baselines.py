"""Baselines: correct by hand, in edge cases, and as good on real data as when they were measured."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextword.common.errors import UsageError
from nextword.tasks.baselines import (
    lead_sentence,
    majority,
    most_similar_choice,
    naive_bayes,
    naive_bayes_multilabel,
    nearest_neighbor_targets,
    ngram_features,
    pair_features,
    tfidf_similarity,
)
from nextword.tasks.metrics import classification, generation_metrics, multiple_choice, similarity
from processes import PATIENCE

DATA = Path(os.environ.get("NEXTWORD_DATA", Path(__file__).parents[2] / "shared" / "data"))
WORDS = st.lists(st.sampled_from(["good", "Bad", "film", "the", "!", "it's"]), max_size=8).map(" ".join)
TEXTS = st.lists(WORDS, min_size=1, max_size=12)


def read_data(name: str, split: str) -> list[dict[str, Any]]:
    paths = sorted((DATA / name).glob(f"{split}.*"))
    if not paths:
        pytest.skip(f"no data: {DATA / name} does not exist; set NEXTWORD_DATA to the folder")
    with paths[0].open(encoding="utf-8", newline="") as file:
        if paths[0].suffix == ".jsonl":
            return [json.loads(line) for line in file]
        if paths[0].suffix == ".tsv":
            return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return list(csv.DictReader(file))


def column(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]


# ---------------------------------------------------------------- labels


def test_majority_takes_the_first_of_equally_frequent_labels():
    assert majority(["b", "a", "a", "b", "c"], 2) == ["b", "b"]
    assert majority([("x",), (), ()], 1) == [()]
    with pytest.raises(UsageError, match="no label to learn from"):
        majority([], 3)


def test_ngram_features():
    text = "It's GOOD, good!"
    unigrams, bigrams = ["it's", "good", ",", "good", "!"], ["it's good", "good ,", ", good", "good !"]
    assert ngram_features(text) == unigrams + bigrams
    assert ngram_features("हिन्दी का") == ["हिन्दी", "का", "हिन्दी का"]  # vowel signs belong to the word
    first, second = ["1:a", "1:cat", "1:.", "1:a cat", "1:cat ."], ["2:the", "2:cat", "2:.", "2:the cat", "2:cat ."]
    assert ngram_features("A cat.", "the Cat.") == [*first, *second, "=cat"]
    assert ngram_features("", "") == ngram_features("") == []
    assert pair_features("The cat sat.", "A cat!") == ["-a", "=cat", "-!"]


@settings(deadline=None)
@given(st.text())
def test_words_contain_every_character(text):
    words = [feature for feature in ngram_features(text) if " " not in feature]
    assert "".join(words) == "".join(character for character in text.lower() if not character.isspace())


def test_naive_bayes_by_hand():
    """Two texts of label a with 3 features in total, one of b with 1; V = 3 ("good", "film", "good film").

    "good": 2/3 · 2/6 against 1/3 · 1/4. "film film film": 2/3 · (2/6)³ against 1/3 · (2/4)³.
    """
    train = ["good film", "", "film"], ["a", "a", "b"]
    assert naive_bayes(*train, ["good unseen", "film film film"]) == ["a", "b"]
    assert naive_bayes(*train, []) == []


@settings(deadline=None)
@given(st.lists(st.sampled_from("xyz"), min_size=1, max_size=9), TEXTS)
def test_naive_bayes_without_features_predicts_the_prior(labels, inputs):
    most_frequent = max(sorted(set(labels)), key=labels.count)
    assert naive_bayes([""] * len(labels), labels, inputs) == [most_frequent] * len(inputs)


def test_naive_bayes_on_pairs_of_texts():
    train = [("a cat", "a cat"), ("a dog", "a dog"), ("a cat", "one house"), ("one dog", "a house")]
    labels = ["yes", "yes", "no", "no"]
    inputs = [("a house", "a house"), ("one house", "two cats")]
    assert naive_bayes(train, labels, inputs, pair_features) == ["yes", "no"]
    assert naive_bayes(train, labels, train) == labels


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(WORDS, st.frozensets(st.sampled_from("xyz"))), min_size=1, max_size=8), TEXTS)
def test_multilabel_naive_bayes_is_one_binary_classifier_per_label(train, inputs):
    texts, label_sets = [t for t, _ in train], [labels for _, labels in train]
    predictions = naive_bayes_multilabel(texts, label_sets, inputs)
    for name in {name for labels in label_sets for name in labels}:
        has_name = [str(int(name in labels)) for labels in label_sets]
        assert [str(int(name in labels)) for labels in predictions] == naive_bayes(texts, has_name, inputs)
    assert all(list(labels) == sorted(labels) for labels in predictions)


@pytest.mark.parametrize("fit", [lambda: naive_bayes([], [], []), lambda: naive_bayes_multilabel([], [], ["a"])])
def test_no_training_texts(fit: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match="no text to learn from"):
        fit()


# ---------------------------------------------------------------- similarity


def test_tfidf_similarity():
    assert tfidf_similarity([("a", "b")], []) == []
    assert tfidf_similarity([("", "")], [("", "")]) == [0.0]
    assert tfidf_similarity([("", "")], [("", ""), ("a", "b"), ("a", "A")]) == [0.0, 0.0, pytest.approx(1.0)]
    assert tfidf_similarity([("x", "y")], [("same words here", "Same words here")]) == [pytest.approx(1.0)]
    unseen, rare, frequent = np.log(3 / 1) + 1, np.log(3 / 2) + 1, 1.0  # idf = ln((1 + n) / (1 + df)) + 1 with n = 2
    expected = [frequent / np.hypot(rare, frequent), rare / np.hypot(rare, unseen)]
    assert tfidf_similarity([("a b", "a")], [("a b", "a"), ("b c", "b")]) == pytest.approx(expected)
    with pytest.raises(UsageError, match="no pair to learn from"):
        tfidf_similarity([], [("a", "b")])


def test_the_most_similar_choice_weights_rare_words():
    questions = ["the cat on the roof", "the sun", "nothing in common", "nothing in common"]
    choices = [["the dog the", "a cat"], ["the moon", "the sun", "moon"], ["a", "bbb", "ccc"], ["dddd", "e"]]
    train = ["the house", "the dog", "the moon", "a cat"]
    assert most_similar_choice(train, questions, choices) == [1, 1, 1, 0]  # ties: the longest, then the first
    assert most_similar_choice(train, [], []) == []
    assert most_similar_choice(train, [""], [["", ""]]) == [0]
    with pytest.raises(UsageError, match="question 2 has no choices"):
        most_similar_choice(train, ["a", "b"], [["a", "b"], []])
    with pytest.raises(UsageError, match="2 questions but 1 answers"):
        most_similar_choice(train, ["a", "b"], [["a", "b"]])
    with pytest.raises(UsageError, match="no text to learn from"):
        most_similar_choice([], ["a"], [["a", "b"]])


def test_the_most_similar_choice_by_hand():
    """n = 3 training texts; df: sun 2, warm 2, red 1, hot 1. Both shared words weigh the same, so the shorter choice wins."""
    assert most_similar_choice(
        ["sun warm", "sun red hot", "warm hot"], ["sun warm"], [["sun red hot", "warm hot"]]
    ) == [1]
    assert most_similar_choice(
        ["sun warm", "sun hot", "warm red hot"], ["sun warm"], [["sun hot", "warm red hot"]]
    ) == [0]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8), st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6)
)
def test_the_prediction_of_a_row_does_not_depend_on_other_test_rows(train, test):
    """Document frequencies come from the training rows alone, in every baseline."""
    sources, labels = [a for a, _ in train], [b for _, b in train]
    choices = [[a, b, "the film"] for a, b in test]
    one_by_one = [tfidf_similarity(train, [pair])[0] for pair in test]
    assert tfidf_similarity(train, test) == pytest.approx(one_by_one)
    questions = [b for _, b in test]
    alone = [
        most_similar_choice(sources, [question], [row])[0] for question, row in zip(questions, choices, strict=True)
    ]
    assert most_similar_choice(sources, questions, choices) == alone
    for predict in (naive_bayes, nearest_neighbor_targets):
        assert predict(sources, labels, questions) == [predict(sources, labels, [text])[0] for text in questions]


def test_the_nearest_neighbor_among_many():
    """Word frequencies as uneven as a language's, against a full table of cosine similarities."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.zipf(1.5, rng.integers(1, 15)) % 40) for _ in range(500)]
    train, inputs = texts[:300], texts[300:]
    vocabulary = sorted({feature for text in train for feature in ngram_features(text)})

    def count(rows: list[str]) -> np.ndarray:
        return np.array([[ngram_features(text).count(feature) for feature in vocabulary] for text in rows])

    train_counts = count(train)
    table = train_counts * (np.log((1 + len(train)) / (1 + (train_counts > 0).sum(0))) + 1)
    weights = table / np.linalg.norm(table, axis=1, keepdims=True)
    cosines = count(inputs) * (np.log((1 + len(train)) / (1 + (train_counts > 0).sum(0))) + 1) @ weights.T
    nearest = nearest_neighbor_targets(train, [str(i) for i in range(300)], inputs)
    assert nearest == [str(int(np.argmax(row >= row.max() * (1 - 1e-9)))) for row in cosines]


def test_the_nearest_neighbor_is_the_first_of_equals():
    train, targets = ["a b", "A b", "c"], ["first", "second", "third"]
    assert nearest_neighbor_targets(train, targets, ["a b", "c", "unseen"]) == ["first", "third", "first"]
    assert nearest_neighbor_targets(["", ""], ["first", "second"], ["a"]) == ["first"]
    with pytest.raises(UsageError, match="2 training sources but 1 answers"):
        nearest_neighbor_targets(["a", "b"], ["a"], ["a"])


# ---------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("One here. Two there.", "One here."),
        ("  Is it? Yes! No.", "Is it?"),
        ("So many!? Yes.", "So many!?"),
        ("He said “no.” Then he left.", "He said “no.”"),
        ("(It is so.) We show it.", "(It is so.)"),
        ("Small letters. do not end it. They go on.", "Small letters. do not end it."),
        ("By J. Smith et al. The rest, e.g. Paris, i.e. Lutetia. End.", None),
        ("See Fig. Two vs. Three, by Dr. Who. End.", "See Fig. Two vs. Three, by Dr. Who."),
        ("It costs 3.5 Euro in the U.S. Army. End.", "It costs 3.5 Euro in the U.S. Army."),
        ("It was 1990. “Élan” came.", "It was 1990."),
        ("Wait... What? Yes.", "Wait..."),
        ("Was it I? It was.", "Was it I?"),
        ("No end at all", "No end at all"),
        ("", ""),
    ],
    ids=range(14),
)
def test_the_end_of_a_sentence(text: str, sentence: str | None) -> None:
    assert lead_sentence(text) == (text.removesuffix(" End.") if sentence is None else sentence)


@settings(deadline=None)
@given(st.text("ab AB.?!\"')\n"))
def test_the_lead_sentence_is_a_prefix_of_the_text(text):
    assert text.strip().startswith(lead_sentence(text))


@pytest.mark.timeout(PATIENCE)  # a quadratic search takes longer on any machine
@pytest.mark.parametrize("sign", [".", " ", ". ", "a", "a. ", '"', ".) "])
def test_the_lead_sentence_takes_linear_time(sign: str) -> None:
    assert lead_sentence(f"A{sign * 200_000}b") == f"A{sign * 200_000}b"


# ---------------------------------------------------------------- real data


@pytest.mark.parametrize(("name", "bound"), [("trec", 0.80), ("movie_reviews", 0.77)])
def test_naive_bayes_on_sentences(name: str, bound: float) -> None:
    train, test = read_data(name, "train"), read_data(name, "test")
    targets, train_labels = column(test, "label"), column(train, "label")
    labels = sorted(set(train_labels))
    predictions = naive_bayes(column(train, "text"), train_labels, column(test, "text"))
    most_frequent = classification(targets, majority(train_labels, len(test)), labels)["accuracy"]
    assert most_frequent.is_below(bound)
    assert classification(targets, predictions, labels)["accuracy"].value > bound


def test_naive_bayes_on_entailment():
    train, test = read_data("mnli", "train"), read_data("mnli", "validation")
    train_pairs, test_pairs = ([(row["premise"], row["hypothesis"]) for row in rows] for rows in (train, test))
    predictions = naive_bayes(train_pairs, column(train, "label"), test_pairs, pair_features)
    labels = sorted(set(column(train, "label")))
    assert classification(column(test, "label"), predictions, labels)["accuracy"].value > 0.45


def test_tfidf_similarity_on_sentence_pairs():
    train, test = read_data("stsb", "train"), read_data("stsb", "test")
    pairs = [[(row["sentence1"], row["sentence2"]) for row in rows] for rows in (train, test)]
    predictions = tfidf_similarity(*pairs)
    assert similarity([float(row["score"]) for row in test], predictions)["pearson"].value > 0.68


def test_the_most_similar_choice_on_questions():
    train, test = read_data("arc_easy", "train"), read_data("arc_easy", "test")
    train_texts = [text for row in train for text in (row["question"], *row["choices"])]
    predictions = most_similar_choice(train_texts, column(test, "question"), column(test, "choices"))
    assert multiple_choice(column(test, "answer"), predictions)["accuracy"].is_above(0.26)


def test_the_lead_sentence_as_a_summary():
    test = read_data("scitldr", "test")[:200]
    summaries = column(test, "summary")
    score = generation_metrics(summaries, list(map(lead_sentence, column(test, "text"))), ["rouge1"])["rouge1"]
    assert 23 < score.value < 30


def test_the_nearest_translation_is_better_than_copying():
    train, test = read_data("english_french", "train")[:6000], read_data("english_french", "test")[:400]
    english, french = column(test, "english"), column(test, "french")
    nearest = nearest_neighbor_targets(column(train, "english"), column(train, "french"), english)
    score, copied = (generation_metrics(french, texts, ["chrf"])["chrf"] for texts in (nearest, english))
    assert copied.is_below(18) and score.is_above(24)
