"""Small models with random weights, for tests of the model and its formats."""

from typing import Any

import torch

from nextword.model.config import ModelConfig, build_config
from nextword.model.gpt import GPT


def small(preset: str, **overrides: Any) -> ModelConfig:
    sizes = {"vocab_size": 61, "n_layers": 2, "d_model": 32, "context_length": 24}
    return build_config(preset, "tiny", **{**sizes, **overrides})


def random_model(config: ModelConfig, seed: int = 0) -> GPT:
    """A model whose biases and norms are random, too."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()
