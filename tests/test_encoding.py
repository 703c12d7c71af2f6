"""Examples as tokens: the templates are those of the stock tokenizer, batches lose nothing, packing keeps texts apart."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextword.data.corpus import Corpus
from nextword.data.dataset import IGNORE_INDEX, segment_positions
from nextword.data.issues import IssueLog
from nextword.data.tokenizer import DELIMITER_TOKEN, EXTRACT_TOKEN, START_TOKEN
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.tasks.dataset import (
    EncodedExample,
    ExampleEncoder,
    TaskDataset,
    TaskSpec,
    TokenSequence,
    max_answer_tokens,
    truncate_longest_first,
)
from nextword.tasks.examples import Example

FORMS = {
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
    return ExampleEncoder(FORMS[task], FORMS[task].with_special_tokens(tokenizer), context_length)


def test_the_templates(tokenizer):
    one = encoder(tokenizer, "entail")
    start, delimiter, extract = one.tokenizer.convert_tokens_to_ids([START_TOKEN, DELIMITER_TOKEN, EXTRACT_TOKEN])
    a, b = tokenizer.encode("a premise"), tokenizer.encode("its end")
    whole = one.encode(example(premise="a premise", hypothesis="its end", label="yes"), IssueLog())
    assert whole is not None and whole.target == 1
    assert whole.sequences[0].ids.tolist() == [start, *a, delimiter, *b, extract]
    assert whole.sequences[0].loss_mask.tolist() == [False, *[True] * len(a), False, *[True] * len(b), False]
    both = encoder(tokenizer, "similarity").encode(
        example(sentence1="a premise", sentence2="its end", score=2.5), IssueLog()
    )
    assert both is not None and both.target == 2.5
    assert [t.ids.tolist() for t in both.sequences] == [
        [start, *a, delimiter, *b, extract], [start, *b, delimiter, *a, extract],
    ]  # fmt: skip
    choices = encoder(tokenizer, "choose").encode(
        example(question="a premise", num_choices=("x", "its end"), add_generation_prompt=1), IssueLog()
    )
    assert choices is not None and choices.sequences[1].ids.tolist() == [start, *a, delimiter, *b, extract]
    answer = encoder(tokenizer, "rewrite").encode(
        example(prompt_logprobs="a premise", completion="its end"), IssueLog()
    )
    assert answer is not None
    assert answer.sequences[0].ids.tolist() == [start, *a, delimiter, *b, tokenizer.eos_id]
    assert answer.sequences[0].loss_mask.tolist() == [False] * (len(a) + 2) + [True] * (len(b) + 1)


def test_several_labels_are_zeros_and_ones(tokenizer):
    form = TaskSpec("classify", "labels", ("a", "b", "c"))
    one = ExampleEncoder(form, form.with_special_tokens(tokenizer), 32)
    found = one.encode(example(text="t", labels=("c", "a")), IssueLog())
    assert found is not None and found.target.tolist() == [True, False, True]


def test_the_stock_tokenizer_gives_the_same_ids_and_cuts_alike(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    ours = {task: encoder(tokenizer, task, 24) for task in ("classify", "entail")}
    ours["classify"].tokenizer.save(tmp_path, 24)
    stock = AutoTokenizer.from_pretrained(tmp_path)

    @settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=60)
    @given(st.text(max_size=80), st.text(min_size=1, max_size=80))
    def check(one, two):
        if "<|" in one + two or not one.isprintable() or not two.isprintable():
            return  # equality is promised for text without markers
        single = ours["classify"].encode(example(text=one, label="no"), IssueLog())
        pair = ours["entail"].encode(example(premise=one, hypothesis=two, label="no"), IssueLog())
        assert single is not None and pair is not None
        cut = {"truncation": True, "max_length": 24}
        assert single.sequences[0].ids.tolist() == stock(one, **cut)["input_ids"]
        assert pair.sequences[0].ids.tolist() == stock(one, two, **cut)["input_ids"]

    check()


@given(st.lists(st.integers(0, 300), min_size=1, max_size=2), st.integers(1, 200))
def test_fit_never_exceeds_its_room_and_wastes_none(lengths, room):
    kept = truncate_longest_first(lengths, room)
    assert sum(kept) == min(room, sum(lengths))
    assert all(0 <= k <= n for k, n in zip(kept, lengths, strict=True))


def test_what_is_too_long_is_named_by_file_and_line(tokenizer):
    problems = IssueLog()
    encoder(tokenizer, "classify", 16).encode(example(text="word " * 40, label="no"), problems)
    assert "data.csv line 7: longer than the context of 16 tokens" in problems.summary_lines()[0]
    long = example(prompt_logprobs="word " * 99, completion="end " * 99)
    one = encoder(tokenizer, "rewrite", 32).encode(long, problems)
    assert one is not None and len(one.sequences[0].ids) == 32 and one.sequences[0].loss_mask.sum() == 20
    talk = ({"role": "user", "content": "word " * 99}, {"role": "assistant", "content": "yes"})
    assert encoder(tokenizer, "chat", 32).encode(example(messages=talk), problems) is None
    assert any("no room for the answer" in line for line in problems.summary_lines())


def test_a_prompt_of_a_conversation_keeps_its_end(tokenizer):
    one = encoder(tokenizer, "prefer", 48)
    talk = ({"role": "user", "content": "word " * 99 + "LAST"},)
    prompt = one.encode_prompt(example(messages=talk))
    assert len(prompt) == 28 and tokenizer.decode(prompt).endswith("LAST")


def test_the_room_for_answers(tokenizer):
    ids = tokenizer.encode("a fairly long answer")
    assert max_answer_tokens(tokenizer, ["short", "a fairly long answer"], 512) == len(ids) + 1
    assert max_answer_tokens(tokenizer, ["word " * 500], 64) == 32


# ---------------------------------------------------------------- batches


def encoded(lengths, texts=1):
    rows = [TokenSequence(np.arange(2, n + 2), np.arange(n) > 0) for n in lengths]
    return [EncodedExample(tuple(row for _ in range(texts)), gold=i % 2) for i, row in enumerate(rows)]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=70), st.integers(1, 9), st.integers(0, 5))
def test_every_example_once_an_epoch(lengths, per_batch, seed):
    data = TaskDataset(encoded(lengths), per_batch, seed, pad_token_id=1, kind="label")
    again = TaskDataset(encoded(lengths), per_batch, seed, pad_token_id=1, kind="label")
    for epoch in (0, 1):
        batches = [data.batch(epoch * data.steps_per_epoch + i) for i in range(data.steps_per_epoch)]
        rows = [row for batch in batches for row in batch.row_ids]
        assert len(set(rows)) == len(rows) == len(lengths)
        assert sorted(n for b in batches for n in (b.tokens != 1).sum(1)) == sorted(lengths)
        assert all(
            np.array_equal(b.tokens, again.batch(epoch * data.steps_per_epoch + i).tokens)
            for i, b in enumerate(batches)
        )
    assert data.longest_passage_tokens == max(lengths)


def test_machines_share_a_batch():
    data = TaskDataset(encoded(range(3, 40), texts=2), 8, 0, pad_token_id=1, kind="label")
    whole = data.batch(1)
    parts = [data.batch(1, rank, 2) for rank in (0, 1)]
    assert sorted(whole.row_ids) == sorted(parts[0].row_ids + parts[1].row_ids)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(0, 3))
def test_packing_loses_nothing_and_keeps_within_the_row(lengths, seed):
    data = TaskDataset(encoded(lengths), 3, seed, pad_token_id=1, kind="answer", pack_length=32)
    seen = 0
    for step in range(data.steps_per_epoch):
        batch = data.batch(step)
        assert batch.segment_ids is not None and batch.tokens.shape[1] <= 32
        assert batch.n_tokens == (batch.segment_ids >= 0).sum()
        seen += batch.n_tokens
        # A text's first token is never the target of another's last.
        ends = np.diff(batch.segment_ids, axis=1) != 0
        assert (batch.targets[:, :-1][ends] == IGNORE_INDEX).all()
    assert seen == sum(lengths)


def test_texts_that_share_a_row_do_not_see_each_other():
    torch.manual_seed(0)
    model = GPT(
        build_config("modern", "tiny", vocab_size=60, n_layers=2, n_heads=2, d_model=16, context_length=32)
    ).eval()
    data = TaskDataset(encoded([9, 11, 7]), 1, 0, pad_token_id=1, kind="answer", pack_length=32)
    batch = data.batch(0)
    assert batch.segment_ids is not None and len(batch.tokens) == 1
    with torch.no_grad():
        together = model(
            torch.from_numpy(batch.tokens), segments=torch.from_numpy(batch.segment_ids),
            positions=torch.from_numpy(segment_positions(batch.segment_ids)),
        )  # fmt: skip
        for segment in range(3):
            here = batch.segment_ids[0] == segment
            alone = model(torch.from_numpy(batch.tokens[:, here]))
            torch.testing.assert_close(together[:, here], alone, rtol=1e-4, atol=1e-5)


def test_places_count_from_each_segment():
    assert segment_positions(np.array([[0, 0, 1, 1, 1, -1, -1]])).tolist() == [[0, 1, 0, 1, 2, 0, 1]]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(1, 9))
def test_a_micro_batch_never_parts_an_example(choices, size):
    row = TokenSequence(np.arange(4), np.arange(4) > 0)
    data = TaskDataset([EncodedExample((row,) * n, gold=0) for n in choices], 12, 0, pad_token_id=1, kind="choice")
    batch = data.batch(0)
    parts = batch.split_micro_batches(size)
    assert [r for part in parts for r in part.row_ids] == batch.row_ids
    assert all(part.loss_denominators == batch.loss_denominators for part in parts)
    for part in parts:
        assert part.labels is not None
        several = np.bincount(part.labels.example_ids)
        assert len(part.row_ids) <= size or len(several) == 1
        assert several.sum() == len(part.row_ids) and len(part.labels.target) == len(several)
        assert part.labels.example_ids.tolist() == sorted(part.labels.example_ids.tolist())
