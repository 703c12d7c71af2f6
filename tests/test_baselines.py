"""The baselines: equal to scikit-learn or to the sum by hand, and as good on real data as they were when measured."""

import csv
import importlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nextword.errors import UsageError

from needs import DATA
from nextword.tasks.baselines import (
    NaiveBayes,
    copy_source,
    lead_sentences,
    majority,
    most_similar_choice,
    naive_bayes_multilabel,
    nearest_neighbor_targets,
    ngram_features,
    pair_features,
    tfidf_similarity,
)
from nextword.tasks.metrics import classification, generation_metrics, multiple_choice, similarity

# The library compared with, whose own types do not say what it gives.
sklearn_text: Any = importlib.import_module("sklearn.feature_extraction.text")
MultinomialNB: Any = importlib.import_module("sklearn.naive_bayes").MultinomialNB

WORDS = st.lists(st.sampled_from(["good", "Bad", "film", "the", "!", "it's"]), max_size=8).map(" ".join)
SOME = st.lists(WORDS, min_size=1, max_size=12)


def data(name: str, split: str) -> list[dict[str, Any]]:
    found = sorted((DATA / name).glob(f"{split}.*"))
    if not found:
        pytest.skip(f"needs data: {DATA / name} is not there; set NEXTWORD_DATA to the folder")
    with found[0].open(encoding="utf-8", newline="") as file:
        if found[0].suffix == ".jsonl":
            return [json.loads(line) for line in file]
        if found[0].suffix == ".tsv":
            return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return list(csv.DictReader(file))


def column(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]


def test_majority_is_the_most_frequent_and_of_equals_the_first():
    assert majority(["b", "a", "a", "b", "c"], 2) == ["b", "b"]
    assert majority([("x",), (), ()], 1) == [()]
    with pytest.raises(UsageError, match="no label to learn from"):
        majority([], 3)


def test_words_and_pairs():
    assert ngram_features("It's GOOD, good!") == [
        "it's",
        "good",
        ",",
        "good",
        "!",
        "it's good",
        "good ,",
        ", good",
        "good !",
    ]
    assert ngram_features("हिन्दी का") == ["हिन्दी", "का", "हिन्दी का"]  # not cut at the vowel signs
    assert ngram_features("A cat.", "the Cat.") == [
        "1:a", "1:cat", "1:.", "1:a cat", "1:cat .", "2:the", "2:cat", "2:.", "2:the cat", "2:cat .", "=cat",
    ]  # fmt: skip
    assert ngram_features("", "") == ngram_features("") == []
    assert pair_features("The cat sat.", "A cat!") == ["-a", "=cat", "-!"]


@settings(deadline=None)
@given(st.text())
def test_words_leave_no_letter_out(text):
    lower = text.lower()
    single = [word for word in ngram_features(text) if " " not in word]
    assert "".join(single) == "".join(c for c in lower if not c.isspace())


@settings(deadline=None)
@given(st.lists(st.tuples(WORDS, st.sampled_from("xyz")), min_size=1, max_size=12), SOME)
def test_naive_bayes_is_sklearns(train, inputs):
    texts, labels = [t for t, _ in train], [y for _, y in train]
    ours = NaiveBayes(texts, labels)
    vectorizer = sklearn_text.CountVectorizer(analyzer=ngram_features)
    if not any(ngram_features(text) for text in texts):
        assert ours.predict(inputs) == [max(sorted(set(labels)), key=labels.count)] * len(inputs)
        return
    theirs = MultinomialNB(alpha=1.0).fit(vectorizer.fit_transform(texts), labels)
    joint = theirs.predict_joint_log_proba(vectorizer.transform(inputs))
    assert ours.labels == list(theirs.classes_)
    np.testing.assert_allclose(ours._log_joint(inputs), joint, atol=1e-9)
    top_two = np.sort(np.pad(joint, [(0, 0), (1, 0)], constant_values=-np.inf), axis=1)[:, -2:]
    for mine, row, (second, best) in zip(ours.predict(inputs), joint, top_two, strict=True):
        assert best - second < 1e-9 or mine == theirs.classes_[row.argmax()]


def test_naive_bayes_by_hand():
    """Two texts of label a with 3 features in all, one of b with 1; V = 3 ("good", "film", "good film")."""
    model = NaiveBayes(["good film", "", "film"], ["a", "a", "b"])
    score = np.log(2 / 3) + np.log((1 + 1) / (3 + 3)), np.log(1 / 3) + np.log((0 + 1) / (1 + 3))
    np.testing.assert_allclose(model._log_joint(["good unseen"]), [score], atol=1e-12)
    assert model.predict(["good unseen", "film film film film"]) == ["a", "b"]


