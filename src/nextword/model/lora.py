"""Low-rank adaptation (Hu et al. 2021): a frozen model is trained through a pair of low-rank matrices beside its own.

`add_lora` adds an adapter to a model, `merge_lora` makes a plain model again, and `save_adapter` writes the adapter in PEFT's
format.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from nextword.common.fs import atomic_write, to_json
from nextword.model.config import ConfigError
from nextword.model.gpt import GPT
from nextword.model.hf import HF_PREFIXES, hf_name_map

# The linear layers of a block, by the last part of their names. Only SwiGLU has a gate.
TARGET_MODULES = ("query", "key", "value", "output", "up", "gate", "down")


@dataclass(frozen=True)
class LoraConfig:
    """The shape of an adapter.

    Attributes:
        rank: r, the rank of the matrices.
        alpha: α; their product is scaled by α / r.
        target_modules: The layers that get an adapter, of `TARGET_MODULES`.

    Raises:
        ConfigError: The rank is below 1, alpha is not above 0, or a target is unknown.
    """

    rank: int = 8
    alpha: float = 16
    target_modules: tuple[str, ...] = TARGET_MODULES

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ConfigError(f"the LoRA rank must be an integer of at least 1, not {self.rank!r}")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"the LoRA alpha must be above 0, not {self.alpha}")
        unknown = [name for name in self.target_modules if name not in TARGET_MODULES]
        if unknown or not self.target_modules:
            names = ", ".join(unknown) or "none"
            raise ConfigError(f"the LoRA target modules must be among {', '.join(TARGET_MODULES)}, not {names}")


# ---------------------------------------------------------------- layers


class LoraLinear(nn.Linear):
    """h = W x + b + (α/r) B A x, with W and b frozen. Hu et al. 2021, section 4.1, equation 3.

    A [r, in] is initialized like a linear layer (He et al. 2015, with a = √5, as in the paper's code) and B [out, r] with
    zeros, so that a new adapter has no effect. B A is never formed.

    Args:
        linear: The layer to adapt; its weight and bias become this layer's own.
        config: Shape of the adapter.
        generator: Draws A, on the CPU, so that it is the same on every device.
    """

    def __init__(self, linear: nn.Linear, config: LoraConfig, generator: torch.Generator):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        lora_a = torch.empty(config.rank, linear.in_features)
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
        self.lora_a = nn.Parameter(lora_a.to(linear.weight))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, config.rank))
        self.scaling = config.alpha / config.rank
        self.enabled = True

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        output = super().forward(input)
        if not self.enabled:
            return output
        return output + F.linear(self.scaling * F.linear(input, self.lora_a), self.lora_b)

    def merged_weight(self) -> Tensor:
        """W + (α/r) B A, [out, in]."""
        return torch.addmm(self.weight, self.lora_b, self.lora_a, alpha=self.scaling)


class TrainableRowsEmbedding(nn.Module):
    """An embedding [V, D] of which only the last rows are trained: the special tokens that fine-tuning has added.

    Args:
        weight: The embedding matrix; its frozen copy is `base`, and its last rows [n, D] are `rows`.
        num_trainable_rows: n.
    """

    def __init__(self, weight: Tensor, num_trainable_rows: int):
        super().__init__()
        self.base = nn.Parameter(weight.detach(), requires_grad=False)
        self.rows = nn.Parameter(weight.detach()[-num_trainable_rows:].clone())
        self.enabled = True

    @property
    def weight(self) -> Tensor:
        """The embedding matrix with the trained rows, or the frozen one while the adapter is disabled."""
        return self.merged_weight() if self.enabled else self.base

    def merged_weight(self) -> Tensor:
        """The embedding matrix with the trained rows."""
        return torch.cat((self.base[: -len(self.rows)], self.rows))

    def forward(self, tokens: Tensor) -> Tensor:
        """The embeddings [B, T, D] of token ids [B, T]."""
        embeddings = F.embedding(tokens, self.base)  # [B, T, D]
        if not self.enabled:
            return embeddings
        # Looked up separately, so that the gradient does not have the size of the vocabulary.
        row = tokens - (len(self.base) - len(self.rows))
        return torch.where(row[..., None] >= 0, F.embedding(row.clamp(min=0), self.rows), embeddings)


# ---------------------------------------------------------------- adding, merging and disabling an adapter


def add_lora(model: GPT, config: LoraConfig, seed: int, num_trainable_rows: int = 0) -> GPT:
    """Freeze a model and add an adapter, in place.

    The adapter, a classification head and the last rows of the embeddings stay trainable. The same arguments give the same
    names in `state_dict`, so that a resumed run can load its state.

    Args:
        model: The model.
        config: Shape of the adapter.
        seed: Seed of the adapter's weights.
        num_trainable_rows: Trainable rows of the token embedding and of an untied head.

    Returns:
        The model.

    Raises:
        ConfigError: The model has none of the target modules, or already has an adapter.
        ValueError: `num_trainable_rows` exceeds the vocabulary.
    """
    if _adapter_modules(model):
        raise ConfigError("the model already has an adapter: merge it first (merge_lora)")
    if not 0 <= num_trainable_rows <= model.config.vocab_size:
        raise ValueError(f"{num_trainable_rows} trainable rows in a vocabulary of {model.config.vocab_size}")
    blocks = model.get_submodule("blocks")
    targets = [
        (name, module)
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in config.target_modules
    ]
    if not targets:
        raise ConfigError(f"the model has none of the layers {', '.join(config.target_modules)}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in targets:
        blocks.set_submodule(name, LoraLinear(linear, config, generator))
    if model.score is not None:
        model.score.requires_grad_(True)
    for name in ("token_embedding", "head"):
        matrix = getattr(model, name)
        if num_trainable_rows and matrix is not None:
            model.set_submodule(name, TrainableRowsEmbedding(matrix.weight, num_trainable_rows))
    return model


@torch.no_grad()
def merge_lora(model: GPT) -> GPT:
    """A plain model that is equal to a model with its adapter; each W becomes W + (α/r) B A. Hu et al. 2021, section 4.1.

    Args:
        model: A model with an adapter. It stays as it is.
    """
    weights = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear | TrainableRowsEmbedding):
            own = ("lora_a", "lora_b") if isinstance(module, LoraLinear) else ("base", "rows")
            for parameter in own:
                del weights[f"{name}.{parameter}"]
            weights[f"{name}.weight"] = module.merged_weight()
    merged = GPT.from_weights(model.config, {name: tensor.detach().clone() for name, tensor in weights.items()})
    return merged.train(model.training)


@contextmanager
def disable_adapter(model: GPT) -> Iterator[GPT]:
    """The model as it was before `add_lora`, within a context: the reference model of DPO.

    The classification head is not part of the adapter and stays as trained.
    """
    modules = _adapter_modules(model)
    was_enabled = [module.enabled for module in modules]
    try:
        for module in modules:
            module.enabled = False
        yield model
    finally:
        for module, enabled in zip(modules, was_enabled, strict=True):
            module.enabled = enabled


def _adapter_modules(model: GPT) -> list[LoraLinear | TrainableRowsEmbedding]:
    return [module for module in model.modules() if isinstance(module, LoraLinear | TrainableRowsEmbedding)]


# ---------------------------------------------------------------- PEFT's format


def save_adapter(model: GPT, config: LoraConfig, directory: Path, base_model_name: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, in float32.

    `peft.PeftModel.from_pretrained(model, directory)` opens it on the stock base model, after `resize_token_embeddings` if the
    vocabulary has grown; the values of the new rows come from the adapter.

    Args:
        model: A model with an adapter.
        config: Shape of the adapter.
        directory: An existing directory.
        base_model_name: Directory or name of the base model.

    Raises:
        ValueError: The model has no adapter.
    """
    modules = dict(model.named_modules())
    tensors: dict[str, Tensor] = {}
    layers_per_target: dict[str, int] = {}  # stock module → number of our adapted layers that it holds
    token_modules: dict[str, TrainableRowsEmbedding] = {}  # stock module → our embedding
    for hf_name, our_names in hf_name_map(model.config).items():
        path = hf_name.removesuffix("ᵀ").removesuffix(".weight")
        layers = [modules.get(name.removesuffix(".weight")) for name in our_names]
        lora_layers = [layer for layer in layers if isinstance(layer, LoraLinear)]
        if lora_layers:
            layers_per_target[".".join(path.split(".")[-2:])] = len(lora_layers)  # "attn.c_attn" in every block
            tensors[f"{path}.lora_A.weight"] = torch.cat([layer.lora_a for layer in lora_layers])
            tensors[f"{path}.lora_B.weight"] = torch.block_diag(*(_lora_b(layer) for layer in layers))
        elif isinstance(embedding := layers[0], TrainableRowsEmbedding):
            token_modules[path] = embedding
            tensors[f"{path}.token_adapter.trainable_tokens_delta"] = embedding.rows
    if not layers_per_target:
        raise ValueError("the model has no adapter to save (see add_lora)")
    if model.score is not None:
        tensors["score.weight"] = model.score.weight
    state_dict = {f"base_model.model.{name}": t.detach().float().cpu().contiguous() for name, t in tensors.items()}
    save_file(state_dict, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter_config = _peft_config(model, config, base_model_name, layers_per_target, token_modules)
    atomic_write(directory / "adapter_config.json", to_json(adapter_config))
    # safetensors writes files that only their owner can read.
    shutil.copymode(directory / "adapter_config.json", directory / "adapter_model.safetensors")


def _lora_b(layer: nn.Module | None) -> Tensor:
    """B [out, r] of one of the layers that a stock matrix holds, for a block-diagonal B; [out, 0] without an adapter."""
    assert isinstance(layer, nn.Linear)
    return layer.lora_b if isinstance(layer, LoraLinear) else layer.weight.new_zeros(layer.out_features, 0)


def _peft_config(
    model: GPT,
    config: LoraConfig,
    base_model_name: str,
    layers_per_target: dict[str, int],
    token_modules: dict[str, TrainableRowsEmbedding],
) -> dict[str, Any]:
    """The content of adapter_config.json. A stock module of n layers has rank n·r and alpha n·α, which keeps the scale."""
    merged = {target: n for target, n in layers_per_target.items() if n > 1}
    token_indices = {
        path.removeprefix(HF_PREFIXES[model.config.family]): list(range(len(e.base) - len(e.rows), len(e.base)))
        for path, e in token_modules.items()
    }
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if model.score is not None else "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(layers_per_target),
        "rank_pattern": {target: n * config.rank for target, n in merged.items()},
        "alpha_pattern": {target: n * config.alpha for target, n in merged.items()},
        "fan_in_fan_out": model.config.family in ("gpt1", "gpt2"),
        "modules_to_save": ["score"] if model.score is not None else None,
        "trainable_token_indices": token_indices or None,
    }
