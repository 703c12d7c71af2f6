"""Activation checkpointing: the backward pass recomputes activations, with the same gradients and less memory."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from nextword import pretrain
from nextword.model.config import build_config
from nextword.model.gpt import GPT, sample_dropout_masks
from nextword.training.losses import DeviceBatch, LossModule, causal_lm_loss
from runs import finish, losses, start
from test_distributed import options

LAYERS, ROWS, LENGTH, WIDTH = 4, 3, 16, 32


def gradients(preset: str, activation_checkpointing: bool) -> tuple[list[Tensor], int]:
    """Loss and gradients of a step with dropout and two documents per row, and the bytes saved for the backward pass."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_layers": LAYERS, "n_heads": 2, "d_model": WIDTH, "context_length": LENGTH}
    model = GPT(build_config(preset, "tiny", dropout=0.1, **sizes))
    model.set_activation_checkpointing(activation_checkpointing)
    loss_module = LossModule(model, causal_lm_loss)
    tokens = torch.randint(0, 50, (ROWS, LENGTH + 1))
    masks = sample_dropout_masks(model.config, [5, 6, 7], LENGTH, "cpu")
    segments = (torch.arange(LENGTH) > 9).long().expand(ROWS, -1)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_module(DeviceBatch(tokens[:, :-1], tokens[:, 1:], masks, segments))["next_word"].total
    saved_bytes = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))], saved_bytes


@pytest.mark.parametrize("preset", ["modern", "tutorial", "gpt2"])
def test_gradients_are_the_same_and_memory_is_less(preset):
    expected, expected_bytes = gradients(preset, activation_checkpointing=False)
    actual, actual_bytes = gradients(preset, activation_checkpointing=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in expected[1:])
    assert actual_bytes < expected_bytes / 3
    assert actual_bytes >= LAYERS * ROWS * LENGTH * WIDTH * 4, "the input of each block is saved"


def test_evaluation_recomputes_nothing():
    sizes: dict[str, Any] = {"n_layers": 2, "n_heads": 2, "d_model": 32, "context_length": 32}
    model = GPT(build_config("modern", "tiny", vocab_size=50, **sizes))
    model.set_activation_checkpointing(True)
    calls: list[int] = []
    for block in model.blocks:
        block.feed_forward.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    assert len(calls) == 2
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert len(calls) == 2 + 2 * 2


@pytest.mark.needs("more time")
def test_two_processes_with_fsdp_and_activation_checkpointing(shards, tmp_path):
    """Equal to a single process without either."""
    model = {"n_layers": 2, "n_heads": 2, "d_model": 32, "context_length": 32, "dropout": 0.1}
    training = {"batch_tokens": 256, "micro_batch_rows": 2, "evaluations": 1}
    pretrain(shards, tmp_path / "single", steps=8, model=model, training=training, seed=3)
    parallel = ["--training.checkpoint-activations", "--training.parallel", "fsdp", "--steps", "8", "--seed", "3"]
    arguments = [*options(model=model, training=training), *parallel]
    finish(start(2, "pretrain", shards, "--out", tmp_path / "two", *arguments))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "single"), abs=2e-5)
    metadata = json.loads((tmp_path / "two" / "run.json").read_text())
    assert metadata["recipe"]["training"]["checkpoint_activations"] is True
    assert metadata["fixed"]["step_kind"] == "plain"
