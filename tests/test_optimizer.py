"""AdamW is torch's, Muon equals torch's, and the learning rate is what the papers draw."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.training.optimizer import AdamW, Muon, Optimizer, lr_multiplier, orthogonalize


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 24), (2, 24, 8), (1, 1, 5)])
def test_orthogonalise_keeps_directions_and_evens_strengths(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    before = torch.linalg.svd(matrices, full_matrices=False)
    after = orthogonalize(matrices)
    strengths = torch.linalg.svdvals(after)
    assert strengths.min() > 0.3
    assert strengths.max() < 1.35
    # Most of U Vᵀ: the directions are those of the matrix itself.
    ideal = before.U @ before.Vh
    cosine = (after * ideal).sum((-2, -1)) / after.norm(dim=(-2, -1)) / ideal.norm(dim=(-2, -1))
    assert cosine.min() > 0.97


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_muon_is_torchs(shape):
    """The same steps as torch.optim.Muon takes, but for its bfloat16."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, longest_held_out = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    muon = Muon([ours], momentum=0.9, weight_decay=0.1)
    stock = torch.optim.Muon([theirs], lr=0.05, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step(0.05)
        stock.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() / moved < 0.03


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_takes_the_steps_of_torchs_own(fused: bool) -> None:
    torch.manual_seed(0)
    ours, longest_held_out = [[nn.Parameter(torch.ones(7, 5)), nn.Parameter(torch.ones(5))] for _ in range(2)]
    settings = {"betas": (0.9, 0.99), "eps": 1e-8, "fused": fused}
    own = AdamW([(ours[:1], 0.1), (ours[1:], 0.0), ([], 0.5)], **settings)
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    stock = torch.optim.AdamW(groups, lr=0.01, **settings)
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            gradient = torch.randn_like(a)
            a.grad, b.grad = (None, None) if step == 1 and a.ndim == 1 else (gradient, gradient.clone())
        own.step(0.01 / (step + 1))
        for group in stock.param_groups:
            group["lr"] = 0.01 / (step + 1)
        stock.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_muon_takes_matrices_of_blocks_and_adamw_the_rest():
    model = GPT(build_config("modern", "tiny", vocab_size=50, d_model=32, n_layers=2, tied=False))
    optimizer = Optimizer(model, kind="muon", lr=1e-3, weight_decay=0.1)
    assert optimizer.muon is not None
    muon = {optimizer.parameter_names[p] for p in optimizer.muon.parameters}
    assert all("blocks." in name and "norm" not in name for name in muon)
    assert len(muon) == 2 * 7
    decayed, mutable_fields = [
        {optimizer.parameter_names[p] for p in parameters} for parameters, _ in optimizer.adamw.groups
    ]
    assert decayed == {"token_embedding.weight", "head.weight"}
    assert all("norm" in name for name in free)
    assert muon | decayed | free == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_goes_out_and_in(kind):
    """Two optimizers that share a history by way of named tensors take the same next step, bit for bit."""
    config = build_config("modern", "tiny", vocab_size=50, d_model=32, n_layers=1)

    def fresh():
        torch.manual_seed(0)
        model = GPT(config)
        return model, Optimizer(model, kind=kind, lr=1e-2)

    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step(0.5)

    model, optimizer = fresh()
    step(model, optimizer, 1)
    tensors = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    other, resumed = fresh()
    other.load_state_dict(model.state_dict())
    resumed.load_state_tensors(tensors)
    step(model, optimizer, 2)
    step(other, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    after = resumed.state_tensors()
    assert all(torch.equal(tensor, after[name]) for name, tensor in optimizer.state_tensors().items())


# ---------------------------------------------------------------- the learning rate


def test_schedules_are_their_curves():
    # Half a cosine from the end of the warm-up to the end of the run.
    assert lr_multiplier(0.1, "cosine", 0.1, 0.1) == pytest.approx(1.0)
    assert lr_multiplier(0.55, "cosine", 0.1, 0.1) == pytest.approx(0.55)
    assert lr_multiplier(1.0, "cosine", 0.1, 0.1) == pytest.approx(0.1)
    assert lr_multiplier(0.325, "cosine", 0.1, 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert lr_multiplier(0.55, "linear", 0.1, 0.0) == pytest.approx(0.5)
    # Warm-up, stable, decay.
    assert lr_multiplier(0.05, "wsd", 0.1, 0.0) == pytest.approx(0.5)
    assert lr_multiplier(0.59, "wsd", 0.1, 0.0) == 1.0
    assert lr_multiplier(0.8, "wsd", 0.1, 0.0) == pytest.approx(0.5)
    assert lr_multiplier(0.99, "constant", 0.1, 0.0) == 1.0
    assert lr_multiplier(0.8, "wsd", 0.8, 0.0) == pytest.approx(1.0)  # no cliff after a long warm-up


@given(
    st.floats(1e-6, 1), st.sampled_from(["cosine", "wsd", "linear", "constant"]), st.floats(0, 1), st.floats(0, 1)
)  # fmt: skip
def test_a_learning_rate_is_between_nothing_and_its_peak(progress, schedule, warmup, final):
    assert 0 <= lr_multiplier(progress, schedule, warmup, final) <= 1 + 1e-9
