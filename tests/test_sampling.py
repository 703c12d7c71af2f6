"""Sampling against its definitions, against the processors of transformers, and against its probabilities."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.inference.sampling import Sampling, apply_penalties, probabilities, sample
from nextword.inference.sampling_options import SamplingOptions, read_sampling_defaults

PLAIN = Sampling(temperature=1.0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, Sampling()),
        ({"do_sample": True, "eos_token_id": 0}, Sampling()),
        ({"temperature": 0.6, "top_k": 50, "top_p": 0.9}, Sampling(temperature=0.6, top_k=50, top_p=0.9)),
        ({"do_sample": False, "temperature": 0.6}, Sampling(temperature=0)),
        ({"max_new_tokens": 7, "min_p": 0.1, "top_p": None}, Sampling(max_tokens=7, min_p=0.1)),
        ({"repetition_penalty": 1.1, "top_k": 0}, Sampling(repetition_penalty=1.1, top_k=0)),
    ],
)
def test_the_defaults_are_those_of_the_generation_config(
    content: dict[str, Any], expected: Sampling, tmp_path: Path
) -> None:
    assert read_sampling_defaults(tmp_path) == Sampling()
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    defaults = read_sampling_defaults(tmp_path)
    assert defaults == expected
    given = SamplingOptions(temperature=0.0, top_k=0, min_p=0.0, stop=("x",), seed=3).sampling(defaults)
    assert given == replace(defaults, temperature=0.0, top_k=0, min_p=0.0, stop=("x",), seed=3)
    assert SamplingOptions().sampling(defaults) == defaults


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("temperature", value) for value in (-1, math.nan, math.inf, "0.7", True, [1])),
        *(("top_k", value) for value in (-5, 1.5, 10**40, {})),
        *(("top_p", value) for value in (0, 1.01)),
        *(("repetition_penalty", value) for value in (0, 10**9)),
        ("max_new_tokens", -1),
        *(("do_sample", value) for value in (0, "false", [])),
    ],
)
def test_a_generation_config_out_of_range_is_named(key: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(CorruptFileError, match=rf"generation_config.json: {key} must be"):
        read_sampling_defaults(tmp_path)


def test_a_generation_config_of_another_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    digits = "9" * 5000
    for content in ("", "[]", "null", '{"top_k": ', "\0", f'{{"top_k": {digits}}}', '{"top_p": 1e999}'):
        path.write_text(content)
        with pytest.raises(CorruptFileError, match=r"generation_config\.json"):
            read_sampling_defaults(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CorruptFileError, match="not a regular file"):
        read_sampling_defaults(tmp_path)


def test_all_tokens_are_kept_with_a_top_k_of_zero() -> None:
    logits = random_logits(0)
    assert torch.equal(probabilities(logits, Sampling(top_k=0)), probabilities(logits, Sampling()))


def random_logits(seed: int, size: int = 50) -> torch.Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def by_hand(logits: list[float], sampling: Sampling, history: list[int]) -> list[float]:
    """The definition, one line a step, in plain Python: the probability of each token."""
    for token in set(history):
        penalty = sampling.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty

    def softmax(kept: set[int]) -> dict[int, float]:
        total = sum(math.exp(logits[i] / sampling.temperature) for i in kept)
        return {i: math.exp(logits[i] / sampling.temperature) / total for i in kept}

    kept = set(range(len(logits)))
    if sampling.top_k:
        kept = set(sorted(kept, key=lambda i: -logits[i])[: sampling.top_k])
    if sampling.top_p:
        p, mass, nucleus = softmax(kept), 0.0, set()
        for i in sorted(kept, key=lambda i: -logits[i]):
            if mass < sampling.top_p:
                nucleus.add(i)
            mass += p[i]
        kept = nucleus
    if sampling.min_p:
        p = softmax(kept)
        kept = {i for i in kept if p[i] >= sampling.min_p * max(p.values())}
    p = softmax(kept)
    return [p.get(i, 0.0) for i in range(len(logits))]


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 5),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(0.001, 1),
    min_p=st.none() | st.floats(0, 1),
    repetition_penalty=st.floats(0.5, 2),
    history=st.lists(st.integers(0, 49), max_size=20),
)
def test_probabilities_equal_their_definition(
    seed: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    history: list[int],
) -> None:
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    logits = random_logits(seed)
    expected = torch.tensor(by_hand(logits.tolist(), sampling, history), dtype=torch.float64)
    found = probabilities(apply_penalties(logits, sampling, history), sampling)
    assert torch.allclose(found, expected, atol=1e-9)


def stock(logits: torch.Tensor, sampling: Sampling, history: list[int]) -> torch.Tensor:
    """The same through transformers' processors, in the order in which its `generate` has them."""
    processors = [
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        TemperatureLogitsWarper(sampling.temperature),
        TopKLogitsWarper(sampling.top_k or len(logits)),
        TopPLogitsWarper(sampling.top_p or 1.0),
        MinPLogitsWarper(sampling.min_p or 0.0),
    ]
    scores = logits[None].double()
    for processor in processors:
        scores = processor(torch.tensor([history]), scores)  # pyright: ignore[reportArgumentType]
    return scores[0].softmax(0)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1.0, top_p=0.9),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(temperature=1.0, repetition_penalty=1.3),
        Sampling(temperature=0.9, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.2),
    ],
)
def test_equals_transformers(sampling: Sampling, seed: int) -> None:
    logits, history = random_logits(seed, 200), [3, 3, 17, 120]
    ours = probabilities(apply_penalties(logits, sampling, history), sampling)
    theirs = stock(logits, sampling, history)
    assert torch.equal(ours == 0, theirs == 0)
    assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("sampling", [PLAIN, Sampling(temperature=0.6, top_k=6, top_p=0.95)])
