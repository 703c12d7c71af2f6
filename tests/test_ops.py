"""Compiled operators: the hidden states, losses and gradients of the model with and without them are equal."""

import pytest
import torch
from torch import Tensor

from nextword.common.native_build import load_native_library
from nextword.model import ops
from nextword.model.config import PRESETS, build_config
from nextword.model.gpt import GPT, sample_dropout_masks
from nextword.training.losses import (
    DeviceBatch,
    LossFn,
    LossModule,
    causal_lm_loss,
    completion_loss,
    sequence_logprobs,
)

VOCAB_SIZE = 61
REASON = load_native_library(ops.SOURCE)[1]  # a build that fails is a test that fails
pytestmark = pytest.mark.skipif(
    REASON.startswith(("no C++ compiler", "this processor")), reason=f"no compiled kernels: {REASON}"
)
MODELS = [
    *((preset, {}) for preset in PRESETS),
    ("modern", {"n_kv_heads": 1}),
    ("modern", {"n_kv_heads": 4, "head_dim": 24, "d_ff": 40, "tied": False}),
    ("modern", {"qk_norm": False}),  # Llama
    ("gpt2", {"dropout": 0.3}),
    ("gpt1", {"dropout": 0.3}),
]


@pytest.fixture(params=MODELS, ids=lambda p: "-".join([p[0], *(f"{k}={v}" for k, v in p[1].items())]))
def model(request: pytest.FixtureRequest) -> GPT:
    preset, overrides = request.param
    return random_model(preset, **overrides)


def random_model(preset: str = "modern", **overrides: object) -> GPT:
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 64, "context_length": 130, **overrides}
    torch.manual_seed(0)
    model = GPT(build_config(preset, vocab_size=VOCAB_SIZE, **sizes))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_batch(model: GPT, rows: int, length: int) -> DeviceBatch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB_SIZE, (rows, length), generator=generator)
    targets = torch.randint(0, VOCAB_SIZE, (rows, length), generator=generator)
    targets[0, : length // 3] = -100
    masks = sample_dropout_masks(model.config, list(range(rows)), length, torch.device("cpu"))
    return DeviceBatch(tokens, targets, masks)


def packed_batch(model: GPT, length: int) -> DeviceBatch:
    """Two documents in the first row, one in the second."""
    cut = length // 3
    segments = torch.tensor([[0] * cut + [1] * (length - cut), [0] * length])
    positions = torch.tensor([[*range(cut), *range(length - cut)], [*range(length)]])
    return random_batch(model, 2, length)._replace(segments=segments, positions=positions)


def loss_and_gradients(
    model: GPT, loss_fn: LossFn, batch: DeviceBatch, kernels: bool
) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    terms = LossModule(model, loss_fn, kernels)(batch)
    loss = torch.stack([term.weight * term.total for term in terms.values()]).sum()
    (loss / 7).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


def assert_equal_training(model: GPT, loss_fn: LossFn, batch: DeviceBatch) -> None:
    expected_loss, expected = loss_and_gradients(model, loss_fn, batch, kernels=False)
    loss, gradients = loss_and_gradients(model, loss_fn, batch, kernels=True)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        # Relative to the largest element: sums over many rows cancel.
        tolerance = 2e-5 * float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 7), (2, 48), (2, 130)])
@pytest.mark.parametrize("loss_fn", [causal_lm_loss, completion_loss])
def test_loss_and_gradients_equal_pytorch(model: GPT, rows: int, length: int, loss_fn: LossFn) -> None:
    assert_equal_training(model, loss_fn, random_batch(model, rows, length))


