"""Hugging Face model directories: `GPT` to the stock classes of `transformers`, and back.

`save_model` writes what `transformers.AutoModelForCausalLM` opens (`AutoModelForSequenceClassification` for a model with a
classification head). `load_model` opens that, and directories of the four supported families from anyone. It reads only
safetensors and JSON and runs no code from a directory. config.json is handled in hf_config.py.
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nextword.common.errors import CorruptFileError, NextwordError
from nextword.common.fs import MANIFEST, atomic_write, read_manifest, to_json, verify_manifest
from nextword.model import hf_config
from nextword.model.config import Family, ModelConfig
from nextword.model.gpt import GPT, sinusoidal_table
from nextword.model.hf_config import read_labels as read_labels

# ---------------------------------------------------------------- names
# Stock tensor → the tensors of `GPT` that it holds, concatenated by rows. "{i}" is the layer, "{p}" weight and bias. A stock
# name ending in "ᵀ" is stored as [in, out] (the `Conv1D` of GPT-1 and GPT-2), the transpose of ours.

CONV1D_BLOCK = {
    "h.{i}.ln_1.{p}": ["blocks.{i}.attention_norm.{p}"],
    "h.{i}.attn.c_attn.weightᵀ": [f"blocks.{{i}}.attention.{n}.weight" for n in ("query", "key", "value")],
    "h.{i}.attn.c_attn.bias": [f"blocks.{{i}}.attention.{n}.bias" for n in ("query", "key", "value")],
    "h.{i}.attn.c_proj.weightᵀ": ["blocks.{i}.attention.output.weight"],
    "h.{i}.attn.c_proj.bias": ["blocks.{i}.attention.output.bias"],
    "h.{i}.ln_2.{p}": ["blocks.{i}.feed_forward_norm.{p}"],
    "h.{i}.mlp.c_fc.weightᵀ": ["blocks.{i}.feed_forward.up.weight"],
    "h.{i}.mlp.c_fc.bias": ["blocks.{i}.feed_forward.up.bias"],
    "h.{i}.mlp.c_proj.weightᵀ": ["blocks.{i}.feed_forward.down.weight"],
    "h.{i}.mlp.c_proj.bias": ["blocks.{i}.feed_forward.down.bias"],
}
LLAMA_BLOCK = {
    "layers.{i}.input_layernorm.weight": ["blocks.{i}.attention_norm.weight"],
    "layers.{i}.self_attn.q_proj.weight": ["blocks.{i}.attention.query.weight"],
    "layers.{i}.self_attn.k_proj.weight": ["blocks.{i}.attention.key.weight"],
    "layers.{i}.self_attn.v_proj.weight": ["blocks.{i}.attention.value.weight"],
    "layers.{i}.self_attn.o_proj.weight": ["blocks.{i}.attention.output.weight"],
    "layers.{i}.self_attn.q_norm.weight": ["blocks.{i}.attention.query_norm.weight"],
    "layers.{i}.self_attn.k_norm.weight": ["blocks.{i}.attention.key_norm.weight"],
    "layers.{i}.post_attention_layernorm.weight": ["blocks.{i}.feed_forward_norm.weight"],
    "layers.{i}.mlp.gate_proj.weight": ["blocks.{i}.feed_forward.gate.weight"],
    "layers.{i}.mlp.up_proj.weight": ["blocks.{i}.feed_forward.up.weight"],
    "layers.{i}.mlp.down_proj.weight": ["blocks.{i}.feed_forward.down.weight"],
}
LLAMA_NON_BLOCK = {"embed_tokens.weight": ["token_embedding.weight"], "norm.weight": ["final_norm.weight"]}
HF_NAME_TEMPLATES: dict[Family, dict[str, list[str]]] = {
    "gpt1": {
        "tokens_embed.weight": ["token_embedding.weight"],
        "positions_embed.weight": ["position_embedding.weight"],
        **CONV1D_BLOCK,
    },
    "gpt2": {
        "wte.weight": ["token_embedding.weight"],
        "wpe.weight": ["position_embedding.weight"],
        **CONV1D_BLOCK,
        "ln_f.{p}": ["final_norm.{p}"],
    },
    "qwen3": {**LLAMA_NON_BLOCK, **LLAMA_BLOCK},
    "llama": {**LLAMA_NON_BLOCK, **{name: ours for name, ours in LLAMA_BLOCK.items() if "_norm.weight" not in name}},
}
HF_PREFIXES: dict[Family, str] = {"gpt1": "transformer.", "gpt2": "transformer.", "qwen3": "model.", "llama": "model."}
MAX_HEADER_BYTES = 2**22  # some thirty thousand tensors
MAX_SHARD_BYTES = 5 * 10**9  # of weights in one file
INDEX_FILENAME = "model.safetensors.index.json"
# Buffers in older files: causal masks and rotary frequencies.
IGNORED_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")


def hf_name_map(config: ModelConfig) -> dict[str, list[str]]:
    """The full name of every stock tensor of a model, and the names of our tensors in it, in order."""
    names: dict[str, list[str]] = {}
    for template, our_templates in HF_NAME_TEMPLATES[config.family].items():
        for i in range(config.n_layers) if "{i}" in template else [0]:
            for p in ("weight", "bias") if "{p}" in template else [""]:
                hf_name = HF_PREFIXES[config.family] + template.format(i=i, p=p)
                names[hf_name] = [name.format(i=i, p=p) for name in our_templates]
    if config.n_labels:  # classification classes have no language-model head
        names["score.weight"] = ["score.weight"]
    elif not config.tied:
        names["lm_head.weight"] = ["head.weight"]
    return names


def iter_hf_tensors(
    config: ModelConfig, weights: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Convert weights to the names and layouts of the stock class, one tensor after the other.

    Biases that the model does not have are zeros.

    Args:
        config: The model.
        weights: Its state dict; tensors may be sharded.
        gather: Returns a full tensor; called for each when its turn comes.
    """

    def full_tensor(name: str) -> Tensor:
        if name in weights:
            return gather(weights[name])
        if name == "position_embedding.weight" and config.positions == "sinusoidal":
            return sinusoidal_table(config.context_length, config.d_model)
        weight = weights[name.replace(".bias", ".weight")]
        return torch.zeros(weight.shape[0], dtype=weight.dtype)

    for hf_name, our_names in hf_name_map(config).items():
        tensors = [full_tensor(name) for name in our_names]
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        yield hf_name.removesuffix("ᵀ"), (tensor.T if hf_name.endswith("ᵀ") else tensor).contiguous()


