"""Encoded examples: templates equal the Hugging Face tokenizer's, batches are complete, packed sequences are independent."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextword.common.errors import NextwordError
from nextword.data.corpus import Corpus
from nextword.data.dataset import IGNORE_INDEX, segment_positions
from nextword.data.issues import IssueLog
from nextword.data.readers import map_strings
from nextword.data.tokenizer import DELIMITER_TOKEN, EXTRACT_TOKEN, START_TOKEN, train_char
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.tasks.dataset import (
    EncodedExample,
    ExampleEncoder,
    TaskDataset,
    TaskSpec,
    TokenSequence,
    load_task_data,
    max_answer_tokens,
    truncate_longest_first,
)
from nextword.tasks.examples import Example

TASK_SPECS = {
    "classify": TaskSpec("classify", "label", ("no", "yes")),
    "entail": TaskSpec("entail", "label", ("no", "yes")),
    "similarity": TaskSpec("similarity", "score"),
    "choose": TaskSpec("choose", "choice"),
    "rewrite": TaskSpec("rewrite", "answer", answer_tokens=20),
    "chat": TaskSpec("chat", "answer", answer_tokens=20, chat=True),
    "prefer": TaskSpec("prefer", "preference", answer_tokens=20, chat=True),
}


def example(**fields):
    return Example("data.csv", 7, fields)


@pytest.fixture(scope="module")
def tokenizer(shards):
    return Corpus.open(shards).tokenizer


def encoder(tokenizer, task, context_length=64):
    return ExampleEncoder(TASK_SPECS[task], TASK_SPECS[task].with_special_tokens(tokenizer), context_length)


def test_the_templates(tokenizer):
    example_encoder = encoder(tokenizer, "entail")
    start, delimiter, extract = example_encoder.tokenizer.convert_tokens_to_ids(
        [START_TOKEN, DELIMITER_TOKEN, EXTRACT_TOKEN]
    )
    a, b = tokenizer.encode("a premise"), tokenizer.encode("its end")
    whole = example_encoder.encode(example(premise="a premise", hypothesis="its end", label="yes"), IssueLog())
    assert whole is not None and whole.target == 1
    assert whole.sequences[0].ids.tolist() == [start, *a, delimiter, *b, extract]
    assert whole.sequences[0].loss_mask.tolist() == [False, *[True] * len(a), False, *[True] * len(b), False]
    both = encoder(tokenizer, "similarity").encode(
        example(sentence1="a premise", sentence2="its end", score=2.5), IssueLog()
    )
    assert both is not None and both.target == 2.5
    assert [sequence.ids.tolist() for sequence in both.sequences] == [
        [start, *a, delimiter, *b, extract],
        [start, *b, delimiter, *a, extract],
    ]
    choices = encoder(tokenizer, "choose").encode(
        example(question="a premise", choices=("x", "its end"), answer=1), IssueLog()
    )
    assert choices is not None and choices.sequences[1].ids.tolist() == [start, *a, delimiter, *b, extract]
    answer = encoder(tokenizer, "rewrite").encode(example(prompt="a premise", completion="its end"), IssueLog())
    assert answer is not None
    assert answer.sequences[0].ids.tolist() == [start, *a, delimiter, *b, tokenizer.eos_id]
    assert answer.sequences[0].loss_mask.tolist() == [False] * (len(a) + 2) + [True] * (len(b) + 1)


def test_the_target_of_several_labels_is_a_mask(tokenizer):
    task_spec = TaskSpec("classify", "labels", ("a", "b", "c"))
    example_encoder = ExampleEncoder(task_spec, task_spec.with_special_tokens(tokenizer), 32)
    found = example_encoder.encode(example(text="t", labels=("c", "a")), IssueLog())
    assert found is not None and found.target.tolist() == [True, False, True]


def test_ids_and_truncation_equal_the_hugging_face_tokenizer(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    ours = {task: encoder(tokenizer, task, 24) for task in ("classify", "entail")}
    ours["classify"].tokenizer.save(tmp_path, 24)
    stock = AutoTokenizer.from_pretrained(tmp_path)

    @settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=60)
    @given(st.text(max_size=80), st.text(min_size=1, max_size=80))
    def check(first, second):
        if "<|" in first + second or not first.isprintable() or not second.isprintable():
            return  # equality holds for text without special tokens
        single = ours["classify"].encode(example(text=first, label="no"), IssueLog())
        pair = ours["entail"].encode(example(premise=first, hypothesis=second, label="no"), IssueLog())
        assert single is not None and pair is not None
        cut = {"truncation": True, "max_length": 24}
        assert single.sequences[0].ids.tolist() == stock(first, **cut)["input_ids"]
        assert pair.sequences[0].ids.tolist() == stock(first, second, **cut)["input_ids"]

    check()


@given(st.lists(st.integers(0, 300), min_size=1, max_size=2), st.integers(1, 200))
def test_truncation_uses_the_maximum_length(lengths, max_length):
    kept = truncate_longest_first(lengths, max_length)
    assert sum(kept) == min(max_length, sum(lengths))
    assert all(0 <= k <= n for k, n in zip(kept, lengths, strict=True))


def test_truncation_is_reported_with_file_and_line(tokenizer):
    issues = IssueLog()
    encoder(tokenizer, "classify", 16).encode(example(text="word " * 40, label="no"), issues)
    assert (
        "data.csv line 7: longer than the context of 16 tokens; the end of the text is cut off"
        in issues.summary_lines()[0]
    )
    long = example(prompt="word " * 99, completion="end " * 99)
    encoded_example = encoder(tokenizer, "rewrite", 32).encode(long, issues)
    assert (
        encoded_example is not None
        and len(encoded_example.sequences[0].ids) == 32
        and encoded_example.sequences[0].loss_mask.sum() == 20
    )
    talk = ({"role": "user", "content": "word " * 99}, {"role": "assistant", "content": "yes"})
    assert encoder(tokenizer, "chat", 32).encode(example(messages=talk), issues) is None
    assert any("no room for the answer" in line for line in issues.summary_lines())


def test_a_conversation_is_truncated_at_its_start(tokenizer):
    example_encoder = encoder(tokenizer, "prefer", 48)
    talk = ({"role": "user", "content": "word " * 99 + "LAST"},)
    prompt = example_encoder.encode_prompt(example(messages=talk))
    assert len(prompt) == 28 and tokenizer.decode(prompt).endswith("LAST")


def test_a_prompt_keeps_its_end_and_a_short_answer_is_whole(tokenizer):
    long = "word " * 99
    issues = IssueLog()

    def decode(task, **fields):
        spec = replace(TASK_SPECS[task], keeps_prompt_end=True)
        example_encoder = ExampleEncoder(spec, spec.with_special_tokens(tokenizer), 48)
        encoded_example = example_encoder.encode(example(**fields), issues)
        assert encoded_example is not None and len(encoded_example.sequences[0].ids) <= 48
        [ids, loss_mask] = encoded_example.sequences[0]
        return tokenizer.decode(ids[~loss_mask].tolist()).strip(), tokenizer.decode(ids[loss_mask].tolist())

    prompt, answer = decode("rewrite", prompt=long + "HOW MANY", completion="It is 7")
    assert prompt.endswith("HOW MANY") and answer == "It is 7"
    prompt, answer = decode("rewrite", prompt="Q", completion=long + "#### 7")
    assert prompt.endswith("Q") and "7" not in answer
    talk = ({"role": "user", "content": long + "HOW MANY"}, {"role": "assistant", "content": "It is 7"})
    prompt, answer = decode("chat", messages=talk)
    assert prompt.endswith("HOW MANY") and answer == "It is 7"
    prompt, answer = decode("chat", messages=(*talk, talk[0], {"role": "assistant", "content": long}))
    assert prompt.endswith("HOW MANY") and answer.startswith("word") and "7" not in answer
    found = "; ".join(issues.summary_lines())
    parts = ("the beginning of the prompt", "the end of the answer", "the beginning of the conversation")
    assert all(f"{part} is cut off" in found for part in parts) and "(2 in all)" in found
    issues = IssueLog()
    examples = [example(text=text, label="no") for text in (long, long, "short")]
    encoder(tokenizer, "classify", 16).encode_all(examples, issues)
    assert (
        "most examples do not fit into the context of 16 tokens: cut off is the end of the text in 2 of 3"
        in "".join(issues.summary_lines())
    )
    issues = IssueLog()
    encoder(tokenizer, "classify", 16).encode_all(examples[1:], issues)
    assert "most examples" not in "".join(issues.summary_lines())


def test_no_example_is_trained_on_and_scored(tmp_path, tokenizer):
    def table(name, rows):
        path = tmp_path / name
        path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
        return str(path)

    def load(train, validation, test):
        issues = IssueLog()
        paths = {"validation": [table("v.csv", validation)], "test": [table("t.csv", test)] if test else None}
        data = load_task_data([table("a.csv", train)], tokenizer, None, 64, issues, **paths)
        sets = [[e.fields["text"] for e in part] for part in (data.train, data.validation, data.test)]
        return sets, "\n".join(issues.summary_lines())

    rows = [(text, i % 2) for i, text in enumerate("abcdefgh")]
    sets, issues = load(
        [*rows, ("x", 0), ("x", 1), ("y", 0), ("y", 0)], [("a", 0), (" b ", 0), ("z", 1)], [("z", 1), ("c", 0)]
    )
    assert sets == [[*"defgh", "y", "y"], ["a", " b "], ["z", "c"]]
    assert "a training example whose text is also in the validation set; left out: 2 of 11 (2 in all)" in issues
    assert "a training example whose text is also in the test set; left out: 1 of 12" in issues
    assert "a.csv line 10: a training example whose text also has another label; left out: 2 of 9 (2 in all)" in issues
    with pytest.raises(NextwordError, match="all 8 training examples are also in the validation"):
        load(rows, rows, None)
    assert load(rows, [("q", 1)], None)[1] == ""


def test_reserved_answer_tokens(tokenizer):
    ids = tokenizer.encode("a fairly long answer")
    assert max_answer_tokens(tokenizer, ["short", "a fairly long answer"], 512) == len(ids) + 1
    assert max_answer_tokens(tokenizer, ["word " * 500], 64) == 32


# ---------------------------------------------------------------- batches


def encoded(lengths, texts=1):
    rows = [TokenSequence(np.arange(2, n + 2), np.arange(n) > 0) for n in lengths]
    return [EncodedExample(tuple(row for _ in range(texts)), target=i % 2) for i, row in enumerate(rows)]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=70), st.integers(1, 9), st.integers(0, 5))
def test_each_epoch_has_each_example_once(lengths, batch_size, seed):
    data = TaskDataset(encoded(lengths), batch_size, seed, pad_token_id=1, kind="label")
    again = TaskDataset(encoded(lengths), batch_size, seed, pad_token_id=1, kind="label")
    for epoch in (0, 1):
        batches = [data.batch(epoch * data.steps_per_epoch + i) for i in range(data.steps_per_epoch)]
        rows = [row for batch in batches for row in batch.row_ids]
        assert len(set(rows)) == len(rows) == len(lengths)
        assert sorted(n for b in batches for n in (b.tokens != 1).sum(1)) == sorted(lengths)
        assert all(
            np.array_equal(b.tokens, again.batch(epoch * data.steps_per_epoch + i).tokens)
            for i, b in enumerate(batches)
        )
    assert data.max_length == max(lengths)


def test_processes_share_a_batch():
    data = TaskDataset(encoded(range(3, 40), texts=2), 8, 0, pad_token_id=1, kind="label")
    whole = data.batch(1)
    parts = [data.batch(1, rank, 2) for rank in (0, 1)]
    assert sorted(whole.row_ids) == sorted(parts[0].row_ids + parts[1].row_ids)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(0, 3))
def test_packing_keeps_all_tokens_within_the_row(lengths, seed):
    data = TaskDataset(encoded(lengths), 3, seed, pad_token_id=1, kind="answer", pack_length=32)
    seen = 0
    for step in range(data.steps_per_epoch):
        batch = data.batch(step)
        assert batch.segment_ids is not None and batch.tokens.shape[1] <= 32
        assert batch.n_tokens == (batch.segment_ids >= 0).sum()
        seen += batch.n_tokens
        # The first token of a sequence is never the target of the last token of another.
        ends = np.diff(batch.segment_ids, axis=1) != 0
        assert (batch.targets[:, :-1][ends] == IGNORE_INDEX).all()
    assert seen == sum(lengths)


def test_packed_sequences_do_not_attend_to_each_other():
    torch.manual_seed(0)
    model = GPT(
        build_config("modern", "tiny", vocab_size=60, n_layers=2, n_heads=2, d_model=16, context_length=32)
    ).eval()
    data = TaskDataset(encoded([9, 11, 7]), 1, 0, pad_token_id=1, kind="answer", pack_length=32)
    batch = data.batch(0)
    assert batch.segment_ids is not None and len(batch.tokens) == 1
    with torch.no_grad():
        together = model(
            torch.from_numpy(batch.tokens),
            segments=torch.from_numpy(batch.segment_ids),
            positions=torch.from_numpy(segment_positions(batch.segment_ids)),
        )
        for segment in range(3):
            here = batch.segment_ids[0] == segment
            alone = model(torch.from_numpy(batch.tokens[:, here]))
            torch.testing.assert_close(together[:, here], alone, rtol=1e-4, atol=1e-5)


def test_positions_count_from_each_segment():
    assert segment_positions(np.array([[0, 0, 1, 1, 1, -1, -1]])).tolist() == [[0, 1, 0, 1, 2, 0, 1]]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(1, 9))
def test_a_micro_batch_never_splits_an_example(choices, size):
    row = TokenSequence(np.arange(4), np.arange(4) > 0)
    data = TaskDataset([EncodedExample((row,) * n, target=0) for n in choices], 12, 0, pad_token_id=1, kind="choice")
    batch = data.batch(0)
    parts = batch.split_micro_batches(size)
    assert [r for part in parts for r in part.row_ids] == batch.row_ids
    assert all(part.loss_denominators == batch.loss_denominators for part in parts)
    for part in parts:
        assert part.labels is not None
        several = np.bincount(part.labels.example_ids)
        assert len(part.row_ids) <= size or len(several) == 1
        assert several.sum() == len(part.row_ids) and len(part.labels.targets) == len(several)
        assert part.labels.example_ids.tolist() == sorted(part.labels.example_ids.tolist())


def test_text_that_the_tokenizer_cannot_represent_is_reported_with_file_and_line():
    tokenizer = train_char(["abcdef"])
    fields = {
        "classify": {"text": "ab{}", "label": "no"},
        "entail": {"premise": "a", "hypothesis": "b{}", "label": "no"},
        "choose": {"question": "a", "choices": ["b", "{}"], "answer": 0},
        "rewrite": {"prompt": "a", "completion": "{}b"},
        "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a{}"}]},
        "prefer": {"messages": [{"role": "user", "content": "a{}"}], "chosen": "a", "rejected": "b"},
    }
    for text, expected in (("c", 0), ("жé", 1)):
        for task, values in fields.items():
            filled = map_strings(values, lambda value, text=text: value.replace("{}", text))
            values = {name: tuple(v) if isinstance(v, list) else v for name, v in filled.items()}
            issues = IssueLog()
            encoder(tokenizer, task).encode(example(**values), issues)
            assert issues.total == expected, (task, issues.issues)
            assert all("data.csv line 7" in str(issue) and "'жé" in str(issue) for issue in issues.issues)
