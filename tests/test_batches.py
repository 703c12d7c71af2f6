"""The data order as a function: every token once an epoch, nothing remembered, any number of machines."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextword.data.dataset import IGNORE_INDEX, TokenDataset, derive_seed, permute


class Row:
    """A row of tokens that are all different, so that each can be followed."""

    def __init__(self, length: int):
        self.tokens = np.arange(length)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        assert start >= 0
        assert start + count <= len(self.tokens)
        return self.tokens[start : start + count]


@given(st.integers(1, 5000), st.integers(0, 2**60))
@settings(deadline=None)
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permute_shuffles():
    order = permute(np.arange(10_000), 10_000, 5)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
    assert (order == permute(np.arange(10_000), 10_000, 6)).sum() < 10
    parts = [permute(np.array([i]), 10_000, 5)[0] for i in range(50)]
    assert parts == order[:50].tolist(), "one place asked alone is the same as among all"


def targets_of(dataset: TokenDataset, rows: range) -> list[int]:
    """The targets of the given rows, counted from the first step on."""
    size, out = dataset.batch_size, []
    for row in rows:
        targets = dataset.batch(row // size).targets[row % size]
        out += targets[targets != IGNORE_INDEX].tolist()
    return out


@given(st.integers(2, 400), st.integers(1, 17), st.integers(1, 6), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_an_epoch_visits_each_token_exactly_once(length, context, rows, seed):
    dataset = TokenDataset(Row(length), context, rows, seed)
    for epoch in range(2):
        visited = targets_of(dataset, range(epoch * dataset.num_windows, (epoch + 1) * dataset.num_windows))
        assert sorted(visited) == list(range(length))


def test_targets_follow_their_tokens():
    dataset = TokenDataset(Row(1000), 16, 4, seed=3)
    for step in range(40):
        batch = dataset.batch(step)
        real = batch.targets != IGNORE_INDEX
        assert ((batch.tokens[real] + 1) % 1000 == batch.targets[real]).all()
        assert batch.tokens.shape == batch.targets.shape == (4, 16)


def test_epochs_differ_in_order_and_in_cuts():
    dataset = TokenDataset(Row(1600), 16, 100, seed=3)  # one batch is one epoch
    first, second = dataset.batch(0), dataset.batch(1)
    assert first.tokens.tolist() != second.tokens.tolist()
    assert set(first.tokens[:, 0].tolist()) != set(second.tokens[:, 0].tolist())


def test_a_batch_is_a_function_of_seed_and_step_alone():
    one, other = TokenDataset(Row(500), 8, 6, seed=1), TokenDataset(Row(500), 8, 6, seed=1)
    for step in (17, 3, 17):
        assert np.array_equal(one.batch(step).tokens, other.batch(step).tokens)
    assert not np.array_equal(one.batch(0).tokens, TokenDataset(Row(500), 8, 6, seed=2).batch(0).tokens)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_machines_share_the_same_rows(world):
    dataset = TokenDataset(Row(500), 8, 6, seed=1)
    whole = dataset.batch(5)
    parts = [dataset.batch(5, rank, world) for rank in range(world)]
    assert np.array_equal(whole.tokens, np.concatenate([part.tokens for part in parts]))
    assert whole.row_ids == [row for part in parts for row in part.row_ids]


def test_split_cuts_rows():
    batch = TokenDataset(Row(500), 8, 7, seed=1).batch(0)
    parts = batch.split_micro_batches(3)
    assert [len(part.row_ids) for part in parts] == [3, 3, 1]
    assert np.array_equal(np.concatenate([part.targets for part in parts]), batch.targets)


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="too few"):
        TokenDataset(Row(1), 8, 2, seed=0)


def test_seeds_are_apart():
    assert len({derive_seed(s, what, i) for s in range(5) for what in range(4) for i in range(50)}) == 1000
    assert all(0 <= derive_seed(0, i) < 2**63 for i in range(100))
