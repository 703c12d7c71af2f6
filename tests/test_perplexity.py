"""Perplexity equals its formula in float64; a trained model uses its context."""

import itertools
import math
import pydoc_data.topics
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nextword.common.errors import NextwordError, UsageError
from nextword.common.statistics import ratio_of_sums
from nextword.inference import perplexity
from nextword.inference.perplexity import (
    MIN_DOCUMENTS,
    DocumentLosses,
    describe_interval,
    evaluate_perplexity,
    measure_context_usage,
)
from nextword.model.config import PRESETS, build_config
from nextword.model.gpt import GPT

CONTEXT, VOCABULARY = 16, 50


class Row:
    """Token ids in memory."""

    def __init__(self, ids: np.ndarray):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, count: int) -> np.ndarray:
        assert start >= 0
        assert start + count <= len(self.ids)
        return self.ids[start : start + count]


def random_row(length: int) -> Row:
    return Row(np.random.default_rng(0).integers(0, VOCABULARY, length).astype(np.uint16))


def tiny(preset: str = "gpt2") -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32, "context_length": CONTEXT}
    model = GPT(build_config(preset, vocab_size=VOCABULARY, **sizes))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def by_hand(model: GPT, row: Row, windows: list[int] | None = None) -> tuple[float, list[list[float]]]:
    """Σ −log softmax(logits)[x_t], one token and one window at a time; and the losses at each position."""
    total, by_position = 0.0, [[] for _ in range(CONTEXT)]
    starts = range(0, len(row) - 1, CONTEXT)
    for start in starts if windows is None else [starts[i] for i in windows]:
        window = torch.tensor(row.ids[start : start + CONTEXT + 1].astype(np.int64))
        logits = model.unembed(model(window[None, :-1]))[0].double()
        for t, target in enumerate(window[1:]):
            loss = -math.log(float(logits[t].exp()[target] / logits[t].exp().sum()))
            total += loss
            by_position[t].append(loss)
    return total, by_position


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("length", [2, 16, 17, 18, 33, 100])
@pytest.mark.parametrize("batch_rows", [None, 2])
def test_perplexity_equals_its_formula(preset: str, length: int, batch_rows: int | None) -> None:
    model, row = tiny(preset), random_row(length)
    result = evaluate_perplexity(model, row, 3 * length, batch_size=batch_rows)
    total, by_position = by_hand(model, row)
    assert result.tokens == length - 1  # every token but the first, exactly once
    assert result.loss == pytest.approx(total / (length - 1), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(total / (length - 1)), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / (3 * length), rel=1e-6)
    assert result.bytes == 3 * length
    assert result.by_position == pytest.approx([sum(x) / len(x) for x in by_position if x], rel=1e-5)


def test_max_windows_are_evenly_spaced() -> None:
    model, row = tiny(), random_row(10 * CONTEXT + 5)  # ten windows and a short one
    result = evaluate_perplexity(model, row, 1000, max_windows=3)
    total, _ = by_hand(model, row, [1, 5, 9])
    assert result.tokens == 3 * CONTEXT
    assert result.loss == pytest.approx(total / result.tokens, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / (1000 * 48 / 164), rel=1e-6)
    assert result == evaluate_perplexity(model, row, 1000, max_windows=3)
    assert evaluate_perplexity(model, row, 1000, max_windows=11) == evaluate_perplexity(model, row, 1000)


def test_an_evaluation_that_is_stopped_is_a_random_sample_with_its_interval() -> None:
    """The interval contains the loss of the whole text in about 95 % of texts."""
    model, covered = tiny(), 0
    for seed in range(60):
        row = Row(np.random.default_rng(seed).integers(0, VOCABULARY, 60 * CONTEXT))
        whole = evaluate_perplexity(model, row, 1000, should_stop=lambda: False)
        assert whole.margin == 0 and whole.loss == pytest.approx(evaluate_perplexity(model, row, 1000).loss, rel=1e-9)
        batches = itertools.count(1)
        sample = evaluate_perplexity(
            model, row, 1000, batch_size=4, should_stop=lambda batches=batches: next(batches) == 3
        )
        assert sample.tokens <= 12 * CONTEXT and sample.bytes == round(1000 * sample.tokens / whole.tokens)
        covered += abs(sample.loss - whole.loss) <= sample.margin
    assert 52 <= covered <= 60