def from_hf(hf_name: str, our_names: list[str], tensor: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Split one stock tensor into ours.

    Args:
        hf_name: Its key in `hf_name_map`.
        our_names: The value there.
        tensor: The stock tensor.
        shapes: The shapes of the model's tensors, see `weight_shapes`.

    Returns:
        Our tensors by name, without those the model does not have (zero biases, the sinusoidal position table).
    """
    tensor = tensor.T if hf_name.endswith("ᵀ") else tensor
    rows = [shapes[name][0] if name in shapes else 0 for name in our_names]
    if not any(rows):
        return {}
    parts = zip(our_names, tensor.split(rows), strict=True)
    return {name: part.contiguous() for name, part in parts if name in shapes}


# ---------------------------------------------------------------- writing


def save_model(
    model: GPT,
    directory: Path,
    *,
    end_of_text_id: int | None = None,
    pad_token_id: int | None = None,
    eos_token_ids: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
    problem_type: str | None = None,
    gather: Callable[[Tensor], Tensor] = Tensor.detach,
) -> None:
    """Write config.json, the weights in float32 and, for a language model, generation_config.json.

    The tokenizer and the manifest are written by the caller. A model with a classification head is saved without its
    language-model head, for which the stock class has no place.

    Args:
        model: The model.
        directory: An existing directory.
        end_of_text_id: The end-of-text token.
        pad_token_id: The pad token; a classification model needs one, to find the last token of a text.
        eos_token_ids: The tokens that end a generated text. Default: `end_of_text_id`.
        labels: The names of the classification head's outputs, in order.
        problem_type: See `hf_config.PROBLEM_TYPES`.
        gather: Returns the full tensor of a weight; called for one after the other.

    Raises:
        ValueError: The labels do not match the head, or a classification model has no pad token.
    """
    config = model.config
    if config.n_labels and pad_token_id is None:
        raise ValueError("a model with a classification head needs pad_token_id")
    content = hf_config.to_hf_config(config, end_of_text_id, pad_token_id)
    content |= hf_config.to_hf_label_config(config, labels, problem_type)
    atomic_write(directory / "config.json", to_json(content))
    for path in write_weights(directory, config, model.state_dict(), lambda tensor: gather(tensor).float().cpu()):
        shutil.copymode(directory / "config.json", path)  # safetensors writes files that only their owner can read
    if config.n_labels:
        return
    stop_ids = [end_of_text_id] if eos_token_ids is None else list(eos_token_ids)
    eos = stop_ids if len(stop_ids) > 1 else next(iter(stop_ids), None)
    generation = {"bos_token_id": end_of_text_id, "eos_token_id": eos, "pad_token_id": pad_token_id, "do_sample": True}
    atomic_write(directory / "generation_config.json", to_json(generation))


def write_weights(
    directory: Path, config: ModelConfig, weights: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor]
) -> list[Path]:
    """Write model.safetensors, or shards of at most `MAX_SHARD_BYTES` with an index. One shard is in memory at a time.

    Arguments as in `iter_hf_tensors`.

    Returns:
        The files of weights.
    """
    files: list[Path] = []
    shard: dict[str, Tensor] = {}
    file_indices: dict[str, int] = {}  # tensor → its file
    shard_bytes = total_bytes = 0

    def flush_shard() -> None:
        files.append(directory / f".{len(files)}.safetensors")
        save_file(shard, files[-1], metadata={"format": "pt"})
        shard.clear()

    for name, tensor in iter_hf_tensors(config, weights, gather):
        if shard and shard_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            flush_shard()
            shard_bytes = 0
        shard[name], file_indices[name] = tensor, len(files)
        shard_bytes, total_bytes = shard_bytes + tensor.nbytes, total_bytes + tensor.nbytes
    flush_shard()
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        weight_map = {name: names[index] for name, index in file_indices.items()}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        atomic_write(directory / INDEX_FILENAME, to_json(index))
    return [path.rename(directory / name) for path, name in zip(files, names, strict=True)]


# ---------------------------------------------------------------- reading


def load_model(directory: Path, device: torch.device | str = "cpu") -> GPT:
    """Open a model directory in float32. One that nextword wrote is checked against its manifest.

    Args:
        directory: The directory.
        device: Device of the model.

    Raises:
        CorruptFileError: A hash, a shape or a file is not as it should be.
        NextwordError: There is no model, or it has a feature that nextword does not support.
    """
    config = load_config(directory, verify_manifest)
    return GPT.from_weights(config, dict(iter_weights(directory, config))).to(device)


def load_config(directory: Path, load_manifest: Callable[[Path], dict[str, Any]] = read_manifest) -> ModelConfig:
    """The configuration of the model in a directory. Raises as `load_model`.

    Args:
        directory: The directory.
        load_manifest: Reads the manifest, and may verify it.
    """
    if not (directory / "config.json").is_file():
        raise NextwordError(f"{directory}: no config.json, so this is not a model directory")
    config = hf_config.read_hf_config(directory / "config.json")
    if not (directory / MANIFEST).is_file():
        return config
    # The manifest has what the stock format cannot express: sinusoidal positions, and biases that do not exist.
    manifest = load_manifest(directory)
    if "model" not in manifest:
        return config
    try:
        config = hf_config.parse_model_config(manifest["model"])
    except (ValueError, TypeError, OverflowError) as error:
        raise CorruptFileError(f"{directory / MANIFEST}: {error}") from error
    return replace(config, tied=config.tied or config.n_labels > 0)  # as in `read_hf_config`


def iter_weights(directory: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Our tensors from the files of a model directory, in float32, one after the other. Raises as `load_model`.

    Every shape is checked in the header of its file before the tensor is read.
    """
    files = find_weight_files(directory)
    shapes = weight_shapes(directory, config, len(files))
    names, prefix = hf_name_map(config), HF_PREFIXES[config.family]
    known = {name.removesuffix("ᵀ") for name in names} | {"lm_head.weight"}  # a tied head may be stored, too
    known |= {name.removeprefix(prefix) for name in known}  # a base model is saved without the prefix
    unexpected = sorted(name for name in files if name not in known and not name.endswith(IGNORED_BUFFERS))
    if unexpected:
        raise NextwordError(f"{directory}: unexpected tensors for this model_type: {', '.join(unexpected[:5])}")
    for hf_name, our_names in names.items():
        key = hf_name.removesuffix("ᵀ")
        key = key if key in files else key.removeprefix(prefix)
        if key not in files:
            if any(name in shapes for name in our_names) or "position_embedding.weight" in our_names:
                raise CorruptFileError(f"{directory}: the tensor {hf_name.removesuffix('ᵀ')} is missing")
            continue
        path, expected = files[key], expected_shape(config, hf_name, our_names, shapes)
        with safe_open(path, framework="pt") as file:
            tensor_slice = file.get_slice(key)
            if list(tensor_slice.get_shape()) != expected:
                shape = tensor_slice.get_shape()
                raise CorruptFileError(f"{path}: {key} has the shape {shape}; config.json says {expected}")
            if tensor_slice.get_dtype() not in FLOAT_DTYPES:
                raise NextwordError(
                    f"{path}: {key} has the data type {tensor_slice.get_dtype()}, which is not supported"
                )
            yield from from_hf(hf_name, our_names, tensor_slice[:].float(), shapes).items()


def find_weight_files(directory: Path) -> dict[str, Path]:
    """The safetensors file of each tensor: model.safetensors, or the shards of an index. Raises as `load_model`."""
    index = directory / INDEX_FILENAME
    if index.is_file():
        weight_map = hf_config.read_json_object(index).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CorruptFileError(f"{index}: weight_map does not give a file name for each tensor")
        names = sorted(set(weight_map.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise CorruptFileError(f"{index}: {outside[0]!r} is outside the directory")
    elif (directory / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        pickles = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt*"))
        hint = f"; {pickles[0]} is a pickle, which nextword does not open: convert it to safetensors" if pickles else ""
        raise NextwordError(f"{directory}: no model.safetensors{hint}")
    files: dict[str, Path] = {}
    for path in (directory / name for name in names):
        check_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        except (SafetensorError, OSError, struct.error, json.JSONDecodeError) as error:
            raise CorruptFileError(f"{path}: not a safetensors file ({error})") from error
    return files


def check_header(path: Path) -> None:
    """Check the length of a safetensors header before it is read.

    Raises:
        CorruptFileError: The file is missing, or the length cannot be right.
    """
    if not path.is_file():
        raise CorruptFileError(f"{path}: missing, or not a file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    size = path.stat().st_size
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise CorruptFileError(f"{path}: not a safetensors file (a header of {length:,} bytes in a file of {size:,})")


def weight_shapes(directory: Path, config: ModelConfig, num_tensors: int) -> dict[str, torch.Size]:
    """The shape of each of our tensors, from a model of one layer on the meta device.

    A hostile config.json may claim any number of layers, and each takes time even on the meta device. The number of tensors in
    the files is therefore checked first.

    Raises:
        CorruptFileError: The files have too few tensors, or sizes are too large for a tensor.
    """
    try:
        weights = GPT.on_meta(replace(config, n_layers=1)).state_dict()
    except RuntimeError as error:  # PyTorch: the number of bytes overflows
        raise CorruptFileError(f"{directory}: config.json has sizes that are too large for any model") from error
    per_layer = sum(
        "{i}" in template and our_names[0].format(i=0, p="weight") in weights
        for template, our_names in HF_NAME_TEMPLATES[config.family].items()
    )
    if config.n_layers * per_layer > num_tensors:
        raise CorruptFileError(
            f"{directory}: a tensor is missing: config.json says {config.n_layers:,} layers, "
            f"and the files have {num_tensors:,} tensors"
        )
    shapes: dict[str, torch.Size] = {}
    for name, tensor in weights.items():
        for i in range(config.n_layers) if name.startswith("blocks.0.") else [0]:
            shapes[name.replace("blocks.0.", f"blocks.{i}.", 1)] = tensor.shape
    return shapes


def expected_shape(
    config: ModelConfig, hf_name: str, our_names: list[str], shapes: Mapping[str, torch.Size]
) -> list[int]:
    """The shape of a stock tensor; arguments as in `from_hf`."""
    if not any(name in shapes for name in our_names):  # a tensor that the model does not have
        if "position_embedding.weight" in our_names:
            return [config.context_length, config.d_model]
        return [sum(shapes[name.replace(".bias", ".weight")][0] for name in our_names)]
    shape = [sum(shapes[name][0] for name in our_names), *shapes[our_names[0]][1:]]
    return shape[::-1] if hf_name.endswith("ᵀ") else shape


# ---------------------------------------------------------------- checkpoints


def load_shards(directory: Path, kind: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The full tensors of a checkpoint, assembled from the files of one or several processes.

    Args:
        directory: The checkpoint.
        kind: "weights" or "optimizer".
        device: Device of the tensors.
    """
    shards: dict[str, list[tuple[list[int], Tensor]]] = {}
    for path in sorted(directory.glob(f"{kind}*.safetensors")):
        with safe_open(path, framework="pt", device=str(device)) as file:
            sharding_info = json.loads((file.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                tensor = file.get_tensor(name)
                offsets = sharding_info[name]["saved_offsets"] if name in sharding_info else [0] * tensor.ndim
                shards.setdefault(name, []).append((offsets, tensor))
    return {name: assemble_shards(parts) for name, parts in shards.items()}


def assemble_shards(shards: list[tuple[list[int], Tensor]]) -> Tensor:
    """One tensor from shards, each with its offset in every dimension."""
    if len(shards) == 1:
        return shards[0][1]
    slices = [
        tuple(slice(offset, offset + length) for offset, length in zip(offsets, shard.shape, strict=True))
        for offsets, shard in shards
    ]
    tensor = shards[0][1].new_empty([max(part.stop for part in parts) for parts in zip(*slices, strict=True)])
    for region, (_, shard) in zip(slices, shards, strict=True):
        tensor[region] = shard
    return tensor