def test_samples_follow_their_probabilities(sampling: Sampling) -> None:
    logits, n = random_logits(1, 12), 4_000
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(12, dtype=torch.float64)
    for _ in range(n):
        counts[sample(logits, sampling, [], [], generator)] += 1
    expected = n * probabilities(logits, sampling)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 32  # 11 degrees of freedom: one in a thousand is above 31.3; the seed is fixed


def test_greedy_decoding_draws_no_random_number() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert sample(torch.tensor([0.0, 2.0, 1.0]), Sampling(temperature=0), [], [], generator) == 1
    assert torch.equal(generator.get_state(), before)
    assert probabilities(torch.tensor([0.0, 2.0, 1.0]), Sampling(temperature=0)).tolist() == [0, 1, 0]
    assert sample(torch.tensor([1.9, 2.0]), Sampling(temperature=0, repetition_penalty=1.1), [1], [], generator) == 0


def test_sampling_draws_one_random_number() -> None:
    one, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    sample(random_logits(0), PLAIN, [], [], one)
    torch.rand((), generator=other, dtype=torch.float64)
    assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-8, 1e300])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    p = probabilities(torch.tensor([1e30, -1e30, 0.0]), Sampling(temperature=temperature))
    assert torch.isfinite(p).all()
    assert abs(float(p.sum()) - 1) < 1e-12


def test_filters_keep_at_least_one_token() -> None:
    sampling = Sampling(temperature=1.0, top_k=1, top_p=1e-12, min_p=1.0)
    assert (probabilities(torch.zeros(5), Sampling(temperature=1.0, top_p=1e-12)) > 0).sum() == 1
    assert (probabilities(random_logits(0), sampling) > 0).sum() == 1


def test_sampling_does_not_change_its_input() -> None:
    logits = random_logits(0)
    copy = logits.clone()
    sample(logits, Sampling(top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=2.0), [1, 2], [2], torch.Generator())
    assert torch.equal(logits, copy)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_nonfinite_logits_are_rejected(bad: float, temperature: float) -> None:
    with pytest.raises(NextwordError, match="not finite"):
        sample(torch.tensor([0.0, bad]), Sampling(temperature=temperature), [], [], torch.Generator())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("max_tokens", -1),
        ("max_tokens", None),
        ("stop", "\n"),
        ("stop", ("",)),
        ("seed", 0.5),
    ],
)
def test_parameters_out_of_range_are_rejected_by_name(setting: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"^{setting} must be"):
        Sampling(**{setting: value})  # pyright: ignore[reportArgumentType]
