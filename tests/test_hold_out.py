"""What is made of examples once they are read: the labels' order, unknown labels, and the part that is held out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextword.common.errors import UsageError
from nextword.data.decoding import IssueLog
from nextword.tasks.examples import (
    Example,
    ExampleSet,
    filter_known_labels,
    input_texts,
    label_names,
    train_validation_split,
)


def labelled(*labels):
    return [Example("a.csv", i, {"text": "a", "label": label}) for i, label in enumerate(labels, 2)]


def test_label_names_and_unknown_labels():
    assert label_names(labelled("10", "9", "-1", "1.5", "9")) == ["-1", "1.5", "9", "10"]
    assert label_names(labelled("b", "10", "9", "é", "B")) == ["10", "9", "B", "b", "é"]
    several = [Example("a", 1, {"text": "a", "labels": ("y", "x")}), Example("a", 2, {"text": "a", "labels": ()})]
    assert label_names(several) == ["x", "y"] and label_names([Example("a", 1, {"text": "b"})]) == []
    problems = IssueLog()
    kept = filter_known_labels([*labelled("a", "b", "c"), *several], ["a", "x"], problems)
    assert [example.fields.get("label") for example in kept] == ["a", None]
    assert [(p.path, p.line, p.count) for p in problems.issues] == [("a.csv", 3, 2), ("a", 1, 1)]
    assert "that the training data does not have; left out: b" in problems.summary_lines()[0]


SMALL = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=40)


@settings(max_examples=100, deadline=None)
@given(SMALL, st.sampled_from([0.01, 0.1, 0.5, 0.99]), st.randoms(use_true_random=False))
def test_hold_out(pairs, share, random):
    items = [Example("a", i, {"text": f"text {text}", "label": str(label)}) for i, (text, label) in enumerate(pairs)]
    train, held = train_validation_split(ExampleSet("classify", {}, items), share)
    inputs = [{example.fields["text"] for example in side} for side in (train, held)]
    assert not inputs[0] & inputs[1] and len(train) + len(held) == len(items)
    assert [e.line for e in train] == sorted(e.line for e in train)
    if len(inputs[0] | inputs[1]) > 1:
        assert train and held
    random.shuffle(items)
    again = train_validation_split(ExampleSet("classify", {}, items), share)
    assert [sorted(e.line for e in side) for side in again] == [[e.line for e in side] for side in (train, held)]


def test_the_held_out_share_and_pairs_in_either_order():
    items = [Example("a", i, {"text": f"text {i}"}) for i in range(5000)]
    train, held = train_validation_split(ExampleSet("classify", {}, items), 0.2)
    assert 900 < len(held) < 1100 and len(train) + len(held) == 5000
    more = [*items, *(Example("b", i, {"text": f"other {i}"}) for i in range(500))]
    assert [e for e in train_validation_split(ExampleSet("classify", {}, more), 0.2)[1] if e.path == "a"] == held
    pairs = [Example("a", i, {"sentence1": f"{i // 2}", "sentence2": "x"}) for i in range(0, 200, 2)]
    swapped = [Example("b", e.line, {"sentence1": "x", "sentence2": e.fields["sentence1"]}) for e in pairs]
    _, held = train_validation_split(ExampleSet("similarity", {}, pairs + swapped), 0.3)
    assert {e.line for e in held if e.path == "a"} == {e.line for e in held if e.path == "b"} != set()
    for share in (0, 1, -1, float("nan")):
        with pytest.raises(UsageError, match="between 0 and 1"):
            train_validation_split(ExampleSet("classify", {}, items), share)
    with pytest.raises(UsageError, match="continue: no task with labelled examples"):
        input_texts("continue", items[0])