def test_loss_does_not_depend_on_the_chunks_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, row = tiny(), random_row(200)
    expected = evaluate_perplexity(model, row, 200)
    monkeypatch.setattr(perplexity, "MAX_LOGITS", 10 * VOCABULARY)
    assert evaluate_perplexity(model, row, 200).loss == pytest.approx(expected.loss, rel=1e-6)


def test_progress_counts_windows_and_the_mode_is_restored() -> None:
    model, calls = tiny().train(), []
    evaluate_perplexity(
        model, random_row(100), 100, batch_size=2, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(2, 7), (4, 7), (6, 7), (7, 7)]
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UsageError, match="another tokenizer"):
        evaluate_perplexity(model, Row(np.array([1, VOCABULARY])), 2)
    assert model.training


@pytest.mark.parametrize(("length", "n_bytes"), [(0, 10), (1, 10), (5, 0)])
def test_a_text_that_is_too_short_is_rejected(length: int, n_bytes: int) -> None:
    with pytest.raises(UsageError, match="too short to evaluate"):
        evaluate_perplexity(tiny(), random_row(length), n_bytes)


def test_a_nonfinite_loss_raises_an_error() -> None:
    model = tiny()
    with torch.no_grad():
        model.token_embedding.weight[0] = torch.nan
    with pytest.raises(NextwordError, match="not finite"):
        evaluate_perplexity(model, random_row(100), 100)


def test_context_usage_needs_a_whole_window() -> None:
    assert len(measure_context_usage(tiny(), random_row(CONTEXT + 1)).original) == CONTEXT
    with pytest.raises(UsageError, match="too short"):
        measure_context_usage(tiny(), random_row(CONTEXT))


