"""Compiled parts of training: the same hidden states, losses and gradients as the model's own operations give."""

import pytest
import torch
from torch import Tensor

from nextword.data.dataset import IGNORE_INDEX
from nextword.model import fused
from nextword.model.config import PRESETS, build_config
from nextword.model.fused import FusedGPT
from nextword.model.gpt import GPT, sample_dropout_masks
from nextword.training.losses import DeviceBatch, LossModule, causal_lm_loss, completion_loss, sequence_logprobs

VOCABULARY = 61
WHY = fused.load_kernels()[1]  # a build that fails is a test that fails
pytestmark = pytest.mark.skipif(
    WHY.startswith(("no C++ compiler", "this processor")), reason=f"no compiled code: {WHY}"
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
    return tiny(preset, **overrides)


def tiny(preset: str = "modern", **overrides: object) -> GPT:
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 64, "context_length": 130, **overrides}
    torch.manual_seed(0)
    model = GPT(build_config(preset, vocab_size=VOCABULARY, **sizes))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(model: GPT, rows: int, length: int) -> DeviceBatch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    targets = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    targets[0, : length // 3] = IGNORE_INDEX
    return DeviceBatch(
        tokens, targets, sample_dropout_masks(model.config, list(range(rows)), length, torch.device("cpu"))
    )


def gradients(step: LossModule, batch: DeviceBatch) -> tuple[float, dict[str, Tensor]]:
    step.model.zero_grad()
    loss = torch.stack([term.weight * term.total for term in step(batch).values()]).sum()
    (loss / 7).backward()
    found = {name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 7), (2, 48), (2, 130)])
@pytest.mark.parametrize("objective", [causal_lm_loss, completion_loss])
def test_loss_and_gradients_are_the_models_own(model: GPT, rows: int, length: int, objective) -> None:
    batch = inputs(model, rows, length)
    expected, right = gradients(LossModule(model, objective), batch)
    found, mine = gradients(LossModule(model, objective, fused=True), batch)
    assert found == pytest.approx(expected, rel=1e-5)
    assert mine.keys() == right.keys()
    for name, gradient in right.items():
        # Relative to the largest: sums over many rows cancel.
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()) + 1e-6)


@pytest.mark.parametrize("length", [7, 60])
def test_texts_that_share_a_row_do_not_see_each_other(model: GPT, length: int) -> None:
    batch = inputs(model, 2, length)
    cut = length // 3
    segments = torch.tensor([[0] * cut + [1] * (length - cut), [0] * length])
    positions = torch.tensor([[*range(cut), *range(length - cut)], [*range(length)]])
    packed = batch._replace(segments=segments, positions=positions)
    expected, right = gradients(LossModule(model, completion_loss), packed)
    found, mine = gradients(LossModule(model, completion_loss, fused=True), packed)
    assert found == pytest.approx(expected, rel=1e-5)
    for name, gradient in right.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()) + 1e-6)
    assert torch.allclose(sequence_logprobs(FusedGPT(model), packed), sequence_logprobs(model, packed), rtol=1e-4)


def test_a_row_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="131 tokens are more than the context length of 130"):
        FusedGPT(tiny())(torch.zeros(1, 131, dtype=torch.int64))


def test_logits_in_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    batch = inputs(model, 3, 50)
    whole, right = gradients(LossModule(model, causal_lm_loss, fused=True), batch)
    monkeypatch.setattr(fused, "PIECE", 7 * VOCABULARY)
    pieces, mine = gradients(LossModule(model, causal_lm_loss, fused=True), batch)
    assert pieces == pytest.approx(whole, rel=1e-6)
    for name, gradient in right.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-5)


def test_threads_change_no_part_at_all() -> None:
    """The parts between the matrix products; those are PyTorch's."""
    threads, found = torch.get_num_threads(), []
    qkv = torch.randn(2 * 100, 3 * 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    config = build_config("modern", vocab_size=5, n_layers=1, n_heads=4, n_kv_heads=4, d_model=64, context_length=100)
    weight, norm = (torch.linspace(0.5, 1.5, width, requires_grad=True) for width in (16, 64))
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for leaf in (qkv, x, weight, norm):
            leaf.grad = None
        out = fused.FusedAttention.apply(qkv, weight, weight, fused.RowLayout(), config, 100)
        total, y = fused.FusedAddNorm.apply(x, x * 2, norm, None, 1e-6)
        (out.square().sum() + (total * y).sum()).backward()
        found.append([out.detach(), y.detach(), *(leaf.grad for leaf in (qkv, x, weight, norm))])
    torch.set_num_threads(threads)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))


def test_a_loss_that_is_no_number_is_seen() -> None:
    model = tiny()
    with torch.no_grad():
        model.blocks[1].feed_forward.down.weight[3, 5] = torch.nan
    loss, found = gradients(LossModule(model, causal_lm_loss, fused=True), inputs(model, 2, 20))
    assert not torch.isfinite(torch.tensor(loss))
    assert not all(torch.isfinite(gradient).all() for gradient in found.values())


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 61, 2048])
def test_log_sums_are_torchs(vocabulary: int):
    logits = 30 * torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    torch.testing.assert_close(fused.logsumexp(logits), torch.logsumexp(before, 1), rtol=1e-6, atol=1e-5)
    assert torch.equal(logits, before)
    for broken in (torch.nan, torch.inf):
        logits[3, vocabulary // 2] = broken
        found = fused.logsumexp(logits)
        assert not found[3].isfinite() and found[4].isfinite()
