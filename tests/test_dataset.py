"""Batches are a pure function of (seed, step): every token once per epoch, on any number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextword.data.dataset import IGNORE_INDEX, InMemoryTokens, TokenDataset, derive_seed, permute


def dataset_of(num_tokens: int, context_length: int, batch_size: int, seed: int) -> TokenDataset:
    """A dataset of tokens that are all different, so that each can be traced."""
    return TokenDataset(InMemoryTokens(np.arange(num_tokens)), context_length, batch_size, seed)


@given(st.integers(1, 5000), st.integers(0, 2**60))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permute_shuffles():
    order = permute(np.arange(10_000), 10_000, 5)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
    assert (order == permute(np.arange(10_000), 10_000, 6)).sum() < 10
    single = [permute(np.array([i]), 10_000, 5)[0] for i in range(50)]
    assert single == order[:50].tolist(), "an index has the same image alone and among others"


@given(st.integers(2, 400), st.integers(1, 17), st.integers(1, 6), st.integers(0, 2**32))
@settings(max_examples=60)
def test_an_epoch_visits_each_token_exactly_once(num_tokens, context_length, batch_size, seed):
    dataset = dataset_of(num_tokens, context_length, batch_size, seed)
    for epoch in range(2):
        visited = []
        for row in range(epoch * dataset.num_windows, (epoch + 1) * dataset.num_windows):
            targets = dataset.batch(row // batch_size).targets[row % batch_size]
            visited += targets[targets != IGNORE_INDEX].tolist()
        assert sorted(visited) == list(range(num_tokens))


def test_targets_are_the_next_tokens():
    dataset = dataset_of(1000, 16, 4, seed=3)
    for step in range(40):
        batch = dataset.batch(step)
        counted = batch.targets != IGNORE_INDEX
        assert ((batch.tokens[counted] + 1) % 1000 == batch.targets[counted]).all()
        assert batch.tokens.shape == batch.targets.shape == (4, 16)


def test_epochs_differ_in_order_and_in_windows():
    dataset = dataset_of(1600, 16, 100, seed=3)  # a batch is an epoch
    first, second = dataset.batch(0), dataset.batch(1)
    assert first.tokens.tolist() != second.tokens.tolist()
    assert set(first.tokens[:, 0].tolist()) != set(second.tokens[:, 0].tolist())


def test_a_batch_depends_on_seed_and_step_only():
    first, second = dataset_of(500, 8, 6, seed=1), dataset_of(500, 8, 6, seed=1)
    for step in (17, 3, 17):
        assert np.array_equal(first.batch(step).tokens, second.batch(step).tokens)
    assert not np.array_equal(first.batch(0).tokens, dataset_of(500, 8, 6, seed=2).batch(0).tokens)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_the_rows_of_a_step(world_size):
    dataset = dataset_of(500, 8, 6, seed=1)
    whole = dataset.batch(5)
    shares = [dataset.batch(5, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(whole.tokens, np.concatenate([share.tokens for share in shares]))
    assert whole.row_ids == [row for share in shares for row in share.row_ids]


def test_micro_batches_are_slices_of_the_batch():
    batch = dataset_of(500, 8, 7, seed=1).batch(0)
    micro_batches = batch.split_micro_batches(3)
    assert [len(micro_batch.row_ids) for micro_batch in micro_batches] == [3, 3, 1]
    assert np.array_equal(np.concatenate([micro_batch.targets for micro_batch in micro_batches]), batch.targets)


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="too few"):
        dataset_of(1, 8, 2, seed=0)


def test_derived_seeds_are_distinct():
    assert len({derive_seed(s, purpose, i) for s in range(5) for purpose in range(4) for i in range(50)}) == 1000
    assert all(0 <= derive_seed(0, i) < 2**63 for i in range(100))
