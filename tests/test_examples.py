"""Labeled examples: columns, tasks, valid and invalid rows."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextword.common.errors import NextwordError, UsageError
from nextword.data.issues import IssueLog
from nextword.data.readers import TEXT_COLUMNS, read_text_rows
from nextword.tasks.examples import (
    Example,
    ExampleSet,
    input_texts,
    label_names,
    read_examples,
)
from nextword.tasks.schema import TASKS, choice_columns, fitting_tasks, resolve_columns

DATA = Path(os.environ.get("NEXTWORD_DATA", Path(__file__).parents[1] / "../shared/data"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path, content, task=None, columns=None, require_targets=True, like=None):
    """The examples, the fields of each, and the issues of a file with this content (rows, or text)."""
    write(path, content) if isinstance(content, list) else path.write_text(content, encoding="utf-8")
    issues = IssueLog()
    examples = read_examples(path, task, issues, columns, require_targets, like)
    return examples, [example.fields for example in examples], issues


def chat(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ({"role": "system", "content": system}, *turns) if system else tuple(turns)


TURN, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
PAIR = {"sentence1": "a", "sentence2": "b"}
AB = {"question": "q", "choices": ("a", "b"), "answer": 1}
VALID_ROWS = [  # (row, task, fields)
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
        {
            "messages": [
                {"role": "developer", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "c"}], "weight": 1, "name": "x"},
            ]
        },
        "chat",
        {"messages": chat("a\nb", "c", system="s")},
    ),
    (
        {"messages": [TURN, {**ANSWER, "weight": 0}, TURN, {**ANSWER, "weight": None}]},
        "chat",
        {"messages": (TURN, {**ANSWER, "weight": 0}, TURN, ANSWER)},
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


@pytest.mark.parametrize(("row", "task", "fields"), VALID_ROWS, ids=range(len(VALID_ROWS)))
def test_the_task_and_the_fields_of_a_row(row, task, fields, tmp_path):
    assert fitting_tasks(row)[0] == task
    examples, fields_read, issues = read(tmp_path / "a.jsonl", [row])
    assert (examples.task, fields_read, issues.total) == (task, [fields], 0)
    assert (examples.items[0].path, examples.items[0].line) == (str(tmp_path / "a.jsonl"), 1)
    assert set(examples.columns.values()) <= set(row)
    again = read(tmp_path / "a.jsonl", [row], task, examples.columns)  # the columns may also be named
    assert again[0] == examples


@pytest.mark.parametrize(("row", "task", "fields"), VALID_ROWS, ids=range(len(VALID_ROWS)))
def test_inputs_are_read_without_targets(row, task, fields, tmp_path):
    examples, _, _ = read(tmp_path / "a.jsonl", [row])
    targets = {"label", "labels", "score", "answer", "completion", "chosen", "rejected", "output"}
    bare = {name: value for name, value in row.items() if name not in {examples.columns.get(role) for role in targets}}
    if task == "prefer" and isinstance(row["chosen"], list) and isinstance(row["prompt"], str):
        return  # its prompt is part of its targets
    _, [fields_read], issues = read(tmp_path / "a.jsonl", [bare], require_targets=False, like=examples)
    if task == "chat" and "output" in row:
        fields = {"messages": fields["messages"][:-1]}
    assert fields_read == {name: value for name, value in fields.items() if name not in targets} and issues.total == 0
    _, [fields_read], issues = read(tmp_path / "a.jsonl", [row], require_targets=False, like=examples)
    assert issues.total == 0 and input_texts(task, Example("", 1, fields_read)) == input_texts(task, examples.items[0])


def test_csv_cells_with_json(tmp_path):
    table = 'question,choices,answer\nq,"[""a"", ""b\\ud800""]",B\n'
    _, fields_read, issues = read(tmp_path / "a.csv", table)
    assert fields_read == [{"question": "q", "choices": ("a", "b\ufffd"), "answer": 1}] and issues.total == 0


INVALID_ROWS = [  # (task, row, message)
    ("classify", {"text": " \n", "label": "x"}, "the text is empty"),
    ("classify", {"text": None, "label": "x"}, "the text is empty"),
    ("classify", {"text": 5, "label": "x"}, "the text is not a string; left out: its type is int"),
    ("classify", {"text": "a", "label": ""}, "the label is empty"),
    ("classify", {"text": "a", "label": None}, "the label is empty"),
    ("classify", {"text": "a", "label": float("nan")}, "the label is empty"),
    ("classify", {"text": "a", "label": float("-inf")}, "the label is empty"),
    (
        "classify",
        {"text": "a", "label": {"a": 1}},
        "the label is neither a string nor a number; left out: it is a dict",
    ),
    ("classify", {"text": "a", "class": "x"}, "no column label: columns: text, class"),
    ("entail", {"premise": "a", "hypothesis": "", "label": "x"}, "the hypothesis is empty"),
    ("similarity", {**PAIR, "score": "x"}, "the score is not a finite number; left out: it is 'x'"),
    ("similarity", {**PAIR, "score": float("inf")}, "the score is not a finite number"),
    ("similarity", {**PAIR, "score": 10**400}, "the score is not a finite number"),
    ("similarity", {**PAIR, "score": True}, "the score is not a finite number"),
    ("similarity", {**PAIR, "score": "1_0"}, "the score is not a finite number"),
    ("choose", {"question": "q", "choices": ["a", "b"], "answer": 2}, "the answer is out of range"),
    ("choose", {"question": "q", "choices": ["a", "b"], "answer": -1}, "the answer is out of range"),
    ("choose", {"question": "q", "choices": ["a", "b"], "answer": "c"}, "the answer is none of the choices"),
    ("choose", {"question": "q", "choices": ["a", "b"], "answer": None}, "the answer is empty"),
    ("choose", {"question": "q", "choices": ["a"], "answer": 0}, "fewer than two choices"),
    ("choose", {"question": "q", "choices": ["a", ""], "answer": 0}, "the choice is empty"),
    ("choose", {"question": "q", "choices": "a, b", "answer": 0}, "the choices are not a list"),
    ("rewrite", {"prompt": "a", "completion": ""}, "the completion is empty"),
    ("chat", {"messages": []}, "the conversation has no user message"),
    ("chat", {"messages": [TURN]}, "does not end with an assistant message"),
    ("chat", {"messages": [TURN, TURN]}, "two consecutive messages have the same role"),
    ("chat", {"messages": [TURN, {"role": "tool", "content": "b"}]}, "unknown role"),
    ("chat", {"messages": [TURN, {"role": ["x"], "content": "b"}]}, "unknown role"),
    ("chat", {"messages": [TURN, {"role": "system", "content": "b"}]}, "a system message is not the first message"),
    ("chat", {"messages": [TURN, {"role": "assistant", "content": " "}]}, "the content of a message is empty"),
    ("chat", {"messages": [TURN, {"role": "assistant", "content": None}]}, "the content of a message is empty"),
    ("chat", {"messages": [{"role": "assistant", "content": "a"}]}, "the conversation has no user message"),
    ("chat", {"messages": [TURN, {**ANSWER, "weight": 0}]}, "the weight of all assistant messages is 0"),
    (
        "chat",
        {"messages": [TURN, {**ANSWER, "weight": 0.5}]},
        "the weight of a message is neither 0 nor 1; left out: it is 0.5",
    ),
    ("chat", {"messages": [TURN, {**ANSWER, "content": None, "tool_calls": [{}]}]}, "a message calls a tool"),
    ("chat", {"messages": [{**TURN, "content": [{"type": "image_url"}]}, ANSWER]}, "a part that is not text"),
    ("chat", {"messages": "hello"}, "not a list of messages"),
    ("chat", {"messages": ["a", "b"]}, "not an object with role"),
    ("prefer", {"prompt": "a", "chosen": "b", "rejected": "b"}, "are identical"),
    ("prefer", {"prompt": "a", "chosen": "", "rejected": "b"}, "the chosen answer is empty"),
    ("prefer", {"prompt": "", "chosen": "a", "rejected": "b"}, "the prompt is empty"),
    ("prefer", {"prompt": [*chat("a", "b")], "chosen": "a", "rejected": "b"}, "does not end with a user message"),
    (
        "prefer",
        {"prompt": "", "chosen": [*chat("a", "b", "c", "d")], "rejected": [*chat("a", "x", "c", "e")]},
        "differ in more than the last assistant message",
    ),
]
VALID = {
    "classify": {"text": "a", "label": "x"},
    "entail": {"premise": "a", "hypothesis": "b", "label": "x"},
    "similarity": {**PAIR, "score": 1},
    "choose": {"question": "q", "choices": ["a", "b"], "answer": 0},
    "rewrite": {"prompt": "a", "completion": "b"},
    "chat": {"messages": [*chat("a", "b")]},
    "prefer": {"prompt": "a", "chosen": "b", "rejected": "c"},
}


@pytest.mark.parametrize(("task", "row", "message"), INVALID_ROWS, ids=range(len(INVALID_ROWS)))
def test_an_invalid_row_is_reported_and_left_out(task, row, message, tmp_path):
    examples, _, issues = read(tmp_path / "a.jsonl", [VALID[task], row, VALID[task]], task)
    assert [example.line for example in examples] == [1, 3]
    [issue] = [i for i in issues.issues if "unused columns" not in i.what]
    assert (issue.path, issue.line, issue.count) == (str(tmp_path / "a.jsonl"), 2, 1) and message in issue.what
    with pytest.raises(NextwordError, match="line 2"):
        read_examples(tmp_path / "a.jsonl", task, IssueLog(strict=True))


def test_an_invalid_optional_target_is_reported(tmp_path):
    rows = [{"text": "a", "label": {"a": 1}}, {"text": "b", "label": ""}, {"text": "c", "label": "x"}, {"text": ""}]
    _, fields_read, issues = read(tmp_path / "a.jsonl", rows, "classify", require_targets=False)
    assert fields_read == [{"text": "a"}, {"text": "b"}, {"text": "c", "label": "x"}]
    assert (issues.total, len(issues.issues)) == (1, 2) and "read without its target" in issues.summary_lines()[0]
    _, fields_read, issues = read(tmp_path / "a.jsonl", [{"messages": [TURN]}], "chat", require_targets=False)
    assert fields_read == [{"messages": chat("a")}] and not issues.issues


def test_the_answer_format_is_inferred_from_all_rows(tmp_path):
    rows = [{"question": "q", "choices": ["3", "2", "1", "0"], "answer": answer} for answer in ("2", "3", "0")]
    assert [f["answer"] for f in read(tmp_path / "a.jsonl", rows)[1]] == [2, 3, 0]
    rows.append({"question": "q", "choices": ["8", "9"], "answer": "9"})  # not an index: all answers are texts
    assert [f["answer"] for f in read(tmp_path / "a.jsonl", rows)[1]] == [1, 0, 3, 1]


def test_labels_are_scores_if_most_are_numbers_and_not_all_integers(tmp_path):
    pairs = [{"sentence1": "a", "sentence2": "b", "label": label} for label in ("1", "2.5", "n/a", "3")]
    examples, fields_read, issues = read(tmp_path / "a.jsonl", pairs)
    assert [f["score"] for f in fields_read] == [1, 2.5, 3] and examples.columns["score"] == "label"
    assert issues.issues[0].line == 3
    whole = [{**pair, "label": "1"} for pair in pairs]
    assert [f["label"] for f in read(tmp_path / "a.jsonl", whole)[1]] == ["1"] * 4
    assert [f["score"] for f in read(tmp_path / "a.jsonl", whole, None, examples.columns)[1]] == [1] * 4


def test_columns_chosen_by_the_user(tmp_path):
    path, table = tmp_path / "a.tsv", "english\tfrench\tid\nyes\toui\t1\n"
    overrides = {"prompt": "english", "completion": "french"}
    examples, fields_read, issues = read(path, table, None, overrides)
    assert (examples.task, fields_read, examples.columns) == (
        "rewrite",
        [{"prompt": "yes", "completion": "oui"}],
        overrides,
    )
    assert issues.total == 0 and "unused columns: id" in issues.summary_lines()[0]
    _, fields_read, _ = read(path, "english\nyes\n", require_targets=False, like=examples)
    assert fields_read == [{"prompt": "yes"}]
    assert read(path, table, None, {"text": "french", "label": "english"})[0].task == "classify"
    assert read(path, "text\tsummary\tx\na\tb\tc\n", None, {"text": "summary", "label": "x"})[0].task == "classify"
    for task, columns, message in [
        ("rewrite", {"source": "english"}, r"rewrite has no role source; its roles are prompt, completion"),
        ("choose", {"choice0": "english"}, r"choose has no role choice0; .*or choice1, choice2"),
        ("rewrite", {"prompt": "German"}, r"no column German for prompt; columns: english, french, id"),
        ("rewrite", {"prompt": "english"}, r"needs a column for completion; columns: english"),
        ("classify", {"text": "id", "label": "french", "labels": "english"}, "label or labels, not both"),
        ("translate", {}, "unknown task 'translate'; choose from classify"),
    ]:
        with pytest.raises(UsageError, match=message) as caught:
            read(path, table, task, columns)
        assert str(path) in str(caught.value)
    choices = {"choice1": "first", "choice2": "second"}
    row = {"question": "q", "first": "a", "second": "b", "answer": "A"}
    assert read(tmp_path / "a.jsonl", [row], "choose", choices)[1] == [
        {"question": "q", "choices": ("a", "b"), "answer": 0}
    ]
    choices |= {"choice3": "third", "answer": "answer"}
    row = {"question": "q", "first": "a", "second": "b"}
    like = ExampleSet("choose", choices, [])
    assert read(tmp_path / "a.jsonl", [row], require_targets=False, like=like)[1] == [
        {"question": "q", "choices": ("a", "b")}
    ]
    with pytest.raises(UsageError, match="no column first for choice1"):
        read(tmp_path / "a.jsonl", [{"question": "q", "third": "c"}], "choose", choices, require_targets=False)


def test_the_task_of_columns(tmp_path):
    with pytest.raises(UsageError, match=r"no task fits the columns x, y(.|\n)*classify: a text"):
        read(tmp_path / "a.jsonl", [{"x": 1, "y": 2}])
    assert fitting_tasks(["x", "y"]) == []
    assert fitting_tasks(["text", "url"]) == ["continue"]
    assert fitting_tasks(["text", "labels"])[0] == "classify"
    assert fitting_tasks(["messages", "chosen", "rejected"])[0] == "chat"


def test_choice_columns():
    assert choice_columns(["B", "x", "A", "C"]) == ["A", "B", "C"]
    assert choice_columns(["ending1", "ending0", "ending2"]) == ["ending0", "ending1", "ending2"]
    assert choice_columns(["choice10", *(f"choice{i}" for i in range(1, 10))])[-1] == "choice10"
    assert choice_columns(["A", "C"]) == choice_columns(["option_b", "option_c"]) == choice_columns(["choice1"]) == []
    assert resolve_columns("choose", ["Question", "optionA", "optionB", "answer"]) == {
        "question": "Question",
        "choice1": "optionA",
        "choice2": "optionB",
        "answer": "answer",
    }


def test_files_and_folders(tmp_path):
    write(tmp_path / "b.jsonl", [{"text": "b", "label": "1"}])
    write(tmp_path / "a.jsonl", [{"text": "a", "label": "1"}])
    (tmp_path / "c.csv").write_text("sentence,label\nc,1\n")
    (tmp_path / "d.json").write_text("[]")
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "more").mkdir()
    issues = IssueLog()
    examples = read_examples([tmp_path, str(tmp_path / "b.jsonl")], None, issues)
    assert [example.fields["text"] for example in examples] == ["a", "b", "b"] and len(examples) == 3
    assert [(p.path[-5:], p.line, p.what) for p in issues.issues if p.path != str(tmp_path)] == [
        ("c.csv", 1, "no column text: columns: sentence, label"),
        (".json", None, "the file has no examples"),
    ]
    assert issues.counts_by_kind["skipped files that are not tables, and subfolders"] == 2
    with pytest.raises(UsageError, match="no such file"):
        read_examples(tmp_path / "gone", None, issues)
    with pytest.raises(UsageError, match=r"(?s)neither examples nor texts.*d\.json: the file has no examples"):
        read_examples(tmp_path / "d.json", None, issues)
    issues = IssueLog()
    assert not read_examples(tmp_path / "d.json", "classify", issues).items and issues.total == 1
    with pytest.raises(UsageError, match=r"README\.md: text without labels"):
        read_examples(tmp_path / "README.md", "classify", issues)
    assert not read_examples(tmp_path / "README.md", "chat", issues).items
    assert "not a supported table" in issues.summary_lines()[-1]


def test_text_without_labels(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert read_examples(tmp_path, None, IssueLog()) == ExampleSet("continue", {}, [])
    write(tmp_path / "a.jsonl", [{"Story": "a", "id": 1}])
    assert read_examples(tmp_path, None, IssueLog()) == ExampleSet("continue", {"text": "Story"}, [])


def table(rows, suffix):
    """The text of a table of rows."""
    if suffix == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter={"csv": ",", "tsv": "\t"}[suffix])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


FUZZING = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NOTE = "how labels is read"


def test_columns_in_any_spelling_and_order(tmp_path):
    @FUZZING
    @given(
        st.sampled_from(
            [(task, role) for task in ("classify", "entail", "similarity", "rewrite", "chat") for role in (0, 1)]
        ),
        st.randoms(use_true_random=False),
        st.sampled_from(["csv", "tsv", "jsonl"]),
    )
    def check(case, random, suffix):
        task, alias = case
        columns = {role: names[alias % len(names)] for role, names in TASKS[task].columns.items()}
        roles = {"classify": ["text", "label"], "chat": ["instruction", "output"]}.get(task)
        roles = roles or [group[0] for group in TASKS[task].required(True)]
        spelled = {role: random.choice([str.lower, str.upper, str.title])(columns[role]) for role in roles}
        spelled = {role: " " * random.randrange(2) + name for role, name in spelled.items()}
        names = [*spelled.values(), "id"]
        random.shuffle(names)
        row = dict.fromkeys(names, "7") | {
            name: "3" if role == "score" else f"a {role}" for role, name in spelled.items()
        }
        path = tmp_path / f"a.{suffix}"
        examples, fields, issues = read(path, table([row, row], suffix), task)
        assert {role: examples.columns[role] for role in roles} == spelled and len(fields) == 2 and issues.total == 0
        # Other data of the task may have other names.
        usual = {columns[role]: row[name] for role, name in spelled.items()}
        assert read(tmp_path / "b.jsonl", [usual, usual], like=examples)[1] == fields

    check()


def test_prepare_reads_the_column_that_finetune_takes_for_a_text(tmp_path):
    for name in (*TEXT_COLUMNS, "Text", " REVIEW"):
        path = tmp_path / "a.csv"
        path.write_text(f"id,{name}\n1,a text\n")
        assert read_examples(path, None, IssueLog()).columns == {"text": name}
        assert [text for _, text in read_text_rows(path, IssueLog())] == ["a text"]
    assert all(
        tuple(TASKS[task].columns["text"])[: len(TEXT_COLUMNS)] == TEXT_COLUMNS for task in ("classify", "continue")
    )


INTEGERS = st.integers(-3, 99).flatmap(
    lambda i: st.sampled_from([(str(i), v) for v in (i, float(i), str(i), f"{i}.0", f" {i}")])
)
TRUTH = st.sampled_from(
    [
        (str(t), v)
        for t in (True, False)
        for v in (t, str(t), str(t).lower(), str(t).upper(), int(t), str(int(t)), float(t))
    ]
)


@pytest.mark.parametrize("values", [INTEGERS, TRUTH], ids=["integers", "truth values"])
def test_a_label_has_one_name_in_every_type_and_file(values, tmp_path):
    @FUZZING
    @given(st.lists(values, min_size=1, max_size=6), st.sampled_from(["csv", "jsonl"]))
    def check(labels, suffix):
        rows = [{"text": "a", "label": value} for _, value in labels]
        names = [name for name, _ in labels]
        examples, fields, issues = read(tmp_path / f"a.{suffix}", table(rows, suffix))
        found = [f["label"] for f in fields]
        if set(found) <= {"0", "1"}:  # truth values written as numbers only
            names = [{"True": "1", "False": "0"}.get(name, name) for name in names]
        assert found == names and issues.total == 0
        like = ExampleSet("classify", examples.columns, [], labels=tuple(set(found)))
        for other in ("csv", "jsonl"):  # other data, written in another way
            rows = [{"text": "a", "label": value} for name, value in reversed(labels)]
            again = read(tmp_path / f"b.{other}", table(rows, other), like=like)[1]
            assert [f["label"] for f in again] == names[::-1]

    check()


def test_known_labels_are_spelled_as_in_the_training_data(tmp_path):
    def spell(known, names):
        rows = [{"text": "a", "label": name} for name in names]
        like = ExampleSet("classify", {}, [], labels=known)
        return [f["label"] for f in read(tmp_path / "a.jsonl", rows, like=like)[1]]

    assert spell(("Negative", "Positive"), ["positive", "NEGATIVE", "other"]) == ["Positive", "Negative", "other"]
    assert spell(("US", "us"), ["us", "US", "Us"]) == ["us", "US", "Us"]
    assert spell(("0", "1", "2"), [True, "2.0", 1]) == ["True", "2", "1"]
    assert spell(("half-true", "true"), [True, "Half-True"]) == ["true", "half-true"]


def numpy_style(labels):
    return "[" + " ".join(map(repr, labels)) + "]"


STYLES = [
    *(
        json.dumps,
        repr,
        numpy_style,
        lambda labels: repr(tuple(labels)),
        lambda labels: f"array({labels!r}, dtype=object)",
    ),
    list,
]


def test_lists_of_labels_in_any_spelling(tmp_path):
    name = st.text(st.sampled_from("ab \"'\\é,[(:7"), min_size=1, max_size=4).map(lambda text: f"x{text}x")

    @FUZZING
    @given(st.lists(st.lists(name, unique=True, max_size=3), min_size=1, max_size=4), st.sampled_from(STYLES))
    def check(rows, style):
        values = [{"text": "a", "labels": style(labels)} for labels in rows]
        for suffix in ("csv", "jsonl") if style is not list else ("jsonl",):
            _, fields, issues = read(tmp_path / f"a.{suffix}", table(values, suffix))
            assert [f["labels"] for f in fields] == list(map(tuple, rows)) and issues.total == 0

    check()
    for text in (
        "[deleted]",
        "(other)",
        "[1, 2",
        "['a' b]",
        "{x}",
        "(1)",
        "[" * 10_000,
        "['\\d]",
        "array(1",
        "{1, 'a'}",
        "{[1]}",
        "[1]]",
    ):
        _, fields, issues = read(tmp_path / "a.jsonl", [{"text": "a", "label": text}])
        assert [f["label"] for f in fields] == [text] and issues.total == 0


def test_vectors_of_zeros_and_ones(tmp_path):
    styles = [
        *STYLES,
        *(lambda bits, s=s: s.join(map(str, bits)) for s in (" ", ",", ";", " | ")),
        lambda v: f"tensor({v})",
    ]

    @FUZZING
    @given(
        st.integers(3, 5).flatmap(
            lambda n: st.lists(st.lists(st.integers(0, 1), min_size=n, max_size=n), min_size=1, max_size=5)
        ),
        st.sampled_from([int, float, bool]),
        st.sampled_from(styles),
    )
    def check(rows, number, style):
        values = [{"text": "a", "labels": style(list(map(number, row)))} for row in rows]
        if number is bool and style in styles[len(STYLES) : -1]:
            return
        examples, fields, issues = read(tmp_path / "a.jsonl", values)
        places = [tuple(str(place) for place, bit in enumerate(row) if bit) for row in rows]
        if all(sum(row) == 1 for row in rows):
            assert [(f["label"],) for f in fields] == places
        else:
            assert [f["labels"] for f in fields] == places
        assert issues.total == 0 and NOTE in issues.issues[0].what
        assert read(tmp_path / "b.jsonl", values, like=examples)[1] == fields

    check()
    rows = [{"text": "a", "labels": bits} for bits in ([1, 0, 0], [0, 1, 1], [0, 1])]
    with pytest.raises(UsageError, match="vectors of 3 zeros and ones, but some have 2"):
        read(tmp_path / "a.jsonl", rows)
    ids = [{"text": "a", "labels": labels} for labels in ([0], [1], [0, 1])]
    assert [f["labels"] for f in read(tmp_path / "a.jsonl", ids)[1]] == [("0",), ("1",), ("0", "1")]
    soft = [{"text": "a", "labels": [0.9, 0.1]}]
    assert "the labels are fractions" in read(tmp_path / "a.jsonl", soft)[2].summary_lines()[0]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 0, 2], ["1", "0", "2"]),
        (["1", "", "2"], ["1", "2"]),  # a missing number is no empty list
        (["x", "y"], ["x", "y"]),
        (["x", "", "y"], [("x",), (), ("y",)]),
        ([[1], [0]], [("1",), ("0",)]),
        (["x;y", "z"], [("x", "y"), ("z",)]),
        (["x, y", "y,z", "x,z"], [("x", "y"), ("y", "z"), ("x", "z")]),
        (["Paris, TX", "Rome, NY"], ["Paris, TX", "Rome, NY"]),
    ],
)
def test_one_label_or_several_in_a_column_called_labels(labels, expected, tmp_path):
    rows = [{"text": "a", "labels": value} for value in labels]
    examples, fields, issues = read(tmp_path / "a.jsonl", rows)
    assert [f.get("label", f.get("labels")) for f in fields] == expected
    assert (NOTE in "".join(issues.summary_lines())) == isinstance(expected[0], str)
    again = read(tmp_path / "b.jsonl", [{"text": "a", "labels": "5"}], like=examples)[1]
    assert again == [{"text": "a", **({"label": "5"} if isinstance(expected[0], str) else {"labels": ("5",)})}]


LETTERS = "ABCDE"
CONVENTIONS = {  # what an answer is, given its index and the choices
    "indices from 0": [lambda i, c: i, lambda i, c: str(i), lambda i, c: float(i), lambda i, c: f"{i}.0"],
    "indices from 1": [
        lambda i, c: i + 1,
        lambda i, c: f" {i + 1}",
        lambda i, c: f"({i + 1})",
        lambda i, c: f"option{i + 1}",
    ],
    "letters": [lambda i, c: LETTERS[i], lambda i, c: LETTERS[i].lower() + ".", lambda i, c: f"answer_{LETTERS[i]}"],
    "texts of the choices": [lambda i, c: c[i]],
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_convention_of_answers_is_decided_over_the_whole_table(convention, tmp_path):
    @FUZZING
    @given(
        st.integers(2, 5).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=6))),
        st.sampled_from(CONVENTIONS[convention]),
        st.sampled_from(["list", "columns", "csv"]),
    )
    def check(case, answer, form):
        n, indices = case
        indices = [0, n - 1, *indices]
        rows = []
        for row, index in enumerate(indices):
            choices = [f"the choice {row} {i}" for i in range(n)]
            cells = (
                {"choices": choices}
                if form == "list"
                else {f"choice_{i + 1}": choice for i, choice in enumerate(choices)}
            )
            rows.append({"question": "q", **cells, "answer": answer(index, choices)})
        suffix = "csv" if form == "csv" else "jsonl"
        examples, fields, issues = read(tmp_path / f"a.{suffix}", table(rows, suffix))
        assert [f["answer"] for f in fields] == indices and examples.answer_format == convention and not issues.issues
        # A part that leaves the convention open is read like the whole.
        assert read(tmp_path / f"b.{suffix}", table(rows[:1], suffix), like=examples)[1] == fields[:1]

    check()


def answers_from(numbers, **columns):
    columns = columns or {"choices": ["x", "y", "z"]}
    return [{"question": "q", **columns, "answer": number} for number in numbers]


def test_open_and_contradictory_answers(tmp_path):
    _, fields, issues = read(tmp_path / "a.jsonl", answers_from([1, 2, 1]))
    assert [f["answer"] for f in fields] == [1, 2, 1]
    assert issues.issues[0].what == "answers are read as indices from 0; they would also fit: indices from 1"
    with pytest.raises(UsageError, match=r"contradict each other: 5 rows have the answer 0.*and 4 have"):
        read(tmp_path / "a.jsonl", answers_from([0] * 5 + [3] * 4))
    _, fields, issues = read(tmp_path / "a.jsonl", answers_from([0, 1, 2] * 20 + [3]))  # a slip
    assert len(fields) == 60 and "out of range" in issues.summary_lines()[0]
    numbered = {"option1": "x", "option2": "y", "option3": "z"}  # the names of the columns count
    assert [f["answer"] for f in read(tmp_path / "a.jsonl", answers_from([1, 2], **numbered))[1]] == [0, 1]


@pytest.mark.parametrize("marks", [(True, False), ("1", "0"), ("TRUE", "FALSE"), (1.0, 0.0)])
@pytest.mark.parametrize("column", ["label", "Desirable"])
def test_unpaired_preferences_are_refused(marks, column, tmp_path):
    good, bad = [{"prompt": "q", "completion": "a", column: mark} for mark in marks]
    with pytest.raises(UsageError, match=rf"{column} marks some answers as undesired"):
        read(tmp_path / "a.jsonl", [good, bad])
    messages = [{"messages": [*chat("q", "a")], column: marks[1]}]
    with pytest.raises(UsageError, match="undesired"):
        read(tmp_path / "a.jsonl", messages)
    for rows in ([good, good], [good, {**bad, column: "a class"}]):
        examples, fields, _ = read(tmp_path / "a.jsonl", rows)
        assert fields == [{"prompt": "q", "completion": "a"}] * 2 and column not in examples.columns.values()
    assert len(read(tmp_path / "a.jsonl", [good, bad], require_targets=False)[0]) == 2


@pytest.mark.parametrize("gap", ["\n\n", "\n", "\n \n"])
@pytest.mark.parametrize("names", [("Human", "Assistant"), ("User", "Gpt")])
def test_preferences_and_conversations_in_one_text(gap, names, tmp_path):
    def text(*contents):
        return gap + gap.join(f"{names[i % 2]}: {content}" for i, content in enumerate(contents))

    shared = ["a", "b: Human", "c"]
    expected = {"messages": chat(*shared), "chosen": "d", "rejected": "e"}
    row = {"chosen": text(*shared, "d"), "rejected": text(*shared, "e")}
    assert read(tmp_path / "a.jsonl", [row])[1] == [expected]
    row = {"prompt": text(*shared, ""), "chosen": "d", "rejected": "e"}
    assert read(tmp_path / "a.jsonl", [row])[1] == [expected]
    assert read(tmp_path / "a.jsonl", [{"messages": text("a", "b")}])[1] == [{"messages": chat("a", "b")}]
    alone = {"prompt": "Human: a", "chosen": "Assistant: d", "rejected": "e"}  # texts, not conversations
    assert read(tmp_path / "a.jsonl", [alone])[1] == [
        {"messages": chat("Human: a"), "chosen": "Assistant: d", "rejected": "e"}
    ]
    issues = read(tmp_path / "a.jsonl", [{"chosen": "d", "rejected": "e"}])[2]
    assert "there is no prompt; left out: give a column prompt, or conversations" in issues.summary_lines()[0]


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["user", "assistant", "system", "A", "[1]", '{"a": 1}', '["a", "b"]', "1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text", "label"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("task", VALID)
@pytest.mark.parametrize("require_targets", [True, False], ids=["targets", "inputs"])
def test_any_values_are_examples_or_issues(task, require_targets, tmp_path):
    path = tmp_path / "a.jsonl"

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(VALID[task], ANY)), max_size=4))
    def check(rows):
        rows = [VALID[task], *rows]
        examples, fields, issues = read(path, rows, task, require_targets=require_targets)
        assert len(examples) + issues.total == len(rows)
        assert fields[0] == read(path, [VALID[task]], task, require_targets=require_targets)[1][0] or task in (
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
    ("trec/train.csv", "classify", 5452),
    ("trec/test.csv", "classify", 500),
    ("movie_reviews/train.csv", "classify", 8530),
    ("movie_reviews/validation.csv", "classify", 1066),
    ("movie_reviews/test.csv", "classify", 1066),
    ("mnli/train.jsonl", "entail", 7107),
    ("mnli/validation.jsonl", "entail", 1777),
    ("stsb/train.csv", "similarity", 5749),
    ("stsb/validation.csv", "similarity", 1500),
    ("stsb/test.csv", "similarity", 1379),
    ("arc_easy/train.jsonl", "choose", 2241),
    ("arc_easy/validation.jsonl", "choose", 567),
    ("arc_easy/test.jsonl", "choose", 2365),
    ("english_french/validation.tsv", "rewrite", 2914),
    ("english_french/test.tsv", "rewrite", 2887),
    ("english_french/train.tsv", "rewrite", 57985),
    ("scitldr/train.jsonl", "rewrite", 1992),
    ("scitldr/validation.jsonl", "rewrite", 619),
    ("scitldr/test.jsonl", "rewrite", 618),
    ("dialogues/train.jsonl", "chat", 1800),
    ("dialogues/validation.jsonl", "chat", 200),
    ("instructions/instructions.json", "chat", 1100),
    ("instructions/preferences.json", "prefer", 1100),
]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data is not at {DATA}; set NEXTWORD_DATA")
@pytest.mark.parametrize(("name", "task", "count"), SHARED, ids=[name for name, _, _ in SHARED])
def test_real_data(name, task, count):
    issues = IssueLog()
    examples = read_examples(DATA / name, None, issues, RENAMED if name.startswith("english") else None)
    assert (examples.task, len(examples) + issues.total) == (task, count)
    same = "the chosen and the rejected answer are identical; left out"
    assert [p.what for p in issues.issues if p.line and not p.what.startswith("HTML")] == (
        [same] if task == "prefer" else []
    )
    if task == "prefer":
        rows = json.loads((DATA / name).read_text(encoding="utf-8"))
        assert issues.total == sum(row["chosen"] == row["rejected"] for row in rows) == 6
    if task in ("classify", "entail"):
        first = {"trec": "ABBR", "movie_reviews": "negative", "mnli": "contradiction"}[name.split("/")[0]]
        assert label_names(examples)[0] == first


@pytest.mark.parametrize("column", ["score", "label"])
@pytest.mark.parametrize(
    "cells, scores, note",
    [
        (["3,5", "0,125", "4"], [3.5, 0.125, 4.0], "commas are decimal points: 3,5 is 3.5"),
        (["-1,250", "2,5e-1", "0,750"], [-1.25, 0.25, 0.75], "commas are decimal points: -1,250 is -1.250"),
        (["3.5", "0.125", "4"], [3.5, 0.125, 4.0], ""),
    ],
)
def test_scores_with_decimal_commas(tmp_path, column, cells, scores, note):
    rows = "".join(f"a{i};b{i};{cell}\n" for i, cell in enumerate(cells))
    examples, fields, issues = read(tmp_path / "a.csv", f"sentence1;sentence2;{column}\n{rows}")
    assert examples.task == "similarity" and [row["score"] for row in fields] == scores
    assert (note in "\n".join(issues.summary_lines())) and issues.total == 0


@pytest.mark.parametrize("cells", [["1,250", "2,500"], ["3,5", "2.5"], ["1,2,3", "0,5"]])
def test_commas_that_may_be_no_decimal_points_are_no_scores(tmp_path, cells):
    rows = "".join(f"a{i};b{i};{cell}\n" for i, cell in enumerate(cells))
    _, fields, issues = read(tmp_path / "a.csv", f"sentence1;sentence2;score\n{rows}")
    assert [row["score"] for row in fields] == [float(cell) for cell in cells if "," not in cell]
    assert f"the score is not a finite number; left out: it is '{cells[0]}'" in "\n".join(issues.summary_lines())
