"""Low-rank adaptation (Hu et al. 2021): a frozen model learns through a thin pair of matrices beside each of its own.

`add_lora` turns a model into one that trains its adapter alone, `merge_lora` turns it back into a plain one, and
`save_adapter` writes the adapter as PEFT reads it.
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

# Every linear layer of a block, by the last part of its name. A model without the gate of SwiGLU has one less.
TARGET_MODULES = ("query", "key", "value", "output", "up", "gate", "down")


@dataclass(frozen=True)
class LoraConfig:
    """An adapter's shape: `rank` r, `alpha` α (the product counts α/r times), and which layers get one.

    Raises:
        ConfigError: a rank below 1, an alpha that is not above 0, no targets or an unknown one.
    """

    rank: int = 8
    alpha: float = 16
    target_modules: tuple[str, ...] = TARGET_MODULES

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ConfigError(f"the rank of an adapter must be a whole number of at least 1, not {self.rank!r}")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"the alpha of an adapter must be above 0, not {self.alpha}")
        unknown = [name for name in self.target_modules if name not in TARGET_MODULES]
        if unknown or not self.target_modules:
            raise ConfigError(
                f"an adapter's targets are among {', '.join(TARGET_MODULES)}, not {', '.join(unknown) or 'none'}"
            )


# ---------------------------------------------------------------- the parts


class LoraLinear(nn.Linear):
    """h = W x + b + (α/r) B A x, with W and b frozen. Hu et al. 2021, section 4.1, equation 3.

    A [r, in] is drawn like a linear layer's weight (He et al. 2015, with a = √5, as in the paper's code), B [out, r] is zero,
    so that a fresh adapter changes nothing. B A is never formed: x goes through r numbers.
    """

    def __init__(self, linear: nn.Linear, config: LoraConfig, generator: torch.Generator):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        lora_a = torch.empty(config.rank, linear.in_features)  # on the CPU, so that every device gets the same numbers
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
        self.lora_a = nn.Parameter(lora_a.to(linear.weight))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, config.rank))
        self.scaling = config.alpha / config.rank
        self.enabled = True

    def forward(self, input: Tensor) -> Tensor:
        plain = super().forward(input)
        if not self.enabled:
            return plain
        return plain + F.linear(self.scaling * F.linear(input, self.lora_a), self.lora_b)

    def merged_weight(self) -> Tensor:
        """W + (α/r) B A, [out, in]."""
        return torch.addmm(self.weight, self.lora_b, self.lora_a, alpha=self.scaling)


class TrainableRowsEmbedding(nn.Module):
    """An embedding [V, D] whose last rows alone are trained: the markers that a task has added to the vocabulary.

    `weight` is the whole matrix as it now is; `base` is the frozen one with its rows as they were, `rows` [n, D] the trained.
    """

    def __init__(self, weight: Tensor, num_trainable_rows: int):
        super().__init__()
        self.base = nn.Parameter(weight.detach(), requires_grad=False)
        self.rows = nn.Parameter(weight.detach()[-num_trainable_rows:].clone())
        self.enabled = True

    @property
    def weight(self) -> Tensor:
        return self.merged_weight() if self.enabled else self.base

    def merged_weight(self) -> Tensor:
        return torch.cat((self.base[: -len(self.rows)], self.rows))

    def forward(self, tokens: Tensor) -> Tensor:
        frozen = F.embedding(tokens, self.base)  # [B, T, D]
        if not self.enabled:
            return frozen
        # A token's own row, looked up without a gradient as large as the vocabulary.
        row = tokens - (len(self.base) - len(self.rows))
        return torch.where(row[..., None] >= 0, F.embedding(row.clamp(min=0), self.rows), frozen)


# ---------------------------------------------------------------- a model with an adapter, and without it again


def add_lora(model: GPT, config: LoraConfig, seed: int, num_trainable_rows: int = 0) -> GPT:
    """Freeze the model and put an adapter beside each targeted layer, drawn under `seed`; changes the model and returns it.

    What stays trainable: the adapter, a classification head, and the last `trained_rows` rows of the token embedding and
    of an untied head. The names of `state_dict` follow from the arguments alone: a resume adds the same adapter to the
    same model and loads the state.

    Raises:
        ConfigError: the model has none of the targets, or has an adapter already.
        ValueError: more trained rows than tokens.
    """
    if any(isinstance(module, LoraLinear | TrainableRowsEmbedding) for module in model.modules()):
        raise ConfigError("this model has an adapter already; merge_lora makes it part of the model")
    if not 0 <= num_trainable_rows <= model.config.vocab_size:
        raise ValueError(f"{num_trainable_rows} trained rows in a vocabulary of {model.config.vocab_size}")
    targets = [
        (name, module)
        for name, module in model.get_submodule("blocks").named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in config.target_modules
    ]
    if not targets:
        raise ConfigError(f"this model has none of the layers {', '.join(config.target_modules)}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in targets:
        model.get_submodule("blocks").set_submodule(name, LoraLinear(linear, config, generator))
    if model.score is not None:
        model.score.requires_grad_(True)
    if num_trainable_rows:
        for name in ("token_embedding", "head"):
            matrix = getattr(model, name)
            if matrix is not None:
                model.set_submodule(name, TrainableRowsEmbedding(matrix.weight, num_trainable_rows))
    return model


@torch.no_grad()
def merge_lora(model: GPT) -> GPT:
    """A plain model, equal to this one with its adapter: each W becomes W + (α/r) B A. The model itself stays as it is.

    Hu et al. 2021, section 4.1, "No additional inference latency".
    """
    weights = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            del weights[f"{name}.lora_a"], weights[f"{name}.lora_b"]
            weights[f"{name}.weight"] = module.merged_weight()
        elif isinstance(module, TrainableRowsEmbedding):
            del weights[f"{name}.base"], weights[f"{name}.rows"]
            weights[f"{name}.weight"] = module.merged_weight()
    plain = GPT.from_weights(model.config, {name: tensor.detach().clone() for name, tensor in weights.items()})
    return plain.train(model.training)


@contextmanager
def disable_adapter(model: GPT) -> Iterator[GPT]:
    """The model as it was before `add_lora`, while the context lasts: the frozen reference of a preference objective.

    A classification head is not part of the adapter and stays as trained.
    """
    adapter_modules = [module for module in model.modules() if isinstance(module, LoraLinear | TrainableRowsEmbedding)]
    was_enabled = [part.enabled for part in adapter_modules]
    try:
        for part in adapter_modules:
            part.enabled = False
        yield model
    finally:
        for part, enabled in zip(adapter_modules, was_enabled, strict=True):
            part.enabled = enabled


# ---------------------------------------------------------------- PEFT's format


def save_adapter(model: GPT, config: LoraConfig, directory: Path, base_model_name: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, in float32, into an existing directory.

    `peft.PeftModel.from_pretrained(model, directory)` opens it over the stock base model, whose embeddings were first
    resized to this model's vocabulary where it has grown (`resize_token_embeddings`; the new rows' values come from here).

    Args:
        model: one that `add_lora` has given an adapter of `config`.
        base: the directory or the name of the model that the adapter belongs to.

    Raises:
        ValueError: the model has no adapter.
    """
    modules = dict(model.named_modules())
    tensors: dict[str, Tensor] = {}
    layers_per_target: dict[str, int] = {}  # target → how many of our layers it holds
    for stock, ours in hf_name_map(model.config).items():
        layers = [modules.get(our.removesuffix(".weight")) for our in ours]
        lora_layers = [layer for layer in layers if isinstance(layer, LoraLinear)]
        if lora_layers:
            path = stock.removesuffix("ᵀ").removesuffix(".weight")
            target = ".".join(path.split(".")[-2:])  # "attn.c_attn": the same in every block
            layers_per_target[target] = len(lora_layers)
            tensors[f"{path}.lora_A.weight"] = torch.cat([pair.lora_a for pair in lora_layers])
            tensors[f"{path}.lora_B.weight"] = torch.block_diag(*(stacked_lora_b(layer) for layer in layers))
    if not tensors:
        raise ValueError("this model has no adapter to save; add_lora gives it one")
    trainable_tokens = trainable_token_modules(model)
    tensors |= {f"{path}.token_adapter.trainable_tokens_delta": part.rows for path, part in trainable_tokens.items()}
    if model.score is not None:
        tensors["score.weight"] = model.score.weight
    state_dict = {f"base_model.model.{name}": t.detach().float().cpu().contiguous() for name, t in tensors.items()}
    save_file(state_dict, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter_config = peft_config(model, config, base_model_name, layers_per_target, trainable_tokens)
    atomic_write(directory / "adapter_config.json", to_json(adapter_config))
    # safetensors makes its file for its owner alone.
    shutil.copymode(directory / "adapter_config.json", directory / "adapter_model.safetensors")


def stacked_lora_b(layer: nn.Module | None) -> Tensor:
    """B [out, r] of a layer; [out, 0] of one without an adapter, which shares a stock matrix with layers that have one.

    Where a stock layer holds query, key and value, its A is theirs, one below the other, and its B is block-diagonal.
    """
    assert isinstance(layer, nn.Linear)
    return layer.lora_b if isinstance(layer, LoraLinear) else layer.weight.new_zeros(layer.out_features, 0)


def trainable_token_modules(model: GPT) -> dict[str, TrainableRowsEmbedding]:
    """The stock module that has trained rows → those rows. A classifier's stock class has no language-model head."""
    modules = dict(model.named_modules())
    parts = {
        stock.removesuffix(".weight"): modules.get(ours[0].removesuffix(".weight"))
        for stock, ours in hf_name_map(model.config).items()
    }
    return {path: part for path, part in parts.items() if isinstance(part, TrainableRowsEmbedding)}


def peft_config(
    model: GPT,
    config: LoraConfig,
    base_model_name: str,
    layers_per_target: dict[str, int],
    trainable_tokens: dict[str, TrainableRowsEmbedding],
) -> dict[str, Any]:
    """What adapter_config.json says. A target of n parts has the rank n·r, and n·α keeps its scale at α/r."""
    first_trainable_row = {path: len(part.base) - len(part.rows) for path, part in trainable_tokens.items()}
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
        "rank_pattern": {target: n * config.rank for target, n in layers_per_target.items() if n > 1},
        "alpha_pattern": {target: n * config.alpha for target, n in layers_per_target.items() if n > 1},
        "fan_in_fan_out": model.config.family in ("gpt1", "gpt2"),
        "modules_to_save": ["score"] if model.score is not None else None,
        "trainable_token_indices": {
            path.removeprefix(HF_PREFIXES[model.config.family]): list(range(first_trainable_row[path], len(part.base)))
            for path, part in trainable_tokens.items()
        }
        or None,
    }
