"""Hugging Face model directories: `GPT` to the classes of `transformers`, and back.

`save_model` writes what `transformers.AutoModelForCausalLM` opens (`AutoModelForSequenceClassification` for a model with a
classification head). `load_model` opens that, and directories of the four supported families from anyone. It reads only
safetensors and JSON and runs no code from a directory. config.json is handled in hf_config.py.
"""

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nextword.common.errors import CorruptFileError, NextwordError
from nextword.common.fs import MANIFEST, atomic_write, is_json_object, read_json_object, to_json, verify_manifest
from nextword.model import hf_config
from nextword.model.config import Family, ModelConfig
from nextword.model.gpt import GPT, sinusoidal_table

# ---------------------------------------------------------------- names
# Stock modules and the modules of `GPT` that they hold, concatenated by rows. In the blocks of GPT-1 and GPT-2, the linear
# layers "c_…" are stored as [in, out] (`Conv1D`), the transpose of ours.

GPT_BLOCK = {
    "ln_1": ["attention_norm"],
    "attn.c_attn": ["attention.query", "attention.key", "attention.value"],
    "attn.c_proj": ["attention.output"],
    "ln_2": ["feed_forward_norm"],
    "mlp.c_fc": ["feed_forward.up"],
    "mlp.c_proj": ["feed_forward.down"],
}
LLAMA_BLOCK = {
    "input_layernorm": ["attention_norm"],
    "self_attn.q_proj": ["attention.query"],
    "self_attn.k_proj": ["attention.key"],
    "self_attn.v_proj": ["attention.value"],
    "self_attn.o_proj": ["attention.output"],
    "post_attention_layernorm": ["feed_forward_norm"],
    "mlp.gate_proj": ["feed_forward.gate"],
    "mlp.up_proj": ["feed_forward.up"],
    "mlp.down_proj": ["feed_forward.down"],
}
QK_NORM = {"self_attn.q_norm": ["attention.query_norm"], "self_attn.k_norm": ["attention.key_norm"]}
LLAMA_OUTER = {"embed_tokens": ["token_embedding"], "norm": ["final_norm"]}


class StockLayout(NamedTuple):
    """The names of a transformers class: their prefix, the list of blocks, a block's modules, and those outside the blocks."""

    prefix: str
    blocks: str
    block: dict[str, list[str]]
    outer: dict[str, list[str]]


LAYOUTS: dict[Family, StockLayout] = {
    "gpt1": StockLayout(
        *("transformer.", "h", GPT_BLOCK),
        {"tokens_embed": ["token_embedding"], "positions_embed": ["position_embedding"]},
    ),
    "gpt2": StockLayout(
        *("transformer.", "h", GPT_BLOCK),
        {"wte": ["token_embedding"], "wpe": ["position_embedding"], "ln_f": ["final_norm"]},
    ),
    "qwen3": StockLayout("model.", "layers", LLAMA_BLOCK | QK_NORM, LLAMA_OUTER),
    "llama": StockLayout("model.", "layers", LLAMA_BLOCK, LLAMA_OUTER),
}
MAX_HEADER_BYTES = 2**22  # some thirty thousand tensors
MAX_SHARD_BYTES = 5 * 10**9  # of weights in one file
MAX_OTHER_BYTES = 2**28  # of a model directory, beside its weights
INDEX_FILENAME = "model.safetensors.index.json"
# Buffers in older files: causal masks, rotary frequencies, and GPT-1's positions 0, 1, 2 …
IGNORED_BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq", "position_ids")
FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")


def hf_name_map(config: ModelConfig) -> dict[str, list[str]]:
    """The full name of every Hugging Face tensor of a model, and the names of our tensors in it, in order."""
    layout = LAYOUTS[config.family]
    modules = dict(layout.outer)
    for i in range(config.n_layers):
        for hf_module, ours in layout.block.items():
            modules[f"{layout.blocks}.{i}.{hf_module}"] = [f"blocks.{i}.{module}" for module in ours]
    names: dict[str, list[str]] = {}
    for hf_module, ours in modules.items():
        has_bias = hf_config.is_gpt(config.family) and not ours[0].endswith("_embedding")
        for parameter in ("weight", "bias") if has_bias else ("weight",):
            names[f"{layout.prefix}{hf_module}.{parameter}"] = [f"{module}.{parameter}" for module in ours]
    if config.n_labels:  # classification classes have no language-model head
        names["score.weight"] = ["score.weight"]
    elif not config.tied:
        names["lm_head.weight"] = ["head.weight"]
    return names


def is_transposed(hf_name: str) -> bool:
    """Whether a Hugging Face tensor is stored as [in, out]."""
    return ".c_" in hf_name and hf_name.endswith(".weight")