def test_naive_bayes_over_pairs_of_texts():
    train = [("a cat", "a cat"), ("a dog", "a dog"), ("a cat", "one house"), ("one dog", "a house")]
    model = NaiveBayes(train, ["yes", "yes", "no", "no"], pair_features)
    assert model.predict([("a house", "a house"), ("one house", "two cats")]) == ["yes", "no"]
    assert NaiveBayes(train, ["yes", "yes", "no", "no"]).predict(train) == ["yes", "yes", "no", "no"]


def test_many_texts_are_scored_in_blocks_as_one_by_one():
    texts = ["good film", "bad film", "the good", "the bad bad", ""] * 120
    model = NaiveBayes(texts[:5], ["p", "n", "p", "n", "n"])
    assert model.predict(texts) == [model.predict([text])[0] for text in texts]
    labels = [("p", "x"), ("n",), ("p",), ("n", "x"), ()]
    assert (
        naive_bayes_multilabel(texts[:5], labels, texts) == naive_bayes_multilabel(texts[:5], labels, texts[:5]) * 120
    )


@settings(deadline=None)
@given(st.lists(st.tuples(WORDS, st.frozensets(st.sampled_from("xyz"))), min_size=1, max_size=8), SOME)
def test_several_labels_are_one_yes_or_no_each(train, inputs):
    texts, labels = [t for t, _ in train], [y for _, y in train]
    found = naive_bayes_multilabel(texts, labels, inputs)
    for name in {name for several in labels for name in several}:
        alone = NaiveBayes(texts, [str(int(name in several)) for several in labels])
        assert [str(int(name in one)) for one in found] == alone.predict(inputs)
    assert all(list(one) == sorted(one) for one in found)


@settings(deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8))
def test_overlap_is_sklearns_tf_idf(pairs):
    def single(text: str) -> list[str]:
        return [word for word in ngram_features(text) if " " not in word]

    sentences = [text for pair in pairs for text in pair]
    if not any(map(single, sentences)):
        assert tfidf_similarity(pairs) == [0.0] * len(pairs)
        return
    table = np.asarray(sklearn_text.TfidfVectorizer(analyzer=single).fit_transform(sentences).todense())
    np.testing.assert_allclose(tfidf_similarity(pairs), (table[::2] * table[1::2]).sum(1), atol=1e-9)


def test_overlap_of_nothing():
    assert tfidf_similarity([]) == []
    assert tfidf_similarity([("", ""), ("a", "b")]) == [0.0, 0.0]
    assert tfidf_similarity([("same words here", "Same words here")]) == [pytest.approx(1.0)]


def test_overlap_choice_weighs_rare_words_and_breaks_ties():
    questions = ["the cat on the roof", "the sun", "nothing in common", "nothing in common"]
    offered = [["the dog the", "a cat"], ["the moon", "the sun", "moon"], ["a", "bbb", "ccc"], ["dddd", "e"]]
    assert most_similar_choice(questions, offered) == [1, 1, 1, 0]
    assert most_similar_choice([], []) == []
    with pytest.raises(UsageError, match="question 2 has no choices"):
        most_similar_choice(["a", "b"], [["a", "b"], []])
    with pytest.raises(UsageError, match="2 questions and 1 answers"):
        most_similar_choice(["a", "b"], [["a", "b"]])


def test_overlap_choice_by_hand():
    """n = 3 texts; df: sun 2, warm 2, red 1, hot 1. Cosines without the question's length: first sun², second warm²
    over the length, and the shorter choice wins, since both shared words weigh the same."""
    assert most_similar_choice(["sun warm"], [["sun red hot", "warm hot"]]) == [1]
    assert most_similar_choice(["sun warm"], [["sun hot", "warm red hot"]]) == [0]


def test_copying_is_what_it_says():
    assert copy_source(("a", "b")) == ["a", "b"]


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
def test_where_a_sentence_ends(text: str, sentence: str | None) -> None:
    wanted = text.removesuffix(" End.") if sentence is None else sentence
    assert lead_sentences([text]) == [wanted]


def test_more_sentences():
    assert lead_sentences(["A is. B is. C is.", "Only one."], 2) == ["A is. B is.", "Only one."]
    with pytest.raises(UsageError, match="0 sentences"):
        lead_sentences(["a"], 0)


@settings(deadline=None)
@given(st.text("ab AB.?!\"')\n"), st.integers(1, 4))
def test_sentences_are_a_beginning_of_the_text(text, count):
    (found,) = lead_sentences([text], count)
    assert text.strip().startswith(found)
    assert len(found) >= len(lead_sentences([text], 1)[0])