def test_a_trained_model_uses_its_context() -> None:
    """The loss falls with the position in the window, and more so than with the tokens shuffled."""
    ids = np.frombuffer("\n".join(pydoc_data.topics.topics.values()).encode("ascii", "replace"), dtype=np.uint8)
    train, held_out = ids[: len(ids) * 9 // 10], Row(ids[len(ids) * 9 // 10 :])
    torch.manual_seed(0)
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 64, "context_length": 32}
    model = GPT(build_config("modern", vocab_size=128, **sizes))  # pyright: ignore[reportArgumentType]
    optimizer, random = torch.optim.AdamW(model.parameters(), lr=3e-3), np.random.default_rng(0)
    for _ in range(120):
        starts = random.integers(0, len(train) - 33, 16)
        window = torch.tensor(np.stack([train[start : start + 33] for start in starts]).astype(np.int64))
        loss = F.cross_entropy(model.unembed(model(window[:, :-1])).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    use = measure_context_usage(model, held_out, max_windows=1024)
    assert use == measure_context_usage(model, held_out, max_windows=1024)

    def fall(losses: list[float]) -> float:
        return losses[0] - float(np.mean(losses[-16:]))

    assert fall(use.original) > 0.2
    assert fall(use.original) > fall(use.shuffled) + 0.2


# ---------------------------------------------------------------- the token that begins a document


class Tokenizer(NamedTuple):
    """Tokens of 1 to 3 bytes; the begin and the end-of-text token have none."""

    eos_id: int = VOCABULARY - 2
    vocab_size: int = VOCABULARY

    def token_bytes(self, id: int) -> bytes:
        return b"" if id >= self.eos_id else b"x" * (1 + id % 3)


@pytest.mark.parametrize("stride", [None, 4, CONTEXT - 1])
@pytest.mark.parametrize("lengths", [[30], [1, 1, 40], [7, 1, 16, 15, 3], [9, 40, 5, 20, 33, 17]])
def test_the_loss_of_each_document(lengths: list[int], stride: int | None) -> None:
    """A begin token is context and never predicted. A document's loss is that of its tokens, its end included, by hand."""
    model, bos, tokenizer = tiny(), VOCABULARY - 1, Tokenizer()
    texts = [np.random.default_rng(i).integers(0, tokenizer.eos_id, n) for i, n in enumerate(lengths)]
    row = Row(np.concatenate([[bos, *text, tokenizer.eos_id] for text in texts]))
    num_bytes = [sum(1 + int(id) % 3 for id in text) for text in texts]
    losses = []
    for window in range(1 + max(0, -(-(len(row) - 1 - CONTEXT) // (stride or CONTEXT)))):
        ids = row.ids[window * (stride or CONTEXT) :][: CONTEXT + 1]
        with torch.no_grad():
            logits = model.unembed(model(torch.tensor(ids[None, :-1])))[0].double()
        nll = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").numpy()
        losses.extend(nll[CONTEXT - (stride or CONTEXT) if window else 0 :])
    is_counted, owner = row.ids[1:] != bos, np.repeat(np.arange(len(lengths)), [n + 2 for n in lengths])[1:]
    expected = np.bincount(owner, np.array(losses) * is_counted)
    documents = DocumentLosses(row, tokenizer)  # pyright: ignore[reportArgumentType]
    result = evaluate_perplexity(
        model, row, sum(num_bytes), stride=stride, bos_id=bos, batch_size=2, documents=documents
    )
    assert documents.sums[:, 0] == pytest.approx(expected, rel=1e-5)
    assert documents.sums[:, 1].tolist() == num_bytes
    assert result.tokens == is_counted.sum() == sum(lengths) + len(lengths) and result.bytes == sum(num_bytes)
    assert result.loss == pytest.approx(expected.sum() / is_counted.sum())
    assert result.bits_per_byte == pytest.approx(expected.sum() / math.log(2) / sum(num_bytes))
    score = ratio_of_sums(expected / math.log(2), num_bytes)
    assert result.interval is not None and result.interval["n"] == len(lengths)
    has_interval = len(lengths) >= MIN_DOCUMENTS
    assert result.interval["low"] == (pytest.approx(score.low, rel=1e-4) if has_interval else None)
    assert ("for texts like these" in result.interval["basis"]) == has_interval
    without = evaluate_perplexity(model, row, sum(num_bytes), stride=stride, bos_id=bos)
    assert (without.loss, without.interval) == (result.loss, None)


def test_documents_of_another_model_tokens_without_an_end_and_a_sample_of_windows() -> None:
    model, tokenizer = tiny(), Tokenizer()
    ids = np.random.default_rng(0).integers(0, tokenizer.eos_id, 40 * CONTEXT)
    ids[CONTEXT :: 2 * CONTEXT] = tokenizer.eos_id  # twenty documents of two windows, the last one without an end
    row = Row(ids)
    documents, others = (DocumentLosses(row, tokenizer) for _ in range(2))  # pyright: ignore[reportArgumentType]
    assert len(documents.sums) == 21
    whole = evaluate_perplexity(model, row, 1000, documents=documents)
    assert documents.sums.sum(0) == pytest.approx([whole.loss * whole.tokens, 1000])
    others.sums = documents.sums * [1.02, 1]
    difference = documents.bits_per_byte(others)
    assert difference.value == pytest.approx(-0.02 * whole.bits_per_byte) and difference.is_below(0)
    assert documents.bits_per_byte(documents).low == 0  # no difference and no variance
    sample = DocumentLosses(row, tokenizer)  # pyright: ignore[reportArgumentType]
    stopped = evaluate_perplexity(model, row, 1000, batch_size=4, should_stop=lambda: True, documents=sample)
    assert stopped.by_document is not None and stopped.by_document.n == sample.sums.any(1).sum() < 21
    assert stopped.by_document.value == pytest.approx(stopped.bits_per_byte)
    tiny_and_long = DocumentLosses(Row(np.array([1, *[2, 48] * 6])), tokenizer)  # pyright: ignore[reportArgumentType]
    tiny_and_long.sums[:] = [[2.0, 1.0]] * 5 + [[900.0, 300.0]]
    assert "one of the 6 documents is most" in describe_interval(tiny_and_long.bits_per_byte())


def test_a_text_of_begin_tokens_only_is_refused() -> None:
    with pytest.raises(UsageError, match="too short"):
        evaluate_perplexity(tiny(), Row(np.array([3, 3, 3])), 1, bos_id=3)
