"""Low-rank adaptation (Hu et al. 2021): a frozen model is trained through a pair of low-rank matrices beside its own.

`add_lora` adds an adapter to a model, `merge_lora` makes a plain model again, and `save_adapter` writes the adapter in PEFT's
format.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from nextword.common.fs import atomic_write, to_json
from nextword.model.gpt import GPT, named_modules
from nextword.model.hf import LAYOUTS, hf_name_map
from nextword.model.hf_config import is_gpt


@dataclass(frozen=True)
class LoraConfig:
    """The shape of an adapter.

    Attributes:
        rank: r, the rank of the matrices.
        alpha: α; their product is scaled by α / r.
    """

    rank: int = 8
    alpha: float = 16


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
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
        self.weight, self.bias = linear.weight, linear.bias
        lora_a = torch.empty(config.rank, linear.in_features)
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
        self.lora_a = nn.Parameter(lora_a.to(linear.weight))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, config.rank))
        self.scaling = config.alpha / config.rank

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return super().forward(input) + F.linear(self.scaling * F.linear(input, self.lora_a), self.lora_b)

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

    @property
    def weight(self) -> Tensor:
        """The embedding matrix with the trained rows."""
        return torch.cat((self.base[: -len(self.rows)], self.rows))

    def forward(self, tokens: Tensor) -> Tensor:
        """The embeddings [B, T, D] of token ids [B, T]."""
        embeddings = F.embedding(tokens, self.base)  # [B, T, D]
        # Looked up separately, so that the gradient does not have the size of the vocabulary.
        row = tokens - (len(self.base) - len(self.rows))
        return torch.where(row[..., None] >= 0, F.embedding(row.clamp(min=0), self.rows), embeddings)


# ---------------------------------------------------------------- adding and merging an adapter


def add_lora(model: GPT, config: LoraConfig, seed: int, num_trainable_rows: int = 0) -> GPT:
    """Freeze a model and add an adapter, in place.

    The adapter, a classification head and the last rows of the embeddings stay trainable. The same arguments give the same
    names in `state_dict`, so that a resumed run can load its state.

    Args:
        model: The model, without an adapter.
        config: Shape of the adapter.
        seed: Seed of the adapter's weights.
        num_trainable_rows: Trainable rows of the token embedding and of an untied head.

    Returns:
        The model.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, module in named_modules(model).items():
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            model.set_submodule(name, LoraLinear(module, config, generator))
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
    own = (".lora_a", ".lora_b", ".base", ".rows")
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(own)}
    for name, module in named_modules(model).items():
        if isinstance(module, LoraLinear):
            weights[f"{name}.weight"] = module.merged_weight()
        elif isinstance(module, TrainableRowsEmbedding):
            weights[f"{name}.weight"] = module.weight
    merged = GPT.from_weights(model.config, {name: tensor.detach().clone() for name, tensor in weights.items()})
    return merged.train(model.training)


# ---------------------------------------------------------------- PEFT's format


def save_adapter(model: GPT, config: LoraConfig, directory: Path, base_model_name: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, in float32.

    `peft.PeftModel.from_pretrained(model, directory)` opens it on the base model in transformers, after
    `resize_token_embeddings` if the vocabulary has grown; the values of the new rows come from the adapter.

    Args:
        model: A model with an adapter.
        config: Shape of the adapter.
        directory: An existing directory.
        base_model_name: Directory or name of the base model.
    """
    modules, prefix = named_modules(model), LAYOUTS[model.config.family].prefix
    tensors: dict[str, Tensor] = {}
    layers_per_target: dict[str, int] = {}  # transformers module → number of our layers that it holds
    token_indices: dict[str, list[int]] = {}  # transformers module → its trained rows
    for hf_name, our_names in hf_name_map(model.config).items():
        path = hf_name.removesuffix(".weight")
        layers = [modules.get(name.removesuffix(".weight")) for name in our_names]
        if lora_layers := [layer for layer in layers if isinstance(layer, LoraLinear)]:
            layers_per_target[".".join(path.split(".")[-2:])] = len(lora_layers)  # "attn.c_attn" in every block
            tensors[f"{path}.lora_A.weight"] = torch.cat([layer.lora_a for layer in lora_layers])
            tensors[f"{path}.lora_B.weight"] = torch.block_diag(*(layer.lora_b for layer in lora_layers))  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
        elif isinstance(embedding := layers[0], TrainableRowsEmbedding):
            tensors[f"{path}.token_adapter.trainable_tokens_delta"] = embedding.rows
            vocab_size = len(embedding.base)
            token_indices[path.removeprefix(prefix)] = list(range(vocab_size - len(embedding.rows), vocab_size))
    if model.score is not None:
        tensors["score.weight"] = model.score.weight
    state_dict = {f"base_model.model.{name}": t.detach().float().cpu().contiguous() for name, t in tensors.items()}
    save_file(state_dict, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    # Those of several layers have rank n·r and alpha n·α: the same scale.
    merged = {target: n for target, n in layers_per_target.items() if n > 1}
    adapter_config: dict[str, Any] = {
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
        "fan_in_fan_out": is_gpt(model.config.family),
        "modules_to_save": ["score"] if model.score is not None else None,
        "trainable_token_indices": token_indices or None,
    }
    atomic_write(directory / "adapter_config.json", to_json(adapter_config))
    # safetensors writes files that only their owner can read.
    shutil.copymode(directory / "adapter_config.json", directory / "adapter_model.safetensors")