@pytest.mark.parametrize("length", [7, 60])
def test_packed_documents_equal_pytorch(model: GPT, length: int) -> None:
    batch = packed_batch(model, length)
    assert_equal_training(model, completion_loss, batch)
    with torch.no_grad():
        expected = sequence_logprobs(model, batch)
        torch.testing.assert_close(sequence_logprobs(model, batch, kernels=True), expected, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_equals_pytorch() -> None:
    model = random_model()
    model.set_activation_checkpointing(True)
    assert_equal_training(model, causal_lm_loss, random_batch(model, 2, 48))


def test_attention_gaps_and_output_indices_equal_pytorch(model: GPT) -> None:
    """A prefix of 5 tokens with two branches, and tokens that no other one attends to."""
    batch = packed_batch(model, 30)
    gaps = torch.zeros(2, 30, 2, dtype=torch.int64)
    gaps[1, 12:20] = torch.tensor([5, 12])
    gaps[0, 15] = torch.tensor([11, 14])
    indices = torch.tensor([0, 13, 15, 42, 59])
    arguments = {"positions": batch.positions, "segments": batch.segments, "attention_gaps": gaps}
    with torch.no_grad():
        expected = model(batch.tokens, **arguments)
        torch.testing.assert_close(model(batch.tokens, **arguments, kernels=True), expected, rtol=1e-4, atol=1e-4)
        for kernels in (False, True):
            rows = model(batch.tokens, **arguments, output_indices=indices, kernels=kernels)
            torch.testing.assert_close(rows, expected.flatten(0, 1)[indices], rtol=1e-4, atol=1e-4)


def test_attention_gaps_hide_their_positions() -> None:
    model = random_model()
    tokens = torch.randint(0, VOCAB_SIZE, (1, 20), generator=torch.Generator().manual_seed(2))
    gaps = torch.zeros(1, 20, 2, dtype=torch.int64)
    gaps[0, 12:] = torch.tensor([5, 12])
    positions = torch.tensor([[*range(12), *range(5, 13)]])
    with torch.no_grad():
        expected = model(torch.cat((tokens[:, :5], tokens[:, 12:]), 1))[0, 5:]
        for kernels in (False, True):
            hidden = model(
                tokens,
                positions=positions,
                segments=torch.zeros_like(tokens),
                attention_gaps=gaps,
                kernels=kernels,
            )
            torch.testing.assert_close(hidden[0, 12:], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", [False, True])
def test_window_longer_than_the_context_is_refused(kernels: bool) -> None:
    with pytest.raises(ValueError, match="131 tokens are more than the context length of 130"):
        random_model()(torch.zeros(1, 131, dtype=torch.int64), kernels=kernels)


def test_cross_entropy_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    batch = random_batch(model, 3, 50)
    expected_loss, expected = loss_and_gradients(model, causal_lm_loss, batch, kernels=True)
    monkeypatch.setattr(ops, "LOGITS_PER_CHUNK", 7 * VOCAB_SIZE)
    loss, gradients = loss_and_gradients(model, causal_lm_loss, batch, kernels=True)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_operators_do_not_depend_on_the_number_of_threads() -> None:
    """Bit for bit, for the operators between the matrix products; those are PyTorch's."""
    num_threads = torch.get_num_threads()
    results: list[list[Tensor]] = []
    qkv = torch.randn(2, 100, 3 * 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    config = build_config("modern", vocab_size=5, n_layers=1, n_heads=4, n_kv_heads=4, d_model=64, context_length=100)
    weight, norm = (torch.linspace(0.5, 1.5, width, requires_grad=True) for width in (16, 64))
    leaves = (qkv, x, weight, norm)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            heads = ops.attention(qkv, weight, weight, config)
            total, y = ops.add_norm(x, x * 2, norm, None, 1e-6)
            gradients = torch.autograd.grad(heads.square().sum() + (total * y).sum(), leaves)
            results.append([heads.detach(), y.detach(), *gradients])
    finally:
        torch.set_num_threads(num_threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_nan_weights_give_a_loss_that_is_not_finite() -> None:
    model = random_model()
    with torch.no_grad():
        model.blocks[1].feed_forward.down.weight[3, 5] = torch.nan
    loss, gradients = loss_and_gradients(model, causal_lm_loss, random_batch(model, 2, 20), kernels=True)
    assert not torch.isfinite(torch.tensor(loss))
    assert not all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("vocab_size", [1, 7, 8, 61, 2048])
def test_logsumexp_equals_pytorch(vocab_size: int) -> None:
    logits = 30 * torch.randn(9, vocab_size, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    torch.testing.assert_close(ops.logsumexp(logits), torch.logsumexp(before, 1), rtol=1e-6, atol=1e-5)
    assert torch.equal(logits, before)
    for value in (torch.nan, torch.inf):
        logits[3, vocab_size // 2] = value
        sums = ops.logsumexp(logits)
        assert not sums[3].isfinite() and sums[4].isfinite()


def test_kernels_are_refused_for_other_models() -> None:
    assert random_model().supports_kernels()
    assert not random_model(head_dim=12).supports_kernels(), "no multiple of 8"
    assert not random_model().double().supports_kernels()
    on_meta = GPT.on_meta(random_model().config)
    assert on_meta.supports_kernels(torch.device("cpu")) and not on_meta.supports_kernels()
