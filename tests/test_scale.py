"""What makes room: activations that are made again in the backward pass, with the same gradients and much less kept."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from nextword.commands import api
from nextword.model.config import build_config
from nextword.model.gpt import GPT, sample_dropout_masks
from nextword.training.losses import DeviceBatch, causal_lm_loss
from nextword.training.step import build_loss_module
from test_distributed import end, losses, start

SIZES = {"n_layers": 2, "n_heads": 2, "d_model": 32, "context_length": 32}
LAYERS, ROWS, LENGTH, WIDTH = 4, 3, 16, 32


def gradients(preset: str, recompute: bool, kind: Any = "plain") -> tuple[list[Tensor], int]:
    """Loss and gradients of a step with dropout and several documents a window; and the bytes kept for the backward pass."""
    torch.manual_seed(0)
    config = build_config(
        preset, "tiny", vocab_size=50, n_layers=LAYERS, n_heads=2, d_model=WIDTH, context_length=LENGTH, dropout=0.1
    )
    model = GPT(config)
    _, step = build_loss_module(model, causal_lm_loss, kind, recompute)
    tokens = torch.randint(0, 50, (ROWS, LENGTH + 1))
    segments = (torch.arange(LENGTH) > 9).long().expand(ROWS, -1)
    keep = sample_dropout_masks(config, [5, 6, 7], LENGTH, "cpu")
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step(DeviceBatch(tokens[:, :-1], tokens[:, 1:], keep, segments))["next_word"].total
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))], size


@pytest.mark.parametrize("preset", ["modern", "tutorial", "gpt2"])
def test_what_is_made_again_gives_the_same_gradients_and_keeps_less(preset):
    plain, much = gradients(preset, recompute=False)
    again, little = gradients(preset, recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in plain[1:])
    assert little < much / 3
    assert little >= LAYERS * ROWS * LENGTH * WIDTH * 4, "what goes into each block is kept, and counted here"


def test_it_is_off_where_nothing_is_learned():
    """A look at held-out text makes nothing twice."""
    model = GPT(build_config("modern", "tiny", vocab_size=50, **SIZES))
    build_loss_module(model, causal_lm_loss, "plain", activation_checkpointing=True)
    calls: list[int] = []
    for block in model.blocks:
        block.feed_forward.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    assert len(calls) == 2
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert len(calls) == 2 + 2 * 2


def test_a_run_of_two_processes_is_that_of_one_without(shards, tmp_path):
    """Beneath `fully_shard`, a block at a time: its weights are gathered once more before it is made again."""
    training = {"batch_tokens": 256, "micro_batch_rows": 2, "evaluations": 1}
    api.pretrain(shards, tmp_path / "alone", steps=8, model={**SIZES, "dropout": 0.1}, training=training, seed=3)
    options = [f"--model.{name.replace('_', '-')}={value}" for name, value in {**SIZES, "dropout": 0.1}.items()]
    options += [f"--training.{name.replace('_', '-')}={value}" for name, value in training.items()]
    more = ["--steps", "8", "--seed", "3", "--training.checkpoint-activations", "--training.parallel", "full"]
    end(start(2, "pretrain", shards, "--out", tmp_path / "two", *options, *more))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), abs=2e-5)
    facts = json.loads((tmp_path / "two" / "run.json").read_text())
    assert facts["recipe"]["training"]["checkpoint_activations"] is True and facts["fixed"]["step_kind"] == "plain"
