"""Labeled examples after reading: the order of labels, unknown labels, and the validation split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextword.common.errors import UsageError
from nextword.data.issues import IssueLog
from nextword.tasks.examples import (
    Example,
    ExampleSet,
    filter_known_labels,
    input_texts,
    label_names,
    train_validation_split,
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


def split(task, examples, fraction):
    return train_validation_split(ExampleSet(task, {}, examples), fraction)


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


def test_the_fraction_is_met_and_more_examples_do_not_move_others():
    examples = [Example("a", i, {"text": f"text {i}"}) for i in range(5000)]
    train, validation = split("classify", examples, 0.2)
    assert 900 < len(validation) < 1100 and len(train) + len(validation) == 5000
    more = [*examples, *(Example("b", i, {"text": f"other {i}"}) for i in range(500))]
    assert [example for example in split("classify", more, 0.2)[1] if example.path == "a"] == validation
    for fraction in (0, 1, -1, float("nan")):
        with pytest.raises(UsageError, match="between 0 and 1"):
            split("classify", examples, fraction)
    with pytest.raises(UsageError, match="continue: "):
        input_texts("continue", examples[0])


def test_a_pair_and_its_reverse_are_in_the_same_split():
    pairs = [Example("a", i, {"sentence1": f"{i // 2}", "sentence2": "x"}) for i in range(0, 200, 2)]
    reversed_pairs = [
        Example("b", example.line, {"sentence1": "x", "sentence2": example.fields["sentence1"]}) for example in pairs
    ]
    _, validation = split("similarity", pairs + reversed_pairs, 0.3)
    validation_lines = [{example.line for example in validation if example.path == path} for path in "ab"]
    assert validation_lines[0] == validation_lines[1] != set()
