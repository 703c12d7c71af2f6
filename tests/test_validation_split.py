"""Labeled examples after reading: the order of labels, unknown labels, and the validation split."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextword.common.errors import UsageError
from nextword.data.issues import IssueLog
from nextword.pipeline.evaluators import cross_fitted
from nextword.tasks.examples import (
    Example,
    ExampleSet,
    filter_known_labels,
    hash_inputs,
    input_texts,
    label_names,
    split_examples,
)


def labeled(*labels):
    return [Example("a.csv", line, {"text": "a", "label": label}) for line, label in enumerate(labels, 2)]


def test_label_names_are_sorted_as_numbers_or_as_text():
    assert label_names(labeled("10", "9", "-1", "1.5", "9")) == ["-1", "1.5", "9", "10"]
    assert label_names(labeled("b", "10", "9", "é", "B")) == ["10", "9", "B", "b", "é"]
    multilabel = [Example("a", 1, {"text": "a", "labels": ("y", "x")}), Example("a", 2, {"text": "a", "labels": ()})]
    assert label_names(multilabel) == ["x", "y"] and label_names([Example("a", 1, {"text": "b"})]) == []


def test_examples_with_unknown_labels_are_dropped_and_recorded():
    multilabel = [Example("a", 1, {"text": "a", "labels": ("y", "x")}), Example("a", 2, {"text": "a", "labels": ()})]
    issues = IssueLog()
    kept = filter_known_labels([*labeled("a", "b", "c"), *multilabel], ["a", "x"], issues)
    assert [example.fields.get("label") for example in kept] == ["a", None]
    assert [(issue.path, issue.line, issue.count) for issue in issues.issues] == [("a.csv", 3, 2), ("a", 1, 1)]
    assert "left out: b" in issues.summary_lines()[0]


def split(task, examples, *fractions, **options):
    train, validation, test = split_examples(ExampleSet(task, {}, examples), *fractions, **options)
    return (train, validation, test) if len(fractions) > 1 else (train, validation)


def lines(examples):
    return [example.line for example in examples]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=40),
    st.sampled_from([0.01, 0.1, 0.5, 0.99]),
    st.randoms(use_true_random=False),
)
def test_the_split_separates_texts_and_does_not_depend_on_the_order(pairs, fraction, random):
    examples = [Example("a", i, {"text": f"text {text}", "label": str(label)}) for i, (text, label) in enumerate(pairs)]
    train, validation = split("classify", examples, fraction)
    train_texts, validation_texts = ({example.fields["text"] for example in part} for part in (train, validation))
    assert not train_texts & validation_texts and len(train) + len(validation) == len(examples)
    assert lines(train) == sorted(lines(train))
    if len(train_texts | validation_texts) > 1:
        assert train and validation
    random.shuffle(examples)
    shuffled = split("classify", examples, fraction)
    assert [sorted(lines(part)) for part in shuffled] == [lines(train), lines(validation)]


def test_the_fractions_are_met_and_more_examples_move_few_others():
    examples = [Example("a", i, {"text": f"text {i}"}) for i in range(5000)]
    train, validation, test = split("classify", examples, 0.2, 0.1)
    assert [len(train), len(validation), len(test)] == [3500, 1000, 500]
    more = [*examples, *(Example("b", i, {"text": f"other {i}"}) for i in range(500))]
    kept = {example.line for example in split("classify", more, 0.2)[1] if example.path == "a"}
    assert len(kept ^ set(lines(validation))) < 60
    with pytest.raises(UsageError, match="continue: "):
        input_texts("continue", examples[0])


def test_runs_of_the_first_version_keep_their_split():
    examples = [Example("a", i, {"text": f"text {i}"}) for i in range(2000)]
    validation = lines(split("classify", examples, 0.1, version=1)[1])
    expected = [i for i, example in enumerate(examples) if hash_inputs("classify", example) < 0.1 * 2**64]
    assert validation == expected and split("classify", examples, 0.0, version=1)[1] == []


def test_cross_fitting_has_no_optimism():
    rng = np.random.default_rng(0)
    reported, selected = [], []
    for _ in range(400):
        right = (rng.random((10, 60)) < 0.6).astype(int)  # ten evaluations of weights that are equally good

        def select(indices, right=right):
            return int(right[:, indices].mean(1).argmax())

        reported.append(np.mean(cross_fitted(right.tolist(), np.arange(60) % 5, select)))
        selected.append(right.mean(1).max())
    assert abs(np.mean(reported) - 0.6) < 0.01 and np.mean(selected) > 0.66


def test_cross_fitting_gives_each_fold_what_the_others_select():
    folds = np.array([0, 1, 0, 1])
    assert cross_fitted([["a"] * 4, ["b"] * 4], folds, lambda others: others[0]) == ["b", "a", "b", "a"]


def test_a_pair_and_its_reverse_are_in_the_same_split():
    pairs = [Example("a", i, {"sentence1": f"{i // 2}", "sentence2": "x"}) for i in range(0, 200, 2)]
    reversed_pairs = [
        Example("b", example.line, {"sentence1": "x", "sentence2": example.fields["sentence1"]}) for example in pairs
    ]
    _, validation = split("similarity", pairs + reversed_pairs, 0.3)
    validation_lines = [{example.line for example in validation if example.path == path} for path in "ab"]
    assert validation_lines[0] == validation_lines[1] != set()