def iter_hf_tensors(
    config: ModelConfig, weights: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Convert weights to the names and layouts of the transformers class, one tensor after the other.

    Biases that the model does not have are zeros.

    Args:
        config: The model.
        weights: Its state dict; tensors may be sharded.
        gather: Returns a full tensor; called for each when its turn comes.
    """

    def full_tensor(name: str) -> Tensor:
        if name in weights:
            return gather(weights[name])
        if name == "position_embedding.weight":
            return sinusoidal_table(config.context_length, config.d_model)
        weight = weights[name.replace(".bias", ".weight")]
        return torch.zeros(weight.shape[0], dtype=weight.dtype)

    for hf_name, our_names in hf_name_map(config).items():
        tensors = [full_tensor(name) for name in our_names]
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        yield hf_name, (tensor.T if is_transposed(hf_name) else tensor).contiguous()


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
    language-model head, for which the transformers class has no place.

    Args:
        model: The model.
        directory: An existing directory.
        end_of_text_id: The end-of-text token.
        pad_token_id: The pad token; a classification model needs one, to find the last token of a text.
        eos_token_ids: The tokens that end a generated text. Default: `end_of_text_id`.
        labels: The names of the classification head's outputs, in order.
        problem_type: See `hf_config.to_hf_label_config`.
        gather: Returns the full tensor of a weight; called for one after the other.
    """
    config = model.config
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
    file_indices: dict[str, int] = {}  # tensor → its file
    total_bytes = 0
    for shard in iter_shards(iter_hf_tensors(config, weights, gather)):
        file_indices |= dict.fromkeys(shard, len(files))
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
        files.append(directory / f".{len(files)}.safetensors")
        save_file(shard, files[-1], metadata={"format": "pt"})
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        weight_map = {name: names[index] for name, index in file_indices.items()}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        atomic_write(directory / INDEX_FILENAME, to_json(index))
    return [path.rename(directory / name) for path, name in zip(files, names, strict=True)]


def iter_shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Group tensors to at most `MAX_SHARD_BYTES`. A shard is emptied when the next one is asked for."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > MAX_SHARD_BYTES:
            yield shard
            shard.clear()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


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
    config = load_config(directory)
    has_head = not config.n_labels and "lm_head.weight" in find_weight_files(directory)
    weights = dict(iter_weights(directory, replace(config, tied=config.tied and not has_head)))
    if config.tied and has_head:  # as in transformers, a head with other numbers than the embedding is not tied
        config = replace(config, tied=torch.equal(weights["head.weight"], weights["token_embedding.weight"]))
        if config.tied:
            del weights["head.weight"]
    return GPT.from_weights(config, weights).to(device)


def load_config(directory: Path) -> ModelConfig:
    """The configuration of the model in a directory, whose files are checked against its manifest. Raises as `load_model`."""
    if not (directory / "config.json").is_file():
        raise NextwordError(f"{directory}: no config.json, so this is not a model directory")
    config = hf_config.read_hf_config(directory / "config.json")
    if not (directory / MANIFEST).is_file():
        return config
    # The manifest has what the Hugging Face format cannot express: sinusoidal positions, and biases that do not exist.
    manifest = verify_manifest(directory, max_bytes=8 * config.parameters + MAX_OTHER_BYTES)
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
    if config.n_layers > len(files):  # before anything is made for each layer
        raise CorruptFileError(
            f"{directory}: a tensor is missing: config.json says {config.n_layers:,} layers, "
            f"and the files have {len(files):,} tensors"
        )
    names, prefix = hf_name_map(config), LAYOUTS[config.family].prefix
    known = {*names, "lm_head.weight"}  # a tied head may be stored, too
    known |= {name.removeprefix(prefix) for name in known}  # a base model is saved without the prefix
    own, full = meta_weights(directory, config)
    for hf_name, our_names in names.items():
        first_layer_names = [re.sub(r"^blocks\.\d+", "blocks.0", name) for name in our_names]
        shapes, is_own = [full[name].shape for name in first_layer_names], first_layer_names[0] in own
        key = hf_name if hf_name in files else hf_name.removeprefix(prefix)
        if key not in files:
            if is_own or our_names == ["position_embedding.weight"]:
                raise CorruptFileError(f"{directory}: the tensor {hf_name} is missing")
            continue
        rows = [shape[0] for shape in shapes]
        expected = [sum(rows), *shapes[0][1:]][:: -1 if is_transposed(hf_name) else 1]
        with safe_open(files[key], framework="pt") as file:
            tensor_slice = file.get_slice(key)
            shape, dtype = tensor_slice.get_shape(), tensor_slice.get_dtype()
            if list(shape) != expected:
                raise CorruptFileError(f"{files[key]}: {key} has the shape {shape}; config.json says {expected}")
            if dtype not in FLOAT_DTYPES:
                raise NextwordError(f"{files[key]}: {key} has the data type {dtype}, which is not supported")
            if is_own:
                tensor = tensor_slice[:].float()
                if not tensor.sum().isfinite():  # the sum of any that are not finite is not either
                    raise CorruptFileError(f"{files[key]}: {key} has values that are not finite, so no output would be")
                parts = torch.split(tensor.T if is_transposed(hf_name) else tensor, rows)
                yield from ((name, part.contiguous()) for name, part in zip(our_names, parts, strict=True))
    unexpected = sorted(name for name in files if name not in known and not name.endswith(IGNORED_BUFFERS))
    if unexpected:
        raise NextwordError(f"{directory}: unexpected tensors for this model_type: {', '.join(unexpected[:5])}")


def meta_weights(directory: Path, config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our tensors for one layer on the meta device: those of the model, and those that its transformers class holds.

    The transformers class of GPT-1 and GPT-2 has a position table and biases, also where the model does not.
    """
    own_config = replace(config, n_layers=1)
    full_config = own_config
    if hf_config.is_gpt(config.family):
        full_config = replace(own_config, positions="learned", attention_bias=True, feed_forward_bias=True)
    try:
        return GPT.on_meta(own_config).state_dict(), GPT.on_meta(full_config).state_dict()
    except RuntimeError as error:  # PyTorch: the number of bytes overflows
        raise CorruptFileError(f"{directory}: config.json has sizes that are too large for any model") from error


def find_weight_files(directory: Path) -> dict[str, Path]:
    """The safetensors file of each tensor: model.safetensors, or else the shards of an index. Raises as `load_model`."""
    index = directory / INDEX_FILENAME
    if (directory / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif index.is_file():
        weight_map = read_json_object(index, hf_config.MAX_JSON_BYTES).get("weight_map", {})
        if not is_json_object(weight_map) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CorruptFileError(f"{index}: weight_map does not give a file name for each tensor")
        names = sorted(set(weight_map.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise CorruptFileError(f"{index}: {outside[0]!r} is outside the directory")
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
