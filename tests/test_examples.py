"""Labelled rows to examples: what the columns mean, what is wrong with a row, and what is held out."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nextword.errors import NextwordError, UsageError
from nextword.tasks.columns import choice_columns, resolve_columns
from nextword.text.streams import IssueLog

from needs import DATA
from nextword.tasks.examples import (
    Example,
    ExampleSet,
    infer_task,
    input_texts,
    label_names,
    read_examples,
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path, content, task=None, columns=None, gold=True):
    """The task, the fields of each example, and the problems, of a file of this content (rows, or text)."""
    write(path, content) if isinstance(content, list) else path.write_text(content, encoding="utf-8")
    problems = IssueLog()
    examples = read_examples(path, task, problems, columns, gold)
    return examples, [example.fields for example in examples], problems


def chat(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ({"role": "system", "content": system}, *turns) if system else tuple(turns)


PAIR = {"sentence1": "a", "sentence2": "b"}
AB = {"question": "q", "choices": ("a", "b"), "answer": 1}
GOOD = [  # a row as people have it; the task that is guessed; its fields
    ({"Review": "fine", "Sentiment": "pos"}, "classify", {"text": "fine", "label": "pos"}),
    ({"text": "a", "label": 1.0}, "classify", {"text": "a", "label": "1"}),
    ({"sentence": "a", "label": True, "id": 3}, "classify", {"text": "a", "label": "True"}),
    ({"text": "a", "labels": ["x", "y", "x"]}, "classify", {"text": "a", "labels": ("x", "y")}),
    ({"text": "a", "label": []}, "classify", {"text": "a", "labels": ()}),
    ({"text": "a", "labels": "x; y|z"}, "classify", {"text": "a", "labels": ("x", "y", "z")}),
    ({"text": "a", "labels": ""}, "classify", {"text": "a", "labels": ()}),
    ({"premise": "a", "hypothesis": "b", "label": 2}, "entail", {"premise": "a", "hypothesis": "b", "label": "2"}),
    ({"text1": "a", "text2": "b", "similarity": "2.5"}, "similarity", {**PAIR, "score": 2.5}),
    ({**PAIR, "label": 3.8}, "similarity", {**PAIR, "score": 3.8}),
    ({"question1": "a", "question2": "b", "label": 1}, "similarity", {**PAIR, "label": "1"}),
    ({"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}, "choose", AB),
    (
        {"question": "q", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}], "answerKey": "B"},
        "choose",
        AB,
    ),
    ({"ctx": "q", "endings": ["a", "b"], "label": "1"}, "choose", AB),
    ({"question": "q", "A": "a", "B": "b", "C": "", "answer": "b"}, "choose", AB),
    ({"query": "q", "option_b": "b", "option_a": "a", "answer": "b"}, "choose", AB),
    ({"question": "q", "options": [7, 8], "answer": 8}, "choose", {**AB, "choices": ("7", "8")}),
    ({"prompt": "a", "completion": "b"}, "rewrite", {"prompt": "a", "completion": "b"}),
    ({"source": "a", "target": "b"}, "rewrite", {"prompt": "a", "completion": "b"}),
    ({"input": "a", "output": "b"}, "rewrite", {"prompt": "a", "completion": "b"}),
    ({"text": "a", "summary": "b", "id": 1}, "rewrite", {"prompt": "a", "completion": "b"}),
    ({"article": "a", "highlights": "b"}, "rewrite", {"prompt": "a", "completion": "b"}),
    ({"question": "a", "answer": "b"}, "rewrite", {"prompt": "a", "completion": "b"}),
    ({"instruction": "a", "input": "b", "output": "c"}, "chat", {"messages": chat("a\n\nb", "c")}),
    ({"instruction": "a", "input": "", "output": "c"}, "chat", {"messages": chat("a", "c")}),
    ({"instruction": "a", "output": "c", "system": "s"}, "chat", {"messages": chat("a", "c", system="s")}),
    ({"messages": [*chat("a", "b", "c", "d", system="s")]}, "chat", {"messages": chat("a", "b", "c", "d", system="s")}),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "chat",
        {"messages": chat("a", "b")},
    ),
    (
        {"instruction": "a", "input": "b", "output": "z", "chosen": "c", "rejected": "d"},
        "prefer",
        {"messages": chat("a\n\nb"), "chosen": "c", "rejected": "d"},
    ),
    (
        {"prompt": "[1]", "chosen": "[2]", "rejected": "d"},
        "prefer",
        {"messages": chat("[1]"), "chosen": "[2]", "rejected": "d"},
    ),
    (
        {"prompt": "unused", "chosen": [*chat("q", "x", "r", "c")], "rejected": [*chat("q", "x", "r", "d")]},
        "prefer",
        {"messages": chat("q", "x", "r"), "chosen": "c", "rejected": "d"},
    ),
    (
        {"prompt": [*chat("q")], "chosen": [chat("q", "c")[1]], "rejected": [chat("q", "d")[1]]},
        "prefer",
        {"messages": chat("q"), "chosen": "c", "rejected": "d"},
    ),
]


@pytest.mark.parametrize(("row", "task", "fields"), GOOD, ids=range(len(GOOD)))
def test_the_columns_that_people_have(row, task, fields, tmp_path):
    assert infer_task(row) == task
    examples, found, problems = read(tmp_path / "a.jsonl", [row])
    assert (examples.task, found, problems.total) == (task, [fields], 0)
    assert (examples.items[0].path, examples.items[0].line) == (str(tmp_path / "a.jsonl"), 1)
    assert set(examples.columns.values()) <= set(row)
    again = read(tmp_path / "a.jsonl", [row], task, examples.columns)  # the columns found are columns one may name
    assert again[0] == examples


@pytest.mark.parametrize(("row", "task", "fields"), GOOD, ids=range(len(GOOD)))
def test_without_gold_the_rest_is_read_all_the_same(row, task, fields, tmp_path):
    examples, _, _ = read(tmp_path / "a.jsonl", [row])
    learned = {"label", "labels", "score", "answer", "completion", "chosen", "rejected", "output"}
    bare = {name: value for name, value in row.items() if name not in {examples.columns.get(role) for role in learned}}
    if task == "prefer" and isinstance(row["chosen"], list) and isinstance(row["prompt"], str):
        return  # its prompt is in what was taken away
    _, [found], problems = read(tmp_path / "a.jsonl", [bare], task, examples.columns, gold=False)
    if task == "chat" and "output" in row:
        fields = {"messages": fields["messages"][:-1]}
    assert found == {name: value for name, value in fields.items() if name not in learned} and problems.total == 0
    _, [found], problems = read(tmp_path / "a.jsonl", [row], task, examples.columns, gold=False)
    assert problems.total == 0 and input_texts(task, Example("", 1, found)) == input_texts(task, examples.items[0])


def test_cells_of_csv_may_hold_json(tmp_path):
    table = 'question,choices,answer\nq,"[""a"", ""b\\ud800""]",B\n'
    _, found, problems = read(tmp_path / "a.csv", table)
    assert found == [{"question": "q", "choices": ("a", "b\ufffd"), "answer": 1}] and problems.total == 0


TURN = {"role": "user", "content": "a"}
BAD = [  # (task, a row, what is said of it)
    ("classify", {"text": " \n", "label": "x"}, "the text is empty"),
    ("classify", {"text": None, "label": "x"}, "the text is empty"),
    ("classify", {"text": 5, "label": "x"}, "the text is not a string; left out: it is a int"),
    ("classify", {"text": "a", "label": ""}, "the label is empty"),
    ("classify", {"text": "a", "label": None}, "the label is empty"),
    ("classify", {"text": "a", "label": float("nan")}, "the label is empty"),
    ("classify", {"text": "a", "label": 1.5}, "the label is no text and no whole number; left out: it is 1.5"),
    ("classify", {"text": "a", "label": {"a": 1}}, "the label is no text and no whole number"),
    ("classify", {"text": "a", "class": "x"}, "no column label: found text, class"),
    ("entail", {"premise": "a", "hypothesis": "", "label": "x"}, "the hypothesis is empty"),
    ("similarity", {**PAIR, "score": "x"}, "the score is no finite number; left out: it is 'x'"),
    ("similarity", {**PAIR, "score": float("inf")}, "the score is no finite number"),
    ("similarity", {**PAIR, "score": 10**400}, "the score is no finite number"),
    ("similarity", {**PAIR, "score": True}, "the score is no finite number"),
    ("similarity", {**PAIR, "score": "1_0"}, "the score is no finite number"),
    ("choose", {"question": "q", "choices": ["a", "b"], "answer": 2}, "the answer is out of range"),
    ("choose", {"question": "q", "choices": ["a", "b"], "answer": -1}, "the answer is out of range"),
    ("choose", {"question": "q", "choices": ["a", "b"], "answer": "c"}, "the answer is none of the choices"),
    ("choose", {"question": "q", "choices": ["a", "b"], "answer": None}, "the answer is empty"),
    ("choose", {"question": "q", "choices": ["a"], "answer": 0}, "fewer than two choices"),
    ("choose", {"question": "q", "choices": ["a", ""], "answer": 0}, "the choice is empty"),
    ("choose", {"question": "q", "choices": "a, b", "answer": 0}, "the choices are not a list"),
    ("rewrite", {"prompt": "a", "completion": ""}, "the completion is empty"),
    ("chat", {"messages": []}, "without a turn of the user"),
    ("chat", {"messages": [TURN]}, "unclosed"),
    ("chat", {"messages": [TURN, TURN]}, "two turns of one role in a row"),
    ("chat", {"messages": [TURN, {"role": "tool", "content": "b"}]}, "unknown role"),
    ("chat", {"messages": [TURN, {"role": ["x"], "content": "b"}]}, "unknown role"),
    ("chat", {"messages": [TURN, {"role": "system", "content": "b"}]}, "a system turn that is not the first"),
    ("chat", {"messages": [TURN, {"role": "assistant", "content": " "}]}, "the content of a turn is empty"),
    ("chat", {"messages": [TURN, {"role": "assistant", "content": None}]}, "the content of a turn is empty"),
    ("chat", {"messages": [{"role": "assistant", "content": "a"}]}, "without a turn of the user"),
    ("chat", {"messages": "hello"}, "no list of messages"),
    ("chat", {"messages": ["a", "b"]}, "no object with a role"),
    ("prefer", {"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
    ("prefer", {"prompt": "a", "chosen": "", "rejected": "b"}, "the chosen answer is empty"),
    ("prefer", {"prompt": "", "chosen": "a", "rejected": "b"}, "the prompt is empty"),
    ("prefer", {"prompt": [*chat("a", "b")], "chosen": "a", "rejected": "b"}, "does not end with the user"),
    (
        "prefer",
        {"prompt": "", "chosen": [*chat("a", "b", "c", "d")], "rejected": [*chat("a", "x", "c", "e")]},
        "not one conversation",
    ),
]
FINE = {
    "classify": {"text": "a", "label": "x"},
    "entail": {"premise": "a", "hypothesis": "b", "label": "x"},
    "similarity": {**PAIR, "score": 1},
    "choose": {"question": "q", "choices": ["a", "b"], "answer": 0},
    "rewrite": {"prompt": "a", "completion": "b"},
    "chat": {"messages": [*chat("a", "b")]},
    "prefer": {"prompt": "a", "chosen": "b", "rejected": "c"},
}


@pytest.mark.parametrize(("task", "row", "what"), BAD, ids=range(len(BAD)))
def test_a_bad_row_is_named_and_left_out(task, row, what, tmp_path):
    examples, _, problems = read(tmp_path / "a.jsonl", [FINE[task], row, FINE[task]], task)
    assert [example.line for example in examples] == [1, 3]
    [problem] = [p for p in problems.issues if "columns that are not read" not in p.what]
    assert (problem.path, problem.line, problem.count) == (str(tmp_path / "a.jsonl"), 2, 1) and what in problem.what
    with pytest.raises(NextwordError, match="line 2"):
        read_examples(tmp_path / "a.jsonl", task, IssueLog(strict=True))


def test_a_bad_gold_is_noticed_where_none_is_needed(tmp_path):
    rows = [{"text": "a", "label": 1.5}, {"text": "b", "label": ""}, {"text": "c", "label": "x"}, {"text": ""}]
    _, found, problems = read(tmp_path / "a.jsonl", rows, "classify", gold=False)
    assert found == [{"text": "a"}, {"text": "b"}, {"text": "c", "label": "x"}]
    assert (problems.total, len(problems.issues)) == (1, 2) and "read without it" in problems.summary_lines()[0]
    _, found, problems = read(tmp_path / "a.jsonl", [{"messages": [TURN]}], "chat", gold=False)
    assert found == [{"messages": chat("a")}] and not problems.issues


def test_what_the_answers_are_is_told_by_all_rows_together(tmp_path):
    rows = [{"question": "q", "choices": ["3", "2", "1", "0"], "answer": answer} for answer in ("2", "3", "0")]
    assert [f["answer"] for f in read(tmp_path / "a.jsonl", rows)[1]] == [2, 3, 0]
    rows.append({"question": "q", "choices": ["8", "9"], "answer": "9"})  # no number of a choice: all are texts
    assert [f["answer"] for f in read(tmp_path / "a.jsonl", rows)[1]] == [1, 0, 3, 1]


def test_labels_that_are_numbers_are_scores_where_most_are_and_not_all_whole(tmp_path):
    pairs = [{"sentence1": "a", "sentence2": "b", "label": label} for label in ("1", "2.5", "n/a", "3")]
    examples, found, problems = read(tmp_path / "a.jsonl", pairs)
    assert [f["score"] for f in found] == [1, 2.5, 3] and examples.columns["score"] == "label"
    assert problems.issues[0].line == 3
    whole = [{**pair, "label": "1"} for pair in pairs]
    assert [f["label"] for f in read(tmp_path / "a.jsonl", whole)[1]] == ["1"] * 4
    assert [f["score"] for f in read(tmp_path / "a.jsonl", whole, None, examples.columns)[1]] == [1] * 4


def test_columns_by_hand(tmp_path):
    path, table = tmp_path / "a.tsv", "english\tfrench\tid\nyes\toui\t1\n"
    by_hand = {"prompt": "english", "completion": "french"}
    examples, found, problems = read(path, table, None, by_hand)
    assert (examples.task, found, examples.columns) == ("rewrite", [{"prompt": "yes", "completion": "oui"}], by_hand)
    assert problems.total == 0 and "columns that are not read: id" in problems.summary_lines()[0]
    _, found, _ = read(path, "english\nyes\n", "rewrite", by_hand, gold=False)
    assert found == [{"prompt": "yes"}]
    assert read(path, table, None, {"text": "french", "label": "english"})[0].task == "classify"
    assert read(path, "text\tsummary\tx\na\tb\tc\n", None, {"text": "summary", "label": "x"})[0].task == "classify"
    for task, columns, what in [
        ("rewrite", {"source": "english"}, r"rewrite has no source; it has prompt, completion"),
        ("choose", {"choice0": "english"}, r"choose has no choice0; .*or choice1, choice2"),
        ("rewrite", {"prompt": "German"}, r"no column German for prompt; found english, french, id"),
        ("rewrite", {"prompt": "english"}, r"needs a column for completion; found english"),
        ("classify", {"text": "id", "label": "french", "labels": "english"}, "label or labels, not both"),
        ("translate", {}, "no such task; there are classify"),
    ]:
        with pytest.raises(UsageError, match=what) as caught:
            read(path, table, task, columns)
        assert str(path) in str(caught.value)
    choices = {"choice1": "first", "choice2": "second"}
    row = {"question": "q", "first": "a", "second": "b", "answer": "A"}
    assert read(tmp_path / "a.jsonl", [row], "choose", choices)[1] == [
        {"question": "q", "choices": ("a", "b"), "answer": 0}
    ]
    choices |= {"choice3": "third", "answer": "answer"}
    row = {"question": "q", "first": "a", "second": "b"}
    assert read(tmp_path / "a.jsonl", [row], "choose", choices, gold=False)[1] == [
        {"question": "q", "choices": ("a", "b")}
    ]
    with pytest.raises(UsageError, match="no column first for choice1"):
        read(tmp_path / "a.jsonl", [{"question": "q", "third": "c"}], "choose", choices, gold=False)


def test_no_task_fits():
    with pytest.raises(UsageError, match=r"no task fits the columns x, y(.|\n)*classify: a text"):
        infer_task(["x", "y"])
    assert infer_task(["text", "url"]) == "continue"
    assert infer_task(["text", "labels"]) == "classify"
    assert infer_task(["messages", "chosen", "rejected"]) == "chat"


def test_choice_columns():
    assert choice_columns(["B", "x", "A", "C"]) == ["A", "B", "C"]
    assert choice_columns(["ending1", "ending0", "ending2"]) == ["ending0", "ending1", "ending2"]
    assert choice_columns(["choice10", *(f"choice{i}" for i in range(1, 10))])[-1] == "choice10"
    assert choice_columns(["A", "C"]) == choice_columns(["option_b", "option_c"]) == choice_columns(["choice1"]) == []
    assert resolve_columns("choose", ["Question", "optionA", "optionB", "answer"]) == {
        "question": "Question", "choice1": "optionA", "choice2": "optionB", "answer": "answer",
    }  # fmt: skip


def test_files_and_folders(tmp_path):
    write(tmp_path / "b.jsonl", [{"text": "b", "label": "1"}])
    write(tmp_path / "a.jsonl", [{"text": "a", "label": "1"}])
    (tmp_path / "c.csv").write_text("sentence,label\nc,1\n")
    (tmp_path / "d.json").write_text("[]")
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "more").mkdir()
    problems = IssueLog()
    examples = read_examples([tmp_path, str(tmp_path / "b.jsonl")], None, problems)
    assert [example.fields["text"] for example in examples] == ["a", "b", "b"] and len(examples) == 3
    assert [(p.path[-5:], p.line, p.what) for p in problems.issues if p.path != str(tmp_path)] == [
        ("c.csv", 1, "no column text: found sentence, label"),
        ("/d.json"[-5:], None, "there is no example in the file"),
    ]
    assert problems.counts_by_kind["left out: what is no table in the folder, and the folders in it"] == 2
    with pytest.raises(UsageError, match="no such file"):
        read_examples(tmp_path / "gone", None, problems)
    with pytest.raises(UsageError, match=r"(?s)no examples and no texts.*d\.json: there is no example"):
        read_examples(tmp_path / "d.json", None, problems)
    problems = IssueLog()
    assert not read_examples(tmp_path / "d.json", "classify", problems).items and problems.total == 1
    assert not read_examples(tmp_path / "README.md", "classify", problems).items
    assert "not a table that is read" in problems.summary_lines()[-1]


def test_text_alone_goes_on_being_documents(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert read_examples(tmp_path, None, IssueLog()) == ExampleSet("continue", {}, [])
    write(tmp_path / "a.jsonl", [{"Story": "a", "id": 1}])
    assert read_examples(tmp_path, None, IssueLog()) == ExampleSet("continue", {"text": "Story"}, [])


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from(["user", "assistant", "system", "A", "[1]", '{"a": 1}', '["a", "b"]', "1"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text", "label"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@pytest.mark.parametrize("task", FINE)
@pytest.mark.parametrize("gold", [True, False], ids=["gold", "bare"])
def test_no_values_whatever_are_fatal(task, gold, tmp_path):
    path = tmp_path / "a.jsonl"

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(FINE[task], ANY)), max_size=4))
    def check(rows):
        rows = [FINE[task], *rows]
        examples, fields, problems = read(path, rows, task, gold=gold)
        assert len(examples) + problems.total == len(rows)
        assert fields[0] == read(path, [FINE[task]], task, gold=gold)[1][0] or task in (
            "classify",
            "similarity",
            "choose",
        )
        for example in examples:
            texts = input_texts(task, example)
            assert texts and all(text.strip() and text.encode() for text in texts)

    check()


RENAMED = {"prompt": "english", "completion": "french"}
SHARED = [
    ("trec/train.csv", "classify", 5452), ("trec/test.csv", "classify", 500),
    ("movie_reviews/train.csv", "classify", 8530), ("movie_reviews/validation.csv", "classify", 1066),
    ("movie_reviews/test.csv", "classify", 1066),
    ("mnli/train.jsonl", "entail", 7107), ("mnli/validation.jsonl", "entail", 1777),
    ("stsb/train.csv", "similarity", 5749), ("stsb/validation.csv", "similarity", 1500),
    ("stsb/test.csv", "similarity", 1379),
    ("arc_easy/train.jsonl", "choose", 2241), ("arc_easy/validation.jsonl", "choose", 567),
    ("arc_easy/test.jsonl", "choose", 2365),
    ("english_french/validation.tsv", "rewrite", 2914), ("english_french/test.tsv", "rewrite", 2887),
    ("english_french/train.tsv", "rewrite", 57985),
    ("scitldr/train.jsonl", "rewrite", 1992), ("scitldr/validation.jsonl", "rewrite", 619),
    ("scitldr/test.jsonl", "rewrite", 618),
    ("dialogues/train.jsonl", "chat", 1800), ("dialogues/validation.jsonl", "chat", 200),
    ("instructions/instructions.json", "chat", 1100), ("instructions/preferences.json", "prefer", 1100),
]  # fmt: skip


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs data: {DATA} is not there; set NEXTWORD_DATA")
@pytest.mark.parametrize(("name", "task", "count"), SHARED, ids=[name for name, _, _ in SHARED])
def test_the_shared_data(name, task, count):
    problems = IssueLog()
    examples = read_examples(DATA / name, None, problems, RENAMED if name.startswith("english") else None)
    assert (examples.task, len(examples) + problems.total) == (task, count)
    same = "the chosen answer and the rejected one are the same; left out"
    assert [p.what for p in problems.issues if p.line] == ([same] if task == "prefer" else [])
    if task == "prefer":
        rows = json.loads((DATA / name).read_text(encoding="utf-8"))
        assert problems.total == sum(row["chosen"] == row["rejected"] for row in rows) == 6
    if task in ("classify", "entail"):
        first = {"trec": "ABBR", "movie_reviews": "negative", "mnli": "contradiction"}[name.split("/")[0]]
        assert label_names(examples)[0] == first
