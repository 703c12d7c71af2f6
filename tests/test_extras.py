"""Optional features: TensorBoard event files, a compiled training step, and the message for a missing package."""

import sys
from typing import Any

import pytest
import torch

import nextword
from nextword.common.errors import MissingDependencyError
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.training.losses import DeviceBatch, LossModule, causal_lm_loss

SETTINGS: dict[str, Any] = {
    "model": {"n_layers": 1, "n_heads": 2, "d_model": 32, "context_length": 32},
    "training": {"batch_tokens": 256, "evaluations": 2},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # from tensorboard
def test_tensorboard_event_files(shards, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    nextword.pretrain(shards, tmp_path / "run", steps=20, tensorboard=True, **SETTINGS)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("training/loss")) == 20
    assert len(events.Scalars("validation/loss")) == 2


def test_a_missing_package_is_reported_with_the_command_that_installs_it(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'nextword\[tensorboard\]'"):
        nextword.pretrain(shards, tmp_path / "run", steps=5, tensorboard=True, **SETTINGS)


@pytest.mark.needs("more time")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from torch.compile, about torch.jit
def test_a_compiled_step_equals_the_eager_one():
    """Loss and gradients, with dropout."""
    import shutil

    if not shutil.which("c++"):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    torch.manual_seed(0)
    model = GPT(build_config("modern", "tiny", vocab_size=50, n_layers=1, d_model=32, context_length=16, dropout=0.1))
    tokens = torch.randint(0, 50, (3, 17))
    dropout_masks = torch.rand(3, 3, 16, 32) > 0.1
    results = []
    eager = LossModule(model, causal_lm_loss)
    for loss_module in (eager, torch.compile(eager)):
        loss = loss_module(DeviceBatch(tokens[:, :-1], tokens[:, 1:], dropout_masks))["next_word"]
        results.append((loss.total, torch.autograd.grad(loss.total, list(model.parameters()))))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-4)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