@pytest.mark.parametrize("sign", [".", " ", ". ", "a", "a. ", '"', ".) "])
def test_a_sentence_is_found_in_linear_time_whatever_the_text(sign: str) -> None:
    """In quadratic time a million of them would take hours."""
    assert lead_sentences([f"A{sign * 1_000_000}b"], 3) == [f"A{sign * 1_000_000}b"]


@settings(deadline=None)
@given(SOME, SOME)
def test_nearest_is_sklearns_greatest_cosine(train, inputs):
    found = nearest_neighbor_targets(train, [str(i) for i in range(len(train))], inputs)
    if not any(ngram_features(text) for text in train):
        assert found == ["0"] * len(inputs)
        return
    vectorizer = sklearn_text.TfidfVectorizer(analyzer=ngram_features)
    table = np.asarray(vectorizer.fit_transform(train).todense())
    cosines = np.asarray(vectorizer.transform(inputs).todense()) @ table.T
    assert found == [str(int(np.argmax(row >= row.max() - 1e-8))) for row in cosines]


def test_nearest_among_many():
    """Words as uneven as a language's, so that how often, how rare and how long all have a say."""
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in random.zipf(1.5, random.integers(1, 15)) % 40) for _ in range(500)]
    train, inputs = texts[:300], texts[300:]
    vectorizer = sklearn_text.TfidfVectorizer(analyzer=ngram_features)
    table = np.asarray(vectorizer.fit_transform(train).todense())
    cosines = np.asarray(vectorizer.transform(inputs).todense()) @ table.T
    found = nearest_neighbor_targets(train, [str(i) for i in range(300)], inputs)
    assert found == [str(int(np.argmax(row >= row.max() - 1e-9))) for row in cosines]


def test_nearest_takes_the_first_of_equals():
    assert nearest_neighbor_targets(["a b", "A b", "c"], ["first", "second", "third"], ["a b", "c", "unseen"]) == [
        "first", "third", "first",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="2 training sources and 1 answers"):
        nearest_neighbor_targets(["a", "b"], ["a"], ["a"])


@pytest.mark.parametrize("learn", [lambda: NaiveBayes([], []), lambda: naive_bayes_multilabel([], [], ["a"])])
def test_nothing_can_be_learned_from_nothing(learn: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match="no text to learn from"):
        learn()


@pytest.mark.parametrize(("name", "bound"), [("trec", 0.80), ("movie_reviews", 0.77)])
def test_naive_bayes_on_sentences(name: str, bound: float) -> None:
    train, test = data(name, "train"), data(name, "test")
    labels = sorted(set(column(train, "label")))
    predicted = NaiveBayes(column(train, "text"), column(train, "label")).predict(column(test, "text"))
    accuracy = classification(column(test, "label"), predicted, labels)["accuracy"]
    first = classification(column(test, "label"), majority(column(train, "label"), len(test)), labels)["accuracy"]
    assert first.high < bound < accuracy.value


def test_naive_bayes_on_entailment():
    train, test = data("mnli", "train"), data("mnli", "validation")
    pairs = [[(row["premise"], row["hypothesis"]) for row in rows] for rows in (train, test)]
    predicted = NaiveBayes(pairs[0], column(train, "label"), pair_features).predict(pairs[1])
    labels = sorted(set(column(train, "label")))
    assert classification(column(test, "label"), predicted, labels)["accuracy"].value > 0.45


def test_overlap_on_sentence_pairs():
    test = data("stsb", "test")
    found = tfidf_similarity([(row["sentence1"], row["sentence2"]) for row in test])
    assert similarity([float(row["score"]) for row in test], found)["pearson"].value > 0.68


def test_overlap_choice_on_questions():
    test = data("arc_easy", "test")
    found = most_similar_choice(column(test, "question"), column(test, "choices"))
    assert multiple_choice(column(test, "answer"), found)["accuracy"].low > 0.26


def test_the_first_sentence_as_a_summary():
    test = data("scitldr", "test")[:200]
    summaries = column(test, "summary")
    score = generation_metrics(summaries, lead_sentences(column(test, "text")), ["rouge1"])["rouge1"]
    assert 23 < score.value < 30


def test_the_nearest_translation_beats_copying():
    train, test = data("english_french", "train")[:6000], data("english_french", "test")[:400]
    english, french = column(test, "english"), column(test, "french")
    found = nearest_neighbor_targets(column(train, "english"), column(train, "french"), english)
    score, copied = (generation_metrics(french, texts, ["chrf"])["chrf"] for texts in (found, copy_source(english)))
    assert copied.high < 18 < 24 < score.low
