"""AdamW and Muon equal those of PyTorch, and the learning rate schedules those of the papers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.training.config import TrainingConfig
from nextword.training.optimizer import AdamW, Muon, Optimizer, lr_multiplier, orthogonalize


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 24), (2, 24, 8), (1, 1, 5)])
def test_orthogonalize_keeps_singular_vectors_and_equalizes_singular_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    svd = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalize(matrices)
    singular_values = torch.linalg.svdvals(result)
    assert singular_values.min() > 0.3
    assert singular_values.max() < 1.35
    ideal = svd.U @ svd.Vh
    cosine = (result * ideal).sum((-2, -1)) / result.norm(dim=(-2, -1)) / ideal.norm(dim=(-2, -1))
    assert cosine.min() > 0.97


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_muon_takes_the_steps_of_torch_optim_muon(shape):
    """Up to the bfloat16 of PyTorch's."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, expected = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    muon = Muon([ours], momentum=0.9, weight_decay=0.1)
    torch_muon = torch.optim.Muon([expected], lr=0.05, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        gradient = torch.randn(shape)
        ours.grad, expected.grad = gradient.clone(), gradient.clone()
        muon.step(0.05)
        torch_muon.step()
    assert (ours - expected).norm() / (expected - start).norm() < 0.03


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_takes_the_steps_of_torch_optim_adamw(fused: bool) -> None:
    torch.manual_seed(0)
    ours, expected = [[nn.Parameter(torch.ones(7, 5)), nn.Parameter(torch.ones(5))] for _ in range(2)]
    settings = {"betas": (0.9, 0.99), "eps": 1e-8, "fused": fused}
    adamw = AdamW([(ours[:1], 0.1), (ours[1:], 0.0), ([], 0.5)], **settings)
    groups = [{"params": expected[:1], "weight_decay": 0.1}, {"params": expected[1:], "weight_decay": 0.0}]
    torch_adamw = torch.optim.AdamW(groups, lr=0.01, **settings)
    for step in range(4):
        for a, b in zip(ours, expected, strict=True):
            gradient = torch.randn_like(a)
            a.grad, b.grad = (None, None) if step == 1 and a.ndim == 1 else (gradient, gradient.clone())
        adamw.step(0.01 / (step + 1))
        for group in torch_adamw.param_groups:
            group["lr"] = 0.01 / (step + 1)
        torch_adamw.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_muon_updates_matrices_of_blocks_and_adamw_the_rest():
    model = GPT(build_config("modern", "tiny", vocab_size=50, d_model=32, n_layers=2, tied=False))
    optimizer = Optimizer(model, TrainingConfig(optimizer="muon", lr=1e-3))
    muon = {optimizer.parameter_names[p] for p in optimizer.muon.state}
    assert all("blocks." in name and "norm" not in name for name in muon)
    assert len(muon) == 2 * 7
    decayed, free = [{optimizer.parameter_names[p] for p in parameters} for parameters, _ in optimizer.adamw.groups]
    assert decayed == {"token_embedding.weight", "head.weight"}
    assert all("norm" in name for name in free)
    assert muon | decayed | free == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_restored_optimizer_takes_the_same_next_step(kind):
    config = build_config("modern", "tiny", vocab_size=50, d_model=32, n_layers=1)

    def build():
        torch.manual_seed(0)
        model = GPT(config)
        return model, Optimizer(model, TrainingConfig(optimizer=kind, lr=1e-2))

    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step(0.5)

    model, optimizer = build()
    step(model, optimizer, 1)
    restored_model, restored = build()
    restored_model.load_state_dict(model.state_dict())
    restored.load_state_tensors({name: tensor.clone() for name, tensor in optimizer.state_tensors().items()})
    step(model, optimizer, 2)
    step(restored_model, restored, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), restored_model.parameters(), strict=True))
    state = restored.state_tensors()
    assert all(torch.equal(tensor, state[name]) for name, tensor in optimizer.state_tensors().items())


# ---------------------------------------------------------------- learning rate schedules


@pytest.mark.parametrize(
    ("progress", "schedule", "warmup", "final", "expected"),
    [
        (0.1, "cosine", 0.1, 0.1, 1.0),
        (0.55, "cosine", 0.1, 0.1, 0.55),
        (1.0, "cosine", 0.1, 0.1, 0.1),
        (0.325, "cosine", 0.1, 0.0, 0.5 * (1 + math.cos(math.pi / 4))),
        (0.55, "linear", 0.1, 0.0, 0.5),
        (0.05, "wsd", 0.1, 0.0, 0.5),
        (0.59, "wsd", 0.1, 0.0, 1.0),
        (0.8, "wsd", 0.1, 0.0, 0.5),
        (0.8, "wsd", 0.8, 0.0, 1.0),  # no drop after a long warmup
        (0.99, "constant", 0.1, 0.0, 1.0),
    ],
)
def test_learning_rate_schedules(progress, schedule, warmup, final, expected):
    assert lr_multiplier(progress, schedule, warmup, final) == pytest.approx(expected)


SCHEDULES = st.sampled_from(["cosine", "wsd", "linear", "constant"])


@given(st.floats(1e-6, 1), SCHEDULES, st.floats(0, 1), st.floats(0, 1))
def test_the_learning_rate_is_between_zero_and_its_peak(progress, schedule, warmup, final):
    assert 0 <= lr_multiplier(progress, schedule, warmup, final) <= 1 + 1e-9
